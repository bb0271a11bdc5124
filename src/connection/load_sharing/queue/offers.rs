//! Sessions that a workload has yet to confirm: rule 10 of the queue.
//!
//! ```text
//!   asking ──offered──→ being asked ──selected──→ answered
//!                          │    └─turned down, late──→ waiting: the next server is asked
//!                          └─no client left──→ withdrawn, which the agent acknowledges
//! ```

use std::time::{Duration, Instant};

use super::request::{AskError, Decision, Unconfirmed, Usable};
use super::{ASK_DEADLINE, ASK_LIMIT, AskId, Due, Queue, Request};
use crate::connection::load_sharing::refusal::Refusal;
use crate::selection::Counts;
use crate::table::Slot;

impl Request {
    /// The time that a workload has from `now` on to confirm the session: `most`, but no
    /// longer than its clients are there.
    pub(super) fn confirm_within(&self, most: Duration, now: Instant) -> Duration {
        let last = self.callers.values().max();
        let left = last.map(|until| (*until + ASK_LIMIT).saturating_duration_since(now));
        most.min(left.unwrap_or(Duration::ZERO))
    }

    /// Whether it may get a port of the server of `slot`.
    pub(super) fn may_use(&self, slot: Slot) -> bool {
        self.wanted.may_use(slot) && !self.turned_down_by.contains_key(&slot)
    }

    /// What it has in common with those that can use the same ports.
    pub(super) fn usable(&self) -> Usable {
        Usable {
            ports: self.wanted.ports.clone(),
            only: self.wanted.only,
            turned_down_by: self.turned_down_by.keys().copied().collect(),
        }
    }

    /// Why it gets no session if no workload has confirmed it; `None` if none was asked.
    /// One that is being asked has been silent for too long.
    pub(super) fn not_confirmed(&self) -> Option<Refusal> {
        let all = self.turned_down_by.values();
        let refused = all.clone().filter(|it| **it != Unconfirmed::Silent).count();
        let silent = all.len() - refused + usize::from(self.asking.is_some());
        let mut reasons = all.filter_map(|it| match it {
            Unconfirmed::Refused(reason) => reason.clone(),
            Unconfirmed::Silent => None,
        });
        (silent + refused > 0).then(|| Refusal::NotConfirmed {
            silent,
            refused,
            reason: reasons.next_back(),
        })
    }
}

impl Queue {
    /// The agent of `slot` offers the session for the question `id` to its workload, and
    /// has `counts` then, with the session's port as taken. It answers when the workload
    /// has decided, when its time is over, or when the question is withdrawn.
    #[must_use]
    pub fn offered(
        &mut self,
        id: AskId,
        slot: Slot,
        counts: Counts,
        now: Instant,
    ) -> Vec<Decision> {
        self.servers.counted(slot, counts);
        if let Some(ask) = self.asks.get_mut(&id)
            && !ask.is_offered
        {
            // The counts have the port from now on.
            self.servers.settle(&ask.reservation);
            ask.is_offered = true;
            self.deadlines.remove(&(ask.deadline, Due::Ask(id)));
            let place = ask.place;
            if let Some(place) = place {
                ask.deadline = now + ask.confirm_within.unwrap_or_default() + ASK_DEADLINE;
                self.deadlines.insert((ask.deadline, Due::Ask(id)));
                self.refuse_the_impatient(place, now);
                self.remove_if_over(place);
            } else {
                self.decisions.push(Decision::Withdraw { ask: id, slot });
            }
        }
        self.wake(Some(slot), now);
        self.take_decisions()
    }

    /// The workload of the server that was asked under `ask` has not confirmed the
    /// session.
    #[must_use]
    pub fn turned_down(
        &mut self,
        ask: AskId,
        unconfirmed: Unconfirmed,
        now: Instant,
    ) -> Vec<Decision> {
        let ask = self.settle(ask);
        let cause = unconfirmed.cause();
        if let Some(ask) = &ask
            && let Some(place) = ask.place
            && let Some(request) = self.requests.get_mut(&place)
        {
            let slot = ask.reservation.slot;
            request.turned_down_by.insert(slot, unconfirmed);
        }
        self.failed(ask, AskError::Refused(cause), now);
        self.take_decisions()
    }

    /// No request needs the answer to the question `id` any more. A workload that is
    /// being asked is asked no longer.
    pub(super) fn abandon(&mut self, id: AskId) {
        if let Some(ask) = self.asks.get_mut(&id)
            && ask.place.take().is_some()
            && ask.is_offered
        {
            let slot = ask.reservation.slot;
            self.decisions.push(Decision::Withdraw { ask: id, slot });
        }
    }

    /// Whether a workload is being asked for `request`.
    pub(super) fn is_offered(&self, request: &Request) -> bool {
        let ask = request.asking.and_then(|ask| self.asks.get(&ask));
        ask.is_some_and(|ask| ask.is_offered)
    }

    /// Whether every server that `request` can use has turned it down. One that takes no
    /// sessions now, for example because its agent is away, may take some in a moment.
    pub(super) fn is_turned_down(&self, request: &Request) -> bool {
        let may_take = |slot: Slot| {
            let server = self.servers.get(slot);
            server.is_some_and(|server| !server.is_draining()) && request.may_use(slot)
        };
        !request.turned_down_by.is_empty() && !self.servers.slots().any(may_take)
    }
}
