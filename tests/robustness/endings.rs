//! Resets, half-closes, and peers that vanish.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use crate::namespace::{ip, is_inside};
use crate::target::Proxy;
use crate::{End, SOON, echoes, end_of, here, only_for, pattern, reset, socket, until};

#[test]
fn a_clients_reset_reaches_the_server() {
    let proxy = Proxy::start(|_| {});
    let (mut client, mut server) = proxy.pair(0);
    echoes(&mut client, &mut server, b"before");
    reset(client);
    assert_eq!(end_of(&mut server), End::Reset(0));
    drop(server);
    proxy.expect_clean();
}

#[test]
fn a_servers_reset_reaches_the_client() {
    let proxy = Proxy::start(|_| {});
    let (mut client, mut server) = proxy.pair(0);
    echoes(&mut client, &mut server, b"before");
    reset(server);
    assert_eq!(end_of(&mut client), End::Reset(0));
    drop(client);
    proxy.expect_clean();
}

/// Sends a million bytes, waits until the proxy's kernel acknowledges no more,
/// resets, and reads slowly at the other end. Returns how many bytes were
/// acknowledged, and how the other end saw the connection end.
fn bytes_before_a_reset(mut from: TcpStream, mut to: TcpStream) -> (usize, End) {
    let sent = pattern(1_000_000, 7);
    from.set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut written = 0;
    while written < sent.len() {
        match from.write(&sent[written..]) {
            Ok(length) => written += length,
            Err(_) => break,
        }
    }
    // The receiver does not read, so that the proxy stops taking bytes.
    let (mut last, mut same) = (usize::MAX, 0);
    until("the proxy takes no more", || {
        let now = socket(&from).unwrap().unacknowledged;
        same = if now == last { same + 1 } else { 0 };
        last = now;
        same >= 20
    });
    let acknowledged = written - last;
    reset(from);
    let mut received = Vec::new();
    let mut space = [0; 20_000];
    let end = loop {
        std::thread::sleep(Duration::from_millis(5));
        match to.read(&mut space) {
            Ok(0) => break End::Closed(received.len()),
            Ok(length) => received.extend_from_slice(&space[..length]),
            Err(_) => break End::Reset(received.len()),
        }
    };
    assert!(
        sent.starts_with(&received),
        "bytes are not those that were sent"
    );
    (acknowledged, end)
}

/// Resets `from` while much is under way, and asserts that the acknowledged
/// bytes arrive at `to` before the reset.
fn bytes_then_reset(from: TcpStream, to: TcpStream) {
    let (acknowledged, end) = bytes_before_a_reset(from, to);
    println!("{acknowledged} bytes acknowledged, then {end:?}");
    assert!(acknowledged >= 500_000, "not much was under way");
    assert!(
        matches!(end, End::Reset(length) if length >= acknowledged),
        "{acknowledged}: {end:?}"
    );
}

#[test]
fn a_reset_comes_after_the_bytes_that_were_read_from_the_client() {
    let proxy = Proxy::start(|_| {});
    let (client, server) = proxy.pair(0);
    bytes_then_reset(client, server);
    proxy.expect_clean();
}

#[test]
fn a_reset_comes_after_the_bytes_that_were_read_from_the_server() {
    let proxy = Proxy::start(|_| {});
    let (client, server) = proxy.pair(0);
    bytes_then_reset(server, client);
    proxy.expect_clean();
}

#[test]
fn a_reset_does_not_wait_for_a_reader_that_takes_nothing() {
    let proxy = Proxy::start(|_| {});
    let (mut client, server) = proxy.pair(0);
    client
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let sent = pattern(64 << 20, 7);
    assert!(
        client.write_all(&sent).is_err(),
        "the proxy did not stop reading"
    );
    reset(client);
    // The server neither reads nor closes: the proxy must end this by itself.
    proxy.expect_clean();
    drop(server);
}

#[test]
fn after_the_clients_end_the_server_goes_on() {
    let proxy = Proxy::start(|_| {});
    let (client, server) = proxy.pair(0);
    half_close(client, server);
    proxy.expect_clean();
}

