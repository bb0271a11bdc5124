//! The sessions this connection server knows, and the gate they make for the
//! data plane.
//!
//! The processing servers' agents own the sessions; what is here is what they
//! have told, in the order they told it. The rules that keep a port from
//! serving two clients:
//!
//! - A connection is admitted under the same lock that ends sessions, so it
//!   belongs to a live session and its agent is told before anything else is
//!   sent. While the agent is out of reach, the next greeting tells it; an
//!   agent gives no port to others that a connection server out of reach may
//!   have, and sessions here are forgotten before it stops to wait.
//! - `End` is final: the session goes from the gate, its connections are cut,
//!   and `Ended` is sent when the last is closed. The agent frees the port
//!   only then.
//!
//! ```text
//! data plane ─admit/closed→ Sessions ─Opened/Closed/Ended→ agents
//! agents ─Session/End→ Sessions ─cut→ data plane
//! ```

pub mod handover;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc::UnboundedSender;

use super::forward::{Gate, SessionKey, Ticket, Traffic, Transport, Verdict};
use super::trace::{Carried, Trace};
use crate::pool::Admission;
use crate::selection::v1::{self, ToAgent, end, to_agent::Message};
use crate::table::{ListenPort, PortIndex, Table};

/// Where messages to one agent go. Unbounded: every message stands for a
/// request, a connection or a session, and those are bounded where they begin.
pub type Outbox = UnboundedSender<ToAgent>;

/// How long the data plane keeps a client whose session is asked for; answers
/// that come later find nobody.
const ASK_LIFETIME: Duration = Duration::from_secs(2);

/// The key of connections under `admission: Open`, which belong to no session.
const NO_SESSION: SessionKey = SessionKey(0);

/// What the data plane must do after a change, outside the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Cut the session's connections.
    Cut(ListenPort, SessionKey),
    /// Look at the parked client again.
    Answer(ListenPort, Ticket, Verdict),
}

/// The sessions of all processing servers, as far as known here.
#[derive(Debug, Default)]
pub struct Sessions {
    inner: RwLock<Inner>,
    next_key: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    admission: Admission,
    table: Option<PortIndex>,
    outboxes: HashMap<u32, Outbox>,
    live: HashMap<ListenPort, Live>,
    port_by_id: HashMap<String, ListenPort>,
    id_by_idempotency_key: HashMap<String, String>,
    ending: HashMap<SessionKey, Ending>,
    /// Sessions that a client has given back, with their slot, until the agent
    /// says the end: what it told before it heard of that comes late, and what
    /// we told may be lost with a stream.
    released: HashMap<String, u32>,
    asked: HashMap<ListenPort, Vec<Parked>>,
}

#[derive(Debug)]
struct Live {
    key: SessionKey,
    slot: u32,
    bound_client: Option<IpAddr>,
    // A lock, not an atomic: the agent must hear Opened and Closed in the order
    // in which the count leaves and reaches zero.
    flows: Mutex<Flows>,
    session: v1::Session,
    trace: Trace,
}

/// Connections and UDP flows of a session.
#[derive(Debug, Default)]
struct Flows {
    open: u32,
    carried: Carried,
}

impl Flows {
    fn open(&mut self) {
        self.open += 1;
        self.carried.opened();
    }

    /// One has ended. Whether it was the last.
    fn close(&mut self, traffic: Traffic) -> bool {
        self.open -= 1;
        self.carried.closed(traffic);
        self.open == 0
    }
}

/// A client that waits for its session to be found.
#[derive(Debug)]
struct Parked {
    ticket: Ticket,
    client: IpAddr,
    since: Instant,
}

/// A session that is over but has connections that are still being cut.
#[derive(Debug)]
struct Ending {
    id: String,
    slot: u32,
    flows: Flows,
    cause: &'static str,
    trace: Trace,
}

impl Inner {
    /// The slot that `port` leads to.
    fn slot(&self, port: ListenPort) -> Option<u32> {
        Some(self.table.as_ref()?.find(port)?.0.slot)
    }

    fn send(&self, slot: u32, message: Message) {
        if let Some(outbox) = self.outboxes.get(&slot) {
            // A closed outbox is a stream that just broke; the next greeting
            // tells the agent all it missed.
            let _ = outbox.send(ToAgent {
                message: Some(message),
            });
        }
    }

