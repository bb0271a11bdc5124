//! A UDP flow: one client's datagrams, with a socket of its own that is
//! connected to the server. So the kernel sorts the replies and reports a
//! server that is gone.
//!
//! Where replies may come from any port of the server, the socket is not
//! connected: the kernel then delivers what any host sends, and
//! [`Flow::takes_from`] sorts it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType};

use super::addresses::AddressPair;
use super::batch::ReceiveBatchSize;
use crate::forward::gate::{SessionKey, Traffic};
use crate::forward::quota::Permit;
use crate::forward::snapshot::FlowSnapshot;
use crate::pool::Replies;
use crate::table::ListenPort;

/// A client's flow of datagrams to its server and back.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) port: ListenPort,
    pub(super) addresses: AddressPair,
    pub(super) session: SessionKey,
    /// The socket towards the server; connected, unless `replies` is `AnyPort`.
    pub(super) server: OwnedFd,
    /// The server's address and the port that the client's datagrams go to.
    pub(super) target: SocketAddr,
    pub(super) replies: Replies,
    pub(super) receive_batch_size: ReceiveBatchSize,
    /// The time of the client's last datagram.
    pub(super) client_active: Instant,
    /// The time of the server's last datagram; at first that of the flow's begin.
    pub(super) server_active: Instant,
    pub(super) traffic: Traffic,
    /// The client has sent again after a reply: its address is not a forged one.
    pub(super) is_assured: bool,
    /// The client's place in the quota.
    pub(super) _permit: Permit,
}

impl Flow {
    /// Whether datagrams of `sender` are for the client. If they come from another
    /// port of the server, and may, the client's next ones go there.
    pub(super) fn takes_from(&mut self, sender: SocketAddr) -> bool {
        match self.replies {
            // The socket receives no others.
            Replies::ServerPort => true,
            Replies::AnyPort => {
                let is_server = sender.ip() == self.target.ip();
                if is_server {
                    self.target.set_port(sender.port());
                }
                is_server
            }
        }
    }

    /// The flow as plain data, for another thread or process.
    pub(super) fn export(self, now: Instant) -> FlowSnapshot {
        FlowSnapshot {
            port: self.port,
            session: self.session,
            client: self.addresses.client,
            local: self.addresses.local,
            server: self.server,
            target: (self.replies == Replies::AnyPort).then_some(self.target),
            idle: now.saturating_duration_since(self.client_active),
            traffic: self.traffic,
            is_assured: self.is_assured,
        }
    }

    /// An exported flow; `None` when its socket should be connected and is not.
    pub(super) fn import(snapshot: FlowSnapshot, permit: Permit, now: Instant) -> Option<Self> {
        let (target, replies) = match snapshot.target {
            Some(target) => (target, Replies::AnyPort),
            None => {
                let peer = net::getpeername(&snapshot.server).ok().flatten()?;
                (peer.try_into().ok()?, Replies::ServerPort)
            }
        };
        Some(Self {
            port: snapshot.port,
            addresses: AddressPair {
                client: snapshot.client,
                local: snapshot.local,
            },
            session: snapshot.session,
            target,
            replies,
            receive_batch_size: ReceiveBatchSize::new(),
            server: snapshot.server,
            client_active: now.checked_sub(snapshot.idle).unwrap_or(now),
            server_active: now,
            traffic: snapshot.traffic,
            is_assured: snapshot.is_assured,
            _permit: permit,
        })
    }
}

/// A socket for datagrams to `target` and for `replies`.
pub(super) fn open(target: SocketAddr, replies: Replies) -> Result<OwnedFd, Errno> {
    let connected = socket(target)?;
    net::connect(&connected, &target)?;
    if replies == Replies::ServerPort {
        return Ok(connected);
    }
    // Bound to the address that the server sees, it receives nothing from networks
    // that reach other addresses only.
    let own: SocketAddr = net::getsockname(&connected)?.try_into()?;
    let unconnected = socket(target)?;
    net::bind(&unconnected, &SocketAddr::new(own.ip(), 0))?;
    Ok(unconnected)
}

fn socket(target: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if target.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    net::socket_with(family, SocketType::DGRAM, flags, None)
}
