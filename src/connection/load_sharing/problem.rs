//! What the load-sharing port refuses, as RFC 9457 problem details.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::refusal::Refusal;
use crate::connection::sessions::{AmendError, ReleaseError};
use crate::session::body::BodyError;
use crate::session::{AmendRefusal, Problem};

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The body has more bytes than it may.
    #[error("the body must not exceed {0} bytes")]
    TooLarge(usize),
    /// The body did not arrive in time.
    #[error("the body must arrive within {} s", .0.as_secs())]
    TooSlow(Duration),
    /// The body broke off.
    #[error("the body broke off")]
    BrokenOff,
    /// The body is not the object that it must be.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// A field is wrong.
    #[error("{0}")]
    InvalidField(String),
    /// HTTP/1.1 without a Host field, or with more than one.
    #[error("HTTP/1.1 needs one Host field")]
    NoHost,
    /// No live session has that id.
    #[error("no live session has this id; it may be over")]
    NoSession,
    /// The session's agent is not attached.
    #[error("the session's processing server is not attached now; try again in a second")]
    OutOfReach,
    /// The session's agent does not know amendments.
    #[error(
        "the agent of the session's processing server is too old to change sessions: it can be changed once the server is replaced"
    )]
    AgentTooOld,
    /// As many amendments are under way as may.
    #[error("too many sessions are being changed; try again in a second")]
    TooManyAmendments,
    /// The session's agent has refused to change it.
    #[error(transparent)]
    NotAmended(AmendRefusal),
    /// No resource has this path.
    #[error("see /openapi.json for the paths and methods")]
    NotFound,
    /// The resource has other methods.
    #[error("see /openapi.json for the paths and methods")]
    MethodNotAllowed,
    /// As many watch events as may.
    #[error("{0} clients watch events of this connection server: end one, or ask again")]
    TooManyWatchers(usize),
    /// The client left. One of HTTP/1.0 may still read this.
    #[error(
        "the client ended its side while the request was waiting: keep it open, or ask over HTTP/1.1"
    )]
    Departed,
    /// The request was right, but gets no session.
    #[error(transparent)]
    Allocation(#[from] Refusal),
}

impl From<ReleaseError> for Refused {
    fn from(error: ReleaseError) -> Self {
        match error {
            ReleaseError::Unknown => Self::NoSession,
            ReleaseError::OutOfReach => Self::OutOfReach,
        }
    }
}

impl From<AmendError> for Refused {
    fn from(error: AmendError) -> Self {
        match error {
            AmendError::Unknown => Self::NoSession,
            AmendError::OutOfReach => Self::OutOfReach,
            AmendError::TooOld => Self::AgentTooOld,
            AmendError::TooMany => Self::TooManyAmendments,
            AmendError::Refused(refusal) => Self::NotAmended(refusal),
        }
    }
}

impl Refused {
    /// Status, static name and title.
    fn kind(&self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as Code;
        match self {
            Self::TooLarge(_) => (Code::PAYLOAD_TOO_LARGE, "too-large", "Body too large"),
            Self::TooSlow(_) => (Code::REQUEST_TIMEOUT, "too-slow", "Body too slow"),
            Self::BrokenOff => (Code::BAD_REQUEST, "malformed", "Malformed body"),
            Self::Body(error) => error.problem(),
            Self::InvalidField(_) => (Code::UNPROCESSABLE_ENTITY, "invalid-field", "Invalid field"),
            Self::NoHost => (Code::BAD_REQUEST, "no-host", "Host missing"),
            Self::NoSession => (Code::NOT_FOUND, "no-session", "No such session"),
            Self::OutOfReach => (
                Code::SERVICE_UNAVAILABLE,
                "server-out-of-reach",
                "Processing server out of reach",
            ),
            Self::AgentTooOld => (Code::CONFLICT, "agent-too-old", "Agent too old"),
            Self::TooManyAmendments => (
                Code::SERVICE_UNAVAILABLE,
                "too-many-amendments",
                "Too many changes at once",
            ),
            Self::NotAmended(refusal) => refusal.problem(),
            Self::NotFound => (Code::NOT_FOUND, "not-found", "No such resource"),
            Self::MethodNotAllowed => (
                Code::METHOD_NOT_ALLOWED,
                "method-not-allowed",
                "Method not allowed",
            ),
            Self::TooManyWatchers(_) => (
                Code::SERVICE_UNAVAILABLE,
                "too-many-watchers",
                "Too many watchers",
            ),
            Self::Departed => (Code::SERVICE_UNAVAILABLE, "departed", "Client has left"),
            Self::Allocation(refusal) => {
                let (status, title) = match refusal {
                    Refusal::AllInUse { .. } | Refusal::Kept(_) | Refusal::NotTogether { .. } => {
                        (Code::SERVICE_UNAVAILABLE, "No free port")
                    }
                    Refusal::NotListening { .. } => {
                        (Code::SERVICE_UNAVAILABLE, "Workload not listening")
                    }
                    Refusal::NotReady(_) => (Code::SERVICE_UNAVAILABLE, "Servers not ready"),
                    Refusal::Starting => (Code::SERVICE_UNAVAILABLE, "Servers starting"),
                    Refusal::BeingReplaced => (Code::SERVICE_UNAVAILABLE, "Servers being replaced"),
                    Refusal::Draining => (Code::SERVICE_UNAVAILABLE, "Servers being removed"),
                    Refusal::AgentsTooOld => (Code::SERVICE_UNAVAILABLE, "Agents too old"),
                    Refusal::NotSelected => (Code::SERVICE_UNAVAILABLE, "No server answered"),
                    Refusal::NotConfirmed { .. } => (Code::SERVICE_UNAVAILABLE, "Not confirmed"),
                    Refusal::QueueFull => (Code::SERVICE_UNAVAILABLE, "Queue full"),
                    Refusal::ShuttingDown => (Code::SERVICE_UNAVAILABLE, "Shutting down"),
                    Refusal::UnknownPort { .. } => (Code::UNPROCESSABLE_ENTITY, "Unknown port"),
                    Refusal::CompanionPort { .. } => (Code::UNPROCESSABLE_ENTITY, "Companion port"),
                    Refusal::InvalidPorts(_) => (Code::UNPROCESSABLE_ENTITY, "Invalid field"),
                    Refusal::UnknownServer => (Code::UNPROCESSABLE_ENTITY, "Unknown server"),
                    Refusal::UnknownSession => (Code::UNPROCESSABLE_ENTITY, "Unknown session"),
                    Refusal::KeyReused => (Code::UNPROCESSABLE_ENTITY, "Idempotency key reused"),
                };
                (status, refusal.name(), title)
            }
        }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let (status, name, title) = self.kind();
        Problem::response(status, name, title, self.to_string())
    }
}
