//! The port book: which of this processing server's connection ports are
//! free, and which session has each of the others. A state machine without
//! I/O, clock or randomness: it takes what happened and the time, and returns
//! the messages to send.
//!
//! ```text
//!           select            opened            last closed         opened
//!   free ───────────→ held ←──────────→ busy ──────────────→ lingering ──→ busy
//!    ↑                  │ unclaimed       │                         │
//!    ↑                  │ deadline        │ released, too long      │ linger time
//!    └── all acknowledged ── ending ←─────┴─────────────────────────┘
//! ```
//!
//! Where the workload has to confirm sessions, one is *offered* before it is held:
//! see `offers`.
//!
//! A session whose connections have all closed, and that none of them has claimed,
//! is held again until its claim deadline. So a port scan, or a workload that does
//! not accept yet, does not cost a client its session.
//!
//! A port is offered only while the workload listens on its server port;
//! otherwise it is not listening. The caller looks at the workload's sockets when
//! the book wants it to. A session that ends keeps its port until every
//! connection server that may know it has acknowledged the end, has stopped, or
//! is gone for good. So a free port has no session and no connection anywhere.
//!
//! A session may have several ports. They were selected together, and whatever
//! happens to the session happens to all of them: a connection on any makes it
//! busy, and they return together.
//!
//! # Time limits
//!
//! | limit | counts from | what renews it |
//! |---|---|---|
//! | confirm deadline | the selection | nothing |
//! | claim deadline | the selection, or the workload's confirmation | nothing; it does not apply while a connection is open, or after one has claimed the session |
//! | linger time | the end of the last connection | a connection ends it; it counts anew from the end of that one |
//! | longest duration | the selection | an amendment of the session, which sets another end or none |
//!
//! A restart of the agent renews none of them, because connection servers report
//! the times of each session in their greetings. The restarted agent ends no
//! session for want of a connection before the recovery is over: a connection
//! server that has not greeted yet may have one open. Neither does a connection
//! server renew any of them when it comes back, is replaced or crashes. A limit
//! that changes in the table applies to what is selected from then on; a
//! restarted agent applies the new one to all that were not amended.
//!
//! - `ports`, `listening`, `session`, `connection_servers`: the parts of the book;
//! - `select`: the choice of ports, which makes a session;
//! - `offers`: sessions that the workload has yet to confirm;
//! - `life`: the changes of sessions;
//! - `amend`: what administrators and the workload change of a session;
//! - `attachment`: the arrival and departure of connection servers;
//! - `recycling`: how many sessions the server takes;
//! - `times`: the clocks, and how long sessions may take;
//! - this file: everything else that the agent asks the book.
//!
//! Source: US 8,544,018 B2, claim 1, the processing server's port position
//! storage part.

mod amend;
mod attachment;
mod connection_servers;
mod life;
mod listening;
mod offers;
mod ports;
mod recycling;
mod select;
mod session;
mod times;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

pub use self::amend::Amended;
use self::connection_servers::ConnectionServers;
use self::life::end_notice;
pub use self::listening::{ServerPort, SocketId};
pub use self::offers::NotOffered;
use self::ports::Ports;
use self::recycling::Recycling;
pub use self::select::{NextPorts, Selected};
use self::session::{ADOPTED, Session, State};
pub use self::times::{Now, Times};
use crate::selection::{self, ConnectionServerId, Counts, EndCause, FromAgent, ToAgent};
use crate::session::SessionId;
use crate::table::{ListenPort, Row, RowState};

/// How long a server that is being stopped waits for clients that know their port:
/// those that are connecting, and those whose connection a connection server has
/// not reported yet. Longer than a round trip to anywhere.
const COMING: Duration = Duration::from_millis(500);

/// A message to connection servers.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    /// The receivers.
    pub to: To,
    /// The message.
    pub message: FromAgent,
}

/// The receivers of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// Every attached connection server, and the workload.
    All,
    /// Every attached one but this, and the workload.
    AllBut(ConnectionServerId),
    /// Every attached one but this. The workload would see nothing new.
    ServersBut(ConnectionServerId),
    /// This one.
    One(ConnectionServerId),
    /// None of them: only the workload beside the agent.
    Workload,
}

/// The book of one processing server.
#[derive(Clone, Debug)]
pub struct Book {
    times: Times,
    ports: Ports,
    sessions: BTreeMap<SessionId, Session>,
    id_by_key: BTreeMap<String, SessionId>,
    connection_servers: ConnectionServers,
    /// The number of the next session.
    next_number: u64,
    /// Deadlines of sessions, earliest first.
    deadlines: BTreeSet<(Duration, SessionId)>,
    /// The end of the time in which nothing is offered, so that connection
    /// servers can report sessions made before a restart.
    recovering_until: Option<Duration>,
    /// Sessions that ended since the restart, while recovering. A greeting that
    /// still lists one must not bring it back.
    over: BTreeSet<SessionId>,
    row_draining: bool,
    row_not_ready: bool,
    /// Whether the server is being stopped.
    stopping: bool,
    /// From when on a server that is being stopped ends what is held.
    held_until: Option<Duration>,
    recycling: Recycling,
    /// Whether the workload takes new sessions, as it says itself.
    is_ready: bool,
}

