//! Streams of connection servers: their greetings, their messages, their ends.
//! Messages are parsed here as they arrive. Of two streams of the same
//! connection server, the newer one counts.

use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use super::{Agent, Outbox, send};
use crate::agent::book::{Selected, To};
use crate::follow::Rejected;
use crate::selection::v1;
use crate::selection::v1::selection_server::Selection;
use crate::selection::{
    ConnectionServerId, FromAgent, Hello, MessageError, RefusalCause, RequestKind, Select, ToAgent,
    Welcome,
};
use crate::session::AmendRefusal;
use crate::table::Table;

/// How long a stream may take to greet.
const GREETING_DEADLINE: Duration = Duration::from_secs(5);

/// Most connection servers attached at once: a pool has at most 10, and a
/// rollout doubles them.
const MAX_STREAMS: usize = 64;

impl Agent {
    /// Checks a greeting and attaches its sender.
    fn attach(&self, hello: &Hello, outbox: &Outbox) -> Result<(), Status> {
        self.follow_greeting(hello)?;
        let from = &hello.connection_server;
        let mut inner = self.inner.lock();
        let now = self.now();
        let table = inner.table.as_ref();
        if table.is_none_or(|table| table.row(self.slot).is_none()) {
            return Err(Status::failed_precondition(format!(
                "the table has no row for slot {}",
                self.slot
            )));
        }
        let welcome = Welcome {
            agent: self.id.to_string(),
            generation: table.map_or(0, |table| table.generation),
            knows_several_ports: true,
            knows_amendments: true,
        };
        if inner.outboxes.len() >= MAX_STREAMS && !inner.outboxes.contains_key(from) {
            return Err(Status::resource_exhausted(
                "too many connection servers are attached",
            ));
        }
        send(outbox, FromAgent::Welcome(welcome));
        // If a stream of the same connection server is still here, it is broken.
        inner.outboxes.insert(from.clone(), outbox.clone());
        let (host_identity, sessions) = (&hello.host_identity, &hello.sessions);
        let notices = inner.book.attach(from, host_identity, sessions, now);
        inner.book.set_unavailable(from, &hello.unavailable);
        inner.send(notices);
        let counts = inner.book.counts(now);
        inner.send_new_counts(To::All, counts);
        drop(inner);
        self.sooner.notify_one();
        info!(connection_server = %from, "connection server attached");
        Ok(())
    }

    /// Follows the table in a greeting, if it is newer; refuses another pool's.
    fn follow_greeting(&self, hello: &Hello) -> Result<(), Status> {
        let other_pool =
            |uid: &str| Status::failed_precondition(format!("pool uid {uid} is another pool's"));
        let ours = self.table();
        if ours.is_some_and(|ours| ours.pool_uid != hello.pool_uid) {
            return Err(other_pool(&hello.pool_uid));
        }
        match self.follow_text(&hello.table) {
            Ok(()) | Err(Rejected::Older { .. }) => Ok(()),
            Err(Rejected::OtherPool { found, .. }) => Err(other_pool(&found)),
            Err(Rejected::Invalid(error)) => Err(Status::invalid_argument(error.to_string())),
        }
    }

    /// Decodes a table that a connection server has sent, and follows it.
    fn follow_text(&self, text: &str) -> Result<(), Rejected> {
        let table = Table::decode(text).map_err(Rejected::from);
        let table = table.inspect_err(|reason| self.metrics.rejected_tables.count(reason))?;
        self.follow(&table)
    }

    /// Sends no more to `outbox`. Returns whether it was the current one of
    /// `from`, not replaced by a newer stream's.
    fn drop_outbox(&self, from: &ConnectionServerId, outbox: &Outbox) -> bool {
        let mut inner = self.inner.lock();
        let is_current = inner.is_current(from, outbox);
        if is_current {
            inner.outboxes.remove(from);
        }
        is_current
    }

    fn detach(&self, from: &ConnectionServerId, outbox: &Outbox) {
        if self.drop_outbox(from, outbox) {
            info!(connection_server = %from, "connection server detached");
            self.change(|book, now| book.detach(from, now));
        }
    }

    fn leave(&self, from: &ConnectionServerId, outbox: &Outbox) {
        if self.drop_outbox(from, outbox) {
            info!(connection_server = %from, "connection server left");
            self.change(|book, now| book.leave(from, now));
        }
    }

    /// Handles a message of a stream. Returns whether the stream still counts.
    /// It does not once a newer one of the same connection server has replaced
    /// it: what it reports happened before the newer one's greeting.
    fn receive(&self, from: &ConnectionServerId, message: &ToAgent, outbox: &Outbox) -> bool {
        match message {
            // A goodbye is the stream's end, see `serve`.
            ToAgent::Hello(_) | ToAgent::Goodbye => {
                self.metrics.unexpected_messages.inc();
            }
            ToAgent::TableUpdate { table, unavailable } => {
                // First, so that no new port is offered too early.
                if self.inner.lock().is_current(from, outbox) {
                    self.change(|book, _| {
                        book.set_unavailable(from, unavailable);
                        Vec::new()
                    });
                }
                if let Err(reason) = self.follow_text(table) {
                    warn!(connection_server = %from, %reason, "table update not accepted");
                }
            }
            ToAgent::Select(request) => {
                return self.select(from, request.request_id, Some(request), outbox);
            }
            ToAgent::Lookup { request_id, port } => {
                let session = self.inner.lock().book.look_up(*port);
                let request_id = *request_id;
                send(
                    outbox,
                    FromAgent::LookedUp {
                        request_id,
                        session,
                    },
                );
            }
            ToAgent::Amend {
                request_id,
                session_id,
                amendment,
            } => {
                let amended = self.amend(session_id, amendment);
                send(outbox, answer_to_amend(*request_id, amended.map(drop)));
            }
            // The client gave the session back, on whichever stream that comes.
            ToAgent::Release(_) => self.change(|book, now| book.report(from, message, now)),
            ToAgent::Withdraw { .. }
            | ToAgent::Opened(_)
            | ToAgent::Joined { .. }
            | ToAgent::Closed { .. }
            | ToAgent::Ended(_) => {
                let mut inner = self.inner.lock();
                let now = self.now();
                let counts = inner.is_current(from, outbox);
                if counts {
                    let notices = inner.book.report(from, message, now);
                    self.conclude(inner, notices, now);
                }
                return counts;
            }
        }
        true
    }

