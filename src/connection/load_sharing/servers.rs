//! The load servers part: a plain struct that knows what every processing
//! server's agent reported last, chooses one for a request, and keeps the
//! requests that wait, in order. No I/O, no locks, no clock.
//!
//! ```text
//! agents ─counts→ Servers ←reserve─ requests
//!                      └─wake→ requests that waited
//! ```
//!
//! A reservation is a request on its way to a server: it counts against the
//! server's free ports until the server's answer [settles](Servers::settle)
//! it. The server alone decides; a reservation only keeps two requests from
//! being sent after the same last port.

use std::collections::BTreeMap;

use super::policy::{Candidate, choose};
use crate::pool::Policy;
use crate::session::{PortFilter, PortState};
use crate::table::Slot;

/// Most requests that wait at once; more are refused at once. At about 500
/// bytes a request, 5 MB.
pub const MAX_WAITING: usize = 10_000;

/// Whether a port may exist that serves both; errs towards yes.
fn overlap(one: &PortFilter, another: &PortFilter) -> bool {
    match (&one.port_name, &another.port_name) {
        (Some(one), Some(another)) => one == another,
        _ => true,
    }
}

/// A processing server as load servers sees it.
#[derive(Clone, Debug, Default)]
pub struct ServerLoad {
    /// Whether its agent's stream is up.
    pub attached: bool,
    /// Whether its row says that it takes nothing new.
    pub row_draining: bool,
    /// Whether its agent says that it takes nothing new.
    pub agent_draining: bool,
    /// The ports that its agent reported last.
    pub ports: Vec<PortState>,
    /// The number of requests on their way to it, by filter.
    reserved: BTreeMap<PortFilter, u32>,
}

impl ServerLoad {
    /// Live sessions, as last reported.
    #[must_use]
    pub fn sessions(&self) -> u32 {
        self.ports
            .iter()
            .map(|ports| ports.held + ports.busy + ports.lingering)
            .sum()
    }

    /// Whether new sessions may go to it at all.
    #[must_use]
    pub fn takes_sessions(&self) -> bool {
        self.attached && !self.is_draining()
    }

    /// Whether it is being removed.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.row_draining || self.agent_draining
    }

    fn free(&self, filter: &PortFilter) -> u32 {
        let reported: u32 = self
            .ports
            .iter()
            .filter(|ports| filter.admits(&ports.name, ports.protocol))
            .map(|ports| ports.free)
            .sum();
        let reserved = self
            .reserved
            .iter()
            .filter(|(other, _)| overlap(filter, other))
            .map(|(_, count)| count)
            .sum();
        reported.saturating_sub(reserved)
    }

    fn candidate(&self, slot: Slot, filter: &PortFilter) -> Option<Candidate> {
        let has_room = self.takes_sessions() && self.free(filter) > 0;
        has_room.then(|| Candidate {
            slot,
            sessions: self.sessions() + self.reserved.values().sum::<u32>(),
        })
    }
}

/// The position of a request in the queue; smaller ones came earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueuePosition(u64);

/// A request that has waited, and the server that is reserved for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Woken {
    /// Its position in the queue.
    pub position: QueuePosition,
    /// The slot of the reserved server.
    pub slot: Slot,
    /// The ports that it can use.
    pub filter: PortFilter,
}

/// A request that waits.
#[derive(Clone, Debug)]
struct QueuedRequest {
    affinity_key: Option<String>,
}

/// The processing servers' counts and the requests that wait for them.
#[derive(Clone, Debug, Default)]
pub struct Servers {
    policy: Policy,
    loads: BTreeMap<Slot, ServerLoad>,
    last: Option<Slot>,
    next_position: u64,
    // By filter first: a request that cannot be served must not make every
    // later one be looked at again and again.
    waiting: BTreeMap<PortFilter, BTreeMap<QueuePosition, QueuedRequest>>,
}

impl Servers {
    /// Sets the policy.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// The server of `slot`, if its agent was attached before.
    #[must_use]
    pub fn get(&self, slot: Slot) -> Option<&ServerLoad> {
        self.loads.get(&slot)
    }

    /// All servers, by slot.
    pub fn loads(&self) -> impl Iterator<Item = &ServerLoad> {
        self.loads.values()
    }

