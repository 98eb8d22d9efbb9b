//! The database: every row is a small JSON document under its kind and id, in SQLite or PostgreSQL alike.
//!
//! Memory answers all questions; the database is what outlives the process. One task writes, and puts whatever waits into one
//! transaction, so that a durable commit is paid for by many: an answer goes out only after its commit.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{AnyPool, Row as _};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::control_plane::backup::Row;

/// Layout of the tables. A database of a later one is refused: its rows may mean more than this version knows.
const SCHEMA: i64 = 1;
/// Orders that share a commit at most.
const BATCH: usize = 512;
/// How often the holder of a shared database shows that it lives, and how long another one watches before it takes over.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
const TAKEOVER: Duration = Duration::from_secs(16);

/// What a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKind {
    Project,
    Enrolment,
    Agent,
    Access,
    Admin,
    Operation,
}

impl RowKind {
    fn name(self) -> &'static str {
        match self {
            RowKind::Project => "project",
            RowKind::Enrolment => "enrolment",
            RowKind::Agent => "agent",
            RowKind::Access => "access",
            RowKind::Admin => "admin",
            RowKind::Operation => "operation",
        }
    }
}

/// Something that Runners are told, kept until the broker has it.
#[derive(Clone, Debug)]
pub struct OutboxEvent {
    pub agent: String,
    pub topic: &'static str,
    /// Seconds since 1970.
    pub at: i64,
    /// It takes the place of one of the same topic and agent that still waits.
    pub latest: bool,
    /// A JSON object.
    pub body: String,
}

/// An event as it waits: the number grows with every one, over restarts and restored backups too.
#[derive(Clone, Debug)]
pub struct PendingEvent {
    pub seq: i64,
    pub agent: String,
    pub topic: String,
    pub body: String,
}

/// One thing that is written.
#[derive(Clone, Debug)]
pub enum Change {
    Put {
        kind: RowKind,
        id: String,
        body: String,
    },
    Remove {
        kind: RowKind,
        id: String,
    },
    /// A row as a backup has it.
    Row(Row),
    AddEvent(OutboxEvent),
    /// The broker has these.
    Delivered(Vec<i64>),
}

impl Change {
    /// # Errors
    /// When the row cannot be written as JSON.
    pub fn put<T: Serialize>(kind: RowKind, id: &str, row: &T) -> anyhow::Result<Change> {
        Ok(Change::Put { kind, id: id.into(), body: serde_json::to_string(row)? })
    }

    pub fn remove(kind: RowKind, id: &str) -> Change {
        Change::Remove { kind, id: id.into() }
    }
}

struct WriteRequest {
    changes: Vec<Change>,
    done: oneshot::Sender<Result<(), String>>,
}

/// What becomes of an order: ready when it is durable or has failed.
pub struct PendingWrite(Option<oneshot::Receiver<Result<(), String>>>);

impl PendingWrite {
    /// # Errors
    /// What the database says.
    pub async fn durable(self) -> anyhow::Result<()> {
        let gone = || anyhow::anyhow!("the database writer has ended");
        let answer = self.0.ok_or_else(gone)?;
        answer
            .await
            .map_err(|_| gone())?
            .map_err(|e| anyhow::anyhow!("the database cannot be written: {e}"))
    }
}

/// The way to the database; clones are the same one.
#[derive(Clone)]
pub struct Store {
    pool: AnyPool,
    orders: mpsc::UnboundedSender<WriteRequest>,
    /// Told whenever an event was written.
    event_written: Arc<Notify>,
    /// Cancelled when another control plane has taken the database over.
    lost: CancellationToken,
}

fn unusable(what: &str, error: &dyn std::fmt::Display, hint: &str) -> Failure {
    Failure::new(Exit::Preflight, "DATABASE_UNUSABLE", what).why(error.to_string()).hint(hint)
}

