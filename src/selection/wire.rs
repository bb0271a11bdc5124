//! Parses the generated messages and writes them. A value that does not parse
//! is an error that names the field; the only defaults are those that
//! `selection.proto` gives a meaning to, such as an empty key.
//!
//! A cause that is unknown here becomes `Unspecified`, because what it explains
//! must be carried out whatever the reason: a session that is over is over.
//!
//! - `to_agent`, `from_agent`: the messages of each direction;
//! - this file: what both have, and the errors.

mod from_agent;
mod to_agent;

use std::net::IpAddr;

use super::field::{
    FieldError, address, address_text, connection_port, idempotency_key, metadata,
    optional_address, protocol, session_id, timestamp, unix_ms,
};
use super::v1::{self, session};
use super::{MAX_CLIENTS, PROTOCOL_VERSION, Session};
use crate::session::{MAX_PORTS, OneOrMore, SessionPort, SessionState};

/// Why a message is not one of the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Nothing in it, or a kind of message that this version does not know.
    #[error("the message is empty or of an unknown kind")]
    Unknown,
    /// A greeting in another version of the protocol.
    #[error("protocol version {found} is not spoken here, only {PROTOCOL_VERSION}")]
    Version {
        /// The sender's version.
        found: u32,
    },
    /// A request with a bad field; the sender waits for an answer to it.
    #[error("request {request_id}: {source}")]
    Request {
        /// The request that is to be answered.
        request_id: u64,
        /// The kind of request.
        kind: RequestKind,
        /// The bad field.
        source: FieldError,
    },
    /// Another message with a bad field.
    #[error(transparent)]
    Field(#[from] FieldError),
}

/// The kinds of messages that are answered by request id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// [`super::ToAgent::Select`].
    Select,
    /// [`super::ToAgent::Lookup`].
    Lookup,
    /// [`super::ToAgent::Amend`].
    Amend,
}

impl TryFrom<v1::Session> for Session {
    type Error = FieldError;

    fn try_from(session: v1::Session) -> Result<Self, FieldError> {
        let state = match session.state() {
            session::State::Held => SessionState::Held,
            session::State::Busy => SessionState::Busy,
            session::State::Lingering => SessionState::Lingering,
            session::State::Unspecified => {
                let rule = "be HELD, BUSY or LINGERING";
                return Err(FieldError::new("state", &session.state, rule));
            }
        };
        Ok(Self {
            id: session_id(&session.session_id)?,
            idempotency_key: idempotency_key(session.idempotency_key)?,
            ports: OneOrMore {
                first: SessionPort {
                    port: connection_port(session.connection_port)?,
                    port_name: session.port_name,
                    protocol: protocol(&session.protocol)?,
                },
                rest: further_ports(session.further_ports)?,
            },
            bound_client: optional_address("bound_client", &session.bound_client)?,
            clients: clients(&session.clients)?,
            state,
            claim_deadline: timestamp("claim_deadline_ms", session.claim_deadline_ms)?,
            created: timestamp("created_ms", session.created_ms)?,
            lingering_since: match session.lingering_since_ms {
                0 => None,
                since => Some(timestamp("lingering_since_ms", since)?),
            },
            is_claimed: session.claimed,
            open_here: session.open_here,
            metadata: metadata(session.metadata)?,
            expires: match session.expires_ms {
                0 => None,
                expires => Some(timestamp("expires_ms", expires)?),
            },
            has_own_expiry: session.own_expiry,
            amended: match session.amended_ms {
                0 => None,
                amended => Some(timestamp("amended_ms", amended)?),
            },
            workload_metadata: metadata(session.workload_metadata)?,
            confirm_deadline: None,
        })
    }
}

fn further_ports(ports: Vec<v1::SessionPort>) -> Result<Box<[SessionPort]>, FieldError> {
    if ports.len() >= usize::from(MAX_PORTS) {
        let rule = "have at most 63 elements";
        return Err(FieldError::new("further_ports", &ports.len(), rule));
    }
    let port = |port: v1::SessionPort| {
        Ok(SessionPort {
            port: connection_port(port.connection_port)?,
            port_name: port.port_name,
            protocol: protocol(&port.protocol)?,
        })
    };
    ports.into_iter().map(port).collect()
}

fn clients(addresses: &[String]) -> Result<Vec<IpAddr>, FieldError> {
    if addresses.len() > MAX_CLIENTS {
        let rule = "have at most 64 elements";
        return Err(FieldError::new("clients", &addresses.len(), rule));
    }
    let addresses = addresses.iter();
    addresses.map(|text| address("clients", text)).collect()
}

impl From<SessionPort> for v1::SessionPort {
    fn from(port: SessionPort) -> Self {
        Self {
            connection_port: port.port.get().into(),
            port_name: port.port_name,
            protocol: port.protocol.name().to_owned(),
        }
    }
}

