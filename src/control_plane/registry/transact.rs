//! Changes of memory and database as one transaction.

use super::{HttpError, Inner, Registry, database_unavailable};
use crate::control_plane::store::Change;

impl From<anyhow::Error> for HttpError {
    /// A change that the database does not accept.
    fn from(error: anyhow::Error) -> HttpError {
        database_unavailable(&error)
    }
}

impl Registry {
    /// The one way to change the registry. `change` decides and changes memory, under the lock, and
    /// returns what to write: so the database gets changes in the order of memory. When they are
    /// durable, `done` ends what must not outlive them, above all open streams; if they fail,
    /// `undo` reverts what `change` did.
    pub(super) async fn transact<T, R, E: From<anyhow::Error>>(
        &self,
        change: impl FnOnce(&mut Inner) -> Result<(Vec<Change>, T), E>,
        undo: impl FnOnce(&mut Inner, T),
        done: impl FnOnce(&mut Inner, T) -> R,
    ) -> Result<R, E> {
        let (write, outcome) = {
            let mut inner = self.inner();
            let (changes, outcome) = change(&mut inner)?;
            if changes.is_empty() {
                return Ok(done(&mut inner, outcome));
            }
            (self.store.enqueue(changes), outcome)
        };
        let written = write.durable().await;
        let mut inner = self.inner();
        match written {
            Ok(()) => Ok(done(&mut inner, outcome)),
            Err(error) => {
                undo(&mut inner, outcome);
                Err(error.into())
            }
        }
    }
}
