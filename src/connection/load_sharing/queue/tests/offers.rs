//! Servers whose workloads confirm sessions.

use super::*;
use crate::connection::load_sharing::queue::Unconfirmed;

/// Workloads have 3 s to confirm.
fn world(servers: usize) -> World {
    let mut world = World::new(&vec![[1, 0, 0]; servers]);
    world.queue.confirm = Some(3 * SECOND);
    world
}

/// The workload of `index` does not take what it was offered first.
fn turn_down(world: &mut World, index: usize, how: Unconfirmed) {
    world.decide(index, 0, Some(how));
}

fn refused(reason: &str) -> Unconfirmed {
    Unconfirmed::Refused(Some(reason.to_owned()))
}

/// The index of the only server that is asked.
fn asked(world: &World) -> Option<usize> {
    let mut asked = world.agents.iter().filter(|agent| !agent.asked.is_empty());
    let index = asked.next().map(|agent| agent.slot.0 as usize);
    assert!(asked.next().is_none());
    index
}

#[test]
fn the_next_server_is_asked_and_none_twice_until_all_have_turned_it_down() {
    let mut world = world(3);
    let client = world.enter(anything(), 60 * SECOND);
    let mut seen = BTreeSet::new();
    for how in [refused("full"), Unconfirmed::Silent, refused("no such map")] {
        assert_eq!(got(&world, client), None);
        let index = asked(&world).expect("a server is asked");
        assert!(seen.insert(index), "{index} again");
        world.offer(index);
        turn_down(&mut world, index, how);
    }
    assert_eq!(asked(&world), None);
    // At once: no one is left who could take it.
    let refusal = world.answers[&client].clone().unwrap_err();
    assert_eq!(refusal.name(), "not-confirmed");
    let text = refusal.to_string();
    assert!(
        text.contains("1 did not confirm it in time, 2 refused it (no such map)"),
        "{text}"
    );
    // The next request is another one.
    world.enter(anything(), Duration::ZERO);
    assert!(asked(&world).is_some());
}

#[test]
fn a_request_waits_for_servers_that_have_not_turned_it_down() {
    let mut world = world(2);
    world.agents[1].free = [0; 3];
    world.report(1);
    let client = world.enter(anything(), 60 * SECOND);
    world.offer(0);
    turn_down(&mut world, 0, Unconfirmed::Silent);
    assert_eq!(got(&world, client), None);
    // Another report of the first server changes nothing, and it is others' now.
    world.report(0);
    assert_eq!(asked(&world), None);
    let other = world.enter(anything(), 60 * SECOND);
    assert_eq!(asked(&world), Some(0));
    world.answer(0, None);
    assert_eq!(got(&world, other), Some("game"));
    world.agents[1].free[0] = 1;
    world.report(1);
    assert_eq!(asked(&world), Some(1));
    world.answer(1, None);
    assert_eq!(got(&world, client), Some("game"));
}

/// An earlier request that all free servers have turned down.
#[test]
fn who_was_turned_down_is_in_no_ones_way() {
    let mut world = world(2);
    world.agents[1].free = [0; 3];
    world.report(1);
    let first = world.enter(anything(), 60 * SECOND);
    world.offer(0);
    world.agents[0].free = [0; 3];
    let second = world.enter(anything(), 60 * SECOND);
    turn_down(&mut world, 0, Unconfirmed::Silent);
    assert_eq!(got(&world, first), None);
    assert_eq!(asked(&world), Some(0));
    world.answer(0, None);
    assert_eq!(got(&world, second), Some("game"));
}

#[test]
fn an_offered_port_counts_once_and_its_answer_may_take_its_time() {
    let mut world = World::new(&[[3, 0, 0]]);
    world.queue.confirm = Some(3 * SECOND);
    let client = world.enter(anything(), Duration::ZERO);
    assert_eq!(world.queue.servers().free_ports(), 2);
    world.offer(0);
    assert_eq!(world.queue.servers().free_ports(), 2);
    world.pass(3 * SECOND + SECOND / 2);
    assert_eq!(got(&world, client), None);
    // A late answer, after that of the agent is overdue.
    world.pass(SECOND);
    assert_eq!(got(&world, client), Some("not-selected"));
    turn_down(&mut world, 0, Unconfirmed::Silent);
    assert_eq!(world.queue.servers().free_ports(), 3);
}

#[test]
fn a_workload_has_no_longer_than_the_request() {
    let mut world = World::new(&[[1, 0, 0]]);
    for (most, wait, expected) in [(3, 0, 3), (9, 0, 5), (9, 1, 6), (9, 60, 9)] {
        world.queue.confirm = Some(most * SECOND);
        let wanted = anything();
        let until = world.now + wait * SECOND;
        let (caller, decisions) = world.queue.enter(wanted, None, false, until, world.now);
        let Some(&Decision::Ask {
            ask,
            confirm_within,
            ..
        }) = decisions.first()
        else {
            panic!("{decisions:?}");
        };
        assert_eq!(confirm_within, Some(expected * SECOND));
        let _ = world.queue.leave(caller);
        let _ = world.queue.turned_down(ask, Unconfirmed::Silent, world.now);
    }
    world.queue.confirm = None;
    let (_, decisions) = world
        .queue
        .enter(anything(), None, false, world.now, world.now);
    assert!(matches!(
        decisions[..],
        [Decision::Ask {
            confirm_within: None,
            ..
        }]
    ));
}

