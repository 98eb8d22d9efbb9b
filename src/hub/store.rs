//! The database: every row is a small JSON document under its kind and id, in SQLite or PostgreSQL alike.
//!
//! Memory answers all questions; the database is what outlives the process. One task writes, and puts whatever waits into one
//! transaction, so that a durable commit is paid for by many: an answer goes out only after its commit.

use anyhow::Context as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{AnyPool, Row as _};
use tokio::sync::{mpsc, oneshot};

use crate::error::{Exit, Failure};
use crate::secret::Secret;

/// Layout of the tables. A database of a later one is refused: its rows may mean more than this version knows.
const SCHEMA: i64 = 1;
/// Changes that share a commit at most.
const BATCH: usize = 512;

/// What a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Project,
    Enrolment,
    Agent,
    Access,
    Admin,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Project => "project",
            Kind::Enrolment => "enrolment",
            Kind::Agent => "agent",
            Kind::Access => "access",
            Kind::Admin => "admin",
        }
    }
}

/// One row put or removed.
#[derive(Clone, Debug)]
pub struct Change {
    kind: Kind,
    id: String,
    /// None removes it.
    body: Option<String>,
}

impl Change {
    /// # Errors
    /// When the row cannot be written as JSON.
    pub fn put<T: Serialize>(kind: Kind, id: &str, row: &T) -> anyhow::Result<Change> {
        Ok(Change { kind, id: id.into(), body: Some(serde_json::to_string(row)?) })
    }

    pub fn remove(kind: Kind, id: &str) -> Change {
        Change { kind, id: id.into(), body: None }
    }
}

struct Order {
    changes: Vec<Change>,
    done: oneshot::Sender<Result<(), String>>,
}

/// The way to the database; clones are the same one.
#[derive(Clone)]
pub struct Store {
    pool: AnyPool,
    orders: mpsc::Sender<Order>,
}

fn unusable(what: &str, error: &dyn std::fmt::Display, hint: &str) -> Failure {
    Failure::new(Exit::Preflight, "DATABASE_UNUSABLE", what).why(error.to_string()).hint(hint)
}

impl Store {
    /// Opens `url` (`sqlite:FILE` or `postgres://…`), and makes the tables where there are none.
    ///
    /// # Errors
    /// Exit 3: not reachable, read-only, or of a later version.
    pub async fn open(url: &Secret) -> anyhow::Result<Store> {
        sqlx::any::install_default_drivers();
        let sqlite = url.expose().starts_with("sqlite:");
        let hint = if sqlite {
            "check that the data directory can be written and its disk has room"
        } else {
            "check that PostgreSQL runs and that the file of --database-url-file names host, database, user and password rightly"
        };
        let known = ["sqlite:", "postgres://", "postgresql://"].iter().any(|scheme| url.expose().starts_with(scheme));
        let options: Option<AnyConnectOptions> = url.expose().parse().ok().filter(|_| known);
        let options = options.ok_or_else(|| {
            Failure::usage("DATABASE_URL_WRONG", "the database's URL cannot be used")
                .hint("postgres://USER:PASSWORD@HOST:PORT/DATABASE, or sqlite:FILE")
        })?;
        let pool = AnyPoolOptions::new()
            // SQLite has one writer; PostgreSQL would gain nothing from more: one task writes
            .max_connections(if sqlite { 1 } else { 2 })
            .acquire_timeout(std::time::Duration::from_secs(10))
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
        for statement in [
            "CREATE TABLE IF NOT EXISTS pipeops_meta (id TEXT PRIMARY KEY, body TEXT NOT NULL)",
            "CREATE TABLE IF NOT EXISTS pipeops_row (kind TEXT NOT NULL, id TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (kind, id))",
        ] {
            sqlx::query(statement).execute(&pool).await.map_err(|e| unusable("the database cannot be written", &e, hint))?;
        }
        let found: Option<String> = match sqlx::query("SELECT body FROM pipeops_meta WHERE id = 'schema'").fetch_optional(&pool).await? {
            Some(row) => Some(row.try_get(0)?),
            None => None,
        };
        match found.as_deref().map(str::parse::<i64>) {
            None => {
                sqlx::query("INSERT INTO pipeops_meta (id, body) VALUES ('schema', $1)")
                    .bind(SCHEMA.to_string())
                    .execute(&pool)
                    .await
                    .map_err(|e| unusable("the database cannot be written", &e, hint))?;
            }
            Some(Ok(SCHEMA)) => {}
            Some(other) => {
                let said = other.map_or_else(|e| e.to_string(), |n| format!("its layout is {n}, this program knows {SCHEMA}"));
                return Err(Failure::new(Exit::Preflight, "DATABASE_VERSION", "the database is of another version of pipeops")
                    .why(said)
                    .hint("run the pipeops that wrote it, or restore a backup that fits")
                    .into());
            }
        }
        let (orders, queue) = mpsc::channel(4096);
        let store = Store { pool, orders };
        tokio::spawn(write(store.pool.clone(), queue));
        Ok(store)
    }

