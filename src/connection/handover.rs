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

mod socket;
#[cfg(test)]
mod tests;
mod wire;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::geteuid;
use tokio::time::Instant;

pub use self::socket::Socket;
use self::wire::{Content, Empty, MAX_DESCRIPTORS};
use super::agents::HandedAgents;
use super::forward::handover::{
    Handed, HandedClient, HandedConnection, HandedDirection, HandedFlow, HandedPort,
};
use super::forward::{Forwarder, SessionKey, Traffic, Transport};
use super::sessions::Sessions;
use super::sessions::handover::{HandedSession, HandedSessions};
use super::trace::Carried;
use crate::table::{ListenPort, Table, TableError};

/// Of the protocol between predecessor and successor. Others are refused.
pub const VERSION: u32 = 1;

/// How long the other side may take for its next frame. Streams stand still
/// meanwhile, so a successor that hangs is given up soon.
const FRAME_DEADLINE: Duration = Duration::from_secs(3);

/// How long the predecessor may take to answer the requests under way, and to
/// pause: its successor waits for that.
const PREPARE_DEADLINE: Duration = Duration::from_secs(15);

/// Bytes after which a frame of connections ends.
const FRAME_BYTES: usize = 1024 * 1024;

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
    Stranger {
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
    pub agents: HandedAgents,
    /// The table in use.
    pub table: Arc<Table>,
    /// The listener of the load-sharing port.
    pub load_sharing: OwnedFd,
    /// The listener of the admin port.
    pub admin: OwnedFd,
    /// What is known of sessions.
    pub sessions: HandedSessions,
    /// What the data plane has.
    pub handed: Handed,
}

impl State {
    /// Has `sessions` and `forwarder` go on with what was handed over. Returns
    /// the numbers of connections and flows.
    pub fn take_over(&mut self, sessions: &Sessions, forwarder: &Forwarder) -> (usize, usize) {
        let mut handed = std::mem::take(&mut self.handed);
        let known = std::mem::take(&mut self.sessions);
        let orphans = sessions.take_over(known, &self.table, handed.sessions());
        let has_session = |key: &SessionKey| !orphans.contains(key);
        handed
            .connections
            .retain(|connection| has_session(&connection.session));
        handed.flows.retain(|flow| has_session(&flow.session));
        let counts = (handed.connections.len(), handed.flows.len());
        // Sessions first: threads ask them at once.
        forwarder.take_over(handed, &self.table);
        counts
    }
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
        false => Err(Error::Stranger {
            found: found.as_raw(),
            ours: ours.as_raw(),
        }),
    }
}

fn send_server(stream: &UnixStream, state: &State) -> Result<(), Error> {
    let HandedAgents { id, reached } = &state.agents;
    let reached = reached.iter().map(|(slot, at)| wire::Reached {
        slot: *slot,
        ago_ms: millis(at.elapsed()),
    });
    let server = wire::Server {
        id: id.clone(),
        reached: reached.collect(),
        table: state.table.encode()?,
        last_key: state.sessions.last_key,
    };
    let listeners = [state.load_sharing.as_fd(), state.admin.as_fd()];
    wire::send(stream, Content::Server(server), &listeners)
}

fn send_state(stream: &UnixStream, state: &State) -> Result<(), Error> {
    send_server(stream, state)?;
    for ports in state.handed.ports.chunks(MAX_DESCRIPTORS) {
        let sockets: Vec<BorrowedFd<'_>> = ports.iter().map(HandedPort::as_fd).collect();
        let ports = ports.iter().map(encode_port).collect();
        wire::send(stream, Content::Ports(wire::Ports { ports }), &sockets)?;
    }
    let mut rest = state.handed.connections.as_slice();
    while !rest.is_empty() {
        let (now, later) = rest.split_at(frame_length(rest));
        rest = later;
        let sockets = now
            .iter()
            .flat_map(|c| [c.client.as_fd(), c.server.as_fd()]);
        let sockets: Vec<BorrowedFd<'_>> = sockets.collect();
        let connections = now.iter().map(encode_connection).collect();
        let content = Content::Connections(wire::Connections { connections });
        wire::send(stream, content, &sockets)?;
    }
    for flows in state.handed.flows.chunks(MAX_DESCRIPTORS) {
        let sockets: Vec<BorrowedFd<'_>> = flows.iter().map(|flow| flow.server.as_fd()).collect();
        let flows = flows.iter().map(encode_flow).collect();
        wire::send(stream, Content::Flows(wire::Flows { flows }), &sockets)?;
    }
    for clients in state.handed.clients.chunks(MAX_DESCRIPTORS) {
        let sockets = clients.iter().filter_map(|client| match client {
            HandedClient::Tcp { socket, .. } => Some(socket.as_fd()),
            HandedClient::Udp { .. } => None,
        });
        let sockets: Vec<BorrowedFd<'_>> = sockets.collect();
        let clients = clients.iter().map(encode_client).collect();
        wire::send(
            stream,
            Content::Clients(wire::Clients { clients }),
            &sockets,
        )?;
    }
    let HandedSessions { live, released, .. } = &state.sessions;
    let live = live.iter().map(|session| wire::Session {
        slot: session.slot,
        key: session.key.0,
        session: session.session.clone(),
        connections: session.carried.connections,
        upstream_bytes: session.carried.traffic.upstream_bytes,
        downstream_bytes: session.carried.traffic.downstream_bytes,
        client: encode_address(session.client),
        age_ms: millis(session.age),
    });
    let released = released.iter().map(|(id, slot)| wire::Released {
        id: id.clone(),
        slot: *slot,
    });
    let sessions = wire::Sessions {
        live: live.collect(),
        released: released.collect(),
    };
    wire::send(stream, Content::Sessions(sessions), &[])?;
    wire::send(stream, Content::Done(Empty {}), &[])
}

