//! How long a slot whose servers fail waits for the next one.
//!
//! ```text
//!            fails, the first time: the next one comes at once
//!            fails again: the next one waits for 10 s, 20 s, … 300 s
//! started ─────────────────────────────────────────────────→ failed
//!    │                                                         │
//!    │ ready for a minute                                      │ the pause is over, or
//!    ↓                                                         ↓ someone removed the pod
//! no failures                                               started
//! ```
//!
//! - A server fails when it ends for good, or when it vanishes before it was ever
//!   ready. One that was ready and whose programs ended with exit code 0 has done its
//!   work, as programs do that serve one client.
//! - A failed server stays in its slot until the pause is over. So its logs and its
//!   status can be read. A user who does not want to wait removes it.
//! - One that has vanished leaves nothing to remove, so the next one waits for 30 s at
//!   most.
//! - A server of another template than the pool's counts for nothing: what was
//!   corrected is tried at once.
//! - The numbers are in the table ([`Attempts`]), where a new controller finds them.

use std::time::Duration;

use jiff::Timestamp;

use super::status::Blocker;
use super::{ObservedServer, elapsed};
use crate::table::{Attempts, Row, RowState, Table};

/// The pause after the second failure in a row; each further one doubles it.
///
/// Source: Kubernetes documentation, Pod Lifecycle, "Container restarts": the back-off
/// of containers.
const FIRST_PAUSE: Duration = Duration::from_secs(10);

/// The longest pause, from the seventh failure in a row on. Source: as above.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// The longest pause after a server that has vanished.
const LONGEST_PAUSE_WITHOUT_POD: Duration = Duration::from_secs(30);

/// How long a server must be ready so that the failures before it are forgotten. So a
/// slot makes at most two servers a minute, however late they fail.
const STABLE: Duration = Duration::from_secs(60);

/// Failures in a row that the status does not report: nodes evict pods, and end.
const TOLERATED: u32 = 1;

/// What is known of the slot of `row`, as the former table has it, now that it has
/// `server`. Only with `may_mark` does a server become one that was ready.
pub(super) fn next(
    row: &Row,
    server: Option<&ObservedServer>,
    may_mark: bool,
    now: Timestamp,
) -> Attempts {
    let former = row.attempts;
    let failed = |failures: u32, never_ready| Attempts {
        failures: failures.saturating_add(1),
        failed_at: Some(now),
        never_ready,
    };
    let Some(server) = server else {
        let was_there = row.server_uid.is_some();
        let is_wanted = row.state == RowState::Active;
        return match former.failed_at {
            None if was_there && is_wanted && former.never_ready => failed(former.failures, false),
            // Its pod is removed.
            Some(_) if was_there => Attempts {
                failures: former.failures,
                ..Attempts::default()
            },
            failed_at => Attempts {
                failed_at,
                never_ready: false,
                ..former
            },
        };
    };
    let is_same = row.server_uid.as_ref() == Some(&server.uid);
    let was_never_ready = !is_same || former.never_ready;
    let never_ready = was_never_ready && (server.not_ready || (is_same && !may_mark));
    if server.is_outdated {
        return Attempts {
            never_ready,
            ..Attempts::default()
        };
    }
    let failed_at = former.failed_at.filter(|_| is_same);
    let failures = match &server.end {
        Some(end) if end.is_success && !never_ready => 0,
        Some(_) if failed_at.is_none() => return failed(former.failures, never_ready),
        None if until_stable(server, now) == Some(Duration::ZERO) => 0,
        _ => former.failures,
    };
    Attempts {
        failures,
        failed_at,
        never_ready,
    }
}

/// The time until the next server may come into the slot of `row`, which has what
/// [`next`] says; zero when it may now.
pub(super) fn pause(row: &Row, now: Timestamp) -> Duration {
    let failed_at = row.attempts.failed_at;
    failed_at.map_or(Duration::ZERO, |at| until(now, at, length(row)))
}

/// How long the pause is after the last failure in the slot of `row`.
fn length(row: &Row) -> Duration {
    let longest = match row.server_uid {
        Some(_) => LONGEST_PAUSE,
        None => LONGEST_PAUSE_WITHOUT_POD,
    };
    match row.attempts.failures.checked_sub(2) {
        None => Duration::ZERO,
        // More doublings than that exceed the longest pause by far.
        Some(doublings) => (FIRST_PAUSE * (1 << doublings.min(10))).min(longest),
    }
}

/// The time until what is known of the slot of `row`, with `server`, changes by itself.
pub(super) fn next_after(
    row: &Row,
    server: Option<&ObservedServer>,
    now: Timestamp,
) -> Option<Duration> {
    let stable = server.and_then(|server| until_stable(server, now));
    let stable = stable.filter(|_| row.attempts.failures > 0);
    let paused = Some(pause(row, now));
    let times = [stable, paused].into_iter().flatten();
    times.filter(|time| !time.is_zero()).min()
}

/// The time until `server` has been ready for long enough; `None` if it is not ready.
fn until_stable(server: &ObservedServer, now: Timestamp) -> Option<Duration> {
    Some(until(now, server.ready_since?, STABLE))
}

/// The time from `now` until `duration` after `since`. A clock that was set back makes
/// it no longer than `duration`.
fn until(now: Timestamp, since: Timestamp, duration: Duration) -> Duration {
    duration.saturating_sub(elapsed(since, now))
}

/// What keeps the slots from having servers that fail again and again: `None` where
/// none of them does. `servers` are those that `table` is about.
#[must_use]
pub fn blocker(table: &Table, servers: &[ObservedServer]) -> Option<Blocker> {
    let is_failing =
        |row: &&Row| row.state == RowState::Active && row.attempts.failures > TOLERATED;
    let mut failing = table.rows.iter().filter(is_failing);
    let row = failing.next()?;
    let name = &row.server;
    let failures = row.attempts.failures;
    let server = servers.iter().find(|server| server.slot == row.slot);
    let end = server.and_then(|server| server.end.as_ref());
    let next = match row.attempts.failed_at {
        Some(at) => {
            let at = at.saturating_add(length(row));
            let at = at.unwrap_or(Timestamp::MAX).strftime("%H:%M:%S UTC");
            format!("it is created again at {at}")
        }
        None => "it is being tried again".to_owned(),
    };
    let cause = match end {
        Some(end) => format!(": {}", end.cause),
        None if server.is_none() && row.attempts.failed_at.is_some() => {
            ": it was removed before it was ready".to_owned()
        }
        None => String::new(),
    };
    let message = format!("pod {name} failed {failures} times in a row{cause}; {next}");
    let others = match failing.count() {
        0 => String::new(),
        1 => "; another pod fails, too".to_owned(),
        others => format!("; {others} other pods fail, too"),
    };
    Some(Blocker::new("PodsFailing", format!("{message}{others}")))
}
