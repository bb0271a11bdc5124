//! Whether a processing server is ready, and why not: which of its ports its
//! workload does not listen on, and what it listens on instead.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use crate::pool::{EntryAdmission, Offer};
use crate::session::ServerState;
use crate::sock_diag::{Protocol, SockDiag};
use crate::table::{PortRange, Row};

/// How long a server or one of its entries may be without ports before that is
/// reported: a program that serves one client is started again between two.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most ports of an entry that are looked at.
const MAX_PORTS: usize = 16;

/// Whether the server could be given to a client, now or when a session ends: it
/// works, and its workload takes sessions.
pub(super) fn is_ready(server: &ServerState) -> bool {
    works(server) && !server.not_ready
}

/// Whether the workload of the server listens on one of its ports. One that takes no
/// sessions for now works all the same: it may have some.
pub(super) fn works(server: &ServerState) -> bool {
    server.attached && server.ports.iter().any(|ports| ports.offered() > 0)
}

/// Where the workload of a server should listen.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    /// The ports of the server.
    pub(super) row: &'a Row,
    /// Address of the server.
    pub(super) address: IpAddr,
    /// Whether connection servers listen on the port with this number: what is
    /// found there on localhost is no workload.
    pub(super) is_connection_port: &'a dyn Fn(u16) -> bool,
}

/// What was reported about the readiness of a server.
#[derive(Debug)]
pub(super) struct Readiness {
    was_ready: bool,
    /// When the server was last ready, or else when it started.
    last_ready: Instant,
    /// The port entries that a client cannot have without the workload.
    entries: BTreeMap<String, Entry>,
}

/// What was seen of the ports of one name.
#[derive(Debug)]
struct Entry {
    /// When one of them was last offered, or else when they were first looked at.
    last_offered: Instant,
    /// Whether it was reported that none is offered.
    is_reported: bool,
}

impl Readiness {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            was_ready: false,
            last_ready: now,
            entries: BTreeMap::new(),
        }
    }

    /// What is to be reported about `server` at `now`. Its workload should listen at
    /// `place`. `listener` is asked only for ports that are not listened on.
    pub(super) fn observe(
        &mut self,
        server: &ServerState,
        place: Place<'_>,
        listener: Listener<'_>,
        now: Instant,
    ) -> Vec<String> {
        // A server that takes no more sessions is replaced, which is reported then.
        if !server.attached || server.spent || server.draining {
            return Vec::new();
        }
        let mut events = Vec::new();
        events.extend(self.observe_server(server, place.address, now));
        let ranges = place.row.ranges.iter();
        for range in ranges.filter(|range| needs_workload(range)) {
            events.extend(self.observe_entry(server, range, place, listener, now));
        }
        events
    }

    fn observe_server(
        &mut self,
        server: &ServerState,
        address: IpAddr,
        now: Instant,
    ) -> Option<String> {
        let name = &server.server;
        if is_ready(server) {
            self.last_ready = now;
            let is_news = !std::mem::replace(&mut self.was_ready, true);
            return is_news.then(|| format!("{name} is ready at {address}"));
        }
        let is_late = now.duration_since(self.last_ready) >= PATIENCE;
        if !is_late || !std::mem::replace(&mut self.was_ready, false) {
            return None;
        }
        let reason = if server.not_ready {
            "its workload takes no new sessions for now, as it has said with PUT /v1/readiness"
        } else {
            "its workload listens on no port"
        };
        Some(format!("{name} is no longer ready: {reason}"))
    }

    fn observe_entry(
        &mut self,
        server: &ServerState,
        range: &PortRange,
        place: Place<'_>,
        listener: Listener<'_>,
        now: Instant,
    ) -> Option<String> {
        let entry = self.entries.entry(range.name.clone()).or_insert(Entry {
            last_offered: now,
            is_reported: false,
        });
        let mut ports = server.ports.iter().filter(|it| it.name == range.name);
        if ports.clone().any(|ports| ports.offered() > 0) {
            entry.last_offered = now;
            entry.is_reported = false;
            return None;
        }
        if entry.is_reported || ports.all(|ports| ports.not_listening == 0) {
            return None;
        }
        let reason = match elsewhere(listener, range, place) {
            Some((transport, found, wanted)) => format!(
                "{transport} {found} is listened on instead of {wanted}: make the workload listen on $(POD_IP)"
            ),
            None if now.duration_since(entry.last_offered) >= PATIENCE => {
                let wanted = SocketAddr::new(place.address, range.server_port.get());
                format!("the workload does not listen on {wanted}")
            }
            None => return None,
        };
        entry.is_reported = true;
        Some(format!(
            "port {} of {} cannot be given: {reason}",
            range.name, server.server
        ))
    }
}

