//! k3s versions, and the names that its release files carry.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// The version installed when neither `--k3s-version` nor `--channel` says otherwise: the stable
/// channel of June 2026.
pub const DEFAULT: &str = "v1.36.2+k3s1";
/// Oldest Kubernetes minor of the 1.x line that is supported without `--ignore K3S_TOO_OLD`.
pub const OLDEST_MINOR: u32 = 28;
/// Where k3s publishes its releases (k3s-io/k3s, install.sh, `INSTALL_K3S_ARTIFACT_URL`).
pub const RELEASES: &str = "https://github.com/k3s-io/k3s/releases/download";
/// Channel server: answers `/NAME` with a redirect whose last path element is the version
/// (install.sh, `get_release_version`).
pub const CHANNELS: &str = "https://update.k3s.io/v1-release/channels";

/// A k3s release such as `v1.36.2+k3s1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
    /// `-rc1` and the like, without the dash; empty for a release.
    pub pre: String,
    /// The number in `+k3sN`.
    pub k3s: u32,
}

impl FromStr for Version {
    type Err = String;

    /// Accepts `v1.36.2+k3s1`, with `-` or `%2B` for `+` as image tags and URLs have it, with or
    /// without `v`.
    fn from_str(text: &str) -> Result<Version, String> {
        let fault = || format!("`{text}` is not a k3s version such as {DEFAULT}");
        let body = text.trim().strip_prefix('v').unwrap_or(text.trim());
        let (core, suffix) = body
            .split_once("+k3s")
            .or_else(|| body.split_once("%2Bk3s"))
            .or_else(|| body.split_once("-k3s"))
            .ok_or_else(fault)?;
        let (numbers, pre) = core.split_once('-').unwrap_or((core, ""));
        let number = |part: Option<&str>| -> Result<u32, String> {
            let part = part
                .filter(|p| !p.is_empty() && p.len() <= 6 && p.bytes().all(|b| b.is_ascii_digit()))
                .ok_or_else(fault)?;
            part.parse().map_err(|_| fault())
        };
        let mut parts = numbers.split('.');
        let version = Version {
            major: number(parts.next())?,
            minor: number(parts.next())?,
            patch: number(parts.next())?,
            pre: pre.to_owned(),
            k3s: number(Some(suffix))?,
        };
        let pre_ok = pre.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.');
        if parts.next().is_some() || !pre_ok { Err(fault()) } else { Ok(version) }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}.{}.{}", self.major, self.minor, self.patch)?;
        if !self.pre.is_empty() {
            write!(f, "-{}", self.pre)?;
        }
        write!(f, "+k3s{}", self.k3s)
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Version {
    /// The version as it stands in a URL path, where `+` would mean a space to some servers.
    pub fn in_url(&self) -> String {
        self.to_string().replace('+', "%2B")
    }

    pub fn is_too_old(&self) -> bool {
        self.major == 1 && self.minor < OLDEST_MINOR
    }
}

/// The version in the target of a channel's redirect.
///
/// # Errors
/// When the answer is not a redirect to a release: a message that quotes what came instead.
pub fn from_redirect(location: &str) -> Result<Version, String> {
    let path = location.split(['?', '#']).next().unwrap_or_default();
    let last = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    last.parse()
        .map_err(|_| format!("the channel redirects to `{location}`, which names no release"))
}

/// Names of the release files for one machine architecture (k3s-io/k3s, install.sh
/// `setup_verify_arch`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// What `uname -m` says.
    pub machine: &'static str,
    pub binary: &'static str,
    pub checksums: &'static str,
    pub images: &'static str,
}

const ARCHES: &[Arch] = &[
    Arch {
        machine: "x86_64",
        binary: "k3s",
        checksums: "sha256sum-amd64.txt",
        images: "k3s-airgap-images-amd64",
    },
    Arch {
        machine: "aarch64",
        binary: "k3s-arm64",
        checksums: "sha256sum-arm64.txt",
        images: "k3s-airgap-images-arm64",
    },
    // the binary says armhf, the lists say arm
    Arch {
        machine: "armv7l",
        binary: "k3s-armhf",
        checksums: "sha256sum-arm.txt",
        images: "k3s-airgap-images-arm",
    },
];

/// The file names for this `uname -m`, `None` where k3s has no build.
pub fn arch(machine: &str) -> Option<Arch> {
    let machine =
        if machine.starts_with("armv7") || machine == "armhf" { "armv7l" } else { machine };
    ARCHES.iter().copied().find(|a| a.machine == machine)
}

/// The digest that a `sha256sum` list gives for `file`.
pub fn digest_in_list(list: &str, file: &str) -> Option<String> {
    list.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (digest, name) = (words.next()?, words.next()?);
        let name = name.trim_start_matches('*').trim_start_matches("./");
        (name == file && digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()))
            .then(|| digest.to_ascii_lowercase())
    })
}

/// The digest compiled in for this release file. The table is written by `scripts/release-digests`
/// when a release is made.
pub fn known_digest(version: &Version, file: &str) -> Option<&'static str> {
    let version = version.to_string();
    include_str!("digests.txt").lines().filter(|l| !l.starts_with('#')).find_map(|line| {
        let mut words = line.split_whitespace();
        let (v, digest, name) = (words.next()?, words.next()?, words.next()?);
        (v == version && name == file).then_some(digest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn versions_read_and_print() {
        for text in ["v1.36.2+k3s1", "v1.28.0-rc1+k3s2"] {
            assert_eq!(text.parse::<Version>().unwrap().to_string(), text);
        }
        assert_eq!("1.36.2-k3s1".parse::<Version>().unwrap().in_url(), "v1.36.2%2Bk3s1");
        for bad in [
            "",
            "stable",
            "v1.36",
            "v1.36.2",
            "v1.36.2+k3s",
            "v1.36.2.1+k3s1",
            "v1.+36.2+k3s1",
            "v1.36.2-é+k3s1",
        ] {
            assert!(bad.parse::<Version>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_channel_that_redirects_elsewhere_is_an_error() {
        let ok = from_redirect("https://github.com/k3s-io/k3s/releases/tag/v1.36.2+k3s1").unwrap();
        assert_eq!(ok.to_string(), DEFAULT);
        assert!(
            from_redirect("https://example.com/login").unwrap_err().contains("names no release")
        );
    }

    #[test]
    fn arm_is_armhf_in_the_program_and_arm_in_the_lists() {
        let arm = arch("armv7l").unwrap();
        assert_eq!((arm.binary, arm.checksums), ("k3s-armhf", "sha256sum-arm.txt"));
        assert!(arch("riscv64").is_none());
    }

    #[test]
    fn checksum_lists_are_matched_by_whole_name() {
        let list = format!("{} *k3s-arm64\n{}  k3s\n", "a".repeat(64), "B".repeat(64));
        assert_eq!(digest_in_list(&list, "k3s").unwrap(), "b".repeat(64));
        assert_eq!(digest_in_list("abc  k3s", "k3s"), None);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,40}") {
            if let Ok(version) = text.parse::<Version>() {
                prop_assert_eq!(version.to_string().parse::<Version>().unwrap(), version);
            }
            let _ = from_redirect(&text);
            let _ = digest_in_list(&text, "k3s");
        }
    }
}
