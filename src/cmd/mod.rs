//! One function a command, over a shared beginning: host, config files, secrets.

pub mod audit;
pub mod control_plane;
pub mod explain;
pub mod info;
pub mod install;
mod installer;
pub mod join;
mod secrets;
pub mod uninstall;

use std::collections::BTreeMap;

use tokio_util::sync::CancellationToken;

use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::host::Host;
use crate::install::settings::{Options, parse_file};

/// What `main` hands to a command.
pub struct Context {
    /// The environment, without secrets.
    pub env: BTreeMap<String, String>,
    /// Join token from the command line or the environment.
    pub k3s_token: Option<Secret>,
    /// Enrolment token from the environment.
    pub agent_token: Option<Secret>,
    /// URLs of a control plane's database and message broker, from the command line or the
    /// environment.
    pub database_url: Option<Secret>,
    pub amqp_url: Option<Secret>,
    /// Cancelled by the first SIGINT or SIGTERM.
    pub stop: CancellationToken,
}

impl Context {
    pub(crate) fn host(&self, root: &str) -> Host {
        Host::new(root, self.env.get("PATH").map(Into::into))
    }

    /// The machine below `root`.
    ///
    /// # Errors
    /// Exit 2 when there is no such directory.
    pub(crate) fn existing_host(&self, root: &str) -> anyhow::Result<Host> {
        let host = self.host(root);
        if host.is_dir("/") {
            return Ok(host);
        }
        let what = format!("--root {root}: there is no such directory");
        Err(Failure::usage("ROOT_MISSING", what).into())
    }

    pub(crate) fn no_color(&self) -> bool {
        self.env.get("NO_COLOR").is_some_and(|v| !v.is_empty())
    }

    /// A token file of the user's; `-` is standard input.
    pub(crate) fn token_file(&self, host: &Host, path: &str) -> anyhow::Result<Secret> {
        let text = if path == "-" {
            host.read_user_file("/dev/stdin")?
        } else {
            host.read_user_file(path).map_err(|e| unreadable(path, &e))?
        };
        match text.trim() {
            "" => Err(Failure::usage("TOKEN_EMPTY", format!("there is no token in {path}"))
                .hint("put the token, and nothing else, into it")
                .into()),
            token => Ok(Secret::new(token)),
        }
    }
}

pub(crate) fn unreadable(path: &str, error: &anyhow::Error) -> Failure {
    Failure::usage("FILE_UNREADABLE", format!("cannot read {path}"))
        .why(format!("{:#}", error.root_cause()))
        .hint("check the path and who may read it")
}

/// Options of the files, lowest layer first, under those of the command line.
pub(crate) fn merged_options(
    host: &Host,
    flags: Options,
    config: Option<&str>,
) -> anyhow::Result<Options> {
    let mut files =
        vec!["/usr/lib/pipeops/config.toml".to_owned(), "/etc/pipeops/config.toml".into()];
    files.extend(
        host.list("/etc/pipeops/config.d")
            .into_iter()
            .filter(|n| n.ends_with(".toml"))
            .map(|n| format!("/etc/pipeops/config.d/{n}")),
    );
    let mut lower = Options::default();
    for path in &files {
        if let Some(text) = host.read(path)? {
            lower = parse_file(&text, path)?.layered_over(lower);
        }
    }
    if let Some(path) = config {
        let text = host.read_user_file(path).map_err(|e| unreadable(path, &e))?;
        lower = parse_file(&text, path)?.layered_over(lower);
    }
    Ok(flags.layered_over(lower))
}

/// The exit code of a failure; SIGTERM has another one than SIGINT.
pub fn exit_of(failure: &Failure, terminated: bool) -> Exit {
    match failure.exit {
        Exit::Interrupted if terminated => Exit::Terminated,
        exit => exit,
    }
}