#[test]
fn a_question_is_withdrawn_when_its_last_client_leaves() {
    let mut world = world(1);
    for wanted in [anything(), keyed("key")] {
        let [first, second] = [0, 1].map(|_| world.enter(wanted.clone(), 60 * SECOND));
        world.offer(0);
        world.leave(first);
        let is_one = wanted.idempotency_key.is_some();
        assert_eq!(world.agents[0].withdrawn.is_empty(), is_one);
        world.leave(second);
        assert_eq!(world.agents[0].withdrawn.len(), 1);
        world.check();
        world.withdraw(0);
        assert!(world.queue.requests.is_empty() && world.queue.asks.is_empty());
        assert_eq!(world.queue.servers().free_ports(), 1);
    }
    // One that is gone before the workload is asked.
    let client = world.enter(keyed("key"), 60 * SECOND);
    world.leave(client);
    world.offer(0);
    assert_eq!(world.agents[0].withdrawn.len(), 1);
}

/// The confirmation was under way when the question was withdrawn.
#[test]
fn what_others_may_have_been_offered_under_its_key_is_not_given_back() {
    for (wanted, kept) in [(anything(), 0), (keyed("key"), 1)] {
        let mut world = world(1);
        let client = world.enter(wanted, 60 * SECOND);
        world.offer(0);
        world.leave(client);
        world.decide(0, 0, None);
        world.withdraw(0);
        assert_eq!(world.agents[0].sessions.len(), kept);
        assert!(world.queue.asks.is_empty());
    }
    // Its client's next request gets it.
    let mut world = world(1);
    let client = world.enter(keyed("key"), 60 * SECOND);
    world.offer(0);
    world.leave(client);
    world.decide(0, 0, None);
    let again = world.enter(keyed("key"), Duration::ZERO);
    assert_eq!(got(&world, again), Some("game"));
}

#[test]
fn each_client_of_a_request_has_its_own_patience() {
    let mut world = World::new(&[[1, 0, 0]]);
    world.queue.confirm = Some(10 * SECOND);
    let patient = world.enter(keyed("key"), 60 * SECOND);
    world.offer(0);
    let hasty = world.enter(keyed("key"), Duration::ZERO);
    world.pass(5 * SECOND - Duration::from_millis(1));
    assert_eq!(got(&world, hasty), None);
    world.pass(Duration::from_millis(1));
    let refusal = world.answers[&hasty].clone().unwrap_err();
    let text = refusal.to_string();
    assert!(text.contains("1 did not confirm it in time"), "{text}");
    world.pass(4 * SECOND);
    world.decide(0, 0, None);
    assert_eq!(got(&world, patient), Some("game"));
    // Nothing is left of it.
    assert!(world.agents[0].withdrawn.is_empty() && world.queue.deadlines.is_empty());
}

#[test]
fn a_closed_queue_answers_those_whose_workload_is_asked() {
    let mut world = world(2);
    let offered = world.enter(anything(), Duration::ZERO);
    let asked_for = asked(&world).unwrap();
    world.offer(asked_for);
    let asking = world.enter(anything(), 60 * SECOND);
    let decisions = world.queue.close(world.now);
    world.carry_out(decisions);
    assert_eq!(got(&world, offered), Some("shutting-down"));
    assert_eq!(world.agents[asked_for].withdrawn.len(), 1);
    // Its agent has yet to answer, which takes a moment.
    let index = asked(&world).unwrap();
    assert_eq!(got(&world, asking), None);
    world.offer(index);
    assert_eq!(got(&world, asking), Some("shutting-down"));
    let late = world.enter(anything(), Duration::ZERO);
    assert_eq!(got(&world, late), Some("shutting-down"));
    assert_eq!(asked(&world), None);
    world.check();
}

/// No further server is asked for those who are refused.
#[test]
fn a_closed_queue_asks_nothing_more_for_a_request_that_a_server_refused() {
    let mut world = World::new(&[[1, 0, 0], [1, 0, 0]]);
    let client = world.enter(anything(), 60 * SECOND);
    let index = asked(&world).unwrap();
    let decisions = world.queue.close(world.now);
    world.carry_out(decisions);
    world.answer(index, Some(RefusalCause::Recovering));
    assert_eq!(got(&world, client), Some("shutting-down"));
    assert_eq!(asked(&world), None);
}

/// As an agent answers whose workload another connection server has it ask.
#[test]
fn an_answer_may_take_its_time_although_no_confirmation_was_asked_for() {
    let mut world = World::new(&[[3, 0, 0]]);
    let client = world.enter(anything(), 60 * SECOND);
    world.offer(0);
    assert_eq!(world.queue.servers().free_ports(), 2, "counted once");
    world.pass(ASK_DEADLINE);
    assert_eq!(world.agents[0].withdrawn.len(), 1);
    assert_eq!(got(&world, client), None);
    world.check();
}

/// Requests that were turned down are in groups of those who can use the same ports.
#[test]
fn many_requests_that_were_turned_down_cost_a_report_little() {
    let mut world = world(2);
    let waiting = 4_000_u32;
    world.queue.most_waiting = waiting as usize;
    world.agents[1].free = [0; 3];
    world.report(1);
    for _ in 0..waiting {
        world.enter(anything(), 600 * SECOND);
        world.offer(0);
        turn_down(&mut world, 0, Unconfirmed::Silent);
    }
    assert_eq!(world.queue.waiting(), waiting as usize);
    let started = Instant::now();
    for _ in 0..100 {
        world.report(0);
    }
    let took = started.elapsed();
    assert!(took < SECOND, "{took:?}");
    assert_eq!(asked(&world), None);
    world.agents[1].free[0] = 1;
    world.report(1);
    assert_eq!(asked(&world), Some(1));
}
