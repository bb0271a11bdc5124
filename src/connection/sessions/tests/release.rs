//! Sessions that clients release, and late messages about them.

use super::*;

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
                assert_eq!(sessions.forget_removed(None, &index(table.clone())), []);
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
