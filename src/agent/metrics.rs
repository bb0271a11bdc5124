//! The agent's counters, and the states of its ports as gauges.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::server::Agent;
use crate::admin::register;
use crate::follow::RejectedTables;
use crate::selection::RefusalCause;
use crate::session::PortState;

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
        }
    }

    /// Counts an answer to a request to select a port, by the cause of its
    /// refusal if it was refused.
    pub fn selected(&self, refused: Option<RefusalCause>) {
        let outcome = refused.map_or("SELECTED", RefusalCause::name);
        self.selections.get_or_create(&Outcome { outcome }).inc();
    }
}

/// Port states as gauges, read when they are asked for.
#[derive(Debug)]
pub struct Live(Agent);

impl Live {
    /// Reads from `agent`.
    #[must_use]
    pub fn new(agent: &Agent) -> Self {
        Self(agent.clone())
    }
}

impl Collector for Live {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counts = self.0.counts();
        let mut family = encoder.encode_descriptor(
            "portpool_ports",
            "Ports of this processing server by state",
            None,
            MetricType::Gauge,
        )?;
        let sum = |count: fn(&PortState) -> u32| {
            counts.ports.iter().map(count).map(i64::from).sum::<i64>()
        };
        let states = [
            ("free", sum(|ports| ports.free)),
            ("held", sum(|ports| ports.held)),
            ("busy", sum(|ports| ports.busy)),
            ("lingering", sum(|ports| ports.lingering)),
            ("notListening", sum(|ports| ports.not_listening)),
        ];
        for (state, count) in states {
            ConstGauge::new(count).encode(family.encode_family(&[("state", state)])?)?;
        }
        Ok(())
    }
}
