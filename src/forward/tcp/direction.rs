//! One direction of a TCP connection: reads from a source and sends to a
//! destination socket.
//!
//! It holds no buffer. It reads into its thread's scratch space and writes at
//! once. Only what the receiver does not take now is kept, and then nothing
//! more is read until that is sent. So a slow reader costs at most one scratch
//! space, and the sender feels it through TCP's own window.
//!
//! An urgent byte is sent as such, in its place. The kernel reports one
//! (`EPOLLPRI`); only then it is looked for.
//!
//! A direction that keeps filling the scratch space is lent a pipe, through
//! which the kernel moves pages instead of copying bytes twice.

use rustix::io::Errno;

use super::pipes::{Pipe, Pipes};
use super::stream::{Mark, Stream};
use crate::forward::scratch::{SCRATCH_BYTES, Scratch};
use crate::forward::snapshot::DirectionSnapshot;

/// Reads of one direction before the others of its thread get their turn.
const READS_PER_TURN: usize = 8;

/// Reads in a row that fill the scratch space before a direction is lent a
/// pipe: two, so that a message of a usual size is sent without one.
const FULL_READS: u8 = 2;

/// Bytes between two ticks below which a direction needs no pipe.
pub(super) const BUSY_BYTES: usize = 1024 * 1024;

/// Bytes between two ticks from which reading them in larger pieces is worth a
/// delay.
const MUCH_BYTES: usize = 4 * 1024 * 1024;

/// Bytes that the destination did not take yet.
#[derive(Debug)]
enum Held {
    /// Bytes, from an offset on.
    Bytes(Box<[u8]>, usize),
    /// A byte that is urgent.
    Urgent(u8),
    /// A pipe, and the number of bytes in it: lent until the direction is quiet.
    Pipe(Pipe, usize),
}

/// A direction: from a source to a destination socket.
#[derive(Debug, Default)]
pub(super) struct Direction {
    /// Boxed, because most directions hold nothing.
    held: Option<Box<Held>>,
    /// Bytes that the source has sent so far.
    pub(super) bytes: u64,
    /// Reads in a row that have filled the scratch space.
    full_reads: u8,
    /// An urgent byte was reported, and the next bytes to read may hold it.
    pub(super) is_urgent: bool,
    /// The source has ended its side.
    pub(super) is_read: bool,
    /// The destination has everything, and the end after it: nothing follows.
    pub(super) is_done: bool,
}

/// What a direction has moved so far. It differs whenever bytes or the end were
/// moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    read: u64,
    held: usize,
    is_done: bool,
}

