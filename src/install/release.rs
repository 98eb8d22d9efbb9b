//! Which k3s is installed, from where, and who vouches for it: resolved before anything is written.

use crate::base::error::{Exit, Failure};
use crate::host::fetch::{Artifact, ArtifactSource};
use crate::host::{Host, download};
use crate::install::engine::journal::Journal;
use crate::install::facts::Facts;
use crate::install::plan::Resource;
use crate::install::planner::Release;
use crate::install::settings::{Options, Settings};
use crate::k3s::paths::{BINARY, IMAGES_DIR};
use crate::k3s::version::{
    Arch, CHANNELS, DEFAULT, RELEASES, Version, arch, digest_in_list, known_digest,
};

/// What was found out, and what the user should know about it.
pub struct ResolvedRelease {
    pub release: Release,
    pub notes: Vec<String>,
}

/// Where releases come from. Debug builds let a test's web server play that place.
#[cfg_attr(
    debug_assertions,
    expect(clippy::disallowed_methods, reason = "a switch for tests, compiled out of releases")
)]
fn place(default: &str, variable: &str) -> String {
    #[cfg(debug_assertions)]
    if let Ok(url) = std::env::var(variable) {
        return url;
    }
    let _ = variable;
    default.to_owned()
}

/// The version only: cheap, for the checks that depend on it. `server` is the version of the server
/// that is joined.
pub async fn version(
    host: &Host,
    settings: &Settings,
    facts: &Facts,
    journal: Option<&Journal>,
    server: Option<&Version>,
) -> anyhow::Result<Version> {
    if let Some(version) = &settings.version {
        return Ok(version.clone());
    }
    if let Some(channel) = &settings.channel {
        return Ok(
            download::resolve_channel(&place(CHANNELS, "PIPEOPS_TEST_CHANNELS"), channel).await?
        );
    }
    if let Some(version) = server {
        return Ok(version.clone());
    }
    if let Some(version) = journal.and_then(|j| j.k3s_version.parse().ok()) {
        // a re-run that names no version keeps the one that is there
        return Ok(version);
    }
    match (&settings.options.offline_dir, arch(&facts.machine)) {
        (Some(dir), Some(arch)) => offline_version(host, dir, arch).await,
        _ => DEFAULT.parse().map_err(anyhow::Error::msg),
    }
}

fn incomplete(what: impl Into<String>) -> Failure {
    Failure::new(Exit::Verification, "OFFLINE_INCOMPLETE", what)
}

/// Asks the program in an offline directory, once its digest is right.
async fn offline_version(host: &Host, dir: &str, arch: Arch) -> anyhow::Result<Version> {
    let path = format!("{dir}/{}", arch.binary);
    offline_digest(host, dir, arch, arch.binary)?;
    let asked = Host::new("/", None)
        .output(&path, &["--version"], std::time::Duration::from_secs(20))
        .await;
    let unknown = |why: String| {
        Failure::usage("K3S_VERSION_UNKNOWN", format!("{path} does not tell its version"))
            .why(why)
            .hint("name it with --k3s-version")
    };
    let output = asked.map_err(|error| unknown(format!("{error:#}")))?;
    let version = output.stdout.split_whitespace().nth(2).unwrap_or_default().parse();
    version.map_err(|_| {
        let printed = format!("{}\n{}", output.stdout, output.stderr);
        let printed =
            printed.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("nothing");
        let status = output.status;
        unknown(format!("`{path} --version` ended with status {status} and said: {printed}")).into()
    })
}

