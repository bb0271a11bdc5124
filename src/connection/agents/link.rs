//! The stream to one agent: kept up, greeted, read. One that is down for too
//! long costs the sessions of its server.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;
use tracing::{debug, info, warn};

use super::{Agents, SelectError};
use crate::connection::control::Change;
use crate::connection::sessions::span::SessionSpan;
use crate::connection::sessions::{Outbox, Sessions};
use crate::pool::PortProtocol;
use crate::selection::v1::selection_client::SelectionClient;
use crate::selection::v1::{self, FromAgent, ToAgent, from_agent, to_agent::Message};
use crate::selection::{
    CUT_AFTER, CUT_SLACK, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, PROTOCOL_VERSION,
};
use crate::session::PortState;
use crate::table::{Slot, Table};

/// How long a connection and its greeting may take.
const ATTACH_DEADLINE: Duration = Duration::from_secs(2);

/// Pause before the first try to attach again, doubled up to the longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = CUT_SLACK;

/// What a stream that is up needs to send requests and match answers.
pub(super) struct Stream {
    pub(super) outbox: Outbox,
    pub(super) pending: HashMap<u64, Waiting>,
}

/// A request that waits for its answer.
pub(super) struct Waiting {
    pub(super) answer: oneshot::Sender<Result<v1::Session, SelectError>>,
    pub(super) span: SessionSpan,
}

