//! Parses the generated messages and writes them. A value that does not parse
//! is an error that names the field; the only defaults are those that
//! `selection.proto` gives a meaning to, such as an empty key.
//!
//! A cause that is unknown here becomes `Unspecified`, because what it explains
//! must be carried out whatever the reason: a session that is over is over.

use std::fmt::Debug;

use super::field::{
    FieldError, address_text, bound_client, connection_port, idempotency_key, optional, protocol,
    session_id, timestamp, unix_ms,
};
use super::v1::{self, end, from_agent, refused, session, to_agent};
use super::{
    ConnectionServerId, Counts, EndCause, FromAgent, Hello, PROTOCOL_VERSION, RefusalCause, Select,
    Session, ToAgent, Welcome,
};
use crate::pool::{MAX_PORT_NAME_LENGTH, PortProtocol};
use crate::session::{PortFilter, PortState, SessionId, SessionState};

/// Longest host identity of a connection server, in bytes: boot, host, network
/// namespace and address take half of it.
const MAX_HOST_IDENTITY_BYTES: usize = 256;

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
    /// [`ToAgent::Select`].
    Select,
    /// [`ToAgent::Lookup`].
    Lookup,
}

impl TryFrom<v1::ToAgent> for ToAgent {
    type Error = MessageError;

    fn try_from(message: v1::ToAgent) -> Result<Self, MessageError> {
        use to_agent::Message;
        Ok(match message.message.ok_or(MessageError::Unknown)? {
            Message::Hello(hello) => Self::Hello(hello.try_into()?),
            Message::TableUpdate(v1::TableUpdate { table }) => Self::TableUpdate(table),
            Message::Select(select) => {
                let request_id = select.request_id;
                let parsed = select.try_into();
                Self::Select(parsed.map_err(|source| MessageError::Request {
                    request_id,
                    kind: RequestKind::Select,
                    source,
                })?)
            }
            Message::Opened(v1::Opened { session_id: id }) => Self::Opened(session_id(&id)?),
            Message::Closed(closed) => Self::Closed {
                session_id: session_id(&closed.session_id)?,
                is_claimed: !closed.unclaimed,
            },
            Message::Release(v1::Release { session_id: id }) => Self::Release(session_id(&id)?),
            Message::Ended(v1::Ended { session_id: id }) => Self::Ended(session_id(&id)?),
            Message::Lookup(v1::Lookup {
                request_id,
                connection_port: number,
            }) => {
                let port = connection_port(number);
                let port = port.map_err(|source| MessageError::Request {
                    request_id,
                    kind: RequestKind::Lookup,
                    source,
                })?;
                Self::Lookup { request_id, port }
            }
            Message::Goodbye(v1::Goodbye {}) => Self::Goodbye,
        })
    }
}

impl From<ToAgent> for v1::ToAgent {
    fn from(message: ToAgent) -> Self {
        use to_agent::Message;
        let session_id = |id: SessionId| id.to_string();
        let message = match message {
            ToAgent::Hello(hello) => Message::Hello(hello.into()),
            ToAgent::TableUpdate(table) => Message::TableUpdate(v1::TableUpdate { table }),
            ToAgent::Select(select) => Message::Select(select.into()),
            ToAgent::Opened(id) => Message::Opened(v1::Opened {
                session_id: session_id(id),
            }),
            ToAgent::Closed {
                session_id,
                is_claimed,
            } => Message::Closed(v1::Closed {
                session_id: session_id.to_string(),
                unclaimed: !is_claimed,
            }),
            ToAgent::Release(id) => Message::Release(v1::Release {
                session_id: session_id(id),
            }),
            ToAgent::Ended(id) => Message::Ended(v1::Ended {
                session_id: session_id(id),
            }),
            ToAgent::Lookup { request_id, port } => Message::Lookup(v1::Lookup {
                request_id,
                connection_port: port.get().into(),
            }),
            ToAgent::Goodbye => Message::Goodbye(v1::Goodbye {}),
        };
        Self {
            message: Some(message),
        }
    }
}

