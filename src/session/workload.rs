//! The types of the agent's local API, which the agent and the client module for
//! workloads share: what it shows of the server and its sessions, and what it takes.

use std::borrow::Cow;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{ConnectionPort, MAX_REASON_CHARACTERS, Metadata, SessionState};
use crate::pool::{Mapping, PortProtocol};
use crate::table::{PortRange, Slot};

/// The processing server that the workload is part of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServerView {
    /// The pool's name.
    pub pool: String,
    /// Name of the pod or process.
    pub server: String,
    /// Slot in the pool.
    #[schema(value_type = u32)]
    pub slot: Slot,
    /// The address that clients connect to, where it is known, as in PORTPOOL_ADDRESS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// What the workload has said last at `/v1/readiness`; true before.
    pub ready: bool,
    /// Whether the server is being removed.
    pub draining: bool,
    /// Whether it takes no more sessions and is replaced when they are over.
    pub spent: bool,
    /// Live sessions, and those whose end is not acknowledged.
    pub sessions: u32,
    /// The server's connection ports.
    pub ports: Vec<EntryView>,
}

/// Adjacent connection ports of one port entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EntryView {
    /// Name of the port entry.
    pub name: String,
    /// What they forward.
    pub protocol: PortProtocol,
    /// The first connection port, to which clients connect.
    pub port: u16,
    /// How many there are.
    pub count: u16,
    /// The server port that the first one leads to.
    pub server_port: u16,
    /// Which server ports the others lead to.
    pub mapping: Mapping,
}

impl EntryView {
    /// The ports of `range`.
    #[must_use]
    pub fn new(range: &PortRange) -> Self {
        Self {
            name: range.name.clone(),
            protocol: range.protocol,
            port: range.connection_port.get(),
            count: range.count,
            server_port: range.server_port.get(),
            mapping: range.mapping,
        }
    }
}

/// Where a session is in its life, as its workload sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum WorkloadState {
    /// The workload has yet to confirm it, where the pool says so.
    Offered,
    /// Selected; its client has not connected yet.
    Held,
    /// Connections are open.
    Busy,
    /// The last connection closed a moment ago; its client may come back.
    Lingering,
}

impl WorkloadState {
    /// The state as it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Offered => "Offered",
            Self::Held => SessionState::Held.name(),
            Self::Busy => SessionState::Busy.name(),
            Self::Lingering => SessionState::Lingering.name(),
        }
    }
}

/// What the workload says when it confirms a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Confirmation {
    /// Strings for the client, which gets them in the answer to its request as
    /// `workloadMetadata`: at most 64 keys, and 4096 bytes in all keys and values.
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub metadata: Metadata,
}

/// What the workload says when it refuses a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WorkloadRefusal {
    /// Why, for the client: 1 to 256 characters, no control characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 256)]
    pub reason: Option<String>,
}

impl WorkloadRefusal {
    /// Whether the reason keeps its bounds.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.reason.as_ref().is_none_or(|reason| {
            (1..=MAX_REASON_CHARACTERS).contains(&reason.chars().count())
                && !reason.contains(char::is_control)
        })
    }
}

/// A session on this server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadSession {
    /// Names the session.
    pub id: String,
    /// The connection port, to which the client connects; the first one of a session
    /// of several ports.
    pub port: u16,
    /// Name of the port entry.
    pub port_name: String,
    /// What the port forwards.
    pub protocol: PortProtocol,
    /// All its ports, in the order of the request.
    pub ports: Vec<ConnectionPort>,
    /// Where the session is in its life.
    pub state: WorkloadState,
    /// The only address that may connect, if it is bound to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub bound_client: Option<std::net::IpAddr>,
    /// What the client says to the workload, in the request for the session.
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub metadata: Metadata,
    /// While `Held`: when it ends unless a client connects (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub claim_deadline: Option<Timestamp>,
    /// While `Offered`: until when the workload may confirm it (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub confirm_deadline: Option<Timestamp>,
    /// What the workload has said when it confirmed the session.
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub workload_metadata: Metadata,
    /// When it ends, even if it is in use, where that is limited (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires: Option<Timestamp>,
    /// When the port was selected (RFC 3339).
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
}

/// Most sessions of a page, and those of one whose request names no number. With the
/// most metadata of both sides, each byte of it escaped, they take 5 MiB: an agent has
/// little memory.
pub const PAGE_MAX: usize = 100;

/// Which of the sessions are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub struct SessionListQuery {
    /// Most sessions of the page: 1 to 100, default 100.
    #[param(minimum = 1, maximum = 100)]
    pub limit: Option<usize>,
    /// Only sessions after this one: `next` of the page before.
    pub after: Option<String>,
}

/// A page of the live sessions of the server, in the order of their ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionList {
    /// The sessions.
    pub items: Vec<WorkloadSession>,
    /// What `after` is for the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A change of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadEvent {
    /// When it happened (RFC 3339).
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// The session's id.
    pub id: String,
    /// Why the session has ended; absent while it lives.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub cause: Option<Cow<'static, str>>,
    /// The session after the change; absent when it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<WorkloadSession>,
    /// Whether the session was amended and is in the same state as before.
    #[serde(skip)]
    pub is_amendment: bool,
}

impl WorkloadEvent {
    /// The event under this `name`, which a stream of events gives beside it.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self {
            is_amendment: name == "Amended",
            ..self
        }
    }

    /// The name of the event: the state that the session is in, `Ended` or `Amended`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match &self.session {
            None => "Ended",
            Some(_) if self.is_amendment => "Amended",
            Some(session) => session.state.name(),
        }
    }
}

/// Whether the workload takes new sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Readiness {
    /// `false`: no new sessions until `true`; live ones go on.
    pub ready: bool,
}
