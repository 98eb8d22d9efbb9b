//! What each kind of resource means on a machine: its check, its doing, its undoing.

use std::time::Duration;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

use super::journal::{Before, Entry, Journal, back_up};
use super::work::{Secrets, Work};
use super::{account, objects, old_data, server_token, teardown, wait};
use crate::base::encoding::hex;
use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::host::paths::{AGENT_TOKEN, LOGS};
use crate::host::{Hands, Host, Owner, fetch};
use crate::install::plan::{Check, Content, Event, Ready, Resource, SecretName, Step};
use crate::install::settings::extra::filled;
use crate::k3s::paths::ADMIN_KUBECONFIG;
use crate::kubernetes::client::{Cluster, passing, status};

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
    content: &Content,
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
        Content::Text(text) => return Ok(Some(text.clone().into_bytes())),
        Content::Filled { text, from } => {
            let full = secrets.get(from).and_then(|fill| filled(text, fill));
            return Ok(Some(full.ok_or_else(|| missing(*from))?.into_bytes()));
        }
        Content::Secret(name) => name,
    };
    match (secrets.get(name), name) {
        (Some(secret), _) => Ok(Some(secret.expose().as_bytes().to_vec())),
        (None, SecretName::AgentToken) if !host.exists(path) => Ok(Some(Vec::new())),
        (None, _) if host.exists(path) => Ok(None),
        (None, name) => Err(missing(*name).into()),
    }
}

/// The login for a mirror, and for nothing else.
fn login<'a>(want: &crate::host::fetch::Fetch, secrets: &'a Secrets) -> Option<&'a Secret> {
    let (crate::host::fetch::Source::Url(url), login) =
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
    error.downcast_ref::<kube::Error>().is_some_and(|e| status(e).is_none_or(passing))
}

