//! A request passed on and its answer passed back, bodies and upgraded connections included. The
//! agent does so for the Kubernetes API, the gateway for an agent; who may, with which credential
//! and what is recorded is theirs.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use http::request::Parts;
use http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tower::BoxError;

use super::header_policy;
use crate::base::task::boxed;

/// A connection after its upgrade.
pub type UpgradedIo = TokioIo<Upgraded>;

/// How a request is sent on.
pub struct Outward<'a> {
    pub uri: Uri,
    /// All of them: no header of the request passes by itself.
    pub headers: HeaderMap,
    /// Whether the answer may switch protocols.
    pub upgrade: bool,
    /// Below which path the caller sees the server.
    pub prefix: &'a str,
}

/// Why there is no answer to pass back.
#[derive(Debug)]
pub enum ForwardError<A, E> {
    /// The request was not answered.
    NoAnswer(E),
    /// A 401, with its body: it is about the credential of the program that passes the request on,
    /// not about the caller's.
    Unauthorized(A),
    /// A redirect to somewhere else than the server.
    Redirect,
    /// A 101 to a request that asked for no upgrade.
    UnaskedUpgrade,
}

/// An answer that may be passed back.
pub struct Answer<A> {
    pub status: StatusCode,
    headers: HeaderMap,
    body: A,
    /// The connections of the caller and of the server, when the answer is a 101.
    upgrades: Option<[OnUpgrade; 2]>,
}

/// Sends a request on, its body wrapped by `body`; that of an upgrade is empty: what follows the
/// request is passed on only after a 101.
///
/// # Errors
/// What came instead of an answer that may be passed back.
pub async fn forward<B, C, A, E, F>(
    mut request: Request<B>,
    outward: Outward<'_>,
    body: impl FnOnce(B) -> C,
    send: impl FnOnce(Request<C>) -> F,
) -> Result<Answer<A>, ForwardError<A, E>>
where
    C: Default,
    F: Future<Output = Result<Response<A>, E>>,
{
    let Outward { uri, headers, upgrade, prefix } = outward;
    let caller = hyper::upgrade::on(&mut request);
    let (Parts { method, .. }, unread) = request.into_parts();
    let mut sent = Request::new(if upgrade { C::default() } else { body(unread) });
    (*sent.method_mut(), *sent.uri_mut(), *sent.headers_mut()) = (method, uri, headers);
    let mut answer = send(sent).await.map_err(ForwardError::NoAnswer)?;
    let status = answer.status();
    if status == StatusCode::UNAUTHORIZED {
        return Err(ForwardError::Unauthorized(answer.into_body()));
    }
    let mut headers = header_policy::response_headers(status, answer.headers(), prefix)
        .ok_or(ForwardError::Redirect)?;
    let mut upgrades = None;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        if !upgrade {
            return Err(ForwardError::UnaskedUpgrade);
        }
        for name in [header::CONNECTION, header::UPGRADE] {
            if let Some(value) = answer.headers().get(&name) {
                headers.insert(name, value.clone());
            }
        }
        upgrades = Some([caller, hyper::upgrade::on(&mut answer)]);
    }
    Ok(Answer { status, headers, body: answer.into_body(), upgrades })
}

impl<A> Answer<A>
where
    A: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    /// The answer as the caller gets it. After a 101 it has no body, and a task relays the two
    /// connections.
    pub fn pass_back<H: StreamHooks>(
        self,
        hooks: H,
        cut: Cut,
    ) -> Response<Option<ForwardedBody<A, H>>> {
        let mut response = Response::new(match self.upgrades {
            Some(upgrades) => {
                tokio::spawn(boxed(relay(upgrades, hooks, cut)));
                None
            }
            None => Some(ForwardedBody::new(self.body, hooks, cut)),
        });
        (*response.status_mut(), *response.headers_mut()) = (self.status, self.headers);
        response
    }
}

/// Completes when a stream must end, and says why to the reader of a body.
pub type Cut = BoxFuture<'static, &'static str>;

/// Why a stream did not come to its own end.
#[derive(Debug)]
pub enum EarlyEnd {
    /// Reading the body failed.
    Broken,
    Cut,
    /// A connection was closed after the 101 and before it was upgraded.
    NotUpgraded,
}