    /// Every row of a kind.
    ///
    /// # Errors
    /// When the database does not answer, or a row cannot be read: nothing is passed over in silence.
    pub async fn all<T: DeserializeOwned>(&self, kind: Kind) -> anyhow::Result<Vec<T>> {
        let rows = sqlx::query("SELECT id, body FROM pipeops_row WHERE kind = $1 ORDER BY id").bind(kind.name()).fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                let (id, body): (String, String) = (row.try_get(0)?, row.try_get(1)?);
                serde_json::from_str(&body).with_context(|| format!("the database holds a damaged row: {} {id}", kind.name()))
            })
            .collect()
    }

    /// Writes all of `changes` or none; back when they are durable.
    ///
    /// # Errors
    /// What the database says.
    pub async fn write(&self, changes: Vec<Change>) -> anyhow::Result<()> {
        let (done, answer) = oneshot::channel();
        let gone = || anyhow::anyhow!("the database writer has ended");
        self.orders.send(Order { changes, done }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map_err(|e| anyhow::anyhow!("the database cannot be written: {e}"))
    }

    /// Waits until what was ordered is written, and closes the database.
    pub async fn close(&self) {
        let _ = self.write(Vec::new()).await;
        self.pool.close().await;
    }
}

async fn write(pool: AnyPool, mut queue: mpsc::Receiver<Order>) {
    let mut orders = Vec::new();
    while queue.recv_many(&mut orders, BATCH).await > 0 {
        let all: Vec<Change> = orders.iter().flat_map(|o| o.changes.iter().cloned()).collect();
        let together = commit(&pool, &all).await;
        for order in orders.drain(..) {
            let result = match &together {
                Ok(()) => Ok(()),
                // one that cannot be written must not take the others with it
                Err(_) => commit(&pool, &order.changes).await.map_err(|e| e.to_string()),
            };
            let _ = order.done.send(result);
        }
    }
}

async fn commit(pool: &AnyPool, changes: &[Change]) -> Result<(), sqlx::Error> {
    if changes.is_empty() {
        return Ok(());
    }
    let mut transaction = pool.begin().await?;
    for change in changes {
        match &change.body {
            Some(body) => {
                sqlx::query("INSERT INTO pipeops_row (kind, id, body) VALUES ($1, $2, $3) ON CONFLICT (kind, id) DO UPDATE SET body = excluded.body")
                    .bind(change.kind.name())
                    .bind(change.id.clone())
                    .bind(body.clone())
            }
            None => sqlx::query("DELETE FROM pipeops_row WHERE kind = $1 AND id = $2").bind(change.kind.name()).bind(change.id.clone()),
        }
        .execute(&mut *transaction)
        .await?;
    }
    transaction.commit().await
}
