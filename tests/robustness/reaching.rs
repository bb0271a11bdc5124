//! The way to the server: it refuses, does not answer or is unreachable, or the
//! proxy has no source port left. Addresses of both families.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::namespace::{ip, is_inside};
use crate::target::{FIRST, Proxy, SERVER, Setup, Target};
use crate::{End, echoes, end_of, here, only_for, reset, until};

#[test]
fn a_client_whose_server_refuses_is_reset() {
    let proxy = Proxy::start(|_| {});
    let mut client = proxy.connect(1);
    assert_eq!(end_of(&mut client), End::Reset(0));
    proxy.counts("connect_refused", 1.0);
    drop(client);
    proxy.expect_clean();
}

/// A listener whose queue is full, so that the kernel answers no client.
struct FullListener {
    _listener: socket2::Socket,
    _queued: Vec<socket2::Socket>,
}

impl FullListener {
    fn on(address: SocketAddr) -> Self {
        let new = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let listener = new().unwrap();
        listener.set_reuse_address(true).unwrap();
        listener.bind(&address.into()).unwrap();
        listener.listen(0).unwrap();
        let queued = (0..3).map(|_| {
            let socket = new().unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&address.into());
            socket
        });
        let queued = queued.collect();
        Self {
            _listener: listener,
            _queued: queued,
        }
    }
}

#[test]
fn a_client_whose_server_does_not_answer_is_reset_in_time() {
    let proxy = Proxy::start(|_| {});
    let full = FullListener::on((proxy.server, SERVER).into());
    let started = Instant::now();
    let mut client = proxy.connect(0);
    assert_eq!(end_of(&mut client), End::Reset(0));
    assert!(started.elapsed() >= Duration::from_secs(1), "it must try");
    proxy.counts("connect_timed_out", 1.0);
    drop((client, full));
    proxy.expect_clean();
}

#[test]
fn a_client_that_is_gone_while_its_server_is_asked_is_forgotten() {
    let proxy = Proxy::start(|_| {});
    let full = FullListener::on((proxy.server, SERVER).into());
    let before = proxy.census().sockets;
    let clients: Vec<_> = (0..20).map(|_| proxy.connect(0)).collect();
    until("servers are asked", || {
        proxy.census().sockets >= before + 40
    });
    let started = Instant::now();
    clients.into_iter().for_each(reset);
    until("they are forgotten", || proxy.census().sockets <= before);
    let took = started.elapsed();
    println!("forgotten after {took:?}");
    if proxy.target == Target::Portpool {
        assert_eq!(proxy.refused("connect_timed_out"), 0.0, "after {took:?}");
    }
    drop(full);
    proxy.expect_clean();
}

#[test]
fn a_client_whose_server_is_unreachable_is_reset_at_once() {
    if !is_inside(here!()) {
        return;
    }
    for host in 1..=2 {
        ip(&["address", "add", &format!("10.77.0.{host}/32"), "dev", "lo"]);
    }
    let proxy = Proxy::start(|setup| {
        setup.listen = "10.77.0.1".parse().unwrap();
        setup.server = "10.77.0.2".parse().unwrap();
    });
    ip(&["address", "del", "10.77.0.2/32", "dev", "lo"]);
    let started = Instant::now();
    let mut client = proxy.connect(0);
    assert_eq!(end_of(&mut client), End::Reset(0));
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
    proxy.counts("connect_unreachable", 1.0);
    drop(client);
    proxy.expect_clean();
}

