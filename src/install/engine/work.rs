//! What a run of the engine hands on to each step.

use std::collections::BTreeMap;

use tokio_util::sync::CancellationToken;

use crate::base::secret::Secret;
use crate::host::Hands;
use crate::install::plan::{Event, SecretName};

/// The secrets of a run by name; the plan only names them.
pub type Secrets = BTreeMap<SecretName, Secret>;

/// What a step needs to do its work and to tell about it.
pub(super) struct Work<'a> {
    pub(super) hands: &'a Hands,
    pub(super) secrets: &'a Secrets,
    pub(super) stop: &'a CancellationToken,
    pub(super) tell: &'a mut dyn FnMut(Event),
}
