//! The data plane on loopback: real bytes, real faults.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

mod admission;
mod bench;
mod ends;
mod ports;
mod properties;
mod properties_tcp;
mod properties_udp;
mod replies;
mod udp;
mod udp_ends;
mod urgent;

use self::bench::{Bench, FIRST, SESSION, pattern, until};
use self::udp::{udp_client, udp_echo};
use nix::libc;
use nix::sys::socket::GetSockOpt;
use portpool::forward::{Decision, Traffic};
use portpool::pool::{PortProtocol, ProxyProtocol};

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
