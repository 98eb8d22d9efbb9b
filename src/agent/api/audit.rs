//! The audit log: one record a line, each with its own hash and that of the record before it.

use std::io;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::base::encoding::hex;
use crate::base::json;
use crate::base::text::json_error;
use crate::contract::types::AuditHead;
use crate::host::state::{Appender, StateDir};

/// The file that records are appended to.
const CURRENT: &str = "audit.jsonl";
/// It is rotated at this size, bytes; the chain of hashes continues in the next file.
const MAX_SIZE: u64 = 16 << 20;
/// Rotated files that are kept.
const MAX_ROTATED: usize = 8;
/// The hash before the first record.
const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Which part of a request a record describes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Before a request that changes something, or an upgrade, is sent on.
    Start,
    End,
    /// The one record of any other request.
    #[default]
    Call,
}

/// Who asked for what, and the result. Never a body, never a query.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct AuditRecord {
    pub phase: Phase,
    pub request: String,
    pub subject: String,
    pub role: String,
    /// Whose namespaces the token is for; empty where it is for those of everybody.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tenant: String,
    pub token: String,
    pub method: String,
    pub path: String,
    pub verdict: String,
    pub status: u16,
    pub duration_ms: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

#[derive(Serialize, Deserialize)]
struct AuditLine {
    seq: u64,
    at: String,
    prev: String,
    #[serde(flatten)]
    record: AuditRecord,
}

/// The log, open for writing.
pub struct AuditLog {
    dir: StateDir,
    file: Appender,
    head: AuditHead,
}

fn digest(line: &str) -> String {
    hex(&Sha256::digest(line))
}

/// What separates a record from its own hash at the end of a line.
const SEAL: &str = ",\"hash\":\"";

/// A record with its hash as the last field.
fn seal(record: &str) -> (String, String) {
    let hash = digest(record);
    (format!("{}{SEAL}{hash}\"}}", &record[..record.len() - 1]), hash)
}

/// The hash of a line, if it is the right one.
fn verify_seal(line: &str) -> Option<String> {
    let (record, hash) = line.rsplit_once(SEAL)?;
    let hash = hash.strip_suffix("\"}")?;
    (digest(&format!("{record}}}")) == hash).then(|| hash.to_owned())
}

impl AuditLog {
    /// Opens the log and finds its head. A last line that a crash cut off is removed: no request
    /// was sent on because of it.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub fn open(dir: StateDir) -> anyhow::Result<AuditLog> {
        let mut head = AuditHead { seq: 0, hash: GENESIS.into() };
        let newest = match dir.last_line(CURRENT)? {
            None => {
                rotated_files(&dir).last().map(|name| dir.last_line(name)).transpose()?.flatten()
            }
            found => found,
        };
        if let Some(line) = newest {
            let seq = serde_json::from_str::<Value>(&line)
                .ok()
                .and_then(|v| v["seq"].as_u64())
                .unwrap_or(0);
            // a changed record is no reason to stop recording: `verify` names it
            head = AuditHead { seq, hash: verify_seal(&line).unwrap_or_else(|| digest(&line)) };
        }
        let file = dir.appender(CURRENT)?;
        Ok(AuditLog { dir, file, head })
    }

    /// Appends a record.
    ///
    /// # Errors
    /// Errors of the file system; the log is then as it was before.
    pub fn write(&mut self, record: AuditRecord) -> io::Result<()> {
        if self.file.size() >= MAX_SIZE {
            self.rotate().map_err(|e| io::Error::other(format!("{e:#}")))?;
        }
        let seq = self.head.seq + 1;
        let line = AuditLine {
            seq,
            at: jiff::Timestamp::now().to_string(),
            prev: self.head.hash.clone(),
            record,
        };
        let (text, hash) = seal(&serde_json::to_string(&line)?);
        self.file.append_line(&text)?;
        self.head = AuditHead { seq, hash };
        Ok(())
    }

    fn rotate(&mut self) -> anyhow::Result<()> {
        self.dir.rename(CURRENT, &format!("audit-{:016}.jsonl", self.head.seq))?;
        self.file = self.dir.appender(CURRENT)?;
        let old = rotated_files(&self.dir);
        for name in old.iter().take(old.len().saturating_sub(MAX_ROTATED)) {
            self.dir.remove(name);
        }
        Ok(())
    }

    /// The last `most` records of the current file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn recent(&self, max: usize) -> anyhow::Result<Vec<String>> {
        let mut lines = self.dir.last_lines(CURRENT)?;
        Ok(lines.split_off(lines.len().saturating_sub(max)))
    }

    pub fn head(&self) -> &AuditHead {
        &self.head
    }
}

