//! Amendments: changes of a live session's metadata, and of when it ends, as JSON
//! merge patches (RFC 7396). Administrators and workloads make them; the agent
//! decides.

use axum::http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::body::{BodyError, media_type, parse_object};
use super::metadata::{MAX_METADATA_BYTES, MAX_METADATA_KEYS, MetadataPatch};
use crate::pool::MONTH_SECONDS;

/// How far ahead the end of a session may be, in seconds: as long as the longest
/// `sessions.maxDurationSeconds` of a pool.
pub const MAX_EXPIRY_SECONDS: i32 = MONTH_SECONDS;

/// A change of a live session (RFC 7396): a member that is absent stays as it is, and
/// null removes one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Amendment {
    /// When the session ends, even if it is in use (RFC 3339): at most 30 days ahead.
    /// Null: it has no end but the others.
    #[serde(deserialize_with = "expires", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires: Option<Option<Timestamp>>,
    /// Strings for the workload to set by key, or null to remove one; null removes all.
    /// At most 64 keys; what is left has at most 64 keys, and 4096 bytes in all keys and
    /// values.
    #[serde(deserialize_with = "metadata", skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = super::metadata::patch_schema)]
    pub metadata: Option<MetadataPatch>,
}

impl Amendment {
    /// Parses the `body` of a request with these `headers`.
    ///
    /// # Errors
    /// [`BodyError`].
    pub fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Self, BodyError> {
        match media_type(headers).as_str() {
            "application/merge-patch+json" | "application/json" => parse_object(body),
            _ => Err(BodyError::MediaType(
                "application/merge-patch+json, or application/json",
            )),
        }
    }
}

/// Why a live session is not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AmendRefusal {
    /// A cause that this version does not know.
    #[error("the session's processing server refused for a reason that is unknown here")]
    Unspecified,
    /// No live session has the id.
    #[error("no live session has this id; it may be over")]
    UnknownSession,
    /// The metadata would be too large.
    #[error(
        "metadata: after the change, there would be more than {MAX_METADATA_KEYS} keys, or all keys and values would have more than {MAX_METADATA_BYTES} bytes together; remove keys with null"
    )]
    MetadataTooLarge,
    /// The end would have passed.
    #[error("expires: must be a time to come; DELETE ends a session at once")]
    ExpiresPassed,
    /// The end would be too far ahead.
    #[error("expires: must be at most {} days ahead", MAX_EXPIRY_SECONDS / 86_400)]
    ExpiresTooFar,
    /// The agent did not understand the change.
    #[error("the session's processing server did not understand the change")]
    MalformedAmend,
}

impl AmendRefusal {
    /// Status, static name and title of the problem that a requester is answered.
    #[must_use]
    pub fn problem(self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as Code;
        match self {
            Self::UnknownSession => (Code::NOT_FOUND, "no-session", "No such session"),
            // As a change is refused that is too large by itself.
            Self::MetadataTooLarge => {
                (Code::UNPROCESSABLE_ENTITY, "invalid-field", "Invalid field")
            }
            Self::ExpiresPassed => (
                Code::UNPROCESSABLE_ENTITY,
                "expires-passed",
                "End has passed",
            ),
            Self::ExpiresTooFar => (
                Code::UNPROCESSABLE_ENTITY,
                "expires-too-far",
                "End too far ahead",
            ),
            Self::Unspecified | Self::MalformedAmend => {
                (Code::BAD_GATEWAY, "not-amended", "Not amended")
            }
        }
    }
}

fn expires<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Option<Timestamp>>, D::Error> {
    let rule = "expires: must be null, or a time like 2030-01-31T12:00:00Z (RFC 3339)";
    let invalid = || serde::de::Error::custom(rule);
    let text = Option::<String>::deserialize(value).map_err(|_| invalid())?;
    let time = text.map(|text| text.parse().map_err(|_| invalid()));
    time.transpose().map(Some)
}

fn metadata<'de, D: Deserializer<'de>>(value: D) -> Result<Option<MetadataPatch>, D::Error> {
    let patch = Option::<MetadataPatch>::deserialize(value)?;
    Ok(Some(patch.unwrap_or(MetadataPatch::Clear)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_is_no_amendment_is_refused_with_the_reason() {
        let patch = "application/merge-patch+json";
        let parsed = |content_type: &str, body: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("content-type", content_type.parse().unwrap());
            Amendment::parse(&headers, body.as_bytes())
        };
        for content_type in [patch, "application/json", "Application/JSON; charset=utf-8"] {
            let amendment = parsed(content_type, r#"{"expires":null}"#).unwrap();
            assert_eq!(amendment.expires, Some(None), "{content_type}");
        }
        for (content_type, body, name, words) in [
            ("text/plain", "{}", "not-json", "application/json"),
            (patch, "", "malformed", "EOF"),
            (patch, "{", "malformed", "EOF"),
            (
                patch,
                " [null,null]",
                "invalid-field",
                "must be a JSON object",
            ),
            (patch, "null", "invalid-field", "invalid type: null"),
            (
                patch,
                r#"{"port":1}"#,
                "invalid-field",
                "unknown field `port`",
            ),
            (
                patch,
                r#"{"expires":null,"expires":null}"#,
                "invalid-field",
                "duplicate field `expires`",
            ),
            (
                patch,
                r#"{"metadata":{"a":"1","a":"2"}}"#,
                "invalid-field",
                r#"metadata: the key "a" occurs twice"#,
            ),
        ] {
            let error = parsed(content_type, body).unwrap_err();
            assert_eq!(error.problem().1, name, "{body}");
            assert!(error.to_string().contains(words), "{body}: {error}");
        }
    }
}