impl Book {
    /// An empty book. `recovering_until` is set after a restart of the agent:
    /// until then sessions that connection servers report are adopted, and
    /// nothing is offered.
    #[must_use]
    pub fn new(times: Times, recovering_until: Option<Duration>) -> Self {
        Self {
            times,
            ports: Ports::default(),
            sessions: BTreeMap::new(),
            id_by_key: BTreeMap::new(),
            connection_servers: ConnectionServers::default(),
            next_number: ADOPTED + 1,
            deadlines: BTreeSet::new(),
            recovering_until,
            over: BTreeSet::new(),
            row_draining: false,
            row_not_ready: false,
            stopping: false,
            held_until: None,
            recycling: Recycling::new(recovering_until.is_some()),
            is_ready: true,
        }
    }

    /// Follows a newer row; `None` when the slot is gone. A port that stays keeps
    /// its session. A session ends when one of its ports goes or leads elsewhere now.
    pub fn set_row(&mut self, row: Option<&Row>, times: Times, now: Now) -> Vec<Notice> {
        self.times = times;
        self.row_draining = row.is_none_or(|row| row.state == RowState::Draining);
        self.row_not_ready = row.is_some_and(|row| row.not_ready);
        let orphans = self.ports.set_row(row, now.monotonic);
        let mut notices = Vec::new();
        for port in orphans {
            if let Some(id) = self.ports.session(port).cloned() {
                self.end(&id, EndCause::Drained, now, &mut notices);
            }
        }
        notices
    }

    /// The server ports whose sockets must be looked at now, a few at a time: it
    /// returns others when [`Book::see`] has been called with what was found.
    pub fn take_due_looks(&mut self, now: Now) -> Vec<ServerPort> {
        self.ports.take_due(now.monotonic)
    }

    /// When [`Book::take_due_looks`] returns a port next.
    #[must_use]
    pub fn next_look(&self) -> Option<Duration> {
        self.ports.next_look()
    }

    /// Notes what a look at `port` has found at `now`: a socket that a client
    /// reaches, or none.
    pub fn see(&mut self, port: ServerPort, socket: Option<SocketId>, now: Now) {
        self.ports.see(port, socket, now.monotonic);
    }

    /// Takes a report of the connection server `from`: `Withdraw`, `Opened`, `Joined`,
    /// `Closed`, `Release` or `Ended`. Other messages do nothing.
    pub fn report(&mut self, from: &ConnectionServerId, report: &ToAgent, now: Now) -> Vec<Notice> {
        let mut notices = Vec::new();
        match report {
            ToAgent::Withdraw { request_id } => {
                self.withdraw(from, *request_id, now, &mut notices);
            }
            ToAgent::Opened(id) => {
                if self.sessions.get(id).is_some_and(|it| !it.is_offered()) {
                    self.opened(from, id, &mut notices);
                } else {
                    notices.push(end_notice(To::One(from.clone()), id, EndCause::Unknown));
                }
            }
            // It has joined already.
            ToAgent::Joined {
                session_id,
                is_companion: true,
                ..
            } => self.used(session_id),
            ToAgent::Joined {
                session_id, client, ..
            } => self.joined(from, session_id, &[*client], &mut notices),
            ToAgent::Closed {
                session_id,
                is_claimed,
            } => self.closed(from, session_id, *is_claimed, now, &mut notices),
            ToAgent::Release(id) => {
                if self.sessions.contains_key(id) {
                    self.end(id, EndCause::Released, now, &mut notices);
                } else {
                    self.remember_over(id);
                    notices.push(end_notice(To::One(from.clone()), id, EndCause::Unknown));
                }
            }
            ToAgent::Ended(id) => self.ended(from, id, now),
            _ => {}
        }
        notices
    }

    /// The live session on `port`.
    #[must_use]
    pub fn look_up(&self, port: ListenPort) -> Option<selection::Session> {
        let session = self.live_session(self.ports.session(port)?)?;
        session.confirm_deadline.is_none().then_some(session)
    }

    /// Whether `port` has no session.
    #[must_use]
    pub fn is_free(&self, port: ListenPort) -> bool {
        self.ports.has_room(port)
    }

    /// Does what is due at `now`.
    pub fn tick(&mut self, now: Now) -> Vec<Notice> {
        let mut notices = Vec::new();
        let is_due = |at: Option<Duration>| at.is_some_and(|at| at <= now.monotonic);
        if is_due(self.recovering_until) {
            self.recovering_until = None;
            self.over = BTreeSet::new();
        }
        if is_due(self.held_until) {
            notices.extend(self.end_those(now, |session| session.state == State::Held));
        }
        for stopped in self.connection_servers.take_closed(now.monotonic) {
            self.renew_unavailable();
            self.write_off(&stopped, now, &mut notices);
        }
        for gone in self.connection_servers.take_gone(now.monotonic) {
            self.renew_unavailable();
            self.write_off(&gone, now, &mut notices);
            self.end_orphans(&gone, now, &mut notices);
        }
        while let Some((at, id)) = self.deadlines.first().cloned() {
            if at > now.monotonic {
                break;
            }
            self.deadlines.remove(&(at, id.clone()));
            let Some(session) = self.sessions.get(&id) else {
                continue;
            };
            let cause = match session.state {
                _ if is_due(session.at_most) => EndCause::MaxDuration,
                State::Offered(_) => EndCause::NotConfirmedInTime,
                State::Held => EndCause::Unclaimed,
                _ => EndCause::Finished,
            };
            self.end(&id, cause, now, &mut notices);
        }
        notices
    }

