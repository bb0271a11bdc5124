//! Datagrams: expiry, errors, sizes, floods.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

use crate::namespace::is_inside;
use crate::target::{Proxy, Target};
use crate::{here, only_for, until};

const WHY_NOT: &str = "it does not forward UDP";

/// Receives a datagram at the server and sends it back; returns its source.
fn answer(server: &UdpSocket) -> SocketAddr {
    let mut space = vec![0; 65_535];
    let (length, from) = server.recv_from(&mut space).unwrap();
    server.send_to(&space[..length], from).unwrap();
    from
}

/// Sends a datagram to the server and back; returns the flow's source address.
pub fn round_trip(client: &UdpSocket, server: &UdpSocket, datagram: &[u8]) -> SocketAddr {
    client.send(datagram).unwrap();
    let from = answer(server);
    let mut space = vec![0; 65_535];
    let length = client.recv(&mut space).unwrap();
    assert!(space[..length] == *datagram, "{length} bytes came back");
    from
}

#[test]
fn datagrams_of_every_size_arrive_as_they_were() {
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 2));
    let (client, server) = (proxy.udp_client(9, 0), proxy.udp_server(0));
    for length in [1, 0, 2, 1200, 1472, 1473, 9000, 32_768, 65_000, 65_507] {
        round_trip(&client, &server, &crate::pattern(length, length as u64));
    }
    drop((client, server));
    proxy.expect_clean();
}

#[test]
fn an_idle_flow_expires_and_begins_anew() {
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 1));
    let (client, server) = (proxy.udp_client(9, 0), proxy.udp_server(0));
    let before = proxy.census().sockets;
    let first = round_trip(&client, &server, b"one");
    let again = round_trip(&client, &server, b"two");
    assert_eq!(first, again, "one flow is one socket");
    until("the flow expires", || proxy.census().sockets <= before);
    round_trip(&client, &server, b"three");
    // A client that sends and is never answered expires too.
    let unanswered = proxy.udp_client(10, 1);
    let mute = proxy.udp_server(1);
    unanswered.send(b"unanswered").unwrap();
    mute.recv(&mut [0; 16]).unwrap();
    drop((client, server, unanswered, mute));
    proxy.expect_clean();
}

#[test]
fn a_server_that_is_gone_is_found_out_and_found_again() {
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 2));
    let client = proxy.udp_client(9, 0);
    // No server listens: the proxy receives ICMP errors.
    for _ in 0..3 {
        client.send(b"lost").unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    let server = proxy.udp_server(0);
    round_trip(&client, &server, b"found");
    drop(server);
    client.send(b"lost again").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let server = proxy.udp_server(0);
    client
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    server
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    until("the server is found again", || {
        client.send(b"found again").unwrap();
        server.recv(&mut [0; 16]).is_ok()
    });
    proxy.counts("connect_refused", 1.0);
    drop((client, server));
    proxy.expect_clean();
}

#[test]
fn as_many_datagrams_go_out_as_came_in() {
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 2));
    let (client, server) = (proxy.udp_client(9, 0), proxy.udp_server(0));
    let mut space = [0; 2048];
    let mut seen = HashSet::new();
    for number in 0..500u32 {
        client.send(&number.to_be_bytes()).unwrap();
        let (length, from) = server.recv_from(&mut space).unwrap();
        assert!(seen.insert(space[..length].to_vec()), "{number} came twice");
        server.send_to(&space[..length], from).unwrap();
        assert_eq!(client.recv(&mut space).unwrap(), 4);
    }
    for socket in [&client, &server] {
        socket
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let error = socket.recv(&mut space).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::WouldBlock,
            "nothing that was not sent"
        );
    }
    drop((client, server));
    proxy.expect_clean();
}

/// How many of the clients get an answer to a datagram each.
fn answered(clients: &[UdpSocket], server: &UdpSocket) -> usize {
    for client in clients {
        client.send(b"hello").unwrap();
    }
    server
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut space = [0; 16];
    let mut sources = HashSet::new();
    while let Ok((_, from)) = server.recv_from(&mut space) {
        sources.insert(from);
    }
    server.set_read_timeout(Some(crate::SOON)).unwrap();
    sources.len()
}

