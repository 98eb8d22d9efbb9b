//! What a run of the engine passes to each step.

use std::collections::BTreeMap;

use tokio_util::sync::CancellationToken;

use crate::base::secret::Secret;
use crate::host::HostWriter;
use crate::install::plan::{ProgressEvent, SecretName};

/// The secrets of a run by name; the plan only names them.
pub type Secrets = BTreeMap<SecretName, Secret>;

/// What a step needs to change the machine and to report progress.
pub(super) struct StepContext<'a> {
    pub(super) writer: &'a HostWriter,
    pub(super) secrets: &'a Secrets,
    pub(super) stop: &'a CancellationToken,
    pub(super) on_event: &'a mut dyn FnMut(ProgressEvent),
}
