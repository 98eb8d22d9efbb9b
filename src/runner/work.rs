//! Jobs: from the queue of the project to the partition of their application, and from there, one
//! after another, to the control plane and back to who asked.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use reqwest::Method;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::calls::{Calls, WAIT_S};
use super::direct::bring;
use super::judge::{self, Message, Next, Refusal, Verdict};
use super::status::StatusSender;
use super::topology::{EVENTS, consume};
use crate::base::backoff::{Backoff, random};
use crate::base::encoding::hex;
use crate::broker::cloud_events::{CloudEvent, attribute};
use crate::broker::{confirmed, publish, with_timeout};
use crate::contract::job::{
    Job, answers_exchange, dead_exchange, jobs_exchange, partition_queue, partitions_exchange,
};
use crate::contract::sealing::SealingKey;

/// Jobs on their way to partitions at once. A message may be as large as the broker lets it be, and
/// each of them is in memory.
const FORWARDED: u16 = 16;
/// Between looks at a job whose call is answered before its time.
const LOOK: Duration = Duration::from_secs(1);
/// Headers of a message on its way through a partition; the token is read there from others too.
const TOKEN: &str = "pipeops-token";
const REDELIVERED: &str = "pipeops-redelivered";
/// The attribute of CloudEvents that has the token of a job.
const TOKEN_ATTRIBUTE: &str = "pipeopstoken";

/// Where the public half of the sealing key is told.
pub(super) const SEALING_KEY: &str = "/api/v1/sealing-key";

/// Why no more jobs are taken over a connection.
pub(super) enum Ended {
    /// The Runner stops.
    Stopped,
    /// The control plane refuses this Runner: the state, and why.
    Refused(&'static str, String),
    /// The control plane does not answer, before anything is taken.
    Away(String),
    /// The broker is away or refuses something.
    Lost(anyhow::Error),
}

impl From<anyhow::Error> for Ended {
    fn from(error: anyhow::Error) -> Ended {
        Ended::Lost(error)
    }
}

impl From<lapin::Error> for Ended {
    fn from(error: lapin::Error) -> Ended {
        Ended::Lost(error.into())
    }
}

/// What all jobs of one connection have in common.
pub(super) struct Worker {
    pub(super) calls: Calls,
    pub(super) project: String,
    pub(super) key: Arc<SealingKey>,
    pub(super) direct: bool,
    /// Of the jobs at once.
    pub(super) permits: Semaphore,
    pub(super) status: StatusSender,
    pub(super) stop: CancellationToken,
}

/// What comes of a message.
enum Outcome {
    /// It has its answer already.
    Forget,
    Answer(Value),
    Refuse(Refusal),
}

impl Worker {
    /// Brings jobs to the partitions of their applications: one Runner at a time does, in the order
    /// that they came in.
    pub(super) async fn forward(self: Arc<Worker>, channel: Channel) -> Result<(), Ended> {
        let consumer = consume(&channel, &jobs_exchange(&self.project), FORWARDED).await?;
        let mut batches = consumer.ready_chunks(usize::from(FORWARDED));
        let partitions = partitions_exchange(&self.project);
        while let Some(batch) = self.unless_stopped(batches.next()).await? {
            let mut sent = Vec::new();
            for delivery in batch {
                let mut delivery = delivery?;
                let message = message_of(&mut delivery);
                let job = match judge::read(&message, &self.project) {
                    Ok(job) => job,
                    Err(refusal) => {
                        self.refuse(&channel, &message, &refusal).await?;
                        ack(&delivery).await?;
                        continue;
                    }
                };
                let key = job.partition().to_string();
                let properties = forwarded(&message);
                let confirmation =
                    publish(&channel, &partitions, &key, properties, &message.body).await?;
                sent.push((delivery, confirmation));
            }
            for (delivery, confirmation) in sent {
                if !confirmed(confirmation).await? {
                    return Err(anyhow::anyhow!("no queue is bound to {partitions}").into());
                }
                ack(&delivery).await?;
            }
        }
        Err(cancelled())
    }

    /// Does the jobs of a partition, one after another.
    pub(super) async fn work(self: Arc<Worker>, channel: Channel, number: u8) -> Result<(), Ended> {
        let queue = partition_queue(&self.project, number);
        let mut consumer = consume(&channel, &queue, 1).await?;
        while let Some(delivery) = self.unless_stopped(consumer.next()).await? {
            let mut delivery = delivery?;
            let message = message_of(&mut delivery);
            let Ok(_permit) = self.unless_stopped(self.permits.acquire()).await? else {
                return Err(Ended::Stopped);
            };
            self.carry_out(&channel, &message).await?;
            ack(&delivery).await?;
        }
        Err(cancelled())
    }

