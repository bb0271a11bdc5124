//! Which session is where: the live sessions as one connection server knows
//! them, a page at a time.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Inner, Live, Sessions};
use crate::pool::PortProtocol;
use crate::session::page::{first_page, page_length};
use crate::session::{ConnectionPort, Metadata, SessionId, SessionState};
use crate::table::Slot;

/// Most sessions of a page.
pub const PAGE_MAX: usize = 1000;

/// Sessions of a page whose request names no number.
const PAGE_DEFAULT: usize = 100;

/// A live session as one connection server knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionInfo {
    /// Names the session.
    pub id: String,
    /// The slot of its processing server.
    #[schema(value_type = u32)]
    pub slot: Slot,
    /// The name of its processing server; absent when the table has that no more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// Its connection port; the first one of a session of several ports.
    pub port: u16,
    /// What the port forwards.
    pub protocol: PortProtocol,
    /// Name of the port entry.
    pub port_name: String,
    /// All its ports, in the order of the request.
    pub ports: Vec<ConnectionPort>,
    /// Where the session is in its life, as its agent reported last.
    pub state: SessionState,
    /// While `Held`: when it ends unless its client connects (RFC 3339).
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
    /// The address that asked for it, if it asked this connection server.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub requester: Option<IpAddr>,
    /// The only address that may connect, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub bound_client: Option<IpAddr>,
    /// What the client says to the workload.
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub metadata: Metadata,
    /// What the workload has said when it confirmed the session.
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub workload_metadata: Metadata,
    /// Connections and UDP flows that are open through this connection server, those
    /// of its clients to companion ports included.
    pub connections: u32,
}

/// Which sessions are listed, and from where on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub struct SessionQuery {
    /// Only sessions of the processing server with this name.
    pub server: Option<String>,
    /// Only sessions with a port of the entry with this name.
    pub port_name: Option<String>,
    /// Only sessions in this state.
    pub state: Option<SessionState>,
    /// Most sessions of the page: 1 to 1000, default 100.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<usize>,
    /// Only sessions after this one: `next` of the page before.
    pub after: Option<String>,
}

/// A page of sessions, in the order of their ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct SessionPage {
    /// The sessions.
    pub items: Vec<SessionInfo>,
    /// What `after` is for the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl SessionQuery {
    /// The number of sessions of a page; `None` if it is out of bounds.
    #[must_use]
    pub fn page_length(&self) -> Option<usize> {
        page_length(self.limit, PAGE_DEFAULT, PAGE_MAX)
    }

    fn admits(&self, session: &Live, server: Option<&str>) -> bool {
        let is = |wanted: &Option<String>, value: Option<&str>| {
            wanted.is_none() || wanted.as_deref() == value
        };
        is(&self.server, server)
            && self.port_name.as_ref().is_none_or(|wanted| {
                let mut ports = session.session.ports.iter();
                ports.any(|port| port.port_name == *wanted)
            })
            && self
                .state
                .is_none_or(|state| state == session.session.state)
            && self
                .after
                .as_deref()
                .is_none_or(|after| session.session.id.as_str() > after)
    }
}

impl Inner {
    /// The name of the processing server in `slot`.
    fn server(&self, slot: Slot) -> Option<&str> {
        let row = self.table.as_ref()?.table().row(slot)?;
        Some(&row.server)
    }

    /// `live` as others see it.
    pub(super) fn info(&self, live: &Live) -> SessionInfo {
        let session = &live.session;
        let first = &session.ports.first;
        let is_held = session.state == SessionState::Held;
        SessionInfo {
            id: session.id.to_string(),
            slot: live.slot,
            server: self.server(live.slot).map(str::to_owned),
            port: first.port.get(),
            protocol: first.protocol,
            port_name: first.port_name.clone(),
            ports: session.ports.iter().map(Into::into).collect(),
            state: session.state,
            claim_deadline: is_held.then_some(session.claim_deadline),
            expires: session.expires,
            created: session.created,
            requester: live.span.client(),
            bound_client: live.bound_client,
            metadata: session.metadata.clone(),
            workload_metadata: session.workload_metadata.clone(),
            connections: live.flows.lock().count(),
        }
    }
}

impl Sessions {
    /// The live session `id`.
    #[must_use]
    pub fn info(&self, id: &SessionId) -> Option<SessionInfo> {
        let inner = self.inner.read();
        let live = inner.live.get(inner.port_by_id.get(id)?)?;
        Some(inner.info(live))
    }

    /// The live sessions that `query` asks for, at most `length` of them.
    #[must_use]
    pub fn list(&self, query: &SessionQuery, length: usize) -> SessionPage {
        let inner = self.inner.read();
        let found: Vec<&Live> = inner
            .live
            .values()
            .filter(|live| query.admits(live, inner.server(live.slot)))
            .collect();
        let (page, next) = first_page(found, length, |live| live.session.id.as_str());
        SessionPage {
            items: page.into_iter().map(|live| inner.info(live)).collect(),
            next,
        }
    }
}
