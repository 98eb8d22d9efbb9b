//! The subcommands of an administrator: calls of the control plane that runs on this machine.

use http::Method;
use serde_json::{Value, json};

use crate::base::error::{Exit, Failure};
use crate::base::text::printable;
use crate::cli::{
    AccessArgs, AdminCommand, ClusterCommand, DataDirArgs, OutputArgs, OutputFormat,
    ProjectCommand, RunnerCommand, TokenCommand, UserCommand,
};
use crate::cmd::Context;
use crate::control_plane::client;
use crate::host::Host;
use crate::output::{Printer, table};

struct AdminClient<'a> {
    context: &'a Context,
    host: Host,
    location: &'a DataDirArgs,
    output: OutputArgs,
}

impl AdminClient<'_> {
    fn new<'a>(
        context: &'a Context,
        location: &'a DataDirArgs,
        output: OutputArgs,
    ) -> AdminClient<'a> {
        AdminClient { context, host: context.host(&location.root), location, output }
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<String> {
        client::call(&self.host, &self.location.data_dir, method, path, body).await
    }

    fn printer(&self) -> Printer {
        Printer::new(self.output.output == OutputFormat::Json, false, self.context.no_color())
    }

    /// Prints the answer: as JSON where requested, else as `text` formats it.
    fn show(&self, answer: &str, text: impl FnOnce(&Value) -> String) -> anyhow::Result<Exit> {
        let value: Value = serde_json::from_str(answer)?;
        if self.output.output == OutputFormat::Json {
            self.printer().document_with_secrets(&value);
        } else {
            for line in text(&value).lines() {
                self.printer().data_with_secrets(line);
            }
        }
        Ok(Exit::Done)
    }

    async fn list(
        &self,
        path: &str,
        head: &[&str],
        row: fn(&Value) -> Vec<String>,
    ) -> anyhow::Result<Exit> {
        let answer = self.call(Method::GET, path, None).await?;
        self.show_list(&answer, head, row)
    }

    fn show_list(
        &self,
        answer: &str,
        head: &[&str],
        row: fn(&Value) -> Vec<String>,
    ) -> anyhow::Result<Exit> {
        self.show(answer, |value| {
            let rows: Vec<Vec<String>> =
                value["items"].as_array().into_iter().flatten().map(row).collect();
            if rows.is_empty() { "none yet".into() } else { table(head, &rows) }
        })
    }

    /// Creates what has a name only; prints one field of the answer.
    async fn create(&self, path: &str, name: &str, field: &str) -> anyhow::Result<Exit> {
        let answer = self.call(Method::POST, path, Some(&json!({"name": name}))).await?;
        self.show(&answer, |v| text(&v[field]))
    }

    async fn act(&self, method: Method, path: &str, message: &str) -> anyhow::Result<Exit> {
        let answer = self.call(method, path, None).await?;
        self.show(&answer, |_| message.to_owned())
    }
}

