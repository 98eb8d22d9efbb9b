//! What each kind of resource means on a machine: its check, its doing, its undoing.

use std::time::Duration;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

use super::context::{Secrets, StepContext};
use super::journal::{Journal, JournalEntry, PriorState, back_up};
use super::{account, objects, old_data, server_token, teardown, wait};
use crate::base::encoding::hex;
use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::host::paths::{AGENT_TOKEN, LOGS};
use crate::host::{Host, HostWriter, Owner, fetch};
use crate::install::plan::{
    FileContent, ProgressEvent, Resource, SecretName, Step, StepStatus, WaitCondition,
};
use crate::install::settings::k3s_table::fill_placeholders;
use crate::k3s::paths::ADMIN_KUBECONFIG;
use crate::kubernetes::client::{Cluster, is_transient, status};

const QUICK: Duration = Duration::from_secs(20);

pub(super) fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Key of the agent token in the journal's digests: the file itself is emptied once the agent is registered.
fn secret_digest(secret: &Secret) -> String {
    digest(secret.expose().as_bytes())
}

/// What a file shall hold; `None` means: whatever it holds already.
fn content(
    path: &str,
    content: &FileContent,
    secrets: &Secrets,
    host: &Host,
) -> anyhow::Result<Option<Vec<u8>>> {
    let missing = |name: SecretName| {
        Failure::usage(
            "PLAN_SECRET_MISSING",
            format!("what goes into {path} is a secret, and this run was not given it"),
        )
        .why("a plan names its secrets and holds none of them")
        .hint(format!("give it as when the plan was made: {}", name.comes_from()))
    };
    let name = match content {
        FileContent::Text(text) => return Ok(Some(text.clone().into_bytes())),
        FileContent::Filled { text, from } => {
            let full = secrets.get(from).and_then(|fill| fill_placeholders(text, fill));
            return Ok(Some(full.ok_or_else(|| missing(*from))?.into_bytes()));
        }
        FileContent::Secret(name) => name,
    };
    match (secrets.get(name), name) {
        (Some(secret), _) => Ok(Some(secret.expose().as_bytes().to_vec())),
        (None, SecretName::AgentToken) if !host.exists(path) => Ok(Some(Vec::new())),
        (None, _) if host.exists(path) => Ok(None),
        (None, name) => Err(missing(*name).into()),
    }
}

/// The login for a mirror, and for nothing else.
fn login<'a>(want: &crate::host::fetch::Artifact, secrets: &'a Secrets) -> Option<&'a Secret> {
    let (crate::host::fetch::ArtifactSource::Url(url), login) =
        (&want.source, secrets.get(&SecretName::ArtifactLogin)?)
    else {
        return None;
    };
    let base = fetch::without_login(login.expose());
    url.starts_with(&format!("{}/", base.trim_end_matches('/'))).then_some(login)
}

fn cluster(host: &Host) -> anyhow::Result<Cluster> {
    Cluster::open(host, ADMIN_KUBECONFIG)
}

/// Whether nobody was there to answer: no answer at all, or one of what stands in front.
fn away(error: &anyhow::Error) -> bool {
    error.downcast_ref::<kube::Error>().is_some_and(|e| status(e).is_none_or(is_transient))
}

