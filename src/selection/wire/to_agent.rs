//! The messages from connection servers to agents.

use std::num::NonZeroU8;
use std::time::Duration;

use super::{MessageError, RequestKind};
use crate::pool::{MAX_PORT_NAME_LENGTH, PortProtocol};
use crate::selection::field::{
    FieldError, address, address_text, connection_port, idempotency_key, metadata, optional,
    optional_address, protocol, session_id, timestamp, too_large, unix_ms,
};
use crate::selection::v1::{self, to_agent};
use crate::selection::{ConnectionServerId, Hello, PROTOCOL_VERSION, Select, Session, ToAgent};
use crate::session::{
    Amendment, Block, MAX_BLOCKS, MAX_PORTS, MetadataPatch, OneOrMore, PortFilter, SessionId,
};
use crate::table::ListenPort;

/// Longest host identity of a connection server, in bytes: boot, host, network
/// namespace and address take half of it.
const MAX_HOST_IDENTITY_BYTES: usize = 256;

impl TryFrom<v1::ToAgent> for ToAgent {
    type Error = MessageError;

    fn try_from(message: v1::ToAgent) -> Result<Self, MessageError> {
        use to_agent::Message;
        Ok(match message.message.ok_or(MessageError::Unknown)? {
            Message::Hello(hello) => Self::Hello(hello.try_into()?),
            Message::TableUpdate(update) => Self::TableUpdate {
                table: update.table,
                unavailable: connection_ports(&update.unavailable_ports)?,
            },
            Message::Select(select) => {
                let request_id = select.request_id;
                let parsed = select.try_into();
                Self::Select(parsed.map_err(|source| MessageError::Request {
                    request_id,
                    kind: RequestKind::Select,
                    source,
                })?)
            }
            Message::Withdraw(v1::Withdraw { request_id }) => Self::Withdraw { request_id },
            Message::Opened(v1::Opened { session_id: id }) => Self::Opened(session_id(&id)?),
            Message::Joined(joined) => Self::Joined {
                session_id: session_id(&joined.session_id)?,
                client: address("client", &joined.client)?,
                is_companion: joined.companion,
            },
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
            Message::Amend(amend) => {
                let request_id = amend.request_id;
                amendment(amend).map_err(|source| MessageError::Request {
                    request_id,
                    kind: RequestKind::Amend,
                    source,
                })?
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
            ToAgent::TableUpdate { table, unavailable } => Message::TableUpdate(v1::TableUpdate {
                table,
                unavailable_ports: port_numbers(&unavailable),
            }),
            ToAgent::Select(select) => Message::Select(select.into()),
            ToAgent::Withdraw { request_id } => Message::Withdraw(v1::Withdraw { request_id }),
            ToAgent::Opened(id) => Message::Opened(v1::Opened {
                session_id: session_id(id),
            }),
            ToAgent::Joined {
                session_id,
                client,
                is_companion,
            } => Message::Joined(v1::Joined {
                session_id: session_id.to_string(),
                client: client.to_string(),
                companion: is_companion,
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
            ToAgent::Amend {
                request_id,
                session_id,
                amendment,
            } => Message::Amend(v1::Amend {
                request_id,
                session_id: session_id.to_string(),
                metadata: amendment.metadata.map(Into::into),
                expires: amendment.expires.map(|expires| v1::Expiry {
                    // 0 means that there is no end: one up to 1970 has passed.
                    at_ms: expires.map_or(0, |at| unix_ms(at).max(1)),
                }),
            }),
            ToAgent::Goodbye => Message::Goodbye(v1::Goodbye {}),
        };
        Self {
            message: Some(message),
        }
    }
}

fn connection_ports(numbers: &[u32]) -> Result<Vec<ListenPort>, FieldError> {
    let ports = numbers.iter().map(|number| connection_port(*number));
    ports.collect()
}

fn port_numbers(ports: &[ListenPort]) -> Vec<u32> {
    ports.iter().map(|port| port.get().into()).collect()
}

fn amendment(amend: v1::Amend) -> Result<ToAgent, FieldError> {
    let expires = amend.expires.map(|expires| match expires.at_ms {
        0 => Ok(None),
        at => timestamp("at_ms", at).map(Some),
    });
    Ok(ToAgent::Amend {
        request_id: amend.request_id,
        session_id: session_id(&amend.session_id)?,
        amendment: Amendment {
            expires: expires.transpose()?,
            metadata: amend.metadata.map(metadata_patch).transpose()?,
        },
    })
}

fn metadata_patch(patch: v1::MetadataPatch) -> Result<MetadataPatch, FieldError> {
    if patch.clear {
        return Ok(MetadataPatch::Clear);
    }
    let set = patch.set.into_iter().map(|(key, value)| (key, Some(value)));
    let removed = patch.remove.into_iter().map(|key| (key, None));
    let merged = MetadataPatch::merge(set.chain(removed).collect());
    merged.map_err(too_large)
}

impl From<MetadataPatch> for v1::MetadataPatch {
    fn from(patch: MetadataPatch) -> Self {
        let mut written = Self::default();
        let MetadataPatch::Merge(entries) = patch else {
            written.clear = true;
            return written;
        };
        for (key, value) in entries {
            match value {
                Some(value) => {
                    written.set.insert(key, value);
                }
                None => written.remove.push(key),
            }
        }
        written
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
        let unavailable = connection_ports(&hello.unavailable_ports)?;
        let sessions = hello.sessions.into_iter().map(Session::try_from);
        Ok(Self {
            pool_uid: hello.pool_uid,
            connection_server,
            table: hello.table,
            sessions: sessions.collect::<Result<_, _>>()?,
            host_identity: hello.host_identity,
            unavailable,
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
            unavailable_ports: port_numbers(&hello.unavailable),
        }
    }
}

impl TryFrom<v1::Select> for Select {
    type Error = FieldError;

    fn try_from(select: v1::Select) -> Result<Self, FieldError> {
        let ports = if select.ports.is_empty() {
            OneOrMore::one(Block::single(filter(select.port_name, &select.protocol)?))
        } else {
            blocks(select.ports)?
        };
        Ok(Self {
            request_id: select.request_id,
            session_id: session_id(&select.session_id)?,
            idempotency_key: idempotency_key(select.idempotency_key)?,
            ports,
            metadata: metadata(select.metadata)?,
            bound_client: optional_address("bound_client", &select.bound_client)?,
            requester: optional_address("requester", &select.requester)?,
            confirm_within: match select.confirm_ms {
                0 => None,
                within => Some(Duration::from_millis(within.into())),
            },
        })
    }
}

fn filter(port_name: String, protocol_name: &str) -> Result<PortFilter, FieldError> {
    let rule = "have at most 15 bytes";
    Ok(PortFilter {
        port_name: optional("port_name", port_name, MAX_PORT_NAME_LENGTH, rule)?,
        protocol: match protocol_name {
            "" => None,
            name => Some(protocol(name)?),
        },
    })
}

fn blocks(ports: Vec<v1::PortBlock>) -> Result<OneOrMore<Block>, FieldError> {
    let rule = "have 1 to 16 elements of 1 to 64 ports, 64 altogether";
    let found = ports.len();
    let invalid = || FieldError::new("ports", &found, rule);
    let block = |block: v1::PortBlock| {
        let count = u8::try_from(block.count).ok().and_then(NonZeroU8::new);
        Ok(Block {
            filter: filter(block.port_name, &block.protocol)?,
            count: count.ok_or_else(invalid)?,
        })
    };
    let blocks: Vec<Block> = ports.into_iter().map(block).collect::<Result<_, _>>()?;
    let blocks = OneOrMore::new(blocks).ok_or_else(invalid)?;
    if found > MAX_BLOCKS || blocks.ports() > MAX_PORTS.into() {
        return Err(invalid());
    }
    Ok(blocks)
}

impl From<Block> for v1::PortBlock {
    fn from(block: Block) -> Self {
        let protocol = block.filter.protocol.map(PortProtocol::name);
        Self {
            count: block.ports(),
            port_name: block.filter.port_name.unwrap_or_default(),
            protocol: protocol.unwrap_or_default().to_owned(),
        }
    }
}

impl From<Select> for v1::Select {
    fn from(select: Select) -> Self {
        // Every agent understands a request for one port.
        let mut single = v1::PortBlock::default();
        let mut ports = Vec::new();
        if select.ports.as_single().is_some() {
            single = select.ports.first.into();
        } else {
            let OneOrMore { first, rest } = select.ports;
            ports.push(first.into());
            ports.extend(rest.into_iter().map(v1::PortBlock::from));
        }
        Self {
            request_id: select.request_id,
            session_id: select.session_id.to_string(),
            idempotency_key: select.idempotency_key.unwrap_or_default(),
            port_name: single.port_name,
            protocol: single.protocol,
            ports,
            bound_client: address_text(select.bound_client),
            metadata: select.metadata.into(),
            requester: address_text(select.requester),
            // One that is over is not the same as none.
            confirm_ms: select.confirm_within.map_or(0, |within| {
                u32::try_from(within.as_millis()).unwrap_or(u32::MAX).max(1)
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_for_one_port_is_what_every_agent_understands() {
        let block = |name: &str, count| v1::PortBlock {
            port_name: name.to_owned(),
            protocol: "UDP".to_owned(),
            count,
        };
        let select = |ports: &[v1::PortBlock]| v1::Select {
            session_id: "s".to_owned(),
            ports: ports.to_vec(),
            ..v1::Select::default()
        };
        let rewritten = |ports: &[v1::PortBlock]| {
            let read = Select::try_from(select(ports)).unwrap();
            v1::Select::from(read)
        };
        let several = [block("rtp", 2), block("", 1)];
        assert_eq!(rewritten(&several), select(&several));
        let single = rewritten(&[block("rtp", 1)]);
        assert_eq!(
            (single.port_name.as_str(), single.ports),
            ("rtp", Vec::new())
        );
        for wrong in [
            vec![block("rtp", 0)],
            vec![block("rtp", 65)],
            vec![block("rtp", 256)],
            vec![block("rtp", 40), block("rtp", 40)],
            vec![block("rtp", 1); 17],
        ] {
            let error = Select::try_from(select(&wrong)).unwrap_err();
            assert_eq!(error.field, "ports", "{wrong:?}");
        }
    }

    #[test]
    fn an_amendment_is_read_as_it_was_written() {
        let entries = [
            ("a".to_owned(), Some(String::new())),
            ("b".to_owned(), None),
        ];
        let time = jiff::Timestamp::from_second(1_900_000_000).unwrap();
        for (expires, metadata) in [
            (None, None),
            (Some(None), Some(MetadataPatch::Clear)),
            (Some(Some(time)), Some(MetadataPatch::Merge(entries.into()))),
        ] {
            let message = ToAgent::Amend {
                request_id: 7,
                session_id: SessionId::new("s").unwrap(),
                amendment: Amendment { expires, metadata },
            };
            let read = ToAgent::try_from(v1::ToAgent::from(message.clone()));
            assert_eq!(read, Ok(message));
        }
        for (remove, value) in [
            (vec!["k".repeat(5_000)], "Bytes(5000)"),
            ((0..65).map(|key| key.to_string()).collect(), "Keys(65)"),
        ] {
            let large = v1::Amend {
                request_id: 7,
                session_id: "s".to_owned(),
                metadata: Some(v1::MetadataPatch {
                    remove,
                    ..v1::MetadataPatch::default()
                }),
                ..v1::Amend::default()
            };
            let error = amendment(large).unwrap_err();
            assert_eq!((error.field, error.value.as_str()), ("metadata", value));
        }
    }

    /// 0 on the wire would remove the end.
    #[test]
    fn an_end_that_passed_long_ago_stays_an_end() {
        for passed in [
            "0001-01-01T00:00:00Z",
            "1969-12-31T23:59:59.999Z",
            "1970-01-01T00:00:00Z",
        ] {
            let message = ToAgent::Amend {
                request_id: 7,
                session_id: SessionId::new("s").unwrap(),
                amendment: Amendment {
                    expires: Some(Some(passed.parse().unwrap())),
                    metadata: None,
                },
            };
            let read = ToAgent::try_from(v1::ToAgent::from(message));
            let Ok(ToAgent::Amend { amendment, .. }) = read else {
                panic!("{read:?}");
            };
            let read = amendment.expires.unwrap().expect(passed);
            assert_eq!(read.as_millisecond(), 1, "{passed}");
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
}
