//! UDP through a connection port: one flow per client, each with its own
//! socket connected to the server, so that the kernel sorts the replies and
//! reports a server that is gone.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Instant;

use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SendFlags, SocketFlags, SocketType};

use super::slab::Key;
use super::{SessionKey, Ticket, Traffic};
use crate::table::ListenPort;

/// Largest datagram, and so the space for one.
pub(super) const DATAGRAM_BYTES: usize = 65_535;

/// Datagrams of one parked client that are kept.
const PARKED_DATAGRAMS: usize = 8;

/// An open UDP connection port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) flows: HashMap<SocketAddr, Key>,
    pub(super) parked: HashMap<SocketAddr, Ticket>,
    /// The table no longer has it: no new flows.
    pub(super) is_draining: bool,
    socket: UdpSocket,
    state: UdpSocketState,
}

/// A datagram that came in on a connection port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    pub(super) client: SocketAddr,
    /// The address that the client sent it to, where the system tells.
    pub(super) local: Option<IpAddr>,
    /// Length of what was read; more than one datagram when above `stride`.
    pub(super) length: usize,
    pub(super) stride: usize,
}

impl Port {
    pub(super) fn new(socket: UdpSocket, state: UdpSocketState) -> Self {
        Self {
            flows: HashMap::new(),
            parked: HashMap::new(),
            is_draining: false,
            socket,
            state,
        }
    }

    /// Reads one datagram, or several of one client at once.
    pub(super) fn receive(&self, space: &mut [u8]) -> io::Result<Received> {
        let mut meta = [RecvMeta::default()];
        let mut slices = [IoSliceMut::new(space)];
        self.state
            .recv(UdpSockRef::from(&self.socket), &mut slices, &mut meta)?;
        let [
            RecvMeta {
                addr: client,
                dst_ip: local,
                len: length,
                stride,
                ..
            },
        ] = meta;
        Ok(Received {
            client,
            local,
            length,
            stride,
        })
    }

    /// Sends a reply from the address that the client knows.
    pub(super) fn reply(&self, flow: &Flow, datagram: &[u8]) -> io::Result<()> {
        let transmit = Transmit {
            destination: flow.client,
            ecn: None,
            contents: datagram,
            segment_size: None,
            src_ip: flow.local,
        };
        self.state
            .try_send(UdpSockRef::from(&self.socket), &transmit)
    }
}

/// One client's datagrams to and from the server.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) port: ListenPort,
    pub(super) client: SocketAddr,
    pub(super) local: Option<IpAddr>,
    pub(super) session: SessionKey,
    pub(super) server: OwnedFd,
    pub(super) active: Instant,
    pub(super) traffic: Traffic,
}

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    Yes,
    /// The socket's buffer is full: dropped, as any network would.
    Dropped,
    /// The server is gone, as ICMP told.
    Gone,
}

impl Flow {
    pub(super) fn send_upstream(&mut self, datagram: &[u8]) -> Sent {
        match net::send(&self.server, datagram, SendFlags::empty()) {
            Ok(_) => {
                self.traffic.upstream_bytes += datagram.len() as u64;
                Sent::Yes
            }
            Err(Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH) => Sent::Gone,
            Err(_) => Sent::Dropped,
        }
    }
}

/// A socket that is connected to `target`.
pub(super) fn connect(target: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if target.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(family, SocketType::DGRAM, flags, None)?;
    net::connect(&socket, &target)?;
    Ok(socket)
}

/// A client whose session is not known yet, with its first datagrams.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) port: ListenPort,
    pub(super) client: SocketAddr,
    pub(super) local: Option<IpAddr>,
    pub(super) datagrams: Vec<Box<[u8]>>,
}

impl Parked {
    /// Keeps a datagram, if there is room.
    pub(super) fn keep(&mut self, datagram: &[u8]) {
        if self.datagrams.len() < PARKED_DATAGRAMS {
            self.datagrams.push(datagram.into());
        }
    }
}
