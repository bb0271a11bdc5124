//! The gate: who waits for its decision, and what a cut ends.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::bench::{Bench, SESSION, pattern, until, was_reset};
use super::udp::udp_client;
use portpool::forward::{Decision, SessionKey};
use portpool::table::ListenPort;

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
fn a_cut_on_one_port_leaves_the_same_session_on_others() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let (mut cut, _server) = bench.pair();
    let listener = TcpListener::bind((bench.server, 7001)).unwrap();
    let mut other = TcpStream::connect((bench.listen, bench.first + 1)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    bench.cut();
    assert!(was_reset(&mut cut));
    until(|| bench.gate.closed.lock().unwrap().len() == 2);
    other.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    assert_eq!(bench.forwarder.counters().cut, 1);
}

#[test]
fn a_cut_of_one_client_refuses_no_other_that_waits() {
    let bench = Bench::new(Decision::Ask);
    let listener = bench.serve();
    let mut clients = [bench.connect(), bench.connect_from(3)];
    until(|| bench.gate.asked.lock().unwrap().len() == 2);
    let address = clients[0].local_addr().unwrap().ip();
    assert_ne!(address, clients[1].local_addr().unwrap().ip());
    let port = ListenPort::new(bench.first).unwrap();
    bench.gate.admitted.fetch_add(1, Ordering::Relaxed);
    bench.forwarder.cut_client(port, SESSION, address);
    assert!(was_reset(&mut clients[0]));
    bench.all_closed();
    // The answers to both are on their way.
    for (id, port) in bench.gate.asked.lock().unwrap().clone() {
        bench.gate.admitted.fetch_add(1, Ordering::Relaxed);
        let decision = Decision::Admit(SessionKey(8));
        bench.forwarder.answer(port, id, decision);
    }
    let (mut server, _) = listener.accept().unwrap();
    clients[1].write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    drop((server, clients));
    bench.all_closed();
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
