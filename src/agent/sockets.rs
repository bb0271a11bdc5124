//! Which ports the workload listens on, as the kernel reports the sockets of
//! this network namespace. No connection is made to find out.
//!
//! The kernel is asked by `sock_diag`, for each protocol on its own. Where it
//! does not answer (no module, a sandbox), `/proc/net` is read instead.
//!
//! Source: sock_diag(7); Linux `Documentation/networking/proc_net_tcp.rst`.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::io::Errno;
use tracing::info;

use super::book::Listening;
use crate::sock_diag::{IPPROTO_TCP, IPPROTO_UDP, SockDiag, StateFlags};

/// Which sockets count as the workload's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ListenScope {
    /// Only those bound to our address: where several servers share a network
    /// namespace, as under `portpool local`.
    Address,
    /// Those bound to all addresses too: where the namespace is ours, as in a
    /// pod. An IPv6 socket on all addresses counts for IPv4 as well, as it does
    /// unless it is `IPV6_V6ONLY`.
    Any,
}

/// The sockets of a protocol that wait for any client.
#[derive(Debug)]
struct Kind {
    protocol: u8,
    state: StateFlags,
    /// `state` in a table of `/proc/net`.
    digits: &'static str,
    tables: [&'static str; 2],
}

const TCP: Kind = Kind {
    protocol: IPPROTO_TCP,
    state: StateFlags::LISTEN,
    digits: "0A",
    tables: ["tcp", "tcp6"],
};

/// Unconnected ones have the state of closed ones.
const UDP: Kind = Kind {
    protocol: IPPROTO_UDP,
    state: StateFlags::CLOSE,
    digits: "07",
    tables: ["udp", "udp6"],
};

/// Reads which ports the workload listens on.
#[derive(Debug)]
pub struct Reader {
    address: IpAddr,
    scope: ListenScope,
    tcp: Source,
    udp: Source,
    /// What [`Reader::read_change`] gave last.
    last: Option<Listening>,
}

impl Reader {
    /// Reads the ports of sockets that serve `address`.
    #[must_use]
    pub fn new(address: IpAddr, scope: ListenScope) -> Self {
        let (tcp, udp) = (Source::open(TCP), Source::open(UDP));
        Self {
            address,
            scope,
            tcp,
            udp,
            last: None,
        }
    }

    /// The listening ports now, unless they are those of the last time.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn read_change(&mut self) -> io::Result<Option<Listening>> {
        let listening = self.read()?;
        if self.last.as_ref() == Some(&listening) {
            return Ok(None);
        }
        Ok(Some(self.last.insert(listening).clone()))
    }

    /// The listening ports now.
    ///
    /// # Errors
    /// The file system's, where `/proc/net` is read.
    pub fn read(&mut self) -> io::Result<Listening> {
        let (address, scope) = (self.address, self.scope);
        let ports = |sockets: Vec<SocketAddr>| {
            let ours = sockets.into_iter().filter(|socket| {
                let bound = socket.ip().to_canonical();
                bound == address || (scope == ListenScope::Any && bound.is_unspecified())
            });
            ours.map(|socket| socket.port()).collect::<BTreeSet<u16>>()
        };
        Ok(Listening {
            tcp: ports(self.tcp.sockets()?),
            udp: ports(self.udp.sockets()?),
        })
    }
}

/// Where the sockets of one protocol are read.
#[derive(Debug)]
struct Source {
    kind: Kind,
    /// `None` from when it did not answer on: the kernel may look for a module
    /// whenever it is asked.
    diag: Option<SockDiag>,
}

impl Source {
    fn open(kind: Kind) -> Self {
        let diag = SockDiag::open()
            .inspect_err(|error| tell_of_files(&kind, error))
            .ok();
        Self { kind, diag }
    }

    fn sockets(&mut self) -> io::Result<Vec<SocketAddr>> {
        let Some(diag) = &mut self.diag else {
            return from_files(&self.kind);
        };
        match diag.local_addresses(self.kind.protocol, &self.kind.state) {
            Ok(sockets) => Ok(sockets),
            Err(error) => {
                if is_lasting(&error) {
                    tell_of_files(&self.kind, &error);
                    self.diag = None;
                }
                from_files(&self.kind)
            }
        }
    }
}

fn tell_of_files(kind: &Kind, error: &io::Error) {
    info!(
        tables = kind.tables.join(", "),
        %error,
        "no answer by sock_diag: reading /proc/net, which takes more processor time"
    );
}

/// Whether the kernel will say so again: it has no module for it, or a sandbox
/// forbids it. Other errors pass, as a lack of memory does.
fn is_lasting(error: &io::Error) -> bool {
    const LASTING: [Errno; 8] = [
        Errno::NOENT,
        Errno::PERM,
        Errno::ACCESS,
        Errno::PROTONOSUPPORT,
        Errno::AFNOSUPPORT,
        Errno::OPNOTSUPP,
        Errno::NOSYS,
        Errno::INVAL,
    ];
    Errno::from_io_error(error).is_some_and(|errno| LASTING.contains(&errno))
}

