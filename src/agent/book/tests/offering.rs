//! When a port is offered: what was seen of the workload's sockets.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn after(milliseconds: u64) -> Now {
    Now {
        monotonic: Duration::from_millis(milliseconds),
        time: Timestamp::UNIX_EPOCH,
    }
}

/// A book with one port for both protocols and without a linger time. Program
/// `number` listens.
fn one_port(number: u32) -> Book {
    offered(Offer::WhenListening, is(number))
}

/// The same with `offer`. `socket` is what listens.
fn offered(offer: Offer, socket: impl Fn(ServerPort) -> Option<SocketId>) -> Book {
    let mut book = book(vec![]);
    offer_as(&mut book, offer, after(0));
    look(&mut book, at(0), socket);
    book
}

/// Gives `book` the row with its port, which has `offer`.
fn offer_as(book: &mut Book, offer: Offer, now: Now) -> Vec<Notice> {
    let both = PortRange {
        protocol: PortProtocol::TCPUDP,
        offer,
        ..range("main", 20_000, 7000, 1)
    };
    let times = Times {
        linger: Duration::ZERO,
        ..TIMES
    };
    book.set_row(Some(&row(vec![both])), times, now)
}

/// Program 7 has no UDP socket.
fn no_udp(port: ServerPort) -> Option<SocketId> {
    is(7)(port).filter(|_| port.protocol == Protocol::Tcp)
}

/// The sockets of program `number`.
fn is(number: u32) -> impl Fn(ServerPort) -> Option<SocketId> {
    move |port| match port.protocol {
        Protocol::Tcp => Some(SocketId(number)),
        Protocol::Udp => Some(SocketId(100 + number)),
    }
}

/// Program 7 has closed its TCP socket.
fn no_tcp(port: ServerPort) -> Option<SocketId> {
    is(7)(port).filter(|_| port.protocol == Protocol::Udp)
}

/// A session `id` from `begin` on that has a connection and ends a second later.
fn serve(book: &mut Book, id: &str, begin: u64) {
    select(book, id, after(begin)).unwrap();
    book.report(&server("a"), &opened(id), after(begin));
    book.report(&server("a"), &closed(id), after(begin + 1_000));
    book.report(&server("a"), &ended(id), after(begin + 1_000));
}

fn is_free(book: &Book) -> bool {
    counts(book)[0] == 1
}

/// The program ends a little after its connection has closed.
#[test]
fn a_one_shot_program_is_not_offered_while_it_ends() {
    let mut book = one_port(7);
    serve(&mut book, "s", 1_000);
    assert!(!is_free(&book), "nothing was seen since the session");
    look(&mut book, after(2_000), is(7));
    assert!(!is_free(&book), "the socket is still there");
    look(&mut book, after(2_200), no_tcp);
    assert_eq!(counts(&book), [0, 0, 0, 0, 1]);
    look(&mut book, after(9_000), no_tcp);
    assert!(!is_free(&book), "not by the passing of time");
    look(&mut book, after(10_000), is(8));
    assert!(is_free(&book), "it listens again");
}

#[test]
fn a_program_that_listens_again_at_once_is_offered_at_once() {
    let mut book = one_port(7);
    serve(&mut book, "s", 1_000);
    look(&mut book, after(2_000), is(8));
    assert!(is_free(&book));
}

/// Its first session costs the port half a second, the others nothing.
#[test]
fn a_lasting_program_proves_itself_once() {
    let mut book = one_port(7);
    serve(&mut book, "s", 1_000);
    look(&mut book, after(2_000), is(7));
    assert_eq!(counts(&book), [0, 0, 0, 1, 0]);
    look(&mut book, after(2_499), is(7));
    assert!(!is_free(&book));
    look(&mut book, after(2_500), is(7));
    assert!(is_free(&book));
    serve(&mut book, "t", 3_000);
    assert!(
        is_free(&book),
        "without a look: there is one before a selection"
    );
}

