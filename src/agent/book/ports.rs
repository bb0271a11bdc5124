//! The ports of the book: which exist, which the workload listens on, which
//! are free and since when. Sessions are ids here.

use std::collections::{BTreeMap, BTreeSet};

use crate::pool::PortProtocol;
use crate::session::{PortFilter, PortState, SessionId};
use crate::table::{ListenPort, Row, TargetPort};

/// The server ports that the workload listens on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listening {
    /// TCP sockets in the listening state.
    pub tcp: BTreeSet<u16>,
    /// Unconnected UDP sockets.
    pub udp: BTreeSet<u16>,
}

impl Listening {
    fn covers(&self, port: TargetPort, protocol: PortProtocol) -> bool {
        let tcp = !protocol.has_tcp() || self.tcp.contains(&port.get());
        let udp = !protocol.has_udp() || self.udp.contains(&port.get());
        tcp && udp
    }
}

/// Ports of one name and protocol.
#[derive(Clone, Debug)]
struct Group {
    name: String,
    protocol: PortProtocol,
    /// Free ports, by the order in which they became free.
    free: BTreeSet<(u64, ListenPort)>,
    not_listening: u32,
    held: u32,
    busy: u32,
    lingering: u32,
}

/// The use of a port by its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Occupancy {
    Held,
    Busy,
    /// Between connections, or being freed.
    Lingering,
}

impl Group {
    fn serves(&self, filter: &PortFilter) -> bool {
        filter.admits(&self.name, self.protocol)
    }

    fn count(&mut self, occupancy: Occupancy) -> &mut u32 {
        match occupancy {
            Occupancy::Held => &mut self.held,
            Occupancy::Busy => &mut self.busy,
            Occupancy::Lingering => &mut self.lingering,
        }
    }
}

/// The session on a port.
#[derive(Clone, Debug)]
struct Occupant {
    session: SessionId,
    occupancy: Occupancy,
}

#[derive(Clone, Debug)]
struct Port {
    /// The index of its group.
    group: usize,
    target: TargetPort,
    is_listening: bool,
    /// A number that grows with each port that is freed.
    freed: u64,
    occupant: Option<Occupant>,
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
    pub(super) fn set_row(&mut self, row: Option<&Row>) -> Vec<ListenPort> {
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
            self.add(port);
        }
        orphans
    }

    pub(super) fn set_listening(&mut self, listening: Listening) {
        if self.listening == listening {
            return;
        }
        self.listening = listening;
        let changed: Vec<ListenPort> = self
            .ports
            .iter()
            .filter(|(_, port)| port.is_listening != self.listens(port))
            .map(|(number, _)| *number)
            .collect();
        for number in changed {
            self.unlist(number);
            if let Some(port) = self.ports.get_mut(&number) {
                port.is_listening = !port.is_listening;
            }
            self.list(number);
        }
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
        if let Some(port) = self.ports.get_mut(&number) {
            port.occupant = Some(Occupant {
                session: session.clone(),
                occupancy,
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

    /// Takes `number` back from its session. It becomes the last of the free
    /// ports, or goes if the row does not have it any more.
    pub(super) fn vacate(&mut self, number: ListenPort) {
        self.next_freed += 1;
        if let Some(port) = self.ports.get_mut(&number) {
            if let Some(occupant) = port.occupant.take() {
                *self.groups[port.group].count(occupant.occupancy) -= 1;
            }
            port.freed = self.next_freed;
        }
        self.list(number);
        if !self.is_in_row(number) {
            self.remove(number);
            self.add(number);
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
            lingering: group.lingering,
            not_listening: group.not_listening,
        });
        counts.collect()
    }

    /// The name and protocol of `port`.
    pub(super) fn name_and_protocol(&self, port: ListenPort) -> (&str, PortProtocol) {
        let group = self.ports.get(&port).map(|port| &self.groups[port.group]);
        group.map_or(("", PortProtocol::TCP), |group| {
            (&group.name, group.protocol)
        })
    }

    fn listens(&self, port: &Port) -> bool {
        self.listening
            .covers(port.target, self.groups[port.group].protocol)
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
    fn add(&mut self, number: ListenPort) {
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
                free,
                not_listening: 0,
                held: 0,
                busy: 0,
                lingering: 0,
            });
            self.groups.len() - 1
        });
        let is_listening = self.listening.covers(target, protocol);
        let port = Port {
            group,
            target,
            is_listening,
            freed: self.next_freed,
            occupant: None,
        };
        self.ports.insert(number, port);
        self.list(number);
    }

    fn remove(&mut self, number: ListenPort) {
        self.unlist(number);
        self.ports.remove(&number);
    }

    /// Counts a port without session as free or not listening.
    fn list(&mut self, number: ListenPort) {
        if let Some(port) = self
            .ports
            .get(&number)
            .filter(|port| port.occupant.is_none())
        {
            let group = &mut self.groups[port.group];
            if port.is_listening {
                group.free.insert((port.freed, number));
            } else {
                group.not_listening += 1;
            }
        }
    }

    /// Undoes [`Ports::list`].
    fn unlist(&mut self, number: ListenPort) {
        if let Some(port) = self
            .ports
            .get(&number)
            .filter(|port| port.occupant.is_none())
        {
            let group = &mut self.groups[port.group];
            if port.is_listening {
                group.free.remove(&(port.freed, number));
            } else {
                group.not_listening -= 1;
            }
        }
    }
}
