//! The AsyncAPI document of what goes over RabbitMQ: events, jobs, answers and dead letters, with
//! the schemas of the types that they are made of. For tests alone: the program does not serve it.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Value, json};

use super::Registry;
use super::events::Topic;
use crate::base::secret::Secret;
use crate::contract::job::{self, Job};
use crate::contract::types::{ClusterInfo, Operation, OperationState, StatusReport};
use crate::control_plane::model::{Agent, Liveness};
use crate::control_plane::store::{Change, Store};

const EXCHANGE: &str = "pipeops.agents";
const QUEUE: &str = "pipeops.runners";
const UNROUTED: &str = "pipeops.unrouted";
const PROJECT: &str = "{project}";
/// States that an answer may have beside those of an operation.
const MORE_STATES: [&str; 2] = ["paused", "refused"];

struct Schemas(SchemaGenerator);

impl Schemas {
    fn of<T: JsonSchema>(&mut self) -> Value {
        json!(self.0.subschema_for::<T>())
    }
}

fn text(what: &str) -> Value {
    json!({"type": "string", "description": what})
}

/// An object with these fields; a name that ends in `?` may be absent.
fn object(fields: Vec<(&str, Value)>) -> Value {
    let mut schema = json!({"type": "object", "required": [], "properties": {}});
    for (name, field) in fields {
        let plain = name.trim_end_matches('?');
        if plain == name {
            schema["required"].as_array_mut().unwrap().push(name.into());
        }
        schema["properties"][plain] = field;
    }
    schema
}

/// An event: its routing key, when it is sent, and what its body has beside what all of them have.
struct Event {
    key: &'static str,
    when: &'static str,
    more: Vec<(&'static str, Value)>,
}

fn events(s: &mut Schemas) -> Vec<Event> {
    let at = |what| json!({"type": "string", "format": "date-time", "description": what});
    let endpoint = || text("base of the gateway's /k8s and /api");
    let event = |key, when, more| Event { key, when, more };
    vec![
        event(
            "agent.registered",
            "An agent is new, or registered again with other facts",
            vec![
                ("cluster_info", s.of::<ClusterInfo>()),
                ("capabilities", json!({"type": "array", "items": {"type": "string"}})),
                ("max_role", text("highest role in which the control plane may act there")),
                ("endpoint", endpoint()),
                ("registered_at", at("when it registered first")),
            ],
        ),
        event("agent.online", "Heartbeats arrive", vec![("endpoint", endpoint())]),
        event(
            "agent.offline",
            "No heartbeat for 45 s, or it was revoked",
            vec![("state", s.of::<Liveness>()), ("reason", text("in words"))],
        ),
        event("agent.deregistered", "It was removed, or uninstalled", Vec::new()),
        event(
            "agent.status",
            "Every minute; of those that wait for the broker only the latest of each agent",
            vec![("status", s.of::<StatusReport>())],
        ),
        event(
            "operation.finished",
            "An operation has ended",
            vec![("operation", s.of::<Operation>())],
        ),
    ]
}

/// What the bodies of all events of agents have.
fn of_agents(key: &str) -> Vec<(&'static str, Value)> {
    vec![
        ("message_id", text("the same on every attempt")),
        ("type", json!({"const": key})),
        ("at", json!({"type": "string", "format": "date-time"})),
        ("project", text("id of the project")),
        ("agent_id", text("`a-` and 32 hex digits")),
        ("cluster_id", text("`c-` and 16 hex digits")),
        ("cluster_name", text("a label, not an identity")),
        ("agent_seq", json!({"type": "integer", "description": "grows with each event"})),
    ]
}

/// Headers of all events, beside those of CloudEvents.
fn of_events() -> Vec<(&'static str, Value)> {
    vec![("agent_seq", json!({"type": "integer"})), ("agent_id", text("as in the body"))]
}

fn counts() -> Value {
    let number = || json!({"type": "integer", "minimum": 0});
    let names = ["total", "waiting", "queued", "running", "succeeded", "failed", "expired"];
    let all = names.into_iter().chain(["cancelled", "interrupted"]);
    object(all.map(|name| (name, number())).collect())
}

/// A rollout, as events and answers have it.
fn rollout(with_clusters: bool) -> Value {
    let state = json!({"enum": ["running", "paused", "succeeded", "failed", "cancelled"]});
    let wave = object(vec![
        ("clusters", json!({"type": "integer"})),
        ("state", json!({"enum": ["waiting", "running", "done"]})),
    ]);
    let cluster = object(vec![
        ("id", text("of the cluster")),
        ("name", text("of the cluster")),
        ("wave", json!({"type": "integer", "minimum": 1})),
        ("state", text("`waiting`, or that of its operation")),
        ("operation?", text("its id")),
        ("reason?", text("as of an operation")),
        ("message?", text("as of an operation")),
    ]);
    let mut fields = vec![
        ("id", text("`ro-` and 32 hex digits")),
        ("kind", text("as of an operation")),
        ("subject", text("who asked")),
        ("tenant?", text("the tenant whose token it was asked for with")),
        ("state", state),
        ("message", text("in words")),
        ("created_at", text("RFC 3339")),
        ("finished_at", text("RFC 3339; empty while it runs")),
        ("waves", json!({"type": "array", "items": wave})),
        ("counts", counts()),
    ];
    if with_clusters {
        fields.push(("clusters", json!({"type": "array", "items": cluster})));
    }
    object(fields)
}

fn answer(s: &mut Schemas) -> Value {
    let state = json!({"anyOf": [s.of::<OperationState>(), {"enum": MORE_STATES}]});
    let of_cluster = object(vec![("cluster_id", text("the cluster that it is for"))]);
    object(vec![
        ("job?", text("its id; absent where its token names none that is known")),
        ("state", state),
        ("reason?", text("a stable code: `pipeops explain REASON`")),
        ("message", text("in words")),
        ("cluster?", text("as the job names it")),
        ("operation?", json!({"allOf": [s.of::<Operation>(), of_cluster]})),
        ("rollout?", rollout(true)),
    ])
}

fn dead_letter() -> Value {
    object(vec![
        ("reason", text("a stable code: `pipeops explain REASON`")),
        ("message", text("in words; nothing of the spec or the token")),
        ("job?", text("its id; absent where its token names none that is known")),
        ("message_id?", text("of the message")),
        ("kind?", text("as the job has it")),
        ("cluster?", text("as the job has it")),
        ("size", json!({"type": "integer", "description": "of the body, bytes"})),
        ("sha256", text("of the body, hexadecimal")),
        ("at", json!({"type": "string", "format": "date-time"})),
    ])
}

/// The headers that each message has: CloudEvents 1.0, binary mode.
fn cloud_event() -> Value {
    object(vec![
        ("cloudEvents:specversion", json!({"const": "1.0"})),
        ("cloudEvents:id", text("the same on every attempt")),
        ("cloudEvents:source", text("`/projects/` and the project's id")),
        ("cloudEvents:type", json!({"type": "string"})),
        ("cloudEvents:subject?", text("the cluster or the job that it is about")),
        ("cloudEvents:time?", json!({"type": "string", "format": "date-time"})),
    ])
}

fn message(kind: &str, summary: &str, payload: Value, more: Vec<(&str, Value)>) -> Value {
    let mut fields = vec![("cloudEvents:type", json!({"const": format!("io.pipeops.{kind}")}))];
    fields.extend(more);
    json!({
        "name": format!("io.pipeops.{kind}"), "summary": summary,
        "contentType": "application/json",
        "headers": {"allOf": [{"$ref": "#/components/schemas/CloudEvent"}, object(fields)]},
        "payload": payload,
    })
}

fn reference(part: &str, name: &str) -> Value {
    json!({"$ref": format!("#/{part}/{name}")})
}

/// Names of messages, as the document has them.
fn named<'a>(names: impl IntoIterator<Item = &'a str>) -> Value {
    let mut all = json!({});
    for name in names {
        all[name] = reference("components/messages", name);
    }
    all
}

