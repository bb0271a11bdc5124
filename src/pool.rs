//! The `ProcessingPool` custom resource: its fields, bounds, defaults and CEL
//! rules. No logic: the rules run in the API server and, unchanged, in
//! `manifest`, which reads pools from files.
//!
//! Doc comments here become the CRD's descriptions, which `kubectl explain`
//! prints; they give unit, bounds and default.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most processing servers of one pool.
pub const MAX_REPLICAS: i32 = 1000;

/// Most processing servers times port entries, the ranges of a table: with
/// names and addresses of the longest they fit into a ConfigMap's 1 MiB, and
/// leave room for ranges in pieces.
pub const MAX_RANGES: u32 = 6000;

/// Most port entries of one pool.
pub const MAX_PORT_ENTRIES: usize = 8;

/// Where agents answer the selection protocol, on their server's address; no
/// port entry may include it.
pub const AGENT_PORT: u16 = 7070;

/// Where agents serve their admin pages; no TCP port entry may include it.
pub const AGENT_ADMIN_PORT: u16 = 7071;

/// Where connection servers serve their admin pages; neither the load-sharing
/// port nor a connection port.
pub const CONNECTION_ADMIN_PORT: u16 = 7701;

/// N processing servers behind a connection server. A client asks the load-sharing port, is told a connection port, connects there, and is bridged to the processing server that chose the port.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "portpool.dev",
    version = "v1alpha1",
    kind = "ProcessingPool",
    plural = "processingpools",
    singular = "processingpool",
    shortname = "pp",
    category = "portpool",
    namespaced,
    cel,
    derive = "PartialEq",
    status = "ProcessingPoolStatus",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    validation = Rule::new("self.metadata.name.size() <= 52 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("metadata.name must have at most 52 lower-case letters, digits and hyphens, and begin with a letter: pods and services are named after it"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".spec.replicas", description = "Processing servers wanted"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas", description = "Processing servers that are ready"),
    printcolumn(name = "Ports", type_ = "integer", json_path = ".status.ports", description = "Connection ports"),
    printcolumn(name = "Sessions", type_ = "integer", json_path = ".status.sessions", description = "Live sessions, when known"),
    printcolumn(name = "Free", type_ = "integer", json_path = ".status.freePorts", description = "Ports a request could get, when known"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.message", description = "What the pool waits for, if anything"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Address", type_ = "string", json_path = ".status.address", description = "Where requests go", priority = 1),
    printcolumn(name = "Policy", type_ = "string", json_path = ".spec.loadSharing.policy", description = "How a request is given its server", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.replicas * self.ports.map(entry, entry.count).sum() <= self.connectionServer.connectionPorts.last - self.connectionServer.connectionPorts.first + 1")
        .message("replicas times the sum of the ports' counts must not exceed the number of connectionServer.connectionPorts: widen the range, or lower replicas or counts"),
    validation = Rule::new("self.replicas * size(self.ports) <= 6000")
        .message("replicas times the number of entries of ports must not exceed 6000, so that the port-relationship table fits into a ConfigMap: lower replicas or merge entries"),
    validation = Rule::new("self.ports.all(one, self.ports.all(other, one.name == other.name || (one.protocol == 'TCP' && other.protocol == 'UDP') || (one.protocol == 'UDP' && other.protocol == 'TCP') || one.port > other.port + (other.shared ? 0 : other.count - 1) || other.port > one.port + (one.shared ? 0 : one.count - 1)))")
        .message("server ports of two entries of ports overlap: port, port+1 and so on, count of them unless shared; move one of them")
)]
pub struct ProcessingPoolSpec {
    /// Number of processing servers, 0 to 1000. Default 2.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,

    /// What each processing server listens on, by name; 1 to 8 entries. Every processing server gets its own connection ports for every entry. Where an entry changes, servers get ports for it anew and the sessions on the former ones end.
    #[schemars(length(min = 1, max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub ports: Vec<PortEntry>,

    /// The server that clients ask and connect to.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self.exposure == oldSelf.exposure").message("exposure cannot change, clients know the addresses it gave: create another pool"))]
    #[x_kube(validation = Rule::new("self.loadSharingPort < self.connectionPorts.first || self.loadSharingPort > self.connectionPorts.last").message("loadSharingPort must lie outside connectionPorts"))]
    #[x_kube(validation = Rule::new("self.loadSharingPort != 7701 && (self.connectionPorts.first > 7701 || self.connectionPorts.last < 7701)").message("neither loadSharingPort nor connectionPorts may include 7701, where connection servers have their admin pages"))]
    pub connection_server: ConnectionServer,

    /// How a request is given its processing server.
    #[serde(default)]
    pub load_sharing: LoadSharing,

    /// How long sessions may take, and who may connect.
    #[serde(default)]
    pub sessions: Sessions,