#[test]
fn one_source_cannot_take_all_flows() {
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| {
        (setup.has_udp, setup.udp_idle_seconds) = (true, 2);
        setup.flows_per_source = Some(5);
    });
    let server = proxy.udp_server(0);
    let greedy: Vec<UdpSocket> = (0..20).map(|_| proxy.udp_client(8, 0)).collect();
    assert_eq!(answered(&greedy, &server), 5);
    round_trip(&proxy.udp_client(9, 0), &server, b"not held up");
    if proxy.target == Target::Portpool {
        assert_eq!(proxy.refused("limit_source"), 15.0);
    }
    drop((greedy, server));
    proxy.expect_clean();
}

#[test]
fn a_flood_of_new_clients_locks_no_client_out() {
    const FLOWS: u32 = 100;
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| {
        // Longer than the flood takes: real clients are idle meanwhile.
        (setup.has_udp, setup.udp_idle_seconds) = (true, 15);
        (setup.flows, setup.flows_per_source) = (Some(FLOWS), Some(FLOWS));
    });
    let server = proxy.udp_server(0);
    // Real clients: they have sent again after an answer.
    let real: Vec<UdpSocket> = (20..30).map(|host| proxy.udp_client(host, 0)).collect();
    let flow = |client: &UdpSocket| {
        round_trip(client, &server, b"one");
        round_trip(client, &server, b"two")
    };
    let flows: Vec<SocketAddr> = real.iter().map(flow).collect();
    for number in 0..10 * FLOWS {
        let host = u8::try_from(40 + number % 200).unwrap();
        proxy.udp_client(host, 0).send(b"flood").unwrap();
        let _ = server.recv_from(&mut [0; 16]).unwrap();
    }
    for (client, flow) in real.iter().zip(&flows) {
        assert_eq!(
            round_trip(client, &server, b"three"),
            *flow,
            "it kept its flow"
        );
    }
    round_trip(&proxy.udp_client(9, 0), &server, b"new");
    assert!(proxy.census().sockets <= FLOWS as usize + 60);
    if proxy.target == Target::Portpool {
        let evicted = proxy.metric("portpool_flows_ended_total{cause=\"evicted\"}");
        assert!(evicted >= f64::from(9 * FLOWS), "{evicted} evicted");
    }
    drop((real, server));
    proxy.expect_clean();
}

#[test]
fn a_client_has_a_flow_of_its_own_on_each_port() {
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 2));
    let servers: Vec<_> = (0..4).map(|index| proxy.udp_server(index)).collect();
    let client = UdpSocket::bind((proxy.address(9), 0)).unwrap();
    client.set_read_timeout(Some(crate::SOON)).unwrap();
    let mut space = [0; 64];
    let mut flows = HashSet::new();
    for round in 0..20u8 {
        // All ports are asked before any server answers, the last one first.
        for index in 0..4u8 {
            client
                .send_to(&[round, index], proxy.port(index.into()))
                .unwrap();
        }
        for (index, server) in (0..4u8).zip(&servers).rev() {
            let (length, from) = server.recv_from(&mut space).unwrap();
            assert_eq!(space[..length], [round, index]);
            flows.insert((index, from));
            server.send_to(&[round, index, 1], from).unwrap();
        }
        let answers: HashSet<_> = (0..4)
            .map(|_| {
                let (length, from) = client.recv_from(&mut space).unwrap();
                (space[..length].to_vec(), from)
            })
            .collect();
        let expected = (0..4u8).map(|index| (vec![round, index, 1], proxy.port(index.into())));
        assert_eq!(answers, expected.collect());
    }
    assert_eq!(flows.len(), 4, "one flow for each port: {flows:?}");
    drop((client, servers));
    proxy.expect_clean();
}

#[test]
fn clients_of_one_port_get_their_own_answers() {
    const CLIENTS: u8 = 200;
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 5));
    let server = proxy.udp_server(0);
    // Few addresses, so that most clients differ only in their ports.
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| proxy.udp_client(20 + number % 3, 0))
        .collect();
    let mut space = [0; 64];
    let mut flows = HashSet::new();
    for round in 0..5 {
        let mut asked = Vec::new();
        // Some at a time: a full buffer is no fault here.
        for (number, client) in (0..CLIENTS).zip(&clients) {
            client.send(&[round, number]).unwrap();
            let (length, from) = server.recv_from(&mut space).unwrap();
            assert_eq!(space[..length], [round, number]);
            asked.push((number, from));
        }
        for (number, from) in asked.into_iter().rev() {
            flows.insert((number, from));
            server.send_to(&[round, number, 1], from).unwrap();
        }
        for (number, client) in (0..CLIENTS).zip(&clients) {
            let length = client.recv(&mut space).unwrap();
            assert_eq!(space[..length], [round, number, 1]);
        }
    }
    assert_eq!(flows.len(), usize::from(CLIENTS), "each kept its flow");
    drop((clients, server));
    proxy.expect_clean();
}

