//! The load sharing part: a plain struct that knows what every processing
//! server's agent reported last, chooses one for a request, and keeps the
//! requests that wait, in order. No I/O, no locks, no clock.
//!
//! ```text
//! agents ─counts→ LoadSharing ←reserve─ requests
//!                      └─wake→ requests that waited
//! ```
//!
//! A reservation is a request on its way to a server: it counts against the
//! server's free ports until the server's answer [settles](LoadSharing::settle)
//! it. The server alone decides; a reservation only keeps two requests from
//! being sent after the same last port.

use std::collections::BTreeMap;

use super::policy::{Candidate, choose};
use crate::pool::{Policy, PortProtocol};
use crate::session::PortState;
use crate::table::Slot;

/// Most requests that wait at once; more are refused at once. At about 500
/// bytes a request, 5 MB.
pub const MAX_WAITING: usize = 10_000;

/// Which ports a request can use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Filter {
    /// Only ports of this name.
    pub port_name: Option<String>,
    /// Only ports that forward this protocol; a `TCPUDP` port forwards all.
    pub protocol: Option<Protocols>,
}

/// Orders protocols so that filters can be map keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocols {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// TCP and UDP on one port.
    Both,
}

impl From<PortProtocol> for Protocols {
    fn from(protocol: PortProtocol) -> Self {
        match protocol {
            PortProtocol::TCP => Self::Tcp,
            PortProtocol::UDP => Self::Udp,
            PortProtocol::TCPUDP => Self::Both,
        }
    }
}

impl Protocols {
    /// The name used in the selection protocol.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => PortProtocol::TCP.name(),
            Self::Udp => PortProtocol::UDP.name(),
            Self::Both => PortProtocol::TCPUDP.name(),
        }
    }
}

impl Filter {
    /// Whether a port of this name and protocol serves the request.
    #[must_use]
    pub fn admits(&self, name: &str, protocol: PortProtocol) -> bool {
        let protocol_fits = match self.protocol {
            None => true,
            Some(Protocols::Tcp) => protocol.has_tcp(),
            Some(Protocols::Udp) => protocol.has_udp(),
            Some(Protocols::Both) => protocol == PortProtocol::TCPUDP,
        };
        protocol_fits
            && self
                .port_name
                .as_deref()
                .is_none_or(|wanted| wanted == name)
    }

    /// Whether a port may exist that serves both; errs towards yes.
    fn overlaps(&self, other: &Self) -> bool {
        match (&self.port_name, &other.port_name) {
            (Some(one), Some(another)) => one == another,
            _ => true,
        }
    }
}

/// A processing server as load sharing sees it.
#[derive(Clone, Debug, Default)]
pub struct Server {
    /// Its agent's stream is up.
    pub attached: bool,
    /// Its row says that it takes nothing new.
    pub row_draining: bool,
    /// Its agent says that it takes nothing new.
    pub agent_draining: bool,
    /// What its agent reported last.
    pub ports: Vec<PortState>,
    /// Requests on their way to it, by what they ask for.
    reserved: BTreeMap<Filter, u32>,
}

impl Server {
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

    fn free(&self, filter: &Filter) -> u32 {
        let reported: u32 = self
            .ports
            .iter()
            .filter(|ports| filter.admits(&ports.name, ports.protocol))
            .map(|ports| ports.free)
            .sum();
        let reserved = self
            .reserved
            .iter()
            .filter(|(other, _)| filter.overlaps(other))
            .map(|(_, count)| count)
            .sum();
        reported.saturating_sub(reserved)
    }

    fn candidate(&self, slot: Slot, filter: &Filter) -> Option<Candidate> {
        let has_room = self.takes_sessions() && self.free(filter) > 0;
        has_room.then(|| Candidate {
            slot,
            sessions: self.sessions() + self.reserved.values().sum::<u32>(),
        })
    }
}

/// Names a waiting request; smaller ones came earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place(u64);

/// A request that waits.
#[derive(Clone, Debug)]
struct Waiting {
    affinity_key: Option<String>,
}

