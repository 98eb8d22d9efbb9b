//! One stream of a session, for reading and writing.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::table::frame;
use super::{KEPT, OUTBOX, RST, Shared, WINDOW, gone};

/// One stream. FIN from the peer means that it is gone, as frp does not half-close: what is written after it fails.
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
        half.forsake();
        if table.ended.is_some() {
            table.streams.remove(&self.id);
        } else {
            table.queue(self.id);
            table.settle(self.id);
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
        let Some(half) = table.streams.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
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
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut table = self.shared.table();
        if let Some(end) = &table.ended {
            return Poll::Ready(Err(gone(end)));
        }
        let Some(half) = table.streams.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
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
