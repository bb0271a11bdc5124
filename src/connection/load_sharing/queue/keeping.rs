//! The ports of one server that are kept for a request for several: rule 8 of
//! the queue.

use std::time::Instant;

use super::{Due, Kept, Place, Queue, Request};
use crate::connection::load_sharing::servers::ReportNumber;
use crate::session::{Block, OneOrMore};
use crate::table::Slot;

impl Request {
    /// Whether the server of `slot` has refused it since the report of this number.
    pub(super) fn has_refused(&self, slot: Slot, report: ReportNumber) -> bool {
        self.refused_by.get(&slot) == Some(&report)
    }
}

impl Queue {
    /// The slot whose ports the request at `place`, for `blocks`, does not get: they
    /// are kept for an earlier one.
    pub(super) fn kept_from(&self, place: Place, blocks: &OneOrMore<Block>) -> Option<Slot> {
        let kept = self.kept.filter(|kept| kept.place < place)?;
        let slot = kept.slot?;
        let others = &self.requests.get(&kept.place)?.wanted.ports;
        let server = self.servers.get(slot)?;
        server.is_shared(blocks, others).then_some(slot)
    }

    /// Keeps a server for the earliest waiting request that has been passed for long
    /// enough. Returns whether another one than before is kept, or none any more.
    pub(super) fn keep(&mut self, now: Instant) -> bool {
        let former = self.kept;
        let is_over = |kept: Kept| !self.requests.contains_key(&kept.place);
        self.kept = former.filter(|kept| !is_over(*kept));
        if self.kept.is_none() {
            let earliest = self.waiting_for_several.first().copied();
            let is_due = |place: &Place| {
                let from = self.requests.get(place).and_then(|it| it.kept_from);
                from.is_some_and(|from| from <= now)
            };
            let place = earliest.filter(is_due);
            self.kept = place.map(|place| Kept { place, slot: None });
        }
        if let Some(Kept { place, slot }) = self.kept
            && let Some(request) = self.requests.get(&place)
        {
            let blocks = &request.wanted.ports;
            let hopeless = |slot, report| request.has_refused(slot, report);
            let slot = slot.filter(|slot| self.servers.may_be_kept(*slot, blocks, hopeless));
            let slot = slot.or_else(|| self.servers.to_keep(blocks, request.wanted.only, hopeless));
            self.kept = Some(Kept { place, slot });
        }
        former.map(|it| it.slot) != self.kept.map(|it| it.slot)
            || former.map(|it| it.place) != self.kept.map(|it| it.place)
    }

    /// Notes that the request at `place` is over. What was kept for it is others' at
    /// the next tick, which is due at once.
    pub(super) fn forget_keeping(&mut self, place: Place, kept_from: Instant) {
        self.deadlines.remove(&(kept_from, Due::Keep(place)));
        if self.kept.is_some_and(|kept| kept.place == place) {
            self.deadlines.insert((kept_from, Due::Keep(place)));
        }
    }
}
