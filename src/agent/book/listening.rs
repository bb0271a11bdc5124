//! What is known of the workload's sockets, and when to look at them again. The
//! caller looks; nothing is asked here.
//!
//! A look costs processor time and the kernel reports no change, so each server
//! port is looked at when a change of it is likely:
//!
//! | when | how soon |
//! |---|---|
//! | a request would get a port that leads to it | before the answer |
//! | a request would get none, and it has no socket | before the answer, [`BATCH`] ports at most every [`QUICKEST`], those first that were not looked at for longest |
//! | a session ended that had a connection | at once, then like a port without a socket until [`OUTLIVED_AFTER`] |
//! | it has no socket | after an eighth of the time that it had none, at least [`QUICKEST`] and at most [`STEADY`] |
//! | none of these | every [`STEADY`], at most [`STEADY_PER_SECOND`] ports a second |
//!
//! A one-shot program closes its socket a little after the last connection. So a
//! socket proves itself first: it is *proven* when it was seen before a session
//! and still [`OUTLIVED_AFTER`] the last connection of it. `ports` has the rule.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::pool::{Offer, PortProtocol};
use crate::sock_diag::Protocol;
use crate::table::{ListenPort, TargetPort};

/// Shortest time between two looks at a port that may change.
const QUICKEST: Duration = Duration::from_millis(20);

/// Part of the time without a change that the next look waits. It bounds both
/// the looks, whose number grows with the logarithm of that time, and the delay.
const PATIENCE: u32 = 8;

/// Longest time between two looks at a port, unless there are more ports than
/// [`STEADY_PER_SECOND`].
const STEADY: Duration = Duration::from_secs(1);

/// Most ports that are looked at in a second while nothing happens: about 0.2 %
/// of a processor. More ports take longer in turn, which delays only what lists
/// show: a port is looked at before it is given out.
const STEADY_PER_SECOND: u32 = 512;

/// Time that each of the ports that may change adds to [`QUICKEST`], so that
/// thousands of them take no more than a tenth of a processor.
const QUICKEST_PER_PORT: Duration = Duration::from_micros(20);

/// Most ports that are looked at in one go: about 0.1 ms.
const BATCH: usize = 64;

/// How long after the last connection of a session a socket must still be there
/// to count as one that outlives sessions. Programs that serve once end within
/// milliseconds; an interpreter may take longer to end. A lasting program costs one
/// port this time once.
pub(super) const OUTLIVED_AFTER: Duration = Duration::from_millis(500);

/// A server port with one of its protocols: what the kernel is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServerPort {
    /// One of the protocols of the port's entry.
    pub protocol: Protocol,
    /// The number of the port.
    pub number: TargetPort,
}

impl ServerPort {
    /// Those that `number` with `protocol` stands for.
    pub(super) fn all(number: TargetPort, protocol: PortProtocol) -> impl Iterator<Item = Self> {
        let tcp = protocol.has_tcp().then_some(Protocol::Tcp);
        let udp = protocol.has_udp().then_some(Protocol::Udp);
        let protocols = tcp.into_iter().chain(udp);
        protocols.map(move |protocol| Self { protocol, number })
    }
}

/// Tells sockets apart: the number of the socket's inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SocketId(pub u32);

/// What was seen of a server port.
#[derive(Clone, Debug)]
pub(super) struct Sight {
    /// The connection ports that lead to it.
    pub(super) leading: BTreeSet<ListenPort>,
    /// The socket that was there at the last look.
    pub(super) socket: Option<SocketId>,
    /// The time of the last look.
    pub(super) seen_at: Duration,
    /// The socket that has outlived a session.
    proven: Option<SocketId>,
    /// From when on there has been no change.
    unchanged_since: Duration,
    /// Until when the socket that is there must prove itself.
    trial_ends: Option<Duration>,
    /// When it is due, unless that is as steadily as all.
    due: Option<Duration>,
}

impl Sight {
    /// Whether the socket that is there outlives sessions.
    pub(super) fn is_proven(&self) -> bool {
        self.socket.is_some() && self.socket == self.proven
    }

