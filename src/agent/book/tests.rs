use super::*;
use crate::pool::ProxyProtocol;
use crate::table::{PortRange, Slot, TargetPort};

const TIMES: Times = Times {
    claim: Duration::from_secs(30),
    linger: Duration::from_secs(5),
    max_duration: Some(Duration::from_secs(100)),
};

fn port(number: u16) -> ListenPort {
    ListenPort::new(number).unwrap()
}

fn range(name: &str, first: u16, server_port: u16, count: u16) -> PortRange {
    PortRange {
        name: name.to_owned(),
        connection_port: port(first),
        server_port: TargetPort::new(server_port).unwrap(),
        count,
        protocol: PortProtocol::TCP,
        shared: false,
        proxy_protocol: ProxyProtocol::None,
    }
}

fn row(ranges: Vec<PortRange>) -> Row {
    Row {
        slot: Slot(0),
        server: "pool-0".to_owned(),
        server_uid: None,
        draining_since: None,
        address: None,
        state: RowState::Active,
        ranges,
    }
}

fn at(seconds: u64) -> Now {
    Now {
        monotonic: Duration::from_secs(seconds),
        unix_ms: seconds * 1000,
    }
}

/// A book whose workload listens on 7000 to 7003, with `a` attached.
fn book(ranges: Vec<PortRange>) -> Book {
    let mut book = Book::new(TIMES, None);
    book.set_row(Some(&row(ranges)), TIMES);
    book.set_listening(Listening {
        tcp: (7000..7004).collect(),
        udp: BTreeSet::from([7000]),
    });
    book.attach("a", "", &[], at(0));
    book
}

fn select(book: &mut Book, id: &str, now: Now) -> Result<u32, refused::Cause> {
    let request = v1::Select {
        session_id: id.to_owned(),
        ..v1::Select::default()
    };
    book.select("a", &request, now)
        .map(|(session, _)| session.connection_port)
}

fn opened(id: &str) -> v1::to_agent::Message {
    v1::to_agent::Message::Opened(v1::Opened {
        session_id: id.to_owned(),
    })
}

fn closed(id: &str) -> v1::to_agent::Message {
    v1::to_agent::Message::Closed(v1::Closed {
        session_id: id.to_owned(),
    })
}

fn ended(id: &str) -> v1::to_agent::Message {
    v1::to_agent::Message::Ended(v1::Ended {
        session_id: id.to_owned(),
    })
}

fn released(id: &str) -> v1::to_agent::Message {
    v1::to_agent::Message::Release(v1::Release {
        session_id: id.to_owned(),
    })
}

/// Free, held, busy, lingering and not listening ports of the first name.
fn counts(book: &Book) -> [u32; 5] {
    let counts = &book.counts(at(0)).ports[0];
    [
        counts.free,
        counts.held,
        counts.busy,
        counts.lingering,
        counts.not_listening,
    ]
}

fn cause_of_end(notices: &[Notice]) -> Option<end::Cause> {
    notices.iter().find_map(|notice| match &notice.message {
        from_agent::Message::End(end) => Some(end.cause()),
        _ => None,
    })
}

#[test]
fn a_session_goes_through_its_life() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    assert_eq!(counts(&book), [2, 0, 0, 0, 0]);
    select(&mut book, "s", at(0)).unwrap();
    assert_eq!(counts(&book), [1, 1, 0, 0, 0]);
    book.report("a", &opened("s"), at(1));
    assert_eq!(counts(&book), [1, 0, 1, 0, 0]);
    book.report("a", &closed("s"), at(40));
    assert_eq!(counts(&book), [1, 0, 0, 1, 0]);
    book.report("a", &opened("s"), at(44));
    assert_eq!(counts(&book), [1, 0, 1, 0, 0], "its client came back");
    book.report("a", &closed("s"), at(50));
    assert_eq!(book.next_deadline(), Some(Duration::from_secs(55)));
    assert_eq!(cause_of_end(&book.tick(at(55))), Some(end::Cause::Finished));
    assert_eq!(
        counts(&book),
        [1, 0, 0, 1, 0],
        "not free before it is acknowledged"
    );
    book.report("a", &ended("s"), at(55));
    assert_eq!(counts(&book), [2, 0, 0, 0, 0]);
}

