//! Streams to the processing servers' agents: the first sending part and the
//! second receiving part of claim 1, as the client side of the selection
//! protocol.
//!
//! One task per processing server keeps one stream up and carries what comes
//! in to the sessions and to load sharing. Decisions are theirs.
//!
//! ```text
//! allocation ─select→ Agents ─stream→ agent
//! agent ─counts→ load sharing     agent ─session, end→ sessions ─cut→ forwarder
//! ```

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock, RwLockReadGuard, mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;
use tracing::{debug, info, warn};

use super::forward::Forwarder;
use super::metrics::Metrics;
use super::reservations::Reservations;
use super::sessions::{Action, Outbox, Sessions};
use super::trace::Trace;
use crate::pool::PortProtocol;
use crate::selection::v1::selection_client::SelectionClient;
use crate::selection::v1::{self, FromAgent, ToAgent, from_agent, refused, to_agent::Message};
use crate::selection::{
    CUT_AFTER, CUT_SLACK, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, PROTOCOL_VERSION,
};
use crate::session::PortState;
use crate::table::{Row, RowState, Table};

/// How long a server may take to select a port before the next one is asked.
/// A selection takes well under a millisecond; a second is a server in trouble.
const SELECT_DEADLINE: Duration = Duration::from_secs(1);

/// How long a connection and its greeting may take.
const ATTACH_DEADLINE: Duration = Duration::from_secs(2);

/// Pause before the first try to attach again, doubled up to the longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const LONGEST_PAUSE: Duration = CUT_SLACK;

/// How long agents may take to hear that this connection server stops.
const LEAVE_DEADLINE: Duration = Duration::from_secs(1);

/// Why a processing server did not select a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelectError {
    /// It said no.
    Refused(refused::Cause),
    /// It did not answer within a second.
    TimedOut,
    /// Its stream is down, or went down before the answer.
    Detached,
}

/// What a connection server begins with; from a predecessor, if there was one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandedAgents {
    /// What agents know it by.
    pub id: String,
    /// Where it listens, as agents are told.
    pub place: String,
    /// When a slot's agent was last in reach: its sessions are to be cut as
    /// early as if nothing had been handed over. Not of those that are cut.
    pub reached: HashMap<u32, Instant>,
}

impl HandedAgents {
    /// Of a connection server that nobody knows yet.
    #[must_use]
    pub fn new(place: String) -> Self {
        Self {
            id: uuid::Uuid::new_v4().simple().to_string(),
            place,
            reached: HashMap::new(),
        }
    }
}

/// The streams to all processing servers.
pub struct Agents {
    /// Names this connection server to agents; a successor goes on under it.
    id: String,
    /// Where it listens; a successor goes on with the same socket.
    place: String,
    /// When a predecessor last reached agents that no stream was opened to yet.
    reached: Mutex<HashMap<u32, Instant>>,
    /// Held for reading while sessions change, for writing by a hand-over.
    steps: Arc<RwLock<()>>,
    sessions: Arc<Sessions>,
    reservations: Arc<Reservations>,
    forwarder: Arc<Forwarder>,
    metrics: Arc<Metrics>,
    links: Mutex<HashMap<u32, Link>>,
    next_request: AtomicU64,
    leaving: AtomicBool,
}

struct Link {
    address: SocketAddr,
    server_uid: Option<String>,
    row: watch::Sender<Arc<Table>>,
    task: AbortHandle,
    stream: Arc<Mutex<Option<Stream>>>,
    /// Since when the stream was down, the last time that it was; `None` when
    /// the sessions were cut.
    detached_since: Arc<Mutex<Option<Instant>>>,
}

/// What a stream that is up needs to send requests and match answers.
struct Stream {
    outbox: Outbox,
    pending: HashMap<u64, Waiting>,
}

/// A request that waits for its answer.
struct Waiting {
    answer: oneshot::Sender<Result<v1::Session, SelectError>>,
    trace: Trace,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agents {
    /// No streams yet; [`Agents::set_table`] starts them.
    #[must_use]
    pub fn new(
        handed: HandedAgents,
        sessions: Arc<Sessions>,
        reservations: Arc<Reservations>,
        forwarder: Arc<Forwarder>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            id: handed.id,
            place: handed.place,
            reached: Mutex::new(handed.reached),
            steps: Arc::default(),
            sessions,
            reservations,
            forwarder,
            metrics,
            links: Mutex::default(),
            next_request: AtomicU64::new(1),
            leaving: AtomicBool::new(false),
        }
    }

