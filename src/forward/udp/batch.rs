//! Receiving datagrams: as many in one call as there are, joined where they are
//! sent on together.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use quinn_udp::{RecvMeta, UdpSockRef, UdpSocketState};
use rustix::net::{self, RecvFlags};

use super::addresses::AddressPair;

/// Most datagrams received in one call.
const BATCH: usize = quinn_udp::BATCH_SIZE;

/// Space for one datagram, the largest of which has 65,507 bytes, or for
/// several that the kernel has joined.
const SLOT_BYTES: usize = 64 * 1024;

/// Longest datagram that is sent together with others: it fits the smallest MTU
/// that IPv6 allows (1280). Longer ones might be refused.
///
/// Source: RFC 8200, section 5.
pub(super) const JOINED_DATAGRAM_MAX: usize = 1200;

/// Most bytes sent in one call: the largest datagram that the kernel takes.
const JOINED_BYTES_MAX: usize = 65_507;

/// The number of datagrams to ask a socket for: one while they come singly, else
/// more than it had last time, so that one call gets all of a burst.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReceiveBatchSize {
    most: u8,
    /// Single datagrams since the socket was last asked for two.
    singles: u8,
}

impl ReceiveBatchSize {
    /// Single datagrams before a socket is asked whether there are two.
    const SINGLES_MAX: u8 = 16;

    pub(super) fn new() -> Self {
        Self {
            most: 1,
            singles: 0,
        }
    }

    /// Whether datagrams come singly.
    pub(super) fn is_single(self) -> bool {
        self.most == 1
    }

    fn most(self) -> usize {
        usize::from(self.most)
    }

    /// Adapts to the number of datagrams that a call received. Returns whether
    /// to ask for more at once: a socket that was asked for one is reported
    /// again if it has more.
    fn adapt(&mut self, received: usize) -> bool {
        let is_full = received >= self.most();
        let next = match (self.most, received) {
            (1, _) => {
                self.singles = (self.singles + 1) % Self::SINGLES_MAX;
                1 + usize::from(self.singles == 0)
            }
            (_, 0 | 1) => 1,
            _ if is_full => 2 * received,
            _ => received + 1,
        };
        let was_single = self.is_single();
        self.most = u8::try_from(next.min(BATCH)).expect("a batch is small");
        is_full && !was_single
    }
}

/// What one call received.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    /// The number of slots that hold datagrams.
    pub(super) count: usize,
    /// Whether to ask for more at once.
    pub(super) has_more: bool,
}

/// A thread's space for datagrams.
#[derive(Debug, Default)]
pub(super) struct Batch {
    space: Vec<u8>,
    metas: Vec<RecvMeta>,
    joined: Vec<u8>,
}

/// Consecutive datagrams of one sender.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a> {
    /// The sender, a client or a server, and the address that it sent to.
    pub(super) addresses: AddressPair,
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

    pub(super) fn is_one(self) -> bool {
        self.bytes.len() <= self.stride
    }

    /// The number of datagrams.
    pub(super) fn count(self) -> u64 {
        self.datagrams().count() as u64
    }
}

impl Batch {
    /// A space for the largest batch. Its memory is taken up as it is used.
    pub(super) fn new() -> Self {
        Self {
            space: vec![0; BATCH * SLOT_BYTES],
            metas: vec![RecvMeta::default(); BATCH],
            joined: Vec::new(),
        }
    }

    /// Receives as many datagrams as there are, up to `receive_batch_size`.
    pub(super) fn receive(
        &mut self,
        state: &UdpSocketState,
        socket: UdpSockRef<'_>,
        receive_batch_size: &mut ReceiveBatchSize,
    ) -> io::Result<Received> {
        let most = receive_batch_size.most();
        let mut slots = self.space.chunks_mut(SLOT_BYTES).map(IoSliceMut::new);
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| slots.next().expect("there are as many slots"));
        let count = state.recv(socket, &mut slices[..most], &mut self.metas[..most])?;
        Ok(Received {
            count,
            has_more: receive_batch_size.adapt(count),
        })
    }

    /// Receives one datagram from a connected socket that does not join them.
    pub(super) fn receive_one(
        &mut self,
        socket: BorrowedFd<'_>,
        peer: SocketAddr,
        receive_batch_size: &mut ReceiveBatchSize,
    ) -> io::Result<Received> {
        let (length, _) = net::recv(socket, &mut self.space[..SLOT_BYTES], RecvFlags::empty())?;
        let meta = &mut self.metas[0];
        (meta.addr, meta.dst_ip) = (peer, None);
        (meta.len, meta.stride) = (length, length);
        Ok(Received {
            count: 1,
            has_more: receive_batch_size.adapt(1),
        })
    }

    /// The run that begins with the datagram received as `first` of
    /// `received`, and the index after it. Datagrams of one length are joined.
    pub(super) fn run(&mut self, first: usize, received: usize) -> (Run<'_>, usize) {
        let meta = self.metas[first];
        let slot = |index: usize, length: usize| {
            &self.space[index * SLOT_BYTES..index * SLOT_BYTES + length]
        };
        let mut run = Run {
            addresses: AddressPair {
                client: meta.addr,
                local: meta.dst_ip,
            },
            bytes: slot(first, meta.len),
            stride: meta.stride,
        };
        let mut next = first + 1;
        // Joined by the kernel already, empty, or too long to be joined.
        if meta.len != meta.stride || meta.len == 0 || meta.len > JOINED_DATAGRAM_MAX {
            return (run, next);
        }
        let (mut total, mut last) = (meta.len, meta.len);
        while next < received && last == meta.len {
            let follower = &self.metas[next];
            let fits = follower.len == follower.stride
                && (1..=meta.len).contains(&follower.len)
                && total + follower.len <= JOINED_BYTES_MAX;
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
