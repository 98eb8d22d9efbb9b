//! `pipeops runner`: takes jobs of a project from RabbitMQ, has the control plane carry them out
//! with the rights of who asked, never with its own, and answers. Several share the queues.

mod calls;
pub mod config;
mod direct;
mod judge;
mod message;
mod share;
pub mod status;
mod topology;
mod work;

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::base::backoff::{Backoff, random};
use crate::base::task::boxed;
use crate::broker::{confirming_channel, is_refusal, is_unreadable};
use crate::contract::job::PARTITIONS;
use crate::contract::sealing::SealingKey;
use crate::host::{self, Host};
use calls::Calls;
use config::RunnerConfig;
use judge::Verdict;
use share::Shares;
use status::{CONTROL_PLANE_AWAY, RUNNING, StatusSender};
use topology::declare;
use work::{Ended, NOT_FOUND, SEALING_KEY, Worker};

/// A Runner that the control plane refuses asks again this often.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);
/// What is on its way to the control plane is waited for this long at the end.
const GRACE: Duration = Duration::from_secs(7);
/// A connection is closed in order within this time: then others take what was not done.
const CLOSE: Duration = Duration::from_secs(2);
/// Name at the broker.
const NAME: &str = "pipeops runner";

/// A Runner between its connections.
struct Runner {
    host: Host,
    config: RunnerConfig,
    key: Arc<SealingKey>,
    status: StatusSender,
    stop: CancellationToken,
}

/// Runs until `stop`. Nothing that broker or control plane do or do not do ends it.
///
/// # Errors
/// A state directory that cannot be used, or that another Runner uses; a sealing key that is none.
pub async fn run(host: Host, config: RunnerConfig, stop: CancellationToken) -> anyhow::Result<()> {
    host::raise_descriptor_limit();
    let state = config.state(&host)?;
    let _only = state.lock()?;
    let key = Arc::new(config.sealing_key(&host, &state)?);
    let status = StatusSender::new();
    let halt = CancellationToken::new();
    let published = tokio::spawn(status.clone().publish(state, halt.clone()));
    let runner = Runner { host, config, key, status: status.clone(), stop: stop.clone() };
    let mut backoff = Backoff::default();
    while !stop.is_cancelled() {
        let ended = runner.session(&mut backoff).await;
        let pause = match ended {
            Ended::Stopped => break,
            Ended::Refused(state, why) => {
                status.set(state, &why);
                REFUSED_PAUSE
            }
            Ended::Away(why) => {
                status.set(CONTROL_PLANE_AWAY, &why);
                backoff.next(random())
            }
            Ended::Lost(error) => {
                let state = match () {
                    () if is_refusal(&error) => "broker_refused",
                    // it goes once it has been given out often enough
                    () if is_unreadable(&error) => "message_unreadable",
                    () => "broker_away",
                };
                status.set(state, &format!("{error:#}"));
                backoff.next(random())
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            () = sleep(pause) => {}
        }
    }
    status.set("stopping", "");
    halt.cancel();
    let _ = published.await;
    Ok(())
}

impl Runner {
    /// One connection to the broker, until it fails, the Runner stops or is refused.
    async fn session(&self, backoff: &mut Backoff) -> Ended {
        let connected = async {
            let (calls, project) = self.admitted().await?;
            let broker = self.config.broker(&self.host)?;
            Ok::<_, Ended>((calls, project, Arc::new(broker.connect(NAME).await?)))
        };
        let (calls, project, connection) = tokio::select! {
            () = self.stop.cancelled() => return Ended::Stopped,
            connected = connected => match connected {
                Ok(connected) => connected,
                Err(ended) => return ended,
            },
        };
        let worker = Arc::new(Worker {
            calls,
            project,
            key: self.key.clone(),
            direct: self.config.direct,
            permits: Semaphore::new(self.config.concurrency()),
            shares: Shares::default(),
            status: self.status.clone(),
            stop: self.stop.clone(),
        });
        let mut tasks = JoinSet::new();
        let started = tokio::select! {
            () = self.stop.cancelled() => Err(Ended::Stopped),
            started = self.start(&worker, &connection, &mut tasks) => started,
        };
        let ended = match started {
            Ok(()) => {
                backoff.reset();
                self.status.set(RUNNING, "");
                first_end(&mut tasks).await
            }
            Err(ended) => ended,
        };
        // whatever is not done is given to others, and to this one later; all at once, see
        // [`topology::close`]
        let _ = timeout(CLOSE, connection.close(200, "bye".into())).await;
        tasks.shutdown().await;
        ended
    }

    /// Whether the control plane takes this Runner, with its key and for its project; and that.
    async fn admitted(&self) -> Result<(Calls, String), Ended> {
        let calls = Calls::new(&self.config, &self.host);
        let calls = calls.map_err(|e| Ended::Refused("settings_wrong", format!("{e:#}")))?;
        let mut key = json!({"public_key": self.key.public()});
        if let Some(project) = &self.config.project {
            // with the token of another one, nothing is written there
            key["project"] = project.as_str().into();
        }
        decided(calls.call(Method::PUT, SEALING_KEY, Some(&key)).await)?;
        let seen = decided(calls.call(Method::GET, SEALING_KEY, None).await)?;
        let project = seen["project"].as_str().map(judge::short);
        let why = || Ended::Away("the control plane does not say which project this is".into());
        Ok((calls, project.ok_or_else(why)?))
    }

    /// Starts all that takes messages.
    async fn start(
        &self,
        worker: &Arc<Worker>,
        connection: &Arc<lapin::Connection>,
        tasks: &mut JoinSet<Result<(), Ended>>,
    ) -> Result<(), Ended> {
        let channel = confirming_channel(connection).await?;
        let events = self.config.events;
        declare(&channel, &worker.project, self.config.declares(), events).await?;
        tasks.spawn(boxed(worker.clone().forward(channel)));
        tasks.spawn(boxed(worker.clone().attend(confirming_channel(connection).await?)));
        for number in 0..PARTITIONS {
            tasks.spawn(boxed(worker.clone().work(connection.clone(), number)));
        }
        if events {
            tasks.spawn(boxed(worker.clone().hear(confirming_channel(connection).await?)));
        }
        Ok(())
    }
}

/// Why the first task ended, and all with it. When the Runner stops, the others finish their calls.
async fn first_end(tasks: &mut JoinSet<Result<(), Ended>>) -> Ended {
    let ended = match tasks.join_next().await {
        Some(Ok(Err(ended))) => ended,
        Some(Err(panic)) => anyhow::anyhow!("a task panicked: {panic}").into(),
        Some(Ok(Ok(()))) | None => Ended::Stopped,
    };
    if matches!(ended, Ended::Stopped) {
        let _ = timeout(GRACE, async { while tasks.join_next().await.is_some() {} }).await;
    }
    ended
}

/// An answer of the control plane about this Runner itself.
fn decided(answer: Result<(u16, Value), String>) -> Result<Value, Ended> {
    match judge::verdict(answer) {
        Verdict::Taken(seen) => Ok(seen),
        Verdict::Unauthorized(why) => Err(Ended::Refused("token_revoked", why)),
        Verdict::Refused(refusal) => match refusal.code.as_str() {
            NOT_FOUND => Err(Ended::Away(refusal.message)),
            "project_foreign" => Err(Ended::Refused("project_foreign", refusal.message)),
            "sealing_key_differs" => Err(Ended::Refused("sealing_key_differs", refusal.message)),
            _ => Err(Ended::Refused("runner_refused", refusal.message)),
        },
        Verdict::Later(why) | Verdict::Away(why) => Err(Ended::Away(why)),
    }
}
