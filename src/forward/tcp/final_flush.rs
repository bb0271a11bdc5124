//! What is left of a connection when one side is gone: what was read of it,
//! and what its socket still holds, is for the other side.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net;

use super::{Connection, Direction, Fault, Scratch, Side};
use crate::forward::admission::Permit;
use crate::forward::pipes::Pipes;
use crate::forward::snapshot::DirectionSnapshot;
use crate::forward::stream::Stream;

/// The direction from the side that is gone to the one that lives.
#[derive(Debug)]
pub(in crate::forward) struct FinalFlush<S = OwnedFd> {
    pub(in crate::forward) destination: S,
    /// Which side lives.
    pub(in crate::forward) side: Side,
    source: S,
    direction: Direction,
    /// Kept until all is over.
    _permit: Option<Permit>,
}

/// How far the delivery got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::forward) enum Delivery {
    /// The destination's kernel has everything.
    Done,
    /// It takes no more now.
    Blocked,
    /// The destination is gone too.
    Gone,
}

/// Whether a connected socket is no longer: the kernel knows no peer of one
/// that was reset, timed out, or has ended both ways.
fn is_gone(socket: &OwnedFd) -> bool {
    net::getpeername(socket).is_err()
}

impl Connection {
    /// Whether a side that has met an error is gone: reset, or timed out.
    pub(in crate::forward) fn has_lost(&self, side: Side) -> bool {
        let socket = match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        };
        !self.is_connecting && is_gone(socket)
    }

    /// Whether closing the sockets loses nothing once both directions have
    /// ended: their peers have acknowledged everything, the end as well.
    pub(in crate::forward) fn is_delivered(&self) -> bool {
        self.is_small() || is_gone(&self.client) && is_gone(&self.server)
    }

    /// What is to be done for the side that lives when the other one is gone;
    /// `None` when there is nobody to do it for.
    pub(in crate::forward) fn into_final_flush(mut self, pipes: &mut Pipes) -> Option<FinalFlush> {
        let gone = (is_gone(&self.client), is_gone(&self.server));
        let (side, source, destination, direction) = match gone {
            (true, false) if !self.is_connecting => {
                self.downstream.give_back(pipes);
                (Side::Server, self.client, self.server, self.upstream)
            }
            (false, true) if !self.is_connecting => {
                self.upstream.give_back(pipes);
                (Side::Client, self.server, self.client, self.downstream)
            }
            _ => {
                self.give_back_pipes(pipes);
                return None;
            }
        };
        Some(FinalFlush {
            destination,
            side,
            source,
            direction,
            _permit: self.permit,
        })
    }
}

impl<S: Stream> FinalFlush<S> {
    /// Passes on what is left.
    pub(in crate::forward) fn deliver(&mut self, scratch: &mut Scratch) -> Delivery {
        loop {
            match self.direction.flush(&self.destination) {
                Ok(true) => {}
                Ok(false) => return Delivery::Blocked,
                Err(_) => return Delivery::Gone,
            }
            if self.direction.is_read {
                return Delivery::Done;
            }
            match self
                .direction
                .fill(&self.source, &self.destination, scratch)
            {
                Err(Fault::Destination(_)) => return Delivery::Gone,
                Err(Fault::Source(Errno::INTR)) | Ok(1..) => {}
                // Its end, or the reset.
                Err(Fault::Source(_)) | Ok(0) => self.direction.is_read = true,
            }
        }
    }

    /// Bytes that went this way so far.
    pub(in crate::forward) fn bytes(&self) -> u64 {
        self.direction.bytes
    }

    /// Client, server, and what was not passed on, from the one that is gone to
    /// the other.
    pub(in crate::forward) fn hand_over(self, pipes: &mut Pipes) -> (S, S, DirectionSnapshot) {
        let direction = self.direction.hand_over(pipes);
        match self.side {
            Side::Server => (self.source, self.destination, direction),
            Side::Client => (self.destination, self.source, direction),
        }
    }

    /// Gives a lent pipe back: it is over.
    pub(in crate::forward) fn give_back_pipe(&mut self, pipes: &mut Pipes) {
        self.direction.give_back(pipes);
    }
}
