//! A data thread: one epoll, and everything that happens on the connection
//! ports that it owns.
//!
//! ```text
//!            commands of control        epoll         deadlines
//!                     └──────────→ event loop ←───────────┘
//!                    ┌─────────────────┼──────────────────┐
//!                 Streams       PendingClients        Datagrams
//!                    └───────── all with &mut Io ─────────┘
//! ```
//!
//! The parts own their state and do not know each other, except that
//! `Streams` and `Datagrams` hand clients to `PendingClients`. What concerns
//! several parts is here: the turn of the loop, commands, and the cut of a
//! session.
//!
//! Listeners and UDP sockets are level-triggered: what is not read now is
//! reported again. TCP sockets of sessions are edge-triggered and registered
//! once, so a session costs no epoll call while it runs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventFlags};

use super::command::{Command, Unwatched};
use super::counters::count;
use super::gate::{Decision, Gate, PendingId, SessionKey, Traffic, Transport};
use super::io::{EventSource, Io, new_epoll};
use super::listeners::Listener;
use super::pending::{Client, PendingClients};
use super::scratch::Scratch;
use super::session_index::{Member, SessionIndex};
use super::shared::Shared;
use super::slab::Key;
use super::snapshot::{ForwarderSnapshot, WorkerSnapshot};
use super::tcp::connection::{Side, Signals};
use super::tcp::streams::Streams;
use super::timers::Timers;
use super::udp::datagrams::Datagrams;
use crate::table::ListenPort;

/// Events taken from epoll at once.
const EVENTS: usize = 256;

/// Most clients that are accepted when a session is cut: what a listener's
/// queue holds by default. The clients that came before the cut are at its
/// head, and clients that fill it meanwhile do not hold the thread.
const ACCEPTS_AT_CUT: usize = 4096;

/// Likewise for datagrams, in turns of 128: many times what a socket's buffer
/// holds by default.
const TURNS_AT_CUT: usize = 64;

/// A data thread's state.
pub(super) struct Worker {
    inbox: mpsc::Receiver<Command>,
    wake: Arc<OwnedFd>,
    io: Io,
    streams: Streams,
    datagrams: Datagrams,
    pending: PendingClients,
    /// A port that could not be watched since control last asked.
    unwatched: Vec<Unwatched>,
    is_stopping: bool,
}

impl Worker {
    pub(super) fn new(
        inbox: mpsc::Receiver<Command>,
        wake: &Arc<OwnedFd>,
        gate: Arc<dyn Gate>,
        shared: Shared,
    ) -> io::Result<Self> {
        let now = Instant::now();
        let io = Io {
            epoll: new_epoll(wake)?,
            gate,
            counters: shared.counters,
            routes: shared.routes,
            idle_times: shared.idle_times,
            sessions: SessionIndex::default(),
            timers: Timers::new(now),
            scratch: Scratch::new(shared.threads),
            now,
        };
        let (tcp_quota, ports) = (shared.tcp_quota.clone(), shared.draining_ports);
        Ok(Self {
            inbox,
            wake: wake.clone(),
            io,
            streams: Streams::new(shared.tcp_quota, shared.peer_timeout, now)?,
            datagrams: Datagrams::new(shared.udp_quota, tcp_quota, shared.flow_share, ports),
            pending: PendingClients::default(),
            unwatched: Vec::new(),
            is_stopping: false,
        })
    }

