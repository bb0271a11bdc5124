//! What the agent counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::follow::RejectedTables;
use crate::selection::v1::refused;

/// Counters of one agent.
pub struct Metrics {
    selections: Family<Outcome, Counter>,
    /// Tables from the file and from connection servers.
    pub rejected_tables: RejectedTables,
    /// Streams that were refused at their greeting.
    pub refused_greetings: Counter,
    /// Messages that are unknown or out of place.
    pub unexpected_messages: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl Metrics {
    /// Registers the counters in `registry`; `rejected_tables` are those that
    /// the follower of the table's file turns down.
    #[must_use]
    pub fn new(registry: &mut Registry, rejected_tables: RejectedTables) -> Self {
        let metrics = Self {
            selections: Family::default(),
            rejected_tables,
            refused_greetings: Counter::default(),
            unexpected_messages: Counter::default(),
        };
        registry.register(
            "portpool_selections",
            "Requests to select a port by outcome",
            metrics.selections.clone(),
        );
        metrics.rejected_tables.register(registry);
        registry.register(
            "portpool_refused_greetings",
            "Connection servers that were refused at their greeting",
            metrics.refused_greetings.clone(),
        );
        registry.register(
            "portpool_unexpected_messages",
            "Messages from connection servers that are unknown or out of place",
            metrics.unexpected_messages.clone(),
        );
        metrics
    }

    /// A request to select a port was answered.
    pub fn selected(&self, refused: Option<refused::Cause>) {
        let outcome = refused.map_or("SELECTED", |cause| cause.as_str_name());
        self.selections.get_or_create(&Outcome { outcome }).inc();
    }
}
