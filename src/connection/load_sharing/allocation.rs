//! Allocates sessions: carries out what the queue decides. Clients come from
//! `api`, the agents' answers from their streams, the time from here.
//!
//! ```text
//! client ─→ Allocation ─→ Queue (lock, no await) ─asks→ outboxes ─Select→ agents
//! agent ─answers, counts→ ↑         └─answers→ clients
//! ```
//!
//! The queue's lock comes before that of the sessions: nothing here is called
//! under theirs.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tracing::debug;

use super::possible;
use super::queue::{Allocated, AskId, Caller, Decision, Queue, Unconfirmed, Wanted};
use super::refusal::Refusal;
use crate::connection::control::{Change, Control};
use crate::connection::metrics::Metrics;
use crate::connection::sessions::span::SessionSpan;
use crate::connection::sessions::{KnownSession, Outbox, Sessions};
use crate::pool::ClientBinding;
use crate::selection::{Counts, RefusalCause, Select, Session, ToAgent};
use crate::session::{SessionId, SessionRequest};
use crate::table::{Slot, Table};

/// How long a request waits for the session that `near` names: longer than a report of
/// its agent takes, also on a busy machine. Only a request with an unknown id pays.
const NEAR_GRACE: Duration = Duration::from_millis(1500);

/// How often it looks whether that is known meanwhile.
const NEAR_CHECK: Duration = Duration::from_millis(10);

/// What a client is answered.
type Answer = Result<Allocated, Refusal>;

/// Allocates sessions.
pub struct Allocation {
    control: Arc<Control>,
    sessions: Arc<Sessions>,
    metrics: Arc<Metrics>,
    inner: Mutex<Inner>,
    /// A deadline has come nearer than the one that is slept for.
    sooner: Notify,
}

struct Inner {
    queue: Queue,
    clients: HashMap<Caller, Client>,
    outboxes: HashMap<Slot, Outbox>,
    /// The deadline that is slept for.
    alarm: Option<Instant>,
}

/// A client that is not answered yet.
struct Client {
    answer: oneshot::Sender<Answer>,
    span: SessionSpan,
}

/// A client's request in the queue, which it leaves when this is dropped.
struct Entered {
    allocation: Arc<Allocation>,
    caller: Caller,
    answer: oneshot::Receiver<Answer>,
    /// Whether the client can ask for the same session again.
    has_key: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut inner = self.allocation.inner.lock();
        let decisions = inner.queue.leave(self.caller);
        inner.clients.remove(&self.caller);
        self.allocation.carry_out(&mut inner, decisions);
        drop(inner);
        // An answer that came too late for the client.
        if let Ok(Ok(allocated)) = self.answer.try_recv()
            && !self.has_key
        {
            let control = self.allocation.control.clone();
            tokio::spawn(async move { control.release(&allocated.session.id).await });
        }
    }
}

impl Allocation {
    /// An empty queue in which at most `most_waiting` clients wait.
    #[must_use]
    pub fn new(
        control: Arc<Control>,
        sessions: Arc<Sessions>,
        metrics: Arc<Metrics>,
        most_waiting: usize,
    ) -> Self {
        let inner = Inner {
            queue: Queue::new(most_waiting),
            clients: HashMap::new(),
            outboxes: HashMap::new(),
            alarm: None,
        };
        Self {
            control,
            sessions,
            metrics,
            inner: Mutex::new(inner),
            sooner: Notify::new(),
        }
    }

    /// Gives the request from `client` a session of the pool of `table`. It leaves
    /// the queue when this is dropped.
    ///
    /// # Errors
    /// The [`Refusal`] to send to the client.
    pub async fn allocate(
        self: &Arc<Self>,
        request: SessionRequest,
        client: IpAddr,
        table: &Table,
    ) -> Answer {
        let started = Instant::now();
        let wait = Duration::from_secs(request.wait_seconds.into());
        let of_key = || self.slot_of_key(request.idempotency_key.as_deref()?);
        if let Some(near) = &request.near
            && of_key().is_none()
        {
            self.until_known(near).await;
        }
        let result = match self.wanted(request, client, table) {
            Ok(wanted) => {
                let change = self.control.begin_change().await;
                let mut entered = self.enter(&change, wanted, wait, SessionSpan::request(client));
                drop(change);
                let answer = (&mut entered.answer).await;
                answer.unwrap_or(Err(Refusal::ShuttingDown))
            }
            Err(refusal) => Err(refusal),
        };
        let outcome = result.as_ref().map_or_else(Refusal::name, |_| "allocated");
        self.metrics.allocated(outcome, started.elapsed());
        result
    }

    /// Waits a moment for the session `id`, which another connection server may have
    /// made just now: its agent reports it to all.
    async fn until_known(&self, id: &str) {
        let Some(id) = SessionId::new(id) else {
            return;
        };
        let deadline = Instant::now() + NEAR_GRACE;
        while self.sessions.get(&id).is_none() && Instant::now() < deadline {
            tokio::time::sleep(NEAR_CHECK).await;
        }
    }

