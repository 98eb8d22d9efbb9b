//! Genuine frp, old and new: the generations that `scripts/parts` builds from Go modules, and every
//! directory with `frps`, `frpc` or both that `PIPEOPS_TEST_FRP_DIR` names or holds.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

/// One release of frp.
pub(crate) struct Release {
    dir: PathBuf,
    /// As it says itself.
    pub(crate) name: String,
    version: (u32, u32),
}

impl Release {
    /// Those that can be had, with that program, oldest first; whatever is missing is said under
    /// the name of the test.
    pub(crate) fn all(test: &str, program: &str) -> Vec<Release> {
        let mut all = Vec::new();
        for built in built() {
            match built {
                Ok(dir) => all.push(Release::of(dir, program)),
                Err(why) => println!("NOT RUN: {test}: {why}"),
            }
        }
        if let Some(dir) = std::env::var_os("PIPEOPS_TEST_FRP_DIR").map(PathBuf::from) {
            let below = std::fs::read_dir(&dir).unwrap().flatten().map(|e| e.path());
            let dirs: Vec<PathBuf> =
                below.chain([dir.clone()]).filter(|d| d.join(program).is_file()).collect();
            if dirs.is_empty() {
                println!(
                    "NOT RUN: {test}: PIPEOPS_TEST_FRP_DIR={} holds no {program}",
                    dir.display()
                );
            }
            all.extend(dirs.iter().map(|d| Release::of(d, program)));
        }
        all.sort_by_key(|release| release.version);
        all
    }

    fn of(dir: impl AsRef<Path>, program: &str) -> Release {
        let dir = dir.as_ref().to_owned();
        let said = Command::new(dir.join(program)).arg("-v").output().unwrap();
        let said = String::from_utf8_lossy(&said.stdout).trim().to_owned();
        let mut parts = said.split('.').map(|p| p.parse::<u32>().unwrap_or(0));
        let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        println!("{program} {said} in {}", dir.display());
        Release { dir, name: format!("{program} {said}"), version }
    }

    pub(crate) fn before(&self, minor: u32) -> bool {
        self.version < (0, minor)
    }

    /// Runs one half of it with settings in the form of today, which are translated for old ones.
    pub(crate) fn run(&self, program: &str, dir: &Path, settings: &str) -> Running {
        // from 0.52 on settings are TOML
        let (kind, text) =
            if self.before(52) { ("ini", ini(settings)) } else { ("toml", settings.to_owned()) };
        let (file, said) =
            (dir.join(format!("{program}.{kind}")), dir.join(format!("{program}.log")));
        std::fs::write(&file, text).unwrap();
        let log = std::fs::File::create(&said).unwrap();
        let mut command = Command::new(self.dir.join(program));
        command.arg("-c").arg(&file).stdout(log.try_clone().unwrap()).stderr(Stdio::from(log));
        Running { child: command.spawn().unwrap(), said }
    }
}

/// The directories of the generations, each built once into the cache, or why there is none.
fn built() -> &'static [Result<PathBuf, String>] {
    static BUILT: OnceLock<Vec<Result<PathBuf, String>>> = OnceLock::new();
    BUILT.get_or_init(|| {
        let here = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/parts/frp");
        let mut versions: Vec<_> = std::fs::read_dir(here)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        versions.sort();
        versions.iter().map(|version| build(version)).collect()
    })
}

fn build(version: &str) -> Result<PathBuf, String> {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/parts"));
    let mut parts = command
        .args(["frp", version])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // a build takes a minute, which is not silent
    let mut last = String::new();
    for line in BufReader::new(parts.stderr.take().unwrap()).lines().map_while(Result::ok) {
        let _ = writeln!(std::io::stderr(), "{line}");
        last = line;
    }
    let done = parts.wait_with_output().unwrap();
    match done.status.code() {
        Some(0) => Ok(PathBuf::from(String::from_utf8(done.stdout).unwrap().trim())),
        // something that it needs is not here
        Some(3) => Err(format!("frp {version}: {last}")),
        code => panic!("scripts/parts frp {version} ended with {code:?}: {last}"),
    }
}