    fn admit(&self, port: ListenPort, client: IpAddr) -> Verdict {
        let Some(live) = self.live.get(&port) else {
            return match self.admission {
                Admission::Open => Verdict::Admit(NO_SESSION),
                Admission::Reserved => Verdict::Ask,
            };
        };
        if live.bound_client.is_some_and(|bound| bound != client) {
            return Verdict::Refuse;
        }
        let mut flows = live.flows.lock();
        flows.open();
        if flows.open == 1 {
            let session_id = live.session.session_id.clone();
            self.send(live.slot, Message::Opened(v1::Opened { session_id }));
        }
        Verdict::Admit(live.key)
    }

    /// Asks for the session on `port`. The port is the request's id: there is
    /// one unanswered question per port.
    fn look_up(&self, slot: u32, port: ListenPort) {
        let connection_port = u32::from(port.get());
        let request_id = u64::from(connection_port);
        self.send(
            slot,
            Message::Lookup(v1::Lookup {
                request_id,
                connection_port,
            }),
        );
    }

    /// Takes a session out of the gate, for the log's `cause`. Its connections
    /// must be cut if the result says so; with none left its agent hears `Ended`
    /// at once.
    fn end(&mut self, id: &str, cause: &'static str) -> Option<Action> {
        let port = self.port_by_id.remove(id)?;
        let live = self.live.remove(&port)?;
        // The key may name a later session by now.
        let idempotency_key = &live.session.idempotency_key;
        if self
            .id_by_idempotency_key
            .get(idempotency_key)
            .is_some_and(|owner| owner == id)
        {
            self.id_by_idempotency_key.remove(idempotency_key);
        }
        let flows = live.flows.into_inner();
        if flows.open == 0 {
            live.trace.ended(cause, &flows.carried);
            return None;
        }
        let ending = Ending {
            id: id.to_owned(),
            slot: live.slot,
            flows,
            cause,
            trace: live.trace,
        };
        self.ending.insert(live.key, ending);
        Some(Action::Cut(port, live.key))
    }

    fn is_ending(&self, id: &str) -> bool {
        self.ending.values().any(|ending| ending.id == id)
    }
}

/// `address` without the IPv6 wrapping that dual-stack sockets give IPv4 peers.
#[must_use]
pub fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

impl Sessions {
    /// Follows `table`: which slot a port asks, and whether a session is needed.
    pub fn set_table(&self, table: &Arc<Table>) {
        let mut inner = self.inner.write();
        inner.table = Some(PortIndex::new(table.clone()));
        inner.released.retain(|_, slot| table.row(*slot).is_some());
        inner.admission = table.sessions.admission;
    }

    /// An agent's stream is up: from now on its messages go to `outbox`, the
    /// greeting first. `greet` makes it from the sessions known on this server.
    pub fn attach(
        &self,
        slot: u32,
        outbox: Outbox,
        greet: impl FnOnce(Vec<v1::Session>) -> ToAgent,
    ) {
        let mut inner = self.inner.write();
        let known = inner
            .live
            .values()
            .filter(|live| live.slot == slot)
            .map(|live| v1::Session {
                open_here: live.flows.lock().open > 0,
                ..live.session.clone()
            });
        let _ = outbox.send(greet(known.collect()));
        // Whether these got through the former stream nobody knows.
        for (id, _) in inner.released.iter().filter(|(_, of)| **of == slot) {
            let session_id = id.clone();
            let message = Some(Message::Release(v1::Release { session_id }));
            let _ = outbox.send(ToAgent { message });
        }
        inner.outboxes.insert(slot, outbox);
    }

    /// The agent has welcomed us: parked clients of its ports are asked for.
    pub fn welcomed(&self, slot: u32) {
        let inner = self.inner.read();
        let ports = inner
            .asked
            .keys()
            .filter(|port| inner.slot(**port) == Some(slot));
        for &port in ports {
            inner.look_up(slot, port);
        }
    }

