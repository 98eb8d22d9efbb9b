//! Layers of a work connection: AES-CFB and snappy, as a proxy's `use_encryption` and
//! `use_compression` ask for.
//!
//! Order on the wire: plaintext, snappy, cipher, stream (fatedier/frp `client/proxy/proxy.go`).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub use crate::base::connection::{Duplex, Io};
use crate::frp::wire::{Decryptor, Encryptor, Key};

/// Most bytes that one write takes: it bounds what a layer holds.
const MAX_WRITE: usize = 16 * 1024;

/// How a layer encodes and decodes.
trait Codec: Unpin {
    /// Appends all of `plain`, encoded, to `out`: the peer can read at once what was written.
    fn encode(&mut self, plain: &[u8], out: &mut Vec<u8>) -> io::Result<()>;
    /// Appends what can be decoded by now to `out`.
    fn decode(&mut self, coded: &mut [u8], out: &mut Vec<u8>) -> io::Result<()>;
}

struct CodecStream<S, C> {
    inner: S,
    codec: C,
    /// Encoded and not written yet.
    pending: Vec<u8>,
    /// Decoded and not read yet, from index `taken` on.
    plain: Vec<u8>,
    taken: usize,
    space: Box<[u8]>,
}

impl<S, C> CodecStream<S, C> {
    fn new(inner: S, codec: C) -> CodecStream<S, C> {
        CodecStream {
            inner,
            codec,
            pending: Vec::new(),
            plain: Vec::new(),
            taken: 0,
            space: vec![0; MAX_WRITE].into(),
        }
    }
}

impl<S: AsyncWrite + Unpin, C> CodecStream<S, C> {
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let n = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.pending))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.pending.drain(..n);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin, C: Codec> AsyncRead for CodecStream<S, C> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.taken == this.plain.len() {
            this.plain.clear();
            this.taken = 0;
            let mut read = ReadBuf::new(&mut this.space);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            let n = read.filled().len();
            if n == 0 {
                return Poll::Ready(Ok(()));
            }
            this.codec.decode(&mut this.space[..n], &mut this.plain)?;
        }
        let n = buf.remaining().min(this.plain.len() - this.taken);
        buf.put_slice(&this.plain[this.taken..this.taken + n]);
        this.taken += n;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin, C: Codec> AsyncWrite for CodecStream<S, C> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.drain(cx))?;
        let n = bytes.len().min(MAX_WRITE);
        if n > 0 {
            this.codec.encode(&bytes[..n], &mut this.pending)?;
        }
        // what does not fit now goes with the next write or flush
        if let Poll::Ready(Err(e)) = this.drain(cx) {
            return Poll::Ready(Err(e));
        }
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.drain(cx))?;
        Pin::new(&mut this.inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.drain(cx))?;
        Pin::new(&mut this.inner).poll_shutdown(cx)
    }
}

struct Cipher {
    encryptor: Encryptor,
    decryptor: Decryptor,
}

impl Codec for Cipher {
    fn encode(&mut self, plain: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        self.encryptor.encrypt(plain, out);
        Ok(())
    }

    fn decode(&mut self, coded: &mut [u8], out: &mut Vec<u8>) -> io::Result<()> {
        let iv = self.decryptor.decrypt(coded);
        out.extend_from_slice(&coded[iv..]);
        Ok(())
    }
}

/// The cipher of the control channel, and of work connections that ask for it.
pub fn encrypted<S: Duplex>(inner: S, key: &Key) -> impl Duplex + use<S> {
    CodecStream::new(
        inner,
        Cipher { encryptor: Encryptor::new(key), decryptor: Decryptor::new(key) },
    )
}

/// Snappy's framing format (google/snappy `framing_format.txt`): each write becomes a chunk at
/// once, as golang/snappy's unbuffered writer does it.
struct Snappy {
    encoder: snap::write::FrameEncoder<Vec<u8>>,
    coded: Vec<u8>,
    begun: bool,
}

