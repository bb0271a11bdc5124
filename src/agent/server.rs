//! The server side of the selection protocol: streams to and from connection
//! servers around the book, which makes the decisions. `streams` has what
//! concerns one stream; this file has what all streams share.
//!
//! ```text
//! connection server ─ToAgent→ Agent ─→ Book (lock, no await) ─notices→ outboxes ─FromAgent→
//!                                       │ ↑ looks that are due
//!                                       ↓ │ what was found
//!                                      sockets
//! ```
//!
//! `workload` has what the workload beside the agent sees and may decide.
//!
//! A look never waits, so it happens under the lock: no session ends between a
//! look and the moment when the book has its result.

mod streams;
mod workload;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, broadcast, mpsc};
use tracing::{info, warn};

use super::book::{Book, Notice, Now, ServerPort, Times, To};
use super::metrics::Metrics;
use super::sockets::Reader;
use crate::follow::{Rejected, is_newer};
use crate::selection::{ConnectionServerId, Counts, FromAgent};
use crate::session::{Block, OneOrMore, WorkloadEvent};
use crate::table::{Slot, Table};

/// The messages to one stream. Unbounded, because every message answers a
/// request, reports a session or follows a change of ports, readiness or a session,
/// and all of them are bounded where they begin.
type Outbox = mpsc::UnboundedSender<FromAgent>;

/// Events that are kept for a workload that reads slowly; it loses the oldest.
const EVENTS_KEPT: usize = 256;

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
    sockets: Reader,
    /// When the sockets may be looked at next, because looks cost much here.
    look_not_before: Duration,
    table: Option<Arc<Table>>,
    outboxes: HashMap<ConnectionServerId, Outbox>,
    /// The counts that were sent last.
    sent_counts: Counts,
    /// Changes of sessions, for the workload.
    events: broadcast::Sender<WorkloadEvent>,
}

impl Agent {
    /// An agent for `slot` that has no table yet. `sockets` are those of its
    /// workload. `recovering` is how long it adopts sessions before it offers
    /// ports: after a restart.
    #[must_use]
    pub fn new(
        slot: Slot,
        sockets: Reader,
        recovering: Option<Duration>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let times = Times::from(&crate::pool::Sessions::default());
        let inner = Inner {
            book: Book::new(times, recovering),
            sockets,
            look_not_before: Duration::ZERO,
            table: None,
            outboxes: HashMap::new(),
            sent_counts: Counts::default(),
            events: broadcast::Sender::new(EVENTS_KEPT),
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

    /// Lets `change` work on the book, then does what follows from it.
    fn change(&self, change: impl FnOnce(&mut Book, Now) -> Vec<Notice>) {
        let mut inner = self.inner.lock();
        let now = self.now();
        let notices = change(&mut inner.book, now);
        self.conclude(inner, notices, now);
    }

    /// Does what follows from a change that has returned `notices`.
    fn conclude(&self, mut inner: MutexGuard<'_, Inner>, notices: Vec<Notice>, now: Now) {
        // Answers that had to wait for the workload.
        for notice in &notices {
            self.metrics.sent(&notice.message);
        }
        inner.conclude(notices, now);
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
            self.change(|book, now| {
                book.take_at_most(table.recycle.after_sessions());
                book.set_row(table.row(self.slot), Times::from(&table.sessions), now)
            });
            self.inner.lock().table = Some(table);
        }
        Ok(())
    }

    /// Does what the book has to do in time, for as long as it is polled.
    pub async fn keep_time(&self) {
        loop {
            let next = self.inner.lock().next_deadline();
            let due = next.map(|next| tokio::time::Instant::from_std(self.started + next));
            let far = tokio::time::Instant::now() + Duration::from_secs(3600);
            tokio::select! {
                () = tokio::time::sleep_until(due.unwrap_or(far)) => self.change(Book::tick),
                () = self.sooner.notified() => {}
            }
        }
    }

    /// Offers no more ports, and ends the sessions whose clients do not come soon.
    pub fn stop(&self) {
        self.change(Book::stop);
    }

    /// Ends every session.
    pub fn end_all(&self) {
        self.change(Book::end_all);
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
    /// Does a look that is due, sends new counts, and then the messages that the
    /// book has returned: a connection server that receives the end of a session knows
    /// already that its port returns.
    fn conclude(&mut self, notices: Vec<Notice>, now: Now) {
        if now.monotonic >= self.look_not_before {
            let due = self.book.take_due_looks(now);
            self.look(&due, now);
        }
        self.send_counts(To::All, now);
        self.send(notices);
    }

    /// Looks at `ports`. Returns whether that was possible.
    fn look(&mut self, ports: &[ServerPort], now: Now) -> bool {
        if ports.is_empty() {
            return true;
        }
        self.look_not_before = now.monotonic + self.sockets.pause();
        let found = self.sockets.look(ports);
        let found = found.inspect_err(|error| {
            warn!(%error, "failed to look at the workload's sockets; its ports stay as they were");
        });
        let is_done = found.is_ok();
        for (port, socket) in ports.iter().zip(found.unwrap_or_default()) {
            self.book.see(*port, socket, now);
        }
        is_done
    }

    /// Looks at the ports that a request for `blocks` gets next, until they are
    /// ones that the workload listens on. Where looks cost much, what was seen last
    /// must do. If there are none, looks at those that it could get.
    fn verify(&mut self, blocks: &OneOrMore<Block>, now: Now) {
        self.verify_next(blocks, now);
        if self.book.next_ports(blocks).is_none() && now.monotonic >= self.look_not_before {
            let ports = self.book.take_looks_on_request(blocks, now);
            self.look(&ports, now);
        }
    }

    fn verify_next(&mut self, blocks: &OneOrMore<Block>, now: Now) {
        let looks_cost_much = !self.sockets.pause().is_zero();
        while let Some(next) = self.book.next_ports(blocks) {
            if looks_cost_much
                || !self.look(&next.server_ports, now)
                || self.book.next_ports(blocks) == Some(next)
            {
                return;
            }
        }
    }

    /// When there is something to do next.
    fn next_deadline(&self) -> Option<Duration> {
        let look = self.book.next_look();
        let look = look.map(|look| look.max(self.look_not_before));
        look.into_iter().chain(self.book.next_deadline()).min()
    }

    /// Whether `outbox` is that of the newest stream of `id`.
    fn is_current(&self, id: &ConnectionServerId, outbox: &Outbox) -> bool {
        let current = self.outboxes.get(id);
        current.is_some_and(|current| current.same_channel(outbox))
    }

    fn send(&self, notices: Vec<Notice>) {
        for Notice { to, message } in notices {
            self.tell_workload(&to, &message);
            match to {
                To::Workload => {}
                To::One(id) => {
                    if let Some(outbox) = self.outboxes.get(&id) {
                        send(outbox, message);
                    }
                }
                To::All => self
                    .outboxes
                    .values()
                    .for_each(|outbox| send(outbox, message.clone())),
                To::AllBut(but) | To::ServersBut(but) => {
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
