//! The program: hides secrets, parses, runs one command, prints what failed, ends with its exit
//! code.
#![expect(clippy::disallowed_methods, reason = "the environment is read here and nowhere else")]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io::{IsTerminal as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{CommandFactory as _, Parser as _};
use pipeops::agent::{self, config, credential};
use pipeops::base::error::{Exit, Failure};
use pipeops::base::json;
use pipeops::base::order;
use pipeops::base::secret::{Secret, mask_registered, register_secret};
use pipeops::base::task::boxed;
use pipeops::cli::{self, Cli, Command};
use pipeops::cmd::{self, Context};
use pipeops::{host, output};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Number of the descriptor that carries secrets over the re-execution.
const SECRETS_FD: &str = "PIPEOPS_SECRETS_FD";
/// Under which name the arguments are handed over.
const ARGUMENTS: &str = "ARGUMENTS";
/// Variables that hold secrets themselves.
const SECRET_VARIABLES: [&str; 4] =
    ["K3S_TOKEN", "AGENT_TOKEN", "PIPEOPS_DATABASE_URL", "PIPEOPS_AMQP_URL"];

fn main() -> ExitCode {
    let shown: Vec<String> = cli::expand_program_name(
        std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect(),
    );
    let handed = match received() {
        Ok(handed) => handed,
        Err(error) => {
            output::fatal(&Failure::from_error(&error), false);
            return ExitCode::from(Exit::Internal.number());
        }
    };
    // what was typed, where some of it had to go out of sight
    let typed = handed.as_ref().and_then(|h| json::read(h.get(ARGUMENTS)?).ok());
    let args: Vec<String> = typed.unwrap_or(shown);
    let parsed = Cli::try_parse_from(&args).unwrap_or_else(|e| refuse(&e));
    let events = match &parsed.command {
        Command::InstallServer(args) => args.run.events.is_some(),
        Command::JoinWorker(args) => args.run.events.is_some(),
        Command::Uninstall(args) => args.events.is_some(),
        _ => false,
    };
    let end = |failure: &Failure, terminated: bool| {
        output::fatal(failure, events);
        ExitCode::from(cmd::exit_of(failure, terminated).number())
    };
    let secrets = match handed.map_or_else(|| hide(&args, &parsed), Ok) {
        Ok(secrets) => secrets,
        Err(error) => return end(&Failure::from_error(&error), false),
    };
    secrets
        .iter()
        .filter(|(name, _)| *name != ARGUMENTS)
        .for_each(|(_, secret)| register_secret(secret));
    let _ = rustls::crypto::ring::default_provider().install_default();
    let level = format!("{:?}", parsed.log_level).to_lowercase();
    output::logging(&level, std::env::var_os("JOURNAL_STREAM").is_some());
    // one beside the main thread at least: it sees signals while a command is held up by a file
    let workers = match &parsed.command {
        Command::Run(_)
        | Command::Runner(cli::RunnerArgs { command: None, .. })
        | Command::ControlPlane(cli::ControlPlaneArgs { command: None, .. }) => 2,
        _ => 1,
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(e) => {
            return end(
                &Failure::new(Exit::Internal, "INTERNAL", format!("starting the runtime: {e}")),
                false,
            );
        }
    };
    let stop = CancellationToken::new();
    let terminated = Arc::new(AtomicBool::new(false));
    let result = runtime.block_on(async {
        watch_signals(stop.clone(), terminated.clone());
        run(parsed, secrets, stop, terminated.clone()).await
    });
    runtime.shutdown_background();
    let was = terminated.load(Ordering::Relaxed);
    match result {
        Ok(exit) => ExitCode::from(exit.number()),
        Err(error) => end(&Failure::from_error(&error), was),
    }
}