    /// When it is due next, of `quick` ports that may change.
    fn next(&self, now: Duration, quick: u32) -> Option<Duration> {
        if self.socket.is_some() && self.trial_ends.is_none() {
            return None;
        }
        let unchanged = now.saturating_sub(self.unchanged_since);
        let pause = (unchanged / PATIENCE).max(QUICKEST + QUICKEST_PER_PORT * quick);
        let trial_ends = self.trial_ends.filter(|ends| *ends > now);
        let next = trial_ends.map_or(now + pause, |ends| ends.min(now + pause));
        (next < now + STEADY).then_some(next)
    }
}

/// Whether `sockets`, by protocol, are what `offer` asks for.
pub(super) fn suffice(mut sockets: impl Iterator<Item = Option<SocketId>>, offer: Offer) -> bool {
    match offer {
        Offer::WhenListening => sockets.all(|socket| socket.is_some()),
        Offer::WhenAnyListens => sockets.any(|socket| socket.is_some()),
        Offer::Always => true,
    }
}

/// The server ports of the row, and what was seen of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Listening {
    sights: BTreeMap<ServerPort, Sight>,
    /// Ports that may change, by when they are due.
    quick: BTreeSet<(Duration, ServerPort)>,
    /// When the next of the steady looks is due.
    steady_at: Duration,
    /// The port that the last steady look ended with.
    steady_after: Option<ServerPort>,
    /// When ports may be looked at next because a request finds none.
    on_request_at: Duration,
}

impl Listening {
    /// Notes that `leading` leads to `port`. A new port is due at once.
    pub(super) fn add(&mut self, port: ServerPort, leading: ListenPort, now: Duration) {
        let sight = self.sights.entry(port).or_insert_with(|| {
            self.quick.insert((now, port));
            Sight {
                leading: BTreeSet::new(),
                socket: None,
                seen_at: now,
                proven: None,
                unchanged_since: now,
                trial_ends: None,
                due: Some(now),
            }
        });
        sight.leading.insert(leading);
    }

    /// Notes that `leading` does not lead to `port` any more. A port that nothing
    /// leads to is forgotten.
    pub(super) fn remove(&mut self, port: ServerPort, leading: ListenPort) {
        let Some(sight) = self.sights.get_mut(&port) else {
            return;
        };
        sight.leading.remove(&leading);
        if sight.leading.is_empty() {
            if let Some(due) = sight.due {
                self.quick.remove(&(due, port));
            }
            self.sights.remove(&port);
        }
    }

    /// What was seen of `port`.
    pub(super) fn get(&self, port: ServerPort) -> Option<&Sight> {
        self.sights.get(&port)
    }

    /// Whether `ports`, those of one connection port, have the sockets that `offer`
    /// asks for.
    pub(super) fn suffices(&self, ports: &[ServerPort], offer: Offer) -> bool {
        let sockets = ports
            .iter()
            .map(|port| self.sights.get(port).and_then(|sight| sight.socket));
        suffice(sockets, offer)
    }

    /// Begins the trial of the socket at `port`, which ends at `ends`. It is due
    /// at once.
    pub(super) fn begin_trial(&mut self, port: ServerPort, ends: Duration, now: Duration) {
        if let Some(sight) = self.sights.get_mut(&port) {
            sight.trial_ends = sight.trial_ends.max(Some(ends));
            sight.unchanged_since = now;
            if let Some(due) = sight.due.replace(now) {
                self.quick.remove(&(due, port));
            }
            self.quick.insert((now, port));
        }
    }

    /// Notes that the socket which is at `port` has outlived a session.
    pub(super) fn prove(&mut self, port: ServerPort) {
        if let Some(sight) = self.sights.get_mut(&port) {
            sight.proven = sight.socket;
        }
    }

