//! The data plane on loopback: real bytes, real faults.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

mod properties;
mod properties_tcp;
mod properties_udp;
mod udp;
mod udp_ends;
mod urgent;

use self::udp::{udp_client, udp_echo};
use crate::common::network::{address, network};
use crate::common::table;
use nix::libc;
use nix::sys::socket::GetSockOpt;
use portpool::forward::{
    ApplyError, Config, Decision, Forwarder, Gate, PendingId, SessionKey, Traffic, Transport,
};
use portpool::pool::{PortProtocol, ProxyProtocol, Sessions};
use portpool::table::{ListenPort, PortIndex, PortRange, Table};

const SOON: Duration = Duration::from_secs(10);
const FIRST: u16 = 20_000;

/// A gate whose decision the test sets, and which counts.
struct TestGate {
    decision: Mutex<Decision>,
    admitted: AtomicU64,
    closed: Mutex<Vec<Traffic>>,
    asked: Mutex<Vec<(PendingId, ListenPort)>>,
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

const SESSION: SessionKey = SessionKey(7);

/// A forwarder on an address of its own, which leads to servers on another.
struct Bench {
    forwarder: Forwarder,
    gate: Arc<TestGate>,
    listen: IpAddr,
    /// The first connection port.
    first: u16,
    server: IpAddr,
    table: Table,
}

impl Bench {
    fn new(decision: Decision) -> Self {
        let network = network();
        Self::on(address(network, 1), address(network, 2), decision)
    }

    fn on(listen: IpAddr, server: IpAddr, decision: Decision) -> Self {
        let mut bench = Self::idle(listen, FIRST, server, decision);
        bench.lead(4, |_| {});
        bench
    }

    /// A forwarder on every address of this machine: on `::` IPv4 ones as well.
    /// Its one port is one that no other test uses.
    fn everywhere(any: IpAddr, decision: Decision) -> Self {
        let free = UdpSocket::bind((any, 0)).unwrap();
        let first = free.local_addr().unwrap().port();
        let mut bench = Self::idle(any, first, address(network(), 2), decision);
        drop(free);
        bench.lead(1, |range| range.protocol = PortProtocol::UDP);
        bench
    }

    /// A forwarder without ports.
    fn idle(listen: IpAddr, first: u16, server: IpAddr, decision: Decision) -> Self {
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
        }
    }

    /// Leads `count` connection ports from the first on to as many server ports
    /// from 7000 on.
    fn lead(&mut self, count: u16, change: impl FnOnce(&mut PortRange)) {
        let mut range = table::range(self.first, 7000, count);
        change(&mut range);
        self.table.rows = vec![table::row(0, Some(self.server), range)];
        self.apply().unwrap();
    }

    fn apply(&self) -> Result<(), ApplyError> {
        let table = Arc::new(self.table.clone());
        self.forwarder.apply(&Arc::new(PortIndex::new(table)))
    }

    fn serve(&self) -> TcpListener {
        TcpListener::bind((self.server, 7000)).unwrap()
    }

    fn connect(&self) -> TcpStream {
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

    /// A client and its server's end.
    fn pair(&self) -> (TcpStream, TcpStream) {
        let listener = self.serve();
        let client = self.connect();
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(SOON)).unwrap();
        (client, server)
    }

    /// Cuts the session on the first port, which is reported like a flow.
    fn cut(&self) {
        self.gate.admitted.fetch_add(1, Ordering::Relaxed);
        let port = ListenPort::new(self.first).unwrap();
        self.forwarder.cut(port, SESSION);
    }

    /// Exports everything and imports it again, as a hand-over does.
    fn hand_over(&self) {
        let snapshot = self.forwarder.export().unwrap();
        self.forwarder.resume(snapshot);
    }

    /// Waits until every admitted flow is reported as closed.
    fn all_closed(&self) -> Vec<Traffic> {
        let admitted = self.gate.admitted.load(Ordering::Relaxed);
        until(|| self.gate.closed.lock().unwrap().len() as u64 >= admitted);
        let closed = self.gate.closed.lock().unwrap().clone();
        assert_eq!(closed.len() as u64, admitted, "each exactly once");
        closed
    }
}

