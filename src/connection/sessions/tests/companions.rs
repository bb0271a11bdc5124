//! Companion ports: who may use them, and what their connections belong to.

use std::net::IpAddr;

use super::*;
use crate::connection::sessions::companions::replaceable;
use crate::session::SessionState;

/// The companion ports of slot 0.
const DATA: u16 = 20_500;

/// A table whose slot 0 has companion ports.
fn with_companions() -> Table {
    let mut table = table(Admission::Session);
    let companions = PortRange {
        name: "data".to_owned(),
        connection_port: port(DATA),
        count: 2,
        admission: Some(EntryAdmission::Companion),
        ..table.rows[0].ranges[0].clone()
    };
    table.rows[0].ranges.push(companions);
    table
}

/// Sessions of that table with slot 0 attached, and the messages to its agent.
fn started() -> (Sessions, Outbox, UnboundedReceiver<ToAgent>) {
    let (sessions, outbox, sent) = attached();
    sessions.set_table(index(with_companions()));
    (sessions, outbox, sent)
}

/// The session `id` on `number`, requested from the client `last`.
fn requested(id: &str, number: u16, last: u8) -> Session {
    Session {
        clients: vec![client(last).ip()],
        ..Session::example(id, number)
    }
}

fn admitted(sessions: &Sessions, number: u16, last: u8) -> SessionKey {
    match admit(sessions, number, last) {
        Decision::Admit(key) => key,
        other => panic!("{other:?}"),
    }
}

fn close(sessions: &Sessions, number: u16, key: SessionKey) {
    let traffic = Traffic {
        upstream_bytes: 1,
        downstream_bytes: 1,
    };
    sessions.closed(port(number), key, traffic);
}

fn joined(id: &str, last: u8) -> Option<ToAgent> {
    Some(ToAgent::Joined {
        session_id: id_of(id),
        client: client(last).ip(),
        is_companion: false,
    })
}

/// The report of the first companion connection of a session.
fn used(id: &str, last: u8) -> Option<ToAgent> {
    Some(ToAgent::Joined {
        session_id: id_of(id),
        client: client(last).ip(),
        is_companion: true,
    })
}

fn connections(sessions: &Sessions) -> Vec<u32> {
    let page = sessions.list(&Default::default(), 10);
    page.items.iter().map(|it| it.connections).collect()
}

/// A cut of companion connections of the client `last` on the first port.
fn cut_of(key: SessionKey, last: u8) -> Action {
    Action::CutCompanions(CompanionCut {
        port: port(DATA),
        key,
        client: client(last).ip(),
    })
}

/// The only action, a cut of these companion connections among others.
fn companions_cut(actions: &Actions) -> Vec<(ListenPort, SessionKey)> {
    let actions: Vec<Action> = actions.clone().into_iter().collect();
    let [Action::Cut(_, _, companions)] = &actions[..] else {
        panic!("{actions:?}");
    };
    companions.iter().map(|cut| (cut.port, cut.key)).collect()
}

#[test]
fn only_clients_with_a_live_session_on_the_server_are_admitted() {
    let (sessions, _outbox, mut sent) = started();
    assert_eq!(admit(&sessions, DATA, 1), Decision::Ask, "no session");
    learn_new(&sessions, requested("a", PORT, 1));
    admitted(&sessions, DATA, 1);
    assert_eq!(next(&mut sent), used("a", 1));
    assert_eq!(admit(&sessions, DATA, 2), Decision::Ask, "another client");
    // A client that connects to the session joins it.
    admitted(&sessions, PORT, 2);
    assert_eq!(next(&mut sent), joined("a", 2));
    assert_eq!(next(&mut sent), opened("a"));
    admitted(&sessions, PORT, 2);
    admitted(&sessions, DATA, 2);
    assert_eq!(next(&mut sent), None, "it has joined already");
    // A session of another server gives no right to these ports.
    let elsewhere = requested("b", PORT + 10, 3);
    assert_eq!(learn(&sessions, Slot(1), elsewhere), []);
    assert_eq!(admit(&sessions, DATA, 3), Decision::Ask);
}

