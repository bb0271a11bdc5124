//! Requests for several ports among those for one, for whom a server is kept: rule 8.

use super::*;

/// A request for one port of the entry that most of these tests are about.
pub(super) fn game() -> Wanted {
    several(&[("game", 1)])
}

/// What a server says of so many ports of that entry.
fn counts(free: u32, busy: u32) -> Counts {
    let ports = PortState {
        name: "game".to_owned(),
        protocol: PortProtocol::TCP,
        free,
        held: 0,
        busy,
        lingering: 0,
        not_listening: 0,
    };
    Counts {
        ports: vec![ports],
        ..Counts::default()
    }
}

impl World {
    /// A world in which each port of the first two entries has a session.
    pub(super) fn full(ports: &[[u32; 3]]) -> Self {
        let mut world = Self::new(ports);
        for (entry, name) in ["game", "voice"].into_iter().enumerate() {
            for _ in 0..ports.iter().map(|of| of[entry]).sum() {
                world.enter(several(&[(name, 1)]), SECOND);
                world.answer_all();
            }
        }
        world
    }

    /// Every agent answers all that it was asked.
    pub(super) fn answer_all(&mut self) {
        while let Some(index) = self.agents.iter().position(|it| !it.asked.is_empty()) {
            self.answer(index, None);
        }
    }

    /// A session in the slot `index` ends.
    pub(super) fn end(&mut self, index: usize, which: usize) {
        self.agents[index].end(which);
        self.report(index);
        self.answer_all();
    }
}

#[test]
fn a_request_for_several_ports_is_passed_for_a_while_and_then_a_server_is_kept_for_it() {
    let mut world = World::full(&[[3, 0, 0], [3, 0, 0]]);
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
    let mut world = World::full(&[[2, 0, 0]]);
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
        queue.attach(Slot(slot), true);
        asked.extend(queue.counted(Slot(slot), counts(free, busy), now));
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
    assert_eq!(queue.kept().map(|kept| kept.slot), Some(Slot(1)));
}

#[test]
fn however_many_wait_for_other_ports_one_is_served_when_its_own_are_free() {
    let mut world = World::new(&[[0, 0, 0]]);
    for count in 2..40 {
        for _ in 0..2 {
            world.enter(several(&[("voice", count)]), 99 * SECOND);
        }
    }
    let large = world.enter(several(&[("game", 2)]), 99 * SECOND);
    world.agents[0].free = [2, 0, 0];
    world.settle();
    assert_eq!(got(&world, large), Some("game"));
}

#[test]
fn a_server_whose_free_ports_are_apart_is_asked_once_for_equal_requests() {
    let mut world = World::new(&[[0, 0, 0]]);
    let waiting = [0; 20].map(|_| world.enter(several(&[("game", 2)]), 99 * SECOND));
    world.agents[0].free = [2, 0, 0];
    world.agents[0].is_fragmented = true;
    for _ in 0..3 {
        world.report(0);
        let mut asked = 0;
        while !world.agents[0].asked.is_empty() {
            world.answer(0, None);
            asked += 1;
        }
        assert_eq!(asked, 1);
    }
    world.agents[0].is_fragmented = false;
    world.settle();
    assert_eq!(got(&world, waiting[0]), Some("game"));
    world.check_settled();
}

#[test]
fn requests_of_thousands_of_kinds_cost_little_when_ports_become_free() {
    let (waiting, reports) = (5000_u32, 100);
    let now = Instant::now();
    let mut queue = Queue::new(waiting as usize);
    for number in 0..waiting {
        let wanted = several(&[("game", 1), (&number.to_string(), 1)]);
        let _waits = queue.enter(wanted, None, false, now + 60 * SECOND, now);
    }
    queue.attach(Slot(0), true);
    let counts = counts(9, 0);
    let started = Instant::now();
    for _ in 0..reports {
        assert_eq!(
            queue.counted(Slot(0), counts.clone(), now + 2 * PASSED_FOR),
            []
        );
    }
    let took = started.elapsed();
    // 10 ms each without optimization.
    assert!(took < SECOND * 10, "{took:?}");
}
