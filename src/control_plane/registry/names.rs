//! Rules for names, which are shown on terminals and on the page and must be distinguishable.

use super::HttpError;
use super::labels::check_labels;
use crate::base::text;
use crate::contract::types::Register;

/// Longest name, and longest fact of an agent (a host name in DNS has 253), characters.
const MAX_NAME: usize = 63;
const MAX_FACT: usize = 253;

/// A name that people give: visible characters, short, without markup.
pub(super) fn check_name(name: &str) -> Result<(), HttpError> {
    let hint = Some(
        "take letters, digits and punctuation that can be seen, without a blank at either end",
    );
    text::check_display_name(name, MAX_NAME)
        .map_err(|why| HttpError::new(400, "bad_name", format!("a name {why}"), hint))
}

/// The facts of an agent about its machine and its cluster: each may be absent, and is shown to
/// people like a name.
pub(super) fn check_facts(request: &Register) -> Result<(), HttpError> {
    let (agent, cluster) = (&request.agent, &request.cluster);
    let plain = [
        ("name", agent.name.as_str()),
        ("version", &agent.version),
        ("host name", &agent.hostname),
        ("operating system", &agent.os),
        ("architecture", &agent.arch),
        ("cluster's provider", &cluster.provider),
        ("cluster's version", &cluster.version),
        ("cluster's region", cluster.region.as_deref().unwrap_or_default()),
        ("cluster's zone", cluster.zone.as_deref().unwrap_or_default()),
    ];
    let labels = [&agent.labels, &cluster.labels]
        .into_iter()
        .flatten()
        .flat_map(|(key, value)| [("label", key.as_str()), ("label", value)]);
    let more = request.capabilities.iter().map(|c| ("capability", c.as_str()));
    for (what, text) in
        plain.into_iter().chain(labels).chain(more).filter(|(_, text)| !text.is_empty())
    {
        let hint = Some("correct it on the node, then restart pipeops-agent");
        text::check_display_name(text, MAX_FACT).map_err(|why| {
            HttpError::new(400, "bad_name", format!("the agent's {what} {why}"), hint)
        })?;
    }
    check_labels(&cluster.labels)
}