fn until(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "did not come to pass");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that are easy to check and hard to get right by accident.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let step = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(step).take(length).collect()
}

fn was_reset(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0; 16]), Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn bytes_arrive_exactly_through_random_chunks_and_half_closes() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (client, server) = bench.pair();
    let transfer = |mut from: TcpStream, mut to: TcpStream, seed: u64| {
        let sent = pattern(8 << 20, seed);
        let expected = sent.clone();
        let writer = std::thread::spawn(move || {
            let mut rest = sent.as_slice();
            let mut length = 1;
            while !rest.is_empty() {
                length = (length * 7919 + 13) % 200_000 + 1;
                let (chunk, after) = rest.split_at(length.min(rest.len()));
                from.write_all(chunk).unwrap();
                rest = after;
            }
            from.shutdown(Shutdown::Write).unwrap();
        });
        let reader = std::thread::spawn(move || {
            let mut received = Vec::new();
            to.read_to_end(&mut received).unwrap();
            assert!(
                received == expected,
                "{} of {} bytes, or others",
                received.len(),
                expected.len()
            );
        });
        (writer, reader)
    };
    let up = transfer(client.try_clone().unwrap(), server.try_clone().unwrap(), 1);
    let down = transfer(server, client, 2);
    for thread in [up.0, up.1, down.0, down.1] {
        thread.join().unwrap();
    }
    let expected = Traffic {
        upstream_bytes: 8 << 20,
        downstream_bytes: 8 << 20,
    };
    assert_eq!(bench.all_closed(), [expected]);
}

#[test]
fn after_one_side_has_ended_the_other_goes_on() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    server.write_all(b"answer").unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    bench.all_closed();
}

#[test]
fn a_reset_is_passed_on_both_ways() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let reset = |stream: TcpStream| {
        socket2::SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .map(|()| drop(stream))
            .unwrap()
    };
    let (client, mut server) = bench.pair();
    reset(client);
    assert!(was_reset(&mut server));
    drop(server);
    let (mut client, server) = bench.pair();
    reset(server);
    assert!(was_reset(&mut client));
    bench.all_closed();
}

#[test]
fn the_end_of_a_burst_does_not_wait_for_more() {
    const BURST: usize = 48 * 1024 * 1024;
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let sender = std::thread::spawn(move || {
        // Half of the messages take no longer.
        let messages = |server: &mut TcpStream| {
            let mut times: Vec<Duration> = (0..300)
                .map(|_| {
                    let begun = Instant::now();
                    server.write_all(b"x").unwrap();
                    server.read_exact(&mut [0]).unwrap();
                    begun.elapsed()
                })
                .collect();
            times.sort();
            times[150]
        };
        let before = messages(&mut server);
        // The last bytes fill no buffer.
        let burst = pattern(BURST + 77, 5);
        let mut longest = Duration::ZERO;
        for _ in 0..8 {
            server.write_all(&burst).unwrap();
            let sent = Instant::now();
            server.read_exact(&mut [0]).unwrap();
            longest = longest.max(sent.elapsed());
        }
        (before, longest, messages(&mut server))
    });
    let answer = |client: &mut TcpStream| {
        for _ in 0..300 {
            client.read_exact(&mut [0]).unwrap();
            client.write_all(b"y").unwrap();
        }
    };
    answer(&mut client);
    let mut received = vec![0; BURST + 77];
    for _ in 0..8 {
        client.read_exact(&mut received).unwrap();
        client.write_all(b"y").unwrap();
    }
    answer(&mut client);
    assert!(received == pattern(BURST + 77, 5), "bytes have changed");
    let (before, longest, after) = sender.join().unwrap();
    println!("burst's end: {longest:?}; a message: {before:?} before, {after:?} after");
    // What the sockets hold takes a while, also on a busy machine.
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    // Held back, each would take a millisecond.
    let usual = (4 * before).max(Duration::from_micros(900));
    assert!(after < usual, "{after:?}, {before:?} before");
}