#[test]
fn without_descriptors_no_flow_opens_and_all_are_answered_later() {
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 10));
    let server = proxy.udp_server(0);
    let early = proxy.udp_client(9, 0);
    let flow = round_trip(&early, &server, b"before");
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = |current| {
        let limit = Rlimit { current, maximum };
        prlimit(Some(proxy.id()), Resource::Nofile, limit).unwrap();
    };
    limit(Some(3));
    let late: Vec<_> = (20..70).map(|host| proxy.udp_client(host, 0)).collect();
    late.iter().for_each(|client| {
        client.send(b"too early").unwrap();
    });
    // What came before is handled by the time that this comes back.
    assert_eq!(round_trip(&early, &server, b"meanwhile"), flow);
    let before = proxy.processor_time();
    std::thread::sleep(Duration::from_secs(2));
    let used = proxy.processor_time() - before;
    assert!(used < Duration::from_millis(200), "{used:?} in 2 s");
    limit(maximum);
    for client in &late {
        round_trip(client, &server, b"now");
    }
    assert_eq!(round_trip(&early, &server, b"after"), flow);
    proxy.counts("connect_failed", 50.0);
    drop((early, late, server));
    proxy.expect_clean();
}

#[test]
fn a_flooding_server_does_not_hold_others_up() {
    only_for!(Portpool, Nginx; WHY_NOT);
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 2));
    let flooding = proxy.udp_server(0);
    let flooded = proxy.udp_client(8, 0);
    flooded.send(b"begin").unwrap();
    let (_, from) = flooding.recv_from(&mut [0; 16]).unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_over = stop.clone();
    let flood = std::thread::spawn(move || {
        while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
            // A full buffer is no error here.
            let _ = flooding.send_to(&[7; 1000], from);
        }
    });
    until("the flood runs", || {
        proxy.processor_time() > Duration::from_millis(200)
    });
    let (client, server) = (proxy.udp_client(9, 1), proxy.udp_server(1));
    let started = Instant::now();
    for _ in 0..100 {
        round_trip(&client, &server, b"a small one");
    }
    println!(
        "{:?} per round trip beside the flood",
        started.elapsed() / 100
    );
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    flood.join().unwrap();
    drop((client, server, flooded));
    proxy.expect_clean();
}

/// Sends a UDP datagram with a forged source port, which takes a raw socket.
fn send_forged(from: SocketAddr, to: SocketAddr, payload: &[u8]) {
    let (kind, protocol) = (socket2::Type::RAW, Some(socket2::Protocol::UDP));
    let socket = socket2::Socket::new(socket2::Domain::IPV4, kind, protocol).unwrap();
    socket.bind(&SocketAddr::new(from.ip(), 0).into()).unwrap();
    let length = u16::try_from(8 + payload.len()).unwrap();
    let mut datagram = Vec::new();
    // Source, destination, length, and no checksum.
    for field in [from.port(), to.port(), length, 0] {
        datagram.extend(field.to_be_bytes());
    }
    datagram.extend(payload);
    socket.send_to(&datagram, &to.into()).unwrap();
}

/// Answers every datagram that a server receives, until none has come for a
/// second or there are far more than were sent. Returns how many were answered.
fn answers_of(servers: &[UdpSocket]) -> usize {
    const ENDLESS: usize = 1000;
    let (mut last, mut answered, mut space) = (Instant::now(), 0, [0; 64]);
    while last.elapsed() < Duration::from_secs(1) && answered < ENDLESS {
        for server in servers {
            server
                .set_read_timeout(Some(Duration::from_millis(5)))
                .unwrap();
            if let Ok((length, from)) = server.recv_from(&mut space) {
                let _ = server.send_to(&space[..length], from);
                (last, answered) = (Instant::now(), answered + 1);
            }
        }
    }
    answered
}

