//! A forwarder between a client and a server, both the test's.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::common::network::{address, network};
use crate::common::table;
use portpool::forward::{
    Config, Decision, Forwarder, Gate, PendingId, SessionKey, Traffic, Transport, UnavailablePort,
};
use portpool::pool::{PortProtocol, Sessions};
use portpool::table::{ListenPort, PortIndex, PortRange, Table};

pub const SOON: Duration = Duration::from_secs(10);

pub const FIRST: u16 = 20_000;

/// A gate whose decision the test sets, and which counts.
pub struct TestGate {
    pub decision: Mutex<Decision>,
    pub admitted: AtomicU64,
    pub closed: Mutex<Vec<Traffic>>,
    pub asked: Mutex<Vec<(PendingId, ListenPort)>>,
}

impl Gate for TestGate {
    fn admit(&self, _: ListenPort, _: Transport, _: SocketAddr) -> Decision {
        let decision = *self.decision.lock().unwrap();
        if matches!(decision, Decision::Admit(_)) {
            self.admitted.fetch_add(1, Ordering::Relaxed);
        }
        decision
    }

    fn ask(&self, id: PendingId, port: ListenPort, _: Transport, _: SocketAddr) {
        self.asked.lock().unwrap().push((id, port));
    }

    fn closed(&self, _: ListenPort, _: SessionKey, traffic: Traffic) {
        self.closed.lock().unwrap().push(traffic);
    }
}

pub const SESSION: SessionKey = SessionKey(7);

/// The turn of a test that uses `::1`: there is only one loopback address of IPv6.
static IPV6: Mutex<()> = Mutex::new(());

/// A forwarder on an address of its own, which leads to servers on another.
pub struct Bench {
    pub forwarder: Forwarder,
    pub gate: Arc<TestGate>,
    pub listen: IpAddr,
    /// The first connection port.
    pub first: u16,
    pub server: IpAddr,
    pub table: Table,
    /// Held until the end of the test.
    _turn: Option<MutexGuard<'static, ()>>,
}

impl Bench {
    pub fn new(decision: Decision) -> Self {
        let network = network();
        Self::on(address(network, 1), address(network, 2), decision)
    }

    pub fn on(listen: IpAddr, server: IpAddr, decision: Decision) -> Self {
        let turn = (listen == IpAddr::V6(Ipv6Addr::LOCALHOST))
            .then(|| IPV6.lock().unwrap_or_else(PoisonError::into_inner));
        let mut bench = Self::idle(listen, FIRST, server, decision);
        bench._turn = turn;
        bench.lead(4, |_| {});
        bench
    }

    /// A forwarder on every address of this machine: on `::` IPv4 ones as well.
    /// Its one port is one that no other test uses.
    pub fn everywhere(any: IpAddr, decision: Decision) -> Self {
        let free = UdpSocket::bind((any, 0)).unwrap();
        let first = free.local_addr().unwrap().port();
        let mut bench = Self::idle(any, first, address(network(), 2), decision);
        drop(free);
        bench.lead(1, |range| range.protocol = PortProtocol::UDP);
        bench
    }

    /// A forwarder without ports.
    pub fn idle(listen: IpAddr, first: u16, server: IpAddr, decision: Decision) -> Self {
        let gate = Arc::new(TestGate {
            decision: Mutex::new(decision),
            admitted: AtomicU64::new(0),
            closed: Mutex::default(),
            asked: Mutex::default(),
        });
        let forwarder = Forwarder::start(&Config::new(listen, Some(2)), &gate).unwrap();
        let table = table::table(Sessions::default(), Vec::new());
        Self {
            forwarder,
            gate,
            listen,
            first,
            server,
            table,
            _turn: None,
        }
    }

    /// Leads `count` connection ports from the first on to as many server ports
    /// from 7000 on.
    pub fn lead(&mut self, count: u16, change: impl FnOnce(&mut PortRange)) {
        let mut range = table::range(self.first, 7000, count);
        change(&mut range);
        self.table.rows = vec![table::row(0, Some(self.server), range)];
        assert_eq!(self.apply(), []);
    }

    /// Applies the table; returns the ports that cannot be opened.
    pub fn apply(&self) -> Vec<UnavailablePort> {
        let table = Arc::new(self.table.clone());
        self.forwarder.apply(&Arc::new(PortIndex::new(table)))
    }

    pub fn serve(&self) -> TcpListener {
        TcpListener::bind((self.server, 7000)).unwrap()
    }

    pub fn connect(&self) -> TcpStream {
        let deadline = Instant::now() + SOON;
        loop {
            match TcpStream::connect((self.listen, self.first)) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(SOON)).unwrap();
                    return stream;
                }
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        }
    }

    /// A client with the address `last` of the bench's network.
    pub fn connect_from(&self, last: u8) -> TcpStream {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let IpAddr::V4(listen) = self.listen else {
            panic!("no other address of IPv6");
        };
        let [a, b, c, _] = listen.octets();
        socket
            .bind(&SocketAddr::from(([a, b, c, last], 0)).into())
            .unwrap();
        let to = SocketAddr::new(self.listen, self.first);
        socket.connect(&to.into()).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    /// A client and its server's end.
    pub fn pair(&self) -> (TcpStream, TcpStream) {
        let listener = self.serve();
        let client = self.connect();
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(SOON)).unwrap();
        (client, server)
    }

    /// Cuts the session on the first port, which is reported like a flow.
    pub fn cut(&self) {
        self.gate.admitted.fetch_add(1, Ordering::Relaxed);
        let port = ListenPort::new(self.first).unwrap();
        self.forwarder.cut(port, SESSION);
    }

    /// Exports everything and imports it again, as a hand-over does.
    pub fn hand_over(&self) {
        let snapshot = self.forwarder.export().unwrap();
        self.forwarder.resume(snapshot);
    }

    /// Waits until every admitted flow is reported as closed.
    pub fn all_closed(&self) -> Vec<Traffic> {
        let admitted = self.gate.admitted.load(Ordering::Relaxed);
        until(|| self.gate.closed.lock().unwrap().len() as u64 >= admitted);
        let closed = self.gate.closed.lock().unwrap().clone();
        assert_eq!(closed.len() as u64, admitted, "each exactly once");
        closed
    }
}

pub fn until(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "did not come to pass");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that are easy to check and hard to get right by accident.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let step = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(step).take(length).collect()
}

pub fn was_reset(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0; 16]), Err(error) if error.kind() == ErrorKind::ConnectionReset)
}