nix::getsockopt_impl!(
    LowWater,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    usize,
    nix::sys::socket::sockopt::GetUsize
);

#[derive(Clone, Copy)]
struct LowWater;

#[test]
fn an_exported_stream_holds_nothing_back() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    let is_enough = Arc::new(AtomicBool::new(false));
    let enough = is_enough.clone();
    let sender = std::thread::spawn(move || while server.write_all(&[7; 65_536]).is_ok() {});
    let receiver = std::thread::spawn(move || {
        let mut space = [0; 65_536];
        while !enough.load(Ordering::Relaxed) && client.read(&mut space).is_ok() {}
    });
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(50));
        let snapshot = bench.forwarder.export().unwrap();
        for connection in &snapshot.connections {
            for socket in [&connection.client, &connection.server] {
                assert_eq!(LowWater.get(socket).unwrap(), 1);
            }
        }
        assert_eq!(snapshot.connections.len(), 1);
        bench.forwarder.resume(snapshot);
    }
    is_enough.store(true, Ordering::Relaxed);
    receiver.join().unwrap();
    sender.join().unwrap();
}

#[test]
fn what_a_connection_carries_is_counted_while_it_lives_and_once() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    let counted = || {
        let counters = bench.forwarder.counters();
        (counters.upstream_bytes, counters.downstream_bytes)
    };
    client.write_all(&[1; 3_000]).unwrap();
    server.read_exact(&mut [0; 3_000]).unwrap();
    server.write_all(&[2; 500]).unwrap();
    client.read_exact(&mut [0; 500]).unwrap();
    until(|| counted() == (3_000, 500));
    client.write_all(&[1; 7]).unwrap();
    drop(client);
    server.read_to_end(&mut Vec::new()).unwrap();
    drop(server);
    bench.all_closed();
    assert_eq!(counted(), (3_007, 500));
}

#[test]
fn a_slow_reader_stops_its_sender() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    client
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let sent = pattern(64 << 20, 3);
    let mut written = 0;
    while let Ok(length) = client.write(&sent[written..]) {
        written += length;
        assert!(written < sent.len(), "nothing held the sender back");
    }
    client.shutdown(Shutdown::Write).unwrap();
    let mut received = Vec::new();
    server.read_to_end(&mut received).unwrap();
    assert!(received == sent[..written]);
}

#[test]
fn a_server_that_refuses_or_has_no_address_resets_the_client() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    assert!(was_reset(&mut bench.connect()));
    until(|| bench.forwarder.counters().connect_refused == 1);
    bench.table.rows[0].address = None;
    bench.apply().unwrap();
    assert!(was_reset(&mut bench.connect()));
    until(|| bench.forwarder.counters().no_server == 1);
    bench.all_closed();
}

#[test]
fn a_server_that_does_not_answer_is_given_up() {
    let bench = Bench::new(Decision::Admit(SESSION));
    // A full backlog: the kernel drops what comes.
    let listener =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener
        .bind(&SocketAddr::new(bench.server, 7000).into())
        .unwrap();
    listener.listen(0).unwrap();
    let _filling: Vec<_> = (0..2)
        .map(|_| {
            let socket =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&SocketAddr::new(bench.server, 7000).into());
            socket
        })
        .collect();
    let started = Instant::now();
    assert!(was_reset(&mut bench.connect()));
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(bench.forwarder.counters().connect_timed_out, 1);
    bench.all_closed();
}

