//! What administrators create and revoke: projects, enrolment tokens, other administrators.

use std::collections::BTreeMap;

use super::labels::check_labels;
use super::{
    HttpError, Inner, Principal, Registry, check_name, database_unavailable, mint_token, not_found,
};
use crate::base::secret::Secret;
use crate::control_plane::keys::{Keys, random_token};
use crate::control_plane::model::{Admin, Enrolment, Project};
use crate::control_plane::store::{Change, RowKind};
use tokio_util::sync::CancellationToken;

/// What an enrolment token is made of.
#[derive(Default)]
pub struct NewEnrolment<'a> {
    /// Name or id.
    pub project: &'a str,
    pub name: &'a str,
    /// Seconds.
    pub ttl: i64,
    /// How many agents it lets in; none: as many as come.
    pub uses: Option<u32>,
    /// Of the clusters that come with it.
    pub labels: BTreeMap<String, String>,
}

impl Registry {
    /// # Errors
    /// A name that is taken or invalid.
    pub async fn add_project(&self, name: &str, now: i64) -> Result<Project, HttpError> {
        check_name(name)?;
        let project = Project {
            id: self.random_id("p")?,
            name: name.into(),
            created_at: now,
            sealing_key: None,
        };
        let change = |inner: &mut Inner| {
            if inner.projects.values().any(|p| p.name == name) {
                return Err(HttpError::new(
                    409,
                    "name_taken",
                    format!("there is a project {name} already"),
                    None,
                ));
            }
            inner.projects.insert(project.id.clone(), project.clone());
            Ok((vec![Change::put(RowKind::Project, &project.id, &project)?], ()))
        };
        self.transact(change, |inner, ()| drop(inner.projects.remove(&project.id)), |_, ()| ())
            .await?;
        Ok(project)
    }

    pub fn projects(&self) -> Vec<Project> {
        self.inner().projects.values().cloned().collect()
    }

    /// The project of that name or id.
    ///
    /// # Errors
    /// 404.
    pub fn project(&self, name: &str) -> Result<Project, HttpError> {
        let inner = self.inner();
        let found = inner.projects.values().find(|p| p.name == name || p.id == name);
        found.cloned().ok_or_else(|| not_found("project", name))
    }

    pub(super) fn random_id(&self, kind: &str) -> Result<String, HttpError> {
        Ok(format!(
            "{kind}-{}",
            random_token()
                .map_err(|e| database_unavailable(&e))?
                .chars()
                .filter(char::is_ascii_alphanumeric)
                .take(12)
                .collect::<String>()
                .to_lowercase()
        ))
    }

    /// An enrolment token. Its text is returned once and stored nowhere.
    ///
    /// # Errors
    /// A bad name, project or label, or a database that cannot be written.
    pub async fn add_enrolment(
        &self,
        keys: &Keys,
        new: NewEnrolment<'_>,
        now: i64,
    ) -> Result<(Enrolment, Secret), HttpError> {
        let NewEnrolment { project, name, ttl, uses, labels } = new;
        let project = self.project(project)?;
        check_name(name)?;
        check_labels(&labels)?;
        let (token, hash) = mint_token(keys, "poe")?;
        let row = Enrolment {
            id: self.random_id("t")?,
            project: project.id,
            name: name.into(),
            hash,
            created_at: now,
            expires_at: now.saturating_add(ttl),
            uses_left: uses,
            revoked: false,
            labels,
        };
        let change = |inner: &mut Inner| {
            inner.insert_enrolment(row.clone());
            Ok::<_, HttpError>((vec![Change::put(RowKind::Enrolment, &row.id, &row)?], ()))
        };
        let undo = |inner: &mut Inner, ()| {
            inner.tokens.remove(&row.hash);
            inner.enrolments.remove(&row.id);
        };
        self.transact(change, undo, |_, ()| ()).await?;
        Ok((row, token))
    }

    pub fn enrolments(&self) -> Vec<Enrolment> {
        self.inner().enrolments.values().cloned().collect()
    }

