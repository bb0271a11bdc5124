//! What every processing server's agent reported last, and which server a
//! request is sent to. A plain struct: no I/O, no locks, no clock.
//!
//! A [`Reservation`] is a request on its way to a server. It counts against the
//! ports of the entries there, until the server's answer comes with the counts
//! after it: both are applied in one step, so each port in flight is counted
//! once. The server alone decides; a reservation only keeps two requests from
//! being sent after the same last port.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::policy::{Candidate, choose};
use super::refusal::Refusal;
use crate::pool::{Policy, PortProtocol};
use crate::selection::Counts;
use crate::session::{Block, OneOrMore, PortFilter, PortState};
use crate::table::{RowState, Slot, Table};

/// Shortest time between two questions to a server for ports that it reported as not
/// listening: that for which its agent does not look again. So many requests in a full
/// pool cost no more than one.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// A request on its way to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The server's slot.
    pub slot: Slot,
    /// What it counts as. The server may select ports of other entries that the
    /// request can use; its answer says so.
    shares: OneOrMore<Share>,
    /// Whether its agent has to look again: it has reported too few ports.
    pub(super) is_look: bool,
}

/// Ports of one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Share {
    entry: Entry,
    ports: u32,
}

/// Name and protocol of a port entry.
type Entry = (String, PortProtocol);

fn entry(ports: &PortState) -> Entry {
    (ports.name.clone(), ports.protocol)
}

/// Port entries with a port to spare: few, the same on every server.
#[derive(Clone, Debug)]
pub(super) struct FreeEntries<'a> {
    servers: &'a Servers,
    entries: BTreeSet<(&'a str, PortProtocol)>,
}

impl FreeEntries<'_> {
    /// Whether a port of them serves `filter`: on the server `only`, or on any.
    pub(super) fn serve(&self, filter: &PortFilter, only: Option<Slot>) -> bool {
        if let Some(slot) = only {
            let server = self.servers.get(slot);
            return server.is_some_and(|server| server.has_one(filter));
        }
        let mut entries = self.entries.iter();
        entries.any(|(name, protocol)| filter.admits(name, *protocol))
    }
}

/// The number of a server's report; it grows with each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportNumber(u64);

/// A processing server as load sharing sees it.
#[derive(Clone, Debug, Default)]
pub struct ServerLoad {
    /// Whether its agent's stream is up.
    pub attached: bool,
    /// Whether its row says that it takes nothing new.
    pub row_draining: bool,
    /// Whether its row says that its workload is not ready.
    row_not_ready: bool,
    /// The ports that its agent reported last.
    pub ports: Vec<PortState>,
    /// Whether its agent says that it takes nothing new.
    agent_draining: bool,
    /// Whether its agent says that its workload is not ready. It may know a newer
    /// row.
    agent_not_ready: bool,
    /// Whether its agent says that it has had all the sessions that it takes.
    spent: bool,
    /// Its ports that become free without a client's doing.
    returning: u32,
    /// Its ports in use besides the first one of each session.
    further: u32,
    /// Whether its agent knows sessions of several ports.
    knows_several_ports: bool,
    /// The number of requests on their way to it.
    asked: u32,
    /// Their ports, by entry: few, and looked through often.
    reserved: Vec<Share>,
    /// The number of the last report.
    report: ReportNumber,
    /// When it was last asked for a port that it had reported as not listening.
    asked_to_look: Option<Instant>,
    /// Whether it has yet to answer that.
    is_looking: bool,
}

impl ServerLoad {
    /// Live sessions, as last reported.
    #[must_use]
    pub fn sessions(&self) -> u32 {
        let in_use: u32 = self.ports.iter().map(in_use).sum();
        in_use.saturating_sub(self.further)
    }

    /// Whether new sessions may go to it at all.
    #[must_use]
    pub fn takes_sessions(&self) -> bool {
        self.attached && !self.is_draining() && !self.is_not_ready() && !self.spent
    }

    /// Whether its workload is not ready.
    #[must_use]
    pub fn is_not_ready(&self) -> bool {
        self.row_not_ready || self.agent_not_ready
    }

