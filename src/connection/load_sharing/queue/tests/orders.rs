//! Random orders of events keep the rules of the queue.

use proptest::prelude::*;

use super::*;
use crate::connection::load_sharing::queue::Unconfirmed;

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
    /// The agent offers what it was asked for first to its workload.
    Offer(usize),
    /// The workload confirms an offered session, or not.
    Decide(usize, usize, Option<bool>),
    /// A client of another connection server wants an offered session with a key, too.
    OfferElsewhere(usize, usize),
    /// The agent sees a withdrawal.
    Withdraw(usize),
    CloseQueue,
    OpenQueue,
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
        6 => (0usize..2).prop_map(Event::Offer),
        4 => (0usize..2, any::<usize>(), proptest::option::of(any::<bool>()))
            .prop_map(|(index, which, how)| Event::Decide(index, which, how)),
        1 => (0usize..2, any::<usize>()).prop_map(|(index, which)| Event::OfferElsewhere(index, which)),
        2 => (0usize..2).prop_map(Event::Withdraw),
        1 => Just(Event::CloseQueue),
        3 => Just(Event::OpenQueue),
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
            Event::Offer(index) if self.queue.confirm.is_some() => self.offer(index),
            Event::Offer(_) => {}
            Event::Decide(index, which, silent) => {
                let how = silent.map(|silent| match silent {
                    true => Unconfirmed::Silent,
                    false => Unconfirmed::Refused(None),
                });
                self.decide(index, which, how);
            }
            Event::OfferElsewhere(index, which) => {
                let offers = &mut self.agents[index].offers;
                let which = which % offers.len().max(1);
                if let Some(offer) = offers.get_mut(which) {
                    offer.is_elsewhere = offer.session.idempotency_key.is_some();
                }
            }
            Event::Withdraw(index) => self.withdraw(index),
            Event::CloseQueue => {
                let decisions = self.queue.close(self.now);
                self.carry_out(decisions);
            }
            Event::OpenQueue => self.queue.open(),
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
        confirm in proptest::option::of(1u64..11),
    ) {
        let mut world = World::new(&free);
        world.queue.confirm = confirm.map(Duration::from_secs);
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
        world.pass(1000 * SECOND);
        let queue = &world.queue;
        prop_assert!(queue.requests.is_empty() && queue.waiting() == 0, "{queue:?}");
        prop_assert!(queue.by_key.is_empty() && queue.places.is_empty(), "{queue:?}");
        prop_assert!(queue.asks.is_empty() && queue.deadlines.is_empty(), "{queue:?}");
    }
}
