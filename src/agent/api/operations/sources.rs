//! The Secrets and ConfigMaps that an application names: where its config sets keep their keys.

use serde_json::Value;

use super::executor::Executor;
use super::requests::{ExecutionError, failed_for};
use crate::base::json;
use crate::base::order;
use crate::contract::application::{Application, ConfigSource};
use crate::kubernetes::application::{ConfigSets, sources};
use crate::kubernetes::config_set::{ConfigKind, ConfigSet};
use crate::kubernetes::pod_references::current;

fn kind_of(source: &ConfigSource) -> (ConfigKind, &str) {
    match source {
        ConfigSource::Secret(name) => (ConfigKind::Secret, name),
        ConfigSource::Config(name) => (ConfigKind::ConfigMap, name),
    }
}

impl Executor<'_> {
    /// The config sets among what an application names. A key that one of them lacks is found before
    /// anything is changed; of what is not ours nobody but the kubelet knows.
    pub(super) async fn config_sets(
        &mut self,
        application: &Application,
    ) -> Result<ConfigSets, ExecutionError> {
        let mut sets = ConfigSets::new();
        for (source, keys) in sources(application) {
            let (kind, name) = kind_of(&source);
            let Some((inventory, _)) = self.inventory(kind, &application.namespace, name).await?
            else {
                continue;
            };
            if let Some(key) = keys.iter().find(|key| inventory.object_of(key).is_none()) {
                let known: Vec<&str> = inventory.keys().collect();
                return failed_for(
                    "config_missing",
                    format!(
                        "{} {}/{name} has no key {key}; it has {}",
                        kind.object_kind(),
                        application.namespace,
                        known.join(", ")
                    ),
                );
            }
            let objects = inventory
                .keys()
                .filter_map(|key| Some((key.to_owned(), inventory.object_of(key)?.to_owned())));
            sets.insert(source, order::map(objects));
        }
        Ok(sets)
    }

    /// Has objects of an application refer to the current versions of its config sets: of secrets
    /// alone for a former revision, as those of then may be known to others, and no longer be valid.
    pub(super) async fn with_current(
        &mut self,
        application: &Value,
        mut objects: Vec<Value>,
        secrets_alone: bool,
    ) -> Result<Vec<Value>, ExecutionError> {
        let Ok(application) = json::fields::<Application>(application.clone()) else {
            return Ok(objects);
        };
        for source in sources(&application).into_keys() {
            let (kind, name) = kind_of(&source);
            if secrets_alone && kind != ConfigKind::Secret {
                continue;
            }
            let namespace = application.namespace.as_str();
            let Some((inventory, _)) = self.inventory(kind, namespace, name).await? else {
                continue;
            };
            let set = ConfigSet { kind, namespace, name };
            for object in &mut objects {
                if let Some(pod) = object.pointer_mut("/spec/template/spec") {
                    *pod = current(pod.take(), set, &inventory);
                }
                let shown = object.pointer_mut("/spec/tls/0/secretName");
                if let (Some(shown), Some(wanted)) = (shown, inventory.object_of("tls.crt"))
                    && kind == ConfigKind::Secret
                    && shown.as_str().is_some_and(|name| set.is_version(name))
                {
                    *shown = wanted.into();
                }
            }
        }
        Ok(objects)
    }
}
