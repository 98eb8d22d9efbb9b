//! Registrations: a key proves who an agent is, a token lets it in, and one identity is one machine.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};

use super::events::Topic;
use super::{
    Entry, Inner, Refused, Registry, Who, check_facts, check_name, duplicate, mint, no_such,
    refused,
};
use crate::base::secret::Secret;
use crate::contract::types::{AgentInfo, Register, agent_id_of};
use crate::control_plane::keys::Keys;
use crate::control_plane::model::{Agent, Held};
use crate::control_plane::store::{Change, Kind};

/// Life of an agent's credential, and how long the former one goes on beside the next, seconds.
const CREDENTIAL: i64 = 86_400;
const OVERLAP: i64 = 600;
/// Two machines with one identity are refused until one of them is silent for this long, seconds.
const DUEL: i64 = 180;

/// What a registration gave.
pub struct Enrolled {
    pub agent_id: String,
    pub cluster_id: String,
    pub credential: Secret,
    pub expires_at: i64,
}

/// The key of a registration, held against its id and its signature over the exact body.
fn proven(info: &AgentInfo, body: &[u8], signature: &str) -> Result<(), Refused> {
    let wrong = |message: &str| refused(400, "bad_signature", message, Some("update the agent"));
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
    /// A registration, new or again. It answers when it is durable.
    ///
    /// # Errors
    /// Wrong signature, foreign token, no use left, another machine with the same key, no database.
    pub async fn register(
        &self,
        keys: &Keys,
        who: &Who,
        mut asked: Register,
        body: &[u8],
        signature: &str,
        now: i64,
    ) -> Result<Enrolled, Refused> {
        proven(&asked.agent, body, signature)?;
        // an agent that does not say how its cluster is called is called after itself
        if asked.cluster.name.is_empty() {
            asked.cluster.name.clone_from(&asked.agent.id);
        }
        check_name(&asked.cluster.name)?;
        check_facts(&asked)?;
        let (credential, hash) = mint(keys, "poa")?;
        let held = Held { hash, expires_at: now + CREDENTIAL };
        let id = asked.agent.id.clone();
        let change = |inner: &mut Inner| {
            let (mut changes, cluster_id, undo) = inner.register(who, asked, held.clone(), now)?;
            if undo.news()
                && let Some(entry) = inner.agents.get(&id)
            {
                changes.extend(self.told(&entry.row, Topic::Registered, now));
            }
            Ok::<_, Refused>((changes, (cluster_id, undo)))
        };
        let undo = |inner: &mut Inner, (_, undo): (String, Undo)| inner.undo(undo, &held.hash);
        let cluster_id = self.transact(change, undo, |_, (cluster_id, _)| cluster_id).await?;
        Ok(Enrolled { agent_id: id, cluster_id, credential, expires_at: held.expires_at })
    }

    /// The next credential; the former ones live for an overlap.
    ///
    /// # Errors
    /// When the agent is not known or the database takes nothing: then the former stays as it was.
    pub async fn rotate(&self, keys: &Keys, id: &str, now: i64) -> Result<(Secret, i64), Refused> {
        let (credential, hash) = mint(keys, "poa")?;
        let held = Held { hash, expires_at: now + CREDENTIAL };
        let change = |inner: &mut Inner| {
            inner.hold(id, held.clone(), now)?;
            let row = &inner.agents.get(id).ok_or_else(|| no_such("agent", id))?.row;
            Ok::<_, Refused>((vec![Change::put(Kind::Agent, id, row)?], ()))
        };
        self.transact(change, |inner, ()| inner.forget_credential(id, &held.hash), |_, ()| ())
            .await?;
        Ok((credential, held.expires_at))
    }
}

/// What takes a registration back that could not be written.
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
    /// Whether Runners have something to hear.
    fn news(&self) -> bool {
        matches!(self, Undo::New { .. } | Undo::Again { changed: true, .. })
    }
}

