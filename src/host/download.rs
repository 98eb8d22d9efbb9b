//! Downloads over HTTP: small texts, release channels, and files that resume; all with retries and
//! time-outs.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use reqwest::header::{CONTENT_RANGE, HeaderName, RANGE, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode};
use sha2::{Digest as _, Sha256};

use crate::base::encoding::hex;
use crate::base::error::{Exit, Failure};
use crate::base::http::explain;
use crate::base::resolve::Resolver;
use crate::base::secret::Secret;
use crate::k3s::version::{self, Version};

const CONNECT: Duration = Duration::from_secs(10);
/// A transfer that brings nothing for this long is given up and tried again.
const STALL: Duration = Duration::from_secs(15);
const TRIES: u32 = 5;
/// Lists and redirects are small.
const MAX_LIST: usize = 1 << 20;

/// A client for release files; `redirects` off where the target itself is the answer.
fn client(redirects: bool) -> anyhow::Result<Client> {
    let policy = if redirects {
        reqwest::redirect::Policy::limited(10)
    } else {
        reqwest::redirect::Policy::none()
    };
    Client::builder()
        .dns_resolver(Resolver::shared())
        .connect_timeout(CONNECT)
        .read_timeout(STALL)
        .redirect(policy)
        .user_agent(concat!("pipeops/", env!("CARGO_PKG_VERSION")))
        .build()
        .context("making an HTTP client")
}

fn network(what: impl Into<String>) -> Failure {
    Failure::new(Exit::Network, "DOWNLOAD_FAILED", what)
}

/// A small text, with retries.
///
/// # Errors
/// Exit 5; 404 has the code `NOT_FOUND`.
pub async fn text(url: &str) -> Result<String, Failure> {
    let client = client(true).map_err(|e| network(e.to_string()))?;
    let mut last = network(format!("cannot read {url}"));
    for attempt in 0..TRIES {
        pause(attempt, None).await;
        let mut answer = match client.get(url).send().await {
            Ok(answer) => answer,
            Err(e) => {
                last = network(format!("cannot read {url}")).why(explain(&e));
                continue;
            }
        };
        if answer.status() == StatusCode::NOT_FOUND {
            return Err(Failure::new(Exit::Network, "NOT_FOUND", format!("{url} does not exist"))
                .hint("check the version and the mirror"));
        }
        if !answer.status().is_success() {
            last = network(format!("cannot read {url}"))
                .why(format!("the server answered {}", answer.status()));
            if answer.status().is_client_error() {
                return Err(last);
            }
            continue;
        }
        let mut body = Vec::new();
        loop {
            match answer.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() <= MAX_LIST => {
                    body.extend_from_slice(&chunk)
                }
                Ok(Some(_)) => {
                    return Err(network(format!("{url} is larger than any checksum list")));
                }
                Ok(None) => return Ok(String::from_utf8_lossy(&body).into_owned()),
                Err(e) => {
                    last = network(format!("cannot read {url}")).why(explain(&e));
                    break;
                }
            }
        }
    }
    Err(last.hint("check the network and any proxy, or use --offline-dir"))
}

/// The version that a release channel stands for.
pub async fn resolve_channel(base: &str, name: &str) -> Result<Version, Failure> {
    let url = format!("{}/{name}", base.trim_end_matches('/'));
    let client = client(false).map_err(|e| network(e.to_string()))?;
    let mut last = network(format!("cannot resolve channel {name}"));
    for attempt in 0..TRIES {
        pause(attempt, None).await;
        match client.get(&url).send().await {
            Ok(answer) if answer.status().is_redirection() => {
                let target = answer
                    .headers()
                    .get(reqwest::header::LOCATION)
                    .and_then(|l| l.to_str().ok())
                    .unwrap_or_default();
                return version::from_redirect(target)
                    .map_err(|why| network(format!("cannot resolve channel {name}")).why(why));
            }
            Ok(answer) if answer.status().is_server_error() => {
                last = network(format!("cannot resolve channel {name}"))
                    .why(format!("{url} answered {}", answer.status()))
            }
            Ok(answer) => {
                return Err(network(format!("cannot resolve channel {name}"))
                    .why(format!("{url} answered {} instead of a redirect", answer.status()))
                    .hint(
                        "channels are stable, latest, and vX.Y; or name a version with \
                         --k3s-version",
                    ));
            }
            Err(e) => last = network(format!("cannot resolve channel {name}")).why(explain(&e)),
        }
    }
    Err(last.hint("name a version with --k3s-version, or use --offline-dir"))
}

/// Waits before try `attempt`: 0, then 0.3 s doubling; or what the server asked for, up to 30 s.
async fn pause(attempt: u32, asked: Option<Duration>) {
    if attempt > 0 {
        let own = Duration::from_millis(300) * 2u32.pow(attempt.min(6) - 1);
        tokio::time::sleep(asked.unwrap_or(own).min(Duration::from_secs(30))).await;
    }
}

/// A URL without its login.
pub fn without_login(url: &str) -> String {
    match url::Url::parse(url) {
        Ok(mut parsed) if !parsed.username().is_empty() || parsed.password().is_some() => {
            let _ = parsed.set_username("").and_then(|()| parsed.set_password(None));
            parsed.to_string()
        }
        _ => url.to_owned(),
    }
}

