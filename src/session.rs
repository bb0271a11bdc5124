//! What a session is to everyone who handles one: its id, its state and the
//! filter that its request put on ports; and the types of the load-sharing API,
//! which the connection server and the client module share. `ports` has the
//! ports of a request and of a session, `metadata` what the client says to the
//! workload, `amendment` what may change in a live session, `workload` the types of the
//! agent's local API; `body` parses requests, `page` cuts lists, `problem` is how a
//! request is refused.
//!
//! The messages about sessions between connection servers and agents are in
//! `selection`.

mod amendment;
mod arrangement;
pub mod body;
mod metadata;
pub mod page;
mod ports;
mod problem;
mod workload;

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

pub use self::amendment::{AmendRefusal, Amendment, MAX_EXPIRY_SECONDS};
pub use self::arrangement::{Run, TooManyCombinations};
pub use self::metadata::{
    MAX_METADATA_BYTES, MAX_METADATA_KEYS, Metadata, MetadataError, MetadataPatch,
};
pub use self::ports::{Block, MAX_BLOCKS, MAX_PORTS, OneOrMore, SessionPort};
pub use self::problem::{Problem, ProblemName};
pub use self::workload::{
    Confirmation, EntryView, PAGE_MAX, Readiness, ServerView, SessionList, SessionListQuery,
    WorkloadEvent, WorkloadRefusal, WorkloadSession, WorkloadState,
};
use crate::pool::{ClientBinding, Policy, PortProtocol};
use crate::table::{ListenPort, Slot};

/// Most characters of an idempotency or affinity key. The OpenAPI document can
/// bound characters, not bytes.
pub const MAX_KEY_CHARACTERS: usize = 128;

/// Longest name of a processing server in a request, in characters: that of a label
/// of a DNS name, which no name of a pod here exceeds.
pub const MAX_SERVER_CHARACTERS: usize = 63;

/// Most characters of the reason with which a workload refuses a session: a sentence or
/// two for the client.
pub const MAX_REASON_CHARACTERS: usize = 256;

/// Longest time a request may wait for a port, in seconds.
pub const MAX_WAIT_SECONDS: u32 = 300;

/// Longest id of a session or of a connection server, in bytes: twice the 32
/// hexadecimal digits that this code makes.
pub const MAX_ID_BYTES: usize = 64;

/// Defines an id: text of 1 to [`MAX_ID_BYTES`] bytes, cheap to clone.
macro_rules! text_id {
    ($(#[$documentation:meta])* $name:ident) => {
        $(#[$documentation])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// The id that is written `text`; `None` unless that has 1 to 64 bytes.
            #[must_use]
            pub fn new(text: &str) -> Option<Self> {
                let fits = (1..=$crate::session::MAX_ID_BYTES).contains(&text.len());
                fits.then(|| Self(text.into()))
            }

            /// An id that no one else has: random, 32 hexadecimal digits.
            #[must_use]
            pub fn random() -> Self {
                Self(uuid::Uuid::new_v4().simple().to_string().into())
            }

            /// The id as it is written.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        /// Ids are in the order of their text.
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(formatter)
            }
        }
    };
}
pub(crate) use text_id;

text_id! {
    /// Names a session: 1 to 64 bytes, chosen by the connection server that the
    /// session was requested from, and never used for another one.
    SessionId
}

/// As in the path of a request.
impl<'de> Deserialize<'de> for SessionId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let wrong = || serde::de::Error::custom("an id has 1 to 64 bytes");
        Self::new(&text).ok_or_else(wrong)
    }
}

/// Which ports a request can use: those that it could be given on any
/// processing server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortFilter {
    /// Only ports of this name.
    pub port_name: Option<String>,
    /// Only ports that forward this protocol; a `TCPUDP` port forwards all.
    pub protocol: Option<PortProtocol>,
}

impl PortFilter {
    /// Whether a port of this name and protocol serves the request.
    #[must_use]
    pub fn admits(&self, port_name: &str, protocol: PortProtocol) -> bool {
        let protocol_fits = match self.protocol {
            None => true,
            Some(PortProtocol::TCP) => protocol.has_tcp(),
            Some(PortProtocol::UDP) => protocol.has_udp(),
            Some(PortProtocol::TCPUDP) => protocol == PortProtocol::TCPUDP,
        };
        let wanted = self.port_name.as_deref();
        protocol_fits && wanted.is_none_or(|wanted| wanted == port_name)
    }
}

