//! What the workload sees of the sessions.

use super::*;

#[test]
fn live_sessions_are_listed_after_an_id() {
    let mut book = book(vec![range("main", 20_000, 7000, 4)]);
    book.attach(&server("a"), "", &[], at(0));
    for id in ["a", "b", "c", "d"] {
        select(&mut book, id, at(1)).unwrap();
    }
    // It ends, and is not over before the connection server has said so.
    book.report(&server("a"), &ToAgent::Release(session("b")), at(2));
    let listed = |after: &str, most| {
        let sessions = book.live_sessions_after(after, most).into_iter();
        let ids = sessions.map(|session| session.id.to_string());
        ids.collect::<String>()
    };
    assert_eq!((listed("", 9), listed("", 2)), ("acd".into(), "ac".into()));
    assert_eq!((listed("a", 1), listed("b", 9)), ("c".into(), "cd".into()));
    let long = "c".repeat(1_000);
    assert_eq!((listed(&long, 9), listed("d", 9)), ("d".into(), "".into()));
}