fn exchange(name: &str, kind: &str) -> Value {
    json!({"amqp": {"is": "routingKey", "bindingVersion": "0.3.0",
        "exchange": {"name": name, "type": kind, "durable": true, "autoDelete": false}}})
}

fn queue(name: &str) -> Value {
    json!({"amqp": {"is": "queue", "bindingVersion": "0.3.0",
        "queue": {"name": name, "durable": true, "exclusive": false, "autoDelete": false}}})
}

fn channel(address: &str, what: &str, messages: Value, bindings: Value) -> Value {
    let mut channel = json!({"address": address, "description": what, "messages": messages,
        "bindings": bindings});
    if address.contains(PROJECT) {
        channel["parameters"] = json!({"project": {"description": "id of the project"}});
    }
    channel
}

fn channels(keys: &[&str]) -> Value {
    let (jobs, answers) = (job::jobs_exchange(PROJECT), job::answers_exchange(PROJECT));
    let dead = job::dead_exchange(PROJECT);
    let all = || named(keys.iter().copied());
    json!({
        "events": channel(EXCHANGE, "Events of agents, by routing key", all(),
            exchange(EXCHANGE, "topic")),
        "runners": channel(QUEUE, "All events, for one reader", all(), queue(QUEUE)),
        "unrouted": channel(UNROUTED, "Events that no queue takes", all(), queue(UNROUTED)),
        "jobs": channel(&jobs, "Jobs of a project, from whoever makes them. The queue behind it \
            has the same name, is a quorum queue and has a single active consumer", named(["job"]),
            exchange(&jobs, "fanout")),
        "answers": channel(&answers, "Answers. The routing key is the name of the queue that the \
            job's reply_to names: this one, or one that begins with it and a dot",
            named(["answer"]), exchange(&answers, "direct")),
        "dead": channel(&dead, "What can't be done. The queue behind it has the same name",
            named(["dead"]), exchange(&dead, "fanout")),
    })
}

fn operation(action: &str, name: &str, summary: &str) -> Value {
    json!({"action": action, "channel": reference("channels", name), "summary": summary})
}

