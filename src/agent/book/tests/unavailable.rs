//! Ports that a connection server cannot listen on.

use super::*;

fn free(book: &Book) -> u32 {
    book.counts(at(0)).ports[0].free
}

#[test]
fn a_port_is_offered_only_if_every_connection_server_listens_on_it() {
    let mut book = book(vec![range("main", 20_000, 7000, 4)]);
    book.attach(&server("b"), "", &[], at(0));
    assert_eq!(free(&book), 4);
    book.set_unavailable(&server("a"), &[port(20_000), port(20_001), port(30_000)]);
    book.set_unavailable(&server("b"), &[port(20_001)]);
    assert_eq!(free(&book), 2);
    assert_eq!(book.counts(at(0)).ports[0].not_listening, 0);
    assert_eq!(select(&mut book, "s", at(0)), Ok(20_002));
    book.set_unavailable(&server("a"), &[]);
    assert_eq!(free(&book), 2, "20000 and 20003");
    // What it said counts until it is known to be dead.
    book.detach(&server("b"), at(1));
    assert_eq!(free(&book), 2);
    book.tick(at(100));
    book.set_unavailable(&server("a"), &[port(20_003)]);
    assert_eq!(free(&book), 2, "20000 and 20001");
    book.leave(&server("a"), at(100));
    assert_eq!(free(&book), 4, "the session is over, too");
}

#[test]
fn a_session_keeps_a_port_that_has_become_unavailable() {
    let mut book = book(vec![range("main", 20_000, 7000, 1)]);
    assert_eq!(select(&mut book, "s", at(0)), Ok(20_000));
    book.report(&server("a"), &opened("s"), at(1));
    book.set_unavailable(&server("a"), &[port(20_000)]);
    assert_eq!(counts(&book), [0, 0, 1, 0, 0]);
    book.report(&server("a"), &released("s"), at(2));
    book.report(&server("a"), &ended("s"), at(2));
    look(&mut book, at(3), workload);
    assert_eq!(counts(&book), [0, 0, 0, 0, 0]);
    let refused = select(&mut book, "t", at(3));
    assert_eq!(refused, Err(RefusalCause::NoFreePort));
    book.set_unavailable(&server("a"), &[]);
    assert_eq!(select(&mut book, "t", at(3)), Ok(20_000));
}

#[test]
fn a_new_row_offers_no_port_that_was_unavailable_before() {
    let mut book = book(vec![range("main", 20_000, 7000, 1)]);
    book.set_unavailable(&server("a"), &[port(20_001)]);
    let grown = row(vec![range("main", 20_000, 7000, 3)]);
    book.set_row(Some(&grown), TIMES, at(1));
    look(&mut book, at(1), workload);
    assert_eq!(free(&book), 2);
}