    /// An agent's stream is gone; it is told nothing. Does nothing when a newer
    /// stream than `outbox` is up.
    pub fn detach(&self, slot: u32, outbox: &Outbox) {
        let mut inner = self.inner.write();
        if inner
            .outboxes
            .get(&slot)
            .is_some_and(|current| current.same_channel(outbox))
        {
            inner.outboxes.remove(&slot);
        }
    }

    /// Forgets every session of `slot` and has its connections cut: the server
    /// is gone, or was out of reach for too long.
    #[must_use]
    pub fn forget_server(&self, slot: u32) -> Vec<Action> {
        let mut inner = self.inner.write();
        let ids: Vec<String> = inner
            .live
            .values()
            .filter(|live| live.slot == slot)
            .map(|live| live.session.session_id.clone())
            .collect();
        ids.iter()
            .filter_map(|id| inner.end(id, "SERVER_GONE"))
            .collect()
    }

    /// Whether connections of ended sessions of `slot` are still being cut: a
    /// greeting would not list them.
    #[must_use]
    pub fn is_cutting(&self, slot: u32) -> bool {
        self.inner
            .read()
            .ending
            .values()
            .any(|ending| ending.slot == slot)
    }

    /// An agent tells of a session, new or changed.
    pub fn learn(&self, slot: u32, session: v1::Session) -> Vec<Action> {
        self.learn_traced(slot, session, Trace::learned)
    }

    /// The same; a new session is logged under the trace that `trace` gives.
    pub fn learn_traced(
        &self,
        slot: u32,
        session: v1::Session,
        trace: impl FnOnce() -> Trace,
    ) -> Vec<Action> {
        let number = u16::try_from(session.connection_port).unwrap_or(0);
        let Some(port) = ListenPort::new(number) else {
            return Vec::new();
        };
        let mut inner = self.inner.write();
        // Another server cannot speak for this port.
        if inner.slot(port) != Some(slot) {
            return Vec::new();
        }
        let mut actions = Vec::new();
        let known = inner
            .live
            .get(&port)
            .map(|live| live.session.session_id.clone());
        if known.as_ref() == Some(&session.session_id) {
            if let Some(live) = inner.live.get_mut(&port) {
                live.session = session;
            }
            return actions;
        }
        let id = &session.session_id;
        if inner.is_ending(id) || inner.released.contains_key(id) {
            return actions;
        }
        // A successor on the port means that we missed the end of the former.
        actions.extend(known.and_then(|id| inner.end(&id, "SUPERSEDED")));
        let trace = trace();
        let row = inner.table.as_ref().and_then(|table| table.find(port));
        trace.selected(&session, row.map_or("", |(row, _)| &row.server));
        let live = Live {
            key: SessionKey(self.next_key.fetch_add(1, Ordering::Relaxed) + 1),
            slot,
            bound_client: session.bound_client.parse().ok().map(canonical),
            flows: Mutex::default(),
            session,
            trace,
        };
        inner.insert(live, port);
        actions
    }

    /// An agent ends a session. Answers `Ended` when no connection is left.
    #[must_use]
    pub fn end(&self, slot: u32, id: &str, cause: end::Cause) -> Option<Action> {
        let mut inner = self.inner.write();
        inner.released.remove(id);
        let action = inner.end(id, cause.as_str_name());
        if action.is_none() && !inner.is_ending(id) {
            let session_id = id.to_owned();
            inner.send(slot, Message::Ended(v1::Ended { session_id }));
        }
        action
    }

    /// The client gives a session back. `None` when it is not known;
    /// `Some(Err(()))` when its server is out of reach.
    pub fn release(&self, id: &str) -> Option<Result<Option<Action>, ()>> {
        let mut inner = self.inner.write();
        let port = *inner.port_by_id.get(id)?;
        let slot = inner.live.get(&port)?.slot;
        if !inner.outboxes.contains_key(&slot) {
            return Some(Err(()));
        }
        let session_id = id.to_owned();
        inner.send(slot, Message::Release(v1::Release { session_id }));
        inner.released.insert(id.to_owned(), slot);
        Some(Ok(inner.end(id, end::Cause::Released.as_str_name())))
    }

