//! UDP through a connection port: one flow per client, each with its own
//! socket connected to the server, so that the kernel sorts the replies and
//! reports a server that is gone.

mod batch;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SendFlags, SocketFlags, SocketType};

use self::batch::MOST_JOINED;
pub(super) use self::batch::{Batch, ReceiveBatchSize, Run};
use super::admission::Permit;
use super::listeners::Listener;
use super::slab::Key;
use super::snapshot::{ClientSnapshot, FlowSnapshot};
use super::{PendingId, SessionKey, Traffic};
use crate::table::ListenPort;

/// Datagrams of one parked client that are kept.
const PARKED_DATAGRAMS: usize = 8;

/// An open UDP connection port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) flows: HashMap<SocketAddr, Key>,
    pub(super) parked: HashMap<SocketAddr, PendingId>,
    /// The table no longer has it: no new flows.
    pub(super) is_draining: bool,
    receive_batch_size: ReceiveBatchSize,
    socket: UdpSocket,
    /// The one that it is bound to, and that its replies come from.
    address: Option<IpAddr>,
    state: UdpSocketState,
}

impl Port {
    pub(super) fn new(socket: UdpSocket, state: UdpSocketState) -> Self {
        let address = socket.local_addr().ok().map(|address| address.ip());
        Self {
            flows: HashMap::new(),
            parked: HashMap::new(),
            is_draining: false,
            receive_batch_size: ReceiveBatchSize::new(),
            address: address.filter(|address| !address.is_unspecified()),
            socket,
            state,
        }
    }

    /// Whether connection ports are open at `address`, as far as is known:
    /// `local` is where a datagram came in.
    pub(super) fn is_at(&self, address: IpAddr, local: Option<IpAddr>) -> bool {
        match self.address {
            Some(own) => own.to_canonical() == address,
            None => {
                address.is_loopback() || local.is_some_and(|local| local.to_canonical() == address)
            }
        }
    }

    pub(super) fn into_listener(self) -> Listener {
        Listener::Udp(self.socket, self.state)
    }

    /// Receives datagrams of clients into `batch`.
    pub(super) fn receive(&mut self, batch: &mut Batch) -> io::Result<(usize, bool)> {
        let socket = UdpSockRef::from(&self.socket);
        let (received, is_more) =
            batch.receive(&self.state, socket, &mut self.receive_batch_size)?;
        if let Some(address) = self.address {
            batch.came_in_at(address, received);
        }
        Ok((received, is_more))
    }

    /// Receives datagrams of a flow's server into `batch`.
    pub(super) fn receive_from_server(
        &self,
        flow: &mut Flow,
        batch: &mut Batch,
    ) -> io::Result<(usize, bool)> {
        if flow.receive_batch_size.is_for_one() {
            return batch.receive_one(
                flow.server.as_fd(),
                flow.target,
                &mut flow.receive_batch_size,
            );
        }
        let socket = UdpSockRef::from(&flow.server);
        batch.receive(&self.state, socket, &mut flow.receive_batch_size)
    }

    /// Sends a client's datagrams to its server.
    pub(super) fn send_upstream(&self, flow: &mut Flow, run: Run<'_>) -> Sent {
        let socket = flow.server.as_fd();
        let plain = |datagram: &[u8]| {
            net::send(&flow.server, datagram, SendFlags::empty())
                .map(drop)
                .map_err(io::Error::from)
        };
        let sent = self.send(run, socket, flow.target, None, plain);
        flow.traffic.upstream_bytes += sent.bytes;
        sent
    }

    /// Sends a server's datagrams from the address that the client knows.
    pub(super) fn reply(&self, flow: &Flow, run: Run<'_>) -> Sent {
        let socket = self.socket.as_fd();
        let plain = |datagram: &[u8]| match self.address {
            Some(_) => net::sendto(socket, datagram, SendFlags::empty(), &flow.client)
                .map(drop)
                .map_err(io::Error::from),
            None => {
                let transmit = transmit(flow.client, flow.local, datagram, None);
                self.state.try_send(UdpSockRef::from(&socket), &transmit)
            }
        };
        self.send(run, socket, flow.client, flow.local, plain)
    }

