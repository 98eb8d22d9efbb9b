//! `secret`: values that pods read by their keys. They come from standard input or files, never
//! from the command line, and are shown nowhere.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::apps::show;
use super::operation::{Request, options_of, tell};
use super::{Context, Session, cell, namespace_needed, printer, rollout};
use crate::base::error::{Exit, Failure};
use crate::base::json;
use crate::cli::{OutputArgs, ReachArgs, SecretArgs, SecretCommand};
use crate::client::applications::ClusterReader;
use crate::client::clusters::Cluster;
use crate::contract::config::{ConfigKind, ConfigSpec};
use crate::host::Host;
use crate::kubernetes::config_set::{ConfigSet, INVENTORY_LABEL, Inventory, SET_LABEL, listed};

/// # Errors
/// Exit 2 for values that cannot be sent; what the control plane or the cluster refuses; as the
/// operation ends.
pub(super) async fn secret(context: &Context, command: SecretCommand) -> anyhow::Result<Exit> {
    match command {
        SecretCommand::Set(args) => set(context, *args).await,
        SecretCommand::List { config, reach, output } => {
            list(context, kind_of(config), &reach, &output).await
        }
    }
}

fn kind_of(config: bool) -> ConfigKind {
    if config { ConfigKind::ConfigMap } else { ConfigKind::Secret }
}

async fn set(context: &Context, args: SecretArgs) -> anyhow::Result<Exit> {
    let (reach, kind) = (&args.operation.reach, kind_of(args.config));
    let session = Session::open(context, reach.cluster.context.as_deref())?;
    let namespace = match session.namespace(reach.namespace.as_deref())? {
        Some(namespace) => namespace.to_owned(),
        None => {
            let hint = "say -n NAMESPACE, or once for all: `pipeops contexts use CONTEXT -n …`";
            if args.rollout.is_given() {
                return Err(namespace_needed(hint).into());
            }
            session.only_namespace(reach.cluster.cluster.as_deref(), hint).await?
        }
    };
    let cluster = match args.rollout.is_given() {
        true => Cluster::default(),
        false => session.cluster(reach.cluster.cluster.as_deref()).await?,
    };
    let mut spec = json!({
        "action": "set", "namespace": namespace, "name": args.name, "remove": args.remove,
        "type": args.kind, "rollout": !args.no_rollout, "timeout_s": args.operation.timeout,
    });
    let values = values(context, &args).await?;
    let keys: Vec<String> = values.keys();
    (spec["data"], spec["binary"]) = (Value::Object(values.data), Value::Object(values.binary));
    let checked = json::fields::<ConfigSpec>(spec.clone());
    // the parser's own text may hold a value
    let checked = checked.map_err(|_| "these are no values of a set".to_owned());
    checked.and_then(|spec| spec.check(kind)).map_err(unsendable)?;
    let list = if args.config { "secret list --config" } else { "secret list" };
    let request = Request {
        cluster,
        title: format!("{namespace}/{}", args.name),
        kind: if args.config { "configmap" } else { "secret" },
        spec,
        timeout_s: args.operation.timeout,
        look: match args.rollout.is_given() {
            true => rollout::look(reach.cluster.context.as_deref()),
            false => format!("pipeops {list} -n {namespace}{}", options_of(&reach.cluster)),
        },
    };
    let follow = &args.operation.follow;
    if args.rollout.is_given() {
        return rollout::carry_out(&session, &request, None, (&args.rollout, follow)).await;
    }
    let mut printer = printer(context, &follow.output);
    match request.carry_out(&session, &mut printer, follow, tell).await? {
        None => Ok(Exit::Done),
        Some(operation) => {
            let set = keys.iter().map(|key| format!("{}: {key} set", request.title));
            let gone = args.remove.iter().map(|key| format!("{}: {key} removed", request.title));
            let summary: Vec<String> = set.chain(gone).collect();
            request.conclude(&printer, follow, &operation, &summary)
        }
    }
}

