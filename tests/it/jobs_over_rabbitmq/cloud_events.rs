//! Every message that goes over the broker is a CloudEvent to others, and is what the AsyncAPI
//! document says of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lapin::types::AMQPValue;
use serde_json::{Map, Value, json};

use super::{Message, Order, Site, collect};
use crate::control_plane::ControlPlane;

/// Reads each message with CloudEvents' own package, and prints what it is.
const READER: &str = r#"
import base64, json, sys
from cloudevents.core.bindings.amqp import AMQPMessage, from_amqp_event
for line in sys.stdin:
    m = json.loads(line)
    properties = {"content-type": m["content_type"]}
    event = from_amqp_event(AMQPMessage(properties, m["headers"], base64.b64decode(m["body"])))
    assert isinstance(event.get_data(), dict), event.get_data()
    shown = {"id": event.get_id(), "type": event.get_type(), "source": event.get_source()}
    print(json.dumps(shown | {"time": event.get_time().isoformat()}))
"#;

/// Where CloudEvents' own package for Python is, and pika, a client of RabbitMQ; fetched once.
///
/// # Errors
/// Why they can't be had.
pub(super) fn packages() -> Result<PathBuf, String> {
    let home = std::env::var("HOME").unwrap_or_default();
    let root = nix::unistd::geteuid().is_root();
    let cache = if root { "/var/cache".into() } else { format!("{home}/.cache") };
    let cache = std::env::var("PIPEOPS_RIG_DIR").unwrap_or(format!("{cache}/pipeops-rig"));
    let there = Path::new(&cache).join("python-packages");
    if there.is_dir() {
        return Ok(there);
    }
    let fresh = Path::new(&cache).join(format!("python-packages-{}", std::process::id()));
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]);
    pip.args(["--timeout", "10", "cloudevents>=2.2", "pika>=1.3", "--target"]).arg(&fresh);
    let done = pip.output().map_err(|e| format!("python3: {e}"))?;
    if !done.status.success() {
        let _ = std::fs::remove_dir_all(&fresh);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        return Err(said.lines().last().unwrap_or("pip fails").to_owned());
    }
    // another run may have been quicker
    let _ = std::fs::rename(&fresh, &there);
    Ok(there)
}

/// Headers as a client of another language has them.
fn plain(message: &Message) -> Value {
    let mut headers = Map::new();
    // `x-…` is the broker's own
    for (name, value) in
        message.headers.inner().iter().filter(|(n, _)| !n.as_str().starts_with("x-"))
    {
        let value: Value = match value {
            AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into(),
            AMQPValue::LongLongInt(number) => (*number).into(),
            other => panic!("a header {name} {other:?}"),
        };
        headers.insert(name.to_string(), value);
    }
    json!({"headers": headers, "content_type": message.kind, "body": STANDARD.encode(&message.body)})
}

/// What a schema refers to, or itself.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let Some(name) = schema["$ref"].as_str() else { return schema };
    let named = document.pointer(name.trim_start_matches('#'));
    named.unwrap_or_else(|| panic!("there is no {name}"))
}

/// What is wrong with a value, by the schema of a document; the rules that the document uses.
fn wrong(document: &Value, schema: &Value, value: &Value, at: &str) -> Option<String> {
    if schema["$ref"].is_string() {
        return wrong(document, resolved(document, schema), value, at);
    }
    if let Some(all) = schema["allOf"].as_array() {
        // the parts have their fields together
        let mut whole = json!({"properties": {}, "required": []});
        for part in all.iter().map(|part| resolved(document, part)) {
            for (name, schema) in part["properties"].as_object().into_iter().flatten() {
                whole["properties"][name] = schema.clone();
            }
            let required = part["required"].as_array().cloned().unwrap_or_default();
            whole["required"].as_array_mut().unwrap().extend(required);
        }
        if whole["properties"].as_object().unwrap().is_empty() {
            return all.iter().find_map(|part| wrong(document, part, value, at));
        }
        return wrong(document, &whole, value, at);
    }
    for name in ["anyOf", "oneOf"] {
        if let Some(some) = schema[name].as_array() {
            let fits = some.iter().any(|part| wrong(document, part, value, at).is_none());
            return (!fits).then(|| format!("{at}: {value} is none of {schema}"));
        }
    }
    if let Some(constant) = schema.get("const").filter(|constant| *constant != value) {
        return Some(format!("{at}: {value} is not {constant}"));
    }
    if let Some(known) = schema["enum"].as_array().filter(|known| !known.contains(value)) {
        return Some(format!("{at}: {value} is not among {known:?}"));
    }
    let is = |kind: &Value| match kind.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        _ => true,
    };
    let kinds = match &schema["type"] {
        Value::Array(kinds) => kinds.clone(),
        Value::Null => Vec::new(),
        one => vec![one.clone()],
    };
    if !kinds.is_empty() && !kinds.iter().any(is) {
        return Some(format!("{at}: {value} is no {kinds:?}"));
    }
    if let Some(fields) = value.as_object() {
        let properties = schema["properties"].as_object();
        for name in schema["required"].as_array().into_iter().flatten() {
            if !fields.contains_key(name.as_str().unwrap()) {
                return Some(format!("{at}: {name} is missing"));
            }
        }
        for (name, field) in fields {
            let place = format!("{at}/{name}");
            match properties.and_then(|known| known.get(name)) {
                Some(schema) => {
                    if let Some(why) = wrong(document, schema, field, &place) {
                        return Some(why);
                    }
                }
                None if schema["additionalProperties"].is_object() => {
                    let why = wrong(document, &schema["additionalProperties"], field, &place);
                    if why.is_some() {
                        return why;
                    }
                }
                // what a message says, the document has
                None if properties.is_some() => return Some(format!("{place} is not described")),
                None => {}
            }
        }
    }
    let items = value.as_array().into_iter().flatten().filter(|_| schema["items"].is_object());
    items
        .enumerate()
        .find_map(|(n, item)| wrong(document, &schema["items"], item, &format!("{at}/{n}")))
}