/// How far a direction got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// It waits for the source or the destination.
    Blocked,
    /// Its turn is over; there may be more.
    Yielded,
    /// The source has ended and the destination has everything.
    Done,
    /// A socket broke.
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

    /// Moves bytes until something blocks or the turn is over. With `at_end` the
    /// source's end has been signalled: a short read is followed by another
    /// one, which finds it.
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
                // The source has nothing more; the next event reports more.
                Ok(length)
                    if length < SCRATCH_BYTES
                        && !at_end
                        && !self.is_urgent
                        && self.held.is_none() =>
                {
                    return Progress::Blocked;
                }
                Ok(_) | Err(Fault::Source(Errno::INTR)) => {}
                Err(Fault::Source(Errno::AGAIN)) => return Progress::Blocked,
                Err(fault) => return Progress::Broken(fault),
            }
        }
        Progress::Yielded
    }

    /// Reads what the source has, and sends what the destination takes at once.
    /// Returns the number of bytes read, 0 at the source's end.
    pub(super) fn fill<S: Stream>(
        &mut self,
        source: &S,
        destination: &S,
        scratch: &mut Scratch,
    ) -> Result<usize, Fault> {
        if self.is_urgent {
            // It is empty: what is held was sent.
            self.give_back(&mut scratch.pipes);
            match source.mark().map_err(Fault::Source)? {
                Mark::None => self.is_urgent = false,
                Mark::Ahead(length) => return self.copy(source, destination, length, scratch),
                Mark::Here => return self.copy_urgent(source, destination),
            }
        }
        if let Some(Held::Pipe(pipe, inside)) = self.held.as_deref_mut() {
            let length = source.fill_pipe(pipe).map_err(Fault::Source)?;
            *inside += length;
            pipe.moved += length;
            self.bytes += length as u64;
            if length > 0 {
                return Ok(length);
            }
            // The end, or an urgent byte and later the end.
            self.is_urgent = true;
            return self.fill(source, destination, scratch);
        }
        self.copy(source, destination, SCRATCH_BYTES, scratch)
    }

    /// Reads and sends the urgent byte, which is the next one.
    fn copy_urgent<S: Stream>(&mut self, source: &S, destination: &S) -> Result<usize, Fault> {
        let mut byte = [0];
        let length = source.read(&mut byte).map_err(Fault::Source)?;
        self.bytes += length as u64;
        if length > 0 {
            self.held = Some(Box::new(Held::Urgent(byte[0])));
            self.flush(destination).map_err(Fault::Destination)?;
        }
        Ok(length)
    }

    /// Reads up to `most` bytes, and sends what the destination takes at once.
    fn copy<S: Stream>(
        &mut self,
        source: &S,
        destination: &S,
        most: usize,
        scratch: &mut Scratch,
    ) -> Result<usize, Fault> {
        let space = &mut scratch.space[..SCRATCH_BYTES.min(most)];
        let length = source.read(space).map_err(Fault::Source)?;
        self.bytes += length as u64;
        let sent = match length {
            0 => 0,
            _ => send(destination, &space[..length]).map_err(Fault::Destination)?,
        };
        if sent < length {
            let kept = scratch.space[sent..length].into();
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

    /// Sends what is held. Returns whether nothing is held any more.
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
            Some(Held::Urgent(byte)) => loop {
                match destination.send_urgent(*byte) {
                    Ok(_) => break,
                    Err(Errno::AGAIN) => return Ok(false),
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
            },
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

    /// What was moved so far.
    pub(super) fn position(&self) -> Position {
        let held = match self.held.as_deref() {
            None => 0,
            Some(Held::Bytes(kept, offset)) => kept.len() - offset,
            Some(Held::Urgent(_)) => 1,
            Some(Held::Pipe(_, length)) => *length,
        };
        Position {
            read: self.bytes,
            held,
            is_done: self.is_done,
        }
    }

    /// Whether bytes wait for the destination.
    pub(super) fn is_holding(&self) -> bool {
        match self.held.as_deref() {
            None => false,
            Some(Held::Bytes(..) | Held::Urgent(_)) => true,
            Some(Held::Pipe(_, inside)) => *inside > 0,
        }
    }

    /// Whether the direction goes through a pipe.
    pub(super) fn has_pipe(&self) -> bool {
        matches!(self.held.as_deref(), Some(Held::Pipe(..)))
    }

    /// Whether the direction has carried much since counting began.
    pub(super) fn carries_much(&self) -> bool {
        let held = self.held.as_deref();
        matches!(held, Some(Held::Pipe(pipe, _)) if pipe.moved >= MUCH_BYTES)
    }

    /// Begins to count anew.
    pub(super) fn reset_count(&mut self) {
        if let Some(Held::Pipe(pipe, _)) = self.held.as_deref_mut() {
            pipe.moved = 0;
        }
    }

    /// The direction as plain data, for another thread or process; a lent pipe
    /// is emptied and given back.
    pub(super) fn export(mut self, pipes: &mut Pipes) -> DirectionSnapshot {
        let held = self.held.take().map(|held| *held);
        let is_urgent = matches!(held, Some(Held::Urgent(_)));
        let kept = match held {
            None => Vec::new(),
            Some(Held::Urgent(byte)) => vec![byte],
            Some(Held::Bytes(kept, offset)) => kept[offset..].to_vec(),
            Some(Held::Pipe(pipe, inside)) => {
                let kept = pipe.read(inside);
                pipes.take_back(pipe, inside - kept.len());
                kept
            }
        };
        DirectionSnapshot {
            kept,
            is_urgent,
            is_read: self.is_read,
            is_done: self.is_done,
            bytes: self.bytes,
        }
    }

    /// An exported direction.
    pub(super) fn import(snapshot: DirectionSnapshot) -> Self {
        let held = match snapshot.kept.as_slice() {
            [] => None,
            [byte] if snapshot.is_urgent => Some(Held::Urgent(*byte)),
            _ => Some(Held::Bytes(snapshot.kept.into_boxed_slice(), 0)),
        };
        Self {
            held: held.map(Box::new),
            // What was reported of the socket is not known.
            is_urgent: true,
            is_read: snapshot.is_read,
            is_done: snapshot.is_done,
            bytes: snapshot.bytes,
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

    /// Gives back a lent pipe that carried little since the last call.
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
