//! Opens a database: connects, creates the tables, checks the version of the schema, becomes the
//! owner.

use std::time::Duration;

use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{AnyPool, Row as _};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::ownership::{heartbeat, take_ownership};
use super::writer::Writer;
use super::{Store, read_metadata};
use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::control_plane::dsn;

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

fn unusable(what: &str, error: &dyn std::fmt::Display, hint: &str) -> Failure {
    Failure::new(Exit::Preflight, "DATABASE_UNUSABLE", what).why(error.to_string()).hint(hint)
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
        let hint = if sqlite {
            "check that the data directory can be written and its disk has room"
        } else {
            "check that PostgreSQL runs and that the file of --database-url-file names host, \
             database, user and password rightly"
        };
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
        tokio::spawn(writer.run(queue));
        if !sqlite {
            tokio::spawn(heartbeat(store.pool.clone(), instance.to_owned(), store.lost.clone()));
        }
        Ok(store)
    }
}

async fn connect(url: &Secret, sqlite: bool, hint: &str) -> anyhow::Result<AnyPool> {
    // the driver's error may quote the URL
    let options: AnyConnectOptions = url.expose().parse().map_err(|_| wrong_url("it is no URL"))?;
    let pool = AnyPoolOptions::new()
        // SQLite has one writer; PostgreSQL would gain nothing from more: one task writes
        .max_connections(if sqlite { 1 } else { 2 })
        .acquire_timeout(Duration::from_secs(5))
        .after_connect(move |connection, _| {
            Box::pin(async move {
                if sqlite {
                    sqlx::query("PRAGMA journal_mode=WAL").execute(&mut *connection).await?;
                    // a commit that was answered survives a power cut
                    sqlx::query("PRAGMA synchronous=FULL").execute(&mut *connection).await?;
                    sqlx::query("PRAGMA busy_timeout=5000").execute(&mut *connection).await?;
                }
                Ok(())
            })
        })
        .connect_with(options)
        .await
        .map_err(|e| unusable("the database cannot be opened", &e, hint))?;
    Ok(pool)
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
