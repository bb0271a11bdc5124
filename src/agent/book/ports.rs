//! The ports of the book: which exist, which the workload listens on, which
//! are free and since when. Sessions are ids here.
//!
//! ```text
//!              occupy               vacate: nothing connected, or
//!   free ─────────────→ occupied    the sockets are proven
//!    ↑ ↓ a socket goes    │  └──────────────────────────────→ free
//!    ↑ ↓ or comes         │ vacate
//!   not listening         ↓                a socket is gone
//!         ↑            on trial ─────────────────────────────→ not listening
//!         │               └─ each socket is new, or proven,
//!         │                  or still there at the end ─────→ free
//!         └ not all protocols of the entry have a socket, or none has
//!           one where any will do
//! ```
//!
//! A port is free only if all its sockets were seen after its last session ended,
//! and are not about to go with that session. Programs that serve one client and
//! end would give the next one a reset. What one socket of an entry has proven
//! holds for the entry's other ports too, until one of their sockets goes: from
//! then on each socket must prove itself. `trial` decides that. The entry's offer
//! says which sockets a port needs: all, any, or none; ports that need none are not
//! looked at.
//!
//! - `group`: the ports of one entry; `trial`: which sockets have proven themselves;
//!   `block`: adjacent ports for a request of several.

mod block;
mod group;
mod trial;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub(super) use self::group::Occupancy;
use self::group::{Group, Vacancy};
use self::trial::Trial;
use super::listening::{Listening, ServerPort, Sight, SocketId};
use crate::pool::{Offer, PortProtocol};
use crate::session::{Block, OneOrMore, PortFilter, PortState, SessionId};
use crate::table::{ListenPort, Row, TargetPort};

/// The session on a port.
#[derive(Clone, Debug)]
struct Occupant {
    session: SessionId,
    occupancy: Occupancy,
    /// The sockets at the port when the session came.
    sockets: Vec<Option<SocketId>>,
}

#[derive(Clone, Debug)]
struct Port {
    /// The index of its group.
    group: usize,
    target: TargetPort,
    offer: Offer,
    /// Whether the sockets are there that the offer asks for.
    is_listening: bool,
    /// Whether every connection server listens on it.
    is_available: bool,
    /// A number that grows with each port that is freed.
    freed: u64,
    occupant: Option<Occupant>,
    trial: Option<Trial>,
}

impl Port {
    /// `None` while it has a session.
    fn vacancy(&self) -> Option<Vacancy> {
        if self.occupant.is_some() {
            return None;
        }
        if !self.is_available {
            return Some(Vacancy::Unavailable);
        }
        Some(match (&self.trial, self.is_listening) {
            (Some(_), _) => Vacancy::OnTrial,
            (None, true) => Vacancy::Free,
            (None, false) => Vacancy::NotListening,
        })
    }
}

/// The server ports at which a socket matters to a port with `offer`.
fn looked_at(target: TargetPort, protocol: PortProtocol, offer: Offer) -> Vec<ServerPort> {
    match offer {
        Offer::WhenListening | Offer::WhenAnyListens => ServerPort::all(target, protocol).collect(),
        Offer::Always => Vec::new(),
    }
}

/// The ports of the row, and those that have left it but have a session.
#[derive(Clone, Debug, Default)]
pub(super) struct Ports {
    row: Option<Row>,
    listening: Listening,
    groups: Vec<Group>,
    ports: BTreeMap<ListenPort, Port>,
    next_freed: u64,
    /// The ports that a connection server cannot listen on, of whichever row.
    unavailable: BTreeSet<ListenPort>,
}