    /// An agent's answer to the question `request_id`: the parked clients can
    /// be decided.
    pub fn looked_up(
        &self,
        slot: u32,
        request_id: u64,
        session: Option<v1::Session>,
    ) -> Vec<Action> {
        let Some(port) = u16::try_from(request_id).ok().and_then(ListenPort::new) else {
            return Vec::new();
        };
        let mut actions = session.map_or_else(Vec::new, |session| self.learn(slot, session));
        let mut inner = self.inner.write();
        let parked = inner.asked.remove(&port).unwrap_or_default();
        for Parked {
            ticket,
            client,
            since,
        } in parked
        {
            if since.elapsed() > ASK_LIFETIME {
                continue;
            }
            let verdict = match inner.admit(port, client) {
                Verdict::Ask => Verdict::Refuse,
                verdict => verdict,
            };
            actions.push(Action::Answer(port, ticket, verdict));
        }
        actions
    }

    /// The live session `id`, with the slot of its server.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<(u32, v1::Session)> {
        let inner = self.inner.read();
        let live = inner.live.get(inner.port_by_id.get(id)?)?;
        Some((live.slot, live.session.clone()))
    }

    /// The live session on `port`, by id.
    #[must_use]
    pub fn session_on(&self, port: ListenPort) -> Option<String> {
        let inner = self.inner.read();
        Some(inner.live.get(&port)?.session.session_id.clone())
    }

    /// The live session made under an idempotency key.
    #[must_use]
    pub fn get_by_idempotency_key(&self, key: &str) -> Option<(u32, v1::Session)> {
        let id = self.inner.read().id_by_idempotency_key.get(key).cloned()?;
        self.get(&id)
    }

    /// Number of live sessions by state, as their agents told last.
    #[must_use]
    pub fn count_by_state(&self) -> [(&'static str, i64); 3] {
        use v1::session::State;
        let mut counts = [("held", 0), ("busy", 0), ("lingering", 0)];
        for live in self.inner.read().live.values() {
            let index = match live.session.state() {
                State::Held | State::Unspecified => 0,
                State::Busy => 1,
                State::Lingering => 2,
            };
            counts[index].1 += 1;
        }
        counts
    }

    /// Number of live sessions with connections here.
    #[must_use]
    pub fn open_count(&self) -> usize {
        let inner = self.inner.read();
        inner
            .live
            .values()
            .filter(|live| live.flows.lock().open > 0)
            .count()
    }
}

impl Gate for Sessions {
    fn admit(&self, port: ListenPort, _transport: Transport, client: SocketAddr) -> Verdict {
        self.inner.read().admit(port, canonical(client.ip()))
    }

    fn ask(&self, ticket: Ticket, port: ListenPort, _transport: Transport, client: SocketAddr) {
        let now = Instant::now();
        let mut inner = self.inner.write();
        let Some(slot) = inner.slot(port) else {
            return;
        };
        let parked = inner.asked.entry(port).or_default();
        parked.retain(|parked| now.duration_since(parked.since) <= ASK_LIFETIME);
        // One question at a time and port, however many clients wait on it.
        let is_first = parked.is_empty();
        parked.push(Parked {
            ticket,
            client: canonical(client.ip()),
            since: now,
        });
        if is_first {
            inner.look_up(slot, port);
        }
    }