/// What a program does of its own for a stream: a body, or an upgraded connection. It is dropped
/// with the last byte, not when a connection drops the body.
pub trait StreamHooks: Send + Unpin + 'static {
    /// What the log says of a body that broke.
    const BROKEN: &str;

    /// So many bytes of a body are passed on.
    fn passed(&mut self, _bytes: usize) {}

    fn ended_early(&mut self, _why: EarlyEnd) {}

    /// Copies between the two ends of an upgraded connection until it ends: here, when both have
    /// closed, so that what is on its way to the one that closed first still arrives.
    fn relay(
        &mut self,
        mut caller: UpgradedIo,
        mut server: UpgradedIo,
    ) -> impl Future<Output = ()> + Send {
        async move {
            let _ = tokio::io::copy_bidirectional(&mut caller, &mut server).await;
        }
    }
}

async fn relay<H: StreamHooks>([caller, server]: [OnUpgrade; 2], mut hooks: H, cut: Cut) {
    let (Ok(caller), Ok(server)) = (caller.await, server.await) else {
        return hooks.ended_early(EarlyEnd::NotUpgraded);
    };
    tokio::select! {
        () = hooks.relay(TokioIo::new(caller), TokioIo::new(server)) => {}
        _ = cut => hooks.ended_early(EarlyEnd::Cut),
    }
}

/// A body that is passed on.
pub struct ForwardedBody<B, H> {
    inner: B,
    /// Until the stream has ended.
    hooks: Option<H>,
    cut: Cut,
}

impl<B, H> ForwardedBody<B, H> {
    pub fn new(inner: B, hooks: H, cut: Cut) -> ForwardedBody<B, H> {
        ForwardedBody { inner, hooks: Some(hooks), cut }
    }
}

