//! The thread's TCP part: accept, connect, copy, end.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{self, SocketFlags};

use super::{ACCEPT_PAUSE, CONNECT_DEADLINE, Pending, Source, Worker, closing};
use crate::forward::admission::{self, Permit};
use crate::forward::counters::count;
use crate::forward::slab::Key;
use crate::forward::stream::Stream;
use crate::forward::tcp::{Connection, Outcome, Side, Signals};
use crate::forward::{Decision, SessionKey, Traffic, Transport, liveness, proxy_protocol};
use crate::pool::ProxyProtocol;
use crate::table::ListenPort;

/// A client that has just come may have sent already.
const FIRST_SIGNALS: Signals = Signals {
    readable: true,
    writable: false,
    ended: false,
    gone: false,
    failed: false,
};

/// What a connection has done for too long.
enum Late {
    Connecting,
    /// Waited for what its peers have not acknowledged.
    Over,
    Idle,
}

impl Worker {
    /// Accepts one connection. Where more wait the port is reported again, which
    /// costs less than asking each port in vain for a second one. Whether there
    /// was one.
    pub(super) fn accept(&mut self, port: ListenPort) -> bool {
        let Some(listener) = self.tcp_ports.get(&port) else {
            return false;
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match net::acceptfrom_with(listener, flags) {
            Ok((client, address)) => {
                if let Some(address) =
                    address.and_then(|address| SocketAddr::try_from(address).ok())
                {
                    self.meet(port, client, address);
                }
                true
            }
            Err(Errno::NFILE | Errno::MFILE | Errno::NOBUFS | Errno::NOMEM) => {
                self.pause_accepting(port);
                false
            }
            Err(Errno::AGAIN) => false,
            // A client that is gone again.
            Err(_) => true,
        }
    }

    /// A client that was just accepted.
    fn meet(&mut self, port: ListenPort, client: OwnedFd, address: SocketAddr) {
        let source = admission::Source::of(address.ip());
        match self.tcp_admission.admit(source, port) {
            Ok(permit) => {
                let verdict = self.gate.admit(port, Transport::Tcp, address);
                self.admit(port, client, address, verdict, permit);
            }
            Err(refused) => {
                count(self.counters.refused(refused));
                client.reset_on_close();
            }
        }
    }

    /// Takes the port out of epoll for a while: reported again and again, it
    /// would only spin.
    fn pause_accepting(&mut self, port: ListenPort) {
        count(&self.counters.accept_failed);
        if let Some(listener) = self.tcp_ports.get(&port)
            && epoll::delete(&self.epoll, listener).is_ok()
        {
            let until = self.now + ACCEPT_PAUSE;
            self.paused.get_or_insert((until, Vec::new())).1.push(port);
            self.next_tick = self.next_tick.min(until);
        }
    }

    /// Accepts again on the ports that have paused long enough.
    pub(super) fn resume_accepting(&mut self) {
        let is_over = |paused: &mut (Instant, Vec<ListenPort>)| paused.0 <= self.now;
        let Some((_, ports)) = self.paused.take_if(is_over) else {
            return;
        };
        for port in ports {
            let watched = self
                .tcp_ports
                .get(&port)
                .map(|listener| self.watch_listener(port, listener, Source::TcpPort));
            // Without memory for the watch, it is tried again.
            if let Some(Err(_)) = watched {
                let until = self.now + ACCEPT_PAUSE;
                self.paused.get_or_insert((until, Vec::new())).1.push(port);
            }
        }
    }

    pub(super) fn admit(
        &mut self,
        port: ListenPort,
        client: OwnedFd,
        address: SocketAddr,
        verdict: Decision,
        permit: Permit,
    ) {
        match verdict {
            Decision::Admit(session) => self.start(port, client, address, session, permit),
            Decision::Refuse => {
                count(&self.counters.no_session);
                client.reset_on_close();
            }
            Decision::Ask => {
                let parked = Pending::Tcp {
                    port,
                    client,
                    address,
                    permit,
                };
                self.park(parked, port, Transport::Tcp, address);
                self.schedule();
            }
        }
    }

    /// Connects an admitted client with its server.
    pub(super) fn start(
        &mut self,
        port: ListenPort,
        client: OwnedFd,
        address: SocketAddr,
        session: SessionKey,
        permit: Permit,
    ) {
        count(&self.counters.tcp_opened);
        // A port may be closed while its client is parked.
        let Some(route) = self.routes.get(port) else {
            count(&self.counters.no_server);
            client.reset_on_close();
            return self.report(port, session, Traffic::default());
        };
        let header = (route.proxy_protocol == ProxyProtocol::V2).then(|| {
            let local = net::getsockname(&client)
                .ok()
                .and_then(|local| SocketAddr::try_from(local).ok());
            proxy_protocol::header(address, local.unwrap_or(address))
        });
        match Connection::start(
            port,
            session,
            client,
            route.target,
            header,
            permit,
            self.now,
        ) {
            Ok(connection) => self.watch_connection(connection),
            Err((client, errno)) => {
                count(self.counters.unreachable(errno));
                client.reset_on_close();
                self.report(port, session, Traffic::default());
            }
        }
    }

    pub(super) fn watch_connection(&mut self, connection: Connection) {
        let session = connection.session;
        let key = self.connections.insert(connection);
        self.unguarded.push(key);
        self.sessions
            .entry(session)
            .or_default()
            .push((Transport::Tcp, key));
        self.schedule();
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        // A near server is connected by now, and the client's first bytes may
        // be there: one event less.
        let outcome = connection.event(Side::Client, FIRST_SIGNALS, &mut self.scratch);
        let goes_on = match outcome {
            Outcome::Waiting | Outcome::Ready => true,
            Outcome::Finished => !connection.is_delivered(),
            Outcome::Broken | Outcome::Unreachable(_) => false,
        };
        if goes_on && epoll_pair(&self.epoll, connection, key).is_err() {
            count(&self.counters.accept_failed);
            return self.end_connection(key);
        }
        self.conclude(key, outcome);
    }

    pub(super) fn connection_event(&mut self, key: Key, side: Side, signals: Signals) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        // How long one that is over waits for its peers does not begin anew.
        if !connection.is_over() {
            connection.active = self.now;
        }
        let outcome = connection.event(side, signals, &mut self.scratch);
        // The other side may take nothing, and so never show it.
        let is_waiting = matches!(outcome, Outcome::Waiting | Outcome::Ready);
        if signals.failed && is_waiting && connection.has_lost(side) {
            return self.break_connection(key);
        }
        self.conclude(key, outcome);
        self.gather_if_busy(key);
    }

