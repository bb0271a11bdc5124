use proptest::prelude::*;

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

const SECOND: Duration = Duration::from_secs(1);

/// A server's agent, with as many ports of each entry.
#[derive(Debug, Default)]
struct Agent {
    slot: Slot,
    attached: bool,
    /// Free ports by entry.
    free: [u32; 3],
    /// Ports that it reports as not listening, by entry.
    closed: [u32; 3],
    /// Those of them that have been opened since it looked.
    opened: [u32; 3],
    /// Live sessions, with the ports of each entry that they have.
    sessions: Vec<([u32; 3], Session)>,
    /// Whether no free ports are adjacent.
    is_fragmented: bool,
    /// What it was asked and has not answered.
    asked: Vec<(AskId, Wanted)>,
}

impl Agent {
    fn counts(&self) -> Counts {
        let ports = (0..ENTRIES.len()).map(|index| PortState {
            name: ENTRIES[index].0.to_owned(),
            protocol: ENTRIES[index].1,
            free: self.free[index],
            held: 0,
            // Beside those that come and go, one of each entry is always busy.
            busy: 1 + self
                .sessions
                .iter()
                .map(|(taken, _)| taken[index])
                .sum::<u32>(),
            lingering: 0,
            not_listening: self.closed[index],
        });
        Counts {
            ports: ports.collect(),
            draining: false,
            returning: 0,
            spent: false,
            not_ready: false,
            further: 0,
        }
    }

    /// The entry of each block of a request, if it can get them all.
    fn take(&self, wanted: &Wanted) -> Option<Vec<usize>> {
        if self.is_fragmented && wanted.ports.as_single().is_none() {
            return None;
        }
        let mut free = self.free;
        wanted.ports.place(&ENTRIES, |index, block| {
            free[index] = free[index].checked_sub(block.ports())?;
            Some(index)
        })
    }

    /// Selects a port as a book does, for a session with this `number`.
    fn select(&mut self, wanted: &Wanted, number: u64) -> Result<Session, RefusalCause> {
        let key = &wanted.idempotency_key;
        let same = self
            .sessions
            .iter()
            .find(|it| key.is_some() && it.1.idempotency_key == *key);
        if let Some((_, session)) = same {
            return match wanted.made(self.slot, session) {
                true => Ok(session.clone()),
                false => Err(RefusalCause::KeyReused),
            };
        }
        if self.take(wanted).is_none() {
            self.look(wanted);
        }
        let entries = self.take(wanted).ok_or(RefusalCause::NoFreePort)?;
        let mut taken = [0; 3];
        for (block, entry) in wanted.ports.iter().zip(&entries) {
            taken[*entry] += block.ports();
            self.free[*entry] -= block.ports();
        }
        // Which numbers they have does not matter here.
        let mut number_of_port = 20_000;
        let mut ports = Vec::new();
        for (block, entry) in wanted.ports.iter().zip(entries) {
            for offset in 0..block.count.get() {
                ports.push(SessionPort {
                    port: ListenPort::new(number_of_port + u16::from(offset)).unwrap(),
                    port_name: ENTRIES[entry].0.to_owned(),
                    protocol: ENTRIES[entry].1,
                });
            }
            number_of_port += 64;
        }
        let session = Session {
            idempotency_key: key.clone(),
            ports: OneOrMore::new(ports).unwrap(),
            ..Session::example(&number.to_string(), 20_000)
        };
        self.sessions.push((taken, session.clone()));
        Ok(session)
    }

    /// Finds what has been opened of the ports that a request can use.
    fn look(&mut self, wanted: &Wanted) {
        for (index, (name, protocol)) in ENTRIES.iter().enumerate() {
            let mut blocks = wanted.ports.iter();
            if blocks.any(|block| block.filter.admits(name, *protocol)) {
                let opened = std::mem::take(&mut self.opened[index]);
                self.closed[index] -= opened;
                self.free[index] += opened;
            }
        }
    }

    /// Ends the session at `index`, modulo their number.
    fn end(&mut self, index: usize) {
        if !self.sessions.is_empty() {
            let (taken, _) = self.sessions.remove(index % self.sessions.len());
            for (free, taken) in self.free.iter_mut().zip(taken) {
                *free += taken;
            }
        }
    }
}

/// The clients and agents around a queue.
#[derive(Debug)]
struct World {
    queue: Queue,
    now: Instant,
    agents: Vec<Agent>,
    /// Clients without an answer, with what they want and until when they wait.
    clients: BTreeMap<Caller, (Wanted, Instant)>,
    answers: BTreeMap<Caller, Result<Allocated, Refusal>>,
    /// The sessions that this connection server was told of.
    known: BTreeSet<SessionId>,
    number: u64,
}

