//! The calls of agents.

use super::{Call, Schemas, call};
use crate::contract::types::{
    Config, Credential, Heartbeat, HeartbeatAnswer, Operation, Register, Registered,
    SIGNATURE_HEADER, StatusReport,
};

pub(super) fn of_agents(s: &mut Schemas) -> Vec<Call> {
    let signature = "base64 of the ECDSA P-256 SHA-256 signature (ASN.1) over the exact body";
    vec![
        call("POST", "/api/v1/agents/register", "Register, or register again with the same key")
            .header(SIGNATURE_HEADER, signature)
            .takes(s.of::<Register>())
            .gives("200", "registered", s.of::<Registered>()),
        call("GET", "/api/v1/agents/{id}/config", "Settings of an agent").gives(
            "200",
            "settings",
            s.of::<Config>(),
        ),
        call("POST", "/api/v1/agents/{id}/heartbeat", "Sign of life")
            .takes(s.of::<Heartbeat>())
            .gives("200", "heard", s.of::<HeartbeatAnswer>()),
        call("POST", "/api/v1/agents/{id}/status", "Status of the cluster")
            .takes(s.of::<StatusReport>())
            .done(),
        call("POST", "/api/v1/agents/{id}/operations/{op}/result", "Result of an operation")
            .takes(s.of::<Operation>())
            .done(),
        call("POST", "/api/v1/agents/{id}/credential", "Next credential").gives(
            "200",
            "the next one",
            s.of::<Credential>(),
        ),
        call("DELETE", "/api/v1/agents/{id}", "Deregister").done(),
    ]
}
