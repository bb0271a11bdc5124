use std::net::SocketAddr;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;
use crate::forward::{Decision, Gate, PendingId, Traffic, Transport};
use crate::pool::{
    Admission, LoadSharing, Mapping, Offer, PortProtocol, ProxyProtocol, Recycle, Replies,
    Sessions as Settings,
};
use crate::session::MAX_METADATA_BYTES;
use crate::table::{FORMAT_VERSION, PortRange, Row, RowState, Table, TargetPort};

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
    let [Action::Cut(ports, key)] = &actions[..] else {
        panic!("not one cut but {actions:?}");
    };
    for port in ports.iter() {
        sessions.closed(*port, *key, Traffic::default());
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
        [Action::Cut(OneOrMore::one(port(PORT)), key)]
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
        [Action::Cut(OneOrMore::one(port(PORT)), former)]
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
        [Action::Cut(OneOrMore::one(port(PORT)), key)]
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
fn only_the_bound_client_is_admitted() {
    let (sessions, _outbox, _sent) = attached();
    let bound = Session {
        bound_client: Some(client(1).ip()),
        ..Session::example("a", PORT)
    };
    learn_new(&sessions, bound);
    assert_eq!(admit(&sessions, PORT, 2), Decision::Refuse);
    assert!(matches!(admit(&sessions, PORT, 1), Decision::Admit(_)));
    let wrapped: SocketAddr = "[::ffff:127.0.0.1]:9".parse().unwrap();
    assert!(matches!(
        sessions.admit(port(PORT), Transport::Tcp, wrapped),
        Decision::Admit(_)
    ));
}

#[test]
fn one_lookup_answers_every_pending_client() {
    let (sessions, _outbox, mut sent) = attached();
    sessions.ask(PendingId(1), port(PORT), Transport::Tcp, client(1));
    sessions.ask(PendingId(2), port(PORT), Transport::Tcp, client(2));
    let Some(ToAgent::Lookup {
        request_id,
        port: asked,
    }) = next(&mut sent)
    else {
        panic!("no question")
    };
    assert_eq!(asked, port(PORT));
    assert_eq!(next(&mut sent), None);
    let actions = sessions.looked_up(Slot(0), request_id, Some(Session::example("a", PORT)));
    let actions: Vec<_> = actions.into_iter().collect();
    let admitted = |action: &Action| matches!(action, Action::Answer(_, _, Decision::Admit(_)));
    assert_eq!(actions.len(), 2);
    assert!(actions.iter().all(admitted), "{actions:?}");
    sessions.ask(PendingId(3), port(PORT + 1), Transport::Tcp, client(1));
    let actions = sessions.looked_up(Slot(0), u64::from(PORT) + 1, None);
    assert_eq!(
        actions,
        [Action::Answer(
            port(PORT + 1),
            PendingId(3),
            Decision::Refuse
        )]
    );
}

#[test]
fn a_released_session_is_removed_at_once_and_reported_to_its_agent() {
    let (sessions, _outbox, mut sent) = attached();
    learn_new(
        &sessions,
        Session {
            idempotency_key: Some("k".to_owned()),
            ..Session::example("a", PORT)
        },
    );
    assert!(sessions.get_by_idempotency_key("k").is_some());
    let action = sessions.release(&id_of("a")).expect("known and in reach");
    let release = ToAgent::Release(id_of("a"));
    assert_eq!(next(&mut sent), Some(release));
    assert_eq!(next(&mut sent), None);
    cut(&sessions, action);
    assert_eq!(next(&mut sent), ended("a"));
    assert!(sessions.get(&id_of("a")).is_none());
    assert!(sessions.get_by_idempotency_key("k").is_none());
    assert_eq!(sessions.release(&id_of("a")), Err(ReleaseError::Unknown));
}

#[test]
fn open_admission_needs_no_session() {
    let sessions = Sessions::default();
    sessions.set_table(index(table(Admission::Open)));
    assert_eq!(admit(&sessions, PORT, 1), Decision::Admit(NO_SESSION));
    sessions.closed(port(PORT), NO_SESSION, Traffic::default());
}

/// Nothing is asked about it, so that the client is not left waiting.
#[test]
fn a_client_of_a_removed_port_is_refused_at_once() {
    for admission in [Admission::Open, Admission::Session] {
        let mut table = table(admission);
        let sessions = Sessions::default();
        sessions.set_table(index(table.clone()));
        assert_ne!(admit(&sessions, PORT + 9, 1), Decision::Refuse);
        table.rows[0].ranges[0].count = 9;
        table.generation = 2;
        sessions.set_table(index(table));
        assert_ne!(admit(&sessions, PORT + 8, 1), Decision::Refuse);
        assert_eq!(admit(&sessions, PORT + 9, 1), Decision::Refuse);
    }
}

#[test]
fn an_entry_may_be_open_or_not_whatever_the_others_are() {
    use Admission::{Open, Session};
    for (all, entry, is_open) in [
        (Session, Some(Open), true),
        (Open, Some(Session), false),
        (Open, None, true),
        (Session, None, false),
    ] {
        let mut table = table(all);
        table.rows[0].ranges[0].admission = entry;
        let sessions = Sessions::default();
        sessions.set_table(index(table));
        let expected = if is_open {
            Decision::Admit(NO_SESSION)
        } else {
            Decision::Ask
        };
        assert_eq!(admit(&sessions, PORT, 1), expected, "{all:?} {entry:?}");
        let others = admit(&sessions, PORT + 10, 1);
        assert_eq!(others == Decision::Admit(NO_SESSION), all == Open);
    }
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
        [Action::Cut(OneOrMore::one(port(PORT)), key)]
    );
    assert!(sessions.get(&id_of("a")).is_none());
    assert!(sessions.get(&id_of("b")).is_some());
}