/// Request information: what a client asks the load-sharing port for. An
/// empty object asks for any port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SessionRequest {
    /// The same key gives the same session, so a lost reply leaks nothing: 1
    /// to 128 characters. While the first request waits, each is answered when its own
    /// `waitSeconds` are over, or all are when a port is free. A different
    /// request under a key in use is refused with 422.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 128)]
    pub idempotency_key: Option<String>,
    /// Only ports that forward this protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<PortProtocol>,
    /// Only ports of the pool's port entry with this name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 15)]
    pub port_name: Option<String>,
    /// Only ports of the processing server with this name, as in `server` of a
    /// session. 422 if the pool has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 63)]
    pub server: Option<String>,
    /// Only ports of the processing server that has the live session with this id.
    /// 422 if there is none when the request arrives. Not together with `server`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub near: Option<String>,
    /// Several ports for the one session, all on one processing server or none:
    /// 1 to 16 elements, 64 ports altogether. Not together with `portName` and
    /// `protocol`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1, max_items = 16)]
    #[serde(deserialize_with = "objects")]
    pub ports: Option<Vec<PortRequest>>,
    /// Under the AffinityHash policy, equal keys go to the same processing
    /// server while it has room: 1 to 128 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 128)]
    pub affinity_key: Option<String>,
    /// `Requester` lets only the requester's address connect, also where the
    /// pool allows any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_binding: Option<ClientBinding>,
    /// Strings for the workload, which sees them at its agent's local API: at most
    /// 64 keys, and 4096 bytes in all keys and values. Under one idempotency key,
    /// those of the request that made the session count.
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    #[schema(schema_with = metadata::schema)]
    pub metadata: Metadata,
    /// Seconds to wait when nothing is free, in order among those who could use
    /// the same ports: 0 to 300, default 0. A client that hangs up leaves the
    /// queue.
    #[schema(maximum = 300)]
    pub wait_seconds: u32,
}

/// Ports of one entry that a request asks for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PortRequest {
    /// Only ports of the pool's port entry with this name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 15)]
    pub port_name: Option<String>,
    /// Only ports that forward this protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<PortProtocol>,
    /// The number of adjacent connection ports: 1 to 64, default 1. They lead to
    /// adjacent server ports, or to the same one where the entry's mapping is
    /// `Shared`. The first of an even number is even.
    #[schema(minimum = 1, maximum = 64)]
    pub count: u32,
}

/// Elements that are JSON objects. Derived code would take an array of a field's
/// values for one, too.
fn objects<'de, D: Deserializer<'de>>(list: D) -> Result<Option<Vec<PortRequest>>, D::Error> {
    type Object = serde_json::Map<String, serde_json::Value>;
    let elements = Option::<Vec<Object>>::deserialize(list)?;
    let parse = |element| PortRequest::deserialize(serde_json::Value::Object(element));
    let parsed = elements.map(|elements| elements.into_iter().map(parse).collect());
    parsed.transpose().map_err(serde::de::Error::custom)
}

impl Default for PortRequest {
    fn default() -> Self {
        Self {
            port_name: None,
            protocol: None,
            count: 1,
        }
    }
}

/// A session: one client's port or ports on one processing server, for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// Names the session in `GET` and `DELETE /v1/sessions/{id}`.
    pub id: String,
    /// Address to connect to: IP address or DNS name.
    pub address: String,
    /// Connection port to connect to; the first one of a session of several ports.
    pub port: u16,
    /// What the port forwards.
    pub protocol: PortProtocol,
    /// Name of the port entry.
    pub port_name: String,
    /// All its ports, in the order of the request. An older connection server does
    /// not say.
    #[serde(default)]
    #[schema(min_items = 1, max_items = 64)]
    pub ports: Vec<ConnectionPort>,
    /// The processing server that selected the ports.
    pub server: String,
    /// Where the session is in its life.
    pub state: SessionState,
    /// While `Held`: connect before this time (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub claim_deadline: Option<jiff::Timestamp>,
    /// When it ends, even if it is in use, where that is limited (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires: Option<jiff::Timestamp>,
    /// When the port was selected (RFC 3339).
    #[schema(value_type = String, format = DateTime)]
    pub created: jiff::Timestamp,
    /// What the workload has said when it confirmed the session, where it is asked.
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub workload_metadata: Metadata,
}