/// Looks, never writes.
pub(super) async fn check(
    host: &Host,
    journal: Option<&Journal>,
    secrets: &Secrets,
    step: &Step,
) -> anyhow::Result<StepStatus> {
    let known = journal.and_then(|j| j.entry(&step.id));
    Ok(match &step.want {
        Resource::Dir { path, mode } => match host.mode(path) {
            None => StepStatus::todo(format!("create {path}")),
            // a directory that was there before keeps its mode
            Some(have)
                if have != *mode
                    && known.is_some_and(|e| matches!(e.before, PriorState::Absent { .. })) =>
            {
                StepStatus::todo(format!("set the mode of {path} to {mode:o}"))
            }
            Some(_) => StepStatus::Done,
        },
        Resource::File { path, content: wanted, mode, .. } => {
            let Some(bytes) = content(path, wanted, secrets, host)? else {
                return Ok(StepStatus::Done);
            };
            if *wanted == FileContent::Secret(SecretName::AgentToken) {
                let delivered = known.and_then(|e| e.digest.clone());
                let same = host.exists(path)
                    && delivered
                        == secrets
                            .get(&SecretName::AgentToken)
                            .map(secret_digest)
                            .or(delivered.clone());
                return Ok(if same && known.is_some() {
                    StepStatus::Done
                } else {
                    StepStatus::todo(format!("write {path}"))
                });
            }
            match host.read_bytes(path)? {
                None => StepStatus::todo(format!("create {path}")),
                Some(have) if have != bytes => StepStatus::todo(format!("change {path}")),
                Some(_) if host.mode(path) != Some(*mode) => {
                    StepStatus::todo(format!("set the mode of {path} to {mode:o}"))
                }
                Some(_) => StepStatus::Done,
            }
        }
        Resource::Program { path } => match host.sha256(path)? {
            Some(have) if have == own_digest(host)? => StepStatus::Done,
            Some(_) => {
                StepStatus::todo(format!("replace {path}, keep the former one as {path}.old"))
            }
            None => StepStatus::todo(format!("create {path}")),
        },
        Resource::Fetch(want) => match host.sha256(&want.path)? {
            Some(have) if have == want.sha256 => StepStatus::Done,
            Some(_) => {
                StepStatus::todo(format!("replace {}, verified by {}", want.path, want.trust))
            }
            None => StepStatus::todo(format!("create {}, verified by {}", want.path, want.trust)),
        },
        Resource::Link { path, target } => {
            let name = path.rsplit('/').next().unwrap_or_default();
            if host.exists(path) || host.which(name).is_some() {
                StepStatus::Done
            } else {
                StepStatus::todo(format!("link {path} to {target}"))
            }
        }
        Resource::User { name } => account::check(host, name),
        Resource::Node { .. } => match known {
            Some(_) => StepStatus::Done,
            None => StepStatus::todo("let k3s fill its directories"),
        },
        Resource::OldData => match old_data::removable(host) {
            dirs if dirs.is_empty() => StepStatus::Done,
            dirs => StepStatus::Todo {
                changes: dirs.iter().map(|d| format!("remove {d}, of a former k3s")).collect(),
            },
        },
        Resource::Unit { name, inputs } => {
            let unit = host.unit(name).await?;
            let started = journal.and_then(|j| j.units.get(name));
            let oneshot = unit.service_type == "oneshot";
            let up = unit.running()
                || unit.active == "activating"
                || oneshot && unit.result == "success";
            if !unit.loaded {
                StepStatus::todo(format!("enable and start {name}"))
            } else if started != Some(&inputs_digest(host, journal, inputs)?) {
                let verb = if started.is_some() && unit.running() { "restart" } else { "start" };
                StepStatus::todo(format!("{verb} {name}"))
            } else if !unit.enabled || !up {
                StepStatus::todo(format!("enable and start {name}"))
            } else {
                StepStatus::Done
            }
        }
        Resource::Firewall { path, table } => {
            let loaded = host
                .ask("nft", &["list", "table", "inet", table], QUICK)
                .await
                .is_ok_and(|o| o.ok());
            let same = journal.and_then(|j| j.units.get("firewall")) == host.sha256(path)?.as_ref();
            if loaded && same {
                StepStatus::Done
            } else {
                StepStatus::todo(format!("load the nftables table {table}"))
            }
        }
        Resource::Objects { yaml } => match cluster(host) {
            Ok(cluster) if cluster.ready().await => match objects::check(&cluster, yaml).await {
                // it was ready a moment ago, and is on its way up or down: looked at again when its turn comes
                Err(e) if away(&e) => StepStatus::Later { until: "the API server answers".into() },
                checked => checked?,
            },
            _ => StepStatus::Later { until: "the API server answers".into() },
        },
        Resource::Ready { what, .. } => {
            let mut open = Vec::new();
            for item in what {
                if let Some(why) = wait::unmet(host, item).await {
                    open.push(format!("{}: {why}", item.title()));
                    break;
                }
            }
            if open.is_empty() {
                StepStatus::Done
            } else {
                StepStatus::Later { until: open.join("; ") }
            }
        }
        Resource::Kubeconfig { user, server } => {
            let path = kubeconfig_path(host, user)?;
            match host.read(ADMIN_KUBECONFIG)? {
                None => StepStatus::Later { until: format!("{ADMIN_KUBECONFIG} is there") },
                Some(admin)
                    if host.read(&path)?.as_deref() == Some(for_user(&admin, server).as_str())
                        && host.mode(&path) == Some(0o600) =>
                {
                    StepStatus::Done
                }
                Some(_) => StepStatus::todo(format!("write {path}")),
            }
        }
    })
}

