//! What may be asked for about an application.

use serde::Deserialize;

use super::Application;
use crate::base::text::is_dns_label;

/// Longest time of an operation that names none, seconds.
pub(crate) const DEFAULT_TIMEOUT_S: u64 = 300;

pub(crate) fn default_timeout_s() -> u64 {
    DEFAULT_TIMEOUT_S
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deploy {
    pub application: Application,
    /// Nothing is written: Kubernetes answers what it would do.
    #[serde(default)]
    pub dry_run: bool,
    /// Fields that another manager set become ours.
    #[serde(default)]
    pub take_over: bool,
    /// When the rollout fails, the revision that ran before is brought back.
    #[serde(default)]
    pub auto_rollback: bool,
    /// For all of it, the job before it included.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    pub namespace: String,
    pub name: String,
    /// The last other one that ran, where it is not given.
    #[serde(default)]
    pub revision: Option<u32>,
    /// Secrets as they were then; without it, those of today.
    #[serde(default)]
    pub with_secrets: bool,
    #[serde(default)]
    pub take_over: bool,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteApplication {
    pub namespace: String,
    pub name: String,
    /// The claims of its volumes too, with all data.
    #[serde(default)]
    pub volumes: bool,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

/// Named like its application, of which it has the surroundings; `delete` deletes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetCronJob {
    pub application: Application,
    /// `MINUTE HOUR DAY MONTH WEEKDAY`, or `@hourly` and the like.
    pub schedule: String,
    /// A name of the tz database, as `Europe/Berlin`; that of the controller where it is not given.
    #[serde(default)]
    pub time_zone: Option<String>,
    /// In place of the application's own.
    #[serde(default)]
    pub command: Vec<String>,
    #[serde(default)]
    pub args: Vec<String>,
    /// It does not run until this is false again.
    #[serde(default)]
    pub suspend: bool,
    /// Longest time of one run: one that hangs would hold up all that follow.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

/// One of: `namespace` and `name` of an application that is deployed, `application` that is
/// described, `namespace` and `cronjob` whose command is run now.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunJob {
    #[serde(default)]
    pub namespace: String,
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub application: Option<Box<Application>>,
    #[serde(default)]
    pub cronjob: String,
    /// In place of the application's own; not with `cronjob`.
    #[serde(default)]
    pub command: Vec<String>,
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

impl RunJob {
    pub(crate) fn check(&self) -> Result<(), String> {
        let (named, cron_job) = (!self.name.is_empty(), !self.cronjob.is_empty());
        match &self.application {
            Some(application) if self.namespace.is_empty() && !named && !cron_job => {
                application.check_for_job().map_err(|why| format!("spec.application.{why}"))
            }
            None if cron_job && !named && self.command.is_empty() && self.args.is_empty() => {
                check_named(&self.namespace, "cronjob", &self.cronjob)
            }
            None if !cron_job => check_named(&self.namespace, "name", &self.name),
            _ => Err("spec: one of application, namespace with name, namespace with cronjob \
                      (and no command)"
                .into()),
        }
    }
}

pub(crate) fn check_named(namespace: &str, field: &str, name: &str) -> Result<(), String> {
    for (field, value) in [("namespace", namespace), (field, name)] {
        if !is_dns_label(value) {
            return Err(format!("spec.{field}: 1 to 63 of a-z, 0-9 and -"));
        }
    }
    Ok(())
}
