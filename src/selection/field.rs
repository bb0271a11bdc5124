//! The values of single fields: parsed from the wire, and written to it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::IpAddr;

use jiff::Timestamp;

use crate::pool::PortProtocol;
use crate::session::{
    MAX_KEY_CHARACTERS, MAX_REASON_CHARACTERS, Metadata, MetadataError, SessionId,
};
use crate::table::ListenPort;

/// Most characters of a bad value that an error shows.
const SHOWN_CHARACTERS: usize = 80;

/// A field whose value the protocol does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {value} is not valid: it must {rule}")]
pub struct FieldError {
    /// The field's name in `selection.proto`.
    pub field: &'static str,
    /// The value, cut off where it is long.
    pub value: String,
    /// What the field allows.
    pub rule: &'static str,
}

impl FieldError {
    pub(super) fn new(field: &'static str, value: &impl Debug, rule: &'static str) -> Self {
        let value = format!("{value:?}")
            .chars()
            .take(SHOWN_CHARACTERS)
            .collect();
        Self { field, value, rule }
    }
}

pub(super) fn session_id(text: &str) -> Result<SessionId, FieldError> {
    SessionId::new(text).ok_or_else(|| FieldError::new("session_id", &text, "have 1 to 64 bytes"))
}

pub(super) fn connection_port(number: u32) -> Result<ListenPort, FieldError> {
    let port = u16::try_from(number).ok().and_then(ListenPort::new);
    port.ok_or_else(|| FieldError::new("connection_port", &number, "be 1 to 65535"))
}

/// At most `most` characters; `None` when empty.
pub(super) fn optional(
    field: &'static str,
    text: String,
    most: usize,
    rule: &'static str,
) -> Result<Option<String>, FieldError> {
    if text.chars().count() > most {
        return Err(FieldError::new(field, &text, rule));
    }
    Ok((!text.is_empty()).then_some(text))
}

pub(super) fn idempotency_key(text: String) -> Result<Option<String>, FieldError> {
    let rule = "have at most 128 characters";
    optional("idempotency_key", text, MAX_KEY_CHARACTERS, rule)
}

/// A reason of the workload, which people read; empty is none.
pub(super) fn reason(text: String) -> Result<Option<String>, FieldError> {
    let rule = "have at most 256 characters";
    optional("reason", text, MAX_REASON_CHARACTERS, rule)
}

pub(super) fn metadata(entries: BTreeMap<String, String>) -> Result<Metadata, FieldError> {
    Metadata::try_from(entries).map_err(too_large)
}

pub(super) fn too_large(error: MetadataError) -> FieldError {
    let rule = "have at most 64 keys, and 4096 bytes in all keys and values";
    FieldError::new("metadata", &error, rule)
}

pub(super) fn protocol(text: &str) -> Result<PortProtocol, FieldError> {
    PortProtocol::from_name(text)
        .ok_or_else(|| FieldError::new("protocol", &text, "be TCP, UDP or TCPUDP"))
}

pub(super) fn address(field: &'static str, text: &str) -> Result<IpAddr, FieldError> {
    let address = text.parse();
    address.map_err(|_| FieldError::new(field, &text, "be an IP address"))
}

/// The address that `text` is; `None` where it is empty.
pub(super) fn optional_address(
    field: &'static str,
    text: &str,
) -> Result<Option<IpAddr>, FieldError> {
    let is_absent = text.is_empty();
    (!is_absent).then(|| address(field, text)).transpose()
}

pub(super) fn timestamp(field: &'static str, unix_ms: u64) -> Result<Timestamp, FieldError> {
    let time = i64::try_from(unix_ms).ok();
    let time = time.and_then(|unix_ms| Timestamp::from_millisecond(unix_ms).ok());
    time.ok_or_else(|| FieldError::new(field, &unix_ms, "be a time before the year 10000"))
}

/// A clock that is set before 1970 reads 1970 on the wire.
pub(super) fn unix_ms(time: Timestamp) -> u64 {
    u64::try_from(time.as_millisecond()).unwrap_or(0)
}

pub(super) fn address_text(address: Option<IpAddr>) -> String {
    address.map_or_else(String::new, |address| address.to_string())
}
