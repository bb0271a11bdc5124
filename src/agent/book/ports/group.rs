//! The ports of one name and protocol, as counts and as a queue of the free ones.

use std::collections::BTreeSet;

use crate::pool::PortProtocol;
use crate::session::{PortFilter, PortState};
use crate::table::{ListenPort, PortRange};

/// Ports of one name and protocol.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) protocol: PortProtocol,
    /// Whether one of its sockets has outlived a session.
    pub(super) is_proven: bool,
    /// Whether a socket of it has gone.
    pub(super) has_lost: bool,
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
pub(in crate::agent::book) enum Occupancy {
    Held,
    Busy,
    /// Between connections.
    Lingering,
    /// The session is over; the port returns when all have acknowledged that.
    Ending,
}

/// A port without a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vacancy {
    Free,
    NotListening,
    OnTrial,
    /// A connection server cannot listen on it. Such ports are not counted.
    Unavailable,
}

impl Group {
    /// The group of the ports of `range`, empty.
    pub(super) fn new(range: &PortRange) -> Self {
        Self {
            name: range.name.clone(),
            protocol: range.protocol,
            is_proven: false,
            has_lost: false,
            free: BTreeSet::new(),
            not_listening: 0,
            on_trial: 0,
            held: 0,
            busy: 0,
            lingering: 0,
            ending: 0,
        }
    }

    /// Whether the ports of `range` belong to it.
    pub(super) fn includes(&self, range: &PortRange) -> bool {
        self.name == range.name && self.protocol == range.protocol
    }

    /// Whether its ports serve `filter`.
    pub(super) fn serves(&self, filter: &PortFilter) -> bool {
        filter.admits(&self.name, self.protocol)
    }

    /// Whether its sockets outlive sessions, as far as is known of all of them.
    pub(super) fn is_lasting(&self) -> bool {
        self.is_proven && !self.has_lost
    }

    /// The ports whose session is over and that are not free yet.
    pub(super) fn returning(&self) -> u32 {
        self.ending + self.on_trial
    }

    /// Its port that has been free for the longest time, after the number that
    /// orders it among all ports.
    pub(super) fn longest_free(&self) -> Option<(u64, ListenPort)> {
        self.free.first().copied()
    }

    /// Its free ports, those first that have been free for the longest time.
    pub(super) fn free(&self) -> impl Iterator<Item = ListenPort> {
        self.free.iter().map(|(_, port)| *port)
    }

    /// The number of its ports whose sessions use them so.
    pub(super) fn count(&mut self, occupancy: Occupancy) -> &mut u32 {
        match occupancy {
            Occupancy::Held => &mut self.held,
            Occupancy::Busy => &mut self.busy,
            Occupancy::Lingering => &mut self.lingering,
            Occupancy::Ending => &mut self.ending,
        }
    }

    /// Counts the port `number`, which has no session and was freed as the
    /// `freed`th.
    pub(super) fn list(&mut self, number: ListenPort, freed: u64, vacancy: Vacancy) {
        match vacancy {
            Vacancy::Free => drop(self.free.insert((freed, number))),
            Vacancy::NotListening => self.not_listening += 1,
            Vacancy::OnTrial => self.on_trial += 1,
            Vacancy::Unavailable => {}
        }
    }

    /// Undoes [`Group::list`].
    pub(super) fn unlist(&mut self, number: ListenPort, freed: u64, vacancy: Vacancy) {
        match vacancy {
            Vacancy::Free => drop(self.free.remove(&(freed, number))),
            Vacancy::NotListening => self.not_listening -= 1,
            Vacancy::OnTrial => self.on_trial -= 1,
            Vacancy::Unavailable => {}
        }
    }

    /// The counts as clients see them.
    pub(super) fn state(&self) -> PortState {
        PortState {
            name: self.name.clone(),
            protocol: self.protocol,
            free: u32::try_from(self.free.len()).unwrap_or(u32::MAX),
            held: self.held,
            busy: self.busy,
            lingering: self.lingering + self.returning(),
            not_listening: self.not_listening,
        }
    }
}