#[test]
fn a_pending_client_is_served_refused_or_given_up() {
    let bench = Bench::new(Decision::Ask);
    let listener = bench.serve();
    let mut clients: Vec<TcpStream> = (0..3).map(|_| bench.connect()).collect();
    until(|| bench.gate.asked.lock().unwrap().len() == 3);
    let asked = bench.gate.asked.lock().unwrap().clone();
    bench.gate.admitted.fetch_add(1, Ordering::Relaxed);
    clients[0].write_all(b"early").unwrap();
    bench
        .forwarder
        .answer(asked[0].1, asked[0].0, Decision::Admit(SESSION));
    bench
        .forwarder
        .answer(asked[1].1, asked[1].0, Decision::Refuse);
    let (mut server, _) = listener.accept().unwrap();
    let mut early = [0; 5];
    server.read_exact(&mut early).unwrap();
    assert_eq!(&early, b"early");
    assert!(was_reset(&mut clients[1]));
    assert!(was_reset(&mut clients[2]), "no one answered");
    assert_eq!(bench.forwarder.counters().pending_too_long, 1);
    // An answer that comes too late ends at once.
    bench.gate.admitted.fetch_add(1, Ordering::Relaxed);
    bench
        .forwarder
        .answer(asked[2].1, asked[2].0, Decision::Admit(SESSION));
    drop((server, clients));
    bench.all_closed();
}

#[test]
fn cutting_a_session_resets_its_connections_only() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut cut, _server) = bench.pair();
    *bench.gate.decision.lock().unwrap() = Decision::Admit(SessionKey(8));
    let (mut other, mut server) = bench.pair();
    bench.cut();
    assert!(was_reset(&mut cut));
    other.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_cut_takes_nothing_from_a_connection_that_has_ended() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    let sent = pattern(256 * 1024, 3);
    server.write_all(&sent).unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.read(&mut [0; 16]).unwrap(), 0);
    // Both ends are passed on by then, and wait for the client to read.
    std::thread::sleep(Duration::from_millis(300));
    bench.cut();
    bench.all_closed();
    assert_eq!(bench.forwarder.counters().cut, 0);
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    assert!(received == sent, "{} bytes", received.len());
}

/// The next session on the port is another client's.
#[test]
fn a_client_that_came_before_a_cut_is_not_admitted_after_it() {
    let bench = Bench::new(Decision::Ask);
    let listener = bench.serve();
    // The gate blocks the port's thread at the first client, and the others wait
    // behind it.
    let decision = bench.gate.decision.lock().unwrap();
    let mut early: Vec<TcpStream> = (0..4).map(|_| bench.connect()).collect();
    let other = udp_client(&bench);
    other.send(b"too early").unwrap();
    bench.cut();
    drop(decision);
    bench.all_closed();
    // The gate receives the report of the cut after everything else.
    assert_eq!(bench.forwarder.counters().no_session, 5);
    *bench.gate.decision.lock().unwrap() = Decision::Admit(SessionKey(8));
    for client in &mut early {
        assert!(was_reset(client));
    }
    let admitted = bench.gate.admitted.load(Ordering::Relaxed);
    let mut late = bench.connect();
    late.write_all(b"x").unwrap();
    until(|| bench.gate.admitted.load(Ordering::Relaxed) == admitted + 1);
    drop((late, listener));
    bench.all_closed();
}

#[test]
fn a_silent_connection_is_reset_after_its_idle_time() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    bench.table.sessions.idle_timeout_seconds = 1;
    bench.apply().unwrap();
    let (mut client, _server) = bench.pair();
    let started = Instant::now();
    assert!(was_reset(&mut client));
    assert!((Duration::from_millis(900)..Duration::from_secs(3)).contains(&started.elapsed()));
    assert_eq!(bench.forwarder.counters().idle, 1);
}