    pub(super) fn pump(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(key) {
            let outcome = connection.pump(&mut self.scratch);
            self.conclude(key, outcome);
        }
    }

    pub(super) fn conclude(&mut self, key: Key, outcome: Outcome) {
        match outcome {
            Outcome::Waiting => {}
            Outcome::Ready => self.ready.push(key),
            Outcome::Finished => self.finish(key),
            Outcome::Broken => self.break_connection(key),
            Outcome::Unreachable(errno) => {
                count(self.counters.unreachable(errno));
                self.end_connection(key);
            }
        }
    }

    /// Closes a connection that has ended both ways, once both peers have
    /// everything: of closed sockets Linux forgets what they hold when it runs
    /// out of memory. Each peer that has shows by an event.
    fn finish(&mut self, key: Key) {
        let connection = self.connections.get_mut(key);
        if connection.is_some_and(|connection| connection.is_delivered()) {
            self.end_connection(key);
        }
    }

    /// Whether a connection has ended both ways.
    pub(super) fn has_finished(&mut self, key: Key) -> bool {
        let connection = self.connections.get_mut(key);
        connection.is_some_and(|connection| connection.is_over())
    }

    /// Closes a connection, by a reset unless it has ended both ways.
    pub(super) fn end_connection(&mut self, key: Key) {
        let Some(mut connection) = self.connections.remove(key) else {
            return;
        };
        connection.give_back_pipes(&mut self.scratch.pipes);
        if !connection.is_over() {
            connection.reset();
        }
        let (port, session, traffic) = (connection.port, connection.session, connection.traffic());
        self.leave_session(session, Transport::Tcp, key);
        // Closed before it is reported: a free port has no connection.
        drop(connection);
        self.report(port, session, traffic);
    }

    pub(super) fn tick_connections(&mut self) {
        for connection in self.connections.iter_mut() {
            connection.give_back_idle_pipes(&mut self.scratch.pipes);
        }
        self.scratch.pipes.close_unused();
        self.guard_peers();
        let idle = Duration::from_secs(self.idle.tcp.load(Ordering::Relaxed));
        let late: Vec<(Key, Late)> = self
            .connections
            .iter()
            .filter_map(|(key, connection)| {
                let silent = self.now.duration_since(connection.active);
                let (is_late, late) = if connection.is_connecting {
                    (silent >= CONNECT_DEADLINE, Late::Connecting)
                } else if connection.is_over() {
                    (silent >= closing::DEADLINE, Late::Over)
                } else {
                    (!idle.is_zero() && silent >= idle, Late::Idle)
                };
                is_late.then_some((key, late))
            })
            .collect();
        for (key, late) in late {
            match late {
                Late::Connecting => self.conclude(key, Outcome::Unreachable(Errno::TIMEDOUT)),
                // The kernel alone goes on with it.
                Late::Over => self.end_connection(key),
                Late::Idle => {
                    count(&self.counters.idle);
                    self.end_connection(key);
                }
            }
        }
    }

    /// Has new connections find out when a peer is gone. What is over before a
    /// tick never pays for that.
    fn guard_peers(&mut self) {
        for key in std::mem::take(&mut self.unguarded) {
            match self.connections.get_mut(key) {
                Some(connection) if connection.is_connecting => self.unguarded.push(key),
                Some(connection) => {
                    // A peer that is gone already says so by itself.
                    let _ = liveness::guard(&connection.client, self.peer_timeout);
                    let _ = liveness::guard(&connection.server, self.peer_timeout);
                }
                None => {}
            }
        }
    }

    /// Something has a deadline now: the next look at deadlines must not lie
    /// in the past.
    pub(super) fn schedule(&mut self) {
        if self.next_tick < self.now {
            self.next_tick = self.now + super::TICK;
        }
    }
}

fn epoll_pair(epoll: &OwnedFd, connection: &Connection, key: Key) -> rustix::io::Result<()> {
    super::watch(
        epoll,
        &connection.client,
        Source::Client.data(key.to_bits()),
    )?;
    super::watch(
        epoll,
        &connection.server,
        Source::Server.data(key.to_bits()),
    )
}
