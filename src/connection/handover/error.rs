//! Why there was no hand-over.

use std::io;
use std::path::PathBuf;

use super::VERSION;
use crate::selection::FieldError;
use crate::table::TableError;

/// Why there was no hand-over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be used.
    #[error("failed to use hand-over socket {path}: {source}")]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The other side is another user's process.
    #[error(
        "the process at the other end of the hand-over socket runs as uid {found}, not as {ours}"
    )]
    WrongUser {
        /// The other process's user.
        found: u32,
        /// This process's user.
        ours: u32,
    },
    /// The successor speaks another version.
    #[error("hand-over protocol version {found} is not spoken here, only {VERSION}")]
    Version {
        /// The successor's version.
        found: u32,
    },
    /// The successor is of a version that does not know sessions of several ports,
    /// and there are some.
    #[error(
        "there are sessions of several ports, which the new process does not know; it must be of a newer version, or come after their end"
    )]
    SeveralPorts,
    /// The predecessor does not hand over, and goes on.
    #[error("the running connection server did not hand over and goes on: {0}")]
    Refused(String),
    /// The other process has died.
    #[error("the process at the other end of the hand-over socket has ended")]
    Vanished,
    /// The other side does not answer, or the stream broke.
    #[error("hand-over failed: {0}")]
    Stream(#[from] io::Error),
    /// The other side sent what cannot be used.
    #[error("hand-over failed: {0}")]
    Malformed(&'static str),
    /// The other side sent a session that does not parse.
    #[error("hand-over failed: a session does not parse: {0}")]
    Session(#[from] FieldError),
    /// The other side sent a table that does not decode.
    #[error("hand-over failed: {0}")]
    Table(#[from] TableError),
}
