//! What a connection does with its two sockets.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{self, RecvFlags, SendFlags, Shutdown, sockopt};
use rustix::pipe::{SpliceFlags, splice};

use super::pipes::{PIPE_BYTES, Pipe};

/// A stream socket that never blocks, or a model of one in tests.
pub(in crate::forward) trait Stream {
    /// Reads what is there, 0 at the end.
    fn read(&self, space: &mut [u8]) -> Result<usize, Errno>;

    /// Sends what the socket's buffer takes; never raises SIGPIPE.
    fn send(&self, bytes: &[u8]) -> Result<usize, Errno>;

    /// Moves what is there into a pipe, 0 at the end.
    fn fill_pipe(&self, pipe: &Pipe) -> Result<usize, Errno>;

    /// Sends up to `length` bytes out of a pipe.
    fn drain_pipe(&self, pipe: &Pipe, length: usize) -> Result<usize, Errno>;

    /// Ends the sending: the peer reads the end after the last byte.
    fn end(&self);

    /// Takes the error that the socket has met, if there is one.
    fn take_error(&self) -> Option<Errno>;

    /// Makes closing the socket reset the connection.
    fn reset_on_close(&self);
}

impl Stream for OwnedFd {
    fn read(&self, space: &mut [u8]) -> Result<usize, Errno> {
        let (length, _) = net::recv(self, space, RecvFlags::empty())?;
        Ok(length)
    }

    fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        net::send(self, bytes, SendFlags::NOSIGNAL)
    }

    fn fill_pipe(&self, pipe: &Pipe) -> Result<usize, Errno> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        splice(self, None, &pipe.input, None, PIPE_BYTES, flags)
    }

    // The standard library has SIGPIPE ignored.
    fn drain_pipe(&self, pipe: &Pipe, length: usize) -> Result<usize, Errno> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        splice(&pipe.output, None, self, None, length, flags)
    }

    fn end(&self) {
        // A peer that is gone needs no end.
        let _ = net::shutdown(self, Shutdown::Write);
    }

    fn take_error(&self) -> Option<Errno> {
        match sockopt::socket_error(self) {
            Ok(Ok(())) => None,
            Ok(Err(errno)) | Err(errno) => Some(errno),
        }
    }

    fn reset_on_close(&self) {
        // A socket that is gone already needs no reset.
        let _ = sockopt::set_socket_linger(self, Some(Duration::ZERO));
    }
}
