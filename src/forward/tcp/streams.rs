//! The TCP connections of a thread, from the accepted client to the reported
//! end. The states are drawn in the parent.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net;

use super::acceptor::{Accepted, Acceptor};
use super::coalescing::Coalescing;
use super::connection::{Connection, Outcome, Side, Signals, connect};
use super::final_flush::{self, FinalFlushes};
use super::liveness::Liveness;
use super::proxy_protocol;
use super::stream::Stream;
use crate::forward::counters::count;
use crate::forward::gate::{Decision, SessionKey, Traffic, Transport};
use crate::forward::io::{EventSource, Io, STREAM_EVENTS};
use crate::forward::pending::{Client, PendingClients, TcpClient};
use crate::forward::quota::{ClientQuota, Permit, SourceNetwork};
use crate::forward::routes::Route;
use crate::forward::slab::{Key, Slab};
use crate::forward::snapshot::{ConnectionSnapshot, PortSnapshot};
use crate::pool::ProxyProtocol;
use crate::table::ListenPort;

/// How long a server may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);

/// The deadline that a connection has passed.
enum Late {
    /// For the server to accept it.
    Connecting,
    /// For its peers to acknowledge what they were sent before the end.
    Finished,
    /// For the next byte.
    Idle,
}

/// What becomes of a connection that leaves the table of live ones.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Both sockets are closed, by a reset unless both directions have ended.
    Close,
    /// One side is lost; the other one gets the rest first.
    FinalFlush,
}

/// A thread's TCP part.
pub(in crate::forward) struct Streams {
    acceptor: Acceptor,
    quota: Arc<ClientQuota>,
    connections: Slab<Connection>,
    /// Connections that want another turn.
    ready: Vec<Key>,
    liveness: Liveness,
    coalescing: Coalescing,
    final_flushes: FinalFlushes,
}

impl Streams {
    pub(in crate::forward) fn new(
        quota: Arc<ClientQuota>,
        peer_timeout: Duration,
        now: Instant,
    ) -> std::io::Result<Self> {
        Ok(Self {
            acceptor: Acceptor::default(),
            quota,
            connections: Slab::default(),
            ready: Vec::new(),
            liveness: Liveness::new(peer_timeout),
            coalescing: Coalescing::new(now),
            final_flushes: FinalFlushes::new()?,
        })
    }

    /// Makes room for `ports` more ports.
    pub(in crate::forward) fn reserve(&mut self, ports: usize) {
        self.acceptor.reserve(ports);
    }

    pub(in crate::forward) fn open_port(
        &mut self,
        port: ListenPort,
        listener: TcpListener,
        io: &Io,
    ) -> rustix::io::Result<()> {
        self.acceptor.open(port, listener, io)
    }

    /// Closes a port. Its connections go on.
    pub(in crate::forward) fn close_port(&mut self, port: ListenPort) {
        self.acceptor.close(port);
    }

    /// Whether connections want a turn without an event.
    pub(in crate::forward) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The time of the next poll of busy connections, if there are any.
    pub(in crate::forward) fn next_poll(&self) -> Option<Instant> {
        self.coalescing.next_poll()
    }

    pub(in crate::forward) fn has_deadlines(&self) -> bool {
        self.connections.len() > 0 || !self.final_flushes.is_empty() || self.acceptor.has_pause()
    }

    /// Accepts one client and asks the gate about it. Returns whether one waited.
    pub(in crate::forward) fn accept(
        &mut self,
        port: ListenPort,
        pending: &mut PendingClients,
        io: &mut Io,
    ) -> bool {
        let (socket, address) = match self.acceptor.accept(port, io) {
            Accepted::Client { socket, address } => (socket, address),
            Accepted::Gone => return true,
            Accepted::Nothing => return false,
        };
        match self.quota.acquire(SourceNetwork::of(address.ip()), port) {
            Ok(permit) => {
                let client = TcpClient {
                    port,
                    socket,
                    address,
                    permit,
                };
                self.meet(client, pending, io);
            }
            Err(exceeded) => {
                count(io.counters.exceeded(exceeded));
                socket.reset_on_close();
            }
        }
        true
    }

    /// Asks the gate about a client and does what it decides.
    pub(in crate::forward) fn meet(
        &mut self,
        client: TcpClient,
        pending: &mut PendingClients,
        io: &mut Io,
    ) {
        match io.gate.admit(client.port, Transport::Tcp, client.address) {
            Decision::Admit(session) => self.connect(client, session, io),
            Decision::Refuse => {
                count(&io.counters.no_session);
                client.socket.reset_on_close();
            }
            Decision::Ask => pending.ask(Client::Tcp(client), io),
        }
    }

