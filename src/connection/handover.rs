//! Hand-over: a new connection-server process takes over the listeners and the
//! live TCP and UDP sessions of the old one on the same host, so that an
//! upgrade cuts nothing. Descriptors go over a Unix socket (`SCM_RIGHTS`).
//!
//! ```text
//! successor                                     predecessor
//!     │ Ask(version) ─────────────────────────────→ │ our uid? a version we speak?
//!     │                                             │ requests under way are answered, waiting ones
//!     │                                             │ sent away; further ones queue in the kernel
//!     │                                             │ no agent is heard, no table applied
//!     │                                             │ data threads pause between two events
//!     │ ←── Server, Ports, Connections, Flows, … ── │
//!     │ checks all of it ─── Ready ───────────────→ │
//!     │ ←──────────────────── Go ────────────────── │ will not touch a socket again …
//!     │ ─────────────────── Taken ────────────────→ │ … ends
//!     │ data threads go on                          ╵
//!     │ greets agents under the same id
//!     │ answers requests
//! ```
//!
//! Until `Go` the predecessor may say `Abort`, and until `Taken` the
//! successor's death is one: the predecessor then goes on as if nothing had
//! happened. A successor that has said `Ready` and sees the stream end without
//! `Abort` knows that the predecessor has died, and goes on instead of it. So
//! never do both forward, and never neither, as long as one of them lives.
//!
//! - `socket`: where successors ask;
//! - `frames`: a [`State`] as frames; `values`: what is in them, pure;
//!   `wire`: the messages themselves, and how a frame is sent;
//! - this file: the two sides, and who has the state when.

mod frames;
mod socket;
pub mod successor;
mod values;
mod wire;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::geteuid;

use self::frames::{receive_state, send_state};
pub use self::socket::Socket;
use self::wire::{Content, Empty};
use super::agents::AgentsSnapshot;
use super::control::ControlSnapshot;
use crate::table::{Table, TableError};

/// Of the protocol between predecessor and successor. Others are refused.
pub const VERSION: u32 = 1;

/// How long the other side may take for its next frame. Streams stand still
/// meanwhile, so a successor that hangs is given up soon.
const FRAME_DEADLINE: Duration = Duration::from_secs(3);

/// How long the predecessor may take to answer the requests under way, and to
/// pause: its successor waits for that.
const PREPARE_DEADLINE: Duration = Duration::from_secs(15);