fn rotated_files(dir: &StateDir) -> Vec<String> {
    dir.list().into_iter().filter(|n| n.starts_with("audit-")).collect()
}

/// A log whose chain is intact.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VerifiedLog {
    pub records: u64,
    /// Number of the first record that is still kept.
    pub first: u64,
    pub head: AuditHead,
}

/// Verifies the whole log.
///
/// # Errors
/// The file and line where the chain breaks, and how.
pub fn verify(dir: &StateDir) -> Result<VerifiedLog, String> {
    let mut found =
        VerifiedLog { records: 0, first: 0, head: AuditHead { seq: 0, hash: GENESIS.into() } };
    for (n, name, line) in lines(dir)? {
        let broken = |why: &str| format!("{name}, line {n}: {why}");
        let parsed: AuditLine =
            json::read(&line).map_err(|e| broken(&format!("no record: {}", json_error(&e))))?;
        if found.records == 0 {
            found.first = parsed.seq;
            if parsed.seq == 1 && parsed.prev != GENESIS {
                return Err(broken("the first record does not begin the chain"));
            }
        } else if parsed.prev != found.head.hash {
            return Err(broken("the record before it was changed or removed"));
        } else if parsed.seq != found.head.seq + 1 {
            return Err(broken("records are missing before it"));
        }
        let hash = verify_seal(&line).ok_or_else(|| broken("the record was changed"))?;
        found.records += 1;
        found.head = AuditHead { seq: parsed.seq, hash };
    }
    Ok(found)
}

/// The last `most` records as they are in the log.
///
/// # Errors
/// When a file cannot be read.
pub fn tail(dir: &StateDir, max: usize) -> Result<Vec<String>, String> {
    let all = lines(dir)?;
    Ok(all.into_iter().rev().take(max).map(|(_, _, line)| line).rev().collect())
}

fn lines(dir: &StateDir) -> Result<Vec<(usize, String, String)>, String> {
    let mut all = Vec::new();
    for name in rotated_files(dir).into_iter().chain([CURRENT.to_owned()]) {
        let text = dir.read(&name).map_err(|e| format!("{e:#}"))?.unwrap_or_default();
        all.extend(
            text.lines().enumerate().map(|(n, line)| (n + 1, name.clone(), line.to_owned())),
        );
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;

    fn record(n: u64) -> AuditRecord {
        AuditRecord {
            phase: Phase::Call,
            request: n.to_string(),
            subject: "r".into(),
            role: "viewer".into(),
            tenant: if n.is_multiple_of(2) { String::new() } else { "acme".into() },
            token: "t".into(),
            method: "GET".into(),
            path: "/api".into(),
            verdict: "allowed".into(),
            status: 200,
            duration_ms: 1,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    #[test]
    fn one_flipped_byte_is_found_and_a_cut_line_is_not_taken_for_one() {
        let root = tempfile::tempdir().unwrap();
        let dir = Host::new(root.path(), None).state_dir("/audit").unwrap();
        let mut audit = AuditLog::open(dir.clone()).unwrap();
        for n in 0..20 {
            audit.write(record(n)).unwrap();
        }
        let head = audit.head().clone();
        drop(audit);
        assert_eq!(verify(&dir).unwrap(), VerifiedLog { records: 20, first: 1, head });
        let good = dir.read(CURRENT).unwrap().unwrap();
        // killed in the middle of a line
        dir.write(CURRENT, &good[..good.len() - 30]).unwrap();
        let mut audit = AuditLog::open(dir.clone()).unwrap();
        audit.write(record(99)).unwrap();
        assert_eq!(verify(&dir).unwrap().records, 20);
        let mut bytes = good.clone().into_bytes();
        let at = good.find("\"request\":\"7\"").unwrap() + 11;
        bytes[at] = b'8';
        dir.write(CURRENT, &String::from_utf8(bytes).unwrap()).unwrap();
        assert!(verify(&dir).unwrap_err().contains("line 8: the record was changed"));
        let without: Vec<&str> =
            good.lines().enumerate().filter(|(n, _)| *n != 4).map(|(_, l)| l).collect();
        dir.write(CURRENT, &(without.join("\n") + "\n")).unwrap();
        assert!(verify(&dir).is_err());
    }
}
