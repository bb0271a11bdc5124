//! Sessions of several ports.

use std::collections::BTreeSet;
use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::session::{Run, SessionPort};

/// The ports of the session `id` that is made for `wanted`.
fn select_all(book: &mut Book, id: &str, wanted: &[(&str, u8)]) -> Result<Vec<u16>, RefusalCause> {
    let request = Select {
        ports: OneOrMore::example(wanted),
        ..request(id, Some(id.to_owned()))
    };
    let selected = book.select(&server("a"), &request, at(0));
    selected.map(|selected| numbers(&selected.session.ports))
}

fn numbers(ports: &OneOrMore<SessionPort>) -> Vec<u16> {
    ports.iter().map(|it| it.port.get()).collect()
}

/// A socket at every port.
fn everywhere(_: ServerPort) -> Option<SocketId> {
    Some(SocketId(1))
}

/// A book whose workload listens on all ports, which were freed in order.
fn listening(ranges: Vec<PortRange>) -> Book {
    let mut book = book(ranges);
    look(&mut book, at(10), everywhere);
    book
}

/// The session is given back and every connection server has acknowledged that.
fn over(book: &mut Book, id: &str) {
    book.report(&server("a"), &released(id), at(10));
    book.report(&server("a"), &ended(id), at(10));
    look(book, at(10), everywhere);
}

#[test]
fn a_session_of_several_ports_lives_and_ends_as_one() {
    let mut book = listening(vec![
        range("rtp", 20_000, 7000, 4),
        range("control", 20_100, 7100, 2),
    ]);
    let ports = select_all(&mut book, "s", &[("control", 1), ("rtp", 2)]);
    assert_eq!(ports, Ok(vec![20_100, 20_000, 20_001]));
    assert_eq!(counts(&book), [2, 2, 0, 0, 0]);
    assert_eq!(book.counts(at(0)).further, 2);
    assert_eq!(book.session_count(), 1);
    let session = book.look_up(port(20_001)).expect("by any of its ports");
    assert_eq!(numbers(&session.ports), [20_100, 20_000, 20_001]);
    assert_eq!(book.look_up(port(20_100)), Some(session));
    book.report(&server("a"), &opened("s"), at(1));
    assert_eq!(counts(&book), [2, 0, 2, 0, 0]);
    book.report(&server("a"), &closed("s"), at(2));
    assert_eq!(counts(&book), [2, 0, 0, 2, 0]);
    assert_eq!(cause_of_end(&book.tick(at(7))), Some(EndCause::Finished));
    for number in [20_000, 20_001, 20_100] {
        assert!(!book.is_free(port(number)), "before it is acknowledged");
    }
    book.report(&server("a"), &ended("s"), at(7));
    for number in [20_000, 20_001, 20_100] {
        assert!(book.is_free(port(number)));
    }
    assert_eq!(book.counts(at(7)).further, 3, "the ports are on trial");
}

#[test]
fn ports_that_are_on_their_way_back_count_as_no_session() {
    let mut book = listening(vec![range("rtp", 20_000, 7000, 6)]);
    let sessions = |book: &Book| {
        let counts = book.counts(at(12));
        let in_use = counts
            .ports
            .iter()
            .map(|it| it.held + it.busy + it.lingering);
        in_use.sum::<u32>() - counts.further
    };
    select_all(&mut book, "s", &[("rtp", 5)]).unwrap();
    book.report(&server("a"), &opened("s"), at(11));
    book.report(&server("a"), &closed("s"), at(12));
    assert_eq!(sessions(&book), 1);
    book.report(&server("a"), &released("s"), at(12));
    assert_eq!(sessions(&book), 1, "not all have acknowledged its end");
    book.report(&server("a"), &ended("s"), at(12));
    assert_eq!(counts(&book), [1, 0, 0, 5, 0], "the ports are on trial");
    assert_eq!(sessions(&book), 0);
}

#[test]
fn all_ports_are_selected_or_none() {
    let mut book = listening(vec![
        range("rtp", 20_000, 7000, 4),
        range("control", 20_100, 7100, 1),
    ]);
    select_all(&mut book, "s", &[("control", 1)]).unwrap();
    let before = book.counts(at(0));
    let refused = select_all(&mut book, "t", &[("rtp", 2), ("control", 1)]);
    assert_eq!(refused, Err(RefusalCause::NoFreePort));
    let refused = select_all(&mut book, "t", &[("rtp", 2), ("none", 1)]);
    assert_eq!(refused, Err(RefusalCause::UnknownPort));
    assert_eq!(book.counts(at(0)), before);
    assert_eq!(book.session_count(), 1);
}

