//! A queue with simulated agents: each gives its ports as a real one does.

use super::super::request::Refusals;
use super::*;

/// A server's agent, with as many ports of each entry.
#[derive(Debug, Default)]
pub(super) struct Agent {
    pub(super) slot: Slot,
    pub(super) attached: bool,
    /// Free ports by entry.
    pub(super) free: [u32; 3],
    /// Ports that it reports as not listening, by entry.
    pub(super) closed: [u32; 3],
    /// Those of them that have been opened since it looked.
    pub(super) opened: [u32; 3],
    /// Live sessions, with the ports of each entry that they have.
    pub(super) sessions: Vec<([u32; 3], Session)>,
    /// Whether no free ports are adjacent.
    pub(super) is_fragmented: bool,
    /// What it was asked and has not answered.
    pub(super) asked: Vec<(AskId, Wanted)>,
}

impl Agent {
    pub(super) fn counts(&self) -> Counts {
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
    pub(super) fn take(&self, wanted: &Wanted) -> Option<Vec<usize>> {
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
    pub(super) fn select(&mut self, wanted: &Wanted, number: u64) -> Result<Session, RefusalCause> {
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
    pub(super) fn look(&mut self, wanted: &Wanted) {
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
    pub(super) fn end(&mut self, index: usize) {
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
pub(super) struct World {
    pub(super) queue: Queue,
    pub(super) now: Instant,
    pub(super) agents: Vec<Agent>,
    /// Clients without an answer, with what they want and until when they wait.
    pub(super) clients: BTreeMap<Caller, (Wanted, Instant)>,
    pub(super) answers: BTreeMap<Caller, Result<Allocated, Refusal>>,
    /// The sessions that this connection server was told of.
    pub(super) known: BTreeSet<SessionId>,
    pub(super) number: u64,
}

impl World {
    pub(super) fn new(free: &[[u32; 3]]) -> Self {
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

    pub(super) fn slot(index: usize) -> Slot {
        Slot(u32::try_from(index).unwrap())
    }

    pub(super) fn attach(&mut self, index: usize) {
        self.agents[index].attached = true;
        self.queue.attach(Self::slot(index), true);
        self.report(index);
    }

    pub(super) fn report(&mut self, index: usize) {
        if self.agents[index].attached {
            let counts = self.agents[index].counts();
            let decisions = self.queue.counted(Self::slot(index), counts, self.now);
            self.carry_out(decisions);
        }
    }

    pub(super) fn enter(&mut self, wanted: Wanted, wait: Duration) -> Caller {
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

    pub(super) fn leave(&mut self, caller: Caller) {
        self.clients.remove(&caller);
        self.queue.leave(caller);
        self.catch_up();
    }

    /// Does what is due, as whoever keeps time does at once.
    pub(super) fn catch_up(&mut self) {
        if self.queue.next_deadline().is_some_and(|at| at <= self.now) {
            self.pass(Duration::ZERO);
        }
    }

    /// The agent answers what it was asked first, and refuses for `cause` if
    /// there is one.
    pub(super) fn answer(&mut self, index: usize, cause: Option<RefusalCause>) {
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

    pub(super) fn detach(&mut self, index: usize) {
        self.agents[index].attached = false;
        self.agents[index].asked.clear();
        let decisions = self.queue.detach(Self::slot(index), self.now);
        self.carry_out(decisions);
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        let decisions = self.queue.tick(self.now);
        self.carry_out(decisions);
    }

    pub(super) fn carry_out(&mut self, decisions: Vec<Decision>) {
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

    pub(super) fn has_client(&self, place: Place) -> bool {
        let mut callers = self.queue.requests[&place].callers.keys();
        callers.any(|caller| self.clients.contains_key(caller))
    }

    /// What holds after each event.
    pub(super) fn check(&self) {
        let queue = &self.queue;
        let lined_up = queue.waiting.values().flat_map(|group| &group.places);
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
    pub(super) fn check_waiting(&self, place: Place, request: &Request) {
        let mut servers = self.queue.servers.clone();
        let blocks = &request.wanted.ports;
        let kept = self.queue.kept_from(place, blocks);
        let refusals = Refusals::of(request, &self.queue.waiting);
        let is_excluded = |slot, report| {
            let may_use = request.wanted.may_use(slot) && kept != Some(slot);
            !may_use || refusals.include(slot, report)
        };
        let reservation = servers.reserve(blocks, None, is_excluded);
        assert_eq!(reservation, None, "free for {blocks:?}");
    }

    /// Everything under way arrives, and agents report what they have.
    pub(super) fn settle(&mut self) {
        for index in 0..self.agents.len() {
            self.report(index);
        }
        while let Some(index) = self.agents.iter().position(|agent| !agent.asked.is_empty()) {
            self.answer(index, None);
            // A request that is over may leave a server to others: see `forget_keeping`.
            self.catch_up();
            self.check();
        }
    }

    /// No client waits for ports that are free in truth and not kept for an earlier
    /// one.
    pub(super) fn check_settled(&self) {
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
