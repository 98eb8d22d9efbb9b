//! Labels of clusters that are set here, what they select, and whose reach that changes.

use std::collections::BTreeMap;

use tokio_util::sync::CancellationToken;

use super::{ClusterView, HttpError, Inner, Principal, Registry, name_ambiguous, not_found};
use crate::contract::selector::{FACTS, MAX_LABELS, Selector, check_label};
use crate::control_plane::model::{Agent, ClusterLabels, Liveness};
use crate::control_plane::store::{Change, RowKind, Store};

pub(super) fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), HttpError> {
    let wrong = |why: String| HttpError::new(400, "bad_label", why, None);
    if labels.len() > MAX_LABELS {
        return Err(wrong(format!(
            "{MAX_LABELS} labels are the most that a cluster has from here"
        )));
    }
    labels.iter().try_for_each(|(key, value)| check_label(key, value).map_err(wrong))
}

pub(in crate::control_plane) fn parse_selector(text: &str) -> Result<Selector, HttpError> {
    Selector::parse(text).map_err(|why| HttpError::new(400, "bad_selector", why, None))
}

/// The selector of a right, as it is stored.
///
/// # Errors
/// 400, also for one that asks for what an agent says of itself.
pub(super) fn checked_selector(text: &str) -> Result<String, HttpError> {
    let selector = parse_selector(text)?;
    if let Some(key) = selector.keys().find(|key| *key != "id" && FACTS.contains(key)) {
        return Err(HttpError::new(
            400,
            "bad_selector",
            format!("{key} is what an agent says of its cluster: no right follows from it"),
            Some("set a label with `control-plane cluster label`, and select by that one"),
        ));
    }
    Ok(selector.to_string())
}

/// What to write when labels have changed.
pub(super) fn labels_change(row: &Agent) -> anyhow::Result<Change> {
    if row.labels.is_empty() {
        return Ok(Change::remove(RowKind::Labels, &row.id));
    }
    let labels = ClusterLabels {
        agent: row.id.clone(),
        labels: row.labels.clone(),
        registered_at: row.registered_at,
    };
    Change::put(RowKind::Labels, &row.id, &labels)
}

impl Registry {
    /// Sets labels of a cluster, or takes them away. Streams of accesses that no longer reach it
    /// end.
    ///
    /// # Errors
    /// 400 for what is no label, 404, or a database that cannot be written: then nothing changes.
    pub async fn set_labels(
        &self,
        cluster: &str,
        labels: BTreeMap<String, Option<String>>,
    ) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let id = inner.find(cluster, None)?.row.id.clone();
            let entry = inner.agents.get_mut(&id).ok_or_else(|| not_found("cluster", cluster))?;
            let mut changed = entry.row.labels.clone();
            for (key, value) in labels {
                match value {
                    Some(value) => drop(changed.insert(key, value)),
                    None => drop(changed.remove(&key)),
                }
            }
            check_labels(&changed)?;
            let former = std::mem::replace(&mut entry.row.labels, changed.clone());
            let changes = if former == changed { None } else { Some(labels_change(&entry.row)?) };
            Ok::<_, HttpError>((changes.into_iter().collect(), (id, former, changed)))
        };
        type Changed = (String, BTreeMap<String, String>, BTreeMap<String, String>);
        let undo = |inner: &mut Inner, (id, former, changed): Changed| {
            // what was changed since may have been written
            let entry = inner.agents.get_mut(&id).filter(|entry| entry.row.labels == changed);
            if let Some(entry) = entry {
                entry.row.labels = former;
                inner.end_unreached(&id);
            }
        };
        let done = |inner: &mut Inner, (id, ..): Changed| inner.end_unreached(&id);
        self.transact(change, undo, done).await
    }

    /// The clusters that a principal reaches, as it may see them.
    pub fn reached(&self, principal: &Principal, now: i64) -> Vec<ClusterView> {
        let reach = match principal {
            Principal::AccessToken(access) => Some(access.reach()),
            Principal::Admin(_) | Principal::Local => None,
            Principal::Enrolment(_) | Principal::Agent(_) => return Vec::new(),
        };
        let inner = self.inner();
        let entries = inner.agents.values();
        let reached = entries.filter(|e| reach.as_ref().is_none_or(|reach| reach(&e.row)));
        let view = |view: ClusterView| match principal.tenant() {
            Some(_) => view.for_tenant(),
            None => view,
        };
        reached.map(|e| view(e.view(now, self.started, false))).collect()
    }

    /// The ids of the clusters that a principal reaches and that a selector names, ordered by name
    /// and then id; without a selector all that it reaches. Those that were revoked are left out.
    pub(in crate::control_plane) fn select(
        &self,
        principal: &Principal,
        selector: Option<&Selector>,
        now: i64,
    ) -> Vec<String> {
        self.meant(principal, selector, now).into_iter().map(|c| c.id).collect()
    }

    /// The same as they are shown.
    pub(in crate::control_plane) fn meant(
        &self,
        principal: &Principal,
        selector: Option<&Selector>,
        now: i64,
    ) -> Vec<ClusterView> {
        let mut found = self.reached(principal, now);
        found.retain(|c| c.state != Liveness::Revoked && selector.is_none_or(|s| c.is_meant(s)));
        found.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        found
    }

    /// Clusters that a principal reaches, by their ids or names, in the order of the list.
    ///
    /// # Errors
    /// 404; 409 for a name that several have.
    pub(in crate::control_plane) fn named(
        &self,
        principal: &Principal,
        list: &[String],
        now: i64,
    ) -> Result<Vec<ClusterView>, HttpError> {
        let reached = self.meant(principal, None, now);
        let (mut ids, mut names) = (BTreeMap::new(), BTreeMap::<&str, Vec<&ClusterView>>::new());
        for cluster in &reached {
            ids.insert(cluster.id.as_str(), cluster);
            names.entry(&cluster.name).or_default().push(cluster);
        }
        let find = |wanted: &String| match (ids.get(wanted.as_str()), names.get(wanted.as_str())) {
            (Some(cluster), _) => Ok((*cluster).clone()),
            (None, Some(named)) => match named[..] {
                [cluster] => Ok(cluster.clone()),
                _ => Err(name_ambiguous(wanted, named.len())),
            },
            (None, None) => Err(not_found("cluster", wanted)),
        };
        list.iter().map(find).collect()
    }
}