/// Help goes out as clap has it; an error quotes what was typed, which may be a secret in the wrong
/// place.
fn refuse(error: &clap::Error) -> Cli {
    let text = error.to_string();
    if !error.use_stderr() || mask_registered(&text) == text {
        error.exit();
    }
    output::note(&mask_registered(&text));
    #[expect(clippy::exit, reason = "as clap does it")]
    std::process::exit(i32::from(Exit::Usage.number()))
}

/// The first SIGINT or SIGTERM stops in order; the second ends the process at once: the journal
/// already knows.
fn watch_signals(stop: CancellationToken, terminated: Arc<AtomicBool>) {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    tokio::spawn(boxed(async move {
        for round in 0..2 {
            let number =
                tokio::select! { _ = interrupt.recv() => 130, _ = terminate.recv() => 143 };
            if round == 0 {
                terminated.store(number == 143, Ordering::Relaxed);
                stop.cancel();
            } else {
                #[expect(clippy::exit, reason = "the user has asked twice")]
                std::process::exit(number);
            }
        }
    }));
}

async fn run(
    parsed: Cli,
    secrets: BTreeMap<String, String>,
    stop: CancellationToken,
    terminated: Arc<AtomicBool>,
) -> anyhow::Result<Exit> {
    let token = |name: &str| {
        secrets.get(name).filter(|t| !t.trim().is_empty()).map(|t| Secret::new(t.trim()))
    };
    let env = std::env::vars_os()
        .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
        .collect();
    let context = Context {
        env,
        k3s_token: token("K3S_TOKEN"),
        agent_token: token("AGENT_TOKEN"),
        database_url: token("PIPEOPS_DATABASE_URL"),
        amqp_url: token("PIPEOPS_AMQP_URL"),
        stop,
        terminated,
    };
    match parsed.command {
        Command::InstallServer(args) => cmd::install::server(&context, args).await,
        Command::JoinWorker(args) => cmd::join::worker(&context, args).await,
        Command::ClusterInfo(args) => cmd::info::info(&context, args).await,
        Command::Uninstall(args) => cmd::uninstall::uninstall(&context, args).await,
        Command::Run(args) => {
            let host = host::Host::new(&args.root.root, context.env.get("PATH").map(Into::into));
            let may_be_agent = !std::io::stdin().is_terminal()
                || config::is_set_up(&host, &args.config, &context.env)
                || context.agent_token.is_some();
            cmd::client::check_run_is_meant(&args.words, may_be_agent)?;
            let config = config::AgentConfig::load(&host, &args.config, &context.env)?;
            let given = context
                .env
                .get("CREDENTIALS_DIRECTORY")
                .and_then(|dir| host.read_user_file(&format!("{dir}/agent-token")).ok());
            let given = given
                .map(|t| Secret::new(t.trim()))
                .filter(|t| !t.is_empty())
                .or(context.agent_token);
            given.as_ref().map_or(Ok(()), config::check_token)?;
            let state = context
                .env
                .get("STATE_DIRECTORY")
                .map_or(config::STATE_DIR, |d| d.split(':').next().unwrap_or(config::STATE_DIR))
                .to_owned();
            let kubeconfig = args.kubeconfig.map(|path| host.typed_path(&path));
            agent::run::run(host, config, kubeconfig, given, &state, context.stop).await?;
            Ok(Exit::Done)
        }
        Command::ControlPlane(args) => cmd::control_plane::control_plane(&context, args).await,
        Command::Runner(args) => cmd::runner::runner(&context, args).await,
        Command::Client(command) => cmd::client::client(&context, command).await,
        Command::Audit(args) => cmd::audit::audit(&context, &args),
        Command::Explain(args) => cmd::explain::explain(&context, &args),
        Command::MintCredential(args) => {
            let host = host::Host::new(&args.root, context.env.get("PATH").map(Into::into));
            credential::mint(&host, &context.stop).await?;
            Ok(Exit::Done)
        }
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pipeops", &mut text);
            output::raw(&text);
            Ok(Exit::Done)
        }
        Command::Man => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut text)?;
            output::raw(&text);
            Ok(Exit::Done)
        }
    }
}