/// How many of `connections` go into the next frame: at least one.
fn frame_length(connections: &[HandedConnection]) -> usize {
    let mut bytes = 0;
    let fits = |connection: &&HandedConnection| {
        let before = bytes;
        bytes += connection.upstream.kept.len() + connection.downstream.kept.len();
        before < FRAME_BYTES
    };
    let most = connections.iter().take(MAX_DESCRIPTORS / 2);
    most.take_while(fits).count().max(1)
}

fn receive_state(stream: &UnixStream) -> Result<State, Error> {
    let (content, listeners) = wire::receive(stream)?;
    let server = match content {
        Content::Server(server) => server,
        Content::Abort(wire::Abort { reason }) => return Err(Error::Refused(reason)),
        _ => return Err(Error::Malformed("the first answer is no server")),
    };
    set_deadline(stream, FRAME_DEADLINE)?;
    let [load_sharing, admin] = <[OwnedFd; 2]>::try_from(listeners)
        .map_err(|_| Error::Malformed("a server has two listeners"))?;
    let now = Instant::now();
    let reached = server.reached.iter().map(|reached| {
        let ago = Duration::from_millis(reached.ago_ms);
        (reached.slot, now.checked_sub(ago).unwrap_or(now))
    });
    let mut state = State {
        agents: HandedAgents {
            id: server.id,
            reached: reached.collect(),
        },
        table: Arc::new(Table::decode(&server.table)?),
        load_sharing,
        admin,
        sessions: HandedSessions {
            last_key: server.last_key,
            ..HandedSessions::default()
        },
        handed: Handed::default(),
    };
    loop {
        let (content, sockets) = wire::receive(stream)?;
        match content {
            Content::Done(_) => return Ok(state),
            Content::Abort(wire::Abort { reason }) => return Err(Error::Refused(reason)),
            Content::Ports(ports) => adopt(&mut state.handed, &ports, sockets)?,
            content => add(&mut state, content, sockets)
                .ok_or(Error::Malformed("a frame's values make no sense"))?,
        }
    }
}

/// Adds a frame's ports. All that may fail about them is done here, while the
/// predecessor sends the others and can still go on.
fn adopt(handed: &mut Handed, ports: &wire::Ports, sockets: Vec<OwnedFd>) -> Result<(), Error> {
    if ports.ports.len() != sockets.len() {
        return Err(Error::Malformed("a connection port has one socket"));
    }
    for (port, socket) in ports.ports.iter().zip(sockets) {
        let number = decode_number(port.port).ok_or(Error::Malformed("a port has no number"))?;
        let transport = match port.is_udp {
            true => Transport::Udp,
            false => Transport::Tcp,
        };
        let adopted = HandedPort::adopt(number, transport, port.is_draining, socket)?;
        handed.ports.push(adopted);
    }
    Ok(())
}

/// Adds another frame's content to `state`; `None` when it makes no sense.
fn add(state: &mut State, content: Content, sockets: Vec<OwnedFd>) -> Option<()> {
    let mut sockets = sockets.into_iter();
    let handed = &mut state.handed;
    match content {
        Content::Connections(wire::Connections { connections }) => {
            for connection in connections {
                let pair = (sockets.next()?, sockets.next()?);
                handed
                    .connections
                    .push(decode_connection(connection, pair)?);
            }
        }
        Content::Flows(wire::Flows { flows }) => {
            for flow in flows {
                handed.flows.push(decode_flow(&flow, sockets.next()?)?);
            }
        }
        Content::Clients(wire::Clients { clients }) => {
            for client in clients {
                handed.clients.push(decode_client(client, &mut sockets)?);
            }
        }
        Content::Sessions(wire::Sessions { live, released }) => {
            for session in live {
                state.sessions.live.push(decode_session(session)?);
            }
            let released = released
                .into_iter()
                .map(|released| (released.id, released.slot));
            state.sessions.released.extend(released);
        }
        _ => return None,
    }
    sockets.next().is_none().then_some(())
}

