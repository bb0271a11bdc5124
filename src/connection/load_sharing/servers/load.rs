//! A processing server as load sharing sees it: what its agent reported last, what
//! its row says, and the requests on their way to it.

use std::time::{Duration, Instant};

use crate::connection::load_sharing::policy::Candidate;
use crate::pool::PortProtocol;
use crate::selection::Counts;
use crate::session::{Block, OneOrMore, PortFilter, PortState};
use crate::table::{Row, RowState, Slot};

/// Shortest time between two questions to a server for ports that it reported as not
/// listening: that for which its agent does not look again. So many requests in a full
/// pool cost no more than one.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// Ports of one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Share {
    entry: Entry,
    ports: u32,
}

/// Name and protocol of a port entry.
type Entry = (String, PortProtocol);

fn entry(ports: &PortState) -> Entry {
    (ports.name.clone(), ports.protocol)
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
    pub(super) row_not_ready: bool,
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
    pub(super) returning: u32,
    /// Its ports that count as in use besides one for each session.
    further: u32,
    /// Whether its agent knows sessions of several ports.
    pub(super) knows_several_ports: bool,
    /// The number of requests on their way to it.
    asked: u32,
    /// Their ports, by entry: few, and looked through often.
    reserved: Vec<Share>,
    /// The number of the last report.
    pub(super) report: ReportNumber,
    /// When it was last asked for a port that it had reported as not listening.
    asked_to_look: Option<Instant>,
    /// Whether it has yet to answer that.
    is_looking: bool,
}

impl ServerLoad {
    /// Its agent's stream is up; it counts from its first counts on.
    pub(super) fn attach(&mut self, knows_several_ports: bool) {
        self.attached = true;
        self.knows_several_ports = knows_several_ports;
    }

    /// Its agent's stream is down: no request goes to it, and those on their way are
    /// lost. What its row says, and whether it was being removed, holds on.
    pub(super) fn detach(&mut self) {
        self.attached = false;
        self.ports.clear();
        self.returning = 0;
        self.agent_not_ready = false;
        self.spent = false;
        self.further = 0;
        self.asked = 0;
        self.is_looking = false;
        self.reserved.clear();
    }

    /// Its agent has reported its ports.
    pub(super) fn counted(&mut self, counts: Counts) {
        self.ports = counts.ports;
        self.agent_draining = counts.draining;
        self.agent_not_ready = counts.not_ready;
        self.returning = counts.returning;
        self.spent = counts.spent;
        self.further = counts.further;
        self.report.0 += 1;
    }

    /// Follows its row.
    pub(super) fn follow(&mut self, row: &Row) {
        self.row_draining = row.state == RowState::Draining;
        self.row_not_ready = row.not_ready;
    }

    /// It is asked at `now` to look at its ports that are not listening.
    pub(super) fn begin_look(&mut self, now: Instant) {
        self.asked_to_look = Some(now);
        self.is_looking = true;
    }

    /// It has answered that, or never will.
    pub(super) fn end_look(&mut self) {
        self.is_looking = false;
    }

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
    pub(super) fn waits_to_be_ready(&self) -> bool {
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
    pub(super) fn free(&self, ports: &PortState) -> u32 {
        let is_same = |(name, protocol): &Entry| *name == ports.name && *protocol == ports.protocol;
        let reserved = self.reserved.iter().find(|it| is_same(&it.entry));
        let reserved = reserved.map_or(0, |share| share.ports);
        ports.free.saturating_sub(reserved)
    }

    pub(super) fn reserve(&mut self, shares: &OneOrMore<Share>) {
        self.asked += 1;
        for share in shares.iter() {
            match self.reserved.iter_mut().find(|it| it.entry == share.entry) {
                Some(reserved) => reserved.ports += share.ports,
                None => self.reserved.push(share.clone()),
            }
        }
    }

    pub(super) fn settle(&mut self, shares: &OneOrMore<Share>) {
        self.asked = self.asked.saturating_sub(1);
        for share in shares.iter() {
            if let Some(reserved) = self.reserved.iter_mut().find(|it| it.entry == share.entry) {
                reserved.ports -= share.ports;
            }
        }
        self.reserved.retain(|share| share.ports > 0);
    }

    /// The reports on entries that serve one of `blocks`.
    pub(super) fn usable<'a>(
        &'a self,
        blocks: &'a OneOrMore<Block>,
    ) -> impl Iterator<Item = &'a PortState> {
        let admits = |ports: &&PortState| {
            let mut blocks = blocks.iter();
            blocks.any(|block| block.filter.admits(&ports.name, ports.protocol))
        };
        self.ports.iter().filter(admits)
    }

    /// What `blocks` take of the entries, which have as many ports as `amount` says;
    /// `None` if they do not have enough. Which of these are adjacent is not known
    /// here. Where the blocks do not fit one after another but may in another
    /// arrangement, the shares are a guess: the agent finds out.
    pub(super) fn shares(
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
        if let Some(placed) = placed {
            return OneOrMore::new(placed);
        }
        let amounts: Vec<_> = self
            .ports
            .iter()
            .map(|it| (it.name.as_str(), it.protocol, amount(it)))
            .collect();
        if !blocks.may_fit(&amounts) {
            return None;
        }
        let shares = blocks.iter().filter_map(|block| {
            let usable = self.matching(&block.filter);
            let most = usable.max_by_key(|it| amount(it))?;
            Some(Share {
                entry: entry(most),
                ports: block.ports(),
            })
        });
        OneOrMore::new(shares)
    }

    /// Whether it has a port to spare that `filter` admits.
    pub(super) fn has_one(&self, filter: &PortFilter) -> bool {
        self.takes_sessions() && self.matching(filter).any(|it| self.free(it) > 0)
    }

    /// Whether it has the ports to spare that `blocks` ask for, as far as it has
    /// reported.
    pub(in crate::connection::load_sharing) fn has_room(&self, blocks: &OneOrMore<Block>) -> bool {
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
    pub(super) fn shares_after_look(
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
    pub(super) fn could_have_room(&self, blocks: &OneOrMore<Block>) -> bool {
        let offered = |ports: &PortState| ports.free + in_use(ports);
        self.takes_sessions() && self.knows_several_ports && self.shares(blocks, offered).is_some()
    }

    /// Whether requests for `blocks` and for `others` could use the same ports.
    pub(in crate::connection::load_sharing) fn is_shared(
        &self,
        blocks: &OneOrMore<Block>,
        others: &OneOrMore<Block>,
    ) -> bool {
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
    pub(super) fn may_look(&self, now: Instant) -> bool {
        let asked = self.asked_to_look;
        let is_allowed = asked.is_none_or(|asked| now >= asked + LOOK_AGAIN_AFTER);
        self.takes_sessions() && !self.is_looking && is_allowed
    }

    pub(super) fn candidate(&self, slot: Slot) -> Candidate {
        Candidate {
            slot,
            sessions: self.sessions() + self.asked,
        }
    }
}

pub(super) fn in_use(ports: &PortState) -> u32 {
    ports.held + ports.busy + ports.lingering
}
