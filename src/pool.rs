//! The `ProcessingPool` custom resource: its fields, bounds and defaults.
//!
//! - `ports`, `sessions`, `recycle`: parts of the spec;
//! - `rules`: rules about several fields, for the API server and for this
//!   program;
//! - this file: the rest of the spec, the status, and the bounds. It has no logic.
//!
//! Doc comments here become the CRD's descriptions, which `kubectl explain`
//! prints. They are written for users and give unit, bounds and default.

mod ports;
mod recycle;
pub mod rules;
mod sessions;

use std::ops::RangeInclusive;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::ports::{
    EntryAdmission, Mapping, Offer, PortEntry, PortProtocol, ProxyProtocol, Replies,
};
pub use self::recycle::Recycle;
pub use self::sessions::{Admission, ClientBinding, Confirm, Sessions};

/// Most characters of a pool's name: pods and services append up to 11 to it, and
/// a label has at most 63.
pub const MAX_NAME_LENGTH: usize = 52;

/// Most processing servers of one pool.
pub const MAX_REPLICAS: i32 = 1000;

/// Most connection servers of one pool.
pub const MAX_CONNECTION_SERVERS: i32 = 10;

/// Most processing servers times port entries, which are the ranges of a table. With
/// the longest names and addresses, they fit into the 1 MiB of a ConfigMap and leave
/// room for ranges in pieces.
pub const MAX_RANGES: u32 = 6000;

/// Most port entries of one pool.
pub const MAX_PORT_ENTRIES: usize = 8;

/// Most characters of the name of a port entry: the limit of the name of a port in
/// Kubernetes. All of them are ASCII, so this is also the limit in bytes.
pub const MAX_PORT_NAME_LENGTH: usize = 15;

/// Most connection ports that one port entry gives a processing server.
pub const MAX_COUNT: i32 = 10_000;

/// Most characters of an address that clients are given: the limit of a DNS name.
pub const MAX_ADDRESS_LENGTH: usize = 253;

/// The first port that a program without privileges may listen on, unless the host or
/// the network of the pod says otherwise.
pub const UNPRIVILEGED_PORTS: i32 = 1024;

/// The highest port number.
pub const MAX_PORT: i32 = 65_535;

/// Longest wait, in seconds, for the waits that users may need to be long: one week.
pub const WEEK_SECONDS: i32 = 604_800;

/// Longest wait, in seconds, that keeps a port from other clients: one hour.
pub const HOUR_SECONDS: i32 = 3_600;

/// Longest limit, in seconds, of the duration of a session: 30 days.
pub const MONTH_SECONDS: i32 = 2_592_000;

/// TCP ports of a processing server that belong to its agent. No port entry may
/// include one: 7070 for connection servers, 7071 for the administrator, 7072 for the
/// workload; 7073 is not used yet.
pub const AGENT_PORTS: RangeInclusive<u16> = 7070..=7073;

/// Most sessions after which a processing server can be replaced.
pub const MAX_RECYCLE_SESSIONS: i32 = 1_000_000;

/// Port on which agents serve the selection protocol, on the address of their server.
pub const AGENT_PORT: u16 = 7070;

/// Port on which agents serve their admin pages.
pub const AGENT_ADMIN_PORT: u16 = 7071;

/// Port of the agent's local API, on a loopback address.
pub const AGENT_API_PORT: u16 = 7072;

/// Port on which connection servers serve their admin pages. It is neither the
/// load-sharing port nor a connection port.
pub const CONNECTION_ADMIN_PORT: u16 = 7701;

/// The desired state of the pool.
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
    doc = "A pool of processing servers behind a connection server, which gives each client a port of its own on one of the servers for a while. A client asks the load-sharing port for a session, receives a connection port, connects to it, and is forwarded to the processing server that selected the port.",
    derive = "PartialEq",
    status = "ProcessingPoolStatus",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    validation = rules::NAME.to_schema(),
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
    validation = rules::ENOUGH_PORTS.to_schema(),
    validation = rules::TABLE_FITS.to_schema(),
    validation = rules::NO_OVERLAP.to_schema(),
    validation = rules::COMPANIONS_OF_SESSIONS.to_schema(),
    validation = rules::IDENTITY_LEAVES_AGENT_PORTS.to_schema()
)]
pub struct ProcessingPoolSpec {
    /// Number of processing servers, 0 to 1000. Default 2.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 0, max = MAX_REPLICAS))]
    pub replicas: i32,

    /// Ports that each processing server listens on, 1 to 8 entries with different names. Every processing server gets its own connection ports for every entry. When an entry changes, other than in its offer, admission or replies, the servers get new connection ports for it, and the sessions on the former ports end. A change of admission to or from Companion ends the sessions and connections on the ports of the entry, which stay the same.
    #[schemars(length(min = 1, max = MAX_PORT_ENTRIES), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub ports: Vec<PortEntry>,

    /// The connection server, which clients send requests and connect to. Default: the defaults of its fields.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self.exposure == oldSelf.exposure").message("exposure cannot change, because clients know the addresses that it gave: create another pool"))]
    #[x_kube(validation = rules::LOAD_SHARING_PORT_OUTSIDE.to_schema())]
    #[x_kube(validation = rules::ADMIN_PORT_FREE.to_schema())]
    #[x_kube(validation = rules::NO_LOW_PORTS_OF_HOSTS.to_schema())]
    #[x_kube(validation = rules::ADVERTISED_ADDRESS.to_schema().field_path(".advertisedAddress"))]
    pub connection_server: ConnectionServer,

    /// How the processing server for a request is chosen. Default: the defaults of its fields.
    #[serde(default)]
    pub load_sharing: LoadSharing,

    /// How long sessions last, and who may connect. Default: the defaults of its fields.
    #[serde(default)]
    pub sessions: Sessions,

