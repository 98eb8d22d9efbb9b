//! Metrics as Prometheus reads them: its text format 0.0.4 (prometheus/docs
//! `docs/instrumenting/exposition_formats.md`).
//!
//! Values are snapshots, read when somebody asks. The crate `prometheus-client` writes OpenMetrics,
//! in which the `# TYPE` line of a counter lacks its `_total`: that would rename what dashboards
//! and tests know.

use std::fmt::{Display, Write as _};

/// The `Content-Type` of this format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// Names and values of labels. Names are `[a-zA-Z_][a-zA-Z0-9_]*`; values are any text.
pub type Labels<'a> = &'a [(&'static str, &'a str)];

/// A text of metrics. All samples of one name are written one after the other, as the format
/// demands.
#[derive(Debug, Default)]
pub struct MetricsText {
    text: String,
    last: &'static str,
}

impl MetricsText {
    /// A value that goes up and down.
    pub fn gauge(&mut self, name: &'static str, labels: Labels, value: impl Display) {
        self.sample(name, "gauge", labels, value);
    }

    /// A value that only grows while the process lives; its name ends in `_total`.
    pub fn counter(&mut self, name: &'static str, labels: Labels, value: impl Display) {
        debug_assert!(name.ends_with("_total"), "{name}");
        self.sample(name, "counter", labels, value);
    }

    fn sample(&mut self, name: &'static str, kind: &str, labels: Labels, value: impl Display) {
        let text = &mut self.text;
        if self.last != name {
            self.last = name;
            let _ = writeln!(text, "# TYPE {name} {kind}");
        }
        text.push_str(name);
        for (i, (label, value)) in labels.iter().enumerate() {
            text.push(if i == 0 { '{' } else { ',' });
            let _ = write!(text, "{label}=\"");
            for c in value.chars() {
                match c {
                    '\\' => text.push_str("\\\\"),
                    '"' => text.push_str("\\\""),
                    '\n' => text.push_str("\\n"),
                    c => text.push(c),
                }
            }
            text.push('"');
        }
        if !labels.is_empty() {
            text.push('}');
        }
        let _ = writeln!(text, " {value}");
    }

    pub fn into_string(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_type_line_and_label_values_are_escaped() {
        let mut metrics = MetricsText::default();
        metrics.gauge("agents", &[("state", "on\"line\\\n"), ("zone", "é")], 2);
        metrics.gauge("agents", &[("state", "offline")], 0);
        metrics.counter("requests_total", &[], 7_u64);
        assert_eq!(
            metrics.into_string(),
            "# TYPE agents gauge\n\
             agents{state=\"on\\\"line\\\\\\n\",zone=\"é\"} 2\n\
             agents{state=\"offline\"} 0\n\
             # TYPE requests_total counter\n\
             requests_total 7\n"
        );
    }
}