#[test]
fn after_the_servers_end_the_client_goes_on() {
    let proxy = Proxy::start(|_| {});
    let (client, server) = proxy.pair(0);
    half_close(server, client);
    proxy.expect_clean();
}

/// One side ends; the other one then sends for a while.
fn half_close(mut ending: TcpStream, mut living: TcpStream) {
    ending.write_all(b"last words").unwrap();
    ending.shutdown(Shutdown::Write).unwrap();
    assert_eq!(end_of(&mut living), End::Closed(10));
    let sent = pattern(1 << 20, 3);
    for chunk in sent.chunks(1 << 18) {
        living.write_all(chunk).unwrap();
        let mut received = vec![0; chunk.len()];
        ending.read_exact(&mut received).unwrap();
        assert!(received == chunk);
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(living);
    assert_eq!(end_of(&mut ending), End::Closed(0));
}

#[test]
fn what_was_sent_before_the_end_is_flushed_to_a_slow_reader() {
    let proxy = Proxy::start(|_| {});
    let (mut client, mut server) = proxy.pair(0);
    let sent = pattern(8 << 20, 5);
    let expected = sent.clone();
    let writer = std::thread::spawn(move || server.write_all(&sent).unwrap());
    std::thread::sleep(Duration::from_millis(300));
    let mut received = Vec::new();
    let mut space = vec![0; 256 * 1024];
    loop {
        match client.read(&mut space).unwrap() {
            0 => break,
            length => received.extend_from_slice(&space[..length]),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    writer.join().unwrap();
    assert!(received == expected, "{} bytes", received.len());
    drop(client);
    proxy.expect_clean();
}

/// Both sides end, after 256 KiB from the server. The client reads nothing for
/// `pause` and must then find everything. Meanwhile the proxy holds the
/// connection, so that a kernel without memory does not reset it, but for at most
/// 30 s.
fn end_with_a_late_reader(pause: Duration, is_held: bool) {
    let proxy = Proxy::start(|_| {});
    let (mut client, mut server) = proxy.pair(0);
    let sent = pattern(256 * 1024, 9);
    server.write_all(&sent).unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(end_of(&mut server), End::Closed(0));
    std::thread::sleep(pause);
    let live = proxy.metric("portpool_flows{transport=\"tcp\"}");
    assert_eq!(live, f64::from(u8::from(is_held)), "connections are held");
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    assert!(received == sent, "{} bytes", received.len());
    drop((client, server));
    proxy.expect_clean();
}

#[test]
fn a_connection_that_has_ended_is_held_until_its_reader_has_all() {
    only_for!(Portpool; "the test asks portpool's metrics");
    end_with_a_late_reader(Duration::from_secs(1), true);
}

#[test]
fn a_connection_that_has_ended_is_not_held_for_ever() {
    only_for!(Portpool; "the test asks portpool's metrics");
    end_with_a_late_reader(Duration::from_secs(31), false);
}

#[test]
fn a_reader_that_takes_nothing_is_given_up() {
    let proxy = Proxy::start(|setup| setup.peer_timeout_seconds = 2);
    let (client, mut server) = proxy.pair(0);
    server
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    assert!(server.write_all(&pattern(64 << 20, 7)).is_err());
    drop(server);
    // The client does not read: only a limit ends this.
    proxy.expect_clean();
    drop(client);
}

#[test]
fn an_idle_flood_is_closed() {
    let proxy = Proxy::start(|setup| setup.idle_seconds = 2);
    let listener = proxy.listener(0);
    let idle: Vec<_> = (0..200)
        .map(|_| (proxy.connect(0), listener.accept().unwrap().0))
        .collect();
    assert!(proxy.census().sockets >= 400);
    // Both ends stay open: the proxy must close the connections by itself.
    proxy.expect_clean();
    drop(idle);
}

#[test]
fn an_idle_half_closed_connection_is_closed() {
    let proxy = Proxy::start(|setup| setup.idle_seconds = 2);
    let listener = proxy.listener(0);
    let pairs: Vec<_> = (0..2)
        .map(|_| (proxy.connect(0), listener.accept().unwrap().0))
        .collect();
    // The client ends one connection, the server the other.
    let (mut first, mut second) = (&pairs[0].1, &pairs[1].0);
    pairs[0].0.shutdown(Shutdown::Write).unwrap();
    pairs[1].1.shutdown(Shutdown::Write).unwrap();
    for living in [&mut first, &mut second] {
        living.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(living.read(&mut [0]).unwrap(), 0);
    }
    // Neither side sends or closes.
    proxy.expect_clean();
    drop(pairs);
}

#[test]
fn a_client_that_vanished_is_found_out() {
    vanish(here!(), "10.77.0.3", true);
}

#[test]
fn a_server_that_vanished_is_found_out() {
    vanish(here!(), "10.77.0.2", false);
}

/// The side with address `gone` loses it: packets to it vanish without an error.
/// The other side must still see an end.
fn vanish(test: &str, gone: &str, is_client: bool) {
    if !is_inside(test) {
        return;
    }
    for host in 1..=3 {
        ip(&["address", "add", &format!("10.77.0.{host}/32"), "dev", "lo"]);
    }
    // nginx can have keep-alive towards servers by the system's times only.
    for (name, value) in [("time", "2"), ("intvl", "1"), ("probes", "2")] {
        let file = format!("/proc/sys/net/ipv4/tcp_keepalive_{name}");
        std::fs::write(file, value).unwrap();
    }
    let proxy = Proxy::start(|setup| {
        setup.listen = "10.77.0.1".parse().unwrap();
        setup.server = "10.77.0.2".parse().unwrap();
        setup.peer_timeout_seconds = 3;
    });
    let listener = proxy.listener(0);
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let from = std::net::SocketAddr::new("10.77.0.3".parse().unwrap(), 0);
    socket.bind(&from.into()).unwrap();
    socket.connect(&proxy.port(0).into()).unwrap();
    let mut client: TcpStream = socket.into();
    let (mut server, _) = listener.accept().unwrap();
    echoes(&mut client, &mut server, b"before");
    ip(&["address", "del", &format!("{gone}/32"), "dev", "lo"]);
    let living = if is_client { &mut server } else { &mut client };
    living.set_read_timeout(Some(SOON)).unwrap();
    let end = end_of(living);
    println!("the other side saw {end:?}");
    ip(&["address", "add", &format!("{gone}/32"), "dev", "lo"]);
    drop((client, server, listener));
    proxy.expect_clean();
}

#[test]
fn table_changes_under_load_lose_nothing() {
    only_for!(Portpool; "it has no table; a reload is another process");
    let mut proxy = Proxy::start(|setup| setup.ports = 8);
    let listener = proxy.listener(0);
    let port = proxy.port(0);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_over = stop.clone();
    let load = std::thread::spawn(move || {
        let mut rounds = 0u64;
        while !is_over.load(std::sync::atomic::Ordering::Relaxed) || rounds < 10 {
            let mut client = TcpStream::connect(port).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let sent = pattern(1 << 20, rounds);
            let expected = sent.clone();
            let mut writing = client.try_clone().unwrap();
            let writer = std::thread::spawn(move || writing.write_all(&sent).unwrap());
            let mut received = vec![0; expected.len()];
            server.set_read_timeout(Some(SOON)).unwrap();
            server.read_exact(&mut received).unwrap();
            assert!(received == expected, "round {rounds}");
            writer.join().unwrap();
            echoes(&mut client, &mut server, b"still here");
            if rounds.is_multiple_of(2) {
                reset(client);
                assert_eq!(end_of(&mut server), End::Reset(0));
            }
            rounds += 1;
        }
        rounds
    });
    for round in 0..200u16 {
        proxy.publish(|table| table.rows[0].ranges[0].count = 1 + round % 8);
        std::thread::sleep(Duration::from_millis(10));
    }
    proxy.publish(|table| table.rows[0].ranges[0].count = 8);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    println!("{} transfers", load.join().unwrap());
    until("the last table is in force", || {
        TcpStream::connect(proxy.port(7)).is_ok()
    });
    proxy.expect_clean();
}
