use super::*;
use crate::pool::PortProtocol;
use crate::selection::Session;
use crate::session::{Block, OneOrMore, PortFilter, PortState, SessionId, SessionPort};
use crate::table::ListenPort;

/// The entries of every server in these tests.
const ENTRIES: [(&str, PortProtocol); 3] = [
    ("game", PortProtocol::TCP),
    ("voice", PortProtocol::UDP),
    ("both", PortProtocol::TCPUDP),
];

/// More than the property test has clients.
const MOST_WAITING: usize = 100;

mod keeping;
mod looking;
mod offers;
mod orders;
mod turns;
mod world;

use self::world::World;

const SECOND: Duration = Duration::from_secs(1);

fn anything() -> Wanted {
    Wanted::default()
}

fn speaking(protocol: PortProtocol) -> Wanted {
    Wanted {
        ports: OneOrMore::one(Block::single(PortFilter {
            port_name: None,
            protocol: Some(protocol),
        })),
        ..anything()
    }
}

/// Blocks of ports of these entries; of any if the name is empty.
fn several(blocks: &[(&str, u8)]) -> Wanted {
    Wanted {
        ports: OneOrMore::example(blocks),
        ..anything()
    }
}

fn keyed(key: &str) -> Wanted {
    Wanted {
        idempotency_key: Some(key.to_owned()),
        ..anything()
    }
}

/// The port entry that a client got, or the name of its refusal.
fn got(world: &World, caller: Caller) -> Option<&str> {
    let answer = world.answers.get(&caller)?;
    Some(match answer {
        Ok(told) => &told.session.ports.first.port_name,
        Err(refusal) => refusal.name(),
    })
}

#[test]
fn a_request_is_before_those_who_could_use_the_same_ports_only() {
    let (tcp, udp) = (PortProtocol::TCP, PortProtocol::UDP);
    let mut world = World::new(&[[2, 0, 0]]);
    let waiting = world.enter(speaking(udp), 9 * SECOND);
    let other = world.enter(speaking(tcp), Duration::ZERO);
    let whatever = world.enter(anything(), Duration::ZERO);
    world.settle();
    assert_eq!(got(&world, other), Some("game"));
    assert_eq!(got(&world, whatever), Some("game"));
    // A port that both can use is the earlier one's.
    let later = world.enter(anything(), 9 * SECOND);
    world.agents[0].free = [0, 0, 1];
    world.settle();
    assert_eq!(got(&world, waiting), Some("both"));
    assert_eq!(got(&world, later), None);
    world.check_settled();
}

#[test]
fn a_request_for_one_server_waits_for_that_one_in_the_same_queue() {
    let mut world = World::new(&[[1, 0, 0], [0; 3]]);
    let of_second = || Wanted {
        only: Some(Slot(1)),
        ..anything()
    };
    let impatient = world.enter(of_second(), Duration::ZERO);
    assert_eq!(got(&world, impatient), Some("no-free-port"));
    let [first, second] = [0, 1].map(|_| world.enter(of_second(), 9 * SECOND));
    // Whoever can use any server is not behind them at another one.
    let any = world.enter(anything(), 9 * SECOND);
    world.answer(0, None);
    assert_eq!(got(&world, any), Some("game"));
    let later = world.enter(anything(), 9 * SECOND);
    for caller in [first, second, later] {
        assert_eq!(got(&world, caller), None);
        world.agents[1].free = [1, 0, 0];
        world.report(1);
        world.answer(1, None);
        assert_eq!(got(&world, caller), Some("game"));
        assert_eq!(world.answers[&caller].as_ref().unwrap().slot, Slot(1));
    }
}

#[test]
fn requests_are_served_in_order_and_a_newcomer_does_not_overtake() {
    let mut world = World::new(&[[0, 0, 0]]);
    let wanted = [anything(), speaking(PortProtocol::TCP), anything()];
    let waiting = wanted.map(|wanted| world.enter(wanted, 9 * SECOND));
    world.agents[0].free = [2, 0, 0];
    world.report(0);
    let newcomer = world.enter(anything(), Duration::ZERO);
    assert_eq!(got(&world, newcomer), Some("no-free-port"));
    world.settle();
    assert_eq!(
        waiting.map(|it| got(&world, it)),
        [Some("game"), Some("game"), None]
    );
    world.agents[0].end(0);
    world.settle();
    assert_eq!(got(&world, waiting[2]), Some("game"));
}

#[test]
fn a_client_that_is_gone_takes_no_port_with_or_without_a_key() {
    let mut world = World::new(&[[0, 0, 0]]);
    for wanted in [anything(), keyed("a"), keyed("b")] {
        let caller = world.enter(wanted, 99 * SECOND);
        world.leave(caller);
    }
    assert_eq!(world.queue.waiting(), 0);
    let there = world.enter(anything(), 9 * SECOND);
    world.agents[0].free = [1, 0, 0];
    world.report(0);
    assert_eq!(world.agents[0].asked.len(), 1);
    world.settle();
    assert_eq!(got(&world, there), Some("game"));
}

