//! Opens a database: connects, creates the tables, checks the version of the schema, becomes the
//! owner.

use std::time::Duration;

use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{AnyConnection, AnyPool, ConnectOptions as _, Connection as _, Row as _};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::ownership::{heartbeat, take_ownership};
use super::writer::Writer;
use super::{Store, read_metadata};
use crate::base::dsn;
use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::base::task::boxed;

/// Version of the schema. A database of a later one is refused: its rows may mean more than this
/// program knows.
const SCHEMA: i64 = 1;

const TABLES: &[&str] = &[
    "CREATE TABLE IF NOT EXISTS pipeops_meta (id TEXT PRIMARY KEY, body TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS pipeops_row (kind TEXT NOT NULL, id TEXT NOT NULL, \
     body TEXT NOT NULL, PRIMARY KEY (kind, id))",
    "CREATE TABLE IF NOT EXISTS pipeops_outbox (seq BIGINT PRIMARY KEY, agent TEXT NOT NULL, \
     topic TEXT NOT NULL, at BIGINT NOT NULL, body TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS pipeops_outbox_agent ON pipeops_outbox (agent, topic)",
];

/// Time for the first connection, and the pause before a server that is starting is asked again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const STARTING_PAUSE: Duration = Duration::from_millis(250);

/// What to look at when a SQLite file does not work.
const SQLITE_HINT: &str = "check that the data directory can be written and its disk has room";
const POSTGRES_HINT: &str = "check that PostgreSQL runs there, and host, database, user and \
                             password in the URL (--database-url, --database-url-file)";
/// Messages of SQLITE_CORRUPT and SQLITE_NOTADB (sqlite.org/rescode.html).
const DAMAGED: [&str; 2] = ["malformed", "not a database"];
const DAMAGED_HINT: &str = "the file is damaged or no SQLite database: `pipeops control-plane \
                            restore FILE` makes another data directory of a backup";

fn unusable(what: &str, error: &dyn std::fmt::Display, hint: &str) -> Failure {
    let why = error.to_string();
    let damaged = DAMAGED.iter().any(|text| why.contains(text));
    let hint = if damaged { DAMAGED_HINT } else { hint };
    Failure::new(Exit::Preflight, "DATABASE_UNUSABLE", what).why(why).hint(hint)
}

fn wrong_url(why: &str) -> Failure {
    Failure::usage("DATABASE_URL_WRONG", "the database's URL cannot be used")
        .why(why)
        .hint("postgres://USER:PASSWORD@HOST:PORT/DATABASE, or sqlite:FILE")
}

impl Store {
    /// Opens `url` (`sqlite:FILE` or `postgres://…`) for the control plane `instance`, and creates
    /// the tables where there are none.
    ///
    /// # Errors
    /// Exit 3: not reachable, read-only, or of a later version. Exit 12: another control plane
    /// works on it.
    pub async fn open(url: &Secret, instance: &str) -> anyhow::Result<Store> {
        sqlx::any::install_default_drivers();
        let url = dsn::database(url).map_err(|why| wrong_url(&why))?;
        let sqlite = url.expose().starts_with("sqlite:");
        let hint = if sqlite { SQLITE_HINT } else { POSTGRES_HINT };
        let pool = connect(&url, sqlite, hint).await?;
        for statement in TABLES {
            sqlx::query(*statement)
                .execute(&pool)
                .await
                .map_err(|e| unusable("the database cannot be written", &e, hint))?;
        }
        check_schema(&pool, hint).await?;
        take_ownership(&pool, instance, sqlite).await?;
        let last: i64 = sqlx::query("SELECT COALESCE(MAX(seq), 0) FROM pipeops_outbox")
            .fetch_one(&pool)
            .await?
            .try_get(0)?;
        let kept = read_metadata(&pool, "outbox_seq").await?;
        let kept = kept.and_then(|n| n.parse().ok()).unwrap_or(0);
        let (writes, queue) = mpsc::unbounded_channel();
        let event_written = std::sync::Arc::<Notify>::default();
        let store = Store { pool, writes, event_written, lost: CancellationToken::new() };
        let writer = Writer {
            pool: store.pool.clone(),
            instance: instance.into(),
            last: last.max(kept),
            event_written: store.event_written.clone(),
            lost: store.lost.clone(),
        };
        tokio::spawn(boxed(writer.run(queue)));
        if !sqlite {
            tokio::spawn(boxed(heartbeat(
                store.pool.clone(),
                instance.to_owned(),
                store.lost.clone(),
            )));
        }
        Ok(store)
    }
}