    /// Sends several datagrams in one go where the kernel can, else each by
    /// `plain`.
    fn send(
        &self,
        run: Run<'_>,
        socket: BorrowedFd<'_>,
        destination: SocketAddr,
        source: Option<IpAddr>,
        plain: impl Fn(&[u8]) -> io::Result<()>,
    ) -> Sent {
        let mut sent = Sent::default();
        let segments = self.state.max_gso_segments();
        if !run.is_one() && run.stride <= MOST_JOINED && segments > 1 {
            for bytes in run.bytes.chunks(run.stride * segments) {
                let part = Run { bytes, ..run };
                let transmit = transmit(destination, source, bytes, Some(run.stride));
                match self.state.try_send(UdpSockRef::from(&socket), &transmit) {
                    Ok(()) => sent.bytes += bytes.len() as u64,
                    // The network takes no such thing: each on its own.
                    Err(error) if is_unsupported(&error) => {
                        part.datagrams()
                            .for_each(|datagram| sent.add(datagram, plain(datagram)));
                    }
                    Err(error) => sent.fail(part.count(), &error),
                }
            }
            return sent;
        }
        for datagram in run.datagrams() {
            sent.add(datagram, plain(datagram));
        }
        sent
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
    pub(super) target: SocketAddr,
    pub(super) receive_batch_size: ReceiveBatchSize,
    pub(super) active: Instant,
    pub(super) traffic: Traffic,
    /// The client has sent again after a reply: its address is not a forged one.
    pub(super) is_assured: bool,
    /// Its place among the clients.
    pub(super) _permit: Permit,
}

impl Flow {
    /// The flow as another thread or process goes on with it.
    pub(super) fn hand_over(self, now: Instant) -> FlowSnapshot {
        FlowSnapshot {
            port: self.port,
            session: self.session,
            client: self.client,
            local: self.local,
            server: self.server,
            idle: now.saturating_duration_since(self.active),
            traffic: self.traffic,
            is_assured: self.is_assured,
        }
    }

    /// Goes on with a flow; `None` when its socket is not connected.
    pub(super) fn take_over(handed: FlowSnapshot, permit: Permit, now: Instant) -> Option<Self> {
        let target = net::getpeername(&handed.server).ok().flatten()?;
        Some(Self {
            port: handed.port,
            client: handed.client,
            local: handed.local,
            session: handed.session,
            target: target.try_into().ok()?,
            receive_batch_size: ReceiveBatchSize::new(),
            server: handed.server,
            active: now.checked_sub(handed.idle).unwrap_or(now),
            traffic: handed.traffic,
            is_assured: handed.is_assured,
            _permit: permit,
        })
    }
}

/// What became of datagrams that were to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// Bytes that the socket took.
    pub(super) bytes: u64,
    /// Datagrams dropped, as any network would: its buffer was full.
    pub(super) dropped: u64,
    /// The receiver is gone, as ICMP told; so are the datagrams.
    pub(super) is_gone: bool,
}

impl Sent {
    fn add(&mut self, datagram: &[u8], result: io::Result<()>) {
        match result {
            Ok(()) => self.bytes += datagram.len() as u64,
            Err(error) => self.fail(1, &error),
        }
    }

    fn fail(&mut self, datagrams: u64, error: &io::Error) {
        match Errno::from_io_error(error) {
            Some(Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH) => {
                self.is_gone = true;
            }
            _ => self.dropped += datagrams,
        }
    }
}

/// The error that refuses segmentation, and not the datagrams.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::IO))
}

fn transmit(
    destination: SocketAddr,
    source: Option<IpAddr>,
    contents: &[u8],
    segment_size: Option<usize>,
) -> Transmit<'_> {
    Transmit {
        destination,
        ecn: None,
        contents,
        segment_size,
        src_ip: source,
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
pub(super) struct Pending {
    pub(super) port: ListenPort,
    pub(super) client: SocketAddr,
    pub(super) local: Option<IpAddr>,
    pub(super) datagrams: Vec<Box<[u8]>>,
    pub(super) permit: Permit,
}

impl Pending {
    pub(super) fn hand_over(self) -> ClientSnapshot {
        ClientSnapshot::Udp {
            port: self.port,
            address: self.client,
            local: self.local,
            datagrams: self.datagrams.into_iter().map(Vec::from).collect(),
        }
    }

    /// Keeps a datagram, if there is room.
    pub(super) fn keep(&mut self, datagram: &[u8]) {
        if self.datagrams.len() < PARKED_DATAGRAMS {
            self.datagrams.push(datagram.into());
        }
    }
}
