//! From a spec to a pool that can be planned. Numbers become their types, bounds
//! are checked, and so are the rules about several fields (`pool::rules`). The API
//! server has checked the same; a pool from a file is checked only here.

use std::ops::RangeInclusive;
use std::time::Duration;

use k8s_openapi::api::core::v1::PodTemplateSpec;
use kube::ResourceExt;

pub use crate::pool::rules::FieldProblem;
use crate::pool::{
    ClientBinding, ConnectionServer, EntryAdmission, Exposure, LoadSharing, MAX_CONNECTION_SERVERS,
    MAX_COUNT, MAX_PORT, MAX_PORT_ENTRIES, MAX_REPLICAS, Mapping, Offer, PodTemplate, PortEntry,
    PortProtocol, ProcessingPool, ProxyProtocol, Recycle, Replies, Sessions, UNPRIVILEGED_PORTS,
    WEEK_SECONDS, rules,
};
use crate::table::{ListenPort, TargetPort};

/// A pool that can be planned: planning it cannot fail.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidPool {
    /// Name of the resource.
    pub name: String,
    /// Namespace of the resource; `default` when it names none.
    pub namespace: String,
    /// Number of processing servers.
    pub replicas: u32,
    /// The ports that each processing server listens on.
    pub entries: Vec<Entry>,
    /// The range that connection ports are taken from.
    pub connection_ports: RangeInclusive<u16>,
    /// Number of connection servers.
    pub connection_servers: u32,
    /// The port that requests go to.
    pub load_sharing_port: u16,
    /// The address that answers give clients.
    pub advertised_address: Option<String>,
    /// How processing servers are chosen.
    pub load_sharing: LoadSharing,
    /// How long sessions last, and who may connect.
    pub sessions: Sessions,
    /// When servers are replaced.
    pub recycle: Recycle,
    /// The longest time that live sessions keep a server from being stopped.
    pub drain_limit: Duration,
    /// How clients outside the pod network reach the connection server.
    pub exposure: Exposure,
    /// Whether the Service of a load balancer takes node ports.
    pub allocate_load_balancer_node_ports: bool,
    /// The processing server's pod as far as this program knows pods, or why no
    /// pod can be created of the template. Running servers are planned without
    /// it, so that a pool with a wrong template is still looked after.
    pub template: Result<PodTemplateSpec, FieldProblem>,
    /// The template as it was written.
    pub raw_template: PodTemplate,
}

/// A port entry with checked numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name of the entry.
    pub name: String,
    /// The server ports that connection ports lead to.
    pub target: Target,
    /// Number of connection ports for each processing server, at least 1.
    pub count: u16,
    /// The transport protocols that are forwarded.
    pub protocol: PortProtocol,
    /// When a connection port is offered.
    pub offer: Offer,
    /// Who may connect; `None` where the pool says that.
    pub admission: Option<EntryAdmission>,
    /// Whether the server receives the address of the client.
    pub proxy_protocol: ProxyProtocol,
    /// Which datagrams of the server reach a client.
    pub replies: Replies,
}

/// The server ports that the connection ports of an entry lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// From this one on.
    Offset(TargetPort),
    /// This one.
    Shared(TargetPort),
    /// Those of the same numbers.
    Identity,
}

impl Target {
    /// The mapping of the entry.
    #[must_use]
    pub fn mapping(self) -> Mapping {
        match self {
            Self::Offset(_) => Mapping::Offset,
            Self::Shared(_) => Mapping::Shared,
            Self::Identity => Mapping::Identity,
        }
    }

    /// The server port that `connection_port` leads to, `offset` ports after the
    /// first one of the entry; `None` above 65535.
    #[must_use]
    pub fn server_port(self, connection_port: ListenPort, offset: u16) -> Option<TargetPort> {
        match self {
            Self::Offset(first) => TargetPort::new(first.get().checked_add(offset)?),
            Self::Shared(port) => Some(port),
            Self::Identity => TargetPort::new(connection_port.get()),
        }
    }
}

impl ValidPool {
    /// The field for which connection servers must see the addresses of clients, and
    /// its value, in words; `None` if none does.
    #[must_use]
    pub fn needs_client_addresses(&self) -> Option<String> {
        let find = |is_it: fn(&Entry) -> bool, what: &str| {
            let entry = self.entries.iter().find(|entry| is_it(entry))?;
            Some(format!("entry {:?} of ports has {what}", entry.name))
        };
        let is_companion = |entry: &Entry| entry.admission == Some(EntryAdmission::Companion);
        let sends_address = |entry: &Entry| entry.proxy_protocol != ProxyProtocol::None;
        let bound = self.sessions.client_binding == ClientBinding::Requester;
        find(is_companion, "admission Companion")
            .or_else(|| bound.then(|| "sessions.clientBinding is Requester".to_owned()))
            .or_else(|| find(sends_address, "a proxyProtocol"))
    }

    /// Whether connection servers listen on ports that need a privilege by default.
    #[must_use]
    pub fn needs_low_ports(&self) -> bool {
        let lowest = (*self.connection_ports.start()).min(self.load_sharing_port);
        i32::from(lowest) < UNPRIVILEGED_PORTS
    }

