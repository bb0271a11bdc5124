//! A queue with simulated agents: each gives its ports as a real one does.

use super::super::request::Refusals;
use super::*;
use crate::connection::load_sharing::queue::{ASK_LIMIT, Unconfirmed};

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
    /// Sessions that its workload has yet to confirm.
    pub(super) offers: Vec<Offer>,
    /// The questions that were withdrawn, which it has yet to see.
    pub(super) withdrawn: Vec<AskId>,
    /// Whether no free ports are adjacent.
    pub(super) is_fragmented: bool,
    /// What it was asked and has not answered.
    pub(super) asked: Vec<(AskId, Wanted)>,
}

/// A session that a workload has yet to confirm.
#[derive(Debug)]
pub(super) struct Offer {
    taken: [u32; 3],
    pub(super) session: Session,
    askers: BTreeSet<AskId>,
    /// Whether another connection server has asked for it as well.
    pub(super) is_elsewhere: bool,
}

impl Agent {
    pub(super) fn counts(&self) -> Counts {
        let ports = (0..ENTRIES.len()).map(|index| PortState {
            name: ENTRIES[index].0.to_owned(),
            protocol: ENTRIES[index].1,
            free: self.free[index],
            held: 0,
            // Beside those that come and go, one of each entry is always busy.
            busy: 1 + self.taken(index),
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

    /// The ports of an entry that sessions have, offered ones too.
    fn taken(&self, index: usize) -> u32 {
        let offered = self.offers.iter().map(|offer| offer.taken[index]);
        let live = self.sessions.iter().map(|(taken, _)| taken[index]);
        live.chain(offered).sum()
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
            let is_its = wanted.made(self.slot, session);
            return is_its
                .then(|| session.clone())
                .ok_or(RefusalCause::KeyReused);
        }
        let (taken, session) = self.make(wanted, number)?;
        self.sessions.push((taken, session.clone()));
        Ok(session)
    }

    /// Takes the ports for a session with this `number`.
    fn make(&mut self, wanted: &Wanted, number: u64) -> Result<([u32; 3], Session), RefusalCause> {
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
            idempotency_key: wanted.idempotency_key.clone(),
            ports: OneOrMore::new(ports).unwrap(),
            ..Session::example(&number.to_string(), 20_000)
        };
        Ok((taken, session))
    }

    /// The offer that a request has the key of.
    fn offer_of(&mut self, wanted: &Wanted) -> Option<&mut Offer> {
        let key = wanted.idempotency_key.as_ref()?;
        let mut offers = self.offers.iter_mut();
        offers.find(|offer| offer.session.idempotency_key.as_ref() == Some(key))
    }

    /// Removes an offer, whose ports are free.
    fn retract(&mut self, index: usize) -> Offer {
        let offer = self.offers.remove(index);
        for (free, taken) in self.free.iter_mut().zip(offer.taken) {
            *free += taken;
        }
        offer
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
        let decisions = self.queue.leave(caller);
        self.carry_out(decisions);
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
        let Some((_, wanted)) = agent.asked.first().cloned() else {
            return;
        };
        if cause.is_none() && agent.offer_of(&wanted).is_some() {
            self.offer(index);
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
                self.selected(index, ask, session);
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

    /// The agent has selected `session` for `ask`. Returns whether it is given back.
    fn selected(&mut self, index: usize, ask: AskId, session: Session) -> bool {
        let (slot, counts) = (Self::slot(index), self.agents[index].counts());
        let allocated = Allocated { slot, session };
        let id = allocated.session.id.clone();
        let is_new = self.known.insert(id.clone());
        let (is_needed, decisions) = self.queue.selected(ask, &allocated, counts, self.now);
        self.carry_out(decisions);
        let is_given_back = !is_needed && is_new;
        if is_given_back {
            let mut told = self.answers.values().flatten();
            assert!(told.all(|told| told.session.id != id), "a client has {id}");
            let sessions = &self.agents[index].sessions;
            let at = sessions.iter().position(|(_, session)| session.id == id);
            self.agents[index].end(at.unwrap());
            self.report(index);
        }
        is_given_back
    }

    /// The agent offers the session that it was asked for first to its workload, or
    /// answers where it cannot.
    pub(super) fn offer(&mut self, index: usize) {
        let agent = &mut self.agents[index];
        let Some((ask, wanted)) = agent.asked.first().cloned() else {
            return;
        };
        let key = wanted.idempotency_key.as_ref();
        let mut live = agent.sessions.iter();
        if live.any(|(_, it)| key.is_some() && it.idempotency_key.as_ref() == key) {
            self.answer(index, None);
            return;
        }
        if let Some(offer) = agent.offer_of(&wanted) {
            if !wanted.made(Self::slot(index), &offer.session) {
                self.answer(index, Some(RefusalCause::KeyReused));
                return;
            }
            offer.askers.insert(ask);
        } else {
            self.number += 1;
            match agent.make(&wanted, self.number) {
                Ok((taken, session)) => agent.offers.push(Offer {
                    taken,
                    session,
                    askers: [ask].into(),
                    is_elsewhere: false,
                }),
                Err(cause) => {
                    self.answer(index, Some(cause));
                    return;
                }
            }
        }
        self.agents[index].asked.remove(0);
        let counts = self.agents[index].counts();
        let decisions = self.queue.offered(ask, Self::slot(index), counts, self.now);
        self.carry_out(decisions);
    }

    /// The workload of `index` decides about an offer: `how` it does not take it, or it
    /// does.
    pub(super) fn decide(&mut self, index: usize, which: usize, how: Option<Unconfirmed>) {
        let agent = &mut self.agents[index];
        if agent.offers.is_empty() {
            return;
        }
        let which = which % agent.offers.len();
        let Some(how) = how else {
            let offer = agent.offers.remove(which);
            agent.sessions.push((offer.taken, offer.session.clone()));
            for ask in offer.askers {
                let is_given_back = self.selected(index, ask, offer.session.clone());
                assert!(!(is_given_back && offer.is_elsewhere), "others have it");
            }
            return;
        };
        let offer = agent.retract(which);
        self.report(index);
        for ask in offer.askers {
            let decisions = self.queue.turned_down(ask, how.clone(), self.now);
            self.carry_out(decisions);
        }
    }

    /// The agent sees a question withdrawn, and says so unless it has answered before.
    pub(super) fn withdraw(&mut self, index: usize) {
        let agent = &mut self.agents[index];
        if agent.withdrawn.is_empty() {
            return;
        }
        let ask = agent.withdrawn.remove(0);
        let mut offers = agent.offers.iter_mut();
        let Some(at) = offers.position(|offer| offer.askers.remove(&ask)) else {
            return;
        };
        let offer = &agent.offers[at];
        if offer.askers.is_empty() && !offer.is_elsewhere {
            agent.retract(at);
            self.report(index);
        }
        let decisions = self.queue.refused(ask, RefusalCause::Withdrawn, self.now);
        self.carry_out(decisions);
    }

    pub(super) fn detach(&mut self, index: usize) {
        let agent = &mut self.agents[index];
        agent.attached = false;
        agent.asked.clear();
        agent.withdrawn.clear();
        for at in (0..agent.offers.len()).rev() {
            agent.offers[at].askers.clear();
            if !agent.offers[at].is_elsewhere {
                agent.retract(at);
            }
        }
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
                Decision::Ask {
                    ask, slot, wanted, ..
                } => {
                    let place = self.queue.asks[&ask].place;
                    assert!(
                        place.is_none_or(|place| self.has_client(place)),
                        "no one asks"
                    );
                    let agent = &mut self.agents[slot.0 as usize];
                    assert!(agent.attached);
                    agent.asked.push((ask, wanted));
                }
                Decision::Withdraw { ask, slot } => {
                    let agent = &mut self.agents[slot.0 as usize];
                    assert!(agent.attached && !agent.withdrawn.contains(&ask));
                    agent.withdrawn.push(ask);
                }
                Decision::Answer(caller, answer) => {
                    let (wanted, until) = self.clients.remove(&caller).expect("a client once");
                    match &answer {
                        Ok(told) => assert!(wanted.made(told.slot, &told.session)),
                        // No one is left who could take it.
                        Err(Refusal::NotConfirmed { .. }) => {}
                        Err(Refusal::ShuttingDown) => assert!(self.queue.is_closed),
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
                let limit = match request.asking {
                    None => Some(Duration::ZERO),
                    Some(_) => queue.is_offered(request).then_some(ASK_LIMIT),
                };
                let is_late = limit.is_some_and(|limit| *until + limit <= self.now);
                assert!(!is_late, "{caller:?} still waits");
                assert_eq!(queue.places[caller], *place);
            }
            if request.asking.is_none() {
                self.check_waiting(*place, request);
            }
        }
        for agent in &self.agents {
            for ask in agent.offers.iter().flat_map(|offer| &offer.askers) {
                let place = queue.asks[ask].place;
                assert_eq!(place.is_none(), agent.withdrawn.contains(ask), "{ask:?}");
                let is_closed = queue.is_closed && place.is_some();
                let has_client = place.is_none_or(|place| self.has_client(place));
                assert!(has_client && !is_closed, "{ask:?} goes on");
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
            let may_use = request.may_use(slot) && kept != Some(slot);
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
        let has_news = |agent: &Agent| {
            !(agent.asked.is_empty() && agent.withdrawn.is_empty() && agent.offers.is_empty())
        };
        while let Some(index) = self.agents.iter().position(has_news) {
            self.answer(index, None);
            self.withdraw(index);
            self.decide(index, 0, Some(Unconfirmed::Silent));
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
            let place = self.queue.places[caller];
            let kept = self.queue.kept_from(place, &wanted.ports);
            let request = &self.queue.requests[&place];
            for (index, agent) in self.agents.iter().enumerate() {
                let slot = Self::slot(index);
                let may_use = agent.attached && kept != Some(slot) && request.may_use(slot);
                let is_served = may_use && agent.take(wanted).is_some();
                assert!(!is_served, "{wanted:?} waits for {agent:?}");
            }
        }
        let free: u32 = agents.flat_map(|agent| agent.free).sum();
        assert_eq!(self.queue.servers.free_ports(), free, "counted once");
    }
}