    /// Connects an admitted client with its server.
    pub(in crate::forward) fn connect(
        &mut self,
        client: TcpClient,
        session: SessionKey,
        io: &mut Io,
    ) {
        count(&io.counters.tcp_opened);
        // A port may be closed while its client is pending.
        let route = io.routes.get(client.port);
        let server = match route.map(|route| connect(route.target)) {
            Some(Ok(server)) => server,
            failed => {
                match failed {
                    Some(Err(errno)) => count(io.counters.unreachable(errno)),
                    _ => count(&io.counters.no_server),
                }
                let port = client.port;
                client.socket.reset_on_close();
                drop(client);
                return io.report(port, session, Traffic::default());
            }
        };
        let header = route.and_then(|route| header(&client, route));
        let connection = Connection::start(client, session, server, header, io.now);
        self.add(connection, io);
    }

    /// Takes in a connection, and moves its first bytes.
    fn add(&mut self, connection: Connection, io: &mut Io) {
        let of = (connection.port, connection.session);
        let key = self.connections.insert(connection);
        self.liveness.add(key);
        io.sessions.add(of, Transport::Tcp, key);
        io.schedule();
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        // A near server is connected by now, and the client's first bytes may
        // be there: one event less.
        let outcome = connection.event(Side::Client, Signals::READABLE, &mut io.scratch);
        let goes_on = match outcome {
            Outcome::Waiting | Outcome::Ready => true,
            Outcome::Finished => !connection.is_delivered(),
            Outcome::Broken | Outcome::Unreachable(_) => false,
        };
        if goes_on && watch_both(connection, key, io).is_err() {
            count(&io.counters.accept_failed);
            return self.end(key, End::Close, io);
        }
        self.conclude(key, outcome, io);
    }