#[test]
fn a_lasting_program_proves_itself_for_all_its_ports() {
    let mut book = book(vec![range("main", 20_000, 7000, 3)]);
    select(&mut book, "s", after(0)).unwrap();
    select(&mut book, "t", after(0)).unwrap();
    for (id, end) in [("s", 1_000), ("t", 2_000)] {
        book.report(&server("a"), &opened(id), after(0));
        book.report(&server("a"), &closed(id), after(end - 500));
        book.report(&server("a"), &released(id), after(end - 500));
        book.report(&server("a"), &ended(id), after(end - 500));
        look(&mut book, after(end), workload);
    }
    assert_eq!(counts(&book), [3, 0, 0, 0, 0]);
    // Ports 20000 and 20001, which were given, are proven; 20002 is not.
    for (id, number) in [("u", 20_002), ("v", 20_000), ("w", 20_001)] {
        assert_eq!(select(&mut book, id, after(3_000)), Ok(number));
        book.report(&server("a"), &opened(id), after(3_000));
        book.report(&server("a"), &released(id), after(3_000));
        book.report(&server("a"), &ended(id), after(3_000));
        assert_eq!(counts(&book), [3, 0, 0, 0, 0]);
    }
}

#[test]
fn an_entry_that_loses_a_socket_is_trusted_port_by_port() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    let serve = |book: &mut Book, id: &str, begin: u64| {
        let port = select(book, id, after(begin)).unwrap();
        book.report(&server("a"), &opened(id), after(begin));
        book.report(&server("a"), &released(id), after(begin));
        book.report(&server("a"), &ended(id), after(begin));
        port
    };
    assert_eq!(serve(&mut book, "s", 0), 20_000);
    look(&mut book, after(500), workload);
    let is_first = |port: ServerPort| port.number.get() == 7000;
    look(&mut book, after(5_000), |port| {
        workload(port).filter(|_| is_first(port))
    });
    assert_eq!(counts(&book), [1, 0, 0, 0, 1], "the other one has gone");
    assert_eq!(serve(&mut book, "t", 6_000), 20_000);
    assert_eq!(counts(&book), [1, 0, 0, 0, 1], "proven by itself");
    look(&mut book, after(7_000), workload);
    assert_eq!(serve(&mut book, "u", 8_000), 20_001);
    assert_eq!(
        counts(&book),
        [1, 0, 0, 1, 0],
        "not proven by the other one"
    );
    assert_eq!(serve(&mut book, "v", 8_000), 20_000);
    assert_eq!(counts(&book), [1, 0, 0, 1, 0]);
}

/// What was proven of one socket says nothing of the next one.
#[test]
fn a_new_socket_must_prove_itself_too() {
    let mut book = one_port(7);
    serve(&mut book, "s", 1_000);
    look(&mut book, after(3_000), is(7));
    look(&mut book, after(4_000), is(8));
    serve(&mut book, "t", 5_000);
    assert!(!is_free(&book));
    look(&mut book, after(6_000), is(8));
    assert!(!is_free(&book));
    look(&mut book, after(6_500), is(8));
    assert!(is_free(&book));
}

/// A look that is done when the session ends says nothing of the time after.
#[test]
fn a_look_before_the_end_of_the_session_does_not_count() {
    let mut book = one_port(7);
    select(&mut book, "s", after(1_000)).unwrap();
    book.report(&server("a"), &opened("s"), after(1_000));
    look(&mut book, after(1_999), is(8));
    book.report(&server("a"), &closed("s"), after(2_000));
    book.report(&server("a"), &ended("s"), after(2_000));
    assert!(!is_free(&book));
    let mut due = book.take_due_looks(after(2_000));
    due.sort();
    assert_eq!(due.len(), 2);
    for port in due {
        assert!(!is_free(&book), "one of the two protocols is not enough");
        book.see(port, is(8)(port), after(2_000));
    }
    assert!(is_free(&book));
}

/// A cut ends connections only when the connection server says so.
#[test]
fn the_trial_of_a_cut_session_counts_from_the_last_acknowledgement() {
    let mut book = one_port(7);
    select(&mut book, "s", after(0)).unwrap();
    book.report(&server("a"), &opened("s"), after(0));
    book.report(&server("a"), &released("s"), after(1_000));
    book.report(&server("a"), &ended("s"), after(3_000));
    look(&mut book, after(3_400), is(7));
    assert!(!is_free(&book));
    look(&mut book, after(3_500), is(7));
    assert!(is_free(&book));
}

#[test]
fn a_session_that_never_had_a_connection_leaves_its_port_free() {
    let mut book = one_port(7);
    select(&mut book, "s", after(0)).unwrap();
    book.report(&server("a"), &released("s"), after(1_000));
    book.report(&server("a"), &ended("s"), after(1_000));
    assert!(is_free(&book));
}

