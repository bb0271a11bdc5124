//! When a data thread looks at deadlines.
//!
//! One tick serves all deadlines of seconds: each part compares its own times
//! at a tick, so that an event need not move a timer. The tick runs only
//! while something has a deadline.
//!
//! # Idle times
//!
//! | limit | counts from | what renews it |
//! |---|---|---|
//! | `idleTimeoutSeconds` | the connection's begin | bytes that are read from one side or taken by the other one, and the end of a side that is passed on |
//! | `udpIdleTimeoutSeconds` | the flow's first datagram | a datagram of the client; of the server only as `udp` says |
//!
//! Nothing else renews them. Acknowledgements and the kernel's keep-alive probes do
//! not, because this code never sees them. A hand-over does not: a snapshot has the
//! time that a client has been idle. A newer table does not either, but a limit that
//! it changes applies to all clients from the next look on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time between two looks at deadlines.
const TICK: Duration = Duration::from_millis(250);

/// The shortest wait for a tick: rounding down would spin.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// A thread's next look at deadlines.
#[derive(Debug)]
pub(super) struct Timers {
    next_tick: Instant,
}

impl Timers {
    pub(super) fn new(now: Instant) -> Self {
        Self { next_tick: now }
    }

    /// Something has a deadline now: the next tick must not lie in the past,
    /// where a thread without deadlines has left it.
    pub(super) fn schedule(&mut self, now: Instant) {
        if self.next_tick < now {
            self.restart(now);
        }
    }

    /// Moves the next tick to `deadline`, if that is earlier.
    pub(super) fn schedule_before(&mut self, deadline: Instant) {
        self.next_tick = self.next_tick.min(deadline);
    }

    pub(super) fn restart(&mut self, now: Instant) {
        self.next_tick = now + TICK;
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        now >= self.next_tick
    }

    /// The time from `now` to the next tick.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.next_tick.saturating_duration_since(now).max(WAIT_MIN)
    }
}

/// Idle times of the table in force. Control writes them, threads read them at
/// their ticks.
#[derive(Debug, Default)]
pub(super) struct IdleTimes {
    /// Seconds, 0 for none.
    tcp: AtomicU64,
    /// Seconds, 0 for none.
    udp: AtomicU64,
}

impl IdleTimes {
    pub(super) fn set(&self, tcp_seconds: i32, udp_seconds: i32) {
        let seconds = |value: i32| u64::try_from(value).unwrap_or(0);
        self.tcp.store(seconds(tcp_seconds), Ordering::Relaxed);
        self.udp.store(seconds(udp_seconds), Ordering::Relaxed);
    }

    /// How long a TCP connection may be idle; `None` for as long as it likes.
    pub(super) fn tcp(&self) -> Option<Duration> {
        duration(&self.tcp)
    }

    /// How long a UDP flow may be idle; `None` for as long as it likes.
    pub(super) fn udp(&self) -> Option<Duration> {
        duration(&self.udp)
    }
}

fn duration(seconds: &AtomicU64) -> Option<Duration> {
    let seconds = seconds.load(Ordering::Relaxed);
    (seconds > 0).then(|| Duration::from_secs(seconds))
}
