//! Streams of connection servers: their greetings, their messages, their ends.
//! Of two of the same name the newer one counts.

use std::pin::Pin;
use std::time::Duration;

use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{Agent, Outbox, send};
use crate::agent::book::{Notice, To};
use crate::follow::Rejected;
use crate::selection::PROTOCOL_VERSION;
use crate::selection::v1::selection_server::Selection;
use crate::selection::v1::{self, FromAgent, ToAgent, from_agent, to_agent};
use crate::table::ListenPort;

/// How long a stream may take to greet.
const GREETING_DEADLINE: Duration = Duration::from_secs(5);

/// Most connection servers attached at once: a pool has at most 10, and a
/// rollout doubles them.
const MAX_STREAMS: usize = 64;

/// Longest place of a connection server: boot, host, network namespace and
/// address take half of it.
const MAX_PLACE_BYTES: usize = 256;

impl Agent {
    /// Checks a greeting and attaches its sender.
    fn attach(&self, hello: &v1::Hello, outbox: &Outbox) -> Result<(), Status> {
        if hello.protocol_version != PROTOCOL_VERSION {
            let found = hello.protocol_version;
            return Err(Status::failed_precondition(format!(
                "protocol version {found} is not spoken here, only {PROTOCOL_VERSION}"
            )));
        }
        let name = &hello.connection_server;
        if name.is_empty() || name.len() > 64 {
            return Err(Status::invalid_argument(
                "connection_server must have 1 to 64 bytes",
            ));
        }
        if hello.place.len() > MAX_PLACE_BYTES {
            return Err(Status::invalid_argument(format!(
                "place must have at most {MAX_PLACE_BYTES} bytes"
            )));
        }
        let ours = self
            .inner
            .lock()
            .table
            .as_ref()
            .map(|table| table.pool_uid.clone());
        if ours.is_some_and(|ours| ours != hello.pool_uid) {
            return Err(Status::failed_precondition(format!(
                "pool uid {} is another pool's",
                hello.pool_uid
            )));
        }
        match self.follow(&hello.table) {
            Ok(()) | Err(Rejected::Older { .. }) => {}
            Err(Rejected::OtherPool { found, .. }) => {
                return Err(Status::failed_precondition(format!(
                    "pool uid {found} is another pool's"
                )));
            }
            Err(Rejected::Invalid(error)) => {
                return Err(Status::invalid_argument(error.to_string()));
            }
        }
        let now = self.now();
        let mut inner = self.inner.lock();
        let has_row = inner
            .table
            .as_ref()
            .is_some_and(|table| table.row(self.slot).is_some());
        if !has_row {
            return Err(Status::failed_precondition(format!(
                "the table has no row for slot {}",
                self.slot
            )));
        }
        if inner.outboxes.len() >= MAX_STREAMS && !inner.outboxes.contains_key(name) {
            return Err(Status::resource_exhausted(
                "too many connection servers are attached",
            ));
        }
        let generation = inner.table.as_ref().map_or(0, |table| table.generation);
        let welcome = v1::Welcome {
            protocol_version: PROTOCOL_VERSION,
            agent: self.id.to_string(),
            generation,
        };
        send(outbox, from_agent::Message::Welcome(welcome));
        // A stream of the same name that is still there is the broken one.
        inner.outboxes.insert(name.clone(), outbox.clone());
        let notices = inner.book.attach(name, &hello.place, &hello.sessions, now);
        inner.send(notices);
        let counts = inner.book.counts(now);
        inner.told = counts.clone();
        inner.send(vec![Notice {
            to: To::All,
            message: from_agent::Message::Counts(counts),
        }]);
        drop(inner);
        self.sooner.notify_one();
        info!(connection_server = name, "connection server attached");
        Ok(())
    }

    /// Sends nothing more to `outbox`. Whether it was the one of `name`, not
    /// replaced by a newer stream's.
    fn drop_outbox(&self, name: &str, outbox: &Outbox) -> bool {
        let mut inner = self.inner.lock();
        let is_current = inner.is_current(name, outbox);
        if is_current {
            inner.outboxes.remove(name);
        }
        is_current
    }

    fn detach(&self, name: &str, outbox: &Outbox) {
        if self.drop_outbox(name, outbox) {
            info!(connection_server = name, "connection server detached");
            self.change(|book, now| {
                book.detach(name, now);
                Vec::new()
            });
        }
    }

