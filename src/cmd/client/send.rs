//! `runner seal` and `runner send`: jobs as people and CI publish them.

use futures_util::StreamExt as _;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Consumer};
use serde_json::{Value, json};

use super::{Context, Session, printer};
use crate::base::error::{Exit, Failure};
use crate::base::text::printable;
use crate::broker::cloud_events::CloudEvent;
use crate::broker::{
    self, Broker, Confirmed, confirmed, confirming_channel, is_refusal, with_timeout,
};
use crate::cli::SendArgs;
use crate::client::operations::failure;
use crate::contract::job::{Job, body_digest};
use crate::contract::sealing::seal as sealed;
use crate::contract::types::Operation;
use crate::frp::wire::fresh_run_id;
use crate::host::user_files::unreadable;
use crate::output::Printer;

/// # Errors
/// Exit 2 for a key that is none, 7 where the project has none.
pub(in crate::cmd) async fn seal(
    context: &Context,
    given: Option<[String; 3]>,
    name: Option<&str>,
) -> anyhow::Result<Exit> {
    let [key, project, maker] = match given {
        Some(given) => given,
        None => {
            let session = Session::open(context, name)?;
            let known = context.unless_stopped(session.api.get("/api/v1/sealing-key")).await?;
            let text = |name: &str| known[name].as_str().unwrap_or_default().to_owned();
            ["public_key", "project", "maker"].map(text)
        }
    };
    let value = read(context, "-").await?;
    // the end of the line that `echo` writes is no part of a value
    let value = value.strip_suffix('\n').unwrap_or(&value);
    let text = sealed(&key, &project, &maker, value).ok_or_else(|| {
        Failure::usage("SEALING_KEY_WRONG", "nothing can be sealed with that key")
            .why("it is no base64 of the 32 bytes of a key of X25519")
            .hint(
                "without --key it is the one that the project's Runners have at the control plane",
            )
    })?;
    Printer::new(false, false, context.no_color()).data(&text);
    Ok(Exit::Done)
}

/// # Errors
/// What is wrong with the job; what control plane or broker refuse; as the job ends.
pub(in crate::cmd) async fn send(context: &Context, args: SendArgs) -> anyhow::Result<Exit> {
    let body = read(context, &args.file).await?;
    let refused = |refusal: crate::contract::job::Refusal| {
        let failure = Failure::usage(refusal.code, refusal.message);
        failure.hint(format!("`pipeops explain {}` says what helps", refusal.code))
    };
    let job = Job::parse(body.as_bytes()).map_err(refused)?;
    job.check_secrets().map_err(refused)?;
    let broker = broker(context, &args).await?;
    let session = Session::open(context, args.context.as_deref())?;
    // the token reaches no further than the job
    let mut wanted = json!({"sha256": body_digest(body.as_bytes()), "ttl_s": args.ttl});
    if let Some(clusters) = job.clusters.as_ref().or(job.cluster.clone().map(|c| vec![c]).as_ref())
    {
        wanted["clusters"] = json!(clusters);
    } else if let Some(selector) = &job.selector {
        wanted["selector"] = json!(selector);
    }
    let issued = session.api.post("/api/v1/job-tokens", None, &wanted);
    let issued = context.unless_stopped(issued).await?;
    let issued: Value = serde_json::from_str(&issued).unwrap_or_default();
    let sent = Sent::new(&issued)?;
    let mut printer = printer(context, &args.output);
    let published = async {
        let connection = broker.connect("pipeops runner send").await?;
        let channel = confirming_channel(&connection).await?;
        let answers = if args.detach { None } else { Some(sent.listen(&channel).await?) };
        sent.publish(&channel, body.as_bytes(), answers.is_some()).await?;
        anyhow::Ok((connection, answers))
    };
    let published = async { published.await.map_err(undelivered) };
    let stopped = || {
        Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted")
            .why(format!("job {} may be published all the same", sent.id))
    };
    let (connection, answers) = context.or_stopped(published, stopped).await?;
    let Some(answers) = answers else {
        printer.document(&json!({"job": sent.id}));
        printer.data(&sent.id);
        return Ok(Exit::Done);
    };
    printer.waiting(&format!("job {}", sent.id));
    let stopped = || {
        let what = format!("stopped waiting; job {} goes on", sent.id);
        Failure::new(Exit::Interrupted, "DETACHED", what)
    };
    let answer = async { sent.answer(answers).await.map_err(undelivered) };
    let answer = context.or_stopped(answer, stopped).await;
    printer.waited();
    drop(connection);
    conclude(&printer, &answer?)
}

