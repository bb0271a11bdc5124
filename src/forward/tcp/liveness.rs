//! Finds peers that are gone without a sign: powered off, or behind a network
//! that drops everything.
//!
//! With a peer timeout T, an idle connection is probed after T/2, and then
//! every T/8. A peer from which nothing came for T is given up at the next
//! probe. So is a peer that for T acknowledges nothing of what it was sent, or
//! keeps its window shut. The timeout replaces Linux's count of probes.
//!
//! Source: tcp(7), `TCP_USER_TIMEOUT`; Linux `net/ipv4/tcp_timer.c`.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt;

use super::connection::Connection;
use crate::forward::slab::{Key, Slab};

/// Smallest time between probes that the kernel takes.
const PROBE_INTERVAL_MIN: Duration = Duration::from_secs(1);

/// The new connections of a thread, whose peers are not watched for life yet.
#[derive(Debug)]
pub(super) struct Liveness {
    unguarded: Vec<Key>,
    /// Time without a sign of life after which a peer is given up.
    peer_timeout: Duration,
}

impl Liveness {
    pub(super) fn new(peer_timeout: Duration) -> Self {
        Self {
            unguarded: Vec::new(),
            peer_timeout,
        }
    }

    pub(super) fn add(&mut self, key: Key) {
        self.unguarded.push(key);
    }

    pub(super) fn clear(&mut self) {
        self.unguarded.clear();
    }

    /// Watches the peers of new connections. A connection that ends before a
    /// tick does not pay for that.
    pub(super) fn tick(&mut self, connections: &mut Slab<Connection>) {
        for key in std::mem::take(&mut self.unguarded) {
            match connections.get_mut(key) {
                Some(connection) if connection.is_connecting => self.unguarded.push(key),
                Some(connection) => {
                    // The socket of a peer that is gone already reports that.
                    let _ = guard(&connection.client, self.peer_timeout);
                    // Nor is a read that passes an urgent byte to lose it. The
                    // clients' sockets have that from their listener.
                    let _ = sockopt::set_socket_oobinline(&connection.server, true);
                    let _ = guard(&connection.server, self.peer_timeout);
                }
                None => {}
            }
        }
    }
}

/// Makes `socket` give up a silent peer after `timeout`. Zero leaves that to the
/// system's own keep-alive, about two hours.
fn guard(socket: impl AsFd, timeout: Duration) -> Result<(), Errno> {
    sockopt::set_socket_keepalive(&socket, true)?;
    if timeout.is_zero() {
        return Ok(());
    }
    sockopt::set_tcp_keepidle(&socket, (timeout / 2).max(PROBE_INTERVAL_MIN))?;
    sockopt::set_tcp_keepintvl(&socket, (timeout / 8).max(PROBE_INTERVAL_MIN))?;
    let milliseconds = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(&socket, milliseconds)
}
