//! Backups: one file with all rows of the database and the keys. It can be restored on another
//! machine, and into another kind of database.

use serde::{Deserialize, Serialize};

use super::client;
use super::clock::now;
use super::keys::Keys;
use super::model::Row;
use super::open::{self, database};
use super::store::{Change, Store};
use crate::base::error::{Exit, Failure};
use crate::base::json;
use crate::base::secret::Secret;
use crate::host::Host;
use crate::host::state::StateDir;

/// Identifies the format of a backup.
const FORMAT: &str = "pipeops control plane backup 1";

#[derive(Serialize, Deserialize)]
struct Backup {
    format: String,
    /// Seconds since 1970.
    at: i64,
    #[serde(serialize_with = "Secret::serialize_exposed")]
    keys: Secret,
    rows: Vec<Row>,
}

/// The text of a backup of a running control plane.
///
/// # Errors
/// When the database does not answer.
pub(super) async fn text(state: &StateDir, store: &Store) -> anyhow::Result<Secret> {
    let Some(keys) = Keys::stored(state)? else {
        return Err(Failure::new(
            Exit::Preflight,
            "NOTHING_THERE",
            "there is no control plane to back up",
        )
        .hint("another place: --data-dir")
        .into());
    };
    let backup = Backup { format: FORMAT.into(), at: now(), keys, rows: store.rows().await? };
    Ok(Secret::new(serde_json::to_string(&backup)?))
}

/// Writes a backup into a new file of mode 0600; returns a message for the user.
///
/// # Errors
/// Exit 2 when the file exists, 3 when there is no control plane.
pub async fn write(
    host: &Host,
    data_dir: &str,
    url: Option<Secret>,
    file: &str,
) -> anyhow::Result<String> {
    let state = host.read_only_state_dir(data_dir);
    if Keys::stored(&state)?.is_none() {
        return Err(Failure::new(
            Exit::Preflight,
            "NOTHING_THERE",
            format!("there is no control plane in {data_dir}"),
        )
        .hint("another place: --data-dir")
        .into());
    }
    let text = match state.lock() {
        // it does not run: the database may be opened here
        Ok(_only) => {
            let store = database(host, data_dir, &state, url).await?;
            let text = text(&state, &store).await;
            store.close().await;
            text?
        }
        Err(_) => Secret::new(
            client::call(host, data_dir, http::Method::GET, "/api/v1/backup", None).await?,
        ),
    };
    host.create_user_file(file, text.expose())?;
    let backup: Backup = json::read(text.expose())?;
    Ok(format!(
        "{} rows and the keys are in {file} (mode 0600); who has it can be this control plane",
        backup.rows.len()
    ))
}

/// Restores the `text` of `file` into an empty data directory and database; returns a message for
/// the user.
///
/// # Errors
/// Exit 2 for a file that is no backup, 3 when something is there already, 12 while a control plane
/// runs there.
pub async fn restore(
    host: &Host,
    data_dir: &str,
    url: Option<Secret>,
    file: &str,
    text: &str,
) -> anyhow::Result<String> {
    let wrong = |why: String| {
        Failure::usage("BACKUP_WRONG", format!("{file} is no backup of a control plane"))
            .why(why)
            .hint("`pipeops control-plane backup FILE` makes one")
    };
    // the error may quote the text: only its position is passed on
    let backup: Backup =
        json::read(text).map_err(|e| wrong(format!("line {}, column {}", e.line(), e.column())))?;
    if backup.format != FORMAT {
        return Err(wrong("it is of another version of pipeops".into()).into());
    }
    let state = host.state_dir(data_dir)?;
    let _only = state.lock()?;
    let there = |what: &str| {
        Failure::new(Exit::Preflight, "NOT_EMPTY", format!("{what} already holds a control plane"))
            .hint(
                "restore into an empty place (--data-dir, --database-url-file), or move what is \
                 there away first",
            )
    };
    if Keys::stored(&state)?.is_some() {
        return Err(there(data_dir).into());
    }
    let store = database(host, data_dir, &state, url).await?;
    if !store.rows().await?.is_empty() {
        store.close().await;
        return Err(there("the database").into());
    }
    let count = backup.rows.len();
    let done = async {
        store.write(backup.rows.into_iter().map(Change::Row).collect()).await?;
        // the keys come last: without them no control plane starts on half of a backup
        let keys = Keys::restore(&state, &backup.keys, now())?;
        store.set_metadata(open::KEYS, &keys.fingerprint()).await
    };
    let done = done.await;
    store.close().await;
    done?;
    Ok(format!(
        "{count} rows and the keys of {} are in {data_dir}",
        super::clock::rfc3339(backup.at)
    ))
}
