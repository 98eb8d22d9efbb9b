//! The secrets of a run: where they come from, what keeps them out of output, and which files let
//! every user read them.

use std::collections::BTreeMap;

use super::Context;
use crate::base::error::Failure;
use crate::base::json;
use crate::base::order;
use crate::base::secret::{MASK, Secret, is_secret_name, mask, register_secret, secrets_in_urls};
use crate::base::text::unquoted_json_error;
use crate::base::yaml::{self, EqualKeys};
use crate::cli::InstallerArgs;
use crate::host::user_files::unreadable;
use crate::host::{Host, HostWriter};
use crate::install::engine::Secrets;
use crate::install::facts::{Facts, ReadableSecret};
use crate::install::plan::{CheckedPlan, SCHEMA, SecretName};
use crate::install::planner::config;
use crate::install::settings::k3s_table::K3sTable;
use crate::install::settings::{Options, Settings, parse_file};
use crate::k3s::paths::REGISTRIES;
use crate::k3s::registries;

/// Settings of k3s that are not ours, and its main file.
const SETTINGS: &str = "/etc/rancher/k3s";
/// Config files of this program that hold no secret of its own.
const CONFIG: &str = "/etc/pipeops";

/// Reads a saved plan.
///
/// # Errors
/// Exit 2 when it is none.
pub(super) fn saved_plan(host: &Host, path: &str) -> anyhow::Result<CheckedPlan> {
    let text = host.read_user_file(path).map_err(|e| unreadable(path, &e))?;
    let bad = |why: String| {
        Failure::usage("PLAN_INVALID", format!("{path} is not a plan of this pipeops"))
            .why(why)
            .hint("make a new one with --plan-out")
    };
    // the parser quotes what it does not expect, and that may be anything
    let then: CheckedPlan = json::read(&text).map_err(|e| bad(unquoted_json_error(&e)))?;
    if then.plan.schema != SCHEMA {
        return Err(
            bad(format!("its format is {}, this one knows {SCHEMA}", then.plan.schema)).into()
        );
    }
    Ok(then)
}

/// Whether a plan holds secrets in plain text, as the first pipeops wrote it.
pub(super) fn holds_plain_secrets(then: &CheckedPlan) -> bool {
    then.plan.options.contains_key("k3s") && !held(&then.plan.options).is_empty()
}

/// Secret settings that a plan or journal of the first pipeops has among its options.
fn held(options: &BTreeMap<String, String>) -> Vec<String> {
    let table =
        options.get("k3s").and_then(|text| json::read::<K3sTable>(text).ok()).unwrap_or_default();
    names(table.secret_keys(), "[k3s] ")
}

fn names(keys: Vec<(String, serde_json::Value)>, of: &str) -> Vec<String> {
    keys.into_iter().map(|(key, shown)| format!("{of}{key} = {shown}")).collect()
}

/// The options that name a file of secrets, as a saved plan has them, where this run does not say.
pub(super) fn adopt_paths(options: &mut Options, saved: Option<&CheckedPlan>) {
    let Some(plan) = saved.map(|s| &s.plan) else { return };
    let inputs = &plan.inputs;
    // one name: the one that is reserved, checked, installed and shown
    if let Some(name) = plan.options.get("node-name") {
        options.node_name = Some(name.clone());
    }
    options.registries = options.registries.take().or_else(|| inputs.get("registries").cloned());
    options.agent_token_file =
        options.agent_token_file.take().or_else(|| inputs.get("agent-token-file").cloned());
}

/// The files that secrets of this run come from, for the plan.
pub(super) fn input_files(
    host: &Host,
    run: &InstallerArgs,
    options: &Options,
) -> BTreeMap<String, String> {
    let files = [
        ("config", &run.config),
        ("registries", &options.registries),
        ("agent-token-file", &options.agent_token_file),
    ];
    order::map(files.into_iter().filter_map(|(key, path)| {
        let path = path.as_ref().filter(|p| *p != "-")?;
        Some((key.to_owned(), host.absolute_user_path(path)))
    }))
}

