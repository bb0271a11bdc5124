//! What is handed over, as messages of the protocol and back: one pair of
//! conversions for each kind. Descriptors travel beside the messages, so the
//! way back takes them too. What does not parse is an error: nothing is guessed.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::time::Duration;

use super::error::Error;
use super::v1;
use crate::connection::sessions::snapshot::CompanionSnapshot;
use crate::connection::sessions::snapshot::SessionSnapshot;
use crate::connection::sessions::span::Carried;
use crate::forward::snapshot::{
    ClientSnapshot, ConnectionSnapshot, DirectionSnapshot, FlowSnapshot, PortSnapshot,
};
use crate::forward::{SessionKey, Traffic, Transport};
use crate::session::SessionId;
use crate::table::{ListenPort, Slot};

impl From<&PortSnapshot> for v1::Port {
    fn from(port: &PortSnapshot) -> Self {
        Self {
            port: port.port.get().into(),
            is_udp: port.transport() == Transport::Udp,
            is_draining: port.is_draining,
        }
    }
}

impl TryFrom<(v1::Port, OwnedFd)> for PortSnapshot {
    type Error = Error;

    fn try_from((port, socket): (v1::Port, OwnedFd)) -> Result<Self, Error> {
        let transport = if port.is_udp {
            Transport::Udp
        } else {
            Transport::Tcp
        };
        let number = listen_port(port.port)?;
        Ok(Self::adopt(number, transport, port.is_draining, socket)?)
    }
}

impl From<&SessionSnapshot> for v1::Session {
    fn from(session: &SessionSnapshot) -> Self {
        Self {
            slot: session.slot.0,
            key: session.key.0,
            session: Some(session.session.clone().into()),
            connections: session.carried.connections,
            upstream_bytes: session.carried.traffic.upstream_bytes,
            downstream_bytes: session.carried.traffic.downstream_bytes,
            client: text(session.client),
            age_ms: millis(session.age),
        }
    }
}

impl TryFrom<v1::Session> for SessionSnapshot {
    type Error = Error;

    fn try_from(session: v1::Session) -> Result<Self, Error> {
        Ok(Self {
            slot: Slot(session.slot),
            key: SessionKey(session.key),
            session: (session.session)
                .ok_or(Error::Malformed("a session is empty"))?
                .try_into()?,
            carried: Carried {
                connections: session.connections,
                traffic: Traffic {
                    upstream_bytes: session.upstream_bytes,
                    downstream_bytes: session.downstream_bytes,
                },
            },
            client: parse_optional(&session.client)?,
            age: Duration::from_millis(session.age_ms),
        })
    }
}

impl From<&DirectionSnapshot> for v1::Direction {
    fn from(direction: &DirectionSnapshot) -> Self {
        Self {
            kept: direction.kept.clone(),
            is_urgent: direction.is_urgent,
            is_read: direction.is_read,
            is_done: direction.is_done,
            bytes: direction.bytes,
        }
    }
}

impl TryFrom<Option<v1::Direction>> for DirectionSnapshot {
    type Error = Error;

    fn try_from(direction: Option<v1::Direction>) -> Result<Self, Error> {
        let direction = direction.ok_or(Error::Malformed("a connection lacks a direction"))?;
        Ok(Self {
            kept: direction.kept,
            is_urgent: direction.is_urgent,
            is_read: direction.is_read,
            is_done: direction.is_done,
            bytes: direction.bytes,
        })
    }
}

impl From<&ConnectionSnapshot> for v1::Connection {
    fn from(connection: &ConnectionSnapshot) -> Self {
        Self {
            port: connection.port.get().into(),
            session: connection.session.0,
            is_connecting: connection.is_connecting,
            is_broken: connection.is_broken,
            idle_ms: millis(connection.idle),
            upstream: Some((&connection.upstream).into()),
            downstream: Some((&connection.downstream).into()),
        }
    }
}

/// The client's and the server's socket of a connection.
pub(super) struct Sockets {
    pub(super) client: OwnedFd,
    pub(super) server: OwnedFd,
}

impl TryFrom<(v1::Connection, Sockets)> for ConnectionSnapshot {
    type Error = Error;