impl Ports {
    /// Follows `row`, whose companion ports are no one's to select: they are left
    /// out. Returns the ports with a session that are not in it, or lead elsewhere
    /// now. They stay until vacated.
    pub(super) fn set_row(&mut self, row: Option<&Row>, now: Duration) -> Vec<ListenPort> {
        self.row = row.cloned();
        if let Some(row) = &mut self.row {
            row.ranges.retain(|range| !range.is_companion());
        }
        let mut orphans = Vec::new();
        let known: Vec<ListenPort> = self.ports.keys().copied().collect();
        for port in known {
            if self.is_as_in_row(port) {
                continue;
            }
            if self.has_room(port) {
                self.remove(port);
            } else if !self.is_in_row(port) {
                orphans.push(port);
            }
        }
        let listed: Vec<ListenPort> = self
            .row
            .iter()
            .flat_map(|row| &row.ranges)
            .flat_map(crate::table::PortRange::connection_ports)
            .collect();
        for port in listed {
            self.add(port, now);
        }
        orphans
    }

    /// Offers none of `ports`, which a connection server cannot listen on.
    pub(super) fn set_unavailable(&mut self, ports: BTreeSet<ListenPort>) {
        let former = std::mem::replace(&mut self.unavailable, ports);
        let changed: Vec<ListenPort> = former
            .symmetric_difference(&self.unavailable)
            .copied()
            .collect();
        for number in changed {
            self.unlist(number);
            if let Some(port) = self.ports.get_mut(&number) {
                port.is_available = !self.unavailable.contains(&number);
            }
            self.list(number);
        }
    }

    /// The server ports to look at now.
    pub(super) fn take_due(&mut self, now: Duration) -> Vec<ServerPort> {
        self.listening.take_due(now)
    }

    /// When [`Ports::take_due`] returns a port next.
    pub(super) fn next_look(&self) -> Option<Duration> {
        self.listening.next_due()
    }

    /// Notes that a look at `server_port` has found `socket`.
    pub(super) fn see(&mut self, server_port: ServerPort, socket: Option<SocketId>, now: Duration) {
        let before = self.listening.get(server_port);
        let before = before.and_then(|sight| sight.socket);
        if !self.listening.see(server_port, socket, now) {
            return;
        }
        let sight = self.listening.get(server_port);
        let leading: Vec<ListenPort> = sight
            .into_iter()
            .flat_map(|sight| sight.leading.iter().copied())
            .collect();
        let is_lost = before.is_some() && before != socket;
        for number in leading {
            self.unlist(number);
            self.note_sockets(number, is_lost);
            self.end_trial(number, now);
            self.list(number);
        }
    }

    /// Follows a change of the sockets at `number`; `is_lost` says that one of
    /// them has gone.
    fn note_sockets(&mut self, number: ListenPort, is_lost: bool) {
        let server_ports = self.server_ports(number);
        if let Some(port) = self.ports.get_mut(&number) {
            port.is_listening = self.listening.suffices(&server_ports, port.offer);
            self.groups[port.group].has_lost |= is_lost;
        }
    }

    /// Ends the trial of `number` if what was seen decides it.
    fn end_trial(&mut self, number: ListenPort, now: Duration) {
        let server_ports = self.server_ports(number);
        let sights: Vec<&Sight> = server_ports
            .iter()
            .filter_map(|port| self.listening.get(*port))
            .collect();
        let Some(port) = self.ports.get_mut(&number) else {
            return;
        };
        let trial = port.trial.as_ref();
        let Some(lasting) = trial.and_then(|trial| trial.outcome(&sights, port.offer, now)) else {
            return;
        };
        port.trial = None;
        self.groups[port.group].is_proven |= lasting.iter().all(|lasts| *lasts);
        for (server_port, lasts) in server_ports.into_iter().zip(lasting) {
            if lasts {
                self.listening.prove(server_port);
            }
        }
    }

    /// The server ports that `number` leads to and whose sockets matter: one for each
    /// of its protocols, or none.
    pub(super) fn server_ports(&self, number: ListenPort) -> Vec<ServerPort> {
        let port = self.ports.get(&number);
        let server_ports = port.map(|port| {
            let protocol = self.groups[port.group].protocol;
            looked_at(port.target, protocol, port.offer)
        });
        server_ports.into_iter().flatten().collect()
    }

