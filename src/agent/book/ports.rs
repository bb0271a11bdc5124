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
//!         └ not all protocols of the entry have a socket
//! ```
//!
//! A port is free only if all its sockets were seen after its last session ended,
//! and are not about to go with that session. Programs that serve one client and
//! end would give the next one a reset. What one socket of an entry has proven
//! holds for the entry's other ports too, until one of their sockets goes: from
//! then on each socket must prove itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::listening::{Listening, OUTLIVED_AFTER, ServerPort, Sight, SocketId};
use crate::pool::PortProtocol;
use crate::session::{PortFilter, PortState, SessionId};
use crate::table::{ListenPort, Row, TargetPort};

/// Ports of one name and protocol.
#[derive(Clone, Debug)]
struct Group {
    name: String,
    protocol: PortProtocol,
    /// Whether one of its sockets has outlived a session.
    is_proven: bool,
    /// Whether a socket of it has gone.
    has_lost: bool,
    /// Free ports, by the order in which they became free.
    free: BTreeSet<(u64, ListenPort)>,
    not_listening: u32,
    on_trial: u32,
    held: u32,
    busy: u32,
    lingering: u32,
    ending: u32,
}

/// The use of a port by its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Occupancy {
    Held,
    Busy,
    /// Between connections.
    Lingering,
    /// The session is over; the port returns when all have acknowledged that.
    Ending,
}

impl Group {
    /// Whether its sockets outlive sessions, as far as is known of all of them.
    fn is_lasting(&self) -> bool {
        self.is_proven && !self.has_lost
    }

    /// The ports whose session is over and that are not free yet.
    fn returning(&self) -> u32 {
        self.ending + self.on_trial
    }

    fn serves(&self, filter: &PortFilter) -> bool {
        filter.admits(&self.name, self.protocol)
    }

    fn count(&mut self, occupancy: Occupancy) -> &mut u32 {
        match occupancy {
            Occupancy::Held => &mut self.held,
            Occupancy::Busy => &mut self.busy,
            Occupancy::Lingering => &mut self.lingering,
            Occupancy::Ending => &mut self.ending,
        }
    }
}

/// The session on a port.
#[derive(Clone, Debug)]
struct Occupant {
    session: SessionId,
    occupancy: Occupancy,
    /// The sockets at the port when the session came.
    sockets: Vec<Option<SocketId>>,
}

/// What must be seen before a port is free again.
#[derive(Clone, Debug)]
struct Trial {
    /// When its session ended. Only what was seen since then counts.
    since: Duration,
    /// When the sockets that the session used count as lasting.
    ends: Duration,
    /// The sockets at the port when the session came.
    sockets: Vec<Option<SocketId>>,
}

/// A port without a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vacancy {
    Free,
    NotListening,
    OnTrial,
}

#[derive(Clone, Debug)]
struct Port {
    /// The index of its group.
    group: usize,
    target: TargetPort,
    /// Whether a socket is there for each protocol.
    is_listening: bool,
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
        Some(match (&self.trial, self.is_listening) {
            (Some(_), _) => Vacancy::OnTrial,
            (None, true) => Vacancy::Free,
            (None, false) => Vacancy::NotListening,
        })
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
}

