//! What a connection does with its two sockets.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{self, RecvFlags, SendFlags, Shutdown, sockopt};
use rustix::pipe::{SpliceFlags, splice};

use super::pipes::{PIPE_BYTES, Pipe};

/// The position of a socket's urgent byte. A read that begins before it ends
/// before it, and so does a splice, which never passes it.
///
/// Source: Linux, `net/ipv4/tcp.c`, `tcp_recvmsg_locked` and `__tcp_read_sock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::forward) enum Mark {
    /// There is no urgent byte.
    None,
    /// So many bytes come first.
    Ahead(usize),
    /// It is the next byte.
    Here,
}

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

    /// Where the urgent byte is that has arrived and was not read yet.
    ///
    /// # Errors
    /// `AGAIN` when it cannot be read yet, nor any byte before it.
    fn mark(&self) -> Result<Mark, Errno>;

    /// Sends a byte as urgent; never raises SIGPIPE.
    fn send_urgent(&self, byte: u8) -> Result<usize, Errno>;

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

    // `SIOCATMARK` has no safe wrapper. The count of readable bytes ends at the
    // urgent byte where that is not in line (`tcp_inq`). It is put in line
    // again before anything is read, as it would be skipped else.
    fn mark(&self) -> Result<Mark, Errno> {
        let mut polled = [PollFd::new(self, PollFlags::PRI)];
        poll(&mut polled, Some(&Timespec::default()))?;
        if !polled[0].revents().contains(PollFlags::PRI) {
            return Ok(Mark::None);
        }
        sockopt::set_socket_oobinline(self, true)?;
        if ioctl_fionread(self)? == 0 {
            // It came before a segment that is missing.
            return Err(Errno::AGAIN);
        }
        sockopt::set_socket_oobinline(self, false)?;
        let before = ioctl_fionread(self);
        sockopt::set_socket_oobinline(self, true)?;
        Ok(match usize::try_from(before?).unwrap_or(usize::MAX) {
            0 => Mark::Here,
            before => Mark::Ahead(before),
        })
    }

    fn send_urgent(&self, byte: u8) -> Result<usize, Errno> {
        net::send(self, &[byte], SendFlags::NOSIGNAL | SendFlags::OOB)
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