#[test]
fn every_end_has_its_cause() {
    type Play = fn(&mut Book) -> Vec<Notice>;
    let cases: [(Play, end::Cause); 6] = [
        (|book| book.tick(at(30)), end::Cause::Unclaimed),
        (
            |book| book.report("a", &released("s"), at(1)),
            end::Cause::Released,
        ),
        (
            |book| {
                book.report("a", &opened("s"), at(1));
                book.tick(at(100))
            },
            end::Cause::MaxDuration,
        ),
        (|book| book.end_all(), end::Cause::Drained),
        (|book| book.set_row(None, TIMES), end::Cause::Drained),
        (
            |book| {
                book.detach("a", at(1));
                book.tick(at(16))
            },
            end::Cause::OwnerGone,
        ),
    ];
    for (play, cause) in cases {
        let mut book = book(vec![range("main", 20_000, 7000, 2)]);
        select(&mut book, "s", at(0)).unwrap();
        assert_eq!(cause_of_end(&play(&mut book)), Some(cause));
    }
}

#[test]
fn the_port_that_has_been_free_for_the_longest_time_is_next() {
    let mut book = book(vec![range("main", 20_000, 7000, 3)]);
    assert_eq!(select(&mut book, "s", at(0)), Ok(20_000));
    book.report("a", &released("s"), at(0));
    book.report("a", &ended("s"), at(0));
    let next: Vec<_> = ["t", "u", "v"]
        .map(|id| select(&mut book, id, at(0)).unwrap())
        .into();
    assert_eq!(next, [20_001, 20_002, 20_000]);
    assert_eq!(
        select(&mut book, "w", at(0)),
        Err(refused::Cause::NoFreePort)
    );
}

#[test]
fn only_ports_that_the_workload_listens_on_are_offered() {
    let mut book = book(vec![range("main", 20_000, 7003, 2)]);
    assert_eq!(counts(&book), [1, 0, 0, 0, 1], "nothing listens on 7004");
    select(&mut book, "s", at(0)).unwrap();
    book.set_listening(Listening::default());
    assert_eq!(counts(&book), [0, 1, 0, 0, 1], "the session stays");
    book.report("a", &released("s"), at(0));
    book.report("a", &ended("s"), at(0));
    assert_eq!(counts(&book), [0, 0, 0, 0, 2]);
}

#[test]
fn a_port_for_both_protocols_needs_both() {
    let both = PortRange {
        protocol: PortProtocol::TCPUDP,
        ..range("main", 20_000, 7000, 2)
    };
    assert_eq!(
        counts(&book(vec![both])),
        [1, 0, 0, 0, 1],
        "UDP is listened on at 7000 only"
    );
}

#[test]
fn shared_ports_depend_on_the_one_server_port() {
    let shared = PortRange {
        shared: true,
        ..range("main", 20_000, 7003, 16)
    };
    let mut book = book(vec![shared]);
    assert_eq!(counts(&book)[0], 16);
    book.set_listening(Listening::default());
    assert_eq!(counts(&book)[4], 16);
}

#[test]
fn a_changed_row_keeps_what_stays_and_ends_what_goes() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    select(&mut book, "stays", at(0)).unwrap();
    select(&mut book, "goes", at(0)).unwrap();
    let notices = book.set_row(Some(&row(vec![range("main", 20_000, 7000, 1)])), TIMES);
    assert_eq!(cause_of_end(&notices), Some(end::Cause::Drained));
    assert!(book.look_up(port(20_000)).is_some());
    book.report("a", &ended("goes"), at(0));
    assert_eq!(
        counts(&book),
        [0, 1, 0, 0, 0],
        "the port has gone with its session"
    );
    assert_eq!(book.session_count(), 1);
}