fn text(value: &Value) -> String {
    match value {
        // text of an agent cannot add lines
        Value::String(text) => printable(text).into_owned(),
        Value::Null => "-".into(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// A list that limits; without one there is no limit.
fn limit_text(value: &Value) -> String {
    if value.is_null() { "all".into() } else { text(value) }
}

fn time_text(value: &Value) -> String {
    value
        .as_i64()
        .and_then(|s| jiff::Timestamp::from_second(s).ok())
        .map_or_else(|| "-".into(), |t| t.to_string())
}

/// One segment of a path, encoded.
fn segment(text: &str) -> anyhow::Result<String> {
    if text.is_empty() || text.contains('/') {
        return Err(Failure::usage("BAD_NAME", format!("`{text}` is no name or id")).into());
    }
    Ok(encoded(text))
}

fn encoded(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>().replace('+', "%20")
}

pub(super) async fn token(
    context: &Context,
    location: &DataDirArgs,
    command: TokenCommand,
) -> anyhow::Result<Exit> {
    match command {
        TokenCommand::Create { project, name, ttl, uses, cluster_label, output } => {
            let client = AdminClient::new(context, location, output);
            let mut body = json!({"project": project, "name": name, "ttl_s": ttl, "uses": uses});
            // a control plane of a version before labels takes a request without them
            if !cluster_label.is_empty() {
                body["labels"] = label_changes(&cluster_label)?;
            }
            let answer = client.call(Method::POST, "/api/v1/tokens", Some(&body)).await?;
            client.show(&answer, |v| text(&v["install"]))
        }
        TokenCommand::List { output } => {
            AdminClient::new(context, location, output)
                .list(
                    "/api/v1/tokens",
                    &["ID", "NAME", "PROJECT", "USES LEFT", "EXPIRES", "REVOKED"],
                    |v| {
                        let fields = ["id", "name", "project", "uses_left"];
                        fields
                            .iter()
                            .map(|f| text(&v[f]))
                            .chain([time_text(&v["expires_at"]), text(&v["revoked"])])
                            .collect()
                    },
                )
                .await
        }
        TokenCommand::Revoke { id, output } => {
            AdminClient::new(context, location, output)
                .act(Method::DELETE, &format!("/api/v1/tokens/{}", segment(&id)?), "revoked")
                .await
        }
    }
}

pub(super) async fn cluster(
    context: &Context,
    location: &DataDirArgs,
    command: ClusterCommand,
) -> anyhow::Result<Exit> {
    let path =
        |cluster: &str| Ok::<_, anyhow::Error>(format!("/api/v1/clusters/{}", segment(cluster)?));
    match command {
        ClusterCommand::List { selector, output } => {
            let query = selector.map(|text| format!("?selector={}", encoded(&text)));
            let path = format!("/api/v1/clusters{}", query.unwrap_or_default());
            AdminClient::new(context, location, output).list(&path, CLUSTER_HEAD, cluster_row).await
        }
        ClusterCommand::Label { cluster, labels, output } => {
            let client = AdminClient::new(context, location, output);
            let body = json!({"labels": label_changes(&labels)?});
            let path = format!("{}/labels", path(&cluster)?);
            let answer = client.call(Method::PATCH, &path, Some(&body)).await?;
            client.show(&answer, |v| labels_text(&v["labels"]))
        }
        ClusterCommand::Show { cluster, output } => {
            let client = AdminClient::new(context, location, output);
            let answer = client.call(Method::GET, &path(&cluster)?, None).await?;
            client.show(&answer, cluster_details)
        }
        ClusterCommand::Kubeconfig { cluster, role, namespaces, write, output } => {
            let client = AdminClient::new(context, location, output);
            let body = json!({"role": role, "namespaces": namespaces});
            let path = format!("{}/kubeconfig", path(&cluster)?);
            let answer = client.call(Method::POST, &path, Some(&body)).await?;
            match write {
                Some(file) => {
                    client.host.write_user_file(&file, &answer)?;
                    client
                        .printer()
                        .say(&format!("{file} (mode 0600) opens the cluster for a day"));
                    Ok(Exit::Done)
                }
                None => client.show(&answer, |_| answer.clone()),
            }
        }
        ClusterCommand::Revoke { cluster, output } => {
            let path = format!("{}/revoke", path(&cluster)?);
            AdminClient::new(context, location, output)
                .act(Method::POST, &path, "revoked; its streams have ended")
                .await
        }
        ClusterCommand::Remove { cluster, output } => {
            AdminClient::new(context, location, output)
                .act(Method::DELETE, &path(&cluster)?, "removed")
                .await
        }
    }
}

/// Columns of clusters.
const CLUSTER_HEAD: &[&str] = &[
    "ID", "NAME", "STATE", "PROVIDER", "REGION", "VERSION", "NODES", "TUNNEL", "SEEN", "LABELS",
    "REASON",
];

fn cluster_row(row: &Value) -> Vec<String> {
    ["id", "name", "state", "provider", "region", "version", "nodes", "tunnel"]
        .iter()
        .map(|field| text(&row[field]))
        .chain([time_text(&row["seen_at"]), labels_text(&row["labels"]), text(&row["reason"])])
        .collect()
}

fn labels_text(labels: &Value) -> String {
    let labels = labels.as_object().into_iter().flatten();
    let labels: Vec<String> =
        labels.map(|(key, value)| format!("{}={}", printable(key), text(value))).collect();
    if labels.is_empty() { "-".into() } else { labels.join(",") }
}

/// `KEY=VALUE` sets a label, `KEY-` takes it away.
fn label_changes(list: &[String]) -> anyhow::Result<Value> {
    let mut changes = json!({});
    for text in list {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Value::from(value)),
            None => (text.trim_end_matches('-'), Value::Null),
        };
        if changes.get(key).is_some() {
            let what = format!("label `{key}` is there twice");
            return Err(Failure::usage("BAD_LABEL", what).hint("say it once").into());
        }
        changes[key] = value;
    }
    Ok(changes)
}

fn cluster_details(cluster: &Value) -> String {
    let fields = [
        "id",
        "name",
        "project",
        "state",
        "reason",
        "tunnel",
        "version",
        "provider",
        "region",
        "zone",
        "agent_id",
        "agent_version",
        "max_role",
    ];
    let mut lines: Vec<String> =
        fields.map(|field| format!("{field:<14}{}", text(&cluster[field]))).into();
    lines.push(format!("{:<14}{}", "labels", labels_text(&cluster["labels"])));
    lines.push(format!("{:<14}{}", "set here", text(&cluster["labels_set"])));
    lines.push(format!("{:<14}{}", "seen", time_text(&cluster["seen_at"])));
    lines.extend(report_lines(&cluster["report"]));
    for node in cluster["report"]["nodes"].as_array().into_iter().flatten() {
        let ready = if node["ready"] == true { "ready" } else { "not ready" };
        lines.push(format!(
            "node          {} {ready} {} {} {}",
            text(&node["name"]),
            text(&node["role"]),
            text(&node["version"]),
            text(&node["note"])
        ));
    }
    lines.join("\n")
}

/// What an agent saw of its cluster when it last reported; nothing when it has not yet.
fn report_lines(report: &Value) -> Vec<String> {
    if report.is_null() {
        return Vec::new();
    }
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let work = &report["workloads"];
    let counts = |part: &str, all: &str, word: &str| {
        format!("{} of {} {word}", number(&work[part]), number(&work[all]))
    };
    let mut kubernetes = text(&report["kubernetes"]);
    if let Some(reason) = report["reason"].as_str().filter(|reason| !reason.is_empty()) {
        kubernetes = format!("{kubernetes}: {}", printable(reason));
    }
    let mebibytes = |field: &str| number(&report["usage"][field]) >> 20;
    let memory = format!(
        "{} of {} MiB used",
        mebibytes("memory_used_bytes"),
        mebibytes("memory_total_bytes")
    );
    [
        ("reported", text(&report["at"])),
        ("kubernetes", kubernetes),
        ("pods", counts("pods_running", "pods", "running")),
        ("deployments", counts("deployments_ready", "deployments", "ready")),
        ("memory", memory),
    ]
    .map(|(name, value)| format!("{name:<14}{value}"))
    .into()
}

pub(super) async fn runner(
    context: &Context,
    location: &DataDirArgs,
    command: RunnerCommand,
) -> anyhow::Result<Exit> {
    match command {
        RunnerCommand::Create { name, access, jobs, output } => {
            let client = AdminClient::new(context, location, output);
            let mut body = access_request(&name, &access);
            // a control plane of a version before jobs takes a request without it
            if jobs {
                body["jobs"] = true.into();
            }
            let answer = client.call(Method::POST, "/api/v1/runners", Some(&body)).await?;
            // standard output has the token alone: scripts write it into a file
            client.show(&answer, |v| {
                let (id, name) = (text(&v["id"]), text(&v["name"]));
                client.printer().say(&format!("made Runner {id} {name}"));
                text(&v["token"])
            })
        }
        RunnerCommand::List { output } => {
            let client = AdminClient::new(context, location, output);
            client.list("/api/v1/runners", ACCESS_HEAD, access_row).await
        }
        RunnerCommand::Revoke { runner, output } => {
            let path = format!("/api/v1/runners/{}", segment(&runner)?);
            AdminClient::new(context, location, output)
                .act(Method::DELETE, &path, "revoked; its streams have ended")
                .await
        }
    }
}

fn access_request(name: &str, access: &AccessArgs) -> Value {
    let AccessArgs { project, role, clusters, selector, namespaces, tenant, ttl } = access;
    let mut request = json!({
        "name": name, "project": project, "role": role, "clusters": clusters,
        "namespaces": namespaces, "tenant": tenant, "ttl_s": ttl,
    });
    if let Some(selector) = selector {
        request["selector"] = selector.as_str().into();
    }
    request
}

/// Columns of all that has a token of the Runner side.
const ACCESS_HEAD: &[&str] = &[
    "ID",
    "NAME",
    "PROJECT",
    "KIND",
    "ROLE",
    "CLUSTERS",
    "TENANT",
    "NAMESPACES",
    "EXPIRES",
    "REVOKED",
];

fn access_row(row: &Value) -> Vec<String> {
    let kind = match () {
        () if row["person"] == true => "user".into(),
        () if row["jobs"] == true => "runner for jobs".into(),
        () => text(&row["kind"]),
    };
    let is_whole_tenant = row["tenant"].is_string() && row["namespaces"] == json!([]);
    ["id", "name", "project"]
        .iter()
        .map(|field| text(&row[field]))
        .chain([kind, text(&row["role"])])
        .chain([match row["selector"].as_str() {
            Some(selector) => printable(selector).into_owned(),
            None => limit_text(&row["clusters"]),
        }])
        .chain([limit_text(&row["tenant"])])
        .chain([if is_whole_tenant { "all".into() } else { limit_text(&row["namespaces"]) }])
        .chain([time_text(&row["expires_at"]), text(&row["revoked"])])
        .collect()
}

pub(super) async fn user(
    context: &Context,
    location: &DataDirArgs,
    command: UserCommand,
) -> anyhow::Result<Exit> {
    match command {
        UserCommand::Create { name, access, output } => {
            let client = AdminClient::new(context, location, output);
            let mut body = access_request(&name, &access);
            body["person"] = true.into();
            let answer = client.call(Method::POST, "/api/v1/runners", Some(&body)).await?;
            client.show(&answer, |v| {
                let name = text(&v["name"]);
                client.printer().say(&format!(
                    "made user {name}; both lines are for that person: the first asks for the \
                     second, which is the token"
                ));
                format!("{}\n{}", text(&v["login"]), text(&v["token"]))
            })
        }
        UserCommand::List { output } => {
            let client = AdminClient::new(context, location, output);
            let answer = client.call(Method::GET, "/api/v1/runners", None).await?;
            let mut answer: Value = serde_json::from_str(&answer)?;
            if let Some(items) = answer["items"].as_array_mut() {
                items.retain(|row| row["person"] == true);
            }
            client.show_list(&answer.to_string(), ACCESS_HEAD, access_row)
        }
        UserCommand::Revoke { name, output } => {
            let path = format!("/api/v1/runners/{}", segment(&format!("user:{name}"))?);
            AdminClient::new(context, location, output)
                .act(Method::DELETE, &path, "revoked; its streams have ended")
                .await
        }
    }
}

pub(super) async fn admin(
    context: &Context,
    location: &DataDirArgs,
    command: AdminCommand,
) -> anyhow::Result<Exit> {
    match command {
        AdminCommand::Create { name, output } => {
            AdminClient::new(context, location, output)
                .create("/api/v1/admins", &name, "token")
                .await
        }
        AdminCommand::List { output } => {
            AdminClient::new(context, location, output)
                .list("/api/v1/admins", &["ID", "NAME", "CREATED"], created_row)
                .await
        }
        AdminCommand::Revoke { id, output } => {
            let path = format!("/api/v1/admins/{}", segment(&id)?);
            AdminClient::new(context, location, output)
                .act(Method::DELETE, &path, "revoked; its sessions have ended")
                .await
        }
    }
}

pub(super) async fn project(
    context: &Context,
    location: &DataDirArgs,
    command: ProjectCommand,
) -> anyhow::Result<Exit> {
    match command {
        ProjectCommand::Create { name, output } => {
            AdminClient::new(context, location, output)
                .create("/api/v1/projects", &name, "id")
                .await
        }
        ProjectCommand::ResetSealingKey { project, output } => {
            let path = format!("/api/v1/projects/{}/sealing-key", segment(&project)?);
            AdminClient::new(context, location, output)
                .act(Method::DELETE, &path, "forgotten; the next Runner that starts tells its key")
                .await
        }
        ProjectCommand::List { output } => {
            AdminClient::new(context, location, output)
                .list("/api/v1/projects", &["ID", "NAME", "CREATED"], created_row)
                .await
        }
    }
}

fn created_row(value: &Value) -> Vec<String> {
    vec![text(&value["id"]), text(&value["name"]), time_text(&value["created_at"])]
}