    /// What a successor has to know. Nothing changes here.
    #[must_use]
    pub fn hand_over(&self) -> HandedAgents {
        let links = self.links.lock();
        let reached = links.iter().filter_map(|(slot, link)| {
            let since = match link.stream.lock().is_some() {
                true => Instant::now(),
                false => (*link.detached_since.lock())?,
            };
            Some((*slot, since))
        });
        HandedAgents {
            id: self.id.clone(),
            place: self.place.clone(),
            reached: reached.collect(),
        }
    }

    /// Whoever changes sessions, or has the data plane follow them, holds this
    /// meanwhile.
    pub async fn step(&self) -> RwLockReadGuard<'_, ()> {
        self.steps.read().await
    }

    /// Waits until no step is under way; none begins while the result lives.
    /// Agents are not told anything and not heard meanwhile.
    pub async fn pause(&self) -> OwnedRwLockWriteGuard<()> {
        self.steps.clone().write_owned().await
    }

    /// Follows `table`: streams to new servers, none to removed ones, and the
    /// row to the others. Sessions of removed and replaced servers end.
    pub fn set_table(self: &Arc<Self>, table: &Arc<Table>) {
        let mut links = self.links.lock();
        let gone: Vec<u32> = links
            .iter()
            .filter(|(slot, link)| {
                !table
                    .row(**slot)
                    .is_some_and(|row| link.leads_to(row, table))
            })
            .map(|(slot, _)| *slot)
            .collect();
        for slot in gone {
            links.remove(&slot);
            self.reservations.detach(slot);
            self.carry_out(self.sessions.forget_server(slot));
        }
        for row in &table.rows {
            let Some(address) = row.socket_address(table.agent_port) else {
                continue;
            };
            self.reservations
                .set_draining(row.slot, row.state == RowState::Draining);
            match links.get(&row.slot) {
                Some(link) => link.update(row.slot, table),
                None => {
                    links.insert(row.slot, self.open(row, address, table));
                }
            }
        }
        drop(links);
        self.reservations.retain(|slot| table.row(slot).is_some());
    }

    fn open(self: &Arc<Self>, row: &Row, address: SocketAddr, table: &Arc<Table>) -> Link {
        let (sender, receiver) = watch::channel(table.clone());
        let stream = Arc::new(Mutex::new(None));
        let reached = self.reached.lock().remove(&row.slot);
        let detached_since = Arc::new(Mutex::new(Some(reached.unwrap_or_else(Instant::now))));
        let task = tokio::spawn(Arc::clone(self).keep_attached(
            row.slot,
            address,
            receiver,
            stream.clone(),
            detached_since.clone(),
        ));
        Link {
            address,
            server_uid: row.server_uid.clone(),
            row: sender,
            task: task.abort_handle(),
            stream,
            detached_since,
        }
    }

    /// Ends all streams without a goodbye: a successor goes on under the name.
    pub fn vanish(&self) {
        self.links.lock().clear();
    }

    /// Asks the server of `slot` to select one of its available connection
    /// ports: claim 1's request to select.
    ///
    /// # Errors
    /// [`SelectError`]; a selection that arrives after that is released.
    pub async fn select(
        &self,
        slot: u32,
        request: v1::Select,
        trace: Trace,
    ) -> Result<v1::Session, SelectError> {
        let request_id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, answered) = oneshot::channel();
        let stream = {
            let links = self.links.lock();
            links
                .get(&slot)
                .ok_or(SelectError::Detached)?
                .stream
                .clone()
        };
        {
            // A successor would not know what the answer is for.
            let _step = self.step().await;
            let mut stream = stream.lock();
            let stream = stream.as_mut().ok_or(SelectError::Detached)?;
            let answer = sender;
            stream.pending.insert(request_id, Waiting { answer, trace });
            let message = Some(Message::Select(v1::Select {
                request_id,
                ..request
            }));
            let _ = stream.outbox.send(ToAgent { message });
        }
        match timeout(SELECT_DEADLINE, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(SelectError::Detached),
            Err(_) => {
                if let Some(stream) = stream.lock().as_mut() {
                    stream.pending.remove(&request_id);
                }
                Err(SelectError::TimedOut)
            }
        }
    }

    /// Says goodbye to every agent, so that none waits for this connection
    /// server before it gives ports to others. Nothing may be open any more.
    pub async fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        for link in self.links.lock().values() {
            if let Some(stream) = link.stream.lock().as_ref() {
                let message = Some(Message::Goodbye(v1::Goodbye {}));
                let _ = stream.outbox.send(ToAgent { message });
            }
        }
        // The agent ends the stream when it has heard.
        let heard = async {
            let is_attached = |link: &Link| link.stream.lock().is_some();
            while self.links.lock().values().any(is_attached) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        if timeout(LEAVE_DEADLINE, heard).await.is_err() {
            warn!("some processing servers did not hear that this connection server stops");
        }
    }

    /// Carries out what the sessions want from the data plane.
    pub fn carry_out(&self, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            match action {
                Action::Cut(port, session) => self.forwarder.cut(port, session),
                Action::Answer(port, ticket, verdict) => {
                    self.forwarder.answer(port, ticket, verdict)
                }
            }
        }
    }

    /// Keeps one stream up for as long as the task runs.
    async fn keep_attached(
        self: Arc<Self>,
        slot: u32,
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
                    info!(slot, %address, "stream to processing server ended");
                }
                Err(error) => {
                    debug!(slot, %address, %error, "failed to attach to processing server")
                }
            }
            let since = *detached_since.lock();
            if since.is_some_and(|since| since.elapsed() >= CUT_AFTER) {
                let _step = self.step().await;
                *detached_since.lock() = None;
                let actions = self.sessions.forget_server(slot);
                if !actions.is_empty() {
                    warn!(slot, %address, sessions = actions.len(), "processing server out of reach; its sessions are cut");
                }
                self.carry_out(actions);
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Attaches once and serves the stream until it ends.
    async fn attach(
        &self,
        slot: u32,
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
        let step = self.step().await;
        self.sessions.attach(slot, outbox.clone(), |sessions| {
            let message = Some(Message::Hello(v1::Hello {
                sessions,
                ..greeting
            }));
            ToAgent { message }
        });
        drop(step);
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
        info!(slot, %address, agent = welcome.agent, generation = welcome.generation, "attached to processing server");
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
                        let _step = self.step().await;
                        self.receive(slot, message, stream, &outbox);
                    }
                    Ok(Some(FromAgent { message: None })) => {
                        self.metrics.unknown_messages.inc();
                    }
                    Ok(None) => return Ok(()),
                    Err(error) => {
                        debug!(slot, %error, "stream to processing server broke");
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

    fn greeting(&self, slot: u32, table: &Table) -> Result<v1::Hello, AttachError> {
        Ok(v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            pool_uid: table.pool_uid.clone(),
            connection_server: self.id.clone(),
            table: table.slice(slot).encode()?,
            sessions: Vec::new(),
            place: self.place.clone(),
        })
    }

    fn receive(
        &self,
        slot: u32,
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
                let trace = || match &waiting {
                    Some(waiting) => waiting.trace.clone(),
                    None => Trace::learned(),
                };
                let actions = self.sessions.learn_traced(slot, session.clone(), trace);
                self.carry_out(actions);
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
            From::Session(session) => self.carry_out(self.sessions.learn(slot, session)),
            From::End(end) => {
                self.metrics.session_ended(end.cause());
                self.carry_out(self.sessions.end(slot, &end.session_id, end.cause()));
            }
            From::LookedUp(v1::LookedUp {
                request_id,
                session,
            }) => {
                self.carry_out(self.sessions.looked_up(slot, request_id, session));
            }
            From::Welcome(_) | From::Selected(_) => {
                self.metrics.unknown_messages.inc();
            }
        }
    }
}

impl Link {
    /// Whether the link's server is still the one in `row`.
    fn leads_to(&self, row: &Row, table: &Table) -> bool {
        let is_replaced = matches!(
            (&self.server_uid, &row.server_uid),
            (Some(before), Some(now)) if before != now
        );
        !is_replaced && row.socket_address(table.agent_port) == Some(self.address)
    }

    fn update(&self, slot: u32, table: &Arc<Table>) {
        self.row.send_if_modified(|current| {
            let changed = current.row(slot) != table.row(slot)
                || current.sessions != table.sessions
                || current.load_sharing != table.load_sharing;
            if changed {
                *current = table.clone();
            }
            changed
        });
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
    slot: u32,
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
            silent: ports.silent,
        })
    });
    states.collect()
}
