//! Reports of the network (ICMP) about datagrams that were sent to clients.
//!
//! One socket sends to all clients of a connection port, so an error alone
//! would not say whose datagram it is about. The kernel queues the reports
//! apart from the datagrams, each with both addresses.
//!
//! Source: Linux, ip(7), `IP_RECVERR`; `net/ipv4/ip_sockglue.c`,
//! `ip_recv_error`, and `net/ipv6/datagram.c`, `ipv6_recv_error`.

use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::cmsg_space;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};

use super::addresses::AddressPair;

/// What a network has reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// The client's port is closed; with the addresses of the flow.
    Closed(AddressPair),
    /// Something about the way there, which may be better a moment later
    /// (RFC 1122, section 4.2.3.9).
    Other,
}

/// Takes the next report on `socket`; `None` when there is none.
pub(super) fn receive(socket: BorrowedFd<'_>) -> Option<Report> {
    let mut control = cmsg_space!(
        (libc::sock_extended_err, libc::sockaddr_in6),
        libc::in6_pktinfo,
        [libc::c_int; 4]
    );
    let mut datagram: [IoSliceMut<'_>; 0] = [];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let received =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut datagram, Some(&mut control), flags)
            .ok()?;
    let (mut local, mut errno) = (None, 0);
    for message in received.cmsgs().into_iter().flatten() {
        match message {
            ControlMessageOwned::Ipv4RecvErr(error, _)
            | ControlMessageOwned::Ipv6RecvErr(error, _) => errno = error.ee_errno,
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                let address = Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr));
                local = Some(IpAddr::V4(address));
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                let address = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                local = Some(IpAddr::V6(address));
            }
            _ => {}
        }
    }
    let client = received.address.as_ref().and_then(socket_address);
    let is_closed = u32::try_from(libc::ECONNREFUSED) == Ok(errno);
    Some(match client {
        Some(client) if is_closed => Report::Closed(AddressPair { client, local }),
        _ => Report::Other,
    })
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|&v4| SocketAddr::V4(v4.into()));
    v4.or_else(|| Some(SocketAddr::V6((*address.as_sockaddr_in6()?).into())))
}
