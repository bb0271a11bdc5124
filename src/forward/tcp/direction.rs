//! One direction of a TCP connection: reads from a source and sends to a
//! destination socket.
//!
//! It holds no buffer. It reads into its thread's scratch space and writes at
//! once; only what the receiver does not take now is kept, and then nothing
//! more is read until that is gone. So a slow reader costs at most one scratch
//! space, and the sender feels it through TCP's own window.
//!
//! A direction that keeps filling the scratch space is lent a pipe, through
//! which the kernel moves pages instead of copying bytes twice.

use rustix::io::Errno;

use super::{SCRATCH_BYTES, Scratch};
use crate::forward::pipes::{Pipe, Pipes};
use crate::forward::snapshot::DirectionSnapshot;
use crate::forward::stream::Stream;

/// Reads of one direction before the others of its thread get their turn.
const READS_PER_TURN: usize = 8;

/// Scratch spaces that a direction fills one after the other before it is lent
/// a pipe: two, so that a message of a usual size never is.
const FULL_READS: u8 = 2;

/// Bytes between two looks at deadlines below which a direction needs no pipe.
pub(super) const BUSY_BYTES: usize = 1024 * 1024;

/// Bytes between two looks at deadlines from which it is worth a delay that
/// more of them gather.
const MUCH_BYTES: usize = 4 * 1024 * 1024;

/// What the destination did not take yet.
#[derive(Debug)]
enum Held {
    /// Bytes, from an offset on.
    Bytes(Box<[u8]>, usize),
    /// A pipe, and how many bytes are in it: lent until the direction is quiet.
    Pipe(Pipe, usize),
}

/// A direction: from a source to a destination socket.
#[derive(Debug, Default)]
pub(super) struct Direction {
    /// In a box: most directions hold nothing.
    held: Option<Box<Held>>,
    /// Bytes that the source has sent so far.
    pub(super) bytes: u64,
    /// Reads in a row that have filled the scratch space.
    full_reads: u8,
    /// The source has ended its side.
    pub(super) is_read: bool,
    /// The destination was told of the end: nothing will follow.
    pub(super) is_done: bool,
}

/// How far a direction got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Waits for the source or the destination.
    Blocked,
    /// Had its turn; there may be more.
    Yielded,
    /// The source has ended and the destination has everything.
    Done,
    /// A socket broke: both are to be reset.
    Broken(Fault),
}

/// Which socket of a direction broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Source(Errno),
    Destination(Errno),
}

impl Direction {
    /// A direction in which `header` goes first.
    pub(super) fn beginning_with(header: Option<Vec<u8>>) -> Self {
        let held = header.map(|header| Held::Bytes(header.into_boxed_slice(), 0));
        Self {
            held: held.map(Box::new),
            ..Self::default()
        }
    }

    /// Moves bytes until something blocks or the turn is over. `at_end` says
    /// that the source's end has been signalled, so that a short read is not
    /// taken for the last one.
    pub(super) fn pump<S: Stream>(
        &mut self,
        source: &S,
        destination: &S,
        at_end: bool,
        scratch: &mut Scratch,
    ) -> Progress {
        if self.is_done {
            return Progress::Done;
        }
        for _ in 0..READS_PER_TURN {
            match self.flush(destination) {
                Ok(true) => {}
                Ok(false) => return Progress::Blocked,
                Err(errno) => return Progress::Broken(Fault::Destination(errno)),
            }
            if self.is_read {
                self.give_back(&mut scratch.pipes);
                self.is_done = true;
                return Progress::Done;
            }
            match self.fill(source, destination, scratch) {
                Ok(0) => self.is_read = true,
                // The source has nothing more; the next event tells.
                Ok(length) if length < SCRATCH_BYTES && !at_end && self.held.is_none() => {
                    return Progress::Blocked;
                }
                Ok(_) | Err(Fault::Source(Errno::INTR)) => {}
                Err(Fault::Source(Errno::AGAIN)) => return Progress::Blocked,
                Err(fault) => return Progress::Broken(fault),
            }
        }
        Progress::Yielded
    }

    /// Takes in what the source has, and passes on what the destination takes
    /// at once. The number of bytes taken in; 0 at the source's end.
    pub(super) fn fill<S: Stream>(
        &mut self,
        source: &S,
        destination: &S,
        scratch: &mut Scratch,
    ) -> Result<usize, Fault> {
        if let Some(Held::Pipe(pipe, inside)) = self.held.as_deref_mut() {
            let length = source.fill_pipe(pipe).map_err(Fault::Source)?;
            *inside += length;
            pipe.moved += length;
            self.bytes += length as u64;
            return Ok(length);
        }
        let space = &mut scratch.scratch[..SCRATCH_BYTES];
        let length = source.read(space).map_err(Fault::Source)?;
        self.bytes += length as u64;
        let sent = match length {
            0 => 0,
            _ => send(destination, &space[..length]).map_err(Fault::Destination)?,
        };
        if sent < length {
            let kept = scratch.scratch[sent..length].into();
            self.held = Some(Box::new(Held::Bytes(kept, 0)));
        }
        self.full_reads = match length {
            SCRATCH_BYTES => self.full_reads.saturating_add(1),
            _ => 0,
        };
        if self.full_reads >= FULL_READS && self.held.is_none() {
            let pipe = scratch.pipes.lend();
            self.held = pipe.map(|pipe| Box::new(Held::Pipe(pipe, 0)));
        }
        Ok(length)
    }

