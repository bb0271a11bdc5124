//! The steps that the queue's events consist of. They add what is to be done to
//! the queue's decisions.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::{Duration, Instant};

use super::super::refusal::Refusal;
use super::super::servers::Reservation;
use super::request::{Allocated, AskError, Decision, Group, Refusals, Usable, Wanted};
use super::{
    ASK_DEADLINE, ASK_LIMIT, Ask, AskId, Caller, Due, MOST_LOOKS, PASSED_FOR, Place, Queue,
    RETURN_TIME, Request,
};
use crate::selection::RefusalCause;
use crate::session::PortState;
use crate::table::Slot;

impl Queue {
    pub(super) fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    pub(super) fn take_decisions(&mut self) -> Vec<Decision> {
        std::mem::take(&mut self.decisions)
    }

    pub(super) fn is_waiting(&self, place: Place) -> bool {
        let request = self.requests.get(&place);
        request.is_some_and(|request| request.asking.is_none())
    }

    pub(super) fn add(&mut self, wanted: Wanted, now: Instant) -> Place {
        let place = Place(self.number());
        if let Some(key) = wanted.idempotency_key.clone() {
            self.by_key.insert(key, place);
        }
        let is_for_several = wanted.ports.as_single().is_none();
        let kept_from = is_for_several.then(|| now + PASSED_FOR);
        if let Some(kept_from) = kept_from {
            self.deadlines.insert((kept_from, Due::Keep(place)));
        }
        let request = Request {
            wanted,
            callers: BTreeMap::new(),
            asking: None,
            refused_by: BTreeMap::new(),
            turned_down_by: BTreeMap::new(),
            looks_left: MOST_LOOKS,
            kept_from,
            turn: place,
            turns: 0,
        };
        self.requests.insert(place, request);
        place
    }

    /// Adds a client to a request.
    pub(super) fn join(&mut self, place: Place, caller: Caller, until: Instant, now: Instant) {
        let Some(request) = self.requests.get_mut(&place) else {
            return;
        };
        request.callers.insert(caller, until);
        self.places.insert(caller, place);
        if until > now {
            self.deadlines.insert((until, Due::Caller(caller)));
        }
        self.deadlines
            .insert((until + ASK_LIMIT, Due::Caller(caller)));
    }

    /// Forgets a client, and the request when it was the last. A request for
    /// which a server is being asked stays until the answer, unless that is the
    /// workload's: its client may ask again under its key.
    pub(super) fn forget(&mut self, place: Place, caller: Caller) {
        self.places.remove(&caller);
        let Some(request) = self.requests.get_mut(&place) else {
            return;
        };
        if let Some(until) = request.callers.remove(&caller) {
            for at in [until, until + ASK_LIMIT] {
                self.deadlines.remove(&(at, Due::Caller(caller)));
            }
        }
        self.remove_if_over(place);
    }

    /// Removes a request without clients that waits for no answer but a workload's,
    /// which it withdraws.
    pub(super) fn remove_if_over(&mut self, place: Place) {
        let request = self.requests.get(&place);
        let Some(request) = request.filter(|request| request.callers.is_empty()) else {
            return;
        };
        if let Some(ask) = request.asking {
            if !self.is_offered(request) {
                return;
            }
            self.abandon(ask);
        }
        self.step_out(place);
        let Some(request) = self.requests.remove(&place) else {
            return;
        };
        if let Some(kept_from) = request.kept_from {
            self.forget_keeping(place, kept_from);
        }
        if let Some(key) = request.wanted.idempotency_key {
            self.by_key.remove(&key);
        }
    }

    pub(super) fn answer(&mut self, caller: Caller, answer: Result<Allocated, Refusal>) {
        if let Some(&place) = self.places.get(&caller) {
            self.forget(place, caller);
            self.decisions.push(Decision::Answer(caller, answer));
        }
    }

    /// Answers every client of a request, which is over then. Returns whether it
    /// had any.
    pub(super) fn answer_all(&mut self, place: Place, answer: &Result<Allocated, Refusal>) -> bool {
        let Some(request) = self.requests.get_mut(&place) else {
            return false;
        };
        request.asking = None;
        let callers: Vec<Caller> = request.callers.keys().copied().collect();
        for caller in &callers {
            self.answer(*caller, answer.clone());
        }
        self.remove_if_over(place);
        !callers.is_empty()
    }

    /// Refuses the clients of a request that do not wait any longer: for a port, or for
    /// what a workload decides.
    pub(super) fn refuse_the_impatient(&mut self, place: Place, now: Instant) {
        let Some(request) = self.requests.get(&place) else {
            return;
        };
        let is_offered = self.is_offered(request);
        if request.asking.is_some() && !is_offered {
            return;
        }
        let is_closed = self.is_closed;
        let (is_refused, limit) = if is_offered {
            (is_closed, ASK_LIMIT)
        } else {
            (self.is_turned_down(request), Duration::ZERO)
        };
        let gives_up = |(_, until): &(&Caller, &Instant)| {
            let is_too_long = is_closed && **until > now + RETURN_TIME;
            is_refused || is_too_long || **until + limit <= now
        };
        let callers = request.callers.iter().filter(gives_up);
        let callers: Vec<Caller> = callers.map(|(caller, _)| *caller).collect();
        if callers.is_empty() {
            return;
        }
        let refusal = if is_closed {
            Refusal::ShuttingDown
        } else if let Some(refusal) = request.not_confirmed() {
            refusal
        } else {
            let wanted = &request.wanted;
            let kept = self.kept_from(place, &wanted.ports);
            self.servers.reason(&wanted.ports, wanted.only, kept)
        };
        for caller in callers {
            self.answer(caller, Err(refusal.clone()));
        }
    }