impl Ports {
    /// Follows `row`. Returns the ports with a session that are not in it, or
    /// lead elsewhere now. They stay until vacated.
    pub(super) fn set_row(&mut self, row: Option<&Row>, now: Duration) -> Vec<ListenPort> {
        self.row = row.cloned();
        let mut orphans = Vec::new();
        let known: Vec<ListenPort> = self.ports.keys().copied().collect();
        for port in known {
            if self.is_in_row(port) {
                continue;
            }
            if self
                .ports
                .get(&port)
                .is_some_and(|port| port.occupant.is_some())
            {
                orphans.push(port);
            } else {
                self.remove(port);
            }
        }
        let listed: Vec<ListenPort> = row
            .into_iter()
            .flat_map(|row| &row.ranges)
            .flat_map(crate::table::PortRange::connection_ports)
            .collect();
        for port in listed {
            self.add(port, now);
        }
        orphans
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
            let server_ports = self.server_ports(number);
            let is_listening = self.listening.covers(server_ports.iter().copied());
            let sights: Vec<&Sight> = server_ports
                .iter()
                .filter_map(|port| self.listening.get(*port))
                .collect();
            let mut proven = Vec::new();
            if let Some(port) = self.ports.get_mut(&number) {
                let group = &mut self.groups[port.group];
                group.has_lost |= is_lost;
                port.is_listening = is_listening;
                if let Some(trial) = &port.trial
                    && is_over(trial, &sights, now)
                {
                    let lasts = |index: &usize| {
                        let socket = sights[*index].socket;
                        is_listening && Some(&socket) == trial.sockets.get(*index)
                    };
                    let all = 0..sights.len();
                    group.is_proven |= all.clone().all(|index| lasts(&index));
                    proven.extend(all.filter(lasts).map(|index| server_ports[index]));
                    port.trial = None;
                }
            }
            for server_port in proven {
                self.listening.prove(server_port);
            }
            self.list(number);
        }
    }

    /// The server ports that `number` leads to: one for each of its protocols.
    pub(super) fn server_ports(&self, number: ListenPort) -> Vec<ServerPort> {
        let port = self.ports.get(&number);
        let server_ports = port.map(|port| {
            let protocol = self.groups[port.group].protocol;
            ServerPort::all(port.target, protocol)
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

    /// Whether `port` serves `filter`.
    pub(super) fn fits(&self, port: ListenPort, filter: &PortFilter) -> bool {
        self.ports
            .get(&port)
            .is_some_and(|port| self.groups[port.group].serves(filter))
    }

    /// The port that serves `filter` and has been free for the longest time.
    pub(super) fn longest_free(&self, filter: &PortFilter) -> Option<ListenPort> {
        let groups = self.groups.iter().filter(|group| group.serves(filter));
        let earliest = groups.filter_map(|group| group.free.first()).min()?;
        Some(earliest.1)
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
            port.trial = occupant.zip(closed).map(|(occupant, closed)| Trial {
                since: now,
                ends: closed + OUTLIVED_AFTER,
                sockets: occupant.sockets,
            });
            if let Some(trial) = &port.trial {
                for server_port in server_ports {
                    self.listening.begin_trial(server_port, trial.ends, now);
                }
            }
        }
        self.list(number);
        if !self.is_in_row(number) {
            self.remove(number);
            self.add(number, now);
        }
    }

    /// Ports by name, protocol and state.
    pub(super) fn counts(&self) -> Vec<PortState> {
        let counts = self.groups.iter().map(|group| PortState {
            name: group.name.clone(),
            protocol: group.protocol,
            free: u32::try_from(group.free.len()).unwrap_or(u32::MAX),
            held: group.held,
            busy: group.busy,
            lingering: group.lingering + group.returning(),
            not_listening: group.not_listening,
        });
        counts.collect()
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

    /// Whether the row has `number` as it is in the book.
    fn is_in_row(&self, number: ListenPort) -> bool {
        let found = self.row.as_ref().and_then(|row| row.find(number));
        let Some(((range, target), port)) = found.zip(self.ports.get(&number)) else {
            return false;
        };
        let group = &self.groups[port.group];
        port.target == target && group.name == range.name && group.protocol == range.protocol
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
        let is_group = |group: &Group| group.name == range.name && group.protocol == range.protocol;
        let (name, protocol) = (range.name.clone(), range.protocol);
        let group = self.groups.iter().position(is_group).unwrap_or_else(|| {
            let free = BTreeSet::new();
            self.groups.push(Group {
                name,
                protocol,
                is_proven: false,
                has_lost: false,
                free,
                not_listening: 0,
                on_trial: 0,
                held: 0,
                busy: 0,
                lingering: 0,
                ending: 0,
            });
            self.groups.len() - 1
        });
        for server_port in ServerPort::all(target, protocol) {
            self.listening.add(server_port, number, now);
        }
        let is_listening = self.listening.covers(ServerPort::all(target, protocol));
        let port = Port {
            group,
            target,
            is_listening,
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
        let group = &mut self.groups[port.group];
        match vacancy {
            Vacancy::Free => drop(group.free.insert((port.freed, number))),
            Vacancy::NotListening => group.not_listening += 1,
            Vacancy::OnTrial => group.on_trial += 1,
        }
    }

    /// Undoes [`Ports::list`].
    fn unlist(&mut self, number: ListenPort) {
        let port = self.ports.get(&number);
        let Some((port, vacancy)) = port.and_then(|port| Some((port, port.vacancy()?))) else {
            return;
        };
        let group = &mut self.groups[port.group];
        match vacancy {
            Vacancy::Free => drop(group.free.remove(&(port.freed, number))),
            Vacancy::NotListening => group.not_listening -= 1,
            Vacancy::OnTrial => group.on_trial -= 1,
        }
    }
}

/// Whether `sights` decide what becomes of a port on `trial`.
fn is_over(trial: &Trial, sights: &[&Sight], now: Duration) -> bool {
    if sights.iter().any(|sight| sight.seen_at < trial.since) {
        return false;
    }
    let is_gone = sights.iter().any(|sight| sight.socket.is_none());
    let is_other = |(index, sight): (usize, &&Sight)| {
        sight.is_proven() || trial.sockets.get(index) != Some(&sight.socket)
    };
    let are_others = sights.iter().enumerate().all(is_other);
    let has_ended = now >= trial.ends && sights.iter().all(|sight| sight.seen_at >= trial.ends);
    is_gone || are_others || has_ended
}