impl TryFrom<v1::Hello> for Hello {
    type Error = MessageError;

    /// The version comes first: what another version means by the other fields
    /// is not known.
    fn try_from(hello: v1::Hello) -> Result<Self, MessageError> {
        if hello.protocol_version != PROTOCOL_VERSION {
            let found = hello.protocol_version;
            return Err(MessageError::Version { found });
        }
        let connection_server = ConnectionServerId::new(&hello.connection_server);
        let connection_server = connection_server.ok_or_else(|| {
            let value = &hello.connection_server;
            FieldError::new("connection_server", value, "have 1 to 64 bytes")
        })?;
        if hello.host_identity.len() > MAX_HOST_IDENTITY_BYTES {
            let rule = "have at most 256 bytes";
            return Err(FieldError::new("host_identity", &hello.host_identity, rule).into());
        }
        let sessions = hello.sessions.into_iter().map(Session::try_from);
        Ok(Self {
            pool_uid: hello.pool_uid,
            connection_server,
            table: hello.table,
            sessions: sessions.collect::<Result<_, _>>()?,
            host_identity: hello.host_identity,
        })
    }
}

impl From<Hello> for v1::Hello {
    fn from(hello: Hello) -> Self {
        Self {
            protocol_version: PROTOCOL_VERSION,
            pool_uid: hello.pool_uid,
            connection_server: hello.connection_server.to_string(),
            table: hello.table,
            sessions: hello.sessions.into_iter().map(Into::into).collect(),
            host_identity: hello.host_identity,
        }
    }
}

impl TryFrom<v1::Select> for Select {
    type Error = FieldError;

    fn try_from(select: v1::Select) -> Result<Self, FieldError> {
        let rule = "have at most 15 bytes";
        Ok(Self {
            request_id: select.request_id,
            session_id: session_id(&select.session_id)?,
            idempotency_key: idempotency_key(select.idempotency_key)?,
            filter: PortFilter {
                port_name: optional("port_name", select.port_name, MAX_PORT_NAME_LENGTH, rule)?,
                protocol: match select.protocol.as_str() {
                    "" => None,
                    name => Some(protocol(name)?),
                },
            },
            bound_client: bound_client(&select.bound_client)?,
        })
    }
}

impl From<Select> for v1::Select {
    fn from(select: Select) -> Self {
        let protocol = select.filter.protocol.map(PortProtocol::name);
        Self {
            request_id: select.request_id,
            session_id: select.session_id.to_string(),
            idempotency_key: select.idempotency_key.unwrap_or_default(),
            port_name: select.filter.port_name.unwrap_or_default(),
            protocol: protocol.unwrap_or_default().to_owned(),
            bound_client: address_text(select.bound_client),
        }
    }
}

impl TryFrom<v1::FromAgent> for FromAgent {
    type Error = MessageError;

    fn try_from(message: v1::FromAgent) -> Result<Self, MessageError> {
        use from_agent::Message;
        Ok(match message.message.ok_or(MessageError::Unknown)? {
            Message::Welcome(welcome) => Self::Welcome(Welcome {
                agent: welcome.agent,
                generation: welcome.generation,
            }),
            Message::Counts(counts) => Self::Counts(counts.try_into()?),
            Message::Selected(v1::Selected {
                request_id,
                session,
                counts,
            }) => {
                let missing = |name| FieldError::new(name, &None::<()>, "be there");
                Self::Selected {
                    request_id,
                    session: session.ok_or_else(|| missing("session"))?.try_into()?,
                    counts: counts.ok_or_else(|| missing("counts"))?.try_into()?,
                }
            }
            Message::Refused(refused) => Self::Refused {
                request_id: refused.request_id,
                cause: refused.cause().into(),
            },
            Message::Session(session) => Self::Session(session.try_into()?),
            Message::End(end) => Self::End {
                session_id: session_id(&end.session_id)?,
                cause: end.cause().into(),
            },
            Message::LookedUp(v1::LookedUp {
                request_id,
                session,
            }) => Self::LookedUp {
                request_id,
                session: session.map(Session::try_from).transpose()?,
            },
        })
    }
}

