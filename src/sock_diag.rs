//! Requests to the kernel about the sockets of this network namespace, by
//! `NETLINK_SOCK_DIAG`, as `ss` sends them. They need no privilege and never wait.
//!
//! The cost of a request grows with the sockets that it is about. For listening
//! sockets the kernel walks only the table of those; a read of `/proc/net/tcp` makes
//! it walk the table of all connections of the machine, even when that is almost
//! empty.
//!
//! Source: sock_diag(7), netlink(7); Linux `include/uapi/linux/inet_diag.h`.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use netlink_packet_core::{
    DecodeError, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_MULTIPART, NLM_F_REQUEST, NLMSG_ALIGNTO,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, Parseable,
};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6};
pub use netlink_packet_sock_diag::constants::{IPPROTO_TCP, IPPROTO_UDP};
pub use netlink_packet_sock_diag::inet::StateFlags;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId};
use netlink_packet_sock_diag::{SOCK_DIAG_BY_FAMILY, SockDiagMessage};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

/// Longest part of an answer that the kernel makes (`netlink_recvmsg`).
const PART_BYTES: usize = 32 * 1024;

/// Most requests for one list. It is requested again when sockets were opened or
/// closed meanwhile, because such a list may have gaps.
const LIST_ATTEMPTS: usize = 3;

/// A socket for requests to the kernel, one at a time.
#[derive(Debug)]
pub struct SockDiag {
    netlink: OwnedFd,
    /// Sequence number of the last request. Its answer has the same number.
    sequence: u32,
    /// Buffer for one part of an answer.
    part: Vec<u8>,
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
            part: vec![0; PART_BYTES],
        })
    }

    /// The local addresses of all sockets of `protocol`, an `IPPROTO_` number,
    /// in one of `states`: first those of IPv4 sockets, then those of IPv6 sockets.
    /// The latter may include IPv4 addresses in their mapped form.
    ///
    /// # Errors
    /// The kernel's, for example `ENOENT` where it lacks the module;
    /// [`io::ErrorKind::Interrupted`] when sockets were opened or closed during every
    /// attempt.
    pub fn local_addresses(
        &mut self,
        protocol: u8,
        states: &StateFlags,
    ) -> io::Result<Vec<SocketAddr>> {
        let mut addresses = Vec::new();
        for (family, any) in [
            (AF_INET, SocketId::new_v4()),
            (AF_INET6, SocketId::new_v6()),
        ] {
            let sockets = self.list(&request(family, protocol, states.clone(), any))?;
            addresses.extend(sockets.into_iter().map(|socket| socket.local));
        }
        Ok(addresses)
    }

    /// Number of bytes that the TCP socket with these addresses has sent, and that
    /// `peer` has not acknowledged.
    ///
    /// # Errors
    /// The kernel's: `ENOENT` when the connection is gone.
    pub fn unacknowledged(&mut self, local: SocketAddr, peer: SocketAddr) -> io::Result<u32> {
        let (local_ip, peer_ip) = (local.ip().to_canonical(), peer.ip().to_canonical());
        let family = if local_ip.is_ipv4() {
            AF_INET
        } else {
            AF_INET6
        };
        let id = SocketId {
            source_port: local.port(),
            destination_port: peer.port(),
            source_address: local_ip,
            destination_address: peer_ip,
            interface_id: 0,
            // The addresses suffice: this stands for any cookie.
            cookie: [0xff; 8],
        };
        let answer = self.ask(&request(family, IPPROTO_TCP, StateFlags::all(), id), 0)?;
        let socket = answer.sockets.first();
        socket
            .map(|socket| socket.send_queue)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn list(&mut self, request: &InetRequest) -> io::Result<Vec<Socket>> {
        for _ in 0..LIST_ATTEMPTS {
            let answer = self.ask(request, NLM_F_DUMP)?;
            if !answer.is_interrupted {
                return Ok(answer.sockets);
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    fn ask(&mut self, request: &InetRequest, flags: u16) -> io::Result<Answer> {
        let answer = self.exchange(request, flags);
        if answer.is_err() {
            // The rest of a list would make the next request fail.
            while net::recv(&self.netlink, &mut self.part, RecvFlags::empty()).is_ok() {}
        }
        answer
    }

    fn exchange(&mut self, request: &InetRequest, flags: u16) -> io::Result<Answer> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = encode(request, flags, self.sequence);
        net::send(&self.netlink, &message, SendFlags::empty())?;
        let mut answer = Answer::default();
        loop {
            // The kernel makes each part while the one before it is received, so
            // this never waits.
            let (_, length) = net::recv(&self.netlink, &mut self.part, RecvFlags::TRUNC)?;
            let part = self.part.get(..length).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "part of an answer was cut off")
            })?;
            if answer.add(part, self.sequence)? {
                return Ok(answer);
            }
        }
    }
}

