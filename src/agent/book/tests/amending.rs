//! What is changed in a live session.

use super::*;
use crate::session::{Amendment, MetadataPatch};

fn until(seconds: Option<u64>) -> Amendment {
    Amendment {
        expires: Some(seconds.map(|seconds| at(seconds).time)),
        metadata: None,
    }
}

fn saying(key: &str, value: Option<&str>) -> Amendment {
    let entries = [(key.to_owned(), value.map(str::to_owned))];
    Amendment {
        expires: None,
        metadata: Some(MetadataPatch::Merge(entries.into())),
    }
}

/// A book with a busy session `s`, which would end at 100.
fn with_session() -> Book {
    let mut book = book(vec![range("main", 20_000, 7000, 1)]);
    select(&mut book, "s", at(0)).unwrap();
    book.report(&server("a"), &opened("s"), at(1));
    book
}

fn is_live(book: &Book) -> bool {
    book.live_session(&session("s")).is_some()
}

#[test]
fn an_amended_session_ends_when_the_amendment_says() {
    for (expires, last) in [(50, 49), (150, 149), (2_592_002, 2_592_001)] {
        let mut book = with_session();
        let amended = book.amend(&session("s"), &until(Some(expires)), at(2));
        let amended = amended.unwrap();
        assert_eq!(amended.session.expires, Some(at(expires).time));
        assert_eq!(amended.session.state, SessionState::Busy);
        assert_eq!(book.next_deadline(), Some(Duration::from_secs(expires)));
        assert_eq!(book.tick(at(last)), []);
        assert!(matches!(
            book.tick(at(expires))[..],
            [Notice {
                message: FromAgent::End {
                    cause: EndCause::MaxDuration,
                    ..
                },
                ..
            }]
        ));
    }
    let mut book = with_session();
    book.amend(&session("s"), &until(None), at(2)).unwrap();
    assert_eq!(book.next_deadline(), None);
    book.tick(at(1_000_000));
    assert!(is_live(&book));
}

#[test]
fn an_amendment_that_cannot_be_changes_nothing() {
    let mut book = with_session();
    let large = "v".repeat(4_095);
    book.amend(&session("s"), &saying("a", Some(&large)), at(2))
        .unwrap();
    let both = Amendment {
        expires: until(Some(50)).expires,
        ..saying("b", Some(""))
    };
    for (amendment, refusal) in [
        (until(Some(2)), AmendRefusal::ExpiresPassed),
        (until(Some(1)), AmendRefusal::ExpiresPassed),
        (until(Some(2_592_003)), AmendRefusal::ExpiresTooFar),
        (both, AmendRefusal::MetadataTooLarge),
    ] {
        let refused = book.amend(&session("s"), &amendment, at(2));
        assert_eq!(refused, Err(refusal), "{amendment:?}");
    }
    let known = book.live_session(&session("s")).unwrap();
    assert_eq!(known.expires, Some(at(100).time));
    assert_eq!(known.metadata.get("b"), None);
    book.report(&server("a"), &ToAgent::Release(session("s")), at(3));
    for id in ["s", "none"] {
        let refused = book.amend(&session(id), &until(None), at(4));
        assert_eq!(refused, Err(AmendRefusal::UnknownSession));
    }
}

#[test]
fn what_is_as_it_was_is_no_change() {
    let mut book = with_session();
    let mut amend = |amendment| {
        let amended = book.amend(&session("s"), &amendment, at(2));
        amended.unwrap().is_changed
    };
    assert!(!amend(Amendment::default()));
    assert!(!amend(saying("a", None)));
    assert!(amend(saying("a", Some("1"))));
    assert!(!amend(saying("a", Some("1"))));
    assert!(amend(saying("a", None)));
}