/// The message of the document with this type.
fn described<'a>(document: &'a Value, kind: &str) -> &'a Value {
    let messages = document["components"]["messages"].as_object().unwrap();
    let is_it = |message: &&Value| {
        message["headers"]["allOf"][1]["properties"]["cloudEvents:type"]["const"] == kind
    };
    messages.values().find(is_it).unwrap_or_else(|| panic!("no message is {kind}"))
}

fn order_as_message(site: &Site, order: &Order) -> Message {
    Message {
        id: order.id.clone(),
        correlation: String::new(),
        kind: "application/json".into(),
        headers: super::headers(&site.project, order),
        body: order.body.clone().into_bytes(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_message_is_a_cloud_event_and_is_as_the_document_has_it() {
    let Some(site) = Site::new().await else { return };
    let _runner = site.runner("").await;
    site.ready(&site.project, 1).await;
    let good = site.order(&site.count(0, 0)).await;
    let mut many = site.count(0, 1);
    many.as_object_mut().unwrap().shift_remove("cluster");
    many["all"] = json!(true);
    let many = site.order(&many).await;
    let bad = Order { body: format!("{} ", good.body), ..good.clone() };
    site.publish(&[good.clone(), many.clone(), bad.clone()]).await;
    let three = |heard: &[Message]| heard.len() >= 3;
    let mut all = collect(&site.rabbit.url, &site.project.answers, three).await;
    all.extend(collect(&site.rabbit.url, &site.project.dead, |heard| !heard.is_empty()).await);
    all.extend([&good, &many].map(|order| order_as_message(&site, order)));
    program_of_the_readme(&site);
    // and what the control plane tells
    let path = format!("/api/v1/clusters/{}", site.cluster);
    site.control_plane.json("DELETE", &path, &site.control_plane.admin, json!({})).await;
    let last = |heard: &[Message]| heard.iter().any(|m| m.json()["type"] == "agent.deregistered");
    all.extend(collect(&site.rabbit.url, "pipeops.runners", last).await);
    let document =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/deployments/asyncapi.json"));
    let document: Value = serde_json::from_str(&document.unwrap()).unwrap();
    let mut kinds = std::collections::BTreeSet::new();
    for message in &all {
        let told = plain(message);
        let kind = told["headers"]["cloudEvents:type"].as_str().unwrap();
        kinds.insert(kind.to_owned());
        let described = described(&document, kind);
        for (part, value) in [("headers", &told["headers"]), ("payload", &message.json())] {
            assert_eq!(wrong(&document, &described[part], value, kind), None, "{kind}: {value}");
        }
    }
    for kind in [
        "agent.registered",
        "agent.online",
        "agent.deregistered",
        "operation.finished",
        "rollout.finished",
        "job",
        "job.answer",
        "job.dead",
    ] {
        assert!(kinds.contains(&format!("io.pipeops.{kind}")), "{kind}: {kinds:?}");
    }
    read_by_others(&all);
}

fn read_by_others(all: &[Message]) {
    use std::io::Write as _;
    let package = match packages() {
        Ok(package) => package,
        Err(why) => {
            println!("NOT RUN: CloudEvents' own package for Python: {why}");
            return;
        }
    };
    let mut reader = Command::new("python3");
    reader.args(["-c", READER]).env("PYTHONPATH", &package);
    reader.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = reader.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let lines: String = all.iter().map(|message| format!("{}\n", plain(message))).collect();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let read = crate::support::run_output(child.wait_with_output().unwrap()).ended(0).out;
    assert_eq!(read.lines().count(), all.len());
    for (message, line) in all.iter().zip(read.lines()) {
        let (event, told) = (serde_json::from_str::<Value>(line).unwrap(), plain(message));
        for name in ["id", "type", "source"] {
            assert_eq!(event[name], told["headers"][format!("cloudEvents:{name}")], "{line}");
        }
    }
    println!("{} messages, read from {}", all.len(), package.display());
}

/// The README's own program sends a job and hears its answer: word by word, but for what is another
/// machine's.
fn program_of_the_readme(site: &Site) {
    let package = match packages() {
        Ok(package) => package,
        Err(why) => {
            println!("NOT RUN: the README's program for Python: {why}");
            return;
        }
    };
    let shop = crate::operations::deployment("shop");
    site.kube.put("/apis/apps/v1/namespaces/beta/deployments/shop", shop);
    site.kube.ready.store(true, std::sync::atomic::Ordering::Relaxed);
    let readme =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let program = readme.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    let program = program
        .replace("https://cp.example.com:8443", &site.control_plane.url)
        .replace("\"cluster\": \"s1\"", &format!("\"cluster\": \"{}\"", site.cluster))
        .replace("production", "beta");
    let ca = ControlPlane::stored(&site.control_plane.sandbox)["ca_certificate"].clone();
    for (name, text) in [
        ("ca.pem", ca.as_str().unwrap()),
        ("token", &site.maker),
        ("amqp-url", &site.rabbit.url),
        ("send.py", &program),
    ] {
        std::fs::write(site.dir.path().join(name), text).unwrap();
    }
    let mut python = Command::new("timeout");
    python.args(["60", "python3", "send.py"]).env("PYTHONPATH", package);
    let done = python.current_dir(site.dir.path()).output().unwrap();
    let said = crate::support::run_output(done).ended(0).out;
    assert!(said.starts_with("succeeded"), "{said}");
}
