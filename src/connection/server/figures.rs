//! The figures of the running parts, which are read when they are asked for:
//! ports, sessions, requests that wait, and what the data plane counted. No
//! label holds anything that a client chose.

use std::sync::{Arc, Weak};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::connection::load_sharing::allocation::Allocation;
use crate::connection::load_sharing::queue::Queue;
use crate::connection::load_sharing::servers::Servers;
use crate::connection::sessions::Sessions;
use crate::forward::{CounterTotals, Forwarder, LiveClients};

/// Reads from the running parts.
#[derive(Debug)]
pub(super) struct Figures {
    forwarder: Weak<Forwarder>,
    sessions: Weak<Sessions>,
    allocation: Weak<Allocation>,
}

impl Figures {
    /// Reads from these parts for as long as they exist.
    pub(super) fn new(
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

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (Some(sessions), Some(allocation)) =
            (self.sessions.upgrade(), self.allocation.upgrade())
        else {
            return Ok(());
        };
        let (states, waiting, not_ready) = allocation.inspect(|queue: &Queue| {
            let servers = queue.servers();
            (
                ports_by_state(servers),
                queue.waiting(),
                servers.not_ready(),
            )
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
            gauge(
                &mut encoder,
                "portpool_connection_ports_unavailable",
                "Sockets of connection ports that this connection server cannot listen on",
                forwarder.unavailable().len(),
            )?;
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
        )?;
        gauge(
            &mut encoder,
            "portpool_servers_not_ready",
            "Attached processing servers that get no new sessions because they are not ready",
            not_ready,
        )
    }
}

/// How many ports of attached servers are in each state.
fn ports_by_state(servers: &Servers) -> [(&'static str, i64); 5] {
    let mut states = ["free", "held", "busy", "lingering", "notListening"].map(|state| (state, 0));
    for ports in servers.loads().flat_map(|server| &server.ports) {
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
    states
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
    family(
        encoder,
        "portpool_refused",
        "Clients that were not connected, by cause",
        "cause",
        &refused_by_cause(counted),
    )?;
    family(
        encoder,
        "portpool_flows_ended",
        "Connections and UDP flows that ended; all, and by the causes that are ours",
        "cause",
        &ended_by_cause(counted),
    )?;
    let unanswered = [("udp", counted.unanswered)];
    family(
        encoder,
        "portpool_flows_unanswered",
        "UDP flows that ended without a byte from their server: it sent nothing, or sent from another port",
        "transport",
        &unanswered,
    )?;
    let dropped = [
        ("buffer_full", counted.datagrams_dropped),
        ("not_of_server", counted.datagrams_of_others),
    ];
    family(
        encoder,
        "portpool_datagrams_dropped",
        "Datagrams that were not forwarded",
        "cause",
        &dropped,
    )
}

fn refused_by_cause(counted: &CounterTotals) -> [(&'static str, u64); 14] {
    [
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
    ]
}

fn ended_by_cause(counted: &CounterTotals) -> [(&'static str, u64); 6] {
    [
        ("idle", counted.idle),
        ("cut", counted.cut),
        ("client_gone", counted.client_gone),
        ("evicted", counted.evicted),
        ("undelivered", counted.undelivered),
        ("all", counted.closed),
    ]
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
