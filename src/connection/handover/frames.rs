//! A [`State`] as the frames that carry it, in the order of the picture in the
//! parent's docs, and put together again from them. Speaks `wire` on a stream
//! that the parent has opened and checked; who has the state meanwhile, and what
//! follows a fault, is the parent's business.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::values::{
    decode_client, decode_connection, decode_flow, decode_number, decode_session, encode_client,
    encode_connection, encode_flow, encode_port, encode_session, millis,
};
use super::wire::{self, Content, Empty, MAX_DESCRIPTORS};
use super::{Error, FRAME_DEADLINE, State, set_deadline};
use crate::connection::agents::AgentsSnapshot;
use crate::connection::control::ControlSnapshot;
use crate::connection::sessions::snapshot::SessionsSnapshot;
use crate::forward::Transport;
use crate::forward::snapshot::{
    ClientSnapshot, ConnectionSnapshot, ForwarderSnapshot, PortSnapshot,
};
use crate::table::{Slot, Table};

/// Bytes after which a frame of connections ends.
const FRAME_BYTES: usize = 1024 * 1024;

/// Sends the first frame.
pub(super) fn send_server(stream: &UnixStream, state: &State) -> Result<(), Error> {
    let AgentsSnapshot { id, place, reached } = &state.agents;
    let reached = reached.iter().map(|(slot, at)| wire::Reached {
        slot: slot.0,
        ago_ms: millis(at.elapsed()),
    });
    let server = wire::Server {
        id: id.clone(),
        place: place.clone(),
        reached: reached.collect(),
        table: state.table.encode()?,
        last_key: state.control.sessions.last_key,
    };
    let listeners = [state.load_sharing.as_fd(), state.admin.as_fd()];
    wire::send(stream, Content::Server(server), &listeners)
}

/// Sends all of `state`, nothing of which may change meanwhile.
pub(super) fn send_state(stream: &UnixStream, state: &State) -> Result<(), Error> {
    send_server(stream, state)?;
    for ports in state.control.forwarder.ports.chunks(MAX_DESCRIPTORS) {
        let sockets: Vec<BorrowedFd<'_>> = ports.iter().map(PortSnapshot::as_fd).collect();
        let ports = ports.iter().map(encode_port).collect();
        wire::send(stream, Content::Ports(wire::Ports { ports }), &sockets)?;
    }
    let mut rest = state.control.forwarder.connections.as_slice();
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
    for flows in state.control.forwarder.flows.chunks(MAX_DESCRIPTORS) {
        let sockets: Vec<BorrowedFd<'_>> = flows.iter().map(|flow| flow.server.as_fd()).collect();
        let flows = flows.iter().map(encode_flow).collect();
        wire::send(stream, Content::Flows(wire::Flows { flows }), &sockets)?;
    }
    for clients in state.control.forwarder.clients.chunks(MAX_DESCRIPTORS) {
        let sockets = clients.iter().filter_map(|client| match client {
            ClientSnapshot::Tcp { socket, .. } => Some(socket.as_fd()),
            ClientSnapshot::Udp { .. } => None,
        });
        let sockets: Vec<BorrowedFd<'_>> = sockets.collect();
        let clients = clients.iter().map(encode_client).collect();
        wire::send(
            stream,
            Content::Clients(wire::Clients { clients }),
            &sockets,
        )?;
    }
    let SessionsSnapshot {
        live,
        released,
        over,
        ..
    } = &state.control.sessions;
    let live = live.iter().map(encode_session);
    let released = released.iter().map(|(id, slot)| wire::Released {
        id: id.clone(),
        slot: slot.0,
    });
    let over = over.iter().map(|(port, id)| wire::Over {
        port: port.get().into(),
        id: id.clone(),
    });
    let sessions = wire::Sessions {
        live: live.collect(),
        released: released.collect(),
        over: over.collect(),
    };
    wire::send(stream, Content::Sessions(sessions), &[])?;
    wire::send(stream, Content::Done(Empty {}), &[])
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

/// Receives all of a state. Its sockets are not to be touched yet: the
/// predecessor has not given them away.
pub(super) fn receive_state(stream: &UnixStream) -> Result<State, Error> {
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
        (Slot(reached.slot), now.checked_sub(ago).unwrap_or(now))
    });
    let mut state = State {
        agents: AgentsSnapshot {
            id: server.id,
            place: server.place,
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
    };
    loop {
        let (content, sockets) = wire::receive(stream)?;
        match content {
            Content::Done(_) => return Ok(state),
            Content::Abort(wire::Abort { reason }) => return Err(Error::Refused(reason)),
            Content::Ports(ports) => adopt(&mut state.control.forwarder, &ports, sockets)?,
            content => add(&mut state, content, sockets)
                .ok_or(Error::Malformed("a frame's values make no sense"))?,
        }
    }
}

/// Adds a frame's ports. All that may fail about them is done here, while the
/// predecessor sends the others and can still go on.
fn adopt(
    handed: &mut ForwarderSnapshot,
    ports: &wire::Ports,
    sockets: Vec<OwnedFd>,
) -> Result<(), Error> {
    if ports.ports.len() != sockets.len() {
        return Err(Error::Malformed("a connection port has one socket"));
    }
    for (port, socket) in ports.ports.iter().zip(sockets) {
        let number = decode_number(port.port).ok_or(Error::Malformed("a port has no number"))?;
        let transport = match port.is_udp {
            true => Transport::Udp,
            false => Transport::Tcp,
        };
        let adopted = PortSnapshot::adopt(number, transport, port.is_draining, socket)?;
        handed.ports.push(adopted);
    }
    Ok(())
}

/// Adds another frame's content to `state`; `None` when it makes no sense.
pub(super) fn add(state: &mut State, content: Content, sockets: Vec<OwnedFd>) -> Option<()> {
    let mut sockets = sockets.into_iter();
    let handed = &mut state.control.forwarder;
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
        Content::Sessions(wire::Sessions {
            live,
            released,
            over,
        }) => {
            for session in live {
                state.control.sessions.live.push(decode_session(session)?);
            }
            let released = released
                .into_iter()
                .map(|released| (released.id, Slot(released.slot)));
            state.control.sessions.released.extend(released);
            for wire::Over { port, id } in over {
                state.control.sessions.over.push((decode_number(port)?, id));
            }
        }
        _ => return None,
    }
    sockets.next().is_none().then_some(())
}