impl From<Session> for v1::Session {
    fn from(session: Session) -> Self {
        let OneOrMore { first, rest } = session.ports;
        let state = match session.state {
            SessionState::Held => session::State::Held,
            SessionState::Busy => session::State::Busy,
            SessionState::Lingering => session::State::Lingering,
        };
        Self {
            session_id: session.id.to_string(),
            idempotency_key: session.idempotency_key.unwrap_or_default(),
            connection_port: first.port.get().into(),
            port_name: first.port_name,
            protocol: first.protocol.name().to_owned(),
            further_ports: rest.into_iter().map(Into::into).collect(),
            bound_client: address_text(session.bound_client),
            clients: session.clients.iter().map(ToString::to_string).collect(),
            state: state.into(),
            claim_deadline_ms: unix_ms(session.claim_deadline),
            created_ms: unix_ms(session.created),
            lingering_since_ms: session.lingering_since.map_or(0, unix_ms),
            claimed: session.is_claimed,
            open_here: session.open_here,
            metadata: session.metadata.into(),
            expires_ms: session.expires.map_or(0, unix_ms),
            own_expiry: session.has_own_expiry,
            amended_ms: session.amended.map_or(0, unix_ms),
            workload_metadata: session.workload_metadata.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::pool::{MAX_PORT_NAME_LENGTH, PortProtocol};
    use crate::selection::{CLIENT_BYTES, SESSION_BYTES};
    use crate::session::MAX_KEY_CHARACTERS;

    fn session() -> v1::Session {
        v1::Session {
            session_id: "s".to_owned(),
            idempotency_key: "k".to_owned(),
            connection_port: 20_000,
            port_name: "main".to_owned(),
            protocol: "TCP".to_owned(),
            bound_client: "192.0.2.1".to_owned(),
            clients: vec!["192.0.2.1".to_owned(), "2001:db8::1".to_owned()],
            state: session::State::Busy.into(),
            claim_deadline_ms: 31_000,
            created_ms: 1_000,
            lingering_since_ms: 2_000,
            claimed: true,
            open_here: true,
            further_ports: vec![v1::SessionPort {
                connection_port: 20_002,
                port_name: "media".to_owned(),
                protocol: "UDP".to_owned(),
            }],
            metadata: [("map".to_owned(), "harbor".to_owned())].into(),
            expires_ms: 61_000,
            own_expiry: true,
            amended_ms: 3_000,
            workload_metadata: [("seat".to_owned(), "4".to_owned())].into(),
        }
    }

    #[test]
    fn a_session_is_written_as_it_was_read() {
        let read = Session::try_from(session()).unwrap();
        assert_eq!(read.ports.first.port.get(), 20_000);
        assert_eq!(read.ports.rest[0].port.get(), 20_002);
        assert_eq!(v1::Session::from(read), session());
        let bare = v1::Session {
            idempotency_key: String::new(),
            bound_client: String::new(),
            clients: Vec::new(),
            lingering_since_ms: 0,
            further_ports: Vec::new(),
            metadata: Default::default(),
            expires_ms: 0,
            amended_ms: 0,
            workload_metadata: Default::default(),
            ..session()
        };
        let read = Session::try_from(bare.clone()).unwrap();
        assert_eq!((&read.idempotency_key, read.bound_client), (&None, None));
        assert_eq!(read.lingering_since, None);
        assert_eq!(v1::Session::from(read), bare);
    }

    /// A greeting would be too long otherwise.
    #[test]
    fn a_session_takes_no_more_bytes_than_its_bound() {
        let most = u64::from(u32::MAX) << 16;
        let address = "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff";
        let mut largest = v1::Session {
            session_id: "s".repeat(64),
            idempotency_key: "\u{10ffff}".repeat(MAX_KEY_CHARACTERS),
            connection_port: 65_535,
            port_name: "n".repeat(MAX_PORT_NAME_LENGTH),
            protocol: PortProtocol::TCPUDP.name().to_owned(),
            bound_client: address.to_owned(),
            clients: vec![address.to_owned()],
            claim_deadline_ms: most,
            created_ms: most,
            lingering_since_ms: most,
            further_ports: Vec::new(),
            metadata: Default::default(),
            workload_metadata: Default::default(),
            expires_ms: most,
            amended_ms: most,
            ..session()
        };
        // Its tag and its length come before it.
        let bytes = |session: &v1::Session| 4 + session.encoded_len();
        assert!(bytes(&largest) <= SESSION_BYTES, "{}", bytes(&largest));
        let with_one = largest.encoded_len();
        largest.clients.push(address.to_owned());
        assert!(largest.encoded_len() - with_one <= CLIENT_BYTES);
        largest.further_ports = vec![
            v1::SessionPort {
                connection_port: 65_535,
                port_name: "n".repeat(MAX_PORT_NAME_LENGTH),
                protocol: PortProtocol::TCPUDP.name().to_owned(),
            };
            usize::from(MAX_PORTS) - 1
        ];
        assert!(bytes(&largest) <= SESSION_BYTES * usize::from(MAX_PORTS));
    }

    #[test]
    fn a_value_that_does_not_parse_is_named() {
        type Spoil = fn(&mut v1::Session);
        let cases: [(Spoil, &str); 12] = [
            (|session| session.session_id.clear(), "session_id \"\""),
            (
                |session| session.session_id = "x".repeat(65),
                "session_id \"xxx",
            ),
            (
                |session| session.idempotency_key = "x".repeat(129),
                "idempotency_key \"xxx",
            ),
            (|session| session.connection_port = 0, "connection_port 0"),
            (
                |session| session.connection_port = 65_536,
                "connection_port 65536",
            ),
            (
                |session| session.protocol = "SCTP".to_owned(),
                "protocol \"SCTP\"",
            ),
            (
                |session| session.bound_client = "anyone".to_owned(),
                "bound_client \"anyone\"",
            ),
            (
                |session| session.clients[1] = "anyone".to_owned(),
                "clients \"anyone\"",
            ),
            (
                |session| session.clients = vec!["192.0.2.1".to_owned(); 65],
                "clients 65",
            ),
            (|session| session.state = 9, "state 9"),
            (
                |session| {
                    session.metadata.insert("k".repeat(5_000), String::new());
                },
                "metadata Bytes(5009)",
            ),
            (
                |session| {
                    let keys = (0..64).map(|key| (key.to_string(), String::new()));
                    session.metadata.extend(keys);
                },
                "metadata Keys(65)",
            ),
        ];
        for (spoil, expected) in cases {
            let mut session = session();
            spoil(&mut session);
            let error = Session::try_from(session).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
            assert!(error.len() < 200, "a long value is cut off: {error}");
        }
    }
}
