//! Accesses: the tokens of Runners, and those in kubeconfigs.

use tokio_util::sync::CancellationToken;

use super::{HttpError, Inner, Registry, check_name, mint_token, not_found};
use crate::base::secret::Secret;
use crate::control_plane::keys::Keys;
use crate::control_plane::model::{AccessKind, AccessToken};
use crate::control_plane::store::{Change, RowKind};

/// Kubeconfigs are listed for this long after they expire, seconds.
const RETENTION: i64 = 7 * 86_400;

impl Registry {
    /// A Runner's token, or one for a kubeconfig.
    ///
    /// # Errors
    /// A bad name or project, or a database that cannot be written.
    pub async fn add_access_token(
        &self,
        keys: &Keys,
        mut row: AccessToken,
    ) -> Result<(AccessToken, Secret), HttpError> {
        check_name(&row.name)?;
        row.project = self.project(&row.project)?.id;
        let prefix = if row.kind == AccessKind::Runner { "por" } else { "pok" };
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

    /// Revokes a Runner or kubeconfig, and the kubeconfigs that a Runner has made; their streams
    /// end.
    ///
    /// # Errors
    /// 404, or a database that cannot be written.
    pub async fn revoke_access_token(&self, id: &str) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            if !inner.access_tokens.contains_key(id) {
                return Err(not_found("runner", id));
            }
            inner.revoke_access_tokens(|row| row.id == id || row.maker.as_deref() == Some(id))
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

    /// The revocation of a Runner, if it may reach an agent's cluster now.
    pub fn runner_revocation(
        &self,
        agent: &str,
        runner: &str,
        now: i64,
    ) -> Option<CancellationToken> {
        let inner = self.inner();
        let row = inner.agents.get(agent).map(|e| &e.row).filter(|row| !row.revoked)?;
        let (access, revocation) = inner.access_tokens.get(runner)?;
        let reaches = access.kind == AccessKind::Runner
            && !access.revoked
            && access.project == row.project
            && access.expires_at.is_none_or(|at| at > now)
            && access.includes(&row.cluster_id);
        reaches.then(|| revocation.clone())
    }

    /// An access, also one that was revoked.
    pub fn access_token(&self, id: &str) -> Option<AccessToken> {
        self.inner().access_tokens.get(id).map(|a| a.0.clone())
    }
}

impl Inner {
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
    use super::*;
    use crate::contract::token::Role;

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
            created_at: 1,
            expires_at: None,
            revoked: false,
            maker,
        }
    }
}
