//! Which sockets the workload listens on, as the kernel reports them for this
//! network namespace. No connection is made to find out.
//!
//! The kernel is asked by `sock_diag` for one server port after the other, so the
//! cost grows with the ports of this server and not with the sockets of the
//! machine. It answers what a client's first packet would reach. Where it does
//! not answer (no module, a sandbox), `proc_net` reads files instead, which report
//! less: there, an IPv6 socket on all addresses counts for IPv4 even if it is
//! `IPV6_V6ONLY`.
//!
//! When to look is decided in `book`.
//!
//! Source: sock_diag(7).

mod proc_net;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use tracing::info;

use super::book::{ServerPort, SocketId};
use crate::sock_diag::{Protocol, SockDiag};

/// Shortest time between two looks where `/proc/net` is read: the kernel then
/// walks the tables of all sockets of the machine.
const FILES_PAUSE: Duration = Duration::from_millis(100);

/// Which sockets count as the workload's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ListenScope {
    /// Only those bound to our address: where several servers share a network
    /// namespace, as under `portpool local`.
    Address,
    /// Those bound to all addresses too: where the namespace is ours, as in a
    /// pod.
    Any,
}

impl ListenScope {
    /// Whether a socket that is bound to `bound` is the workload's, and gets what
    /// is sent to `address`. `::` includes IPv4.
    fn includes(self, bound: IpAddr, address: IpAddr) -> bool {
        let bound = bound.to_canonical();
        let is_wildcard =
            bound.is_unspecified() && (bound.is_ipv6() || bound.is_ipv4() == address.is_ipv4());
        bound == address || (self == Self::Any && is_wildcard)
    }
}

/// Looks at server ports.
#[derive(Debug)]
pub struct Reader {
    address: IpAddr,
    scope: ListenScope,
    /// `None` where the kernel does not answer.
    diag: Option<SockDiag>,
}

impl Reader {
    /// A reader of the sockets that serve `address`, which is one of this machine.
    #[must_use]
    pub fn new(address: IpAddr, scope: ListenScope) -> Self {
        let address = address.to_canonical();
        let diag = open(address).inspect_err(|error| {
            info!(%error, "no answer by sock_diag: reading /proc/net, which takes more processor time");
        });
        let diag = diag.ok();
        Self {
            address,
            scope,
            diag,
        }
    }

    /// Shortest time between two looks; zero where a look costs little.
    #[must_use]
    pub fn pause(&self) -> Duration {
        match self.diag {
            Some(_) => Duration::ZERO,
            None => FILES_PAUSE,
        }
    }

    /// The sockets at `ports` now, in their order; `None` where the workload does
    /// not listen.
    ///
    /// # Errors
    /// The kernel's, or the file system's where `/proc/net` is read.
    pub fn look(&mut self, ports: &[ServerPort]) -> io::Result<Vec<Option<SocketId>>> {
        match &mut self.diag {
            Some(diag) => ask(diag, self.address, self.scope, ports),
            None => proc_net::look(self.address, self.scope, ports),
        }
    }
}

/// Opens a socket for requests to the kernel.
///
/// # Errors
/// The system's; [`io::ErrorKind::Unsupported`] when the kernel does not find
/// sockets that are there. For a protocol without a module it finds none.
fn open(address: IpAddr) -> io::Result<SockDiag> {
    let mut diag = SockDiag::open()?;
    let (tcp, udp) = (
        TcpListener::bind((address, 0))?,
        UdpSocket::bind((address, 0))?,
    );
    for (protocol, local) in [
        (Protocol::Tcp, tcp.local_addr()?),
        (Protocol::Udp, udp.local_addr()?),
    ] {
        if diag.listeners(protocol, &[local])? == [None] {
            return Err(io::ErrorKind::Unsupported.into());
        }
    }
    Ok(diag)
}

