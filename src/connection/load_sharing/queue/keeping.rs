//! The turns of requests for several ports: rules 8 and 9 of the queue.

use std::time::{Duration, Instant};

use super::request::{Refusals, Usable};
use super::{Due, KEPT_FOR, MOST_LOOKED_AT, Place, Queue};
use crate::session::{Block, OneOrMore};
use crate::table::Slot;

/// Turns after which they do not become longer any more: by then, they are longer
/// than a request may wait.
const MOST_DOUBLINGS: u32 = 6;

/// For whom ports are kept.
#[derive(Clone, Debug)]
pub(super) enum Keeping {
    Nothing,
    /// A request for several ports has its turn.
    Kept(Kept),
    /// Such a turn was in vain, and those have theirs that waited meanwhile.
    Others(Others),
}

/// The request that the ports of a server are kept for.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) place: Place,
    pub(super) slot: Slot,
    ports: OneOrMore<Block>,
    from: Instant,
    until: Instant,
    is_served: bool,
}

/// The requests for one port that waited at the end of a turn.
#[derive(Clone, Debug)]
pub(super) struct Others {
    /// The place of the request that the turn was for.
    former: Place,
    /// The last place that a request had then.
    last: Place,
    slot: Slot,
    ports: OneOrMore<Block>,
    /// How long nothing is kept in any case.
    until: Instant,
}

impl Queue {
    /// The request that the ports of a server are kept for.
    pub(super) fn kept(&self) -> Option<&Kept> {
        match &self.keeping {
            Keeping::Kept(kept) => Some(kept),
            Keeping::Nothing | Keeping::Others(_) => None,
        }
    }

    /// The slot whose ports the request at `place`, for `blocks`, does not get: they
    /// are kept for an earlier one.
    pub(super) fn kept_from(&self, place: Place, blocks: &OneOrMore<Block>) -> Option<Slot> {
        let kept = self.kept().filter(|kept| kept.place < place)?;
        let server = self.servers.get(kept.slot)?;
        let is_kept = self.requests.contains_key(&kept.place);
        (is_kept && server.is_shared(blocks, &kept.ports)).then_some(kept.slot)
    }

    /// Begins and ends the turns that are due. Returns whether another server than before
    /// is kept or for another request, or none any more.
    pub(super) fn keep(&mut self, now: Instant) -> bool {
        let kept = |queue: &Self| queue.kept().map(|kept| (kept.place, kept.slot));
        let former = kept(self);
        self.end_turn(now);
        self.end_turn_of_others(now);
        if matches!(self.keeping, Keeping::Nothing) {
            self.begin_turn(now);
        }
        former != kept(self)
    }

    /// Begins the turn of the next request that a server could serve.
    fn begin_turn(&mut self, now: Instant) {
        let groups = self.waiting.iter();
        let groups = groups.filter(|(usable, _)| !usable.is_for_one());
        let mut due: Vec<(Place, Place)> = groups
            .filter_map(|(_, group)| {
                let place = *group.places.first()?;
                let request = self.requests.get(&place)?;
                let is_due = request.kept_from.is_some_and(|from| from <= now);
                is_due.then_some((request.turn, place))
            })
            .collect();
        due.sort_unstable();
        let mut due = due.into_iter().take(MOST_LOOKED_AT);
        let next = due.find_map(|(_, place)| {
            let request = self.requests.get(&place)?;
            let wanted = &request.wanted;
            let refusals = Refusals::of(request, &self.waiting);
            let hopeless = |slot, report| refusals.include(slot, report);
            let may_use = |slot| request.may_use(slot);
            let slot = self.servers.to_keep(&wanted.ports, may_use, hopeless)?;
            Some((place, slot, wanted.ports.clone(), request.turns))
        });
        let Some((place, slot, ports, turns)) = next else {
            return;
        };
        let until = now + length(turns);
        self.deadlines.insert((until, Due::Keep(place)));
        self.keeping = Keeping::Kept(Kept {
            place,
            slot,
            ports,
            from: now,
            until,
            is_served: false,
        });
    }

    /// Ends the turn whose request is over, whose server cannot serve it any more, or
    /// that has lasted for long enough. If it was in vain, the others have theirs.
    fn end_turn(&mut self, now: Instant) {
        let Some(kept) = self.kept() else {
            return;
        };
        let goes_on = self.requests.get(&kept.place).is_some_and(|request| {
            let refusals = Refusals::of(request, &self.waiting);
            let hopeless = |slot, report| refusals.include(slot, report);
            let may_serve = request.may_use(kept.slot)
                && self.servers.may_be_kept(kept.slot, &kept.ports, hopeless);
            may_serve && now < kept.until
        });
        if goes_on {
            return;
        }
        let kept = kept.clone();
        self.deadlines.remove(&(kept.until, Due::Keep(kept.place)));
        self.keeping = Keeping::Nothing;
        if kept.is_served {
            return;
        }
        let last = Place(self.number());
        if let Some(request) = self.requests.get_mut(&kept.place) {
            request.turn = last;
            request.turns += 1;
        }
        let until = now + now.saturating_duration_since(kept.from);
        self.deadlines.insert((until, Due::Keep(kept.place)));
        self.keeping = Keeping::Others(Others {
            former: kept.place,
            last,
            slot: kept.slot,
            ports: kept.ports,
            until,
        });
    }

    /// Ends the turn of the others if it has lasted for long enough and none of them waits.
    fn end_turn_of_others(&mut self, now: Instant) {
        let Keeping::Others(others) = &self.keeping else {
            return;
        };
        if now < others.until || self.is_waiting_of(others) {
            return;
        }
        let deadline = (others.until, Due::Keep(others.former));
        self.deadlines.remove(&deadline);
        self.keeping = Keeping::Nothing;
    }

    /// Whether one of `others` has no answer.
    fn is_waiting_of(&self, others: &Others) -> bool {
        let server = self.servers.get(others.slot);
        let Some(server) = server.filter(|server| server.takes_sessions()) else {
            return false;
        };
        let is_of = |usable: &Usable, place: Option<&Place>| {
            usable.is_for_one()
                && usable.may_use(others.slot)
                && place.is_some_and(|place| *place <= others.last)
                && server.is_shared(&usable.ports, &others.ports)
        };
        let asked = self.asks.values().filter_map(|ask| ask.place);
        let mut asked = asked.filter_map(|place| Some((place, self.requests.get(&place)?)));
        let mut waiting = self.waiting.iter();
        waiting.any(|(usable, group)| is_of(usable, group.places.first()))
            || asked.any(|(place, request)| is_of(&request.usable(), Some(&place)))
    }

    /// Notes that the request at `place` gets a session.
    pub(super) fn note_served(&mut self, place: Place) {
        if let Keeping::Kept(kept) = &mut self.keeping {
            kept.is_served |= kept.place == place;
        }
    }

    /// Notes that the request at `place` is over. What was kept for it is others' at
    /// the next tick, which is due at once.
    pub(super) fn forget_keeping(&mut self, place: Place, kept_from: Instant) {
        self.deadlines.remove(&(kept_from, Due::Keep(place)));
        if self.kept().is_some_and(|kept| kept.place == place) {
            self.deadlines.insert((kept_from, Due::Keep(place)));
        }
    }
}

/// How long a turn is at most of a request that has had so many.
fn length(turns: u32) -> Duration {
    KEPT_FOR * 2_u32.pow(turns.min(MOST_DOUBLINGS))
}
