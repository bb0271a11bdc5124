//! A UDP flow: one client's datagrams, with a socket of its own that is
//! connected to the server. So the kernel sorts the replies and reports a
//! server that is gone.

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
use crate::table::ListenPort;

/// A client's flow of datagrams to its server and back.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) port: ListenPort,
    pub(super) addresses: AddressPair,
    pub(super) session: SessionKey,
    /// The socket that is connected to the server.
    pub(super) server: OwnedFd,
    /// The server's address.
    pub(super) target: SocketAddr,
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
    /// The flow as plain data, for another thread or process.
    pub(super) fn export(self, now: Instant) -> FlowSnapshot {
        FlowSnapshot {
            port: self.port,
            session: self.session,
            client: self.addresses.client,
            local: self.addresses.local,
            server: self.server,
            idle: now.saturating_duration_since(self.client_active),
            traffic: self.traffic,
            is_assured: self.is_assured,
        }
    }

    /// An exported flow; `None` when its socket is not connected.
    pub(super) fn import(snapshot: FlowSnapshot, permit: Permit, now: Instant) -> Option<Self> {
        let target = net::getpeername(&snapshot.server).ok().flatten()?;
        Some(Self {
            port: snapshot.port,
            addresses: AddressPair {
                client: snapshot.client,
                local: snapshot.local,
            },
            session: snapshot.session,
            target: target.try_into().ok()?,
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
