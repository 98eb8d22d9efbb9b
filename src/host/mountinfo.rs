//! `/proc/self/mountinfo`: which mount holds a path, and what is mounted below one (man
//! proc_pid_mountinfo).

use crate::base::order;

/// The mount that holds a path: `(where, type, options)` of the deepest one, the topmost of those
/// on the same place.
pub fn mount_of(mountinfo: &str, path: &str) -> Option<(String, String, Vec<String>)> {
    let mut best: Option<(String, String, Vec<String>)> = None;
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (mut left, mut right) = (left.split_whitespace().skip(4), right.split_whitespace());
        let (Some(at), Some(options), Some(kind)) =
            (left.next().map(unescape), left.next(), right.next())
        else {
            continue;
        };
        let inside = at == "/"
            || path == at
            || path.strip_prefix(&at).is_some_and(|rest| rest.starts_with('/'));
        if inside && best.as_ref().is_none_or(|(deepest, ..)| at.len() >= deepest.len()) {
            // options of the mount itself, then those of the file system
            let all = options
                .split(',')
                .chain(right.nth(1).unwrap_or_default().split(','))
                .map(str::to_owned)
                .collect();
            best = Some((at, kind.to_owned(), all));
        }
    }
    best
}

/// Mount points below or at `dir`, deepest first, from `/proc/self/mountinfo`, with the type of
/// each file system.
pub fn mounts_under(mountinfo: &str, dir: &str) -> Vec<(String, String)> {
    let below = format!("{}/", dir.trim_end_matches('/'));
    let mut found: Vec<(String, String)> = mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let path = unescape(left.split_whitespace().nth(4)?);
            let kind = right.split_whitespace().next()?.to_owned();
            (path == dir || path.starts_with(&below)).then_some((path, kind))
        })
        .collect();
    // the last line on a path is the topmost mount there; undo in reverse order of mounting
    found.reverse();
    order::sort(&mut found, |(a, _), (b, _)| b.len().cmp(&a.len()));
    found
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let mut out: Vec<u8> = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let code = (bytes[at] == b'\\')
            .then(|| {
                text.get(at + 1..at + 4).filter(|d| d.bytes().all(|b| (b'0'..=b'7').contains(&b)))
            })
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_deepest_and_topmost_mount_holds_a_path() {
        let text = "1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / /var rw,noexec - xfs /dev/b rw\n3 1 0:3 / /var ro - zfs p rw\n4 1 0:4 / /usr ro shared:1 - ext4 /dev/c rw\n";
        let of = |path| mount_of(text, path).map(|(at, kind, _)| (at, kind)).unwrap();
        assert_eq!(of("/var/lib/rancher"), ("/var".into(), "zfs".into()));
        assert_eq!(of("/variable"), ("/".into(), "ext4".into()));
        assert!(mount_of(text, "/usr/local/bin").unwrap().2.contains(&"ro".to_owned()));
    }

    #[test]
    fn mounts_come_deepest_first_and_unescaped() {
        let text = "1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / /var/lib/kubelet rw - tmpfs t rw\n\
                    3 2 0:3 / /var/lib/kubelet/a\\040b rw shared:1 - nfs4 h:/x rw\n4 1 0:4 / /var/lib/kubelet2 rw - tmpfs t rw\n";
        let found = mounts_under(text, "/var/lib/kubelet");
        assert_eq!(
            found,
            [
                ("/var/lib/kubelet/a b".to_owned(), "nfs4".to_owned()),
                ("/var/lib/kubelet".to_owned(), "tmpfs".to_owned())
            ]
        );
    }

    proptest! {
        #[test]
        fn no_mountinfo_panics(text in "(?s).{0,300}") {
            let _ = (mount_of(&text, "/var"), mounts_under(&text, "/var"));
        }
    }
}