impl World {
    fn new(free: &[[u32; 3]]) -> Self {
        let mut world = Self {
            queue: Queue::new(MOST_WAITING),
            now: Instant::now(),
            agents: Vec::new(),
            clients: BTreeMap::new(),
            answers: BTreeMap::new(),
            known: BTreeSet::new(),
            number: 0,
        };
        for (slot, free) in free.iter().enumerate() {
            world.agents.push(Agent {
                slot: Self::slot(slot),
                free: *free,
                ..Agent::default()
            });
            world.attach(slot);
        }
        world
    }

    fn slot(index: usize) -> Slot {
        Slot(u32::try_from(index).unwrap())
    }

    fn attach(&mut self, index: usize) {
        self.agents[index].attached = true;
        self.queue.attach(Self::slot(index), true);
        self.report(index);
    }

    fn report(&mut self, index: usize) {
        if self.agents[index].attached {
            let counts = self.agents[index].counts();
            let decisions = self.queue.counted(Self::slot(index), counts, self.now);
            self.carry_out(decisions);
        }
    }

    fn enter(&mut self, wanted: Wanted, wait: Duration) -> Caller {
        let until = self.now + wait;
        let key = &wanted.idempotency_key;
        let mut live = self.agents.iter().enumerate().flat_map(|(index, agent)| {
            let sessions = agent.sessions.iter();
            sessions.map(move |(_, session)| (index, session))
        });
        let live = live.find(|(_, it)| {
            key.is_some() && it.idempotency_key == *key && self.known.contains(&it.id)
        });
        let live = live.map(|(index, session)| Allocated {
            slot: Self::slot(index),
            session: session.clone(),
        });
        let (caller, decisions) = self
            .queue
            .enter(wanted.clone(), live, false, until, self.now);
        self.clients.insert(caller, (wanted, until));
        self.carry_out(decisions);
        caller
    }

    fn leave(&mut self, caller: Caller) {
        self.clients.remove(&caller);
        self.queue.leave(caller);
        self.catch_up();
    }

    /// Does what is due, as whoever keeps time does at once.
    fn catch_up(&mut self) {
        if self.queue.next_deadline().is_some_and(|at| at <= self.now) {
            self.pass(Duration::ZERO);
        }
    }

    /// The agent answers what it was asked first, and refuses for `cause` if
    /// there is one.
    fn answer(&mut self, index: usize, cause: Option<RefusalCause>) {
        let agent = &mut self.agents[index];
        if agent.asked.is_empty() {
            return;
        }
        let (ask, wanted) = agent.asked.remove(0);
        self.number += 1;
        let before = agent.free;
        let selected = cause.map_or_else(|| agent.select(&wanted, self.number), Err);
        // What it has found is reported before a refusal.
        let has_found = selected.is_err() && agent.free != before;
        match selected {
            Ok(session) => {
                let (slot, counts) = (Self::slot(index), agent.counts());
                let allocated = Allocated { slot, session };
                let id = allocated.session.id.clone();
                let is_new = self.known.insert(id.clone());
                let (is_received, decisions) =
                    self.queue.selected(ask, &allocated, counts, self.now);
                self.carry_out(decisions);
                if !is_received && is_new {
                    let mut told = self.answers.values().flatten();
                    assert!(told.all(|told| told.session.id != id), "a client has {id}");
                    let sessions = &self.agents[index].sessions;
                    let at = sessions.iter().position(|(_, session)| session.id == id);
                    self.agents[index].end(at.unwrap());
                    self.report(index);
                }
            }
            Err(cause) => {
                if has_found {
                    self.report(index);
                }
                let decisions = self.queue.refused(ask, cause, self.now);
                self.carry_out(decisions);
            }
        }
    }

    fn detach(&mut self, index: usize) {
        self.agents[index].attached = false;
        self.agents[index].asked.clear();
        let decisions = self.queue.detach(Self::slot(index), self.now);
        self.carry_out(decisions);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let decisions = self.queue.tick(self.now);
        self.carry_out(decisions);
    }

