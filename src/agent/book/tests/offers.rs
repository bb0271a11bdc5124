//! Sessions that the workload has to confirm.

use super::*;
use crate::agent::book::NotOffered;
use crate::selection::GONE_AFTER;

const WITHIN: Duration = Duration::from_secs(3);

fn asking(id: &str, request_id: u64, key: Option<&str>) -> Select {
    Select {
        request_id,
        confirm_within: Some(WITHIN),
        ..request(id, key.map(str::to_owned))
    }
}

/// A book of one port with an offered session `s`, which `a` has asked for.
fn with_offer() -> Book {
    let mut book = book(vec![range("main", 20_000, 7000, 1)]);
    let selected = book.select(&server("a"), &asking("s", 7, None), at(10));
    let selected = selected.unwrap();
    assert!(selected.is_offered);
    let deadline = at(13).time;
    assert_eq!(selected.session.confirm_deadline, Some(deadline));
    assert!(matches!(
        &selected.notices[..],
        [Notice {
            to: To::Workload,
            message: FromAgent::Session(told),
        }] if told.confirm_deadline == Some(deadline)
    ));
    book
}

/// A book of one port with an offered session `s`, which `a` has asked for under `key`.
fn with_key() -> Book {
    let mut book = book(vec![range("main", 20_000, 7000, 1)]);
    book.select(&server("a"), &asking("s", 0, Some("key")), at(10))
        .unwrap();
    book
}

fn says(text: &str) -> Metadata {
    Metadata::new([("seat", text)]).unwrap()
}

/// The answers to requests in `notices`, with their receivers.
fn answers(notices: &[Notice]) -> Vec<(&str, u64, Option<RefusalCause>, Option<&str>)> {
    let answers = notices.iter().filter_map(|notice| {
        let To::One(to) = &notice.to else {
            return None;
        };
        Some(match &notice.message {
            FromAgent::Selected { request_id, .. } => (to.as_str(), *request_id, None, None),
            FromAgent::Refused {
                request_id,
                cause,
                reason,
            } => (to.as_str(), *request_id, Some(*cause), reason.as_deref()),
            _ => return None,
        })
    });
    answers.collect()
}

/// The port is free, and no session is left.
fn is_free(book: &Book) -> bool {
    book.is_free(port(20_000)) && book.session_count() == 0
}

#[test]
fn no_connection_server_knows_a_session_before_it_is_confirmed() {
    let mut book = with_offer();
    assert_eq!(book.look_up(port(20_000)), None);
    assert_eq!(
        book.live_sessions_after("", 9).len(),
        1,
        "the workload knows it"
    );
    let attached = book.attach(&server("b"), "", &[], at(11));
    assert_eq!(attached, []);
    // A request that guesses its id finds none.
    let told = book.report(&server("b"), &opened("s"), at(11));
    assert!(matches!(
        told[..],
        [Notice {
            message: FromAgent::End {
                cause: EndCause::Unknown,
                ..
            },
            ..
        }]
    ));
    let notices = book.confirm(&session("s"), says("4"), at(12)).unwrap();
    let FromAgent::Selected {
        session: answer,
        counts,
        ..
    } = &notices[0].message
    else {
        panic!("who asked learns it first: {notices:?}");
    };
    assert_eq!(answer.workload_metadata.get("seat"), Some("4"));
    assert_eq!(answer.claim_deadline, at(42).time, "counts from now on");
    assert_eq!(counts.ports[0].held, 1);
    assert_eq!(notices[1].to, To::All);
    assert_eq!(notices.len(), 2);
    assert_eq!(book.look_up(port(20_000)).as_ref(), Some(answer));
    assert_eq!(book.tick(at(41)), []);
    assert_eq!(book.tick(at(42)).len(), 1, "unclaimed");
}