#[test]
fn a_draining_server_selects_nothing() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    book.stop();
    assert_eq!(select(&mut book, "s", at(0)), Err(refused::Cause::Draining));
    assert!(book.counts(at(0)).draining);
}

#[test]
fn a_restarted_agent_adopts_before_it_offers() {
    let mut book = Book::new(TIMES, Some(Duration::from_secs(15)));
    book.set_row(Some(&row(vec![range("main", 20_000, 7000, 2)])), TIMES);
    book.set_listening(Listening {
        tcp: (7000..7002).collect(),
        ..Listening::default()
    });
    let known = |id: &str, number: u32| v1::Session {
        session_id: id.to_owned(),
        connection_port: number,
        open_here: true,
        ..v1::Session::default()
    };
    let notices = book.attach("a", "", &[known("s", 20_000), known("stranger", 9)], at(1));
    assert_eq!(
        cause_of_end(&notices),
        Some(end::Cause::Unknown),
        "a port of somebody else"
    );
    assert!(book.look_up(port(20_000)).is_some());
    assert_eq!(
        select(&mut book, "t", at(1)),
        Err(refused::Cause::Recovering)
    );
    book.tick(at(15));
    assert_eq!(select(&mut book, "t", at(15)), Ok(20_001));
}

/// A book after a restart, until 15 s.
fn recovering() -> Book {
    let mut book = Book::new(TIMES, Some(Duration::from_secs(15)));
    book.set_row(Some(&row(vec![range("main", 20_000, 7000, 2)])), TIMES);
    book
}

/// The session `s` as a connection server that has it open lists it.
fn listed() -> [v1::Session; 1] {
    [v1::Session {
        session_id: "s".to_owned(),
        connection_port: 20_000,
        open_here: true,
        ..v1::Session::default()
    }]
}

/// `a` has told a restarted agent of a session, which ends; `b` knows it still,
/// and greets at last.
#[test]
fn a_session_that_ended_while_recovering_is_not_brought_back() {
    type Play = fn(&mut Book);
    let cases: [(&str, Play, u64, bool); 6] = [
        (
            "live still",
            |book| drop(book.attach("a", "", &listed(), at(1))),
            3,
            false,
        ),
        (
            "given back",
            |book| {
                book.attach("a", "", &listed(), at(1));
                book.report("a", &released("s"), at(2));
            },
            3,
            true,
        ),
        (
            "given back before anybody greeted with it",
            |book| {
                book.attach("a", "", &[], at(1));
                book.report("a", &released("s"), at(2));
            },
            3,
            true,
        ),
        (
            "its last connection closed",
            |book| {
                book.attach("a", "", &listed(), at(1));
                book.report("a", &closed("s"), at(2));
                book.tick(at(7));
            },
            8,
            true,
        ),
        (
            "all were ended",
            |book| {
                book.attach("a", "", &listed(), at(1));
                book.end_all();
            },
            3,
            true,
        ),
        (
            "recovery is over: nothing is adopted, so nothing is kept",
            |book| {
                book.attach("a", "", &listed(), at(1));
                book.report("a", &released("s"), at(2));
                book.tick(at(15));
                assert!(book.over.is_empty());
            },
            16,
            true,
        ),
    ];
    for (what, play, greeting, is_over) in cases {
        let mut book = recovering();
        play(&mut book);
        book.report("a", &ended("s"), at(greeting));
        let notices = book.attach("b", "", &listed(), at(greeting));
        let expected = is_over.then_some(end::Cause::Unknown);
        assert_eq!(cause_of_end(&notices), expected, "{what}");
        assert_eq!(book.look_up(port(20_000)).is_none(), is_over, "{what}");
    }
}

