use std::net::SocketAddr;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;
use crate::forward::{Decision, Gate, PendingId, Traffic, Transport};
use crate::pool::{
    Admission, EntryAdmission, LoadSharing, Mapping, Offer, PortProtocol, ProxyProtocol, Recycle,
    Replies, Sessions as Settings,
};
use crate::table::{FORMAT_VERSION, PortRange, Row, RowState, Table, TargetPort};

mod admission;
mod amending;
mod companions;
mod release;
mod several;

const PORT: u16 = 20_000;

fn table(admission: Admission) -> Table {
    let range = |slot: u16| PortRange {
        name: "main".to_owned(),
        connection_port: port(PORT + 10 * slot),
        server_port: TargetPort::new(7000).unwrap(),
        count: 10,
        protocol: PortProtocol::TCP,
        mapping: Mapping::Offset,
        offer: Offer::WhenListening,
        admission: None,
        proxy_protocol: ProxyProtocol::None,
        replies: Replies::ServerPort,
    };
    let row = |slot: u16| Row {
        slot: Slot(slot.into()),
        server: format!("pool-{slot}"),
        server_uid: None,
        not_ready: false,
        draining_since: None,
        attempts: crate::table::Attempts::default(),
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
        recycle: Recycle::default(),
        drain_seconds: None,
        rows: vec![row(0), row(1)],
    }
}

fn index(table: Table) -> Arc<PortIndex> {
    Arc::new(PortIndex::new(Arc::new(table)))
}

fn port(number: u16) -> ListenPort {
    ListenPort::new(number).unwrap()
}

fn client(last: u8) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, last], 4000))
}

fn id_of(text: &str) -> SessionId {
    SessionId::new(text).unwrap()
}

/// Sessions with slot 0 attached, and the messages to its agent.
fn attached() -> (Sessions, Outbox, UnboundedReceiver<ToAgent>) {
    let sessions = Sessions::default();
    sessions.set_table(index(table(Admission::Session)));
    let (outbox, mut sent) = unbounded_channel();
    sessions.attach(Slot(0), outbox.clone(), |_| ToAgent::Goodbye);
    sent.try_recv().expect("the greeting");
    (sessions, outbox, sent)
}

fn next(sent: &mut UnboundedReceiver<ToAgent>) -> Option<ToAgent> {
    sent.try_recv().ok()
}

fn admit(sessions: &Sessions, number: u16, last: u8) -> Decision {
    sessions.admit(port(number), Transport::Tcp, client(last))
}

impl<const N: usize> PartialEq<[Action; N]> for Actions {
    fn eq(&self, other: &[Action; N]) -> bool {
        self.clone().into_iter().eq(other.iter().cloned())
    }
}

/// An agent reports a session.
fn learn(sessions: &Sessions, slot: Slot, session: Session) -> Actions {
    sessions.learn(slot, session, SessionSpan::learned)
}

/// The agent of slot 0 reports a session that is new on its port.
fn learn_new(sessions: &Sessions, session: Session) {
    assert_eq!(learn(sessions, Slot(0), session), []);
}

/// The data plane carries out the only action, a cut.
fn cut(sessions: &Sessions, actions: Actions) {
    let actions: Vec<_> = actions.into_iter().collect();
    let [Action::Cut(ports, key, companions)] = &actions[..] else {
        panic!("not one cut but {actions:?}");
    };
    let own = ports.iter().map(|port| (*port, *key));
    for (port, key) in own.chain(companions.iter().map(|cut| (cut.port, cut.key))) {
        sessions.closed(port, key, Traffic::default());
    }
}

/// A client releases a session, and the data plane cuts it.
fn release(sessions: &Sessions, id: &str) {
    cut(
        sessions,
        sessions.release(&id_of(id)).expect("known and in reach"),
    );
}

fn opened(id: &str) -> Option<ToAgent> {
    Some(ToAgent::Opened(id_of(id)))
}

