//! What the connection server counts. No label holds anything that a client
//! chose.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::admin::register;

/// Counters of one connection server.
pub struct Metrics {
    allocations: Family<Outcome, Counter>,
    allocation_seconds: Histogram,
    not_selected: Family<Cause, Counter>,
    ended: Family<Cause, Counter>,
    requests_refused: Family<Cause, Counter>,
    /// Messages from agents that this version does not know.
    pub unknown_messages: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

impl Metrics {
    /// Registers the counters in `registry`.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        // 100 µs to 3.3 s, then waiting requests up to their limit.
        let buckets = (0..16)
            .map(|power| 0.0001 * f64::from(1 << power))
            .chain([30.0, 300.0]);
        let allocation_seconds = Histogram::new(buckets);
        registry.register_with_unit(
            "portpool_allocation_duration",
            "Time from request to answer, waiting included",
            Unit::Seconds,
            allocation_seconds.clone(),
        );
        Self {
            allocation_seconds,
            allocations: register(
                registry,
                "portpool_allocations",
                "Requests for a session by outcome",
            ),
            not_selected: register(
                registry,
                "portpool_selections_failed",
                "Processing servers that were asked and did not select a port, by cause",
            ),
            ended: register(
                registry,
                "portpool_sessions_ended",
                "Sessions ended by agents, by cause",
            ),
            requests_refused: register(
                registry,
                "portpool_requests_refused",
                "Requests to the load-sharing and admin ports that got a problem, by its name",
            ),
            unknown_messages: register(
                registry,
                "portpool_unknown_messages",
                "Messages from agents that this version does not know",
            ),
        }
    }

    /// A request was answered with `outcome` after `took`.
    pub fn allocated(&self, outcome: &'static str, took: Duration) {
        self.allocations.get_or_create(&Outcome { outcome }).inc();
        self.allocation_seconds.observe(took.as_secs_f64());
    }

    /// A server that was asked did not select a port.
    pub fn not_selected(&self, cause: &'static str) {
        self.not_selected.get_or_create(&Cause { cause }).inc();
    }

    /// A request got the problem named `cause`.
    pub fn request_refused(&self, cause: &'static str) {
        self.requests_refused.get_or_create(&Cause { cause }).inc();
    }

    /// An agent ended a session.
    pub fn session_ended(&self, cause: &'static str) {
        self.ended.get_or_create(&Cause { cause }).inc();
    }
}
