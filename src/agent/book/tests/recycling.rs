//! How many sessions a server takes before it is replaced.

use super::*;

/// A book with four ports that takes `most` sessions.
fn taking(most: u32) -> Book {
    let mut book = book(vec![range("main", 20_000, 7000, 4)]);
    book.take_at_most(Some(most));
    book
}

/// A session `id` that is used and given back.
fn serve(book: &mut Book, id: &str) {
    select(book, id, at(1)).unwrap();
    book.report(&server("a"), &opened(id), at(1));
    book.report(&server("a"), &closed(id), at(2));
    book.report(&server("a"), &released(id), at(2));
    book.report(&server("a"), &ended(id), at(2));
}

#[test]
fn a_server_takes_as_many_sessions_as_the_pool_says() {
    let mut book = taking(2);
    serve(&mut book, "one");
    assert!(!book.is_spent());
    select(&mut book, "two", at(3)).unwrap();
    assert!(book.counts(at(3)).spent, "the last one still lives");
    assert_eq!(
        select(&mut book, "three", at(3)),
        Err(RefusalCause::Draining)
    );
    assert!(!book.is_draining(), "its session goes on");
    book.take_at_most(None);
    select(&mut book, "three", at(3)).unwrap();
}

#[test]
fn a_session_that_nobody_connects_to_does_not_count() {
    let mut book = taking(1);
    select(&mut book, "one", at(1)).unwrap();
    assert!(book.is_spent());
    book.tick(at(31));
    assert!(!book.is_spent(), "unclaimed");
    // One that is given back while its client is connected does.
    select(&mut book, "two", at(32)).unwrap();
    book.report(&server("a"), &opened("two"), at(33));
    book.report(&server("a"), &released("two"), at(34));
    assert!(book.is_spent());
}

#[test]
fn a_session_that_used_companion_ports_only_counts() {
    let mut book = taking(1);
    select(&mut book, "one", at(1)).unwrap();
    let used = ToAgent::Joined {
        session_id: session("one"),
        client: [192, 0, 2, 1].into(),
        is_companion: true,
    };
    book.report(&server("a"), &used, at(2));
    assert_eq!(cause_of_end(&book.tick(at(31))), Some(EndCause::Unclaimed));
    assert!(book.is_spent(), "its client has left something behind");
}

#[test]
fn a_restarted_agent_takes_no_more_where_sessions_are_counted() {
    let mut book = Book::new(TIMES, Some(Duration::from_secs(15)));
    assert!(!book.is_spent(), "they are not counted here");
    book.take_at_most(Some(1000));
    assert!(book.is_spent());
}