fn closed(id: &str) -> Option<ToAgent> {
    Some(ToAgent::Closed {
        session_id: id_of(id),
        is_claimed: false,
    })
}

fn ended(id: &str) -> Option<ToAgent> {
    Some(ToAgent::Ended(id_of(id)))
}

#[test]
fn only_the_first_and_the_last_connection_are_reported() {
    let (sessions, _outbox, mut sent) = attached();
    learn_new(&sessions, Session::example("a", PORT));
    let Decision::Admit(key) = admit(&sessions, PORT, 1) else {
        panic!("not admitted")
    };
    assert_eq!(admit(&sessions, PORT, 1), Decision::Admit(key));
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
    learn_new(&sessions, Session::example("a", PORT));
    let Decision::Admit(key) = admit(&sessions, PORT, 1) else {
        panic!("not admitted")
    };
    assert_eq!(next(&mut sent), opened("a"));
    assert_eq!(
        sessions.end(Slot(0), &id_of("a"), EndCause::Finished),
        [Action::Cut(OneOrMore::one(port(PORT)), key, Vec::new())]
    );
    assert!(sessions.is_cutting(Slot(0)));
    assert_eq!(
        admit(&sessions, PORT, 1),
        Decision::Ask,
        "nothing more is admitted"
    );
    assert_eq!(
        sessions.end(Slot(0), &id_of("a"), EndCause::Finished),
        [],
        "asked again while cutting"
    );
    sessions.closed(port(PORT), key, Traffic::default());
    assert_eq!(next(&mut sent), None, "clients may wait to be accepted");
    assert!(sessions.is_cutting(Slot(0)));
    sessions.closed(port(PORT), key, Traffic::default());
    assert_eq!(next(&mut sent), ended("a"));
    assert!(!sessions.is_cutting(Slot(0)));
}

#[test]
fn an_unused_session_is_acknowledged_once_cut_an_unknown_one_at_once() {
    let (sessions, _outbox, mut sent) = attached();
    learn_new(&sessions, Session::example("a", PORT));
    let action = sessions.end(Slot(0), &id_of("a"), EndCause::Finished);
    assert_eq!(next(&mut sent), None, "clients may wait to be accepted");
    cut(&sessions, action);
    assert_eq!(next(&mut sent), ended("a"));
    assert_eq!(
        sessions.end(Slot(0), &id_of("never"), EndCause::Finished),
        []
    );
    assert_eq!(next(&mut sent), ended("never"));
}

#[test]
fn a_successor_on_the_port_ends_the_former() {
    let (sessions, _outbox, _sent) = attached();
    learn_new(&sessions, Session::example("a", PORT));
    let Decision::Admit(former) = admit(&sessions, PORT, 1) else {
        panic!("not admitted")
    };
    assert_eq!(
        learn(&sessions, Slot(0), Session::example("b", PORT)),
        [Action::Cut(OneOrMore::one(port(PORT)), former, Vec::new())]
    );
    let Decision::Admit(key) = admit(&sessions, PORT, 1) else {
        panic!("not admitted")
    };
    assert_ne!(former, key);
    assert!(sessions.get(&id_of("a")).is_none());
}

#[test]
fn a_session_goes_on_while_its_agent_is_out_of_reach_but_not_for_ever() {
    let (sessions, outbox, _sent) = attached();
    learn_new(&sessions, Session::example("a", PORT));
    sessions.detach(Slot(0), &outbox);
    let Decision::Admit(key) = admit(&sessions, PORT, 1) else {
        panic!("not admitted")
    };
    assert_eq!(sessions.release(&id_of("a")), Err(ReleaseError::OutOfReach));
    assert_eq!(
        sessions.forget_server(Slot(0)),
        [Action::Cut(OneOrMore::one(port(PORT)), key, Vec::new())]
    );
    assert_eq!(admit(&sessions, PORT, 1), Decision::Ask);
}

