//! What all parts of a data thread work with, passed to them as `&mut Io`: the
//! epoll, the time of this turn, the gate, the counters, and what else they
//! share. A part's own state is in the part.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::counters::{self, Counters, count};
use super::gate::{Gate, SessionKey, Traffic};
use super::routes::Routes;
use super::scratch::Scratch;
use super::session_index::SessionIndex;
use super::slab::Key;
use super::timers::{IdleTimes, Timers};
use crate::table::ListenPort;

/// The events of a connection's socket: edges only, so that it is registered
/// once and costs no epoll call while it runs. An urgent byte wakes up the side that
/// waits for bytes anyway.
pub(super) const STREAM_EVENTS: EventFlags = EventFlags::IN
    .union(EventFlags::PRI)
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

/// Kinds of event sources, in the upper 8 bits of epoll's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum EventSource {
    Wake,
    TcpPort,
    UdpPort,
    Client,
    Server,
    Flow,
    FinalFlush,
}

impl EventSource {
    const ALL: [Self; 7] = [
        Self::Wake,
        Self::TcpPort,
        Self::UdpPort,
        Self::Client,
        Self::Server,
        Self::Flow,
        Self::FinalFlush,
    ];

    /// `id` is below 2^56: a key's bits, or a port's number.
    fn data(self, id: u64) -> EventData {
        EventData::new_u64(u64::from(self as u8) << 56 | id)
    }

    pub(super) fn of_port(self, port: ListenPort) -> EventData {
        self.data(port.get().into())
    }

    pub(super) fn of_key(self, key: Key) -> EventData {
        self.data(key.to_bits())
    }

    /// The source and its id.
    pub(super) fn parse(data: EventData) -> Option<(Self, u64)> {
        let bits = data.u64();
        let source = Self::ALL
            .into_iter()
            .find(|source| u64::from(*source as u8) == bits >> 56)?;
        Some((source, bits & !(0xff << 56)))
    }
}

/// What the parts of a thread share.
pub(super) struct Io {
    pub(super) epoll: OwnedFd,
    pub(super) gate: Arc<dyn Gate>,
    pub(super) counters: Arc<Counters>,
    pub(super) routes: Arc<Routes>,
    pub(super) idle_times: Arc<IdleTimes>,
    pub(super) sessions: SessionIndex,
    pub(super) timers: Timers,
    pub(super) scratch: Scratch,
    /// The time at which this turn of the loop began.
    pub(super) now: Instant,
}

impl Io {
    /// Registers a socket for `events` under `data`.
    pub(super) fn watch(
        &self,
        socket: impl AsFd,
        data: EventData,
        events: EventFlags,
    ) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, socket, data, events)
    }

    /// Changes what a socket is registered for; what is ready is reported
    /// again.
    pub(super) fn change_watch(
        &self,
        socket: impl AsFd,
        data: EventData,
        events: EventFlags,
    ) -> rustix::io::Result<()> {
        epoll::modify(&self.epoll, socket, data, events)
    }

    /// Something has a deadline now.
    pub(super) fn schedule(&mut self) {
        self.timers.schedule(self.now);
    }

    /// Reports the end of an admitted connection or flow. Its sockets must be
    /// closed already: a free port has no connection.
    pub(super) fn report(&mut self, port: ListenPort, session: SessionKey, traffic: Traffic) {
        self.count_carried();
        count(&self.counters.closed);
        self.gate.closed(port, session, traffic);
    }

    /// Adds what was carried meanwhile to the counters: not at once, as threads
    /// share them.
    pub(super) fn count_carried(&mut self) {
        let carried = std::mem::take(&mut self.scratch.carried);
        counters::add(&self.counters.upstream_bytes, carried.upstream_bytes);
        counters::add(&self.counters.downstream_bytes, carried.downstream_bytes);
    }
}

/// An epoll that wakes the thread when control has a command for it.
pub(super) fn new_epoll(wake: &OwnedFd) -> io::Result<OwnedFd> {
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, wake, EventSource::Wake.data(0), EventFlags::IN)?;
    Ok(epoll)
}