#[test]
fn datagrams_from_all_its_own_ports_reach_no_server() {
    const EACH: usize = 5;
    only_for!(Portpool, Nginx; WHY_NOT);
    if !is_inside(here!()) {
        return;
    }
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 5));
    let servers: Vec<_> = (0..4).map(|index| proxy.udp_server(index)).collect();
    let client = proxy.udp_client(9, 0);
    let flow = round_trip(&client, &servers[0], b"before");
    // From each port to each port, including itself.
    for _ in 0..EACH {
        for (from, to) in (0..4).flat_map(|from| (0..4).map(move |to| (from, to))) {
            send_forged(proxy.port(from), proxy.port(to), b"round and round");
        }
    }
    assert_eq!(answers_of(&servers), 0);
    assert_eq!(round_trip(&client, &servers[0], b"after"), flow);
    if proxy.target == Target::Portpool {
        assert_eq!(proxy.refused("loop"), (16 * EACH) as f64);
    }
    drop((client, servers));
    proxy.expect_clean();
}

#[test]
fn a_datagram_from_a_port_of_another_thread_starts_no_loop() {
    only_for!(Portpool; "it has one thread here");
    if !is_inside(here!()) {
        return;
    }
    let proxy = Proxy::start(|setup| {
        (setup.has_udp, setup.udp_idle_seconds) = (true, 2);
        setup.threads = 2;
    });
    let servers: Vec<_> = (0..2).map(|index| proxy.udp_server(index)).collect();
    send_forged(proxy.port(1), proxy.port(0), b"round and round");
    assert_eq!(answers_of(&servers), 0);
    drop(servers);
    proxy.expect_clean();
}

#[test]
fn a_datagram_from_its_own_port_at_another_address_starts_no_loop() {
    only_for!(Portpool, Nginx; WHY_NOT);
    if !is_inside(here!()) {
        return;
    }
    let proxy = Proxy::start(|setup| {
        (setup.has_udp, setup.udp_idle_seconds) = (true, 2);
        setup.listen = "0.0.0.0".parse().unwrap();
        setup.server = "127.0.0.2".parse().unwrap();
    });
    let servers: Vec<_> = (0..2).map(|index| proxy.udp_server(index)).collect();
    let [from, to] = ["127.0.0.3:20001", "127.0.0.1:20000"].map(|text| text.parse().unwrap());
    send_forged(from, to, b"round and round");
    assert_eq!(answers_of(&servers), 0);
    drop(servers);
    proxy.expect_clean();
}

#[test]
fn a_datagram_from_a_servers_own_port_starts_no_loop() {
    only_for!(Portpool, Nginx; WHY_NOT);
    if !is_inside(here!()) {
        return;
    }
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 2));
    let servers = [proxy.udp_server(0)];
    let server = servers[0].local_addr().unwrap();
    send_forged(server, proxy.port(0), b"round and round");
    let answered = answers_of(&servers);
    assert!(answered <= 2, "{answered} datagrams came round");
    drop(servers);
    proxy.expect_clean();
}

#[test]
fn a_datagram_from_one_of_its_own_ports_starts_no_loop() {
    only_for!(Portpool, Nginx; WHY_NOT);
    if !is_inside(here!()) {
        return;
    }
    let proxy = Proxy::start(|setup| (setup.has_udp, setup.udp_idle_seconds) = (true, 2));
    let servers = [proxy.udp_server(0), proxy.udp_server(1)];
    send_forged(proxy.port(1), proxy.port(0), b"round and round");
    // Both servers answer every datagram.
    let (deadline, mut answered, mut space) = (Instant::now() + Duration::from_secs(2), 0, [0; 64]);
    while Instant::now() < deadline {
        for server in &servers {
            server
                .set_read_timeout(Some(Duration::from_millis(20)))
                .unwrap();
            if let Ok((length, from)) = server.recv_from(&mut space) {
                server.send_to(&space[..length], from).unwrap();
                answered += 1;
            }
        }
    }
    assert!(answered <= 2, "{answered} datagrams came round");
    if proxy.target == Target::Portpool {
        assert_eq!(proxy.refused("loop"), 1.0);
    }
    drop(servers);
    proxy.expect_clean();
}
