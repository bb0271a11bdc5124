//! The settings of sessions in a pool's spec.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{HOUR_SECONDS, MONTH_SECONDS, WEEK_SECONDS};

/// Longest time that a workload may have to confirm a session: its client waits meanwhile.
const MAX_CONFIRM_SECONDS: i32 = 10;

/// How long sessions last, and who may connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Sessions {
    /// Time in seconds that a selected port waits for its client to connect, 1 to 3600. Default 30.
    #[schemars(range(min = 1, max = HOUR_SECONDS))]
    pub claim_seconds: i32,

    /// Time in seconds without a byte after which a TCP connection is reset, 1 to 604800; 0 means never. Default 3600.
    #[schemars(range(min = 0, max = WEEK_SECONDS))]
    pub idle_timeout_seconds: i32,

    /// Time in seconds without a datagram from a UDP client after which it counts as gone, 1 to 604800. What it is sent does not count, unless it has a TCP connection to the same connection port. Default 60.
    #[schemars(range(min = 1, max = WEEK_SECONDS))]
    pub udp_idle_timeout_seconds: i32,

    /// Longest duration of a session in seconds, 1 to 2592000, after which it is ended even if it is in use; 0 means no limit. Default 0.
    #[schemars(range(min = 0, max = MONTH_SECONDS))]
    pub max_duration_seconds: i32,

    /// Time in seconds that a session continues after its last connection, so that its client may connect again, 0 to 3600. Default 5.
    #[schemars(range(min = 0, max = HOUR_SECONDS))]
    pub linger_seconds: i32,

    /// Whether a connection needs a session, unless the entry of its port says otherwise. Session: connections to a port without one are reset. Open: they are forwarded. Default Session.
    pub admission: Admission,

    /// Whether the workload decides about each session before its client gets the port. Never: it does not. Workload: it must confirm the session at its agent's local API within confirmSeconds, else the next processing server is asked. Default Never.
    pub confirm: Confirm,

    /// Time in seconds that the workload has to confirm or refuse a session, 1 to 10; at most 5 more than the request's waitSeconds. Default 3.
    #[schemars(range(min = 1, max = MAX_CONFIRM_SECONDS))]
    pub confirm_seconds: i32,

    /// Who may connect to the port of a session. Any: every client that knows the port. Requester: only the address that the request came from. Default Any.
    pub client_binding: ClientBinding,
}

impl Sessions {
    /// The time that the workload has to confirm a session; `None` if it need not.
    #[must_use]
    pub fn confirm_within(&self) -> Option<Duration> {
        let seconds = u64::try_from(self.confirm_seconds).unwrap_or(0);
        (self.confirm == Confirm::Workload).then(|| Duration::from_secs(seconds))
    }
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            claim_seconds: 30,
            idle_timeout_seconds: 3600,
            udp_idle_timeout_seconds: 60,
            max_duration_seconds: 0,
            linger_seconds: 5,
            admission: Admission::default(),
            confirm: Confirm::default(),
            confirm_seconds: 3,
            client_binding: ClientBinding::default(),
        }
    }
}

/// Whether the workload decides about sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Confirm {
    /// It does not.
    #[default]
    Never,
    /// It confirms or refuses each before its client gets the port.
    Workload,
}

/// Whether a connection needs a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Admission {
    /// Connections without a session are reset.
    #[default]
    // Tables of format 1 have the former name.
    #[serde(alias = "Reserved")]
    Session,
    /// Connections without a session are forwarded.
    Open,
}

/// Who may connect to a session's port.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, ToSchema,
)]
pub enum ClientBinding {
    /// Every client that knows the port.
    #[default]
    Any,
    /// Only the address that the request came from.
    Requester,
}
