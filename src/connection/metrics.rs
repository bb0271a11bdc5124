//! What the connection server counts. No label holds anything that a client
//! chose.

use std::sync::{Arc, Weak};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::load_sharing::allocation::Allocation;
use super::load_sharing::queue::Queue;
use super::sessions::Sessions;
use crate::admin::register;
use crate::forward::{CounterTotals, Forwarder, LiveClients};

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
                "Requests to the load-sharing port that got a problem, by its name",
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

/// Figures read from the running parts when they are asked for.
#[derive(Debug)]
pub struct Live {
    forwarder: Weak<Forwarder>,
    sessions: Weak<Sessions>,
    allocation: Weak<Allocation>,
}

impl Live {
    /// Reads from these parts for as long as they exist.
    #[must_use]
    pub fn new(
        forwarder: &Arc<Forwarder>,
        sessions: &Arc<Sessions>,
        allocation: &Arc<Allocation>,
    ) -> Self {
        Self {
            forwarder: Arc::downgrade(forwarder),
            sessions: Arc::downgrade(sessions),
            allocation: Arc::downgrade(allocation),
        }
    }
}

impl Collector for Live {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (Some(sessions), Some(allocation)) =
            (self.sessions.upgrade(), self.allocation.upgrade())
        else {
            return Ok(());
        };
        let mut states = [
            ("free", 0),
            ("held", 0),
            ("busy", 0),
            ("lingering", 0),
            ("notListening", 0),
        ];
        let waiting = allocation.inspect(|queue: &Queue| {
            let loads = queue.servers().loads();
            for ports in loads.flat_map(|server| &server.ports) {
                let counts = [
                    ports.free,
                    ports.held,
                    ports.busy,
                    ports.lingering,
                    ports.not_listening,
                ];
                for (state, count) in states.iter_mut().zip(counts) {
                    state.1 += i64::from(count);
                }
            }
            queue.waiting()
        });
        let mut family = encoder.encode_descriptor(
            "portpool_ports",
            "Connection ports of attached processing servers by state",
            None,
            MetricType::Gauge,
        )?;
        for (state, count) in states {
            let labels = [("state", state)];
            ConstGauge::new(count).encode(family.encode_family(&labels)?)?;
        }
        if let Some(forwarder) = self.forwarder.upgrade() {
            encode_forwarding(&mut encoder, &forwarder.counters())?;
            encode_live(&mut encoder, forwarder.live())?;
        }
        let mut family = encoder.encode_descriptor(
            "portpool_sessions",
            "Live sessions by state",
            None,
            MetricType::Gauge,
        )?;
        for (state, count) in sessions.count_by_state() {
            ConstGauge::new(count).encode(family.encode_family(&[("state", state)])?)?;
        }
        gauge(
            &mut encoder,
            "portpool_sessions_open",
            "Live sessions with connections through this connection server",
            sessions.open_count(),
        )?;
        gauge(
            &mut encoder,
            "portpool_requests_waiting",
            "Requests waiting for a free port",
            waiting,
        )
    }
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: usize,
) -> Result<(), std::fmt::Error> {
    let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
    gauge.encode(metric)
}

fn encode_live(
    encoder: &mut DescriptorEncoder<'_>,
    live: LiveClients,
) -> Result<(), std::fmt::Error> {
    let mut family = encoder.encode_descriptor(
        "portpool_flows",
        "Live connections and UDP flows, those whose session is asked for included",
        None,
        MetricType::Gauge,
    )?;
    for (transport, count) in [("tcp", live.connections), ("udp", live.flows)] {
        let labels = [("transport", transport)];
        ConstGauge::new(i64::from(count)).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn encode_forwarding(
    encoder: &mut DescriptorEncoder<'_>,
    counted: &CounterTotals,
) -> Result<(), std::fmt::Error> {
    let bytes = [
        ("upstream", counted.upstream_bytes),
        ("downstream", counted.downstream_bytes),
    ];
    family(
        encoder,
        "portpool_forwarded_bytes",
        "Bytes forwarded by connections and UDP flows, live ones included",
        "direction",
        &bytes,
    )?;
    let opened = [("tcp", counted.tcp_opened), ("udp", counted.udp_opened)];
    family(
        encoder,
        "portpool_flows_opened",
        "Connections and UDP flows admitted",
        "transport",
        &opened,
    )?;
    let refused = [
        ("no_session", counted.no_session),
        ("no_server", counted.no_server),
        ("pending_too_long", counted.pending_too_long),
        ("too_many", counted.too_many),
        ("limit_total", counted.limit_total),
        ("limit_source", counted.limit_source),
        ("limit_port", counted.limit_port),
        ("loop", counted.loops),
        ("connect_refused", counted.connect_refused),
        ("connect_timed_out", counted.connect_timed_out),
        ("connect_unreachable", counted.connect_unreachable),
        ("no_source_port", counted.no_source_port),
        ("connect_failed", counted.connect_failed),
        ("accept_failed", counted.accept_failed),
    ];
    family(
        encoder,
        "portpool_refused",
        "Clients that were not connected, by cause",
        "cause",
        &refused,
    )?;
    let ended = [
        ("idle", counted.idle),
        ("cut", counted.cut),
        ("client_gone", counted.client_gone),
        ("evicted", counted.evicted),
        ("undelivered", counted.undelivered),
        ("all", counted.closed),
    ];
    family(
        encoder,
        "portpool_flows_ended",
        "Connections and UDP flows that ended; all, and by the causes that are ours",
        "cause",
        &ended,
    )?;
    let unanswered = [("udp", counted.unanswered)];
    family(
        encoder,
        "portpool_flows_unanswered",
        "UDP flows that ended without a byte from their server: it sent nothing, or sent from another port",
        "transport",
        &unanswered,
    )?;
    let dropped = [("buffer_full", counted.datagrams_dropped)];
    family(
        encoder,
        "portpool_datagrams_dropped",
        "Datagrams that were not forwarded",
        "cause",
        &dropped,
    )
}

fn family(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: &[(&str, u64)],
) -> Result<(), std::fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (value, count) in values {
        ConstCounter::new(*count).encode(family.encode_family(&[(label, *value)])?)?;
    }
    Ok(())
}
