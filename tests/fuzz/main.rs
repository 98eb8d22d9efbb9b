//! Fuzz targets for every parser that reads what others wrote, as seeded loops: mutations of a
//! small corpus, no crash.
//!
//! `scripts/fuzz SECONDS` gives each target that long; by default each runs for a blink, so that
//! they cannot rot.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "tests stand outside the doors"
)]

mod remote;

use std::time::{Duration, Instant};

use pipeops::base::cidr::Cidr;
use pipeops::install::facts::parse;
use pipeops::install::settings::{parse_duration, parse_file};
use pipeops::k3s::token::{Token, ca_hash};
use pipeops::k3s::version::{Version, digest_in_list, from_redirect};
use pipeops::k3s::{logs, user_input};

/// xorshift64*: the same seed gives the same run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end.max(1)).unwrap_or(1)).unwrap_or(0)
    }
}

const WORDS: &[&str] = &[
    "::",
    "K10",
    "\n",
    "\0",
    "é",
    "\u{202e}",
    "-----BEGIN CERTIFICATE-----",
    "[",
    "]",
    "https://",
    ":",
    "+k3s",
    "%2B",
    "18446744073709551616",
    "-1",
    "{",
    "\"",
    "\\040",
    "\\",
    " - ",
    "=",
    "/",
    "0A",
    "ffffffff",
];

fn mutate_bytes(random: &mut Random, seed: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        match random.below(6) {
            0 if at < bytes.len() => bytes[at] = u8::try_from(random.below(256)).unwrap_or(0),
            1 => bytes.truncate(at),
            2 => {
                let word = WORDS[random.below(WORDS.len())].as_bytes();
                bytes.splice(at..at, word.iter().copied());
            }
            3 if at < bytes.len() => {
                let to = at + random.below(bytes.len() - at);
                bytes.drain(at..to);
            }
            4 => {
                let copy: Vec<u8> = bytes[at..].iter().copied().take(64).collect();
                bytes.extend(copy);
            }
            _ => bytes.insert(at, u8::try_from(random.below(256)).unwrap_or(0)),
        }
    }
    bytes.truncate(1 << 16);
    bytes
}

pub(crate) fn run(name: &str, corpus: &[&str], target: impl Fn(&str)) {
    let corpus: Vec<&[u8]> = corpus.iter().map(|s| s.as_bytes()).collect();
    run_bytes(name, &corpus, |bytes| target(&String::from_utf8_lossy(bytes)));
}

pub(crate) fn run_bytes(name: &str, corpus: &[&[u8]], mut target: impl FnMut(&[u8])) {
    let time = std::env::var("PIPEOPS_FUZZ_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .map_or(Duration::from_millis(200), Duration::from_secs);
    let (mut random, begin, mut rounds) = (Random(0x9E37_79B9_7F4A_7C15), Instant::now(), 0u64);
    while begin.elapsed() < time {
        for seed in corpus {
            target(&mutate_bytes(&mut random, seed));
            rounds += 1;
        }
    }
    println!("{name}: {rounds} inputs in {:.1} s", begin.elapsed().as_secs_f32());
    assert!(rounds > 0);
}

#[test]
fn token() {
    let hash = "ab".repeat(32);
    let (full, boot) =
        (format!("K10{hash}::server:s3cret"), format!("K10{hash}::abcdef.0123456789abcdef"));
    run("token", &[&full, &boot, "password", "K10::node:x"], |text| {
        if let Ok(token) = Token::parse(text) {
            let _ = token.authorization();
        }
        let _ = ca_hash(text.as_bytes());
    });
}

#[test]
fn url() {
    run(
        "url",
        &["10.0.0.1", "https://[fd00::1]:6443/", "cp.example.com:443", "10.0.0.0/8", "fd00::/8"],
        |text| {
            if let Ok(url) = user_input::server_url(text) {
                assert!(url::Url::parse(&url).is_ok(), "{text:?} -> {url}");
                assert_eq!(user_input::server_url(&url).as_deref(), Ok(url.as_str()), "stable");
            }
            if let Some(cidr) = Cidr::parse(text) {
                assert!(cidr.overlaps(&cidr) && cidr.contains(cidr.address));
            }
        },
    );
}

#[test]
fn version() {
    run(
        "version",
        &[
            "v1.36.2+k3s1",
            "v1.28.0-rc1+k3s2",
            "https://github.com/k3s-io/k3s/releases/tag/v1.36.2+k3s1",
            "abc  k3s\n",
        ],
        |text| {
            if let Ok(version) = text.parse::<Version>() {
                assert_eq!(version.to_string().parse::<Version>().as_ref(), Ok(&version));
            }
            let _ = (from_redirect(text), digest_in_list(text, "k3s"), parse_duration(text));
        },
    );
}

#[test]
fn config() {
    let file = "tls-san = [\"a\"]\nnode-name = \"n\"\n[k3s]\nkubelet-arg = [\"x=y\"]\n";
    run("config", &[file, "ignore = [\"SWAP_ON\"]", "[k3s]\na = 1\nb = {c = 2}\n"], |text| {
        if let Ok(options) = parse_file(text, "f") {
            let _ = options.recorded();
        }
    });
}

#[test]
fn proc() {
    let corpus = [
        "  sl  local_address rem_address   st tx_queue\n   0: 0100007F:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1234 1\n",
        "1 0 0:1 / / rw - ext4 /dev/a rw\n3 2 0:3 / /var/lib/kubelet/a\\040b rw shared:1 - nfs4 h:/x rw\n",
        "MemTotal: 4000000 kB\nSwapTotal: 0 kB\nprocessor : 0\n",
        "ID=debian\nPRETTY_NAME=\"Debian\"\nnameserver 10.0.0.1\nsearch a b\n",
        "[{\"dst\":\"default\",\"dev\":\"eth0\",\"metric\":1,\"ifname\":\"eth0\",\"addr_info\":[{\"local\":\"10.0.0.1\",\"prefixlen\":24}]}]",
        "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t3\t1\t1\n",
        "br_netfilter 32768 0 - Live 0x0\nkernel/net/vxlan.ko.xz: a\niptables v1.8.9 (nf_tables)\nLoadState=loaded\n",
        "level=error msg=\"Node password rejected, duplicate hostname\"\n",
    ];
    run("proc", &corpus, |text| {
        let _ = (
            parse::os_release(text),
            parse::meminfo(text, "MemTotal"),
            parse::cpus(text),
            parse::sockets(text, "tcp"),
            parse::sockets(text, "udp"),
        );
        let _ = (
            parse::resolv_conf(text),
            parse::ip_routes(text, false),
            parse::ip_addresses(text),
            parse::module_names(text),
        );
        let _ = (
            parse::cgroups(None, text),
            parse::cgroups(Some(text), ""),
            parse::iptables(text),
            parse::version_numbers(text),
            pipeops::host::mountinfo::mounts_under(text, "/var"),
        );
        let _ = (
            pipeops::host::systemd::parse_properties(text),
            logs::classify(text),
            logs::notable_lines(text, 5),
        );
    });
}
