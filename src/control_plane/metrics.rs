//! Metrics for Prometheus.

use std::sync::atomic::Ordering::Relaxed;

use super::state::ControlPlane;
use crate::base::metrics::MetricsText;

impl ControlPlane {
    /// Prometheus text.
    pub(super) fn metrics(&self, now: i64) -> String {
        let mut metrics = MetricsText::default();
        for (state, count) in self.registry().count_by_liveness(now) {
            metrics.gauge("pipeops_agents", &[("state", state)], count);
        }
        if let Some(tunnels) = self.inner.frps.tunnels() {
            metrics.gauge("pipeops_tunnels", &[], tunnels);
        }
        metrics.counter("pipeops_requests_total", &[], self.inner.requests.load(Relaxed));
        if let Some(broker) = &self.inner.broker_status {
            metrics.gauge("pipeops_broker_up", &[], u8::from(broker.down().is_none()));
            metrics.gauge("pipeops_events_waiting", &[], broker.waiting.load(Relaxed));
            metrics.counter("pipeops_events_sent_total", &[], broker.sent.load(Relaxed));
            metrics.counter("pipeops_events_dropped_total", &[], broker.dropped.load(Relaxed));
        }
        metrics.into_string()
    }
}
