//! Who may use companion ports: the addresses of clients with live sessions, and
//! their connections to companion ports.
//!
//! A companion connection belongs to a client address on a processing server, not
//! to one session: of two clients behind one address, no one can say whose it is. So
//! it counts for all live sessions of the address there, and is cut when the last
//! of them ends.
//!
//! ```text
//! session made, client joins ─add→ client (slot, address) ─admit→ key of its connections
//! session ends ─────────────remove→ has it other sessions? if not, its connections are cut
//! ```
//!
//! A session has at most [`MAX_CLIENTS`] addresses. Where there would be more, one that
//! connects here replaces one that is idle here ([`replaceable`]); other connection
//! servers and the agent keep what they have.
//!
//! Only sessions of servers with companion ports are here: others cost nothing.
//! [`Companions`] keeps who is where; the rest has the sessions and their agents
//! follow.

use std::collections::HashMap;
use std::net::IpAddr;

use super::{Action, Actions, CompanionCut, Inner, Live, NO_SESSION};
use crate::forward::{Decision, SessionKey, Traffic};
use crate::selection::{MAX_CLIENTS, ToAgent};
use crate::table::{ListenPort, PortIndex, PortRange, Row, Slot};

/// A client address on the processing server of a slot.
pub(super) type Place = (Slot, IpAddr);

/// The clients of sessions whose servers have companion ports.
#[derive(Debug, Default)]
pub(super) struct Companions {
    clients: HashMap<Place, Client>,
    /// The clients that have companion connections.
    by_key: HashMap<SessionKey, Place>,
    /// The client addresses of each session, by its first port.
    by_session: HashMap<ListenPort, Vec<IpAddr>>,
    /// Keys of companion connections that are being cut, with the session whose end
    /// cuts them.
    cutting: HashMap<SessionKey, SessionKey>,
}

/// A client address with live sessions on one server.
#[derive(Debug)]
struct Client {
    /// What its companion connections are admitted under.
    key: SessionKey,
    /// Its live sessions, by their first ports.
    sessions: Vec<ListenPort>,
    /// Its open companion connections and flows by port.
    open: HashMap<ListenPort, u32>,
}

impl Client {
    fn open_count(&self) -> u32 {
        self.open.values().sum()
    }
}

/// What a session that ends leaves of its clients' companion connections.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// The connections that end with it.
    pub(super) cuts: Vec<CompanionCut>,
    /// How many reports follow: of each of those connections, and of each cut.
    pub(super) reports: u32,
}

/// Which of the `clients` of a session, in the order in which they came, another one
/// may replace: the first that has no companion connections open, so that false sources
/// of datagrams cannot keep the places that they have taken. The requester is the
/// first of all and keeps its place.
pub(super) fn replaceable(
    clients: &[IpAddr],
    is_in_use: impl Fn(&IpAddr) -> bool,
) -> Option<usize> {
    let others = clients.iter().enumerate().skip(1);
    let mut idle = others.filter(|(_, client)| !is_in_use(client));
    idle.next().map(|(index, _)| index)
}

impl Companions {
    /// Counts the session on `first` among those of `client`. A client that is new here
    /// gets the key that `key` makes. If the session has as many clients as it may, one
    /// that comes here may replace another one, and one that is known from elsewhere is
    /// left out. Returns the number of companion connections that the session has from
    /// now on, if this is new.
    pub(super) fn add(
        &mut self,
        (slot, client): Place,
        first: ListenPort,
        comes_here: bool,
        key: impl FnOnce() -> SessionKey,
    ) -> Option<u32> {
        let of_session = self.by_session.entry(first).or_default();
        if of_session.contains(&client) {
            return None;
        }
        if of_session.len() >= MAX_CLIENTS {
            let is_in_use = |other: &IpAddr| {
                let known = self.clients.get(&(slot, *other));
                known.is_some_and(|known| !known.open.is_empty())
            };
            let index = replaceable(of_session, is_in_use).filter(|_| comes_here)?;
            let place = (slot, of_session.remove(index));
            if let Some(replaced) = self.clients.get_mut(&place) {
                replaced.sessions.retain(|other| *other != first);
                if replaced.sessions.is_empty() {
                    self.clients.remove(&place);
                }
            }
        }
        of_session.push(client);
        let place = self.clients.entry((slot, client));
        let known = place.or_insert_with(|| Client {
            key: key(),
            sessions: Vec::new(),
            open: HashMap::new(),
        });
        known.sessions.push(first);
        Some(known.open_count())
    }

    /// Takes out the session on `first`, whose key is `session` and which ends.
    pub(super) fn remove(&mut self, slot: Slot, first: ListenPort, session: SessionKey) -> Left {
        let mut left = Left::default();
        for address in self.by_session.remove(&first).unwrap_or_default() {
            let Some(client) = self.clients.get_mut(&(slot, address)) else {
                continue;
            };
            client.sessions.retain(|other| *other != first);
            if !client.sessions.is_empty() {
                continue;
            }
            let Some(client) = self.clients.remove(&(slot, address)) else {
                continue;
            };
            self.by_key.remove(&client.key);
            if client.open.is_empty() {
                continue;
            }
            self.cutting.insert(client.key, session);
            let ports = u32::try_from(client.open.len()).unwrap_or(u32::MAX);
            left.reports += client.open_count() + ports;
            let ports = client.open.into_keys();
            left.cuts.extend(ports.map(|port| CompanionCut {
                port,
                key: client.key,
                client: address,
            }));
        }
        left
    }

