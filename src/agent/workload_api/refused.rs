//! Why the local API refuses a request, and what it answers then.

use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::super::book::NotOffered;
use super::{ANSWER_DEADLINE, WATCHERS_MAX};
use crate::session::body::BodyError;
use crate::session::{AmendRefusal, MAX_REASON_CHARACTERS, Problem};

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("the body must be {{\"ready\": true}} or {{\"ready\": false}}: {0}")]
    Readiness(BodyError),
    #[error("{0}")]
    Parameter(String),
    #[error(transparent)]
    NotRead(#[from] BytesRejection),
    #[error(transparent)]
    Object(#[from] BodyError),
    #[error("reason: must have 1 to {MAX_REASON_CHARACTERS} characters and no control characters")]
    Reason,
    #[error(
        "no live session has this id: it was not confirmed within confirmSeconds, its client has left, or it is over"
    )]
    TooLate,
    #[error("the pool did not ask about this session (sessions.confirm); DELETE ends it")]
    NotOffered,
    #[error(
        "the session was confirmed before, with the metadata that it shows; PATCH changes what the client has said, DELETE ends it"
    )]
    Confirmed,
    #[error(transparent)]
    NotAmended(#[from] AmendRefusal),
    #[error("the agent has no table with this server yet; ask again in a second")]
    NoRow,
    #[error("no live session has this id; it may be over")]
    NoSession,
    #[error("send the request within {} s", ANSWER_DEADLINE.as_secs())]
    TooSlow,
    #[error("{WATCHERS_MAX} clients watch events already: end one, or ask again")]
    TooManyWatchers,
    #[error("see /openapi.json for the paths and methods")]
    NotFound,
    #[error("see /openapi.json for the paths and methods")]
    MethodNotAllowed,
}

impl From<NotOffered> for Refused {
    fn from(error: NotOffered) -> Self {
        match error {
            NotOffered::Unknown => Self::TooLate,
            NotOffered::NotAsked => Self::NotOffered,
            NotOffered::Confirmed => Self::Confirmed,
        }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let (status, name, title) = match &self {
            Self::Parameter(_) | Self::Reason => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid-field",
                "Invalid field",
            ),
            Self::NotRead(rejection) => (rejection.status(), "body", "Wrong body"),
            Self::Readiness(error) | Self::Object(error) => error.problem(),
            Self::NotOffered => (StatusCode::CONFLICT, "not-offered", "Not offered"),
            Self::Confirmed => (StatusCode::CONFLICT, "confirmed", "Confirmed before"),
            Self::NotAmended(refusal) => refusal.problem(),
            Self::NoRow => (StatusCode::SERVICE_UNAVAILABLE, "starting", "Starting"),
            Self::NoSession | Self::TooLate => {
                (StatusCode::NOT_FOUND, "no-session", "No such session")
            }
            Self::TooSlow => (StatusCode::REQUEST_TIMEOUT, "too-slow", "Request too slow"),
            Self::TooManyWatchers => (
                StatusCode::SERVICE_UNAVAILABLE,
                "too-many-watchers",
                "Too many watchers",
            ),
            Self::NotFound => (StatusCode::NOT_FOUND, "not-found", "No such resource"),
            Self::MethodNotAllowed => (
                StatusCode::METHOD_NOT_ALLOWED,
                "method-not-allowed",
                "Method not allowed",
            ),
        };
        Problem::response(status, name, title, self.to_string())
    }
}