/// First chunk of each direction.
const IDENTIFIER: &[u8] = b"\xff\x06\x00\x00sNaPpY";
/// A chunk holds at most 65536 plain bytes; what compression may add to that, and the checksum.
const MAX_CHUNK: usize = 80_000;

impl Codec for Snappy {
    fn encode(&mut self, plain: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        use io::Write as _;
        self.encoder.write_all(plain)?;
        self.encoder.flush()?;
        out.append(self.encoder.get_mut());
        Ok(())
    }

    fn decode(&mut self, coded: &mut [u8], out: &mut Vec<u8>) -> io::Result<()> {
        use io::Read as _;
        let wrong =
            |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("snappy: {what}"));
        self.coded.extend_from_slice(coded);
        let mut at = 0;
        while let Some(&[kind, a, b, c]) =
            self.coded.get(at..at + 4).and_then(|h| <&[u8; 4]>::try_from(h).ok())
        {
            let length = usize::from(a) | usize::from(b) << 8 | usize::from(c) << 16;
            if !self.begun && kind != 0xff {
                return Err(wrong("the stream identifier is missing"));
            }
            if length > MAX_CHUNK && kind < 0x80 {
                return Err(wrong("a chunk is too long"));
            }
            let Some(chunk) = self.coded.get(at..at + 4 + length) else { break };
            match kind {
                0xff if chunk == IDENTIFIER => self.begun = true,
                0xff => return Err(wrong("another stream identifier")),
                0 | 1 => {
                    snap::read::FrameDecoder::new(IDENTIFIER.chain(chunk)).read_to_end(out)?;
                }
                0x80.. => {}
                _ => return Err(wrong("an unknown chunk")),
            }
            at += 4 + length;
        }
        self.coded.drain(..at);
        Ok(())
    }
}

/// The layers of a work connection that its proxy asks for.
pub fn layered(inner: Io, encryption: Option<&Key>, compression: bool) -> Io {
    let inner: Io = match encryption {
        Some(key) => Box::new(encrypted(inner, key)),
        None => inner,
    };
    if compression {
        let codec = Snappy {
            encoder: snap::write::FrameEncoder::new(Vec::new()),
            coded: Vec::new(),
            begun: false,
        };
        return Box::new(CodecStream::new(inner, codec));
    }
    inner
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::base::secret::Secret;

    #[tokio::test]
    async fn every_combination_carries_bytes_both_ways() {
        let key = Key::derive(&Secret::new("t"));
        for (encryption, compression) in
            [(false, false), (true, false), (false, true), (true, true)]
        {
            let (a, b) = tokio::io::duplex(777);
            let mut a = layered(Box::new(a), encryption.then_some(&key), compression);
            let mut b = layered(Box::new(b), encryption.then_some(&key), compression);
            let sent: Vec<u8> = (0..300_000_u32).map(|i| (i.wrapping_mul(i) % 251) as u8).collect();
            let copy = sent.clone();
            let writer = tokio::spawn(async move {
                a.write_all(&copy).await.unwrap();
                a.flush().await.unwrap();
                let mut answer = [0; 2];
                a.read_exact(&mut answer).await.unwrap();
                answer
            });
            let mut got = vec![0; sent.len()];
            b.read_exact(&mut got).await.unwrap();
            assert!(got == sent, "encryption {encryption}, compression {compression}");
            b.write_all(b"ok").await.unwrap();
            b.flush().await.unwrap();
            assert_eq!(&writer.await.unwrap(), b"ok");
        }
    }

    #[tokio::test]
    async fn wrong_snappy_is_an_error_and_no_endless_buffer() {
        for bytes in [
            &b"\x00\x05\x00\x00hello"[..],
            b"\xff\x06\x00\x00sNaPpX",
            b"\xff\x06\x00\x00sNaPpY\x00\xff\xff\xff",
            b"\xff\x06\x00\x00sNaPpY\x02\x01\x00\x00x",
        ] {
            let mut io = layered(Box::new(io::Cursor::new(bytes.to_vec())), None, true);
            assert!(io.read_to_end(&mut Vec::new()).await.is_err(), "{bytes:?}");
        }
    }
}
