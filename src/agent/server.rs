//! The server side of the selection protocol: streams to and from connection
//! servers around the book, which makes the decisions. `streams` has what
//! concerns one stream; this file has what all streams share.
//!
//! ```text
//! connection server ─ToAgent→ Agent ─→ Book (lock, no await) ─notices→ outboxes ─FromAgent→
//! ```

mod streams;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tracing::info;

use super::book::{Book, Listening, Notice, Now, Times, To};
use super::metrics::Metrics;
use crate::follow::{Rejected, is_newer};
use crate::selection::{ConnectionServerId, Counts, FromAgent};
use crate::table::{Slot, Table};

/// The messages to one stream. Unbounded, because every message answers a
/// request or reports a session, and both are bounded where they begin.
type Outbox = mpsc::UnboundedSender<FromAgent>;

/// The agent of one processing server. Cheap to clone.
#[derive(Clone)]
pub struct Agent {
    slot: Slot,
    /// Names this process to connection servers.
    id: Arc<str>,
    started: Instant,
    metrics: Arc<Metrics>,
    inner: Arc<Mutex<Inner>>,
    /// A deadline may have come nearer.
    sooner: Arc<Notify>,
}

struct Inner {
    book: Book,
    table: Option<Arc<Table>>,
    outboxes: HashMap<ConnectionServerId, Outbox>,
    /// The counts that were sent last.
    sent_counts: Counts,
}

impl Agent {
    /// An agent for `slot` that has no table yet. `recovering` is how long it
    /// adopts sessions before it offers ports: after a restart.
    #[must_use]
    pub fn new(slot: Slot, recovering: Option<Duration>, metrics: Arc<Metrics>) -> Self {
        let times = Times::from(&crate::pool::Sessions::default());
        let inner = Inner {
            book: Book::new(times, recovering),
            table: None,
            outboxes: HashMap::new(),
            sent_counts: Counts::default(),
        };
        Self {
            slot,
            id: uuid::Uuid::new_v4().simple().to_string().into(),
            started: Instant::now(),
            metrics,
            inner: Arc::new(Mutex::new(inner)),
            sooner: Arc::new(Notify::new()),
        }
    }

    fn now(&self) -> Now {
        Now {
            monotonic: self.started.elapsed(),
            time: Timestamp::now(),
        }
    }

    /// Lets `change` work on the book, then sends its messages and new counts.
    fn change(&self, change: impl FnOnce(&mut Book, Now) -> Vec<Notice>) {
        let now = self.now();
        let mut inner = self.inner.lock();
        let notices = change(&mut inner.book, now);
        inner.send(notices);
        inner.send_counts(To::All, now);
        drop(inner);
        self.sooner.notify_one();
    }

    /// Follows `table`, which need not have our row, if it is newer.
    ///
    /// # Errors
    /// [`Rejected`] when the last table stays in force.
    pub fn follow(&self, table: &Table) -> Result<(), Rejected> {
        let current = self.table();
        let is_newer = is_newer(table, current.as_deref())
            .inspect_err(|reason| self.metrics.rejected_tables.count(reason))?;
        if is_newer {
            let table = Arc::new(table.slice(self.slot));
            info!(
                generation = table.generation,
                has_row = !table.rows.is_empty(),
                "row accepted"
            );
            self.change(|book, _| book.set_row(table.row(self.slot), Times::from(&table.sessions)));
            self.inner.lock().table = Some(table);
        }
        Ok(())
    }

    /// Follows a change of the ports that the workload listens on.
    pub fn set_listening(&self, listening: Listening) {
        self.change(|book, _| {
            book.set_listening(listening);
            Vec::new()
        });
    }

    /// Does what the book has to do in time, for as long as it is polled.
    pub async fn keep_time(&self) {
        loop {
            let next = self.inner.lock().book.next_deadline();
            let due = next.map(|next| tokio::time::Instant::from_std(self.started + next));
            let far = tokio::time::Instant::now() + Duration::from_secs(3600);
            tokio::select! {
                () = tokio::time::sleep_until(due.unwrap_or(far)) => self.change(Book::tick),
                () = self.sooner.notified() => {}
            }
        }
    }

    /// Offers no more ports.
    pub fn stop(&self) {
        self.change(|book, _| {
            book.stop();
            Vec::new()
        });
    }

    /// Ends every session.
    pub fn end_all(&self) {
        self.change(|book, _| book.end_all());
    }

    /// The table in use, cut down to our row.
    #[must_use]
    pub fn table(&self) -> Option<Arc<Table>> {
        self.inner.lock().table.clone()
    }

    /// Ports by name and state.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.inner.lock().book.counts(self.now())
    }

    /// The number of sessions that are live, or whose end is not acknowledged.
    #[must_use]
    pub fn session_count(&self) -> usize {
        self.inner.lock().book.session_count()
    }
}

impl Inner {
    /// Whether `outbox` is that of the newest stream of `id`.
    fn is_current(&self, id: &ConnectionServerId, outbox: &Outbox) -> bool {
        let current = self.outboxes.get(id);
        current.is_some_and(|current| current.same_channel(outbox))
    }

    fn send(&self, notices: Vec<Notice>) {
        for Notice { to, message } in notices {
            match to {
                To::One(id) => {
                    if let Some(outbox) = self.outboxes.get(&id) {
                        send(outbox, message);
                    }
                }
                To::All => self
                    .outboxes
                    .values()
                    .for_each(|outbox| send(outbox, message.clone())),
                To::AllBut(but) => {
                    let others = self.outboxes.iter().filter(|(id, _)| **id != but);
                    others.for_each(|(_, outbox)| send(outbox, message.clone()));
                }
            }
        }
    }

    /// Sends the counts if they have changed, and returns them. Those that `to`
    /// leaves out must get them in another way.
    fn send_counts(&mut self, to: To, now: Now) -> Counts {
        let counts = self.book.counts(now);
        if counts != self.sent_counts {
            self.send_new_counts(to, counts.clone());
        }
        counts
    }

    fn send_new_counts(&mut self, to: To, counts: Counts) {
        self.sent_counts.clone_from(&counts);
        let message = FromAgent::Counts(counts);
        self.send(vec![Notice { to, message }]);
    }
}

/// Sends to a stream, if it has not ended. Its reader notices the end.
fn send(outbox: &Outbox, message: FromAgent) {
    let _ = outbox.send(message);
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Agent")
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}
