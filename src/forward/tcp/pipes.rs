//! Pipes that a thread lends to directions that carry much. Through a pipe the
//! kernel moves pages from socket to socket.
//!
//! Without CAP_SYS_RESOURCE all pipes of a user share a budget of
//! `pipe-user-pages-soft` (64 MiB by default). Past it a pipe holds two pages
//! and is slower than copying. So there are few pipes, lent only while they
//! are of use, and a direction that gets none copies.
//!
//! Source: Linux, `fs/pipe.c`, `account_pipe_buffers` and `pipe_set_size`.

use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// Size of a pipe, and most bytes moved at once.
pub(super) const PIPE_BYTES: usize = 512 * 1024;

/// Pipes of all threads together: half of what a user may have.
const MOST_PIPES: usize = 64;

/// Requests that are refused after the system has refused a pipe, before it is
/// asked again.
const REFUSALS_PER_ATTEMPT: u16 = 1024;

/// A pipe. A free one is empty; of a lent one the borrower knows the content.
#[derive(Debug)]
pub(in crate::forward) struct Pipe {
    pub(super) output: OwnedFd,
    pub(super) input: OwnedFd,
    /// Bytes that went in since its borrower began to count.
    pub(super) moved: usize,
}

impl Pipe {
    fn new() -> rustix::io::Result<Self> {
        let (output, input) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC)?;
        fcntl_setpipe_size(&input, PIPE_BYTES)?;
        Ok(Self {
            output,
            input,
            moved: 0,
        })
    }

    /// Takes the `inside` bytes that are in it.
    pub(super) fn read(&self, inside: usize) -> Vec<u8> {
        let mut bytes = vec![0; inside];
        let mut length = 0;
        while length < inside {
            match rustix::io::read(&self.output, &mut bytes[length..]) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(read) if read > 0 => length += read,
                // The kernel gives back what it has put in.
                _ => break,
            }
        }
        bytes.truncate(length);
        bytes
    }
}

/// A thread's pipes.
#[derive(Debug)]
pub(in crate::forward) struct Pipes {
    free: Vec<Pipe>,
    lent: usize,
    most: usize,
    /// Requests that are refused without asking the system.
    refusals_left: u16,
}

impl Pipes {
    /// The pipes of one of `threads` threads: at least one.
    pub(in crate::forward) fn new(threads: usize) -> Self {
        Self {
            free: Vec::new(),
            lent: 0,
            most: (MOST_PIPES / threads).max(1),
            refusals_left: 0,
        }
    }

    /// A pipe, if there is one.
    pub(super) fn lend(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.free.pop() {
            self.lent += 1;
            return Some(pipe);
        }
        if self.lent >= self.most {
            return None;
        }
        if self.refusals_left > 0 {
            self.refusals_left -= 1;
            return None;
        }
        match Pipe::new() {
            Ok(pipe) => {
                self.lent += 1;
                Some(pipe)
            }
            Err(_) => {
                self.refusals_left = REFUSALS_PER_ATTEMPT;
                None
            }
        }
    }

    /// Takes a lent pipe back that holds `inside` bytes; they are discarded.
    pub(super) fn take_back(&mut self, pipe: Pipe, inside: usize) {
        self.lent -= 1;
        if inside == 0 {
            self.free.push(pipe);
        }
    }

    /// Number of pipes that are lent.
    #[cfg(test)]
    pub(super) fn lent(&self) -> usize {
        self.lent
    }

    /// Whether there are free pipes.
    pub(in crate::forward) fn has_unused(&self) -> bool {
        !self.free.is_empty()
    }

    /// Closes the free pipes, unless one is lent: then others may be soon.
    pub(super) fn close_unused(&mut self) {
        if self.lent == 0 {
            self.free.clear();
        }
    }
}