#[test]
fn what_was_selected_for_a_client_that_is_gone_is_given_back_or_its_next_requests() {
    let mut world = World::new(&[[1, 0, 0]]);
    for wanted in [anything(), keyed("a")] {
        let caller = world.enter(wanted, SECOND);
        world.leave(caller);
        world.settle();
        assert_eq!(world.agents[0].free, [1, 0, 0]);
    }
    let lost = world.enter(keyed("b"), SECOND);
    world.leave(lost);
    let again = world.enter(keyed("b"), Duration::ZERO);
    world.settle();
    assert_eq!(got(&world, again), Some("game"));
    assert_eq!(world.agents[0].sessions.len(), 1);
}

#[test]
fn requests_with_one_key_have_one_place_and_one_session() {
    let mut world = World::new(&[[0, 0, 0]]);
    let first = world.enter(keyed("job"), 9 * SECOND);
    let at_once = world.enter(keyed("job"), Duration::ZERO);
    assert_eq!(got(&world, at_once), Some("no-free-port"));
    let between = world.enter(anything(), 99 * SECOND);
    let second = world.enter(keyed("job"), 99 * SECOND);
    assert_eq!(world.queue.waiting(), 2);
    let mut other = keyed("job");
    other.ports.first.filter.protocol = Some(PortProtocol::UDP);
    let other = world.enter(other, 99 * SECOND);
    assert_eq!(got(&world, other), Some("key-reused"));
    // The place stays while one of them waits.
    world.pass(10 * SECOND);
    assert_eq!(got(&world, first), Some("no-free-port"));
    let third = world.enter(keyed("job"), 99 * SECOND);
    world.agents[0].free = [1, 0, 0];
    world.settle();
    assert_eq!([second, third].map(|it| got(&world, it)), [Some("game"); 2]);
    assert_eq!(world.answers[&second], world.answers[&third]);
    assert_eq!(got(&world, between), None);
    let late = world.enter(keyed("job"), Duration::ZERO);
    assert_eq!(world.answers[&late], world.answers[&second]);
}

#[test]
fn a_session_that_another_connection_server_made_is_the_answer_to_its_key() {
    let mut world = World::new(&[[0, 0, 0], [0, 0, 0]]);
    let waiting = world.enter(keyed("job"), 9 * SECOND);
    world.agents[0].free = [1, 0, 0];
    let session = world.agents[0].select(&keyed("job"), 1).unwrap();
    let decisions = world.queue.found(&Allocated {
        slot: Slot(0),
        session,
    });
    world.carry_out(decisions);
    assert_eq!(got(&world, waiting), Some("game"));
}

#[test]
fn every_request_waits_a_moment_for_ports_that_are_on_their_way_back() {
    let mut world = World::new(&[[0, 0, 0]]);
    let counts = Counts {
        returning: 1,
        spent: false,
        not_ready: false,
        ..world.agents[0].counts()
    };
    let decisions = world.queue.counted(Slot(0), counts, world.now);
    world.carry_out(decisions);
    let enter = |world: &mut World, is_returning| {
        let (now, until) = (world.now, world.now);
        let (caller, decisions) = world
            .queue
            .enter(anything(), None, is_returning, until, now);
        world.clients.insert(caller, (anything(), now));
        world.carry_out(decisions);
        caller
    };
    let first = enter(&mut world, false);
    let second = enter(&mut world, false);
    assert_eq!(world.queue.waiting(), 2);
    world.agents[0].free = [1, 0, 0];
    world.settle();
    world.pass(RETURN_TIME);
    assert_eq!(got(&world, first), Some("game"));
    assert_eq!(got(&world, second), Some("no-free-port"));
    // The agent has not heard of it, but its connection server has.
    let third = enter(&mut world, true);
    let fourth = enter(&mut world, false);
    assert_eq!(got(&world, third), None);
    assert_eq!(got(&world, fourth), Some("no-free-port"));
}

#[test]
fn a_server_that_fails_is_not_asked_again_before_it_reports() {
    let mut world = World::new(&[[1, 0, 0]]);
    let waiting = world.enter(anything(), 9 * SECOND);
    let next = world.enter(anything(), 9 * SECOND);
    world.answer(0, Some(RefusalCause::Recovering));
    // The port may do for the next one, which has not been refused.
    assert_eq!(world.agents[0].asked.len(), 1);
    world.answer(0, Some(RefusalCause::Recovering));
    assert!(world.agents[0].asked.is_empty());
    world.report(0);
    world.settle();
    assert_eq!(
        [waiting, next].map(|it| got(&world, it)),
        [Some("game"), None]
    );
}

