//! Datagrams as they are received: as many at once as there are, joined where
//! they go on together.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use quinn_udp::{RecvMeta, UdpSockRef, UdpSocketState};
use rustix::net::{self, RecvFlags};

/// Most datagrams received at once.
const BATCH: usize = quinn_udp::BATCH_SIZE;

/// Space for one datagram, the largest of which has 65,507 bytes, or for
/// several that the kernel has joined.
const SLOT_BYTES: usize = 64 * 1024;

/// Longest datagrams that are sent in one go: they fit the smallest MTU that
/// IPv6 allows (1280), longer ones might be refused.
///
/// Source: RFC 8200, section 5.
pub(super) const MOST_JOINED: usize = 1200;

/// Most bytes sent in one go: the largest datagram that the kernel takes.
const JOINED_BYTES: usize = 65_507;

/// How many datagrams to ask a socket for: one while they come alone, else a
/// few more than it had last time, so that one call gets all of a burst.
#[derive(Clone, Copy, Debug)]
pub(in crate::forward) struct ReceiveBatchSize {
    most: u8,
    /// Lone datagrams since it was last asked for two.
    alone: u8,
}

impl ReceiveBatchSize {
    /// Lone datagrams before a socket is asked whether there are two.
    const ALONE: u8 = 16;

    pub(in crate::forward) fn new() -> Self {
        Self { most: 1, alone: 0 }
    }

    /// Whether datagrams come alone.
    pub(super) fn is_for_one(self) -> bool {
        self.most == 1
    }

    fn most(self) -> usize {
        usize::from(self.most)
    }

    /// Learns how many there were. Whether to ask at once for more: a socket
    /// that was asked for one is reported again if there are.
    fn learn(&mut self, received: usize) -> bool {
        let is_full = received >= self.most();
        let next = match (self.most, received) {
            (1, _) => {
                self.alone = (self.alone + 1) % Self::ALONE;
                1 + usize::from(self.alone == 0)
            }
            (_, 0 | 1) => 1,
            _ if is_full => 2 * received,
            _ => received + 1,
        };
        let was_alone = self.is_for_one();
        self.most = u8::try_from(next.min(BATCH)).expect("a batch is small");
        is_full && !was_alone
    }
}

/// A thread's space for datagrams.
#[derive(Debug, Default)]
pub(in crate::forward) struct Batch {
    space: Vec<u8>,
    metas: Vec<RecvMeta>,
    joined: Vec<u8>,
}

/// Datagrams of one sender, one after the other.
#[derive(Clone, Copy, Debug)]
pub(in crate::forward) struct Run<'a> {
    pub(in crate::forward) sender: SocketAddr,
    /// The address that they were sent to, where the system tells.
    pub(in crate::forward) local: Option<IpAddr>,
    pub(in crate::forward) bytes: &'a [u8],
    /// Length of each datagram but the last, which may be shorter.
    pub(in crate::forward) stride: usize,
}

impl<'a> Run<'a> {
    /// Each datagram.
    pub(in crate::forward) fn datagrams(self) -> impl Iterator<Item = &'a [u8]> {
        // An empty datagram has no chunks, but is one.
        let empty = self.bytes.is_empty().then_some(self.bytes);
        self.bytes.chunks(self.stride.max(1)).chain(empty)
    }

    pub(in crate::forward) fn is_one(self) -> bool {
        self.bytes.len() <= self.stride
    }

    /// How many there are.
    pub(in crate::forward) fn count(self) -> u64 {
        self.datagrams().count() as u64
    }
}

impl Batch {
    /// Memory is taken up as it is used.
    pub(in crate::forward) fn new() -> Self {
        Self {
            space: vec![0; BATCH * SLOT_BYTES],
            metas: vec![RecvMeta::default(); BATCH],
            joined: Vec::new(),
        }
    }

    /// Receives what is there, as far as `receive_batch_size` goes. Whether there may be
    /// more.
    pub(in crate::forward) fn receive(
        &mut self,
        state: &UdpSocketState,
        socket: UdpSockRef<'_>,
        receive_batch_size: &mut ReceiveBatchSize,
    ) -> io::Result<(usize, bool)> {
        let most = receive_batch_size.most();
        let mut slots = self.space.chunks_mut(SLOT_BYTES).map(IoSliceMut::new);
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| slots.next().expect("there are as many slots"));
        let received = state.recv(socket, &mut slices[..most], &mut self.metas[..most])?;
        Ok((received, receive_batch_size.learn(received)))
    }

    /// The same of a connected socket that joins none, for one datagram.
    pub(super) fn receive_one(
        &mut self,
        socket: BorrowedFd<'_>,
        peer: SocketAddr,
        receive_batch_size: &mut ReceiveBatchSize,
    ) -> io::Result<(usize, bool)> {
        let (length, _) = net::recv(socket, &mut self.space[..SLOT_BYTES], RecvFlags::empty())?;
        let meta = &mut self.metas[0];
        (meta.addr, meta.dst_ip) = (peer, None);
        (meta.len, meta.stride) = (length, length);
        Ok((1, receive_batch_size.learn(1)))
    }

    /// What was received came in at `address`: the system need not tell where
    /// there is only one.
    pub(super) fn came_in_at(&mut self, address: IpAddr, received: usize) {
        for meta in &mut self.metas[..received] {
            meta.dst_ip = Some(address);
        }
    }

    /// The run that begins with the datagram received as `first` of
    /// `received`, and the index behind it. Datagrams of one length are joined.
    pub(in crate::forward) fn run(&mut self, first: usize, received: usize) -> (Run<'_>, usize) {
        let meta = self.metas[first];
        let slot = |index: usize, length: usize| {
            &self.space[index * SLOT_BYTES..index * SLOT_BYTES + length]
        };
        let mut run = Run {
            sender: meta.addr,
            local: meta.dst_ip,
            bytes: slot(first, meta.len),
            stride: meta.stride,
        };
        let mut next = first + 1;
        // Joined by the kernel already, empty, or too long to be joined.
        if meta.len != meta.stride || meta.len == 0 || meta.len > MOST_JOINED {
            return (run, next);
        }
        let (mut total, mut last) = (meta.len, meta.len);
        while next < received && last == meta.len {
            let follower = &self.metas[next];
            let fits = follower.len == follower.stride
                && (1..=meta.len).contains(&follower.len)
                && total + follower.len <= JOINED_BYTES;
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
