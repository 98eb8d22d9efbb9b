//! The form of a request: its kind, and a specification that depends on it.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::OperationRequest;
use crate::base::json;
use crate::base::text::valueless_json_error;

/// # Errors
/// Why the text is no request, with the field and without its value.
pub(super) fn read(text: &[u8]) -> Result<OperationRequest, String> {
    let value = json::value(text).map_err(|error| valueless_json_error(&error))?;
    let Envelope { kind, spec } = json::fields(value).map_err(|error| unreadable("", &error))?;
    kind.read(spec)
}

fn unreadable(below: &str, error: &serde_path_to_error::Error<serde_json::Error>) -> String {
    let path = error.path().to_string();
    let path = [below, path.as_str()].into_iter().filter(|part| !part.is_empty() && *part != ".");
    let path = path.collect::<Vec<_>>().join(".");
    let why = valueless_json_error(error.inner());
    if path.is_empty() { why } else { format!("{path}: {why}") }
}

/// A request before its kind is known. serde could read the whole at once, and would compile each
/// specification twice: for `kind` before `spec`, and for `spec` before `kind`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    kind: Kind,
    spec: Value,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Apply,
    Delete,
    Scale,
    Restart,
    Cordon,
    Uncordon,
    Drain,
    Remove,
    Deploy,
    Rollback,
    DeleteApplication,
    Job,
    #[serde(rename = "cronjob")]
    CronJob,
    Secret,
    #[serde(rename = "configmap")]
    ConfigMap,
    Tenant,
}

impl Kind {
    fn read(self, spec: Value) -> Result<OperationRequest, String> {
        fn spec_of<T: DeserializeOwned>(spec: Value) -> Result<T, String> {
            json::fields(spec).map_err(|error| unreadable("spec", &error))
        }
        Ok(match self {
            Kind::Apply => OperationRequest::Apply(spec_of(spec)?),
            Kind::Delete => OperationRequest::Delete(spec_of(spec)?),
            Kind::Scale => OperationRequest::Scale(spec_of(spec)?),
            Kind::Restart => OperationRequest::Restart(spec_of(spec)?),
            Kind::Cordon => OperationRequest::Cordon(spec_of(spec)?),
            Kind::Uncordon => OperationRequest::Uncordon(spec_of(spec)?),
            Kind::Drain => OperationRequest::Drain(spec_of(spec)?),
            Kind::Remove => OperationRequest::Remove(spec_of(spec)?),
            Kind::Deploy => OperationRequest::Deploy(spec_of(spec)?),
            Kind::Rollback => OperationRequest::Rollback(spec_of(spec)?),
            Kind::DeleteApplication => OperationRequest::DeleteApplication(spec_of(spec)?),
            Kind::Job => OperationRequest::Job(spec_of(spec)?),
            Kind::CronJob => OperationRequest::CronJob(spec_of(spec)?),
            Kind::Secret => OperationRequest::Secret(spec_of(spec)?),
            Kind::ConfigMap => OperationRequest::ConfigMap(spec_of(spec)?),
            Kind::Tenant => OperationRequest::Tenant(spec_of(spec)?),
        })
    }
}