#[test]
fn a_greeting_lists_the_sessions_of_its_server() {
    let (sessions, outbox, _sent) = attached();
    learn_new(&sessions, Session::example("open", PORT));
    learn_new(&sessions, Session::example("held", PORT + 1));
    admit(&sessions, PORT, 1);
    sessions.detach(Slot(0), &outbox);
    let (again, _receiver) = unbounded_channel();
    let mut listed = Vec::new();
    sessions.attach(Slot(0), again, |known| {
        listed = known;
        ToAgent::Goodbye
    });
    listed.sort_by(|one, other| one.id.cmp(&other.id));
    let listed: Vec<_> = listed
        .iter()
        .map(|known| (known.id.as_str(), known.open_here))
        .collect();
    assert_eq!(listed, [("held", false), ("open", true)]);
}

#[test]
fn a_server_cannot_speak_for_the_port_of_another() {
    let (sessions, _outbox, _sent) = attached();
    assert_eq!(learn(&sessions, Slot(1), Session::example("a", PORT)), []);
    assert!(sessions.get(&id_of("a")).is_none());
    assert_eq!(learn(&sessions, Slot(0), Session::example("b", 9)), []);
}

#[test]
fn a_removed_server_loses_its_sessions_only() {
    let (sessions, _outbox, _sent) = attached();
    learn_new(&sessions, Session::example("a", PORT));
    assert_eq!(
        learn(&sessions, Slot(1), Session::example("b", PORT + 10)),
        []
    );
    let Decision::Admit(key) = admit(&sessions, PORT, 1) else {
        panic!("not admitted")
    };
    assert_eq!(
        sessions.forget_server(Slot(0)),
        [Action::Cut(OneOrMore::one(port(PORT)), key, Vec::new())]
    );
    assert!(sessions.get(&id_of("a")).is_none());
    assert!(sessions.get(&id_of("b")).is_some());
}

/// Whether a connection with `traffic` that stays for `time` claims its session,
/// and whether a greeting and a successor say so.
fn claims(traffic: Traffic, time: std::time::Duration) -> [bool; 3] {
    let (sessions, _outbox, mut sent) = attached();
    learn_new(&sessions, Session::example("a", PORT));
    let Decision::Admit(key) = admit(&sessions, PORT, 1) else {
        panic!("not admitted")
    };
    next(&mut sent);
    for live in sessions.inner.write().live.values_mut() {
        let since = live.flows.get_mut().since.as_mut().unwrap();
        *since = since.checked_sub(time).unwrap();
    }
    sessions.closed(port(PORT), key, traffic);
    let Some(ToAgent::Closed { is_claimed, .. }) = next(&mut sent) else {
        panic!("not reported")
    };
    let successor = Sessions::default();
    let table = index(table(Admission::Session));
    let _none = successor.import(sessions.export(), &table, std::iter::empty());
    let listed = [sessions, successor].map(|sessions| {
        let mut known = Vec::new();
        let (outbox, _sent) = tokio::sync::mpsc::unbounded_channel();
        sessions.attach(Slot(0), outbox, |sessions| {
            known = sessions;
            ToAgent::Goodbye
        });
        known[0].is_claimed
    });
    [is_claimed, listed[0], listed[1]]
}

#[test]
fn what_connects_and_leaves_claims_nothing() {
    let carried = |upstream_bytes, downstream_bytes| Traffic {
        upstream_bytes,
        downstream_bytes,
    };
    let cases = [
        ("a scan, or an unreachable server", carried(0, 0), false),
        ("a scan that was greeted", carried(0, 20), false),
        ("a client that sends", carried(1, 0), true),
    ];
    for (what, traffic, expected) in cases {
        let found = claims(traffic, std::time::Duration::ZERO);
        assert_eq!(found, [expected; 3], "{what}");
    }
    let watched = claims(carried(0, 20), super::flows::CLAIMING_TIME);
    assert_eq!(watched, [true; 3], "a client that stays");
}