    /// Seconds that live sessions may keep a processing server that is to go, because the pool shrinks or its template has changed, 0 to 604800. Default 600. `portpool local` has an option instead.
    #[serde(default = "default_drain_seconds")]
    #[schemars(range(min = 0, max = 604800))]
    pub drain_seconds: i32,

    /// The pod of one processing server, as in a Deployment. `portpool local` runs its containers' command, args and env as processes.
    #[schemars(schema_with = "preserved_template")]
    pub template: PodTemplate,
}

/// A pod template as it was written, unknown fields included: the API server
/// knows newer fields than this program, and names those that nobody knows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PodTemplate(pub serde_json::Value);

fn default_drain_seconds() -> i32 {
    600
}

fn default_replicas() -> i32 {
    2
}

// An embedded PodTemplateSpec schema would make the CRD larger than kubectl's
// annotation limit; the API server checks the template when the pod is created.
fn preserved_template(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "object",
        "description": "The pod of one processing server, as in a Deployment. `portpool local` runs its containers' command, args and env as processes.",
        "x-kubernetes-preserve-unknown-fields": true
    })
}

/// What the operator has found and done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProcessingPoolStatus {
    /// Generation of the spec that this status is about.
    pub observed_generation: i64,

    /// Processing servers that exist.
    pub replicas: i32,

    /// Processing servers that are ready.
    pub ready_replicas: i32,

    /// Selects the pods of the processing servers, for the scale subresource.
    pub selector: String,

    /// Connection ports in the port-relationship table.
    pub ports: i32,

    /// Generation of the port-relationship table.
    pub table_generation: i64,

    /// Live sessions, when a connection server has told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions: Option<i32>,

    /// Ports that a request could get, when a connection server has told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_ports: Option<i32>,

    /// Where requests go, once known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,

    /// One sentence: what the pool waits for, or that it is complete.
    pub message: String,

    /// Ready: the pool is as its spec says. Progressing: something is being changed. Degraded: something needs attention. ConnectionServerAvailable: requests are answered.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// A run of ports that each processing server's workload listens on.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.shared || self.port + self.count - 1 <= 65535").message("port + count - 1 must not exceed 65535"),
    validation = Rule::new("self.proxyProtocol == 'None' || self.protocol == 'TCP'").message("proxyProtocol V2 needs protocol TCP"),
    validation = Rule::new("self.protocol == 'UDP' || self.port > 7071 || self.port + (self.shared ? 0 : self.count - 1) < 7070").message("port, and port + count - 1 unless shared, must not include 7070 and 7071, where portpool's agent listens: move the workload's ports")
)]
pub struct PortEntry {
    /// Name that requests choose it by: lower-case letters, digits and hyphens, at most 15 characters. Unique in the pool.
    #[schemars(
        length(min = 1, max = 15),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,

    /// First port that the workload listens on, 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,

    /// Number of sessions one processing server takes here at once, each on its own connection port, 1 to 10000. Unless `shared`, the workload listens on this many ports: port, port+1, and so on. Default 1.
    #[serde(default = "default_count")]
    #[schemars(range(min = 1, max = 10000))]
    pub count: i32,

    /// What is forwarded: TCP, UDP, or both. Default TCP.
    #[serde(default)]
    pub protocol: PortProtocol,

    /// Whether all connection ports lead to the one server port `port`, for workloads that serve many clients on one port. Default false: connection port and server port go in step.
    #[serde(default)]
    pub shared: bool,

    /// Whether the processing server is told the client's address in a PROXY protocol header at the start of each TCP connection: None or V2. Default None.
    #[serde(default)]
    pub proxy_protocol: ProxyProtocol,
}

fn default_count() -> i32 {
    1
}

/// Transport protocols of a port.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, ToSchema,
)]
pub enum PortProtocol {
    /// TCP connections.
    #[default]
    TCP,
    /// UDP datagrams.
    UDP,
    /// Both on the same number.
    TCPUDP,
}

impl PortProtocol {
    /// Whether TCP is forwarded.
    #[must_use]
    pub fn has_tcp(self) -> bool {
        self != Self::UDP
    }

    /// Whether UDP is forwarded.
    #[must_use]
    pub fn has_udp(self) -> bool {
        self != Self::TCP
    }

    /// The name used in manifests and in the selection protocol.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TCP => "TCP",
            Self::UDP => "UDP",
            Self::TCPUDP => "TCPUDP",
        }
    }

    /// The protocol called `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::TCP, Self::UDP, Self::TCPUDP]
            .into_iter()
            .find(|protocol| protocol.name() == name)
    }
}

/// Versions of the PROXY protocol sent to the processing server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ProxyProtocol {
    /// No header.
    #[default]
    None,
    /// The binary header, version 2.
    V2,
}

