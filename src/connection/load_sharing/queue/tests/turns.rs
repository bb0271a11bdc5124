//! Turns of requests for several ports, and those of the others: rule 9.

use proptest::prelude::*;

use super::keeping::game;
use super::*;
use crate::session::MAX_WAIT_SECONDS;

/// What the request wants that a server is kept for.
fn kept(world: &World) -> Option<&Wanted> {
    let kept = world.queue.kept()?;
    Some(&world.queue.requests[&kept.place].wanted)
}

#[test]
fn a_request_that_no_server_can_serve_takes_no_turn_from_others() {
    let mut world = World::full(&[[2, 0, 0]]);
    // One port of this entry is all there is.
    world.enter(several(&[("voice", 2)]), 99 * SECOND);
    let large = world.enter(several(&[("game", 2)]), 99 * SECOND);
    world.pass(PASSED_FOR);
    world.end(0, 0);
    let later = world.enter(game(), 50 * SECOND);
    world.answer_all();
    assert_eq!(got(&world, later), None);
    world.end(0, 0);
    assert_eq!(got(&world, large), Some("game"));
}

#[test]
fn a_turn_in_vain_is_followed_by_one_of_the_others() {
    let mut world = World::new(&[[1, 0, 0]]);
    world.agents[0].is_fragmented = true;
    let take = |world: &mut World| {
        let caller = world.enter(game(), 99 * SECOND);
        world.answer_all();
        caller
    };
    take(&mut world);
    let large = world.enter(several(&[("game", 2)]), 300 * SECOND);
    world.pass(PASSED_FOR);
    let [first, second] = [0; 2].map(|_| take(&mut world));
    world.end(0, 0);
    world.pass(KEPT_FOR - SECOND);
    assert_eq!(got(&world, first), None);
    world.pass(SECOND);
    world.answer_all();
    assert_eq!(
        [first, second].map(|it| got(&world, it)),
        [Some("game"), None]
    );
    // The others' turn goes on until all that waited have been served.
    let late = take(&mut world);
    world.pass(2 * KEPT_FOR - SECOND);
    world.end(0, 0);
    assert_eq!(
        [second, late].map(|it| got(&world, it)),
        [Some("game"), None]
    );
    world.end(0, 0);
    assert_eq!(got(&world, late), None, "the next turn has begun");
    world.pass(KEPT_FOR);
    assert_eq!(got(&world, late), None, "it is twice as long");
    world.pass(KEPT_FOR);
    world.answer_all();
    assert_eq!(got(&world, late), Some("game"));
    assert_eq!(got(&world, large), None);
    // Nothing is kept for as long as the turn was, although no one waits.
    world.end(0, 0);
    world.pass(2 * KEPT_FOR - SECOND);
    let newcomer = world.enter(game(), Duration::ZERO);
    world.answer_all();
    assert_eq!(got(&world, newcomer), Some("game"));
}

#[test]
fn the_turn_of_others_is_at_most_twice_as_long_as_that_in_vain() {
    let mut world = World::full(&[[1, 0, 0]]);
    let large = several(&[("game", 2)]);
    world.enter(large.clone(), 300 * SECOND);
    world.pass(PASSED_FOR);
    let waiting = world.enter(game(), 300 * SECOND);
    world.pass(KEPT_FOR);
    world.pass(2 * KEPT_FOR - SECOND);
    assert_eq!(kept(&world), None);
    assert_eq!(world.queue.next_deadline(), Some(world.now + SECOND));
    world.pass(SECOND);
    assert_eq!(kept(&world), Some(&large));
    assert_eq!(got(&world, waiting), None);
}

#[test]
fn the_next_turn_begins_when_the_last_of_the_others_hangs_up() {
    let mut world = World::full(&[[1, 0, 0]]);
    let large = several(&[("game", 2)]);
    world.enter(large.clone(), 300 * SECOND);
    world.pass(PASSED_FOR);
    let others = [0; 2].map(|_| world.enter(game(), 300 * SECOND));
    world.pass(KEPT_FOR);
    world.pass(KEPT_FOR + SECOND);
    for (caller, is_last) in others.into_iter().zip([false, true]) {
        assert_eq!(kept(&world), None);
        world.clients.remove(&caller);
        assert_eq!(world.queue.leave(caller), []);
        let due = world.queue.next_deadline();
        assert_eq!(due.is_some_and(|at| at <= world.now), is_last);
    }
    world.catch_up();
    assert_eq!(kept(&world), Some(&large));
}

