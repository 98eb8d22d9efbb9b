//! The database: every row is a small JSON document under its kind and id, in SQLite or PostgreSQL
//! alike.
//!
//! Memory answers all questions but that for an operation's log; the database is what outlives the
//! process. An answer goes out only after the commit of what it speaks of.

mod open;
mod ownership;
mod writer;

use std::sync::Arc;

use anyhow::Context as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::{AnyPool, Row as _};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::model::Row;
use crate::base::json;
use writer::WriteRequest;

/// The kind of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKind {
    Project,
    Enrolment,
    Agent,
    Access,
    Admin,
    Operation,
    Job,
    Rollout,
    Labels,
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
            RowKind::Job => "job",
            RowKind::Rollout => "rollout",
            RowKind::Labels => "labels",
        }
    }
}

/// An event for Runners, kept until the broker has it.
#[derive(Clone, Debug)]
pub struct OutboxEvent {
    pub agent: String,
    pub topic: &'static str,
    /// Seconds since 1970.
    pub at: i64,
    /// It replaces one of the same topic and agent that still waits.
    pub latest: bool,
    /// A JSON object.
    pub body: String,
}

/// An event as it waits. The number grows with each, over restarts and restored backups too.
#[derive(Clone, Debug)]
pub struct PendingEvent {
    pub seq: i64,
    pub agent: String,
    pub topic: String,
    pub body: String,
}

/// One change of the database.
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

/// The outcome of a write: ready when it is durable or has failed.
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

/// A handle on the database; clones share it.
#[derive(Clone)]
pub struct Store {
    pool: AnyPool,
    writes: mpsc::UnboundedSender<WriteRequest>,
    /// Notified whenever an event was written.
    event_written: Arc<Notify>,
    /// Cancelled when another control plane has taken the database over.
    lost: CancellationToken,
}

impl Store {
    /// All rows of a kind.
    ///
    /// # Errors
    /// When the database does not answer, or a row cannot be read: none is skipped silently.
    pub async fn all<T: DeserializeOwned>(&self, kind: RowKind) -> anyhow::Result<Vec<T>> {
        let rows = sqlx::query("SELECT id, body FROM pipeops_row WHERE kind = $1 ORDER BY id")
            .bind(kind.name())
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| {
                let (id, body): (String, String) = (row.try_get(0)?, row.try_get(1)?);
                parsed(kind, &id, &body)
            })
            .collect()
    }

    /// One row, as it is after all changes that are queued now.
    ///
    /// # Errors
    /// When the database does not answer, or the row cannot be read.
    pub async fn one<T: DeserializeOwned>(
        &self,
        kind: RowKind,
        id: &str,
    ) -> anyhow::Result<Option<T>> {
        self.write(Vec::new()).await?;
        let row = sqlx::query("SELECT body FROM pipeops_row WHERE kind = $1 AND id = $2")
            .bind(kind.name())
            .bind(id.to_owned())
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| parsed(kind, id, &row.try_get::<String, _>(0)?)).transpose()
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

    /// Queues `changes`, of which all or none are written, in the order of these calls.
    pub fn enqueue(&self, changes: Vec<Change>) -> PendingWrite {
        let (done, answer) = oneshot::channel();
        PendingWrite(self.writes.send(WriteRequest { changes, done }).is_ok().then_some(answer))
    }

    /// Writes all of `changes` or none; returns when they are durable.
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
    pub async fn pending_events(&self, max: i64) -> anyhow::Result<Vec<PendingEvent>> {
        let rows =
            sqlx::query("SELECT seq, agent, topic, body FROM pipeops_outbox ORDER BY seq LIMIT $1")
                .bind(max)
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
            let oldest = "DELETE FROM pipeops_outbox WHERE seq IN \
                          (SELECT seq FROM pipeops_outbox ORDER BY seq LIMIT 100)";
            dropped += sqlx::query(oldest).execute(&self.pool).await?.rows_affected();
        }
        Ok(dropped)
    }

    /// A value beside the rows, such as the version of the schema.
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

    /// Waits until everything queued is written, and closes the database.
    pub async fn close(&self) {
        let _ = self.write(Vec::new()).await;
        self.pool.close().await;
    }
}

fn parsed<T: DeserializeOwned>(kind: RowKind, id: &str, body: &str) -> anyhow::Result<T> {
    json::read(body)
        .with_context(|| format!("the database holds a damaged row: {} {id}", kind.name()))
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
    sqlx::query(
        "INSERT INTO pipeops_meta (id, body) VALUES ($1, $2) \
         ON CONFLICT (id) DO UPDATE SET body = excluded.body",
    )
    .bind(id.to_owned())
    .bind(text.to_owned())
    .execute(connection)
    .await
    .map(drop)
}