/// Looks, never writes.
pub(super) async fn check(
    host: &Host,
    journal: Option<&Journal>,
    secrets: &Secrets,
    step: &Step,
) -> anyhow::Result<Check> {
    let known = journal.and_then(|j| j.entry(&step.id));
    Ok(match &step.want {
        Resource::Dir { path, mode } => match host.mode(path) {
            None => Check::todo(format!("create {path}")),
            // a directory that was there before keeps its mode
            Some(have)
                if have != *mode
                    && known.is_some_and(|e| matches!(e.before, Before::Absent { .. })) =>
            {
                Check::todo(format!("set the mode of {path} to {mode:o}"))
            }
            Some(_) => Check::Done,
        },
        Resource::File { path, content: wanted, mode, .. } => {
            let Some(bytes) = content(path, wanted, secrets, host)? else { return Ok(Check::Done) };
            if *wanted == Content::Secret(SecretName::AgentToken) {
                let delivered = known.and_then(|e| e.digest.clone());
                let same = host.exists(path)
                    && delivered
                        == secrets
                            .get(&SecretName::AgentToken)
                            .map(secret_digest)
                            .or(delivered.clone());
                return Ok(if same && known.is_some() {
                    Check::Done
                } else {
                    Check::todo(format!("write {path}"))
                });
            }
            match host.read_bytes(path)? {
                None => Check::todo(format!("create {path}")),
                Some(have) if have != bytes => Check::todo(format!("change {path}")),
                Some(_) if host.mode(path) != Some(*mode) => {
                    Check::todo(format!("set the mode of {path} to {mode:o}"))
                }
                Some(_) => Check::Done,
            }
        }
        Resource::Program { path } => match host.sha256(path)? {
            Some(have) if have == own_digest(host)? => Check::Done,
            Some(_) => Check::todo(format!("replace {path}, keep the former one as {path}.old")),
            None => Check::todo(format!("create {path}")),
        },
        Resource::Fetch(want) => match host.sha256(&want.path)? {
            Some(have) if have == want.sha256 => Check::Done,
            Some(_) => Check::todo(format!("replace {}, verified by {}", want.path, want.trust)),
            None => Check::todo(format!("create {}, verified by {}", want.path, want.trust)),
        },
        Resource::Link { path, target } => {
            let name = path.rsplit('/').next().unwrap_or_default();
            if host.exists(path) || host.which(name).is_some() {
                Check::Done
            } else {
                Check::todo(format!("link {path} to {target}"))
            }
        }
        Resource::User { name } => account::check(host, name),
        Resource::Node { .. } => match known {
            Some(_) => Check::Done,
            None => Check::todo("let k3s fill its directories"),
        },
        Resource::OldData => match old_data::removable(host) {
            dirs if dirs.is_empty() => Check::Done,
            dirs => Check::Todo {
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
                Check::todo(format!("enable and start {name}"))
            } else if started != Some(&inputs_digest(host, journal, inputs)?) {
                let verb = if started.is_some() && unit.running() { "restart" } else { "start" };
                Check::todo(format!("{verb} {name}"))
            } else if !unit.enabled || !up {
                Check::todo(format!("enable and start {name}"))
            } else {
                Check::Done
            }
        }
        Resource::Firewall { path, table } => {
            let loaded = host
                .ask("nft", &["list", "table", "inet", table], QUICK)
                .await
                .is_ok_and(|o| o.ok());
            let same = journal.and_then(|j| j.units.get("firewall")) == host.sha256(path)?.as_ref();
            if loaded && same {
                Check::Done
            } else {
                Check::todo(format!("load the nftables table {table}"))
            }
        }
        Resource::Objects { yaml } => match cluster(host) {
            Ok(cluster) if cluster.ready().await => match objects::check(&cluster, yaml).await {
                // it was ready a moment ago, and is on its way up or down: looked at again when its turn comes
                Err(e) if away(&e) => Check::Later { until: "the API server answers".into() },
                checked => checked?,
            },
            _ => Check::Later { until: "the API server answers".into() },
        },
        Resource::Ready { what, .. } => {
            let mut open = Vec::new();
            for item in what {
                if let Some(why) = wait::missing(host, item).await {
                    open.push(format!("{}: {why}", item.title()));
                    break;
                }
            }
            if open.is_empty() { Check::Done } else { Check::Later { until: open.join("; ") } }
        }
        Resource::Kubeconfig { user, server } => {
            let path = kubeconfig_path(host, user)?;
            match host.read(ADMIN_KUBECONFIG)? {
                None => Check::Later { until: format!("{ADMIN_KUBECONFIG} is there") },
                Some(admin)
                    if host.read(&path)?.as_deref() == Some(for_user(&admin, server).as_str())
                        && host.mode(&path) == Some(0o600) =>
                {
                    Check::Done
                }
                Some(_) => Check::todo(format!("write {path}")),
            }
        }
    })
}

