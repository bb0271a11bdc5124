//! Opening connection ports: one listening socket per port and transport,
//! registered with the epoll of the thread that owns the port.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{OwnedFd};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt as nix_sockopt};
use rustix::event::epoll;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};

use super::token::Token;
use super::{ApplyError, Transport};
use crate::table::ListenPort;

/// A silent connection is probed after this, because a peer that vanished
/// without a word is otherwise noticed at the idle timeout only.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// Time between probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Unanswered probes after which a connection counts as broken: two minutes
/// after its last sign of life.
const KEEPALIVE_PROBES: u32 = 4;

/// Opens the socket of `port` for `transport` on `listen`, and registers it
/// with `epoll`.
///
/// # Errors
/// [`ApplyError::Bind`], naming the port and the cause.
pub fn open(
    epoll: &OwnedFd,
    listen: IpAddr,
    port: ListenPort,
    transport: Transport,
) -> Result<OwnedFd, ApplyError> {
    let address = SocketAddr::new(listen, port.get());
    let opened = match transport {
        Transport::Tcp => open_tcp(address),
        Transport::Udp => open_udp(address),
    };
    opened
        .and_then(|socket| {
            let token = match transport {
                Transport::Tcp => Token::Listener(port),
                Transport::Udp => Token::Datagrams(port),
            };
            let data = epoll::EventData::new_u64(token.encode());
            epoll::add(epoll, &socket, data, epoll::EventFlags::IN)?;
            Ok(socket)
        })
        .map_err(|source| ApplyError::bind(address, transport, source))
}

fn open_tcp(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = new_socket(address, SocketType::STREAM)?;
    // Connections of an earlier process in TIME_WAIT do not hinder a restart.
    // A listener of another program still does.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    // Accepted sockets inherit these.
    tune_connection(&socket)?;
    net::bind(&socket, &address)?;
    // The kernel lowers the backlog to net.core.somaxconn.
    net::listen(&socket, i32::MAX)?;
    Ok(socket)
}

fn open_udp(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = new_socket(address, SocketType::DGRAM)?;
    // Tells which of our addresses a client used, to answer from it.
    let wanted = if address.is_ipv4() {
        setsockopt(&socket, nix_sockopt::Ipv4PacketInfo, &true)
    } else {
        setsockopt(&socket, nix_sockopt::Ipv6RecvPacketInfo, &true)
    };
    wanted.map_err(io::Error::from)?;
    net::bind(&socket, &address)?;
    Ok(socket)
}

/// A non-blocking socket for `address`. An IPv6 one takes IPv4 too, whatever
/// the system's default, when it is bound to `::`.
pub fn new_socket(address: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(family, kind, flags, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, !address.ip().is_unspecified())?;
    }
    Ok(socket)
}

/// Sets what both connections of a session have: no delay, because whole
/// messages are passed on at once, and keep-alive probes.
pub fn tune_connection(socket: &OwnedFd) -> io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    Ok(())
}