    /// Handles what epoll reports about one side of a connection.
    pub(in crate::forward) fn handle_event(
        &mut self,
        key: Key,
        side: Side,
        signals: Signals,
        io: &mut Io,
    ) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let before = connection.position();
        let outcome = connection.event(side, signals, &mut io.scratch);
        // A finished one moves nothing more, so the time that it waits for its
        // peers does not begin anew.
        if connection.position() != before {
            connection.active = io.now;
        }
        // The other side may take nothing, and so never show it.
        let is_waiting = matches!(outcome, Outcome::Waiting | Outcome::Ready);
        if signals.failed && is_waiting && connection.has_lost(side) {
            return self.end(key, End::FinalFlush, io);
        }
        self.conclude(key, outcome, io);
        self.coalescing.add_if_busy(key, &mut self.connections, io);
    }

    /// Continues the final flush `key`.
    pub(in crate::forward) fn continue_flush(&mut self, key: Key, io: &mut Io) {
        self.final_flushes.continue_flush(key, io);
    }

    /// Gives a turn to the connections that want one.
    pub(in crate::forward) fn pump_ready(&mut self, io: &mut Io) {
        for key in std::mem::take(&mut self.ready) {
            if let Some(connection) = self.connections.get_mut(key) {
                let outcome = connection.pump(&mut io.scratch);
                self.conclude(key, outcome, io);
            }
        }
    }

    /// Polls the busy connections.
    pub(in crate::forward) fn poll_busy(&mut self, io: &mut Io) {
        let was_single = self.coalescing.is_single();
        for source in self.coalescing.take_sources() {
            let key = source.key;
            if let Some(connection) = self.connections.get_mut(key) {
                let outcome = self.coalescing.poll(source, connection, io);
                self.conclude(key, outcome, io);
            }
        }
        self.coalescing.end_poll(io.now);
        if self.coalescing.is_single() && !was_single {
            self.coalescing.update_watches(&mut self.connections, io);
        }
    }

    fn conclude(&mut self, key: Key, outcome: Outcome, io: &mut Io) {
        match outcome {
            Outcome::Waiting => {}
            Outcome::Ready => self.ready.push(key),
            Outcome::Finished => self.end_if_delivered(key, io),
            Outcome::Broken => self.end(key, End::FinalFlush, io),
            Outcome::Unreachable(errno) => {
                count(io.counters.unreachable(errno));
                self.end(key, End::Close, io);
            }
        }
    }

    /// Ends a finished connection once both peers have everything: when Linux
    /// runs out of memory, it discards what closed sockets hold. An event
    /// reports each peer that has everything.
    fn end_if_delivered(&mut self, key: Key, io: &mut Io) {
        let connection = self.connections.get_mut(key);
        if connection.is_some_and(|connection| connection.is_delivered()) {
            self.end(key, End::Close, io);
        }
    }

    /// Ends a connection. Every live connection ends here, and a final flush
    /// that begins here ends in [`FinalFlushes`].
    fn end(&mut self, key: Key, end: End, io: &mut Io) {
        let Some(mut connection) = self.connections.remove(key) else {
            return;
        };
        let (port, session, traffic) = (connection.port, connection.session, connection.carried());
        io.sessions.remove((port, session), Transport::Tcp, key);
        match end {
            End::FinalFlush => self.final_flushes.start(connection, io),
            End::Close => {
                connection.give_back_pipes(&mut io.scratch.pipes);
                if !connection.is_finished() {
                    connection.reset();
                }
                // Closed before it is reported: a free port has no connection.
                drop(connection);
                io.report(port, session, traffic);
            }
        }
    }

    /// Ends a connection whose session is cut.
    pub(in crate::forward) fn cut(&mut self, key: Key, io: &mut Io) {
        let connection = self.connections.get_mut(key);
        // One that has ended in order and waits for its peers is not cut.
        if !connection.is_some_and(|connection| connection.is_finished()) {
            count(&io.counters.cut);
        }
        self.end(key, End::Close, io);
    }

    /// Ends the final flushes on `port` of a session that is cut.
    pub(in crate::forward) fn cut_final_flushes(
        &mut self,
        port: ListenPort,
        session: SessionKey,
        io: &mut Io,
    ) {
        self.final_flushes.cut(port, session, io);
    }

    pub(in crate::forward) fn tick(&mut self, io: &mut Io) {
        self.acceptor.tick(io);
        for connection in self.connections.iter_mut() {
            connection.give_back_idle_pipes(&mut io.scratch.pipes);
        }
        io.scratch.pipes.close_unused();
        self.liveness.tick(&mut self.connections);
        self.end_late(io);
        self.final_flushes.tick(io);
    }

    /// Ends the connections that have passed a deadline.
    fn end_late(&mut self, io: &mut Io) {
        let idle = io.idle_times.tcp();
        let late = self.connections.iter().filter_map(|(key, connection)| {
            let quiet = io.now.duration_since(connection.active);
            let (is_late, late) = if connection.is_connecting {
                (quiet >= CONNECT_DEADLINE, Late::Connecting)
            } else if connection.is_finished() {
                (quiet >= final_flush::DEADLINE, Late::Finished)
            } else {
                (idle.is_some_and(|idle| quiet >= idle), Late::Idle)
            };
            is_late.then_some((key, late))
        });
        let late: Vec<(Key, Late)> = late.collect();
        for (key, late) in late {
            match late {
                Late::Connecting => count(io.counters.unreachable(Errno::TIMEDOUT)),
                // From now on only the kernel delivers the rest.
                Late::Finished => {}
                Late::Idle => count(&io.counters.idle),
            }
            self.end(key, End::Close, io);
        }
    }

    /// Stops read coalescing. Comes before [`Streams::export`], while the
    /// sockets are still registered.
    pub(in crate::forward) fn stop_coalescing(&mut self, io: &Io) {
        self.coalescing.stop(&mut self.connections, io);
    }

    /// Takes out all ports.
    pub(in crate::forward) fn export_ports(&mut self) -> impl Iterator<Item = PortSnapshot> {
        self.acceptor.export()
    }

    /// Takes out all connections.
    pub(in crate::forward) fn export(&mut self, io: &mut Io) -> Vec<ConnectionSnapshot> {
        self.ready.clear();
        self.liveness.clear();
        let mut connections = self.final_flushes.export(io);
        let (now, pipes) = (io.now, &mut io.scratch.pipes);
        let live = self.connections.drain();
        connections.extend(live.map(|connection| connection.export(now, pipes)));
        connections
    }

    /// Continues an exported connection.
    pub(in crate::forward) fn import(
        &mut self,
        snapshot: ConnectionSnapshot,
        permit: Option<Permit>,
        io: &mut Io,
    ) {
        let is_broken = snapshot.is_broken;
        let connection = Connection::import(snapshot, permit, io.now);
        if is_broken {
            self.final_flushes.start(connection, io);
        } else {
            self.add(connection, io);
        }
    }
}

/// The header that the server gets first, if its port has one.
fn header(client: &TcpClient, route: Route) -> Option<Vec<u8>> {
    let has_header = route.proxy_protocol == ProxyProtocol::V2;
    has_header.then(|| {
        let local = local_address(&client.socket);
        proxy_protocol::header(client.address, local.unwrap_or(client.address))
    })
}

fn local_address(socket: &OwnedFd) -> Option<SocketAddr> {
    SocketAddr::try_from(net::getsockname(socket).ok()?).ok()
}

/// Registers both sockets for as long as they live.
fn watch_both(connection: &Connection, key: Key, io: &Io) -> rustix::io::Result<()> {
    let client = EventSource::Client.of_key(key);
    let server = EventSource::Server.of_key(key);
    io.watch(&connection.client, client, STREAM_EVENTS)?;
    io.watch(&connection.server, server, STREAM_EVENTS)
}
