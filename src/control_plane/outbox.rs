//! Events to RabbitMQ: those in the database are published in order, and removed once the broker
//! has them on disk.
//!
//! Declares the topic exchange `pipeops.agents`, the durable queue `pipeops.runners` bound to all
//! topics, and `pipeops.unrouted` for messages that no queue takes. Each message is persistent and
//! confirmed. `message_id` is the same on every attempt, and the header `agent_seq` grows with each
//! event of an agent: a consumer drops an id that it has seen, and has the rest in order. Beside it
//! stand the attributes of CloudEvents, of the type `io.pipeops.` and the topic.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use lapin::options::{
    BasicPublishOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, ExchangeKind};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::base::backoff::{Backoff, random};
use crate::broker::cloud_events::CloudEvent;
use crate::broker::{Broker, confirming_channel, with_timeout};
use crate::control_plane::store::{Change, PendingEvent, Store};

pub const EXCHANGE: &str = "pipeops.agents";
pub const QUEUE: &str = "pipeops.runners";
pub const UNROUTED: &str = "pipeops.unrouted";
/// Unconfirmed messages at once.
const WINDOW: i64 = 256;
/// Unpublished events are kept this long and up to this size.
const RETENTION_DAYS: i64 = 7;
const MAX_BYTES: i64 = 1 << 30;
const TRIM_INTERVAL: Duration = Duration::from_secs(60);

/// The state of the connection to the broker, for metrics and logs.
#[derive(Default)]
pub struct BrokerStatus {
    /// Why it is down, empty before the first attempt; none while it is up.
    down: Mutex<Option<String>>,
    pub sent: AtomicU64,
    pub dropped: AtomicU64,
    pub waiting: AtomicI64,
}

impl BrokerStatus {
    /// Why the broker is not reached.
    pub fn down(&self) -> Option<String> {
        self.down.lock().clone()
    }

    fn set(&self, why: Option<String>) {
        let mut down = self.down.lock();
        match (&why, down.as_ref()) {
            (None, None) => {}
            (None, Some(_)) => tracing::info!("the message broker is reached"),
            (Some(why), former) if former != Some(why) && !why.is_empty() => {
                tracing::warn!(why, "no message broker: events wait in the database")
            }
            _ => {}
        }
        *down = why;
    }
}

/// Publishes events until `halt`.
pub async fn run(
    store: Store,
    broker: Broker,
    broker_status: Arc<BrokerStatus>,
    halt: CancellationToken,
) {
    broker_status.set(Some(String::new()));
    let mut backoff = Backoff::default();
    let work = async {
        loop {
            let why = match send(&store, &broker, &broker_status).await {
                Ok(never) => match never {},
                Err(error) => format!("{error:#}"),
            };
            // after a connection that was up, the delays start again
            if broker_status.down().is_none() {
                backoff.reset();
            }
            broker_status.set(Some(why));
            sleep(backoff.next(random())).await;
        }
    };
    let tidy = async {
        loop {
            match store
                .trim(jiff::Timestamp::now().as_second() - RETENTION_DAYS * 86_400, MAX_BYTES)
                .await
            {
                Ok(0) => {}
                Ok(dropped) => {
                    broker_status.dropped.fetch_add(dropped, Ordering::Relaxed);
                    tracing::error!(
                        dropped,
                        "unpublished events were dropped: they were older than 7 days, or over \
                         1 GiB waited"
                    );
                }
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "old events are not removed")
                }
            }
            if let Ok((count, _)) = store.backlog().await {
                broker_status.waiting.store(count, Ordering::Relaxed);
            }
            sleep(TRIM_INTERVAL).await;
        }
    };
    tokio::select! {
        () = work => {}
        () = tidy => {}
        () = halt.cancelled() => {}
    }
}

async fn declare(channel: &Channel) -> anyhow::Result<()> {
    let mut routed = FieldTable::default();
    routed.insert("alternate-exchange".into(), AMQPValue::LongString(UNROUTED.into()));
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let kept = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let table = FieldTable::default;
    for (exchange, kind, arguments, queue, key) in [
        (UNROUTED, ExchangeKind::Fanout, table(), UNROUTED, ""),
        (EXCHANGE, ExchangeKind::Topic, routed, QUEUE, "#"),
    ] {
        with_timeout(
            "declaring an exchange",
            channel.exchange_declare(exchange.into(), kind, durable, arguments),
        )
        .await?;
        with_timeout("declaring a queue", channel.queue_declare(queue.into(), kept, table()))
            .await?;
        with_timeout(
            "binding a queue",
            channel.queue_bind(
                queue.into(),
                exchange.into(),
                key.into(),
                QueueBindOptions::default(),
                table(),
            ),
        )
        .await?;
    }
    Ok(())
}

