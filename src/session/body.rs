//! Bodies of requests: JSON objects of a named media type, read alike at every door.

use axum::http::{HeaderMap, StatusCode, header};
use serde::de::DeserializeOwned;

/// Why a body is not the object that a request needs.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The body is of another media type than these.
    #[error("send the body with content-type: {0}")]
    MediaType(&'static str),
    /// The body is not JSON.
    #[error("{0}")]
    Malformed(serde_json::Error),
    /// The body is a list.
    #[error("the body must be a JSON object")]
    NoObject,
    /// A field is wrong.
    #[error("{0}")]
    Field(serde_json::Error),
}

impl BodyError {
    /// Status, static name and title of the problem that a requester is answered.
    #[must_use]
    pub fn problem(&self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as Code;
        match self {
            Self::MediaType(_) => (
                Code::UNSUPPORTED_MEDIA_TYPE,
                "not-json",
                "Unsupported media type",
            ),
            Self::Malformed(_) => (Code::BAD_REQUEST, "malformed", "Malformed JSON"),
            Self::NoObject | Self::Field(_) => {
                (Code::UNPROCESSABLE_ENTITY, "invalid-field", "Invalid field")
            }
        }
    }
}

/// The media type of a body without its parameters, in lower case.
#[must_use]
pub fn media_type(headers: &HeaderMap) -> String {
    let content_type = headers.get(header::CONTENT_TYPE);
    let content_type = content_type.and_then(|value| value.to_str().ok());
    let media_type = content_type.and_then(|value| value.split(';').next());
    media_type.unwrap_or_default().trim().to_ascii_lowercase()
}

/// Parses a body that must be a JSON object, sent as such.
///
/// # Errors
/// [`BodyError`].
pub fn parse_json_object<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: &[u8],
) -> Result<T, BodyError> {
    if media_type(headers) != "application/json" {
        return Err(BodyError::MediaType("application/json"));
    }
    parse_object(body)
}

/// Parses a body that must be a JSON object.
///
/// # Errors
/// [`BodyError`], but for the media type.
pub fn parse_object<T: DeserializeOwned>(body: &[u8]) -> Result<T, BodyError> {
    // serde would also take the fields from a list, in their order.
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(BodyError::NoObject);
    }
    serde_json::from_slice(body).map_err(|error| {
        if error.is_data() {
            BodyError::Field(error)
        } else {
            BodyError::Malformed(error)
        }
    })
}