/// Takes secrets out of sight. One that came as argument or in the environment stands in
/// `/proc/PID/` for everybody or for root's tools to read: it moves to a sealed memory file, and
/// the program executes itself again without it.
fn hide(args: &[String], parsed: &Cli) -> anyhow::Result<BTreeMap<String, String>> {
    let variables = SECRET_VARIABLES.iter();
    let mut secrets = order::map(
        variables.filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?))),
    );
    let mut shown = args.to_vec();
    // the command stands in the arguments by now, whatever the program's name was
    if let Some(name) = shown.first_mut() {
        "pipeops".clone_into(name);
    }
    let given: Vec<(&str, Option<&String>)> = match &parsed.command {
        Command::JoinWorker(join) => vec![("K3S_TOKEN", join.token.as_ref().filter(|t| *t != "-"))],
        Command::ControlPlane(args) => {
            vec![
                ("PIPEOPS_DATABASE_URL", args.serve.options.database_url.as_ref()),
                ("PIPEOPS_AMQP_URL", args.serve.options.amqp_url.as_ref()),
            ]
        }
        _ => Vec::new(),
    };
    for (name, secret) in given.into_iter().filter_map(|(name, secret)| Some((name, secret?))) {
        secrets.insert(name.into(), secret.clone());
        for arg in shown.iter_mut().skip(1).filter(|a| a.ends_with(secret.as_str())) {
            // `--flag=SECRET` or the secret alone
            let flag = arg.len() - secret.len();
            if flag == 0 || arg[..flag].ends_with('=') {
                arg.replace_range(flag.., "-");
            }
        }
    }
    // a login in a URL, a token in another place than its own: the arguments themselves are handed
    // over
    let typed = shown.clone();
    shown.iter_mut().skip(1).for_each(|arg| *arg = mask_registered(arg));
    if shown != typed {
        secrets.insert(ARGUMENTS.into(), serde_json::to_string(&typed)?);
    }
    if secrets.is_empty() {
        return Ok(secrets);
    }
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let fd: OwnedFd = memfd_create(c"pipeops-secrets", MFdFlags::MFD_ALLOW_SEALING)?;
    #[expect(clippy::disallowed_types, reason = "a file in memory is no file of the machine")]
    let mut file = std::fs::File::from(fd);
    file.write_all(serde_json::to_string(&secrets)?.as_bytes())?;
    file.rewind()?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
    let env: Vec<CString> = std::env::vars_os()
        .filter(|(key, _)| !SECRET_VARIABLES.iter().any(|s| key == s))
        .map(|(key, value)| format!("{}={}", key.to_string_lossy(), value.to_string_lossy()))
        .chain([format!("{SECRETS_FD}={}", file.as_raw_fd())])
        .filter_map(|pair| CString::new(pair).ok())
        .collect();
    let argv: Vec<CString> = shown.into_iter().filter_map(|a| CString::new(a).ok()).collect();
    nix::unistd::execve(c"/proc/self/exe", &argv, &env)?;
    Ok(secrets)
}

/// Reads what the former self left, and closes it: no child inherits it. `None` when there is no
/// former self.
fn received() -> anyhow::Result<Option<BTreeMap<String, String>>> {
    let Some(fd) = std::env::var(SECRETS_FD).ok().and_then(|n| n.parse::<i32>().ok()) else {
        return Ok(None);
    };
    let path = format!("/proc/self/fd/{fd}");
    let ours = std::fs::read_link(&path)
        .is_ok_and(|target| target.to_string_lossy().contains("memfd:pipeops-secrets"));
    anyhow::ensure!(ours, "{SECRETS_FD} names a descriptor that is not ours");
    let text = std::fs::read_to_string(&path)?;
    nix::unistd::close(fd)?;
    Ok(Some(json::read(&text)?))
}