    fn carry_out(&mut self, decisions: Vec<Decision>) {
        for decision in decisions {
            match decision {
                Decision::Ask { ask, slot, wanted } => {
                    let place = self.queue.asks[&ask].place;
                    assert!(
                        place.is_none_or(|place| self.has_client(place)),
                        "no one asks"
                    );
                    let agent = &mut self.agents[slot.0 as usize];
                    assert!(agent.attached);
                    agent.asked.push((ask, wanted));
                }
                Decision::Answer(caller, answer) => {
                    let (wanted, until) = self.clients.remove(&caller).expect("a client once");
                    match &answer {
                        Ok(told) => assert!(wanted.made(told.slot, &told.session)),
                        Err(Refusal::KeyReused) => assert!(wanted.idempotency_key.is_some()),
                        Err(refusal) => assert!(until <= self.now, "too early: {refusal}"),
                    }
                    self.answers.insert(caller, answer);
                }
                Decision::NotSelected(..) => {}
            }
        }
    }

    fn has_client(&self, place: Place) -> bool {
        let mut callers = self.queue.requests[&place].callers.keys();
        callers.any(|caller| self.clients.contains_key(caller))
    }

    /// What holds after each event.
    fn check(&self) {
        let queue = &self.queue;
        let lined_up = queue.waiting.values().flatten();
        let lined_up = lined_up.chain(&queue.waiting_for_several);
        let lined_up: BTreeSet<Place> = lined_up.copied().collect();
        for (place, request) in &queue.requests {
            assert_eq!(lined_up.contains(place), request.asking.is_none());
            assert!(request.asking.is_some() || self.has_client(*place));
            for (caller, until) in &request.callers {
                let is_late = *until <= self.now && request.asking.is_none();
                assert!(!is_late, "{caller:?} still waits");
                assert_eq!(queue.places[caller], *place);
            }
            if request.asking.is_none() {
                self.check_waiting(*place, request);
            }
        }
        assert_eq!(queue.places.len(), self.clients.len());
        let keyed = queue
            .requests
            .values()
            .filter(|it| it.wanted.idempotency_key.is_some());
        assert_eq!(
            queue.by_key.len(),
            keyed.count(),
            "one request for each key"
        );
    }

    /// No port is free that a request waits for, unless it is kept for an earlier
    /// one.
    fn check_waiting(&self, place: Place, request: &Request) {
        let mut servers = self.queue.servers.clone();
        let blocks = &request.wanted.ports;
        let kept = self.queue.kept_from(place, blocks);
        let is_excluded = |slot, report| {
            let may_use = request.wanted.may_use(slot) && kept != Some(slot);
            !may_use || request.has_refused(slot, report)
        };
        let reservation = servers.reserve(blocks, None, is_excluded);
        assert_eq!(reservation, None, "free for {blocks:?}");
    }

    /// Everything under way arrives, and agents report what they have.
    fn settle(&mut self) {
        for index in 0..self.agents.len() {
            self.report(index);
        }
        while let Some(index) = self.agents.iter().position(|agent| !agent.asked.is_empty()) {
            self.answer(index, None);
            self.check();
        }
    }