/// The connection server's part of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectionServer {
    /// Number of connection servers, 1 to 10. Any of them serves any client. Default 1.
    #[schemars(range(min = 1, max = 10))]
    pub replicas: i32,

    /// Port that requests go to (HTTP), 1 to 65535. A change rolls the connection servers out anew; connections through the former ones have drainSeconds to end. Default 7700.
    #[schemars(range(min = 1, max = 65535))]
    pub load_sharing_port: i32,

    /// Range that connection ports are taken from. Keep it outside the kernel's ip_local_port_range, by default 32768 to 60999. A server keeps its ports while the range has them; where a changed range does not, it gets others and the sessions on the former ones end. Default 20000 to 29999.
    pub connection_ports: ConnectionPorts,

    /// Address that clients are told to connect to: an IP address or a DNS name of at most 253 characters. Default: the one their request came to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[0-9A-Za-z.:_-]+$"))]
    pub advertised_address: Option<String>,

    /// How clients outside the pod network reach the connection server: ClusterIP, NodePort, LoadBalancer or HostNetwork. Default ClusterIP. `portpool local` ignores it.
    pub exposure: Exposure,
}

impl Default for ConnectionServer {
    fn default() -> Self {
        Self {
            replicas: 1,
            load_sharing_port: 7700,
            connection_ports: ConnectionPorts::default(),
            advertised_address: None,
            exposure: Exposure::default(),
        }
    }
}

/// A closed range of connection ports.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.first <= self.last").message("first must not be above last")
)]
pub struct ConnectionPorts {
    /// First connection port, 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub first: i32,

    /// Last connection port, 1 to 65535, not below first.
    #[schemars(range(min = 1, max = 65535))]
    pub last: i32,
}

impl Default for ConnectionPorts {
    fn default() -> Self {
        Self {
            first: 20000,
            last: 29999,
        }
    }
}

/// How clients outside the pod network reach the connection server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Exposure {
    /// Only from inside the cluster.
    #[default]
    ClusterIP,
    /// On every node, node port = connection port.
    NodePort,
    /// By a load balancer of the cluster's provider.
    LoadBalancer,
    /// On the addresses of the nodes that run the connection servers.
    HostNetwork,
}

/// How a request is given its processing server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadSharing {
    /// LeastSessions: the server with the fewest sessions. RoundRobin: each in turn. Packed: the fullest server that has room, so that others run empty. AffinityHash: requests with the same affinity key go to the same server while it has room. Default LeastSessions.
    pub policy: Policy,
}

/// Ways to choose a processing server.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, ToSchema,
)]
pub enum Policy {
    /// The server with the fewest sessions.
    #[default]
    LeastSessions,
    /// Each server in turn.
    RoundRobin,
    /// The fullest server that has room.
    Packed,
    /// The same affinity key goes to the same server while it has room.
    AffinityHash,
}

/// How long sessions may take, and who may connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Sessions {
    /// Seconds that a selected port waits for its client, 1 to 3600. Default 30.
    #[schemars(range(min = 1, max = 3600))]
    pub claim_seconds: i32,

    /// Seconds without a byte after which a TCP connection is reset, 1 to 604800; 0 means never. Default 3600.
    #[schemars(range(min = 0, max = 604800))]
    pub idle_timeout_seconds: i32,

    /// Seconds without a datagram after which a UDP client counts as gone, 1 to 604800. Default 60.
    #[schemars(range(min = 1, max = 604800))]
    pub udp_idle_timeout_seconds: i32,

    /// Seconds after which a session is ended whatever it does, up to 2592000; 0 means never. Default 0.
    #[schemars(range(min = 0, max = 2592000))]
    pub max_duration_seconds: i32,

    /// Seconds that a session outlives its last connection, so that its client may come back, 0 to 3600. Default 5.
    #[schemars(range(min = 0, max = 3600))]
    pub linger_seconds: i32,

    /// Whether a connection needs a session. Reserved: connections to a port without one are reset. Open: they are forwarded. Default Reserved.
    pub admission: Admission,

    /// Who may connect to a session's port. Any: whoever knows it. Requester: only the address that the request came from. Default Any.
    pub client_binding: ClientBinding,
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            claim_seconds: 30,
            idle_timeout_seconds: 3600,
            udp_idle_timeout_seconds: 60,
            max_duration_seconds: 0,
            linger_seconds: 5,
            admission: Admission::default(),
            client_binding: ClientBinding::default(),
        }
    }
}

/// Whether a connection needs a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Admission {
    /// Connections without a session are reset.
    #[default]
    Reserved,
    /// Connections without a session are forwarded.
    Open,
}

/// Who may connect to a session's port.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, ToSchema,
)]
pub enum ClientBinding {
    /// Whoever knows the port.
    #[default]
    Any,
    /// Only the address that the request came from.
    Requester,
}
