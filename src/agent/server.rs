//! The server side of the selection protocol: streams to and from connection
//! servers around the book. Decides nothing itself. What one stream carries is
//! in `streams`; here is what all share.
//!
//! ```text
//! connection server ─ToAgent→ Agent ─→ Book (lock, no await) ─notices→ outboxes ─FromAgent→
//! ```

mod streams;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tonic::Status;
use tracing::info;

use super::book::{Book, Listening, Notice, Now, Times, To};
use super::metrics::Metrics;
use crate::follow::{Rejected, accept};
use crate::selection::v1::{self, FromAgent, from_agent};
use crate::table::{Slot, Table};

/// Unbounded: every message answers a request or tells of a session, and both
/// are bounded where they begin.
type Outbox = mpsc::UnboundedSender<Result<FromAgent, Status>>;

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
    outboxes: HashMap<String, Outbox>,
    told: v1::Counts,
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
            told: v1::Counts::default(),
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
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let unix_ms = since_epoch.map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        });
        Now {
            monotonic: self.started.elapsed(),
            unix_ms,
        }
    }

    /// Lets `change` work on the book, then sends what is to be told.
    fn change(&self, change: impl FnOnce(&mut Book, Now) -> Vec<Notice>) {
        let now = self.now();
        let mut inner = self.inner.lock();
        let notices = change(&mut inner.book, now);
        inner.send(notices);
        inner.tell_counts(now);
        drop(inner);
        self.sooner.notify_one();
    }

    /// Follows `text`, a table with our row, if it is newer.
    ///
    /// # Errors
    /// [`Rejected`] when the last table stays in force.
    pub fn follow(&self, text: &str) -> Result<(), Rejected> {
        let current = self.inner.lock().table.clone();
        let accepted = accept(current.as_deref(), text);
        if let Err(reason) = &accepted {
            self.metrics.rejected_tables.count(reason);
        }
        if let Some(table) = accepted? {
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

    /// The workload's listening ports are these now.
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

    /// Offers nothing more.
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
    pub fn counts(&self) -> v1::Counts {
        self.inner.lock().book.counts(self.now())
    }

    /// Sessions that are not over.
    #[must_use]
    pub fn session_count(&self) -> usize {
        self.inner.lock().book.session_count()
    }
}

impl Inner {
    /// Whether `outbox` is that of the newest stream of `name`.
    fn is_current(&self, name: &str, outbox: &Outbox) -> bool {
        let current = self.outboxes.get(name);
        current.is_some_and(|current| current.same_channel(outbox))
    }

    fn send(&self, notices: Vec<Notice>) {
        for Notice { to, message } in notices {
            match to {
                To::One(name) => {
                    if let Some(outbox) = self.outboxes.get(&name) {
                        send(outbox, message);
                    }
                }
                To::All => self
                    .outboxes
                    .values()
                    .for_each(|outbox| send(outbox, message.clone())),
                To::AllBut(but) => {
                    let others = self.outboxes.iter().filter(|(name, _)| **name != but);
                    others.for_each(|(_, outbox)| send(outbox, message.clone()));
                }
            }
        }
    }

    /// Tells everyone the counts if they are others than told last.
    fn tell_counts(&mut self, now: Now) {
        let counts = self.book.counts(now);
        if counts != self.told {
            self.told = counts.clone();
            self.send(vec![Notice {
                to: To::All,
                message: from_agent::Message::Counts(counts),
            }]);
        }
    }
}

/// A stream that is gone gets nothing; its end is noticed by its reader.
fn send(outbox: &Outbox, message: from_agent::Message) {
    let _ = outbox.send(Ok(FromAgent {
        message: Some(message),
    }));
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Agent")
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}