fn encode_port(port: &HandedPort) -> wire::Port {
    wire::Port {
        port: port.port.get().into(),
        is_udp: port.transport() == Transport::Udp,
        is_draining: port.is_draining,
    }
}

fn decode_session(session: wire::Session) -> Option<HandedSession> {
    Some(HandedSession {
        slot: session.slot,
        key: SessionKey(session.key),
        session: session.session,
        carried: Carried {
            connections: session.connections,
            traffic: Traffic {
                upstream_bytes: session.upstream_bytes,
                downstream_bytes: session.downstream_bytes,
            },
        },
        client: decode_address(&session.client)?,
        age: Duration::from_millis(session.age_ms),
    })
}

fn encode_connection(connection: &HandedConnection) -> wire::Connection {
    let direction = |direction: &HandedDirection| wire::Direction {
        kept: direction.kept.clone(),
        is_read: direction.is_read,
        is_done: direction.is_done,
        bytes: direction.bytes,
    };
    wire::Connection {
        port: connection.port.get().into(),
        session: connection.session.0,
        is_connecting: connection.is_connecting,
        is_broken: connection.is_broken,
        idle_ms: millis(connection.idle),
        upstream: direction(&connection.upstream),
        downstream: direction(&connection.downstream),
    }
}

fn decode_connection(
    connection: wire::Connection,
    (client, server): (OwnedFd, OwnedFd),
) -> Option<HandedConnection> {
    let direction = |direction: wire::Direction| HandedDirection {
        kept: direction.kept,
        is_read: direction.is_read,
        is_done: direction.is_done,
        bytes: direction.bytes,
    };
    Some(HandedConnection {
        port: decode_number(connection.port)?,
        session: SessionKey(connection.session),
        client,
        server,
        is_connecting: connection.is_connecting,
        is_broken: connection.is_broken,
        idle: Duration::from_millis(connection.idle_ms),
        upstream: direction(connection.upstream),
        downstream: direction(connection.downstream),
    })
}

fn encode_flow(flow: &HandedFlow) -> wire::Flow {
    wire::Flow {
        port: flow.port.get().into(),
        session: flow.session.0,
        client: flow.client.to_string(),
        local: encode_address(flow.local),
        idle_ms: millis(flow.idle),
        upstream_bytes: flow.traffic.upstream_bytes,
        downstream_bytes: flow.traffic.downstream_bytes,
        is_assured: flow.is_assured,
    }
}

fn decode_flow(flow: &wire::Flow, server: OwnedFd) -> Option<HandedFlow> {
    Some(HandedFlow {
        port: decode_number(flow.port)?,
        session: SessionKey(flow.session),
        client: flow.client.parse().ok()?,
        local: decode_address(&flow.local)?,
        server,
        idle: Duration::from_millis(flow.idle_ms),
        traffic: Traffic {
            upstream_bytes: flow.upstream_bytes,
            downstream_bytes: flow.downstream_bytes,
        },
        is_assured: flow.is_assured,
    })
}

fn encode_client(client: &HandedClient) -> wire::Client {
    match client {
        HandedClient::Tcp { port, address, .. } => wire::Client {
            port: port.get().into(),
            address: address.to_string(),
            ..wire::Client::default()
        },
        HandedClient::Udp {
            port,
            address,
            local,
            datagrams,
        } => wire::Client {
            port: port.get().into(),
            is_udp: true,
            address: address.to_string(),
            local: encode_address(*local),
            datagrams: datagrams.clone(),
        },
    }
}

fn decode_client(
    client: wire::Client,
    sockets: &mut impl Iterator<Item = OwnedFd>,
) -> Option<HandedClient> {
    let port = decode_number(client.port)?;
    let address: SocketAddr = client.address.parse().ok()?;
    Some(match client.is_udp {
        false => HandedClient::Tcp {
            port,
            socket: sockets.next()?,
            address,
        },
        true => HandedClient::Udp {
            port,
            address,
            local: decode_address(&client.local)?,
            datagrams: client.datagrams,
        },
    })
}

fn decode_number(number: u32) -> Option<ListenPort> {
    ListenPort::new(u16::try_from(number).ok()?)
}

fn encode_address(address: Option<IpAddr>) -> String {
    address.map_or_else(String::new, |address| address.to_string())
}

fn decode_address(text: &str) -> Option<Option<IpAddr>> {
    match text {
        "" => Some(None),
        text => text.parse().ok().map(Some),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