impl Inner {
    fn register(
        &mut self,
        who: &Who,
        asked: Register,
        held: Held,
        now: i64,
    ) -> Result<(Vec<Change>, String, Undo), Refused> {
        let id = asked.agent.id.clone();
        if let Some(entry) = self.agents.get_mut(&id) {
            let fits = match who {
                Who::Agent(own) => *own == id,
                Who::Enrolment(token) => {
                    self.enrolments.get(token).is_some_and(|t| t.project == entry.row.project)
                }
                Who::Access(_) | Who::Admin(_) | Who::Local => false,
            };
            if !fits {
                return Err(refused(
                    403,
                    "foreign_token",
                    "the token is of another project or agent",
                    None,
                ));
            }
            if entry.row.revoked {
                return Err(refused(
                    403,
                    "agent_revoked",
                    "this agent was revoked",
                    Some("remove it at the control plane, then enrol it again"),
                ));
            }
            if entry.row.info.machine != asked.agent.machine {
                entry.duel_until = now + DUEL;
                return Err(duplicate());
            }
            if entry.duel_until > now {
                return Err(duplicate());
            }
            let row = &entry.row;
            let same = row.info == asked.agent
                && row.cluster == asked.cluster
                && row.capabilities == asked.capabilities
                && row.max_role == asked.max_role;
            (entry.row.info, entry.row.cluster, entry.row.capabilities, entry.row.max_role) =
                (asked.agent, asked.cluster, asked.capabilities, asked.max_role);
            (entry.seen_at, entry.row.seen_at, entry.draining) = (now, now, false);
            let (cluster, changed) = (entry.row.cluster_id.clone(), !same);
            self.hold(&id, held, now)?;
            let row = &self.agents.get(&id).ok_or_else(|| no_such("agent", &id))?.row;
            let change = Change::put(Kind::Agent, &id, row)?;
            return Ok((vec![change], cluster, Undo::Again { id, changed }));
        }
        let Who::Enrolment(token) = who else {
            return Err(refused(
                403,
                "enrolment_needed",
                "a new agent needs an enrolment token",
                Some("make one: pipeops control-plane token create"),
            ));
        };
        let enrolment = self.enrolments.get_mut(token).ok_or_else(|| no_such("token", token))?;
        if enrolment.uses_left == Some(0) {
            return Err(refused(
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
            info: asked.agent,
            cluster: asked.cluster,
            capabilities: asked.capabilities,
            max_role: asked.max_role,
            credentials: vec![held],
            registered_at: now,
            seen_at: now,
            revoked: false,
            online: false,
        };
        let changes = vec![
            Change::put(Kind::Agent, &id, &row)?,
            Change::put(Kind::Enrolment, token, enrolment)?,
        ];
        self.know(Entry::new(row));
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

    /// Adds a credential; the former ones end after the overlap, and those whose time is over are forgotten.
    fn hold(&mut self, id: &str, held: Held, now: i64) -> Result<(), Refused> {
        let entry = self.agents.get_mut(id).ok_or_else(|| no_such("agent", id))?;
        for former in &mut entry.row.credentials {
            former.expires_at = former.expires_at.min(now + OVERLAP);
        }
        let (alive, over): (Vec<Held>, Vec<Held>) =
            entry.row.credentials.drain(..).partition(|c| c.expires_at > now);
        entry.row.credentials = alive;
        // a client that asks in a loop does not fill the row
        while entry.row.credentials.len() > 3 {
            let first = entry.row.credentials.remove(0);
            self.tokens.remove(&first.hash);
        }
        entry.row.credentials.push(held.clone());
        for held in over {
            self.tokens.remove(&held.hash);
        }
        self.tokens.insert(held.hash, (Kind::Agent, id.into()));
        Ok(())
    }

    fn forget_credential(&mut self, id: &str, hash: &str) {
        self.tokens.remove(hash);
        if let Some(entry) = self.agents.get_mut(id) {
            entry.row.credentials.retain(|c| c.hash != hash);
        }
    }
}