    fn leave(&self, name: &str, outbox: &Outbox) {
        if self.drop_outbox(name, outbox) {
            info!(connection_server = name, "connection server left");
            self.change(|book, now| book.leave(name, now));
        }
    }

    /// Handles a message of a stream. Whether the stream still counts: one that
    /// a newer one of the same connection server has replaced is not heard any
    /// more, as what it tells was so before the newer one's greeting.
    fn receive(&self, name: &str, message: &to_agent::Message, outbox: &Outbox) -> bool {
        use to_agent::Message;
        let mut counts = true;
        match message {
            // A goodbye is the stream's end, see `serve`.
            Message::Hello(_) | Message::Goodbye(_) => {
                self.metrics.unexpected_messages.inc();
            }
            Message::TableUpdate(update) => {
                if let Err(reason) = self.follow(&update.table) {
                    warn!(connection_server = name, %reason, "table update not accepted");
                }
            }
            Message::Select(request) => counts = self.select(name, request, outbox),
            Message::Lookup(lookup) => {
                let number = u16::try_from(lookup.connection_port).unwrap_or(0);
                let session =
                    ListenPort::new(number).and_then(|port| self.inner.lock().book.look_up(port));
                let request_id = lookup.request_id;
                send(
                    outbox,
                    from_agent::Message::LookedUp(v1::LookedUp {
                        request_id,
                        session,
                    }),
                );
            }
            // Given back is given back, whoever says so.
            Message::Release(_) => self.change(|book, now| book.report(name, message, now)),
            Message::Opened(_) | Message::Closed(_) | Message::Ended(_) => {
                let now = self.now();
                let mut inner = self.inner.lock();
                counts = inner.is_current(name, outbox);
                if counts {
                    let notices = inner.book.report(name, message, now);
                    inner.send(notices);
                    inner.tell_counts(now);
                }
                drop(inner);
                self.sooner.notify_one();
            }
        }
        counts
    }

    /// Selects a port: counts first, so that the reply's reader has them.
    /// Whether the stream still counts.
    fn select(&self, name: &str, request: &v1::Select, outbox: &Outbox) -> bool {
        let now = self.now();
        let request_id = request.request_id;
        let mut inner = self.inner.lock();
        if !inner.is_current(name, outbox) {
            return false;
        }
        let selected = inner.book.select(name, request, now);
        self.metrics.selected(selected.as_ref().err().copied());
        let answer = match selected {
            Ok((session, notices)) => {
                inner.send(notices);
                let session = Some(session);
                from_agent::Message::Selected(v1::Selected {
                    request_id,
                    session,
                })
            }
            Err(cause) => {
                let cause = cause.into();
                from_agent::Message::Refused(v1::Refused { request_id, cause })
            }
        };
        inner.tell_counts(now);
        send(outbox, answer);
        drop(inner);
        self.sooner.notify_one();
        true
    }

    async fn serve(self, mut incoming: Streaming<ToAgent>, name: String, outbox: Outbox) {
        while let Ok(Some(ToAgent { message })) = incoming.message().await {
            match message {
                Some(to_agent::Message::Goodbye(_)) => {
                    self.leave(&name, &outbox);
                    return;
                }
                Some(message) => {
                    if !self.receive(&name, &message, &outbox) {
                        break;
                    }
                }
                None => {
                    self.metrics.unexpected_messages.inc();
                }
            }
        }
        self.detach(&name, &outbox);
    }
}

#[tonic::async_trait]
impl Selection for Agent {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<FromAgent, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<ToAgent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut incoming = request.into_inner();
        let first = tokio::time::timeout(GREETING_DEADLINE, incoming.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no greeting came"))??;
        let Some(ToAgent {
            message: Some(to_agent::Message::Hello(hello)),
        }) = first
        else {
            self.metrics.refused_greetings.inc();
            return Err(Status::invalid_argument("the first message must be Hello"));
        };
        let (outbox, outgoing) = mpsc::unbounded_channel();
        if let Err(status) = Agent::attach(self, &hello, &outbox) {
            self.metrics.refused_greetings.inc();
            warn!(reason = status.message(), "greeting refused");
            return Err(status);
        }
        tokio::spawn(
            self.clone()
                .serve(incoming, hello.connection_server, outbox),
        );
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(
            outgoing,
        ))))
    }
}