fn whole() -> Value {
    let mut settings = SchemaSettings::draft07();
    settings.definitions_path = "/components/schemas".into();
    let s = &mut Schemas(settings.into_generator());
    let mut messages = json!({});
    let mut keys = Vec::new();
    for Event { key, when, more } in events(s) {
        let mut fields = of_agents(key);
        fields.extend(more);
        messages[key] = message(key, when, object(fields), of_events());
        keys.push(key);
    }
    let ended = vec![
        ("message_id", text("the same on every attempt")),
        ("type", json!({"const": "rollout.finished"})),
        ("at", json!({"type": "string", "format": "date-time"})),
        ("project", text("id of the project; empty for one over several")),
        ("agent_id", json!({"const": ""})),
        ("agent_seq", json!({"type": "integer"})),
        ("rollout", rollout(false)),
    ];
    let when = "A rollout has ended";
    messages["rollout.finished"] = message("rollout.finished", when, object(ended), of_events());
    keys.push("rollout.finished");
    let token = text("of POST /api/v1/job-tokens; a header `pipeops-token` does as well");
    let targets = ["cluster", "clusters", "selector", "all"].map(|one| json!({"required": [one]}));
    messages["job"] = message(
        "job",
        "An operation or a rollout that is asked for; unknown fields are refused",
        json!({"allOf": [s.of::<Job>(), {"oneOf": targets}]}),
        vec![("cloudEvents:pipeopstoken", token)],
    );
    messages["job"]["correlationId"] = json!({"location": "$message.header#/correlationId",
        "description": "comes back in the answer; without it the message_id"});
    messages["answer"] = message("job.answer", "What became of a job", answer(s), Vec::new());
    messages["dead"] =
        message("job.dead", "Why a message can't be done", dead_letter(), Vec::new());
    let mut schemas = json!({"CloudEvent": cloud_event()});
    for (name, schema) in s.0.take_definitions(true) {
        schemas[name] = schema;
    }
    let mut take = operation("receive", "jobs", "A Runner takes jobs");
    take["reply"] = json!({"channel": reference("channels", "answers"),
        "address": {"location": "$message.header#/replyTo"}});
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "pipeops over RabbitMQ", "version": "1",
            "description": "Events of the control plane, and jobs for Runners. Each message is a \
                CloudEvent in binary mode: attributes are headers, the body is the data.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "channels": channels(&keys),
        "operations": {
            "tell": operation("send", "events", "The control plane tells of agents"),
            "take": take,
            "answer": operation("send", "answers", "A Runner answers"),
            "giveUp": operation("send", "dead", "A Runner puts aside what can't be done"),
        },
        "components": {"messages": messages, "schemas": schemas},
    })
}

#[test]
fn the_asyncapi_document_is_fresh() {
    crate::base::json::assert_committed("asyncapi.json", &whole(), "asyncapi");
}

#[test]
fn what_the_document_names_is_in_it() {
    let document = whole();
    let text = document.to_string();
    let named: std::collections::BTreeSet<&str> =
        text.split("\"#").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(named.len() > 15, "{named:?}");
    let missing: Vec<_> =
        named.into_iter().filter(|name| document.pointer(name).is_none()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[tokio::test]
async fn an_event_has_the_fields_that_the_document_has() {
    let dir = tempfile::tempdir().unwrap();
    let url = Secret::new(format!("sqlite:{}?mode=rwc", dir.path().join("t.db").display()));
    let store = Store::open(&url, "i").await.unwrap();
    let registry = Registry::load(store, Some("https://cp.test".into()), 0).await.unwrap();
    let row: Agent = serde_json::from_value(json!({"id": "a-1", "cluster_id": "c-1",
        "project": "p-1", "info": {}, "cluster": {"region": "eu"}, "capabilities": ["tenants"],
        "max_role": "operator", "credentials": [], "registered_at": 1, "seen_at": 1,
        "revoked": false}))
    .unwrap();
    let (report, operation) = (StatusReport::default(), Operation::default());
    let document = whole();
    let messages = &document["components"]["messages"];
    let mut kinds = 0;
    for topic in [
        Topic::Registered,
        Topic::Online,
        Topic::Offline(Liveness::Offline, "silent"),
        Topic::Deregistered,
        Topic::Status(Some(&report)),
        Topic::Finished(&operation),
    ] {
        let Some(Change::AddEvent(event)) = registry.event(&row, topic, 1) else { panic!("none") };
        let body: Value = serde_json::from_str(&event.body).unwrap();
        let described = &messages[event.topic]["payload"];
        let mut told: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
        // it is added when the event is sent
        told.push("agent_seq");
        told.sort_unstable();
        let fields = described["properties"].as_object().unwrap();
        let mut known: Vec<&str> = fields.keys().map(String::as_str).collect();
        known.sort_unstable();
        assert_eq!(told, known, "{}", event.topic);
        assert_eq!(described["required"].as_array().unwrap().len(), known.len());
        assert_eq!(fields["type"]["const"], event.topic);
        kinds += 1;
    }
    assert_eq!(kinds, events(&mut Schemas(SchemaSettings::draft07().into_generator())).len());
}