    /// # Errors
    /// 404, or a database that cannot be written: then it stays valid.
    pub async fn revoke_enrolment(&self, id: &str) -> Result<(), HttpError> {
        let set = |inner: &mut Inner, revoked: bool| {
            let row = inner.enrolments.get_mut(id).ok_or_else(|| not_found("token", id))?;
            let before = std::mem::replace(&mut row.revoked, revoked);
            Ok::<_, HttpError>((vec![Change::put(RowKind::Enrolment, id, row)?], before))
        };
        let undo = |inner: &mut Inner, before: bool| drop(set(inner, before));
        self.transact(|inner| set(inner, true), undo, |_, _| ()).await
    }

    /// The principal of a subject, if it is still valid.
    pub fn resolve_subject(&self, subject: &str, now: i64) -> Option<Principal> {
        self.inner().resolve_subject(subject, now)
    }

    /// What ends the streams of a principal to an agent. It has come already where the agent's
    /// cluster is no longer within its reach.
    pub fn revocation_of(&self, principal: &Principal, agent: &str) -> CancellationToken {
        let mut inner = self.inner();
        let revocation = match principal {
            Principal::AccessToken(access) => match inner.access_tokens.get(&access.id) {
                Some((row, _)) if row.selector.is_some() => {
                    return inner.reaching(&access.id, agent).unwrap_or_else(|| {
                        let ended = CancellationToken::new();
                        ended.cancel();
                        ended
                    });
                }
                found => found.map(|a| &a.1),
            },
            Principal::Admin(name) => {
                inner.admins.values().find(|a| a.0.name == *name).map(|a| &a.1)
            }
            Principal::Enrolment(_) | Principal::Agent(_) | Principal::Local => None,
        };
        revocation.cloned().unwrap_or_default()
    }

    /// # Errors
    /// A name that is taken or invalid, or a database that cannot be written.
    pub async fn add_admin(
        &self,
        keys: &Keys,
        name: &str,
        now: i64,
    ) -> Result<(Admin, Secret), HttpError> {
        check_name(name)?;
        let (token, hash) = mint_token(keys, "pom")?;
        let row = Admin { id: self.random_id("m")?, name: name.into(), hash, created_at: now };
        let change = |inner: &mut Inner| {
            // an administrator owns things by its name; `local` stands for the local socket
            let subject = Principal::Admin(name.into()).subject();
            if subject == Principal::Local.subject()
                || inner.resolve_subject(&subject, now).is_some()
            {
                return Err(HttpError::new(
                    409,
                    "name_taken",
                    format!("there is an administrator {name} already"),
                    Some("choose another name"),
                ));
            }
            inner.insert_admin(row.clone());
            Ok((vec![Change::put(RowKind::Admin, &row.id, &row)?], ()))
        };
        let undo = |inner: &mut Inner, ()| {
            inner.tokens.remove(&row.hash);
            inner.admins.remove(&row.id);
        };
        self.transact(change, undo, |_, ()| ()).await?;
        Ok((row, token))
    }

    /// Removes an administrator: its token and its sessions on the page are invalid from now on.
    ///
    /// # Errors
    /// 404; 409 for the last one; a database that cannot be written: then nothing changes.
    pub async fn remove_admin(&self, id: &str) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            if inner.admins.len() == 1 && inner.admins.contains_key(id) {
                return Err(HttpError::new(
                    409,
                    "last_admin",
                    "this is the last administrator",
                    Some("make another one first"),
                ));
            }
            let admin = inner.admins.remove(id).ok_or_else(|| not_found("administrator", id))?;
            let subject = Principal::Admin(admin.0.name.clone()).subject();
            let (mut changes, made) =
                inner.revoke_access_tokens(|row| row.maker.as_ref() == Some(&subject))?;
            changes.push(Change::remove(RowKind::Admin, id));
            Ok((changes, (admin, made)))
        };
        let undo = |inner: &mut Inner, (admin, made): (Revocable<Admin>, Vec<String>)| {
            inner.admins.insert(id.into(), admin);
            inner.restore_access_tokens(made);
        };
        let done = |inner: &mut Inner,
                    ((row, revocation), made): (Revocable<Admin>, Vec<String>)| {
            inner.tokens.remove(&row.hash);
            revocation.cancel();
            inner.end_access_tokens(made);
        };
        self.transact(change, undo, done).await
    }

    pub fn admins(&self) -> Vec<Admin> {
        self.inner().admins.values().map(|a| a.0.clone()).collect()
    }
}