    /// Whether it would take sessions if its workload were ready.
    fn waits_to_be_ready(&self) -> bool {
        self.attached && !self.is_draining() && self.is_not_ready() && !self.spent
    }

    /// Whether it has had all the sessions that it takes.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.spent
    }

    /// Whether it is being removed.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.row_draining || self.agent_draining
    }

    /// The ports of an entry that are free and not reserved.
    fn free(&self, ports: &PortState) -> u32 {
        let is_same = |(name, protocol): &Entry| *name == ports.name && *protocol == ports.protocol;
        let reserved = self.reserved.iter().find(|it| is_same(&it.entry));
        let reserved = reserved.map_or(0, |share| share.ports);
        ports.free.saturating_sub(reserved)
    }

    fn reserve(&mut self, shares: &OneOrMore<Share>) {
        self.asked += 1;
        for share in shares.iter() {
            match self.reserved.iter_mut().find(|it| it.entry == share.entry) {
                Some(reserved) => reserved.ports += share.ports,
                None => self.reserved.push(share.clone()),
            }
        }
    }

    fn settle(&mut self, shares: &OneOrMore<Share>) {
        self.asked = self.asked.saturating_sub(1);
        for share in shares.iter() {
            if let Some(reserved) = self.reserved.iter_mut().find(|it| it.entry == share.entry) {
                reserved.ports -= share.ports;
            }
        }
        self.reserved.retain(|share| share.ports > 0);
    }

    /// The reports on entries that serve one of `blocks`.
    fn usable<'a>(&'a self, blocks: &'a OneOrMore<Block>) -> impl Iterator<Item = &'a PortState> {
        let admits = |ports: &&PortState| {
            let mut blocks = blocks.iter();
            blocks.any(|block| block.filter.admits(&ports.name, ports.protocol))
        };
        self.ports.iter().filter(admits)
    }

    /// What `blocks` take of the entries, which have as many ports as `amount` says;
    /// `None` if they do not have enough. Which of these are adjacent is not known
    /// here.
    fn shares(
        &self,
        blocks: &OneOrMore<Block>,
        amount: impl Fn(&PortState) -> u32,
    ) -> Option<OneOrMore<Share>> {
        if let Some(filter) = blocks.as_single() {
            // The fullest supply is most likely where the agent selects from.
            let most = self.matching(filter).max_by_key(|it| amount(it));
            return most.filter(|it| amount(it) > 0).map(|ports| {
                OneOrMore::one(Share {
                    entry: entry(ports),
                    ports: 1,
                })
            });
        }
        // Most servers that lack ports are found here.
        if self.usable(blocks).map(&amount).sum::<u32>() < blocks.ports() {
            return None;
        }
        let mut left: Vec<(&PortState, u32)> =
            self.ports.iter().map(|it| (it, amount(it))).collect();
        left.sort_by_key(|(_, left)| std::cmp::Reverse(*left));
        let entries: Vec<(&str, PortProtocol)> = left
            .iter()
            .map(|(ports, _)| (ports.name.as_str(), ports.protocol))
            .collect();
        let placed = blocks.place(&entries, |index, block| {
            let (of, left) = &mut left[index];
            *left = left.checked_sub(block.ports())?;
            Some(Share {
                entry: entry(of),
                ports: block.ports(),
            })
        });
        OneOrMore::new(placed?)
    }

    /// Whether it has a port to spare that `filter` admits.
    fn has_one(&self, filter: &PortFilter) -> bool {
        self.takes_sessions() && self.matching(filter).any(|it| self.free(it) > 0)
    }

    /// Whether it has the ports to spare that `blocks` ask for, as far as it has
    /// reported.
    pub(super) fn has_room(&self, blocks: &OneOrMore<Block>) -> bool {
        if !self.takes_sessions() {
            return false;
        }
        match blocks.as_single() {
            Some(filter) => self.has_one(filter),
            None => self.knows_several_ports && self.shares(blocks, |it| self.free(it)).is_some(),
        }
    }

    /// What `blocks` take of the entries if the workload listens by now on all ports
    /// that `may_open`, and on one of them they need.
    fn shares_after_look(
        &self,
        blocks: &OneOrMore<Block>,
        may_open: impl Fn(&PortState) -> bool,
    ) -> Option<OneOrMore<Share>> {
        if blocks.as_single().is_some() {
            return self.shares(blocks, |it| it.not_listening * u32::from(may_open(it)));
        }
        if !self.knows_several_ports || !self.usable(blocks).any(&may_open) {
            return None;
        }
        self.shares(blocks, |it| {
            self.free(it) + it.not_listening * u32::from(may_open(it))
        })
    }

    /// Whether it has the ports that `blocks` ask for once its sessions are over.
    fn could_have_room(&self, blocks: &OneOrMore<Block>) -> bool {
        let offered = |ports: &PortState| ports.free + in_use(ports);
        self.takes_sessions() && self.knows_several_ports && self.shares(blocks, offered).is_some()
    }

    /// Whether requests for `blocks` and for `others` could use the same ports.
    pub(super) fn is_shared(&self, blocks: &OneOrMore<Block>, others: &OneOrMore<Block>) -> bool {
        let admits = |blocks: &OneOrMore<Block>, ports: &PortState| {
            let mut blocks = blocks.iter();
            blocks.any(|block| block.filter.admits(&ports.name, ports.protocol))
        };
        self.usable(blocks).any(|ports| admits(others, ports))
    }

    /// The reports on entries that serve `filter`.
    fn matching(&self, filter: &PortFilter) -> impl Iterator<Item = &PortState> {
        let admits = |ports: &&PortState| filter.admits(&ports.name, ports.protocol);
        self.ports.iter().filter(admits)
    }

    /// Whether it may be asked at `now` to look at its ports that are not listening.
    fn may_look(&self, now: Instant) -> bool {
        let asked = self.asked_to_look;
        let is_allowed = asked.is_none_or(|asked| now >= asked + LOOK_AGAIN_AFTER);
        self.takes_sessions() && !self.is_looking && is_allowed
    }

    fn candidate(&self, slot: Slot) -> Candidate {
        Candidate {
            slot,
            sessions: self.sessions() + self.asked,
        }
    }
}