    /// The addresses that may use companion ports because of the session on `first`.
    pub(super) fn clients_of(&self, first: ListenPort) -> &[IpAddr] {
        self.by_session.get(&first).map_or(&[], Vec::as_slice)
    }

    /// Admits a client to the companion port `port`, if it has a live session.
    pub(super) fn admit(
        &mut self,
        place: Place,
        port: ListenPort,
    ) -> Option<(SessionKey, &[ListenPort])> {
        let client = self.clients.get_mut(&place)?;
        *client.open.entry(port).or_default() += 1;
        self.by_key.insert(client.key, place);
        Some((client.key, &client.sessions))
    }

    /// A connection admitted under `key` on `port` has ended. Returns the sessions
    /// that it counted for; `None` when it is no companion connection of a live
    /// session.
    pub(super) fn close(&mut self, port: ListenPort, key: SessionKey) -> Option<&[ListenPort]> {
        let place = self.by_key.get(&key)?;
        let client = self.clients.get_mut(place)?;
        if let Some(open) = client.open.get_mut(&port) {
            *open -= 1;
            if *open == 0 {
                client.open.remove(&port);
            }
        }
        if client.open.is_empty() {
            self.by_key.remove(&key);
        }
        Some(&client.sessions)
    }

    /// Has the connections cut that are on a port for which `is_over`, although
    /// their clients' sessions go on: the table has changed. The cuts count as
    /// connections until they are reported. Returns them with the sessions that each
    /// counts for.
    pub(super) fn cut_on(
        &mut self,
        is_over: impl Fn(Slot, ListenPort) -> bool,
    ) -> Vec<(CompanionCut, Vec<ListenPort>)> {
        let mut cuts = Vec::new();
        for place in self.by_key.values() {
            let Some(client) = self.clients.get_mut(place) else {
                continue;
            };
            for (port, open) in &mut client.open {
                if is_over(place.0, *port) {
                    *open += 1;
                    let cut = CompanionCut {
                        port: *port,
                        key: client.key,
                        client: place.1,
                    };
                    cuts.push((cut, client.sessions.clone()));
                }
            }
        }
        cuts
    }

    /// The session whose end cuts the connections admitted under `key`.
    pub(super) fn cut_by(&self, key: SessionKey) -> Option<SessionKey> {
        self.cutting.get(&key).copied()
    }

    /// All connections that were cut under `keys` are closed.
    pub(super) fn forget_cuts(&mut self, keys: &[SessionKey]) {
        for key in keys {
            self.cutting.remove(key);
        }
    }

    /// The clients with companion connections.
    pub(super) fn keys(&self) -> impl Iterator<Item = (SessionKey, Place)> {
        self.by_key.iter().map(|(key, place)| (*key, *place))
    }

    /// Has a client keep the key that it had in another process.
    pub(super) fn restore_key(&mut self, key: SessionKey, place: Place) {
        if let Some(client) = self.clients.get_mut(&place) {
            client.key = key;
            self.by_key.insert(key, place);
        }
    }

    /// A companion connection under `key` comes from another process. Returns the
    /// sessions that it counts for; `None` when it belongs to none.
    pub(super) fn restore(&mut self, port: ListenPort, key: SessionKey) -> Option<&[ListenPort]> {
        let place = *self.by_key.get(&key)?;
        let (_, sessions) = self.admit(place, port)?;
        Some(sessions)
    }
}

impl Inner {
    /// Whether the server in `slot` has companion ports.
    pub(super) fn has_companions(&self, slot: Slot) -> bool {
        let row = self
            .table
            .as_ref()
            .and_then(|table| table.table().row(slot));
        row.is_some_and(Row::has_companions)
    }

    /// Lets `client` use companion ports because of `live`; it `comes_here`, or another
    /// connection server knows it. Returns whether its agent should learn that: it is new,
    /// and replaces no other client. The agent has as many as it may then.
    pub(super) fn join(&self, live: &Live, client: IpAddr, comes_here: bool) -> bool {
        let mut companions = self.companions.lock();
        let place = (live.slot, client);
        let is_full = companions.clients_of(live.first()).len() >= MAX_CLIENTS;
        let open = companions.add(place, live.first(), comes_here, || self.new_key());
        if let Some(open) = open {
            self.change_flows(live, |flows| flows.open_companions(open));
        }
        open.is_some() && !is_full
    }

    /// Lets the clients that the agent knows use companion ports because of the
    /// session on `first`, if its server has such.
    pub(super) fn join_known(&self, first: ListenPort) {
        if let Some(live) = self.live.get(&first).filter(|live| live.has_companions) {
            for client in &live.session.clients {
                self.join(live, client.to_canonical(), false);
            }
        }
    }