    /// Checks `pool`.
    ///
    /// # Errors
    /// All [`FieldProblem`]s with single fields; if there are none, those with rules
    /// about several fields. Both are in the order of the fields.
    pub fn new(pool: &ProcessingPool) -> Result<Self, Vec<FieldProblem>> {
        let spec = &pool.spec;
        let mut checker = Checker::default();
        let replicas = checker.number(spec.replicas, 0..=MAX_REPLICAS, "spec.replicas");
        let entries = checker.entries(&spec.ports);
        let server = checker.connection_server(&spec.connection_server);
        let drain_seconds =
            checker.number(spec.drain_seconds, 0..=WEEK_SECONDS, "spec.drainSeconds");
        if checker.problems.is_empty() {
            checker.problems = rules::check(spec);
        }
        if !checker.problems.is_empty() {
            return Err(checker.problems);
        }
        Ok(Self {
            name: pool.name_any(),
            namespace: pool
                .namespace()
                .filter(|namespace| !namespace.is_empty())
                .unwrap_or_else(|| "default".to_owned()),
            replicas,
            entries,
            connection_ports: server.connection_ports,
            connection_servers: server.replicas,
            load_sharing_port: server.load_sharing_port,
            advertised_address: spec.connection_server.advertised_address.clone(),
            load_sharing: spec.load_sharing.clone(),
            sessions: spec.sessions.clone(),
            recycle: spec.recycle,
            drain_limit: Duration::from_secs(drain_seconds.into()),
            exposure: spec.connection_server.exposure,
            allocate_load_balancer_node_ports: spec
                .connection_server
                .allocate_load_balancer_node_ports,
            template: serde_json::from_value(spec.template.0.clone())
                .map_err(|error| FieldProblem::new("spec.template", error.to_string())),
            raw_template: spec.template.clone(),
        })
    }
}

/// The numbers of a connection server, checked.
struct CheckedServer {
    replicas: u32,
    load_sharing_port: u16,
    connection_ports: RangeInclusive<u16>,
}

/// Checks the bounds of single fields and collects what is wrong. A value out of
/// bounds is replaced by the nearest bound, so that checking goes on.
#[derive(Default)]
struct Checker {
    problems: Vec<FieldProblem>,
}

impl Checker {
    fn report(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.problems.push(FieldProblem::new(path, message));
    }

    fn number(&mut self, value: i32, bounds: RangeInclusive<i32>, path: &str) -> u32 {
        let (least, most) = (*bounds.start(), *bounds.end());
        if !bounds.contains(&value) {
            self.report(path, format!("must be {least} to {most}; this is {value}"));
        }
        u32::try_from(value.clamp(least, most)).expect("bounds are not negative")
    }

    fn port(&mut self, value: i32, path: &str) -> u16 {
        let number = self.number(value, 1..=MAX_PORT, path);
        u16::try_from(number).expect("a port was checked")
    }

    fn connection_server(&mut self, server: &ConnectionServer) -> CheckedServer {
        let path = |field: &str| format!("spec.connectionServer.{field}");
        let ports = server.connection_ports;
        let load_sharing_port = self.port(server.load_sharing_port, &path("loadSharingPort"));
        let first = self.port(ports.first, &path("connectionPorts.first"));
        let last = self.port(ports.last, &path("connectionPorts.last"));
        let bounds = 1..=MAX_CONNECTION_SERVERS;
        CheckedServer {
            replicas: self.number(server.replicas, bounds, &path("replicas")),
            load_sharing_port,
            connection_ports: first..=last,
        }
    }

    fn entries(&mut self, listed: &[PortEntry]) -> Vec<Entry> {
        if listed.is_empty() || listed.len() > MAX_PORT_ENTRIES {
            let number = listed.len();
            let message = format!("must have 1 to {MAX_PORT_ENTRIES} entries; this has {number}");
            self.report("spec.ports", message);
        }
        let mut entries: Vec<Entry> = Vec::new();
        for (index, entry) in listed.iter().enumerate() {
            let path = format!("spec.ports[{index}]");
            if entries.iter().any(|other| other.name == entry.name) {
                let message = format!(
                    "{:?} is the name of an earlier entry: names are unique",
                    entry.name
                );
                self.report(format!("{path}.name"), message);
            }
            entries.push(self.entry(entry, &path));
        }
        entries
    }

    fn entry(&mut self, entry: &PortEntry, path: &str) -> Entry {
        // Whether there must be a port is one of the rules.
        let port = entry
            .port
            .map_or(1, |port| self.port(port, &format!("{path}.port")));
        let port = TargetPort::new(port).expect("a port was checked");
        let count = self.number(entry.count, 1..=MAX_COUNT, &format!("{path}.count"));
        Entry {
            name: entry.name.clone(),
            target: match entry.mapping {
                Mapping::Offset => Target::Offset(port),
                Mapping::Shared => Target::Shared(port),
                Mapping::Identity => Target::Identity,
            },
            count: u16::try_from(count).expect("a count was checked"),
            protocol: entry.protocol,
            offer: entry.offer,
            admission: entry.admission,
            proxy_protocol: entry.proxy_protocol,
            replies: entry.replies,
        }
    }
}