/// Settings of today in the form that frp had before 0.52.
fn ini(settings: &str) -> String {
    let settings: toml::Table = settings.parse().unwrap();
    let mut text = "[common]\n".to_owned();
    lines("", &settings, &mut text);
    let sections = |key: &str| {
        settings
            .get(key)
            .and_then(toml::Value::as_array)
            .into_iter()
            .flatten()
            .map(|s| s.as_table().unwrap())
    };
    for (key, prefix, role) in
        [("proxies", "", ""), ("visitors", "", "role = visitor\n"), ("httpPlugins", "plugin.", "")]
    {
        for section in sections(key) {
            text.push_str(&format!("[{prefix}{}]\n{role}", section["name"].as_str().unwrap()));
            lines("", section, &mut text);
        }
    }
    text
}

fn lines(prefix: &str, table: &toml::Table, text: &mut String) {
    for (key, value) in table {
        let key = format!("{prefix}{key}");
        let value = match value {
            toml::Value::Table(inner) => {
                lines(&format!("{key}."), inner, text);
                continue;
            }
            toml::Value::Array(array) if array.iter().any(toml::Value::is_table) => continue,
            toml::Value::Array(array) => {
                array.iter().map(|v| v.as_str().unwrap()).collect::<Vec<_>>().join(",")
            }
            toml::Value::String(string) => string.clone(),
            other => other.to_string(),
        };
        match key.as_str() {
            "auth.method" | "name" => (),
            "auth.additionalScopes" => {
                for scope in value.split(',') {
                    text.push_str(&format!(
                        "authenticate_{} = true\n",
                        if scope == "HeartBeats" { "heartbeats" } else { "new_work_conns" }
                    ));
                }
            }
            key => text.push_str(&format!("{} = {value}\n", former(key))),
        }
    }
}

/// What a key was called.
fn former(key: &str) -> String {
    match key {
        "secretKey" => return "sk".into(),
        "transport.tls.force" => return "tls_only".into(),
        _ => (),
    }
    let key = key.strip_prefix("transport.").or(key.strip_prefix("auth.")).unwrap_or(key);
    // names of the user's own stay as they are
    if let Some(own) = key.strip_prefix("metadatas.") {
        return format!("meta_{own}");
    }
    let letters: Vec<char> = key.chars().collect();
    let mut name = String::new();
    for (at, &letter) in letters.iter().enumerate() {
        let upper = |at: usize| letters.get(at).is_some_and(char::is_ascii_uppercase);
        let lower = |at: usize| letters.get(at).is_some_and(char::is_ascii_lowercase);
        if at > 0 && upper(at) && (lower(at - 1) || upper(at - 1) && lower(at + 1)) {
            name.push('_');
        }
        name.push(if letter == '.' { '_' } else { letter.to_ascii_lowercase() });
    }
    name
}

#[test]
fn settings_of_today_are_translated_for_old_ones() {
    let today = "vhostHTTPPort = 1\nauth.token = \"t\"\nauth.additionalScopes = [\"HeartBeats\", \"NewWorkConns\"]\ntransport.tcpMux = true\n\
                 transport.tls.certFile = \"c\"\nmetadatas.\"aB\" = \"m\"\n\
                 [[proxies]]\nname = \"p\"\ntype = \"http\"\nlocalIP = \"127.0.0.1\"\nsecretKey = \"k\"\ncustomDomains = [\"a\", \"b\"]\n\
                 transport.useEncryption = true\n[[visitors]]\nname = \"v\"\nserverName = \"s\"\n[[httpPlugins]]\nname = \"w\"\nops = [\"Login\", \"Ping\"]\n";
    let mut former: Vec<String> = ini(today).lines().map(str::to_owned).collect();
    assert_eq!(former.remove(0), "[common]");
    former.sort();
    let mut expected = vec![
        "[p]",
        "[v]",
        "[plugin.w]",
        "authenticate_heartbeats = true",
        "authenticate_new_work_conns = true",
        "custom_domains = a,b",
        "local_ip = 127.0.0.1",
        "meta_aB = m",
        "ops = Login,Ping",
        "role = visitor",
        "server_name = s",
        "sk = k",
        "tcp_mux = true",
        "tls_cert_file = c",
        "token = t",
        "type = http",
        "use_encryption = true",
        "vhost_http_port = 1",
    ];
    expected.sort_unstable();
    assert_eq!(former, expected);
}

/// Ended with the test, and shown where it fails.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) said: PathBuf,
}

impl Running {
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("{}: {}", self.said.display(), self.log());
        }
    }
}
