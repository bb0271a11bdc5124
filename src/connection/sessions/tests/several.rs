//! Sessions of several ports.

use super::*;
use crate::session::SessionPort;

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
    assert_eq!(actions, [Action::Cut(ports, key, Vec::new())]);
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
