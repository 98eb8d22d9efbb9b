//! What is to be done with a message, and what the control plane's answer means for it: pure, with
//! neither broker nor network.

use serde_json::{Map, Value, json};

use crate::base::order::sort;
use crate::base::text::printable;
use crate::contract::job::{self, Job, answers_exchange};

/// Longest foreign text that is repeated, characters.
const MAX_TEXT: usize = 400;
/// Shortest sealed value that is looked for in messages, bytes.
const MASKED: usize = 8;
/// Codes of this program.
const REPLY_QUEUE_FOREIGN: &str = "reply_queue_foreign";
const SEALED_UNREADABLE: &str = "sealed_unreadable";
const TOKEN_MISSING: &str = "token_missing";

/// A message with what counts of its properties; what is absent is empty.
#[derive(Clone, Default)]
pub(super) struct Message {
    pub(super) body: Vec<u8>,
    /// The token of the job.
    pub(super) token: String,
    pub(super) reply_to: String,
    pub(super) correlation_id: String,
    pub(super) message_id: String,
    /// It, or a copy of it, may have been taken before.
    pub(super) redelivered: bool,
    /// It is an answer, a dead letter or an event of this program, and no job: some exchange is
    /// bound where it must not be.
    pub(super) is_told: bool,
}

/// Why a job is not done, now or later: a stable code, and words without spec and token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: String,
    pub(super) message: String,
    /// The job, where the control plane has found the token genuine, and the message the one that
    /// it is for: what else a token says may name a job of somebody else, whose answer would then
    /// be taken for a copy.
    pub(super) job: Option<String>,
}

impl Refusal {
    fn new(code: &str, message: &str) -> Refusal {
        Refusal { code: code.into(), message: message.into(), job: None }
    }

    pub(super) fn sealed() -> Refusal {
        Refusal::new(
            SEALED_UNREADABLE,
            "something in the job is sealed for another key, another project or another maker",
        )
    }
}

impl From<job::Refusal> for Refusal {
    fn from(refusal: job::Refusal) -> Refusal {
        Refusal::new(refusal.code, &refusal.message)
    }
}

/// Reads a message: nothing of it is believed yet.
///
/// # Errors
/// Why no Runner can do it.
pub(super) fn read(message: &Message, project: &str) -> Result<Job, Refusal> {
    if !is_ours(&message.reply_to, project) {
        let why = "reply_to names a queue that is not one for answers of this project";
        return Err(Refusal::new(REPLY_QUEUE_FOREIGN, why));
    }
    if message.token.is_empty() {
        let why = "the message has no token of a job in its header cloudEvents:pipeopstoken";
        return Err(Refusal::new(TOKEN_MISSING, why));
    }
    Ok(Job::parse(&message.body)?)
}

/// Whether answers may go to a queue: the project's own, or one under its name.
fn is_ours(reply_to: &str, project: &str) -> bool {
    let ours = answers_exchange(project);
    let rest = reply_to.strip_prefix(&ours);
    reply_to.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The queue that an answer goes to; none where the message names one that is not of the project.
pub(super) fn reply_queue(message: &Message, project: &str) -> Option<String> {
    match message.reply_to.as_str() {
        "" => Some(answers_exchange(project)),
        named => is_ours(named, project).then(|| named.to_owned()),
    }
}

/// What an answer of the control plane means for a job.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// What has come of the job so far.
    Taken(Value),
    /// It will not be done: the message is a dead letter.
    Refused(Refusal),
    /// The control plane decides later, for this reason.
    Later(String),
    /// Nobody has answered, or not the control plane.
    Away(String),
    /// The control plane does not know the token of this Runner, or no longer.
    Unauthorized(String),
}

/// Judges an answer: status and body, or why there is none.
pub(super) fn verdict(answer: Result<(u16, Value), String>) -> Verdict {
    let (status, body) = match answer {
        Ok(answer) => answer,
        Err(why) => return Verdict::Away(why),
    };
    let said = |name: &str| short(body[name].as_str().unwrap_or_default());
    let (code, message) = (said("code"), said("message"));
    match status {
        200..=299 if status == 204 || body.is_object() => Verdict::Taken(body),
        // what stands between, as a proxy, has no code, and decides nothing
        _ if code.is_empty() => Verdict::Away(format!("it answers with status {status}")),
        401 => Verdict::Unauthorized(message),
        400..=499 if !matches!(status, 408 | 425 | 429) => {
            let job = Some(said("job")).filter(|job| !job.is_empty());
            Verdict::Refused(Refusal { code, message, job })
        }
        _ => Verdict::Later(format!("{code}: {message}")),
    }
}