/// What there is now, in the form that undoing needs. Only called right before the first change of a step.
pub(super) async fn before(writer: &HostWriter, step: &Step) -> anyhow::Result<PriorState> {
    let file = |path: &str| -> anyhow::Result<PriorState> {
        let Some(bytes) = writer.read_bytes(path)? else {
            return Ok(PriorState::Absent { made: missing_parents(writer, path) });
        };
        let mode = writer.mode(path).unwrap_or(0o600);
        Ok(PriorState::File { backup: back_up(writer, &step.id, &bytes)?, mode })
    };
    Ok(match &step.want {
        Resource::File { path, .. } => file(path)?,
        Resource::Program { path } | Resource::Fetch(crate::host::fetch::Artifact { path, .. }) => {
            file(path)?
        }
        Resource::Kubeconfig { user, .. } => file(&kubeconfig_path(writer, user)?)?,
        Resource::Dir { path, .. } if writer.exists(path) => PriorState::Present,
        Resource::Dir { path, .. } => PriorState::Absent { made: missing_parents(writer, path) },
        Resource::Node { dirs, .. } => PriorState::Absent {
            made: dirs.iter().filter(|d| !writer.exists(d)).cloned().collect(),
        },
        Resource::Unit { name, .. } => {
            let unit = writer.unit(name).await?;
            PriorState::Unit { enabled: unit.enabled, active: unit.running() }
        }
        Resource::User { name } => account::before(writer, name),
        Resource::Link { .. }
        | Resource::Firewall { .. }
        | Resource::Objects { .. }
        | Resource::Ready { .. }
        | Resource::OldData => PriorState::Absent { made: Vec::new() },
    })
}

fn missing_parents(host: &Host, path: &str) -> Vec<String> {
    let mut made = Vec::new();
    let mut at = path;
    while let Some((parent, _)) = at.rsplit_once('/') {
        if parent.is_empty() || host.exists(parent) {
            break;
        }
        made.insert(0, parent.to_owned());
        at = parent;
    }
    made
}

/// A file as it was before this run changed it.
pub(super) struct PreviousFile {
    id: String,
    path: String,
    /// `None`: it was not there.
    bytes: Option<Vec<u8>>,
    mode: u32,
}

/// What a file step is about to replace; nothing for other steps.
pub(super) fn previous_file(
    host: &Host,
    step: &Step,
    secrets: &Secrets,
) -> anyhow::Result<Option<PreviousFile>> {
    let Resource::File { path, mode, content: wanted, .. } = &step.want else { return Ok(None) };
    let settings = match wanted {
        FileContent::Text(_) | FileContent::Filled { .. } => true,
        FileContent::Secret(name) => {
            matches!(name, SecretName::Registries | SecretName::ProxyEnvironment)
        }
    };
    if !settings {
        return Ok(None);
    }
    let (bytes, wanted) = (host.read_bytes(path)?, content(path, wanted, secrets, host)?);
    if wanted.is_none() || bytes == wanted {
        return Ok(None);
    }
    Ok(Some(PreviousFile {
        id: step.id.clone(),
        path: path.clone(),
        mode: host.mode(path).unwrap_or(*mode),
        bytes,
    }))
}

