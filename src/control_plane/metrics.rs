//! Metrics for Prometheus.

use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;

use super::state::ControlPlane;

impl ControlPlane {
    /// Prometheus text.
    pub(super) fn metrics(&self, now: i64) -> String {
        let mut text = String::from("# TYPE pipeops_agents gauge\n");
        for (state, count) in self.registry().count_by_liveness(now) {
            let _ = writeln!(text, "pipeops_agents{{state=\"{state}\"}} {count}");
        }
        let requests = self.inner.requests.load(Relaxed);
        if let Some(tunnels) = self.inner.frps.tunnels() {
            let _ = writeln!(text, "# TYPE pipeops_tunnels gauge\npipeops_tunnels {tunnels}");
        }
        let _ = writeln!(
            text,
            "# TYPE pipeops_requests_total counter\npipeops_requests_total {requests}"
        );
        if let Some(broker_status) = &self.inner.broker_status {
            let _ = writeln!(
                text,
                "# TYPE pipeops_broker_up gauge\npipeops_broker_up {}",
                u8::from(broker_status.down().is_none())
            );
            for (name, kind, value) in [
                ("pipeops_events_waiting", "gauge", broker_status.waiting.load(Relaxed)),
                (
                    "pipeops_events_sent_total",
                    "counter",
                    broker_status.sent.load(Relaxed).cast_signed(),
                ),
                (
                    "pipeops_events_dropped_total",
                    "counter",
                    broker_status.dropped.load(Relaxed).cast_signed(),
                ),
            ] {
                let _ = writeln!(text, "# TYPE {name} {kind}\n{name} {value}");
            }
        }
        text
    }
}