fn unsendable(why: String) -> Failure {
    Failure::usage("VALUES_INVALID", "the values cannot be set")
        .why(why)
        .hint("--key KEY reads standard input, --key KEY=FILE and --env-file FILE read a file")
}

/// Values by key, as an operation takes them.
#[derive(Default)]
struct Values {
    data: Map<String, Value>,
    /// Base64 of what is no text.
    binary: Map<String, Value>,
}

impl Values {
    fn keys(&self) -> Vec<String> {
        self.data.keys().chain(self.binary.keys()).cloned().collect()
    }

    /// # Errors
    /// A key that has a value already.
    fn put(&mut self, key: &str, value: Vec<u8>) -> Result<(), String> {
        if self.data.contains_key(key) || self.binary.contains_key(key) {
            return Err(format!("the key `{key}` is given twice"));
        }
        match String::from_utf8(value) {
            Ok(text) => self.data.insert(key.to_owned(), text.into()),
            Err(bytes) => {
                let bytes = STANDARD.encode(bytes.as_bytes());
                self.binary.insert(key.to_owned(), bytes.into())
            }
        };
        Ok(())
    }

    /// Lines `KEY=VALUE`, as `kubectl create secret --from-env-file` takes them: a value is what
    /// stands there, quotes included.
    ///
    /// # Errors
    /// The number of a line that is none; never its text.
    fn put_lines(&mut self, text: &[u8]) -> Result<(), String> {
        let text = std::str::from_utf8(text).map_err(|_| "it is no text")?;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let pair = line.split_once('=').filter(|(key, _)| !key.is_empty());
            let (key, value) = pair.ok_or(format!("line {} is not KEY=VALUE", number + 1))?;
            self.put(key, value.as_bytes().to_vec())?;
        }
        Ok(())
    }
}

/// Reads all values that were named.
async fn values(context: &Context, args: &SecretArgs) -> anyhow::Result<Values> {
    let mut values = Values::default();
    let keys = args.key.iter().map(|text| text.split_once('=').unwrap_or((text, "-")));
    let keys: Vec<(&str, &str)> = keys.collect();
    let env_files = args.env_file.iter().map(String::as_str);
    let files = keys.iter().map(|(_, file)| *file).chain(env_files);
    if files.filter(|file| *file == "-").count() > 1 {
        return Err(unsendable("standard input has one value, or one file".into()).into());
    }
    for (key, file) in keys {
        let mut value = read(context, file, &format!("the value of --key {key}")).await?;
        // the end of the line that `echo` writes is no part of a value
        if file == "-" && value.last() == Some(&b'\n') {
            value.pop();
        }
        values.put(key, value).map_err(unsendable)?;
    }
    for file in &args.env_file {
        let text = read(context, file, "the file of --env-file").await?;
        values.put_lines(&text).map_err(|why| unsendable(format!("--env-file {file}: {why}")))?;
    }
    Ok(values)
}

/// The bytes of a file, or of standard input. An error does not name the file: it may be a value
/// that was typed in its place.
async fn read(context: &Context, file: &str, what: &str) -> anyhow::Result<Vec<u8>> {
    let path = if file == "-" { "/dev/stdin".to_owned() } else { file.to_owned() };
    // a terminal or a pipe gives nothing for as long as it likes
    let read = tokio::task::spawn_blocking(move || Host::new("/", None).read_user_bytes(&path));
    context.unless_stopped(read).await?.map_err(|e| {
        Failure::usage("FILE_UNREADABLE", format!("cannot read {what}"))
            .why(e.root_cause().to_string())
            .hint("KEY=FILE names a file: a value has no place on a command line")
            .into()
    })
}