#[test]
fn a_turn_in_vain_keeps_none_of_other_ports_from_beginning() {
    let mut world = World::full(&[[1, 1, 0]]);
    let [large, voice] = ["game", "voice"].map(|name| several(&[(name, 2)]));
    for wanted in [&large, &voice] {
        world.enter(wanted.clone(), 300 * SECOND);
    }
    world.pass(PASSED_FOR);
    assert_eq!(kept(&world), Some(&large));
    world.pass(KEPT_FOR);
    assert_eq!(kept(&world), Some(&voice));
    world.pass(KEPT_FOR);
    assert_eq!(kept(&world), Some(&large));
}

#[test]
fn a_request_that_is_held_back_has_its_turn_before_later_ones_for_its_ports() {
    let mut world = World::full(&[[1, 1, 0]]);
    let [large, both, voice] = [
        several(&[("game", 2)]),
        several(&[("game", 1), ("voice", 1)]),
        several(&[("voice", 2)]),
    ];
    for wanted in [&large, &both, &voice] {
        world.enter(wanted.clone(), 300 * SECOND);
    }
    world.pass(PASSED_FOR);
    assert_eq!(kept(&world), Some(&large));
    world.pass(KEPT_FOR);
    assert_eq!(kept(&world), None, "voice would keep ports from both");
    world.pass(KEPT_FOR);
    assert_eq!(kept(&world), Some(&both));
}

#[test]
fn however_many_no_server_can_serve_another_has_its_turn() {
    let mut world = World::full(&[[2, 0, 0]]);
    for count in 0..MOST_LOOKED_AT {
        let count = u8::try_from(count + 2).unwrap();
        world.enter(several(&[("voice", count)]), 99 * SECOND);
    }
    let large = world.enter(several(&[("game", 2)]), 99 * SECOND);
    world.pass(PASSED_FOR);
    world.end(0, 0);
    let later = world.enter(game(), 50 * SECOND);
    world.answer_all();
    assert_eq!(got(&world, later), None);
    world.end(0, 0);
    assert_eq!(got(&world, large), Some("game"));
}

