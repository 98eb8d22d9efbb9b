//! The streams of a session and the frames that they cause. No I/O, no waiting.

use std::collections::{HashMap, VecDeque};
use std::task::Waker;

use bytes::{Buf as _, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;

use super::{
    ACK, BATCH, CLOSE_TIMEOUT, CLOSE_TIMEOUT_UNSENT, CloseReason, DATA, FIN, FIRST_WINDOW, GO_AWAY,
    HEADER, Limits, MAX_CONTROL, MAX_FRAME, MAX_IDLE_CAPACITY, MAX_OUTBOX, PING, PING_AFTER, RST,
    SESSION_TIMEOUT, SYN, Side, UNACKNOWLEDGED, WINDOW,
};

pub(super) struct StreamTable {
    pub(super) streams: HashMap<u32, StreamState>,
    pub(super) control: VecDeque<[u8; HEADER]>,
    /// Streams with something to send, in turn.
    pub(super) ready: VecDeque<u32>,
    pub(super) next: u32,
    pub(super) incoming: VecDeque<u32>,
    pub(super) acceptor: Option<Waker>,
    pub(super) driver: Option<Waker>,
    pub(super) received: Instant,
    pub(super) closing: bool,
    pub(super) ended: Option<CloseReason>,
    /// The same, for those that wait for it.
    pub(super) end_sender: watch::Sender<Option<CloseReason>>,
    pub(super) limits: Limits,
}

/// The state of one stream.
#[derive(Default)]
pub(super) struct StreamState {
    pub(super) inbox: BytesMut,
    /// What the peer may still send.
    pub(super) granted: u32,
    /// What was read since the window was last opened.
    pub(super) read: u32,
    pub(super) outbox: BytesMut,
    /// What we may still send.
    pub(super) window: u32,
    pub(super) queued: bool,
    pub(super) permit: Option<OwnedSemaphorePermit>,
    pub(super) remote_fin: bool,
    pub(super) reset: bool,
    pub(super) local_fin: bool,
    pub(super) fin_sent: bool,
    /// When the handle was dropped, or after that something was last sent.
    pub(super) dropped: Option<Instant>,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,
}

impl StreamState {
    /// Both ends are closed: what is still unsent has no reader, and would wait for a window that
    /// is never opened.
    pub(super) fn discard_unreadable(&mut self) {
        if self.remote_fin && self.dropped.is_some() {
            self.outbox = BytesMut::new();
        }
    }
}

pub(super) fn frame(kind: u8, flags: u16, stream: u32, length: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[1] = kind;
    bytes[2..4].copy_from_slice(&flags.to_be_bytes());
    bytes[4..8].copy_from_slice(&stream.to_be_bytes());
    bytes[8..].copy_from_slice(&length.to_be_bytes());
    bytes
}

impl StreamTable {
    pub(super) fn wake_driver(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    pub(super) fn queue(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.queued
        {
            stream.queued = true;
            self.ready.push_back(id);
            self.wake_driver();
        }
    }

    pub(super) fn push_control(&mut self, frame: [u8; HEADER]) {
        self.control.push_back(frame);
        self.wake_driver();
    }

    pub(super) fn add(&mut self, id: u32, permit: Option<OwnedSemaphorePermit>) {
        let stream = StreamState {
            granted: self.limits.window,
            window: FIRST_WINDOW,
            permit,
            ..StreamState::default()
        };
        self.streams.insert(id, stream);
    }

    /// Removes a stream that both sides have closed.
    pub(super) fn remove_if_closed(&mut self, id: u32) {
        if self
            .streams
            .get(&id)
            .is_some_and(|h| h.dropped.is_some() && (h.reset || (h.fin_sent && h.remote_fin)))
        {
            self.streams.remove(&id);
        }
    }

    pub(super) fn end(&mut self, why: CloseReason) {
        if self.ended.is_none() {
            self.end_sender.send_replace(Some(why.clone()));
            self.ended = Some(why);
        }
        for stream in self.streams.values_mut() {
            stream.permit = None;
            for waker in [stream.reader.take(), stream.writer.take()].into_iter().flatten() {
                waker.wake();
            }
        }
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.wake();
        }
        self.wake_driver();
    }

    /// Puts frames into `out`: control frames first, then data of the streams in turn.
    pub(super) fn fill(&mut self, out: &mut BytesMut) {
        while out.len() < BATCH {
            let Some(frame) = self.control.pop_front() else { break };
            out.extend_from_slice(&frame);
        }
        while out.len() < BATCH {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.queued = false;
            if stream.reset {
                continue;
            }
            let n = stream.outbox.len().min(stream.window as usize).min(MAX_FRAME);
            if n > 0 {
                let length = u32::try_from(n).unwrap_or(u32::MAX);
                out.extend_from_slice(&frame(DATA, 0, id, length));
                out.extend_from_slice(&stream.outbox[..n]);
                stream.outbox.advance(n);
                stream.window -= length;
                stream.dropped = stream.dropped.map(|_| Instant::now());
                if stream.outbox.is_empty() && stream.outbox.capacity() > MAX_IDLE_CAPACITY {
                    stream.outbox = BytesMut::new();
                }
                if stream.outbox.len() <= MAX_OUTBOX / 2
                    && let Some(writer) = stream.writer.take()
                {
                    writer.wake();
                }
            }
            if stream.outbox.is_empty() {
                if stream.local_fin && !stream.fin_sent {
                    stream.fin_sent = true;
                    out.extend_from_slice(&frame(WINDOW, FIN, id, 0));
                    self.remove_if_closed(id);
                }
            } else if stream.window > 0 {
                stream.queued = true;
                self.ready.push_back(id);
            }
        }
    }

    /// Handles a header; gives the stream and the number of payload bytes that follow.
    pub(super) fn header(
        &mut self,
        head: [u8; HEADER],
        side: Side,
    ) -> Result<(u32, usize), CloseReason> {
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = head;
        let (flags, id, length) = (
            u16::from_be_bytes([f0, f1]),
            u32::from_be_bytes([s0, s1, s2, s3]),
            u32::from_be_bytes([l0, l1, l2, l3]),
        );
        if version != 0 {
            return Err(CloseReason::Protocol(
                "version of a frame is not 0; is tcpMux on at both ends?",
            ));
        }
        if self.control.len() > MAX_CONTROL {
            return Err(CloseReason::Protocol("it asks and does not read the answers"));
        }
        match kind {
            PING => {
                if flags & SYN != 0 {
                    self.push_control(frame(PING, ACK, 0, length));
                }
                return Ok((0, 0));
            }
            GO_AWAY => return Err(CloseReason::GoAway),
            DATA | WINDOW => {}
            _ => return Err(CloseReason::Protocol("unknown frame type")),
        }
        if flags & SYN != 0 {
            self.open_incoming(id, side)?;
        }
        let mut requeue = false;
        if let Some(stream) = self.streams.get_mut(&id) {
            if flags & ACK != 0 {
                stream.permit = None;
            }
            if kind == WINDOW {
                stream.window = stream.window.saturating_add(length);
                requeue = !stream.outbox.is_empty();
            } else if length > stream.granted {
                self.push_control(frame(GO_AWAY, 0, 0, 1));
                return Err(CloseReason::Protocol("it sends more than its window"));
            } else {
                stream.granted -= length;
            }
            if flags & FIN != 0 {
                stream.remote_fin = true;
                stream.discard_unreadable();
                // our own FIN may have waited behind data that is discarded now
                requeue |= stream.dropped.is_some();
            }
            if flags & RST != 0 {
                stream.reset = true;
                stream.permit = None;
            }
            if flags & (FIN | RST) != 0 {
                for waker in [stream.reader.take(), stream.writer.take()].into_iter().flatten() {
                    waker.wake();
                }
            }
        }
        if requeue {
            self.queue(id);
        }
        if flags & (FIN | RST) != 0 {
            self.remove_if_closed(id);
        }
        Ok((id, if kind == DATA { length as usize } else { 0 }))
    }

    /// Takes a stream that the peer opens, or resets it.
    fn open_incoming(&mut self, id: u32, side: Side) -> Result<(), CloseReason> {
        let from_peer = (id % 2 == 1) == (side == Side::Server);
        if id == 0 || !from_peer || self.streams.contains_key(&id) {
            return Err(CloseReason::Protocol("a stream is opened with a number that is not free"));
        }
        if self.closing
            || self.incoming.len() >= UNACKNOWLEDGED
            || self.streams.len() >= self.limits.streams
        {
            self.push_control(frame(WINDOW, RST, id, 0));
        } else {
            self.add(id, None);
            let more = self.limits.window - FIRST_WINDOW;
            self.push_control(frame(WINDOW, ACK, id, more));
            self.incoming.push_back(id);
            if let Some(acceptor) = self.acceptor.take() {
                acceptor.wake();
            }
        }
        Ok(())
    }

    /// Takes payload of a stream. That of a closed one is ignored, and the peer's window stays
    /// shut.
    pub(super) fn payload(&mut self, id: u32, bytes: &[u8]) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.dropped.is_none()
            && !stream.reset
        {
            stream.inbox.extend_from_slice(bytes);
            if let Some(reader) = stream.reader.take() {
                reader.wake();
            }
        }
    }

    /// Housekeeping; `Some` when the session is dead.
    pub(super) fn tick(&mut self) -> Option<CloseReason> {
        let silence = self.received.elapsed();
        if silence >= SESSION_TIMEOUT {
            return Some(CloseReason::Silent);
        }
        if silence >= PING_AFTER {
            self.push_control(frame(PING, SYN, 0, 0));
        }
        let expired = |h: &StreamState| {
            h.dropped.is_some_and(|at| {
                at.elapsed()
                    > if h.outbox.is_empty() { CLOSE_TIMEOUT } else { CLOSE_TIMEOUT_UNSENT }
            })
        };
        let old: Vec<u32> =
            self.streams.iter().filter(|(_, h)| expired(h)).map(|(id, _)| *id).collect();
        for id in old {
            self.streams.remove(&id);
            self.push_control(frame(WINDOW, RST, id, 0));
        }
        None
    }
}
