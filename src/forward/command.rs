//! What control asks of a data thread.

use std::io;
use std::net::IpAddr;
use std::sync::mpsc;

use super::gate::{Decision, PendingId, SessionKey, Transport};
use super::listeners::Listener;
use super::snapshot::{ForwarderSnapshot, WorkerSnapshot};
use crate::table::ListenPort;

/// A command of control to a thread.
#[derive(Debug)]
pub(super) enum Command {
    Listen(Vec<(ListenPort, Listener)>),
    /// The table has a draining UDP port again.
    Reopen(ListenPort),
    Close(ListenPort, Transport),
    Answer(ListenPort, PendingId, Decision),
    Cut(ListenPort, SessionKey),
    CutClient(ListenPort, SessionKey, IpAddr),
    /// Reports that all commands before are done, and the ports that could not be
    /// watched.
    Settle(mpsc::Sender<Vec<Unwatched>>),
    Export(mpsc::Sender<io::Result<ForwarderSnapshot>>),
    Import(Box<WorkerSnapshot>),
    Stop,
}

/// A port that epoll did not take.
#[derive(Debug)]
pub(super) struct Unwatched {
    pub(super) port: ListenPort,
    pub(super) transport: Transport,
    pub(super) error: io::Error,
}