impl Session {
    /// The session with `port`, one of its ports, as its first: to connect there.
    #[must_use]
    pub fn at(&self, port: &ConnectionPort) -> Self {
        let ConnectionPort {
            port,
            protocol,
            port_name,
        } = port.clone();
        Self {
            port,
            protocol,
            port_name,
            ..self.clone()
        }
    }
}

/// A connection port of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionPort {
    /// Connection port to connect to.
    pub port: u16,
    /// What the port forwards.
    pub protocol: PortProtocol,
    /// Name of the port entry.
    pub port_name: String,
}

impl From<&SessionPort> for ConnectionPort {
    fn from(port: &SessionPort) -> Self {
        Self {
            port: port.port.get(),
            protocol: port.protocol,
            port_name: port.port_name.clone(),
        }
    }
}

/// Where a session is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum SessionState {
    /// Selected; its client has not connected yet.
    Held,
    /// Connections are open.
    Busy,
    /// The last connection closed a moment ago; its client may come back.
    Lingering,
}

impl SessionState {
    /// The state as it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Held => "Held",
            Self::Busy => "Busy",
            Self::Lingering => "Lingering",
        }
    }
}

/// Live state of a pool as one connection server sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolState {
    /// The pool's name.
    pub pool: String,
    /// Generation of the port-relationship table in use.
    pub generation: u64,
    /// How processing servers are chosen.
    pub policy: Policy,
    /// Live sessions.
    pub sessions: u32,
    /// Ports that a request could get now.
    pub free_ports: u32,
    /// Requests waiting for a port.
    pub waiting: u32,
    /// Connection ports that this connection server cannot listen on, by number, the
    /// first 100. They are not offered, and are tried again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unavailable_ports: Vec<UnavailablePort>,
    /// The processing servers, by slot.
    pub servers: Vec<ServerState>,
}

/// Most elements of `unavailablePorts`.
pub const MAX_UNAVAILABLE_PORTS: usize = 100;

/// A connection port that a connection server cannot listen on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnavailablePort {
    /// The connection port.
    #[schema(value_type = u16)]
    pub port: ListenPort,
    /// The protocol that cannot be listened on: TCP or UDP.
    pub protocol: PortProtocol,
    /// The system's answer, and the remedy.
    pub reason: String,
}

/// Live state of one processing server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServerState {
    /// Slot in the pool.
    #[schema(value_type = u32)]
    pub slot: Slot,
    /// Name of the pod or process.
    pub server: String,
    /// Its address, once known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Whether its agent is connected, so that it can get sessions.
    pub attached: bool,
    /// Whether it is being removed.
    pub draining: bool,
    /// Whether its pod is not Ready, or its workload has said so, and it gets no new
    /// sessions for now. Those that it has go on.
    #[serde(default)]
    pub not_ready: bool,
    /// Whether it has had all the sessions that it takes, and is replaced when they
    /// are over.
    #[serde(default)]
    pub spent: bool,
    /// Live sessions.
    pub sessions: u32,
    /// Ports by name.
    pub ports: Vec<PortState>,
}

/// Ports of one name on one processing server, by state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PortState {
    /// Name of the port entry.
    pub name: String,
    /// What they forward.
    pub protocol: PortProtocol,
    /// Offered to the next request.
    pub free: u32,
    /// Selected, waiting for the client.
    pub held: u32,
    /// With open connections.
    pub busy: u32,
    /// Between a client's connections, or being freed.
    pub lingering: u32,
    /// The workload does not listen on them.
    pub not_listening: u32,
}

impl PortState {
    /// The number of those on which the workload listens: a client has them, or can get
    /// them.
    #[must_use]
    pub fn offered(&self) -> u32 {
        self.free + self.held + self.busy + self.lingering
    }
}