/// What there is now, in the form that undoing needs. Only called right before the first change of a step.
pub(super) async fn before(hands: &Hands, step: &Step) -> anyhow::Result<Before> {
    let file = |path: &str| -> anyhow::Result<Before> {
        let Some(bytes) = hands.read_bytes(path)? else {
            return Ok(Before::Absent { made: missing_parents(hands, path) });
        };
        let mode = hands.mode(path).unwrap_or(0o600);
        Ok(Before::File { backup: back_up(hands, &step.id, &bytes)?, mode })
    };
    Ok(match &step.want {
        Resource::File { path, .. } => file(path)?,
        Resource::Program { path } | Resource::Fetch(crate::host::fetch::Fetch { path, .. }) => {
            file(path)?
        }
        Resource::Kubeconfig { user, .. } => file(&kubeconfig_path(hands, user)?)?,
        Resource::Dir { path, .. } if hands.exists(path) => Before::Present,
        Resource::Dir { path, .. } => Before::Absent { made: missing_parents(hands, path) },
        Resource::Node { dirs, .. } => {
            Before::Absent { made: dirs.iter().filter(|d| !hands.exists(d)).cloned().collect() }
        }
        Resource::Unit { name, .. } => {
            let unit = hands.unit(name).await?;
            Before::Unit { enabled: unit.enabled, active: unit.running() }
        }
        Resource::User { name } => account::before(hands, name),
        Resource::Link { .. }
        | Resource::Firewall { .. }
        | Resource::Objects { .. }
        | Resource::Ready { .. }
        | Resource::OldData => Before::Absent { made: Vec::new() },
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
pub(super) struct Former {
    id: String,
    path: String,
    /// `None`: it was not there.
    bytes: Option<Vec<u8>>,
    mode: u32,
}

/// What a file step is about to replace; nothing for other steps.
pub(super) fn former(
    host: &Host,
    step: &Step,
    secrets: &Secrets,
) -> anyhow::Result<Option<Former>> {
    let Resource::File { path, mode, content: wanted, .. } = &step.want else { return Ok(None) };
    let settings = match wanted {
        Content::Text(_) | Content::Filled { .. } => true,
        Content::Secret(name) => {
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
    Ok(Some(Former {
        id: step.id.clone(),
        path: path.clone(),
        mode: host.mode(path).unwrap_or(*mode),
        bytes,
    }))
}

/// Former files back in place, the unit started with them, and the wait for what they made true.
pub(super) async fn put_back(
    work: &mut Work<'_>,
    journal: &mut Journal,
    former: &[Former],
    unit: &str,
    inputs: &[String],
    what: &[Ready],
    within: Duration,
) -> anyhow::Result<()> {
    let hands = work.hands;
    for file in former {
        match &file.bytes {
            Some(bytes) => {
                hands.write(&file.path, bytes, file.mode, Owner::default())?;
                journal.finish(&file.id, Some(digest(bytes)));
            }
            None => hands.remove(&file.path)?,
        }
    }
    hands.daemon_reload().await?;
    keep_server_token(work)?;
    // the wait that failed has stopped it, as a rule
    if hands.unit(unit).await?.main_pid == 0 {
        hands.start(unit).await?;
    } else {
        hands.restart(unit).await?;
    }
    journal.units.insert(unit.to_owned(), inputs_digest(hands, Some(&*journal), inputs)?);
    wait::until(hands, what, within, true, work.stop, &[], |_| {}).await
}

/// Makes it so. Gives the digest of what was written, for telling edits later.
pub(super) async fn apply(
    work: &mut Work<'_>,
    journal: &mut Journal,
    step: &Step,
) -> anyhow::Result<Option<String>> {
    let hands = work.hands;
    let make_parent = |path: &str| -> anyhow::Result<()> {
        let parent = path.rsplit_once('/').map_or("/", |(d, _)| d);
        hands.mkdir(if parent.is_empty() { "/" } else { parent }, 0o755).map(drop)
    };
    match &step.want {
        Resource::Dir { path, mode } => {
            if hands.mkdir(path, *mode)?.is_empty() {
                hands.chmod(path, *mode)?;
            }
            Ok(None)
        }
        Resource::File { path, content: wanted, mode, group } => {
            let Some(bytes) = content(path, wanted, work.secrets, hands)? else { return Ok(None) };
            make_parent(path)?;
            keep_aside(work, journal, step, path)?;
            hands.write(path, &bytes, *mode, Owner { user: None, group: group.as_deref() })?;
            Ok(Some(match wanted {
                Content::Secret(SecretName::AgentToken) => work
                    .secrets
                    .get(&SecretName::AgentToken)
                    .map_or_else(|| digest(b""), secret_digest),
                _ => digest(&bytes),
            }))
        }
        Resource::Program { path } => {
            make_parent(path)?;
            let own = std::path::PathBuf::from("/proc/self/exe");
            hands.copy(&own, path, 0o755, true)?;
            Ok(Some(own_digest(hands)?))
        }
        Resource::Fetch(want) => {
            make_parent(&want.path)?;
            keep_aside(work, journal, step, &want.path)?;
            let (id, tell, stop) = (step.id.clone(), &mut *work.tell, work.stop);
            let progress =
                |done, total| tell(Event::Progress { id: id.clone(), done, total, note: None });
            tokio::select! {
                result = fetch::fetch(hands, want, want.mode == 0o755, login(want, work.secrets), progress) => result?,
                // what has come stays, and the next run resumes there
                () = stop.cancelled() => return Err(Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted while downloading").into()),
            }
            Ok(Some(want.sha256.clone()))
        }
        Resource::Link { path, target } => {
            make_parent(path)?;
            hands.link(path, target)?;
            Ok(None)
        }
        Resource::User { name } => {
            account::make(hands, name).await?;
            Ok(None)
        }
        Resource::Node { .. } => {
            journal.kernel = teardown::kernel_state(hands).await;
            Ok(None)
        }
        Resource::OldData => {
            old_data::remove(hands)?;
            Ok(None)
        }
        Resource::Unit { name, inputs } => {
            hands.daemon_reload().await?;
            hands.enable(name).await?;
            let unit = hands.unit(name).await?;
            let inputs = inputs_digest(hands, Some(&*journal), inputs)?;
            keep_server_token(work)?;
            if journal.units.get(name) != Some(&inputs) && unit.running() {
                hands.restart(name).await?;
            } else if !unit.running() && unit.active != "activating"
                || unit.service_type == "oneshot"
            {
                hands.start(name).await?;
            }
            journal.units.insert(name.clone(), inputs);
            Ok(None)
        }
        Resource::Firewall { path, .. } => {
            hands.run("nft", &["-f", &hands.at(path).display().to_string()], QUICK).await?;
            if let Some(digest) = hands.sha256(path)? {
                journal.units.insert("firewall".into(), digest);
            }
            Ok(None)
        }
        Resource::Objects { yaml } => {
            objects::apply(&cluster(hands)?, yaml).await?;
            Ok(None)
        }
        Resource::Ready { what, within_s } => {
            let (id, tell) = (step.id.clone(), &mut *work.tell);
            let mut last = String::new();
            let progress = |note: String| {
                if note != last {
                    last.clone_from(&note);
                    tell(Event::Progress {
                        id: id.clone(),
                        done: 0,
                        total: None,
                        note: Some(note),
                    });
                }
            };
            let secrets: Vec<Secret> = work.secrets.values().cloned().collect();
            wait::until(
                hands,
                what,
                Duration::from_secs(*within_s),
                step.optional,
                work.stop,
                &secrets,
                progress,
            )
            .await?;
            keep_server_token(work)?;
            Ok(None)
        }
        Resource::Kubeconfig { user, server } => {
            let path = kubeconfig_path(hands, user)?;
            let admin = hands
                .read(ADMIN_KUBECONFIG)?
                .with_context(|| format!("{ADMIN_KUBECONFIG} is not there"))?;
            make_parent(&path)?;
            let owner = Owner { user: Some(user), group: None };
            if let Some((dir, _)) = path.rsplit_once('/') {
                hands.own(dir, owner)?;
            }
            let text = for_user(&admin, server);
            hands.write(&path, text.as_bytes(), 0o600, owner)?;
            Ok(Some(digest(text.as_bytes())))
        }
    }
}

fn keep_server_token(work: &mut Work<'_>) -> anyhow::Result<()> {
    if let Some(text) = server_token::keep(work.hands)? {
        (work.tell)(Event::Note { text });
    }
    Ok(())
}

/// Undoes one entry of the journal. `whole` says that the node itself goes, and its cluster objects with it.
pub(super) async fn undo(
    work: &mut Work<'_>,
    journal: &Journal,
    entry: &Entry,
    whole: bool,
    purge: bool,
) -> anyhow::Result<Vec<String>> {
    let hands = work.hands;
    match &entry.want {
        Resource::File { path, .. }
        | Resource::Program { path }
        | Resource::Fetch(crate::host::fetch::Fetch { path, .. }) => {
            let mine = matches!(
                &entry.want,
                Resource::File { content: Content::Secret(SecretName::AgentToken), .. }
            );
            if !mine && let Some(note) = aside(hands, path, entry.digest.as_deref())? {
                (work.tell)(Event::Note { text: note });
            }
            restore(hands, path, &entry.before)?;
            hands.remove(&format!("{path}.old"))?;
            fetch::clear_parts(hands, path)?;
        }
        Resource::Kubeconfig { user, .. } => {
            restore(hands, &kubeconfig_path(hands, user)?, &entry.before)?
        }
        Resource::Dir { path, .. } => {
            if let Before::Absent { made } = &entry.before {
                if !hands.remove_empty(path) {
                    return Ok(vec![format!(
                        "{path}: not empty, it holds files that pipeops did not write"
                    )]);
                }
                remove_made(hands, made);
            }
        }
        Resource::Link { path, target } => {
            if hands.link_target(path).as_ref() == Some(target) {
                hands.remove(path)?;
            }
        }
        Resource::User { name } => account::undo(hands, name, &entry.before).await?,
        Resource::Unit { name, .. } => {
            let Before::Unit { enabled, active } = entry.before else { return Ok(Vec::new()) };
            if !enabled && !active {
                hands.disable(name).await?;
            }
        }
        Resource::Firewall { table, .. } => {
            if hands
                .ask("nft", &["list", "table", "inet", table], QUICK)
                .await
                .is_ok_and(|o| o.ok())
            {
                hands.run("nft", &["delete", "table", "inet", table], QUICK).await?;
            }
        }
        Resource::Objects { yaml } if !whole => objects::remove(&cluster(hands)?, yaml).await?,
        Resource::Node { dirs, .. } => {
            let Before::Absent { made } = &entry.before else { return Ok(Vec::new()) };
            return teardown::node(work, journal, dirs, made, purge).await;
        }
        Resource::Objects { .. } | Resource::Ready { .. } | Resource::OldData => {}
    }
    Ok(Vec::new())
}

/// Parent directories that came with a file go when nothing else is in them.
fn remove_made(hands: &Hands, made: &[String]) {
    for dir in made.iter().rev() {
        hands.remove_empty(dir);
    }
}

/// Puts back what was there, or nothing.
fn restore(hands: &Hands, path: &str, before: &Before) -> anyhow::Result<()> {
    match before {
        Before::File { backup, mode } => {
            if let Some(bytes) = hands.read_bytes(backup)? {
                hands.write(path, &bytes, *mode, Owner::default())?;
            }
        }
        Before::Absent { made } => {
            hands.remove(path)?;
            remove_made(hands, made);
        }
        Before::Present | Before::Unit { .. } => {}
    }
    Ok(())
}

/// Before an owned file is overwritten: somebody's edit is kept.
fn keep_aside(
    work: &mut Work<'_>,
    journal: &Journal,
    step: &Step,
    path: &str,
) -> anyhow::Result<()> {
    let Some(written) = journal.entry(&step.id).and_then(|e| e.digest.clone()) else {
        return Ok(());
    };
    if let Some(note) = aside(work.hands, path, Some(&written))? {
        (work.tell)(Event::Note { text: note });
    }
    Ok(())
}

fn aside(hands: &Hands, path: &str, written: Option<&str>) -> anyhow::Result<Option<String>> {
    let (Some(written), Some(now)) = (written, hands.sha256(path)?) else { return Ok(None) };
    if now == written {
        return Ok(None);
    }
    let dir = format!("{LOGS}/kept");
    hands.mkdir(&dir, 0o700)?;
    let kept = format!("{dir}/{}.{}", path.trim_start_matches('/').replace('/', "_"), &now[..12]);
    hands.copy(&hands.at(path), &kept, 0o600, false)?;
    Ok(Some(format!(
        "CONFIG_DRIFT: {path} was edited by somebody else; that version is kept as {kept}"
    )))
}

/// Owned files that are not as we left them.
pub(super) fn drift(host: &Host, journal: &Journal) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in &journal.entries {
        let Resource::File { path, content, .. } = &entry.want else { continue };
        if *content == Content::Secret(SecretName::AgentToken) {
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
