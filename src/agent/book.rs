//! The port book: which of this processing server's connection ports are
//! free, and which session has each of the others. A state machine without
//! I/O, clock or randomness: it takes what happened and the time, and returns
//! what to tell.
//!
//! ```text
//!           select            opened            last closed         opened
//!   free ───────────→ held ───────────→ busy ──────────────→ lingering ──→ busy
//!    ↑                  │ deadline        │ released, too long      │ linger time
//!    └── all acknowledged ── ending ←─────┴─────────────────────────┘
//! ```
//!
//! A port is offered only while the workload listens on its server port;
//! otherwise it is not listening. A session that ends keeps its port until every
//! connection server that may know it has acknowledged the end, or is no more,
//! or is gone for good: so a free port has no session and no connection
//! anywhere.
//!
//! - `ports`, `session`, `connection_servers`: what is kept of each;
//! - `life`: what becomes of sessions; `attachment`: connection servers come and
//!   go; here: what the agent asks for.
//!
//! Source: US 8,544,018 B2, claim 1, the processing server's port position
//! storage part and request receiving part.

mod attachment;
mod connection_servers;
mod life;
mod ports;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use self::connection_servers::ConnectionServers;
use self::life::end_notice;
use self::ports::Ports;
pub use self::ports::{Listening, PortFilter};
use self::session::{ADOPTED, Session, State};
use crate::pool::PortProtocol;
use crate::selection::v1::{self, end, from_agent, refused};
use crate::table::{ListenPort, Row, RowState};

/// Longest session id and connection server name, in bytes.
const MAX_ID_BYTES: usize = 64;
/// Longest idempotency key, in bytes.
const MAX_KEY_BYTES: usize = 128;
/// Longest port name, in bytes.
const MAX_NAME_BYTES: usize = 15;

/// The time, as the book needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Now {
    /// Since any fixed moment; never goes back.
    pub monotonic: Duration,
    /// Milliseconds since the Unix epoch, for what clients are told.
    pub unix_ms: u64,
}

/// How long sessions may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// From selection to the first connection.
    pub claim: Duration,
    /// From the last connection's end to the session's.
    pub linger: Duration,
    /// From selection to the end, whatever happens.
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

/// Something to tell connection servers.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    /// To whom.
    pub to: To,
    /// What.
    pub message: from_agent::Message,
}

/// Who is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// Every attached connection server.
    All,
    /// Every attached one but this.
    AllBut(String),
    /// This one.
    One(String),
}