    /// Logs what happens to agents and operations.
    pub(super) async fn hear(self: Arc<Worker>, channel: Channel) -> Result<(), Ended> {
        let mut consumer = consume(&channel, EVENTS, FORWARDED).await?;
        while let Some(delivery) = self.unless_stopped(consumer.next()).await? {
            let delivery = delivery?;
            let event: Value = serde_json::from_slice(&delivery.data).unwrap_or_default();
            let text = |value: &Value| judge::short(value.as_str().unwrap_or_default());
            let operation = &event["operation"];
            tracing::info!(
                cluster = text(&event["cluster_name"]),
                operation = text(&operation["id"]),
                state = text(&operation["state"]),
                "heard {}",
                text(&event["type"])
            );
            ack(&delivery).await?;
        }
        Err(cancelled())
    }

    /// Does a job to its end, and publishes what has come of it. Killed anywhere, it is done again
    /// from the beginning, to the same effect: the control plane knows the job.
    async fn carry_out(&self, channel: &Channel, message: &Message) -> Result<(), Ended> {
        let (outcome, job) = match judge::read(message, &self.project) {
            Ok(job) => (self.follow(&job, message).await?, Some(job)),
            Err(refusal) => (Outcome::Refuse(refusal), None),
        };
        match (outcome, job) {
            (Outcome::Answer(seen), Some(job)) => {
                let id = judge::short(seen["id"].as_str().unwrap_or_default());
                let answer = judge::answer(&job, &seen);
                let state = judge::short(answer["state"].as_str().unwrap_or_default());
                self.reply(channel, message, &format!("answer-{id}"), &id, &answer).await?;
                self.answered(&id).await?;
                tracing::info!(job = id, state, "answered");
            }
            (Outcome::Refuse(refusal), _) => {
                self.refuse(channel, message, &refusal).await?;
                if let Some(id) = judge::known_job(message, &refusal) {
                    self.answered(&id).await?;
                }
            }
            (Outcome::Forget | Outcome::Answer(_), _) => {}
        }
        Ok(())
    }

    /// Hands a job to the control plane and waits for its end.
    async fn follow(&self, job: &Job, message: &Message) -> Result<Outcome, Ended> {
        let mut opened = Map::new();
        for sealed in job.sealed() {
            let Some(clear) = self.key.open(&self.project, sealed) else {
                self.check_key().await?;
                return Ok(Outcome::Refuse(Refusal::sealed()));
            };
            opened.insert(sealed.to_owned(), clear.expose().into());
        }
        let mut request = json!({
            "token": message.token, "message": String::from_utf8_lossy(&message.body),
            "opened": opened, "redelivered": message.redelivered,
            "direct": self.direct && job.is_operation(),
        });
        let mut seen = self.ask(Method::POST, "/api/v1/jobs", Some(&request)).await?;
        loop {
            let known = match seen {
                Ok(known) => known,
                Err(refusal) => return Ok(Outcome::Refuse(refusal)),
            };
            let id = judge::short(known["id"].as_str().unwrap_or_default());
            let brought = match judge::next(&known) {
                Next::Forget => return Ok(Outcome::Forget),
                Next::Answer => return Ok(Outcome::Answer(known)),
                Next::Wait => Ok(()),
                Next::Bring => self.unless_stopped(bring(&known["direct"])).await?,
            };
            match brought {
                Ok(()) => {
                    seen = self.look(&id).await?;
                    if seen.is_ok() {
                        continue;
                    }
                    // the control plane has forgotten it, and says why
                }
                Err(why) => {
                    tracing::info!(job = id, why, "not through the tunnel");
                    request["direct"] = false.into();
                }
            }
            seen = self.ask(Method::POST, "/api/v1/jobs", Some(&request)).await?;
        }
    }

    /// Whether values are still sealed to this Runner's key: another one may have replaced it, and
    /// reads what this one does not.
    async fn check_key(&self) -> Result<(), Ended> {
        match self.ask(Method::GET, SEALING_KEY, None).await? {
            Ok(known) if known["public_key"] == self.key.public() => Ok(()),
            _ => {
                let why = "another Runner has replaced the sealing key of the project";
                Err(Ended::Refused("sealing_key_differs", why.into()))
            }
        }
    }

