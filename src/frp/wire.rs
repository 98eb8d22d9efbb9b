//! FRP wire protocol version 1: bytes and values, digests, the control channel's cipher.
//!
//! Facts from fatedier/frp v0.70.1 (`pkg/msg/msg.go`, `pkg/auth/token.go`) and fatedier/golib
//! (`msg/json/process.go`, `crypto/encode.go`); checked beside genuine ones of five generations by
//! `tests/it/genuine.rs`.

use aes::Aes128;
use cfb_mode::cipher::KeyIvInit as _;
use cfb_mode::{BufDecryptor, BufEncryptor};
use md5::{Digest as _, Md5};
use ring::rand::SecureRandom as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::base::encoding::hex;
use crate::base::secret::Secret;

/// The version that client and server announce. Servers of many years refuse a login whose version
/// is below 0.18.0 (fatedier/frp `utils/version/version.go`, in 0.31 as in 0.5x), so it has to be
/// one of frp's: the version of this protocol, with ours behind it.
pub const VERSION: &str = concat!("0.70.1+pipeops.", env!("CARGO_PKG_VERSION"));
/// Longest body of a message, both ways; a longer one ends the peer's read loop.
pub const MAX_BODY: usize = 10240;
/// Type byte and length.
pub const HEADER: usize = 9;

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("unknown message type 0x{0:02x}")]
    Type(u8),
    #[error("message length {0} is out of range 0 to {MAX_BODY}")]
    Length(i64),
    #[error("body of message `{kind}` is wrong: {why}")]
    Body { kind: char, why: String },
    #[error("message `{kind}` has {length} bytes, the protocol carries at most {MAX_BODY}")]
    TooLong { kind: char, length: usize },
}

macro_rules! messages {
    ($($name:ident = $byte:literal { $($field:ident : $type:ty),* $(,)? })*) => {
        $(
            #[doc = concat!(
                "Message `", stringify!($name), "`; fields as on the wire, absent ones are empty."
            )]
            #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
            #[serde(default)]
            pub struct $name {
                $(#[serde(skip_serializing_if = "empty")] pub $field: $type,)*
            }
        )*

        /// A message of the control channel, or the first one of a work or visitor connection.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Message { $($name($name),)* }

        $(impl From<$name> for Message {
            fn from(m: $name) -> Message { Message::$name(m) }
        })*

        impl Message {
            /// The type byte.
            pub fn kind(&self) -> u8 {
                match self { $(Message::$name(_) => $byte,)* }
            }

            fn body(&self) -> Vec<u8> {
                match self { $(Message::$name(m) => serde_json::to_vec(m).unwrap_or_default(),)* }
            }

            /// Parses a body as Go does: `null` counts as absent, unknown keys are ignored.
            ///
            /// # Errors
            /// An unknown type, or a body that is no JSON object of the right types.
            pub fn parse(kind: u8, body: &[u8]) -> Result<Message, WireError> {
                let wrong = |why: String| WireError::Body { kind: char::from(kind), why };
                if !matches!(kind, $($byte)|*) {
                    return Err(WireError::Type(kind));
                }
                let wrong_json = |e: serde_json::Error| wrong(e.to_string());
                let mut value: Value = serde_json::from_slice(body).map_err(wrong_json)?;
                match value.as_object_mut() {
                    Some(map) => map.retain(|_, v| !v.is_null()),
                    None => return Err(wrong("not an object".into())),
                }
                match kind {
                    $($byte => serde_json::from_value::<$name>(value)
                        .map(Message::$name)
                        .map_err(wrong_json),)*
                    other => Err(WireError::Type(other)),
                }
            }
        }
    };
}

/// Go's `omitempty`.
fn empty<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

messages! {
    Login = b'o' {
        version: String,
        hostname: String,
        os: String,
        arch: String,
        user: String,
        privilege_key: String,
        timestamp: i64,
        run_id: String,
        metas: BTreeMap<String, String>,
        pool_count: i64,
    }
    LoginResp = b'1' { version: String, run_id: String, error: String }
    NewProxy = b'p' {
        proxy_name: String,
        proxy_type: String,
        use_encryption: bool,
        use_compression: bool,
        metas: BTreeMap<String, String>,
        remote_port: u16,
        custom_domains: Vec<String>,
        subdomain: String,
        sk: String,
        allow_users: Vec<String>,
    }
    NewProxyResp = b'2' { proxy_name: String, remote_addr: String, error: String }
    CloseProxy = b'c' { proxy_name: String }
    NewWorkConn = b'w' { run_id: String, privilege_key: String, timestamp: i64 }
    ReqWorkConn = b'r' {}
    StartWorkConn = b's' {
        proxy_name: String,
        src_addr: String,
        dst_addr: String,
        src_port: u16,
        dst_port: u16,
        error: String,
    }
    NewVisitorConn = b'v' {
        run_id: String,
        proxy_name: String,
        sign_key: String,
        timestamp: i64,
        use_encryption: bool,
        use_compression: bool,
    }
    NewVisitorConnResp = b'3' { proxy_name: String, error: String }
    Ping = b'h' { privilege_key: String, timestamp: i64 }
    Pong = b'4' { error: String }
}

