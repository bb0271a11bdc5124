//! Hand-over: a new connection-server process takes over the listeners and the
//! live TCP and UDP sessions of the old one on the same host, so that an
//! upgrade cuts nothing. Descriptors go over a Unix socket (`SCM_RIGHTS`).
//!
//! ```text
//! successor (Import)                            predecessor (Export)
//!     │ Request(version) ─────────────────────────→ │ our uid? a version we speak?
//!     │                                             │ requests under way are answered, waiting ones
//!     │                                             │ refused; further ones queue in the kernel
//!     │                                             │ messages of agents and new tables wait
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
//! Until `Go` the predecessor may send `Abort`, and until `Taken` the
//! successor's death has the same effect: the predecessor then goes on as if
//! nothing had happened. A successor that has sent `Ready` and sees the stream
//! end without `Abort` knows that the predecessor has died, and goes on instead
//! of it. So while at least one of them is alive, exactly one forwards.
//!
//! - `socket`: where successors ask;
//! - `state`: a [`State`] as frames; `values`: what is in them, pure; `v1`: the
//!   messages, generated from `handover.proto`; `wire`: how a frame is sent;
//! - `successor`: a hand-over that a signal asks for; `error`: why one failed;
//! - this file: the two sides, and who has the state when.

mod error;
mod socket;
mod state;
pub mod successor;
#[allow(
    missing_docs,
    rustdoc::all,
    clippy::all,
    clippy::uninlined_format_args,
    clippy::semicolon_if_nothing_returned
)]
#[rustfmt::skip]
mod v1;
mod values;
mod wire;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::process::geteuid;

pub use self::error::Error;
pub use self::socket::Socket;
pub use self::state::State;
use self::v1::{Empty, frame::Content};
use self::wire::{FRAME_DEADLINE, set_deadline};

/// The protocol's version. Both sides must speak the same one.
pub const VERSION: u32 = 1;

/// How long the predecessor may take to answer the requests under way, and to
/// pause: its successor waits for that.
const PREPARE_DEADLINE: Duration = Duration::from_secs(15);

/// The predecessor's side of a hand-over that was requested. If it is dropped
/// before it is complete, the successor gives up.
#[derive(Debug)]
pub struct Export {
    stream: UnixStream,
    is_settled: bool,
    /// Whether the successor knows sessions of several ports.
    knows_several_ports: bool,
}

impl Export {
    /// Receives the request of a process that has connected to the socket.
    ///
    /// # Errors
    /// When it is another user's process, or speaks another version. It has
    /// been sent the reason.
    pub fn accept(stream: UnixStream) -> Result<Self, Error> {
        set_deadline(&stream, FRAME_DEADLINE)?;
        let mut export = Self {
            stream,
            is_settled: false,
            knows_several_ports: false,
        };
        let checked = export.check();
        if let Err(error) = &checked {
            export.abort(&error.to_string());
        }
        checked.map(|()| export)
    }

    fn check(&mut self) -> Result<(), Error> {
        check_peer(&self.stream)?;
        match wire::receive(&self.stream)? {
            (Content::Request(request), _) if request.version == VERSION => {
                self.knows_several_ports = request.several_ports;
                Ok(())
            }
            (Content::Request(request), _) => Err(Error::Version {
                found: request.version,
            }),
            _ => Err(Error::Malformed("the first frame is no request")),
        }
    }

