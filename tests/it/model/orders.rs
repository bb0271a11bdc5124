//! Orders of events: all short ones, long random ones, and some by hand.

use proptest::prelude::*;

use super::checks::LATEST;
use super::*;

/// Plays `order` with every order of so many further `events`, and counts what it played.
fn explore(order: &mut Vec<Event>, depth: usize, events: &[Event], played: &mut u32) {
    if depth == 0 {
        let result = std::panic::catch_unwind(|| play(1, order));
        assert!(result.is_ok(), "after {order:?}");
        *played += 1;
        return;
    }
    for event in events {
        order.push(*event);
        explore(order, depth - 1, events, played);
        order.pop();
    }
}

/// One agent with two ports, two connection servers, a session on its way, in
/// use or being cut: every order of four further events.
#[test]
fn every_short_order_of_events_keeps_the_rules() {
    let events = [
        Event::ToAgent(0, 0),
        Event::FromAgent(0, 0),
        Event::Deliver(0, 0),
        Event::Deliver(1, 0),
        Event::Connect(0, 0, 0),
        Event::Client(1, 0),
        Event::Accept,
        Event::Close,
        Event::Cut,
        Event::Release(0, 0, 0),
        Event::Break(0, 0, Noticing::Agent),
        Event::Attach(0, 0),
        Event::RestartAgent(0, false),
        Event::RestartConnectionServer(0, true),
        Event::HandOver(0),
        Event::Pass(6),
    ];
    let on_its_way = [Event::Select(0, 0), Event::ToAgent(0, 0)];
    let in_use = [
        Event::Select(0, 0),
        Event::Pass(0),
        Event::Connect(0, 0, 0),
        Event::Break(0, 0, Noticing::Agent),
        Event::Connect(0, 0, 0),
    ];
    let being_cut = [
        Event::Client(0, 0),
        Event::Wait(0, 0, 0),
        Event::Release(0, 0, 0),
        Event::Deliver(1, 0),
    ];
    let both_in_use = [
        Event::SelectBoth(0, 0),
        Event::Pass(0),
        Event::Connect(0, 0, 1),
        Event::Break(0, 0, Noticing::Agent),
        Event::Connect(0, 0, 0),
    ];
    let companion_in_use = [
        Event::Client(0, 0),
        Event::Pass(0),
        Event::Companion(0, 0),
        Event::Companion(1, 0),
    ];
    let companion_first = [
        Event::Select(0, 0),
        Event::Client(1, 0),
        Event::Companion(0, 0),
    ];
    let mut played = 0;
    for begin in [&on_its_way[..], &in_use, &being_cut] {
        explore(&mut begin.to_vec(), 4, &events, &mut played);
    }
    explore(&mut both_in_use.to_vec(), 3, &events, &mut played);
    assert_eq!(played, 3 * 16u32.pow(4) + 16u32.pow(3));
    let with_companions: Vec<Event> = events
        .into_iter()
        .chain([Event::Companion(0, 0), Event::Companion(1, 0)])
        .collect();
    for begin in [&companion_in_use[..], &companion_first] {
        explore(&mut begin.to_vec(), 3, &with_companions, &mut played);
    }
}

/// A session that both connection servers have asked for, or the first one only, and
/// that the workload has yet to confirm: every order of four or three further events.
#[test]
fn every_short_order_of_decisions_and_withdrawals_keeps_the_rules() {
    let shared = [
        Event::Offer(0, 0, Some(1)),
        Event::Deliver(0, 0),
        Event::Offer(1, 0, Some(1)),
        Event::Deliver(1, 0),
    ];
    let own = [Event::Offer(0, 0, None), Event::Deliver(0, 0)];
    let with_offers = [
        Event::Decide(0, true),
        Event::Decide(0, false),
        Event::Withdraw(0, 0),
        Event::Withdraw(1, 0),
        Event::Deliver(0, 0),
        Event::Deliver(1, 0),
        Event::Connect(0, 0, 0),
        Event::Break(0, 0, Noticing::Agent),
        Event::Attach(0, 0),
        Event::RestartAgent(0, false),
        Event::RestartConnectionServer(0, false),
        Event::HandOver(0),
        Event::Pass(6),
    ];
    let mut played = 0;
    explore(&mut shared.to_vec(), 4, &with_offers, &mut played);
    explore(&mut own.to_vec(), 3, &with_offers, &mut played);
    assert_eq!(played, 13u32.pow(4) + 13u32.pow(3));
}

/// A client releases a session whose agent has restarted and does not know it
/// yet. The greeting of another connection server must not bring it back.
#[test]
fn a_session_released_to_a_restarted_agent_stays_over() {
    play(
        2,
        &[
            Event::Select(0, 1),
            Event::ToAgent(0, 1),
            Event::FromAgent(1, 1),
            Event::Client(0, 1),
            Event::Release(0, 1, 0),
            Event::Select(0, 0),
            Event::Close,
            Event::RestartAgent(1, true),
            Event::Client(0, 1),
            Event::Attach(1, 1),
        ],
    );
}