#[test]
fn blocks_are_of_one_range_and_even_ones_begin_with_an_even_port() {
    let mut book = listening(vec![range("rtp", 20_001, 7001, 6)]);
    assert_eq!(
        select_all(&mut book, "a", &[("rtp", 2)]),
        Ok(vec![20_002, 20_003])
    );
    assert_eq!(
        select_all(&mut book, "b", &[("rtp", 3)]),
        Ok(vec![20_004, 20_005, 20_006])
    );
    assert_eq!(select_all(&mut book, "c", &[("rtp", 1)]), Ok(vec![20_001]));
    // Two ranges whose connection ports are adjacent, but not their server ports.
    let mut book = listening(vec![
        range("rtp", 20_000, 7000, 1),
        range("rtp", 20_001, 7100, 1),
    ]);
    let refused = select_all(&mut book, "a", &[("rtp", 2)]);
    assert_eq!(refused, Err(RefusalCause::NoFreePort));
}

#[test]
fn the_block_is_chosen_whose_last_freed_port_has_been_free_for_the_longest_time() {
    let mut book = listening(vec![range("rtp", 20_000, 7000, 6)]);
    for id in ["a", "b", "c"] {
        select_all(&mut book, id, &[("rtp", 2)]).unwrap();
    }
    for id in ["b", "c", "a"] {
        over(&mut book, id);
    }
    for expected in [[20_002, 20_003], [20_004, 20_005], [20_000, 20_001]] {
        let id = expected[0].to_string();
        assert_eq!(
            select_all(&mut book, &id, &[("rtp", 2)]),
            Ok(expected.to_vec())
        );
    }
}

#[test]
fn an_idle_server_serves_what_it_can_hold_whatever_was_freed_last() {
    for (count, first, wanted) in [
        (8, 2, &[("rtp", 4), ("rtp", 4)][..]),
        (5, 2, &[("rtp", 2), ("rtp", 3)]),
        (6, 1, &[("rtp", 3), ("rtp", 3)]),
        (6, 2, &[("rtp", 3), ("rtp", 3)]),
    ] {
        let mut book = listening(vec![range("rtp", 20_000, 7000, count)]);
        select_all(&mut book, "first", &[("rtp", first)]).unwrap();
        over(&mut book, "first");
        let ports = select_all(&mut book, "s", wanted);
        assert!(ports.is_ok(), "{wanted:?} on {count} free ports: {ports:?}");
    }
}

#[test]
fn shared_ports_make_blocks_too() {
    let shared = PortRange {
        mapping: Mapping::Shared,
        ..range("web", 20_000, 7000, 4)
    };
    let mut book = listening(vec![shared]);
    let ports = select_all(&mut book, "s", &[("web", 4)]);
    assert_eq!(ports, Ok(vec![20_000, 20_001, 20_002, 20_003]));
}

#[test]
fn a_key_gives_the_same_ports_to_the_same_request_only() {
    let mut book = listening(vec![range("rtp", 20_000, 7000, 6)]);
    let ports = select_all(&mut book, "k", &[("rtp", 2), ("rtp", 1)]);
    assert_eq!(select_all(&mut book, "k", &[("rtp", 2), ("rtp", 1)]), ports);
    for other in [&[("rtp", 2)][..], &[("rtp", 1), ("rtp", 2)], &[("", 4)]] {
        let refused = select_all(&mut book, "k", other);
        assert_eq!(refused, Err(RefusalCause::KeyReused), "{other:?}");
    }
}

#[test]
fn a_restarted_agent_adopts_all_ports_of_a_session_or_ends_it() {
    let of = |id: &str, ports: &[u16]| {
        let ports = ports
            .iter()
            .map(|number| SessionPort::example("rtp", *number));
        selection::Session {
            ports: OneOrMore::new(ports).unwrap(),
            ..known(id, 20_000, true)
        }
    };
    let mut book = Book::new(TIMES, Some(Duration::from_secs(15)));
    let ranges = vec![range("rtp", 20_000, 7000, 6)];
    book.set_row(Some(&row(ranges)), TIMES, at(0));
    look(&mut book, at(0), everywhere);
    let sessions = [
        of("whole", &[20_000, 20_001]),
        of("removed", &[20_005, 20_006]),
        of("taken", &[20_002, 20_001]),
        of("twice", &[20_003, 20_003]),
    ];
    let notices = book.attach(&server("a"), "", &sessions, at(1));
    let ended: BTreeSet<&str> = notices
        .iter()
        .filter_map(|notice| match &notice.message {
            FromAgent::End { session_id, .. } => Some(session_id.as_str()),
            _ => None,
        })
        .collect();
    // Sessions are adopted in the order of their ids.
    assert_eq!(ended, BTreeSet::from(["removed", "twice", "whole"]));
    assert_eq!(counts(&book)[2], 2);
    assert_eq!(book.counts(at(1)).further, 1);
}