async fn read(context: &Context, path: &str) -> anyhow::Result<String> {
    let (from, name) = if path == "-" { ("/dev/stdin", "standard input") } else { (path, path) };
    let (host, from) = (context.host("/"), from.to_owned());
    // a terminal or a pipe gives nothing for as long as it likes
    let read = tokio::task::spawn_blocking(move || host.read_user_file(&from));
    let text = context.unless_stopped(read).await?;
    text.map_err(|e| unreadable(name, &e).into())
}

async fn broker(context: &Context, args: &SendArgs) -> anyhow::Result<Broker> {
    let host = context.host("/");
    let url = match (&args.amqp_url_file, &context.amqp_url) {
        (Some(path), _) => context.token_file(&host, path).await?,
        (None, Some(url)) => url.clone(),
        (None, None) => {
            let failure = Failure::usage("AMQP_URL_WRONG", "no broker is named");
            return Err(failure.hint("--amqp-url-file FILE, or PIPEOPS_AMQP_URL").into());
        }
    };
    let ca = args.amqp_ca.as_deref();
    let ca = ca.map(|path| host.read_user_file(path).map_err(|e| unreadable(path, &e)));
    Ok(Broker { url: broker::check(&url)?, ca: ca.transpose()? })
}

/// What the broker, or the way to it, does not let through.
fn undelivered(error: anyhow::Error) -> Failure {
    let why = format!("{error:#}");
    if is_refusal(&error) {
        return Failure::new(Exit::Refused, "BROKER_REFUSES", "the message broker refuses")
            .why(why)
            .hint(
                "a publisher needs the permission `write` on pipeops.jobs.PROJECT, and for the \
                   answer configure, write and read on pipeops.answers.PROJECT.*, read on \
                   pipeops.answers.PROJECT; a Runner makes the exchanges when it starts",
            );
    }
    Failure::new(Exit::Network, "BROKER_SILENT", "the message broker is not reached")
        .why(why)
        .hint("check the URL and the way there; where the job was published, its Runner goes on")
}

/// A job with its token, on its way.
struct Sent {
    id: String,
    token: String,
    project: String,
    exchange: String,
    answers: String,
    /// The queue of this command alone.
    queue: String,
}

impl Sent {
    fn new(issued: &Value) -> Result<Sent, Failure> {
        // names at the broker are 255 bytes at most
        let text = |name: &str| {
            let text = issued[name].as_str().unwrap_or_default();
            let fits = !text.is_empty() && (text.len() < 200 || name == "token");
            fits.then(|| text.to_owned()).ok_or_else(|| {
                let what = "the control plane answers with no token for a job";
                Failure::new(Exit::Network, "ANSWER_UNREADABLE", what)
                    .why(format!("its answer has no `{name}`"))
                    .hint("is this a control plane that knows jobs?")
            })
        };
        let answers = text("reply_queue")?;
        Ok(Sent {
            id: text("id")?,
            token: text("token")?,
            project: text("project")?,
            exchange: text("exchange")?,
            queue: format!("{answers}.{}", fresh_run_id()),
            answers,
        })
    }

    /// A queue for the answer, which goes with this command.
    async fn listen(&self, channel: &Channel) -> anyhow::Result<Consumer> {
        let queue = || self.queue.as_str().into();
        let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let declared = channel.queue_declare(queue(), options, FieldTable::default());
        with_timeout("declaring a queue", declared).await?;
        let exchange = self.answers.as_str().into();
        let options = QueueBindOptions::default();
        let bound = channel.queue_bind(queue(), exchange, queue(), options, FieldTable::default());
        with_timeout("binding a queue", bound).await?;
        let options = BasicConsumeOptions::default();
        let consumed = channel.basic_consume(queue(), "".into(), options, FieldTable::default());
        with_timeout("consuming a queue", consumed).await
    }

