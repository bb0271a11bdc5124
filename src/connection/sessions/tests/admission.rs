//! Who may connect to a port.

use super::*;

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
        (Session, Some(EntryAdmission::Open), true),
        (Open, Some(EntryAdmission::Session), false),
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
