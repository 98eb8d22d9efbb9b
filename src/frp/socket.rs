//! TCP connections of a tunnel: their options, and how much of what was written the kernel may hold.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The kernel gives up a multiplexer's connection when the peer has acknowledged or taken nothing
/// for this long.
const USER_TIMEOUT_MS: u32 = 12_000;
/// First keepalive after this much silence, and the next ones; seconds, as Go's and so frp's.
const KEEPALIVE: u32 = 15;

/// What the kernel holds unsent goes before the next frame of any stream: with the megabytes of
/// Linux's default a key pressed in a shell waits behind a copy, for seconds on a slow line. So it
/// is as much as the line takes in this time,
const AHEAD: Duration = Duration::from_millis(10);
/// within these bounds, bytes: the upper one is what Linux allows a socket at most by default, for
/// lines that are kept busy by no less.
const UNSENT: std::ops::RangeInclusive<u32> = 128 * 1024..=4 * 1024 * 1024;
/// Over which the speed of a line is measured, at least.
const MEASURED: Duration = Duration::from_millis(50);

/// Small writes are sent at once, and a peer that is gone is noticed.
pub fn set_socket_options(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = setsockopt(stream, sockopt::KeepAlive, &true);
    let _ = setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE);
    let _ = setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE);
}

/// A connection to or from an FRP server, below TLS.
pub struct TunnelSocket {
    tcp: TcpStream,
    /// Of a multiplexer's connection.
    unsent: Option<UnsentLimit>,
}

impl TunnelSocket {
    /// Sets the options of the socket. A peer that takes nothing is given up only where it is a
    /// multiplexer, which always reads; a user with a connection of its own may pause for as long
    /// as it likes.
    pub fn new(tcp: TcpStream, muxed: bool) -> TunnelSocket {
        set_socket_options(&tcp);
        let unsent = muxed.then(|| {
            let _ = setsockopt(&tcp, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS);
            UnsentLimit::new(&tcp)
        });
        TunnelSocket { tcp, unsent }
    }

    /// As of [`TcpStream::peek`].
    ///
    /// # Errors
    /// As of [`TcpStream::peek`].
    pub async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tcp.peek(buffer).await
    }

    fn wrote(&mut self, n: usize) {
        if let Some(unsent) = &mut self.unsent {
            unsent.wrote(&self.tcp, n);
        }
    }
}

/// How much the kernel may hold unsent, by how fast it took what was written before.
struct UnsentLimit {
    bytes: u32,
    /// Begin of the measurement, and what was written since.
    since: Instant,
    written: u64,
}

impl UnsentLimit {
    fn new(tcp: &TcpStream) -> UnsentLimit {
        let limit = UnsentLimit { bytes: *UNSENT.start(), since: Instant::now(), written: 0 };
        limit.set(tcp);
        limit
    }

    fn set(&self, tcp: &TcpStream) {
        let _ = socket2::SockRef::from(tcp).set_tcp_notsent_lowat(self.bytes);
    }

    fn wrote(&mut self, tcp: &TcpStream, n: usize) {
        self.written += n as u64;
        let elapsed = self.since.elapsed();
        if elapsed < MEASURED {
            return;
        }
        let bytes = limit_at(self.written, elapsed);
        *self = UnsentLimit { bytes, since: Instant::now(), written: 0 };
        self.set(tcp);
    }
}

/// For a line that took so many bytes in this time, which is not zero.
fn limit_at(written: u64, elapsed: Duration) -> u32 {
    let ahead = u128::from(written) * AHEAD.as_nanos() / elapsed.as_nanos().max(1);
    u32::try_from(ahead).unwrap_or(u32::MAX).clamp(*UNSENT.start(), *UNSENT.end())
}

impl AsyncRead for TunnelSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TunnelSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.tcp).poll_write(cx, bytes))?;
        self.wrote(n);
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, pieces))?;
        self.wrote(n);
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_line_may_hold_more_than_a_slow_one() {
        for (megabytes_a_second, kib) in [(0, 128), (1, 128), (12, 128), (50, 488), (600, 4096)] {
            let written = megabytes_a_second * 1_000_000 / 20;
            assert_eq!(limit_at(written, MEASURED) / 1024, kib, "{megabytes_a_second} MB/s");
        }
        assert_eq!(limit_at(u64::MAX, Duration::ZERO), *UNSENT.end());
    }
}