#[test]
fn a_lost_release_is_sent_again() {
    let (sessions, outbox, _lost) = attached();
    learn_new(&sessions, Session::example("a", PORT));
    release(&sessions, "a");
    sessions.detach(Slot(0), &outbox);
    let (again, mut sent) = unbounded_channel();
    sessions.attach(Slot(0), again, |_| ToAgent::Goodbye);
    assert_eq!(next(&mut sent), Some(ToAgent::Goodbye), "the greeting");
    let release = ToAgent::Release(id_of("a"));
    assert_eq!(next(&mut sent), Some(release));
    learn_new(&sessions, Session::example("a", PORT));
    assert!(
        sessions.get(&id_of("a")).is_none(),
        "the agent still knew it"
    );
    assert_eq!(sessions.end(Slot(0), &id_of("a"), EndCause::Released), []);
}

/// The agent was restarted before all connection servers had received the end,
/// and one of them brought the session back.
#[test]
fn an_agent_that_counts_an_ended_session_as_live_is_corrected() {
    type End = fn(&Sessions);
    fn end(sessions: &Sessions) {
        let actions = sessions.end(Slot(0), &id_of("a"), EndCause::Unclaimed);
        if !actions.is_empty() {
            cut(sessions, actions);
        }
    }
    let cases: [(&str, End, bool); 5] = [
        ("ended by its agent", end, true),
        (
            "released, and its agent has received that",
            |sessions| {
                release(sessions, "a");
                end(sessions);
            },
            true,
        ),
        (
            "ended before another session got its port",
            |sessions| {
                end(sessions);
                learn_new(sessions, Session::example("b", PORT));
                cut(
                    sessions,
                    sessions.end(Slot(0), &id_of("b"), EndCause::Unclaimed),
                );
            },
            false,
        ),
        (
            "cut here, because its agent was out of reach",
            |sessions| cut(sessions, sessions.forget_server(Slot(0))),
            false,
        ),
        (
            "ended, and its port is removed",
            |sessions| {
                end(sessions);
                let mut table = table(Admission::Session);
                let rows = std::mem::take(&mut table.rows);
                sessions.set_table(index(table.clone()));
                sessions.forget_removed(&index(table.clone()));
                sessions.set_table(index(Table { rows, ..table }));
            },
            false,
        ),
    ];
    for (what, play, is_over) in cases {
        let (sessions, outbox, _lost) = attached();
        learn_new(&sessions, Session::example("a", PORT));
        play(&sessions);
        sessions.detach(Slot(0), &outbox);
        let successor = Sessions::default();
        let table = index(table(Admission::Session));
        successor.import(sessions.export(), &table, std::iter::empty());
        for (who, sessions) in [("it", sessions), ("its successor", successor)] {
            let (again, mut sent) = unbounded_channel();
            sessions.attach(Slot(0), again, |_| ToAgent::Goodbye);
            assert_eq!(next(&mut sent), Some(ToAgent::Goodbye), "the greeting");
            assert_eq!(learn(&sessions, Slot(0), Session::example("a", PORT)), []);
            assert_eq!(
                sessions.get(&id_of("a")).is_none(),
                is_over,
                "{what}: {who}"
            );
            let release = ToAgent::Release(id_of("a"));
            assert_eq!(next(&mut sent), is_over.then_some(release), "{what}: {who}");
        }
    }
}

