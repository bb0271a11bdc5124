//! The pace of what the workload changes.

use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

/// Shortest time between two changes. Each is sent to every connection server, and one
/// that reads slowly must not make the agent remember many.
const PAUSE: Duration = Duration::from_millis(20);

/// When the next change may be made.
#[derive(Debug)]
pub(super) struct Pace(Mutex<Instant>);

impl Pace {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    /// Waits for the turn of one change, in the order of the calls. A caller that leaves
    /// meanwhile takes no turn, and one that leaves later cannot give it back.
    pub(super) async fn take_turn(&self) {
        let mut next = self.0.lock().await;
        sleep_until(*next).await;
        *next = Instant::now() + PAUSE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn changes_are_made_a_pause_apart() {
        let (pace, start) = (Pace::new(), Instant::now());
        for turn in 0..4 {
            pace.take_turn().await;
            assert_eq!(start.elapsed(), PAUSE * turn);
        }
        let leaves = tokio::time::timeout(PAUSE / 2, pace.take_turn());
        assert!(leaves.await.is_err());
        pace.take_turn().await;
        assert_eq!(start.elapsed(), PAUSE * 4);
    }
}