#[test]
fn the_first_companion_connection_of_a_session_is_reported_to_each_stream() {
    let (sessions, _outbox, mut sent) = started();
    learn_new(&sessions, requested("a", PORT, 1));
    learn_new(&sessions, requested("b", PORT + 1, 2));
    for number in [DATA, DATA, DATA + 1] {
        admitted(&sessions, number, 1);
    }
    assert_eq!(next(&mut sent), used("a", 1));
    assert_eq!(next(&mut sent), None);
    // The former stream may have lost it.
    let (outbox, mut sent) = unbounded_channel();
    sessions.attach(Slot(0), outbox, |_| ToAgent::Ended(id_of("greeting")));
    assert_eq!(next(&mut sent), Some(ToAgent::Ended(id_of("greeting"))));
    assert_eq!(next(&mut sent), used("a", 1));
    assert_eq!(next(&mut sent), None);
}

#[test]
fn a_client_that_another_connection_server_knows_is_found_by_its_agents_answer() {
    let (sessions, _outbox, mut sent) = started();
    assert_eq!(admit(&sessions, DATA, 1), Decision::Ask);
    sessions.ask(PendingId(1), port(DATA), Transport::Tcp, client(1));
    sessions.ask(PendingId(2), port(DATA), Transport::Tcp, client(2));
    let request_id = u64::from(DATA);
    let lookup = ToAgent::Lookup {
        request_id,
        port: port(DATA),
    };
    assert_eq!(next(&mut sent), Some(lookup));
    assert_eq!(next(&mut sent), None, "one lookup for both");
    // What the agent knows comes before its answer.
    learn_new(&sessions, requested("a", PORT, 1));
    let answers: Vec<Action> = sessions
        .looked_up(Slot(0), request_id, None)
        .into_iter()
        .collect();
    assert!(
        matches!(
            answers[..],
            [
                Action::Answer(_, PendingId(1), Decision::Admit(_)),
                Action::Answer(_, PendingId(2), Decision::Refuse)
            ]
        ),
        "{answers:?}"
    );
}

#[test]
fn companion_connections_are_cut_before_the_end_is_acknowledged() {
    let (sessions, _outbox, mut sent) = started();
    learn_new(&sessions, requested("a", PORT, 1));
    let key = admitted(&sessions, DATA, 1);
    assert_eq!(next(&mut sent), used("a", 1));
    assert_eq!(admitted(&sessions, DATA + 1, 1), key);
    assert_eq!(admitted(&sessions, DATA + 1, 1), key);
    close(&sessions, DATA + 1, key);
    close(&sessions, DATA + 1, key);
    let actions = sessions.end(Slot(0), &id_of("a"), EndCause::MaxDuration);
    assert_eq!(companions_cut(&actions), [(port(DATA), key)]);
    assert_eq!(admit(&sessions, DATA, 1), Decision::Ask);
    cut(&sessions, actions);
    assert_eq!(next(&mut sent), None, "the connection is still open");
    close(&sessions, DATA, key);
    assert_eq!(next(&mut sent), ended("a"));
    assert!(!sessions.is_any_ending());
}

#[test]
fn of_two_sessions_that_end_each_waits_for_its_own_companion_connections() {
    let (sessions, _outbox, mut sent) = started();
    let [(first, cut_first), (second, cut_second)] = [1, 2].map(|last| {
        let id = format!("of-{last}");
        learn_new(&sessions, requested(&id, PORT + u16::from(last), last));
        let key = admitted(&sessions, DATA, last);
        assert_eq!(next(&mut sent), used(&id, last));
        let actions = sessions.end(Slot(0), &id_of(&id), EndCause::Finished);
        assert_eq!(companions_cut(&actions), [(port(DATA), key)]);
        (key, actions)
    });
    for (actions, key, id) in [(cut_first, first, "of-1"), (cut_second, second, "of-2")] {
        cut(&sessions, actions);
        assert_eq!(next(&mut sent), None, "its connection is still open");
        close(&sessions, DATA, key);
        assert_eq!(next(&mut sent), ended(id));
    }
}

