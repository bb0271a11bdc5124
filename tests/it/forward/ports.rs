//! Ports that tables add and remove.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use super::bench::{Bench, FIRST, SESSION, until};
use portpool::forward::{Decision, Transport};
use portpool::pool::PortProtocol;
use portpool::table::ListenPort;

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
fn a_port_in_use_is_named_and_all_others_open() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    let taken = FIRST + 5;
    let other = TcpListener::bind((bench.listen, taken)).unwrap();
    bench.table.rows[0].ranges[0].count = 8;
    for _ in 0..2 {
        let [unavailable] = &bench.apply()[..] else {
            panic!("one socket cannot be opened: {:?}", bench.apply());
        };
        assert_eq!(unavailable.address.port(), taken);
        assert_eq!(unavailable.transport, Transport::Tcp);
        let message = unavailable.to_string();
        assert!(message.contains("another program uses it"), "{message}");
        let listeners = bench.forwarder.open_listeners();
        assert_eq!(listeners, 15, "eight ports, TCP and UDP, but one");
    }
    let _listener = bench.serve();
    bench.connect();
    drop(other);
    assert_eq!(bench.apply(), [], "tried again");
    assert_eq!(bench.forwarder.open_listeners(), 16);
    TcpStream::connect((bench.listen, taken)).unwrap();
    bench.lead(4, |_| {});
    assert_eq!(bench.forwarder.open_listeners(), 8);
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
