//! Many streams over one connection: yamux with the semantics of hashicorp's implementation, which frp uses.
//!
//! Frames as in hashicorp/yamux `spec.md`; behaviour as in fatedier/yamux at d0154be (`session.go`, `stream.go`): a stream is
//! announced at once, an incoming one acknowledged at once (frpc closes the session when it is not, after 75 s), windows start
//! at 256 KiB and larger ones are told by the first window update. Own code rather than the `yamux` crate: that one acknowledges
//! only with the first data, sends FIN twice when closed twice, ends the connection at its stream limit and has no ping.
//!
//! One task owns the connection ([`Driver`]); streams meet it in a table under one lock that is never held over a wait. A reader
//! that does not read fills its own window and nobody else's; writers take turns, a frame each.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior};

const DATA: u8 = 0;
const WINDOW: u8 = 1;
const PING: u8 = 2;
const GO_AWAY: u8 = 3;
const SYN: u16 = 1;
const ACK: u16 = 2;
const FIN: u16 = 4;
const RST: u16 = 8;
const HEADER: usize = 12;

/// Window of a new stream before anything is said, each way.
const FIRST_WINDOW: u32 = 256 * 1024;
/// What a stream may hold that is written and not sent yet, bytes.
const OUTBOX: usize = 64 * 1024;
/// Largest data frame that we send: short enough that streams take turns, long enough for bulk.
const FRAME: usize = 32 * 1024;
/// Outgoing bytes gathered before they are written.
const BATCH: usize = 64 * 1024;
/// Streams opened and not acknowledged: hashicorp's accept backlog, past which it resets.
const UNACKNOWLEDGED: usize = 256;
/// Control frames waiting to go out; a peer that makes more is not reading what it asked for.
const CONTROL: usize = 16 * 1024;
/// A buffer larger than this is given back when it runs empty.
const KEPT: usize = 16 * 1024;
/// Read at once: one TLS record.
const READ: usize = 16 * 1024;
/// How long a stream that we closed waits for the peer's end.
const LINGER: Duration = Duration::from_secs(60);
/// Silence after which the peer is pinged, and after which the session is dead.
const QUIET: Duration = Duration::from_secs(20);
const DEAD: Duration = Duration::from_secs(40);
const TICK: Duration = Duration::from_secs(5);

/// Which side opened the connection: clients use odd stream numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Client,
    Server,
}

/// Limits of a session.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Receive window of a stream, bytes, at least 256 KiB: the most that an unread stream holds.
    pub window: u32,
    /// Streams that the peer may have open.
    pub streams: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { window: 1024 * 1024, streams: 16 * 1024 }
    }
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum End {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the peer said that it goes away")]
    GoAway,
    #[error("closed here")]
    Here,
    #[error("nothing was received for {} s", DEAD.as_secs())]
    Silent,
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("connection lost: {0}")]
    Io(String),
}

/// The part of a session that opens and accepts streams. Clones are the same session.
#[derive(Clone)]
pub struct Mux {
    shared: Arc<Shared>,
}

