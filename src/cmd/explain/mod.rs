//! `explain`: what a code means, for people. The text stands in `explain.md`, an entry a code.

use std::sync::LazyLock;

use serde_json::json;

use super::Context;
use crate::base::error::{Exit, Failure, nearest};
use crate::base::packed_text::unpacked;
use crate::cli::{Explain, OutputFormat};
use crate::output::Printer;

static TEXT: LazyLock<String> =
    LazyLock::new(|| unpacked(include_bytes!(concat!(env!("OUT_DIR"), "/explain.md.snappy"))));

/// What is known of one code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    code: &'static str,
    /// Lines of 100 characters at most, without the last end of line.
    text: &'static str,
}

impl Entry {
    fn first_sentence(&self) -> String {
        let line = self.text.lines().collect::<Vec<_>>().join(" ");
        line.split_once(". ").map_or(line.clone(), |(first, _)| format!("{first}."))
    }

    fn json(&self) -> serde_json::Value {
        json!({"code": self.code, "text": self.text})
    }
}

/// All entries, in the order of the text: by code, those of operations last.
fn entries() -> impl Iterator<Item = Entry> {
    TEXT.split("\n## ").skip(1).filter_map(|entry| {
        let (code, text) = entry.split_once('\n')?;
        Some(Entry { code, text: text.trim() })
    })
}

/// The entry of a code in any case, with `-` or `_`. `NOT_FOUND` and `not_found` are two codes:
/// what is written exactly so comes first.
fn find(code: &str) -> Option<Entry> {
    let code = code.trim().replace('-', "_");
    entries()
        .find(|entry| entry.code == code)
        .or_else(|| entries().find(|entry| entry.code.eq_ignore_ascii_case(&code)))
}

/// # Errors
/// Exit 2 for a code that does not exist.
pub fn explain(context: &Context, args: &Explain) -> anyhow::Result<Exit> {
    let printer = Printer::new(args.verb.output == OutputFormat::Json, false, context.no_color());
    // nothing is masked: what looks like a password in a URL is a placeholder
    let Some(code) = &args.code else {
        let all: Vec<_> = entries().map(|entry| entry.json()).collect();
        printer.document_with_secrets(&all);
        let width = entries().map(|entry| entry.code.len()).max().unwrap_or(0);
        for entry in entries() {
            let (code, first) = (entry.code, entry.first_sentence());
            printer.data_with_secrets(&format!("{code:width$}  {first}"));
        }
        return Ok(Exit::Done);
    };
    let Some(entry) = find(code) else {
        let near = nearest(&code.replace('-', "_"), entries().map(|entry| entry.code));
        let hint = "`pipeops explain` lists all codes";
        return Err(Failure::usage("CODE_UNKNOWN", format!("there is no code `{code}`"))
            .hint(match near {
                Some(near) => format!("did you mean `{near}`? {hint}"),
                None => hint.to_owned(),
            })
            .into());
    };
    printer.document_with_secrets(&entry.json());
    printer.data_with_secrets(&format!("{}\n\n{}", entry.code, entry.text));
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests;