    /// The server of `slot`, made when unknown.
    pub fn server(&mut self, slot: Slot) -> &mut ServerLoad {
        self.loads.entry(slot).or_default()
    }

    /// Forgets slots that `keep` does not name.
    pub fn retain(&mut self, keep: impl Fn(Slot) -> bool) {
        self.loads.retain(|&slot, _| keep(slot));
    }

    /// Number of requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.values().map(BTreeMap::len).sum()
    }

    /// Ports that are free now.
    #[must_use]
    pub fn free_ports(&self) -> u32 {
        let any = PortFilter::default();
        self.loads
            .values()
            .filter(|server| server.takes_sessions())
            .map(|server| server.free(&any))
            .sum()
    }

    /// Reserves a server for a new request, leaving out `excluded` ones.
    /// `None` when none has a port to spare, or when an earlier request waits
    /// for such a port.
    pub fn reserve(
        &mut self,
        filter: &PortFilter,
        affinity_key: Option<&str>,
        excluded: &[Slot],
    ) -> Option<Slot> {
        let overtakes = self
            .waiting
            .iter()
            .any(|(other, queue)| !queue.is_empty() && overlap(other, filter));
        if overtakes {
            return None;
        }
        self.take(filter, affinity_key, excluded)
    }

    fn take(
        &mut self,
        filter: &PortFilter,
        affinity_key: Option<&str>,
        excluded: &[Slot],
    ) -> Option<Slot> {
        let candidates = self
            .loads
            .iter()
            .filter(|(slot, _)| !excluded.contains(slot))
            .filter_map(|(&slot, server)| server.candidate(slot, filter));
        let slot = choose(self.policy, candidates, affinity_key, self.last)?;
        self.last = Some(slot);
        *self
            .server(slot)
            .reserved
            .entry(filter.clone())
            .or_default() += 1;
        Some(slot)
    }

    /// The server has answered a reservation, or never will.
    pub fn settle(&mut self, slot: Slot, filter: &PortFilter) {
        let Some(server) = self.loads.get_mut(&slot) else {
            return;
        };
        if let Some(count) = server.reserved.get_mut(filter) {
            *count -= 1;
            if *count == 0 {
                server.reserved.remove(filter);
            }
        }
    }

    /// Lets a request wait; `position` is that of a request that waited before.
    /// `None` when [`MAX_WAITING`] wait already.
    pub fn wait(
        &mut self,
        filter: &PortFilter,
        affinity_key: Option<&str>,
        position: Option<QueuePosition>,
    ) -> Option<QueuePosition> {
        if self.waiting() >= MAX_WAITING {
            return None;
        }
        let position = position.unwrap_or_else(|| {
            self.next_position += 1;
            QueuePosition(self.next_position)
        });
        let affinity_key = affinity_key.map(str::to_owned);
        self.waiting
            .entry(filter.clone())
            .or_default()
            .insert(position, QueuedRequest { affinity_key });
        Some(position)
    }

    /// Takes a request out of the queue: it gave up.
    pub fn leave(&mut self, filter: &PortFilter, position: QueuePosition) {
        if let Some(queue) = self.waiting.get_mut(filter) {
            queue.remove(&position);
            if queue.is_empty() {
                self.waiting.remove(filter);
            }
        }
    }

    /// Reserves servers for requests that wait, earliest first, for as long as
    /// ports are free. It must be called after every change that may free one.
    #[must_use]
    pub fn wake(&mut self) -> Vec<Woken> {
        let mut woken = Vec::new();
        let mut stuck: Vec<PortFilter> = Vec::new();
        loop {
            let earliest = self
                .waiting
                .iter()
                .filter(|(filter, _)| !stuck.contains(filter))
                .filter_map(|(filter, queue)| {
                    let (position, waiting) = queue.first_key_value()?;
                    Some((*position, filter.clone(), waiting.affinity_key.clone()))
                })
                .min_by_key(|(position, _, _)| *position);
            let Some((position, filter, affinity_key)) = earliest else {
                return woken;
            };
            match self.take(&filter, affinity_key.as_deref(), &[]) {
                Some(slot) => {
                    self.leave(&filter, position);
                    woken.push(Woken {
                        position,
                        slot,
                        filter,
                    });
                }
                None => stuck.push(filter),
            }
        }
    }
}

#[cfg(test)]
mod tests;
