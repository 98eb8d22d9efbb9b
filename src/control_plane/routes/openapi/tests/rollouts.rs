//! The calls about rollouts.

use schemars::JsonSchema;
use serde_json::{Value, json};

use super::{Call, Schemas, call, items, typed};
use crate::contract::types::IDEMPOTENCY_KEY_HEADER;
use crate::control_plane::rollout::RolloutState;
use crate::control_plane::rollouts::RolloutRequest;

/// A rollout as it is shown; `view` of its record makes the same of JSON.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "a schema is made of it")]
struct Rollout {
    /// `ro-` and 32 hex digits.
    id: String,
    kind: String,
    /// Who asked.
    subject: String,
    tenant: Option<String>,
    state: RolloutState,
    /// Why it is paused or was cancelled, or what has come of it.
    message: String,
    /// RFC 3339.
    created_at: String,
    /// Empty until nothing more comes of it.
    finished_at: String,
    waves: Vec<Wave>,
    counts: Counts,
}

#[derive(JsonSchema)]
#[expect(dead_code, reason = "a schema is made of it")]
struct Wave {
    clusters: usize,
    /// `waiting`, `running` or `done`.
    state: String,
}

#[derive(JsonSchema)]
#[expect(dead_code, reason = "a schema is made of it")]
struct Counts {
    total: usize,
    waiting: usize,
    queued: usize,
    running: usize,
    succeeded: usize,
    failed: usize,
    expired: usize,
    cancelled: usize,
    interrupted: usize,
}

pub(super) fn of_rollouts(s: &mut Schemas) -> Vec<Call> {
    let key = "1 to 128 printable characters: the same for each try of the same thing";
    let text = json!({"type": "string"});
    let cluster = json!({"type": "object", "properties": {
        "id": text, "name": text, "wave": {"type": "integer"}, "operation": text,
        "state": {"type": "string", "description": "`waiting`, or that of its operation"},
        "reason": text, "message": text,
    }});
    let rollout = json!(s.0.subschema_for::<Rollout>());
    let clusters = json!({"type": "object", "properties": {
        "clusters": {"type": "array", "items": cluster}}});
    let whole = typed("application/json", json!({"allOf": [rollout, clusters]}));
    let one = "/api/v1/rollouts/{id}";
    let shown = |method, path, summary: &str| -> Call {
        call(method, path, summary).gives("200", "as it is now", whole.clone())
    };
    let limit = json!({
        "name": "limit", "in": "query", "description": "1 to 500, by default 50",
        "schema": {"type": "integer"},
    });
    vec![
        call("GET", "/api/v1/rollouts", "Rollouts that the caller may see, the newest first")
            .parameter(limit)
            .gives("200", "without their clusters", items(rollout)),
        call("POST", "/api/v1/rollouts", "Ask for an operation on many clusters, in waves")
            .header(IDEMPOTENCY_KEY_HEADER, key)
            .takes(s.of::<RolloutRequest>())
            .gives("200", "known already, under the same key", whole.clone())
            .gives("202", "taken", whole.clone()),
        shown("GET", one, "One rollout"),
        shown("DELETE", one, "Begin on no more clusters, and cancel what is queued"),
        shown(
            "POST",
            "/api/v1/rollouts/{id}/resume",
            "Go on with what waits since an operation has failed",
        ),
    ]
}

/// The schema names what is shown, and nothing else is.
#[test]
fn a_rollout_is_shown_as_the_document_says() {
    let mut settings = schemars::generate::SchemaSettings::draft2020_12().into_generator();
    let schema = json!(settings.root_schema_for::<Rollout>());
    let names = |value: &Value| -> Vec<String> {
        let mut names: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        names.sort_unstable();
        names
    };
    let record = json!({
        "id": "ro-1", "project": "p", "caller_id": "r", "subject": "r", "kind": "restart",
        "request": "", "state": "running", "message": "", "created_at": 1, "clusters": [],
        "limits": {"project": "p", "role": "deployer", "tenant": "acme"},
    });
    let record: crate::control_plane::rollout::RolloutRecord =
        serde_json::from_value(record).unwrap();
    let view = record.view(false);
    assert_eq!(names(&view), names(&schema["properties"]));
    let counts = schema["$defs"]["Counts"]["properties"].clone();
    assert_eq!(names(&view["counts"]), names(&counts));
}
