//! Exchanges and queues of a project: made, or looked for where the Runner may not make them.

use lapin::options::{
    BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Consumer, ExchangeKind};

use crate::broker::with_timeout;
use crate::contract::job::{
    PARTITIONS, answers_exchange, dead_exchange, jobs_exchange, partition_queue,
    partitions_exchange,
};

/// The queue of events that all Runners share, made by control planes too.
pub(super) const EVENTS: &str = "pipeops.runners";
/// A job is never lost for having been given back often: with every restart of the broker or of a
/// Runner. RabbitMQ drops a message after 20 of them from 4.0 on, and keeps this limit.
const DELIVERY_LIMIT: i64 = 1_000_000;
/// Of the queue that others publish to: what no Runner can read (see
/// [`crate::broker::is_unreadable`]) ends its connection each time, and must go at last. A job is
/// there in hand for as long as it takes to publish it again, and alone.
const JOBS_DELIVERY_LIMIT: i64 = 100;

/// The queue that each Runner of a project consumes, and nobody publishes to: of one with a single
/// active consumer, the broker does not count those that stand by.
pub(super) fn runners_queue(project: &str) -> String {
    format!("{}.runners", jobs_exchange(project))
}

/// A queue that is replicated, and a message of it on disk before it is confirmed.
fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments
}

/// The same of which one consumer at a time takes, in its order; the others stand by.
fn ordered(limit: i64) -> FieldTable {
    let mut arguments = quorum();
    arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(limit));
    arguments
}

/// # Errors
/// What the broker refuses; it names the exchange or the queue.
pub(super) async fn declare(
    channel: &Channel,
    project: &str,
    declares: bool,
    events: bool,
) -> anyhow::Result<()> {
    let (jobs, partitions) = (jobs_exchange(project), partitions_exchange(project));
    let (answers, dead) = (answers_exchange(project), dead_exchange(project));
    let exchanges = [
        (&jobs, ExchangeKind::Fanout),
        (&partitions, ExchangeKind::Direct),
        (&answers, ExchangeKind::Direct),
        (&dead, ExchangeKind::Fanout),
    ];
    for (exchange, kind) in exchanges {
        let options = ExchangeDeclareOptions {
            durable: true,
            passive: !declares,
            ..ExchangeDeclareOptions::default()
        };
        let declared = channel.exchange_declare(
            exchange.as_str().into(),
            kind,
            options,
            FieldTable::default(),
        );
        with_timeout("declaring an exchange", declared).await?;
    }
    let mut queues = vec![
        (jobs.clone(), ordered(JOBS_DELIVERY_LIMIT), &jobs, String::new()),
        (answers.clone(), quorum(), &answers, answers.clone()),
        (dead.clone(), quorum(), &dead, String::new()),
    ];
    for number in 0..PARTITIONS {
        let queue = partition_queue(project, number);
        queues.push((queue, ordered(DELIVERY_LIMIT), &partitions, number.to_string()));
    }
    for (queue, arguments, exchange, key) in queues {
        queue_declare(channel, &queue, arguments, declares).await?;
        if declares {
            let (exchange, key) = (exchange.as_str().into(), key.into());
            let options = QueueBindOptions::default();
            let bound =
                channel.queue_bind(queue.into(), exchange, key, options, FieldTable::default());
            with_timeout("binding a queue", bound).await?;
        }
    }
    queue_declare(channel, &runners_queue(project), quorum(), declares).await?;
    if events {
        queue_declare(channel, EVENTS, FieldTable::default(), declares).await?;
    }
    Ok(())
}

async fn queue_declare(
    channel: &Channel,
    queue: &str,
    arguments: FieldTable,
    declares: bool,
) -> anyhow::Result<()> {
    let options =
        QueueDeclareOptions { durable: true, passive: !declares, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.into(), options, arguments);
    with_timeout("declaring a queue", declared).await.map(drop)
}

/// How many Runners of a project there are, this one too.
///
/// # Errors
/// What the broker refuses.
pub(super) async fn runners(channel: &Channel, project: &str) -> anyhow::Result<u32> {
    let options =
        QueueDeclareOptions { durable: true, passive: true, ..QueueDeclareOptions::default() };
    let queue = runners_queue(project);
    let declared = channel.queue_declare(queue.into(), options, FieldTable::default());
    Ok(with_timeout("counting Runners", declared).await?.consumer_count())
}

/// Ends a channel: what was in hand goes to the next consumer before all that is behind it. No
/// consumer may be dropped before that: it would be cancelled alone, and the next one begin with
/// what is behind.
pub(super) async fn close(channel: &Channel) {
    if channel.status().connected() {
        let closed = channel.close(200, "let go".into());
        // with the connection it is closed too
        drop(with_timeout("closing a channel", closed).await);
    }
}

/// What comes from a queue, one message at once: each may be as large as the broker lets it be.
///
/// # Errors
/// What the broker refuses.
pub(super) async fn consume(channel: &Channel, queue: &str) -> anyhow::Result<Consumer> {
    let limited = channel.basic_qos(1, BasicQosOptions::default());
    with_timeout("limiting what comes at once", limited).await?;
    let options = BasicConsumeOptions::default();
    let consumer = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
    with_timeout("consuming a queue", consumer).await
}