    fn try_from((connection, sockets): (v1::Connection, Sockets)) -> Result<Self, Error> {
        Ok(Self {
            port: listen_port(connection.port)?,
            session: SessionKey(connection.session),
            client: sockets.client,
            server: sockets.server,
            is_connecting: connection.is_connecting,
            is_broken: connection.is_broken,
            idle: Duration::from_millis(connection.idle_ms),
            upstream: connection.upstream.try_into()?,
            downstream: connection.downstream.try_into()?,
        })
    }
}

impl From<&FlowSnapshot> for v1::Flow {
    fn from(flow: &FlowSnapshot) -> Self {
        Self {
            port: flow.port.get().into(),
            session: flow.session.0,
            client: flow.client.to_string(),
            local: text(flow.local),
            idle_ms: millis(flow.idle),
            upstream_bytes: flow.traffic.upstream_bytes,
            downstream_bytes: flow.traffic.downstream_bytes,
            is_assured: flow.is_assured,
            target: text(flow.target),
        }
    }
}

impl TryFrom<(v1::Flow, OwnedFd)> for FlowSnapshot {
    type Error = Error;

    fn try_from((flow, server): (v1::Flow, OwnedFd)) -> Result<Self, Error> {
        Ok(Self {
            port: listen_port(flow.port)?,
            session: SessionKey(flow.session),
            client: parse(&flow.client)?,
            local: parse_optional(&flow.local)?,
            server,
            idle: Duration::from_millis(flow.idle_ms),
            traffic: Traffic {
                upstream_bytes: flow.upstream_bytes,
                downstream_bytes: flow.downstream_bytes,
            },
            is_assured: flow.is_assured,
            target: parse_optional(&flow.target)?,
        })
    }
}

impl From<&ClientSnapshot> for v1::Client {
    fn from(client: &ClientSnapshot) -> Self {
        match client {
            ClientSnapshot::Tcp { port, address, .. } => Self {
                port: port.get().into(),
                address: address.to_string(),
                ..Self::default()
            },
            ClientSnapshot::Udp {
                port,
                address,
                local,
                datagrams,
            } => Self {
                port: port.get().into(),
                is_udp: true,
                address: address.to_string(),
                local: text(*local),
                datagrams: datagrams.clone(),
            },
        }
    }
}

impl TryFrom<(v1::Client, Option<OwnedFd>)> for ClientSnapshot {
    type Error = Error;

    fn try_from((client, socket): (v1::Client, Option<OwnedFd>)) -> Result<Self, Error> {
        let port = listen_port(client.port)?;
        let address: SocketAddr = parse(&client.address)?;
        if client.is_udp {
            return Ok(Self::Udp {
                port,
                address,
                local: parse_optional(&client.local)?,
                datagrams: client.datagrams,
            });
        }
        let socket = socket.ok_or(Error::Malformed("a TCP client has no socket"))?;
        Ok(Self::Tcp {
            port,
            socket,
            address,
        })
    }
}

impl From<&CompanionSnapshot> for v1::Companion {
    fn from(companion: &CompanionSnapshot) -> Self {
        Self {
            key: companion.key.0,
            slot: companion.slot.0,
            client: companion.client.to_string(),
        }
    }
}

impl TryFrom<v1::Companion> for CompanionSnapshot {
    type Error = Error;

    fn try_from(companion: v1::Companion) -> Result<Self, Error> {
        Ok(Self {
            key: SessionKey(companion.key),
            slot: Slot(companion.slot),
            client: parse(&companion.client)?,
        })
    }
}

pub(super) fn listen_port(number: u32) -> Result<ListenPort, Error> {
    let port = u16::try_from(number).ok().and_then(ListenPort::new);
    port.ok_or(Error::Malformed("a port is not between 1 and 65535"))
}

pub(super) fn session_id(text: &str) -> Result<SessionId, Error> {
    SessionId::new(text).ok_or(Error::Malformed("a session id has not 1 to 64 bytes"))
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn text(address: Option<impl ToString>) -> String {
    address.map_or_else(String::new, |address| address.to_string())
}

fn parse<T: FromStr>(text: &str) -> Result<T, Error> {
    let malformed = |_| Error::Malformed("an address does not parse");
    text.parse().map_err(malformed)
}

fn parse_optional<T: FromStr>(text: &str) -> Result<Option<T>, Error> {
    if text.is_empty() {
        return Ok(None);
    }
    parse(text).map(Some)
}
