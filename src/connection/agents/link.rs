//! The stream to one agent: a task keeps it up, greets, and passes on what the
//! agent sends. If it is down for too long, the sessions of its server end.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};
use tracing::{debug, info, warn};

use super::{Agents, Told};
use crate::connection::control::Change;
use crate::connection::load_sharing::queue::{Allocated, AskId};
use crate::connection::sessions::{Outbox, Sessions};
use crate::selection::v1::{self, selection_client::SelectionClient};
use crate::selection::{
    CUT_AFTER, CUT_SLACK, FromAgent, Hello, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, ToAgent,
};
use crate::table::Slot;

/// How long a connection and its greeting may take.
const ATTACH_DEADLINE: Duration = Duration::from_secs(2);

/// The pause before the first attempt to attach again. It doubles up to the
/// longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = CUT_SLACK;

/// Whether the stream is up, and where messages to it go.
pub(super) struct LinkState {
    pub(super) outbox: Mutex<Option<Outbox>>,
    /// The time since which the stream was down, the last time that it was;
    /// `None` when the sessions were cut.
    pub(super) detached_since: Mutex<Option<Instant>>,
}

impl LinkState {
    /// A stream that is down since `detached_since`.
    pub(super) fn new(detached_since: Instant) -> Self {
        Self {
            outbox: Mutex::new(None),
            detached_since: Mutex::new(Some(detached_since)),
        }
    }

    pub(super) fn is_attached(&self) -> bool {
        self.outbox.lock().is_some()
    }
}

/// The task's side of a link.
pub(super) struct LinkTask {
    pub(super) agents: Arc<Agents>,
    pub(super) slot: Slot,
    pub(super) address: SocketAddr,
    pub(super) told: watch::Receiver<Told>,
    pub(super) state: Arc<LinkState>,
}