/// A missing table (no IPv6) counts as empty.
fn from_files(kind: &Kind) -> io::Result<Vec<SocketAddr>> {
    let mut sockets = Vec::new();
    for table in kind.tables {
        match std::fs::read_to_string(format!("/proc/net/{table}")) {
            Ok(text) => sockets.extend(parse_table(&text, kind.digits)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

/// The local addresses of the sockets in the state `digits`. Lines that are not
/// as documented are passed over.
fn parse_table(table: &str, digits: &str) -> Vec<SocketAddr> {
    let sockets = table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, _remote) = (fields.next()?, fields.next()?);
        if fields.next()? != digits {
            return None;
        }
        let (bound, port) = local.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        Some(SocketAddr::new(parse_address(bound)?, port))
    });
    sockets.collect()
}

/// The kernel prints addresses as 32-bit words in the machine's byte order.
fn parse_address(text: &str) -> Option<IpAddr> {
    let word = |index: usize| {
        let digits = text.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match text.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let mut octets = [0; 16];
            for index in 0..4 {
                octets[index * 4..index * 4 + 4].copy_from_slice(&word(index)?);
            }
            Some(IpAddr::V6(Ipv6Addr::from(octets)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use socket2::{Domain, Socket, Type};
    use std::net::{TcpListener, UdpSocket};

    fn address(last: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, last])
    }

    /// One that asks the kernel, and one that reads files.
    fn readers(address: IpAddr, scope: ListenScope) -> [Reader; 2] {
        let asking = Reader::new(address, scope);
        assert!(asking.tcp.diag.is_some() && asking.udp.diag.is_some());
        let mut reading = Reader::new(address, scope);
        (reading.tcp.diag, reading.udp.diag) = (None, None);
        [asking, reading]
    }

    #[test]
    fn real_sockets_are_found_on_their_address_only() {
        let here = readers(address(9), ListenScope::Address);
        let elsewhere = readers(address(10), ListenScope::Any);
        for (mut here, mut elsewhere) in here.into_iter().zip(elsewhere) {
            let tcp = TcpListener::bind((address(9), 0)).unwrap();
            let udp = UdpSocket::bind((address(9), 0)).unwrap();
            let (tcp_port, udp_port) = (
                tcp.local_addr().unwrap().port(),
                udp.local_addr().unwrap().port(),
            );
            let found = here.read().unwrap();
            assert!(found.tcp.contains(&tcp_port) && found.udp.contains(&udp_port));
            let found = elsewhere.read().unwrap();
            assert!(!found.tcp.contains(&tcp_port) && !found.udp.contains(&udp_port));
            drop((tcp, udp));
            let found = here.read().unwrap();
            assert!(!found.tcp.contains(&tcp_port) && !found.udp.contains(&udp_port));
        }
    }

    #[test]
    fn the_same_ports_are_reported_once() {
        // No other test listens here, nor this one of another process.
        let [.., high, low] = std::process::id().to_be_bytes();
        let address = IpAddr::from([127, 90, high, low]);
        let mut reader = Reader::new(address, ListenScope::Address);
        assert_eq!(reader.read_change().unwrap(), Some(Listening::default()));
        assert_eq!(reader.read_change().unwrap(), None);
        let listener = TcpListener::bind((address, 0)).unwrap();
        let tcp = BTreeSet::from([listener.local_addr().unwrap().port()]);
        let udp = BTreeSet::new();
        assert_eq!(reader.read_change().unwrap(), Some(Listening { tcp, udp }));
        assert_eq!(reader.read_change().unwrap(), None);
        drop(listener);
        assert_eq!(reader.read_change().unwrap(), Some(Listening::default()));
    }

    #[test]
    fn a_wildcard_socket_counts_where_the_namespace_is_ours() {
        for bound in ["0.0.0.0:0", "[::]:0"] {
            let Ok(socket) = TcpListener::bind(bound) else {
                eprintln!("skipped: no {bound} here");
                continue;
            };
            let port = socket.local_addr().unwrap().port();
            for mut reader in readers(address(9), ListenScope::Any) {
                assert!(reader.read().unwrap().tcp.contains(&port));
            }
            for mut reader in readers(address(9), ListenScope::Address) {
                assert!(!reader.read().unwrap().tcp.contains(&port));
            }
        }
    }

    #[test]
    fn connected_sockets_are_not_listening() {
        let server = UdpSocket::bind((address(9), 0)).unwrap();
        let client = UdpSocket::bind((address(9), 0)).unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let listener = TcpListener::bind((address(9), 0)).unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _accepted = listener.accept().unwrap();
        drop(listener);
        for mut reader in readers(address(9), ListenScope::Address) {
            let found = reader.read().unwrap();
            assert!(found.udp.contains(&server.local_addr().unwrap().port()));
            assert!(!found.udp.contains(&client.local_addr().unwrap().port()));
            assert!(!found.tcp.contains(&stream.peer_addr().unwrap().port()));
        }
    }

    #[test]
    fn both_families_and_mapped_addresses_are_understood() {
        let head = "  sl  local_address rem_address   st\n";
        for (bound, expected) in [
            ("0100007F:1B58", "127.0.0.1:7000"),
            (
                "0000000000000000FFFF00000100007F:1B58",
                "[::ffff:127.0.0.1]:7000",
            ),
            ("00000000000000000000000001000000:1B58", "[::1]:7000"),
        ] {
            let table = format!("{head}   0: {bound} 00000000:0000 0A 0:0\n");
            assert_eq!(parse_table(&table, "0A"), [expected.parse().unwrap()]);
            assert_eq!(parse_table(&table, "07"), []);
        }
    }

    #[test]
    fn files_are_read_from_when_the_kernel_does_not_answer_on() {
        let listener = TcpListener::bind((address(9), 0)).unwrap();
        // For experiments, RFC 3692: no module can be for it.
        let kind = Kind {
            protocol: 253,
            ..TCP
        };
        let mut source = Source::open(kind);
        assert!(source.diag.is_some());
        for _ in 0..2 {
            let found = source.sockets().unwrap();
            assert!(found.contains(&listener.local_addr().unwrap()));
            assert!(source.diag.is_none());
        }
    }

    #[test]
    fn only_a_lasting_error_ends_the_use_of_a_source() {
        let errno = |errno: Errno| io::Error::from(errno);
        for error in [Errno::NOENT, Errno::PERM, Errno::PROTONOSUPPORT] {
            assert!(is_lasting(&errno(error)));
        }
        for error in [Errno::NOBUFS, Errno::BUSY, Errno::NOMEM] {
            assert!(!is_lasting(&errno(error)));
        }
        assert!(!is_lasting(&io::ErrorKind::Interrupted.into()));
    }

    /// A socket to open, and its address.
    #[derive(Clone, Copy, Debug)]
    struct Plan {
        bound: &'static str,
        is_tcp: bool,
        /// With UDP the socket is connected, with TCP it is only bound.
        is_silent: bool,
        only_v6: bool,
    }

    fn plan() -> impl Strategy<Value = Plan> {
        let bound = prop::sample::select(vec![
            "127.0.0.9:0",
            "127.0.0.10:0",
            "0.0.0.0:0",
            "[::]:0",
            "[::1]:0",
            "[::ffff:127.0.0.9]:0",
            "[::ffff:0.0.0.0]:0",
        ]);
        let flags = (any::<bool>(), any::<bool>(), any::<bool>());
        (bound, flags).prop_map(|(bound, (is_tcp, is_silent, only_v6))| Plan {
            bound,
            is_tcp,
            is_silent,
            only_v6: only_v6 && !bound.contains("ffff"),
        })
    }

    /// The socket and its port. `None` where there is no IPv6.
    fn open(plan: Plan) -> Option<(Socket, u16)> {
        let bound: SocketAddr = plan.bound.parse().unwrap();
        let kind = if plan.is_tcp {
            Type::STREAM
        } else {
            Type::DGRAM
        };
        let socket = Socket::new(Domain::for_address(bound), kind, None).ok()?;
        if bound.is_ipv6() {
            socket.set_only_v6(plan.only_v6).unwrap();
        }
        socket.bind(&bound.into()).ok()?;
        if plan.is_tcp && !plan.is_silent {
            socket.listen(1).unwrap();
        }
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        if !plan.is_tcp && plan.is_silent {
            // Itself is a peer as good as any.
            let _ = socket.connect(&local.into());
        }
        Some((socket, local.port()))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn the_kernel_answers_what_the_files_say(
            plans in prop::collection::vec(plan(), 1..24),
            served in prop::sample::select(vec!["127.0.0.9", "127.0.0.10", "::1"]),
            scope in prop::sample::select(vec![ListenScope::Address, ListenScope::Any]),
        ) {
            let sockets: Vec<(Socket, u16)> = plans.into_iter().filter_map(open).collect();
            let ports: BTreeSet<u16> = sockets.iter().map(|(_, port)| *port).collect();
            let ours = |reader: &mut Reader| {
                let found = reader.read().unwrap();
                [found.tcp, found.udp].map(|found| {
                    found.intersection(&ports).copied().collect::<BTreeSet<_>>()
                })
            };
            let [mut asking, mut reading] = readers(served.parse().unwrap(), scope);
            // Others may open a socket of the same number between two readings.
            let agree = (0..5).any(|_| ours(&mut asking) == ours(&mut reading));
            prop_assert!(agree, "{:?}, not {:?}", ours(&mut asking), ours(&mut reading));
            prop_assert!(asking.tcp.diag.is_some() && asking.udp.diag.is_some());
        }

        #[test]
        fn no_text_panics(text in "(.{0,80}\n){0,5}", bound in "\\PC{0,40}") {
            parse_table(&text, TCP.digits);
            parse_table(&format!("head\n 0: {bound}:1B58 0:0 0A\n"), TCP.digits);
        }
    }
}
