//! The time limits of sessions: nothing renews them but what the head of the book
//! says.

use super::restart::{listed, recovering};
use super::*;

/// Longer than a recovery, which may delay what it is about.
const LIMITS: Times = Times {
    claim: Duration::from_secs(40),
    linger: Duration::from_secs(40),
    max_duration: Some(Duration::from_secs(100)),
};

fn ports() -> Row {
    row(vec![range("main", 20_000, 7000, 2)])
}

/// A book with `a` and `b` attached, and a session `s` of `a` selected at 0.
fn begin() -> Book {
    let mut book = Book::new(LIMITS, None);
    book.set_row(Some(&ports()), LIMITS, at(0));
    look(&mut book, at(0), workload);
    book.attach(&server("a"), "here", &[], at(0));
    book.attach(&server("b"), "there", &[], at(0));
    let request = request("s", Some("key".to_owned()));
    book.select(&server("a"), &request, at(0)).unwrap();
    book
}

/// What connection server `name` lists in a greeting.
fn listing(book: &Book, is_open: bool) -> Vec<selection::Session> {
    let session = book
        .look_up(port(20_000))
        .map(|session| selection::Session {
            open_here: is_open,
            ..session
        });
    session.into_iter().collect()
}

fn is_busy(book: &Book) -> bool {
    let session = book.look_up(port(20_000)).unwrap();
    session.state == SessionState::Busy
}

type Change = fn(&mut Book, Now);

/// Everything that may happen in a session without a connection that begins or
/// ends. A session that has one has it at `b`.
const OTHERS: [(&str, Change); 10] = [
    ("nothing", |_, _| {}),
    ("the request is repeated", |book, now| {
        let request = request("t", Some("key".to_owned()));
        let again = book.select(&server("b"), &request, now).unwrap();
        assert_eq!(again.session.id, session("s"));
    }),
    ("another request", |book, now| {
        select(book, "t", now).unwrap();
    }),
    ("a lookup", |book, _| {
        book.look_up(port(20_000)).unwrap();
    }),
    ("looks at the sockets", |book, now| {
        look(book, now, workload);
        look(book, now, silent);
    }),
    ("a newer table", |book, now| {
        let longer = Times {
            claim: LIMITS.claim * 2,
            linger: LIMITS.linger * 2,
            max_duration: LIMITS.max_duration.map(|most| most * 2),
        };
        book.set_row(Some(&ports()), longer, now);
    }),
    ("connection servers come back", |book, now| {
        let is_busy = is_busy(book);
        for (name, is_open) in [("a", false), ("b", is_busy)] {
            book.detach(&server(name), now);
            let known = listing(book, is_open);
            book.attach(&server(name), "", &known, now);
        }
    }),
    (
        "a connection server crashes and another one comes",
        |book, now| {
            book.detach(&server("a"), now);
            book.attach(&server("c"), "here", &[], now);
        },
    ),
    ("a connection server says goodbye", |book, now| {
        book.leave(&server("a"), now);
    }),
    ("the agent restarts", |book, now| {
        let is_busy = is_busy(book);
        let known = [("a", listing(book, false)), ("b", listing(book, is_busy))];
        *book = Book::new(LIMITS, Some(now.monotonic + Duration::from_secs(15)));
        book.set_row(Some(&ports()), LIMITS, now);
        look(book, now, workload);
        for (name, known) in known {
            book.attach(&server(name), "", &known, now);
        }
    }),
];

/// Plays the session with each of the others at `when`, once and several times
/// within 14 s, and returns when it ends and why.
fn ends(play: fn(&mut Book, u64), when: u64) -> Vec<(String, u64, EndCause)> {
    let mut found = Vec::new();
    for (what, other) in OTHERS {
        for again in [false, true] {
            let mut book = begin();
            let mut is_done = false;
            let end = (0..300).find_map(|second| {
                let mut ends = book.tick(at(second)).into_iter();
                let cause = ends.find_map(|notice| match notice.message {
                    FromAgent::End { session_id, cause } if session_id == session("s") => {
                        Some(cause)
                    }
                    _ => None,
                });
                if cause.is_none() {
                    play(&mut book, second);
                    let is_again = again && (when..when + 14).contains(&second) && second % 7 == 0;
                    let is_time = second == when || is_again;
                    // The second port is given only once.
                    if is_time && !(is_done && what == "another request") {
                        other(&mut book, at(second));
                        is_done = true;
                    }
                }
                cause.map(|cause| (second, cause))
            });
            let (second, cause) = end.expect("it has an end");
            found.push((format!("{what}, again {again}"), second, cause));
        }
    }
    found
}

#[test]
fn nothing_renews_the_claim_deadline() {
    for (what, second, cause) in ends(|_, _| {}, 10) {
        // One that no client may have received does not wait so long.
        let is_orphan = cause == EndCause::OwnerGone && second < 40;
        let is_due = cause == EndCause::Unclaimed && second == 40;
        assert!(is_due || is_orphan, "{what}: {cause:?} at {second}");
    }
}

