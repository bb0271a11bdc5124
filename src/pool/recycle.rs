//! When the processing servers of a pool are replaced by new ones.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MAX_RECYCLE_SESSIONS, MONTH_SECONDS};

/// When a processing server is replaced by a new one in its slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Recycle {
    /// Number of sessions after which a processing server is replaced, 1 to 1000000; 0 means never. It takes no further session then, and is replaced when its last one has ended. A session without a connection does not count. A server whose agent was restarted does not know how many it had, and is replaced when its sessions are over. Default 0.
    #[schemars(range(min = 0, max = MAX_RECYCLE_SESSIONS))]
    pub after_sessions: i32,

    /// Age in seconds from which on a processing server is replaced, 1 to 2592000; 0 means never. One server in four is replaced at a time, as after a change of the template: it drains first, for drainSeconds at most. Default 0.
    #[schemars(range(min = 0, max = MONTH_SECONDS))]
    pub after_seconds: i32,
}

impl Recycle {
    /// Whether servers are never replaced.
    #[must_use]
    pub fn is_never(&self) -> bool {
        *self == Self::default()
    }

    /// The number of sessions after which a server is replaced, if there is one.
    #[must_use]
    pub fn after_sessions(&self) -> Option<u32> {
        positive(self.after_sessions)
    }

    /// The time until a server of this age is too old and is replaced: zero if it is
    /// now, `None` if servers may have any age.
    #[must_use]
    pub fn until_too_old(&self, age: Duration) -> Option<Duration> {
        let most = Duration::from_secs(positive(self.after_seconds)?.into());
        Some(most.saturating_sub(age))
    }
}

fn positive(number: i32) -> Option<u32> {
    u32::try_from(number).ok().filter(|number| *number > 0)
}
