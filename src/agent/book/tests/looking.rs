//! What is looked at because a request finds no port.

use super::*;

fn after(milliseconds: u64) -> Now {
    Now {
        monotonic: Duration::from_millis(milliseconds),
        time: Timestamp::UNIX_EPOCH,
    }
}

/// A book with 200 ports, of which the workload listens on none.
fn unopened() -> Book {
    let mut book = book(vec![range("main", 20_000, 7100, 200)]);
    look(&mut book, after(0), silent);
    book
}

#[test]
fn a_request_that_finds_nothing_has_few_ports_looked_at_and_seldom() {
    let mut book = unopened();
    let any = OneOrMore::default();
    let mut looked: Vec<ServerPort> = Vec::new();
    let mut times = Vec::new();
    // Requests come every millisecond.
    for millisecond in 1000..1080 {
        let now = after(millisecond);
        let ports = book.take_looks_on_request(&any, now);
        if ports.is_empty() {
            continue;
        }
        times.push(millisecond);
        for port in &ports {
            book.see(*port, None, now);
        }
        looked.extend(ports);
    }
    assert_eq!(times, [1000, 1020, 1040, 1060]);
    assert_eq!(looked.len(), 4 * 64);
    let first: BTreeSet<ServerPort> = looked[..200].iter().copied().collect();
    assert_eq!(
        first.len(),
        200,
        "those first that were not looked at for longest"
    );
    // What is found is given.
    let now = after(2000);
    let port = book.take_looks_on_request(&any, now)[5];
    book.see(port, Some(SocketId(7)), now);
    let given = select(&mut book, "s", now).unwrap();
    assert_eq!(given - 20_000, port.number.get() - 7100);
}

#[test]
fn nothing_is_looked_at_for_a_request_that_no_port_would_serve() {
    let other = OneOrMore::one(Block::single(PortFilter {
        port_name: Some("other".to_owned()),
        protocol: None,
    }));
    let now = after(1000);
    assert_eq!(unopened().take_looks_on_request(&other, now), []);
    let any = OneOrMore::default();
    let mut stopping = unopened();
    stopping.stop(now);
    assert_eq!(stopping.take_looks_on_request(&any, now), []);
    let mut recovering = Book::new(TIMES, Some(Duration::from_secs(15)));
    recovering.set_row(
        Some(&row(vec![range("main", 20_000, 7000, 2)])),
        TIMES,
        after(0),
    );
    assert_eq!(recovering.take_looks_on_request(&any, now), []);
    // Those that are in use, or on trial, are not asked about either.
    let mut used = book(vec![range("main", 20_000, 7000, 2)]);
    for id in ["a", "b"] {
        select(&mut used, id, now).unwrap();
    }
    assert_eq!(used.take_looks_on_request(&any, now), []);
}