    /// Gives `state` to the successor. After success nothing of it may be
    /// used here any more, only closed.
    ///
    /// # Errors
    /// When the successor has not taken it, and never will: it is still ours.
    pub fn complete(&mut self, state: &State) -> Result<(), Error> {
        if let Err(error) = self.send(state) {
            self.abort(&error.to_string());
            return Err(error);
        }
        wire::send(&self.stream, Content::Go(Empty {}), &[])?;
        self.is_settled = true;
        match wire::receive(&self.stream) {
            Ok((Content::Taken(_), _)) => Ok(()),
            // It sends Taken before it uses anything: it has died.
            Err(Error::Vanished) => Err(Error::Vanished),
            Err(Error::Stream(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(Error::Vanished)
            }
            // It is alive and was sent Go; two must not forward.
            _ => Ok(()),
        }
    }

    /// Sends `state` and waits until the successor has checked it.
    fn send(&self, state: &State) -> Result<(), Error> {
        if !self.knows_several_ports && state.has_several_ports() {
            return Err(Error::SeveralPorts);
        }
        state::send(&self.stream, state)?;
        match wire::receive(&self.stream)? {
            (Content::Ready(_), _) => Ok(()),
            _ => Err(Error::Malformed("the successor sent an unexpected frame")),
        }
    }

    fn abort(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.is_settled, true) {
            let reason = reason.to_owned();
            // A successor that has died needs no reason.
            let _ = wire::send(&self.stream, Content::Abort(v1::Abort { reason }), &[]);
        }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.abort("it failed to prepare");
    }
}

/// The successor's side: a state that is ready to be taken.
#[derive(Debug)]
pub struct Import {
    stream: UnixStream,
    state: State,
}

impl Import {
    /// Requests a hand-over from the process that listens at `path`, and
    /// receives everything. `None` when no process listens, or it died before
    /// it had sent everything.
    ///
    /// # Errors
    /// When the predecessor refused, and goes on.
    pub fn request(path: &Path) -> Result<Option<Self>, Error> {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => {
                return Ok(None);
            }
            Err(source) => {
                let path = path.to_owned();
                return Err(Error::Socket { path, source });
            }
        };
        check_peer(&stream)?;
        set_deadline(&stream, PREPARE_DEADLINE)?;
        let request = Content::Request(v1::Request {
            version: VERSION,
            several_ports: true,
        });
        // A predecessor that refuses at once may have closed the stream, with
        // its reason waiting in it.
        let requested = wire::send(&stream, request, &[]);
        match state::receive(&stream) {
            Ok(state) => Ok(Some(Self { stream, state })),
            Err(Error::Vanished) => Ok(None),
            Err(error) => Err(requested.err().unwrap_or(error)),
        }
    }

    /// The state that can be taken. It must not be used yet.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Takes the state: from now on it is this process's.
    ///
    /// # Errors
    /// When the predecessor keeps it.
    pub fn complete(self) -> Result<State, Error> {
        let Self { stream, state } = self;
        // The answer shows whether it arrived.
        let _ = wire::send(&stream, Content::Ready(Empty {}), &[]);
        match wire::receive(&stream) {
            Ok((Content::Go(_), _)) => {
                wire::send(&stream, Content::Taken(Empty {}), &[]).or_else(died)?;
                Ok(state)
            }
            Ok((Content::Abort(v1::Abort { reason }), _)) => Err(Error::Refused(reason)),
            Ok(_) => Err(Error::Malformed("the predecessor sent an unexpected frame")),
            // It never leaves without Abort: it has died.
            Err(error) => died(error).map(|()| state),
        }
    }
}

/// Success if `error` means that the other side has died.
fn died(error: Error) -> Result<(), Error> {
    use io::ErrorKind::{BrokenPipe, ConnectionReset};
    match error {
        Error::Vanished => Ok(()),
        Error::Stream(error) if matches!(error.kind(), BrokenPipe | ConnectionReset) => Ok(()),
        error => Err(error),
    }
}

/// Both sides trust the other with everything that they have.
fn check_peer(stream: &UnixStream) -> Result<(), Error> {
    let peer = rustix::net::sockopt::socket_peercred(stream).map_err(io::Error::from)?;
    let (found, ours) = (peer.uid, geteuid());
    if found == ours {
        return Ok(());
    }
    Err(Error::WrongUser {
        found: found.as_raw(),
        ours: ours.as_raw(),
    })
}

#[cfg(test)]
mod tests;
