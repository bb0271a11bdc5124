//! What every processing server's agent reported last, and which server a
//! request is sent to. A plain struct: no I/O, no locks, no clock.
//!
//! A [`Reservation`] is a request on its way to a server. It counts against one
//! port of one entry there, until the server's answer comes with the counts
//! after it: both are applied in one step, so each port in flight is counted
//! once. The server alone decides; a reservation only keeps two requests from
//! being sent after the same last port.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::policy::{Candidate, choose};
use super::refusal::Refusal;
use crate::pool::{Policy, PortProtocol};
use crate::selection::Counts;
use crate::session::{PortFilter, PortState};
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
    /// The port entry on which it counts. The server may select a port of
    /// another one that the request can use; its answer says so.
    entry: Entry,
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
            return server.is_some_and(|server| server.has_room(filter));
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
    /// The requests on their way to it, by entry: few, and looked through often.
    reserved: Vec<(Entry, u32)>,
    /// The number of the last report.
    report: ReportNumber,
    /// When it was last asked for a port that it had reported as not listening.
    asked_to_look: Option<Instant>,
}

impl ServerLoad {
    /// Live sessions, as last reported.
    #[must_use]
    pub fn sessions(&self) -> u32 {
        self.ports.iter().map(in_use).sum()
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
        let reserved = self.reserved.iter().find(|(entry, _)| is_same(entry));
        let reserved = reserved.map_or(0, |(_, count)| *count);
        ports.free.saturating_sub(reserved)
    }

    fn reserve(&mut self, entry: &Entry) {
        match self.reserved.iter_mut().find(|(it, _)| it == entry) {
            Some((_, count)) => *count += 1,
            None => self.reserved.push((entry.clone(), 1)),
        }
    }

    fn settle(&mut self, entry: &Entry) {
        if let Some((_, count)) = self.reserved.iter_mut().find(|(it, _)| it == entry) {
            *count -= 1;
        }
        self.reserved.retain(|(_, count)| *count > 0);
    }

    /// The reports on entries that serve `filter`.
    fn matching(&self, filter: &PortFilter) -> impl Iterator<Item = &PortState> {
        let admits = |ports: &&PortState| filter.admits(&ports.name, ports.protocol);
        self.ports.iter().filter(admits)
    }

    fn has_room(&self, filter: &PortFilter) -> bool {
        self.takes_sessions() && self.matching(filter).any(|it| self.free(it) > 0)
    }

    /// Whether it may be asked at `now` to look at its ports that are not listening.
    fn may_look(&self, now: Instant) -> bool {
        let asked = self.asked_to_look;
        self.takes_sessions() && asked.is_none_or(|asked| now >= asked + LOOK_AGAIN_AFTER)
    }

    fn candidate(&self, slot: Slot) -> Candidate {
        Candidate {
            slot,
            sessions: self.sessions() + self.reserved.iter().map(|(_, count)| count).sum::<u32>(),
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
    pub(super) fn attach(&mut self, slot: Slot) {
        self.server(slot).attached = true;
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
    /// a port to spare.
    pub(super) fn reserve(
        &mut self,
        filter: &PortFilter,
        affinity_key: Option<&str>,
        excluded: impl Fn(Slot, ReportNumber) -> bool,
    ) -> Option<Reservation> {
        let candidates = self
            .loads
            .iter()
            .filter(|(slot, server)| !excluded(**slot, server.report))
            .filter(|(_, server)| server.has_room(filter))
            .map(|(&slot, server)| server.candidate(slot));
        let slot = choose(self.policy, candidates, affinity_key, self.last)?;
        self.last = Some(slot);
        let server = self.server(slot);
        // The fullest supply is most likely where the agent selects from.
        let most = server.matching(filter).max_by_key(|it| server.free(it));
        let entry = entry(most?);
        server.reserve(&entry);
        Some(Reservation { slot, entry })
    }

    /// Reserves a server that may have a port for a request by now, although it has
    /// reported none: its workload did not listen on some that `may_open`, and the
    /// agent looks again when it is asked. As [`Servers::reserve`] otherwise.
    pub(super) fn reserve_to_look(
        &mut self,
        filter: &PortFilter,
        affinity_key: Option<&str>,
        excluded: impl Fn(Slot, ReportNumber) -> bool,
        may_open: impl Fn(Slot, &PortState) -> bool,
        now: Instant,
    ) -> Option<Reservation> {
        let may_open = |slot, ports: &PortState| ports.not_listening > 0 && may_open(slot, ports);
        let candidates = self
            .loads
            .iter()
            .filter(|(slot, server)| !excluded(**slot, server.report) && server.may_look(now))
            .filter(|(slot, server)| server.matching(filter).any(|it| may_open(**slot, it)))
            .map(|(&slot, server)| server.candidate(slot));
        let slot = choose(self.policy, candidates, affinity_key, self.last)?;
        let server = self.server(slot);
        server.asked_to_look = Some(now);
        let entry = entry(server.matching(filter).find(|it| may_open(slot, it))?);
        server.reserve(&entry);
        Some(Reservation { slot, entry })
    }

    /// The server has answered a reservation, or never will.
    pub(super) fn settle(&mut self, reservation: &Reservation) {
        if let Some(server) = self.loads.get_mut(&reservation.slot) {
            server.settle(&reservation.entry);
        }
    }

    /// Why no server is reserved for a request with `filter`, or not the server
    /// `only` where the request is for that.
    pub(super) fn reason(&self, filter: &PortFilter, only: Option<Slot>) -> Refusal {
        let is_usable = |slot: &Slot| only.is_none_or(|only| only == *slot);
        let usable = self.loads.iter().filter(|(slot, _)| is_usable(slot));
        let usable: Vec<&ServerLoad> = usable.map(|(_, server)| server).collect();
        let loads = || usable.iter().copied();
        let (mut free, mut occupied, mut silent) = (0, 0, 0);
        for server in loads().filter(|server| server.takes_sessions()) {
            for ports in server.matching(filter) {
                let left = server.free(ports);
                free += left;
                occupied += in_use(ports) + (ports.free - left);
                silent += ports.not_listening;
            }
        }
        let spent = loads().filter(|server| server.is_spent());
        occupied += spent
            .flat_map(|server| server.matching(filter))
            .map(in_use)
            .sum::<u32>();
        let not_ready = loads().filter(|server| server.waits_to_be_ready()).count();
        match (free, occupied, silent) {
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
