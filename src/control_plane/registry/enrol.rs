//! Registration: a key proves the identity of an agent, a token admits it, and an identity belongs
//! to one machine.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};

use super::events::Topic;
use super::labels::labels_change;
use super::{
    Entry, HttpError, Inner, Principal, Registry, check_facts, check_name, duplicate, mint_token,
    not_found,
};
use crate::base::secret::Secret;
use crate::contract::types::{AgentInfo, Register, agent_id_of};
use crate::control_plane::keys::Keys;
use crate::control_plane::model::{Agent, AgentCredential};
use crate::control_plane::store::{Change, RowKind};

/// Lifetime of an agent's credential, and how long the previous one stays valid beside the next,
/// seconds.
const CREDENTIAL: i64 = 86_400;
const OVERLAP: i64 = 600;
/// Two machines with one identity are refused until one of them has been silent for this long,
/// seconds.
const CONFLICT: i64 = 180;

/// The result of a registration.
pub struct Registration {
    pub agent_id: String,
    pub cluster_id: String,
    pub credential: Secret,
    pub expires_at: i64,
}

/// Checks the key of a registration: its id, and its signature over the exact body.
fn verify_signature(info: &AgentInfo, body: &[u8], signature: &str) -> Result<(), HttpError> {
    let wrong =
        |message: &str| HttpError::new(400, "bad_signature", message, Some("update the agent"));
    let der =
        spki(&info.public_key).ok_or_else(|| wrong("the public key is no P-256 key in PEM"))?;
    if info.id != agent_id_of(&der) {
        return Err(wrong("the id does not belong to the key"));
    }
    let signature = STANDARD.decode(signature).map_err(|_| wrong("there is no signature"))?;
    // the uncompressed point is the end of a P-256 SubjectPublicKeyInfo
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &der[der.len() - 65..])
        .verify(body, &signature)
        .map_err(|_| wrong("the signature is wrong"))
}

/// DER of a P-256 SubjectPublicKeyInfo in PEM: 91 bytes, RFC 5480.
pub fn spki(pem: &str) -> Option<Vec<u8>> {
    let der = STANDARD
        .decode(pem.lines().filter(|l| !l.starts_with('-')).map(str::trim).collect::<String>())
        .ok()?;
    (der.len() == 91).then_some(der)
}

impl Registry {
    /// Registers an agent, new or again. Returns when that is durable.
    ///
    /// # Errors
    /// Wrong signature, foreign token, no use left, another machine with the same key, no database.
    pub async fn register(
        &self,
        keys: &Keys,
        principal: &Principal,
        mut request: Register,
        body: &[u8],
        signature: &str,
        now: i64,
    ) -> Result<Registration, HttpError> {
        verify_signature(&request.agent, body, signature)?;
        // a cluster without a name is named after its agent
        if request.cluster.name.is_empty() {
            request.cluster.name.clone_from(&request.agent.id);
        }
        check_name(&request.cluster.name)?;
        check_facts(&request)?;
        let (credential, hash) = mint_token(keys, "poa")?;
        let stored = AgentCredential { hash, expires_at: now + CREDENTIAL };
        let id = request.agent.id.clone();
        let change = |inner: &mut Inner| {
            let (mut changes, cluster_id, undo) =
                inner.register(principal, request, stored.clone(), now)?;
            if undo.is_announced()
                && let Some(entry) = inner.agents.get(&id)
            {
                changes.extend(self.event(&entry.row, Topic::Registered, now));
            }
            Ok::<_, HttpError>((changes, (cluster_id, undo)))
        };
        let undo = |inner: &mut Inner, (_, undo): (String, Undo)| inner.undo(undo, &stored.hash);
        let cluster_id = self.transact(change, undo, |_, (cluster_id, _)| cluster_id).await?;
        Ok(Registration { agent_id: id, cluster_id, credential, expires_at: stored.expires_at })
    }

    /// The next credential; the previous ones stay valid for an overlap.
    ///
    /// # Errors
    /// When the agent is not known or the database cannot be written: then nothing changes.
    pub async fn rotate(
        &self,
        keys: &Keys,
        id: &str,
        now: i64,
    ) -> Result<(Secret, i64), HttpError> {
        let (credential, hash) = mint_token(keys, "poa")?;
        let stored = AgentCredential { hash, expires_at: now + CREDENTIAL };
        let change = |inner: &mut Inner| {
            inner.add_credential(id, stored.clone(), now)?;
            let row = &inner.agents.get(id).ok_or_else(|| not_found("agent", id))?.row;
            Ok::<_, HttpError>((vec![Change::put(RowKind::Agent, id, row)?], ()))
        };
        self.transact(change, |inner, ()| inner.forget_credential(id, &stored.hash), |_, ()| ())
            .await?;
        Ok((credential, stored.expires_at))
    }
}

/// How to undo a registration that could not be written.
enum Undo {
    New {
        id: String,
        enrolment: String,
    },
    /// `changed`: with other facts than before.
    Again {
        id: String,
        changed: bool,
    },
}

impl Undo {
    /// Whether Runners get an event.
    fn is_announced(&self) -> bool {
        matches!(self, Undo::New { .. } | Undo::Again { changed: true, .. })
    }
}

impl Inner {
    fn register(
        &mut self,
        principal: &Principal,
        request: Register,
        stored: AgentCredential,
        now: i64,
    ) -> Result<(Vec<Change>, String, Undo), HttpError> {
        if self.agents.contains_key(&request.agent.id) {
            self.register_again(principal, request, stored, now)
        } else {
            self.register_new(principal, request, stored, now)
        }
    }