/// Why there was no hand-over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be used.
    #[error("failed to use hand-over socket {path}: {source}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The other side is another user's process.
    #[error(
        "the process at the other end of the hand-over socket runs as uid {found}, not as {ours}"
    )]
    WrongUser {
        /// Its user.
        found: u32,
        /// This process's user.
        ours: u32,
    },
    /// The successor speaks another version.
    #[error("hand-over protocol version {found} is not spoken here, only {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// The predecessor does not hand over, and goes on.
    #[error("the running connection server did not hand over and goes on: {0}")]
    Refused(String),
    /// The other side is gone.
    #[error("the process at the other end of the hand-over socket has ended")]
    Vanished,
    /// The other side is silent, or the stream broke.
    #[error("hand-over failed: {0}")]
    Stream(#[from] io::Error),
    /// What came cannot be used.
    #[error("hand-over failed: {0}")]
    Malformed(&'static str),
    /// The table that came is none.
    #[error("hand-over failed: {0}")]
    Table(#[from] TableError),
}

/// Everything that goes from one process to the next.
#[derive(Debug)]
pub struct State {
    /// Of the streams to agents.
    pub agents: AgentsSnapshot,
    /// The table in use.
    pub table: Arc<Table>,
    /// The listener of the load-sharing port.
    pub load_sharing: OwnedFd,
    /// The listener of the admin port.
    pub admin: OwnedFd,
    /// The sessions and the data plane.
    pub control: ControlSnapshot,
}

/// The predecessor's side of a hand-over that was asked for. Dropped before it
/// is complete it tells the successor to give up.
#[derive(Debug)]
pub struct Offer {
    stream: UnixStream,
    is_settled: bool,
}

impl Offer {
    /// Hears what a process that has connected to the socket wants.
    ///
    /// # Errors
    /// When it is not ours, or speaks another version. It has been told why.
    pub fn hear(stream: UnixStream) -> Result<Self, Error> {
        set_deadline(&stream, FRAME_DEADLINE)?;
        let mut offer = Self {
            stream,
            is_settled: false,
        };
        let heard = offer.check();
        if let Err(error) = &heard {
            offer.abort(&error.to_string());
        }
        heard.map(|()| offer)
    }

    fn check(&self) -> Result<(), Error> {
        check_peer(&self.stream)?;
        match wire::receive(&self.stream)? {
            (Content::Ask(ask), _) if ask.version == VERSION => Ok(()),
            (Content::Ask(ask), _) => Err(Error::Version { found: ask.version }),
            _ => Err(Error::Malformed("the first frame is no question")),
        }
    }

    /// Gives `state` to the successor. After success nothing of it may be
    /// used here any more, only closed.
    ///
    /// # Errors
    /// When the successor has not taken it, and never will: it is still ours.
    pub fn give(&mut self, state: &State) -> Result<(), Error> {
        match self.offer(state) {
            Ok(()) => {}
            Err(error) => {
                self.abort(&error.to_string());
                return Err(error);
            }
        }
        wire::send(&self.stream, Content::Go(Empty {}), &[])?;
        self.is_settled = true;
        match wire::receive(&self.stream) {
            Ok((Content::Taken(_), _)) => Ok(()),
            // It says Taken before it touches anything: it has died.
            Err(Error::Vanished) => Err(Error::Vanished),
            Err(Error::Stream(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(Error::Vanished)
            }
            // It lives and has been told to go on; two must not.
            _ => Ok(()),
        }
    }

    fn offer(&self, state: &State) -> Result<(), Error> {
        send_state(&self.stream, state)?;
        match wire::receive(&self.stream)? {
            (Content::Ready(_), _) => Ok(()),
            _ => Err(Error::Malformed("the successor said something unexpected")),
        }
    }

    fn abort(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.is_settled, true) {
            let reason = reason.to_owned();
            // A successor that is gone has given up already.
            let _ = wire::send(&self.stream, Content::Abort(wire::Abort { reason }), &[]);
        }
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.abort("it failed to prepare");
    }
}

/// The successor's side: a state that is ready to be taken.
#[derive(Debug)]
pub struct Inheritance {
    stream: UnixStream,
    state: State,
}

/// Asks whoever listens at `path` to hand over, and receives everything.
/// `None` when nobody listens, or whoever did died before it had given all.
///
/// # Errors
/// When the predecessor refused, and goes on.
pub fn ask(path: &Path) -> Result<Option<Inheritance>, Error> {
    let stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(source) => {
            let path = path.to_owned();
            return Err(Error::Socket { path, source });
        }
    };
    check_peer(&stream)?;
    set_deadline(&stream, PREPARE_DEADLINE)?;
    // A predecessor that refuses at once may be gone: what it said is there.
    let asked = wire::send(&stream, Content::Ask(wire::Ask { version: VERSION }), &[]);
    let state = receive_state(&stream);
    match state {
        Ok(state) => Ok(Some(Inheritance { stream, state })),
        Err(Error::Vanished) => Ok(None),
        Err(error) => Err(asked.err().unwrap_or(error)),
    }
}

impl Inheritance {
    /// What can be taken; not to be touched yet.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Takes it: from now on it is this process's.
    ///
    /// # Errors
    /// When the predecessor keeps it.
    pub fn take(self) -> Result<State, Error> {
        let Self { stream, state } = self;
        // Whether it was heard shows in the answer.
        let _ = wire::send(&stream, Content::Ready(Empty {}), &[]);
        match wire::receive(&stream) {
            Ok((Content::Go(_), _)) => {
                wire::send(&stream, Content::Taken(Empty {}), &[]).or_else(died)?;
                Ok(state)
            }
            Ok((Content::Abort(wire::Abort { reason }), _)) => Err(Error::Refused(reason)),
            Ok(_) => Err(Error::Malformed(
                "the predecessor said something unexpected",
            )),
            // It never goes without a word: it has died.
            Err(error) => died(error).map(|()| state),
        }
    }
}

/// Whether `error` says that the other side has died.
fn died(error: Error) -> Result<(), Error> {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    match error {
        Error::Vanished => Ok(()),
        Error::Stream(error) if matches!(error.kind(), BrokenPipe | ConnectionReset) => Ok(()),
        error => Err(error),
    }
}

fn set_deadline(stream: &UnixStream, deadline: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(deadline))?;
    stream.set_write_timeout(Some(deadline))
}

/// Both sides trust the other with all that they have.
fn check_peer(stream: &UnixStream) -> Result<(), Error> {
    let peer = rustix::net::sockopt::socket_peercred(stream).map_err(io::Error::from)?;
    let (found, ours) = (peer.uid, geteuid());
    match found == ours {
        true => Ok(()),
        false => Err(Error::WrongUser {
            found: found.as_raw(),
            ours: ours.as_raw(),
        }),
    }
}

#[cfg(test)]
mod tests;