    /// No client waits for ports that are free in truth and not kept for an earlier
    /// one.
    fn check_settled(&self) {
        let agents = self.agents.iter().filter(|agent| agent.attached);
        for (caller, (wanted, _)) in &self.clients {
            let kept = self
                .queue
                .kept_from(self.queue.places[caller], &wanted.ports);
            for (index, agent) in self.agents.iter().enumerate() {
                let slot = Self::slot(index);
                let may_use = agent.attached && kept != Some(slot) && wanted.may_use(slot);
                let is_served = may_use && agent.take(wanted).is_some();
                assert!(!is_served, "{wanted:?} waits for {agent:?}");
            }
        }
        let free: u32 = agents.flat_map(|agent| agent.free).sum();
        assert_eq!(self.queue.servers.free_ports(), free, "counted once");
    }
}

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
    let blocks = blocks.iter().map(|(name, count)| Block {
        filter: PortFilter {
            port_name: Some((*name).to_owned()).filter(|name| !name.is_empty()),
            protocol: None,
        },
        count: (*count).try_into().unwrap(),
    });
    Wanted {
        ports: OneOrMore::new(blocks).unwrap(),
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

#[derive(Clone, Debug)]
enum Event {
    Enter(usize, Option<u8>, u64),
    Leave(usize),
    Answer(usize, Option<RefusalCause>),
    End(usize, usize),
    /// The workload opens a port that the agent has reported as not listening.
    Open(usize, usize),
    /// Another connection server's client gets a port, with a key or without.
    Elsewhere(usize, usize, Option<u8>),
    Detach(usize),
    Attach(usize),
    Pass(u64),
    /// Whether free ports are adjacent changes.
    Fragment(usize),
}

/// What the requests of [`Event::Enter`] want.
fn wanted(index: usize, key: Option<u8>) -> Wanted {
    let mut wanted = match index % 10 {
        0 => anything(),
        1 => speaking(PortProtocol::TCP),
        2 => speaking(PortProtocol::UDP),
        3 => speaking(PortProtocol::TCPUDP),
        4 => several(&[("voice", 1)]),
        5 => several(&[("game", 2)]),
        6 => several(&[("", 1), ("voice", 1)]),
        7 => several(&[("both", 1), ("game", 1), ("", 2)]),
        8 => several(&[("game", 2)]),
        _ => anything(),
    };
    wanted.only = (index % 10 >= 8).then_some(Slot(u32::from(index % 10 == 8)));
    wanted.idempotency_key = key.map(|key| key.to_string());
    wanted
}

fn event() -> impl Strategy<Value = Event> {
    let key = || proptest::option::of(0u8..3);
    prop_oneof![
        6 => (0usize..10, key(), 0u64..20).prop_map(|(want, key, wait)| Event::Enter(want, key, wait)),
        2 => any::<usize>().prop_map(Event::Leave),
        6 => (0usize..2).prop_map(|index| Event::Answer(index, None)),
        1 => (0usize..2).prop_map(|index| Event::Answer(index, Some(RefusalCause::Recovering))),
        4 => (0usize..2, any::<usize>()).prop_map(|(index, which)| Event::End(index, which)),
        2 => (0usize..2, 0usize..3).prop_map(|(index, entry)| Event::Open(index, entry)),
        1 => (0usize..2, 0usize..10, key()).prop_map(|(index, want, key)| Event::Elsewhere(index, want, key)),
        1 => (0usize..2).prop_map(Event::Detach),
        2 => (0usize..2).prop_map(Event::Attach),
        1 => (1u64..8).prop_map(Event::Pass),
        1 => (0usize..2).prop_map(Event::Fragment),
    ]
}

impl World {
    fn happen(&mut self, event: &Event) {
        let client = |world: &Self, which: usize| {
            let clients = world.clients.keys();
            clients.copied().nth(which % world.clients.len().max(1))
        };
        match *event {
            Event::Enter(want, key, wait) => {
                self.enter(wanted(want, key), Duration::from_secs(wait));
            }
            Event::Leave(which) => {
                if let Some(caller) = client(self, which) {
                    self.leave(caller);
                }
            }
            Event::Answer(index, cause) => self.answer(index, cause),
            Event::End(index, which) => {
                self.agents[index].end(which);
                self.report(index);
            }
            Event::Open(index, entry) => {
                self.agents[index].closed[entry] += 1;
                self.report(index);
                self.agents[index].opened[entry] += 1;
            }
            Event::Elsewhere(index, want, key) => {
                self.number += 1;
                let wanted = Wanted {
                    only: None,
                    ..wanted(want, key)
                };
                let selected = self.agents[index].select(&wanted, self.number);
                if let Ok(session) = selected
                    && self.agents[index].attached
                {
                    let slot = Self::slot(index);
                    self.known.insert(session.id.clone());
                    let decisions = self.queue.found(&Allocated { slot, session });
                    self.carry_out(decisions);
                    self.report(index);
                }
            }
            Event::Detach(index) => self.detach(index),
            Event::Attach(index) if !self.agents[index].attached => self.attach(index),
            Event::Attach(_) => {}
            Event::Pass(seconds) => self.pass(Duration::from_secs(seconds)),
            Event::Fragment(index) => self.agents[index].is_fragmented ^= true,
        }
        self.catch_up();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn no_request_waits_for_a_free_port_and_no_departed_client_is_served(
        free in proptest::collection::vec(proptest::array::uniform3(0u32..4), 2),
        events in proptest::collection::vec(event(), 1..60),
    ) {
        let mut world = World::new(&free);
        for event in &events {
            world.happen(event);
            world.check();
        }
        world.settle();
        world.check_settled();
        for caller in world.clients.keys().copied().collect::<Vec<_>>() {
            world.leave(caller);
        }
        // What was kept for one that left may have been asked for others.
        world.settle();
        world.pass(Duration::ZERO);
        let queue = &world.queue;
        prop_assert!(queue.requests.is_empty() && queue.waiting() == 0, "{queue:?}");
        prop_assert!(queue.by_key.is_empty() && queue.places.is_empty(), "{queue:?}");
        prop_assert!(queue.asks.is_empty() && queue.deadlines.is_empty(), "{queue:?}");
    }
}