#[test]
fn confirming_again_changes_nothing_and_later_is_too_late() {
    let mut book = with_offer();
    book.confirm(&session("s"), says("4"), at(11)).unwrap();
    let again = book.confirm(&session("s"), says("4"), at(12));
    assert_eq!(again, Ok(Vec::new()));
    let otherwise = book.confirm(&session("s"), says("5"), at(12));
    assert_eq!(otherwise, Err(NotOffered::Confirmed));
    let known = book.live_session(&session("s")).unwrap();
    assert_eq!(known.workload_metadata.get("seat"), Some("4"));
    let refused = book.refuse(&session("s"), None, at(12));
    assert_eq!(refused, Err(NotOffered::Confirmed));

    let mut book = with_offer();
    let notices = book.tick(at(13));
    let cause = Some(RefusalCause::NotConfirmed);
    assert_eq!(answers(&notices), [("a", 7, cause, None)]);
    assert!(is_free(&book));
    let late = book.confirm(&session("s"), says("4"), at(13));
    assert_eq!(late, Err(NotOffered::Unknown));
    // A session that the workload was not asked about.
    select(&mut book, "plain", at(13)).unwrap();
    let unasked = book.confirm(&session("plain"), says("4"), at(13));
    assert_eq!(unasked, Err(NotOffered::NotAsked));
}

#[test]
fn a_refused_session_frees_its_port_at_once_and_says_why() {
    let mut book = with_offer();
    let notices = book.refuse(&session("s"), Some("no such map"), at(11));
    let notices = notices.unwrap();
    let cause = Some(RefusalCause::RefusedByWorkload);
    assert_eq!(answers(&notices), [("a", 7, cause, Some("no such map"))]);
    // Connection servers do not know it.
    assert!(notices.iter().all(|notice| notice.to != To::All));
    assert!(is_free(&book));
    let again = book.refuse(&session("s"), None, at(11));
    assert_eq!(again, Err(NotOffered::Unknown));
    assert!(
        book.select(&server("a"), &asking("t", 8, None), at(11))
            .is_ok()
    );
}

#[test]
fn an_offered_session_ends_with_whatever_ends_its_server_or_who_asked() {
    type Event = fn(&mut Book) -> Vec<Notice>;
    let cases: [(Event, &[(&str, u64)]); 6] = [
        (|book| book.end_all(at(11)), &[("a", 7)]),
        (|book| book.stop(at(11)), &[("a", 7)]),
        (|book| book.set_row(None, TIMES, at(11)), &[("a", 7)]),
        (
            |book| book.end_for_workload(&session("s"), at(11)),
            &[("a", 7)],
        ),
        // The numbers of its requests are gone with its stream.
        (|book| book.detach(&server("a"), at(11)), &[]),
        (|book| book.attach(&server("a"), "", &[], at(11)), &[]),
    ];
    for (index, (event, expected)) in cases.into_iter().enumerate() {
        let mut book = with_offer();
        let notices = event(&mut book);
        let answered = answers(&notices);
        let to: Vec<_> = answered.iter().map(|(to, id, ..)| (*to, *id)).collect();
        assert_eq!(to, expected, "{index}");
        assert!(answered.iter().all(|(_, _, cause, _)| cause.is_some()));
        assert_eq!(book.session_count(), 0, "{index}");
    }
}

/// The message that takes a request back.
fn withdraw(request_id: u64) -> ToAgent {
    ToAgent::Withdraw { request_id }
}

#[test]
fn a_request_that_is_withdrawn_ends_the_offer_when_it_was_the_last() {
    let mut book = with_offer();
    // Another's, and one that it has not.
    assert_eq!(book.report(&server("b"), &withdraw(7), at(11)), []);
    assert_eq!(book.report(&server("a"), &withdraw(8), at(11)), []);
    let notices = book.report(&server("a"), &withdraw(7), at(11));
    let cause = Some(RefusalCause::Withdrawn);
    assert_eq!(answers(&notices), [("a", 7, cause, None)]);
    assert!(is_free(&book));
    let late = book.confirm(&session("s"), says("4"), at(11));
    assert_eq!(late, Err(NotOffered::Unknown));
    // One that the workload has confirmed lives on: its answer was under way.
    let mut book = with_offer();
    book.confirm(&session("s"), says("4"), at(11)).unwrap();
    assert_eq!(book.report(&server("a"), &withdraw(7), at(11)), []);
    assert!(book.live_session(&session("s")).is_some());
}

