//! What administrators make and take back: projects, enrolment tokens, Runners, other administrators.

use super::{Refused, Registry, Who, check_name, mint, no_such, refused, unwritten};
use crate::base::secret::Secret;
use crate::control_plane::keys::{Keys, fresh};
use crate::control_plane::model::{Access, AccessKind, Admin, Enrolment, Project};
use crate::control_plane::store::{Change, Kind};
use tokio_util::sync::CancellationToken;

/// Kubeconfigs are forgotten this long after their end, seconds: until then it can be seen who had one.
const KEPT: i64 = 7 * 86_400;

impl Registry {
    /// # Errors
    /// A name that is taken or cannot be one.
    pub async fn add_project(&self, name: &str, now: i64) -> Result<Project, Refused> {
        check_name(name)?;
        let project = Project { id: self.fresh_id("p")?, name: name.into(), created_at: now };
        {
            let mut inner = self.inner();
            if inner.projects.values().any(|p| p.name == name) {
                return Err(refused(409, "name_taken", format!("there is a project {name} already"), None));
            }
            inner.projects.insert(project.id.clone(), project.clone());
        }
        let written = self.put(Kind::Project, &project.id, &project).await;
        if written.is_err() {
            self.inner().projects.remove(&project.id);
        }
        written.map(|()| project)
    }

    pub fn projects(&self) -> Vec<Project> {
        self.inner().projects.values().cloned().collect()
    }

    /// The project of that name or id.
    ///
    /// # Errors
    /// 404.
    pub fn project(&self, name: &str) -> Result<Project, Refused> {
        let inner = self.inner();
        let found = inner.projects.values().find(|p| p.name == name || p.id == name);
        found.cloned().ok_or_else(|| no_such("project", name))
    }

    fn fresh_id(&self, kind: &str) -> Result<String, Refused> {
        Ok(format!(
            "{kind}-{}",
            fresh().map_err(|e| unwritten(&e))?.chars().filter(char::is_ascii_alphanumeric).take(12).collect::<String>().to_lowercase()
        ))
    }

    /// A token that lets agents in; the text is in nobody's hands but the caller's.
    ///
    /// # Errors
    /// A bad name or project, or no database.
    pub async fn add_enrolment(
        &self,
        keys: &Keys,
        project: &str,
        name: &str,
        ttl: i64,
        uses: Option<u32>,
        now: i64,
    ) -> Result<(Enrolment, Secret), Refused> {
        let project = self.project(project)?;
        check_name(name)?;
        let (token, hash) = mint(keys, "poe")?;
        let row = Enrolment {
            id: self.fresh_id("t")?,
            project: project.id,
            name: name.into(),
            hash,
            created_at: now,
            expires_at: now.saturating_add(ttl),
            uses_left: uses,
            revoked: false,
        };
        self.put(Kind::Enrolment, &row.id, &row).await?;
        self.inner().know_enrolment(row.clone());
        Ok((row, token))
    }

    pub fn enrolments(&self) -> Vec<Enrolment> {
        self.inner().enrolments.values().cloned().collect()
    }

    /// # Errors
    /// 404, or no database: then it stays good.
    pub async fn revoke_enrolment(&self, id: &str) -> Result<(), Refused> {
        let mut row = self.inner().enrolments.get(id).cloned().ok_or_else(|| no_such("token", id))?;
        row.revoked = true;
        self.put(Kind::Enrolment, id, &row).await?;
        self.inner().enrolments.insert(id.into(), row);
        Ok(())
    }

    /// A Runner's token, or one for a kubeconfig.
    ///
    /// # Errors
    /// A bad name or project, or no database.
    pub async fn add_access(&self, keys: &Keys, mut row: Access) -> Result<(Access, Secret), Refused> {
        check_name(&row.name)?;
        row.project = self.project(&row.project)?.id;
        let prefix = if row.kind == AccessKind::Runner { "por" } else { "pok" };
        let (token, hash) = mint(keys, prefix)?;
        (row.id, row.hash) = (self.fresh_id("r")?, hash);
        self.put(Kind::Access, &row.id, &row).await?;
        let gone = {
            let mut inner = self.inner();
            // whoever makes it may have been revoked meanwhile, with all that he had made by then
            let gone = row.maker.as_deref().is_some_and(|maker| inner.still(maker, row.created_at).is_none());
            row.revoked |= gone;
            inner.know_access(row.clone());
            gone
        };
        if gone {
            self.put(Kind::Access, &row.id, &row).await?;
            return Err(refused(401, "token_unknown", "the token was revoked", None));
        }
        Ok((row, token))
    }

    pub fn accesses(&self) -> Vec<Access> {
        self.inner().accesses.values().map(|a| a.0.clone()).collect()
    }

    /// Revokes a Runner or kubeconfig, and the kubeconfigs that a Runner has made; what they have open ends.
    ///
    /// # Errors
    /// 404, or no database.
    pub async fn revoke_access(&self, id: &str) -> Result<(), Refused> {
        if !self.inner().accesses.contains_key(id) {
            return Err(no_such("runner", id));
        }
        self.end_accesses(|row| row.id == id || row.maker.as_deref() == Some(id)).await
    }