impl Agents {
    /// Keeps one stream up for as long as the task runs.
    pub(super) async fn keep_attached(
        self: Arc<Self>,
        slot: Slot,
        address: SocketAddr,
        mut table: watch::Receiver<Arc<Table>>,
        stream: Arc<Mutex<Option<Stream>>>,
        detached_since: Arc<Mutex<Option<Instant>>>,
    ) {
        let mut pause = FIRST_PAUSE;
        loop {
            let since = *detached_since.lock();
            let attached = tokio::select! {
                attached = self.attach(slot, address, &mut table, &stream) => attached,
                () = overdue(since, &stream) => Err(AttachError::OutOfReach),
            };
            if attached.is_ok() {
                *detached_since.lock() = Some(Instant::now());
            }
            stream.lock().take();
            self.reservations.detach(slot);
            if self.leaving.load(Ordering::Relaxed) {
                return;
            }
            match attached {
                Ok(()) => {
                    pause = FIRST_PAUSE;
                    info!(%slot, %address, "stream to processing server ended");
                }
                Err(error) => {
                    debug!(%slot, %address, %error, "failed to attach to processing server")
                }
            }
            let since = *detached_since.lock();
            if since.is_some_and(|since| since.elapsed() >= CUT_AFTER) {
                let change = self.control.begin_change().await;
                *detached_since.lock() = None;
                let sessions = change.forget_server(slot);
                if sessions > 0 {
                    warn!(%slot, %address, sessions, "processing server out of reach; its sessions are cut");
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Attaches once and serves the stream until it ends.
    async fn attach(
        &self,
        slot: Slot,
        address: SocketAddr,
        table: &mut watch::Receiver<Arc<Table>>,
        stream: &Arc<Mutex<Option<Stream>>>,
    ) -> Result<(), AttachError> {
        while self.sessions.is_cutting(slot) {
            sleep(Duration::from_millis(1)).await;
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(ATTACH_DEADLINE)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let mut client = SelectionClient::new(endpoint.connect().await?);
        let (outbox, outgoing) = mpsc::unbounded_channel();
        let current = table.borrow_and_update().clone();
        let greeting = self.greeting(slot, &current)?;
        let greet = |sessions| {
            let message = Some(Message::Hello(v1::Hello {
                sessions,
                ..greeting
            }));
            ToAgent { message }
        };
        let change = self.control.begin_change().await;
        change.attach(slot, outbox.clone(), greet);
        drop(change);
        let _detach = Detach {
            sessions: &self.sessions,
            slot,
            outbox: &outbox,
        };
        let outgoing = UnboundedReceiverStream::new(outgoing);
        let welcome = async {
            let mut incoming = client.attach(outgoing).await?.into_inner();
            let first = incoming.message().await?.and_then(|first| first.message);
            match first {
                Some(from_agent::Message::Welcome(welcome)) => Ok((incoming, welcome)),
                _ => Err(AttachError::NoWelcome),
            }
        };
        let (mut incoming, welcome) = timeout(ATTACH_DEADLINE, welcome).await??;
        info!(%slot, %address, agent = welcome.agent, generation = welcome.generation, "attached to processing server");
        *stream.lock() = Some(Stream {
            outbox: outbox.clone(),
            pending: HashMap::new(),
        });
        self.reservations.attach(slot);
        self.sessions.welcomed(slot);
        loop {
            tokio::select! {
                message = incoming.message() => match message {
                    Ok(Some(FromAgent { message: Some(message) })) => {
                        let change = self.control.begin_change().await;
                        self.receive(&change, slot, message, stream, &outbox);
                    }
                    Ok(Some(FromAgent { message: None })) => {
                        self.metrics.unknown_messages.inc();
                    }
                    Ok(None) => return Ok(()),
                    Err(error) => {
                        debug!(%slot, %error, "stream to processing server broke");
                        return Ok(());
                    }
                },
                changed = table.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let table = table.borrow_and_update().slice(slot).encode()?;
                    let message = Some(Message::TableUpdate(v1::TableUpdate { table }));
                    let _ = outbox.send(ToAgent { message });
                }
            }
        }
    }

    fn greeting(&self, slot: Slot, table: &Table) -> Result<v1::Hello, AttachError> {
        Ok(v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            pool_uid: table.pool_uid.clone(),
            connection_server: self.id.clone(),
            table: table.slice(slot).encode()?,
            sessions: Vec::new(),
            place: self.host_identity.clone(),
        })
    }

    fn receive(
        &self,
        change: &Change<'_>,
        slot: Slot,
        message: from_agent::Message,
        stream: &Mutex<Option<Stream>>,
        outbox: &Outbox,
    ) {
        use from_agent::Message as From;
        let waiting = |request_id: u64| {
            let mut stream = stream.lock();
            stream.as_mut()?.pending.remove(&request_id)
        };
        match message {
            From::Counts(counts) => {
                self.reservations
                    .counted(slot, port_states(counts.ports), counts.draining)
            }
            From::Selected(v1::Selected {
                request_id,
                session: Some(session),
            }) => {
                let waiting = waiting(request_id);
                let span = || match &waiting {
                    Some(waiting) => waiting.span.clone(),
                    None => SessionSpan::learned(),
                };
                change.learn(slot, session.clone(), span);
                let session_id = session.session_id.clone();
                // Nobody waits any more, and nobody was told the port.
                if waiting.is_none_or(|waiting| waiting.answer.send(Ok(session)).is_err()) {
                    let message = Some(Message::Release(v1::Release { session_id }));
                    let _ = outbox.send(ToAgent { message });
                }
            }
            From::Refused(refused) => {
                if let Some(waiting) = waiting(refused.request_id) {
                    let cause = refused.cause();
                    let _ = waiting.answer.send(Err(SelectError::Refused(cause)));
                }
            }
            From::Session(session) => change.learn(slot, session, SessionSpan::learned),
            From::End(end) => {
                self.metrics.session_ended(end.cause());
                change.end(slot, &end.session_id, end.cause());
            }
            From::LookedUp(v1::LookedUp {
                request_id,
                session,
            }) => {
                change.looked_up(slot, request_id, session);
            }
            From::Welcome(_) | From::Selected(_) => {
                self.metrics.unknown_messages.inc();
            }
        }
    }
}

/// Completes when a stream that has been down since `since` is not up again
/// when its sessions are to be cut. A try to attach may be under way: one that
/// succeeded later would have told the agent of sessions that are cut.
async fn overdue(since: Option<Instant>, stream: &Mutex<Option<Stream>>) {
    let Some(since) = since else {
        return std::future::pending().await;
    };
    sleep_until(since + CUT_AFTER).await;
    if stream.lock().is_some() {
        std::future::pending().await
    }
}

/// Detaches the sessions however the attachment ends, also when its task is
/// aborted.
struct Detach<'a> {
    sessions: &'a Sessions,
    slot: Slot,
    outbox: &'a Outbox,
}

impl Drop for Detach<'_> {
    fn drop(&mut self) {
        self.sessions.detach(self.slot, self.outbox);
    }
}

#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
    #[error("{0}")]
    Status(#[from] tonic::Status),
    #[error("agent did not answer the greeting in {} s", ATTACH_DEADLINE.as_secs())]
    TimedOut(#[from] tokio::time::error::Elapsed),
    #[error("agent answered the greeting with something other than a welcome")]
    NoWelcome,
    #[error("agent was out of reach for {} s", CUT_AFTER.as_secs())]
    OutOfReach,
    #[error(transparent)]
    Table(#[from] crate::table::TableError),
}

fn port_states(ports: Vec<v1::PortCounts>) -> Vec<PortState> {
    let states = ports.into_iter().filter_map(|ports| {
        Some(PortState {
            protocol: PortProtocol::from_name(&ports.protocol)?,
            name: ports.name,
            free: ports.free,
            held: ports.held,
            busy: ports.busy,
            lingering: ports.lingering,
            not_listening: ports.not_listening,
        })
    });
    states.collect()
}