    fn closed(&self, port: ListenPort, session: SessionKey, traffic: Traffic) {
        if session == NO_SESSION {
            return;
        }
        {
            let inner = self.inner.read();
            if let Some(live) = inner.live.get(&port).filter(|live| live.key == session) {
                let mut flows = live.flows.lock();
                if flows.close(traffic) {
                    let session_id = live.session.session_id.clone();
                    inner.send(live.slot, Message::Closed(v1::Closed { session_id }));
                }
                return;
            }
        }
        let mut inner = self.inner.write();
        let Some(ending) = inner.ending.get_mut(&session) else {
            return;
        };
        if ending.flows.close(traffic)
            && let Some(ended) = inner.ending.remove(&session)
        {
            ended.trace.ended(ended.cause, &ended.flows.carried);
            let session_id = ended.id;
            inner.send(ended.slot, Message::Ended(v1::Ended { session_id }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{LoadSharing, PortProtocol, ProxyProtocol, Sessions as Settings};
    use crate::table::{FORMAT_VERSION, PortRange, Row, RowState, TargetPort};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    const PORT: u16 = 20_000;

    fn table(admission: Admission) -> Table {
        let range = |slot: u16| PortRange {
            name: "main".to_owned(),
            connection_port: port(PORT + 10 * slot),
            server_port: TargetPort::new(7000).unwrap(),
            count: 10,
            protocol: PortProtocol::TCP,
            shared: false,
            proxy_protocol: ProxyProtocol::None,
        };
        let row = |slot: u16| Row {
            slot: slot.into(),
            server: format!("pool-{slot}"),
            server_uid: None,
            draining_since: None,
            address: None,
            state: RowState::Active,
            ranges: vec![range(slot)],
        };
        Table {
            format_version: FORMAT_VERSION,
            pool: "pool".to_owned(),
            pool_uid: "uid".to_owned(),
            generation: 1,
            advertised_address: None,
            agent_port: TargetPort::new(7070).unwrap(),
            load_sharing: LoadSharing::default(),
            sessions: Settings {
                admission,
                ..Settings::default()
            },
            rows: vec![row(0), row(1)],
        }
    }

    fn port(number: u16) -> ListenPort {
        ListenPort::new(number).unwrap()
    }

    fn client(last: u8) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, last], 4000))
    }

    fn session(id: &str, number: u16) -> v1::Session {
        v1::Session {
            session_id: id.to_owned(),
            connection_port: number.into(),
            port_name: "main".to_owned(),
            protocol: "TCP".to_owned(),
            ..v1::Session::default()
        }
    }

    /// Sessions with slot 0 attached, and what its agent is sent.
    fn attached() -> (Sessions, Outbox, UnboundedReceiver<ToAgent>) {
        let sessions = Sessions::default();
        sessions.set_table(&Arc::new(table(Admission::Reserved)));
        let (outbox, mut sent) = unbounded_channel();
        sessions.attach(0, outbox.clone(), |_| ToAgent::default());
        sent.try_recv().expect("the greeting");
        (sessions, outbox, sent)
    }

    fn next(sent: &mut UnboundedReceiver<ToAgent>) -> Option<Message> {
        sent.try_recv().ok()?.message
    }

    fn admit(sessions: &Sessions, number: u16, last: u8) -> Verdict {
        sessions.admit(port(number), Transport::Tcp, client(last))
    }

    fn opened(id: &str) -> Option<Message> {
        Some(Message::Opened(v1::Opened {
            session_id: id.to_owned(),
        }))
    }

    fn closed(id: &str) -> Option<Message> {
        Some(Message::Closed(v1::Closed {
            session_id: id.to_owned(),
        }))
    }

    fn ended(id: &str) -> Option<Message> {
        Some(Message::Ended(v1::Ended {
            session_id: id.to_owned(),
        }))
    }

    #[test]
    fn only_the_first_and_the_last_connection_are_told() {
        let (sessions, _outbox, mut sent) = attached();
        sessions.learn(0, session("a", PORT));
        let Verdict::Admit(key) = admit(&sessions, PORT, 1) else {
            panic!("not admitted")
        };
        assert_eq!(admit(&sessions, PORT, 1), Verdict::Admit(key));
        assert_eq!(next(&mut sent), opened("a"));
        assert_eq!(next(&mut sent), None);
        sessions.closed(port(PORT), key, Traffic::default());
        assert_eq!(next(&mut sent), None);
        sessions.closed(port(PORT), key, Traffic::default());
        assert_eq!(next(&mut sent), closed("a"));
        assert_eq!(sessions.open_count(), 0);
    }

    #[test]
    fn an_ended_session_is_acknowledged_when_its_last_connection_is_closed() {
        let (sessions, _outbox, mut sent) = attached();
        sessions.learn(0, session("a", PORT));
        let Verdict::Admit(key) = admit(&sessions, PORT, 1) else {
            panic!("not admitted")
        };
        assert_eq!(next(&mut sent), opened("a"));
        assert_eq!(
            sessions.end(0, "a", end::Cause::Finished),
            Some(Action::Cut(port(PORT), key))
        );
        assert!(sessions.is_cutting(0));
        assert_eq!(
            admit(&sessions, PORT, 1),
            Verdict::Ask,
            "nothing more is admitted"
        );
        assert_eq!(
            sessions.end(0, "a", end::Cause::Finished),
            None,
            "asked again while cutting"
        );
        assert_eq!(next(&mut sent), None, "not over yet");
        sessions.closed(port(PORT), key, Traffic::default());
        assert_eq!(next(&mut sent), ended("a"));
        assert!(!sessions.is_cutting(0));
    }

