use super::*;
use jiff::Timestamp;

use crate::pool::{Mapping, Offer, PortProtocol, ProxyProtocol, Replies};
use crate::selection::{RefusalCause, Select};
use crate::session::{AmendRefusal, Block, Metadata, OneOrMore, PortFilter, SessionState};
use crate::sock_diag::Protocol;
use crate::table::{PortRange, Slot, TargetPort};

mod amending;
mod companions;
mod leaving;
mod limits;
mod listing;
mod looking;
mod offering;
mod offers;
mod recycling;
mod restart;
mod several;
mod unavailable;

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
        mapping: Mapping::Offset,
        offer: Offer::WhenListening,
        admission: None,
        proxy_protocol: ProxyProtocol::None,
        replies: Replies::ServerPort,
    }
}

fn row(ranges: Vec<PortRange>) -> Row {
    Row {
        slot: Slot(0),
        server: "pool-0".to_owned(),
        server_uid: None,
        not_ready: false,
        draining_since: None,
        attempts: crate::table::Attempts::default(),
        address: None,
        state: RowState::Active,
        ranges,
    }
}

fn at(seconds: u64) -> Now {
    Now {
        monotonic: Duration::from_secs(seconds),
        time: Timestamp::from_second(i64::try_from(seconds).unwrap()).unwrap(),
    }
}

/// A book whose workload listens on 7000 to 7003, with `a` attached.
fn book(ranges: Vec<PortRange>) -> Book {
    let mut book = Book::new(TIMES, None);
    book.set_row(Some(&row(ranges)), TIMES, at(0));
    look(&mut book, at(0), workload);
    book.attach(&server("a"), "", &[], at(0));
    book
}

/// Does every look that is due at `now`. `socket` is what is there.
fn look(book: &mut Book, now: Now, socket: impl Fn(ServerPort) -> Option<SocketId>) {
    while book.next_look().is_some_and(|next| next <= now.monotonic) {
        for port in book.take_due_looks(now) {
            book.see(port, socket(port), now);
        }
    }
}

/// A workload that listens on TCP ports 7000 to 7003 and on UDP port 7000.
fn workload(port: ServerPort) -> Option<SocketId> {
    let number = port.number.get();
    let is_there = match port.protocol {
        Protocol::Tcp => (7000..7004).contains(&number),
        Protocol::Udp => number == 7000,
    };
    is_there.then_some(SocketId(1))
}

/// A workload that does not listen.
fn silent(_: ServerPort) -> Option<SocketId> {
    None
}

fn server(id: &str) -> ConnectionServerId {
    ConnectionServerId::new(id).unwrap()
}

fn session(id: &str) -> SessionId {
    SessionId::new(id).unwrap()
}

fn request(id: &str, idempotency_key: Option<String>) -> Select {
    Select {
        request_id: 0,
        session_id: session(id),
        idempotency_key,
        ports: OneOrMore::default(),
        bound_client: None,
        metadata: Metadata::default(),
        requester: None,
        confirm_within: None,
    }
}

fn select(book: &mut Book, id: &str, now: Now) -> Result<u16, RefusalCause> {
    let selected = book.select(&server("a"), &request(id, None), now);
    selected.map(|selected| selected.session.ports.first.port.get())
}

fn opened(id: &str) -> ToAgent {
    ToAgent::Opened(session(id))
}

/// The last connection has closed, and it was one that claims the session.
fn closed(id: &str) -> ToAgent {
    ToAgent::Closed {
        session_id: session(id),
        is_claimed: true,
    }
}

/// The last connection has closed, and none has claimed the session.
fn probed(id: &str) -> ToAgent {
    ToAgent::Closed {
        session_id: session(id),
        is_claimed: false,
    }
}

fn ended(id: &str) -> ToAgent {
    ToAgent::Ended(session(id))
}

fn released(id: &str) -> ToAgent {
    ToAgent::Release(session(id))
}

