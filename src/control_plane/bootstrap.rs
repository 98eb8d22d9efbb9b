//! The first start: a project and the first administrator.

use std::sync::atomic::Ordering::Relaxed;

use super::clock::now;
use super::error::HttpError;
use super::registry::NewEnrolment;
use super::scope::DAY;
use super::state::ControlPlane;

/// File with the first administrator's token, until it is used.
const BOOTSTRAP_TOKEN: &str = "admin-token";

impl ControlPlane {
    /// Adds the first project and the first administrator where there are none.
    pub(super) async fn bootstrap(&self, show: Option<fn(&str, &str)>) -> anyhow::Result<()> {
        let failed = |r: HttpError| anyhow::anyhow!("{}", r.message);
        if self.registry().projects().is_empty() {
            self.registry().add_project("default", now()).await.map_err(failed)?;
        }
        let waiting = self.inner.state.read(BOOTSTRAP_TOKEN)?.is_some();
        self.inner.bootstrap_token_exists.store(waiting, Relaxed);
        if !self.registry().admins().is_empty() {
            return Ok(());
        }
        // the administrator comes last: if this fails before, the next start does it again
        let line = match show {
            Some(_) => {
                let first = NewEnrolment {
                    project: "default",
                    name: "first",
                    ttl: DAY,
                    uses: Some(1),
                    ..NewEnrolment::default()
                };
                let added = self.registry().add_enrolment(self.keys(), first, now()).await;
                self.install_line(&added.map_err(failed)?.1)
            }
            None => String::new(),
        };
        let (_, token) =
            self.registry().add_admin(self.keys(), "first", now()).await.map_err(failed)?;
        match show {
            Some(show) => show(token.expose(), &line),
            None => {
                self.inner.state.write(BOOTSTRAP_TOKEN, token.expose())?;
                self.inner.bootstrap_token_exists.store(true, Relaxed);
            }
        }
        Ok(())
    }

    /// An administrator has called: the file with the first token is no longer needed.
    pub(super) fn remove_bootstrap_token(&self) {
        if self.inner.bootstrap_token_exists.swap(false, Relaxed) {
            self.inner.state.remove(BOOTSTRAP_TOKEN);
        }
    }
}
