//! What is handed over, as the messages of `wire` and back: one pair of functions
//! for each kind. Pure; descriptors travel beside the messages and are given to
//! `decode_…`, which answers `None` for what makes no sense.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::wire;
use crate::connection::sessions::snapshot::SessionSnapshot;
use crate::connection::sessions::span::Carried;
use crate::forward::snapshot::{
    ClientSnapshot, ConnectionSnapshot, DirectionSnapshot, FlowSnapshot, PortSnapshot,
};
use crate::forward::{SessionKey, Traffic, Transport};
use crate::table::{ListenPort, Slot};

pub(super) fn encode_port(port: &PortSnapshot) -> wire::Port {
    wire::Port {
        port: port.port.get().into(),
        is_udp: port.transport() == Transport::Udp,
        is_draining: port.is_draining,
    }
}

pub(super) fn encode_session(session: &SessionSnapshot) -> wire::Session {
    wire::Session {
        slot: session.slot.0,
        key: session.key.0,
        session: session.session.clone(),
        connections: session.carried.connections,
        upstream_bytes: session.carried.traffic.upstream_bytes,
        downstream_bytes: session.carried.traffic.downstream_bytes,
        client: encode_address(session.client),
        age_ms: millis(session.age),
    }
}

pub(super) fn decode_session(session: wire::Session) -> Option<SessionSnapshot> {
    Some(SessionSnapshot {
        slot: Slot(session.slot),
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

pub(super) fn encode_connection(connection: &ConnectionSnapshot) -> wire::Connection {
    let direction = |direction: &DirectionSnapshot| wire::Direction {
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

pub(super) fn decode_connection(
    connection: wire::Connection,
    (client, server): (OwnedFd, OwnedFd),
) -> Option<ConnectionSnapshot> {
    let direction = |direction: wire::Direction| DirectionSnapshot {
        kept: direction.kept,
        is_read: direction.is_read,
        is_done: direction.is_done,
        bytes: direction.bytes,
    };
    Some(ConnectionSnapshot {
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

pub(super) fn encode_flow(flow: &FlowSnapshot) -> wire::Flow {
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

pub(super) fn decode_flow(flow: &wire::Flow, server: OwnedFd) -> Option<FlowSnapshot> {
    Some(FlowSnapshot {
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

pub(super) fn encode_client(client: &ClientSnapshot) -> wire::Client {
    match client {
        ClientSnapshot::Tcp { port, address, .. } => wire::Client {
            port: port.get().into(),
            address: address.to_string(),
            ..wire::Client::default()
        },
        ClientSnapshot::Udp {
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

pub(super) fn decode_client(
    client: wire::Client,
    sockets: &mut impl Iterator<Item = OwnedFd>,
) -> Option<ClientSnapshot> {
    let port = decode_number(client.port)?;
    let address: SocketAddr = client.address.parse().ok()?;
    Some(match client.is_udp {
        false => ClientSnapshot::Tcp {
            port,
            socket: sockets.next()?,
            address,
        },
        true => ClientSnapshot::Udp {
            port,
            address,
            local: decode_address(&client.local)?,
            datagrams: client.datagrams,
        },
    })
}

pub(super) fn decode_number(number: u32) -> Option<ListenPort> {
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

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
