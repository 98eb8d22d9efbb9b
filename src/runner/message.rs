//! Messages as they come, and as they go on to a partition.

use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable};

use super::judge::Message;
use crate::broker::cloud_events::attribute;

/// Headers of a message on its way through a partition; the token is read there from others too.
const TOKEN: &str = "pipeops-token";
const REDELIVERED: &str = "pipeops-redelivered";
/// The attribute of CloudEvents that has the token of a job.
const TOKEN_ATTRIBUTE: &str = "pipeopstoken";
/// Types of what this program publishes begin so; one of them is a job.
const OWN_TYPES: &str = "io.pipeops.";
const JOB_TYPE: &str = "io.pipeops.job";

/// What counts of a delivery; its body is moved. Where others publish, what headers say of former
/// deliveries is theirs, and not `is_ours`: it would hide that an answered job comes again.
pub(super) fn message_of(delivery: &mut Delivery, is_ours: bool) -> Message {
    let empty = FieldTable::default();
    let properties = &delivery.properties;
    let headers = properties.headers().as_ref().unwrap_or(&empty);
    let text = |value: &Option<lapin::types::ShortString>| {
        value.as_ref().map(|value| value.as_str().to_owned()).unwrap_or_default()
    };
    let token =
        attribute(headers, TOKEN_ATTRIBUTE).or_else(|| match headers.inner().get(TOKEN)? {
            AMQPValue::LongString(token) => std::str::from_utf8(token.as_bytes()).ok(),
            _ => None,
        });
    let kind = attribute(headers, "type").unwrap_or_default();
    // a quorum queue counts deliveries in a header, also where the broker has restarted
    let counted = headers.inner().get("x-delivery-count");
    let counted = counted.is_some_and(|count| !is_zero(count));
    let marked = headers.inner().get(REDELIVERED) == Some(&AMQPValue::Boolean(true));
    Message {
        token: token.unwrap_or_default().to_owned(),
        reply_to: text(properties.reply_to()),
        correlation_id: text(properties.correlation_id()),
        message_id: text(properties.message_id()),
        redelivered: delivery.redelivered || (is_ours && (counted || marked)),
        is_told: kind != JOB_TYPE && kind.starts_with(OWN_TYPES),
        body: std::mem::take(&mut delivery.data),
    }
}

fn is_zero(value: &AMQPValue) -> bool {
    use AMQPValue::{
        LongInt, LongLongInt, LongUInt, ShortInt, ShortShortInt, ShortShortUInt, ShortUInt,
    };
    matches!(
        value,
        LongLongInt(0)
            | LongInt(0)
            | LongUInt(0)
            | ShortInt(0)
            | ShortUInt(0)
            | ShortShortInt(0)
            | ShortShortUInt(0)
    )
}

/// A message on its way to a partition. Nothing else of its headers and properties goes on: `CC`
/// would send it to other partitions too, `user-id` have the broker close the channel, an
/// expiration lose it without a word.
pub(super) fn forwarded(message: &Message) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert(TOKEN.into(), AMQPValue::LongString(message.token.as_str().into()));
    headers.insert(REDELIVERED.into(), AMQPValue::Boolean(message.redelivered));
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_content_type("application/json".into())
        .with_reply_to(message.reply_to.as_str().into())
        .with_correlation_id(message.correlation_id.as_str().into())
        .with_message_id(message.message_id.as_str().into())
        .with_headers(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_goes_on_with_what_counts_of_it_and_nothing_else() {
        let mut headers = FieldTable::default();
        headers.insert("cloudEvents:pipeopstoken".into(), AMQPValue::LongString("a.b.c".into()));
        headers.insert("CC".into(), AMQPValue::LongString("3".into()));
        let delivery = |headers: FieldTable, redelivered| {
            let mut delivery =
                Delivery::mock(1, "".into(), "".into(), redelivered, b"body".to_vec());
            delivery.properties = BasicProperties::default()
                .with_reply_to("r".into())
                .with_correlation_id("c".into())
                .with_message_id("m".into())
                .with_user_id("guest".into())
                .with_expiration("1".into())
                .with_headers(headers);
            delivery
        };
        let message = message_of(&mut delivery(headers, false), false);
        assert_eq!((message.token.as_str(), message.redelivered), ("a.b.c", false));
        assert_eq!((message.reply_to.as_str(), &message.body[..]), ("r", &b"body"[..]));
        let on = forwarded(&message);
        assert_eq!((on.user_id(), on.expiration()), (&None, &None));
        assert_eq!(on.headers().as_ref().unwrap().inner().len(), 2);
        let again = message_of(&mut delivery(on.headers().clone().unwrap(), false), true);
        assert_eq!((again.token.as_str(), again.redelivered), ("a.b.c", false));
        for (name, value, redelivered) in [
            ("x-delivery-count", AMQPValue::LongLongInt(0), false),
            ("x-delivery-count", AMQPValue::LongLongInt(1), true),
            (REDELIVERED, AMQPValue::Boolean(true), true),
            (REDELIVERED, AMQPValue::LongString("true".into()), false),
        ] {
            let mut headers = FieldTable::default();
            headers.insert(name.into(), value);
            let message = message_of(&mut delivery(headers.clone(), false), true);
            assert_eq!(message.redelivered, redelivered, "{name}");
            // of a publisher
            assert!(!message_of(&mut delivery(headers.clone(), false), false).redelivered);
            assert!(message_of(&mut delivery(headers, true), false).redelivered);
        }
        for (kind, is_told) in [
            ("io.pipeops.job", false),
            ("io.pipeops.job.answer", true),
            ("io.pipeops.job.dead", true),
            ("io.pipeops.agent.online", true),
            ("com.example.job", false),
        ] {
            let mut headers = FieldTable::default();
            headers.insert("cloudEvents:type".into(), AMQPValue::LongString(kind.into()));
            let message = message_of(&mut delivery(headers, false), false);
            assert_eq!(message.is_told, is_told, "{kind}");
        }
    }
}