struct Shared {
    table: Mutex<Table>,
    backlog: Arc<Semaphore>,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        // a panic inside the lock leaves plain data behind
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Table {
    streams: HashMap<u32, Half>,
    control: VecDeque<[u8; HEADER]>,
    /// Streams with something to send, in turn.
    ready: VecDeque<u32>,
    next: u32,
    incoming: VecDeque<u32>,
    acceptor: Option<Waker>,
    driver: Option<Waker>,
    received: Instant,
    closing: bool,
    ended: Option<End>,
    /// The same, for those who wait.
    tell: watch::Sender<Option<End>>,
    limits: Limits,
}

/// One stream, as the table knows it.
#[derive(Default)]
struct Half {
    inbox: BytesMut,
    /// What the peer may still send.
    granted: u32,
    /// What was read since the window was last opened.
    read: u32,
    outbox: BytesMut,
    /// What we may still send.
    window: u32,
    queued: bool,
    permit: Option<OwnedSemaphorePermit>,
    remote_fin: bool,
    reset: bool,
    local_fin: bool,
    fin_sent: bool,
    /// When the handle was dropped.
    dropped: Option<Instant>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

fn frame(kind: u8, flags: u16, stream: u32, length: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[1] = kind;
    bytes[2..4].copy_from_slice(&flags.to_be_bytes());
    bytes[4..8].copy_from_slice(&stream.to_be_bytes());
    bytes[8..].copy_from_slice(&length.to_be_bytes());
    bytes
}

impl Table {
    fn wake_driver(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    fn queue(&mut self, id: u32) {
        if let Some(half) = self.streams.get_mut(&id)
            && !half.queued
        {
            half.queued = true;
            self.ready.push_back(id);
            self.wake_driver();
        }
    }

    fn say(&mut self, frame: [u8; HEADER]) {
        self.control.push_back(frame);
        self.wake_driver();
    }

    fn add(&mut self, id: u32, permit: Option<OwnedSemaphorePermit>) {
        let half = Half { granted: self.limits.window, window: FIRST_WINDOW, permit, ..Half::default() };
        self.streams.insert(id, half);
    }

    /// Forgets a stream that both sides have closed.
    fn settle(&mut self, id: u32) {
        if self.streams.get(&id).is_some_and(|h| h.dropped.is_some() && (h.reset || (h.fin_sent && h.remote_fin))) {
            self.streams.remove(&id);
        }
    }

    fn end(&mut self, why: End) {
        if self.ended.is_none() {
            self.tell.send_replace(Some(why.clone()));
            self.ended = Some(why);
        }
        for half in self.streams.values_mut() {
            half.permit = None;
            for waker in [half.reader.take(), half.writer.take()].into_iter().flatten() {
                waker.wake();
            }
        }
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.wake();
        }
        self.wake_driver();
    }

    /// Puts frames into `out`: what the session has to say first, then the streams in turn.
    fn fill(&mut self, out: &mut BytesMut) {
        while out.len() < BATCH {
            let Some(frame) = self.control.pop_front() else { break };
            out.extend_from_slice(&frame);
        }
        while out.len() < BATCH {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(half) = self.streams.get_mut(&id) else { continue };
            half.queued = false;
            if half.reset {
                continue;
            }
            let n = half.outbox.len().min(half.window as usize).min(FRAME);
            if n > 0 {
                let length = u32::try_from(n).unwrap_or(u32::MAX);
                out.extend_from_slice(&frame(DATA, 0, id, length));
                out.extend_from_slice(&half.outbox[..n]);
                half.outbox.advance(n);
                half.window -= length;
                if half.outbox.is_empty() && half.outbox.capacity() > KEPT {
                    half.outbox = BytesMut::new();
                }
                if half.outbox.len() <= OUTBOX / 2
                    && let Some(writer) = half.writer.take()
                {
                    writer.wake();
                }
            }
            if half.outbox.is_empty() {
                if half.local_fin && !half.fin_sent {
                    half.fin_sent = true;
                    out.extend_from_slice(&frame(WINDOW, FIN, id, 0));
                    self.settle(id);
                }
            } else if half.window > 0 {
                half.queued = true;
                self.ready.push_back(id);
            }
        }
    }

