//! UDP through a connection port: one flow per client, each with its own
//! socket connected to the server, so that the kernel sorts the replies and
//! reports a server that is gone.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::admission::Permit;
use super::handover::{HandedClient, HandedFlow};
use super::listeners::Listener;
use super::slab::Key;
use super::{SessionKey, Ticket, Traffic};
use crate::table::ListenPort;

/// Most datagrams received at once.
const BATCH: usize = quinn_udp::BATCH_SIZE;

/// Space for one datagram, the largest of which has 65,507 bytes, or for
/// several that the kernel has joined.
const SLOT_BYTES: usize = 64 * 1024;

/// Longest datagrams that are sent in one go: they fit the smallest MTU that
/// IPv6 allows (1280), longer ones might be refused.
///
/// Source: RFC 8200, section 5.
const MOST_JOINED: usize = 1200;

/// Most bytes sent in one go: the largest datagram that the kernel takes.
const JOINED_BYTES: usize = 65_507;

/// Datagrams of one parked client that are kept.
const PARKED_DATAGRAMS: usize = 8;

/// How many datagrams to ask a socket for: one while they come alone, else a
/// few more than it had last time, so that one call gets all of a burst.
#[derive(Clone, Copy, Debug)]
pub(super) struct Appetite {
    most: u8,
    /// Lone datagrams since it was last asked for two.
    alone: u8,
}

impl Appetite {
    /// Lone datagrams before a socket is asked whether there are two.
    const ALONE: u8 = 16;

    pub(super) fn new() -> Self {
        Self { most: 1, alone: 0 }
    }

    fn most(self) -> usize {
        usize::from(self.most)
    }

    /// Learns how many there were. Whether to ask at once for more: a socket
    /// that was asked for one is reported again if there are.
    fn learn(&mut self, received: usize) -> bool {
        let is_full = received >= self.most();
        let next = match (self.most, received) {
            (1, _) => {
                self.alone = (self.alone + 1) % Self::ALONE;
                1 + usize::from(self.alone == 0)
            }
            (_, 0 | 1) => 1,
            _ if is_full => 2 * received,
            _ => received + 1,
        };
        let was_alone = self.most == 1;
        self.most = u8::try_from(next.min(BATCH)).expect("a batch is small");
        is_full && !was_alone
    }
}

/// A thread's space for datagrams.
#[derive(Debug, Default)]
pub(super) struct Batch {
    space: Vec<u8>,
    metas: Vec<RecvMeta>,
    joined: Vec<u8>,
}

/// Datagrams of one sender, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a> {
    pub(super) sender: SocketAddr,
    /// The address that they were sent to, where the system tells.
    pub(super) local: Option<IpAddr>,
    pub(super) bytes: &'a [u8],
    /// Length of each datagram but the last, which may be shorter.
    pub(super) stride: usize,
}

impl<'a> Run<'a> {
    /// Each datagram.
    pub(super) fn datagrams(self) -> impl Iterator<Item = &'a [u8]> {
        // An empty datagram has no chunks, but is one.
        let empty = self.bytes.is_empty().then_some(self.bytes);
        self.bytes.chunks(self.stride.max(1)).chain(empty)
    }

    fn is_one(self) -> bool {
        self.bytes.len() <= self.stride
    }

    /// How many there are.
    fn count(self) -> u64 {
        self.datagrams().count() as u64
    }
}

impl Batch {
    /// Memory is taken up as it is used.
    pub(super) fn new() -> Self {
        Self {
            space: vec![0; BATCH * SLOT_BYTES],
            metas: vec![RecvMeta::default(); BATCH],
            joined: Vec::new(),
        }
    }