impl From<FromAgent> for v1::FromAgent {
    fn from(message: FromAgent) -> Self {
        use from_agent::Message;
        let message = match message {
            FromAgent::Welcome(Welcome { agent, generation }) => Message::Welcome(v1::Welcome {
                protocol_version: PROTOCOL_VERSION,
                agent,
                generation,
            }),
            FromAgent::Counts(counts) => Message::Counts(counts.into()),
            FromAgent::Selected {
                request_id,
                session,
                counts,
            } => Message::Selected(v1::Selected {
                request_id,
                session: Some(session.into()),
                counts: Some(counts.into()),
            }),
            FromAgent::Refused { request_id, cause } => Message::Refused(v1::Refused {
                request_id,
                cause: refused::Cause::from(cause).into(),
            }),
            FromAgent::Session(session) => Message::Session(session.into()),
            FromAgent::End { session_id, cause } => Message::End(v1::End {
                session_id: session_id.to_string(),
                cause: end::Cause::from(cause).into(),
            }),
            FromAgent::LookedUp {
                request_id,
                session,
            } => Message::LookedUp(v1::LookedUp {
                request_id,
                session: session.map(Into::into),
            }),
        };
        Self {
            message: Some(message),
        }
    }
}

impl TryFrom<v1::Counts> for Counts {
    type Error = FieldError;

    fn try_from(counts: v1::Counts) -> Result<Self, FieldError> {
        let ports = counts.ports.into_iter().map(|ports| {
            Ok(PortState {
                protocol: protocol(&ports.protocol)?,
                name: ports.name,
                free: ports.free,
                held: ports.held,
                busy: ports.busy,
                lingering: ports.lingering,
                not_listening: ports.not_listening,
            })
        });
        Ok(Self {
            ports: ports.collect::<Result<_, _>>()?,
            draining: counts.draining,
            returning: counts.returning,
        })
    }
}

impl From<Counts> for v1::Counts {
    fn from(counts: Counts) -> Self {
        let ports = counts.ports.into_iter().map(|ports| v1::PortCounts {
            name: ports.name,
            protocol: ports.protocol.name().to_owned(),
            free: ports.free,
            held: ports.held,
            busy: ports.busy,
            lingering: ports.lingering,
            not_listening: ports.not_listening,
        });
        Self {
            ports: ports.collect(),
            draining: counts.draining,
            returning: counts.returning,
        }
    }
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
            port: connection_port(session.connection_port)?,
            port_name: session.port_name,
            protocol: protocol(&session.protocol)?,
            bound_client: bound_client(&session.bound_client)?,
            state,
            claim_deadline: timestamp("claim_deadline_ms", session.claim_deadline_ms)?,
            created: timestamp("created_ms", session.created_ms)?,
            lingering_since: match session.lingering_since_ms {
                0 => None,
                since => Some(timestamp("lingering_since_ms", since)?),
            },
            is_claimed: session.claimed,
            open_here: session.open_here,
        })
    }
}

impl From<Session> for v1::Session {
    fn from(session: Session) -> Self {
        let state = match session.state {
            SessionState::Held => session::State::Held,
            SessionState::Busy => session::State::Busy,
            SessionState::Lingering => session::State::Lingering,
        };
        Self {
            session_id: session.id.to_string(),
            idempotency_key: session.idempotency_key.unwrap_or_default(),
            connection_port: session.port.get().into(),
            port_name: session.port_name,
            protocol: session.protocol.name().to_owned(),
            bound_client: address_text(session.bound_client),
            state: state.into(),
            claim_deadline_ms: unix_ms(session.claim_deadline),
            created_ms: unix_ms(session.created),
            lingering_since_ms: session.lingering_since.map_or(0, unix_ms),
            claimed: session.is_claimed,
            open_here: session.open_here,
        }
    }
}

