//! Opening connection ports.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::socket::SetSockOpt;
use nix::sys::socket::sockopt::{
    Ipv4PacketInfo, Ipv6DontFrag, Ipv6RecvPacketInfo, ReceiveTimestampns,
};
use quinn_udp::{UdpSockRef, UdpSocketState};
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use socket2::{Domain, Socket, Type};

use super::gate::Transport;
use crate::table::ListenPort;

/// The kernel lowers it to `net.core.somaxconn`: a short queue resets clients
/// that come in a burst.
const BACKLOG: i32 = i32::MAX;

/// A connection port of the table that cannot be listened on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to open connection port {address} ({transport:?}): {reason}")]
pub struct UnavailablePort {
    /// The address and the number of the port.
    pub address: SocketAddr,
    /// The transport that failed.
    pub transport: Transport,
    /// The system's answer, and the remedy.
    pub reason: String,
}

impl UnavailablePort {
    pub(super) fn new(address: SocketAddr, transport: Transport, error: &io::Error) -> Self {
        Self {
            address,
            transport,
            reason: format!("{error}{}", hint(error)),
        }
    }

    /// The connection port.
    #[must_use]
    pub fn port(&self) -> Option<ListenPort> {
        ListenPort::new(self.address.port())
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; another program uses it: stop that, or move spec.connectionServer.connectionPorts"
        }
        io::ErrorKind::PermissionDenied => {
            "; ports so low need a privilege, or a lower net.ipv4.ip_unprivileged_port_start: move spec.connectionServer.connectionPorts"
        }
        _ => "",
    }
}

/// An open connection port.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Udp(UdpSocket, UdpSocketState),
}

impl Listener {
    /// Opens `port` on `address`; `::` includes IPv4.
    pub(super) fn open(
        address: IpAddr,
        port: ListenPort,
        transport: Transport,
    ) -> Result<Self, UnavailablePort> {
        let address = SocketAddr::new(address, port.get());
        let open = match transport {
            Transport::Tcp => open_tcp(address),
            Transport::Udp => open_udp(address),
        };
        open.map_err(|error| UnavailablePort::new(address, transport, &error))
    }

    /// A port that another process has opened.
    pub(super) fn adopt(socket: OwnedFd, transport: Transport) -> io::Result<Self> {
        match transport {
            Transport::Tcp => Ok(Self::Tcp(socket.into())),
            Transport::Udp => udp(socket.into()),
        }
    }

    /// The port's socket.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Udp(socket, _) => socket.as_fd(),
        }
    }

    pub(super) fn transport(&self) -> Transport {
        match self {
            Self::Tcp(_) => Transport::Tcp,
            Self::Udp(..) => Transport::Udp,
        }
    }
}

fn open_tcp(address: SocketAddr) -> io::Result<Listener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        None,
    )?;
    // Connections of a former process may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    // Accepted sockets inherit it. Messages must not wait for a full segment.
    socket.set_tcp_nodelay(true)?;
    // Inherited too: a read that passes an urgent byte must not lose it.
    socket.set_out_of_band_inline(true)?;
    bind(&socket, address)?;
    socket.listen(BACKLOG)?;
    Ok(Listener::Tcp(socket.into()))
}

fn open_udp(address: SocketAddr) -> io::Result<Listener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM.nonblocking(),
        None,
    )?;
    bind(&socket, address)?;
    udp(socket)
}

/// Prepares a bound socket for receiving and sending several datagrams in one
/// call.
fn udp(socket: Socket) -> io::Result<Listener> {
    let is_ipv6 = socket.domain()? == Domain::IPV6;
    let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
    // The network's reports that a client's port is closed are queued.
    state.enable_transport_errors(UdpSockRef::from(&socket))?;
    // Each datagram would pay for data that is not read.
    ReceiveTimestampns.set(&socket, &false)?;
    sockopt::set_ip_recvtos(&socket, false)?;
    if is_ipv6 {
        sockopt::set_ipv6_recvtclass(&socket, false)?;
    }
    let address = socket.local_addr()?.as_socket();
    if address.is_some_and(|address| !address.ip().is_unspecified()) {
        if is_ipv6 {
            Ipv6RecvPacketInfo.set(&socket, &false)?;
        } else {
            Ipv4PacketInfo.set(&socket, &false)?;
        }
    }
    // `UdpSocketState::new` forbids fragments, as QUIC requires. Datagrams that
    // pass here may be fragmented.
    sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::WANT)
        .or_else(|error| if is_ipv6 { Ok(()) } else { Err(error) })?;
    if is_ipv6 {
        sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::WANT)?;
        // With it, each datagram beyond the MTU would be dropped.
        Ipv6DontFrag.set(&socket, &false)?;
    }
    Ok(Listener::Udp(socket.into(), state))
}

fn bind(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())
}