/// Digest of a file in the directory, held against the directory's own list.
fn offline_digest(host: &Host, dir: &str, arch: Arch, file: &str) -> anyhow::Result<String> {
    let list = host.read_user_file(&format!("{dir}/{}", arch.checksums)).map_err(|_| {
        let failure = match Host::new("/", None).is_dir(dir) {
            true => incomplete(format!("{dir} has no {}", arch.checksums)),
            false => Failure::usage(
                "OFFLINE_DIR_MISSING",
                format!("--offline-dir: there is no directory {dir}"),
            ),
        };
        failure.hint(
            "copy the whole release into it: the program, the checksum list, the image archive",
        )
    })?;
    let expected = digest_in_list(&list, file).ok_or_else(|| {
        incomplete(format!("{dir}/{} does not list {file}", arch.checksums))
            .hint("take list and files from the same release")
    })?;
    let path = format!("{dir}/{file}");
    let have = host.user_file_sha256(&path).map_err(|_| {
        incomplete(format!("{dir} has no {file}")).hint("copy the whole release into it")
    })?;
    if have != expected {
        return Err(Failure::new(
            Exit::Verification,
            "DIGEST_MISMATCH",
            format!("{path} is not what its list says"),
        )
        .why(format!("listed {expected}"))
        .why(format!("is     {have}"))
        .hint("copy it again from the release")
        .into());
    }
    Ok(expected)
}

/// Files and digests for `version`.
pub async fn resolve(
    host: &Host,
    settings: &Settings,
    facts: &Facts,
    journal: Option<&Journal>,
    version: Version,
) -> anyhow::Result<ResolvedRelease> {
    let arch = arch(&facts.machine).ok_or_else(|| {
        Failure::new(
            Exit::Preflight,
            "ARCH_UNSUPPORTED",
            format!("k3s has no build for `{}`", facts.machine),
        )
    })?;
    let options = &settings.options;
    if let Some(release) = journal
        .filter(|j| {
            j.complete && j.k3s_version == version.to_string() && options.k3s_sha256.is_none()
        })
        .and_then(|j| recorded(j, &version))
    {
        return Ok(ResolvedRelease { release, notes: Vec::new() });
    }
    match &options.offline_dir {
        Some(dir) => offline(host, dir, options, arch, version).await,
        None => online(options, arch, version).await,
    }
}

fn binary(source: ArtifactSource, sha256: String, trust: &str) -> Artifact {
    Artifact { path: BINARY.into(), mode: 0o755, source, sha256, trust: trust.into() }
}

/// The digest of the k3s program that is known without asking anybody, and who vouches for it.
fn known(options: &Options, version: &Version, arch: Arch) -> Option<(String, &'static str)> {
    match (&options.k3s_sha256, known_digest(version, arch.binary)) {
        (Some(given), _) => Some((given.to_ascii_lowercase(), "--k3s-sha256")),
        (None, Some(known)) => Some((known.to_owned(), "the table in this program")),
        (None, None) => None,
    }
}

/// From a directory that the user has filled.
async fn offline(
    host: &Host,
    dir: &str,
    options: &Options,
    arch: Arch,
    version: Version,
) -> anyhow::Result<ResolvedRelease> {
    let own = offline_digest(host, dir, arch, arch.binary)?;
    if let Ok(inside) = offline_version(host, dir, arch).await
        && inside != version
    {
        return Err(Failure::new(
            Exit::Verification,
            "OFFLINE_VERSION",
            format!("{dir} holds k3s {inside}, not {version}"),
        )
        .hint("copy that version into it, or leave --k3s-version out")
        .into());
    }
    let mut notes = Vec::new();
    let (digest, trust) = known(options, &version, arch).unwrap_or_else(|| {
        notes.push(format!(
            "k3s {version} is checked against the list beside it only, the weaker check: it proves \
             an undamaged copy, not the origin"
        ));
        (own.clone(), "the list in the offline directory")
    });
    if digest != own {
        return Err(Failure::new(
            Exit::Verification,
            "DIGEST_MISMATCH",
            format!("{dir}/{} is not k3s {version}", arch.binary),
        )
        .why(format!("expected {digest} ({trust})"))
        .why(format!("is       {own}"))
        .hint("copy it again from the release, or name its version with --k3s-version")
        .into());
    }
    let images = vec![offline_images(host, dir, arch)?];
    let source = ArtifactSource::File(format!("{dir}/{}", arch.binary));
    let release = Release { binary: binary(source, digest, trust), images, version };
    Ok(ResolvedRelease { release, notes })
}

