//! What every processing server's agent reported last, and which server a
//! request is sent to. A plain struct: no I/O, no locks, no clock.
//!
//! A [`Reservation`] is a request on its way to a server. It counts against the
//! ports of the entries there, until the server's answer comes with the counts
//! after it: both are applied in one step, so each port in flight is counted
//! once. The server alone decides; a reservation only keeps two requests from
//! being sent after the same last port. `load` is one server; this file is all.

mod load;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

pub use self::load::{ReportNumber, ServerLoad};
use self::load::{Share, in_use};
use super::policy::choose;
use super::refusal::Refusal;
use crate::pool::{Policy, PortProtocol};
use crate::selection::Counts;
use crate::session::{Block, OneOrMore, PortState};
use crate::table::{Slot, Table};

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

/// Port entries with a port to spare: few, the same on every server.
#[derive(Clone, Debug)]
pub(super) struct FreeEntries<'a> {
    servers: &'a Servers,
    /// The most ports of each entry that one server has to spare.
    most: BTreeMap<(&'a str, PortProtocol), u32>,
}

impl FreeEntries<'_> {
    /// Whether the server `only`, or any that is not among `excluded`, may have the ports
    /// for `blocks` to spare. For one port on any server, and for all on one, that is
    /// certain as far as is known.
    pub(super) fn may_serve(
        &self,
        blocks: &OneOrMore<Block>,
        only: Option<Slot>,
        excluded: &BTreeSet<Slot>,
    ) -> bool {
        let has_room =
            |slot: Slot, server: &ServerLoad| !excluded.contains(&slot) && server.has_room(blocks);
        if let Some(slot) = only {
            let server = self.servers.get(slot);
            return server.is_some_and(|server| has_room(slot, server));
        }
        let is_somewhere = blocks.iter().all(|block| {
            let mut entries = self.most.iter();
            entries.any(|((name, protocol), most)| {
                block.filter.admits(name, *protocol) && *most >= block.ports()
            })
        });
        let mut loads = self.servers.loads.iter();
        is_somewhere && (excluded.is_empty() || loads.any(|(slot, it)| has_room(*slot, it)))
    }
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

    /// The slots of all servers.
    pub(super) fn slots(&self) -> impl Iterator<Item = Slot> {
        self.loads.keys().copied()
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
        self.server(slot).attach(knows_several_ports);
    }

    /// An agent's stream is down: no request goes to the server, and those on
    /// their way are lost.
    pub(super) fn detach(&mut self, slot: Slot) {
        self.server(slot).detach();
    }

    /// An agent reported its ports.
    pub(super) fn counted(&mut self, slot: Slot, counts: Counts) {
        self.server(slot).counted(counts);
    }

    /// Follows `table`: its policy, which rows are `Draining` or not ready, and which
    /// are gone.
    pub(super) fn follow(&mut self, table: &Table) {
        self.policy = table.load_sharing.policy;
        for row in &table.rows {
            self.server(row.slot).follow(row);
        }
        self.loads.retain(|&slot, _| table.row(slot).is_some());
    }

    /// The number of the last report of `slot`.
    pub(super) fn report_of(&self, slot: Slot) -> ReportNumber {
        self.get(slot)
            .map_or_else(ReportNumber::default, |load| load.report)
    }

    /// The entries with a port to spare on any server.
    pub(super) fn free_entries(&self) -> FreeEntries<'_> {
        let mut entries: BTreeMap<_, u32> = BTreeMap::new();
        for server in self.loads().filter(|server| server.takes_sessions()) {
            for ports in &server.ports {
                let free = server.free(ports);
                if free > 0 {
                    let most = entries.entry((ports.name.as_str(), ports.protocol));
                    let most = most.or_default();
                    *most = free.max(*most);
                }
            }
        }
        FreeEntries {
            servers: self,
            most: entries,
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
        let shares = after_look(slot, server)?;
        server.begin_look(now);
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
            if reservation.is_look {
                server.end_look();
            }
        }
    }

    /// The server whose ports are to be kept for a request for `blocks`: the one
    /// that lacks the fewest sessions' ends, as far as is known, among those that it
    /// `may_use` and that are not `hopeless`.
    pub(super) fn to_keep(
        &self,
        blocks: &OneOrMore<Block>,
        may_use: impl Fn(Slot) -> bool,
        hopeless: impl Fn(Slot, ReportNumber) -> bool,
    ) -> Option<Slot> {
        let may_be_kept =
            |slot: &Slot| may_use(*slot) && self.may_be_kept(*slot, blocks, &hopeless);
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
        let known = free + kept_free + occupied + silent;
        if blocks.as_single().is_none()
            && let Some(refusal) =
                reason_for_several(blocks, &loads().collect::<Vec<_>>(), known, not_ready)
        {
            return refusal;
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
                listening: 0,
                not_ready,
            },
            (0, 0, 0) if not_ready > 0 => Refusal::NotReady(not_ready),
            (0, 0, 0) => reason_without_ports(loads()),
        }
    }
}

/// Why `servers` have none of the ports of a request for `blocks`, several ones, if a
/// server that takes sessions is among them. `known` is the number of matching ports
/// of these, and `not_ready` that of those that are not ready.
fn reason_for_several(
    blocks: &OneOrMore<Block>,
    servers: &[&ServerLoad],
    known: u32,
    not_ready: usize,
) -> Option<Refusal> {
    let takers = || servers.iter().filter(|server| server.takes_sessions());
    takers().next()?;
    if !takers().any(|server| server.knows_several_ports) {
        return Some(Refusal::AgentsTooOld);
    }
    let usable = takers().flat_map(|server| server.usable(blocks));
    let not_listening: u32 = usable.map(|ports| ports.not_listening).sum();
    let may_have_room = takers().any(|server| server.could_have_room(blocks));
    match (may_have_room, not_listening, not_ready) {
        (false, 1.., _) => Some(Refusal::NotListening {
            ports: not_listening,
            listening: known - not_listening,
            not_ready,
        }),
        (false, 0, 1..) => Some(Refusal::NotReady(not_ready)),
        _ if known == 0 => None,
        _ => Some(Refusal::NotTogether {
            ports: blocks.ports(),
            not_listening,
            not_ready,
        }),
    }
}

/// Why no port is known of `servers`, which are all ready. One that has had its
/// sessions is replaced, and its row drains meanwhile.
fn reason_without_ports<'a>(servers: impl Iterator<Item = &'a ServerLoad>) -> Refusal {
    let attached: Vec<&ServerLoad> = servers.filter(|server| server.attached).collect();
    if attached.iter().any(|server| server.is_spent()) {
        Refusal::BeingReplaced
    } else if !attached.is_empty() && attached.iter().all(|server| server.is_draining()) {
        Refusal::Draining
    } else {
        Refusal::Starting
    }
}

#[cfg(test)]
mod tests;
