//! What the local API shows of the server and its sessions, and what it takes.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::pool::{Mapping, PortProtocol};
use crate::selection::{EndCause, FromAgent, Session};
use crate::session::page::{first_page, page_length};
use crate::session::{ConnectionPort, Metadata, SessionState};
use crate::table::{PortRange, Slot};

/// The processing server that the workload is part of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
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
    pub(in crate::agent) fn new(range: &PortRange) -> Self {
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

/// A session on this server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
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
    pub state: SessionState,
    /// The only address that may connect, if it is bound to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub bound_client: Option<std::net::IpAddr>,
    /// What the client says to the workload, in the request for the session.
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub metadata: Metadata,
    /// While `Held`: when it ends unless a client connects (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub claim_deadline: Option<Timestamp>,
    /// When it ends, even if it is in use, where that is limited (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires: Option<Timestamp>,
    /// When the port was selected (RFC 3339).
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
}

impl From<&Session> for WorkloadSession {
    fn from(session: &Session) -> Self {
        let is_held = session.state == SessionState::Held;
        let first = &session.ports.first;
        Self {
            id: session.id.to_string(),
            port: first.port.get(),
            port_name: first.port_name.clone(),
            protocol: first.protocol,
            ports: session.ports.iter().map(Into::into).collect(),
            state: session.state,
            bound_client: session.bound_client,
            metadata: session.metadata.clone(),
            claim_deadline: is_held.then(|| in_milliseconds(session.claim_deadline)),
            expires: session.expires.map(in_milliseconds),
            created: in_milliseconds(session.created),
        }
    }
}

/// As exact as connection servers, and so clients, receive it.
fn in_milliseconds(time: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(time.as_millisecond()).unwrap_or(time)
}

/// Most sessions of a page, and those of one whose request names no number. With the
/// most metadata, each byte of it escaped, they take 3 MiB: an agent has little memory.
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct SessionList {
    /// The sessions.
    pub items: Vec<WorkloadSession>,
    /// What `after` is for the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl SessionList {
    /// The page that `query` asks for of the sessions that `first_after` gives: the
    /// first ones after an id, as many as it is asked for. `None` if the limit of
    /// `query` is out of bounds.
    pub(in crate::agent) fn new(
        query: &SessionListQuery,
        first_after: impl FnOnce(&str, usize) -> Vec<Session>,
    ) -> Option<Self> {
        let length = page_length(query.limit, PAGE_MAX, PAGE_MAX)?;
        // One more shows whether there is another page.
        let found = first_after(query.after.as_deref().unwrap_or_default(), length + 1);
        let (page, next) = first_page(found, length, |it| it.id.as_str());
        Some(Self {
            items: page.iter().map(WorkloadSession::from).collect(),
            next,
        })
    }
}

/// A change of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadEvent {
    /// When it happened (RFC 3339).
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// The session's id.
    pub id: String,
    /// Why the session has ended; absent while it lives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<&'static str>,
    /// The session after the change; absent when it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<WorkloadSession>,
    /// Whether the session was amended and is in the same state as before.
    #[serde(skip)]
    is_amendment: bool,
}

impl WorkloadEvent {
    /// The event that `session` was amended.
    pub(in crate::agent) fn amended(session: &Session, time: Timestamp) -> Self {
        Self {
            time,
            id: session.id.to_string(),
            cause: None,
            session: Some(session.into()),
            is_amendment: true,
        }
    }

    /// The event that `message` reports; `None` if it is not about a session's state.
    pub(in crate::agent) fn of(message: &FromAgent, time: Timestamp) -> Option<Self> {
        match message {
            FromAgent::Session(session) => Some(Self {
                time,
                id: session.id.to_string(),
                cause: None,
                session: Some(session.into()),
                is_amendment: false,
            }),
            FromAgent::End { session_id, cause } => Some(Self {
                time,
                id: session_id.to_string(),
                cause: Some(EndCause::name(*cause)),
                session: None,
                is_amendment: false,
            }),
            _ => None,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Readiness {
    /// `false`: no new sessions until `true`; live ones go on.
    pub ready: bool,
}