#[test]
fn ten_thousand_fragmented_ports_are_looked_through_in_no_time() {
    let mut book = listening(vec![range("rtp", 20_000, 7000, 10_000)]);
    for number in 0..5_000 {
        select_all(&mut book, &number.to_string(), &[("rtp", 2)]).unwrap();
    }
    for number in 0..5_000 {
        over(&mut book, &number.to_string());
    }
    // Every third port is in use: no three adjacent ones are free.
    for number in 0..10_000 {
        select(&mut book, &format!("single-{number}"), at(0)).unwrap();
    }
    for number in (0..10_000).filter(|number| number % 3 != 0) {
        over(&mut book, &format!("single-{number}"));
    }
    let started = std::time::Instant::now();
    for _ in 0..10 {
        let refused = select_all(&mut book, "s", &[("rtp", 63)]);
        assert_eq!(refused, Err(RefusalCause::NoFreePort));
    }
    // A millisecond each without optimization.
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
}

proptest! {
    /// Random requests and ends: no port is given twice, each block is as asked,
    /// and none is refused that the free ports can hold in some arrangement.
    #[test]
    fn no_port_is_given_twice_and_no_partial_answer(
        first in 20_000u16..20_002,
        steps in proptest::collection::vec(
            (proptest::collection::vec((0usize..3, 1u8..5), 1..4), any::<bool>(), any::<usize>()),
            1..60,
        ),
    ) {
        let ranges = vec![range("rtp", first, 7000, 13), range("web", 20_100, 8000, 3)];
        let mut book = listening(ranges.clone());
        let mut live: Vec<(String, Vec<u16>)> = Vec::new();
        for (number, (wanted, ends, which)) in steps.into_iter().enumerate() {
            if ends && !live.is_empty() {
                let (id, _) = live.remove(which % live.len());
                over(&mut book, &id);
            }
            let wanted: Vec<(&str, u8)> = wanted
                .into_iter()
                .map(|(name, count)| (["rtp", "web", ""][name], count))
                .collect();
            let used: BTreeSet<u16> = live.iter().flat_map(|(_, ports)| ports).copied().collect();
            let id = number.to_string();
            match select_all(&mut book, &id, &wanted) {
                Ok(ports) => {
                    let mut rest = &ports[..];
                    for (name, count) in &wanted {
                        let (block, left) = rest.split_at((*count).into());
                        rest = left;
                        prop_assert!(block.windows(2).all(|pair| pair[0] + 1 == pair[1]));
                        prop_assert!(count % 2 == 1 || block[0] % 2 == 0);
                        let is_of = |range: &&PortRange| {
                            let is_in = |number: &u16| range.target(port(*number)).is_some();
                            block.iter().all(is_in) && (name.is_empty() || *name == range.name)
                        };
                        prop_assert!(ranges.iter().any(|range| is_of(&range)));
                    }
                    prop_assert!(rest.is_empty());
                    let given: BTreeSet<u16> = ports.iter().copied().collect();
                    prop_assert_eq!(given.len(), ports.len());
                    prop_assert!(given.is_disjoint(&used));
                    live.push((id, ports));
                }
                Err(cause) => {
                    prop_assert_eq!(cause, RefusalCause::NoFreePort);
                    let runs: Vec<Run<'_>> = ranges
                        .iter()
                        .flat_map(|range| {
                            let ports: Vec<u32> = range
                                .connection_ports()
                                .filter(|port| !used.contains(&port.get()))
                                .map(|port| port.get().into())
                                .collect();
                            let runs = ports.chunk_by(|one, next| one + 1 == *next);
                            let runs: Vec<Range<u32>> =
                                runs.map(|run| run[0]..run[run.len() - 1] + 1).collect();
                            runs.into_iter().map(|ports| Run {
                                name: &range.name,
                                protocol: range.protocol,
                                ports,
                            })
                        })
                        .collect();
                    prop_assert!(!OneOrMore::example(&wanted).has_arrangement(&runs), "{:?}", used);
                }
            }
        }
        let held: usize = live.iter().map(|(_, ports)| ports.len()).sum();
        let further: u32 = book.counts(at(0)).further;
        prop_assert_eq!(further as usize, held - live.len());
    }
}
