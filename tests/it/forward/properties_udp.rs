//! Properties of UDP that docs/forwarding.md lists and no other test shows.

use std::collections::HashSet;
use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::sockopt::{Ipv4RecvTtl, Ipv6DontFrag};
use nix::sys::socket::{
    ControlMessageOwned, GetSockOpt, MsgFlags, SetSockOpt, SockaddrStorage, recvmsg,
};
use portpool::forward::{Decision, Transport};
use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};

use super::bench::{Bench, SESSION, SOON, until};
use super::udp::{WILDCARDS, expect_nothing, udp_client, udp_echo};

/// A server that waits no longer than a test may take.
fn server(bench: &Bench) -> UdpSocket {
    let server = UdpSocket::bind((bench.server, 7000)).unwrap();
    server.set_read_timeout(Some(SOON)).unwrap();
    server
}

#[test]
fn datagrams_keep_their_order_and_come_once() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let server = server(&bench);
    let client = udp_client(&bench);
    let mut space = [0; 2000];
    let mut next = 0u32;
    for burst in 1..=60 {
        let numbers = next..next + burst;
        // Sizes change, so that some are joined and others are not.
        let datagram = |number: u32| {
            let mut datagram = vec![7; 4 + usize::try_from(number / 7 % 5 * 300).unwrap()];
            datagram[..4].copy_from_slice(&number.to_be_bytes());
            datagram
        };
        for number in numbers.clone() {
            client.send(&datagram(number)).unwrap();
        }
        for number in numbers.clone() {
            let (length, from) = server.recv_from(&mut space).unwrap();
            assert!(space[..length] == datagram(number), "{number} up");
            server.send_to(&space[..length], from).unwrap();
        }
        for number in numbers.clone() {
            let length = client.recv(&mut space).unwrap();
            assert!(space[..length] == datagram(number), "{number} down");
        }
        next = numbers.end;
    }
    expect_nothing(&server);
    expect_nothing(&client);
}

#[test]
fn datagrams_that_were_sent_together_arrive_one_by_one() {
    const SIZE: usize = 500;
    let bench = Bench::new(Decision::Admit(SESSION));
    let _clients = udp_echo(bench.server);
    let client = udp_client(&bench);
    // What another socket can do: this one must not join what it receives.
    let other = UdpSocket::bind((bench.server, 0)).unwrap();
    let state = UdpSocketState::new(UdpSockRef::from(&other)).unwrap();
    let contents: Vec<u8> = (0..20).flat_map(|number| [number; SIZE]).collect();
    let transmit = Transmit {
        destination: client.peer_addr().unwrap(),
        ecn: None,
        contents: &contents,
        segment_size: Some(SIZE),
        src_ip: None,
    };
    state
        .try_send(UdpSockRef::from(&client), &transmit)
        .unwrap();
    let mut space = [0; 2 * SIZE];
    for number in 0..20 {
        let mut slices = [IoSliceMut::new(&mut space)];
        let flags = MsgFlags::empty();
        let received =
            recvmsg::<SockaddrStorage>(client.as_raw_fd(), &mut slices, None, flags).unwrap();
        let is_joined = received.flags.contains(MsgFlags::MSG_TRUNC);
        assert!(!is_joined && received.bytes == SIZE, "{received:?}");
        assert!(space[..SIZE] == [number; SIZE]);
    }
}

#[test]
fn a_client_gets_no_report_of_a_closed_server_port() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let client = udp_client(&bench);
    client.send(b"no one listens").unwrap();
    until(|| bench.forwarder.counters().connect_refused == 1);
    expect_nothing(&client);
    // A datagram begins a new flow.
    let server = server(&bench);
    client.send(b"again").unwrap();
    assert_eq!(server.recv(&mut [0; 16]).unwrap(), 5);
}

#[test]
fn each_client_is_a_port_of_the_connection_server() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let server = server(&bench);
    let clients: Vec<UdpSocket> = (0..10).map(|_| udp_client(&bench)).collect();
    let seen = |client: &UdpSocket| -> SocketAddr {
        client.send(b"x").unwrap();
        server.recv_from(&mut [0; 8]).unwrap().1
    };
    let first: Vec<SocketAddr> = clients.iter().map(seen).collect();
    let again: Vec<SocketAddr> = clients.iter().map(seen).collect();
    assert_eq!(first, again);
    assert_eq!(first.iter().collect::<HashSet<_>>().len(), 10);
    for (client, flow) in clients.iter().zip(first) {
        assert_ne!(client.local_addr().unwrap().port(), flow.port());
    }
}

