//! The bytes that a TCP socket has sent and its peer has not acknowledged yet.
//!
//! The `ioctl` for it has no safe wrapper, so the kernel is asked through
//! `NETLINK_SOCK_DIAG`: one message there and back, about 10 µs.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use rustix::net;

use crate::sock_diag::SockDiag;

/// A socket through which the kernel is asked.
#[derive(Debug)]
pub(super) struct SendQueues(SockDiag);

impl SendQueues {
    pub(super) fn open() -> io::Result<Self> {
        SockDiag::open().map(Self)
    }

    /// Bytes sent on `socket` and not acknowledged. `None` when the connection
    /// is gone, or the kernel does not report it.
    pub(super) fn unacknowledged(&mut self, socket: &OwnedFd) -> Option<u32> {
        let local = SocketAddr::try_from(net::getsockname(socket).ok()?).ok()?;
        let peer = SocketAddr::try_from(net::getpeername(socket).ok()??).ok()?;
        self.0.unacknowledged(local, peer).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn what_waits_for_the_peer_is_counted() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                eprintln!("skipped: no {address} here");
                continue;
            };
            let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut receiver, _) = listener.accept().unwrap();
            sender.set_nonblocking(true).unwrap();
            let mut queues = SendQueues::open().unwrap();
            let mut queued =
                |sender: &TcpStream| queues.unacknowledged(&sender.try_clone().unwrap().into());
            assert_eq!(queued(&sender), Some(0));
            let mut written = 0;
            while let Ok(length) = sender.write(&[1; 4096]) {
                written += length;
            }
            let waiting = queued(&sender).unwrap();
            assert!(waiting > 0 && waiting as usize <= written, "{waiting}");
            receiver.read_exact(&mut vec![0; written]).unwrap();
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while queued(&sender) != Some(0) {
                assert!(std::time::Instant::now() < deadline);
            }
            drop(receiver);
            drop(listener);
        }
    }
}
