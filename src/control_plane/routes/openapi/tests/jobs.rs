//! Calls about jobs.

use serde_json::{Value, json};

use super::{Call, Schemas, call, object};
use crate::contract::types::Operation;
use crate::control_plane::caller_token::RunnerToken;
use crate::control_plane::job_tokens::JobTokenRequest;
use crate::control_plane::jobs::BroughtJob;
use crate::control_plane::routes::jobs::SealingKey;

fn query(name: &str, description: &str, schema: Value) -> Value {
    json!({"name": name, "in": "query", "description": description, "schema": schema})
}

pub(super) fn calls(s: &mut Schemas) -> Vec<Call> {
    let text = json!({"type": "string"});
    let of = |value: Value| value["application/json"]["schema"].clone();
    let operation = of(s.with::<Operation>(&[("cluster_id", "which cluster it is for")]));
    let direct = of(s.with::<RunnerToken>(&[
        ("key", "the Idempotency-Key to post it under"),
        ("cluster_id", "which cluster it is for"),
        ("operation_id", "the operation that it becomes"),
        ("body", "what to post to the agent's /api/v1/operations, to the byte"),
    ]));
    let state = json!({"type": "string", "description":
        "of the operation or rollout; `unknown` where its end is no longer kept, `refused` where \
         it is not done"});
    let job = json!({
        "id": text, "state": state, "operation": operation,
        "answered": {"type": "boolean", "description": "its answer is at the broker already"},
        "rollout": {"type": "object", "description": "of a job for more than one cluster"},
        "reason": {"type": "string", "description": "why it is refused"}, "message": text,
    });
    let mut brought = job.clone();
    brought["sealed"] = json!({"type": "boolean", "description":
        "with the state `sealed`: nothing was done, bring it again with what is sealed opened"});
    brought["maker"] = json!({"type": "string", "description": "for whom that is sealed"});
    brought["direct"] = direct;
    let token = object(json!({
        "token": text, "id": text, "expires_at": text, "project": text, "exchange": text,
        "reply_queue": text, "sealing_key": text, "maker": text,
    }));
    let nothing = || json!({});
    vec![
        call("POST", "/api/v1/job-tokens", "A token for a job, bound to the hash of its body")
            .takes(s.of::<JobTokenRequest>())
            .gives("201", "the token, and where to publish the job", token),
        call("POST", "/api/v1/jobs", "Bring a job that came over RabbitMQ")
            .takes(s.of::<BroughtJob>())
            .gives("202", "taken, or known already", object(brought)),
        call("GET", "/api/v1/jobs/{id}", "What has become of a job")
            .parameter(query(
                "wait_s",
                "Answer when it has ended, or after so many seconds: 60 at most",
                json!({"type": "integer", "minimum": 0, "maximum": 60}),
            ))
            .gives("200", "as it is now", object(job)),
        call("POST", "/api/v1/jobs/{id}/answered", "Say that the answer is at the broker").gives(
            "204",
            "noted",
            nothing(),
        ),
        call("GET", "/api/v1/sealing-key", "The key that values in jobs are sealed to").gives(
            "200",
            "of the project",
            object(json!({"public_key": text, "project": text, "maker": text})),
        ),
        call("PUT", "/api/v1/sealing-key", "Tell the key that values in jobs are sealed to")
            .takes(s.of::<SealingKey>())
            .gives("204", "noted", nothing()),
        call("DELETE", "/api/v1/projects/{id}/sealing-key", "Forget the key of a project").done(),
    ]
}