/// Converts a cause between the domain and the wire, and names it for metrics
/// and logs as the wire does.
macro_rules! cause {
    ($domain:ty, $wire:ty, $($variant:ident)*) => {
        impl From<$wire> for $domain {
            fn from(cause: $wire) -> Self {
                match cause {
                    $(<$wire>::$variant => Self::$variant,)*
                }
            }
        }

        impl From<$domain> for $wire {
            fn from(cause: $domain) -> Self {
                match cause {
                    $(<$domain>::$variant => Self::$variant,)*
                }
            }
        }

        impl $domain {
            /// Static name in upper case, for metrics and logs.
            #[must_use]
            pub fn name(self) -> &'static str {
                <$wire>::from(self).as_str_name()
            }
        }
    };
}
cause!(RefusalCause, refused::Cause, Unspecified NoFreePort Draining UnknownPort DuplicateId Recovering Malformed KeyReused);
cause!(EndCause, end::Cause, Unspecified Unclaimed Released Finished MaxDuration Drained OwnerGone Unknown);

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> v1::Session {
        v1::Session {
            session_id: "s".to_owned(),
            idempotency_key: "k".to_owned(),
            connection_port: 20_000,
            port_name: "main".to_owned(),
            protocol: "TCP".to_owned(),
            bound_client: "192.0.2.1".to_owned(),
            state: session::State::Busy.into(),
            claim_deadline_ms: 31_000,
            created_ms: 1_000,
            lingering_since_ms: 2_000,
            claimed: true,
            open_here: true,
        }
    }

    #[test]
    fn a_session_is_written_as_it_was_read() {
        let read = Session::try_from(session()).unwrap();
        assert_eq!(read.port.get(), 20_000);
        assert_eq!(v1::Session::from(read), session());
        let bare = v1::Session {
            idempotency_key: String::new(),
            bound_client: String::new(),
            lingering_since_ms: 0,
            ..session()
        };
        let read = Session::try_from(bare.clone()).unwrap();
        assert_eq!((&read.idempotency_key, read.bound_client), (&None, None));
        assert_eq!(read.lingering_since, None);
        assert_eq!(v1::Session::from(read), bare);
    }

    #[test]
    fn a_value_that_does_not_parse_is_named() {
        type Spoil = fn(&mut v1::Session);
        let cases: [(Spoil, &str); 8] = [
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
            (|session| session.state = 9, "state 9"),
        ];
        for (spoil, expected) in cases {
            let mut session = session();
            spoil(&mut session);
            let error = Session::try_from(session).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
            assert!(error.len() < 200, "a long value is cut off: {error}");
        }
    }

    #[test]
    fn a_request_that_does_not_parse_keeps_its_id() {
        let select = v1::Select {
            request_id: 7,
            ..v1::Select::default()
        };
        let message = v1::ToAgent {
            message: Some(to_agent::Message::Select(select)),
        };
        let error = ToAgent::try_from(message).unwrap_err();
        assert!(
            matches!(
                error,
                MessageError::Request {
                    request_id: 7,
                    kind: RequestKind::Select,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn a_session_that_ends_for_an_unknown_cause_ends() {
        let end = v1::End {
            session_id: "s".to_owned(),
            cause: 99,
        };
        let message = v1::FromAgent {
            message: Some(from_agent::Message::End(end)),
        };
        let expected = FromAgent::End {
            session_id: SessionId::new("s").unwrap(),
            cause: EndCause::Unspecified,
        };
        assert_eq!(FromAgent::try_from(message), Ok(expected));
    }
}