#[test]
fn companion_connections_keep_a_session_but_do_not_claim_it() {
    let (sessions, _outbox, mut sent) = started();
    learn_new(&sessions, requested("a", PORT, 1));
    let companion = admitted(&sessions, DATA, 1);
    assert_eq!(next(&mut sent), used("a", 1));
    assert_eq!(next(&mut sent), None, "its client has yet to come");
    assert_eq!(sessions.open_count(), 0);
    let own = admitted(&sessions, PORT, 1);
    assert_eq!(next(&mut sent), opened("a"));
    assert_eq!(connections(&sessions), [2]);
    sessions.closed(port(PORT), own, Traffic::default());
    assert_eq!(next(&mut sent), None, "the companion is open");
    assert_eq!(sessions.open_count(), 1);
    close(&sessions, DATA, companion);
    assert_eq!(next(&mut sent), closed("a"), "nothing has claimed it");
    assert_eq!(connections(&sessions), [0]);
}

#[test]
fn a_session_that_has_begun_elsewhere_is_kept_by_companion_connections_here() {
    let (sessions, _outbox, mut sent) = started();
    learn_new(&sessions, requested("a", PORT, 1));
    let key = admitted(&sessions, DATA, 1);
    assert_eq!(next(&mut sent), used("a", 1));
    let busy = Session {
        state: SessionState::Busy,
        ..requested("a", PORT, 1)
    };
    assert_eq!(learn(&sessions, Slot(0), busy), []);
    assert_eq!(next(&mut sent), opened("a"));
    close(&sessions, DATA, key);
    assert_eq!(next(&mut sent), closed("a"));
}

#[test]
fn of_two_sessions_of_one_address_the_last_one_takes_the_companions_along() {
    let (sessions, _outbox, mut sent) = started();
    for (id, number) in [("a", PORT), ("b", PORT + 1)] {
        learn_new(&sessions, requested(id, number, 1));
        admitted(&sessions, number, 1);
        assert_eq!(next(&mut sent), opened(id));
    }
    let key = admitted(&sessions, DATA, 1);
    assert_eq!(connections(&sessions), [2, 2], "it counts for both");
    let actions = sessions.end(Slot(0), &id_of("a"), EndCause::Finished);
    assert_eq!(companions_cut(&actions), [], "it may be b's");
    assert_eq!(admitted(&sessions, DATA, 1), key);
    let third = requested("c", PORT + 2, 1);
    learn_new(&sessions, third);
    assert_eq!(connections(&sessions), [3, 2]);
    release(&sessions, "c");
    let actions = sessions.forget_server(Slot(0));
    assert_eq!(companions_cut(&actions), [(port(DATA), key)]);
}

#[test]
fn the_first_other_client_without_companion_connections_is_replaceable() {
    let clients = [1, 2, 3].map(|last| client(last).ip());
    for (in_use, expected) in [
        (&[][..], Some(1)),
        (&[1], Some(1)),
        (&[2], Some(2)),
        (&[3], Some(1)),
        (&[2, 3], None),
    ] {
        let is_in_use = |address: &IpAddr| in_use.iter().any(|last| client(*last).ip() == *address);
        assert_eq!(replaceable(&clients, is_in_use), expected, "{in_use:?}");
    }
    for requester_only in [&clients[..1], &[]] {
        assert_eq!(replaceable(requester_only, |_| false), None);
    }
}