impl Message {
    /// The whole message as bytes.
    ///
    /// # Errors
    /// When the body is longer than the peer would read: sending it would end the session.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let body = self.body();
        if body.len() > MAX_BODY {
            return Err(WireError::TooLong { kind: char::from(self.kind()), length: body.len() });
        }
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.push(self.kind());
        bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// Type and body length of a header, refused before anything is allocated.
    ///
    /// # Errors
    /// A length out of range. The type is judged with the body.
    pub fn header(bytes: [u8; HEADER]) -> Result<(u8, usize), WireError> {
        let [kind, length @ ..] = bytes;
        let length = i64::from_be_bytes(length);
        match usize::try_from(length) {
            Ok(n) if n <= MAX_BODY => Ok((kind, n)),
            _ => Err(WireError::Length(length)),
        }
    }
}

/// Reads one message and not a byte more: what follows on the stream is payload or ciphertext. Not
/// cancel-safe.
///
/// # Errors
/// I/O errors as they are; a wrong message as `InvalidData`.
pub async fn read<R: AsyncRead + Unpin>(from: &mut R) -> std::io::Result<Message> {
    let wrong = |e: WireError| std::io::Error::new(std::io::ErrorKind::InvalidData, e);
    let mut header = [0; HEADER];
    from.read_exact(&mut header).await?;
    let (kind, length) = Message::header(header).map_err(wrong)?;
    let mut body = vec![0; length];
    from.read_exact(&mut body).await?;
    Message::parse(kind, &body).map_err(wrong)
}

/// Writes and flushes one message.
///
/// # Errors
/// I/O errors as they are; a message that is too long as `InvalidInput`.
pub async fn write<W: AsyncWrite + Unpin>(
    to: &mut W,
    message: impl Into<Message>,
) -> std::io::Result<()> {
    let bytes = message
        .into()
        .encode()
        .map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidInput, e))?;
    to.write_all(&bytes).await?;
    to.flush().await
}

/// `hex(md5(token || seconds))`: proves the token for a time that the sender names; a server does
/// not judge the time.
pub fn privilege_key(token: &Secret, timestamp: i64) -> String {
    let mut md5 = Md5::new();
    md5.update(token.expose());
    md5.update(timestamp.to_string());
    hex(&md5.finalize())
}

/// A new run id: 128 random bits, as it alone binds work connections to a session.
pub fn fresh_run_id() -> String {
    hex(&random::<16>())
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[expect(
        clippy::expect_used,
        reason = "without the system's random numbers nothing here is safe to go on"
    )]
    ring::rand::SystemRandom::new().fill(&mut bytes).expect("the system gives random numbers");
    bytes
}

/// Key of a cipher. That of the control channel is derived from the token, that of a visitor from
/// the proxy's secret key.
#[derive(Clone)]
pub struct Key([u8; 16]);

impl Key {
    /// PBKDF2-HMAC-SHA1, salt `frp`, 64 rounds.
    pub fn derive(secret: &Secret) -> Key {
        let mut key = [0; 16];
        let rounds = std::num::NonZeroU32::new(64).unwrap_or(std::num::NonZeroU32::MIN);
        ring::pbkdf2::derive(
            ring::pbkdf2::PBKDF2_HMAC_SHA1,
            rounds,
            b"frp",
            secret.expose().as_bytes(),
            &mut key,
        );
        Key(key)
    }
}

/// The sending side of AES-128-CFB: the IV goes out in clear once, just before the first byte.
pub struct Encryptor {
    cipher: BufEncryptor<Aes128>,
    iv: Option<[u8; 16]>,
}

impl Encryptor {
    pub fn new(key: &Key) -> Encryptor {
        Encryptor::with_iv(key, random())
    }

    fn with_iv(key: &Key, iv: [u8; 16]) -> Encryptor {
        Encryptor { cipher: BufEncryptor::new(&key.0.into(), &iv.into()), iv: Some(iv) }
    }

    /// Appends the ciphertext of `plain` to `out`.
    pub fn encrypt(&mut self, plain: &[u8], out: &mut Vec<u8>) {
        if let Some(iv) = self.iv.take() {
            out.extend_from_slice(&iv);
        }
        let from = out.len();
        out.extend_from_slice(plain);
        self.cipher.encrypt(&mut out[from..]);
    }
}

/// The receiving side: takes the IV from the first 16 bytes.
pub struct Decryptor {
    key: Key,
    head: Vec<u8>,
    cipher: Option<BufDecryptor<Aes128>>,
}

