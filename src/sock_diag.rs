//! Requests to the kernel about sockets of this network namespace, by
//! `NETLINK_SOCK_DIAG`, as `ss` sends them. They need no privilege and never wait.
//!
//! Each request names the addresses of one socket, and the kernel looks that one up
//! as it does for a packet: about 2 µs, however many sockets there are. Lists of
//! sockets are not requested, because a list costs by the sockets of the whole
//! machine. Neither are reports of closed sockets (`SKNLGRP_INET_TCP_DESTROY`): the
//! kernel would make one for every connection of the machine that ends.
//!
//! Source: sock_diag(7), netlink(7); Linux `include/uapi/linux/inet_diag.h`,
//! `inet_diag_find_one_icsk`, `udp_dump_one`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use netlink_packet_core::{
    DecodeError, NLM_F_REQUEST, NLMSG_ALIGNTO, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, Parseable,
};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags,
};
use netlink_packet_sock_diag::{SOCK_DIAG_BY_FAMILY, SockDiagMessage};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

/// More bytes than an answer about one socket has: about 500.
const ANSWER_BYTES: usize = 8 * 1024;

/// Most requests that are sent at once. Sending 32 saves half of the time that
/// single ones take, and their answers fit into a receive buffer of 64 KiB.
const BATCH: usize = 32;

/// A protocol that the kernel is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A socket for requests to the kernel.
#[derive(Debug)]
pub struct SockDiag {
    netlink: OwnedFd,
    /// Sequence number of the last request. Its answer has the same number.
    sequence: u32,
    /// Buffer for one answer.
    answer: Vec<u8>,
}

impl SockDiag {
    /// Opens a socket for requests.
    ///
    /// # Errors
    /// The system's, for example in a sandbox that does not offer this family of
    /// sockets.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (family, kind) = (AddressFamily::NETLINK, SocketType::DGRAM);
        let netlink = net::socket_with(family, kind, flags, Some(netlink::SOCK_DIAG))?;
        Ok(Self {
            netlink,
            sequence: 0,
            answer: vec![0; ANSWER_BYTES],
        })
    }

    /// For each of `addresses`, the socket that a new client's first packet to it
    /// would reach now: one that is bound to that address, or to all addresses of a
    /// kind that includes it. A socket that is bound to a network device is not
    /// found.
    ///
    /// # Errors
    /// The kernel's. It reports no error when it has no module for `protocol`: it
    /// finds nothing then.
    pub fn listeners(
        &mut self,
        protocol: Protocol,
        addresses: &[SocketAddr],
    ) -> io::Result<Vec<Option<Socket>>> {
        let request = |address: &SocketAddr| {
            let anyone = match address.ip().to_canonical() {
                IpAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
                IpAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
            };
            match protocol {
                Protocol::Tcp => request(IPPROTO_TCP, *address, anyone),
                // Of UDP sockets the kernel takes the two the other way round.
                Protocol::Udp => request(IPPROTO_UDP, anyone, *address),
            }
        };
        let mut sockets = Vec::with_capacity(addresses.len());
        for batch in addresses.chunks(BATCH) {
            let requests: Vec<InetRequest> = batch.iter().map(request).collect();
            sockets.extend(self.ask(&requests)?);
        }
        Ok(sockets)
    }

    /// Number of bytes that the TCP socket with these addresses has sent, and that
    /// `peer` has not acknowledged.
    ///
    /// # Errors
    /// The kernel's: `ENOENT` when the connection is gone.
    pub fn unacknowledged(&mut self, local: SocketAddr, peer: SocketAddr) -> io::Result<u32> {
        let found = self.ask(&[request(IPPROTO_TCP, local, peer)])?;
        let socket = found.into_iter().next().flatten();
        socket
            .map(|socket| socket.send_queue)
            .ok_or_else(|| Errno::NOENT.into())
    }

    fn ask(&mut self, requests: &[InetRequest]) -> io::Result<Vec<Option<Socket>>> {
        let answers = self.exchange(requests);
        if answers.is_err() {
            // The other answers would be taken for those of the next requests.
            while net::recv(&self.netlink, &mut self.answer, RecvFlags::empty()).is_ok() {}
        }
        answers
    }

    fn exchange(&mut self, requests: &[InetRequest]) -> io::Result<Vec<Option<Socket>>> {
        let first = self.sequence.wrapping_add(1);
        let mut messages = Vec::new();
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            messages.extend(encode(request, self.sequence));
        }
        net::send(&self.netlink, &messages, SendFlags::empty())?;
        let mut answers = Answers::new(first, requests.len());
        while answers.missing > 0 {
            // The kernel answers while it is sent the requests, so this never waits.
            let (_, length) = net::recv(&self.netlink, &mut self.answer, RecvFlags::TRUNC)?;
            let answer = self.answer.get(..length).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "an answer was cut off")
            })?;
            answers.add(answer)?;
        }
        Ok(answers.sockets)
    }
}

