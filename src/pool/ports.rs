//! The port entries of a pool's spec, and the protocols of a port.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Admission, MAX_COUNT, MAX_PORT, MAX_PORT_NAME_LENGTH, rules};

/// A run of ports that the workload of each processing server listens on.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = rules::PORT_AS_MAPPED.to_schema(),
    validation = rules::LAST_PORT_EXISTS.to_schema(),
    validation = rules::ANY_OF_SEVERAL.to_schema(),
    validation = rules::COMPANION_IS_NOT_OFFERED.to_schema(),
    validation = rules::PROXY_PROTOCOL_OVER_TCP.to_schema(),
    validation = rules::REPLIES_OVER_UDP.to_schema(),
    validation = rules::AGENT_PORTS_FREE.to_schema()
)]
pub struct PortEntry {
    /// Name by which requests choose this entry: 1 to 15 lower-case letters, digits and hyphens, with no hyphen at either end. Unique in the pool.
    #[schemars(
        length(min = 1, max = MAX_PORT_NAME_LENGTH),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,

    /// First port that the workload listens on, 1 to 65535. It is required, but absent with mapping Identity. TCP ports 7070 to 7073 belong to the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_PORT))]
    pub port: Option<i32>,

    /// Number of connection ports of one processing server, each of which takes one session at a time unless they are for companions, 1 to 10000. With mapping Offset, the workload listens on this many ports: port, port + 1, and so on. Default 1.
    #[serde(default = "default_count")]
    #[schemars(range(min = 1, max = MAX_COUNT))]
    pub count: i32,

    /// Transport protocols that are forwarded: TCP, UDP or TCPUDP (both on the same numbers). Default TCP.
    #[serde(default)]
    pub protocol: PortProtocol,

    /// Server ports that the connection ports of a server lead to. Offset: the first one leads to port, the next one to port + 1, and so on. Shared: all of them lead to the one server port `port`, for workloads that serve many clients on one port. Identity: each leads to the server port of the same number, for workloads that announce their ports themselves; every server has other ones, adjacent to each other, and its containers find them in environment variables. Default Offset.
    #[serde(default)]
    pub mapping: Mapping,

    /// When a connection port is offered to requests. WhenListening: while the workload listens on its server port, with every protocol of the entry. WhenAnyListens: while it listens with one of them at least, for programs that open UDP only when a client asks for it; it needs protocol TCPUDP. Always: without looking, for programs that open a port when they are asked for it. Default WhenListening.
    #[serde(default)]
    pub offer: Offer,

    /// Who may connect to a port of this entry. Session: the client of the session that has the port; connections to a port without one are reset. Companion: client addresses with a live session on the same processing server, of which these connections become part; no request gets such a port, and offer does not apply. It is for ports that a program opens beside the one that its client asked for, as FTP and RTP do. Open: everyone; connections without a session are forwarded. Default: as in sessions.admission.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "EntryAdmission")]
    pub admission: Option<EntryAdmission>,

    /// Which datagrams of the server reach a client. ServerPort: those from the server port that the client's datagrams go to. AnyPort: those from every port of the server's address; the client's next datagrams go to the port that has answered last. It is for protocols that answer from another port, as TFTP does, and needs a protocol with UDP. Default ServerPort.
    #[serde(default)]
    pub replies: Replies,

    /// PROXY protocol header that gives the workload the address of the client at the start of each TCP connection: None or V2. V2 needs protocol TCP. Default None.
    #[serde(default)]
    pub proxy_protocol: ProxyProtocol,
}

fn default_count() -> i32 {
    1
}

/// Server ports that the connection ports of a server lead to.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, ToSchema,
)]
pub enum Mapping {
    /// Each connection port leads to a server port of its own.
    #[default]
    Offset,
    /// All connection ports lead to one server port.
    Shared,
    /// Each connection port leads to the server port of the same number.
    Identity,
}

/// When a connection port is offered to requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Offer {
    /// While the workload listens with every protocol of the entry.
    #[default]
    WhenListening,
    /// While the workload listens with one protocol of the entry at least.
    WhenAnyListens,
    /// Whether or not the workload listens.
    Always,
}

/// Who may connect to a port of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EntryAdmission {
    /// The client of the session that has the port.
    // Tables of format 1 have the former name.
    #[serde(alias = "Reserved")]
    Session,
    /// Client addresses with a live session on the same processing server.
    Companion,
    /// Everyone.
    Open,
}

impl From<Admission> for EntryAdmission {
    fn from(admission: Admission) -> Self {
        match admission {
            Admission::Session => Self::Session,
            Admission::Open => Self::Open,
        }
    }
}

/// The server ports whose datagrams a client of a UDP port gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Replies {
    /// The one that the client's datagrams go to.
    #[default]
    ServerPort,
    /// All of the server's address. The client's next datagrams go to the one that
    /// has answered last.
    AnyPort,
}

/// Transport protocols of a port.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    JsonSchema,
    ToSchema,
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