    /// Follows which servers have companion ports.
    pub(super) fn follow_companions(&mut self) {
        let has = |live: &Live| self.has_companions(live.slot);
        let changed = self
            .live
            .values()
            .filter(|live| has(live) != live.has_companions);
        let changed: Vec<ListenPort> = changed.map(Live::first).collect();
        for first in changed {
            if let Some(live) = self.live.get_mut(&first) {
                // Who has joined stays so until the session ends.
                live.has_companions = !live.has_companions;
            }
            self.join_known(first);
        }
    }

    /// Whether `port` is a companion port.
    pub(super) fn is_companion(&self, port: ListenPort) -> bool {
        let found = self.table.as_ref().and_then(|table| table.find(port));
        found.is_some_and(|(_, range)| range.is_companion())
    }

    /// Has connections cut on ports to which `table`, which is in force after
    /// `former`, gives another use: companion connections where a port leads
    /// elsewhere or is for others now, and connections without a session where it has
    /// become a companion port.
    pub(super) fn cut_after_change(
        &mut self,
        former: Option<&PortIndex>,
        table: &PortIndex,
    ) -> Actions {
        let target = |index: &PortIndex, slot, port| {
            let (_, range) = index.find(port).filter(|(row, _)| row.slot == slot)?;
            range.is_companion().then(|| range.target(port)).flatten()
        };
        let mut actions = self.cut_companions(|slot, port| {
            let before = former.and_then(|former| target(former, slot, port));
            target(table, slot, port).is_none_or(|now| before != Some(now))
        });
        let Some(former) = former else {
            return actions;
        };
        // Whatever it was at last: it may have been open for everyone before that.
        let has_become = |slot, port| {
            let before = former.find(port).filter(|(row, _)| row.slot == slot);
            before.is_some_and(|(_, range)| !range.is_companion())
        };
        for row in &table.table().rows {
            let ranges = row.ranges.iter().filter(|range| range.is_companion());
            for port in ranges.flat_map(PortRange::connection_ports) {
                if has_become(row.slot, port) {
                    actions.push(Action::CutOpen(port, NO_SESSION));
                }
            }
        }
        actions
    }

    /// Has companion connections cut on the ports for which `is_over`.
    pub(super) fn cut_companions(&mut self, is_over: impl Fn(Slot, ListenPort) -> bool) -> Actions {
        let cuts = self.companions.get_mut().cut_on(is_over);
        let mut actions = Actions::default();
        for (cut, sessions) in cuts {
            for live in sessions.iter().filter_map(|first| self.live.get(first)) {
                self.change_flows(live, |flows| flows.open_companions(1));
            }
            actions.push(Action::CutCompanions(cut));
        }
        actions
    }

    /// The decision on a client of a companion port. One without a session may have
    /// one that is not known here yet.
    pub(super) fn admit_companion(&self, slot: Slot, port: ListenPort, client: IpAddr) -> Decision {
        let mut companions = self.companions.lock();
        let Some((key, sessions)) = companions.admit((slot, client), port) else {
            return Decision::Ask;
        };
        for live in sessions.iter().filter_map(|first| self.live.get(first)) {
            self.change_flows(live, |flows| flows.open_companions(1));
            self.use_companion(live, client);
        }
        Decision::Admit(key)
    }

    /// Reports the first client of `live` that has come to a companion port: the server
    /// is not as it was before, whether or not the session is ever claimed.
    fn use_companion(&self, live: &Live, client: IpAddr) {
        if live.flows.lock().companion.replace(client).is_none() {
            self.send(live.slot, joined_companion(live, client));
        }
    }

    /// The reports that an agent may have missed of clients on its companion ports.
    pub(super) fn companions_used(&self, slot: Slot) -> Vec<ToAgent> {
        let of_slot = self.live.values().filter(|live| live.slot == slot);
        let used = of_slot.filter_map(|live| {
            let client = live.flows.lock().companion?;
            Some(joined_companion(live, client))
        });
        used.collect()
    }

    /// A companion connection comes from another process. Returns whether it belongs
    /// to a live session.
    pub(super) fn restore_companion(&self, port: ListenPort, key: SessionKey) -> bool {
        let mut companions = self.companions.lock();
        let Some(sessions) = companions.restore(port, key) else {
            return false;
        };
        for live in sessions.iter().filter_map(|first| self.live.get(first)) {
            // What its session has carried counts it already.
            live.flows.lock().companions += 1;
        }
        true
    }

    /// A flow under `key` has ended. Returns whether it was a companion connection of
    /// live sessions.
    pub(super) fn close_companion(
        &self,
        port: ListenPort,
        key: SessionKey,
        traffic: Traffic,
    ) -> bool {
        let mut companions = self.companions.lock();
        let Some(sessions) = companions.close(port, key) else {
            return false;
        };
        for live in sessions.iter().filter_map(|first| self.live.get(first)) {
            self.change_flows(live, |flows| flows.close_companion(traffic));
        }
        true
    }
}

fn joined_companion(live: &Live, client: IpAddr) -> ToAgent {
    ToAgent::Joined {
        session_id: live.session.id.clone(),
        client,
        is_companion: true,
    }
}
