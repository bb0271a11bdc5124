//! Requests for several ports among those for one: rule 8.

use proptest::prelude::*;

use super::*;

/// A request for one port of the entry that all of these tests are about.
fn game() -> Wanted {
    several(&[("game", 1)])
}

impl World {
    /// Every agent answers all that it was asked.
    fn answer_all(&mut self) {
        while let Some(index) = self.agents.iter().position(|it| !it.asked.is_empty()) {
            self.answer(index, None);
        }
    }

    /// A session in the slot `index` ends.
    fn end(&mut self, index: usize, which: usize) {
        self.agents[index].end(which);
        self.report(index);
        self.answer_all();
    }
}

#[test]
fn a_request_for_several_ports_is_passed_for_a_while_and_then_a_server_is_kept_for_it() {
    let mut world = World::new(&[[3, 0, 0], [3, 0, 0]]);
    for _ in 0..6 {
        world.enter(game(), SECOND);
        world.answer_all();
    }
    let large = world.enter(several(&[("game", 2)]), 99 * SECOND);
    world.end(0, 0);
    let passing = world.enter(game(), Duration::ZERO);
    world.answer_all();
    assert_eq!(got(&world, passing), Some("game"));
    world.pass(PASSED_FOR);
    world.end(0, 0);
    let later = world.enter(game(), 50 * SECOND);
    let at_once = world.enter(game(), Duration::ZERO);
    world.answer_all();
    assert_eq!(world.answers[&at_once], Err(Refusal::Kept(1)));
    world.end(1, 0);
    assert_eq!(
        got(&world, later),
        Some("game"),
        "the other server is not kept"
    );
    let later = world.enter(game(), 50 * SECOND);
    world.answer_all();
    assert_eq!(got(&world, large), None);
    world.end(0, 0);
    assert_eq!(got(&world, large), Some("game"));
    world.end(0, 0);
    assert_eq!(got(&world, later), Some("game"), "nothing is kept any more");
}

#[test]
fn what_was_kept_goes_to_the_next_when_its_client_leaves() {
    let mut world = World::new(&[[2, 0, 0]]);
    for _ in 0..2 {
        world.enter(game(), SECOND);
        world.answer_all();
    }
    let large = world.enter(several(&[("game", 2)]), 99 * SECOND);
    world.pass(PASSED_FOR);
    world.end(0, 0);
    let later = world.enter(game(), 50 * SECOND);
    let voice = world.enter(several(&[("voice", 1)]), 50 * SECOND);
    assert_eq!(got(&world, later), None);
    world.agents[0].free[1] = 1;
    world.report(0);
    world.answer_all();
    assert_eq!(
        got(&world, voice),
        Some("voice"),
        "it is of no use to the other"
    );
    world.leave(large);
    world.answer_all();
    assert_eq!(got(&world, later), Some("game"));
}

#[test]
fn a_server_that_has_refused_without_sessions_is_not_kept() {
    let now = Instant::now();
    let mut queue = Queue::new(MOST_WAITING);
    let mut asked = Vec::new();
    for (slot, free, busy) in [(0, 4, 0), (1, 1, 3)] {
        let port = PortState {
            name: "game".to_owned(),
            protocol: PortProtocol::TCP,
            free,
            held: 0,
            busy,
            lingering: 0,
            not_listening: 0,
        };
        let counts = Counts {
            ports: vec![port],
            ..Counts::default()
        };
        queue.attach(Slot(slot), true);
        asked.extend(queue.counted(Slot(slot), counts, now));
    }
    let large = several(&[("game", 2)]);
    let (_, decisions) = queue.enter(large, None, false, now + 99 * SECOND, now);
    let [
        Decision::Ask {
            ask, slot: Slot(0), ..
        },
    ] = decisions[..]
    else {
        panic!("{decisions:?}");
    };
    let cause = RefusalCause::NoFreePort;
    let decisions = queue.refused(ask, cause, now);
    let refused = Decision::NotSelected(Slot(0), AskError::Refused(cause));
    assert_eq!(
        decisions,
        [refused],
        "it is not asked again before it reports"
    );
    assert_eq!(queue.tick(now + PASSED_FOR), []);
    assert_eq!(queue.kept.and_then(|kept| kept.slot), Some(Slot(1)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// However many requests for one port come, one for several gets them once the
    /// sessions of one server are over, and no request for one port waits for a
    /// later one.
    #[test]
    fn neither_large_requests_starve_nor_small_ones(
        ends in proptest::collection::vec((0usize..3, any::<usize>()), 40..60),
        large in proptest::collection::vec((5usize..40, 2u8..5), 1..6),
    ) {
        let wait = 1000 * SECOND;
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
            world.pass(PASSED_FOR / 4);
            world.end(index, which);
            world.answer_all();
            world.check();
            let waiting: Vec<bool> = callers
                .iter()
                .map(|caller| world.clients.contains_key(caller))
                .collect();
            prop_assert!(waiting.is_sorted(), "a small one is before an earlier one");
        }
        // Later ones go on coming as fast as ports become free. On the kept server
        // those are served first that came before the large one.
        let rounds = callers.len() + 8 * waits.len();
        for index in (0..3).cycle().take(3 * rounds) {
            world.enter(game(), wait);
            world.answer_all();
            world.pass(PASSED_FOR / 4);
            world.end(index, 0);
        }
        for caller in waits {
            prop_assert!(!world.clients.contains_key(&caller), "a large one starves");
        }
    }
}