    /// What `request` wants of the pool of `table`.
    fn wanted(
        &self,
        request: SessionRequest,
        client: IpAddr,
        table: &Table,
    ) -> Result<Wanted, Refusal> {
        let (slot, refusal) = match (&request.server, &request.near) {
            (Some(name), _) => {
                let row = table.rows.iter().find(|row| row.server == *name);
                (row.map(|row| row.slot), Refusal::UnknownServer)
            }
            (None, Some(id)) => {
                let near = SessionId::new(id).and_then(|id| self.sessions.get(&id));
                (near.map(|near| near.slot), Refusal::UnknownSession)
            }
            (None, None) => return wanted_of_any(request, client, table),
        };
        // What it names may be gone since it was sent first.
        let slot = slot.or_else(|| self.slot_of_key(request.idempotency_key.as_deref()?));
        let only = Some(slot.ok_or(refusal)?);
        let wanted = wanted_of_any(request, client, table)?;
        Ok(Wanted { only, ..wanted })
    }

    /// The slot of the server that the request with `key` is for: that of its live
    /// session, or the one that it waits for.
    fn slot_of_key(&self, key: &str) -> Option<Slot> {
        // Under the lock: the request is either in the queue, or its session is known.
        let inner = self.inner.lock();
        let live = self.sessions.get_by_idempotency_key(key);
        let live = live.map(|live| live.slot);
        live.or_else(|| inner.queue.only_of_key(key))
    }

    /// Puts a client into the queue.
    fn enter(
        self: &Arc<Self>,
        _: &Change<'_>,
        wanted: Wanted,
        wait: Duration,
        span: SessionSpan,
    ) -> Entered {
        let key = wanted.idempotency_key.as_deref();
        let has_key = key.is_some();
        let mut inner = self.inner.lock();
        // Under the lock: a request with the key is either in the queue, or its
        // session is known.
        let live = key.and_then(|key| self.sessions.get_by_idempotency_key(key));
        let live = live.map(|KnownSession { slot, session }| Allocated { slot, session });
        let is_returning = self.sessions.is_any_ending();
        let now = Instant::now();
        let until = now + wait;
        let (caller, decisions) = inner.queue.enter(wanted, live, is_returning, until, now);
        let (sender, answer) = oneshot::channel();
        let client = Client {
            answer: sender,
            span,
        };
        inner.clients.insert(caller, client);
        self.carry_out(&mut inner, decisions);
        Entered {
            allocation: self.clone(),
            caller,
            answer,
            has_key,
        }
    }

    /// Changes the queue and carries out what follows.
    fn change(&self, change: impl FnOnce(&mut Queue, Instant) -> Vec<Decision>) {
        let mut inner = self.inner.lock();
        let decisions = change(&mut inner.queue, Instant::now());
        self.carry_out(&mut inner, decisions);
    }

    fn carry_out(&self, inner: &mut Inner, decisions: Vec<Decision>) {
        for decision in decisions {
            match decision {
                Decision::Ask {
                    ask,
                    slot,
                    wanted,
                    confirm_within,
                } => {
                    if let Some(outbox) = inner.outboxes.get(&slot) {
                        // When the stream just broke, it is detached next.
                        let _ = outbox.send(ToAgent::Select(select(ask, wanted, confirm_within)));
                    }
                }
                Decision::Withdraw { ask, slot } => {
                    if let Some(outbox) = inner.outboxes.get(&slot) {
                        let _ = outbox.send(ToAgent::Withdraw { request_id: ask.0 });
                    }
                }
                Decision::Answer(caller, answer) => {
                    if let Some(client) = inner.clients.remove(&caller) {
                        let _ = client.answer.send(answer);
                    }
                }
                Decision::NotSelected(slot, error) => {
                    debug!(%slot, ?error, "processing server did not select a port");
                    self.metrics.not_selected(error.name());
                }
            }
        }
        self.hurry(inner);
    }

    /// Wakes up whoever keeps time if there is something to do sooner.
    fn hurry(&self, inner: &Inner) {
        let next = inner.queue.next_deadline();
        if next.is_some_and(|next| inner.alarm.is_none_or(|alarm| next < alarm)) {
            self.sooner.notify_one();
        }
    }