/// A client releases a session that a restarted agent has adopted, and the agent
/// forgets it. Another connection server's greeting comes late.
#[test]
fn a_session_ended_by_a_restarted_agent_stays_over() {
    play(
        1,
        &[
            Event::Client(1, 0),
            Event::Pass(0),
            Event::RestartAgent(0, true),
            Event::Attach(0, 0),
            Event::Release(0, 0, 0),
            Event::Deliver(0, 0),
            Event::Connect(0, 0, 0),
            Event::Client(1, 0),
            Event::Pass(0),
        ],
    );
}

/// An agent dies before one connection server has received a session's end. The
/// other one reports it to the restarted agent, whichever of the two attaches
/// first.
#[test]
fn an_end_that_one_connection_server_missed_outlives_the_agent() {
    for (first, second) in [(0, 1), (1, 0)] {
        play(
            1,
            &[
                Event::Client(0, 0),
                Event::Pass(0),
                Event::Close,
                Event::Release(0, 0, 0),
                Event::Deliver(0, 0),
                Event::RestartAgent(0, true),
                Event::Attach(first, 0),
                Event::Attach(second, 0),
                Event::Pass(0),
                Event::Connect(0, 0, 0),
                Event::Connect(1, 0, 0),
                Event::Pass(0),
            ],
        );
    }
}

/// An agent dies before one connection server has received an amendment, and that one
/// attaches first, or last, to the restarted agent.
#[test]
fn an_amendment_that_one_connection_server_missed_outlives_the_agent() {
    for (first, second) in [(0, 1), (1, 0)] {
        let mut world = World::new(1);
        for event in [
            Event::Client(0, 0),
            Event::Pass(0),
            Event::Amend(0, 0),
            Event::FromAgent(1, 0),
            Event::RestartAgent(0, true),
            Event::Attach(first, 0),
            Event::Attach(second, 0),
            Event::Pass(0),
        ] {
            world.happen(event);
            world.check();
        }
        let live = world.agents[0].look_up(port(0, 0)).unwrap();
        assert_eq!(live.metadata.get(LATEST), Some("1"));
        for server in &world.servers {
            let known = server.sessions.list(&Default::default(), 10).items;
            assert_eq!(known[0].metadata.get(LATEST), Some("1"));
        }
        world.end();
    }
}

fn event() -> impl Strategy<Value = Event> {
    let (server, agent, offset) = (0..SERVERS, 0..2usize, 0..PORTS);
    let pair = || (0..SERVERS, 0..2usize);
    let noticing = prop_oneof![
        Just(Noticing::Both),
        Just(Noticing::Agent),
        Just(Noticing::ConnectionServer)
    ];
    prop_oneof![
        3 => pair().prop_map(|(s, a)| Event::Select(s, a)),
        2 => pair().prop_map(|(s, a)| Event::SelectBoth(s, a)),
        3 => (pair(), proptest::option::of(0..2u8)).prop_map(|((s, a), key)| Event::Offer(s, a, key)),
        3 => (agent.clone(), any::<bool>()).prop_map(|(a, c)| Event::Decide(a, c)),
        2 => pair().prop_map(|(s, a)| Event::Withdraw(s, a)),
        8 => pair().prop_map(|(s, a)| Event::ToAgent(s, a)),
        8 => pair().prop_map(|(s, a)| Event::FromAgent(s, a)),
        6 => (server.clone(), agent.clone(), offset.clone()).prop_map(|(s, a, o)| Event::Connect(s, a, o)),
        4 => pair().prop_map(|(s, a)| Event::Deliver(s, a)),
        3 => pair().prop_map(|(s, a)| Event::Client(s, a)),
        3 => pair().prop_map(|(s, a)| Event::Companion(s, a)),
        3 => Just(Event::Close),
        2 => Just(Event::Cut),
        2 => (server.clone(), agent.clone(), offset.clone()).prop_map(|(s, a, o)| Event::Wait(s, a, o)),
        2 => Just(Event::Accept),
        2 => (agent.clone(), offset.clone()).prop_map(|(a, o)| Event::Amend(a, o)),
        1 => (server.clone(), agent.clone(), offset).prop_map(|(s, a, o)| Event::Release(s, a, o)),
        1 => (server.clone(), agent.clone(), noticing).prop_map(|(s, a, n)| Event::Break(s, a, n)),
        2 => pair().prop_map(|(s, a)| Event::Attach(s, a)),
        1 => (agent, any::<bool>()).prop_map(|(a, n)| Event::RestartAgent(a, n)),
        1 => (server.clone(), any::<bool>()).prop_map(|(s, n)| Event::RestartConnectionServer(s, n)),
        2 => server.prop_map(Event::HandOver),
        2 => (0..20u64).prop_map(Event::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn long_random_orders_of_events_keep_the_rules(events in proptest::collection::vec(event(), 1..120)) {
        play(2, &events);
    }
}