#[test]
fn a_released_session_does_not_come_back_with_late_messages() {
    let (sessions, _outbox, _sent) = attached();
    learn_new(&sessions, Session::example("a", PORT));
    release(&sessions, "a");
    learn_new(&sessions, Session::example("a", PORT));
    assert!(
        sessions.get(&id_of("a")).is_none(),
        "sent before the agent received the release"
    );
    assert_eq!(sessions.end(Slot(0), &id_of("a"), EndCause::Finished), []);
    learn_new(&sessions, Session::example("b", PORT));
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

/// A session on `PORT` and on two further ports.
fn several(id: &str) -> Session {
    let ports = [PORT, PORT + 1, PORT + 5].map(|number| SessionPort::example("main", number));
    Session {
        ports: OneOrMore::new(ports).unwrap(),
        ..Session::example(id, PORT)
    }
}

#[test]
fn a_session_of_several_ports_is_open_while_any_of_them_is_and_ends_whole() {
    let (sessions, _outbox, mut sent) = attached();
    learn_new(&sessions, several("a"));
    let Decision::Admit(key) = admit(&sessions, PORT + 5, 1) else {
        panic!("not admitted")
    };
    assert_eq!(next(&mut sent), opened("a"));
    assert_eq!(admit(&sessions, PORT, 1), Decision::Admit(key));
    sessions.closed(port(PORT + 5), key, Traffic::default());
    assert_eq!(next(&mut sent), None, "one is open on its first port");
    sessions.closed(port(PORT), key, Traffic::default());
    assert_eq!(next(&mut sent), closed("a"));
    assert_eq!(sessions.session_on(port(PORT + 1)), Some(id_of("a")));
    let actions = sessions.end(Slot(0), &id_of("a"), EndCause::Finished);
    let ports = several("a").ports.map(|it| it.port);
    assert_eq!(actions, [Action::Cut(ports, key)]);
    for number in [PORT, PORT + 1, PORT + 5] {
        assert_eq!(admit(&sessions, number, 1), Decision::Ask);
        assert_eq!(next(&mut sent), None, "not cut on every port yet");
        sessions.closed(port(number), key, Traffic::default());
    }
    assert_eq!(next(&mut sent), ended("a"));
    learn_new(&sessions, Session::example("b", PORT + 5));
}

#[test]
fn a_successor_on_a_further_port_ends_the_whole_session() {
    let (sessions, _outbox, _sent) = attached();
    learn_new(&sessions, several("a"));
    let actions = learn(&sessions, Slot(0), Session::example("b", PORT + 1));
    cut(&sessions, actions);
    assert_eq!(sessions.session_on(port(PORT)), None);
    assert_eq!(sessions.session_on(port(PORT + 1)), Some(id_of("b")));
}

#[test]
fn an_agent_that_knows_single_ports_only_gets_sessions_of_several_back() {
    let (sessions, _outbox, mut sent) = attached();
    learn_new(&sessions, several("a"));
    learn_new(&sessions, Session::example("b", PORT + 3));
    assert_eq!(sessions.welcomed(Slot(0), true), []);
    let actions = sessions.welcomed(Slot(0), false);
    assert_eq!(next(&mut sent), Some(ToAgent::Release(id_of("a"))));
    cut(&sessions, actions);
    assert_eq!(sessions.session_on(port(PORT + 5)), None);
    assert_eq!(sessions.session_on(port(PORT + 3)), Some(id_of("b")));
}

#[test]
fn a_session_of_several_ports_is_handed_over_whole() {
    let (sessions, _outbox, _sent) = attached();
    learn_new(&sessions, several("a"));
    let successor = Sessions::default();
    let table = index(table(Admission::Session));
    let _none = successor.import(sessions.export(), &table, std::iter::empty());
    assert_eq!(successor.session_on(port(PORT + 5)), Some(id_of("a")));
    assert_eq!(
        successor.get(&id_of("a")).unwrap().session.ports,
        several("a").ports
    );
}

/// An agent takes no larger greetings.
#[test]
fn a_greeting_has_metadata_up_to_its_bound_and_every_session() {
    let largest = Metadata::new([("k", "v".repeat(MAX_METADATA_BYTES - 1))]).unwrap();
    let sessions = (0..3_000).map(|index| Session {
        metadata: largest.clone(),
        ..Session::example(&format!("session-{index}"), 20_000)
    });
    let greeting = within_budget(sessions);
    let with = greeting.iter().filter(|it| !it.metadata.is_empty()).count();
    assert_eq!((greeting.len(), with), (3_000, 2_048));
}