/// What is to be done with a job, as the control plane sees it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Its answer is at the broker already.
    Forget,
    /// It has ended: the answer goes out.
    Answer,
    /// The control plane waits for what is sealed in it.
    Open,
    /// The Runner itself brings it to the agent.
    Bring,
    Wait,
}

pub(super) fn next(seen: &Value) -> Next {
    let state = seen["state"].as_str().unwrap_or_default();
    if seen["answered"] == true {
        return Next::Forget;
    }
    match state {
        "sealed" => Next::Open,
        "waiting" | "queued" | "running" if seen["direct"].is_object() => Next::Bring,
        "waiting" | "queued" | "running" => Next::Wait,
        _ => Next::Answer,
    }
}

/// Whether the control plane knows of an operation or a rollout of the job, or has decided.
pub(super) fn has_begun(seen: &Value) -> bool {
    next(seen) != Next::Wait || seen["operation"].is_object() || seen["rollout"].is_object()
}

/// Takes values that were sealed out of all messages below: whoever refuses a value may quote it,
/// and more programs read answers than may know it. Short ones stay, as what they are part of.
pub(super) fn mask(seen: &mut Value, opened: &Value) {
    match seen {
        Value::Object(fields) => {
            for (name, field) in fields {
                match field {
                    Value::String(text) if name == "message" => *text = masked(text, opened),
                    field => mask(field, opened),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| mask(item, opened)),
        _ => {}
    }
}

/// A message without the values that were sealed.
pub(super) fn masked(text: &str, opened: &Value) -> String {
    let values = opened.as_object().into_iter().flat_map(Map::values).filter_map(Value::as_str);
    let mut values: Vec<&str> = values.filter(|value| value.len() >= MASKED).collect();
    // one may be part of another
    sort(&mut values, |a, b| b.len().cmp(&a.len()));
    values.into_iter().fold(text.to_owned(), |text, value| text.replace(value, "[sealed]"))
}

/// The answer to a job that has ended.
pub(super) fn answer(job: &Job, seen: &Value) -> Value {
    let ended = if seen["rollout"].is_object() { &seen["rollout"] } else { &seen["operation"] };
    let mut answer = json!({"job": seen["id"], "state": seen["state"],
        "message": ended["message"].as_str().unwrap_or_default()});
    if let Some(reason) = ended["reason"].as_str().filter(|reason| !reason.is_empty()) {
        answer["reason"] = reason.into();
    }
    if let Some(cluster) = &job.cluster {
        answer["cluster"] = cluster.as_str().into();
    }
    for part in ["operation", "rollout"] {
        if seen[part].is_object() {
            answer[part] = seen[part].clone();
        }
    }
    answer
}

/// The answer to a message that is a dead letter.
pub(super) fn refused_answer(message: &Message, refusal: &Refusal) -> Value {
    let mut answer =
        json!({"state": "refused", "reason": refusal.code, "message": refusal.message});
    if let Some(job) = &refusal.job {
        answer["job"] = job.as_str().into();
    }
    if let Some(cluster) = Job::parse(&message.body).ok().and_then(|job| job.cluster) {
        answer["cluster"] = short(&cluster).into();
    }
    answer
}

/// A dead letter: all that may be said of a message without its spec and its token.
pub(super) fn dead_letter(message: &Message, refusal: &Refusal, at: &str) -> Value {
    let job = Job::parse(&message.body).ok();
    let mut letter = Map::new();
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            letter.insert(name.into(), value.into());
        }
    };
    put("reason", Some(refusal.code.clone()));
    put("message", Some(refusal.message.clone()));
    put("job", refusal.job.clone());
    put("message_id", Some(short(&message.message_id)));
    put("kind", job.as_ref().map(|job| short(&job.kind)));
    put("cluster", job.and_then(|job| job.cluster).map(|cluster| short(&cluster)));
    put("sha256", Some(job::body_digest(&message.body)));
    put("at", Some(at.to_owned()));
    letter.insert("size".into(), message.body.len().into());
    letter.into()
}

