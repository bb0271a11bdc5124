//! The load-sharing API's types: a request for a session, its answer, and the
//! problem details of a refusal. Shared by the connection server, which
//! speaks them, and the client module.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::pool::{ClientBinding, Policy, PortProtocol};
use crate::table::Slot;

/// Longest idempotency or affinity key, in bytes.
pub const MAX_KEY_BYTES: usize = 128;

/// Longest time a request may wait for a port, in seconds.
pub const MAX_WAIT_SECONDS: u32 = 300;

/// Request information: what a client asks the load-sharing port for. An
/// empty object asks for any port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SessionRequest {
    /// The same key gives the same live session, so a lost reply leaks
    /// nothing: 1 to 128 bytes. Another request under a live session's key is
    /// refused with 422.
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
    /// Under the AffinityHash policy, equal keys go to the same processing
    /// server while it has room: 1 to 128 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 128)]
    pub affinity_key: Option<String>,
    /// `Requester` lets only the requester's address connect, also where the
    /// pool allows any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_binding: Option<ClientBinding>,
    /// Seconds to wait, in order, when nothing is free: 0 to 300, default 0.
    #[schema(maximum = 300)]
    pub wait_seconds: u32,
}

/// A session: one client's port on one processing server, for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// Names the session in `GET` and `DELETE /v1/sessions/{id}`.
    pub id: String,
    /// Address to connect to: IP address or DNS name.
    pub address: String,
    /// Connection port to connect to.
    pub port: u16,
    /// What the port forwards.
    pub protocol: PortProtocol,
    /// Name of the port entry.
    pub port_name: String,
    /// The processing server that selected the port.
    pub server: String,
    /// Where the session is in its life.
    pub state: SessionState,
    /// While `Held`: connect before this time (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub claim_deadline: Option<jiff::Timestamp>,
    /// When the port was selected (RFC 3339).
    #[schema(value_type = String, format = DateTime)]
    pub created: jiff::Timestamp,
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

/// Live state of a pool as one connection server sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
    /// The processing servers, by slot.
    pub servers: Vec<ServerState>,
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

/// A refusal as RFC 9457 problem details (`application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `urn:portpool:problem:` and the refusal's name; stable, for programs.
    #[serde(rename = "type")]
    pub kind: String,
    /// The refusal in a few words.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What was wrong here, and the remedy.
    pub detail: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{}: {} ({})",
            self.title, self.detail, self.status
        )
    }
}
