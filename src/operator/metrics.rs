//! The metrics of the controller.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::admin::register;

/// The label of a reconcile: how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Outcome {
    /// `ok`, `blocked` or `error`.
    pub(super) outcome: &'static str,
}

/// The label of a request that writes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Write {
    /// `apply`, `create`, `delete` or `status`.
    pub(super) verb: &'static str,
}

pub(super) struct Metrics {
    pub(super) leader: Gauge,
    pub(super) reconciles: Family<Outcome, Counter>,
    pub(super) writes: Family<Write, Counter>,
    /// Seconds from the start of a reconcile to its end.
    pub(super) duration: Histogram,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let leader = register(registry, "portpool_leader", "1 while this controller leads");
        let reconciles = register(registry, "portpool_reconciles", "Reconciles by outcome");
        let writes = register(registry, "portpool_api_writes", "Writes to the API server");
        // A histogram has no default.
        let duration = Histogram::new(exponential_buckets(0.001, 4.0, 8));
        registry.register(
            "portpool_reconcile_duration_seconds",
            "Time of a reconcile",
            duration.clone(),
        );
        Self {
            leader,
            reconciles,
            writes,
            duration,
        }
    }

    pub(super) fn wrote(&self, verb: &'static str) {
        self.writes.get_or_create(&Write { verb }).inc();
    }
}
