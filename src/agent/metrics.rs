//! The agent's counters.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::admin::register;
use crate::follow::RejectedTables;
use crate::selection::{FromAgent, RefusalCause};

/// Counters of one agent.
pub struct Metrics {
    selections: Family<Outcome, Counter>,
    /// Tables from the file and from connection servers.
    pub rejected_tables: RejectedTables,
    /// Streams that were refused at their greeting.
    pub refused_greetings: Counter,
    /// Messages that are unknown or out of place.
    pub unexpected_messages: Counter,
    refused_requests: Family<Cause, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
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
        rejected_tables.register(registry);
        Self {
            rejected_tables,
            selections: register(
                registry,
                "portpool_selections",
                "Requests to select a port by outcome",
            ),
            refused_greetings: register(
                registry,
                "portpool_refused_greetings",
                "Connection servers that were refused at their greeting",
            ),
            unexpected_messages: register(
                registry,
                "portpool_unexpected_messages",
                "Messages from connection servers that are unknown or out of place",
            ),
            refused_requests: register(
                registry,
                "portpool_requests_refused",
                "Requests to the local API that got a problem, by its name, and connections without one",
            ),
        }
    }

    /// Counts a request to the local API, or a connection, that was refused because of
    /// `cause`.
    pub fn request_refused(&self, cause: &'static str) {
        self.refused_requests.get_or_create(&Cause { cause }).inc();
    }

    /// Counts an answer to a request to select a port, by the cause of its
    /// refusal if it was refused.
    pub fn selected(&self, refused: Option<RefusalCause>) {
        let outcome = refused.map_or("SELECTED", RefusalCause::name);
        self.selections.get_or_create(&Outcome { outcome }).inc();
    }

    /// Counts `message` if it is such an answer.
    pub fn sent(&self, message: &FromAgent) {
        match message {
            FromAgent::Selected { .. } => self.selected(None),
            FromAgent::Refused { cause, .. } => self.selected(Some(*cause)),
            _ => {}
        }
    }
}