    /// Puts a request among those that wait, at its place.
    pub(super) fn line_up(&mut self, place: Place) {
        if let Some(request) = self.requests.get(&place) {
            let group = self.waiting.entry(request.usable());
            group.or_default().places.insert(place);
        }
    }

    /// Takes a request out of those that wait.
    fn step_out(&mut self, place: Place) {
        let Some(request) = self.requests.get(&place) else {
            return;
        };
        let usable = request.usable();
        if let Some(group) = self.waiting.get_mut(&usable) {
            group.places.remove(&place);
            if group.places.is_empty() {
                self.waiting.remove(&usable);
            }
        }
    }

    /// Asks a server for a request. Returns whether one has the ports to spare.
    pub(super) fn ask(&mut self, place: Place, now: Instant) -> bool {
        let Some(request) = self.requests.get(&place) else {
            return false;
        };
        let wanted = &request.wanted;
        let kept = self.kept_from(place, &wanted.ports);
        let refusals = Refusals::of(request, &self.waiting);
        let is_excluded = |slot, report| {
            !request.may_use(slot) || kept == Some(slot) || refusals.include(slot, report)
        };
        let affinity_key = wanted.affinity_key.as_deref();
        let reserved = self
            .servers
            .reserve(&wanted.ports, affinity_key, is_excluded);
        let Some(reservation) = reserved else {
            return false;
        };
        self.ask_for(place, reservation, now);
        true
    }

    /// Asks a server for a waiting request that may have a port for it by now,
    /// although it has reported none: see rule 7.
    pub(super) fn ask_to_look(&mut self, place: Place, now: Instant) {
        let Some(request) = self.requests.get(&place) else {
            return;
        };
        if request.asking.is_some() || request.looks_left == 0 {
            return;
        }
        let wanted = &request.wanted;
        let kept = self.kept_from(place, &wanted.ports);
        let refusals = Refusals::of(request, &self.waiting);
        let is_excluded = |slot, report| {
            !request.may_use(slot) || kept == Some(slot) || refusals.include(slot, report)
        };
        let is_earlier = |group: &Group| group.places.first() < Some(&place);
        let waiting = self.waiting.iter();
        let earlier = waiting.filter(|(usable, group)| usable.is_for_one() && is_earlier(group));
        let earlier: Vec<&Usable> = earlier.map(|(usable, _)| usable).collect();
        let is_its = |slot: Slot, ports: &PortState| {
            let mut earlier = earlier.iter();
            !earlier.any(|usable| usable.includes(slot, ports))
        };
        let affinity_key = wanted.affinity_key.as_deref();
        let reserved =
            self.servers
                .reserve_to_look(&wanted.ports, affinity_key, is_excluded, is_its, now);
        if let Some(reservation) = reserved {
            self.ask_for(place, reservation, now);
        }
    }

    /// Sends a request to the server that is reserved for it.
    fn ask_for(&mut self, place: Place, reservation: Reservation, now: Instant) {
        let id = AskId(self.number());
        let Some(request) = self.requests.get_mut(&place) else {
            return;
        };
        request.asking = Some(id);
        request.looks_left -= u32::from(reservation.is_look);
        let deadline = now + ASK_DEADLINE;
        let confirm_within = self.confirm.map(|most| request.confirm_within(most, now));
        self.decisions.push(Decision::Ask {
            ask: id,
            slot: reservation.slot,
            wanted: request.wanted.clone(),
            confirm_within,
        });
        self.deadlines.insert((deadline, Due::Ask(id)));
        let ask = Ask {
            reservation,
            deadline,
            place: Some(place),
            confirm_within,
            is_offered: false,
        };
        self.asks.insert(id, ask);
        self.step_out(place);
    }

    /// The question is over.
    pub(super) fn settle(&mut self, id: AskId) -> Option<Ask> {
        let ask = self.asks.remove(&id)?;
        self.deadlines.remove(&(ask.deadline, Due::Ask(id)));
        if !ask.is_offered {
            self.servers.settle(&ask.reservation);
        }
        Some(ask)
    }

