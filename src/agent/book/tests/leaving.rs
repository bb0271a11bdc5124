//! Connection servers leave or die, and the sessions that they know of.

use super::*;

#[test]
fn no_port_waits_for_a_connection_server_that_has_left() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    book.attach(&server("b"), "", &[], at(0));
    select(&mut book, "busy", at(0)).unwrap();
    book.report(&server("a"), &opened("busy"), at(0));
    select(&mut book, "held", at(0)).unwrap();
    book.leave(&server("a"), at(1));
    // Its connections are closed, and it has nothing to acknowledge.
    book.report(&server("b"), &released("busy"), at(1));
    book.report(&server("b"), &ended("busy"), at(1));
    look(&mut book, at(2), workload);
    assert_eq!(counts(&book), [1, 1, 0, 0, 0]);
    // What it made can still be claimed through the other.
    book.tick(at(20));
    book.report(&server("b"), &opened("held"), at(20));
    assert_eq!(counts(&book), [1, 0, 1, 0, 0]);
}

/// `a` listens at one address, `b` at another; the stream of `a` ends at 2 s. A
/// session is given back at 5 s. Its port is free again when no connection
/// server can know the session.
#[test]
fn a_port_waits_only_for_those_that_may_know_its_session() {
    type Play = fn(&mut Book);
    let cases: [(&str, Play, u64); 8] = [
        (
            "made before the stream ended: its connection server may live",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.detach(&server("a"), at(2));
            },
            17,
        ),
        (
            "made after that: it was never sent",
            |book| {
                book.detach(&server("a"), at(2));
                select(book, "s", at(3)).unwrap();
            },
            5,
        ),
        (
            "sent when it came back, and away again",
            |book| {
                book.detach(&server("a"), at(2));
                select(book, "s", at(3)).unwrap();
                book.attach(&server("a"), "here", &[], at(3));
                book.detach(&server("a"), at(4));
            },
            19,
        ),
        (
            "another process listens at its address: a second later all is closed",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.report(&server("a"), &opened("s"), at(1));
                book.detach(&server("a"), at(2));
                book.attach(&server("c"), "here", &[], at(5));
            },
            6,
        ),
        (
            "another process is elsewhere",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.detach(&server("a"), at(2));
                book.attach(&server("c"), "elsewhere", &[], at(5));
            },
            17,
        ),
        (
            "its own stream is back, and ends again",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.detach(&server("a"), at(2));
                book.attach(&server("a"), "here", &[], at(3));
                book.detach(&server("a"), at(4));
            },
            19,
        ),
        (
            "two had one address at a time: it proves nothing",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.attach(&server("c"), "here", &[], at(1));
                book.detach(&server("a"), at(2));
                book.attach(&server("c"), "here", &[], at(3));
                book.attach(&server("d"), "here", &[], at(3));
            },
            17,
        ),
        (
            "its address is not known",
            |book| {
                book.attach(&server("a"), "", &[], at(0));
                select(book, "s", at(1)).unwrap();
                book.detach(&server("a"), at(2));
                book.attach(&server("c"), "", &[], at(3));
            },
            17,
        ),
    ];
    for (what, play, expected) in cases {
        let mut book = book(vec![range("main", 20_000, 7000, 2)]);
        book.attach(&server("a"), "here", &[], at(0));
        book.attach(&server("b"), "there", &[], at(0));
        play(&mut book);
        book.report(&server("b"), &released("s"), at(5));
        for name in ["b", "c", "d"] {
            book.report(&server(name), &ended("s"), at(5));
        }
        let is_free = |at: &u64| {
            book.tick(self::at(*at));
            book.session_count() == 0
        };
        assert_eq!((5..60).find(is_free), Some(expected), "{what}");
    }
}

/// A client that got its session from the dead one can claim it through others
/// or the next process. That time is limited, as the client may never have got
/// the answer.
#[test]
fn a_session_of_a_dead_connection_server_may_still_be_claimed() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    book.attach(&server("a"), "here", &[], at(0));
    select(&mut book, "claimed", at(1)).unwrap();
    select(&mut book, "lost", at(1)).unwrap();
    book.detach(&server("a"), at(2));
    book.attach(&server("c"), "here", &[], at(3));
    book.tick(at(4));
    assert_eq!(counts(&book), [0, 2, 0, 0, 0]);
    book.report(&server("c"), &opened("claimed"), at(5));
    let notices = book.tick(at(17));
    assert_eq!(cause_of_end(&notices), Some(EndCause::OwnerGone));
    book.report(&server("c"), &ended("lost"), at(17));
    assert_eq!(counts(&book), [1, 0, 1, 0, 0]);
}
