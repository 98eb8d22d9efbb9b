//! Accesses: the tokens of Runners and users, and those in kubeconfigs.

use tokio_util::sync::CancellationToken;

use super::labels::checked_selector;
use super::{HttpError, Inner, Registry, check_name, mint_token, not_found};
use crate::base::secret::Secret;
use crate::control_plane::keys::Keys;
use crate::control_plane::model::{AccessKind, AccessToken, USER_PREFIX, user_subject};
use crate::control_plane::store::{Change, RowKind};

/// Kubeconfigs are listed for this long after they expire, seconds.
const RETENTION: i64 = 7 * 86_400;
/// The most kubeconfigs of one maker that open something.
const MAX_KUBECONFIGS: usize = 50;

impl Registry {
    /// A token of a Runner or user, or one for a kubeconfig. Its clusters may be given by name; the
    /// name of a Runner or user is free again once it is revoked or has expired.
    ///
    /// # Errors
    /// A bad name, project, cluster or selector, a Runner's name that is taken in its project, a user's that
    /// is taken in any, more kubeconfigs than one maker may have, or a database that cannot be
    /// written.
    pub async fn add_access_token(
        &self,
        keys: &Keys,
        mut row: AccessToken,
    ) -> Result<(AccessToken, Secret), HttpError> {
        check_name(&row.name)?;
        if row.person && row.name.contains('/') {
            let hint = Some("it stands in paths of the API: take - or . in its place");
            return Err(HttpError::new(400, "bad_name", "a user's name has no /", hint));
        }
        row.project = self.project(&row.project)?.id;
        if let Some(selector) = &row.selector {
            row.selector = Some(checked_selector(selector)?);
        }
        if let Some(clusters) = &mut row.clusters {
            let inner = self.inner();
            for cluster in clusters {
                *cluster = inner.find(cluster, Some(&row.project))?.row.cluster_id.clone();
            }
        }
        let prefix = match (row.kind, row.person) {
            (AccessKind::Kubeconfig, _) => "pok",
            (AccessKind::Runner, true) => "pou",
            (AccessKind::Runner, false) => "por",
        };
        let (token, hash) = mint_token(keys, prefix)?;
        (row.id, row.hash) = (self.random_id("r")?, hash);
        let change = |inner: &mut Inner| {
            // its maker may have been revoked meanwhile, with all that it had made by then
            if row
                .maker
                .as_deref()
                .is_some_and(|maker| inner.resolve_subject(maker, row.created_at).is_none())
            {
                return Err(HttpError::new(401, "token_unknown", "the token was revoked", None));
            }
            inner.check_free(&row)?;
            inner.check_kubeconfigs(&row)?;
            inner.insert_access_token(row.clone());
            Ok((vec![Change::put(RowKind::Access, &row.id, &row)?], ()))
        };
        let undo = |inner: &mut Inner, ()| {
            inner.tokens.remove(&row.hash);
            inner.access_tokens.remove(&row.id);
        };
        self.transact(change, undo, |_, ()| ()).await?;
        Ok((row, token))
    }

    pub fn access_tokens(&self) -> Vec<AccessToken> {
        self.inner().access_tokens.values().map(|a| a.0.clone()).collect()
    }

    /// Revokes a Runner by id or name, a user by `user:NAME`, or a kubeconfig by id, and the
    /// kubeconfigs that it made; their streams end.
    ///
    /// # Errors
    /// 404; 409 for a name that several Runners have; a database that cannot be written.
    pub async fn revoke_access_token(&self, id: &str, now: i64) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let id = inner.access_id(id, now)?;
            inner.revoke_access_tokens(|row| row.id == id || row.maker.as_ref() == Some(&id))
        };
        self.transact(change, Inner::restore_access_tokens, Inner::end_access_tokens).await
    }

    /// Removes kubeconfigs that expired long ago.
    ///
    /// # Errors
    /// When the database cannot be written; the next call tries again.
    pub async fn tidy_access_tokens(&self, now: i64) -> anyhow::Result<()> {
        let change = |inner: &mut Inner| {
            let expired = |row: &AccessToken| {
                row.kind == AccessKind::Kubeconfig
                    && row.expires_at.is_some_and(|at| at + RETENTION <= now)
            };
            let ids: Vec<String> = inner
                .access_tokens
                .values()
                .filter(|a| expired(&a.0))
                .map(|a| a.0.id.clone())
                .collect();
            let changes = ids.iter().map(|id| Change::remove(RowKind::Access, id)).collect();
            Ok((changes, ids))
        };
        let done = |inner: &mut Inner, ids: Vec<String>| {
            for (row, _) in ids.iter().filter_map(|id| inner.access_tokens.remove(id)) {
                inner.tokens.remove(&row.hash);
            }
        };
        self.transact(change, |_, _| (), done).await
    }

    /// What ends the streams of a Runner to an agent, if it may reach its cluster now.
    pub fn runner_revocation(
        &self,
        agent: &str,
        runner: &str,
        now: i64,
    ) -> Option<CancellationToken> {
        let mut inner = self.inner();
        let (access, _) = inner.access_tokens.get(runner)?;
        let lives = access.kind == AccessKind::Runner
            && !access.revoked
            && access.expires_at.is_none_or(|at| at > now)
            && inner.agents.get(agent).is_some_and(|e| !e.row.revoked);
        if lives { inner.reaching(runner, agent) } else { None }
    }

    /// The access of that id or subject, also one that was revoked.
    pub fn access_token(&self, text: &str) -> Option<AccessToken> {
        self.inner().access_of(text).cloned()
    }
}

