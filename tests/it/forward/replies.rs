//! Flows with replies from any port of the server, as TFTP needs them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use portpool::forward::Decision;
use portpool::pool::Replies;
use portpool::table::TargetPort;

use super::bench::{Bench, SESSION, SOON, until};
use super::udp::{expect_nothing, udp_client};

/// A forwarder whose first port follows replies, its client, and a server with
/// two sockets, of which the first one has the server port.
struct Transfer {
    bench: Bench,
    client: UdpSocket,
    server: [UdpSocket; 2],
    /// The flow's address, as the server sees it.
    flow: SocketAddr,
}

impl Transfer {
    /// The client has asked the server port.
    fn begin(mut bench: Bench) -> Self {
        // Any port: others of the address may be another test's.
        let server = [(); 2].map(|()| {
            let socket = UdpSocket::bind((bench.server, 0)).unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            socket
        });
        let port = server[0].local_addr().unwrap().port();
        bench.lead(1, |range| {
            range.replies = Replies::AnyPort;
            range.server_port = TargetPort::new(port).unwrap();
        });
        let client = udp_client(&bench);
        client.send(b"RRQ").unwrap();
        let (length, flow) = server[0].recv_from(&mut [0; 8]).unwrap();
        assert_eq!(length, 3);
        Self {
            bench,
            client,
            server,
            flow,
        }
    }

    /// `from` sends, the client receives it and answers; `to` receives that.
    fn exchange(&self, from: &UdpSocket, to: &UdpSocket) {
        let mut space = [0; 8];
        from.send_to(b"DATA", self.flow).unwrap();
        let length = self.client.recv(&mut space).unwrap();
        assert_eq!(&space[..length], b"DATA");
        self.client.send(b"ACK").unwrap();
        let (length, sender) = to.recv_from(&mut space).unwrap();
        assert_eq!((&space[..length], sender), (&b"ACK"[..], self.flow));
    }
}

#[test]
fn a_flow_goes_on_with_the_port_that_has_answered_last() {
    let loopback = IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]);
    let decision = Decision::Admit(SESSION);
    for bench in [
        Bench::new(decision),
        Bench::on(loopback, loopback, decision),
    ] {
        let transfer = Transfer::begin(bench);
        let [first, second] = &transfer.server;
        transfer.exchange(second, second);
        transfer.exchange(second, second);
        transfer.bench.hand_over();
        transfer.client.send(b"again").unwrap();
        assert_eq!(second.recv(&mut [0; 8]).unwrap(), 5);
        transfer.exchange(first, first);
        expect_nothing(second);
        // Another client of the port has a flow of its own, to the server port.
        let other = udp_client(&transfer.bench);
        other.send(b"RRQ").unwrap();
        let (_, flow) = first.recv_from(&mut [0; 8]).unwrap();
        assert_ne!(flow, transfer.flow);
        assert_eq!(transfer.bench.forwarder.counters().datagrams_of_others, 0);
    }
}

#[test]
fn a_flow_takes_nothing_from_another_host_than_its_server() {
    let transfer = Transfer::begin(Bench::new(Decision::Admit(SESSION)));
    let [first, second] = &transfer.server;
    // No address of the pool, with the server port and with another one.
    let stranger = Ipv4Addr::new(127, 254, 254, 254);
    let server_port = first.local_addr().unwrap().port();
    for port in [server_port, 0] {
        let stranger = UdpSocket::bind((stranger, port)).unwrap();
        stranger.send_to(b"forged", transfer.flow).unwrap();
    }
    expect_nothing(&transfer.client);
    until(|| transfer.bench.forwarder.counters().datagrams_of_others == 2);
    // Nor does it send there.
    transfer.client.send(b"ACK").unwrap();
    assert_eq!(first.recv(&mut [0; 8]).unwrap(), 3);
    transfer.exchange(second, second);
}

#[test]
fn bursts_pass_a_flow_that_follows_replies_in_order() {
    let transfer = Transfer::begin(Bench::new(Decision::Admit(SESSION)));
    let [_, second] = &transfer.server;
    transfer.exchange(second, second);
    for burst in 1..=40_u8 {
        let datagram = |number: u8| vec![number; 700];
        for (sender, receiver) in [(second, &transfer.client), (&transfer.client, second)] {
            for number in 0..burst {
                let bytes = datagram(number);
                match sender.peer_addr() {
                    Ok(_) => sender.send(&bytes),
                    Err(_) => sender.send_to(&bytes, transfer.flow),
                }
                .unwrap();
            }
            for number in 0..burst {
                let mut space = [0; 2000];
                let length = receiver.recv(&mut space).unwrap();
                assert!(space[..length] == datagram(number), "{number} of {burst}");
            }
        }
    }
}