/// The caller looks at what a request would get, as the book says.
#[test]
fn a_port_that_is_found_not_listening_is_not_given() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    let filter = OneOrMore::default();
    let next = book.next_ports(&filter).unwrap();
    let (first, server_ports) = (next.ports.first, next.server_ports);
    assert_eq!(first, port(20_000));
    for server_port in server_ports {
        book.see(server_port, None, at(1));
    }
    assert_eq!(book.next_ports(&filter).unwrap().ports.first, port(20_001));
    assert_eq!(select(&mut book, "s", at(1)), Ok(20_001));
    assert_eq!(book.next_ports(&filter), None);
}

#[test]
fn a_port_that_opens_is_offered_soon_after() {
    let mut book = book(vec![range("main", 20_000, 7010, 1)]);
    assert_eq!(counts(&book), [0, 0, 0, 0, 1]);
    let next = book.next_look().unwrap();
    assert!(next < SECOND / 10, "{next:?}");
    let opened = |port: ServerPort| (port.number.get() == 7010).then_some(SocketId(1));
    look(&mut book, after(100), opened);
    assert!(is_free(&book));
}

#[test]
fn one_socket_is_enough_where_any_will_do() {
    assert!(!is_free(&offered(Offer::WhenListening, no_udp)));
    assert!(is_free(&offered(Offer::WhenAnyListens, no_udp)));
    assert!(is_free(&offered(Offer::WhenAnyListens, no_tcp)));
    assert!(!is_free(&offered(Offer::WhenAnyListens, silent)));
}

/// iperf3 has its TCP socket for ever, and a UDP socket during a measurement.
#[test]
fn a_socket_that_comes_and_goes_with_a_session_keeps_no_port_back() {
    let mut book = offered(Offer::WhenAnyListens, no_udp);
    serve(&mut book, "first", 1_000);
    look(&mut book, after(2_600), no_udp);
    assert!(is_free(&book), "its TCP socket has outlived a session");
    select(&mut book, "second", after(3_000)).unwrap();
    book.report(&server("a"), &opened("second"), after(3_000));
    look(&mut book, after(5_000), is(7));
    book.report(&server("a"), &closed("second"), after(6_000));
    book.report(&server("a"), &ended("second"), after(6_000));
    look(&mut book, after(6_010), no_udp);
    assert!(is_free(&book), "as soon as it was looked at");
}

#[test]
fn a_one_shot_program_is_not_offered_while_it_ends_where_any_socket_will_do() {
    let mut book = offered(Offer::WhenAnyListens, no_udp);
    serve(&mut book, "s", 1_000);
    look(&mut book, after(2_100), no_udp);
    assert!(!is_free(&book), "its socket may go with the session");
    look(&mut book, after(2_200), silent);
    assert_eq!(counts(&book), [0, 0, 0, 0, 1]);
    look(&mut book, after(4_000), |port| {
        is(8)(port).filter(|_| port.protocol == Protocol::Tcp)
    });
    assert!(is_free(&book), "the next program listens");
}

#[test]
fn what_is_always_offered_is_never_looked_at() {
    let mut book = offered(Offer::Always, silent);
    assert!(is_free(&book));
    assert_eq!(book.next_look(), None);
    let server_ports = book.next_ports(&OneOrMore::default()).unwrap().server_ports;
    assert_eq!(server_ports, []);
    serve(&mut book, "s", 1_000);
    assert!(is_free(&book), "at the end of the session");
}

#[test]
fn a_changed_offer_ends_no_session_and_holds_for_the_next() {
    let mut book = offered(Offer::WhenAnyListens, no_udp);
    select(&mut book, "s", after(1_000)).unwrap();
    assert_eq!(offer_as(&mut book, Offer::WhenListening, after(1_100)), []);
    assert!(book.look_up(port(20_000)).is_some());
    book.report(&server("a"), &released("s"), after(2_000));
    book.report(&server("a"), &ended("s"), after(2_000));
    look(&mut book, after(2_100), no_udp);
    assert!(!is_free(&book), "UDP is asked for now");
    offer_as(&mut book, Offer::Always, after(3_000));
    assert!(is_free(&book));
    offer_as(&mut book, Offer::WhenListening, after(4_000));
    assert!(!is_free(&book), "until it has been looked at");
    look(&mut book, after(4_100), is(7));
    assert!(is_free(&book));
}