    /// Does what the queue has to do in time, for as long as it is polled.
    pub async fn keep_time(&self) {
        loop {
            let alarm = {
                let mut inner = self.inner.lock();
                inner.alarm = inner.queue.next_deadline();
                inner.alarm
            };
            let due = async {
                match alarm {
                    Some(alarm) => tokio::time::sleep_until(alarm.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {
                    let _change = self.control.begin_change().await;
                    self.change(Queue::tick);
                }
                () = self.sooner.notified() => {}
            }
        }
    }

    /// An agent's stream is up: requests go to `outbox` once it has reported its
    /// ports; those for several ports if it knows them.
    pub fn attach(&self, slot: Slot, outbox: Outbox, knows_several_ports: bool) {
        let mut inner = self.inner.lock();
        inner.outboxes.insert(slot, outbox);
        inner.queue.attach(slot, knows_several_ports);
    }

    /// An agent's stream is down: other servers are asked instead.
    pub fn detach(&self, _: &Change<'_>, slot: Slot) {
        self.inner.lock().outboxes.remove(&slot);
        self.change(|queue, now| queue.detach(slot, now));
    }

    /// Follows `table`.
    pub fn follow(&self, _: &Change<'_>, table: &Table) {
        self.change(|queue, now| queue.follow(table, now));
    }

    /// An agent reported its ports.
    pub fn counted(&self, _: &Change<'_>, slot: Slot, counts: Counts) {
        self.change(|queue, now| queue.counted(slot, counts, now));
    }

    /// An agent has selected a port for the question `ask`, after which it has
    /// `counts`. A new session that no one needs any more is given back.
    pub fn selected(&self, change: &Change<'_>, ask: AskId, allocated: &Allocated, counts: Counts) {
        let Allocated { slot, session } = allocated;
        // Under one key an agent selects the same session again.
        let is_new = self.sessions.get(&session.id).is_none();
        let span = self.span(ask);
        let span = || span.unwrap_or_else(SessionSpan::learned);
        // Before its client knows the port.
        change.learn(*slot, session.clone(), span);
        let mut inner = self.inner.lock();
        let now = Instant::now();
        let (is_needed, decisions) = inner.queue.selected(ask, allocated, counts, now);
        // Under the lock: a client that asks again under the key must not be told
        // of what is given back.
        if !is_needed
            && is_new
            && change.release(&session.id).is_err()
            && let Some(outbox) = inner.outboxes.get(slot)
        {
            let _ = outbox.send(ToAgent::Release(session.id.clone()));
        }
        self.carry_out(&mut inner, decisions);
    }

    /// An agent has refused to select a port for the question `ask`.
    /// The workload may give a `reason`.
    pub fn refused(&self, _: &Change<'_>, ask: AskId, cause: RefusalCause, reason: Option<String>) {
        self.change(|queue, now| match Unconfirmed::new(cause, reason) {
            Some(unconfirmed) => queue.turned_down(ask, unconfirmed, now),
            None => queue.refused(ask, cause, now),
        });
    }

    /// An agent asks its workload to confirm the session for the question `ask`, and has
    /// `counts` then.
    pub fn offered(&self, _: &Change<'_>, ask: AskId, slot: Slot, counts: Counts) {
        self.change(|queue, now| queue.offered(ask, slot, counts, now));
    }

    /// An agent reported a session that another connection server made. It may be
    /// what a request with its key waits for.
    pub fn found(&self, change: &Change<'_>, slot: Slot, session: Session) {
        change.learn(slot, session.clone(), SessionSpan::learned);
        // One that is over here, and that its agent still reports, is no answer.
        if session.idempotency_key.is_some() && self.sessions.get(&session.id).is_some() {
            self.change(|queue, _| queue.found(&Allocated { slot, session }));
        }
    }

    /// The span of the request that `ask` is for, if its client is still there.
    fn span(&self, ask: AskId) -> Option<SessionSpan> {
        let inner = self.inner.lock();
        let client = inner.clients.get(&inner.queue.caller_of(ask)?)?;
        Some(client.span.clone())
    }

    /// Refuses every request that waits or would wait.
    pub fn close(&self) {
        self.change(Queue::close);
    }

    /// Lets requests wait again.
    pub fn open(&self) {
        self.inner.lock().queue.open();
    }

    /// Reads from the servers and the queue.
    pub fn inspect<T>(&self, inspect: impl FnOnce(&Queue) -> T) -> T {
        inspect(&self.inner.lock().queue)
    }
}

/// What `request` wants of the pool of `table`, whichever server it is for.
fn wanted_of_any(
    request: SessionRequest,
    client: IpAddr,
    table: &Table,
) -> Result<Wanted, Refusal> {
    let is_bound = [request.client_binding, Some(table.sessions.client_binding)]
        .contains(&Some(ClientBinding::Requester));
    let ports = request.blocks().map_err(Refusal::InvalidPorts)?;
    possible::check(&ports, table)?;
    Ok(Wanted {
        ports,
        only: None,
        affinity_key: request.affinity_key,
        idempotency_key: request.idempotency_key,
        bound_client: is_bound.then_some(client),
        metadata: request.metadata,
        requester: Some(client),
    })
}

fn select(ask: AskId, wanted: Wanted, confirm_within: Option<Duration>) -> Select {
    Select {
        request_id: ask.0,
        session_id: SessionId::random(),
        idempotency_key: wanted.idempotency_key,
        ports: wanted.ports,
        bound_client: wanted.bound_client,
        metadata: wanted.metadata,
        requester: wanted.requester,
        confirm_within,
    }
}

impl std::fmt::Debug for Allocation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Allocation")
            .field("queue", &self.inner.lock().queue)
            .finish_non_exhaustive()
    }
}
