//! Datagrams through the data plane.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use portpool::forward::Decision;
use portpool::table::{ListenPort, PortRange};

use super::bench::{Bench, FIRST, SESSION, SOON, pattern, until};
use crate::common::network::{address, network};

/// A server that sends back what comes, and reports from where it came.
pub(super) fn udp_echo(address: IpAddr) -> Receiver<SocketAddr> {
    let socket = UdpSocket::bind((address, 7000)).unwrap();
    let (sender, clients) = channel();
    std::thread::spawn(move || {
        let mut datagram = vec![0; 65_535];
        while let Ok((length, client)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], client);
            if sender.send(client).is_err() {
                return;
            }
        }
    });
    clients
}

pub(super) fn udp_client(bench: &Bench) -> UdpSocket {
    let any: IpAddr = if bench.listen.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket.connect((bench.listen, bench.first)).unwrap();
    socket
}

/// Fails when something arrives within a while.
pub(super) fn expect_nothing(socket: &UdpSocket) {
    let while_long = Duration::from_millis(300);
    socket.set_read_timeout(Some(while_long)).unwrap();
    let error = socket.recv(&mut [0; 16]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    socket.set_read_timeout(Some(SOON)).unwrap();
}

#[test]
fn datagrams_of_every_size_come_back_to_their_own_client() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let _clients = udp_echo(bench.server);
    let (one, other) = (udp_client(&bench), udp_client(&bench));
    for length in [0, 1, 1472, 9000, 65_507] {
        let (mine, theirs) = (pattern(length, 5), pattern(length, 6));
        one.send(&mine).unwrap();
        other.send(&theirs).unwrap();
        let mut answer = vec![0; 65_535];
        let received = one.recv(&mut answer).unwrap();
        assert!(answer[..received] == mine, "{length} bytes");
        let received = other.recv(&mut answer).unwrap();
        assert!(answer[..received] == theirs, "{length} bytes");
    }
    assert_eq!(bench.forwarder.counters().udp_opened, 2);
}

#[test]
fn removing_a_udp_port_keeps_its_flows_until_they_end() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    let _clients = udp_echo(bench.server);
    let (living, other) = (udp_client(&bench), udp_client(&bench));
    let echo = |text: &[u8]| {
        living.send(text).unwrap();
        let mut answer = [0; 16];
        let length = living.recv(&mut answer).unwrap();
        assert_eq!(&answer[..length], text);
    };
    echo(b"before");
    let away = |range: &mut PortRange| range.connection_port = ListenPort::new(FIRST + 50).unwrap();
    bench.lead(1, away);
    echo(b"removed");
    other.send(b"too late").unwrap();
    until(|| bench.forwarder.counters().no_session == 1);
    // The port comes back while the flow lives and is removed again: the flow stays.
    bench.lead(4, |_| {});
    echo(b"back");
    bench.lead(1, away);
    echo(b"removed again");
    assert_eq!(bench.forwarder.counters().udp_opened, 1);
    bench.cut();
    bench.all_closed();
    until(|| UdpSocket::bind((bench.listen, FIRST)).is_ok());
    bench.lead(4, |_| {});
    echo(b"a new flow");
}

#[test]
fn a_pending_flow_keeps_its_first_datagrams() {
    let bench = Bench::new(Decision::Ask);
    let _clients = udp_echo(bench.server);
    let client = udp_client(&bench);
    client.send(b"one").unwrap();
    client.send(b"two").unwrap();
    until(|| !bench.gate.asked.lock().unwrap().is_empty());
    let asked = bench.gate.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 1, "one question");
    bench
        .forwarder
        .answer(asked[0].1, asked[0].0, Decision::Admit(SESSION));
    let mut answers = HashMap::new();
    for _ in 0..2 {
        let mut answer = [0; 8];
        let length = client.recv(&mut answer).unwrap();
        answers.insert(answer[..length].to_vec(), ());
    }
    assert!(answers.contains_key(b"one".as_slice()) && answers.contains_key(b"two".as_slice()));
}

/// Both wildcard addresses; `::` takes IPv4 as well.
pub(super) const WILDCARDS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
];

/// A client's socket that talks to several addresses of the forwarder, each
/// with a name of one byte.
struct Caller {
    socket: UdpSocket,
    addresses: [SocketAddr; 2],
}

impl Caller {
    fn new(bench: &Bench) -> Self {
        let network = network();
        let socket = UdpSocket::bind((address(network, 1), 0)).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        let addresses = [2, 3].map(|host| (address(network, host), bench.first).into());
        Self { socket, addresses }
    }

    fn ask(&self) {
        for (name, address) in (0..).zip(self.addresses) {
            self.socket.send_to(&[name; 100], address).unwrap();
        }
    }

    /// Receives `count` answers, each from the address with its name.
    fn expect_answers(&self, count: usize) {
        let mut answer = [0; 200];
        for _ in 0..count {
            let (length, from) = self.socket.recv_from(&mut answer).unwrap();
            assert_eq!(length, 100);
            assert_eq!(from, self.addresses[usize::from(answer[0])]);
        }
    }
}

#[test]
fn each_answer_comes_from_the_address_that_was_asked() {
    for any in WILDCARDS {
        let bench = Bench::everywhere(any, Decision::Admit(SESSION));
        let server = UdpSocket::bind((bench.server, 7000)).unwrap();
        let caller = Caller::new(&bench);
        caller.ask();
        let mut flows = HashMap::new();
        for _ in 0..2 {
            let mut datagram = [0; 200];
            let (length, from) = server.recv_from(&mut datagram).unwrap();
            assert_eq!(length, 100);
            flows.insert(datagram[0], from);
        }
        assert_eq!(flows.len(), 2, "{any}: a flow for each address");
        // Bursts, which are received and sent together, also after a hand-over.
        for _ in 0..4 {
            for _ in 0..20 {
                for (name, flow) in &flows {
                    server.send_to(&[*name; 100], flow).unwrap();
                }
            }
            caller.expect_answers(40);
            bench.hand_over();
        }
        caller.ask();
        let mut datagram = [0; 200];
        for _ in 0..2 {
            let (_, from) = server.recv_from(&mut datagram).unwrap();
            assert_eq!(from, flows[&datagram[0]], "the same flow as before");
        }
        assert_eq!(bench.forwarder.counters().udp_opened, 2);
    }
}

#[test]
fn a_pending_client_is_answered_from_each_address_that_it_asked() {
    for any in WILDCARDS {
        let bench = Bench::everywhere(any, Decision::Ask);
        let _clients = udp_echo(bench.server);
        let caller = Caller::new(&bench);
        caller.ask();
        caller.ask();
        until(|| bench.gate.asked.lock().unwrap().len() == 2);
        // The importing threads ask again.
        bench.gate.asked.lock().unwrap().clear();
        bench.hand_over();
        until(|| bench.gate.asked.lock().unwrap().len() == 2);
        let asked = bench.gate.asked.lock().unwrap().clone();
        for (id, port) in asked {
            let decision = Decision::Admit(SESSION);
            bench.forwarder.answer(port, id, decision);
        }
        caller.expect_answers(4);
    }
}