impl Decryptor {
    pub fn new(key: &Key) -> Decryptor {
        Decryptor { key: key.clone(), head: Vec::new(), cipher: None }
    }

    /// Decrypts `bytes` in place; gives how many of the first bytes belong to the IV.
    pub fn decrypt(&mut self, bytes: &mut [u8]) -> usize {
        let mut taken = 0;
        if self.cipher.is_none() {
            taken = bytes.len().min(16 - self.head.len());
            self.head.extend_from_slice(&bytes[..taken]);
            let Ok(iv) = <[u8; 16]>::try_from(self.head.as_slice()) else { return taken };
            self.cipher = Some(BufDecryptor::new(&self.key.0.into(), &iv.into()));
        }
        if let Some(cipher) = &mut self.cipher {
            cipher.decrypt(&mut bytes[taken..]);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Secret {
        Secret::new("my_secret_token")
    }

    fn bytes(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    #[test]
    fn messages_are_the_bytes_of_the_original() {
        assert_eq!(
            Message::from(ReqWorkConn {}).encode().unwrap(),
            bytes("72 0000000000000002 7b7d")
        );
        assert_eq!(
            Message::from(Ping::default()).encode().unwrap(),
            bytes("68 0000000000000002 7b7d")
        );
        let work = NewWorkConn { run_id: "0123456789abcdef".into(), ..NewWorkConn::default() };
        assert_eq!(
            Message::from(work).encode().unwrap(),
            bytes("77 000000000000001d 7b2272756e5f6964223a2230313233343536373839616263646566227d")
        );
    }

    #[test]
    fn the_digest_and_the_key_are_those_of_the_original() {
        assert_eq!(privilege_key(&token(), 1_700_000_000), "0d1f6b37b5fc65f2bf3aacc729a39071");
        assert_eq!(
            privilege_key(&Secret::new(""), 1_700_000_000),
            "24920decf83f6960b80f737a28eeafc1"
        );
        assert_eq!(hex(&Key::derive(&token()).0), "3ee5b9daf57cb530f6c9510dc000e9fc");
        assert_eq!(hex(&Key::derive(&Secret::new("")).0), "cdc9dc4c472c37331281df4c232a8407");
    }

    #[test]
    fn one_keystream_runs_over_all_messages_of_a_direction() {
        let key = Key::derive(&token());
        let mut encryptor =
            Encryptor::with_iv(&key, std::array::from_fn(|i| u8::try_from(i).unwrap()));
        let mut out = Vec::new();
        encryptor.encrypt(&Message::from(Ping::default()).encode().unwrap(), &mut out);
        encryptor.encrypt(&Message::from(ReqWorkConn {}).encode().unwrap(), &mut out);
        let expected =
            "000102030405060708090a0b0c0d0e0f a4fc1896a6b69e67247520 273db113c92c981a2aec90";
        assert_eq!(out, bytes(expected));
        // and back, in pieces of any size
        for step in 1..out.len() {
            let mut decryptor = Decryptor::new(&key);
            let mut plain = Vec::new();
            for piece in out.chunks(step) {
                let mut piece = piece.to_vec();
                let iv = decryptor.decrypt(&mut piece);
                plain.extend_from_slice(&piece[iv..]);
            }
            assert_eq!(plain, bytes("68 0000000000000002 7b7d 72 0000000000000002 7b7d"));
        }
    }

    #[test]
    fn lengths_are_judged_before_a_byte_is_allocated() {
        let header = |kind: u8, length: i64| {
            let mut header = [kind; HEADER];
            header[1..].copy_from_slice(&length.to_be_bytes());
            Message::header(header)
        };
        assert_eq!(header(b'h', 10240), Ok((b'h', 10240)));
        assert_eq!(header(b'h', 10241), Err(WireError::Length(10241)));
        assert_eq!(header(b'h', -1), Err(WireError::Length(-1)));
        assert_eq!(header(b'h', i64::MAX), Err(WireError::Length(i64::MAX)));
        let long = NewProxy { proxy_name: "x".repeat(MAX_BODY), ..NewProxy::default() };
        assert!(matches!(Message::from(long).encode(), Err(WireError::TooLong { kind: 'p', .. })));
    }

    #[test]
    fn bodies_are_read_as_leniently_as_go_does_and_no_more() {
        assert_eq!(
            Message::parse(b'4', br#"{"error":null,"later":{"x":1}}"#),
            Ok(Pong::default().into())
        );
        assert_eq!(Message::parse(b'z', b"{}"), Err(WireError::Type(b'z')));
        assert!(matches!(Message::parse(b'4', b"[]"), Err(WireError::Body { .. })));
        assert!(matches!(Message::parse(b'1', br#"{"run_id":7}"#), Err(WireError::Body { .. })));
        assert!(matches!(Message::parse(b'1', b""), Err(WireError::Body { .. })));
    }
}
