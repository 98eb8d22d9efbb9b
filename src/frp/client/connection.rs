//! One connection to the FRP server, from dialling to its end. It reports to the driver with its
//! number: an event of a former connection no longer counts.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::WorkConnection;
use super::control::ControlChannel;
use crate::base::task::boxed;
use crate::frp::dial::{Connector, Dialer};
use crate::frp::wire::{Login, Message};
use crate::frp::{TunnelConfig, TunnelEvent};

/// What the tasks of a connection report to the driver.
pub(super) enum ConnectionEvent {
    Tunnel(TunnelEvent),
    /// The connection is there.
    Connected(Connector),
    /// The client is logged in, and messages for the control channel go here.
    Control(mpsc::Sender<Message>),
}

/// Where the tasks of one connection report.
#[derive(Clone)]
pub(super) struct Events {
    number: u64,
    sender: mpsc::Sender<(u64, ConnectionEvent)>,
}

impl Events {
    /// Gives whether the driver still listens.
    pub(super) async fn send(&self, event: ConnectionEvent) -> bool {
        self.sender.send((self.number, event)).await.is_ok()
    }
}

pub(super) struct Connection {
    pub(super) number: u64,
    events: mpsc::Sender<(u64, ConnectionEvent)>,
    tasks: JoinSet<()>,
    connector: Option<Connector>,
    control: Option<mpsc::Sender<Message>>,
}

impl Connection {
    /// None yet.
    pub(super) fn new(events: mpsc::Sender<(u64, ConnectionEvent)>) -> Connection {
        Connection { number: 0, events, tasks: JoinSet::new(), connector: None, control: None }
    }

    pub(super) fn begin(&mut self) {
        self.end();
        self.number += 1;
    }

    /// The connection itself is closed too, so that the server learns of it before the next login.
    pub(super) fn end(&mut self) {
        self.tasks.abort_all();
        self.tasks = JoinSet::new();
        self.connector = None;
        self.control = None;
    }

    /// Keeps what the event brings; gives what it means for the tunnel.
    pub(super) fn take(&mut self, event: ConnectionEvent) -> Option<TunnelEvent> {
        match event {
            ConnectionEvent::Tunnel(event) => Some(event),
            ConnectionEvent::Connected(connector) => {
                self.connector = Some(connector);
                Some(TunnelEvent::Connected)
            }
            ConnectionEvent::Control(control) => {
                self.control = Some(control);
                None
            }
        }
    }

    /// How long nothing was received, where it is known.
    pub(super) fn silence(&self) -> Option<Duration> {
        self.connector.as_ref().and_then(Connector::silence)
    }

    pub(super) fn send_control(&self, message: impl Into<Message>) {
        // a full queue means that the server does not read: the missing pong will show it
        if let Some(control) = &self.control {
            let _ = control.try_send(message.into());
        }
    }

    fn events(&self) -> Events {
        Events { number: self.number, sender: self.events.clone() }
    }

    pub(super) fn connect(&mut self, dialer: Dialer, proxied: bool) {
        let events = self.events();
        self.tasks.spawn(boxed(async move {
            let mut tasks = JoinSet::new();
            let event = match dialer.connect(&mut tasks).await {
                Ok(connector) => ConnectionEvent::Connected(connector),
                Err(error) => {
                    let why = explain_unreachable(proxied, &dialer, error.why);
                    ConnectionEvent::Tunnel(if error.unanswered {
                        TunnelEvent::ConnectTimedOut(why)
                    } else {
                        TunnelEvent::ConnectFailed(why)
                    })
                }
            };
            events.send(event).await;
            // the connection is open as long as this task runs
            while tasks.join_next().await.is_some() {}
        }));
    }

    pub(super) fn login(
        &mut self,
        login: Login,
        config: Arc<TunnelConfig>,
        work_connections: mpsc::Sender<WorkConnection>,
    ) {
        let Some(connector) = self.connector.clone() else { return };
        let events = self.events();
        let channel = ControlChannel::new(connector, config, work_connections, events.clone());
        self.tasks.spawn(boxed(async move {
            let end = channel.run(login).await;
            events.send(ConnectionEvent::Tunnel(end)).await;
        }));
    }
}

/// Why a server is not reached; where a proxy is set, with what to do about it.
fn explain_unreachable(proxied: bool, dialer: &Dialer, why: String) -> String {
    if !proxied || !(why.starts_with("dns: ") || why.starts_with("tcp: ")) {
        return why;
    }
    format!(
        "proxy_only: {why}; a proxy is set, and the tunnel does not go through one: let this \
         machine reach {dialer} directly"
    )
}