    /// Receives what is there, as far as `appetite` goes. Whether there may be
    /// more.
    pub(super) fn receive(
        &mut self,
        state: &UdpSocketState,
        socket: UdpSockRef<'_>,
        appetite: &mut Appetite,
    ) -> io::Result<(usize, bool)> {
        let most = appetite.most();
        let mut slots = self.space.chunks_mut(SLOT_BYTES).map(IoSliceMut::new);
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| slots.next().expect("there are as many slots"));
        let received = state.recv(socket, &mut slices[..most], &mut self.metas[..most])?;
        Ok((received, appetite.learn(received)))
    }

    /// Receives one datagram from a connected socket that joins none.
    fn receive_one(&mut self, socket: BorrowedFd<'_>, peer: SocketAddr) -> io::Result<usize> {
        let (length, _) = net::recv(socket, &mut self.space[..SLOT_BYTES], RecvFlags::empty())?;
        let meta = &mut self.metas[0];
        (meta.addr, meta.dst_ip) = (peer, None);
        (meta.len, meta.stride) = (length, length);
        Ok(1)
    }

    /// The run that begins with the datagram received as `first` of
    /// `received`, and the index behind it. Datagrams of one length are joined.
    pub(super) fn run(&mut self, first: usize, received: usize) -> (Run<'_>, usize) {
        let meta = self.metas[first];
        let slot = |index: usize, length: usize| {
            &self.space[index * SLOT_BYTES..index * SLOT_BYTES + length]
        };
        let mut run = Run {
            sender: meta.addr,
            local: meta.dst_ip,
            bytes: slot(first, meta.len),
            stride: meta.stride,
        };
        let mut next = first + 1;
        // Joined by the kernel already, empty, or too long to be joined.
        if meta.len != meta.stride || meta.len == 0 || meta.len > MOST_JOINED {
            return (run, next);
        }
        let (mut total, mut last) = (meta.len, meta.len);
        while next < received && last == meta.len {
            let follower = &self.metas[next];
            let fits = follower.len == follower.stride
                && (1..=meta.len).contains(&follower.len)
                && total + follower.len <= JOINED_BYTES;
            if !fits || follower.addr != meta.addr || follower.dst_ip != meta.dst_ip {
                break;
            }
            (total, last) = (total + follower.len, follower.len);
            next += 1;
        }
        if next > first + 1 {
            self.joined.clear();
            for index in first..next {
                self.joined
                    .extend_from_slice(slot(index, self.metas[index].len));
            }
            run.bytes = &self.joined;
        }
        (run, next)
    }
}

/// An open UDP connection port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) flows: HashMap<SocketAddr, Key>,
    pub(super) parked: HashMap<SocketAddr, Ticket>,
    /// The table no longer has it: no new flows.
    pub(super) is_draining: bool,
    appetite: Appetite,
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
            appetite: Appetite::new(),
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
        let (received, is_more) = batch.receive(&self.state, socket, &mut self.appetite)?;
        if let Some(address) = self.address {
            for meta in &mut batch.metas[..received] {
                meta.dst_ip = Some(address);
            }
        }
        Ok((received, is_more))
    }

    /// Receives datagrams of a flow's server into `batch`.
    pub(super) fn receive_from_server(
        &self,
        flow: &mut Flow,
        batch: &mut Batch,
    ) -> io::Result<(usize, bool)> {
        if flow.appetite.most() == 1 {
            let received = batch.receive_one(flow.server.as_fd(), flow.target)?;
            return Ok((received, flow.appetite.learn(received)));
        }
        let socket = UdpSockRef::from(&flow.server);
        batch.receive(&self.state, socket, &mut flow.appetite)
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
    pub(super) appetite: Appetite,
    pub(super) active: Instant,
    pub(super) traffic: Traffic,
    /// The client has sent again after a reply: its address is not a forged one.
    pub(super) is_assured: bool,
    /// Its place among the clients.
    pub(super) _permit: Permit,
}

impl Flow {
    /// The flow as another thread or process goes on with it.
    pub(super) fn hand_over(self, now: Instant) -> HandedFlow {
        HandedFlow {
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
    pub(super) fn take_over(handed: HandedFlow, permit: Permit, now: Instant) -> Option<Self> {
        let target = net::getpeername(&handed.server).ok().flatten()?;
        Some(Self {
            port: handed.port,
            client: handed.client,
            local: handed.local,
            session: handed.session,
            target: target.try_into().ok()?,
            appetite: Appetite::new(),
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
pub(super) struct Parked {
    pub(super) port: ListenPort,
    pub(super) client: SocketAddr,
    pub(super) local: Option<IpAddr>,
    pub(super) datagrams: Vec<Box<[u8]>>,
    pub(super) permit: Permit,
}

impl Parked {
    pub(super) fn hand_over(self) -> HandedClient {
        HandedClient::Udp {
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