/// Former files back in place, the unit started with them, and the wait for what they made true.
pub(super) async fn restore_previous(
    context: &mut StepContext<'_>,
    journal: &mut Journal,
    previous: &[PreviousFile],
    unit: &str,
    inputs: &[String],
    what: &[WaitCondition],
    within: Duration,
) -> anyhow::Result<()> {
    let writer = context.writer;
    for file in previous {
        match &file.bytes {
            Some(bytes) => {
                writer.write(&file.path, bytes, file.mode, Owner::default())?;
                journal.finish(&file.id, Some(digest(bytes)));
            }
            None => writer.remove(&file.path)?,
        }
    }
    writer.daemon_reload().await?;
    keep_server_token(context)?;
    // the wait that failed has stopped it, as a rule
    if writer.unit(unit).await?.main_pid == 0 {
        writer.start(unit).await?;
    } else {
        writer.restart(unit).await?;
    }
    journal.units.insert(unit.to_owned(), inputs_digest(writer, Some(&*journal), inputs)?);
    wait::wait_until(writer, what, within, true, context.stop, &[], |_| {}).await
}

/// Makes it so. Gives the digest of what was written, for telling edits later.
pub(super) async fn apply(
    context: &mut StepContext<'_>,
    journal: &mut Journal,
    step: &Step,
) -> anyhow::Result<Option<String>> {
    let writer = context.writer;
    let make_parent = |path: &str| -> anyhow::Result<()> {
        let parent = path.rsplit_once('/').map_or("/", |(d, _)| d);
        writer.mkdir(if parent.is_empty() { "/" } else { parent }, 0o755).map(drop)
    };
    match &step.want {
        Resource::Dir { path, mode } => {
            if writer.mkdir(path, *mode)?.is_empty() {
                writer.chmod(path, *mode)?;
            }
            Ok(None)
        }
        Resource::File { path, content: wanted, mode, group } => {
            let Some(bytes) = content(path, wanted, context.secrets, writer)? else {
                return Ok(None);
            };
            make_parent(path)?;
            keep_aside(context, journal, step, path)?;
            writer.write(path, &bytes, *mode, Owner { user: None, group: group.as_deref() })?;
            Ok(Some(match wanted {
                FileContent::Secret(SecretName::AgentToken) => context
                    .secrets
                    .get(&SecretName::AgentToken)
                    .map_or_else(|| digest(b""), secret_digest),
                _ => digest(&bytes),
            }))
        }
        Resource::Program { path } => {
            make_parent(path)?;
            let own = std::path::PathBuf::from("/proc/self/exe");
            writer.copy(&own, path, 0o755, true)?;
            Ok(Some(own_digest(writer)?))
        }
        Resource::Fetch(want) => {
            make_parent(&want.path)?;
            keep_aside(context, journal, step, &want.path)?;
            let (id, on_event, stop) = (step.id.clone(), &mut *context.on_event, context.stop);
            let progress = |done, total| {
                on_event(ProgressEvent::Progress { id: id.clone(), done, total, note: None })
            };
            tokio::select! {
                result = fetch::fetch(writer, want, want.mode == 0o755, login(want, context.secrets), progress) => result?,
                // what has come stays, and the next run resumes there
                () = stop.cancelled() => return Err(Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted while downloading").into()),
            }
            Ok(Some(want.sha256.clone()))
        }
        Resource::Link { path, target } => {
            make_parent(path)?;
            writer.link(path, target)?;
            Ok(None)
        }
        Resource::User { name } => {
            account::make(writer, name).await?;
            Ok(None)
        }
        Resource::Node { .. } => {
            journal.kernel = teardown::kernel_state(writer).await;
            Ok(None)
        }
        Resource::OldData => {
            old_data::remove(writer)?;
            Ok(None)
        }
        Resource::Unit { name, inputs } => {
            writer.daemon_reload().await?;
            writer.enable(name).await?;
            let unit = writer.unit(name).await?;
            let inputs = inputs_digest(writer, Some(&*journal), inputs)?;
            keep_server_token(context)?;
            if journal.units.get(name) != Some(&inputs) && unit.running() {
                writer.restart(name).await?;
            } else if !unit.running() && unit.active != "activating"
                || unit.service_type == "oneshot"
            {
                writer.start(name).await?;
            }
            journal.units.insert(name.clone(), inputs);
            Ok(None)
        }
        Resource::Firewall { path, .. } => {
            writer.run("nft", &["-f", &writer.at(path).display().to_string()], QUICK).await?;
            if let Some(digest) = writer.sha256(path)? {
                journal.units.insert("firewall".into(), digest);
            }
            Ok(None)
        }
        Resource::Objects { yaml } => {
            objects::apply(&cluster(writer)?, yaml).await?;
            Ok(None)
        }
        Resource::Ready { what, within_s } => {
            let (id, on_event) = (step.id.clone(), &mut *context.on_event);
            let mut last = String::new();
            let progress = |note: String| {
                if note != last {
                    last.clone_from(&note);
                    on_event(ProgressEvent::Progress {
                        id: id.clone(),
                        done: 0,
                        total: None,
                        note: Some(note),
                    });
                }
            };
            let secrets: Vec<Secret> = context.secrets.values().cloned().collect();
            wait::wait_until(
                writer,
                what,
                Duration::from_secs(*within_s),
                step.optional,
                context.stop,
                &secrets,
                progress,
            )
            .await?;
            keep_server_token(context)?;
            Ok(None)
        }
        Resource::Kubeconfig { user, server } => {
            let path = kubeconfig_path(writer, user)?;
            let admin = writer
                .read(ADMIN_KUBECONFIG)?
                .with_context(|| format!("{ADMIN_KUBECONFIG} is not there"))?;
            make_parent(&path)?;
            let owner = Owner { user: Some(user), group: None };
            if let Some((dir, _)) = path.rsplit_once('/') {
                writer.own(dir, owner)?;
            }
            let text = for_user(&admin, server);
            writer.write(&path, text.as_bytes(), 0o600, owner)?;
            Ok(Some(digest(text.as_bytes())))
        }
    }
}

fn keep_server_token(context: &mut StepContext<'_>) -> anyhow::Result<()> {
    if let Some(text) = server_token::keep(context.writer)? {
        (context.on_event)(ProgressEvent::Note { text });
    }
    Ok(())
}

/// Undoes one entry of the journal. `whole` says that the node itself goes, and its cluster objects with it.
pub(super) async fn undo(
    context: &mut StepContext<'_>,
    journal: &Journal,
    entry: &JournalEntry,
    whole: bool,
    purge: bool,
) -> anyhow::Result<Vec<String>> {
    let writer = context.writer;
    match &entry.want {
        Resource::File { path, .. }
        | Resource::Program { path }
        | Resource::Fetch(crate::host::fetch::Artifact { path, .. }) => {
            let mine = matches!(
                &entry.want,
                Resource::File { content: FileContent::Secret(SecretName::AgentToken), .. }
            );
            if !mine && let Some(note) = aside(writer, path, entry.digest.as_deref())? {
                (context.on_event)(ProgressEvent::Note { text: note });
            }
            restore(writer, path, &entry.before)?;
            writer.remove(&format!("{path}.old"))?;
            fetch::clear_parts(writer, path)?;
        }
        Resource::Kubeconfig { user, .. } => {
            restore(writer, &kubeconfig_path(writer, user)?, &entry.before)?
        }
        Resource::Dir { path, .. } => {
            if let PriorState::Absent { made } = &entry.before {
                if !writer.remove_empty(path) {
                    return Ok(vec![format!(
                        "{path}: not empty, it holds files that pipeops did not write"
                    )]);
                }
                remove_made(writer, made);
            }
        }
        Resource::Link { path, target } => {
            if writer.link_target(path).as_ref() == Some(target) {
                writer.remove(path)?;
            }
        }
        Resource::User { name } => account::undo(writer, name, &entry.before).await?,
        Resource::Unit { name, .. } => {
            let PriorState::Unit { enabled, active } = entry.before else { return Ok(Vec::new()) };
            if !enabled && !active {
                writer.disable(name).await?;
            }
        }
        Resource::Firewall { table, .. } => {
            if writer
                .ask("nft", &["list", "table", "inet", table], QUICK)
                .await
                .is_ok_and(|o| o.ok())
            {
                writer.run("nft", &["delete", "table", "inet", table], QUICK).await?;
            }
        }
        Resource::Objects { yaml } if !whole => objects::remove(&cluster(writer)?, yaml).await?,
        Resource::Node { dirs, .. } => {
            let PriorState::Absent { made } = &entry.before else { return Ok(Vec::new()) };
            return teardown::node(context, journal, dirs, made, purge).await;
        }
        Resource::Objects { .. } | Resource::Ready { .. } | Resource::OldData => {}
    }
    Ok(Vec::new())
}

/// Parent directories that came with a file go when nothing else is in them.
fn remove_made(writer: &HostWriter, made: &[String]) {
    for dir in made.iter().rev() {
        writer.remove_empty(dir);
    }
}

/// Puts back what was there, or nothing.
fn restore(writer: &HostWriter, path: &str, before: &PriorState) -> anyhow::Result<()> {
    match before {
        PriorState::File { backup, mode } => {
            if let Some(bytes) = writer.read_bytes(backup)? {
                writer.write(path, &bytes, *mode, Owner::default())?;
            }
        }
        PriorState::Absent { made } => {
            writer.remove(path)?;
            remove_made(writer, made);
        }
        PriorState::Present | PriorState::Unit { .. } => {}
    }
    Ok(())
}

/// Before an owned file is overwritten: somebody's edit is kept.
fn keep_aside(
    context: &mut StepContext<'_>,
    journal: &Journal,
    step: &Step,
    path: &str,
) -> anyhow::Result<()> {
    let Some(written) = journal.entry(&step.id).and_then(|e| e.digest.clone()) else {
        return Ok(());
    };
    if let Some(note) = aside(context.writer, path, Some(&written))? {
        (context.on_event)(ProgressEvent::Note { text: note });
    }
    Ok(())
}

fn aside(writer: &HostWriter, path: &str, written: Option<&str>) -> anyhow::Result<Option<String>> {
    let (Some(written), Some(now)) = (written, writer.sha256(path)?) else { return Ok(None) };
    if now == written {
        return Ok(None);
    }
    let dir = format!("{LOGS}/kept");
    writer.mkdir(&dir, 0o700)?;
    let kept = format!("{dir}/{}.{}", path.trim_start_matches('/').replace('/', "_"), &now[..12]);
    writer.copy(&writer.at(path), &kept, 0o600, false)?;
    Ok(Some(format!(
        "CONFIG_DRIFT: {path} was edited by somebody else; that version is kept as {kept}"
    )))
}

/// Owned files that are not as we left them.
pub(super) fn drift(host: &Host, journal: &Journal) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in &journal.entries {
        let Resource::File { path, content, .. } = &entry.want else { continue };
        if *content == FileContent::Secret(SecretName::AgentToken) {
            continue;
        }
        if let (Some(written), Some(now)) = (&entry.digest, host.sha256(path)?)
            && now != *written
        {
            found.push(path.clone());
        }
    }
    Ok(found)
}

