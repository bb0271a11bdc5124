//! What the local API shows of sessions, made from what the book says of them.

use jiff::Timestamp;

use crate::selection::{EndCause, FromAgent, Session};
use crate::session::page::{first_page, page_length};
use crate::session::{
    PAGE_MAX, SessionList, SessionListQuery, SessionState, WorkloadEvent, WorkloadSession,
    WorkloadState,
};

impl From<&Session> for WorkloadState {
    fn from(session: &Session) -> Self {
        match session.state {
            _ if session.confirm_deadline.is_some() => Self::Offered,
            SessionState::Held => Self::Held,
            SessionState::Busy => Self::Busy,
            SessionState::Lingering => Self::Lingering,
        }
    }
}

impl From<&Session> for WorkloadSession {
    fn from(session: &Session) -> Self {
        let state = WorkloadState::from(session);
        let is_held = state == WorkloadState::Held;
        let first = &session.ports.first;
        Self {
            id: session.id.to_string(),
            port: first.port.get(),
            port_name: first.port_name.clone(),
            protocol: first.protocol,
            ports: session.ports.iter().map(Into::into).collect(),
            state,
            bound_client: session.bound_client,
            metadata: session.metadata.clone(),
            claim_deadline: is_held.then(|| in_milliseconds(session.claim_deadline)),
            confirm_deadline: session.confirm_deadline.map(in_milliseconds),
            workload_metadata: session.workload_metadata.clone(),
            expires: session.expires.map(in_milliseconds),
            created: in_milliseconds(session.created),
        }
    }
}

/// As exact as connection servers, and so clients, receive it.
fn in_milliseconds(time: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(time.as_millisecond()).unwrap_or(time)
}

/// The page that `query` asks for of the sessions that `first_after` gives: the first
/// ones after an id, as many as it is asked for. `None` if the limit of `query` is out of
/// bounds.
pub(super) fn page_of(
    query: &SessionListQuery,
    first_after: impl FnOnce(&str, usize) -> Vec<Session>,
) -> Option<SessionList> {
    let length = page_length(query.limit, PAGE_MAX, PAGE_MAX)?;
    // One more shows whether there is another page.
    let found = first_after(query.after.as_deref().unwrap_or_default(), length + 1);
    let (page, next) = first_page(found, length, |it| it.id.as_str());
    Some(SessionList {
        items: page.iter().map(WorkloadSession::from).collect(),
        next,
    })
}

/// The event that `session` was amended.
pub(super) fn amended(session: &Session, time: Timestamp) -> WorkloadEvent {
    WorkloadEvent {
        is_amendment: true,
        ..changed(session, time)
    }
}

/// The event that `message` reports; `None` if it is not about a session's state.
pub(super) fn event_of(message: &FromAgent, time: Timestamp) -> Option<WorkloadEvent> {
    match message {
        FromAgent::Session(session) => Some(changed(session, time)),
        FromAgent::End { session_id, cause } => Some(WorkloadEvent {
            time,
            id: session_id.to_string(),
            cause: Some(EndCause::name(*cause).into()),
            session: None,
            is_amendment: false,
        }),
        _ => None,
    }
}

fn changed(session: &Session, time: Timestamp) -> WorkloadEvent {
    WorkloadEvent {
        time,
        id: session.id.to_string(),
        cause: None,
        session: Some(session.into()),
        is_amendment: false,
    }
}