impl Inner {
    /// The access of that id or subject, also one that was revoked: of the subject of a user the
    /// one that counts now.
    pub(super) fn access_of(&self, text: &str) -> Option<&AccessToken> {
        if !text.starts_with(USER_PREFIX) {
            return self.access_tokens.get(text).map(|(row, _)| row);
        }
        let rows = self.access_tokens.values().map(|(row, _)| row);
        rows.filter(|row| row.person && row.subject() == text)
            .max_by_key(|row| (!row.revoked, row.created_at))
    }

    /// # Errors
    /// 409 for a name that another Runner of the project, or another user, has.
    fn check_free(&self, row: &AccessToken) -> Result<(), HttpError> {
        let (name, now) = (&row.name, row.created_at);
        let taken = |message: String, hint| Err(HttpError::new(409, "name_taken", message, hint));
        match (row.kind, row.person) {
            // operations and kubeconfigs of users are told apart by their names
            (AccessKind::Runner, true) if self.resolve_subject(&row.subject(), now).is_some() => {
                let hint = Some("choose another name, or revoke that user first");
                taken(format!("there is a user {name} already"), hint)
            }
            (AccessKind::Runner, false)
                if self.runners_called(name, now).any(|other| other.project == row.project) =>
            {
                let hint = Some("choose another name, or revoke that Runner first");
                taken(format!("its project has a Runner {name} already"), hint)
            }
            _ => Ok(()),
        }
    }

    /// # Errors
    /// 429 for one more kubeconfig than its maker may have.
    fn check_kubeconfigs(&self, row: &AccessToken) -> Result<(), HttpError> {
        let now = row.created_at;
        let lives = |other: &&AccessToken| {
            other.kind == AccessKind::Kubeconfig
                && other.maker == row.maker
                && !other.revoked
                && other.expires_at.is_none_or(|at| at > now)
        };
        let rows = self.access_tokens.values().map(|(row, _)| row);
        if row.kind != AccessKind::Kubeconfig
            || row.maker.is_none()
            || rows.filter(lives).count() < MAX_KUBECONFIGS
        {
            return Ok(());
        }
        Err(HttpError::new(
            429,
            "too_many_kubeconfigs",
            format!("this caller has {MAX_KUBECONFIGS} kubeconfigs that are valid"),
            Some(
                "use one of them, or ask for a shorter time (ttl_s): they end by themselves; an \
                 administrator revokes one by its id, `pipeops control-plane runner list` shows it",
            ),
        ))
    }

    /// Runners of that name, in any project, that are neither revoked nor expired.
    fn runners_called(&self, name: &str, now: i64) -> impl Iterator<Item = &AccessToken> {
        self.access_tokens.values().map(|(row, _)| row).filter(move |row| {
            row.kind == AccessKind::Runner
                && !row.person
                && row.name == name
                && !row.revoked
                && row.expires_at.is_none_or(|at| at > now)
        })
    }