/// A session as a connection server lists it.
fn known(id: &str, number: u16, open_here: bool) -> selection::Session {
    selection::Session {
        open_here,
        ..selection::Session::example(id, number)
    }
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

fn cause_of_end(notices: &[Notice]) -> Option<EndCause> {
    notices.iter().find_map(|notice| match notice.message {
        FromAgent::End { cause, .. } => Some(cause),
        _ => None,
    })
}

#[test]
fn a_session_goes_through_its_life() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    assert_eq!(counts(&book), [2, 0, 0, 0, 0]);
    select(&mut book, "s", at(0)).unwrap();
    assert_eq!(counts(&book), [1, 1, 0, 0, 0]);
    book.report(&server("a"), &opened("s"), at(1));
    assert_eq!(counts(&book), [1, 0, 1, 0, 0]);
    book.report(&server("a"), &closed("s"), at(40));
    assert_eq!(counts(&book), [1, 0, 0, 1, 0]);
    book.report(&server("a"), &opened("s"), at(44));
    assert_eq!(counts(&book), [1, 0, 1, 0, 0], "its client has come back");
    book.report(&server("a"), &closed("s"), at(50));
    assert_eq!(book.next_deadline(), Some(Duration::from_secs(55)));
    assert_eq!(cause_of_end(&book.tick(at(55))), Some(EndCause::Finished));
    assert_eq!(
        counts(&book),
        [1, 0, 0, 1, 0],
        "not free before it is acknowledged"
    );
    book.report(&server("a"), &ended("s"), at(55));
    assert_eq!(counts(&book), [1, 0, 0, 1, 0], "not free before it is seen");
    look(&mut book, at(55), workload);
    assert_eq!(counts(&book), [2, 0, 0, 0, 0]);
}

#[test]
fn every_end_has_its_cause() {
    type Play = fn(&mut Book) -> Vec<Notice>;
    let cases: [(Play, EndCause); 6] = [
        (|book| book.tick(at(30)), EndCause::Unclaimed),
        (
            |book| book.report(&server("a"), &released("s"), at(1)),
            EndCause::Released,
        ),
        (
            |book| {
                book.report(&server("a"), &opened("s"), at(1));
                book.tick(at(100))
            },
            EndCause::MaxDuration,
        ),
        (|book| book.end_all(at(1)), EndCause::Drained),
        (|book| book.set_row(None, TIMES, at(1)), EndCause::Drained),
        (
            |book| {
                book.detach(&server("a"), at(1));
                book.tick(at(16))
            },
            EndCause::OwnerGone,
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
    book.report(&server("a"), &released("s"), at(0));
    book.report(&server("a"), &ended("s"), at(0));
    let next: Vec<_> = ["t", "u", "v"]
        .map(|id| select(&mut book, id, at(0)).unwrap())
        .into();
    assert_eq!(next, [20_001, 20_002, 20_000]);
    assert_eq!(select(&mut book, "w", at(0)), Err(RefusalCause::NoFreePort));
}

#[test]
fn only_ports_that_the_workload_listens_on_are_offered() {
    let mut book = book(vec![range("main", 20_000, 7003, 2)]);
    assert_eq!(counts(&book), [1, 0, 0, 0, 1], "nothing listens on 7004");
    select(&mut book, "s", at(0)).unwrap();
    look(&mut book, at(1), silent);
    assert_eq!(counts(&book), [0, 1, 0, 0, 1], "the session stays");
    book.report(&server("a"), &released("s"), at(0));
    book.report(&server("a"), &ended("s"), at(0));
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
        mapping: Mapping::Shared,
        ..range("main", 20_000, 7003, 16)
    };
    let mut book = book(vec![shared]);
    assert_eq!(counts(&book)[0], 16);
    look(&mut book, at(1), silent);
    assert_eq!(counts(&book)[4], 16);
}

#[test]
fn a_changed_row_keeps_what_stays_and_ends_what_goes() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    select(&mut book, "stays", at(0)).unwrap();
    select(&mut book, "goes", at(0)).unwrap();
    let notices = book.set_row(
        Some(&row(vec![range("main", 20_000, 7000, 1)])),
        TIMES,
        at(1),
    );
    assert_eq!(cause_of_end(&notices), Some(EndCause::Drained));
    assert!(book.look_up(port(20_000)).is_some());
    book.report(&server("a"), &ended("goes"), at(0));
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
    book.stop(at(1));
    assert_eq!(select(&mut book, "s", at(0)), Err(RefusalCause::Draining));
    assert!(book.counts(at(0)).draining);
}