#[test]
fn a_server_that_is_late_or_gone_costs_no_place_and_no_port() {
    let mut world = World::new(&[[1, 0, 0], [0, 0, 0]]);
    let first = world.enter(anything(), 9 * SECOND);
    let second = world.enter(anything(), 9 * SECOND);
    world.pass(ASK_DEADLINE);
    assert_eq!(world.queue.waiting(), 2);
    assert_eq!(world.queue.servers.free_ports(), 0, "it may still select");
    world.agents[1].free = [1, 0, 0];
    world.report(1);
    assert_eq!(world.agents[1].asked.len(), 1);
    world.detach(1);
    assert_eq!(world.queue.waiting(), 2);
    // The late selection is given back, and serves the first.
    world.settle();
    assert_eq!(
        [first, second].map(|it| got(&world, it)),
        [Some("game"), None]
    );
    world.check_settled();
}

#[test]
fn the_queue_is_bounded_and_says_so() {
    let mut world = World::new(&[[0, 0, 0]]);
    for _ in 0..MOST_WAITING {
        world.enter(anything(), SECOND);
    }
    let until = world.now + SECOND;
    let (caller, decisions) = world.queue.enter(anything(), None, false, until, world.now);
    let refused = Decision::Answer(caller, Err(Refusal::QueueFull));
    assert_eq!(decisions, [refused]);
    // Those who do not wait hear what everybody hears.
    let at_once = world.enter(anything(), Duration::ZERO);
    assert_eq!(got(&world, at_once), Some("no-free-port"));
}

/// A pool without servers has no port names, so a request may wait for any.
#[test]
fn requests_for_a_thousand_names_are_served_as_fast_as_for_one() {
    let (names, waiting, servers) = (1000_u32, 8000_u32, 100_u32);
    let now = Instant::now();
    let mut queue = Queue::new(waiting as usize);
    for number in 0..waiting {
        let filter = PortFilter {
            port_name: Some((number % names).to_string()),
            protocol: None,
        };
        let wanted = Wanted {
            ports: OneOrMore::one(Block::single(filter)),
            ..Wanted::default()
        };
        let _waits = queue.enter(wanted, None, false, now + 60 * SECOND, now);
    }
    assert_eq!(queue.waiting(), waiting as usize);
    let started = Instant::now();
    let mut asked = Vec::new();
    for slot in 0..servers {
        let port = PortState {
            name: "7".to_owned(),
            protocol: PortProtocol::TCP,
            free: u32::from(slot % 50 == 0),
            held: 0,
            busy: 0,
            lingering: 0,
            not_listening: 0,
        };
        let counts = Counts {
            ports: vec![port],
            draining: false,
            returning: 0,
            spent: false,
            not_ready: false,
            further: 0,
        };
        queue.attach(Slot(slot), true);
        asked.extend(queue.counted(Slot(slot), counts, now));
    }
    let took = started.elapsed();
    assert_eq!(asked.len(), 2, "{asked:?}");
    // Less than 0.1 s without optimization; each report took seconds.
    assert!(took < SECOND * 3, "{took:?}");
}

#[test]
fn a_closed_queue_refuses_those_who_wait_until_it_is_open() {
    let mut world = World::new(&[[0, 0, 0]]);
    let until = world.now + 2 * RETURN_TIME;
    let (caller, _) = world.queue.enter(anything(), None, false, until, world.now);
    let refused = |caller| [Decision::Answer(caller, Err(Refusal::ShuttingDown))];
    assert_eq!(world.queue.close(world.now), refused(caller));
    let (caller, decisions) = world.queue.enter(anything(), None, false, until, world.now);
    assert_eq!(decisions, refused(caller));
    world.queue.open();
    let (_, decisions) = world.queue.enter(anything(), None, false, until, world.now);
    assert_eq!(decisions, []);
}

#[test]
fn nothing_renews_the_time_that_a_request_waits() {
    let mut world = World::new(&[[0, 0, 0]]);
    let caller = world.enter(keyed("k"), 3 * SECOND);
    world.pass(SECOND);
    // Neither its client's next request, nor others, nor servers that come, go,
    // report or refuse.
    let retry = world.enter(keyed("k"), 9 * SECOND);
    let later = world.enter(anything(), 9 * SECOND);
    world.report(0);
    world.detach(0);
    world.pass(SECOND);
    world.attach(0);
    world.agents[0].free = [2, 0, 0];
    world.report(0);
    for _ in 0..2 {
        world.answer(0, Some(RefusalCause::Recovering));
    }
    world.queue.open();
    assert_eq!(got(&world, caller), None);
    world.pass(SECOND);
    assert_eq!(got(&world, caller), Some("not-selected"));
    assert_eq!([retry, later].map(|it| got(&world, it)), [None, None]);
}