/// Registers every secret in the options before anything is printed about them.
pub(super) fn register(options: &Options, env: &BTreeMap<String, String>) {
    options.k3s.secret_words().iter().for_each(|word| register_secret(word));
    let urls = [&options.artifact_url, &options.control_plane_url]
        .into_iter()
        .flatten()
        .chain(env.values().filter(|v| v.contains("://")));
    urls.flat_map(|text| secrets_in_urls(text)).for_each(|word| register_secret(&word));
}

/// The contents of the files that hold secrets, each under its name.
pub(super) async fn load(
    context: &Context,
    host: &Host,
    settings: &Settings,
    facts: &Facts,
) -> anyhow::Result<Secrets> {
    let mut secrets = Secrets::new();
    let options = &settings.options;
    let agent = match &options.agent_token_file {
        Some(path) => Some(context.token_file(host, path).await?),
        None => context.agent_token.clone(),
    };
    if let Some(token) = agent {
        register_secret(token.expose());
        secrets.insert(SecretName::AgentToken, token);
    }
    if !facts.proxy.is_empty() {
        secrets.insert(
            SecretName::ProxyEnvironment,
            Secret::new(config::proxy_environment(facts, settings)),
        );
    }
    if let Some(fill) = options.k3s.secret_values() {
        secrets.insert(SecretName::K3sSettings, fill);
    }
    if let Some(url) = options.artifact_url.as_ref().filter(|url| !secrets_in_urls(url).is_empty())
    {
        secrets.insert(SecretName::ArtifactLogin, Secret::new(url.as_str()));
    }
    if let Some(path) = &options.registries {
        let text = host.read_user_file(path).map_err(|e| unreadable(path, &e))?;
        let parsed = registries::validate(&text, &|file| host.exists(file)).map_err(|faults| {
            let mut failure = Failure::usage(
                "REGISTRIES_INVALID",
                format!("{path} is not a registries.yaml that k3s can use"),
            );
            failure.why = faults;
            failure.hint("see https://docs.k3s.io/installation/private-registry")
        })?;
        logins("", &parsed).iter().for_each(|(_, secret)| register_secret(secret));
        secrets.insert(SecretName::Registries, Secret::new(text));
    }
    Ok(secrets)
}

/// Finds files with secrets that every user may read, and restricts those that pipeops owns.
pub(super) fn find_readable(
    host: &Host,
    writer: Option<&HostWriter>,
    run: &InstallerArgs,
    options: &Options,
    secrets: &Secrets,
) -> anyhow::Result<Vec<ReadableSecret>> {
    let mut readable = Vec::new();
    let named: Vec<&str> =
        [&run.apply_plan, &run.plan_out].into_iter().flatten().map(String::as_str).collect();
    for plan in host.plans_readable_by_others(&named) {
        let holds = json::read::<CheckedPlan>(&plan.text)
            .map(|c| held(&c.plan.options))
            .unwrap_or_default();
        if let Some(writer) = writer {
            writer.make_private(&plan.path)?;
        }
        if !holds.is_empty() {
            let path = plan.path.display().to_string();
            readable.push(ReadableSecret {
                path,
                mode: plan.mode,
                holds,
                made_private: writer.is_some(),
            });
        }
    }
    for (path, holds) in machine_files(host) {
        let Some(mode) =
            host.mode(&path).filter(|_| !holds.is_empty() && shown_to_all(host, &path))
        else {
            continue;
        };
        let writer = writer.filter(|_| path.starts_with(CONFIG));
        if let Some(writer) = writer {
            writer.chmod(&path, 0o600)?;
        }
        readable.push(ReadableSecret { path, mode, holds, made_private: writer.is_some() });
    }
    // the user's own files, which may be anywhere
    let outside = Host::new("/", None);
    let mut files = Vec::new();
    if let Some(path) = &run.config {
        files.push((path, in_config(&host.read_user_file(path).unwrap_or_default())));
    }
    if let (Some(path), Some(text)) = (&options.registries, secrets.get(&SecretName::Registries)) {
        files.push((path, in_registries(text.expose())));
    }
    if let Some(path) = options.agent_token_file.as_ref().filter(|p| *p != "-") {
        files.push((path, vec!["the enrolment token".into()]));
    }
    for (path, holds) in files {
        let path = host.absolute_user_path(path);
        let passing = ["/dev/", "/proc/"].iter().any(|p| path.starts_with(p));
        if let Some(mode) = outside
            .mode(&path)
            .filter(|_| !holds.is_empty() && !passing && shown_to_all(&outside, &path))
        {
            readable.push(ReadableSecret { path, mode, holds, made_private: false });
        }
    }
    Ok(readable)
}

