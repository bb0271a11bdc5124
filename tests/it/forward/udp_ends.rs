//! What ends a UDP flow, and what renews it.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use portpool::forward::Decision;

use super::bench::{Bench, SESSION, SOON, until};
use super::udp::{WILDCARDS, udp_client, udp_echo};
use crate::common::network::{address, network};

/// The shortest idle time.
const IDLE: Duration = Duration::from_secs(1);

/// A bench whose flows may be idle for [`IDLE`].
fn impatient() -> Bench {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    bench.table.sessions.udp_idle_timeout_seconds = 1;
    assert_eq!(bench.apply(), []);
    bench
}

/// A server that sends twenty datagrams a second to its first client, until it
/// is dropped or learns that the client is gone.
struct Streamer {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<bool>>,
}

impl Streamer {
    fn start(address: IpAddr) -> Self {
        let socket = UdpSocket::bind((address, 7000)).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let stop = is_over.clone();
        let thread = std::thread::spawn(move || {
            let (_, client) = socket.recv_from(&mut [0; 16]).unwrap();
            socket.connect(client).unwrap();
            while !stop.load(Ordering::Relaxed) {
                match socket.send(b"media") {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => return true,
                    _ => std::thread::sleep(IDLE / 20),
                }
            }
            false
        });
        let thread = Some(thread);
        Self { is_over, thread }
    }

    /// Waits until its kernel has reported that the client is gone.
    fn expect_client_gone(mut self) {
        let thread = self.thread.take().unwrap();
        until(|| thread.is_finished());
        assert!(thread.join().unwrap());
    }
}

impl Drop for Streamer {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_flow_ends_when_its_server_is_gone() {
    let bench = Bench::new(Decision::Admit(SESSION));
    udp_client(&bench).send(b"no one listens").unwrap();
    until(|| bench.gate.closed.lock().unwrap().len() == 1);
    assert_eq!(bench.forwarder.counters().connect_refused, 1);
}

#[test]
fn a_flow_ends_when_neither_side_sends() {
    let bench = impatient();
    let _clients = udp_echo(bench.server);
    let client = udp_client(&bench);
    client.send(b"x").unwrap();
    client.recv(&mut [0; 8]).unwrap();
    until(|| bench.forwarder.counters().idle == 1);
    bench.all_closed();
}

#[test]
fn what_a_server_sends_does_not_keep_the_flow_of_a_silent_client() {
    let bench = impatient();
    let server = Streamer::start(bench.server);
    let client = udp_client(&bench);
    let begun = Instant::now();
    client.send(b"subscribe").unwrap();
    client.recv(&mut [0; 8]).unwrap();
    // Also not through a hand-over, which keeps the time of silence.
    std::thread::sleep(IDLE / 2);
    bench.hand_over();
    until(|| bench.forwarder.counters().idle == 1);
    let lasted = begun.elapsed();
    assert!((IDLE..2 * IDLE).contains(&lasted), "{lasted:?}");
    bench.all_closed();
    server.expect_client_gone();
}

#[test]
fn a_receiver_that_sends_now_and_then_keeps_its_flow() {
    let bench = impatient();
    let _server = Streamer::start(bench.server);
    let client = udp_client(&bench);
    for _ in 0..6 {
        client.send(b"report").unwrap();
        std::thread::sleep(IDLE / 2);
        client.recv(&mut [0; 8]).unwrap();
    }
    let counters = bench.forwarder.counters();
    assert_eq!((counters.udp_opened, counters.closed), (1, 0));
}

/// iperf3's reverse mode: the client sends one datagram, and TCP goes on.
#[test]
fn a_tcp_connection_keeps_the_flow_of_a_silent_client_while_its_server_sends() {
    let bench = impatient();
    let control = bench.pair();
    let server = Streamer::start(bench.server);
    let client = udp_client(&bench);
    client.send(b"begin").unwrap();
    std::thread::sleep(3 * IDLE);
    assert_eq!(bench.forwarder.counters().closed, 0);
    drop(control);
    until(|| bench.forwarder.counters().idle == 1);
    server.expect_client_gone();
}

#[test]
fn a_client_whose_port_is_closed_is_gone_at_once() {
    let everywhere = |any| Bench::everywhere(any, Decision::Admit(SESSION));
    let [any_v4, any_v6] = WILDCARDS;
    let own = Bench::new(Decision::Admit(SESSION));
    let at = own.listen;
    let loopback = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let cases = [
        (own, at),
        (everywhere(any_v4), address(network(), 1)),
        (everywhere(any_v6), address(network(), 1)),
        (everywhere(any_v6), loopback),
    ];
    for (bench, listen) in cases {
        let server = Streamer::start(bench.server);
        let client = UdpSocket::bind((listen, 0)).unwrap();
        client.send_to(b"begin", (listen, bench.first)).unwrap();
        client.recv(&mut [0; 8]).unwrap();
        drop(client);
        until(|| bench.forwarder.counters().client_gone == 1);
        assert_eq!(bench.all_closed().len(), 1, "{listen} of {}", bench.listen);
        server.expect_client_gone();
    }
}

/// The socket that answers them is the same one.
#[test]
fn reports_about_one_client_cost_no_other_a_datagram() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let server = UdpSocket::bind((bench.server, 7000)).unwrap();
    let living = udp_client(&bench);
    let flow_of = |client: &UdpSocket| -> SocketAddr {
        client.send(b"begin").unwrap();
        server.recv_from(&mut [0; 8]).unwrap().1
    };
    let flow = flow_of(&living);
    let mut answer = [0; 8];
    for number in 0..200u32 {
        let leaving = udp_client(&bench);
        let closed = flow_of(&leaving);
        drop(leaving);
        // One at once after it, and one while the report is on its way.
        server.send_to(b"lost", closed).unwrap();
        for _ in 0..2 {
            server.send_to(&number.to_be_bytes(), flow).unwrap();
        }
        living.send(&number.to_be_bytes()).unwrap();
        for _ in 0..2 {
            let length = living.recv(&mut answer).unwrap();
            assert_eq!(answer[..length], number.to_be_bytes());
        }
        let (length, from) = server.recv_from(&mut answer).unwrap();
        assert_eq!((&answer[..length], from), (&number.to_be_bytes()[..], flow));
    }
    until(|| bench.forwarder.counters().client_gone == 200);
    assert_eq!(bench.forwarder.counters().datagrams_dropped, 0);
}