/// One of the others may have heard the session's end before the restart, and
/// says so when it hears that it is live.
#[test]
fn an_adopted_session_is_told_to_the_others() {
    let mut book = recovering();
    book.attach("a", "", &[], at(1));
    let mut told = |name: &str| {
        let notices = book.attach(name, "", &listed(), at(2)).into_iter();
        let is_told = |notice: &Notice| matches!(notice.message, from_agent::Message::Session(_));
        let told = notices.filter(is_told).map(|notice| notice.to);
        told.collect::<Vec<_>>()
    };
    let one = |name: &str| To::One(name.to_owned());
    assert_eq!(told("b"), [To::AllBut("b".to_owned()), one("b")]);
    assert_eq!(told("c"), [one("c")], "the others know it");
}

#[test]
fn nobody_waits_for_a_connection_server_that_has_left() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    book.attach("b", "", &[], at(0));
    select(&mut book, "busy", at(0)).unwrap();
    book.report("a", &opened("busy"), at(0));
    select(&mut book, "held", at(0)).unwrap();
    book.leave("a", at(1));
    // Its connections are closed, and it has nothing to acknowledge.
    book.report("b", &released("busy"), at(1));
    book.report("b", &ended("busy"), at(1));
    assert_eq!(counts(&book), [1, 1, 0, 0, 0]);
    // What it made can still be claimed through the other.
    book.tick(at(20));
    book.report("b", &opened("held"), at(20));
    assert_eq!(counts(&book), [1, 0, 1, 0, 0]);
}

/// `a` listens at one place, `b` at another; the stream of `a` ends at 2 s. A
/// session that is given back at 5 s is free again when nobody can have it.
#[test]
fn a_port_waits_only_for_those_who_may_have_its_session() {
    type Play = fn(&mut Book);
    let cases: [(&str, Play, u64); 8] = [
        (
            "made before the stream ended: whoever had it may live",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.detach("a", at(2));
            },
            17,
        ),
        (
            "made after that: it was never told of it",
            |book| {
                book.detach("a", at(2));
                select(book, "s", at(3)).unwrap();
            },
            5,
        ),
        (
            "told of it when it came back, and away again",
            |book| {
                book.detach("a", at(2));
                select(book, "s", at(3)).unwrap();
                book.attach("a", "here", &[], at(3));
                book.detach("a", at(4));
            },
            19,
        ),
        (
            "another process is in its place: a second later all is closed",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.report("a", &opened("s"), at(1));
                book.detach("a", at(2));
                book.attach("c", "here", &[], at(5));
            },
            6,
        ),
        (
            "another process is elsewhere",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.detach("a", at(2));
                book.attach("c", "elsewhere", &[], at(5));
            },
            17,
        ),
        (
            "its own stream is back, and ends again",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.detach("a", at(2));
                book.attach("a", "here", &[], at(3));
                book.detach("a", at(4));
            },
            19,
        ),
        (
            "two were in one place at a time: it proves nothing",
            |book| {
                select(book, "s", at(1)).unwrap();
                book.attach("c", "here", &[], at(1));
                book.detach("a", at(2));
                book.attach("c", "here", &[], at(3));
                book.attach("d", "here", &[], at(3));
            },
            17,
        ),
        (
            "nobody knows where it was",
            |book| {
                book.attach("a", "", &[], at(0));
                select(book, "s", at(1)).unwrap();
                book.detach("a", at(2));
                book.attach("c", "", &[], at(3));
            },
            17,
        ),
    ];
    for (what, play, expected) in cases {
        let mut book = book(vec![range("main", 20_000, 7000, 2)]);
        book.attach("a", "here", &[], at(0));
        book.attach("b", "there", &[], at(0));
        play(&mut book);
        book.report("b", &released("s"), at(5));
        for name in ["b", "c", "d"] {
            book.report(name, &ended("s"), at(5));
        }
        let is_free = |at: &u64| {
            book.tick(self::at(*at));
            book.session_count() == 0
        };
        assert_eq!((5..60).find(is_free), Some(expected), "{what}");
    }
}