    /// Notes what a look at `port` has found. Returns whether something depends
    /// on it: the socket has changed, or is on trial.
    pub(super) fn see(
        &mut self,
        port: ServerPort,
        socket: Option<SocketId>,
        now: Duration,
    ) -> bool {
        let quick = u32::try_from(self.quick.len()).unwrap_or(u32::MAX);
        let Some(sight) = self.sights.get_mut(&port) else {
            return false;
        };
        let is_changed = sight.socket != socket;
        let is_on_trial = sight.trial_ends.is_some();
        if is_changed {
            sight.socket = socket;
            sight.unchanged_since = now;
        }
        sight.seen_at = now;
        sight.trial_ends = sight.trial_ends.filter(|ends| *ends > now);
        let next = sight.next(now, quick);
        if let Some(due) = std::mem::replace(&mut sight.due, next) {
            self.quick.remove(&(due, port));
        }
        self.quick.extend(next.map(|next| (next, port)));
        is_changed || is_on_trial
    }

    /// The ports to look at now, [`BATCH`] at most. Steady looks go round.
    pub(super) fn take_due(&mut self, now: Duration) -> Vec<ServerPort> {
        let mut due = Vec::new();
        while due.len() < BATCH
            && let Some(&(at, port)) = self.quick.first()
            && at <= now
        {
            self.quick.pop_first();
            if let Some(sight) = self.sights.get_mut(&port) {
                sight.due = None;
            }
            due.push(port);
        }
        if due.is_empty() && self.steady_at <= now {
            due = self.next_steady();
            self.steady_at = now + self.steady_pause();
        }
        due
    }

    /// Those of `ports` to look at now because a request finds none: [`BATCH`] at
    /// most, and none at all for [`QUICKEST`] after that, however many requests come.
    pub(super) fn take_on_request(
        &mut self,
        ports: impl Iterator<Item = ServerPort>,
        now: Duration,
    ) -> Vec<ServerPort> {
        if now < self.on_request_at {
            return Vec::new();
        }
        let seen_at = |port| Some((self.sights.get(&port)?.seen_at, port));
        let longest_ago: BTreeSet<(Duration, ServerPort)> = ports.filter_map(seen_at).collect();
        let ports = longest_ago.into_iter().map(|(_, port)| port);
        let ports: Vec<ServerPort> = ports.take(BATCH).collect();
        if !ports.is_empty() {
            self.on_request_at = now + QUICKEST;
        }
        ports
    }

    /// When [`Listening::take_due`] returns a port next.
    pub(super) fn next_due(&self) -> Option<Duration> {
        let steady = (!self.sights.is_empty()).then_some(self.steady_at);
        let quick = self.quick.first().map(|(at, _)| *at);
        quick.into_iter().chain(steady).min()
    }

    fn next_steady(&mut self) -> Vec<ServerPort> {
        let after = self.steady_after.take();
        let is_next = |port: &ServerPort| after.is_none_or(|after| *port > after);
        let ports = self.sights.keys().copied().filter(is_next);
        let next: Vec<ServerPort> = ports.take(BATCH).collect();
        // From the first one again after the last one.
        self.steady_after = next.last().copied().filter(|_| next.len() == BATCH);
        next
    }

    /// Time between two steady looks at [`BATCH`] ports: all have their turn in
    /// [`STEADY`].
    fn steady_pause(&self) -> Duration {
        let ports = u32::try_from(self.sights.len()).unwrap_or(u32::MAX);
        let batch = u32::try_from(BATCH).unwrap_or(u32::MAX);
        STEADY / ports.min(STEADY_PER_SECOND).div_ceil(batch).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u16) -> ServerPort {
        ServerPort {
            protocol: Protocol::Tcp,
            number: TargetPort::new(number).unwrap(),
        }
    }

    /// Ports from 1000 on, and whether a socket is at each of them.
    fn listening(ports: u16) -> Listening {
        let mut listening = Listening::default();
        for number in 1000..1000 + ports {
            let leading = ListenPort::new(number).unwrap();
            listening.add(port(number), leading, Duration::ZERO);
        }
        listening
    }

