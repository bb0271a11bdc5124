//! Everything that goes from one process to the next, as the frames that carry
//! it, in the order of the picture in the parent's docs. The stream was opened
//! and checked by the parent, which also knows who has the state meanwhile and
//! what follows a fault.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::error::Error;
use super::v1::{self, Empty, frame::Content};
use super::values::{Sockets, listen_port, millis, session_id};
use super::wire::{self, FRAME_DEADLINE, MAX_DESCRIPTORS};
use crate::connection::agents::AgentsSnapshot;
use crate::connection::control::ControlSnapshot;
use crate::connection::sessions::snapshot::SessionsSnapshot;
use crate::forward::snapshot::{
    ClientSnapshot, ConnectionSnapshot, ForwarderSnapshot, PortSnapshot,
};
use crate::selection::ConnectionServerId;
use crate::table::{Slot, Table};

/// Bytes after which a frame of connections ends.
const FRAME_BYTES: usize = 1024 * 1024;

/// Most sessions of a frame: with the longest keys, the most metadata and all ports of a
/// connection server they take 24 MiB.
const SESSIONS_OF_FRAME: usize = 4096;

/// Everything that goes from one process to the next.
#[derive(Debug)]
pub struct State {
    /// The connection server's id, and when it last reached each agent.
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

impl State {
    /// Whether there are sessions of several ports.
    pub(super) fn has_several_ports(&self) -> bool {
        let mut live = self.control.sessions.live.iter();
        live.any(|live| !live.session.ports.rest.is_empty())
    }
}

/// Sends all of `state`, nothing of which may change meanwhile.
pub(super) fn send(stream: &UnixStream, state: &State) -> Result<(), Error> {
    send_server(stream, state)?;
    send_forwarder(stream, &state.control.forwarder)?;
    send_sessions(stream, &state.control.sessions)?;
    wire::send(stream, Content::Done(Empty {}), &[])
}

/// Sends the first frame.
pub(super) fn send_server(stream: &UnixStream, state: &State) -> Result<(), Error> {
    let AgentsSnapshot {
        id,
        host_identity,
        reached,
    } = &state.agents;
    let reached = reached.iter().map(|(slot, at)| v1::Reached {
        slot: slot.0,
        ago_ms: millis(at.elapsed()),
    });
    let server = v1::Server {
        id: id.to_string(),
        host_identity: host_identity.clone(),
        reached: reached.collect(),
        table: state.table.encode()?,
        last_key: state.control.sessions.last_key,
    };
    let listeners = [state.load_sharing.as_fd(), state.admin.as_fd()];
    wire::send(stream, Content::Server(server), &listeners)
}

fn send_forwarder(stream: &UnixStream, forwarder: &ForwarderSnapshot) -> Result<(), Error> {
    for ports in forwarder.ports.chunks(MAX_DESCRIPTORS) {
        let sockets: Vec<BorrowedFd<'_>> = ports.iter().map(PortSnapshot::as_fd).collect();
        let ports = ports.iter().map(v1::Port::from).collect();
        wire::send(stream, Content::Ports(v1::Ports { ports }), &sockets)?;
    }
    let mut rest = forwarder.connections.as_slice();
    while !rest.is_empty() {
        let (now, later) = rest.split_at(frame_length(rest));
        rest = later;
        let sockets = now
            .iter()
            .flat_map(|c| [c.client.as_fd(), c.server.as_fd()]);
        let sockets: Vec<BorrowedFd<'_>> = sockets.collect();
        let connections = now.iter().map(v1::Connection::from).collect();
        let content = Content::Connections(v1::Connections { connections });
        wire::send(stream, content, &sockets)?;
    }
    for flows in forwarder.flows.chunks(MAX_DESCRIPTORS) {
        let sockets: Vec<BorrowedFd<'_>> = flows.iter().map(|flow| flow.server.as_fd()).collect();
        let flows = flows.iter().map(v1::Flow::from).collect();
        wire::send(stream, Content::Flows(v1::Flows { flows }), &sockets)?;
    }
    for clients in forwarder.clients.chunks(MAX_DESCRIPTORS) {
        let sockets = clients.iter().filter_map(|client| match client {
            ClientSnapshot::Tcp { socket, .. } => Some(socket.as_fd()),
            ClientSnapshot::Udp { .. } => None,
        });
        let sockets: Vec<BorrowedFd<'_>> = sockets.collect();
        let clients = clients.iter().map(v1::Client::from).collect();
        wire::send(stream, Content::Clients(v1::Clients { clients }), &sockets)?;
    }
    Ok(())
}

/// How many of `connections` go into the next frame: at least one.
fn frame_length(connections: &[ConnectionSnapshot]) -> usize {
    let mut bytes = 0;
    let fits = |connection: &&ConnectionSnapshot| {
        let before = bytes;
        bytes += connection.upstream.kept.len() + connection.downstream.kept.len();
        before < FRAME_BYTES
    };
    let most = connections.iter().take(MAX_DESCRIPTORS / 2);
    most.take_while(fits).count().max(1)
}

fn send_sessions(stream: &UnixStream, sessions: &SessionsSnapshot) -> Result<(), Error> {
    let released = sessions.released.iter().map(|(id, slot)| v1::Released {
        id: id.to_string(),
        slot: slot.0,
    });
    let last_ended = sessions.last_ended.iter().map(|(port, id)| v1::LastEnded {
        port: port.get().into(),
        id: id.to_string(),
    });
    let ended = v1::Sessions {
        live: Vec::new(),
        released: released.collect(),
        last_ended: last_ended.collect(),
        companions: sessions.companions.iter().map(Into::into).collect(),
    };
    wire::send(stream, Content::Sessions(ended), &[])?;
    for live in sessions.live.chunks(SESSIONS_OF_FRAME) {
        let sessions = v1::Sessions {
            live: live.iter().map(v1::Session::from).collect(),
            ..v1::Sessions::default()
        };
        wire::send(stream, Content::Sessions(sessions), &[])?;
    }
    Ok(())
}

/// Receives all of a state. Its sockets must not be used yet: they are still
/// the predecessor's.
pub(super) fn receive(stream: &UnixStream) -> Result<State, Error> {
    let (content, listeners) = wire::receive(stream)?;
    let server = match content {
        Content::Server(server) => server,
        Content::Abort(v1::Abort { reason }) => return Err(Error::Refused(reason)),
        _ => return Err(Error::Malformed("the first answer is no server")),
    };
    wire::set_deadline(stream, FRAME_DEADLINE)?;
    let mut state = begin(server, listeners)?;
    loop {
        let (content, sockets) = wire::receive(stream)?;
        match content {
            Content::Done(_) => return Ok(state),
            Content::Abort(v1::Abort { reason }) => return Err(Error::Refused(reason)),
            content => add(&mut state, content, sockets)?,
        }
    }
}

/// The state after the first frame.
fn begin(server: v1::Server, listeners: Vec<OwnedFd>) -> Result<State, Error> {
    let [load_sharing, admin] = <[OwnedFd; 2]>::try_from(listeners)
        .map_err(|_| Error::Malformed("a server has two listeners"))?;
    let id = ConnectionServerId::new(&server.id).ok_or(Error::Malformed(
        "the id of a connection server has not 1 to 64 bytes",
    ))?;
    let now = Instant::now();
    let reached = server.reached.iter().map(|reached| {
        let ago = Duration::from_millis(reached.ago_ms);
        (Slot(reached.slot), now.checked_sub(ago).unwrap_or(now))
    });
    Ok(State {
        agents: AgentsSnapshot {
            id,
            host_identity: server.host_identity,
            reached: reached.collect(),
        },
        table: Arc::new(Table::decode(&server.table)?),
        load_sharing,
        admin,
        control: ControlSnapshot {
            sessions: SessionsSnapshot {
                last_key: server.last_key,
                ..SessionsSnapshot::default()
            },
            forwarder: ForwarderSnapshot::default(),
        },
    })
}

/// Adds the content of a further frame to `state`. All that may fail about a
/// port is done here, while the predecessor sends the others and can still go
/// on.
pub(super) fn add(state: &mut State, content: Content, sockets: Vec<OwnedFd>) -> Result<(), Error> {
    let mut sockets = sockets.into_iter();
    let mut socket = || {
        let missing = Error::Malformed("a frame lacks a descriptor");
        sockets.next().ok_or(missing)
    };
    let ControlSnapshot {
        sessions,
        forwarder,
    } = &mut state.control;
    match content {
        Content::Ports(v1::Ports { ports }) => {
            for port in ports {
                forwarder.ports.push((port, socket()?).try_into()?);
            }
        }
        Content::Connections(v1::Connections { connections }) => {
            for connection in connections {
                let sockets = Sockets {
                    client: socket()?,
                    server: socket()?,
                };
                forwarder
                    .connections
                    .push((connection, sockets).try_into()?);
            }
        }
        Content::Flows(v1::Flows { flows }) => {
            for flow in flows {
                forwarder.flows.push((flow, socket()?).try_into()?);
            }
        }
        Content::Clients(v1::Clients { clients }) => {
            for client in clients {
                let socket = if client.is_udp { None } else { Some(socket()?) };
                forwarder.clients.push((client, socket).try_into()?);
            }
        }
        Content::Sessions(received) => {
            for session in received.live {
                sessions.live.push(session.try_into()?);
            }
            for v1::Released { id, slot } in received.released {
                sessions.released.insert(session_id(&id)?, Slot(slot));
            }
            for companion in received.companions {
                sessions.companions.push(companion.try_into()?);
            }
            for v1::LastEnded { port, id } in received.last_ended {
                sessions
                    .last_ended
                    .insert(listen_port(port)?, session_id(&id)?);
            }
        }
        _ => return Err(Error::Malformed("a frame is out of place")),
    }
    if sockets.next().is_some() {
        return Err(Error::Malformed("a frame has too many descriptors"));
    }
    Ok(())
}
