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

/// Smallest time between probes that the kernel takes.
const PROBE_INTERVAL_MIN: Duration = Duration::from_secs(1);

/// Makes `socket` give up a silent peer after `timeout`. Zero leaves that to the
/// system's own keep-alive, about two hours.
pub(super) fn guard(socket: impl AsFd, timeout: Duration) -> Result<(), Errno> {
    sockopt::set_socket_keepalive(&socket, true)?;
    if timeout.is_zero() {
        return Ok(());
    }
    sockopt::set_tcp_keepidle(&socket, (timeout / 2).max(PROBE_INTERVAL_MIN))?;
    sockopt::set_tcp_keepintvl(&socket, (timeout / 8).max(PROBE_INTERVAL_MIN))?;
    let milliseconds = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(&socket, milliseconds)
}