    /// Looks for `duration` from `begin` on whenever something is due; `socket`
    /// is at each port. Returns the times of the looks and how many ports each
    /// was at.
    fn look(
        listening: &mut Listening,
        begin: Duration,
        duration: Duration,
        socket: Option<SocketId>,
    ) -> Vec<(Duration, usize)> {
        let mut looks = Vec::new();
        let end = begin + duration;
        let mut now = begin;
        while let Some(next) = listening.next_due().filter(|next| *next < end) {
            now = now.max(next);
            let due = listening.take_due(now);
            assert!((1..=BATCH).contains(&due.len()));
            for port in &due {
                listening.see(*port, socket, now);
            }
            looks.push((now, due.len()));
        }
        looks
    }

    fn count(looks: &[(Duration, usize)]) -> usize {
        looks.iter().map(|(_, ports)| ports).sum()
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn what_listens_is_looked_at_once_a_second() {
        let mut listening = listening(40);
        let looks = look(&mut listening, Duration::ZERO, MINUTE, Some(SocketId(1)));
        assert_eq!(count(&looks), 40 * 61, "all at the start, then steadily");
        assert_eq!(looks.len(), 61);
    }

    #[test]
    fn ten_thousand_ports_cost_no_more_than_five_hundred() {
        for (ports, each) in [(500, 60), (10_000, 3)] {
            let mut listening = listening(ports);
            let looks = look(&mut listening, Duration::ZERO, MINUTE, Some(SocketId(1)));
            let steady = count(&looks) - usize::from(ports);
            assert!((25_000..=31_000).contains(&steady), "{ports}: {steady}");
            let fewest = listening.sights.values().map(|sight| sight.seen_at).min();
            let oldest = MINUTE - fewest.unwrap();
            assert!(oldest <= Duration::from_secs(60 / each + 1), "{oldest:?}");
        }
    }

    #[test]
    fn a_port_that_opens_is_seen_after_an_eighth_of_the_time_before() {
        for milliseconds in [1, 50, 300, 2_000, 7_000, 30_000] {
            let opens = Duration::from_millis(milliseconds);
            let mut listening = listening(1);
            look(&mut listening, Duration::ZERO, opens, None);
            let looks = look(
                &mut listening,
                opens,
                STEADY + QUICKEST * 2,
                Some(SocketId(1)),
            );
            let delay = looks[0].0.saturating_sub(opens);
            let longest = (opens / PATIENCE).clamp(QUICKEST + QUICKEST_PER_PORT, STEADY);
            assert!(delay <= longest, "{opens:?}: {delay:?}");
        }
    }

    #[test]
    fn a_port_that_never_opens_is_looked_at_less_and_less() {
        let mut listening = listening(1);
        let looks = look(&mut listening, Duration::ZERO, MINUTE, None);
        assert!(looks.len() < 110, "{}", looks.len());
    }

    #[test]
    fn a_socket_on_trial_is_looked_at_when_the_trial_ends() {
        let mut listening = listening(1);
        let start = Duration::from_secs(100);
        look(&mut listening, Duration::ZERO, start, Some(SocketId(1)));
        let ends = start + OUTLIVED_AFTER;
        listening.begin_trial(port(1000), ends, start);
        let looks = look(&mut listening, start, STEADY, Some(SocketId(1)));
        assert_eq!(looks[0].0, start);
        assert!(looks.iter().any(|(at, _)| *at == ends), "{looks:?}");
        assert!(looks.len() < 25, "{}", looks.len());
    }

    #[test]
    fn a_port_that_nothing_leads_to_is_forgotten() {
        let mut listening = listening(1);
        let leading = |number| ListenPort::new(number).unwrap();
        listening.add(port(1000), leading(7), Duration::ZERO);
        listening.remove(port(1000), leading(7));
        assert!(listening.get(port(1000)).is_some());
        listening.remove(port(1000), leading(1000));
        assert!(listening.get(port(1000)).is_none());
        assert_eq!(listening.next_due(), None);
        assert_eq!(listening.take_due(MINUTE), []);
    }
}