    /// The id of an access: `text` itself, that of the user whom it names, or of the one Runner of
    /// this name.
    fn access_id(&self, text: &str, now: i64) -> Result<String, HttpError> {
        if self.access_tokens.contains_key(text) {
            return Ok(text.to_owned());
        }
        if let Some(name) = text.strip_prefix(USER_PREFIX) {
            let user = self.access_of(&user_subject(name)).filter(|row| !row.revoked);
            return user.map(|row| row.id.clone()).ok_or_else(|| not_found("user", name));
        }
        let named: Vec<&AccessToken> = self.runners_called(text, now).collect();
        match named[..] {
            [row] => Ok(row.id.clone()),
            [] => Err(not_found("runner", text)),
            _ => {
                let ids: Vec<String> =
                    named.iter().map(|row| format!("{} in {}", row.id, row.project)).collect();
                Err(HttpError::new(
                    409,
                    "name_ambiguous",
                    format!("{} Runners are called {text}: {}", named.len(), ids.join(", ")),
                    Some("use the id"),
                ))
            }
        }
    }

    /// Revokes accesses; returns what to write, and their ids.
    pub(super) fn revoke_access_tokens(
        &mut self,
        which: impl Fn(&AccessToken) -> bool,
    ) -> Result<(Vec<Change>, Vec<String>), HttpError> {
        let (mut changes, mut ids) = (Vec::new(), Vec::new());
        for (row, _) in
            self.access_tokens.values_mut().filter(|(row, _)| !row.revoked && which(row))
        {
            row.revoked = true;
            changes.push(Change::put(RowKind::Access, &row.id, row)?);
            ids.push(row.id.clone());
        }
        Ok((changes, ids))
    }

    pub(super) fn restore_access_tokens(&mut self, ids: Vec<String>) {
        for id in ids {
            if let Some((row, _)) = self.access_tokens.get_mut(&id) {
                row.revoked = false;
            }
        }
    }