    /// Longest time in seconds that live sessions keep a processing server running after the pool has shrunk or the template has changed, 0 to 604800. Default 600. `portpool local` uses its option --drain-seconds instead.
    #[serde(default = "default_drain_seconds")]
    #[schemars(range(min = 0, max = WEEK_SECONDS))]
    pub drain_seconds: i32,

    /// When a processing server is replaced by a new one: new pod, new processes, the same slot and connection ports. Default: only when the template changes or the pod is lost.
    #[serde(default, skip_serializing_if = "Recycle::is_never")]
    pub recycle: Recycle,

    /// Template for the pod of a processing server, as in a Deployment. `portpool local` runs the command, args and env of its containers as processes.
    #[schemars(schema_with = "preserved_template")]
    pub template: PodTemplate,
}

/// A pod template as it was written, unknown fields included: the API server may
/// know newer fields than this program, and it rejects those that it does not know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PodTemplate(pub serde_json::Value);

/// The drain limit of a pool that names none, in seconds.
pub const DEFAULT_DRAIN_SECONDS: i32 = 600;

fn default_drain_seconds() -> i32 {
    DEFAULT_DRAIN_SECONDS
}

fn default_replicas() -> i32 {
    2
}

// An embedded PodTemplateSpec schema would make the CRD larger than kubectl's
// annotation limit; the API server checks the template when the pod is created.
fn preserved_template(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "object",
        "description": "Template for the pod of a processing server, as in a Deployment. `portpool local` runs the command, args and env of its containers as processes.",
        "x-kubernetes-preserve-unknown-fields": true
    })
}

/// The observed state of the pool, written by the controller.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProcessingPoolStatus {
    /// The metadata.generation of the spec that this status is about.
    pub observed_generation: i64,

    /// Number of processing servers that exist.
    pub replicas: i32,

    /// Number of processing servers that are ready.
    pub ready_replicas: i32,

    /// Label selector of the pods of the processing servers, for the scale subresource.
    pub selector: String,

    /// Number of connection ports in the port-relationship table, companion ports included.
    pub ports: i32,

    /// Generation of the port-relationship table. It only grows.
    pub table_generation: i64,

    /// Number of live sessions; absent while no connection server answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions: Option<i32>,

    /// Number of connection ports that a request could get; absent while no connection server answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_ports: Option<i32>,

    /// Address that clients send requests to; absent until it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,

    /// One sentence that says what the pool waits for, or that it is complete.
    pub message: String,

    /// Conditions of the pool. Ready: the pool is as its spec says. Progressing: the controller is changing something. Degraded: something needs the attention of the user. ConnectionServerAvailable: requests are answered. ClientAddressesKept, where companion ports, clientBinding Requester or proxyProtocol need it: connection servers see the addresses of clients.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// The connection server of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectionServer {
    /// Number of connection servers, 1 to 10. Each of them serves any client. Default 1.
    #[schemars(range(min = 1, max = MAX_CONNECTION_SERVERS))]
    pub replicas: i32,

    /// Load-sharing port: the HTTP port that clients send requests to, 1 to 65535, outside connectionPorts and not 7701; from 1024 on with exposure HostNetwork. A change replaces the connection servers; connections through the former ones have drainSeconds to end. Default 7700.
    #[schemars(range(min = 1, max = MAX_PORT))]
    pub load_sharing_port: i32,

    /// Range that connection ports are taken from. Keep it outside the ip_local_port_range of the kernel, which is 32768 to 60999 by default. A processing server keeps its ports while the range includes them; otherwise it gets other ports, and the sessions on the former ones end. Default 20000 to 29999.
    pub connection_ports: ConnectionPorts,

    /// Address that answers give clients to connect to: an IP address or a DNS name, without a port, of 1 to 253 characters. Default: the address that the client sent its request to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_ADDRESS_LENGTH))]
    pub advertised_address: Option<String>,

    /// How clients outside the pod network reach the connection server: ClusterIP (not at all), NodePort, LoadBalancer or HostNetwork. It cannot be changed. Default ClusterIP. `portpool local` ignores it.
    pub exposure: Exposure,

    /// Whether a LoadBalancer Service takes a node port for each connection port, of the 2,768 that a cluster has by default. Only load balancers that forward to node ports need them; an error of the load balancer says so. Default false. `portpool local` ignores it.
    pub allocate_load_balancer_node_ports: bool,
}

impl Default for ConnectionServer {
    fn default() -> Self {
        Self {
            replicas: 1,
            load_sharing_port: 7700,
            connection_ports: ConnectionPorts::default(),
            advertised_address: None,
            exposure: Exposure::default(),
            allocate_load_balancer_node_ports: false,
        }
    }
}

/// A closed range of connection ports.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = rules::IN_ORDER.to_schema()
)]
pub struct ConnectionPorts {
    /// First port of the range, 1 to 65535; from 1024 on with exposure HostNetwork.
    #[schemars(range(min = 1, max = MAX_PORT))]
    pub first: i32,

    /// Last port of the range, 1 to 65535, not below first.
    #[schemars(range(min = 1, max = MAX_PORT))]
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
    /// Clients reach it only from inside the cluster.
    #[default]
    ClusterIP,
    /// Clients reach it on every node; the node port is the connection port.
    NodePort,
    /// Clients reach it through a load balancer of the provider of the cluster.
    LoadBalancer,
    /// Clients reach it on the addresses of the nodes that run the connection servers.
    HostNetwork,
}

/// How the processing server for a request is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadSharing {
    /// Policy by which the server is chosen. LeastSessions: the server with the fewest sessions. RoundRobin: each server in turn. Packed: the fullest server that has room, so that others become empty. AffinityHash: requests with the same affinity key go to the same server while it has room. Default LeastSessions.
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