/// A row and its revocation.
type Revocable<T> = (T, CancellationToken);

impl Inner {
    /// The principal of that id or subject, if it may still do anything.
    pub(super) fn resolve_subject(&self, subject: &str, now: i64) -> Option<Principal> {
        if subject == Principal::Local.subject() {
            return Some(Principal::Local);
        }
        if subject.starts_with("admin:") {
            return self
                .admins
                .values()
                .map(|a| Principal::Admin(a.0.name.clone()))
                .find(|principal| principal.subject() == subject);
        }
        self.access_of(subject)
            .filter(|a| !a.revoked && a.expires_at.is_none_or(|at| at > now))
            .map(|a| Principal::AccessToken(Box::new(a.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::super::access::tests::{named, new_enrolment, row};
    use super::*;
    use crate::control_plane::store::Store;
    use crate::host::Host;

    #[tokio::test]
    async fn what_is_not_written_has_not_happened_and_no_stream_ends_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::load(&Host::new(dir.path(), None).state_dir("/s").unwrap(), 0).unwrap();
        let url = Secret::new(format!("sqlite:{}?mode=rwc", dir.path().join("t.db").display()));
        let store = Store::open(&url, "i").await.unwrap();
        let registry = Registry::load(store.clone(), None, 0).await.unwrap();
        registry.add_project("default", 1).await.unwrap();
        let (admin, token) = registry.add_admin(&keys, "eve", 1).await.unwrap();
        registry.add_admin(&keys, "other", 1).await.unwrap();
        let principal = registry.authenticate(&keys.token_hash(token.expose()), 1).unwrap();
        let (access, _) =
            registry.add_access_token(&keys, row(Some(principal.subject()))).await.unwrap();
        let (enrolment, _) = registry.add_enrolment(&keys, new_enrolment("t"), 1).await.unwrap();
        let streams = [
            registry.revocation_of(&principal, "a-1"),
            registry.revocation_of(&Principal::AccessToken(Box::new(access.clone())), "a-1"),
        ];
        let known = || {
            let revoked = registry.access_tokens().iter().filter(|a| a.revoked).count()
                + registry.enrolments().iter().filter(|e| e.revoked).count();
            (
                registry.projects().len(),
                registry.admins().len(),
                registry.access_tokens().len(),
                registry.enrolments().len(),
                revoked,
            )
        };
        assert_eq!(known(), (1, 2, 1, 1, 0));
        // the database takes nothing any more
        store.close().await;
        let code = |result: Result<(), HttpError>| result.unwrap_err().code;
        for error in [
            code(registry.add_project("more", 2).await.map(drop)),
            code(registry.add_admin(&keys, "more", 2).await.map(drop)),
            code(registry.add_access_token(&keys, named("more")).await.map(drop)),
            code(registry.add_enrolment(&keys, new_enrolment("more"), 2).await.map(drop)),
            code(registry.revoke_enrolment(&enrolment.id).await),
            code(registry.revoke_access_token(&access.id, 2).await),
            code(registry.remove_admin(&admin.id).await),
        ] {
            assert_eq!(error, "database_unavailable");
            assert_eq!(known(), (1, 2, 1, 1, 0));
        }
        assert!(registry.authenticate(&keys.token_hash(token.expose()), 2).is_ok());
        assert!(streams.iter().all(|stream| !stream.is_cancelled()));
        // and with one that does
        let store = Store::open(&url, "i").await.unwrap();
        let registry = Registry::load(store, None, 0).await.unwrap();
        let streams = [
            registry.revocation_of(&principal, "a-1"),
            registry.revocation_of(&Principal::AccessToken(Box::new(access)), "a-1"),
        ];
        registry.remove_admin(&admin.id).await.unwrap();
        assert!(
            streams.iter().all(CancellationToken::is_cancelled)
                && registry.access_tokens()[0].revoked
        );
        assert!(registry.authenticate(&keys.token_hash(token.expose()), 2).is_err());
        assert_eq!(
            registry
                .add_access_token(&keys, row(Some(principal.subject())))
                .await
                .unwrap_err()
                .code,
            "token_unknown"
        );
    }
}
