//! The messages from agents to connection servers, and the causes in them.

use super::MessageError;
use crate::selection::field::{FieldError, protocol, reason, session_id};
use crate::selection::v1::{self, amended, end, from_agent, refused};
use crate::selection::{
    Counts, EndCause, FromAgent, PROTOCOL_VERSION, RefusalCause, Session, Welcome,
};
use crate::session::{AmendRefusal, PortState};

fn missing(name: &'static str) -> FieldError {
    FieldError::new(name, &None::<()>, "be there")
}

impl TryFrom<v1::FromAgent> for FromAgent {
    type Error = MessageError;

    fn try_from(message: v1::FromAgent) -> Result<Self, MessageError> {
        use from_agent::Message;
        Ok(match message.message.ok_or(MessageError::Unknown)? {
            Message::Welcome(welcome) => Self::Welcome(Welcome {
                agent: welcome.agent,
                generation: welcome.generation,
                knows_several_ports: welcome.several_ports,
                knows_amendments: welcome.amendments,
            }),
            Message::Counts(counts) => Self::Counts(counts.try_into()?),
            Message::Selected(v1::Selected {
                request_id,
                session,
                counts,
            }) => Self::Selected {
                request_id,
                session: session.ok_or_else(|| missing("session"))?.try_into()?,
                counts: counts.ok_or_else(|| missing("counts"))?.try_into()?,
            },
            Message::Refused(refused) => Self::Refused {
                request_id: refused.request_id,
                cause: refused.cause().into(),
                reason: reason(refused.reason)?,
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
            Message::Offered(v1::Offered { request_id, counts }) => Self::Offered {
                request_id,
                counts: counts.ok_or_else(|| missing("counts"))?.try_into()?,
            },
            Message::Amended(amended) => Self::Amended {
                request_id: amended.request_id,
                outcome: outcome(amended.outcome()),
            },
        })
    }
}

impl From<FromAgent> for v1::FromAgent {
    fn from(message: FromAgent) -> Self {
        use from_agent::Message;
        let message = match message {
            FromAgent::Welcome(Welcome {
                agent,
                generation,
                knows_several_ports,
                knows_amendments,
            }) => Message::Welcome(v1::Welcome {
                protocol_version: PROTOCOL_VERSION,
                agent,
                generation,
                several_ports: knows_several_ports,
                amendments: knows_amendments,
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
            FromAgent::Refused {
                request_id,
                cause,
                reason,
            } => Message::Refused(v1::Refused {
                request_id,
                cause: refused::Cause::from(cause).into(),
                reason: reason.unwrap_or_default(),
            }),
            FromAgent::Offered { request_id, counts } => Message::Offered(v1::Offered {
                request_id,
                counts: Some(counts.into()),
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
            FromAgent::Amended {
                request_id,
                outcome,
            } => Message::Amended(v1::Amended {
                request_id,
                outcome: outcome_code(outcome).into(),
            }),
        };
        Self {
            message: Some(message),
        }
    }
}

fn outcome(code: amended::Outcome) -> Result<(), AmendRefusal> {
    use amended::Outcome;
    Err(match code {
        Outcome::Done => return Ok(()),
        Outcome::Unspecified => AmendRefusal::Unspecified,
        Outcome::UnknownSession => AmendRefusal::UnknownSession,
        Outcome::MetadataTooLarge => AmendRefusal::MetadataTooLarge,
        Outcome::ExpiresPassed => AmendRefusal::ExpiresPassed,
        Outcome::ExpiresTooFar => AmendRefusal::ExpiresTooFar,
        Outcome::MalformedAmend => AmendRefusal::MalformedAmend,
    })
}

fn outcome_code(outcome: Result<(), AmendRefusal>) -> amended::Outcome {
    use amended::Outcome;
    match outcome {
        Ok(()) => Outcome::Done,
        Err(AmendRefusal::Unspecified) => Outcome::Unspecified,
        Err(AmendRefusal::UnknownSession) => Outcome::UnknownSession,
        Err(AmendRefusal::MetadataTooLarge) => Outcome::MetadataTooLarge,
        Err(AmendRefusal::ExpiresPassed) => Outcome::ExpiresPassed,
        Err(AmendRefusal::ExpiresTooFar) => Outcome::ExpiresTooFar,
        Err(AmendRefusal::MalformedAmend) => Outcome::MalformedAmend,
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
            spent: counts.spent,
            not_ready: counts.not_ready,
            further: counts.further,
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
            spent: counts.spent,
            not_ready: counts.not_ready,
            further: counts.further,
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
cause!(RefusalCause, refused::Cause, Unspecified NoFreePort Draining UnknownPort DuplicateId Recovering Malformed KeyReused NotReady NotConfirmed RefusedByWorkload Withdrawn);
cause!(EndCause, end::Cause, Unspecified Unclaimed Released Finished MaxDuration Drained OwnerGone Unknown EndedByWorkload NotConfirmedInTime DeclinedByWorkload);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::SessionId;

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