    /// Servers did not select a port: the next ones are asked, or the requests
    /// wait at their places.
    pub(super) fn failed(
        &mut self,
        asks: impl IntoIterator<Item = Ask>,
        error: AskError,
        now: Instant,
    ) {
        let mut places = Vec::new();
        for ask in asks {
            let Reservation { slot, is_look, .. } = ask.reservation;
            let Some(place) = ask.place else {
                continue;
            };
            if !is_look || error != AskError::Refused(RefusalCause::NoFreePort) {
                self.decisions.push(Decision::NotSelected(slot, error));
            }
            if error == AskError::Refused(RefusalCause::KeyReused) {
                self.answer_all(place, &Err(Refusal::KeyReused));
                continue;
            }
            let is_answered = matches!(error, AskError::Refused(_));
            if is_look
                && !is_answered
                && let Some(request) = self.requests.get_mut(&place)
            {
                request.looks_left = 0;
            }
            self.put_back(place, slot, now);
            places.push(place);
        }
        // In order: what the servers left may be another one's turn.
        self.wake(None, now);
        for place in places {
            self.ask_to_look(place, now);
            self.refuse_the_impatient(place, now);
        }
    }

    /// Has a request wait at its place after the server of `slot` failed, or
    /// refuses it if that has taken too long.
    fn put_back(&mut self, place: Place, slot: Slot, now: Instant) {
        let report = self.servers.report_of(slot);
        let Some(request) = self.requests.get_mut(&place) else {
            return;
        };
        request.asking = None;
        request.refused_by.insert(slot, report);
        let is_over = |until: &Instant| *until + ASK_LIMIT <= now;
        let is_over = request.callers.values().all(is_over);
        let usable = request.usable();
        self.line_up(place);
        if !usable.is_for_one()
            && let Some(group) = self.waiting.get_mut(&usable)
        {
            group.refused_by.insert(slot, report);
        }
        // No further server is asked for those who are refused.
        if is_over || self.is_closed {
            self.refuse_the_impatient(place, now);
            self.remove_if_over(place);
        }
    }

    /// Gives a session to a request. Returns whether a client receives it.
    pub(super) fn give(&mut self, place: Place, allocated: &Allocated) -> bool {
        let asking = self.requests.get(&place).and_then(|request| request.asking);
        if let Some(ask) = asking {
            self.abandon(ask);
        }
        self.note_served(place);
        self.answer_all(place, &Ok(allocated.clone()))
    }

    /// Gives a session to the request of its key, if that could have made it.
    /// Returns whether a client receives it.
    pub(super) fn give_by_key(&mut self, allocated: &Allocated) -> bool {
        let key = allocated.session.idempotency_key.as_ref();
        let Some(&place) = key.and_then(|key| self.by_key.get(key)) else {
            return false;
        };
        let is_its = self.requests[&place]
            .wanted
            .made(allocated.slot, &allocated.session);
        is_its && self.give(place, allocated)
    }

    /// Asks servers for requests that wait, earliest first, for as long as ports
    /// are free. To be called after every change that may free one: in `slot`, or
    /// anywhere.
    ///
    /// It costs a look at each group of waiting requests that can use the same ports,
    /// for those for several ports also one at `slot`, and a look at the servers for
    /// each request that is asked for or that a server has refused.
    pub(super) fn wake(&mut self, slot: Option<Slot>, now: Instant) {
        let slot = if self.keep(now) { None } else { slot };
        let free = self.servers.free_entries();
        let waiting = self.waiting.iter();
        let served = waiting.filter(|(usable, _)| {
            free.may_serve(&usable.ports, usable.only, &usable.turned_down_by)
                && self.may_be_served(usable, slot)
        });
        // The next of the requests that can use the same ports, which may be free.
        let mut next: BTreeMap<Place, Usable> = served
            .filter_map(|(usable, group)| Some((*group.places.first()?, usable.clone())))
            .collect();
        while let Some((place, usable)) = next.pop_first() {
            let is_asked = self.ask(place, now);
            // Servers that refused this one may have a port for the next. Those that have
            // not the ports for one of several have them for none of the group.
            let may_serve_next = || {
                let free = self.servers.free_entries();
                usable.is_for_one()
                    && self.is_refused(place)
                    && free.may_serve(&usable.ports, usable.only, &usable.turned_down_by)
            };
            if is_asked || may_serve_next() {
                let later = (Bound::Excluded(place), Bound::Unbounded);
                let group = self.waiting.get(&usable);
                let later = group.and_then(|group| group.places.range(later).next());
                next.extend(later.map(|later| (*later, usable)));
            }
        }
    }

    /// Whether what is free in `slot`, or anywhere if `None`, may serve requests for
    /// `usable`, several ports. Those for one are looked at in any case.
    fn may_be_served(&self, usable: &Usable, slot: Option<Slot>) -> bool {
        let Some(slot) = slot.filter(|_| !usable.is_for_one()) else {
            return true;
        };
        let server = self.servers.get(slot);
        usable.may_use(slot) && server.is_some_and(|server| server.has_room(&usable.ports))
    }

    /// Whether a server has refused the request at `place` and not reported since.
    fn is_refused(&self, place: Place) -> bool {
        self.requests.get(&place).is_some_and(|request| {
            let mut refused_by = request.refused_by.iter();
            refused_by.any(|(slot, report)| self.servers.report_of(*slot) == *report)
        })
    }
}
