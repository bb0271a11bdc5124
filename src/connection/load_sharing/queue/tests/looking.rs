//! Requests that find nothing free, and servers whose workload did not listen.

use super::*;

const MOMENT: Duration = Duration::from_millis(20);

/// A world of `servers` without a free port, each with a port of every entry that
/// was reported as not listening.
fn closed(servers: usize) -> World {
    let mut world = World::new(&vec![[0; 3]; servers]);
    for index in 0..servers {
        world.agents[index].closed = [1; 3];
        world.report(index);
    }
    world
}

/// How many questions each agent has not answered.
fn asked(world: &World) -> Vec<usize> {
    world.agents.iter().map(|agent| agent.asked.len()).collect()
}

#[test]
fn a_port_that_was_opened_a_moment_ago_is_given_to_a_request_that_does_not_wait() {
    let mut world = closed(2);
    world.agents[1].opened = [1, 0, 0];
    let caller = world.enter(speaking(PortProtocol::TCP), Duration::ZERO);
    assert_eq!(asked(&world), [1, 0]);
    world.answer(0, None);
    assert_eq!(asked(&world), [0, 1], "the next one is asked");
    assert_eq!(got(&world, caller), None);
    world.answer(1, None);
    assert_eq!(got(&world, caller), Some("game"));
    world.check();
}

#[test]
fn each_server_is_asked_once_and_then_the_request_is_refused() {
    let mut world = closed(2);
    let caller = world.enter(anything(), Duration::ZERO);
    world.answer(0, None);
    world.answer(1, None);
    assert_eq!(asked(&world), [0, 0]);
    assert_eq!(got(&world, caller), Some("no-free-port"));
    // One that waits does not ask again and again either.
    world.now += MOMENT;
    let patient = world.enter(anything(), 9 * SECOND);
    for _ in 0..3 {
        world.answer(0, None);
        world.answer(1, None);
        world.pass(MOMENT);
    }
    assert_eq!((asked(&world), got(&world, patient)), (vec![0, 0], None));
    // Its port is reported as any other.
    world.agents[1].free = [1, 0, 0];
    world.report(1);
    world.answer(1, None);
    assert_eq!(got(&world, patient), Some("game"));
}

#[test]
fn a_flood_of_requests_asks_a_server_once_in_a_moment() {
    let mut world = closed(1);
    let mut questions = 0;
    for _ in 0..1000 {
        let caller = world.enter(anything(), Duration::ZERO);
        questions += asked(&world)[0];
        world.answer(0, None);
        assert_eq!(got(&world, caller), Some("no-free-port"));
        world.pass(MOMENT / 10);
    }
    assert_eq!(questions, 100);
}

#[test]
fn a_request_asks_few_servers_however_many_there_are() {
    let mut world = closed(50);
    let caller = world.enter(anything(), Duration::ZERO);
    let mut questions = 0;
    while let Some(index) = asked(&world).iter().position(|asked| *asked > 0) {
        world.answer(index, None);
        questions += 1;
    }
    assert_eq!(questions, MOST_LOOKS);
    assert_eq!(got(&world, caller), Some("no-free-port"));
}

#[test]
fn servers_that_do_not_answer_delay_a_refusal_by_one_deadline() {
    let mut world = closed(9);
    let caller = world.enter(anything(), Duration::ZERO);
    world.pass(ASK_DEADLINE);
    assert_eq!(got(&world, caller), Some("no-free-port"));
    let before = asked(&world);
    assert_eq!(before.iter().sum::<usize>(), 1);
    // The next request does not ask that server, which has not answered.
    let other = world.enter(anything(), Duration::ZERO);
    let after = asked(&world);
    assert!(after.iter().all(|asked| *asked <= 1), "{after:?}");
    assert_eq!(after.iter().sum::<usize>(), 2);
    // One that is out of reach answers as little.
    let index = (0..9).find(|index| after[*index] > before[*index]);
    world.detach(index.unwrap());
    assert_eq!(got(&world, other), Some("no-free-port"));
    // Once it has answered, it may be asked again.
    let mut world = closed(1);
    let _ = world.enter(anything(), Duration::ZERO);
    world.pass(ASK_DEADLINE);
    let ignored = world.enter(anything(), Duration::ZERO);
    assert_eq!(got(&world, ignored), Some("no-free-port"));
    world.answer(0, None);
    world.agents[0].opened = [1, 0, 0];
    let lucky = world.enter(anything(), Duration::ZERO);
    world.answer(0, None);
    assert_eq!(got(&world, lucky), Some("game"));
    world.check();
}

#[test]
fn a_newcomer_does_not_ask_for_ports_that_others_wait_for() {
    let mut world = closed(1);
    let patient = world.enter(speaking(PortProtocol::UDP), 9 * SECOND);
    world.answer(0, None);
    world.pass(MOMENT);
    world.agents[0].opened = [1, 1, 0];
    // It could only get a port that the other one waits for.
    let voice = several(&[("voice", 1)]);
    let newcomer = world.enter(voice, Duration::ZERO);
    assert_eq!(got(&world, newcomer), Some("no-free-port"));
    // Another port is its own.
    let other = several(&[("game", 1)]);
    let other = world.enter(other, Duration::ZERO);
    world.answer(0, None);
    assert_eq!(got(&world, other), Some("game"));
    // The agent looks at its own time, too.
    world.agents[0].look(&anything());
    world.settle();
    assert_eq!(got(&world, patient), Some("voice"));
}

#[test]
fn a_request_for_several_ports_counts_those_that_may_have_been_opened() {
    let mut world = closed(2);
    world.agents[1].free = [1, 0, 0];
    world.agents[1].opened = [1, 0, 0];
    world.report(1);
    let caller = world.enter(several(&[("game", 2)]), Duration::ZERO);
    assert_eq!(asked(&world), [0, 1], "the first can have one at most");
    world.answer(1, None);
    assert_eq!(got(&world, caller), Some("game"));
    world.check();
}