    /// A header has come; gives the stream and number of payload bytes that follow.
    fn header(&mut self, head: [u8; HEADER], side: Side) -> Result<(u32, usize), End> {
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = head;
        let (flags, id, length) = (u16::from_be_bytes([f0, f1]), u32::from_be_bytes([s0, s1, s2, s3]), u32::from_be_bytes([l0, l1, l2, l3]));
        if version != 0 {
            return Err(End::Protocol("version of a frame is not 0; is tcpMux on at both ends?"));
        }
        if self.control.len() > CONTROL {
            return Err(End::Protocol("it asks and does not read the answers"));
        }
        match kind {
            PING => {
                if flags & SYN != 0 {
                    self.say(frame(PING, ACK, 0, length));
                }
                return Ok((0, 0));
            }
            GO_AWAY => return Err(End::GoAway),
            DATA | WINDOW => {}
            _ => return Err(End::Protocol("unknown frame type")),
        }
        if flags & SYN != 0 {
            let theirs = (id % 2 == 1) == (side == Side::Server);
            if id == 0 || !theirs || self.streams.contains_key(&id) {
                return Err(End::Protocol("a stream is opened with a number that is not free"));
            }
            if self.closing || self.incoming.len() >= UNACKNOWLEDGED || self.streams.len() >= self.limits.streams {
                self.say(frame(WINDOW, RST, id, 0));
            } else {
                self.add(id, None);
                let more = self.limits.window - FIRST_WINDOW;
                self.say(frame(WINDOW, ACK, id, more));
                self.incoming.push_back(id);
                if let Some(acceptor) = self.acceptor.take() {
                    acceptor.wake();
                }
            }
        }
        let mut requeue = false;
        if let Some(half) = self.streams.get_mut(&id) {
            if flags & ACK != 0 {
                half.permit = None;
            }
            if kind == WINDOW {
                half.window = half.window.saturating_add(length);
                requeue = !half.outbox.is_empty();
            } else if length > half.granted {
                self.say(frame(GO_AWAY, 0, 0, 1));
                return Err(End::Protocol("it sends more than its window"));
            } else {
                half.granted -= length;
            }
            if flags & FIN != 0 {
                half.remote_fin = true;
            }
            if flags & RST != 0 {
                half.reset = true;
                half.permit = None;
            }
            if flags & (FIN | RST) != 0 {
                for waker in [half.reader.take(), half.writer.take()].into_iter().flatten() {
                    waker.wake();
                }
            }
        }
        if requeue {
            self.queue(id);
        }
        if flags & (FIN | RST) != 0 {
            self.settle(id);
        }
        Ok((id, if kind == DATA { length as usize } else { 0 }))
    }

    /// Payload of a stream; of one that nobody holds it is passed over, and the peer's window stays shut.
    fn payload(&mut self, id: u32, bytes: &[u8]) {
        if let Some(half) = self.streams.get_mut(&id)
            && half.dropped.is_none()
            && !half.reset
        {
            half.inbox.extend_from_slice(bytes);
            if let Some(reader) = half.reader.take() {
                reader.wake();
            }
        }
    }

    /// Housekeeping; `Some` when the session is dead.
    fn tick(&mut self) -> Option<End> {
        let silence = self.received.elapsed();
        if silence >= DEAD {
            return Some(End::Silent);
        }
        if silence >= QUIET {
            self.say(frame(PING, SYN, 0, 0));
        }
        let old: Vec<u32> = self.streams.iter().filter(|(_, h)| h.dropped.is_some_and(|at| at.elapsed() > LINGER)).map(|(id, _)| *id).collect();
        for id in old {
            self.streams.remove(&id);
            self.say(frame(WINDOW, RST, id, 0));
        }
        None
    }
}

impl Mux {
    /// A session over `io`. Nothing moves until the driver is polled.
    pub fn new<T: AsyncRead + AsyncWrite + Unpin>(io: T, side: Side, limits: Limits) -> (Mux, Driver<T>) {
        let limits = Limits { window: limits.window.max(FIRST_WINDOW), ..limits };
        let table = Table {
            streams: HashMap::new(),
            control: VecDeque::new(),
            ready: VecDeque::new(),
            next: if side == Side::Client { 1 } else { 2 },
            incoming: VecDeque::new(),
            acceptor: None,
            driver: None,
            received: Instant::now(),
            closing: false,
            ended: None,
            tell: watch::Sender::new(None),
            limits,
        };
        let mux = Mux { shared: Arc::new(Shared { table: Mutex::new(table), backlog: Arc::new(Semaphore::new(UNACKNOWLEDGED)) }) };
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let driver = Driver {
            io,
            side,
            mux: mux.clone(),
            out: BytesMut::new(),
            space: vec![0; READ].into(),
            input: BytesMut::new(),
            body: None,
            unflushed: false,
            tick,
        };
        (mux, driver)
    }

