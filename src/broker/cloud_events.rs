//! What a message says of itself: the attributes of CloudEvents 1.0, in the headers of the message
//! (binary mode of the AMQP binding, cloudevents/spec v1.0.2, `bindings/amqp-protocol-binding.md`
//! §3.1). The body stays what it is, and its content type stands in the property of that name.

use lapin::types::{AMQPValue, FieldTable};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// Both are allowed before a name, and a reader takes both (§3.1.3.1).
const PREFIXES: [&str; 2] = ["cloudEvents:", "cloudEvents_"];
/// What stands before the type of each message.
const TYPE: &str = "io.pipeops.";
/// A name in the path of a URI, RFC 3986 §2.3.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The attributes of a message.
pub struct CloudEvent<'a> {
    /// The same on every attempt: with the project it tells a copy from something new.
    pub id: &'a str,
    /// What follows `io.pipeops.` in its type: `job`, `agent.online`, …
    pub kind: &'a str,
    pub project: &'a str,
    /// What it is about, a cluster or a job; left out where it is empty.
    pub subject: &'a str,
    /// RFC 3339.
    pub time: &'a str,
}

impl CloudEvent<'_> {
    /// The headers of the message.
    pub fn headers(&self) -> FieldTable {
        let mut headers = FieldTable::default();
        let source = format!("/projects/{}", utf8_percent_encode(self.project, SEGMENT));
        let kind = format!("{TYPE}{}", self.kind);
        for (name, value) in [
            ("specversion", "1.0"),
            ("id", self.id),
            ("source", &source),
            ("type", &kind),
            ("subject", self.subject),
            ("time", self.time),
        ] {
            // an attribute that has no value is one that is not there
            if !value.is_empty() {
                let name = format!("{}{name}", PREFIXES[0]);
                headers.insert(name.into(), AMQPValue::LongString(value.into()));
            }
        }
        headers
    }
}

/// The text of an attribute of a message that came; none where it has none, or one that is no text.
pub fn attribute<'a>(headers: &'a FieldTable, name: &str) -> Option<&'a str> {
    let found = |prefix: &str| headers.inner().get(format!("{prefix}{name}").as_str());
    match PREFIXES.iter().find_map(|prefix| found(prefix))? {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_what_it_is_and_one_of_others_is_read_with_either_sign() {
        let event = CloudEvent {
            id: "m-1",
            kind: "agent.online",
            project: "über us",
            subject: "",
            time: "2026-11-28T02:00:00Z",
        };
        let headers = event.headers();
        for (name, value) in [
            ("specversion", Some("1.0")),
            ("id", Some("m-1")),
            ("type", Some("io.pipeops.agent.online")),
            ("source", Some("/projects/%C3%BCber%20us")),
            ("time", Some("2026-11-28T02:00:00Z")),
            ("subject", None),
            ("datacontenttype", None),
        ] {
            assert_eq!(attribute(&headers, name), value, "{name}");
        }
        let mut other = FieldTable::default();
        other.insert("cloudEvents_id".into(), AMQPValue::ShortString("m-2".into()));
        other.insert("cloudEvents:type".into(), AMQPValue::LongLongInt(7));
        other.insert("cloudEvents:subject".into(), AMQPValue::LongString("\u{feff}".into()));
        assert_eq!(attribute(&other, "id"), Some("m-2"));
        assert_eq!(attribute(&other, "type"), None);
        let broken = AMQPValue::LongString(vec![0xff, 0xfe].into());
        other.insert("cloudEvents:source".into(), broken);
        assert_eq!(attribute(&other, "source"), None);
    }
}
