//! How many connections the load-sharing port has room for, and who gives way
//! when little is left.
//!
//! Clients that wait for a port take three quarters of the connections at most:
//! the queue is bounded to that. The last quarter is for those who ask or give
//! back. While it is being used, room is *short*: idle connections are closed,
//! and the others after the request that they have. Thus neither clients that
//! wait nor clients that keep their connections lock anybody out.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// Most connections at once, where there are enough open files; further ones
/// wait in the kernel's backlog. Each may hold an HTTP/1 head of up to
/// `HEAD_BYTES` of `http`, so 128 MiB in the worst case.
const MAX_CONNECTIONS: usize = 8192;

/// The part of the open files that connections may take. The rest is for
/// connection ports and the clients on them, whose bounds leave room for these.
const SHARE_OF_FILES: usize = 8;

/// The part of the connections that is kept for those who do not wait.
const KEPT: usize = 4;

/// How long a new connection may take to send a request while room is short.
pub(super) const SHORT_DEADLINE: Duration = Duration::from_secs(2);

/// Most connections at once.
pub(in crate::connection) fn most_connections() -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let share = usize::try_from(files).unwrap_or(usize::MAX) / SHARE_OF_FILES;
    share.clamp(KEPT, MAX_CONNECTIONS)
}

/// Most clients that may wait at once: each may take a connection.
pub(in crate::connection) fn most_waiting() -> usize {
    let most = most_connections();
    most - most / KEPT
}

/// Room for connections.
#[derive(Debug)]
pub(super) struct Room {
    free: Arc<Semaphore>,
    kept: usize,
    is_short: watch::Sender<bool>,
}

/// The permit of one connection, free again when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    room: Arc<Room>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Room {
    pub(super) fn new() -> Arc<Self> {
        let most = most_connections();
        Arc::new(Self {
            free: Arc::new(Semaphore::new(most)),
            kept: most / KEPT,
            is_short: watch::Sender::new(false),
        })
    }

    /// Waits until there is room for a connection.
    pub(super) async fn enter(self: &Arc<Self>) -> Permit {
        let permit = self.free.clone().acquire_owned().await;
        self.note();
        Permit {
            room: self.clone(),
            // It is never closed.
            permit: permit.ok(),
        }
    }

    fn note(&self) {
        let is_short = self.free.available_permits() < self.kept;
        let note = |was_short: &mut bool| std::mem::replace(was_short, is_short) != is_short;
        self.is_short.send_if_modified(note);
    }
}

impl Permit {
    /// Completes while room is short.
    pub(super) async fn is_needed(&self) {
        let mut is_short = self.room.is_short.subscribe();
        // The sender is in the room that this permit is of.
        let _ = is_short.wait_for(|is_short| *is_short).await;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.permit = None;
        self.room.note();
    }
}