impl Store {
    /// Opens `url` (`sqlite:FILE` or `postgres://…`) for the control plane `instance`, and makes the tables where there are none.
    ///
    /// # Errors
    /// Exit 3: not reachable, read-only, or of a later version. Exit 12: another control plane works on it.
    pub async fn open(url: &Secret, instance: &str) -> anyhow::Result<Store> {
        sqlx::any::install_default_drivers();
        let wrong = |why: &str| {
            Failure::usage("DATABASE_URL_WRONG", "the database's URL cannot be used")
                .why(why)
                .hint("postgres://USER:PASSWORD@HOST:PORT/DATABASE, or sqlite:FILE")
        };
        let url = super::dsn::database(url).map_err(|why| wrong(&why))?;
        let sqlite = url.expose().starts_with("sqlite:");
        let hint = if sqlite {
            "check that the data directory can be written and its disk has room"
        } else {
            "check that PostgreSQL runs and that the file of --database-url-file names host, database, user and password rightly"
        };
        // what it says of a URL may quote it
        let options: AnyConnectOptions = url.expose().parse().map_err(|_| wrong("it is no URL"))?;
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
        for statement in [
            "CREATE TABLE IF NOT EXISTS pipeops_meta (id TEXT PRIMARY KEY, body TEXT NOT NULL)",
            "CREATE TABLE IF NOT EXISTS pipeops_row (kind TEXT NOT NULL, id TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (kind, id))",
            "CREATE TABLE IF NOT EXISTS pipeops_outbox (seq BIGINT PRIMARY KEY, agent TEXT NOT NULL, topic TEXT NOT NULL, at BIGINT NOT NULL, body TEXT NOT NULL)",
            "CREATE INDEX IF NOT EXISTS pipeops_outbox_agent ON pipeops_outbox (agent, topic)",
        ] {
            sqlx::query(statement)
                .execute(&pool)
                .await
                .map_err(|e| unusable("the database cannot be written", &e, hint))?;
        }
        let found: Option<String> =
            match sqlx::query("SELECT body FROM pipeops_meta WHERE id = 'schema'")
                .fetch_optional(&pool)
                .await?
            {
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
                let said = other.map_or_else(
                    |e| e.to_string(),
                    |n| format!("its layout is {n}, this program knows {SCHEMA}"),
                );
                return Err(Failure::new(
                    Exit::Preflight,
                    "DATABASE_VERSION",
                    "the database is of another version of pipeops",
                )
                .why(said)
                .hint("run the pipeops that wrote it, or restore a backup that fits")
                .into());
            }
        }
        take_ownership(&pool, instance, sqlite).await?;
        let last: i64 = sqlx::query("SELECT COALESCE(MAX(seq), 0) FROM pipeops_outbox")
            .fetch_one(&pool)
            .await?
            .try_get(0)?;
        let kept =
            read_metadata(&pool, "outbox_seq").await?.and_then(|n| n.parse().ok()).unwrap_or(0);
        let (orders, queue) = mpsc::unbounded_channel();
        let store =
            Store { pool, orders, event_written: Arc::default(), lost: CancellationToken::new() };
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

    /// Every row of a kind.
    ///
    /// # Errors
    /// When the database does not answer, or a row cannot be read: nothing is passed over in silence.
    pub async fn all<T: DeserializeOwned>(&self, kind: RowKind) -> anyhow::Result<Vec<T>> {
        let rows = sqlx::query("SELECT id, body FROM pipeops_row WHERE kind = $1 ORDER BY id")
            .bind(kind.name())
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| {
                let (id, body): (String, String) = (row.try_get(0)?, row.try_get(1)?);
                serde_json::from_str(&body).with_context(|| {
                    format!("the database holds a damaged row: {} {id}", kind.name())
                })
            })
            .collect()
    }

    /// All rows of all kinds, as they stand.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn rows(&self) -> anyhow::Result<Vec<Row>> {
        let rows = sqlx::query("SELECT kind, id, body FROM pipeops_row ORDER BY kind, id")
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| {
                Ok(Row { kind: row.try_get(0)?, id: row.try_get(1)?, body: row.try_get(2)? })
            })
            .collect()
    }

    /// Orders all of `changes` or none. They are written in the order of these calls.
    pub fn enqueue(&self, changes: Vec<Change>) -> PendingWrite {
        let (done, answer) = oneshot::channel();
        PendingWrite(self.orders.send(WriteRequest { changes, done }).is_ok().then_some(answer))
    }

    /// Writes all of `changes` or none; back when they are durable.
    ///
    /// # Errors
    /// What the database says.
    pub async fn write(&self, changes: Vec<Change>) -> anyhow::Result<()> {
        self.enqueue(changes).durable().await
    }

    /// Done when another control plane has taken the database over.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Done when an event was written since the last call.
    pub async fn event_written(&self) {
        self.event_written.notified().await;
    }

    /// The oldest events that wait.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn waiting(&self, most: i64) -> anyhow::Result<Vec<PendingEvent>> {
        let rows =
            sqlx::query("SELECT seq, agent, topic, body FROM pipeops_outbox ORDER BY seq LIMIT $1")
                .bind(most)
                .fetch_all(&self.pool)
                .await?;
        rows.iter()
            .map(|row| {
                Ok(PendingEvent {
                    seq: row.try_get(0)?,
                    agent: row.try_get(1)?,
                    topic: row.try_get(2)?,
                    body: row.try_get(3)?,
                })
            })
            .collect()
    }

    /// How many events wait, and their bytes.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn backlog(&self) -> anyhow::Result<(i64, i64)> {
        let query =
            "SELECT COUNT(*), CAST(COALESCE(SUM(LENGTH(body)), 0) AS BIGINT) FROM pipeops_outbox";
        let row = sqlx::query(query).fetch_one(&self.pool).await?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    }

    /// Drops events from before `at` and, beyond `bytes`, the oldest; gives how many.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn trim(&self, at: i64, bytes: i64) -> anyhow::Result<u64> {
        let mut dropped = sqlx::query("DELETE FROM pipeops_outbox WHERE at < $1")
            .bind(at)
            .execute(&self.pool)
            .await?
            .rows_affected();
        while self.backlog().await?.1 > bytes {
            let oldest = "DELETE FROM pipeops_outbox WHERE seq IN (SELECT seq FROM pipeops_outbox ORDER BY seq LIMIT 100)";
            dropped += sqlx::query(oldest).execute(&self.pool).await?.rows_affected();
        }
        Ok(dropped)
    }

    /// A note that is no row.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn metadata(&self, id: &str) -> anyhow::Result<Option<String>> {
        Ok(read_metadata(&self.pool, id).await?)
    }

    /// # Errors
    /// When the database does not answer.
    pub async fn set_metadata(&self, id: &str, text: &str) -> anyhow::Result<()> {
        write_metadata(&mut *self.pool.acquire().await?, id, text).await?;
        Ok(())
    }

    /// Waits until what was ordered is written, and closes the database.
    pub async fn close(&self) {
        let _ = self.write(Vec::new()).await;
        self.pool.close().await;
    }
}