    async fn publish(&self, channel: &Channel, body: &[u8], answered: bool) -> anyhow::Result<()> {
        let time = jiff::Timestamp::now().to_string();
        let about = CloudEvent {
            id: &self.id,
            kind: "job",
            project: &self.project,
            subject: "",
            time: &time,
        };
        let mut headers = about.headers();
        let token = AMQPValue::LongString(self.token.as_str().into());
        headers.insert("cloudEvents:pipeopstoken".into(), token);
        let mut properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into())
            .with_message_id(self.id.as_str().into())
            .with_correlation_id(self.id.as_str().into())
            .with_headers(headers);
        if answered {
            properties = properties.with_reply_to(self.queue.as_str().into());
        }
        let sent = broker::publish(channel, &self.exchange, "", properties, body).await?;
        match confirmed(sent).await? {
            Confirmed::Taken => Ok(()),
            Confirmed::Unroutable => anyhow::bail!("no queue is bound to {}", self.exchange),
            Confirmed::Rejected => anyhow::bail!("{} takes no more messages", self.exchange),
        }
    }

    /// The answer to the job, of all that comes.
    async fn answer(&self, mut answers: Consumer) -> anyhow::Result<Value> {
        while let Some(delivery) = answers.next().await {
            let delivery = delivery?;
            delivery.ack(BasicAckOptions::default()).await?;
            let correlated = delivery.properties.correlation_id().as_ref();
            if correlated.is_some_and(|id| id.as_str() == self.id) {
                return serde_json::from_slice(&delivery.data).map_err(Into::into);
            }
        }
        anyhow::bail!("the queue for the answer was deleted")
    }
}

/// Prints an answer and ends as the job has ended.
fn conclude(printer: &Printer, answer: &Value) -> anyhow::Result<Exit> {
    printer.document(answer);
    let text = |name: &str| printable(answer[name].as_str().unwrap_or_default()).into_owned();
    let (state, reason, message) = (text("state"), text("reason"), text("message"));
    let operation = serde_json::from_value::<Operation>(answer["operation"].clone());
    if let Some(failure) = operation.ok().as_ref().and_then(failure) {
        return Err(failure.into());
    }
    if state == "succeeded" {
        let counts = &answer["rollout"]["counts"];
        let counts = if counts.is_object() { format!(": {counts}") } else { String::new() };
        printer.data(&format!("job {} {state}{counts}", text("job")));
        return Ok(Exit::Done);
    }
    let what = if message.is_empty() { format!("the job is {state}") } else { message };
    let mut failure = Failure::new(Exit::Problems, "OPERATION_FAILED", what);
    if state == "refused" {
        failure.exit = Exit::Refused;
    }
    if !reason.is_empty() {
        failure.hint = Some(format!("`pipeops explain {reason}` says what helps"));
        failure.code = reason;
    }
    Err(failure.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_ends_as_its_job_has_ended() {
        let printer = Printer::new(false, false, true);
        for (answer, exit, code) in [
            (json!({"state": "refused", "reason": "token_expired"}), 7, "token_expired"),
            (json!({"state": "failed", "rollout": {"counts": {}}}), 13, "OPERATION_FAILED"),
            (json!({"state": "paused", "message": "eu: crash_loop"}), 13, "OPERATION_FAILED"),
            (
                json!({"state": "failed", "operation": {"id": "o", "state": "failed",
                    "reason": "timed_out"}}),
                8,
                "timed_out",
            ),
            (json!({}), 13, "OPERATION_FAILED"),
        ] {
            let failure = Failure::from_error(&conclude(&printer, &answer).unwrap_err());
            assert_eq!((failure.exit.number(), failure.code.as_str()), (exit, code), "{answer}");
        }
        let done = json!({"job": "j", "state": "succeeded", "operation": {"state": "succeeded"}});
        assert_eq!(conclude(&printer, &done).unwrap(), Exit::Done);
    }

    #[test]
    fn a_token_for_a_job_has_all_that_is_needed() {
        let issued = json!({"id": "j-1", "token": "t", "project": "p", "exchange": "pipeops.jobs.p",
            "reply_queue": "pipeops.answers.p"});
        let sent = Sent::new(&issued).ok().unwrap();
        assert!(sent.queue.starts_with("pipeops.answers.p.") && sent.queue.len() > 40);
        for name in ["id", "token", "project", "exchange", "reply_queue"] {
            let mut issued = issued.clone();
            issued[name] = Value::Null;
            assert_eq!(Sent::new(&issued).err().unwrap().code, "ANSWER_UNREADABLE");
        }
    }
}