    /// Opens a stream; waits only while 256 are unacknowledged.
    ///
    /// # Errors
    /// When the session has ended.
    pub async fn open(&self) -> io::Result<Stream> {
        let permit = tokio::select! {
            permit = self.shared.backlog.clone().acquire_owned() => permit.map_err(|_| io::Error::from(io::ErrorKind::NotConnected))?,
            end = self.ended() => return Err(gone(&end)),
        };
        let mut table = self.shared.table();
        if let Some(end) = &table.ended {
            return Err(gone(end));
        }
        let id = table.next;
        table.next = id.checked_add(2).ok_or_else(|| io::Error::other("this connection has used up its stream numbers"))?;
        table.add(id, Some(permit));
        let more = table.limits.window - FIRST_WINDOW;
        table.say(frame(WINDOW, SYN, id, more));
        Ok(Stream { shared: self.shared.clone(), id })
    }

    /// The next stream that the peer opens; `None` when the session has ended.
    pub async fn accept(&self) -> Option<Stream> {
        std::future::poll_fn(|cx| {
            let mut table = self.shared.table();
            if let Some(id) = table.incoming.pop_front() {
                return Poll::Ready(Some(Stream { shared: self.shared.clone(), id }));
            }
            if table.ended.is_some() {
                return Poll::Ready(None);
            }
            table.acceptor = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Waits for the end of the session.
    pub async fn ended(&self) -> End {
        let mut end = self.shared.table().tell.subscribe();
        let end = end.wait_for(Option::is_some).await.ok().and_then(|e| e.clone());
        end.unwrap_or(End::Here)
    }

    /// How long nothing was received.
    pub fn silence(&self) -> Duration {
        self.shared.table().received.elapsed()
    }

    /// Streams that are open, in either direction.
    pub fn open_streams(&self) -> usize {
        self.shared.table().streams.len()
    }

    /// Takes no new streams, sends what streams have written, then closes the connection.
    pub fn close(&self) {
        let mut table = self.shared.table();
        table.closing = true;
        table.wake_driver();
    }
}

fn gone(end: &End) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, end.clone())
}

/// The task that owns the connection: reads, writes, nothing else.
pub struct Driver<T> {
    io: T,
    side: Side,
    mux: Mux,
    out: BytesMut,
    space: Box<[u8]>,
    input: BytesMut,
    /// Stream and bytes of payload still to come.
    body: Option<(u32, usize)>,
    unflushed: bool,
    tick: Interval,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    /// Runs the session to its end.
    pub async fn run(mut self) -> End {
        let end = std::future::poll_fn(|cx| self.poll(cx)).await;
        self.mux.shared.table().end(end.clone());
        // a GoAway or the last bytes may still be there; a peer that does not read must not hold us
        let _ = tokio::time::timeout(Duration::from_secs(1), async {
            use tokio::io::AsyncWriteExt as _;
            let mut last = std::mem::take(&mut self.out);
            self.mux.shared.table().fill(&mut last);
            self.io.write_all(&last).await?;
            self.io.shutdown().await
        })
        .await;
        end
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        while self.tick.poll_tick(cx).is_ready() {
            if self.out.is_empty() {
                self.out = BytesMut::new();
            }
            if let Some(end) = self.mux.shared.table().tick() {
                return Poll::Ready(end);
            }
        }
        // enough for one turn: other tasks of this thread want theirs
        for _ in 0..32 {
            let mut moved = match self.send(cx) {
                Ok(moved) => moved,
                Err(end) => return Poll::Ready(end),
            };
            match self.receive(cx) {
                Ok(more) => moved |= more,
                Err(end) => return Poll::Ready(end),
            }
            if !moved {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn send(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let mut moved = false;
        if self.out.is_empty() {
            let mut table = self.mux.shared.table();
            table.driver = Some(cx.waker().clone());
            table.fill(&mut self.out);
            if self.out.is_empty() && table.closing {
                return Err(End::Here);
            }
        }
        while !self.out.is_empty() {
            match Pin::new(&mut self.io).poll_write(cx, &self.out) {
                Poll::Ready(Ok(0)) => return Err(End::Closed),
                Poll::Ready(Ok(n)) => {
                    self.out.advance(n);
                    self.unflushed = true;
                    moved = true;
                }
                Poll::Ready(Err(e)) => return Err(End::Io(e.to_string())),
                Poll::Pending => return Ok(moved),
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.io).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(e)) => return Err(End::Io(e.to_string())),
                Poll::Pending => {}
            }
        }
        Ok(moved)
    }

    fn receive(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let mut read = ReadBuf::new(&mut self.space);
        match Pin::new(&mut self.io).poll_read(cx, &mut read) {
            Poll::Pending => return Ok(false),
            Poll::Ready(Err(e)) => return Err(End::Io(e.to_string())),
            Poll::Ready(Ok(())) if read.filled().is_empty() => return Err(End::Closed),
            Poll::Ready(Ok(())) => {}
        }
        let mut table = self.mux.shared.table();
        table.received = Instant::now();
        let mut bytes = read.filled();
        while !bytes.is_empty() {
            if let Some((id, left)) = self.body {
                let n = left.min(bytes.len());
                table.payload(id, &bytes[..n]);
                bytes = &bytes[n..];
                self.body = (left > n).then_some((id, left - n));
                continue;
            }
            let n = (HEADER - self.input.len()).min(bytes.len());
            self.input.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if let Ok(head) = <[u8; HEADER]>::try_from(self.input.as_ref()) {
                self.input.clear();
                let (id, length) = table.header(head, self.side)?;
                self.body = (length > 0).then_some((id, length));
            }
        }
        Ok(true)
    }
}

impl<T> Drop for Driver<T> {
    /// A driver that is cancelled ends its session: nobody waits for streams that nothing moves.
    fn drop(&mut self) {
        self.mux.shared.table().end(End::Here);
    }
}

/// One stream. FIN from the peer means that it is gone, as frp does not half-close: what is written after it fails.
///
/// Dropping a stream sends what was written, then FIN.
pub struct Stream {
    shared: Arc<Shared>,
    id: u32,
}

impl Stream {
    /// Ends the stream at once, without sending what is left.
    pub fn reset(self) {
        let mut table = self.shared.table();
        if let Some(half) = table.streams.get_mut(&self.id)
            && !half.reset
            && !(half.fin_sent && half.remote_fin)
        {
            half.reset = true;
            table.say(frame(WINDOW, RST, self.id, 0));
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut table = self.shared.table();
        let Some(half) = table.streams.get_mut(&self.id) else { return };
        half.dropped = Some(Instant::now());
        half.inbox = BytesMut::new();
        (half.reader, half.writer) = (None, None);
        half.local_fin = true;
        if table.ended.is_some() {
            table.streams.remove(&self.id);
        } else {
            table.queue(self.id);
            table.settle(self.id);
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut table = self.shared.table();
        let ended = table.ended.clone();
        let whole = table.limits.window;
        let Some(half) = table.streams.get_mut(&self.id) else { return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())) };
        if half.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if half.inbox.is_empty() {
            if half.remote_fin {
                return Poll::Ready(Ok(()));
            }
            if let Some(end) = ended {
                return Poll::Ready(Err(gone(&end)));
            }
            half.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let n = half.inbox.len().min(buf.remaining());
        buf.put_slice(&half.inbox[..n]);
        half.inbox.advance(n);
        if half.inbox.is_empty() && half.inbox.capacity() > KEPT {
            half.inbox = BytesMut::new();
        }
        half.read += u32::try_from(n).unwrap_or(u32::MAX);
        if half.read >= whole / 2 && !half.remote_fin {
            let read = std::mem::take(&mut half.read);
            half.granted += read;
            table.say(frame(WINDOW, 0, self.id, read));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut table = self.shared.table();
        if let Some(end) = &table.ended {
            return Poll::Ready(Err(gone(end)));
        }
        let Some(half) = table.streams.get_mut(&self.id) else { return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())) };
        if half.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if half.local_fin || half.remote_fin {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let n = bytes.len().min(OUTBOX.saturating_sub(half.outbox.len()));
        if n == 0 && !bytes.is_empty() {
            half.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        half.outbox.extend_from_slice(&bytes[..n]);
        if half.window > 0 {
            table.queue(self.id);
        }
        Poll::Ready(Ok(n))
    }

    /// What is written is on its way; the driver flushes the connection whenever it has nothing more to send.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut table = self.shared.table();
        if let Some(half) = table.streams.get_mut(&self.id) {
            half.local_fin = true;
            table.queue(self.id);
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;
