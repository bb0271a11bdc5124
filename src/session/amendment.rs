//! Amendments: changes of a live session's metadata, and of when it ends, as JSON
//! merge patches (RFC 7396). Administrators and workloads make them; the agent
//! decides.

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::metadata::MetadataPatch;
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