/// The book of one processing server.
#[derive(Clone, Debug)]
pub struct Book {
    times: Times,
    ports: Ports,
    sessions: BTreeMap<String, Session>,
    id_by_key: BTreeMap<String, String>,
    connection_servers: ConnectionServers,
    /// The number of the next session.
    next_number: u64,
    /// Deadlines of sessions, earliest first.
    deadlines: BTreeSet<(Duration, String)>,
    /// Until when nothing is offered, so that connection servers can report
    /// sessions made before a restart.
    recovering_until: Option<Duration>,
    /// Sessions that are over since the restart, while recovering: a greeting
    /// that lists one comes late, and must not bring it back.
    over: BTreeSet<String>,
    row_draining: bool,
    stopping: bool,
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
            stopping: false,
        }
    }

    /// Follows a newer row; `None` when the slot is gone. Ports that stay keep
    /// all; sessions on ports that go, or lead elsewhere now, end.
    pub fn set_row(&mut self, row: Option<&Row>, times: Times) -> Vec<Notice> {
        self.times = times;
        self.row_draining = row.is_none_or(|row| row.state == RowState::Draining);
        let orphans = self.ports.set_row(row);
        let mut notices = Vec::new();
        for port in orphans {
            if let Some(id) = self.ports.session(port).map(str::to_owned) {
                self.end(&id, end::Cause::Drained, &mut notices);
            }
        }
        notices
    }

    /// The ports that the workload listens on have changed.
    pub fn set_listening(&mut self, listening: Listening) {
        self.ports.set_listening(listening);
    }

    /// Selects an available connection port for a request of connection server
    /// `name`: the port that has been free for the longest time. The same
    /// idempotency key selects the same live session.
    ///
    /// # Errors
    /// Why not; nothing has changed then.
    pub fn select(
        &mut self,
        name: &str,
        request: &v1::Select,
        now: Now,
    ) -> Result<(v1::Session, Vec<Notice>), refused::Cause> {
        let filter = check(request).ok_or(refused::Cause::Malformed)?;
        if let Some(id) = self.id_by_key.get(&request.idempotency_key)
            && let Some(session) = self.sessions.get(id)
        {
            let is_same = session.bound_client == request.bound_client
                && (session.filter == filter || self.ports.fits(session.port, &filter));
            return match is_same {
                true => Ok((self.describe(id, session), Vec::new())),
                false => Err(refused::Cause::KeyReused),
            };
        }
        if self.sessions.contains_key(&request.session_id) {
            return Err(refused::Cause::DuplicateId);
        }
        if self.is_draining() {
            return Err(refused::Cause::Draining);
        }
        if self.is_recovering(now) {
            return Err(refused::Cause::Recovering);
        }
        if !self.ports.knows(&filter) {
            return Err(refused::Cause::UnknownPort);
        }
        let port = self
            .ports
            .longest_free(&filter)
            .ok_or(refused::Cause::NoFreePort)?;
        let id = request.session_id.clone();
        let session = Session {
            number: self.next_number,
            port,
            owner: name.to_owned(),
            state: State::Held,
            open: BTreeSet::new(),
            filter,
            idempotency_key: request.idempotency_key.clone(),
            bound_client: request.bound_client.clone(),
            created_ms: now.unix_ms,
            claim_deadline_ms: now.unix_ms + millis(self.times.claim),
            until: Some(now.monotonic + self.times.claim),
            at_most: self.times.max_duration.map(|most| now.monotonic + most),
        };
        self.next_number += 1;
        let described = self.describe(&id, &session);
        self.insert(id, session);
        let message = from_agent::Message::Session(described.clone());
        let notice = Notice {
            to: To::AllBut(name.to_owned()),
            message,
        };
        Ok((described, vec![notice]))
    }

    /// Connection server `name` reports one of `Opened`, `Closed`, `Release`
    /// and `Ended`; other messages do nothing.
    pub fn report(&mut self, name: &str, report: &v1::to_agent::Message, now: Now) -> Vec<Notice> {
        use v1::to_agent::Message;
        let mut notices = Vec::new();
        match report {
            Message::Opened(v1::Opened { session_id }) => {
                if self.sessions.contains_key(session_id) {
                    self.opened(name, session_id, &mut notices);
                } else {
                    let to = To::One(name.to_owned());
                    notices.push(end_notice(to, session_id, end::Cause::Unknown));
                }
            }
            Message::Closed(v1::Closed { session_id }) => {
                self.closed(name, session_id, now, &mut notices)
            }
            Message::Release(v1::Release { session_id }) => {
                if self.sessions.contains_key(session_id) {
                    self.end(session_id, end::Cause::Released, &mut notices);
                } else {
                    self.remember_over(session_id);
                    let to = To::One(name.to_owned());
                    notices.push(end_notice(to, session_id, end::Cause::Unknown));
                }
            }
            Message::Ended(v1::Ended { session_id }) => self.ended(name, session_id),
            _ => {}
        }
        notices
    }

    /// The live session on `port`.
    #[must_use]
    pub fn look_up(&self, port: ListenPort) -> Option<v1::Session> {
        let id = self.ports.session(port)?;
        let session = self.sessions.get(id).filter(|session| session.is_live())?;
        Some(self.describe(id, session))
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
        for name in self.connection_servers.take_closed(now.monotonic) {
            self.has_nothing(&name, now, &mut notices);
        }
        for name in self.connection_servers.take_gone(now.monotonic) {
            self.has_nothing(&name, now, &mut notices);
            self.end_orphans(&name, &mut notices);
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
                _ if is_due(session.at_most) => end::Cause::MaxDuration,
                State::Held => end::Cause::Unclaimed,
                _ => end::Cause::Finished,
            };
            self.end(&id, cause, &mut notices);
        }
        notices
    }

    /// When [`Book::tick`] has something to do next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        let session = self.deadlines.first().map(|(at, _)| *at);
        let gone = self.connection_servers.next_deadline();
        let all = gone.into_iter().chain(session);
        all.chain(self.recovering_until).min()
    }

    /// Offers nothing more: the server is being stopped.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Ends every session: the time to drain has passed.
    pub fn end_all(&mut self) -> Vec<Notice> {
        let mut notices = Vec::new();
        let ids: Vec<String> = self.sessions.keys().cloned().collect();
        for id in ids {
            self.end(&id, end::Cause::Drained, &mut notices);
        }
        notices
    }

    /// Whether no port is offered any more.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.row_draining || self.stopping
    }

    /// Sessions that are not over and acknowledged.
    #[must_use]
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// Ports by name and state.
    #[must_use]
    pub fn counts(&self, now: Now) -> v1::Counts {
        let mut ports = self.ports.counts();
        if self.is_recovering(now) {
            for counts in &mut ports {
                counts.not_listening += std::mem::take(&mut counts.free);
            }
        }
        v1::Counts {
            ports,
            draining: self.is_draining(),
        }
    }

    fn is_recovering(&self, now: Now) -> bool {
        self.recovering_until
            .is_some_and(|until| now.monotonic < until)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What a request asks for; `None` when it is malformed.
fn check(request: &v1::Select) -> Option<PortFilter> {
    let is_valid = !request.session_id.is_empty()
        && request.session_id.len() <= MAX_ID_BYTES
        && request.idempotency_key.len() <= MAX_KEY_BYTES
        && request.port_name.len() <= MAX_NAME_BYTES
        && (request.bound_client.is_empty() || request.bound_client.parse::<IpAddr>().is_ok());
    let protocol = match request.protocol.as_str() {
        "" => None,
        name => Some(PortProtocol::from_name(name)?),
    };
    let name = (!request.port_name.is_empty()).then(|| request.port_name.clone());
    is_valid.then_some(PortFilter { name, protocol })
}

#[cfg(test)]
mod tests;