#[test]
fn without_source_ports_clients_are_reset_and_served_when_there_are_some() {
    const PORTS: usize = 64;
    if !is_inside(here!()) {
        return;
    }
    let proxy = Proxy::start(|_| {});
    let range = format!("40000 {}", 40_000 + PORTS - 1);
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", range).unwrap();
    let listener = proxy.listener(0);
    listener.set_nonblocking(true).unwrap();
    // Clients have other addresses than the proxy, and so other source ports.
    let mut clients: Vec<TcpStream> = (0..PORTS + 20)
        .map(|number| proxy.connect_from(u8::try_from(10 + number / 8).unwrap(), 0))
        .collect();
    let mut servers = Vec::new();
    until("ports run out", || {
        servers.extend(listener.accept());
        servers.len() >= PORTS / 2 && {
            // Refused clients are readable.
            let is_over = |client: &mut TcpStream| {
                client.set_nonblocking(true).unwrap();
                matches!(client.read(&mut [0]), Ok(0)) || client.take_error().unwrap().is_some()
            };
            clients
                .iter_mut()
                .filter_map(|client| is_over(client).then_some(()))
                .count()
                > 0
                || proxy.target == Target::Portpool && proxy.refused("no_source_port") >= 1.0
        }
    });
    proxy.counts("no_source_port", 1.0);
    drop((clients, servers));
    // The ports are free again when TIME_WAIT, a second here, is over.
    until("clients are served again", || {
        let Ok(mut client) = TcpStream::connect(proxy.port(0)) else {
            return false;
        };
        client
            .set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let Ok((mut server, _)) = listener.accept().or_else(|_| {
            std::thread::sleep(Duration::from_millis(100));
            listener.accept()
        }) else {
            return false;
        };
        server.set_nonblocking(false).unwrap();
        server
            .set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        client.write_all(b"again").is_ok() && server.read_exact(&mut [0; 5]).is_ok()
    });
    drop(listener);
    proxy.expect_clean();
}

#[test]
fn one_listener_takes_both_families() {
    if !is_inside(here!()) {
        return;
    }
    only_for!(Portpool; "its listeners are of one family each as configured here");
    let proxy = Proxy::start(|setup| {
        setup.listen = "::".parse().unwrap();
        setup.server = "127.0.0.2".parse().unwrap();
        setup.has_udp = true;
    });
    for address in ["127.0.0.1", "::1"] {
        let address: std::net::IpAddr = address.parse().unwrap();
        let listener = proxy.listener(0);
        let mut client = TcpStream::connect((address, FIRST)).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        echoes(&mut client, &mut server, b"of either family");
        let server = proxy.udp_server(0);
        let client = std::net::UdpSocket::bind((address, 0)).unwrap();
        client.connect((address, FIRST)).unwrap();
        client.send(b"datagram").unwrap();
        let mut space = [0; 16];
        let (length, from) = server.recv_from(&mut space).unwrap();
        server.send_to(&space[..length], from).unwrap();
        client.set_read_timeout(Some(crate::SOON)).unwrap();
        assert_eq!(client.recv(&mut space).unwrap(), 8, "{address}");
    }
    // Idle flows stay until they expire, so that no clean state is expected.
    drop(proxy);
}

#[test]
fn servers_may_be_of_the_other_family() {
    if !is_inside(here!()) {
        return;
    }
    for (listen, server) in [("127.0.0.1", "::1"), ("::1", "127.0.0.2")] {
        only_for!(Portpool; "its configuration here has addresses of one family");
        let proxy = Proxy::start(|setup| {
            setup.listen = listen.parse().unwrap();
            setup.server = server.parse().unwrap();
        });
        let (mut client, mut server) = proxy.pair(0);
        echoes(&mut client, &mut server, b"across");
        reset(client);
        assert_eq!(end_of(&mut server), End::Reset(0));
        drop(server);
        proxy.expect_clean();
    }
}

#[test]
fn a_port_that_others_hold_is_named() {
    only_for!(Portpool; "it has no table");
    if !is_inside(here!()) {
        return;
    }
    // IPv4 is enough: `::` without IPV6_V6ONLY needs the port there as well.
    let held = TcpListener::bind(("0.0.0.0", FIRST + 1)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let plain = Setup::plain("::".parse().unwrap(), "127.0.0.2".parse().unwrap());
    let setup = Setup {
        has_udp: true,
        ..plain
    };
    let table = crate::target::table(&setup);
    let mut running = crate::target::portpool(&setup, folder.path(), &table)
        .env("PORTPOOL_LOG", "warn")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = BufReader::new(running.stderr.take().unwrap());
    let named = format!("[::]:{}", FIRST + 1);
    let is_named = |line: &String| line.contains(&named) && line.contains("another program");
    let found = log.lines().map_while(Result::ok).find(is_named);
    running.kill().unwrap();
    running.wait().unwrap();
    assert!(found.is_some(), "no line of the log names {named}");
    drop(held);
}