impl Inner {
    /// Labels that were set before this start. Those of an agent that a version before labels has
    /// removed are nobody's, also where it has registered anew.
    pub(super) async fn load_labels(&mut self, store: &Store) -> anyhow::Result<()> {
        let mut left = Vec::new();
        for row in store.all::<ClusterLabels>(RowKind::Labels).await? {
            let entry = self.agents.get_mut(&row.agent);
            match entry.filter(|entry| entry.row.registered_at == row.registered_at) {
                Some(entry) => entry.row.labels = row.labels,
                None => left.push(Change::remove(RowKind::Labels, &row.agent)),
            }
        }
        if left.is_empty() { Ok(()) } else { store.write(left).await }
    }

    /// What ends the streams of an access to an agent; none where its cluster is out of reach.
    pub(super) fn reaching(&mut self, access: &str, agent: &str) -> Option<CancellationToken> {
        let (row, revocation) = self.access_tokens.get(access)?;
        let entry = self.agents.get_mut(agent)?;
        if !row.reach()(&entry.row) {
            return None;
        }
        if row.selector.is_none() {
            return Some(revocation.clone());
        }
        let accesses = &self.access_tokens;
        entry.selected.retain(|id, end| !end.is_cancelled() && accesses.contains_key(id));
        let end = entry.selected.entry(access.to_owned());
        Some(end.or_insert_with(|| revocation.child_token()).clone())
    }

