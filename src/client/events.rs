//! Server-sent events (WHATWG HTML §9.2), as far as a stream of this project uses them.

/// Longest event, bytes; one of an operation holds 20 lines of a log at most.
const MAX_EVENT: usize = 1 << 20;

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) id: Option<String>,
    pub(super) name: String,
    pub(super) data: String,
}

/// Reads events out of pieces of a stream, wherever it is cut.
#[derive(Default)]
pub(super) struct EventReader {
    rest: Vec<u8>,
}

impl EventReader {
    /// The events that end in this piece.
    ///
    /// # Errors
    /// An event that is longer than 1 MiB.
    pub(super) fn read(&mut self, piece: &[u8]) -> Result<Vec<Event>, &'static str> {
        self.rest.extend_from_slice(piece);
        let mut events = Vec::new();
        while let Some(end) = self.rest.windows(2).position(|two| two == b"\n\n") {
            let block: Vec<u8> = self.rest.drain(..end + 2).collect();
            events.extend(parse(&String::from_utf8_lossy(&block)));
        }
        if self.rest.len() > MAX_EVENT { Err("an event is longer than 1 MiB") } else { Ok(events) }
    }
}

/// None for a comment, which only shows that the stream lives.
fn parse(block: &str) -> Option<Event> {
    let mut event = Event::default();
    for line in block.lines() {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => event.id = Some(value.to_owned()),
            "event" => value.clone_into(&mut event.name),
            "data" => event.data.push_str(value),
            _ => {}
        }
    }
    (!event.data.is_empty()).then_some(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_wherever_the_stream_is_cut() {
        let text =
            ": quiet\n\nid: 1\nevent: step\ndata: {\"a\": \"ü\"}\n\nevent: end\ndata: {}\n\n";
        let event = |id: Option<&str>, name: &str, data: &str| Event {
            id: id.map(str::to_owned),
            name: name.into(),
            data: data.into(),
        };
        let wanted = [event(Some("1"), "step", "{\"a\": \"ü\"}"), event(None, "end", "{}")];
        for size in 1..text.len() {
            let mut reader = EventReader::default();
            let mut found = Vec::new();
            for piece in text.as_bytes().chunks(size) {
                found.extend(reader.read(piece).unwrap());
            }
            assert_eq!(found, wanted, "in pieces of {size}");
        }
        let mut reader = EventReader::default();
        assert!(reader.read(&vec![b'x'; MAX_EVENT + 1]).is_err());
    }
}
