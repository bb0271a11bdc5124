//! The metrics of the controller.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

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
    pub(super) duration: Histogram,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            leader: Gauge::default(),
            reconciles: Family::default(),
            writes: Family::default(),
            duration: Histogram::new(exponential_buckets(0.001, 4.0, 8)),
        };
        registry.register(
            "portpool_leader",
            "1 while this controller leads",
            metrics.leader.clone(),
        );
        registry.register(
            "portpool_reconciles",
            "Reconciles by outcome",
            metrics.reconciles.clone(),
        );
        registry.register(
            "portpool_api_writes",
            "Writes to the API server",
            metrics.writes.clone(),
        );
        registry.register(
            "portpool_reconcile_duration_seconds",
            "Time of a reconcile",
            metrics.duration.clone(),
        );
        metrics
    }

    pub(super) fn wrote(&self, verb: &'static str) {
        self.writes.get_or_create(&Write { verb }).inc();
    }
}