    /// Ends the streams to an agent of those accesses whose selector no longer names its cluster.
    fn end_unreached(&mut self, agent: &str) {
        let Some(entry) = self.agents.get_mut(agent) else { return };
        let (row, accesses) = (&entry.row, &self.access_tokens);
        entry.selected.retain(|id, end| {
            let reaches = accesses.get(id).is_some_and(|(access, _)| access.reach()(row));
            if !reaches {
                end.cancel();
            }
            reaches
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::access::tests::{named, registry};
    use super::super::entry::Entry;
    use super::super::entry::tests::agent;
    use super::*;
    use crate::control_plane::model::{AccessToken, OperationRecord};
    use serde_json::json;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn changes(pairs: &[(&str, Option<&str>)]) -> BTreeMap<String, Option<String>> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), value.map(str::to_owned))).collect()
    }

    /// A project with the clusters c-1, c-2 and c-3, whose agents say that they are in production.
    async fn with_clusters(registry: &Registry) {
        let project = registry.add_project("default", 1).await.unwrap().id;
        for (n, name) in [("1", "b"), ("2", "a"), ("3", "b")] {
            let mut row = agent();
            (row.id, row.cluster_id) = (format!("a-{n}"), format!("c-{n}"));
            (row.project, row.cluster.name) = (project.clone(), name.into());
            row.cluster.labels = labels(&[("env", "prod"), ("rack", "7")]);
            row.cluster.provider = "aws".into();
            let change = Change::put(RowKind::Agent, &row.id, &row).unwrap();
            registry.store.write(vec![change]).await.unwrap();
            registry.inner().insert_agent(Entry::new(row));
        }
    }

    fn selected(text: &str) -> AccessToken {
        AccessToken { clusters: Some(Vec::new()), selector: Some(text.into()), ..named("selected") }
    }

    #[tokio::test]
    async fn what_an_agent_says_of_itself_gives_nobody_a_right_and_takes_none() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, keys) = registry(&dir).await;
        with_clusters(&registry).await;
        let add = async |row| registry.add_access_token(&keys, row).await.map(|(row, _)| row);
        let row = add(selected(" env == prod")).await.unwrap();
        assert_eq!(row.selector.as_deref(), Some("env=prod"));
        let principal = Principal::AccessToken(Box::new(row.clone()));
        let select = |text: Option<&str>| {
            let selector = text.map(|text| Selector::parse(text).unwrap());
            registry.select(&principal, selector.as_ref(), 101)
        };
        assert!(select(None).is_empty() && registry.check_access(&row, "c-1").is_err());
        assert!(registry.runner_revocation("a-1", &row.id, 2).is_none());
        assert!(registry.revocation_of(&principal, "a-1").is_cancelled());
        for cluster in ["c-1", "c-2", "c-3"] {
            registry.set_labels(cluster, changes(&[("env", Some("prod"))])).await.unwrap();
        }
        assert_eq!(select(None), ["c-2", "c-1", "c-3"]);
        // to look at, all count
        assert_eq!(select(Some("rack=7,name=b,provider=aws")), ["c-1", "c-3"]);
        assert!(select(Some("region")).is_empty());
        let streams =
            [registry.revocation_of(&principal, "a-1"), registry.revocation_of(&principal, "a-2")];
        let visitor = registry.runner_revocation("a-1", &row.id, 2).unwrap();
        let operation: OperationRecord = serde_json::from_value(json!({"agent": "a-1",
            "operation": {"id": "o-1", "state": "running", "subject": row.id}, "key": "k",
            "request": "", "sealed": null, "asked_ms": 0, "expires_at": 9, "changed_at": 0}))
        .unwrap();
        registry.put_operation(operation, 2).await.unwrap();
        assert!(registry.running_for_revoked().is_empty());
        // a label that decides nothing ends no stream
        registry.set_labels("c-1", changes(&[("tier", Some("web"))])).await.unwrap();
        assert!(!streams[0].is_cancelled() && !visitor.is_cancelled());
        registry.set_labels("c-1", changes(&[("env", None)])).await.unwrap();
        assert!(streams[0].is_cancelled() && visitor.is_cancelled() && !streams[1].is_cancelled());
        assert!(registry.check_access(&row, "c-1").is_err());
        // what runs for it there is cancelled
        assert_eq!(registry.running_for_revoked().len(), 1);
        assert_eq!(select(None), ["c-2", "c-3"]);
        // back in reach there are new ones, and they go with the access as well
        registry.set_labels("c-1", changes(&[("env", Some("prod"))])).await.unwrap();
        let again = registry.revocation_of(&principal, "a-1");
        assert!(!again.is_cancelled());
        registry.revoke_access_token(&row.id, 2).await.unwrap();
        assert!(again.is_cancelled() && streams[1].is_cancelled());
        // and nobody gets a right that an agent decides about
        for wrong in ["provider=aws", "env=prod,zone!=a", "name in (a,b)", "", "env=prod,", "*"] {
            assert_eq!(add(selected(wrong)).await.unwrap_err().code, "bad_selector", "{wrong}");
        }
        let by_id = add(selected("id in (c-3,c-9)")).await.unwrap();
        assert!(registry.check_access(&by_id, "c-3").is_ok());
        assert!(registry.check_access(&by_id, "c-2").is_err());
        // one of a later version reaches nothing here, and this one nothing in a version before
        let later = AccessToken { selector: Some("env~prod".into()), ..row.clone() };
        assert!(registry.check_access(&later, "c-2").is_err());
        let before = AccessToken { selector: None, ..row };
        assert!(registry.check_access(&before, "c-2").is_err());
    }

    #[tokio::test]
    async fn a_tenant_selects_by_what_it_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, _) = registry(&dir).await;
        with_clusters(&registry).await;
        let project = registry.project("default").unwrap().id;
        let row = AccessToken { tenant: Some("acme".into()), project, ..named("t") };
        let select = |text: &str| {
            let principal = Principal::AccessToken(Box::new(row.clone()));
            registry.select(&principal, Some(&Selector::parse(text).unwrap()), 101)
        };
        assert_eq!(select("name=a"), ["c-2"]);
        assert!(select("provider=aws").is_empty() && select("env=prod").is_empty());
    }

    #[tokio::test]
    async fn labels_are_kept_beside_the_agent_and_go_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, _) = registry(&dir).await;
        with_clusters(&registry).await;
        let set = async |pairs: &[(&str, Option<&str>)]| {
            registry.set_labels("c-1", changes(pairs)).await.map_err(|error| error.code)
        };
        let shown = |registry: &Registry| {
            let cluster = registry.cluster("c-1", None, 101).unwrap();
            (cluster.labels, cluster.labels_set)
        };
        set(&[("env", Some("test")), ("team", Some("a"))]).await.unwrap();
        let all = labels(&[("env", "test"), ("rack", "7"), ("team", "a")]);
        assert_eq!(shown(&registry), (all.clone(), vec!["env".to_owned(), "team".to_owned()]));
        // all of it or nothing
        for wrong in [("name", Some("x")), ("a b", Some("x")), ("a", Some("x y")), ("", Some(""))] {
            assert_eq!(set(&[("env", None), wrong]).await, Err("bad_label"), "{wrong:?}");
        }
        let keys: Vec<String> = (0..=MAX_LABELS).map(|n| format!("k{n}")).collect();
        let many: Vec<(&str, Option<&str>)> =
            keys.iter().map(|key| (key.as_str(), Some("v"))).collect();
        assert_eq!(set(&many).await, Err("bad_label"));
        let unknown = registry.set_labels("nope", changes(&[])).await.unwrap_err();
        assert_eq!(unknown.code, "not_found");
        assert_eq!(shown(&registry).0, all);
        // a version before labels writes the agent's row without them
        let row = registry.inner().agents["a-1"].row.clone();
        let before = Change::put(RowKind::Agent, "a-1", &row).unwrap();
        let nobodys = |agent: &str| {
            let labels = labels(&[("env", "prod")]);
            let row = ClusterLabels { agent: agent.into(), labels, registered_at: 1 };
            Change::put(RowKind::Labels, agent, &row).unwrap()
        };
        // nor are those of before it was removed and registered again under such a version
        let changes_of_before = vec![before, nobodys("a-9"), nobodys("a-2")];
        registry.store.write(changes_of_before).await.unwrap();
        let store = registry.store.clone();
        let registry = Registry::load(store.clone(), None, 0).await.unwrap();
        assert_eq!(shown(&registry).0, all);
        assert!(registry.cluster("c-2", None, 101).unwrap().labels_set.is_empty());
        let kept = async || store.all::<ClusterLabels>(RowKind::Labels).await.unwrap().len();
        assert_eq!(kept().await, 1);
        registry.set_labels("c-1", changes(&[("env", None), ("team", None)])).await.unwrap();
        assert_eq!(kept().await, 0);
        assert_eq!(shown(&registry).0["env"], "prod");
        registry.set_labels("c-1", changes(&[("env", Some("x"))])).await.unwrap();
        registry.remove_agent("a-1", 2).await.unwrap();
        assert_eq!(kept().await, 0);
    }

    #[tokio::test]
    async fn labels_that_are_not_written_are_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, keys) = registry(&dir).await;
        with_clusters(&registry).await;
        registry.set_labels("c-1", changes(&[("env", Some("prod"))])).await.unwrap();
        let (row, _) = registry.add_access_token(&keys, selected("env=prod")).await.unwrap();
        let principal = Principal::AccessToken(Box::new(row.clone()));
        let stream = registry.revocation_of(&principal, "a-1");
        registry.store.clone().close().await;
        let failed = registry.set_labels("c-1", changes(&[("env", None)])).await.unwrap_err();
        assert_eq!(failed.code, "database_unavailable");
        assert!(registry.check_access(&row, "c-1").is_ok() && !stream.is_cancelled());
    }
}
