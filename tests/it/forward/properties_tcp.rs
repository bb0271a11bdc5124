//! Properties of TCP that docs/forwarding.md lists and no other test shows.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use portpool::forward::Decision;
use portpool::forward::snapshot::ConnectionSnapshot;
use portpool::sock_diag::SockDiag;
use rustix::net::{SendFlags, sendto, sockopt};
use socket2::{Domain, SockRef, Socket, Type};

use super::bench::{Bench, SESSION, SOON, until, was_reset};

/// Looks at the data plane's own sockets of its one connection.
fn look<T>(bench: &Bench, look: impl FnOnce(&ConnectionSnapshot) -> T) -> T {
    let snapshot = bench.forwarder.export().unwrap();
    assert_eq!(snapshot.connections.len(), 1);
    let seen = look(&snapshot.connections[0]);
    bench.forwarder.resume(snapshot);
    seen
}

#[test]
fn closing_with_unread_bytes_resets_the_other_side() {
    let bench = Bench::new(Decision::Admit(SESSION));
    for is_client in [true, false] {
        let (client, server) = bench.pair();
        let (mut leaves, mut stays) = if is_client {
            (client, server)
        } else {
            (server, client)
        };
        stays.write_all(b"unread").unwrap();
        leaves.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(leaves.peek(&mut [0; 8]).unwrap(), 6);
        leaves.write_all(b"last").unwrap();
        drop(leaves);
        stays.read_exact(&mut [0; 4]).unwrap();
        assert!(was_reset(&mut stays), "client: {is_client}");
    }
    bench.all_closed();
}

#[test]
fn a_server_that_answers_and_resets_at_once_is_heard() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let listener = bench.serve();
    let server = std::thread::spawn(move || {
        for _ in 0..200 {
            let (mut stream, _) = listener.accept().unwrap();
            // It leaves with a byte unread.
            assert_eq!(stream.peek(&mut [0; 1]).unwrap(), 1);
            stream.write_all(b"last").unwrap();
        }
    });
    for _ in 0..200 {
        let mut client = bench.connect();
        client.write_all(b"?").unwrap();
        let mut answer = [0; 4];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"last");
        assert!(was_reset(&mut client));
    }
    server.join().unwrap();
    let closed = bench.all_closed();
    assert!(closed.iter().all(|traffic| traffic.downstream_bytes == 4));
    assert_eq!(bench.forwarder.counters().connect_failed, 0);
}

#[test]
fn both_sides_of_a_connection_are_probed() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (_client, _server) = bench.pair();
    // From the first tick on; the default timeout is 300 s.
    until(|| {
        look(&bench, |connection| {
            [&connection.client, &connection.server].iter().all(|side| {
                sockopt::socket_keepalive(side).unwrap()
                    && sockopt::tcp_keepidle(side).unwrap().as_secs() == 150
                    && sockopt::tcp_user_timeout(side).unwrap() == 300_000
            })
        })
    });
}

#[test]
fn bytes_are_acknowledged_before_the_server_has_them() {
    let bench = Bench::new(Decision::Ask);
    let _listener = bench.serve();
    let mut client = bench.connect();
    client.write_all(b"no server is connected").unwrap();
    let (local, peer) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
    until(|| {
        SockDiag::open()
            .unwrap()
            .unacknowledged(local, peer)
            .unwrap()
            == 0
    });
}

#[test]
fn bytes_are_sent_on_without_delay() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (_client, _server) = bench.pair();
    look(&bench, |connection| {
        for side in [&connection.client, &connection.server] {
            assert!(sockopt::tcp_nodelay(side).unwrap());
        }
    });
}

#[test]
fn each_side_has_its_own_segment_size() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let listener = bench.serve();
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    client.set_tcp_mss(600).unwrap();
    let address = SocketAddr::new(bench.listen, bench.first);
    client.connect(&address.into()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let mut client = TcpStream::from(client);
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    assert!(SockRef::from(&client).tcp_mss().unwrap() <= 600);
    assert!(SockRef::from(&server).tcp_mss().unwrap() > 1000);
}

#[test]
fn fast_open_falls_back_to_a_handshake() {
    const FASTOPEN: SendFlags = SendFlags::from_bits_retain(0x2000_0000);
    let bench = Bench::new(Decision::Admit(SESSION));
    let listener = bench.serve();
    let address = SocketAddr::new(bench.listen, bench.first);
    for _ in 0..3 {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        assert_eq!(sendto(&client, b"early", FASTOPEN, &address), Ok(5));
        let (mut server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(SOON)).unwrap();
        let mut early = [0; 5];
        server.read_exact(&mut early).unwrap();
        assert_eq!(&early, b"early");
    }
}

#[test]
fn segments_leave_with_the_ttl_and_tos_of_the_connection_server() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut client, mut server) = bench.pair();
    sockopt::set_ip_ttl(&client, 9).unwrap();
    sockopt::set_ip_tos(&client, 0xb8).unwrap();
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    look(&bench, |connection| {
        assert_ne!(sockopt::ip_ttl(&connection.server), Ok(9));
        assert_eq!(sockopt::ip_tos(&connection.server), Ok(0));
    });
}