fn in_use(ports: &PortState) -> u32 {
    ports.held + ports.busy + ports.lingering
}

/// The processing servers' counts.
#[derive(Clone, Debug, Default)]
pub struct Servers {
    policy: Policy,
    loads: BTreeMap<Slot, ServerLoad>,
    last: Option<Slot>,
}

impl Servers {
    /// The server of `slot`, if its agent was attached before.
    #[must_use]
    pub fn get(&self, slot: Slot) -> Option<&ServerLoad> {
        self.loads.get(&slot)
    }

    /// All servers, by slot.
    pub fn loads(&self) -> impl Iterator<Item = &ServerLoad> {
        self.loads.values()
    }

    fn server(&mut self, slot: Slot) -> &mut ServerLoad {
        self.loads.entry(slot).or_default()
    }

    /// An agent's stream is up; its server counts from its first counts on.
    pub(super) fn attach(&mut self, slot: Slot, knows_several_ports: bool) {
        let server = self.server(slot);
        server.attached = true;
        server.knows_several_ports = knows_several_ports;
    }

    /// An agent's stream is down: no request goes to the server, and those on
    /// their way are lost.
    pub(super) fn detach(&mut self, slot: Slot) {
        let server = self.server(slot);
        server.attached = false;
        server.ports.clear();
        server.returning = 0;
        server.agent_not_ready = false;
        server.spent = false;
        server.further = 0;
        server.asked = 0;
        server.is_looking = false;
        server.reserved.clear();
    }

    /// An agent reported its ports.
    pub(super) fn counted(&mut self, slot: Slot, counts: Counts) {
        let server = self.server(slot);
        server.ports = counts.ports;
        server.agent_draining = counts.draining;
        server.agent_not_ready = counts.not_ready;
        server.returning = counts.returning;
        server.spent = counts.spent;
        server.further = counts.further;
        server.report.0 += 1;
    }

    /// Follows `table`: its policy, which rows are `Draining` or not ready, and which
    /// are gone.
    pub(super) fn follow(&mut self, table: &Table) {
        self.policy = table.load_sharing.policy;
        for row in &table.rows {
            let server = self.server(row.slot);
            server.row_draining = row.state == RowState::Draining;
            server.row_not_ready = row.not_ready;
        }
        self.loads.retain(|&slot, _| table.row(slot).is_some());
    }