/// One connection, until it fails.
async fn send(
    store: &Store,
    broker: &Broker,
    broker_status: &BrokerStatus,
) -> anyhow::Result<std::convert::Infallible> {
    let connection = broker.connect("pipeops control plane").await?;
    let channel = confirming_channel(&connection).await?;
    declare(&channel).await?;
    broker_status.set(None);
    loop {
        let waiting = store.pending_events(WINDOW).await?;
        if waiting.is_empty() {
            broker_status.waiting.store(0, Ordering::Relaxed);
            // a connection that broke while idle is noticed here
            tokio::select! {
                () = store.event_written() => {}
                () = sleep(Duration::from_secs(5)) => {
                    anyhow::ensure!(connection.status().connected(), "the connection is lost");
                }
            }
            continue;
        }
        batch(store, &channel, &waiting, broker_status).await?;
    }
}

/// The events up to the second one of an agent, which waits for the confirmation of the first.
fn first_of_each(waiting: &[PendingEvent]) -> &[PendingEvent] {
    let mut seen = HashSet::new();
    let upto = waiting.iter().position(|w| !seen.insert(w.agent.as_str())).unwrap_or(waiting.len());
    &waiting[..upto]
}

async fn batch(
    store: &Store,
    channel: &Channel,
    waiting: &[PendingEvent],
    broker_status: &BrokerStatus,
) -> anyhow::Result<()> {
    let mut confirmations = Vec::new();
    for event in first_of_each(waiting) {
        let mut body: Value =
            serde_json::from_str(&event.body).context("an event in the database")?;
        body["agent_seq"] = event.seq.into();
        let text = |name: &str| body[name].as_str().unwrap_or_default();
        let about = CloudEvent {
            id: text("message_id"),
            kind: &event.topic,
            project: text("project"),
            subject: text("cluster_id"),
            time: text("at"),
        };
        let mut headers = about.headers();
        headers.insert("agent_seq".into(), AMQPValue::LongLongInt(event.seq));
        headers.insert("agent_id".into(), AMQPValue::LongString(event.agent.as_str().into()));
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into())
            .with_message_id(about.id.into())
            .with_type(event.topic.as_str().into())
            .with_headers(headers);
        let payload = body.to_string();
        let publish = channel.basic_publish(
            EXCHANGE.into(),
            event.topic.as_str().into(),
            BasicPublishOptions::default(),
            payload.as_bytes(),
            properties,
        );
        confirmations.push((event.seq, with_timeout("publishing", publish).await?));
    }
    let mut delivered = Vec::new();
    let mut result = Ok(());
    for (seq, confirmation) in confirmations {
        match with_timeout("waiting for a confirmation", confirmation).await {
            Ok(confirmation) if confirmation.is_ack() => delivered.push(seq),
            Ok(_) => result = Err(anyhow::anyhow!("the broker took a message back")),
            Err(error) => result = Err(error),
        }
        if result.is_err() {
            break;
        }
    }
    broker_status.sent.fetch_add(delivered.len() as u64, Ordering::Relaxed);
    // if that cannot be written, they are published again, with the same message_id
    store.write(vec![Change::Delivered(delivered)]).await?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::secret::Secret;

    #[test]
    fn an_agents_events_go_out_one_after_the_other() {
        let event = |seq: i64, agent: &str| PendingEvent {
            seq,
            agent: agent.into(),
            topic: String::new(),
            body: String::new(),
        };
        let all = [event(1, "a"), event(2, "b"), event(3, "a"), event(4, "c")];
        assert_eq!(first_of_each(&all).iter().map(|w| w.seq).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(first_of_each(&all[1..]).len(), 3);
        assert!(first_of_each(&[]).is_empty());
    }

    #[tokio::test]
    async fn what_waits_too_long_or_is_too_much_is_dropped_oldest_first() {
        let dir = tempfile::tempdir().unwrap();
        let url = Secret::new(format!("sqlite:{}?mode=rwc", dir.path().join("t.db").display()));
        let store = Store::open(&url, "i").await.unwrap();
        let event = |at: i64, latest: bool| {
            let body = format!("{{\"at\":{at}}}");
            Change::AddEvent(crate::control_plane::store::OutboxEvent {
                agent: "a".into(),
                topic: if latest { "agent.status" } else { "agent.online" },
                at,
                latest,
                body,
            })
        };
        store
            .write(
                (0..300)
                    .map(|at| event(at, false))
                    .chain([event(300, true), event(301, true)])
                    .collect(),
            )
            .await
            .unwrap();
        // of the latest only the latest waits
        assert_eq!(store.backlog().await.unwrap().0, 301);
        assert_eq!(store.trim(50, i64::MAX).await.unwrap(), 50);
        assert_eq!(store.trim(0, 1500).await.unwrap(), 200);
        let left = store.pending_events(1000).await.unwrap();
        assert_eq!((left[0].body.as_str(), left.len()), ("{\"at\":250}", 51));
        assert!(left.windows(2).all(|w| w[0].seq < w[1].seq));
        store.write(vec![Change::Delivered(left.iter().map(|w| w.seq).collect())]).await.unwrap();
        assert_eq!(store.backlog().await.unwrap(), (0, 0));
    }
}