    /// Sends what is held. Whether all of it is gone.
    pub(super) fn flush<S: Stream>(&mut self, destination: &S) -> Result<bool, Errno> {
        match self.held.as_deref_mut() {
            None => return Ok(true),
            Some(Held::Bytes(kept, offset)) => {
                while *offset < kept.len() {
                    match send(destination, &kept[*offset..])? {
                        0 => return Ok(false),
                        sent => *offset += sent,
                    }
                }
            }
            Some(Held::Pipe(pipe, inside)) => {
                while *inside > 0 {
                    match destination.drain_pipe(pipe, *inside) {
                        Ok(sent) => *inside -= sent,
                        Err(Errno::AGAIN) => return Ok(false),
                        Err(Errno::INTR) => {}
                        Err(errno) => return Err(errno),
                    }
                }
                return Ok(true);
            }
        }
        self.held = None;
        Ok(true)
    }

    /// Whether bytes wait for the destination.
    pub(super) fn is_holding(&self) -> bool {
        match self.held.as_deref() {
            None => false,
            Some(Held::Bytes(..)) => true,
            Some(Held::Pipe(_, inside)) => *inside > 0,
        }
    }

    /// Whether it goes through a pipe.
    pub(super) fn has_pipe(&self) -> bool {
        matches!(self.held.as_deref(), Some(Held::Pipe(..)))
    }

    /// Whether it has carried much since that was last counted.
    pub(super) fn carries_much(&self) -> bool {
        let held = self.held.as_deref();
        matches!(held, Some(Held::Pipe(pipe, _)) if pipe.moved >= MUCH_BYTES)
    }

    /// What follows counts anew.
    pub(super) fn count_anew(&mut self) {
        if let Some(Held::Pipe(pipe, _)) = self.held.as_deref_mut() {
            pipe.moved = 0;
        }
    }

    /// The direction as another thread or process goes on with it; a lent pipe
    /// is emptied and given back.
    pub(super) fn hand_over(mut self, pipes: &mut Pipes) -> DirectionSnapshot {
        let kept = match self.held.take().map(|held| *held) {
            None => Vec::new(),
            Some(Held::Bytes(kept, offset)) => kept[offset..].to_vec(),
            Some(Held::Pipe(pipe, inside)) => {
                let kept = pipe.read(inside);
                pipes.take_back(pipe, inside - kept.len());
                kept
            }
        };
        DirectionSnapshot {
            kept,
            is_read: self.is_read,
            is_done: self.is_done,
            bytes: self.bytes,
        }
    }

    /// Goes on with a direction.
    pub(super) fn take_over(handed: DirectionSnapshot) -> Self {
        let held = Held::Bytes(handed.kept.into_boxed_slice(), 0);
        let is_holding = !matches!(&held, Held::Bytes(kept, _) if kept.is_empty());
        Self {
            held: is_holding.then(|| Box::new(held)),
            is_read: handed.is_read,
            is_done: handed.is_done,
            bytes: handed.bytes,
            full_reads: 0,
        }
    }

    /// Gives a lent pipe back, with what is in it.
    pub(super) fn give_back(&mut self, pipes: &mut Pipes) {
        let held = self.held.take_if(|held| matches!(**held, Held::Pipe(..)));
        if let Some(Held::Pipe(pipe, inside)) = held.map(|held| *held) {
            self.full_reads = 0;
            pipes.take_back(pipe, inside);
        }
    }

    /// Gives back a lent pipe that carried little since this was last asked.
    pub(super) fn give_back_if_idle(&mut self, pipes: &mut Pipes) {
        if let Some(Held::Pipe(pipe, inside)) = self.held.as_deref_mut() {
            let moved = std::mem::take(&mut pipe.moved);
            if *inside == 0 && moved < BUSY_BYTES {
                self.give_back(pipes);
            }
        }
    }
}

/// Sends what the socket takes; 0 when its buffer is full.
fn send<S: Stream>(socket: &S, bytes: &[u8]) -> Result<usize, Errno> {
    loop {
        match socket.send(bytes) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(0),
            result => return result,
        }
    }
}
