//! How much of what was sent a TCP socket's peer has not acknowledged yet.
//!
//! The `ioctl` for it has no safe wrapper, so the kernel is asked through
//! `NETLINK_SOCK_DIAG`, as `ss` does: one message there and back, about 10 µs.
//! It needs no privilege.
//!
//! Source: sock_diag(7); Linux `include/uapi/linux/inet_diag.h`.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, netlink,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
const REQUEST_BYTES: usize = 16 + 56;
/// Where `idiag_wqueue` lies in an answer: behind `struct nlmsghdr`, four
/// bytes, `struct inet_diag_sockid`, and two words.
const QUEUE_OFFSET: usize = 16 + 4 + 48 + 8;

/// A way to ask.
#[derive(Debug)]
pub(super) struct SendQueues {
    netlink: OwnedFd,
}

impl SendQueues {
    pub(super) fn open() -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (family, kind) = (AddressFamily::NETLINK, SocketType::DGRAM);
        let netlink = net::socket_with(family, kind, flags, Some(netlink::SOCK_DIAG))?;
        Ok(Self { netlink })
    }

    /// Bytes sent on `socket` and not acknowledged. `None` when the connection
    /// is gone, or the kernel does not tell.
    pub(super) fn unacknowledged(&self, socket: &OwnedFd) -> Option<u32> {
        let local = SocketAddr::try_from(net::getsockname(socket).ok()?).ok()?;
        let peer = SocketAddr::try_from(net::getpeername(socket).ok()??).ok()?;
        let request = request(local, peer);
        net::send(&self.netlink, &request, SendFlags::empty()).ok()?;
        let mut answer = [0u8; 512];
        let (length, _) = net::recv(&self.netlink, &mut answer, RecvFlags::empty()).ok()?;
        let answer = &answer[..length];
        let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
        let queue = answer.get(QUEUE_OFFSET..QUEUE_OFFSET + 4)?;
        (kind == SOCK_DIAG_BY_FAMILY).then(|| queue.try_into().map(u32::from_ne_bytes).ok())?
    }
}

fn request(local: SocketAddr, peer: SocketAddr) -> Vec<u8> {
    let (local_ip, peer_ip) = (local.ip().to_canonical(), peer.ip().to_canonical());
    let family = match local_ip {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let mut request = Vec::with_capacity(REQUEST_BYTES);
    let length = u32::try_from(REQUEST_BYTES).expect("it is small");
    request.extend(length.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence number and sender: there is one question at a time.
    request.extend([0; 8]);
    let protocol = u8::try_from(ipproto::TCP.as_raw().get()).expect("protocols have 8 bits");
    let family = u8::try_from(family.as_raw()).expect("families have 8 bits");
    request.extend([family, protocol, 0, 0]);
    // All states.
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(local.port().to_be_bytes());
    request.extend(peer.port().to_be_bytes());
    for address in [local_ip, peer_ip] {
        let mut words = [0; 16];
        match address {
            IpAddr::V4(address) => words[..4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => words.copy_from_slice(&address.octets()),
        }
        request.extend(words);
    }
    // Any interface, and no cookie.
    request.extend([0; 4]);
    request.extend([0xff; 8]);
    request
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
            let queues = SendQueues::open().unwrap();
            let queued =
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