    fn register_again(
        &mut self,
        principal: &Principal,
        request: Register,
        stored: AgentCredential,
        now: i64,
    ) -> Result<(Vec<Change>, String, Undo), HttpError> {
        let id = request.agent.id.clone();
        let entry = self.agents.get_mut(&id).ok_or_else(|| not_found("agent", &id))?;
        let fits = match principal {
            Principal::Agent(own) => *own == id,
            Principal::Enrolment(token) => {
                self.enrolments.get(token).is_some_and(|t| t.project == entry.row.project)
            }
            Principal::AccessToken(_) | Principal::Admin(_) | Principal::Local => false,
        };
        if !fits {
            return Err(HttpError::new(
                403,
                "foreign_token",
                "the token is of another project or agent",
                None,
            ));
        }
        if entry.row.revoked {
            return Err(HttpError::new(
                403,
                "agent_revoked",
                "this agent was revoked",
                Some("remove it at the control plane, then enrol it again"),
            ));
        }
        if entry.row.info.machine != request.agent.machine {
            entry.conflict_until = now + CONFLICT;
            return Err(duplicate());
        }
        if entry.conflict_until > now {
            return Err(duplicate());
        }
        let row = &entry.row;
        let unchanged = row.info == request.agent
            && row.cluster == request.cluster
            && row.capabilities == request.capabilities
            && row.max_role == request.max_role;
        (entry.row.info, entry.row.cluster, entry.row.capabilities, entry.row.max_role) =
            (request.agent, request.cluster, request.capabilities, request.max_role);
        (entry.seen_at, entry.row.seen_at, entry.draining) = (now, now, false);
        let (cluster, changed) = (entry.row.cluster_id.clone(), !unchanged);
        self.add_credential(&id, stored, now)?;
        let row = &self.agents.get(&id).ok_or_else(|| not_found("agent", &id))?.row;
        let change = Change::put(RowKind::Agent, &id, row)?;
        Ok((vec![change], cluster, Undo::Again { id, changed }))
    }

    fn register_new(
        &mut self,
        principal: &Principal,
        request: Register,
        stored: AgentCredential,
        now: i64,
    ) -> Result<(Vec<Change>, String, Undo), HttpError> {
        let id = request.agent.id.clone();
        let Principal::Enrolment(token) = principal else {
            return Err(HttpError::new(
                403,
                "enrolment_needed",
                "a new agent needs an enrolment token",
                Some("make one: pipeops control-plane token create"),
            ));
        };
        let enrolment = self.enrolments.get_mut(token).ok_or_else(|| not_found("token", token))?;
        if enrolment.uses_left == Some(0) {
            return Err(HttpError::new(
                403,
                "token_used_up",
                "the enrolment token has let in as many agents as it may",
                Some("make another one"),
            ));
        }
        enrolment.uses_left = enrolment.uses_left.map(|n| n - 1);
        let cluster_id = format!("c-{}", &id[2..18]);
        let row = Agent {
            id: id.clone(),
            cluster_id: cluster_id.clone(),
            project: enrolment.project.clone(),
            info: request.agent,
            cluster: request.cluster,
            capabilities: request.capabilities,
            max_role: request.max_role,
            credentials: vec![stored],
            registered_at: now,
            seen_at: now,
            revoked: false,
            online: false,
            labels: enrolment.labels.clone(),
        };
        let mut changes = vec![
            Change::put(RowKind::Agent, &id, &row)?,
            Change::put(RowKind::Enrolment, token, enrolment)?,
        ];
        if !row.labels.is_empty() {
            changes.push(labels_change(&row)?);
        }
        self.insert_agent(Entry::new(row));
        Ok((changes, cluster_id, Undo::New { id, enrolment: token.clone() }))
    }

    fn undo(&mut self, undo: Undo, hash: &str) {
        match undo {
            Undo::New { id, enrolment } => {
                self.agents.remove(&id);
                self.tokens.remove(hash);
                if let Some(row) = self.enrolments.get_mut(&enrolment) {
                    row.uses_left = row.uses_left.map(|n| n + 1);
                }
            }
            Undo::Again { id, .. } => self.forget_credential(&id, hash),
        }
    }

    /// Adds a credential; the previous ones end after the overlap, and expired ones are removed.
    fn add_credential(
        &mut self,
        id: &str,
        stored: AgentCredential,
        now: i64,
    ) -> Result<(), HttpError> {
        let entry = self.agents.get_mut(id).ok_or_else(|| not_found("agent", id))?;
        for former in &mut entry.row.credentials {
            former.expires_at = former.expires_at.min(now + OVERLAP);
        }
        let (valid, expired): (Vec<AgentCredential>, Vec<AgentCredential>) =
            entry.row.credentials.drain(..).partition(|c| c.expires_at > now);
        entry.row.credentials = valid;
        // a client that asks in a loop does not fill the row
        while entry.row.credentials.len() > 3 {
            let first = entry.row.credentials.remove(0);
            self.tokens.remove(&first.hash);
        }
        entry.row.credentials.push(stored.clone());
        for stored in expired {
            self.tokens.remove(&stored.hash);
        }
        self.tokens.insert(stored.hash, (RowKind::Agent, id.into()));
        Ok(())
    }

    fn forget_credential(&mut self, id: &str, hash: &str) {
        self.tokens.remove(hash);
        if let Some(entry) = self.agents.get_mut(id) {
            entry.row.credentials.retain(|c| c.hash != hash);
        }
    }
}
