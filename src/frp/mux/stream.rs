//! One stream of a session, for reading and writing.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::table::frame;
use super::{MAX_IDLE_CAPACITY, MAX_OUTBOX, RST, Shared, WINDOW, closed_error};

/// One stream. FIN from the peer means that it is gone, as frp does not half-close: what is written
/// after it fails.
///
/// Dropping a stream sends what was written, then FIN.
pub struct Stream {
    pub(super) shared: Arc<Shared>,
    pub(super) id: u32,
}

impl Stream {
    /// Ends the stream at once, without sending what is left.
    pub fn reset(self) {
        let mut table = self.shared.table();
        if let Some(stream) = table.streams.get_mut(&self.id)
            && !stream.reset
            && !(stream.fin_sent && stream.remote_fin)
        {
            stream.reset = true;
            table.push_control(frame(WINDOW, RST, self.id, 0));
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut table = self.shared.table();
        let Some(stream) = table.streams.get_mut(&self.id) else { return };
        stream.dropped = Some(Instant::now());
        stream.inbox = BytesMut::new();
        (stream.reader, stream.writer) = (None, None);
        stream.local_fin = true;
        stream.discard_unreadable();
        if table.ended.is_some() {
            table.streams.remove(&self.id);
        } else {
            table.queue(self.id);
            table.remove_if_closed(self.id);
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut table = self.shared.table();
        let ended = table.ended.clone();
        let whole = table.limits.window;
        let Some(stream) = table.streams.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        if stream.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if stream.inbox.is_empty() {
            if stream.remote_fin {
                return Poll::Ready(Ok(()));
            }
            if let Some(end) = ended {
                return Poll::Ready(Err(closed_error(&end)));
            }
            stream.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let n = stream.inbox.len().min(buf.remaining());
        buf.put_slice(&stream.inbox[..n]);
        stream.inbox.advance(n);
        if stream.inbox.is_empty() && stream.inbox.capacity() > MAX_IDLE_CAPACITY {
            stream.inbox = BytesMut::new();
        }
        stream.read += u32::try_from(n).unwrap_or(u32::MAX);
        if stream.read >= whole / 2 && !stream.remote_fin {
            let read = std::mem::take(&mut stream.read);
            stream.granted += read;
            table.push_control(frame(WINDOW, 0, self.id, read));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut table = self.shared.table();
        if let Some(end) = &table.ended {
            return Poll::Ready(Err(closed_error(end)));
        }
        let Some(stream) = table.streams.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        if stream.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if stream.local_fin || stream.remote_fin {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let n = bytes.len().min(MAX_OUTBOX.saturating_sub(stream.outbox.len()));
        if n == 0 && !bytes.is_empty() {
            stream.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        stream.outbox.extend_from_slice(&bytes[..n]);
        if stream.window > 0 {
            table.queue(self.id);
        }
        Poll::Ready(Ok(n))
    }

    /// Nothing to do: the driver flushes the connection whenever it has nothing more to send.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut table = self.shared.table();
        if let Some(stream) = table.streams.get_mut(&self.id) {
            stream.local_fin = true;
            table.queue(self.id);
        }
        Poll::Ready(Ok(()))
    }
}