impl LinkTask {
    /// Keeps the stream up for as long as the task runs.
    pub(super) async fn run(mut self) {
        let (slot, address, state) = (self.slot, self.address, self.state.clone());
        let mut pause = FIRST_PAUSE;
        loop {
            let since = *state.detached_since.lock();
            let attached = tokio::select! {
                attached = self.attach() => attached,
                () = overdue(since, &state) => Err(AttachError::OutOfReach),
            };
            if attached.is_ok() {
                *state.detached_since.lock() = Some(Instant::now());
            }
            state.outbox.lock().take();
            let change = self.agents.control.begin_change().await;
            self.agents.allocation.detach(&change, slot);
            drop(change);
            if self.agents.leaving.load(Ordering::Relaxed) {
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
            self.cut_when_overdue().await;
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Ends the sessions of an agent that was out of reach for too long.
    async fn cut_when_overdue(&self) {
        let since = *self.state.detached_since.lock();
        if since.is_none_or(|since| since.elapsed() < CUT_AFTER) {
            return;
        }
        let (slot, address) = (self.slot, self.address);
        let change = self.agents.control.begin_change().await;
        *self.state.detached_since.lock() = None;
        let sessions = change.forget_server(slot);
        if sessions > 0 {
            warn!(%slot, %address, sessions, "processing server out of reach; its sessions are cut");
        }
    }

    /// Attaches once and serves the stream until it ends.
    async fn attach(&mut self) -> Result<(), AttachError> {
        let (slot, address) = (self.slot, self.address);
        while self.agents.sessions.is_cutting(slot) {
            sleep(Duration::from_millis(1)).await;
        }
        let mut client = connect(address).await?;
        let (outbox, outgoing) = mpsc::unbounded_channel();
        let _detach = self.greet(&outbox).await?;
        let outgoing = UnboundedReceiverStream::new(outgoing).map(v1::ToAgent::from);
        let welcome = async {
            let mut incoming = client.attach(outgoing).await?.into_inner();
            match incoming.message().await?.map(FromAgent::try_from) {
                Some(Ok(FromAgent::Welcome(welcome))) => Ok((incoming, welcome)),
                _ => Err(AttachError::NoWelcome),
            }
        };
        let (incoming, welcome) = timeout(ATTACH_DEADLINE, welcome).await??;
        info!(%slot, %address, agent = welcome.agent, generation = welcome.generation, "attached to processing server");
        *self.state.outbox.lock() = Some(outbox.clone());
        let change = self.agents.control.begin_change().await;
        let knows_several_ports = welcome.knows_several_ports;
        let allocation = &self.agents.allocation;
        allocation.attach(slot, outbox.clone(), knows_several_ports);
        change.welcomed(slot, knows_several_ports);
        let sessions = &self.agents.sessions;
        sessions.amends(slot, welcome.knows_amendments);
        drop(change);
        self.serve(incoming, &outbox).await
    }

    /// Sends the greeting to `outbox`, which gets every further message.
    async fn greet(&mut self, outbox: &Outbox) -> Result<Detach, AttachError> {
        let slot = self.slot;
        let Told { table, unavailable } = self.told.borrow_and_update().clone();
        let greeting = Hello {
            pool_uid: table.pool_uid.clone(),
            connection_server: self.agents.id.clone(),
            table: table.encode()?,
            sessions: Vec::new(),
            host_identity: self.agents.host_identity.clone(),
            unavailable,
        };
        let greet = |sessions| {
            ToAgent::Hello(Hello {
                sessions,
                ..greeting
            })
        };
        let change = self.agents.control.begin_change().await;
        change.attach(slot, outbox.clone(), greet);
        Ok(Detach {
            sessions: self.agents.sessions.clone(),
            slot,
            outbox: outbox.clone(),
        })
    }

    /// Passes on what the agent sends, and newer tables to the agent.
    async fn serve(
        &mut self,
        mut incoming: Streaming<v1::FromAgent>,
        outbox: &Outbox,
    ) -> Result<(), AttachError> {
        let slot = self.slot;
        loop {
            tokio::select! {
                message = incoming.message() => match message {
                    Ok(Some(message)) => match FromAgent::try_from(message) {
                        Ok(message) => {
                            let change = self.agents.control.begin_change().await;
                            self.receive(&change, message);
                        }
                        Err(error) => self.ignore(&error),
                    },
                    Ok(None) => return Ok(()),
                    Err(error) => {
                        debug!(%slot, %error, "stream to processing server broke");
                        return Ok(());
                    }
                },
                changed = self.told.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let Told { table, unavailable } = self.told.borrow_and_update().clone();
                    let table = table.encode()?;
                    let _ = outbox.send(ToAgent::TableUpdate { table, unavailable });
                }
            }
        }
    }

    fn receive(&self, change: &Change<'_>, message: FromAgent) {
        let slot = self.slot;
        let allocation = &self.agents.allocation;
        match message {
            FromAgent::Counts(counts) => allocation.counted(change, slot, counts),
            FromAgent::Selected {
                request_id,
                session,
                counts,
            } => {
                let (ask, allocated) = (AskId(request_id), Allocated { slot, session });
                allocation.selected(change, ask, &allocated, counts);
            }
            FromAgent::Offered { request_id, counts } => {
                allocation.offered(change, AskId(request_id), slot, counts);
            }
            FromAgent::Refused {
                request_id,
                cause,
                reason,
            } => allocation.refused(change, AskId(request_id), cause, reason),
            FromAgent::Session(session) => allocation.found(change, slot, session),
            FromAgent::End { session_id, cause } => {
                self.agents.metrics.session_ended(cause.name());
                change.end(slot, &session_id, cause);
            }
            FromAgent::LookedUp {
                request_id,
                session,
            } => change.looked_up(slot, request_id, session),
            FromAgent::Amended {
                request_id,
                outcome,
            } => self.agents.sessions.amended(request_id, outcome),
            FromAgent::Welcome(_) => self.ignore(&"message out of place"),
        }
    }

    /// Counts a message that this version cannot use.
    fn ignore(&self, reason: &dyn Display) {
        debug!(slot = %self.slot, %reason, "message from processing server ignored");
        self.agents.metrics.unknown_messages.inc();
    }
}

async fn connect(address: SocketAddr) -> Result<SelectionClient<Channel>, AttachError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(ATTACH_DEADLINE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(SelectionClient::new(endpoint.connect().await?))
}

/// Completes when a stream that has been down since `since` is not up again at
/// the time when its sessions must be cut. An attempt to attach may be under
/// way: if it succeeded later, its greeting would list sessions that are cut.
async fn overdue(since: Option<Instant>, state: &LinkState) {
    let Some(since) = since else {
        return std::future::pending().await;
    };
    sleep_until(since + CUT_AFTER).await;
    if state.is_attached() {
        std::future::pending().await
    }
}

/// Detaches the sessions however the attachment ends, also when its task is
/// aborted.
struct Detach {
    sessions: Arc<Sessions>,
    slot: Slot,
    outbox: Outbox,
}

impl Drop for Detach {
    fn drop(&mut self) {
        self.sessions.detach(self.slot, &self.outbox);
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