#[test]
fn who_comes_replaces_the_oldest_idle_client_of_a_session_that_has_as_many_as_it_may() {
    let (sessions, _outbox, mut sent) = started();
    let most = u8::try_from(crate::selection::MAX_CLIENTS).unwrap();
    let reported = |last: u8| Session {
        clients: (1..=last).map(|last| client(last).ip()).collect(),
        ..Session::example("a", PORT)
    };
    learn_new(&sessions, reported(most));
    let second = admitted(&sessions, DATA, 2);
    assert_eq!(next(&mut sent), used("a", 2), "the first use");
    // The requester and one with a companion connection stay.
    admitted(&sessions, PORT, 100);
    assert_eq!(next(&mut sent), opened("a"), "the agent keeps those it has");
    admitted(&sessions, DATA, 100);
    for (last, is_in) in [(1, true), (2, true), (3, false), (4, true), (most, true)] {
        let decision = admit(&sessions, DATA, last);
        let expected = if is_in { "Admit" } else { "Ask" };
        assert!(format!("{decision:?}").starts_with(expected), "{last}");
    }
    // What the agent reports replaces no one.
    assert_eq!(learn(&sessions, Slot(0), reported(most)), []);
    assert_eq!(admit(&sessions, DATA, 3), Decision::Ask);
    admitted(&sessions, DATA, 100);
    // Three of the second client are open, counting those above.
    assert_eq!(admitted(&sessions, DATA, 2), second);
    assert_eq!(connections(&sessions), [9]);
}

/// False sources of datagrams cost the agent nothing.
#[test]
fn the_agent_learns_who_is_added_and_not_who_replaces_another() {
    let (sessions, _outbox, mut sent) = started();
    learn_new(&sessions, requested("a", PORT, 1));
    let most = u8::try_from(crate::selection::MAX_CLIENTS).unwrap();
    for last in 1..=most + 10 {
        admitted(&sessions, PORT, last);
    }
    admitted(&sessions, DATA, most + 10);
    let reports = std::iter::from_fn(|| next(&mut sent));
    let joins = reports.filter(|sent| {
        matches!(
            sent,
            ToAgent::Joined {
                is_companion: false,
                ..
            }
        )
    });
    assert_eq!(
        joins.count(),
        usize::from(most) - 1,
        "the first one is known"
    );
}

#[test]
fn a_client_that_is_replaced_keeps_its_rights_by_another_session() {
    let (sessions, _outbox, _sent) = started();
    learn_new(&sessions, requested("a", PORT, 1));
    learn_new(&sessions, requested("b", PORT + 1, 2));
    let most = u8::try_from(crate::selection::MAX_CLIENTS).unwrap();
    for last in 2..=most + 1 {
        admitted(&sessions, PORT, last);
    }
    let key = admitted(&sessions, DATA, 2);
    let connections = connections(&sessions);
    assert_eq!(connections, [u32::from(most), 1], "it is b's only");
    let actions = sessions.end(Slot(0), &id_of("b"), EndCause::Finished);
    assert_eq!(companions_cut(&actions), [(port(DATA), key)]);
    assert_eq!(admit(&sessions, DATA, 2), Decision::Ask);
}

#[test]
fn connections_are_cut_on_a_port_that_is_no_companion_port_any_more() {
    let (sessions, _outbox, _sent) = started();
    learn_new(&sessions, requested("a", PORT, 1));
    let key = admitted(&sessions, DATA, 1);
    let (former, mut changed) = (with_companions(), with_companions());
    assert_eq!(
        sessions.forget_removed(Some(&index(former.clone())), &index(changed.clone())),
        [],
        "nothing has changed"
    );
    changed.rows[0].ranges[1].admission = None;
    let changed = index(changed);
    sessions.set_table(changed.clone());
    let actions = sessions.forget_removed(Some(&index(former)), &changed);
    assert_eq!(actions, [cut_of(key, 1)]);
    close(&sessions, DATA, key);
    close(&sessions, DATA, key);
    assert_eq!(connections(&sessions), [0]);
}

