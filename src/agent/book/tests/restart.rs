//! A restarted agent adopts the sessions that connection servers report.

use super::*;

#[test]
fn a_restarted_agent_adopts_before_it_offers() {
    let mut book = Book::new(TIMES, Some(Duration::from_secs(15)));
    book.set_row(
        Some(&row(vec![range("main", 20_000, 7000, 2)])),
        TIMES,
        at(0),
    );
    look(&mut book, at(0), workload);
    let notices = book.attach(
        &server("a"),
        "",
        &[known("s", 20_000, true), known("stranger", 9, true)],
        at(1),
    );
    assert_eq!(
        cause_of_end(&notices),
        Some(EndCause::Unknown),
        "no port of this server"
    );
    assert!(book.look_up(port(20_000)).is_some());
    assert_eq!(select(&mut book, "t", at(1)), Err(RefusalCause::Recovering));
    book.tick(at(15));
    assert_eq!(select(&mut book, "t", at(15)), Ok(20_001));
}

/// A book after a restart, until 15 s.
pub(super) fn recovering() -> Book {
    let mut book = Book::new(TIMES, Some(Duration::from_secs(15)));
    book.set_row(
        Some(&row(vec![range("main", 20_000, 7000, 2)])),
        TIMES,
        at(0),
    );
    book
}

/// The session `s` as a connection server that has it open lists it.
pub(super) fn listed() -> [selection::Session; 1] {
    [known("s", 20_000, true)]
}

/// `a` has reported a session to a restarted agent, and the session ends. `b`
/// still knows it and greets last.
#[test]
fn a_session_that_ended_while_recovering_is_not_brought_back() {
    type Play = fn(&mut Book);
    let cases: [(&str, Play, u64, bool); 6] = [
        (
            "live still",
            |book| drop(book.attach(&server("a"), "", &listed(), at(1))),
            3,
            false,
        ),
        (
            "given back",
            |book| {
                book.attach(&server("a"), "", &listed(), at(1));
                book.report(&server("a"), &released("s"), at(2));
            },
            3,
            true,
        ),
        (
            "released before any greeting listed it",
            |book| {
                book.attach(&server("a"), "", &[], at(1));
                book.report(&server("a"), &released("s"), at(2));
            },
            3,
            true,
        ),
        (
            "its last connection closed: another one may have one open",
            |book| {
                book.attach(&server("a"), "", &listed(), at(1));
                book.report(&server("a"), &closed("s"), at(2));
                book.tick(at(7));
            },
            8,
            false,
        ),
        (
            "all were ended",
            |book| {
                book.attach(&server("a"), "", &listed(), at(1));
                book.end_all(at(1));
            },
            3,
            true,
        ),
        (
            "recovery is over: nothing is adopted, so nothing is kept",
            |book| {
                book.attach(&server("a"), "", &listed(), at(1));
                book.report(&server("a"), &released("s"), at(2));
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
        book.report(&server("a"), &ended("s"), at(greeting));
        let notices = book.attach(&server("b"), "", &listed(), at(greeting));
        let expected = is_over.then_some(EndCause::Unknown);
        assert_eq!(cause_of_end(&notices), expected, "{what}");
        assert_eq!(book.look_up(port(20_000)).is_none(), is_over, "{what}");
    }
}

/// Another one may have received the session's end before the restart. It
/// reports that when it sees the session as live.
#[test]
fn an_adopted_session_is_sent_to_the_others() {
    let mut book = recovering();
    book.attach(&server("a"), "", &[], at(1));
    let mut receivers = |name: &str| {
        let notices = book.attach(&server(name), "", &listed(), at(2)).into_iter();
        let is_session = |notice: &Notice| matches!(notice.message, FromAgent::Session(_));
        let receivers = notices.filter(is_session).map(|notice| notice.to);
        receivers.collect::<Vec<_>>()
    };
    let one = |name: &str| To::One(server(name));
    assert_eq!(receivers("b"), [To::AllBut(server("b")), one("b")]);
    assert_eq!(receivers("c"), [one("c")], "the others know it");
}

/// An agent that has restarted does not know which connection server knows
/// which session.
#[test]
fn a_session_made_before_a_restart_is_waited_for_by_all() {
    let mut book = Book::new(TIMES, Some(Duration::from_secs(15)));
    book.set_row(
        Some(&row(vec![range("main", 20_000, 7000, 2)])),
        TIMES,
        at(0),
    );
    book.attach(&server("a"), "here", &[], at(1));
    book.detach(&server("a"), at(2));
    let known = known("s", 20_000, false);
    book.attach(&server("b"), "there", &[known], at(3));
    book.report(&server("b"), &released("s"), at(4));
    book.report(&server("b"), &ended("s"), at(4));
    assert_eq!(book.session_count(), 1);
    book.tick(at(17));
    assert_eq!(book.session_count(), 0);
}