/// The processing servers' counts and the requests that wait for them.
#[derive(Clone, Debug, Default)]
pub struct LoadSharing {
    policy: Policy,
    servers: BTreeMap<Slot, Server>,
    last: Option<Slot>,
    next_place: u64,
    // By filter first: a request that cannot be served must not make every
    // later one be looked at again and again.
    waiting: BTreeMap<Filter, BTreeMap<Place, Waiting>>,
}

impl LoadSharing {
    /// Sets the policy.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// The servers by slot.
    #[must_use]
    pub fn servers(&self) -> &BTreeMap<Slot, Server> {
        &self.servers
    }

    /// The server of `slot`, made when unknown.
    pub fn server(&mut self, slot: Slot) -> &mut Server {
        self.servers.entry(slot).or_default()
    }

    /// Forgets slots that `keep` does not name.
    pub fn retain(&mut self, keep: impl Fn(Slot) -> bool) {
        self.servers.retain(|&slot, _| keep(slot));
    }

    /// Number of requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.values().map(BTreeMap::len).sum()
    }

    /// Ports that are free now.
    #[must_use]
    pub fn free_ports(&self) -> u32 {
        let any = Filter::default();
        self.servers
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
        filter: &Filter,
        affinity_key: Option<&str>,
        excluded: &[Slot],
    ) -> Option<Slot> {
        let overtakes = self
            .waiting
            .iter()
            .any(|(other, queue)| !queue.is_empty() && other.overlaps(filter));
        if overtakes {
            return None;
        }
        self.take(filter, affinity_key, excluded)
    }

    fn take(
        &mut self,
        filter: &Filter,
        affinity_key: Option<&str>,
        excluded: &[Slot],
    ) -> Option<Slot> {
        let candidates = self
            .servers
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

    /// The server has answered a reservation, or will not any more.
    pub fn settle(&mut self, slot: Slot, filter: &Filter) {
        let Some(server) = self.servers.get_mut(&slot) else {
            return;
        };
        if let Some(count) = server.reserved.get_mut(filter) {
            *count -= 1;
            if *count == 0 {
                server.reserved.remove(filter);
            }
        }
    }

    /// Lets a request wait; `place` keeps the place of one that waited before.
    /// `None` when [`MAX_WAITING`] wait already.
    pub fn wait(
        &mut self,
        filter: &Filter,
        affinity_key: Option<&str>,
        place: Option<Place>,
    ) -> Option<Place> {
        if self.waiting() >= MAX_WAITING {
            return None;
        }
        let place = place.unwrap_or_else(|| {
            self.next_place += 1;
            Place(self.next_place)
        });
        let affinity_key = affinity_key.map(str::to_owned);
        self.waiting
            .entry(filter.clone())
            .or_default()
            .insert(place, Waiting { affinity_key });
        Some(place)
    }

    /// Takes a request out of the queue: it gave up.
    pub fn leave(&mut self, filter: &Filter, place: Place) {
        if let Some(queue) = self.waiting.get_mut(filter) {
            queue.remove(&place);
            if queue.is_empty() {
                self.waiting.remove(filter);
            }
        }
    }

    /// Reserves servers for requests that wait, earliest first, as far as free
    /// ports go: place, slot and filter of each. To be called after every change for the better.
    #[must_use]
    pub fn wake(&mut self) -> Vec<(Place, Slot, Filter)> {
        let mut woken = Vec::new();
        let mut stuck: Vec<Filter> = Vec::new();
        loop {
            let earliest = self
                .waiting
                .iter()
                .filter(|(filter, _)| !stuck.contains(filter))
                .filter_map(|(filter, queue)| {
                    let (place, waiting) = queue.first_key_value()?;
                    Some((*place, filter.clone(), waiting.affinity_key.clone()))
                })
                .min_by_key(|(place, _, _)| *place);
            let Some((place, filter, affinity_key)) = earliest else {
                return woken;
            };
            match self.take(&filter, affinity_key.as_deref(), &[]) {
                Some(slot) => {
                    self.leave(&filter, place);
                    woken.push((place, slot, filter));
                }
                None => stuck.push(filter),
            }
        }
    }
}

#[cfg(test)]
mod tests;