    /// What has come of a job after a time, or when it has ended.
    async fn look(&self, id: &str) -> Result<Result<Value, Refusal>, Ended> {
        let begun = Instant::now();
        let path = format!("/api/v1/jobs/{id}?wait_s={WAIT_S}");
        let mut seen = self.ask(Method::GET, &path, None).await?;
        if let Ok(Value::Object(seen)) = &mut seen {
            // it has been brought
            seen.remove("direct");
        }
        if !matches!(&seen, Ok(seen) if judge::next(seen) != Next::Wait) {
            self.unless_stopped(sleep(LOOK.saturating_sub(begun.elapsed()))).await?;
        }
        Ok(seen)
    }

    /// Asks the control plane until it decides something. What is on its way to it is waited for,
    /// also by a Runner that stops.
    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Result<Value, Refusal>, Ended> {
        let (mut backoff, mut told) = (Backoff::default(), String::new());
        loop {
            let call = self.calls.call(method.clone(), path, body);
            let answer =
                if method == Method::GET { self.unless_stopped(call).await? } else { call.await };
            let why = match judge::verdict(answer) {
                Verdict::Taken(seen) => {
                    self.status.control_plane(None);
                    return Ok(Ok(seen));
                }
                Verdict::Refused(refusal) => return Ok(Err(refusal)),
                Verdict::Unauthorized(why) => return Err(Ended::Refused("token_revoked", why)),
                Verdict::Later(why) => {
                    if told != why {
                        tracing::info!(why, "a job waits: the control plane decides later");
                        told = why;
                    }
                    None
                }
                Verdict::Away(why) => Some(why),
            };
            self.status.control_plane(why.as_deref());
            self.unless_stopped(sleep(backoff.next(random()))).await?;
        }
    }

    /// Tells the control plane that the answer is at the broker: then the job is not done again.
    async fn answered(&self, id: &str) -> Result<(), Ended> {
        let path = format!("/api/v1/jobs/{id}/answered");
        // that it is known there already, or not at all, changes nothing
        self.ask(Method::POST, &path, None).await.map(drop)
    }

    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Result<T, Ended> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(Ended::Stopped),
            done = work => Ok(done),
        }
    }

    /// Publishes an answer to who asked; where that queue is gone, to the one of the project.
    async fn reply(
        &self,
        channel: &Channel,
        message: &Message,
        id: &str,
        job: &str,
        answer: &Value,
    ) -> Result<(), Ended> {
        let Some(queue) = judge::reply_queue(message, &self.project) else { return Ok(()) };
        let exchange = answers_exchange(&self.project);
        let correlated = match message.correlation_id.as_str() {
            "" => &message.message_id,
            id => id,
        };
        for key in [&queue, &exchange] {
            let properties = self.properties("job.answer", id, job);
            let properties = properties.with_correlation_id(correlated.into());
            let body = answer.to_string();
            let sent = publish(channel, &exchange, key, properties, body.as_bytes()).await?;
            if confirmed(sent).await? {
                return Ok(());
            }
        }
        Err(anyhow::anyhow!("no queue is bound to {exchange}").into())
    }

    /// Makes a message a dead letter, and says so to who asked.
    async fn refuse(
        &self,
        channel: &Channel,
        message: &Message,
        refusal: &Refusal,
    ) -> Result<(), Ended> {
        // the same for the same message, so that a copy is known as one
        let digest = Sha256::digest([&message.body[..], message.token.as_bytes()].concat());
        let digest = &hex(&digest)[..32];
        let job = judge::known_job(message, refusal).unwrap_or_default();
        let letter = judge::dead_letter(message, refusal, &now()).to_string();
        let exchange = dead_exchange(&self.project);
        let properties = self.properties("job.dead", &format!("dead-{digest}"), &job);
        let sent = publish(channel, &exchange, "", properties, letter.as_bytes()).await?;
        if !confirmed(sent).await? {
            return Err(anyhow::anyhow!("no queue is bound to {exchange}").into());
        }
        let answer = judge::refused_answer(message, refusal);
        let id = match job.as_str() {
            "" => format!("refused-{digest}"),
            job => format!("answer-{job}"),
        };
        self.reply(channel, message, &id, &job, &answer).await?;
        tracing::warn!(reason = refusal.code, job, "a dead letter: {}", refusal.message);
        Ok(())
    }

    fn properties(&self, kind: &str, id: &str, job: &str) -> BasicProperties {
        let time = now();
        let about = CloudEvent { id, kind, project: &self.project, subject: job, time: &time };
        BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into())
            .with_message_id(id.into())
            .with_type(kind.into())
            .with_headers(about.headers())
    }
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}

fn cancelled() -> Ended {
    anyhow::anyhow!("the broker has ended the consumer: its queue was deleted").into()
}