/// Text of others as it may stand in a log or a message.
pub(super) fn short(text: &str) -> String {
    printable(text).chars().take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &str =
        r#"{"cluster": "eu", "kind": "restart", "spec": {"planted-in-the-spec": 1}}"#;

    fn message(change: impl FnOnce(&mut Message)) -> Message {
        let mut message = Message {
            body: BODY.into(),
            token: "head.claims.mark".into(),
            message_id: "m-1".into(),
            ..Message::default()
        };
        change(&mut message);
        message
    }

    #[test]
    fn what_no_runner_can_do_is_refused_before_anybody_is_asked() {
        assert_eq!(read(&message(|_| ()), "p").unwrap().cluster.as_deref(), Some("eu"));
        for (change, code) in [
            ((|m| m.token.clear()) as fn(&mut Message), "token_missing"),
            (|m| m.body = b"{".into(), "bad_job"),
            (|m| m.body.clear(), "bad_job"),
            (|m| m.body = vec![0xff; 9], "bad_job"),
            (|m| m.body.resize((1 << 20) + 1, b' '), "bad_job"),
            (|m| m.reply_to = "pipeops.answers.q".into(), "reply_queue_foreign"),
            (|m| m.reply_to = "pipeops.answers.pq".into(), "reply_queue_foreign"),
            (|m| m.reply_to = "amq.rabbitmq.reply-to".into(), "reply_queue_foreign"),
            (|m| m.reply_to = "amq.rabbitmq.reply-to.g1h".into(), "reply_queue_foreign"),
            (|m| m.reply_to = "x.pipeops.answers.p".into(), "reply_queue_foreign"),
        ] {
            let message = message(change);
            let refusal = read(&message, "p").err().unwrap();
            assert_eq!(refusal.code, code, "{}", refusal.message);
            let foreign = code == "reply_queue_foreign";
            assert_eq!(reply_queue(&message, "p").is_none(), foreign, "{}", message.reply_to);
        }
        for (reply_to, queue) in [
            ("", "pipeops.answers.p"),
            ("pipeops.answers.p", "pipeops.answers.p"),
            ("pipeops.answers.p.mine", "pipeops.answers.p.mine"),
        ] {
            let message = message(|m| m.reply_to = reply_to.into());
            assert!(read(&message, "p").is_ok());
            assert_eq!(reply_queue(&message, "p").as_deref(), Some(queue));
        }
    }

    #[test]
    fn an_answer_of_the_control_plane_decides_or_is_asked_for_again() {
        let coded = |code: &str| json!({"code": code, "message": "m"});
        for (status, body, meant) in [
            (202, json!({"id": "j-1", "state": "running"}), "taken"),
            (200, json!({"id": "j-1", "state": "failed"}), "taken"),
            (204, Value::Null, "taken"),
            (200, Value::Null, "away"),
            (200, json!("<html>"), "away"),
            (302, Value::Null, "away"),
            (400, coded("bad_operation"), "bad_operation"),
            (403, coded("token_forged"), "token_forged"),
            (404, coded("not_found"), "not_found"),
            (409, coded("replayed"), "replayed"),
            (409, coded("agent_offline"), "agent_offline"),
            (503, coded("agent_offline"), "later"),
            (503, coded("shutting_down"), "later"),
            (504, coded("agent_silent"), "later"),
            (429, coded("queue_full"), "later"),
            (408, coded("slow"), "later"),
            (500, Value::Null, "away"),
            // of a proxy between
            (403, Value::Null, "away"),
            (404, json!({"error": "no route"}), "away"),
            (401, Value::Null, "away"),
            (401, coded("token_unknown"), "unauthorized"),
        ] {
            let shown = format!("{status} {body}");
            let found = match verdict(Ok((status, body))) {
                Verdict::Taken(_) => "taken".to_owned(),
                Verdict::Refused(refusal) => refusal.code,
                Verdict::Later(_) => "later".into(),
                Verdict::Away(_) => "away".into(),
                Verdict::Unauthorized(_) => "unauthorized".into(),
            };
            assert_eq!(found, meant, "{shown}");
        }
        assert_eq!(verdict(Err("refused".into())), Verdict::Away("refused".into()));
    }

    #[test]
    fn what_has_come_of_a_job_says_what_is_next() {
        for (seen, expected) in [
            (json!({"state": "running"}), Next::Wait),
            (json!({"state": "sealed", "sealed": true, "maker": "r-1"}), Next::Open),
            (json!({"state": "queued"}), Next::Wait),
            (json!({"state": "running", "direct": {}}), Next::Bring),
            (json!({"state": "succeeded", "direct": {}}), Next::Answer),
            (json!({"state": "succeeded", "answered": false}), Next::Answer),
            (json!({"state": "interrupted"}), Next::Answer),
            // somebody has to decide, and others wait behind it
            (json!({"state": "paused"}), Next::Answer),
            (json!({"state": "succeeded", "answered": true}), Next::Forget),
            (json!({"state": "running", "answered": true, "direct": {}}), Next::Forget),
        ] {
            assert_eq!(next(&seen), expected, "{seen}");
        }
    }

    #[test]
    fn what_was_sealed_is_in_no_message_and_everything_else_stays() {
        // the second one begins like the first
        let one = "planted-canary-4711-in-plain-text";
        let other = format!("{one}-too");
        let opened = json!({"a": one, "b": other, "c": "short", "d": "succeeded"});
        let seen = |first: &str, second: &str| {
            let object = json!({"name": one, "message": second});
            json!({"state": "succeeded", "operation": {"message": first, "objects": [object]}})
        };
        let mut told = seen(&format!("no {other}, short"), &format!("\"{one}\""));
        mask(&mut told, &opened);
        assert_eq!(told, seen("no [sealed], short", "\"[sealed]\""));
        assert_eq!(masked(one, &Value::Null), one);
        for (seen, begun) in [
            (json!({"state": "running"}), false),
            (json!({"state": "running", "operation": {}}), true),
            (json!({"state": "running", "rollout": {}}), true),
            (json!({"state": "interrupted"}), true),
        ] {
            assert_eq!(has_begun(&seen), begun, "{seen}");
        }
    }

    #[test]
    fn an_answer_has_what_has_come_of_the_operation_or_the_rollout() {
        let job = Job::parse(BODY.as_bytes()).unwrap();
        let seen = json!({"id": "j-1", "state": "failed", "answered": false,
            "operation": {"id": "o-1", "reason": "crash_loop", "message": "exits with 1"}});
        let expected = json!({"job": "j-1", "state": "failed", "message": "exits with 1",
            "reason": "crash_loop", "cluster": "eu", "operation": seen["operation"]});
        assert_eq!(answer(&job, &seen), expected);
        let many = Job::parse(br#"{"all": true, "kind": "restart", "spec": {}}"#).unwrap();
        let seen = json!({"id": "j-2", "state": "succeeded",
            "rollout": {"id": "ro-1", "message": "200 of 200"}});
        let expected = json!({"job": "j-2", "state": "succeeded", "message": "200 of 200",
            "rollout": seen["rollout"]});
        assert_eq!(answer(&many, &seen), expected);
    }

    #[test]
    fn a_dead_letter_has_neither_spec_nor_token_and_a_forged_one_names_no_job() {
        let refused = |status, body: Value| match verdict(Ok((status, body))) {
            Verdict::Refused(refusal) => refusal,
            other => panic!("{other:?}"),
        };
        let expired = json!({"code": "token_expired", "message": "no\u{1b}", "job": "j-1"});
        let expired = refused(403, expired);
        let message = message(|_| ());
        let letter = dead_letter(&message, &expired, "now");
        let expected = json!({"reason": "token_expired", "message": "no\\u{1b}", "job": "j-1",
            "message_id": "m-1", "kind": "restart", "cluster": "eu",
            "sha256": job::body_digest(BODY.as_bytes()), "at": "now", "size": BODY.len()});
        assert_eq!(letter, expected);
        assert!(!letter.to_string().contains("planted-in-the-spec"));
        assert!(!letter.to_string().contains(&message.token));
        let answer = refused_answer(&message, &expired);
        assert_eq!((&answer["job"], &answer["state"]), (&json!("j-1"), &json!("refused")));
        for refusal in [
            refused(403, json!({"code": "token_forged", "message": "no"})),
            refused(413, json!({"code": "too_large", "message": "no", "job": ""})),
            Refusal::sealed(),
        ] {
            assert_eq!(dead_letter(&message, &refusal, "now")["job"], Value::Null);
            assert_eq!(refused_answer(&message, &refusal)["job"], Value::Null);
        }
        let unread = Message { body: vec![0xff], ..Message::default() };
        let letter = dead_letter(&unread, &read(&unread, "p").err().unwrap(), "now");
        assert_eq!((&letter["size"], &letter["kind"]), (&json!(1), &Value::Null));
    }
}