#[test]
fn who_withdraws_takes_nothing_from_others_who_asked_under_the_key() {
    let mut book = book(vec![range("main", 20_000, 7000, 1)]);
    for name in ["a", "b"] {
        book.attach(&server(name), "", &[], at(10));
        let asked = asking(name, 7, Some("key"));
        book.select(&server(name), &asked, at(10)).unwrap();
    }
    let notices = book.report(&server("a"), &withdraw(7), at(11));
    let cause = Some(RefusalCause::Withdrawn);
    assert_eq!(answers(&notices), [("a", 7, cause, None)]);
    let notices = book.confirm(&session("a"), says("4"), at(12)).unwrap();
    assert_eq!(answers(&notices), [("b", 7, None, None)]);
    // It is that of the one who is left: it does not end with the other.
    book.leave(&server("a"), at(12));
    assert!(book.live_session(&session("a")).is_some());
    book.detach(&server("b"), at(12));
    book.tick(at(12 + GONE_AFTER.as_secs()));
    assert!(book.live_session(&session("a")).is_none(), "no one has it");
}

#[test]
fn only_who_asks_for_a_confirmation_joins_an_offer() {
    let mut book = with_key();
    let plain = request("t", Some("key".to_owned()));
    let refused = book.select(&server("a"), &plain, at(10));
    assert_eq!(refused, Err(RefusalCause::DuplicateId));
    book.confirm(&session("s"), says("4"), at(11)).unwrap();
    let selected = book.select(&server("a"), &plain, at(11)).unwrap();
    assert_eq!(selected.session.id, session("s"));
}

/// A workload that is silent is not asked again for the request.
#[test]
fn an_offer_that_ends_with_its_longest_duration_is_not_confirmed() {
    let mut book = book(vec![range("main", 20_000, 7000, 1)]);
    let times = Times {
        max_duration: Some(Duration::from_secs(1)),
        ..TIMES
    };
    let ports = vec![range("main", 20_000, 7000, 1)];
    book.set_row(Some(&row(ports)), times, at(10));
    book.select(&server("a"), &asking("s", 7, None), at(10))
        .unwrap();
    let cause = Some(RefusalCause::NotConfirmed);
    assert_eq!(answers(&book.tick(at(11))), [("a", 7, cause, None)]);
}

/// A session that is adopted was confirmed, where the pool asks.
#[test]
fn confirming_again_after_a_restart_of_the_agent_changes_nothing() {
    let mut book = with_offer();
    let notices = book.confirm(&session("s"), Metadata::default(), at(11));
    let Ok(
        [
            Notice {
                message: FromAgent::Selected { session: known, .. },
                ..
            },
            ..,
        ],
    ) = notices.as_deref()
    else {
        panic!("{notices:?}");
    };
    let mut restarted = Book::new(TIMES, Some(at(20).monotonic));
    let ports = vec![range("main", 20_000, 7000, 1)];
    restarted.set_row(Some(&row(ports)), TIMES, at(12));
    restarted.attach(&server("a"), "", std::slice::from_ref(known), at(12));
    let again = restarted.confirm(&session("s"), Metadata::default(), at(12));
    assert_eq!(again, Ok(Vec::new()));
}

#[test]
fn requests_with_the_same_key_wait_for_the_same_confirmation() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    book.attach(&server("b"), "", &[], at(10));
    for (from, id, request_id) in [("a", "s", 7), ("b", "t", 8)] {
        let selected = book.select(&server(from), &asking(id, request_id, Some("key")), at(10));
        let selected = selected.unwrap();
        assert!(selected.is_offered);
        assert_eq!(selected.session.id, session("s"));
    }
    assert_eq!(book.session_count(), 1);
    // One of them leaves, the other still wants it.
    book.detach(&server("a"), at(11));
    let notices = book.confirm(&session("s"), says("4"), at(12)).unwrap();
    assert_eq!(answers(&notices), [("b", 8, None, None)]);
    // From then on the key gives the session at once.
    let selected = book.select(&server("b"), &asking("u", 9, Some("key")), at(12));
    assert!(!selected.unwrap().is_offered);
}

#[test]
fn a_request_that_is_repeated_without_end_is_refused() {
    let mut book = with_key();
    let refused = (1..100).find_map(|number| {
        let selected = book.select(&server("a"), &asking("s", number, Some("key")), at(10));
        selected.err().map(|cause| (number, cause))
    });
    assert_eq!(refused, Some((64, RefusalCause::DuplicateId)));
}