impl<B, H: StreamHooks> Body for ForwardedBody<B, H>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let Some(hooks) = &mut this.hooks else { return Poll::Ready(None) };
        // before the frames: a body that always has one is cut too
        if let Poll::Ready(why) = this.cut.as_mut().poll(cx) {
            hooks.ended_early(EarlyEnd::Cut);
            this.hooks = None;
            return Poll::Ready(Some(Err(why.into())));
        }
        let polled = Pin::new(&mut this.inner).poll_frame(cx).map_err(Into::into);
        match &polled {
            Poll::Pending => {}
            Poll::Ready(Some(Ok(frame))) => hooks.passed(frame.data_ref().map_or(0, Bytes::len)),
            Poll::Ready(Some(Err(error))) => {
                tracing::debug!(error = format!("{error:?}"), "{}", H::BROKEN);
                hooks.ended_early(EarlyEnd::Broken);
                this.hooks = None;
            }
            Poll::Ready(None) => this.hooks = None,
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // axum makes Content-Length of it: an answer without a body (HEAD, 304) keeps the server's
        if self.inner.is_end_stream() { SizeHint::default() } else { self.inner.size_hint() }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::ready;
    use std::sync::Arc;

    use http::HeaderValue;
    use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use parking_lot::Mutex;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio_util::sync::CancellationToken;

    use super::*;

    /// Writes down what happens.
    #[derive(Clone, Default)]
    struct Noted(Arc<Mutex<Vec<String>>>);

    impl Noted {
        fn is(&self, wanted: &[&str]) {
            assert_eq!(*self.0.lock(), wanted);
        }
    }

    impl StreamHooks for Noted {
        const BROKEN: &str = "a body broke";

        fn passed(&mut self, bytes: usize) {
            self.0.lock().push(bytes.to_string());
        }

        fn ended_early(&mut self, why: EarlyEnd) {
            self.0.lock().push(format!("{why:?}"));
        }
    }

    fn never() -> Cut {
        Box::pin(std::future::pending())
    }

    fn when(token: &CancellationToken) -> Cut {
        let token = token.clone();
        Box::pin(async move {
            token.cancelled().await;
            "revoked"
        })
    }

    /// A body of these frames.
    fn frames<const N: usize>(
        frames: [Result<&'static str, &'static str>; N],
    ) -> impl Body<Data = Bytes, Error = BoxError> + Unpin {
        let frames = frames.map(|frame| match frame {
            Ok(data) => Ok(Frame::data(Bytes::from_static(data.as_bytes()))),
            Err(error) => Err(BoxError::from(error)),
        });
        StreamBody::new(futures_util::stream::iter(frames))
    }

    #[tokio::test]
    async fn a_body_is_watched_to_its_end_and_no_longer() {
        let noted = Noted::default();
        let inner = frames([Ok("first"), Ok("and last")]);
        let mut body = ForwardedBody::new(inner, noted.clone(), never());
        while let Some(frame) = body.frame().await {
            assert!(frame.is_ok());
        }
        noted.is(&["5", "8"]);
        assert_eq!(Arc::strong_count(&noted.0), 1, "kept with the body");

        let noted = Noted::default();
        let inner = frames([Ok("first"), Err("gone")]);
        let body = ForwardedBody::new(inner, noted.clone(), never());
        assert_eq!(body.collect().await.unwrap_err().to_string(), "gone");
        noted.is(&["5", "Broken"]);
    }

    #[tokio::test]
    async fn a_body_that_has_more_to_give_is_cut() {
        let (noted, token) = (Noted::default(), CancellationToken::new());
        let inner = frames([Ok("first"), Ok("and last")]);
        let mut body = ForwardedBody::new(inner, noted.clone(), when(&token));
        assert!(body.frame().await.unwrap().is_ok());
        token.cancel();
        assert_eq!(body.frame().await.unwrap().unwrap_err().to_string(), "revoked");
        noted.is(&["5", "Cut"]);
        assert!(body.frame().await.is_none());
    }

    #[test]
    fn a_body_that_is_not_there_has_no_length() {
        let body = |text: &'static str| {
            ForwardedBody::new(Full::<Bytes>::from(text), Noted::default(), never())
        };
        assert_eq!(body("four").size_hint().exact(), Some(4));
        assert_eq!(body("").size_hint().exact(), None);
    }

    fn upgrade_headers() -> HeaderMap {
        HeaderMap::from_iter([
            (header::CONNECTION, HeaderValue::from_static("Upgrade")),
            (header::UPGRADE, HeaderValue::from_static("websocket")),
        ])
    }

    type Judged = Result<Answer<Empty<Bytes>>, ForwardError<Empty<Bytes>, Infallible>>;

    /// What becomes of an answer, and the body of the request that was sent.
    async fn judged(status: u16, headers: HeaderMap, upgrade: bool) -> (Judged, Bytes) {
        let uri = Uri::from_static("/api");
        let outward = Outward { uri, headers: HeaderMap::new(), upgrade, prefix: "/k8s" };
        let mut answer = Response::new(Empty::new());
        *answer.status_mut() = StatusCode::from_u16(status).unwrap();
        *answer.headers_mut() = headers;
        let mut body = Full::default();
        let send = |request: Request<Full<Bytes>>| {
            assert_eq!((request.method(), request.uri().path()), (&http::Method::PUT, "/api"));
            assert!(request.headers().is_empty());
            body = request.into_body();
            ready(Ok(answer))
        };
        let request = Request::put("/k8s/api").header("x-own", "1").body("body").unwrap();
        let judged = forward(request, outward, Full::from, send).await;
        (judged, body.collect().await.unwrap().to_bytes())
    }

    #[tokio::test]
    async fn answers_that_are_not_the_callers_are_not_passed_back() {
        let location =
            |to| HeaderMap::from_iter([(header::LOCATION, HeaderValue::from_static(to))]);
        let (answer, body) = judged(401, HeaderMap::new(), false).await;
        assert!(matches!(answer, Err(ForwardError::Unauthorized(_))));
        assert_eq!(body, "body");
        let (answer, _) = judged(302, location("https://evil.example/"), false).await;
        assert!(matches!(answer, Err(ForwardError::Redirect)));
        let (answer, _) = judged(101, upgrade_headers(), false).await;
        assert!(matches!(answer, Err(ForwardError::UnaskedUpgrade)));

        let (answer, _) = judged(302, location("/api/v1"), false).await;
        let response = answer.unwrap().pass_back(Noted::default(), never());
        assert_eq!(response.headers()["location"], "/k8s/api/v1");
        assert!(response.body().is_some());
    }

    #[tokio::test]
    async fn an_upgrade_is_asked_for_without_a_body_and_answered_without_one() {
        let (answer, body) = judged(101, upgrade_headers(), true).await;
        assert_eq!(body, "");
        let noted = Noted::default();
        let response = answer.unwrap().pass_back(noted.clone(), never());
        assert_eq!(response.status(), 101);
        assert!(response.body().is_none());
        for (name, value) in &upgrade_headers() {
            assert_eq!(response.headers().get(name), Some(value));
        }
        // there is no connection below these two
        tokio::task::yield_now().await;
        noted.is(&["NotUpgraded"]);
    }

    /// A server whose upgraded connections give back what they get.
    async fn serve_echo(io: DuplexStream) {
        let service = service_fn(|mut request: Request<Incoming>| {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let (mut r, mut w) = tokio::io::split(TokioIo::new(upgrade.await.unwrap()));
                let _ = tokio::io::copy(&mut r, &mut w).await;
            });
            let mut answer = Response::new(Empty::<Bytes>::new());
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            *answer.headers_mut() = upgrade_headers();
            ready(Ok::<_, Infallible>(answer))
        });
        let server = hyper::server::conn::http1::Builder::new();
        let _ = server.serve_connection(TokioIo::new(io), service).with_upgrades().await;
    }

    /// Passes one request on over `server`.
    async fn serve_proxy(
        io: DuplexStream,
        server: DuplexStream,
        noted: Noted,
        token: CancellationToken,
    ) {
        let (sender, connection) =
            hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(server))
                .await
                .unwrap();
        tokio::spawn(connection.with_upgrades());
        let sender = Mutex::new(Some(sender));
        let service = service_fn(|request: Request<Incoming>| {
            let mut sender = sender.lock().take().unwrap();
            let (noted, cut) = (noted.clone(), when(&token));
            async move {
                let uri = Uri::from_static("/exec");
                let headers = upgrade_headers();
                let outward = Outward { uri, headers, upgrade: true, prefix: "/k8s" };
                let send = |request: Request<Empty<Bytes>>| sender.send_request(request);
                let answer = forward(request, outward, |_| Empty::<Bytes>::new(), send).await;
                let response = answer.ok().unwrap().pass_back(noted, cut);
                Ok::<_, Infallible>(response.map(|_| Empty::<Bytes>::new()))
            }
        });
        let server = hyper::server::conn::http1::Builder::new();
        let _ = server.serve_connection(TokioIo::new(io), service).with_upgrades().await;
    }

    #[tokio::test]
    async fn an_upgraded_connection_is_relayed_until_both_ends_close_or_it_is_cut() {
        for (cuts, wanted) in [(true, &["Cut"][..]), (false, &[])] {
            let (mut caller, proxy) = tokio::io::duplex(1024);
            let (out, server) = tokio::io::duplex(1024);
            let (noted, token) = (Noted::default(), CancellationToken::new());
            tokio::spawn(serve_echo(server));
            tokio::spawn(serve_proxy(proxy, out, noted.clone(), token.clone()));
            let head = "GET /k8s/exec HTTP/1.1\r\nhost: p\r\n\
                        connection: Upgrade\r\nupgrade: websocket\r\n\r\n";
            caller.write_all(head.as_bytes()).await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(caller.read_u8().await.unwrap());
            }
            assert!(head.starts_with(b"HTTP/1.1 101 "));
            caller.write_all(b"ping").await.unwrap();
            let mut back = [0; 4];
            caller.read_exact(&mut back).await.unwrap();
            assert_eq!(&back, b"ping");
            if cuts {
                token.cancel();
            } else {
                // what is on its way to an end that has closed still arrives
                caller.write_all(b"last").await.unwrap();
                caller.shutdown().await.unwrap();
                caller.read_exact(&mut back).await.unwrap();
                assert_eq!(&back, b"last");
            }
            assert_eq!(caller.read(&mut back).await.unwrap(), 0);
            drop(caller);
            tokio::task::yield_now().await;
            noted.is(wanted);
        }
    }
}