    /// When [`Book::tick`] has something to do next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        let session = self.deadlines.first().map(|(at, _)| *at);
        let gone = self.connection_servers.next_deadline();
        let all = gone.into_iter().chain(session);
        let is_any_held = || self.sessions.values().any(|it| it.state == State::Held);
        all.chain(self.recovering_until)
            .chain(self.held_until.filter(|_| is_any_held()))
            .min()
    }

    /// Offers no more ports, because the server is being stopped. Sessions whose
    /// clients have not come within `COMING` end: their clients can have a server
    /// that stays, and a stop must not wait for clients that may never come. Offered
    /// sessions end at once, because no client knows their ports.
    pub fn stop(&mut self, now: Now) -> Vec<Notice> {
        self.stopping = true;
        self.held_until.get_or_insert(now.monotonic + COMING);
        self.end_those(now, Session::is_offered)
    }

    /// Ends every session, because the time to drain has passed.
    pub fn end_all(&mut self, now: Now) -> Vec<Notice> {
        self.end_those(now, |_| true)
    }

    fn end_those(&mut self, now: Now, is_over: impl Fn(&Session) -> bool) -> Vec<Notice> {
        let mut notices = Vec::new();
        let over = self.sessions.iter();
        let over = over.filter(|(_, session)| is_over(session));
        let ids: Vec<SessionId> = over.map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.end(&id, EndCause::Drained, now, &mut notices);
        }
        notices
    }

    /// Whether no port is offered any more.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.row_draining || self.stopping
    }

    /// Takes `most` sessions altogether; without end if `None`.
    pub fn take_at_most(&mut self, most: Option<u32>) {
        self.recycling.most = most;
    }

    /// Takes no more sessions, because the workload wants to be replaced.
    pub fn spend(&mut self) {
        self.recycling.ask_for();
    }

    /// Offers ports only while the workload `is_ready` for new sessions.
    pub fn set_ready(&mut self, is_ready: bool) {
        self.is_ready = is_ready;
    }

    /// Whether no port is offered for now, because the table says that the pod is
    /// not Ready, or the workload does.
    fn is_not_ready(&self) -> bool {
        self.row_not_ready || !self.is_ready
    }

    /// What the workload has said last with [`Book::set_ready`].
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Ends the session `id` for the workload. Returns nothing unless it is live.
    pub fn end_for_workload(&mut self, id: &SessionId, now: Now) -> Vec<Notice> {
        let mut notices = Vec::new();
        self.end(id, EndCause::EndedByWorkload, now, &mut notices);
        notices
    }

    /// The live session `id`.
    #[must_use]
    pub fn live_session(&self, id: &SessionId) -> Option<selection::Session> {
        let session = self.sessions.get(id).filter(|session| session.is_live())?;
        Some(self.describe(id, session))
    }

    /// The first `most` live sessions with ids above `after`, in their order. It
    /// passes over those between them that are ending.
    #[must_use]
    pub fn live_sessions_after(&self, after: &str, most: usize) -> Vec<selection::Session> {
        let above = (Bound::Excluded(after), Bound::Unbounded);
        let live = self.sessions.range::<str, _>(above);
        let live = live.filter(|(_, session)| session.is_live()).take(most);
        live.map(|(id, session)| self.describe(id, session))
            .collect()
    }

    /// Whether no port is offered any more, because there were all the sessions
    /// that this server takes, or the workload wants to be replaced.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.recycling.is_spent()
    }

    /// The number of sessions that are live, or whose end is not acknowledged.
    #[must_use]
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// Ports by name and state.
    #[must_use]
    pub fn counts(&self, now: Now) -> Counts {
        let mut ports = self.ports.counts();
        let in_use = ports.iter().map(|it| it.held + it.busy + it.lingering);
        let sessions = u32::try_from(self.sessions.len()).unwrap_or(u32::MAX);
        let further = in_use.sum::<u32>().saturating_sub(sessions);
        if self.is_recovering(now) {
            for counts in &mut ports {
                counts.not_listening += std::mem::take(&mut counts.free);
            }
        }
        Counts {
            ports,
            draining: self.is_draining(),
            spent: self.is_spent(),
            not_ready: self.is_not_ready(),
            returning: self.ports.returning(),
            further,
        }
    }

    fn is_recovering(&self, now: Now) -> bool {
        self.recovering_until
            .is_some_and(|until| now.monotonic < until)
    }
}

#[cfg(test)]
mod tests;