#[test]
fn strangers_are_cut_on_a_port_that_becomes_a_companion_port() {
    for before in [Some(EntryAdmission::Open), None] {
        let (sessions, _outbox, _sent) = attached();
        let mut former = with_companions();
        former.rows[0].ranges[1].admission = before;
        sessions.set_table(index(former.clone()));
        // One of these is let in while everyone may come, and may stay after that.
        if before.is_some() {
            assert_eq!(admit(&sessions, DATA, 9), Decision::Admit(NO_SESSION));
        }
        let changed = index(with_companions());
        sessions.set_table(changed.clone());
        assert_eq!(
            sessions.forget_removed(Some(&index(former)), &changed),
            [DATA, DATA + 1].map(|number| Action::CutOpen(port(number), NO_SESSION))
        );
        close(&sessions, DATA, NO_SESSION);
        assert_eq!(admit(&sessions, DATA, 9), Decision::Ask);
        assert_eq!(
            sessions.forget_removed(Some(&changed), &changed),
            [],
            "it was one before"
        );
    }
}

#[test]
fn a_session_on_what_is_a_companion_port_here_cuts_companions_on_its_ports_only() {
    let (sessions, _outbox, _sent) = started();
    learn_new(&sessions, requested("a", PORT, 1));
    let key = admitted(&sessions, DATA, 1);
    assert_eq!(admitted(&sessions, DATA + 1, 1), key);
    learn_new(&sessions, requested("b", PORT + 1, 2));
    let actions = learn(&sessions, Slot(0), requested("c", DATA, 3));
    assert_eq!(actions, [cut_of(key, 1)]);
}

#[test]
fn a_row_that_gets_companion_ports_gives_them_to_its_live_sessions() {
    let (sessions, _outbox, mut sent) = attached();
    learn_new(&sessions, requested("a", PORT, 1));
    admitted(&sessions, PORT, 2);
    assert_eq!(next(&mut sent), opened("a"), "no one joins without need");
    let changed = index(with_companions());
    let former = sessions.set_table(changed.clone());
    assert_eq!(sessions.forget_removed(former.as_deref(), &changed), []);
    admitted(&sessions, DATA, 1);
}

#[test]
fn a_session_that_had_begun_before_its_row_got_companion_ports_is_kept_by_them() {
    let (sessions, _outbox, mut sent) = attached();
    learn_new(&sessions, requested("a", PORT, 1));
    let busy = Session {
        state: SessionState::Busy,
        ..requested("a", PORT, 1)
    };
    assert_eq!(learn(&sessions, Slot(0), busy), []);
    let changed = index(with_companions());
    let former = sessions.set_table(changed.clone());
    assert_eq!(sessions.forget_removed(former.as_deref(), &changed), []);
    let key = admitted(&sessions, DATA, 1);
    assert_eq!(next(&mut sent), opened("a"));
    assert_eq!(next(&mut sent), used("a", 1));
    close(&sessions, DATA, key);
    assert_eq!(next(&mut sent), closed("a"));
}

#[test]
fn a_successor_goes_on_with_companion_connections() {
    let (former, _outbox, _sent) = started();
    learn_new(&former, requested("a", PORT, 1));
    let own = admitted(&former, PORT, 2);
    let (first, second) = (admitted(&former, DATA, 1), admitted(&former, DATA, 2));
    let open = [
        (PORT, own),
        (DATA, first),
        (DATA, second),
        (DATA, SessionKey(99)),
    ];
    let open = open.map(|(number, key)| (port(number), key));
    let sessions = Sessions::default();
    let table = index(with_companions());
    let orphans = sessions.import(former.export(), &table, open.into_iter());
    assert_eq!(orphans, [SessionKey(99)].into());
    assert_eq!(admitted(&sessions, DATA, 2), second, "the key is the same");
    assert_eq!(connections(&sessions), [4]);
    let actions = sessions.end(Slot(0), &id_of("a"), EndCause::Finished);
    let cut = companions_cut(&actions);
    assert!(cut.contains(&(port(DATA), first)) && cut.contains(&(port(DATA), second)));
}
