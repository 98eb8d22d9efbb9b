//! The one task that writes: it puts what waits into one transaction, so that many share a commit.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use sqlx::AnyPool;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Change, OutboxEvent, write_metadata};
use crate::control_plane::model::Row;

/// Write requests that share a commit at most.
const BATCH: usize = 512;

pub(super) struct WriteRequest {
    pub(super) changes: Vec<Change>,
    pub(super) done: oneshot::Sender<Result<(), String>>,
}

/// Rows of one transaction, written many at a time: across a network a commit costs round trips.
#[derive(Default)]
struct Rows<'a> {
    rows: Vec<(&'a str, &'a str, &'a str)>,
    index: HashMap<(&'a str, &'a str), usize>,
}

impl<'a> Rows<'a> {
    /// The last state of a row counts: one statement may touch it once.
    fn put(&mut self, kind: &'a str, id: &'a str, body: &'a str) {
        match self.index.entry((kind, id)) {
            Entry::Occupied(place) => self.rows[*place.get()].2 = body,
            Entry::Vacant(place) => {
                place.insert(self.rows.len());
                self.rows.push((kind, id, body));
            }
        }
    }

    async fn write(&mut self, connection: &mut sqlx::AnyConnection) -> Result<(), sqlx::Error> {
        self.index.clear();
        let mut rest = self.rows.as_slice();
        while !rest.is_empty() {
            // few sizes, so that the database has seen each statement before
            let size = [64, 16, 4, 1].into_iter().find(|n| *n <= rest.len()).unwrap_or(1);
            let (now, later) = rest.split_at(size);
            let values: Vec<String> = (0..size)
                .map(|n| format!("(${}, ${}, ${})", 3 * n + 1, 3 * n + 2, 3 * n + 3))
                .collect();
            let text = format!(
                "INSERT INTO pipeops_row (kind, id, body) VALUES {} \
                 ON CONFLICT (kind, id) DO UPDATE SET body = excluded.body",
                values.join(", ")
            );
            let query = sqlx::query(sqlx::AssertSqlSafe(text));
            let bound = now.iter().fold(query, |q, (kind, id, body)| {
                q.bind((*kind).to_owned()).bind((*id).to_owned()).bind((*body).to_owned())
            });
            bound.execute(&mut *connection).await?;
            rest = later;
        }
        self.rows.clear();
        Ok(())
    }
}

/// Whether the database itself refused what was written: then it may be the fault of one request.
fn rejected_by_database(result: &Result<(), sqlx::Error>) -> bool {
    matches!(result, Err(sqlx::Error::Database(_)))
}

fn as_text(result: &Result<(), sqlx::Error>) -> Result<(), String> {
    result.as_ref().copied().map_err(ToString::to_string)
}

pub(super) struct Writer {
    pub(super) pool: AnyPool,
    pub(super) instance: String,
    /// Number of the last event.
    pub(super) last: i64,
    pub(super) event_written: Arc<Notify>,
    pub(super) lost: CancellationToken,
}

impl Writer {
    pub(super) async fn run(mut self, mut queue: mpsc::UnboundedReceiver<WriteRequest>) {
        let mut requests = Vec::new();
        while queue.recv_many(&mut requests, BATCH).await > 0 {
            let mut result = self.commit(&mut requests.iter().flat_map(|r| &r.changes)).await;
            for request in requests.drain(..) {
                // one request that cannot be written must not fail the others; a database that is
                // away is not asked for each
                if rejected_by_database(&result) {
                    let alone = self.commit(&mut request.changes.iter()).await;
                    let _ = request.done.send(as_text(&alone));
                    if alone.is_err() && !rejected_by_database(&alone) {
                        result = alone;
                    }
                } else {
                    let _ = request.done.send(as_text(&result));
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
                    self.add_event(&mut transaction, event).await?;
                    continue;
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

    async fn add_event(
        &mut self,
        transaction: &mut sqlx::AnyConnection,
        event: &OutboxEvent,
    ) -> Result<(), sqlx::Error> {
        if event.latest {
            sqlx::query("DELETE FROM pipeops_outbox WHERE agent = $1 AND topic = $2")
                .bind(event.agent.clone())
                .bind(event.topic)
                .execute(&mut *transaction)
                .await?;
        }
        // by the clock, so that a restored backup does not give a number twice; never backwards
        self.last = (self.last + 1).max(jiff::Timestamp::now().as_millisecond());
        sqlx::query(
            "INSERT INTO pipeops_outbox (seq, agent, topic, at, body) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(self.last)
        .bind(event.agent.clone())
        .bind(event.topic)
        .bind(event.at)
        .bind(event.body.clone())
        .execute(transaction)
        .await
        .map(drop)
    }
}