    async fn end_accesses(&self, which: impl Fn(&Access) -> bool) -> Result<(), Refused> {
        let (rows, order) = {
            let inner = self.inner();
            let ended = inner.accesses.values().map(|a| &a.0).filter(|row| !row.revoked && which(row));
            let rows: Vec<Access> = ended.map(|row| Access { revoked: true, ..row.clone() }).collect();
            let changes = rows.iter().map(|row| Change::put(Kind::Access, &row.id, row)).collect::<anyhow::Result<_>>();
            (rows, self.store.order(changes.map_err(|e| unwritten(&e))?))
        };
        order.durable().await.map_err(|e| unwritten(&e))?;
        let mut inner = self.inner();
        for row in rows {
            if let Some(access) = inner.accesses.get_mut(&row.id) {
                access.0 = row;
                access.1.cancel();
            }
        }
        Ok(())
    }

    /// Forgets kubeconfigs whose time is long over.
    ///
    /// # Errors
    /// No database: they are forgotten next time.
    pub async fn tidy_accesses(&self, now: i64) -> anyhow::Result<()> {
        let (rows, order) = {
            let inner = self.inner();
            let over = |row: &&Access| row.kind == AccessKind::Kubeconfig && row.expires_at.is_some_and(|at| at + KEPT <= now);
            let rows: Vec<(String, String)> = inner.accesses.values().map(|a| &a.0).filter(over).map(|a| (a.id.clone(), a.hash.clone())).collect();
            if rows.is_empty() {
                return Ok(());
            }
            let changes = rows.iter().map(|(id, _)| Change::remove(Kind::Access, id)).collect();
            (rows, self.store.order(changes))
        };
        order.durable().await?;
        let mut inner = self.inner();
        for (id, hash) in rows {
            inner.tokens.remove(&hash);
            inner.accesses.remove(&id);
        }
        Ok(())
    }

    /// What ends when a Runner is revoked, if he reaches an agent's cluster now.
    pub fn runner_of(&self, agent: &str, runner: &str, now: i64) -> Option<CancellationToken> {
        let inner = self.inner();
        let row = inner.agents.get(agent).map(|e| &e.row).filter(|row| !row.revoked)?;
        let (access, over) = inner.accesses.get(runner)?;
        let reaches = access.kind == AccessKind::Runner
            && !access.revoked
            && access.project == row.project
            && access.expires_at.is_none_or(|at| at > now)
            && access.includes(&row.cluster_id);
        reaches.then(|| over.clone())
    }

    /// An access, also one that was revoked.
    pub fn access(&self, id: &str) -> Option<Access> {
        self.inner().accesses.get(id).map(|a| a.0.clone())
    }

    /// Whoever asked for something under this subject, if he still may.
    pub fn still(&self, subject: &str, now: i64) -> Option<Who> {
        self.inner().still(subject, now)
    }

    /// What ends when somebody is revoked.
    pub fn until_revoked(&self, who: &Who) -> CancellationToken {
        let inner = self.inner();
        let over = match who {
            Who::Access(access) => inner.accesses.get(&access.id).map(|a| &a.1),
            Who::Admin(name) => inner.admins.values().find(|a| a.0.name == *name).map(|a| &a.1),
            Who::Enrolment(_) | Who::Agent(_) | Who::Local => None,
        };
        over.cloned().unwrap_or_default()
    }

    /// # Errors
    /// A name that is taken or cannot be one, or no database.
    pub async fn add_admin(&self, keys: &Keys, name: &str, now: i64) -> Result<(Admin, Secret), Refused> {
        check_name(name)?;
        // what an administrator makes and does is his by his name; `local` is whoever can open the socket
        let subject = Who::Admin(name.into()).subject();
        if subject == Who::Local.subject() || self.still(&subject, now).is_some() {
            return Err(refused(409, "name_taken", format!("there is an administrator {name} already"), Some("choose another name")));
        }
        let (token, hash) = mint(keys, "pom")?;
        let row = Admin { id: self.fresh_id("m")?, name: name.into(), hash, created_at: now };
        self.put(Kind::Admin, &row.id, &row).await?;
        self.inner().know_admin(row.clone());
        Ok((row, token))
    }

    /// Forgets an administrator: his token and his sessions on the page are worth nothing from now on.
    ///
    /// # Errors
    /// 404; 409 for the last one; no database: then he stays.
    pub async fn remove_admin(&self, id: &str) -> Result<(), Refused> {
        let (row, order) = {
            let mut inner = self.inner();
            if inner.admins.len() == 1 && inner.admins.contains_key(id) {
                return Err(refused(409, "last_admin", "this is the last administrator", Some("make another one first")));
            }
            let (row, over) = inner.admins.remove(id).ok_or_else(|| no_such("administrator", id))?;
            over.cancel();
            (row, self.store.order(vec![Change::remove(Kind::Admin, id)]))
        };
        if let Err(error) = order.durable().await {
            self.inner().know_admin(row);
            return Err(unwritten(&error));
        }
        self.inner().tokens.remove(&row.hash);
        let subject = Who::Admin(row.name).subject();
        self.end_accesses(|made| made.maker.as_ref() == Some(&subject)).await
    }

    pub fn admins(&self) -> Vec<Admin> {
        self.inner().admins.values().map(|a| a.0.clone()).collect()
    }
}

impl super::Inner {
    fn still(&self, subject: &str, now: i64) -> Option<Who> {
        if subject == Who::Local.subject() {
            return Some(Who::Local);
        }
        if subject.starts_with("admin:") {
            return self.admins.values().map(|a| Who::Admin(a.0.name.clone())).find(|who| who.subject() == subject);
        }
        let access = self.accesses.get(subject).map(|a| &a.0);
        access.filter(|a| !a.revoked && a.expires_at.is_none_or(|at| at > now)).map(|a| Who::Access(Box::new(a.clone())))
    }
}
