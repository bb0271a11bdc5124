//! Refusals as RFC 9457 problem details.

use std::fmt;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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

/// The static name of the problem in a response, for the metrics.
#[derive(Clone, Copy, Debug)]
pub struct ProblemName(pub &'static str);

/// When to ask again, in seconds, where that may help.
const RETRY_AFTER: &str = "1";

impl Problem {
    /// The answer with `status` to a request that is refused for the reason `name`;
    /// the others are as in [`Problem`]. It has [`ProblemName`] as an extension.
    pub fn response(
        status: StatusCode,
        name: &'static str,
        title: &str,
        detail: String,
    ) -> Response {
        let problem = Self {
            kind: format!("urn:portpool:problem:{name}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail,
        };
        let content_type = [(header::CONTENT_TYPE, "application/problem+json")];
        let mut response = (status, content_type, Json(problem)).into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            let soon = HeaderValue::from_static(RETRY_AFTER);
            response.headers_mut().insert(header::RETRY_AFTER, soon);
        }
        response.extensions_mut().insert(ProblemName(name));
        response
    }
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