async fn connect(url: &Secret, sqlite: bool, hint: &str) -> anyhow::Result<AnyPool> {
    // the driver's error may quote the URL
    let options: AnyConnectOptions = url.expose().parse().map_err(|_| wrong_url("it is no URL"))?;
    first_connection(&options, sqlite, CONNECT_TIMEOUT)
        .await
        .map_err(|e| unusable("the database cannot be opened", &e, hint))?;
    let pool = AnyPoolOptions::new()
        // SQLite has one writer; PostgreSQL would gain nothing from more: one task writes
        .max_connections(if sqlite { 1 } else { 2 })
        .acquire_timeout(CONNECT_TIMEOUT)
        .after_connect(move |connection, _| Box::pin(prepare(connection, sqlite)))
        .connect_with(options)
        .await
        .map_err(|e| unusable("the database cannot be opened", &e, hint))?;
    Ok(pool)
}

async fn prepare(connection: &mut AnyConnection, sqlite: bool) -> Result<(), sqlx::Error> {
    if sqlite {
        sqlx::query("PRAGMA journal_mode=WAL").execute(&mut *connection).await?;
        // a commit that was answered survives a power cut
        sqlx::query("PRAGMA synchronous=FULL").execute(&mut *connection).await?;
        sqlx::query("PRAGMA busy_timeout=5000").execute(&mut *connection).await?;
    }
    Ok(())
}

/// A connection by itself: of a server that is away a pool says only that its own time is over, and
/// of a damaged file it logs each of its attempts (sqlx-core 0.9, `src/pool/inner.rs`). A server
/// that is starting is asked again, as a pool does.
async fn first_connection(
    options: &AnyConnectOptions,
    sqlite: bool,
    most: Duration,
) -> Result<(), sqlx::Error> {
    let end = Instant::now() + most;
    loop {
        let error = match timeout_at(end, options.connect()).await {
            Ok(Ok(mut connection)) => {
                prepare(&mut connection, sqlite).await?;
                return connection.close().await;
            }
            Ok(Err(error)) => error,
            Err(_) => {
                let silent = format!("no answer within {} s", most.as_secs());
                return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, silent).into());
            }
        };
        let starting = match &error {
            sqlx::Error::Io(e) => e.kind() == std::io::ErrorKind::ConnectionRefused,
            sqlx::Error::Database(e) => e.is_transient_in_connect_phase(),
            _ => false,
        };
        if !starting || Instant::now() + STARTING_PAUSE >= end {
            return Err(error);
        }
        tokio::time::sleep(STARTING_PAUSE).await;
    }
}

/// Notes the version of the schema in a new database, and compares it in an old one.
async fn check_schema(pool: &AnyPool, hint: &str) -> anyhow::Result<()> {
    let found = read_metadata(pool, "schema").await?;
    match found.as_deref().map(str::parse::<i64>) {
        None => {
            sqlx::query("INSERT INTO pipeops_meta (id, body) VALUES ('schema', $1)")
                .bind(SCHEMA.to_string())
                .execute(pool)
                .await
                .map_err(|e| unusable("the database cannot be written", &e, hint))?;
            Ok(())
        }
        Some(Ok(SCHEMA)) => Ok(()),
        Some(other) => {
            let why = other.map_or_else(
                |e| e.to_string(),
                |n| format!("its layout is {n}, this program knows {SCHEMA}"),
            );
            Err(Failure::new(
                Exit::Preflight,
                "DATABASE_VERSION",
                "the database is of another version of pipeops",
            )
            .why(why)
            .hint("run the pipeops that wrote it, or restore a backup that fits")
            .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;

    #[tokio::test]
    async fn a_server_that_is_away_and_a_file_that_is_damaged_are_named() {
        sqlx::any::install_default_drivers();
        // nobody listens there any more
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options: AnyConnectOptions =
            format!("postgres://u:pw@127.0.0.1:{port}/d").parse().unwrap();
        let away = first_connection(&options, false, Duration::from_millis(300)).await.unwrap_err();
        assert!(away.to_string().contains("refused"), "{away}");
        // one that accepts and says nothing
        let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let options: AnyConnectOptions =
            format!("postgres://u:pw@{}/d", mute.local_addr().unwrap()).parse().unwrap();
        let mute = first_connection(&options, false, Duration::from_millis(300)).await.unwrap_err();
        assert!(mute.to_string().contains("no answer"), "{mute}");
        let dir = tempfile::tempdir().unwrap();
        let state = Host::new(dir.path(), None).state_dir("/s").unwrap();
        state.write("t.db", &format!("SQLite format 3\0{}", "x".repeat(8192))).unwrap();
        let url = Secret::new(format!("sqlite:{}", dir.path().join("s/t.db").display()));
        let damaged = Failure::from_error(&Store::open(&url, "i").await.err().unwrap());
        assert_eq!(damaged.code, "DATABASE_UNUSABLE");
        assert_eq!(damaged.hint.as_deref(), Some(DAMAGED_HINT), "{damaged:?}");
    }
}
