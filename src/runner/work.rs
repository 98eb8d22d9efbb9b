//! Jobs: from the queue of the project to the partition of their application, and from there, one
//! after another, to the control plane and back to who asked.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;
use lapin::{BasicProperties, Channel, Connection, Consumer};
use reqwest::Method;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::calls::{Calls, WAIT_S};
use super::direct::bring;
use super::judge::{self, Message, Next, Refusal, Verdict};
use super::message::{forwarded, message_of};
use super::share::Shares;
use super::status::StatusSender;
use super::topology::{EVENTS, close, consume, runners, runners_queue};
use crate::base::backoff::{Backoff, random};
use crate::base::encoding::hex;
use crate::broker::cloud_events::CloudEvent;
use crate::broker::{Confirmed, confirmed, confirming_channel, publish, with_timeout};
use crate::contract::job::{
    Job, answers_exchange, dead_exchange, jobs_exchange, partition_queue, partitions_exchange,
};
use crate::contract::sealing::SealingKey;

/// A channel that has been at work for so long is opened again when the broker closes it.
const SETTLED: Duration = Duration::from_secs(60);
/// A job waits for so long for others here, where another Runner could take it.
const HANDS_FULL: Duration = Duration::from_secs(5);
/// How often a Runner asks whether it is still one.
const WATCH: Duration = Duration::from_secs(3);
/// Between looks at a job whose call is answered before its time.
const LOOK: Duration = Duration::from_secs(1);
/// Where jobs are brought.
const JOBS: &str = "/api/v1/jobs";
/// What a path that is not there is answered with, and a key that nobody has told.
pub(super) const NOT_FOUND: &str = "not_found";
/// Where the public half of the sealing key is told.
pub(super) const SEALING_KEY: &str = "/api/v1/sealing-key";

/// Why no more jobs are taken over a connection.
pub(super) enum Ended {
    /// The Runner stops.
    Stopped,
    /// The control plane refuses this Runner: the state, and why.
    Refused(&'static str, String),
    /// The control plane does not answer, or is one that knows no jobs.
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
    pub(super) shares: Shares,
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
        let mut consumer = consume(&channel, &jobs_exchange(&self.project)).await?;
        let ended = self.spread_all(&channel, &mut consumer).await;
        close(&channel).await;
        ended
    }

    async fn spread_all(&self, channel: &Channel, jobs: &mut Consumer) -> Result<(), Ended> {
        while let Some(delivery) = self.unless_stopped(jobs.next()).await? {
            let mut delivery = delivery?;
            let message = message_of(&mut delivery, false);
            match judge::read(&message, &self.project) {
                Ok(job) => self.spread(channel, &message, job.partition()).await?,
                Err(refusal) => self.refuse(channel, &message, &refusal).await?,
            }
            ack(&delivery).await?;
        }
        Err(cancelled())
    }

    /// Publishes a job to its partition, until that takes it: given back, it would go at last.
    async fn spread(&self, channel: &Channel, message: &Message, to: u8) -> Result<(), Ended> {
        let (exchange, key) = (partitions_exchange(&self.project), to.to_string());
        let mut backoff = Backoff::default();
        loop {
            let sent = publish(channel, &exchange, &key, forwarded(message), &message.body).await?;
            match confirmed(sent).await? {
                Confirmed::Taken => return Ok(()),
                why => tracing::warn!("{exchange} does not take a job for {key}: {why:?}"),
            }
            self.unless_stopped(sleep(backoff.next(random()))).await?;
        }
    }

    /// Does the jobs of a partition, on one channel after another: the broker closes one with a job
    /// in hand for long (`consumer_timeout`), and the Runner one to let the partition go.
    pub(super) async fn work(
        self: Arc<Worker>,
        connection: Arc<Connection>,
        number: u8,
    ) -> Result<(), Ended> {
        let queue = partition_queue(&self.project, number);
        loop {
            let channel = confirming_channel(&connection).await?;
            let mut consumer = consume(&channel, &queue).await?;
            let begun = Instant::now();
            let ended = self.work_on(&channel, &mut consumer, number).await;
            let was_closed = !channel.status().connected() && connection.status().connected();
            close(&channel).await;
            match ended {
                Ok(()) => {}
                Err(Ended::Lost(error)) if was_closed && begun.elapsed() > SETTLED => {
                    let error = format!("{error:#}");
                    tracing::warn!(partition = number, error, "its channel is opened again");
                }
                Err(ended) => return Err(ended),
            }
        }
    }