    /// The number of the last report of `slot`.
    pub(super) fn report_of(&self, slot: Slot) -> ReportNumber {
        self.get(slot).map_or(ReportNumber(0), |load| load.report)
    }

    /// The entries with a port to spare on any server.
    pub(super) fn free_entries(&self) -> FreeEntries<'_> {
        let takers = self.loads().filter(|server| server.takes_sessions());
        let free = takers.flat_map(|server| {
            let has_free = |ports: &&PortState| server.free(ports) > 0;
            server.ports.iter().filter(has_free)
        });
        let entries = free.map(|ports| (ports.name.as_str(), ports.protocol));
        FreeEntries {
            servers: self,
            entries: entries.collect(),
        }
    }

    /// Ports that are free now.
    #[must_use]
    pub fn free_ports(&self) -> u32 {
        let takers = self.loads().filter(|server| server.takes_sessions());
        takers
            .flat_map(|server| server.ports.iter().map(|ports| server.free(ports)))
            .sum()
    }

    /// The number of servers that would take sessions if their workloads were ready.
    #[must_use]
    pub fn not_ready(&self) -> usize {
        let waiting = self.loads().filter(|server| server.waits_to_be_ready());
        waiting.count()
    }

    /// Whether ports are about to become free.
    pub(super) fn has_returning(&self) -> bool {
        let mut takers = self.loads().filter(|server| server.takes_sessions());
        takers.any(|server| server.returning > 0)
    }

    /// Reserves a server for a request, among those that are not `excluded`;
    /// that is asked with the number of their last report. `None` when none has
    /// the ports to spare.
    pub(super) fn reserve(
        &mut self,
        blocks: &OneOrMore<Block>,
        affinity_key: Option<&str>,
        excluded: impl Fn(Slot, ReportNumber) -> bool,
    ) -> Option<Reservation> {
        let candidates = self
            .loads
            .iter()
            .filter(|(slot, server)| !excluded(**slot, server.report))
            .filter(|(_, server)| server.has_room(blocks))
            .map(|(&slot, server)| server.candidate(slot));
        let slot = choose(self.policy, candidates, affinity_key, self.last)?;
        self.last = Some(slot);
        let server = self.server(slot);
        let shares = server.shares(blocks, |it| server.free(it))?;
        server.reserve(&shares);
        Some(Reservation {
            slot,
            shares,
            is_look: false,
        })
    }

    /// Reserves a server that may have the ports for a request by now, although it
    /// has reported too few: its workload did not listen on some that `may_open`, and
    /// the agent looks again when it is asked. As [`Servers::reserve`] otherwise.
    pub(super) fn reserve_to_look(
        &mut self,
        blocks: &OneOrMore<Block>,
        affinity_key: Option<&str>,
        excluded: impl Fn(Slot, ReportNumber) -> bool,
        may_open: impl Fn(Slot, &PortState) -> bool,
        now: Instant,
    ) -> Option<Reservation> {
        let may_open = |slot, ports: &PortState| ports.not_listening > 0 && may_open(slot, ports);
        let after_look =
            |slot, server: &ServerLoad| server.shares_after_look(blocks, |it| may_open(slot, it));
        let candidates = self
            .loads
            .iter()
            .filter(|(slot, server)| !excluded(**slot, server.report) && server.may_look(now))
            .filter(|(slot, server)| after_look(**slot, server).is_some())
            .map(|(&slot, server)| server.candidate(slot));
        let slot = choose(self.policy, candidates, affinity_key, self.last)?;
        let server = self.server(slot);
        server.asked_to_look = Some(now);
        let shares = after_look(slot, server)?;
        server.is_looking = true;
        server.reserve(&shares);
        Some(Reservation {
            slot,
            shares,
            is_look: true,
        })
    }

    /// The server has answered a reservation, or never will.
    pub(super) fn settle(&mut self, reservation: &Reservation) {
        if let Some(server) = self.loads.get_mut(&reservation.slot) {
            server.settle(&reservation.shares);
            server.is_looking &= !reservation.is_look;
        }
    }

    /// The server whose ports are to be kept for a request for `blocks`: the one
    /// that lacks the fewest sessions' ends, as far as is known, among those that are
    /// not `hopeless`.
    pub(super) fn to_keep(
        &self,
        blocks: &OneOrMore<Block>,
        only: Option<Slot>,
        hopeless: impl Fn(Slot, ReportNumber) -> bool,
    ) -> Option<Slot> {
        let may_be_kept = |slot: &Slot| {
            only.is_none_or(|only| only == *slot) && self.may_be_kept(*slot, blocks, &hopeless)
        };
        let load = |slot: &Slot| {
            let server = self.get(*slot);
            let usable = server.into_iter().flat_map(|server| server.usable(blocks));
            (usable.map(in_use).sum::<u32>(), *slot)
        };
        self.loads
            .keys()
            .copied()
            .filter(may_be_kept)
            .min_by_key(load)
    }

    /// Whether a request for `blocks` can be served in `slot` once sessions there are
    /// over. One that is `hopeless` has refused it as it is, so that it must have
    /// sessions that can end.
    pub(super) fn may_be_kept(
        &self,
        slot: Slot,
        blocks: &OneOrMore<Block>,
        hopeless: impl Fn(Slot, ReportNumber) -> bool,
    ) -> bool {
        self.get(slot).is_some_and(|server| {
            let has_sessions = || server.usable(blocks).any(|ports| in_use(ports) > 0);
            server.could_have_room(blocks) && (has_sessions() || !hopeless(slot, server.report))
        })
    }

    /// Why no server is reserved for a request for `blocks`, or not the server `only`
    /// where the request is for that. It gets none of the ports in the slot `kept`.
    pub(super) fn reason(
        &self,
        blocks: &OneOrMore<Block>,
        only: Option<Slot>,
        kept: Option<Slot>,
    ) -> Refusal {
        let is_usable = |slot: &Slot| only.is_none_or(|only| only == *slot);
        let usable = self.loads.iter().filter(|(slot, _)| is_usable(slot));
        let usable: Vec<(Slot, &ServerLoad)> = usable.map(|(slot, it)| (*slot, it)).collect();
        let loads = || usable.iter().map(|(_, server)| *server);
        let (mut free, mut kept_free, mut occupied, mut silent) = (0, 0, 0, 0);
        for (slot, server) in usable.iter().filter(|(_, it)| it.takes_sessions()) {
            for ports in server.usable(blocks) {
                let left = server.free(ports);
                if kept == Some(*slot) {
                    kept_free += left;
                } else {
                    free += left;
                }
                occupied += in_use(ports) + (ports.free - left);
                silent += ports.not_listening;
            }
        }
        let spent = loads().filter(|server| server.is_spent());
        occupied += spent
            .flat_map(|server| server.usable(blocks))
            .map(in_use)
            .sum::<u32>();
        let not_ready = loads().filter(|server| server.waits_to_be_ready()).count();
        let mut takers = loads().filter(|server| server.takes_sessions()).peekable();
        if blocks.as_single().is_none() && takers.peek().is_some() {
            if !takers.any(|server| server.knows_several_ports) {
                return Refusal::AgentsTooOld;
            }
            if free + kept_free + occupied > 0 {
                return Refusal::NotTogether(blocks.ports());
            }
        }
        match (free, occupied, silent) {
            (0, _, _) if kept_free > 0 => Refusal::Kept(kept_free),
            (1.., _, _) => Refusal::NotSelected,
            (0, 1.., _) => Refusal::AllInUse {
                in_use: occupied,
                not_listening: silent,
                not_ready,
            },
            (0, 0, 1..) => Refusal::NotListening {
                ports: silent,
                not_ready,
            },
            (0, 0, 0) if not_ready > 0 => Refusal::NotReady(not_ready),
            (0, 0, 0) => {
                let mut attached = loads().filter(|server| server.attached);
                let is_removed = attached.next().is_some_and(ServerLoad::is_draining);
                if is_removed && attached.all(ServerLoad::is_draining) {
                    Refusal::Draining
                } else {
                    Refusal::Starting
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