async fn read_metadata(pool: &AnyPool, id: &str) -> Result<Option<String>, sqlx::Error> {
    let row = sqlx::query("SELECT body FROM pipeops_meta WHERE id = $1")
        .bind(id.to_owned())
        .fetch_optional(pool)
        .await?;
    row.map(|row| row.try_get(0)).transpose()
}

async fn write_metadata(
    connection: &mut sqlx::AnyConnection,
    id: &str,
    text: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO pipeops_meta (id, body) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET body = excluded.body")
        .bind(id.to_owned())
        .bind(text.to_owned())
        .execute(connection)
        .await
        .map(drop)
}

/// Becomes the one control plane that writes here. The former holder may be another one that lives: then its beat changes while it is
/// watched. Clocks are not asked, they differ. `alone`: the lock on the data directory has kept others away.
async fn take_ownership(pool: &AnyPool, instance: &str, alone: bool) -> anyhow::Result<()> {
    let begun = tokio::time::Instant::now();
    let first = read_metadata(pool, "beat").await?;
    loop {
        let holder = read_metadata(pool, "holder").await?;
        if alone || holder.as_deref().is_none_or(|h| h == instance) || begun.elapsed() > TAKEOVER {
            write_metadata(&mut *pool.acquire().await?, "holder", instance).await?;
            return Ok(());
        }
        if read_metadata(pool, "beat").await? != first {
            return Err(Failure::new(
                Exit::Locked,
                "DATABASE_IN_USE",
                "another control plane works on this database",
            )
            .hint("stop it first; one database is one control plane's")
            .into());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Shows that the holder lives.
async fn heartbeat(pool: AnyPool, instance: String, lost: CancellationToken) {
    let mut count = 0_u64;
    while !lost.is_cancelled() {
        count += 1;
        if let Ok(mut connection) = pool.acquire().await {
            let _ = write_metadata(
                &mut connection,
                "beat",
                &format!("{instance} {} {count}", std::process::id()),
            )
            .await;
        } else if pool.is_closed() {
            return;
        }
        tokio::time::sleep(HEARTBEAT).await;
    }
}

/// Rows of one transaction, written many at a time: what a commit costs at a database across a network is round trips.
#[derive(Default)]
struct Rows<'a> {
    order: Vec<(&'a str, &'a str, &'a str)>,
    at: HashMap<(&'a str, &'a str), usize>,
}

impl<'a> Rows<'a> {
    /// The last of a row's states counts: one statement may touch it once.
    fn put(&mut self, kind: &'a str, id: &'a str, body: &'a str) {
        match self.at.entry((kind, id)) {
            Entry::Occupied(place) => self.order[*place.get()].2 = body,
            Entry::Vacant(place) => {
                place.insert(self.order.len());
                self.order.push((kind, id, body));
            }
        }
    }

    async fn write(&mut self, connection: &mut sqlx::AnyConnection) -> Result<(), sqlx::Error> {
        self.at.clear();
        let mut rest = self.order.as_slice();
        while !rest.is_empty() {
            // few sizes, so that the database has seen each statement before
            let size = [64, 16, 4, 1].into_iter().find(|n| *n <= rest.len()).unwrap_or(1);
            let (now, later) = rest.split_at(size);
            let values: Vec<String> = (0..size)
                .map(|n| format!("(${}, ${}, ${})", 3 * n + 1, 3 * n + 2, 3 * n + 3))
                .collect();
            let text = format!(
                "INSERT INTO pipeops_row (kind, id, body) VALUES {} ON CONFLICT (kind, id) DO UPDATE SET body = excluded.body",
                values.join(", ")
            );
            let query = sqlx::query(sqlx::AssertSqlSafe(text));
            let bound = now.iter().fold(query, |q, (kind, id, body)| {
                q.bind((*kind).to_owned()).bind((*id).to_owned()).bind((*body).to_owned())
            });
            bound.execute(&mut *connection).await?;
            rest = later;
        }
        self.order.clear();
        Ok(())
    }
}

/// Whether the database itself refused what was written: then it may be one order's fault.
fn rejected_by_database(result: &Result<(), sqlx::Error>) -> bool {
    matches!(result, Err(sqlx::Error::Database(_)))
}

fn as_text(result: &Result<(), sqlx::Error>) -> Result<(), String> {
    result.as_ref().copied().map_err(ToString::to_string)
}

struct Writer {
    pool: AnyPool,
    instance: String,
    /// Number of the last event.
    last: i64,
    event_written: Arc<Notify>,
    lost: CancellationToken,
}

impl Writer {
    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<WriteRequest>) {
        let mut orders = Vec::new();
        while queue.recv_many(&mut orders, BATCH).await > 0 {
            let mut result = self.commit(&mut orders.iter().flat_map(|o| &o.changes)).await;
            for order in orders.drain(..) {
                // one that cannot be written must not take the others with it; a database that is away is not asked for each
                if rejected_by_database(&result) {
                    let alone = self.commit(&mut order.changes.iter()).await;
                    let _ = order.done.send(as_text(&alone));
                    if alone.is_err() && !rejected_by_database(&alone) {
                        result = alone;
                    }
                } else {
                    let _ = order.done.send(as_text(&result));
                }
            }
        }
    }

    async fn commit(
        &mut self,
        changes: &mut (dyn Iterator<Item = &Change> + Send),
    ) -> Result<(), sqlx::Error> {
        let mut changes = changes.peekable();
        if changes.peek().is_none() {
            return Ok(());
        }
        let mut transaction = self.pool.begin().await?;
        // a holder that was frozen while another one took over must not write again
        let ours =
            sqlx::query("UPDATE pipeops_meta SET body = body WHERE id = 'holder' AND body = $1")
                .bind(self.instance.clone());
        if ours.execute(&mut *transaction).await?.rows_affected() == 0 {
            self.lost.cancel();
            return Err(sqlx::Error::Protocol(
                "another control plane has taken the database over".into(),
            ));
        }
        let before = self.last;
        let mut rows = Rows::default();
        for change in changes {
            let query = match change {
                Change::Put { kind, id, body } => {
                    rows.put(kind.name(), id, body);
                    continue;
                }
                Change::Row(Row { kind, id, body }) => {
                    rows.put(kind, id, body);
                    continue;
                }
                Change::Remove { kind, id } => {
                    rows.write(&mut transaction).await?;
                    sqlx::query("DELETE FROM pipeops_row WHERE kind = $1 AND id = $2")
                        .bind(kind.name())
                        .bind(id.clone())
                }
                Change::AddEvent(event) => {
                    if event.latest {
                        let former = sqlx::query(
                            "DELETE FROM pipeops_outbox WHERE agent = $1 AND topic = $2",
                        );
                        former
                            .bind(event.agent.clone())
                            .bind(event.topic)
                            .execute(&mut *transaction)
                            .await?;
                    }
                    // by the clock, so that a restored backup does not give a number twice; never backwards
                    self.last = (self.last + 1).max(jiff::Timestamp::now().as_millisecond());
                    sqlx::query("INSERT INTO pipeops_outbox (seq, agent, topic, at, body) VALUES ($1, $2, $3, $4, $5)")
                        .bind(self.last)
                        .bind(event.agent.clone())
                        .bind(event.topic)
                        .bind(event.at)
                        .bind(event.body.clone())
                }
                Change::Delivered(all) => {
                    for seq in all {
                        sqlx::query("DELETE FROM pipeops_outbox WHERE seq = $1")
                            .bind(*seq)
                            .execute(&mut *transaction)
                            .await?;
                    }
                    continue;
                }
            };
            query.execute(&mut *transaction).await?;
        }
        rows.write(&mut transaction).await?;
        if self.last != before {
            write_metadata(&mut transaction, "outbox_seq", &self.last.to_string()).await?;
        }
        transaction.commit().await?;
        if self.last != before {
            self.event_written.notify_one();
        }
        Ok(())
    }
}
