//! Messages over RabbitMQ, as control plane and Runner send them: the connection, and messages that
//! count as sent once the broker has them on disk.

pub mod cloud_events;
mod transport;

use std::time::Duration;

use anyhow::Context as _;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};
use tokio::time::timeout;

use crate::base::dsn;
use crate::base::error::Failure;
use crate::base::secret::Secret;

/// Time limit of each step of connecting, and of each confirmation.
const TIMEOUT: Duration = Duration::from_secs(20);
/// What a broker says when it refuses, and not when something is wrong with the way to it:
/// access-refused, not-found, resource-locked, precondition-failed, not-allowed (AMQP 0-9-1 §1.2).
const REFUSALS: [u16; 5] = [403, 404, 405, 406, 530];

/// A message broker.
#[derive(Clone)]
pub struct Broker {
    /// `amqp://` or `amqps://`, with its password.
    pub url: Secret,
    /// The CA that signed its certificate, PEM; without it, the system's roots.
    pub ca: Option<String>,
}

/// Refuses an invalid URL of a broker, without showing it.
///
/// # Errors
/// Exit 2.
pub fn check(url: &Secret) -> anyhow::Result<Secret> {
    Ok(dsn::broker(url).map_err(|why| {
        Failure::usage("AMQP_URL_WRONG", "the message broker's URL cannot be used")
            .why(why)
            .hint("amqp[s]://USER:PASSWORD@HOST:PORT/VHOST")
    })?)
}

impl Broker {
    /// A connection, which the broker shows under `name`.
    ///
    /// # Errors
    /// What the network, TLS or the broker says; never the URL.
    pub async fn connect(&self, name: &str) -> anyhow::Result<Connection> {
        let connecting = transport::connect(self.url.expose(), self.ca.clone(), name);
        with_timeout("connecting", connecting).await
    }
}

/// A channel whose messages are confirmed.
///
/// # Errors
/// What the broker says.
pub async fn confirming_channel(connection: &Connection) -> anyhow::Result<Channel> {
    let channel = with_timeout("opening a channel", connection.create_channel()).await?;
    let confirming = channel.confirm_select(ConfirmSelectOptions::default());
    with_timeout("asking for confirmations", confirming).await?;
    Ok(channel)
}

/// Sends a message, which some queue must take.
///
/// # Errors
/// A channel or connection that is closed, and what the broker said then.
pub async fn publish(
    channel: &Channel,
    exchange: &str,
    key: &str,
    properties: BasicProperties,
    body: &[u8],
) -> anyhow::Result<PublisherConfirm> {
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let published = channel.basic_publish(exchange.into(), key.into(), options, body, properties);
    with_timeout("publishing", published).await
}

/// What has become of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Confirmed {
    /// The broker has it on disk.
    Taken,
    /// No queue is bound under its key.
    Unroutable,
    /// A queue does not take it: it is full, or has lost most of its members.
    Rejected,
}

/// Waits for what the broker says of a message.
///
/// # Errors
/// As [`publish`].
pub async fn confirmed(sent: PublisherConfirm) -> anyhow::Result<Confirmed> {
    Ok(match with_timeout("waiting for a confirmation", sent).await? {
        Confirmation::Ack(None) => Confirmed::Taken,
        Confirmation::Ack(Some(_)) => Confirmed::Unroutable,
        _ => Confirmed::Rejected,
    })
}

/// Whether the broker itself refuses something: that does not pass, but for what somebody changes
/// there.
pub fn is_refusal(error: &anyhow::Error) -> bool {
    let said = error.chain().find_map(|cause| cause.downcast_ref::<lapin::Error>());
    matches!(said.map(lapin::Error::kind),
        Some(lapin::ErrorKind::ProtocolError(said)) if REFUSALS.contains(&said.get_id()))
}

/// Whether the broker has sent something that cannot be read, as a short string that is no UTF-8:
/// whoever publishes may set one, and it ends the connection of whoever gets it.
pub fn is_unreadable(error: &anyhow::Error) -> bool {
    let said = error.chain().find_map(|cause| cause.downcast_ref::<lapin::Error>());
    matches!(said.map(lapin::Error::kind), Some(lapin::ErrorKind::ParsingError(_)))
}

/// The answer of the broker, within its time.
///
/// # Errors
/// No answer, or what it says; `what` was tried.
pub async fn with_timeout<T>(
    what: &'static str,
    future: impl Future<Output = lapin::Result<T>>,
) -> anyhow::Result<T> {
    timeout(TIMEOUT, future)
        .await
        .map_err(|_| anyhow::anyhow!("{what}: no answer for {} s", TIMEOUT.as_secs()))?
        .context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_from_a_broker_that_is_away() {
        use lapin::protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError};
        let said = |kind: AMQPErrorKind| {
            let error = lapin::ErrorKind::ProtocolError(AMQPError::new(kind, "no".into()));
            anyhow::Error::new(lapin::Error::from(error)).context("declaring a queue")
        };
        assert!(is_refusal(&said(AMQPSoftError::ACCESSREFUSED.into())));
        assert!(is_refusal(&said(AMQPSoftError::PRECONDITIONFAILED.into())));
        assert!(is_refusal(&said(AMQPHardError::NOTALLOWED.into())));
        assert!(!is_refusal(&said(AMQPHardError::CONNECTIONFORCED.into())));
        assert!(!is_refusal(&anyhow::anyhow!("connecting: no answer for 20 s")));
    }

    #[test]
    fn a_wrong_url_is_refused_without_being_shown() {
        for wrong in [
            "",
            "amqp://",
            "http://u:planted-canary-4711-in-plain-text@h/",
            "postgres://h",
            "amqp:planted-canary-4711-in-plain-text",
        ] {
            let failure = check(&Secret::new(wrong)).unwrap_err();
            assert!(!format!("{failure:?}").contains("canary-4711-in-plain-text"), "{failure:?}");
        }
        check(&Secret::new("amqp://u:p@h:5672/%2f")).unwrap();
    }
}