#[test]
fn a_turn_that_its_server_cuts_short_makes_no_later_one_longer() {
    let mut world = World::full(&[[2, 0, 0]]);
    let large = several(&[("game", 2)]);
    world.enter(large.clone(), 300 * SECOND);
    world.pass(PASSED_FOR);
    for _ in 0..7 {
        world.pass(SECOND);
        assert_eq!(kept(&world), Some(&large));
        world.detach(0);
        world.attach(0);
        assert_eq!(kept(&world), None);
        world.pass(SECOND);
    }
    assert_eq!(kept(&world), Some(&large));
    let later = world.enter(game(), 50 * SECOND);
    world.end(0, 0);
    assert_eq!(got(&world, later), None);
    world.pass(KEPT_FOR);
    world.answer_all();
    assert_eq!(got(&world, later), Some("game"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// A pool whose ports are never adjacent, and large requests again and again: a small
    /// one waits for the longest turn that such a request can have, 80 s of its 300 s.
    #[test]
    fn requests_that_cannot_be_served_do_not_starve_small_ones(
        steps in proptest::collection::vec((any::<bool>(), any::<bool>(), 1u32..9), 100..200),
    ) {
        let mut world = World::new(&[[4, 0, 0]]);
        world.queue.most_waiting = usize::MAX;
        world.agents[0].is_fragmented = true;
        for (is_large, is_small, seconds) in steps {
            if is_large {
                world.enter(several(&[("game", 2)]), 300 * SECOND);
            }
            if is_small {
                world.enter(game(), 100 * SECOND);
            }
            world.answer_all();
            world.pass(seconds * SECOND);
            world.answer_all();
            for _ in 0..4 {
                world.end(0, 0);
            }
        }
        let refused: Vec<_> = world
            .answers
            .values()
            .filter_map(|answer| answer.as_ref().err())
            .filter(|refusal| matches!(refusal, Refusal::Kept(_)))
            .collect();
        prop_assert!(refused.is_empty(), "{refused:?}");
    }

    /// Sessions of up to a minute, and always so many requests for one port that none is
    /// free: one for several gets them before its time is over.
    #[test]
    fn small_requests_do_not_starve_a_large_one(
        (servers, count, first) in (1usize..4, 2u8..5, 0u32..60),
        lengths in proptest::collection::vec(prop_oneof![Just(60), 1u32..=60], 1..40),
    ) {
        let mut world = World::new(&vec![[4, 0, 0]; servers]);
        world.queue.most_waiting = usize::MAX;
        let mut lengths = lengths.into_iter().cycle();
        let mut ends = BTreeMap::new();
        let mut large = None;
        for second in 0..first + MAX_WAIT_SECONDS {
            if second == first {
                let wait = MAX_WAIT_SECONDS * SECOND;
                large = Some(world.enter(several(&[("game", count)]), wait));
            }
            while world.queue.waiting() < 60 {
                world.enter(game(), 120 * SECOND);
                world.answer_all();
            }
            for index in 0..servers {
                let over = world.agents[index].sessions.iter().map(|(_, session)| {
                    let length = || second + lengths.next().unwrap();
                    *ends.entry(session.id.clone()).or_insert_with(length) <= second
                });
                let over: Vec<bool> = over.collect();
                // From the last one, so that the others keep their indexes.
                for which in (0..over.len()).rev().filter(|which| over[*which]) {
                    world.end(index, which);
                }
            }
            world.pass(SECOND);
            world.answer_all();
        }
        prop_assert_eq!(got(&world, large.unwrap()), Some("game"));
    }

    /// However many requests for one port come, each one for several gets them in the
    /// end if it waits for long enough, and no request for one port waits for a later one.
    #[test]
    fn large_requests_are_served_in_the_end_and_small_ones_in_order(
        ends in proptest::collection::vec((0usize..3, any::<usize>()), 40..60),
        large in proptest::collection::vec((5usize..40, 2u8..5), 1..6),
        // Each server has an end every third step, which may take longer than a turn.
        step_time in prop_oneof![Just(PASSED_FOR / 4), Just(5 * SECOND), Just(20 * SECOND)],
    ) {
        let wait = 100_000_000 * SECOND;
        let mut world = World::new(&[[4, 0, 0]; 3]);
        // More clients wait than elsewhere.
        world.queue.most_waiting = usize::MAX;
        let mut callers = Vec::new();
        let mut waits = Vec::new();
        for (step, (index, which)) in ends.into_iter().enumerate() {
            // More than ends, so that the queue is never empty.
            for _ in 0..2 {
                callers.push(world.enter(game(), wait));
            }
            for (_, count) in large.iter().filter(|(at, _)| *at == step) {
                waits.push(world.enter(several(&[("game", *count)]), wait));
            }
            world.answer_all();
            world.pass(step_time);
            world.answer_all();
            world.end(index, which);
            world.answer_all();
            world.check();
            let waiting: Vec<bool> = callers
                .iter()
                .map(|caller| world.clients.contains_key(caller))
                .collect();
            prop_assert!(waiting.is_sorted(), "a small one is before an earlier one");
        }
        // Later ones go on coming as fast as ports become free. Those that wait are
        // served after each turn in vain.
        let turns = 8 * u32::try_from(waits.len()).unwrap();
        let rounds = turns * u32::try_from(callers.len() + 50).unwrap();
        let mut indexes = (0..3).cycle();
        for _ in 0..3 * rounds {
            if waits.iter().all(|caller| !world.clients.contains_key(caller)) {
                break;
            }
            world.enter(game(), wait);
            world.answer_all();
            world.pass(step_time);
            world.answer_all();
            world.end(indexes.next().unwrap(), 0);
        }
        for caller in waits {
            prop_assert!(!world.clients.contains_key(&caller), "a large one starves");
        }
    }
}