    /// Ends the streams of revoked accesses.
    pub(super) fn end_access_tokens(&mut self, ids: Vec<String>) {
        for (_, revocation) in ids.iter().filter_map(|id| self.access_tokens.get(id)) {
            revocation.cancel();
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::admin::NewEnrolment;
    use super::*;
    use crate::contract::token::Role;
    use crate::control_plane::store::Store;
    use crate::host::Host;

    /// A Runner that may only look.
    pub(in crate::control_plane::registry) fn row(maker: Option<String>) -> AccessToken {
        AccessToken {
            id: String::new(),
            project: "default".into(),
            name: "ci".into(),
            kind: AccessKind::Runner,
            hash: String::new(),
            role: Role::Viewer,
            clusters: None,
            namespaces: None,
            tenant: None,
            created_at: 1,
            expires_at: None,
            revoked: false,
            maker,
            person: false,
            selector: None,
            jobs: false,
        }
    }

    pub(in crate::control_plane::registry) fn new_enrolment(name: &str) -> NewEnrolment<'_> {
        NewEnrolment { project: "default", name, ttl: 60, ..NewEnrolment::default() }
    }

    pub(in crate::control_plane::registry) fn named(name: &str) -> AccessToken {
        AccessToken { name: name.into(), ..row(None) }
    }

    /// With nothing in it, and keys of its own.
    pub(in crate::control_plane::registry) async fn registry(
        dir: &tempfile::TempDir,
    ) -> (Registry, Keys) {
        let keys = Keys::load(&Host::new(dir.path(), None).state_dir("/s").unwrap(), 0).unwrap();
        let url = Secret::new(format!("sqlite:{}?mode=rwc", dir.path().join("t.db").display()));
        let store = Store::open(&url, "i").await.unwrap();
        (Registry::load(store, None, 0).await.unwrap(), keys)
    }

    #[tokio::test]
    async fn a_runner_is_called_as_no_other_of_its_project_and_revoked_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, keys) = registry(&dir).await;
        registry.add_project("default", 1).await.unwrap();
        registry.add_project("other", 1).await.unwrap();
        let add = async |row| registry.add_access_token(&keys, row).await.map(|(row, _)| row);
        let code = |result: Result<(), HttpError>| result.unwrap_err().code;
        let first = add(named("ci")).await.unwrap();
        assert_eq!(code(add(named("ci")).await.map(drop)), "name_taken");
        // a kubeconfig is no Runner, another project has names of its own
        add(AccessToken { kind: AccessKind::Kubeconfig, ..named("ci") }).await.unwrap();
        let other = add(AccessToken { project: "other".into(), ..named("ci") }).await.unwrap();
        let ambiguous = registry.revoke_access_token("ci", 2).await.unwrap_err();
        assert_eq!(ambiguous.code, "name_ambiguous");
        assert!(
            ambiguous.message.contains(&first.id) && ambiguous.message.contains(&other.id),
            "{}",
            ambiguous.message
        );
        registry.revoke_access_token(&other.id, 2).await.unwrap();
        registry.revoke_access_token("ci", 2).await.unwrap();
        assert!(registry.access_token(&first.id).unwrap().revoked);
        assert_eq!(code(registry.revoke_access_token("ci", 2).await), "not_found");
        // then the name is free, also that of one whose time is over
        add(AccessToken { expires_at: Some(5), ..named("ci") }).await.unwrap();
        add(AccessToken { created_at: 5, ..named("ci") }).await.unwrap();
        // and its clusters must be there
        let nowhere = AccessToken { clusters: Some(vec!["nope".into()]), ..named("more") };
        assert_eq!(code(add(nowhere).await.map(drop)), "not_found");
    }

    #[tokio::test]
    async fn a_caller_has_so_many_kubeconfigs_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, keys) = registry(&dir).await;
        registry.add_project("default", 1).await.unwrap();
        let add = async |row| registry.add_access_token(&keys, row).await.map(|(row, _)| row);
        let (one, other) = (add(named("one")).await.unwrap(), add(named("other")).await.unwrap());
        let kubeconfig = |maker: &AccessToken, created_at| AccessToken {
            kind: AccessKind::Kubeconfig,
            maker: Some(maker.id.clone()),
            created_at,
            expires_at: Some(5),
            ..named("k")
        };
        let first = add(kubeconfig(&one, 1)).await.unwrap();
        for _ in 1..MAX_KUBECONFIGS {
            add(kubeconfig(&one, 1)).await.unwrap();
        }
        let refused = add(kubeconfig(&one, 1)).await.unwrap_err();
        assert_eq!((refused.status, refused.code), (429, "too_many_kubeconfigs"));
        add(kubeconfig(&other, 1)).await.unwrap();
        // what is revoked or has expired makes room
        registry.revoke_access_token(&first.id, 2).await.unwrap();
        add(kubeconfig(&one, 2)).await.unwrap();
        assert_eq!(add(kubeconfig(&one, 2)).await.unwrap_err().code, "too_many_kubeconfigs");
        add(kubeconfig(&one, 5)).await.unwrap();
    }

    #[tokio::test]
    async fn a_user_is_one_of_a_name_and_goes_with_the_kubeconfigs_that_it_made() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, keys) = registry(&dir).await;
        registry.add_project("default", 1).await.unwrap();
        registry.add_project("other", 1).await.unwrap();
        let add = async |row| registry.add_access_token(&keys, row).await;
        let user = |name: &str| AccessToken { person: true, ..named(name) };
        let (eve, token) = add(user("eve")).await.unwrap();
        assert!(token.expose().starts_with("pou_"));
        let principal = registry.authenticate(&keys.token_hash(token.expose()), 2).unwrap();
        assert_eq!(principal.subject(), "user:eve");
        assert!(registry.resolve_subject("user:eve", 2).is_some());
        assert_eq!(add(user("a/b")).await.unwrap_err().code, "bad_name");
        // in no project is there another one; a Runner of the name is something else
        let again = add(AccessToken { project: "other".into(), ..user("eve") }).await;
        assert_eq!(again.unwrap_err().code, "name_taken");
        let (runner, _) = add(named("eve")).await.unwrap();
        let kubeconfig =
            AccessToken { kind: AccessKind::Kubeconfig, maker: Some(principal.id()), ..named("k") };
        let (kubeconfig, _) = add(kubeconfig).await.unwrap();
        registry.revoke_access_token("user:eve", 2).await.unwrap();
        let revoked = |id: &str| registry.access_token(id).unwrap().revoked;
        assert!(revoked(&eve.id) && revoked(&kubeconfig.id) && !revoked(&runner.id));
        assert!(revoked("user:eve") && registry.resolve_subject("user:eve", 2).is_none());
        let unknown = registry.revoke_access_token("user:eve", 2).await.unwrap_err();
        assert_eq!((unknown.status, unknown.code), (404, "not_found"));
        // who comes under the name later is the one who counts
        let (later, _) = add(user("eve")).await.unwrap();
        assert_eq!(registry.access_token("user:eve").unwrap().id, later.id);
        // and the one before makes nothing any more under that name
        let late = AccessToken { maker: Some(eve.id.clone()), ..named("l") };
        assert_eq!(add(late).await.unwrap_err().code, "token_unknown");
        // as a version before wrote it, and reads it
        let text = serde_json::to_string(&runner).unwrap();
        assert!(!text.contains("person") && !text.contains("tenant"), "{text}");
        let read = serde_json::from_str::<AccessToken>(&text).unwrap();
        assert!(!read.person && read.tenant.is_none());
    }
}