fn ask(
    diag: &mut SockDiag,
    address: IpAddr,
    scope: ListenScope,
    ports: &[ServerPort],
) -> io::Result<Vec<Option<SocketId>>> {
    let mut found = vec![None; ports.len()];
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let is_asked = |(_, port): &(usize, &ServerPort)| port.protocol == protocol;
        let asked: Vec<(usize, &ServerPort)> = ports.iter().enumerate().filter(is_asked).collect();
        let addresses = asked
            .iter()
            .map(|(_, port)| SocketAddr::new(address, port.number.get()));
        let addresses: Vec<SocketAddr> = addresses.collect();
        let sockets = diag.listeners(protocol, &addresses)?;
        for ((index, _), socket) in asked.into_iter().zip(sockets) {
            let ours = socket.filter(|socket| scope.includes(socket.local.ip(), address));
            found[index] = ours.map(|socket| SocketId(socket.inode));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::TargetPort;
    use proptest::prelude::*;
    use socket2::{Domain, Socket, Type};
    use std::net::Ipv6Addr;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, last])
    }

    /// One that asks the kernel, and one that reads files.
    fn readers(address: IpAddr, scope: ListenScope) -> [Reader; 2] {
        let asking = Reader::new(address, scope);
        assert!(asking.diag.is_some());
        let mut reading = Reader::new(address, scope);
        reading.diag = None;
        [asking, reading]
    }

    fn at(protocol: Protocol, number: u16) -> ServerPort {
        let number = TargetPort::new(number).unwrap();
        ServerPort { protocol, number }
    }

    fn finds(reader: &mut Reader, protocol: Protocol, port: u16) -> bool {
        reader.look(&[at(protocol, port)]).unwrap() != [None]
    }

    #[test]
    fn real_sockets_are_found_on_their_address_only() {
        let here = readers(address(9), ListenScope::Address);
        let elsewhere = readers(address(10), ListenScope::Any);
        for (mut here, mut elsewhere) in here.into_iter().zip(elsewhere) {
            let tcp = TcpListener::bind((address(9), 0)).unwrap();
            let udp = UdpSocket::bind((address(9), 0)).unwrap();
            let ports = [
                at(Protocol::Udp, udp.local_addr().unwrap().port()),
                at(Protocol::Tcp, tcp.local_addr().unwrap().port()),
            ];
            let found = here.look(&ports).unwrap();
            assert!(found.iter().all(Option::is_some));
            assert_ne!(found[0], found[1]);
            assert_eq!(elsewhere.look(&ports).unwrap(), [None; 2]);
            drop((tcp, udp));
            assert_eq!(here.look(&ports).unwrap(), [None; 2]);
        }
    }

    #[test]
    fn a_socket_that_replaces_another_one_has_another_id() {
        for mut reader in readers(address(9), ListenScope::Address) {
            let first = TcpListener::bind((address(9), 0)).unwrap();
            let at = at(Protocol::Tcp, first.local_addr().unwrap().port());
            let before = reader.look(&[at]).unwrap();
            assert_eq!(reader.look(&[at]).unwrap(), before);
            let local = first.local_addr().unwrap();
            drop(first);
            let _second = TcpListener::bind(local).unwrap();
            let after = reader.look(&[at]).unwrap();
            assert!(after[0].is_some());
            assert_ne!(after, before);
        }
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
                assert!(finds(&mut reader, Protocol::Tcp, port));
            }
            for mut reader in readers(address(9), ListenScope::Address) {
                assert!(!finds(&mut reader, Protocol::Tcp, port));
            }
        }
    }

    /// nginx does this for `listen [::]:80`.
    #[test]
    fn a_socket_for_ipv6_only_does_not_serve_an_ipv4_address() {
        for (kind, protocol) in [(Type::STREAM, Protocol::Tcp), (Type::DGRAM, Protocol::Udp)] {
            let Ok(socket) = Socket::new(Domain::IPV6, kind, None) else {
                eprintln!("skipped: no IPv6 here");
                return;
            };
            socket.set_only_v6(true).unwrap();
            let anywhere = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
            socket.bind(&anywhere.into()).unwrap();
            if protocol == Protocol::Tcp {
                socket.listen(1).unwrap();
            }
            let port = socket.local_addr().unwrap().as_socket().unwrap().port();
            let mut ipv4 = Reader::new(address(9), ListenScope::Any);
            assert!(!finds(&mut ipv4, protocol, port));
            let mut ipv6 = Reader::new(Ipv6Addr::LOCALHOST.into(), ListenScope::Any);
            assert!(finds(&mut ipv6, protocol, port));
        }
    }

    #[test]
    fn a_socket_for_ipv4_does_not_serve_an_ipv6_address() {
        let ipv6 = IpAddr::from(Ipv6Addr::LOCALHOST);
        if TcpListener::bind((ipv6, 0)).is_err() {
            eprintln!("skipped: no IPv6 here");
            return;
        }
        let socket = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        for mut reader in readers(ipv6, ListenScope::Any) {
            assert!(!finds(&mut reader, Protocol::Tcp, port));
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
        let port = |address: io::Result<SocketAddr>| address.unwrap().port();
        for mut reader in readers(address(9), ListenScope::Address) {
            assert!(finds(&mut reader, Protocol::Udp, port(server.local_addr())));
            assert!(!finds(
                &mut reader,
                Protocol::Udp,
                port(client.local_addr())
            ));
            assert!(!finds(&mut reader, Protocol::Tcp, port(stream.peer_addr())));
        }
    }

    /// A socket to open, and its address.
    #[derive(Clone, Copy, Debug)]
    struct Plan {
        bound: &'static str,
        is_tcp: bool,
        /// With UDP the socket is connected, with TCP it is only bound.
        is_silent: bool,
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
        (bound, any::<(bool, bool)>()).prop_map(|(bound, (is_tcp, is_silent))| Plan {
            bound,
            is_tcp,
            is_silent,
        })
    }

    /// The socket and its port. `None` where there is no IPv6.
    fn open_socket(plan: Plan) -> Option<(Socket, ServerPort)> {
        let bound: SocketAddr = plan.bound.parse().unwrap();
        let (kind, protocol) = match plan.is_tcp {
            true => (Type::STREAM, Protocol::Tcp),
            false => (Type::DGRAM, Protocol::Udp),
        };
        let socket = Socket::new(Domain::for_address(bound), kind, None).ok()?;
        if bound.is_ipv6() {
            socket.set_only_v6(false).unwrap();
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
        Some((socket, at(protocol, local.port())))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn the_kernel_answers_what_the_files_say(
            plans in prop::collection::vec(plan(), 1..24),
            served in prop::sample::select(vec!["127.0.0.9", "127.0.0.10", "::1"]),
            scope in prop::sample::select(vec![ListenScope::Address, ListenScope::Any]),
        ) {
            let (sockets, ports): (Vec<Socket>, Vec<ServerPort>) =
                plans.into_iter().filter_map(open_socket).unzip();
            let [mut asking, mut reading] = readers(served.parse().unwrap(), scope);
            // Others may open a socket of the same number between two looks.
            let agree = (0..5).any(|_| asking.look(&ports).unwrap() == reading.look(&ports).unwrap());
            prop_assert!(agree, "{:?}, not {:?}", asking.look(&ports), reading.look(&ports));
            drop(sockets);
        }
    }
}