#[test]
fn nothing_but_a_connection_renews_the_linger_time() {
    let session = |book: &mut Book, second| match second {
        1 => drop(book.report(&server("b"), &opened("s"), at(1))),
        20 => drop(book.report(&server("b"), &closed("s"), at(20))),
        _ => {}
    };
    for (what, second, cause) in ends(session, 25) {
        let is_orphan = cause == EndCause::OwnerGone && second < 60;
        let is_due = cause == EndCause::Finished && second == 60;
        assert!(is_due || is_orphan, "{what}: {cause:?} at {second}");
    }
}

#[test]
fn nothing_renews_the_longest_duration() {
    let session = |book: &mut Book, second| match second {
        1 => drop(book.report(&server("b"), &opened("s"), at(1))),
        // A client that comes and goes: the session is never without it for long.
        30.. if second % 10 == 0 => {
            book.report(&server("b"), &closed("s"), at(second));
            book.report(&server("b"), &opened("s"), at(second));
        }
        _ => {}
    };
    for (what, second, cause) in ends(session, 50) {
        assert_eq!((second, cause), (100, EndCause::MaxDuration), "{what}");
    }
}

/// Its clock may have been set meanwhile.
#[test]
fn a_session_from_the_future_has_no_more_than_its_limits() {
    let mut book = recovering();
    let future = Timestamp::from_second(1_000_000).unwrap();
    let known = selection::Session {
        created: future,
        claim_deadline: future,
        ..known("s", 20_000, false)
    };
    book.attach(&server("a"), "", &[known], at(1));
    assert_eq!(book.next_deadline(), Some(Duration::from_secs(15)));
    book.tick(at(15));
    assert_eq!(book.next_deadline(), Some(Duration::from_secs(31)));
}

/// The connection server that has it open may greet last.
#[test]
fn a_recovering_agent_ends_nothing_for_want_of_a_connection() {
    for state in [
        SessionState::Held,
        SessionState::Busy,
        SessionState::Lingering,
    ] {
        let mut book = recovering();
        let known = selection::Session {
            state,
            lingering_since: Some(Timestamp::UNIX_EPOCH),
            ..known("s", 20_000, false)
        };
        book.attach(&server("a"), "", std::slice::from_ref(&known), at(10));
        book.attach(&server("b"), "", std::slice::from_ref(&known), at(11));
        assert_eq!(cause_of_end(&book.tick(at(14))), None, "{state:?}");
        book.attach(&server("c"), "", &listed(), at(14));
        assert_eq!(cause_of_end(&book.tick(at(40))), None, "{state:?}");
        assert!(is_busy(&book), "{state:?}");
    }
}

/// A port scan, or a client that comes while the workload does not listen.
#[test]
fn a_session_that_no_connection_has_claimed_is_held_until_its_deadline() {
    for linger in [0, 5] {
        let times = Times {
            linger: Duration::from_secs(linger),
            ..TIMES
        };
        let mut book = book(vec![range("main", 20_000, 7000, 1)]);
        book.set_row(
            Some(&row(vec![range("main", 20_000, 7000, 1)])),
            times,
            at(0),
        );
        select(&mut book, "s", at(0)).unwrap();
        for second in [1, 10, 20] {
            book.report(&server("a"), &opened("s"), at(second));
            assert_eq!(counts(&book), [0, 0, 1, 0, 0]);
            book.report(&server("a"), &probed("s"), at(second));
            assert_eq!(counts(&book), [0, 1, 0, 0, 0], "held again");
        }
        let held = book.look_up(port(20_000)).unwrap();
        assert_eq!(held.claim_deadline, at(30).time, "as it was");
        assert_eq!(cause_of_end(&book.tick(at(29))), None);
        assert_eq!(cause_of_end(&book.tick(at(30))), Some(EndCause::Unclaimed));
    }
}

/// Once claimed, a session is not held for later connections that carry nothing.
#[test]
fn a_claim_is_for_good() {
    let mut book = book(vec![range("main", 20_000, 7000, 1)]);
    select(&mut book, "s", at(0)).unwrap();
    book.report(&server("a"), &opened("s"), at(1));
    book.report(&server("a"), &closed("s"), at(2));
    book.report(&server("a"), &opened("s"), at(3));
    book.report(&server("a"), &probed("s"), at(4));
    assert_eq!(counts(&book), [0, 0, 0, 1, 0]);
    assert_eq!(cause_of_end(&book.tick(at(9))), Some(EndCause::Finished));
}

#[test]
fn a_probe_near_the_claim_deadline_leaves_the_linger_time() {
    let mut book = book(vec![range("main", 20_000, 7000, 1)]);
    select(&mut book, "s", at(0)).unwrap();
    book.report(&server("a"), &opened("s"), at(28));
    book.report(&server("a"), &probed("s"), at(29));
    assert_eq!(counts(&book), [0, 0, 0, 1, 0]);
    assert_eq!(book.next_deadline(), Some(Duration::from_secs(34)));
}

/// Connection servers say so in their greetings.
#[test]
fn a_restarted_agent_knows_what_is_claimed() {
    for (is_claimed, ends) in [(false, 30), (true, 15)] {
        let mut book = recovering();
        let known = selection::Session {
            state: SessionState::Busy,
            claim_deadline: at(30).time,
            is_claimed,
            ..known("s", 20_000, false)
        };
        book.attach(&server("a"), "", &[known], at(1));
        let end = (0..60).find(|second| cause_of_end(&book.tick(at(*second))).is_some());
        assert_eq!(end, Some(ends), "claimed {is_claimed}");
    }
}
