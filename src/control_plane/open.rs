//! Opens the data directory and the database, and checks that the two belong together.

use super::keys::{self, Keys};
use super::store::Store;
use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::host::Host;
use crate::host::state::StateDir;

/// File with a random id, which distinguishes this control plane from another one on the same
/// database.
const INSTANCE: &str = "instance";
/// Key in the database's metadata: a fingerprint of the keys that it was written with.
pub(super) const KEYS: &str = "keys";

/// Turns an error of the file system into one that names the data directory and what to do.
pub(super) fn check_data_dir<T>(result: anyhow::Result<T>) -> anyhow::Result<T> {
    result.map_err(|e| match e.downcast_ref::<Failure>() {
        Some(_) => e,
        None => {
            Failure::new(Exit::Preflight, "DATA_DIR_UNUSABLE", "the data directory cannot be used")
                .why(format!("{e:#}"))
                .hint(
                    "check that it can be written (df -h, mount, its owner), or choose another \
             with --data-dir",
                )
                .into()
        }
    })
}

/// The database of a data directory, or the one at `url`.
pub(super) async fn database(
    host: &Host,
    data_dir: &str,
    state: &StateDir,
    url: Option<Secret>,
) -> anyhow::Result<Store> {
    let url = match url {
        Some(url) => url,
        None => {
            // SQLite gives its other files the mode of this one
            check_data_dir(state.touch("pipeops.db"))?;
            Secret::new(format!(
                "sqlite:{}?mode=rw",
                host.real_path(data_dir).join("pipeops.db").display()
            ))
        }
    };
    let instance = match check_data_dir(state.read(INSTANCE))? {
        Some(instance) => instance,
        None => {
            let made = keys::random_token()?;
            check_data_dir(state.write(INSTANCE, &made))?;
            made
        }
    };
    Store::open(&url, &instance).await
}

/// Refuses a database that was written with other keys: tokens are stored as keyed hashes, so none
/// of them would be known.
pub(super) async fn check_keys_match(
    store: &Store,
    keys: &Keys,
    data_dir: &str,
) -> anyhow::Result<()> {
    let fingerprint = store.metadata(KEYS).await?;
    if fingerprint.as_ref().is_some_and(|mark| *mark != keys.fingerprint())
        && !store.rows().await?.is_empty()
    {
        store.close().await;
        return Err(Failure::new(
            Exit::Preflight,
            "KEYS_FOREIGN",
            "the database is that of a control plane with other keys",
        )
        .why(format!(
            "keys.json in {data_dir} is not the one that it was written with: \
             no agent or token in it would be known"
        ))
        .hint("put that keys.json there, or restore a backup, or use an empty database")
        .into());
    }
    if fingerprint.is_none_or(|mark| mark != keys.fingerprint()) {
        store.set_metadata(KEYS, &keys.fingerprint()).await?;
    }
    Ok(())
}