#[test]
fn answers_from_another_port_of_the_server_are_dropped() {
    let mut bench = Bench::new(Decision::Admit(SESSION));
    bench.table.sessions.udp_idle_timeout_seconds = 1;
    assert_eq!(bench.apply(), []);
    let server = server(&bench);
    let other = UdpSocket::bind((bench.server, 0)).unwrap();
    let client = udp_client(&bench);
    client.send(b"RRQ").unwrap();
    let (_, flow) = server.recv_from(&mut [0; 8]).unwrap();
    other.send_to(b"DATA", flow).unwrap();
    expect_nothing(&client);
    until(|| bench.forwarder.counters().unanswered == 1);
    // With an answer it does not count.
    client.send(b"x").unwrap();
    let (_, flow) = server.recv_from(&mut [0; 8]).unwrap();
    server.send_to(b"y", flow).unwrap();
    assert_eq!(client.recv(&mut [0; 8]).unwrap(), 1);
    until(|| bench.forwarder.counters().closed == 2);
    assert_eq!(bench.forwarder.counters().unanswered, 1);
}

#[test]
fn datagrams_may_be_fragmented() {
    let decision = Decision::Admit(SESSION);
    for any in WILDCARDS {
        let bench = Bench::everywhere(any, decision);
        let server = server(&bench);
        let client = UdpSocket::bind((bench.server, 0)).unwrap();
        client.send_to(b"x", (bench.server, bench.first)).unwrap();
        server.recv(&mut [0; 8]).unwrap();
        let snapshot = bench.forwarder.export().unwrap();
        let port = &snapshot.ports[0];
        assert_eq!(port.transport(), Transport::Udp);
        if any.is_ipv6() {
            let discovery = sockopt::ipv6_mtu_discover(port).unwrap();
            assert_eq!(discovery, Ipv6PathMtuDiscovery::WANT);
            assert!(!Ipv6DontFrag.get(port).unwrap());
        } else {
            let discovery = sockopt::ip_mtu_discover(port).unwrap();
            assert_eq!(discovery, Ipv4PathMtuDiscovery::WANT);
        }
        let flow = &snapshot.flows[0].server;
        let discovery = sockopt::ip_mtu_discover(flow).unwrap();
        assert_eq!(discovery, Ipv4PathMtuDiscovery::WANT);
        bench.forwarder.resume(snapshot);
    }
}

/// The TTL and the TOS of the next datagram.
fn receive_ttl_and_tos(socket: &UdpSocket) -> (i32, u8) {
    let mut control = nix::cmsg_space!(libc::c_int, libc::c_int);
    let mut space = [0; 16];
    let mut slices = [IoSliceMut::new(&mut space)];
    let flags = MsgFlags::empty();
    let received =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)
            .unwrap();
    let (mut ttl, mut tos) = (0, 0);
    for message in received.cmsgs().unwrap() {
        match message {
            ControlMessageOwned::Ipv4Ttl(value) => ttl = value,
            ControlMessageOwned::Ipv4Tos(value) => tos = value,
            _ => {}
        }
    }
    (ttl, tos)
}

#[test]
fn datagrams_leave_with_the_ttl_and_tos_of_the_connection_server() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let server = server(&bench);
    Ipv4RecvTtl.set(&server, &true).unwrap();
    sockopt::set_ip_recvtos(&server, true).unwrap();
    let client = UdpSocket::bind((bench.server, 0)).unwrap();
    sockopt::set_ip_ttl(&client, 9).unwrap();
    // Expedited forwarding, and ECT(0).
    sockopt::set_ip_tos(&client, 0xba).unwrap();
    let direct = server.local_addr().unwrap();
    client.send_to(b"direct", direct).unwrap();
    assert_eq!(receive_ttl_and_tos(&server), (9, 0xba));
    let through = SocketAddr::new(bench.listen, bench.first);
    client.send_to(b"through", through).unwrap();
    let (ttl, tos) = receive_ttl_and_tos(&server);
    assert!(ttl != 9 && tos == 0, "{ttl}, {tos:#x}");
}

#[test]
fn a_broadcast_reaches_no_server() {
    let bench = Bench::new(Decision::Admit(SESSION));
    let server = server(&bench);
    let client = UdpSocket::bind((bench.listen, 0)).unwrap();
    client.set_broadcast(true).unwrap();
    for group in ["127.255.255.255", "224.0.0.251"] {
        client.send_to(b"anyone", (group, bench.first)).unwrap();
    }
    expect_nothing(&server);
    client.send_to(b"one", (bench.listen, bench.first)).unwrap();
    assert_eq!(server.recv(&mut [0; 16]).unwrap(), 3);
}
