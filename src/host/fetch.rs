//! Downloads that end verified or not at all: retry, resume, time-outs, digest while streaming.
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "part of the door to the machine"
)]

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use reqwest::header::{CONTENT_RANGE, RANGE, RETRY_AFTER};
use reqwest::{Client, StatusCode};
use sha2::{Digest as _, Sha256};

use super::{Host, HostWriter};
use crate::base::encoding::hex;
use crate::base::error::{Exit, Failure};
use crate::base::http::explain;
use crate::base::resolve::Resolver;
use crate::base::secret::Secret;
use crate::k3s::version::{self, Version};
use serde::{Deserialize, Serialize};

const CONNECT: Duration = Duration::from_secs(10);
/// A transfer that brings nothing for this long is given up and tried again.
const STALL: Duration = Duration::from_secs(15);
const TRIES: u32 = 5;
/// Lists and redirects are small.
const MOST_LIST: usize = 1 << 20;

/// A verified file from a release, a mirror or a directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Artifact {
    pub path: String,
    pub mode: u32,
    pub source: ArtifactSource,
    /// sha256, hexadecimal.
    pub sha256: String,
    /// Who vouches for the digest, for people.
    pub trust: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArtifactSource {
    Url(String),
    File(String),
}

/// A client for release files; `redirects` off where the target itself is the answer.
pub fn client(redirects: bool) -> anyhow::Result<Client> {
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
/// Exit 5; 404 is told apart by its code `NOT_FOUND`.
pub async fn small(url: &str) -> Result<String, Failure> {
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
                Ok(Some(chunk)) if body.len() + chunk.len() <= MOST_LIST => {
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
pub async fn channel(base: &str, name: &str) -> Result<Version, Failure> {
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
                    .hint("channels are stable, latest, and vX.Y; or name a version with --k3s-version"));
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

/// Downloads or copies into place. The file appears under its name only when its digest is right.
///
/// # Errors
/// Exit 5 for the network, 6 for a wrong digest; a full disk leaves nothing behind but the journal.
pub async fn fetch(
    writer: &HostWriter,
    want: &Artifact,
    keep: bool,
    login: Option<&Secret>,
    mut progress: impl FnMut(u64, Option<u64>),
) -> anyhow::Result<()> {
    let name = want.path.rsplit('/').next().unwrap_or_default();
    let dir = want.path.rsplit_once('/').map_or("/", |(dir, _)| dir);
    // named by digest: a half file of another version is never resumed
    let part = format!("{dir}/.{name}.{}.part", &want.sha256[..want.sha256.len().min(12)]);
    let real = writer.at(&part);
    let result = match &want.source {
        ArtifactSource::File(from) => copy(from, &real, &mut progress),
        ArtifactSource::Url(url) => download(url, login, &real, &mut progress).await,
    };
    let digest = match result {
        Ok(digest) => digest,
        Err(error) => {
            let full = error.chain().any(|c| {
                c.downcast_ref::<std::io::Error>()
                    .is_some_and(|io| io.kind() == std::io::ErrorKind::StorageFull)
            });
            if full || matches!(want.source, ArtifactSource::File(_)) {
                let _ = fs::remove_file(&real);
            }
            return Err(error);
        }
    };
    if digest != want.sha256 {
        let _ = fs::remove_file(&real);
        let from = match &want.source {
            ArtifactSource::Url(url) => url,
            ArtifactSource::File(file) => file,
        };
        return Err(Failure::new(
            Exit::Verification,
            "DIGEST_MISMATCH",
            format!("{from} is not what it should be"),
        )
        .why(format!("expected sha256 {} ({})", want.sha256, want.trust))
        .why(format!("received sha256 {digest}"))
        .hint(
            "it was damaged or tampered with on the way: try again, then ask who runs that mirror",
        )
        .into());
    }
    writer.place(&real, &want.path, want.mode, keep)
}

/// Removes half downloads of `path`, whatever version they were of.
pub fn clear_parts(writer: &HostWriter, path: &str) -> anyhow::Result<()> {
    let (dir, name) = path.rsplit_once('/').unwrap_or(("/", path));
    let prefix = format!(".{name}.");
    for file in writer.list(dir).iter().filter(|f| f.starts_with(&prefix) && f.ends_with(".part")) {
        writer.remove(&format!("{dir}/{file}"))?;
    }
    Ok(())
}

/// The directory is the user's, outside any sandbox root.
fn copy(
    from: &str,
    to: &PathBuf,
    progress: &mut impl FnMut(u64, Option<u64>),
) -> anyhow::Result<String> {
    let mut source = File::open(from).with_context(|| format!("reading {from}"))?;
    let total = source.metadata().map(|m| m.len()).ok();
    let mut target = File::create(to).with_context(|| format!("writing {}", to.display()))?;
    let (mut digest, mut done, mut buffer) = (Sha256::new(), 0u64, vec![0; 1 << 18]);
    loop {
        let n = source.read(&mut buffer).with_context(|| format!("reading {from}"))?;
        if n == 0 {
            return Ok(hex(&digest.finalize()));
        }
        digest.update(&buffer[..n]);
        target.write_all(&buffer[..n]).with_context(|| format!("writing {}", to.display()))?;
        done += n as u64;
        progress(done, total);
    }
}

async fn download(
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
        let status = answer.status();
        let total = match status {
            StatusCode::PARTIAL_CONTENT if have > 0 => {
                let range = answer
                    .headers()
                    .get(CONTENT_RANGE)
                    .and_then(|r| r.to_str().ok())
                    .unwrap_or_default();
                if !range.starts_with(&format!("bytes {have}-")) {
                    let _ = fs::remove_file(to);
                    last = network(format!("cannot download {url}"))
                        .why(format!("asked for bytes from {have}, was sent `{range}`"));
                    continue;
                }
                answer.content_length().map(|l| l + have)
            }
            StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => {
                // the whole file is here already, or a longer one of another kind: the digest decides
                let complete = answer
                    .headers()
                    .get(CONTENT_RANGE)
                    .and_then(|r| r.to_str().ok())
                    .is_some_and(|r| r == format!("bytes */{have}"));
                if complete {
                    return Ok(hex(&digest.finalize()));
                }
                let _ = fs::remove_file(to);
                continue;
            }
            s if s.is_success() => {
                if have > 0 {
                    // no resume here: from the start
                    (digest, have) = (Sha256::new(), 0);
                    let _ = fs::remove_file(to);
                }
                answer.content_length()
            }
            StatusCode::NOT_FOUND => {
                return Err(Failure::new(
                    Exit::Network,
                    "NOT_FOUND",
                    format!("{url} does not exist"),
                )
                .hint("check --k3s-version and --artifact-url")
                .into());
            }
            s => {
                asked = answer
                    .headers()
                    .get(RETRY_AFTER)
                    .and_then(|v| v.to_str().ok())
                    .and_then(|v| v.parse().ok())
                    .map(Duration::from_secs);
                last = network(format!("cannot download {url}"))
                    .why(format!("the server answered {s}"));
                if s.is_client_error()
                    && s != StatusCode::TOO_MANY_REQUESTS
                    && s != StatusCode::REQUEST_TIMEOUT
                {
                    return Err(last.into());
                }
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

impl Host {
    /// Text of a file of the user's (offline directory, token file), outside any sandbox root.
    ///
    /// # Errors
    /// Names the file.
    pub fn users_file(&self, path: &str) -> anyhow::Result<String> {
        let bytes = fs::read(path).with_context(|| format!("reading {path}"))?;
        String::from_utf8(bytes).ok().with_context(|| format!("{path} is not text"))
    }

    /// Writes a new file of the user's with secrets in it, mode 0600: durable, or not there.
    ///
    /// # Errors
    /// Exit 2 when it exists; else names the file.
    pub fn users_new_file(&self, path: &str, content: &str) -> anyhow::Result<()> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let opened = fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(path);
        let mut file = opened.map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => anyhow::Error::new(
                Failure::usage("FILE_EXISTS", format!("{path} exists already"))
                    .hint("name a new file"),
            ),
            _ => anyhow::Error::new(e).context(format!("writing {path}")),
        })?;
        let written = file.write_all(content.as_bytes()).and_then(|()| file.sync_all());
        written
            .inspect_err(|_| drop(fs::remove_file(path)))
            .with_context(|| format!("writing {path}"))
    }

    /// Names in a directory of the user's.
    ///
    /// # Errors
    /// Names the directory.
    pub fn users_dir(&self, path: &str) -> anyhow::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path).with_context(|| format!("reading {path}"))? {
            names.push(
                entry
                    .with_context(|| format!("reading {path}"))?
                    .file_name()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        names.sort();
        Ok(names)
    }

    /// sha256 of a file of the user's.
    ///
    /// # Errors
    /// Names the file.
    pub fn users_sha256(&self, path: &str) -> anyhow::Result<String> {
        let machine = Host { root: "/".into(), ..self.clone() };
        machine.sha256(path)?.with_context(|| format!("{path} is not there"))
    }

    /// Writes a file for the user, for example a saved plan: mode 0600, also where one of another mode was there.
    ///
    /// # Errors
    /// Names the file.
    pub fn write_for_user(&self, path: &str, text: &str) -> anyhow::Result<()> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let attempt = || -> std::io::Result<()> {
            // a link keeps its place; a pipe or a terminal is written to as it is
            let real = fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path));
            if fs::metadata(&real).is_ok_and(|m| !m.is_file()) {
                return OpenOptions::new().write(true).open(&real)?.write_all(text.as_bytes());
            }
            let name = real
                .file_name()
                .ok_or(std::io::ErrorKind::InvalidInput)?
                .to_string_lossy()
                .into_owned();
            let beside = real.with_file_name(format!(".{name}.{}.new", std::process::id()));
            let mut file =
                OpenOptions::new().create_new(true).write(true).mode(0o600).open(&beside)?;
            let written = file
                .write_all(text.as_bytes())
                .and_then(|()| file.sync_all())
                .and_then(|()| fs::rename(&beside, &real));
            written.inspect_err(|_| drop(fs::remove_file(&beside)))
        };
        attempt().with_context(|| format!("writing {path}"))
    }

    /// A path of the user's from the root on, so that it means the same in another directory.
    pub fn users_path(&self, path: &str) -> String {
        std::path::absolute(path).map_or_else(|_| path.to_owned(), |p| p.display().to_string())
    }
}