/// The pool's longest duration has changed meanwhile.
#[test]
fn a_restarted_agent_keeps_the_end_of_an_amended_session() {
    for amended in [None, Some(None), Some(Some(at(150).time))] {
        let mut book = with_session();
        let amendment = Amendment {
            expires: amended,
            metadata: None,
        };
        book.amend(&session("s"), &amendment, at(2)).unwrap();
        let mut known = book.live_session(&session("s")).unwrap();
        known.open_here = true;
        let times = Times {
            max_duration: Some(Duration::from_secs(300)),
            ..TIMES
        };
        let mut restarted = Book::new(times, Some(Duration::from_secs(20)));
        let row = row(vec![range("main", 20_000, 7000, 1)]);
        restarted.set_row(Some(&row), times, at(5));
        restarted.attach(&server("a"), "", &[known], at(5));
        restarted.tick(at(20));
        let expected = amended.unwrap_or(Some(at(300).time));
        let adopted = restarted.live_session(&session("s")).unwrap();
        assert_eq!(adopted.expires, expected);
        let seconds = expected.map(|at| Duration::from_secs(at.as_second().unsigned_abs()));
        assert_eq!(restarted.next_deadline(), seconds);
    }
}

/// Two connection servers greet a restarted agent; one missed the last amendment.
#[test]
fn a_restarted_agent_takes_the_latest_amendment_whoever_greets_first() {
    for late_is_first in [false, true] {
        let mut book = with_session();
        let first = Amendment {
            expires: until(Some(200)).expires,
            ..saying("a", Some("1"))
        };
        let second = Amendment {
            expires: until(Some(50)).expires,
            ..saying("a", Some("2"))
        };
        // The clock stands still.
        let [missed, mut latest] = [first, second].map(|amendment| {
            let amended = book.amend(&session("s"), &amendment, at(2)).unwrap();
            amended.session
        });
        assert!(latest.amended > missed.amended);
        latest.open_here = true;
        let mut restarted = Book::new(TIMES, Some(at(20).monotonic));
        let row = row(vec![range("main", 20_000, 7000, 1)]);
        restarted.set_row(Some(&row), TIMES, at(5));
        let mut greetings = [("a", missed), ("b", latest.clone())];
        if late_is_first {
            greetings.reverse();
        }
        for (from, known) in &greetings {
            let notices = restarted.attach(&server(from), "", std::slice::from_ref(known), at(5));
            let told = notices.iter().any(|it| {
                let latest =
                    matches!(&it.message, FromAgent::Session(of) if of.metadata == latest.metadata);
                it.to == To::AllBut(server(from)) && latest
            });
            // The others learn what is new.
            assert!(told || *from == "a");
        }
        let live = restarted.live_session(&session("s")).unwrap();
        assert_eq!(
            (live.metadata.get("a"), live.expires, live.amended),
            (Some("2"), Some(at(50).time), latest.amended)
        );
        assert_eq!(restarted.next_deadline(), Some(at(20).monotonic));
        restarted.tick(at(20));
        assert_eq!(restarted.next_deadline(), Some(at(50).monotonic));
    }
}

/// A greeting leaves out metadata that it has no room for.
#[test]
fn a_restarted_agent_takes_metadata_from_whoever_has_it() {
    for whole_is_first in [false, true] {
        let mut book = book(vec![range("main", 20_000, 7000, 1)]);
        let asked = Select {
            metadata: Metadata::new([("a", "1")]).unwrap(),
            ..request("s", None)
        };
        let selected = book.select(&server("a"), &asked, at(2)).unwrap();
        let whole = selection::Session {
            workload_metadata: Metadata::new([("room", "7")]).unwrap(),
            ..selected.session
        };
        let without = selection::Session {
            metadata: Metadata::default(),
            amended: None,
            workload_metadata: Metadata::default(),
            ..whole.clone()
        };
        let mut restarted = Book::new(TIMES, Some(at(20).monotonic));
        let row = row(vec![range("main", 20_000, 7000, 1)]);
        restarted.set_row(Some(&row), TIMES, at(5));
        let mut greetings = [("a", without), ("b", whole.clone())];
        if whole_is_first {
            greetings.reverse();
        }
        for (from, known) in &greetings {
            restarted.attach(&server(from), "", std::slice::from_ref(known), at(5));
        }
        let live = restarted.live_session(&session("s")).unwrap();
        assert_eq!(
            (live.metadata, live.workload_metadata, live.expires),
            (whole.metadata, whole.workload_metadata, whole.expires)
        );
    }
}
