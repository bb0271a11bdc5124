//! The states of the agent's ports as gauges, read when they are asked for.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::server::Agent;
use crate::session::PortState;

/// The gauges of one agent.
#[derive(Debug)]
pub struct Gauges(Agent);

impl Gauges {
    /// Reads from `agent`.
    #[must_use]
    pub fn new(agent: &Agent) -> Self {
        Self(agent.clone())
    }
}

impl Collector for Gauges {
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