/// A hand-over registers the sockets anew, which epoll answers with an event.
#[test]
fn nothing_but_bytes_and_ends_renews_the_idle_time() {
    type Other = fn(&mut Bench);
    let others: [(&str, Other); 2] = [
        ("a hand-over", |bench| bench.hand_over()),
        ("a newer table", |bench| {
            bench.table.generation += 1;
            bench.apply().unwrap();
        }),
    ];
    for (what, other) in others {
        for is_half_closed in [false, true] {
            let mut bench = Bench::new(Decision::Admit(SESSION));
            bench.table.sessions.idle_timeout_seconds = 2;
            bench.apply().unwrap();
            let (mut client, mut server) = bench.pair();
            let started = Instant::now();
            if is_half_closed {
                server.shutdown(Shutdown::Write).unwrap();
                assert_eq!(client.read(&mut [0]).unwrap(), 0);
            }
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(450));
                other(&mut bench);
            }
            server.set_nonblocking(false).unwrap();
            assert!(was_reset(&mut server), "{what}");
            let lasted = started.elapsed();
            let expected = Duration::from_millis(1_900)..Duration::from_millis(2_700);
            assert!(expected.contains(&lasted), "{what}: {lasted:?}");
            assert_eq!(bench.forwarder.counters().idle, 1);
        }
    }
}

#[test]
fn removing_a_port_keeps_its_connections_and_closes_the_port() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    bench.lead(1, |range| {
        range.connection_port = ListenPort::new(FIRST + 50).unwrap()
    });
    until(|| TcpStream::connect((bench.listen, FIRST)).is_err());
    TcpStream::connect((bench.listen, FIRST + 50)).unwrap();
    client.write_all(b"still here").unwrap();
    server.read_exact(&mut [0; 10]).unwrap();
}

#[test]
fn a_port_that_was_removed_can_be_added_at_once() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    for _ in 0..200 {
        bench.lead(1, |range| {
            range.connection_port = ListenPort::new(FIRST + 50).unwrap()
        });
        bench.lead(4, |_| {});
    }
    let _listener = bench.serve();
    bench.connect();
}

#[test]
fn a_port_in_use_is_named_and_nothing_is_changed() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    let _other = TcpListener::bind((bench.listen, FIRST + 5)).unwrap();
    bench.table.rows[0].ranges[0].count = 8;
    let error = bench.apply().unwrap_err().to_string();
    assert!(
        error.contains(&(FIRST + 5).to_string()) && error.contains("another program"),
        "{error}"
    );
    assert_eq!(
        bench.forwarder.open_listeners(),
        8,
        "four ports, TCP and UDP"
    );
    assert!(
        TcpListener::bind((bench.listen, FIRST + 4)).is_ok(),
        "bound for nothing"
    );
}

#[test]
fn the_server_gets_the_clients_address_first() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    bench.lead(4, |range| {
        range.protocol = PortProtocol::TCP;
        range.proxy_protocol = ProxyProtocol::V2;
    });
    let (mut client, mut server) = bench.pair();
    client.write_all(b"data").unwrap();
    let mut received = [0; 32];
    server.read_exact(&mut received).unwrap();
    let header = ppp::v2::Header::try_from(&received[..28]).unwrap();
    let ppp::v2::Addresses::IPv4(addresses) = header.addresses else {
        panic!("{header:?}")
    };
    assert_eq!(addresses.source_port, client.local_addr().unwrap().port());
    assert_eq!(addresses.destination_port, FIRST);
    assert_eq!(&received[28..], b"data");
}

#[test]
fn ipv6_is_forwarded() {
    let loopback = IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]);
    let bench = Bench::on(loopback, loopback, Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    client.write_all(b"six").unwrap();
    server.read_exact(&mut [0; 3]).unwrap();
    let _clients = udp_echo(loopback);
    let client = udp_client(&bench);
    client.send(b"six").unwrap();
    assert_eq!(client.recv(&mut [0; 8]).unwrap(), 3);
}

#[test]
fn ten_thousand_ports_open_and_answer() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    portpool::forward::check_open_files(10_000).unwrap();
    let started = Instant::now();
    bench.lead(10_000, |range| range.protocol = PortProtocol::TCP);
    println!("10,000 ports opened in {:?}", started.elapsed());
    assert_eq!(bench.forwarder.open_listeners(), 10_000);
    let listener = TcpListener::bind((bench.server, 7000 + 9_999)).unwrap();
    let mut client = TcpStream::connect((bench.listen, FIRST + 9_999)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(b"last").unwrap();
    server.read_exact(&mut [0; 4]).unwrap();
}