/// Sends the login of a URL; it goes no further than the host that it is for.
fn with_login(request: reqwest::RequestBuilder, login: Option<&Secret>) -> reqwest::RequestBuilder {
    let Some(url) = login.and_then(|l| url::Url::parse(l.expose()).ok()) else { return request };
    let plain =
        |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    request.basic_auth(plain(url.username()), url.password().map(plain))
}

/// What an answer means for the part that is on disk.
enum Reply {
    /// The bytes that are missing, or all of them where the server cannot resume; and the whole
    /// length.
    Body { resumed: bool, total: Option<u64> },
    /// The whole file is on disk already, or a longer one of another kind: the digest decides.
    Complete,
    /// What is on disk is of no use.
    Discard(Option<Failure>),
    /// Try again, after the time that the server asks for.
    Retry { after: Option<Duration>, why: Failure },
}

/// # Errors
/// When no further try can help.
fn examine(url: &str, answer: &Response, have: u64) -> Result<Reply, Failure> {
    let header = |name: HeaderName| {
        answer.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    };
    match answer.status() {
        StatusCode::PARTIAL_CONTENT if have > 0 => {
            let range = header(CONTENT_RANGE);
            if !range.starts_with(&format!("bytes {have}-")) {
                let why = network(format!("cannot download {url}"))
                    .why(format!("asked for bytes from {have}, was sent `{range}`"));
                return Ok(Reply::Discard(Some(why)));
            }
            let total = answer.content_length().map(|rest| rest + have);
            Ok(Reply::Body { resumed: true, total })
        }
        StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => {
            let complete = header(CONTENT_RANGE) == format!("bytes */{have}");
            Ok(if complete { Reply::Complete } else { Reply::Discard(None) })
        }
        s if s.is_success() => Ok(Reply::Body { resumed: false, total: answer.content_length() }),
        StatusCode::NOT_FOUND => {
            Err(Failure::new(Exit::Network, "NOT_FOUND", format!("{url} does not exist"))
                .hint("check --k3s-version and --artifact-url"))
        }
        s => {
            let why =
                network(format!("cannot download {url}")).why(format!("the server answered {s}"));
            let passing = s == StatusCode::TOO_MANY_REQUESTS || s == StatusCode::REQUEST_TIMEOUT;
            if s.is_client_error() && !passing {
                return Err(why);
            }
            let after = header(RETRY_AFTER).parse().ok().map(Duration::from_secs);
            Ok(Reply::Retry { after, why })
        }
    }
}

/// Downloads to a file, resuming what an earlier try left there; gives the digest of the whole.
pub(super) async fn file(
    url: &str,
    login: Option<&Secret>,
    to: &PathBuf,
    progress: &mut impl FnMut(u64, Option<u64>),
) -> anyhow::Result<String> {
    let client = client(true)?;
    let mut last = network(format!("cannot download {url}"));
    let mut asked = None;
    let (mut attempt, mut best) = (0, 0);
    while attempt < TRIES {
        pause(attempt, asked.take()).await;
        attempt += 1;
        let mut digest = Sha256::new();
        let mut have = resume(to, &mut digest)?;
        let mut request = with_login(client.get(url), login);
        if have > 0 {
            request = request.header(RANGE, format!("bytes={have}-"));
        }
        let mut answer = match request.send().await {
            Ok(answer) => answer,
            Err(e) => {
                last = network(format!("cannot download {url}")).why(explain(&e));
                continue;
            }
        };
        let total = match examine(url, &answer, have)? {
            Reply::Body { resumed, total } => {
                if have > 0 && !resumed {
                    (digest, have) = (Sha256::new(), 0);
                    let _ = fs::remove_file(to);
                }
                total
            }
            Reply::Complete => return Ok(hex(&digest.finalize())),
            Reply::Discard(why) => {
                let _ = fs::remove_file(to);
                last = why.unwrap_or(last);
                continue;
            }
            Reply::Retry { after, why } => {
                (asked, last) = (after, why);
                continue;
            }
        };
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(to)
            .with_context(|| format!("writing {}", to.display()))?;
        let broken = loop {
            match answer.chunk().await {
                Ok(Some(chunk)) => {
                    file.write_all(&chunk).with_context(|| format!("writing {}", to.display()))?;
                    digest.update(&chunk);
                    have += chunk.len() as u64;
                    progress(have, total);
                }
                Ok(None) => break None,
                Err(e) => break Some(explain(&e)),
            }
        };
        match (broken, total) {
            (None, Some(total)) if have < total => {
                last = network(format!("the download of {url} was cut"))
                    .why(format!("{have} of {total} bytes came"))
            }
            (None, _) => return Ok(hex(&digest.finalize())),
            (Some(why), _) => {
                last = network(format!("the download of {url} was cut"))
                    .why(format!("{have} bytes came, then: {why}"))
            }
        }
        if have > best {
            // it got further than ever: the tries are for those that do not
            best = have;
            attempt = attempt.min(TRIES - 2);
        }
    }
    Err(last.hint("check the network and any proxy, then run again: the download resumes").into())
}

/// Feeds what an earlier try left to the digest; gives its length.
fn resume(part: &PathBuf, digest: &mut Sha256) -> anyhow::Result<u64> {
    let Ok(mut file) = File::open(part) else { return Ok(0) };
    let (mut have, mut buffer) = (0u64, vec![0; 1 << 18]);
    loop {
        match file.read(&mut buffer).with_context(|| format!("reading {}", part.display()))? {
            0 => return Ok(have),
            n => {
                digest.update(&buffer[..n]);
                have += n as u64;
            }
        }
    }
}