    /// Answers a request that does not parse and counts other messages that do
    /// not. Returns whether the stream still counts.
    fn refuse(&self, from: &ConnectionServerId, error: &MessageError, outbox: &Outbox) -> bool {
        debug!(connection_server = %from, %error, "message not accepted");
        match *error {
            MessageError::Request {
                request_id, kind, ..
            } => match kind {
                RequestKind::Select => return self.select(from, request_id, None, outbox),
                RequestKind::Amend => {
                    let outcome = Err(AmendRefusal::MalformedAmend);
                    send(outbox, answer_to_amend(request_id, outcome));
                }
                RequestKind::Lookup => {
                    let session = None;
                    send(
                        outbox,
                        FromAgent::LookedUp {
                            request_id,
                            session,
                        },
                    );
                }
            },
            MessageError::Unknown | MessageError::Version { .. } | MessageError::Field(_) => {
                self.metrics.unexpected_messages.inc();
            }
        }
        true
    }

    /// Selects a port, or refuses a request that did not parse (`None`). The
    /// answer has the new counts with it; the others get them by themselves.
    /// Returns whether the stream still counts.
    fn select(
        &self,
        from: &ConnectionServerId,
        request_id: u64,
        request: Option<&Select>,
        outbox: &Outbox,
    ) -> bool {
        let mut inner = self.inner.lock();
        let now = self.now();
        if !inner.is_current(from, outbox) {
            return false;
        }
        let selected = match request {
            Some(request) => {
                inner.verify(&request.ports, now);
                inner.book.select(from, request, now)
            }
            None => Err(RefusalCause::Malformed),
        };
        let answer = match selected {
            Ok(Selected {
                session,
                notices,
                is_offered,
            }) => {
                inner.send(notices);
                let counts = inner.send_counts(To::AllBut(from.clone()), now);
                if is_offered {
                    FromAgent::Offered { request_id, counts }
                } else {
                    FromAgent::Selected {
                        request_id,
                        session,
                        counts,
                    }
                }
            }
            Err(cause) => {
                inner.send_counts(To::All, now);
                FromAgent::Refused {
                    request_id,
                    cause,
                    reason: None,
                }
            }
        };
        self.metrics.sent(&answer);
        send(outbox, answer);
        drop(inner);
        self.sooner.notify_one();
        true
    }

    async fn serve(
        self,
        mut incoming: Streaming<v1::ToAgent>,
        from: ConnectionServerId,
        outbox: Outbox,
    ) {
        while let Ok(Some(message)) = incoming.message().await {
            let counts = match ToAgent::try_from(message) {
                Ok(ToAgent::Goodbye) => {
                    self.leave(&from, &outbox);
                    return;
                }
                Ok(message) => self.receive(&from, &message, &outbox),
                Err(error) => self.refuse(&from, &error, &outbox),
            };
            if !counts {
                break;
            }
        }
        self.detach(&from, &outbox);
    }
}

fn answer_to_amend(request_id: u64, outcome: Result<(), AmendRefusal>) -> FromAgent {
    FromAgent::Amended {
        request_id,
        outcome,
    }
}

/// The greeting in the first message of a stream.
fn greeting(first: Option<v1::ToAgent>) -> Result<Hello, Status> {
    match first.unwrap_or_default().try_into() {
        Ok(ToAgent::Hello(hello)) => Ok(hello),
        Err(error @ MessageError::Version { .. }) => {
            Err(Status::failed_precondition(error.to_string()))
        }
        Err(error @ MessageError::Field(_)) => Err(Status::invalid_argument(error.to_string())),
        Ok(_) | Err(MessageError::Unknown | MessageError::Request { .. }) => {
            Err(Status::invalid_argument("the first message must be Hello"))
        }
    }
}

#[tonic::async_trait]
impl Selection for Agent {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<v1::FromAgent, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::ToAgent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut incoming = request.into_inner();
        let first = tokio::time::timeout(GREETING_DEADLINE, incoming.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no greeting came"))??;
        let (outbox, outgoing) = mpsc::unbounded_channel();
        let attached = greeting(first).and_then(|hello| {
            Agent::attach(self, &hello, &outbox)?;
            Ok(hello.connection_server)
        });
        let from = attached.inspect_err(|status| {
            self.metrics.refused_greetings.inc();
            warn!(reason = status.message(), "greeting refused");
        })?;
        tokio::spawn(self.clone().serve(incoming, from, outbox));
        let outgoing = UnboundedReceiverStream::new(outgoing);
        Ok(Response::new(Box::pin(
            outgoing.map(|message| Ok(message.into())),
        )))
    }
}
