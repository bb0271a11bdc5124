//! Refusals as RFC 9457 problem details.

use std::fmt;

use axum::Json;
use axum::http::{StatusCode, header};
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

impl Problem {
    /// The answer with `status` to a request that is refused for the reason `name`;
    /// the others are as in [`Problem`].
    pub fn response(status: StatusCode, name: &str, title: &str, detail: String) -> Response {
        let problem = Self {
            kind: format!("urn:portpool:problem:{name}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail,
        };
        let content_type = [(header::CONTENT_TYPE, "application/problem+json")];
        (status, content_type, Json(problem)).into_response()
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