/// The archive of images in an offline directory.
fn offline_images(host: &Host, dir: &str, arch: Arch) -> anyhow::Result<Artifact> {
    let archives: Vec<String> =
        host.list_user_dir(dir)?.into_iter().filter(|n| n.starts_with(arch.images)).collect();
    let Some(archive) =
        ["zst", "gz", "tar"].iter().find_map(|end| archives.iter().find(|a| a.ends_with(end)))
    else {
        return Err(incomplete(format!("{dir} has no {}.tar.zst, .tar.gz or .tar", arch.images))
            .hint(
                "without the images no pod of the system can start; copy the archive of the same \
                 release",
            )
            .into());
    };
    Ok(Artifact {
        path: format!("{IMAGES_DIR}/{archive}"),
        mode: 0o644,
        source: ArtifactSource::File(format!("{dir}/{archive}")),
        sha256: offline_digest(host, dir, arch, archive)?,
        trust: "the list in the offline directory".into(),
    })
}

/// From the releases of k3s, or a mirror of them.
async fn online(
    options: &Options,
    arch: Arch,
    version: Version,
) -> anyhow::Result<ResolvedRelease> {
    let official = place(RELEASES, "PIPEOPS_TEST_RELEASES");
    // the login of a mirror is sent to it and stands in no plan
    let base =
        options.artifact_url.as_deref().map_or_else(|| official.clone(), download::without_login);
    let base = base.trim_end_matches('/');
    let source = ArtifactSource::Url(format!("{base}/{}/{}", version.in_url(), arch.binary));
    let mut notes = Vec::new();
    let (digest, trust) = match known(options, &version, arch) {
        Some(known) => known,
        None => {
            let digest = published_digest(&official, options, arch, &version).await?;
            notes.push(format!(
                "k3s {version} is not in this program's table; it is checked against the release's \
                 own list, the weaker check"
            ));
            (digest, "the release's own list")
        }
    };
    let release = Release { binary: binary(source, digest, trust), images: Vec::new(), version };
    Ok(ResolvedRelease { release, notes })
}

/// From the list that the release itself carries. A mirror's own list proves nothing about the
/// mirror, so only the official place is asked.
async fn published_digest(
    official: &str,
    options: &Options,
    arch: Arch,
    version: &Version,
) -> Result<String, Failure> {
    let list_url =
        format!("{}/{}/{}", official.trim_end_matches('/'), version.in_url(), arch.checksums);
    let list = match download::text(&list_url).await {
        Ok(list) => list,
        Err(failure) if options.artifact_url.is_some() => {
            return Err(Failure::new(
                Exit::Verification,
                "DIGEST_UNKNOWN",
                format!("only the mirror itself vouches for k3s {version}"),
            )
            .why(format!(
                "this pipeops does not know the version, and the release's own list cannot be \
                 read: {}",
                failure.what
            ))
            .hint("give the digest with --k3s-sha256, from a source that you trust"));
        }
        Err(failure) if failure.code == "NOT_FOUND" => {
            return Err(Failure::new(
                Exit::Network,
                "K3S_VERSION_UNKNOWN",
                format!("there is no k3s release {version}"),
            )
            .why(failure.what)
            .hint("see https://github.com/k3s-io/k3s/releases"));
        }
        Err(failure) => return Err(failure),
    };
    digest_in_list(&list, arch.binary).ok_or_else(|| {
        Failure::new(
            Exit::Verification,
            "DIGEST_UNKNOWN",
            format!("the release's list does not name {}", arch.binary),
        )
        .why(list_url)
        .hint("try again later, or give --k3s-sha256")
    })
}

/// The files of the installed version, as a journal that was closed has them: a re-run needs no
/// network.
fn recorded(journal: &Journal, version: &Version) -> Option<Release> {
    let fetches: Vec<Artifact> = journal
        .entries
        .iter()
        .filter_map(|e| match &e.want {
            Resource::Fetch(fetch) => Some(fetch.clone()),
            _ => None,
        })
        .collect();
    let binary = fetches.iter().find(|f| f.path == BINARY)?.clone();
    Some(Release {
        version: version.clone(),
        binary,
        images: fetches.into_iter().filter(|f| f.path != BINARY).collect(),
    })
}