    /// The number of ports.
    pub(super) fn count(&self) -> usize {
        self.ports.len()
    }

    /// The session on `port`.
    pub(super) fn session(&self, port: ListenPort) -> Option<&SessionId> {
        let occupant = self.ports.get(&port)?.occupant.as_ref()?;
        Some(&occupant.session)
    }

    /// Whether `port` exists and has no session; the workload need not listen.
    pub(super) fn has_room(&self, port: ListenPort) -> bool {
        self.ports
            .get(&port)
            .is_some_and(|port| port.occupant.is_none())
    }

    /// Whether any port could serve `filter`.
    pub(super) fn knows(&self, filter: &PortFilter) -> bool {
        self.ports
            .values()
            .any(|port| self.groups[port.group].serves(filter))
    }

    /// The port that serves `filter` and has been free for the longest time.
    fn longest_free(&self, filter: &PortFilter) -> Option<ListenPort> {
        let groups = self.groups.iter().filter(|group| group.serves(filter));
        let earliest = groups.filter_map(Group::longest_free).min()?;
        Some(earliest.1)
    }

    /// The server ports to look at before a request for `blocks` is refused because
    /// the workload does not listen.
    pub(super) fn take_on_request(
        &mut self,
        blocks: &OneOrMore<Block>,
        now: Duration,
    ) -> Vec<ServerPort> {
        let is_hidden = |port: &&Port| {
            let group = &self.groups[port.group];
            let serves = blocks.iter().any(|block| group.serves(&block.filter));
            serves && port.vacancy() == Some(Vacancy::NotListening)
        };
        let hidden = self.ports.values().filter(is_hidden);
        let server_ports = hidden.flat_map(|port| {
            let protocol = self.groups[port.group].protocol;
            looked_at(port.target, protocol, port.offer)
        });
        self.listening.take_on_request(server_ports, now)
    }

    /// Gives `number` to a session.
    pub(super) fn occupy(&mut self, number: ListenPort, session: &SessionId, occupancy: Occupancy) {
        self.unlist(number);
        let sockets = self.sockets(number);
        if let Some(port) = self.ports.get_mut(&number) {
            port.trial = None;
            port.occupant = Some(Occupant {
                session: session.clone(),
                occupancy,
                sockets,
            });
            *self.groups[port.group].count(occupancy) += 1;
        }
    }

    /// Changes what the session on `number` does with it.
    pub(super) fn mark(&mut self, number: ListenPort, occupancy: Occupancy) {
        let Some(port) = self.ports.get_mut(&number) else {
            return;
        };
        if let Some(occupant) = &mut port.occupant {
            let group = &mut self.groups[port.group];
            *group.count(occupant.occupancy) -= 1;
            *group.count(occupancy) += 1;
            occupant.occupancy = occupancy;
        }
    }

    /// Takes `number` back from its session, the last connection of which closed
    /// at `closed` if it had any. The port becomes the last of the free ports, or
    /// goes if the row does not have it any more.
    pub(super) fn vacate(&mut self, number: ListenPort, closed: Option<Duration>, now: Duration) {
        self.next_freed += 1;
        let server_ports = self.server_ports(number);
        let is_proven = |port: &ServerPort| {
            let sight = self.listening.get(*port);
            sight.is_none_or(|sight| sight.is_proven() || sight.socket.is_none())
        };
        let is_proven = server_ports.iter().all(is_proven);
        if let Some(port) = self.ports.get_mut(&number) {
            let occupant = port.occupant.take();
            if let Some(occupant) = &occupant {
                *self.groups[port.group].count(occupant.occupancy) -= 1;
            }
            port.freed = self.next_freed;
            let is_lasting = is_proven || self.groups[port.group].is_lasting();
            let closed = closed.filter(|_| !is_lasting);
            port.trial = occupant
                .zip(closed)
                .map(|(occupant, closed)| Trial::new(occupant.sockets, closed, now));
            if let Some(trial) = &port.trial {
                for server_port in server_ports {
                    self.listening.begin_trial(server_port, trial.ends, now);
                }
            }
        }
        self.list(number);
        if !self.is_as_in_row(number) {
            self.remove(number);
            self.add(number, now);
        }
    }

