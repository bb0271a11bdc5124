//! A UDP connection port: receiving from clients and servers, and sending to
//! them, several datagrams in one call where the kernel can.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};
use rustix::io::Errno;
use rustix::net::{self, SendFlags};

use super::addresses::AddressPair;
use super::batch::{Batch, JOINED_DATAGRAM_MAX, ReceiveBatchSize, Received, Run};
use super::flow::Flow;
use super::reports::{self, Report};
use crate::forward::listeners::Listener;
use crate::forward::slab::Key;
use crate::pool::Replies;

/// An open UDP connection port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) flows: HashMap<AddressPair, Key>,
    /// Whether the table no longer has the port: it takes no new flows then.
    pub(super) is_draining: bool,
    receive_batch_size: ReceiveBatchSize,
    socket: UdpSocket,
    /// The address that the socket is bound to, and that its replies come from;
    /// `None` when that is every address.
    address: Option<IpAddr>,
    /// What the kernel can do with this socket.
    state: UdpSocketState,
}

impl Port {
    pub(super) fn new(socket: UdpSocket, state: UdpSocketState) -> Self {
        let address = socket.local_addr().ok().map(|address| address.ip());
        Self {
            flows: HashMap::new(),
            is_draining: false,
            receive_batch_size: ReceiveBatchSize::new(),
            address: address.filter(|address| !address.is_unspecified()),
            socket,
            state,
        }
    }

    /// Whether connection ports are open at `address`, as far as is known.
    /// `local` is the address that a datagram was sent to.
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
    pub(super) fn receive(&mut self, batch: &mut Batch) -> io::Result<Received> {
        let socket = UdpSockRef::from(&self.socket);
        batch.receive(&self.state, socket, &mut self.receive_batch_size)
    }

    /// Takes what a network has reported about a datagram that was sent to a
    /// client; `None` when there is nothing more.
    pub(super) fn receive_report(&self) -> Option<Report> {
        reports::receive(self.socket.as_fd())
    }

    /// Receives datagrams of a flow's server into `batch`.
    pub(super) fn receive_from_server(
        &self,
        flow: &mut Flow,
        batch: &mut Batch,
    ) -> io::Result<Received> {
        let is_connected = flow.replies == Replies::ServerPort;
        if is_connected && flow.receive_batch_size.is_single() {
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
            let sent = match flow.replies {
                Replies::ServerPort => net::send(&flow.server, datagram, SendFlags::empty()),
                Replies::AnyPort => {
                    net::sendto(&flow.server, datagram, SendFlags::empty(), &flow.target)
                }
            };
            sent.map(drop).map_err(io::Error::from)
        };
        let sent = self.send(run, socket, flow.target, None, plain);
        flow.traffic.upstream_bytes += sent.bytes;
        sent
    }

    /// Sends a server's datagrams from the address that the client knows.
    pub(super) fn reply(&self, flow: &Flow, run: Run<'_>) -> Sent {
        let socket = self.socket.as_fd();
        let AddressPair { client, local } = flow.addresses;
        let plain = |datagram: &[u8]| match local {
            None => past_report(|| {
                net::sendto(socket, datagram, SendFlags::empty(), &client)
                    .map(drop)
                    .map_err(io::Error::from)
            }),
            Some(_) => {
                let transmit = transmit(client, local, datagram, None);
                past_report(|| self.state.try_send(UdpSockRef::from(&socket), &transmit))
            }
        };
        self.send(run, socket, client, local, plain)
    }

    /// Sends several datagrams in one call where the kernel can, else each with
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
        if !run.is_one() && run.stride <= JOINED_DATAGRAM_MAX && segments > 1 {
            for bytes in run.bytes.chunks(run.stride * segments) {
                let part = Run { bytes, ..run };
                let transmit = transmit(destination, source, bytes, Some(run.stride));
                let send = || self.state.try_send(UdpSockRef::from(&socket), &transmit);
                match past_report(send) {
                    Ok(()) => sent.bytes += bytes.len() as u64,
                    // The network cannot split them: each is sent on its own.
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

/// What became of datagrams that were to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// Bytes that the socket took.
    pub(super) bytes: u64,
    /// Datagrams dropped because the socket's buffer was full, as any network
    /// does.
    pub(super) dropped: u64,
    /// Whether the receiver is gone, as ICMP reported. The datagrams are lost.
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

/// Sends once more after an error: it may be a report on an earlier datagram, of
/// another client even, in whose place nothing was sent.
fn past_report(send: impl Fn() -> io::Result<()>) -> io::Result<()> {
    match send() {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => send(),
        sent => sent,
    }
}

/// Whether the error refuses segmentation, and not the datagrams.
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