fn request(family: u8, protocol: u8, states: StateFlags, socket_id: SocketId) -> InetRequest {
    InetRequest {
        family,
        protocol,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    }
}

fn encode(request: &InetRequest, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
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
struct Socket {
    local: SocketAddr,
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
            send_queue: response.send_queue,
        })
    }
}

#[derive(Debug, Default)]
struct Answer {
    sockets: Vec<Socket>,
    /// Whether the kernel has marked the list as one that may have gaps.
    is_interrupted: bool,
}

impl Answer {
    /// Adds the messages in `part` that answer request `sequence`. Returns whether
    /// the answer is complete now.
    fn add(&mut self, part: &[u8], sequence: u32) -> io::Result<bool> {
        let mut rest = part;
        while !rest.is_empty() {
            let message = NetlinkMessage::<Socket>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let header = message.header;
            let length = usize::try_from(header.length).unwrap_or(usize::MAX);
            let next = length.checked_next_multiple_of(usize::from(NLMSG_ALIGNTO));
            rest = next.and_then(|next| rest.get(next..)).unwrap_or_default();
            if header.sequence_number != sequence {
                continue;
            }
            self.is_interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
            match message.payload {
                NetlinkPayload::InnerMessage(socket) => {
                    self.sockets.push(socket);
                    if header.flags & NLM_F_MULTIPART == 0 {
                        return Ok(true);
                    }
                }
                NetlinkPayload::Done(done) => return succeeded(done.code),
                NetlinkPayload::Error(error) => {
                    return succeeded(error.code.map_or(0, std::num::NonZero::get));
                }
                NetlinkPayload::Overrun(_) => return Err(rustix::io::Errno::NOBUFS.into()),
                _ => {}
            }
        }
        Ok(false)
    }
}