/// Files of the machine that may hold secrets of k3s, with those that they hold.
fn machine_files(host: &Host) -> Vec<(String, Vec<String>)> {
    let below = |dir: &str, end: &str| -> Vec<String> {
        host.list(dir)
            .into_iter()
            .filter(|n| n.ends_with(end))
            .map(|n| format!("{dir}/{n}"))
            .collect()
    };
    let mut own_files = vec![format!("{CONFIG}/config.toml")];
    own_files.extend(below(&format!("{CONFIG}/config.d"), ".toml"));
    let mut k3s_files = vec![format!("{SETTINGS}/config.yaml")];
    k3s_files.extend(
        [".yaml", ".yml"].iter().flat_map(|end| below(&format!("{SETTINGS}/config.yaml.d"), end)),
    );
    let in_settings = |path: &str| {
        let Ok(serde_json::Value::Object(map)) = yaml::parse(&host.text(path), EqualKeys::Refused)
        else {
            return Vec::new();
        };
        names(map.into_iter().collect::<K3sTable>().known_secret_keys(), "")
    };
    let own_files = own_files.into_iter().map(|p| (in_config(&host.text(&p)), p));
    let k3s_files = k3s_files.into_iter().map(|p| (in_settings(&p), p));
    let registries =
        std::iter::once((in_registries(&host.text(REGISTRIES)), REGISTRIES.to_owned()));
    own_files.chain(k3s_files).chain(registries).map(|(holds, path)| (path, holds)).collect()
}

/// Whether everybody may read the file and enter its directories.
fn shown_to_all(host: &Host, path: &str) -> bool {
    let mut dirs =
        std::path::Path::new(path).ancestors().skip(1).filter_map(std::path::Path::to_str);
    host.mode(path).is_some_and(|mode| mode & 0o004 != 0)
        && dirs.all(|dir| host.mode(dir).is_none_or(|mode| mode & 0o001 != 0))
}

fn in_config(text: &str) -> Vec<String> {
    let Ok(options) = parse_file(text, "") else { return Vec::new() };
    let login = options
        .artifact_url
        .filter(|url| !secrets_in_urls(url).is_empty())
        .map(|url| format!("artifact-url = {}", mask(&url, &[])));
    names(options.k3s.known_secret_keys(), "[k3s] ").into_iter().chain(login).collect()
}

fn in_registries(text: &str) -> Vec<String> {
    let parsed = yaml::parse(text, EqualKeys::Refused).unwrap_or_default();
    logins("", &parsed).into_iter().map(|(name, _)| format!("{name} = {MASK}")).collect()
}

/// Passwords and tokens anywhere in a registries.yaml, with the names under which they stand.
fn logins(name: &str, value: &serde_json::Value) -> Vec<(String, String)> {
    match value {
        serde_json::Value::Object(map) => map
            .iter()
            .flat_map(|(key, inner)| match inner {
                serde_json::Value::String(text)
                    if (is_secret_name(key) || key == "auth") && !text.is_empty() =>
                {
                    vec![(format!("{name}{key}"), text.clone())]
                }
                inner => logins(&format!("{name}{key}."), inner),
            })
            .collect(),
        serde_json::Value::Array(items) => {
            items.iter().flat_map(|item| logins(name, item)).collect()
        }
        serde_json::Value::String(text) => secrets_in_urls(text)
            .into_iter()
            .map(|secret| (name.trim_end_matches('.').to_owned(), secret))
            .collect(),
        _ => Vec::new(),
    }
}
