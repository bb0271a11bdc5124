//! Companion ports, and the clients that may use them.

use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::pool::EntryAdmission;
use crate::selection::MAX_CLIENTS;

fn client(last: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, last).into()
}

fn joined(id: &str, last: u8) -> ToAgent {
    ToAgent::Joined {
        session_id: session(id),
        client: client(last),
        is_companion: false,
    }
}

/// A book with two ports for sessions and three companion ports, on all of which the
/// workload listens.
fn with_companions() -> Book {
    let companions = PortRange {
        admission: Some(EntryAdmission::Companion),
        ..range("data", 20_100, 7100, 3)
    };
    let mut book = book(vec![range("main", 20_000, 7000, 2), companions]);
    look(&mut book, at(10), |_| Some(SocketId(1)));
    book
}

/// The session `id`, requested from the client `last`.
fn select_for(book: &mut Book, id: &str, last: u8) -> Selected {
    let request = Select {
        requester: Some(client(last)),
        ..request(id, None)
    };
    book.select(&server("a"), &request, at(10)).unwrap()
}

#[test]
fn no_request_gets_a_companion_port() {
    let mut book = with_companions();
    let counts = book.counts(at(10));
    let names: Vec<&str> = counts.ports.iter().map(|it| it.name.as_str()).collect();
    assert_eq!((names, counts.ports[0].free), (vec!["main"], 2));
    let named = Select {
        ports: OneOrMore::one(Block::single(PortFilter {
            port_name: Some("data".to_owned()),
            protocol: None,
        })),
        ..request("named", None)
    };
    let refused = book.select(&server("a"), &named, at(10));
    assert_eq!(refused, Err(RefusalCause::UnknownPort));
    for id in ["one", "two"] {
        select_for(&mut book, id, 1);
    }
    let full = book.select(&server("a"), &request("three", None), at(10));
    assert_eq!(full, Err(RefusalCause::NoFreePort));
    assert_eq!(book.look_up(port(20_100)), None);
}

#[test]
fn sessions_on_ports_that_become_companions_end() {
    let mut book = book(vec![range("main", 20_000, 7000, 2)]);
    look(&mut book, at(10), |_| Some(SocketId(1)));
    select_for(&mut book, "one", 1);
    let companions = PortRange {
        admission: Some(EntryAdmission::Companion),
        ..range("main", 20_000, 7000, 2)
    };
    let row = row(vec![companions]);
    let notices = book.set_row(Some(&row), TIMES, at(11));
    assert_eq!(cause_of_end(&notices), Some(EndCause::Drained));
}

#[test]
fn the_other_connection_servers_learn_who_has_joined() {
    let mut book = with_companions();
    let selected = select_for(&mut book, "one", 1);
    assert_eq!(selected.session.clients, [client(1)]);
    let notices = book.report(&server("b"), &joined("one", 2), at(10));
    let [
        Notice {
            to,
            message: FromAgent::Session(session),
        },
    ] = &notices[..]
    else {
        panic!("{notices:?}");
    };
    // The workload sees no addresses.
    assert_eq!(*to, To::ServersBut(server("b")));
    assert_eq!(session.clients, [client(1), client(2)]);
    for last in [1, 2] {
        assert_eq!(book.report(&server("a"), &joined("one", last), at(10)), []);
    }
    assert_eq!(book.report(&server("a"), &joined("none", 1), at(10)), []);
    for last in 3..=u8::MAX {
        book.report(&server("a"), &joined("one", last), at(10));
    }
    let live = book.look_up(port(20_000)).unwrap();
    assert_eq!(live.clients.len(), MAX_CLIENTS);
}

#[test]
fn no_one_joins_a_session_that_is_bound_to_another_client() {
    let mut book = with_companions();
    let request = Select {
        requester: Some(client(1)),
        bound_client: Some(client(1)),
        ..request("one", None)
    };
    book.select(&server("a"), &request, at(10)).unwrap();
    assert_eq!(book.report(&server("a"), &joined("one", 2), at(10)), []);
    assert_eq!(book.look_up(port(20_000)).unwrap().clients, [client(1)]);
}

#[test]
fn a_restarted_agent_knows_the_clients_of_every_connection_server() {
    let known = |clients: &[u8]| selection::Session {
        clients: clients.iter().copied().map(client).collect(),
        ..known("one", 20_000, true)
    };
    let mut book = Book::new(TIMES, Some(at(60).monotonic));
    book.set_row(
        Some(&row(vec![range("main", 20_000, 7000, 2)])),
        TIMES,
        at(0),
    );
    book.attach(&server("a"), "", &[known(&[1, 2])], at(1));
    let notices = book.attach(&server("b"), "", &[known(&[2, 3, 4])], at(2));
    let live = book.look_up(port(20_000)).unwrap();
    assert_eq!(live.clients, [1, 2, 3, 4].map(client));
    let told = notices
        .iter()
        .filter(|it| it.to == To::ServersBut(server("b")));
    assert_eq!(told.count(), 1, "one notice of both that are new to others");
}