/// What its client was told by the dead one can be claimed yet, through others
/// or the next process; but not for ever, as the client may never have heard.
#[test]
fn a_session_of_a_dead_connection_server_may_still_be_claimed() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    book.attach("a", "here", &[], at(0));
    select(&mut book, "claimed", at(1)).unwrap();
    select(&mut book, "lost", at(1)).unwrap();
    book.detach("a", at(2));
    book.attach("c", "here", &[], at(3));
    book.tick(at(4));
    assert_eq!(counts(&book), [0, 2, 0, 0, 0]);
    book.report("c", &opened("claimed"), at(5));
    let notices = book.tick(at(17));
    assert_eq!(cause_of_end(&notices), Some(end::Cause::OwnerGone));
    book.report("c", &ended("lost"), at(17));
    assert_eq!(counts(&book), [1, 0, 1, 0, 0]);
}

/// Every way that a session, a request or a connection server can go, again and
/// again: all that the book remembers is of those that are there.
#[test]
fn what_the_book_keeps_does_not_grow_with_the_sessions_seen() {
    let mut book = Book::new(TIMES, Some(Duration::from_secs(100)));
    book.set_row(Some(&row(vec![range("main", 20_000, 7000, 4)])), TIMES);
    book.set_listening(Listening {
        tcp: (7000..7004).collect(),
        ..Listening::default()
    });
    // What it says of itself; numbers may get longer.
    let kept = |book: &Book| format!("{book:?}").len();
    let (mut selected, mut early) = (0, 0);
    for number in 0..100_000 {
        let (id, now) = (format!("{number:06}"), at(number));
        book.tick(now);
        book.attach("a", "here", &[], now);
        let another = format!("another-{id}");
        book.attach(&another, "there", &[], now);
        let request = v1::Select {
            session_id: id.clone(),
            idempotency_key: format!("key-{id}"),
            ..v1::Select::default()
        };
        selected += usize::from(book.select("a", &request, now).is_ok());
        let _ = book.select(&another, &request, now);
        match number % 4 {
            0 => book.report("a", &released(&id), now),
            1 => book.report(&another, &opened(&id), now),
            2 => {
                book.report("a", &opened(&id), now);
                book.report("a", &closed(&id), now)
            }
            _ => Vec::new(),
        };
        for unknown in [opened, closed, ended, released] {
            book.report("a", &unknown(&format!("unknown-{id}")), now);
        }
        match number % 2 {
            0 => drop(book.leave(&another, now)),
            _ => book.detach(&another, now),
        }
        for earlier in number.saturating_sub(40)..=number {
            book.report("a", &ended(&format!("{earlier:06}")), now);
        }
        match number {
            99 => assert!(book.over.len() <= 4),
            1_000 => early = kept(&book),
            _ => {}
        }
    }
    let late = kept(&book);
    assert!(selected > 10_000, "{selected} sessions");
    assert!(
        late < early + early / 4,
        "{early} bytes, then {late}: {book:?}"
    );
}

/// An agent that has restarted does not know who was told of what.
#[test]
fn a_session_made_before_a_restart_is_waited_for_by_all() {
    let mut book = Book::new(TIMES, Some(Duration::from_secs(15)));
    book.set_row(Some(&row(vec![range("main", 20_000, 7000, 2)])), TIMES);
    book.attach("a", "here", &[], at(1));
    book.detach("a", at(2));
    let known = v1::Session {
        session_id: "s".to_owned(),
        connection_port: 20_000,
        ..v1::Session::default()
    };
    book.attach("b", "there", &[known], at(3));
    book.report("b", &released("s"), at(4));
    book.report("b", &ended("s"), at(4));
    assert_eq!(book.session_count(), 1);
    book.tick(at(17));
    assert_eq!(book.session_count(), 0);
}