    /// Does the jobs of a partition, one after another, until it is to be let go.
    async fn work_on(
        &self,
        channel: &Channel,
        jobs: &mut Consumer,
        number: u8,
    ) -> Result<(), Ended> {
        while let Some(delivery) = self.unless_stopped(jobs.next()).await? {
            let mut delivery = delivery?;
            let Some(permit) = self.permit(channel).await? else { return Ok(()) };
            self.shares.took(number, Instant::now());
            self.carry_out(channel, &message_of(&mut delivery, true)).await?;
            ack(&delivery).await?;
            drop(permit);
            let now = Instant::now();
            if self.shares.has_many(now) {
                let runners = runners(channel, &self.project).await?;
                if self.shares.lets_go(number, runners, now) {
                    return Ok(());
                }
            }
        }
        Err(cancelled())
    }

    /// Leave to do one more job; none where this Runner has its hands full, and there are others.
    async fn permit(&self, channel: &Channel) -> Result<Option<SemaphorePermit<'_>>, Ended> {
        loop {
            let permit = timeout(HANDS_FULL, self.permits.acquire());
            match self.unless_stopped(permit).await? {
                Ok(permit) => return permit.map(Some).map_err(|_| Ended::Stopped),
                Err(_) if runners(channel, &self.project).await? > 1 => return Ok(None),
                Err(_) => {}
            }
        }
    }

    /// Is one of the project's Runners, for as long as control plane and key allow that: one that has
    /// no job in hand would hear of neither.
    pub(super) async fn attend(self: Arc<Worker>, channel: Channel) -> Result<(), Ended> {
        let mut consumer = consume(&channel, &runners_queue(&self.project)).await?;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return Err(Ended::Stopped),
                // nobody publishes there
                delivery = consumer.next() => match delivery {
                    Some(delivery) => ack(&delivery?).await?,
                    None => return Err(cancelled()),
                },
                () = sleep(WATCH) => self.check_key().await?,
            }
        }
    }

    /// Logs what happens to agents and operations.
    pub(super) async fn hear(self: Arc<Worker>, channel: Channel) -> Result<(), Ended> {
        let mut consumer = consume(&channel, EVENTS).await?;
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
            // the control plane has it on record
            (Outcome::Refuse(refusal), _) => self.refuse(channel, message, &refusal).await?,
            (Outcome::Forget | Outcome::Answer(_), _) => {}
        }
        Ok(())
    }

    /// Hands a job to the control plane and waits for its end.
    async fn follow(&self, job: &Job, message: &Message) -> Result<Outcome, Ended> {
        let mut request = json!({
            "token": message.token, "message": String::from_utf8_lossy(&message.body),
            "redelivered": message.redelivered, "direct": self.direct && job.is_operation(),
        });
        let mut outcome = self.ended(job, &mut request).await?;
        match &mut outcome {
            Outcome::Answer(seen) => judge::mask(seen, &request["opened"]),
            Outcome::Refuse(refusal) => {
                refusal.message = judge::masked(&refusal.message, &request["opened"]);
            }
            Outcome::Forget => {}
        }
        Ok(outcome)
    }

    async fn ended(&self, job: &Job, request: &mut Value) -> Result<Outcome, Ended> {
        let mut seen = self.ask(Method::POST, JOBS, Some(request)).await?;
        loop {
            let known = match seen {
                Ok(known) => known,
                Err(refusal) => return Ok(Outcome::Refuse(refusal)),
            };
            let id = judge::short(known["id"].as_str().unwrap_or_default());
            let is_there = match judge::next(&known) {
                Next::Forget => return Ok(Outcome::Forget),
                Next::Answer => return Ok(Outcome::Answer(known)),
                Next::Wait => true,
                Next::Open => {
                    // the maker is who the control plane says it is
                    let maker = known["maker"].as_str().unwrap_or_default();
                    let opened = self.opened(job, maker).filter(|_| request["opened"].is_null());
                    let Some(opened) = opened else {
                        self.check_key().await?;
                        return Ok(Outcome::Refuse(Refusal::sealed()));
                    };
                    request["opened"] = opened.into();
                    false
                }
                Next::Bring => match self.unless_stopped(bring(&known["direct"])).await? {
                    Ok(()) => true,
                    Err(why) => {
                        tracing::info!(job = id, why, "not through the tunnel");
                        request["direct"] = false.into();
                        false
                    }
                },
            };
            if is_there {
                seen = self.look(&id).await?;
                // else the agent may have lost it, or the control plane has forgotten it
                if seen.as_ref().is_ok_and(judge::has_begun) {
                    continue;
                }
            }
            seen = self.ask(Method::POST, JOBS, Some(request)).await?;
        }
    }

    /// By sealed text of a job, what it says; none where one is not for this Runner and this maker.
    fn opened(&self, job: &Job, maker: &str) -> Option<Map<String, Value>> {
        let open = |sealed: &str| {
            let clear = self.key.open(&self.project, maker, sealed)?;
            Some((sealed.to_owned(), clear.expose().into()))
        };
        job.sealed().into_iter().map(open).collect()
    }

    /// Whether the control plane still knows this Runner, and values are still sealed to its key.
    async fn check_key(&self) -> Result<(), Ended> {
        match self.ask(Method::GET, SEALING_KEY, None).await? {
            Ok(known) if known["public_key"] == self.key.public() => Ok(()),
            // it is told anew
            Err(refusal) if refusal.code == NOT_FOUND => Err(Ended::Away(refusal.message)),
            Err(refusal) => Err(Ended::Refused("runner_refused", refusal.message)),
            Ok(_) => {
                let why = "values are sealed to another key of the project by now";
                Err(Ended::Refused("sealing_key_differs", why.into()))
            }
        }
    }

    /// What has come of a job after a time, or when it has ended.
    async fn look(&self, id: &str) -> Result<Result<Value, Refusal>, Ended> {
        let begun = Instant::now();
        let path = format!("{JOBS}/{id}?wait_s={WAIT_S}");
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
                // one of the version before, or something between, which knows no jobs
                Verdict::Refused(refusal) if refusal.code == NOT_FOUND && path == JOBS => {
                    Some(refusal.message)
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
        let path = format!("{JOBS}/{id}/answered");
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
        // what a queue of somebody's own does with it is nobody else's trouble
        let mut keys = vec![&queue, &exchange];
        keys.dedup();
        let mut why = anyhow::anyhow!("no queue takes an answer from {exchange}");
        for key in keys {
            let properties = self.properties("job.answer", id, job);
            let properties = properties.with_correlation_id(correlated.into());
            let body = answer.to_string();
            let sent = publish(channel, &exchange, key, properties, body.as_bytes()).await?;
            match confirmed(sent).await {
                Ok(Confirmed::Taken) => return Ok(()),
                Ok(Confirmed::Unroutable | Confirmed::Rejected) => {}
                Err(error) => why = error,
            }
        }
        Err(why.into())
    }

    /// Makes a message a dead letter, and says so to who asked.
    async fn refuse(
        &self,
        channel: &Channel,
        message: &Message,
        refusal: &Refusal,
    ) -> Result<(), Ended> {
        if message.is_told {
            // an answer to an answer, or a dead letter for a dead letter, would go round for ever
            tracing::warn!("an answer, a dead letter or an event came as a job and is dropped");
            return Ok(());
        }
        // the same for the same message, so that a copy is known as one
        let mut digest = Sha256::new();
        digest.update(&message.body);
        digest.update(&message.token);
        let digest = &hex(&digest.finalize())[..32];
        let job = refusal.job.clone().unwrap_or_default();
        let letter = judge::dead_letter(message, refusal, &now()).to_string();
        let exchange = dead_exchange(&self.project);
        let properties = self.properties("job.dead", &format!("dead-{digest}"), &job);
        let sent = publish(channel, &exchange, "", properties, letter.as_bytes()).await?;
        match confirmed(sent).await? {
            Confirmed::Taken => {}
            // the log has it: whoever lets it be full does not keep jobs from being done
            Confirmed::Rejected => tracing::error!("{exchange} is full: a dead letter is lost"),
            Confirmed::Unroutable => {
                return Err(anyhow::anyhow!("no queue is bound to {exchange}").into());
            }
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