    /// Handles events until a command stops the thread.
    pub(super) fn run(mut self) {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        while !self.is_stopping {
            events.clear();
            let timeout = self.timeout().map(|timeout| {
                Timespec::try_from(timeout).expect("timeouts are far below the largest")
            });
            let waited = epoll::wait(
                &self.io.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            );
            self.io.now = Instant::now();
            match waited {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "epoll failed; the data thread stops");
                    return;
                }
            }
            for event in &events {
                self.handle(*event);
            }
            self.streams.pump_ready(&mut self.io);
            let next_poll = self.streams.next_poll();
            if next_poll.is_some_and(|next_poll| self.io.now >= next_poll) {
                self.streams.poll_busy(&mut self.io);
            }
            if self.io.timers.is_due(self.io.now) {
                self.tick();
            }
        }
    }

    /// The time to wait for events: none when connections want a turn, any when
    /// nothing has a deadline.
    fn timeout(&self) -> Option<Duration> {
        if self.streams.has_ready() {
            return Some(Duration::ZERO);
        }
        let now = self.io.now;
        if let Some(next_poll) = self.streams.next_poll() {
            return Some(next_poll.saturating_duration_since(now));
        }
        let has_deadlines = self.streams.has_deadlines()
            || self.datagrams.has_deadlines()
            || !self.pending.is_empty()
            || self.io.scratch.pipes.has_unused();
        has_deadlines.then(|| self.io.timers.wait(now))
    }

    fn handle(&mut self, event: Event) {
        let flags = event.flags;
        let Some((source, id)) = EventSource::parse(event.data) else {
            return;
        };
        let (key, port) = (Key::from_bits(id), port_of(id));
        let signals = Signals {
            readable: flags.contains(EventFlags::IN),
            urgent: flags.contains(EventFlags::PRI),
            writable: flags.contains(EventFlags::OUT),
            ended: flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR),
            gone: flags.intersects(EventFlags::HUP | EventFlags::ERR),
            failed: flags.contains(EventFlags::ERR),
        };
        let Self {
            io,
            streams,
            datagrams,
            pending,
            ..
        } = self;
        match source {
            EventSource::Wake => self.take_commands(),
            EventSource::TcpPort => {
                port.map(|port| streams.accept(port, pending, io));
            }
            EventSource::UdpPort => {
                port.map(|port| {
                    if signals.failed {
                        datagrams.end_unreachable(port, io);
                    }
                    datagrams.receive_from_clients(port, pending, io)
                });
            }
            EventSource::Client => streams.handle_event(key, Side::Client, signals, io),
            EventSource::Server => streams.handle_event(key, Side::Server, signals, io),
            EventSource::Flow => datagrams.receive_from_server(key, io),
            EventSource::FinalFlush => streams.continue_flush(key, io),
        }
    }

    fn take_commands(&mut self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.wake, &mut count);
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Listen(listeners) => {
                    self.streams.reserve(listeners.len());
                    for (port, listener) in listeners {
                        self.listen(port, listener);
                    }
                }
                Command::Reopen(port) => self.datagrams.reopen_port(port),
                Command::Close(port, Transport::Tcp) => self.streams.close_port(port),
                Command::Close(port, Transport::Udp) => {
                    self.datagrams.drain_port(port, &mut self.io);
                }
                Command::Answer(port, id, decision) => self.answer(port, id, decision),
                Command::Cut(port, session) => {
                    self.refuse_waiting(port);
                    self.cut(port, session);
                }
                // One that has yet to be accepted is decided on then. One that waits
                // may have been admitted under this session, and the answer be late.
                Command::CutClient(port, session, client) => {
                    self.pending.refuse_client_at(port, client, &self.io);
                    self.cut(port, session);
                }
                Command::Settle(done) => {
                    // Control may have given up.
                    let _ = done.send(std::mem::take(&mut self.unwatched));
                }
                Command::Export(reply) => {
                    // Control waits for every thread.
                    let _ = reply.send(self.export());
                }
                Command::Import(snapshot) => self.import(*snapshot),
                Command::Stop => self.is_stopping = true,
            }
        }
    }

    fn listen(&mut self, port: ListenPort, listener: Listener) {
        let transport = listener.transport();
        let io = &self.io;
        let watched = match listener {
            Listener::Tcp(listener) => self.streams.open_port(port, listener, io),
            Listener::Udp(socket, state) => self.datagrams.open_port(port, socket, state, io),
        };
        if let Err(error) = watched {
            self.unwatched.push(Unwatched {
                port,
                transport,
                error: error.into(),
            });
        }
    }

    /// Carries out the gate's decision on a pending client.
    fn answer(&mut self, port: ListenPort, id: PendingId, decision: Decision) {
        let io = &mut self.io;
        let Some(client) = self.pending.take(id) else {
            // The answer is too late: what the gate has counted has ended.
            if let Decision::Admit(session) = decision {
                io.gate.closed(port, session, Traffic::default());
            }
            return;
        };
        match (decision, client) {
            (Decision::Admit(session), Client::Tcp(client)) => {
                self.streams.connect(client, session, io);
            }
            (Decision::Admit(session), Client::Udp(client)) => {
                self.datagrams.open(client, session, io);
            }
            (Decision::Refuse | Decision::Ask, client) => {
                count(&io.counters.no_session);
                client.refuse();
            }
        }
    }

    /// Cuts a session on one of its ports. Clients that reach it from now on came
    /// after the session.
    fn cut(&mut self, port: ListenPort, session: SessionKey) {
        let io = &mut self.io;
        for Member { transport, key } in io.sessions.take((port, session)) {
            match transport {
                Transport::Tcp => self.streams.cut(key, io),
                Transport::Udp => self.datagrams.cut(key, io),
            }
        }
        self.streams.cut_final_flushes(port, session, io);
        io.gate.closed(port, session, Traffic::default());
    }

    /// Takes in all clients that have come to `port` so far, and refuses those
    /// that the gate does not admit at once: they came before the port's next
    /// session.
    fn refuse_waiting(&mut self, port: ListenPort) {
        let (pending, io) = (&mut self.pending, &mut self.io);
        for _ in 0..ACCEPTS_AT_CUT {
            if !self.streams.accept(port, pending, io) {
                break;
            }
        }
        for _ in 0..TURNS_AT_CUT {
            if !self.datagrams.receive_from_clients(port, pending, io) {
                break;
            }
        }
        pending.refuse_at(port, io);
    }

    /// Looks at everything that has a deadline. One pass over a thread's
    /// sessions costs about 10 µs per 1000.
    fn tick(&mut self) {
        let io = &mut self.io;
        io.timers.restart(io.now);
        io.count_carried();
        self.pending.tick(io);
        self.streams.tick(io);
        self.datagrams.tick(io);
    }

    /// Takes out everything that this thread has.
    ///
    /// # Errors
    /// When there is no descriptor for a new epoll; nothing has changed then.
    fn export(&mut self) -> io::Result<ForwarderSnapshot> {
        let io = &mut self.io;
        self.streams.stop_coalescing(io);
        // In the old epoll sockets stay registered as long as any process has
        // them open, and would be refused when they come back.
        io.epoll = new_epoll(&self.wake)?;
        let clients = self.pending.export();
        let connections = self.streams.export(io);
        let flows = self.datagrams.export(io);
        let (tcp, udp) = (self.streams.export_ports(), self.datagrams.export_ports());
        let ports = tcp.chain(udp).collect();
        io.sessions.clear();
        Ok(ForwarderSnapshot {
            ports,
            connections,
            flows,
            clients,
        })
    }

    /// Continues this thread's part of a snapshot.
    fn import(&mut self, snapshot: WorkerSnapshot) {
        for port in snapshot.ports {
            let (number, is_draining) = (port.port, port.is_draining);
            self.listen(number, port.listener);
            for Unwatched {
                port,
                transport,
                error,
            } in self.unwatched.drain(..)
            {
                // The exporting process cannot take it back any more.
                tracing::error!(%port, ?transport, %error, "failed to watch a connection port that was taken over");
            }
            if is_draining {
                self.datagrams.keep_draining(number, &mut self.io);
            }
        }
        let (pending, io) = (&mut self.pending, &mut self.io);
        for (connection, permit) in snapshot.connections {
            self.streams.import(connection, permit, io);
        }
        for (flow, permit) in snapshot.flows {
            self.datagrams.import(flow, permit, io);
        }
        // The gate decides again, as if the client had just come.
        for (client, permit) in snapshot.clients {
            match Client::import(client, permit) {
                Client::Tcp(client) => self.streams.meet(client, pending, io),
                Client::Udp(client) => self.datagrams.meet_again(client, pending, io),
            }
        }
    }
}

fn port_of(id: u64) -> Option<ListenPort> {
    ListenPort::new(u16::try_from(id).ok()?)
}
