//! Files of a release, downloaded or copied: each ends verified under its name, or not at all.
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "part of the door to the machine"
)]

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{HostWriter, download};
use crate::base::encoding::hex;
use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;

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
    let real = writer.real_path(&part);
    let result = match &want.source {
        ArtifactSource::File(from) => copy(from, &real, &mut progress),
        ArtifactSource::Url(url) => download::file(url, login, &real, &mut progress).await,
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
    writer.move_into_place(&real, &want.path, want.mode, keep)
}

/// Removes half downloads of `path`, whatever version they were of.
pub fn remove_partial_downloads(writer: &HostWriter, path: &str) -> anyhow::Result<()> {
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