    /// Ports by name, protocol and state.
    pub(super) fn counts(&self) -> Vec<PortState> {
        self.groups.iter().map(Group::state).collect()
    }

    /// The ports that become free without a client's doing.
    pub(super) fn returning(&self) -> u32 {
        self.groups.iter().map(Group::returning).sum()
    }

    /// The name and protocol of `port`.
    pub(super) fn name_and_protocol(&self, port: ListenPort) -> (&str, PortProtocol) {
        let group = self.ports.get(&port).map(|port| &self.groups[port.group]);
        group.map_or(("", PortProtocol::TCP), |group| {
            (&group.name, group.protocol)
        })
    }

    /// The sockets that were seen at `number`, by protocol.
    fn sockets(&self, number: ListenPort) -> Vec<Option<SocketId>> {
        let sight = |port| self.listening.get(port)?.socket;
        self.server_ports(number).into_iter().map(sight).collect()
    }

    /// Whether the row has `number` as it is in the book, its offer included.
    fn is_as_in_row(&self, number: ListenPort) -> bool {
        let found = self.row.as_ref().and_then(|row| row.find(number));
        let port = self.ports.get(&number);
        let has_offer = found
            .zip(port)
            .is_some_and(|((range, _), port)| port.offer == range.offer);
        has_offer && self.is_in_row(number)
    }

    /// Whether the row has `number` and it leads where it does in the book.
    fn is_in_row(&self, number: ListenPort) -> bool {
        let found = self.row.as_ref().and_then(|row| row.find(number));
        let Some(((range, target), port)) = found.zip(self.ports.get(&number)) else {
            return false;
        };
        let group = &self.groups[port.group];
        port.target == target && group.includes(range)
    }

    /// Adds `number` as the row says, unless it is there.
    fn add(&mut self, number: ListenPort, now: Duration) {
        let found = self.row.as_ref().and_then(|row| row.find(number));
        let Some((range, target)) = found else {
            return;
        };
        if self.ports.contains_key(&number) {
            return;
        }
        let known = self.groups.iter().position(|group| group.includes(range));
        let group = known.unwrap_or_else(|| {
            self.groups.push(Group::new(range));
            self.groups.len() - 1
        });
        let offer = range.offer;
        let server_ports = looked_at(target, range.protocol, offer);
        for server_port in &server_ports {
            self.listening.add(*server_port, number, now);
        }
        let port = Port {
            group,
            target,
            offer,
            is_listening: self.listening.suffices(&server_ports, offer),
            is_available: !self.unavailable.contains(&number),
            freed: self.next_freed,
            occupant: None,
            trial: None,
        };
        self.ports.insert(number, port);
        self.list(number);
    }

    fn remove(&mut self, number: ListenPort) {
        self.unlist(number);
        for server_port in self.server_ports(number) {
            self.listening.remove(server_port, number);
        }
        self.ports.remove(&number);
    }

    /// Counts a port without session by what is missing for it to be free.
    fn list(&mut self, number: ListenPort) {
        let port = self.ports.get(&number);
        let Some((port, vacancy)) = port.and_then(|port| Some((port, port.vacancy()?))) else {
            return;
        };
        self.groups[port.group].list(number, port.freed, vacancy);
    }

    /// Undoes [`Ports::list`].
    fn unlist(&mut self, number: ListenPort) {
        let port = self.ports.get(&number);
        let Some((port, vacancy)) = port.and_then(|port| Some((port, port.vacancy()?))) else {
            return;
        };
        self.groups[port.group].unlist(number, port.freed, vacancy);
    }
}