/// Whether a client cannot use the ports of `range` unless a workload listens. No
/// request gets companion ports, those of an open entry belong to no session, and both
/// may open for a moment only.
fn needs_workload(range: &PortRange) -> bool {
    let is_for_sessions = matches!(range.admission, None | Some(EntryAdmission::Session));
    range.offer != Offer::Always && is_for_sessions
}

/// Gives the local address of the socket that a client of an address would reach.
pub(super) type Listener<'a> = &'a mut dyn FnMut(Protocol, SocketAddr) -> Option<SocketAddr>;

/// Asks the kernel; nothing where it does not answer.
pub(super) fn ask_kernel(protocol: Protocol, address: SocketAddr) -> Option<SocketAddr> {
    let found = SockDiag::open().ok()?.listeners(protocol, &[address]);
    let found = found.ok()?.into_iter().next()??;
    Some(found.local)
}

/// A socket on a port of `range` at an address where a workload listens by
/// mistake instead of `place`: all addresses, or localhost. With its transport
/// protocol and the socket that is needed.
fn elsewhere(
    listener: Listener<'_>,
    range: &PortRange,
    place: Place<'_>,
) -> Option<(&'static str, SocketAddr, SocketAddr)> {
    let address = place.address;
    let places: [IpAddr; 3] = [
        address,
        Ipv4Addr::LOCALHOST.into(),
        Ipv6Addr::LOCALHOST.into(),
    ];
    let protocols = [
        (Protocol::Tcp, "TCP", range.protocol.has_tcp()),
        (Protocol::Udp, "UDP", range.protocol.has_udp()),
    ];
    let targets = range
        .connection_ports()
        .filter_map(|port| range.target(port));
    for port in targets.take(MAX_PORTS) {
        let wanted = SocketAddr::new(address, port.get());
        for (protocol, name, _) in protocols.iter().filter(|(_, _, is_used)| *is_used) {
            let mut found = places
                .iter()
                .filter_map(|place| listener(*protocol, SocketAddr::new(*place, port.get())));
            let is_mistake = |found: &SocketAddr| {
                let is_connection_server =
                    found.ip().is_loopback() && (place.is_connection_port)(found.port());
                found.ip().to_canonical() != address && !is_connection_server
            };
            if let Some(found) = found.find(is_mistake) {
                return Some((name, found, wanted));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::session::PortState;
    use crate::table::Table;

    fn server(attached: bool, free: u32, not_listening: u32) -> ServerState {
        let ports = serde_json::json!([{
            "name": "main", "protocol": "TCPUDP", "free": free, "held": 0, "busy": 0,
            "lingering": 0, "notListening": not_listening,
        }]);
        let server = serde_json::json!({
            "slot": 0, "server": "t-0", "attached": attached, "draining": false,
            "sessions": 0, "ports": ports,
        });
        serde_json::from_value(server).unwrap()
    }

    fn table() -> Table {
        table_of("port: 7000, count: 2")
    }

    /// A table of one server whose only entry has these fields.
    fn table_of(entry: &str) -> Table {
        let text = "\
apiVersion: portpool.dev/v1alpha1
kind: ProcessingPool
metadata: {name: t}
spec:
  replicas: 1
  ports: [{name: main, protocol: TCPUDP, ENTRY}]
  template: {spec: {containers: [{name: a, command: [a]}]}}
";
        let pool = crate::manifest::parse(&text.replace("ENTRY", entry)).unwrap();
        super::super::running::plan_first(&pool).table
    }

    /// What is reported about `server` after `seconds`, while `tcp` and `udp` are
    /// listened on.
    fn observe(
        readiness: &mut Readiness,
        server: &ServerState,
        at: (Instant, u64),
        listened: (&[&str], &[&str]),
    ) -> Vec<String> {
        observe_in(&table(), readiness, server, at, listened)
    }

    fn observe_in(
        table: &Table,
        readiness: &mut Readiness,
        server: &ServerState,
        (start, seconds): (Instant, u64),
        (tcp, udp): (&[&str], &[&str]),
    ) -> Vec<String> {
        let mut listener = |protocol, address: SocketAddr| {
            let listed = if protocol == Protocol::Tcp { tcp } else { udp };
            let mut listed = listed.iter().map(|one| one.parse::<SocketAddr>().unwrap());
            listed.find(|found| {
                let is_reached = found.ip() == address.ip() || found.ip().is_unspecified();
                is_reached && found.port() == address.port()
            })
        };
        let now = start + Duration::from_secs(seconds);
        let place = Place {
            is_connection_port: &|port| table.has_connection_port(port),
            ..place(table)
        };
        readiness.observe(server, place, &mut listener, now)
    }

    /// The place of the first server, without connection servers.
    fn place(table: &Table) -> Place<'_> {
        Place {
            row: &table.rows[0],
            address: IpAddr::from([127, 0, 0, 2]),
            is_connection_port: &|_| false,
        }
    }

    #[test]
    fn a_server_is_ready_while_its_workload_listens() {
        let start = Instant::now();
        let readiness = &mut Readiness::new(start);
        let none: (&[&str], &[&str]) = (&[], &[]);
        let mut at =
            |server: &ServerState, seconds| observe(readiness, server, (start, seconds), none);
        assert_eq!(at(&server(false, 0, 0), 0), [""; 0]);
        assert_eq!(at(&server(true, 0, 2), 1), [""; 0]);
        assert_eq!(at(&server(true, 2, 0), 2), ["t-0 is ready at 127.0.0.2"]);
        // A program that serves one client is started again.
        assert_eq!(at(&server(true, 0, 2), 3), [""; 0]);
        assert_eq!(at(&server(true, 1, 1), 4), [""; 0]);
        assert_eq!(
            at(&server(true, 0, 2), 9),
            [
                "t-0 is no longer ready: its workload listens on no port",
                "port main of t-0 cannot be given: the workload does not listen on 127.0.0.2:7000",
            ]
        );
        assert_eq!(at(&server(true, 0, 2), 20), [""; 0]);
        assert_eq!(at(&server(true, 2, 0), 21), ["t-0 is ready at 127.0.0.2"]);
    }

    #[test]
    fn a_port_that_is_missing_is_named_though_another_one_is_offered() {
        let start = Instant::now();
        let mut readiness = Readiness::new(start);
        let mut table = table();
        let always = PortRange {
            name: "media".to_owned(),
            offer: Offer::Always,
            ..table.rows[0].ranges[0].clone()
        };
        table.rows[0].ranges.push(always);
        let mut at = |main: (u32, u32), seconds| {
            let mut server = server(true, main.0, main.1);
            let media = PortState {
                name: "media".to_owned(),
                free: 2,
                ..server.ports[0].clone()
            };
            server.ports.push(media);
            observe_in(
                &table,
                &mut readiness,
                &server,
                (start, seconds),
                (&[], &[]),
            )
        };
        let missing =
            "port main of t-0 cannot be given: the workload does not listen on 127.0.0.2:7000";
        assert_eq!(at((0, 2), 1), ["t-0 is ready at 127.0.0.2"]);
        assert_eq!(at((0, 2), 6), [missing]);
        assert_eq!(at((0, 2), 60), [""; 0], "said once");
        // It is said again after it was there.
        assert_eq!(at((2, 0), 61), [""; 0]);
        assert_eq!(at((0, 2), 65), [""; 0]);
        assert_eq!(at((0, 2), 66), [missing]);
    }

    #[test]
    fn an_entry_that_a_running_server_gets_has_time_to_be_listened_on() {
        let start = Instant::now();
        let mut readiness = Readiness::new(start);
        let mut at = |table: &Table, server: &ServerState, seconds| {
            observe_in(table, &mut readiness, server, (start, seconds), (&[], &[]))
        };
        let (mut table, mut server) = (table(), server(true, 2, 0));
        assert_eq!(at(&table, &server, 1), ["t-0 is ready at 127.0.0.2"]);
        let mut further = table.rows[0].ranges[0].clone();
        further.name = "further".to_owned();
        table.rows[0].ranges.push(further);
        let ports = PortState {
            name: "further".to_owned(),
            free: 0,
            not_listening: 2,
            ..server.ports[0].clone()
        };
        server.ports.push(ports);
        assert_eq!(at(&table, &server, 60), [""; 0]);
        assert_eq!(at(&table, &server, 64), [""; 0]);
        assert_eq!(at(&table, &server, 65).len(), 1);
    }

    #[test]
    fn a_server_whose_workload_takes_no_sessions_is_not_called_ready() {
        let start = Instant::now();
        let mut readiness = Readiness::new(start);
        let mut at = |server: &ServerState, seconds| {
            observe(&mut readiness, server, (start, seconds), (&[], &[]))
        };
        let unready = ServerState {
            not_ready: true,
            ..server(true, 2, 0)
        };
        assert!(!is_ready(&unready));
        assert!(works(&unready), "it is not replaced first");
        assert_eq!(at(&unready, 0), [""; 0]);
        assert_eq!(at(&server(true, 2, 0), 1), ["t-0 is ready at 127.0.0.2"]);
        assert_eq!(at(&unready, 2), [""; 0]);
        let said = at(&unready, 7);
        assert!(said[0].contains("PUT /v1/readiness"), "{said:?}");
        assert_eq!(at(&server(true, 2, 0), 8), ["t-0 is ready at 127.0.0.2"]);
    }

    #[test]
    fn nothing_is_said_of_a_server_that_takes_no_more_sessions() {
        let start = Instant::now();
        for (spent, draining) in [(true, false), (false, true)] {
            let mut readiness = Readiness::new(start);
            for (free, not_listening, seconds) in [(2, 0, 0), (0, 2, 9)] {
                let server = ServerState {
                    spent,
                    draining,
                    ..server(true, free, not_listening)
                };
                let said = observe(&mut readiness, &server, (start, seconds), (&[], &[]));
                assert_eq!(said, [""; 0]);
            }
        }
    }

    #[test]
    fn an_address_that_is_listened_on_by_mistake_is_named_at_once() {
        let cases: [(&[&str], &[&str], &str); 5] = [
            (
                &["0.0.0.0:7000"],
                &[],
                "TCP 0.0.0.0:7000 is listened on instead of 127.0.0.2:7000",
            ),
            (
                &["[::]:7001"],
                &[],
                "TCP [::]:7001 is listened on instead of 127.0.0.2:7001",
            ),
            (
                &[],
                &["127.0.0.1:7000"],
                "UDP 127.0.0.1:7000 is listened on instead of",
            ),
            // Another server's, and another port.
            (&["127.0.0.3:7000", "0.0.0.0:7002"], &[], ""),
            (&[], &[], ""),
        ];
        for (tcp, udp, words) in cases {
            let start = Instant::now();
            let readiness = &mut Readiness::new(start);
            let found = observe(readiness, &server(true, 0, 2), (start, 0), (tcp, udp));
            assert_eq!(found.len(), usize::from(!words.is_empty()), "{found:?}");
            assert!(found.iter().all(|event| event.contains(words)), "{found:?}");
            assert!(found.iter().all(|event| event.contains("$(POD_IP)")));
            let again = observe(readiness, &server(true, 0, 2), (start, 1), (tcp, udp));
            assert_eq!(again, [""; 0], "said once");
        }
    }

    #[test]
    fn a_connection_server_is_not_taken_for_a_workload() {
        // The first connection port of this pool is 20000.
        let cases = [
            ("mapping: Identity", "127.0.0.1:20000", 0),
            ("mapping: Identity", "0.0.0.0:20000", 1),
            ("port: 7000", "127.0.0.1:7000", 1),
        ];
        for (entry, listened, count) in cases {
            let (start, mut readiness) = (Instant::now(), Readiness::new(Instant::now()));
            let (table, server) = (table_of(entry), server(true, 0, 1));
            let listened: (&[&str], &[&str]) = (&[listened], &[]);
            let found = observe_in(&table, &mut readiness, &server, (start, 0), listened);
            assert_eq!(found.len(), count, "{entry}: {found:?}");
        }
    }

    #[test]
    fn nothing_is_said_of_ports_that_need_no_workload() {
        for (field, count) in [
            ("offer: Always", 0),
            ("admission: Open", 0),
            ("count: 1", 1),
        ] {
            let (start, mut readiness) = (Instant::now(), Readiness::new(Instant::now()));
            let (table, server) = (
                table_of(&format!("port: 7000, {field}")),
                server(true, 0, 1),
            );
            let listened: (&[&str], &[&str]) = (&["0.0.0.0:7000"], &[]);
            let found = observe_in(&table, &mut readiness, &server, (start, 0), listened);
            assert_eq!(found.len(), count, "{field}: {found:?}");
        }
    }

    #[test]
    fn nothing_is_said_of_companion_ports() {
        let (start, server) = (Instant::now(), server(true, 0, 1));
        let mut table = table_of("port: 7000");
        for (admission, count) in [(None, 1), (Some(EntryAdmission::Companion), 0)] {
            table.rows[0].ranges[0].admission = admission;
            let mut readiness = Readiness::new(start);
            let listened: (&[&str], &[&str]) = (&["0.0.0.0:7000"], &[]);
            let found = observe_in(&table, &mut readiness, &server, (start, 0), listened);
            assert_eq!(found.len(), count, "{admission:?}: {found:?}");
        }
    }

    #[test]
    fn the_kernel_is_asked_only_for_ports_that_are_missing() {
        let (start, asked) = (Instant::now(), Cell::new(0));
        let mut readiness = Readiness::new(start);
        let table = table();
        for (server, times) in [(server(true, 2, 0), 0), (server(true, 0, 2), 1)] {
            let mut listener = |_, _| {
                asked.set(1);
                None
            };
            readiness.observe(&server, place(&table), &mut listener, start);
            assert_eq!(asked.get(), times);
        }
    }
}