async fn list(
    context: &Context,
    kind: ConfigKind,
    reach: &ReachArgs,
    output: &OutputArgs,
) -> anyhow::Result<Exit> {
    let session = Session::open(context, reach.cluster.context.as_deref())?;
    let namespace = session.namespace(reach.namespace.as_deref())?.map(str::to_owned);
    let cluster = session.cluster(reach.cluster.cluster.as_deref()).await?;
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    let query = format!("labelSelector={INVENTORY_LABEL}={}&limit=500", listed(kind));
    let mut found = Vec::new();
    for place in session.places(&cluster, namespace).await? {
        let kept = ("configmaps", "ConfigMap");
        let sets = reader.list("/api/v1", place.as_deref(), kept, &query);
        found.extend(context.unless_stopped(sets).await?);
    }
    let items: Vec<Value> = found.iter().filter_map(|object| item(kind, object)).collect();
    let row = |item: &Value| {
        let keys: Vec<String> = item["keys"].as_array().into_iter().flatten().map(cell).collect();
        let last = item["versions"].as_array().and_then(|versions| versions.last());
        let last = |field: &str| cell(&last.map_or(Value::Null, |last| last[field].clone()));
        let place = ["namespace", "name"].map(|field| cell(&item[field]));
        [place.to_vec(), vec![keys.join(","), last("number"), last("created_at"), last("by")]]
            .concat()
    };
    let lines: Vec<Vec<String>> = items.iter().map(row).collect();
    let head = ["NAMESPACE", "NAME", "KEYS", "VERSION", "CHANGED", "BY"];
    show(&printer(context, output), &items, &head, &lines);
    Ok(Exit::Done)
}

/// A set as a list shows it; none for an inventory that is not one of ours.
fn item(kind: ConfigKind, object: &Value) -> Option<Value> {
    let metadata = &object["metadata"];
    let (namespace, name) =
        (metadata["namespace"].as_str()?, metadata["labels"][SET_LABEL].as_str()?);
    let inventory = Inventory::parse(ConfigSet { kind, namespace, name }, object).ok()?;
    let keys: Vec<&str> = inventory.keys().collect();
    Some(json!({
        "namespace": namespace, "name": name, "keys": keys, "versions": inventory.versions(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_taken_as_they_stand() {
        let mut values = Values::default();
        let text = b"# of the database\n\n  URL=postgres://a=b\r\nEMPTY=\nQUOTED=\"x\" \n";
        values.put_lines(text).unwrap();
        values.put("key", vec![0xff, 0]).unwrap();
        let wanted = json!({"URL": "postgres://a=b", "EMPTY": "", "QUOTED": "\"x\" "});
        assert_eq!(Value::Object(values.data.clone()), wanted);
        assert_eq!(Value::Object(values.binary.clone()), json!({"key": "/wA="}));
        for (text, said) in [
            (&b"A=1\nplanted-canary-4711-in-plain-text\n"[..], "line 2 is not KEY=VALUE"),
            (b"=planted-canary-4711-in-plain-text\n", "line 1 is not KEY=VALUE"),
            (b"URL=planted-canary-4711-in-plain-text\n", "`URL` is given twice"),
            (b"\xff", "it is no text"),
        ] {
            let why = values.put_lines(text).unwrap_err();
            assert!(why.contains(said) && !why.contains("canary-4711-in-plain-text"), "{why}");
        }
    }

    #[test]
    fn a_set_is_listed_without_a_value() {
        let inventory = json!({
            "keys": {"url": "db-0123456789"},
            "versions": [{"number": 3, "object": "db-0123456789", "keys": ["url"],
                "created_at": "t", "by": "user:eve"}],
        });
        let mut object = json!({
            "metadata": {"name": "db.secrets.pipeops.io", "namespace": "beta", "labels": {
                "app.kubernetes.io/managed-by": "pipeops", SET_LABEL: "db"}},
            "data": {"inventory": inventory.to_string()},
        });
        let shown = item(ConfigKind::Secret, &object).unwrap();
        assert_eq!((&shown["name"], &shown["keys"]), (&json!("db"), &json!(["url"])));
        assert_eq!(shown["versions"][0]["by"], "user:eve");
        object["metadata"]["labels"] = json!({SET_LABEL: "db"});
        assert_eq!(item(ConfigKind::Secret, &object), None);
    }
}