/// A request about the socket with these addresses.
fn request(protocol: u8, source: SocketAddr, destination: SocketAddr) -> InetRequest {
    let (source_address, destination_address) =
        (source.ip().to_canonical(), destination.ip().to_canonical());
    InetRequest {
        family: if source_address.is_ipv4() {
            AF_INET
        } else {
            AF_INET6
        },
        protocol,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: source.port(),
            destination_port: destination.port(),
            source_address,
            destination_address,
            interface_id: 0,
            // The addresses suffice: this stands for any cookie.
            cookie: [0xff; 8],
        },
    }
}

fn encode(request: &InetRequest, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    header.sequence_number = sequence;
    let request = SockDiagMessage::InetRequest(request.clone());
    let mut message = NetlinkMessage::new(header, request.into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// The fields of a `struct inet_diag_msg` that are used. Its attributes are not
/// parsed, because each kernel version adds more of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// The address that the socket is bound to. That of an IPv6 socket may be an
    /// IPv4 address in its mapped form.
    pub local: SocketAddr,
    /// The number of the socket's inode, which no other open socket has.
    pub inode: u32,
    send_queue: u32,
}

impl NetlinkDeserializable for Socket {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if header.message_type != SOCK_DIAG_BY_FAMILY {
            return Err("it is not about a socket".into());
        }
        let response = InetResponseHeader::parse(payload)?;
        let id = response.socket_id;
        Ok(Self {
            local: SocketAddr::new(id.source_address, id.source_port),
            inode: response.inode,
            send_queue: response.send_queue,
        })
    }
}

/// The answers to requests with successive sequence numbers.
#[derive(Debug)]
struct Answers {
    /// Sequence number of the first request.
    first: u32,
    /// By request, `None` where there is no such socket.
    sockets: Vec<Option<Socket>>,
    /// The number of requests without an answer.
    missing: usize,
}

impl Answers {
    fn new(first: u32, requests: usize) -> Self {
        Self {
            first,
            sockets: vec![None; requests],
            missing: requests,
        }
    }