/// Digest over what a unit reads at start.
/// What a unit was started with. A token is emptied once it is used up: what was delivered counts, not what is left.
fn inputs_digest(
    host: &Host,
    journal: Option<&Journal>,
    inputs: &[String],
) -> anyhow::Result<String> {
    let mut all = Sha256::new();
    for path in inputs {
        all.update(path.as_bytes());
        let delivered = journal
            .filter(|_| path == AGENT_TOKEN)
            .and_then(|j| j.entry("agent-token")?.digest.clone());
        let now = if path == AGENT_TOKEN { delivered } else { host.sha256(path)? };
        all.update(now.unwrap_or_default().as_bytes());
    }
    Ok(hex(&all.finalize()))
}

fn own_digest(host: &Host) -> anyhow::Result<String> {
    host.users_sha256("/proc/self/exe")
}

fn kubeconfig_path(host: &Host, user: &str) -> anyhow::Result<String> {
    let home = host.home_of(user).ok_or_else(|| {
        Failure::usage("USER_UNKNOWN", format!("there is no local user `{user}`"))
            .hint("create it first, or leave --kubeconfig-for out")
    })?;
    Ok(format!("{}/.kube/pipeops.yaml", home.trim_end_matches('/')))
}

/// The admin kubeconfig with an address that works from elsewhere.
fn for_user(admin: &str, server: &str) -> String {
    // one that listens on another port or has no IPv4 says so there
    let port = server.rsplit_once(':').map_or("6443", |(_, port)| port);
    ["127.0.0.1", "[::1]"].iter().fold(admin.to_owned(), |text, host| {
        text.replace(&format!("https://{host}:{port}"), server)
    })
}