    #[test]
    fn an_unused_or_unknown_session_is_acknowledged_at_once() {
        let (sessions, _outbox, mut sent) = attached();
        sessions.learn(0, session("a", PORT));
        assert_eq!(sessions.end(0, "a", end::Cause::Finished), None);
        assert_eq!(next(&mut sent), ended("a"));
        assert_eq!(sessions.end(0, "never", end::Cause::Finished), None);
        assert_eq!(next(&mut sent), ended("never"));
    }

    #[test]
    fn a_successor_on_the_port_ends_the_former() {
        let (sessions, _outbox, _sent) = attached();
        sessions.learn(0, session("a", PORT));
        let Verdict::Admit(former) = admit(&sessions, PORT, 1) else {
            panic!("not admitted")
        };
        assert_eq!(
            sessions.learn(0, session("b", PORT)),
            [Action::Cut(port(PORT), former)]
        );
        let Verdict::Admit(key) = admit(&sessions, PORT, 1) else {
            panic!("not admitted")
        };
        assert_ne!(former, key);
        assert!(sessions.get("a").is_none());
    }

    #[test]
    fn a_session_goes_on_while_its_agent_is_out_of_reach_but_not_for_ever() {
        let (sessions, outbox, _sent) = attached();
        sessions.learn(0, session("a", PORT));
        sessions.detach(0, &outbox);
        let Verdict::Admit(key) = admit(&sessions, PORT, 1) else {
            panic!("not admitted")
        };
        assert_eq!(sessions.release("a"), Some(Err(())));
        assert_eq!(sessions.forget_server(0), [Action::Cut(port(PORT), key)]);
        assert_eq!(admit(&sessions, PORT, 1), Verdict::Ask);
    }

    #[test]
    fn a_greeting_lists_the_sessions_of_its_server() {
        let (sessions, outbox, _sent) = attached();
        sessions.learn(0, session("open", PORT));
        sessions.learn(0, session("held", PORT + 1));
        admit(&sessions, PORT, 1);
        sessions.detach(0, &outbox);
        let (again, _receiver) = unbounded_channel();
        let mut listed = Vec::new();
        sessions.attach(0, again, |known| {
            listed = known;
            ToAgent::default()
        });
        listed.sort_by(|one, other| one.session_id.cmp(&other.session_id));
        let listed: Vec<_> = listed
            .iter()
            .map(|known| (known.session_id.as_str(), known.open_here))
            .collect();
        assert_eq!(listed, [("held", false), ("open", true)]);
    }

    #[test]
    fn a_server_cannot_speak_for_the_port_of_another() {
        let (sessions, _outbox, _sent) = attached();
        assert_eq!(sessions.learn(1, session("a", PORT)), []);
        assert!(sessions.get("a").is_none());
        assert_eq!(sessions.learn(0, session("b", 9)), []);
        assert_eq!(
            sessions.learn(
                0,
                v1::Session {
                    connection_port: 70_000,
                    ..session("c", 1)
                }
            ),
            []
        );
    }

    #[test]
    fn only_the_bound_client_is_admitted() {
        let (sessions, _outbox, _sent) = attached();
        let bound = v1::Session {
            bound_client: "127.0.0.1".to_owned(),
            ..session("a", PORT)
        };
        sessions.learn(0, bound);
        assert_eq!(admit(&sessions, PORT, 2), Verdict::Refuse);
        assert!(matches!(admit(&sessions, PORT, 1), Verdict::Admit(_)));
        let wrapped: SocketAddr = "[::ffff:127.0.0.1]:9".parse().unwrap();
        assert!(matches!(
            sessions.admit(port(PORT), Transport::Tcp, wrapped),
            Verdict::Admit(_)
        ));
    }