    /// Adds the messages in `bytes`. Those that answer older requests are passed
    /// over.
    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let message = NetlinkMessage::<Socket>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let header = message.header;
            let length = usize::try_from(header.length).unwrap_or(usize::MAX);
            let next = length.checked_next_multiple_of(usize::from(NLMSG_ALIGNTO));
            rest = next.and_then(|next| rest.get(next..)).unwrap_or_default();
            let index = header.sequence_number.wrapping_sub(self.first);
            let index = usize::try_from(index).unwrap_or(usize::MAX);
            let Some(socket) = self.sockets.get_mut(index) else {
                continue;
            };
            match message.payload {
                NetlinkPayload::InnerMessage(found) => *socket = Some(found),
                NetlinkPayload::Error(error) => {
                    let code = error.code.map_or(0, std::num::NonZero::get);
                    let errno = code.saturating_neg();
                    if errno != Errno::NOENT.raw_os_error() {
                        return Err(io::Error::from_raw_os_error(errno));
                    }
                }
                NetlinkPayload::Overrun(_) => return Err(Errno::NOBUFS.into()),
                _ => continue,
            }
            self.missing = self.missing.saturating_sub(1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::{NLMSG_ERROR, NLMSG_NOOP};
    use proptest::prelude::*;
    use std::net::{TcpListener, UdpSocket};

    /// A message as the kernel writes it, padded.
    fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(16 + payload.len()).unwrap().to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// A listening socket on 127.0.0.9, and an attribute of three bytes.
    fn socket(sequence: u32, port: u16, inode: u32) -> Vec<u8> {
        let mut payload = vec![AF_INET, 10, 0, 0];
        payload.extend(port.to_be_bytes());
        payload.extend([0; 2]);
        payload.extend([127, 0, 0, 9]);
        payload.extend([0; 12 + 16 + 4 + 8 + 4 + 4]);
        payload.extend(42u32.to_ne_bytes());
        payload.extend([0; 4]);
        payload.extend(inode.to_ne_bytes());
        payload.extend([7, 0, 8, 0, 1, 2, 3]);
        message(SOCK_DIAG_BY_FAMILY, sequence, &payload)
    }

    fn error(sequence: u32, errno: Errno) -> Vec<u8> {
        let code = (-errno.raw_os_error()).to_ne_bytes();
        message(NLMSG_ERROR, sequence, &[code, [0; 4]].concat())
    }

    fn ports(answers: &Answers) -> Vec<Option<u16>> {
        let sockets = answers.sockets.iter();
        sockets
            .map(|socket| socket.map(|socket| socket.local.port()))
            .collect()
    }

    #[test]
    fn each_request_has_its_answer_in_whatever_order_they_come() {
        let mut answers = Answers::new(u32::MAX, 3);
        answers.add(&socket(1, 7002, 9)).unwrap();
        answers.add(&message(NLMSG_NOOP, 0, &[])).unwrap();
        let both = [socket(u32::MAX, 7000, 8), error(0, Errno::NOENT)].concat();
        assert_eq!(answers.missing, 2);
        answers.add(&both).unwrap();
        assert_eq!(answers.missing, 0);
        assert_eq!(ports(&answers), [Some(7000), None, Some(7002)]);
        let last = answers.sockets[2].unwrap();
        assert_eq!(last.local, "127.0.0.9:7002".parse().unwrap());
        assert_eq!((last.inode, last.send_queue), (9, 42));
    }

    #[test]
    fn answers_to_an_older_request_are_skipped() {
        let mut answers = Answers::new(5, 1);
        answers.add(&socket(4, 6000, 1)).unwrap();
        answers.add(&error(4, Errno::PERM)).unwrap();
        assert_eq!(answers.missing, 1);
        answers.add(&socket(5, 7000, 1)).unwrap();
        assert_eq!((answers.missing, ports(&answers)), (0, vec![Some(7000)]));
    }

    #[test]
    fn a_refusal_of_the_kernel_is_an_error() {
        let refused = Answers::new(5, 1).add(&error(5, Errno::PERM)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::PERM.raw_os_error()));
    }

    #[test]
    fn a_cut_off_message_is_an_error() {
        let whole = socket(5, 7000, 1);
        // Up to the padding, what is cut off are attributes, which are not read.
        for length in 1..whole.len() - 1 {
            let mut answers = Answers::new(5, 1);
            assert!(answers.add(&whole[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn more_sockets_than_one_batch_has_are_found_each_on_its_port() {
        let mut diag = SockDiag::open().unwrap();
        let bound: Vec<UdpSocket> = (0..200)
            .map(|_| UdpSocket::bind("127.0.0.9:0").unwrap())
            .collect();
        let addresses: Vec<SocketAddr> = bound
            .iter()
            .map(|socket| socket.local_addr().unwrap())
            .collect();
        let found = diag.listeners(Protocol::Udp, &addresses).unwrap();
        let locals: Vec<SocketAddr> = found.iter().map(|found| found.unwrap().local).collect();
        assert_eq!(locals, addresses);
        let inodes: std::collections::BTreeSet<u32> =
            found.iter().map(|found| found.unwrap().inode).collect();
        assert_eq!(inodes.len(), bound.len());
        drop(bound);
        let found = diag.listeners(Protocol::Udp, &addresses[..3]).unwrap();
        assert_eq!(found, [None; 3]);
    }

    #[test]
    fn an_answer_that_cannot_be_read_does_not_spoil_the_next() {
        let listener = TcpListener::bind("127.0.0.9:0").unwrap();
        let at = [listener.local_addr().unwrap(); 3];
        let mut diag = SockDiag::open().unwrap();
        // Too short for an answer.
        diag.answer = vec![0; 32];
        let error = diag.listeners(Protocol::Tcp, &at).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        diag.answer = vec![0; ANSWER_BYTES];
        let found = diag.listeners(Protocol::Tcp, &at).unwrap();
        assert!(found.iter().all(|found| found.unwrap().local == at[0]));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(part in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..90) {
            let _ = Answers::new(5, 2).add(&part);
            let mut near = socket(5, 7000, 1);
            near.splice(at.min(near.len()).., part);
            let _ = Answers::new(5, 2).add(&near);
        }
    }
}
