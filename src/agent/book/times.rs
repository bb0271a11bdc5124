//! Time for the book: the two clocks, and how long sessions may take.

use std::time::Duration;

use jiff::Timestamp;

/// The time, as the book needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Now {
    /// The time since any fixed moment; it never goes back.
    pub monotonic: Duration,
    /// The time of day, which clients see.
    pub time: Timestamp,
}

impl Now {
    /// The time of day in `duration`.
    pub(super) fn time_in(self, duration: Duration) -> Timestamp {
        time_after(self.time, duration)
    }

    /// The time that has passed since `time`; zero when the clock says that it is
    /// to come.
    pub(super) fn since(self, time: Timestamp) -> Duration {
        let passed = self.time.duration_since(time);
        passed.try_into().unwrap_or(Duration::ZERO)
    }

    /// The time that passes until `time`; zero when that is over.
    pub(super) fn until(self, time: Timestamp) -> Duration {
        let left = time.duration_since(self.time);
        left.try_into().unwrap_or(Duration::ZERO)
    }
}

/// The time of day `duration` after `time`.
pub(super) fn time_after(time: Timestamp, duration: Duration) -> Timestamp {
    time.checked_add(duration).unwrap_or(Timestamp::MAX)
}

/// How long sessions may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// The time from selection to the first connection.
    pub claim: Duration,
    /// The time from the last connection's end to the session's.
    pub linger: Duration,
    /// The time from selection to the end, even with open connections.
    pub max_duration: Option<Duration>,
}

impl From<&crate::pool::Sessions> for Times {
    fn from(sessions: &crate::pool::Sessions) -> Self {
        let seconds = |value: i32| Duration::from_secs(u64::try_from(value).unwrap_or(0));
        let max_duration = seconds(sessions.max_duration_seconds);
        Self {
            claim: seconds(sessions.claim_seconds),
            linger: seconds(sessions.linger_seconds),
            max_duration: (!max_duration.is_zero()).then_some(max_duration),
        }
    }
}
