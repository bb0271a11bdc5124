//! The turns of requests for several ports: rules 8 and 9 of the queue.

use std::time::{Duration, Instant};

use super::request::Refusals;
use super::{Due, KEPT_FOR, MOST_LOOKED_AT, Place, Queue};
use crate::session::{Block, OneOrMore};
use crate::table::Slot;

/// Turns after which they do not become longer any more: by then, they are longer
/// than a request may wait.
const MOST_DOUBLINGS: u32 = 6;

/// For whom ports are kept.
#[derive(Clone, Debug, Default)]
pub(super) struct Keeping {
    /// The request for several ports that has its turn.
    kept: Option<Kept>,
    /// Those that have theirs since such a turn was in vain. They are few: each lasts no
    /// longer than twice a turn, and there is one turn at a time.
    others: Vec<Others>,
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
    /// Until when nothing is kept of `ports` in any case.
    until: Instant,
    /// Until when nothing is kept of them while one of the requests waits.
    latest: Instant,
}

impl Queue {
    /// The request that the ports of a server are kept for.
    pub(super) fn kept(&self) -> Option<&Kept> {
        self.keeping.kept.as_ref()
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
        self.end_turns_of_others(now);
        if self.keeping.kept.is_none() {
            self.begin_turn(now);
        }
        former != kept(self)
    }

    /// Begins the turn of the next request that a server could serve, of ports that
    /// neither others nor an earlier request shall have first.
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
        let are_further = due.len() > MOST_LOOKED_AT;
        due.truncate(MOST_LOOKED_AT);
        let mut servable = due.iter().filter_map(|&(_, place)| {
            let request = self.requests.get(&place)?;
            let wanted = &request.wanted;
            let refusals = Refusals::of(request, &self.waiting);
            let hopeless = |slot, report| refusals.include(slot, report);
            let may_use = |slot| request.may_use(slot);
            let slot = self.servers.to_keep(&wanted.ports, may_use, hopeless)?;
            Some((place, slot, wanted.ports.clone(), request.turns))
        });
        let others = self.keeping.others.iter();
        let mut of_others: Vec<_> = others.map(|others| others.ports.clone()).collect();
        let mut held_back = Vec::new();
        let next = servable.find(|(place, slot, ports, _)| {
            let server = self.servers.get(*slot);
            let is_shared = |others| server.is_some_and(|it| it.is_shared(ports, others));
            let is_held_back = of_others.iter().any(is_shared);
            if is_held_back {
                of_others.push(ports.clone());
                held_back.push(*place);
            }
            !is_held_back
        });
        if are_further {
            // Those that no server can serve must not be all that is looked at.
            let is_next = |place| next.as_ref().is_some_and(|(next, ..)| *next == place);
            let looked_at = due.iter().map(|(_, place)| *place);
            let looked_at = looked_at.take_while(|place| !is_next(*place));
            for place in looked_at.filter(|place| !held_back.contains(place)) {
                self.last_number += 1;
                if let Some(request) = self.requests.get_mut(&place) {
                    request.turn = Place(self.last_number);
                }
            }
        }
        let Some((place, slot, ports, turns)) = next else {
            return;
        };
        let until = now + length(turns);
        self.deadlines.insert((until, Due::Keep(place)));
        self.keeping.kept = Some(Kept {
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
        self.keeping.kept = None;
        if kept.is_served {
            return;
        }
        let last = Place(self.number());
        if let Some(request) = self.requests.get_mut(&kept.place) {
            request.turn = last;
            // One that a server cut short does not show that turns must be longer.
            request.turns += u32::from(now >= kept.until);
        }
        let lasted = now.saturating_duration_since(kept.from);
        let until = now + lasted;
        let latest = until + lasted;
        for at in [until, latest] {
            self.deadlines.insert((at, Due::Keep(kept.place)));
        }
        self.keeping.others.push(Others {
            former: kept.place,
            last,
            slot: kept.slot,
            ports: kept.ports,
            until,
            latest,
        });
    }

    /// Ends the turns of others that have lasted for long enough, if none of them waits
    /// or it is too long for that.
    fn end_turns_of_others(&mut self, now: Instant) {
        let others = std::mem::take(&mut self.keeping.others);
        let (over, others): (Vec<_>, Vec<_>) = others.into_iter().partition(|others| {
            now >= others.latest || now >= others.until && !self.is_waiting_of(others)
        });
        self.keeping.others = others;
        for Others {
            former,
            until,
            latest,
            ..
        } in over
        {
            for at in [until, latest] {
                self.deadlines.remove(&(at, Due::Keep(former)));
            }
        }
    }

    /// Whether one of `others` has no answer.
    fn is_waiting_of(&self, others: &Others) -> bool {
        let server = self.servers.get(others.slot);
        let Some(server) = server.filter(|server| server.takes_sessions()) else {
            return false;
        };
        // The place comes first: most requests that wait came later.
        let is_of = |place: Place, ports: &OneOrMore<Block>| {
            let is_for_one = ports.as_single().is_some();
            place <= others.last && is_for_one && server.is_shared(ports, &others.ports)
        };
        let mut waiting = self.waiting.iter();
        let mut asked = self.asks.values().filter_map(|ask| ask.place);
        waiting.any(|(usable, group)| {
            let first = group.places.first();
            let is_of = first.is_some_and(|place| is_of(*place, &usable.ports));
            is_of && usable.may_use(others.slot)
        }) || asked.any(|place| {
            let request = Some(place).filter(|place| *place <= others.last);
            let request = request.and_then(|place| self.requests.get(&place));
            request.is_some_and(|request| {
                is_of(place, &request.wanted.ports) && request.may_use(others.slot)
            })
        })
    }

    /// Notes that the request at `place` gets a session.
    pub(super) fn note_served(&mut self, place: Place) {
        if let Some(kept) = &mut self.keeping.kept {
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

    /// Notes that a client of the request at `place` has left. If it was the last of
    /// others, their turn ends at the next tick, which is due as soon as that may be.
    pub(super) fn note_left(&mut self, place: Place) {
        let others = self.keeping.others.iter();
        let left = others.filter(|it| place <= it.last && !self.is_waiting_of(it));
        let due = left.map(|others| (others.until, Due::Keep(others.former)));
        let due: Vec<_> = due.collect();
        self.deadlines.extend(due);
    }
}

/// How long a turn is at most of a request that has had so many.
fn length(turns: u32) -> Duration {
    KEPT_FOR * 2_u32.pow(turns.min(MOST_DOUBLINGS))
}