/// The result that `code` stands for: 0 is success, a negative number an error.
fn succeeded(code: i32) -> io::Result<bool> {
    match code {
        0 => Ok(true),
        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::{NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP};
    use proptest::prelude::*;
    use rustix::io::Errno;

    /// A message as the kernel writes it, padded.
    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(16 + payload.len()).unwrap().to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// A listening socket on 127.0.0.9, and an attribute of three bytes.
    fn socket(flags: u16, sequence: u32, port: u16, send_queue: u32) -> Vec<u8> {
        let mut payload = vec![AF_INET, 10, 0, 0];
        payload.extend(port.to_be_bytes());
        payload.extend([0; 2]);
        payload.extend([127, 0, 0, 9]);
        payload.extend([0; 12 + 16 + 4 + 8 + 4 + 4]);
        payload.extend(send_queue.to_ne_bytes());
        payload.extend([0; 8]);
        payload.extend([7, 0, 8, 0, 1, 2, 3]);
        message(SOCK_DIAG_BY_FAMILY, flags, sequence, &payload)
    }

    fn end(sequence: u32, code: i32) -> Vec<u8> {
        message(NLMSG_DONE, NLM_F_MULTIPART, sequence, &code.to_ne_bytes())
    }

    fn ports(answer: &Answer) -> Vec<u16> {
        answer
            .sockets
            .iter()
            .map(|socket| socket.local.port())
            .collect()
    }

    #[test]
    fn a_list_ends_with_its_end_however_many_parts_it_has() {
        let mut answer = Answer::default();
        let first = [
            socket(NLM_F_MULTIPART, 5, 7000, 0),
            socket(NLM_F_MULTIPART, 5, 7001, 0),
        ];
        assert!(!answer.add(&first.concat(), 5).unwrap());
        assert!(!answer.add(&message(NLMSG_NOOP, 0, 5, &[]), 5).unwrap());
        let last = [socket(NLM_F_MULTIPART, 5, 7002, 0), end(5, 0)];
        assert!(answer.add(&last.concat(), 5).unwrap());
        assert_eq!(ports(&answer), [7000, 7001, 7002]);
        assert_eq!(answer.sockets[0].local, "127.0.0.9:7000".parse().unwrap());
        assert!(!answer.is_interrupted);
    }

    #[test]
    fn one_socket_is_an_answer_that_needs_no_end() {
        let mut answer = Answer::default();
        assert!(answer.add(&socket(0, 1, 7000, 42), 1).unwrap());
        assert_eq!(answer.sockets[0].send_queue, 42);
    }

    #[test]
    fn answers_to_an_older_question_are_skipped() {
        let mut answer = Answer::default();
        let part = [
            socket(NLM_F_MULTIPART, 4, 6000, 0),
            end(4, 0),
            socket(NLM_F_MULTIPART, 5, 7000, 0),
        ];
        assert!(!answer.add(&part.concat(), 5).unwrap());
        assert!(answer.add(&end(5, 0), 5).unwrap());
        assert_eq!(ports(&answer), [7000]);
    }

    #[test]
    fn a_list_with_gaps_is_recognized() {
        for flagged in [
            socket(NLM_F_MULTIPART | NLM_F_DUMP_INTR, 5, 7000, 0),
            message(NLMSG_DONE, NLM_F_MULTIPART | NLM_F_DUMP_INTR, 5, &[0; 4]),
        ] {
            let mut answer = Answer::default();
            answer.add(&[flagged, end(5, 0)].concat(), 5).unwrap();
            assert!(answer.is_interrupted);
        }
    }

    #[test]
    fn a_refusal_of_the_kernel_is_an_error() {
        let code = (-Errno::NOENT.raw_os_error()).to_ne_bytes();
        let refusal = message(NLMSG_ERROR, 0, 5, &[code, [0; 4]].concat());
        for part in [refusal, end(5, -Errno::NOENT.raw_os_error())] {
            let error = Answer::default().add(&part, 5).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::NOENT.raw_os_error()));
        }
    }

    #[test]
    fn a_cut_off_message_is_an_error() {
        let whole = [socket(NLM_F_MULTIPART, 5, 7000, 0), end(5, 0)].concat();
        for length in 1..whole.len() - 1 {
            let result = Answer::default().add(&whole[..length], 5);
            // A message that lacks only its padding is read, but is not the end.
            assert!(!result.is_ok_and(|is_complete| is_complete), "{length}");
        }
    }

    #[test]
    fn after_a_refusal_the_next_question_is_answered() {
        let listener = std::net::TcpListener::bind("127.0.0.9:0").unwrap();
        let mut diag = SockDiag::open().unwrap();
        for _ in 0..3 {
            // RFC 3692 reserves this protocol for experiments: no module can be for it.
            assert!(diag.local_addresses(253, &StateFlags::all()).is_err());
            let found = diag
                .local_addresses(IPPROTO_TCP, &StateFlags::LISTEN)
                .unwrap();
            assert!(found.contains(&listener.local_addr().unwrap()));
        }
    }

    #[test]
    fn a_list_given_up_half_way_does_not_spoil_the_next() {
        let sockets: Vec<_> = (0..400)
            .map(|_| std::net::UdpSocket::bind("127.0.0.9:0").unwrap())
            .collect();
        let mut diag = SockDiag::open().unwrap();
        // Too short for a part, so that the list cannot be read.
        diag.part = vec![0; 64];
        let error = diag
            .local_addresses(IPPROTO_UDP, &StateFlags::CLOSE)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        diag.part = vec![0; PART_BYTES];
        let found = diag
            .local_addresses(IPPROTO_UDP, &StateFlags::CLOSE)
            .unwrap();
        // More than one part has: about 100 bytes for each.
        for socket in &sockets {
            assert!(found.contains(&socket.local_addr().unwrap()));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(part in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..90) {
            let _ = Answer::default().add(&part, 5);
            let mut near = socket(NLM_F_MULTIPART, 5, 7000, 0);
            near.splice(at.min(near.len()).., part);
            let _ = Answer::default().add(&near, 5);
        }
    }
}