    #[test]
    fn one_question_answers_every_parked_client() {
        let (sessions, _outbox, mut sent) = attached();
        sessions.ask(Ticket(1), port(PORT), Transport::Tcp, client(1));
        sessions.ask(Ticket(2), port(PORT), Transport::Tcp, client(2));
        let Some(Message::Lookup(question)) = next(&mut sent) else {
            panic!("no question")
        };
        assert_eq!(question.connection_port, u32::from(PORT));
        assert_eq!(next(&mut sent), None);
        let actions = sessions.looked_up(0, question.request_id, Some(session("a", PORT)));
        let admitted = |action: &Action| matches!(action, Action::Answer(_, _, Verdict::Admit(_)));
        assert_eq!(actions.len(), 2);
        assert!(actions.iter().all(admitted), "{actions:?}");
        sessions.ask(Ticket(3), port(PORT + 1), Transport::Tcp, client(1));
        let actions = sessions.looked_up(0, u64::from(PORT) + 1, None);
        assert_eq!(
            actions,
            [Action::Answer(port(PORT + 1), Ticket(3), Verdict::Refuse)]
        );
    }

    #[test]
    fn a_released_session_is_gone_at_once_and_its_agent_is_told() {
        let (sessions, _outbox, mut sent) = attached();
        sessions.learn(
            0,
            v1::Session {
                idempotency_key: "k".to_owned(),
                ..session("a", PORT)
            },
        );
        assert!(sessions.get_by_idempotency_key("k").is_some());
        assert_eq!(sessions.release("a"), Some(Ok(None)));
        let release = Message::Release(v1::Release {
            session_id: "a".to_owned(),
        });
        assert_eq!(next(&mut sent), Some(release));
        assert!(sessions.get("a").is_none());
        assert!(sessions.get_by_idempotency_key("k").is_none());
        assert_eq!(sessions.release("a"), None);
    }

    #[test]
    fn open_admission_needs_no_session() {
        let sessions = Sessions::default();
        sessions.set_table(&Arc::new(table(Admission::Open)));
        assert_eq!(admit(&sessions, PORT, 1), Verdict::Admit(NO_SESSION));
        sessions.closed(port(PORT), NO_SESSION, Traffic::default());
    }

    #[test]
    fn a_removed_server_loses_its_sessions_only() {
        let (sessions, _outbox, _sent) = attached();
        sessions.learn(0, session("a", PORT));
        sessions.learn(1, session("b", PORT + 10));
        let Verdict::Admit(key) = admit(&sessions, PORT, 1) else {
            panic!("not admitted")
        };
        assert_eq!(sessions.forget_server(0), [Action::Cut(port(PORT), key)]);
        assert!(sessions.get("a").is_none());
        assert!(sessions.get("b").is_some());
    }

    #[test]
    fn a_lost_release_is_told_again() {
        let (sessions, outbox, _lost) = attached();
        sessions.learn(0, session("a", PORT));
        assert_eq!(sessions.release("a"), Some(Ok(None)));
        sessions.detach(0, &outbox);
        let (again, mut sent) = unbounded_channel();
        sessions.attach(0, again, |_| ToAgent::default());
        assert_eq!(next(&mut sent), None, "the greeting");
        let release = v1::Release {
            session_id: "a".to_owned(),
        };
        assert_eq!(next(&mut sent), Some(Message::Release(release)));
        sessions.learn(0, session("a", PORT));
        assert!(sessions.get("a").is_none(), "the agent knew it still");
        assert_eq!(sessions.end(0, "a", end::Cause::Released), None);
    }

    #[test]
    fn a_session_given_back_does_not_come_back_with_late_news() {
        let (sessions, _outbox, _sent) = attached();
        sessions.learn(0, session("a", PORT));
        assert_eq!(sessions.release("a"), Some(Ok(None)));
        sessions.learn(0, session("a", PORT));
        assert!(
            sessions.get("a").is_none(),
            "told before the agent heard of it"
        );
        assert_eq!(sessions.end(0, "a", end::Cause::Finished), None);
        sessions.learn(0, session("b", PORT));
        assert!(sessions.get("b").is_some());
    }
}