async fn ack(delivery: &Delivery) -> anyhow::Result<()> {
    with_timeout("acknowledging", delivery.ack(BasicAckOptions::default())).await.map(drop)
}

/// What counts of a delivery; its body is moved.
fn message_of(delivery: &mut Delivery) -> Message {
    let empty = FieldTable::default();
    let properties = &delivery.properties;
    let headers = properties.headers().as_ref().unwrap_or(&empty);
    let text = |value: &Option<lapin::types::ShortString>| {
        value.as_ref().map(|value| value.as_str().to_owned()).unwrap_or_default()
    };
    let token =
        attribute(headers, TOKEN_ATTRIBUTE).or_else(|| match headers.inner().get(TOKEN)? {
            AMQPValue::LongString(token) => std::str::from_utf8(token.as_bytes()).ok(),
            _ => None,
        });
    // a quorum queue counts deliveries in a header, also where the broker has restarted
    let counted = headers.inner().get("x-delivery-count");
    let counted = counted.is_some_and(|count| !is_zero(count));
    let marked = headers.inner().get(REDELIVERED) == Some(&AMQPValue::Boolean(true));
    Message {
        token: token.unwrap_or_default().to_owned(),
        reply_to: text(properties.reply_to()),
        correlation_id: text(properties.correlation_id()),
        message_id: text(properties.message_id()),
        redelivered: delivery.redelivered || counted || marked,
        body: std::mem::take(&mut delivery.data),
    }
}

fn is_zero(value: &AMQPValue) -> bool {
    use AMQPValue::{
        LongInt, LongLongInt, LongUInt, ShortInt, ShortShortInt, ShortShortUInt, ShortUInt,
    };
    matches!(
        value,
        LongLongInt(0)
            | LongInt(0)
            | LongUInt(0)
            | ShortInt(0)
            | ShortUInt(0)
            | ShortShortInt(0)
            | ShortShortUInt(0)
    )
}

/// A message on its way to a partition. Nothing else of its headers and properties goes on: `CC`
/// would send it to other partitions too, `user-id` have the broker close the channel, an
/// expiration lose it without a word.
fn forwarded(message: &Message) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert(TOKEN.into(), AMQPValue::LongString(message.token.as_str().into()));
    headers.insert(REDELIVERED.into(), AMQPValue::Boolean(message.redelivered));
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_content_type("application/json".into())
        .with_reply_to(message.reply_to.as_str().into())
        .with_correlation_id(message.correlation_id.as_str().into())
        .with_message_id(message.message_id.as_str().into())
        .with_headers(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_goes_on_with_what_counts_of_it_and_nothing_else() {
        let mut headers = FieldTable::default();
        headers.insert("cloudEvents:pipeopstoken".into(), AMQPValue::LongString("a.b.c".into()));
        headers.insert("CC".into(), AMQPValue::LongString("3".into()));
        let delivery = |headers: FieldTable, redelivered| {
            let mut delivery =
                Delivery::mock(1, "".into(), "".into(), redelivered, b"body".to_vec());
            delivery.properties = BasicProperties::default()
                .with_reply_to("r".into())
                .with_correlation_id("c".into())
                .with_message_id("m".into())
                .with_user_id("guest".into())
                .with_expiration("1".into())
                .with_headers(headers);
            delivery
        };
        let message = message_of(&mut delivery(headers, false));
        assert_eq!((message.token.as_str(), message.redelivered), ("a.b.c", false));
        assert_eq!((message.reply_to.as_str(), &message.body[..]), ("r", &b"body"[..]));
        let on = forwarded(&message);
        assert_eq!((on.user_id(), on.expiration()), (&None, &None));
        assert_eq!(on.headers().as_ref().unwrap().inner().len(), 2);
        let again = message_of(&mut delivery(on.headers().clone().unwrap(), false));
        assert_eq!((again.token.as_str(), again.redelivered), ("a.b.c", false));
        for (name, value, redelivered) in [
            ("x-delivery-count", AMQPValue::LongLongInt(0), false),
            ("x-delivery-count", AMQPValue::LongLongInt(1), true),
            (REDELIVERED, AMQPValue::Boolean(true), true),
            (REDELIVERED, AMQPValue::LongString("true".into()), false),
        ] {
            let mut headers = FieldTable::default();
            headers.insert(name.into(), value);
            let message = message_of(&mut delivery(headers, false));
            assert_eq!(message.redelivered, redelivered, "{name}");
        }
        assert!(message_of(&mut delivery(FieldTable::default(), true)).redelivered);
    }
}