#[test]
fn a_server_that_is_not_ready_selects_nothing_and_keeps_its_sessions() {
    let ports = vec![range("main", 20_000, 7000, 2)];
    let mut book = book(ports.clone());
    select(&mut book, "before", at(0)).unwrap();
    let not_ready = Row {
        not_ready: true,
        ..row(ports.clone())
    };
    assert!(book.set_row(Some(&not_ready), TIMES, at(1)).is_empty());
    assert_eq!(select(&mut book, "s", at(1)), Err(RefusalCause::NotReady));
    assert!(book.counts(at(1)).not_ready);
    assert!(book.look_up(port(20_000)).is_some());
    // Its counts go on, and so does what the agent reports to the kubelet: whether
    // it is ready must not depend on whether it is offered.
    assert_eq!(counts(&book), [1, 1, 0, 0, 0]);
    book.set_row(Some(&row(ports)), TIMES, at(2));
    assert!(select(&mut book, "after", at(2)).is_ok());
}

#[test]
fn a_stopping_server_keeps_only_sessions_whose_clients_come_soon() {
    let mut book = book(vec![range("main", 20_000, 7000, 4)]);
    for id in ["held", "busy", "lingering", "coming"] {
        select(&mut book, id, at(0)).unwrap();
    }
    for id in ["busy", "lingering"] {
        book.report(&server("a"), &opened(id), at(1));
    }
    book.report(&server("a"), &closed("lingering"), at(1));
    book.stop(at(1));
    // The client had connected; the report of it was on its way.
    book.report(&server("a"), &opened("coming"), at(1));
    assert!(book.tick(at(1)).is_empty());
    assert_eq!(book.session_count(), 4);
    assert_eq!(book.next_deadline(), Some(Duration::from_secs(1) + COMING));
    let notices = book.tick(at(2));
    let messages: Vec<_> = notices.iter().map(|notice| &notice.message).collect();
    let drained = FromAgent::End {
        session_id: session("held"),
        cause: EndCause::Drained,
    };
    assert_eq!(messages, [&drained]);
    book.report(&server("a"), &ended("held"), at(2));
    assert_eq!(book.session_count(), 3);
    // A client that came and left without a byte is not waited for again.
    book.report(&server("a"), &probed("coming"), at(3));
    assert!(book.next_deadline() <= Some(Duration::from_secs(3)));
    book.tick(at(3));
    book.report(&server("a"), &ended("coming"), at(3));
    assert_eq!(book.session_count(), 2);
    assert!(book.next_deadline() > Some(Duration::from_secs(3)));
}

/// Sessions, requests and connection servers end in every way, again and again.
/// The book remembers only those that exist.
#[test]
fn what_the_book_keeps_does_not_grow_with_the_sessions_seen() {
    let mut book = Book::new(TIMES, Some(Duration::from_secs(100)));
    book.set_row(
        Some(&row(vec![range("main", 20_000, 7000, 4)])),
        TIMES,
        at(0),
    );
    look(&mut book, at(0), workload);
    // Its debug text; numbers in it may get longer.
    let kept = |book: &Book| format!("{book:?}").len();
    let (mut selected, mut early) = (0, 0);
    for number in 0..100_000 {
        let (id, now) = (format!("{number:06}"), at(number));
        book.tick(now);
        look(&mut book, now, workload);
        book.attach(&server("a"), "here", &[], now);
        let another = server(&format!("another-{id}"));
        book.attach(&another, "there", &[], now);
        let request = request(&id, Some(format!("key-{id}")));
        selected += usize::from(book.select(&server("a"), &request, now).is_ok());
        let _ = book.select(&another, &request, now);
        match number % 4 {
            0 => book.report(&server("a"), &released(&id), now),
            1 => book.report(&another, &opened(&id), now),
            2 => {
                book.report(&server("a"), &opened(&id), now);
                book.report(&server("a"), &closed(&id), now)
            }
            _ => Vec::new(),
        };
        for unknown in [opened, closed, ended, released] {
            book.report(&server("a"), &unknown(&format!("unknown-{id}")), now);
        }
        match number % 2 {
            0 => drop(book.leave(&another, now)),
            _ => drop(book.detach(&another, now)),
        }
        for earlier in number.saturating_sub(40)..=number {
            book.report(&server("a"), &ended(&format!("{earlier:06}")), now);
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
