//! From a request to a session: reserve a server, have it select a port, and
//! on a refusal or a missed deadline ask the next one.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tracing::{Instrument, debug};

use super::reservations::{Reservation, Reservations};
use super::servers::{QueuePosition, ServerLoad};
use crate::connection::agents::{Agents, SelectError};
use crate::connection::metrics::Metrics;
use crate::connection::sessions::span::SessionSpan;
use crate::connection::sessions::{KnownSession, Sessions};
use crate::pool::ClientBinding;
use crate::selection::{RefusalCause, Select, Session};
use crate::session::{PortFilter, SessionId, SessionRequest};
use crate::table::{Slot, Table};

/// How long a request may take besides its own `waitSeconds`: a few servers
/// that miss their deadline of one second each.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// Why a request gets no session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No free port matched, even after the time that the client would wait.
    #[error("no matching port is free; try again, or let the request wait with waitSeconds")]
    NoFreePort,
    /// No agent is attached.
    #[error("no processing server is attached; see GET /v1/pool")]
    NoServer,
    /// Too many requests wait already.
    #[error("too many requests are waiting; try again later")]
    QueueFull,
    /// The pool has no port entry of that name and protocol.
    #[error("no port entry has name and protocol as requested; the pool has {0}")]
    UnknownPort(String),
    /// The idempotency key's session was made by another request.
    #[error("idempotencyKey belongs to a live session made by a different request; use a new key")]
    KeyReused,
    /// The connection server stops.
    #[error("this connection server is shutting down; ask again and another one answers")]
    ShuttingDown,
}

impl Refusal {
    /// Static name, for metrics and problem types.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoFreePort => "no-free-port",
            Self::NoServer => "no-server",
            Self::QueueFull => "queue-full",
            Self::UnknownPort(_) => "unknown-port",
            Self::KeyReused => "key-reused",
            Self::ShuttingDown => "shutting-down",
        }
    }
}

/// A session that a request got.
#[derive(Clone, Debug)]
pub struct Allocated {
    /// The slot of its server.
    pub slot: Slot,
    /// The session as its agent reported it.
    pub session: Session,
}

/// Allocates sessions.
pub struct Allocation {
    agents: Arc<Agents>,
    reservations: Arc<Reservations>,
    sessions: Arc<Sessions>,
    metrics: Arc<Metrics>,
    table: watch::Receiver<Arc<Table>>,
    // One request per idempotency key at a time: the second finds the session
    // of the first.
    keys: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// A validated request and where it came from.
#[derive(Clone, Debug)]
struct Wanted {
    filter: PortFilter,
    idempotency_key: Option<String>,
    affinity_key: Option<String>,
    bound_client: Option<IpAddr>,
    /// The end of its wait for a free port; `None` when it does not wait.
    wait_until: Option<Instant>,
    give_up: Instant,
    span: SessionSpan,
}

impl Allocation {
    /// Puts the parts together.
    #[must_use]
    pub fn new(
        agents: Arc<Agents>,
        reservations: Arc<Reservations>,
        sessions: Arc<Sessions>,
        metrics: Arc<Metrics>,
        table: watch::Receiver<Arc<Table>>,
    ) -> Self {
        Self {
            agents,
            reservations,
            sessions,
            metrics,
            table,
            keys: Mutex::default(),
        }
    }

    /// Gives the request from `client` a session.
    ///
    /// # Errors
    /// The [`Refusal`] to send to the client.
    pub async fn allocate(
        self: &Arc<Self>,
        request: SessionRequest,
        client: IpAddr,
    ) -> Result<Allocated, Refusal> {
        let started = Instant::now();
        let result = match self.want(request, client) {
            Ok(wanted) => {
                let span = wanted.span.span().clone();
                self.get(wanted).instrument(span).await
            }
            Err(refusal) => Err(refusal),
        };
        let outcome = result.as_ref().map_or_else(Refusal::name, |_| "allocated");
        self.metrics.allocated(outcome, started.elapsed());
        result
    }

    async fn get(self: &Arc<Self>, wanted: Wanted) -> Result<Allocated, Refusal> {
        match wanted.idempotency_key.clone() {
            None => self.select(&wanted).await,
            // On its own task, so that a client that hangs up and asks again
            // finds the session that its first request was getting.
            Some(key) => {
                let this = self.clone();
                let task = async move { this.allocate_once(&key, &wanted).await };
                let task = tokio::spawn(task.in_current_span());
                task.await.unwrap_or(Err(Refusal::ShuttingDown))
            }
        }
    }

    fn want(&self, request: SessionRequest, client: IpAddr) -> Result<Wanted, Refusal> {
        let table = self.table.borrow();
        let binding = request.client_binding.unwrap_or_default();
        let is_bound = binding == ClientBinding::Requester
            || table.sessions.client_binding == ClientBinding::Requester;
        let filter = PortFilter {
            port_name: request.port_name,
            protocol: request.protocol,
        };
        let ranges = || table.rows.iter().flat_map(|row| &row.ranges);
        // A pool scaled to nothing has no names to compare with.
        if !table.rows.is_empty()
            && !ranges().any(|range| filter.admits(&range.name, range.protocol))
        {
            let mut entries: Vec<String> = ranges()
                .map(|range| format!("{} ({})", range.name, range.protocol.name()))
                .collect();
            entries.sort();
            entries.dedup();
            return Err(Refusal::UnknownPort(entries.join(", ")));
        }
        let now = Instant::now();
        let wait = Duration::from_secs(request.wait_seconds.into());
        Ok(Wanted {
            filter,
            idempotency_key: request.idempotency_key,
            affinity_key: request.affinity_key,
            bound_client: is_bound.then_some(client),
            wait_until: (!wait.is_zero()).then(|| now + wait),
            give_up: now + wait + ASK_LIMIT,
            span: SessionSpan::request(client),
        })
    }

    async fn allocate_once(&self, key: &str, wanted: &Wanted) -> Result<Allocated, Refusal> {
        let lock = self.keys.lock().entry(key.to_owned()).or_default().clone();
        let guard = lock.lock().await;
        let result = match self.sessions.get_by_idempotency_key(key) {
            Some(known) if wanted.made(&known.session) => {
                let KnownSession { slot, session } = known;
                Ok(Allocated { slot, session })
            }
            Some(_) => Err(Refusal::KeyReused),
            None => self.select(wanted).await,
        };
        drop(guard);
        let mut keys = self.keys.lock();
        // Ours and the map's: no other request waits for the key.
        if Arc::strong_count(&lock) == 2 {
            keys.remove(key);
        }
        result
    }

    /// Asks one server after the other until one selects a port.
    async fn select(&self, wanted: &Wanted) -> Result<Allocated, Refusal> {
        let mut excluded = Vec::new();
        let mut position = None;
        loop {
            let affinity_key = wanted.affinity_key.as_deref();
            let reserved = match position {
                None => self
                    .reservations
                    .reserve(&wanted.filter, affinity_key, &excluded),
                Some(_) => None,
            };
            let reservation = match reserved {
                Some(reservation) => reservation,
                None => {
                    let (reservation, waited) = self.wait(wanted, position).await?;
                    position = Some(waited);
                    excluded.clear();
                    reservation
                }
            };
            match self.ask(wanted, &reservation).await {
                Ok(session) => {
                    let slot = reservation.slot;
                    return Ok(Allocated { slot, session });
                }
                Err(SelectError::Refused(RefusalCause::KeyReused)) => {
                    return Err(Refusal::KeyReused);
                }
                Err(error) => {
                    debug!(
                        slot = %reservation.slot,
                        ?error,
                        "processing server did not select a port"
                    );
                    self.metrics.not_selected(error.name());
                    excluded.push(reservation.slot);
                }
            }
            if Instant::now() >= wanted.give_up {
                return Err(Refusal::NoFreePort);
            }
        }
    }

    async fn ask(
        &self,
        wanted: &Wanted,
        reservation: &Reservation,
    ) -> Result<Session, SelectError> {
        let request = Select {
            request_id: 0,
            session_id: SessionId::random(),
            idempotency_key: wanted.idempotency_key.clone(),
            filter: wanted.filter.clone(),
            bound_client: wanted.bound_client,
        };
        self.agents
            .select(reservation.slot, request, wanted.span.clone())
            .await
    }

    async fn wait(
        &self,
        wanted: &Wanted,
        position: Option<QueuePosition>,
    ) -> Result<(Reservation, QueuePosition), Refusal> {
        let Some(wait_until) = wanted.wait_until else {
            let has_server = self
                .reservations
                .inspect(|servers| servers.loads().any(ServerLoad::takes_sessions));
            return Err(if has_server {
                Refusal::NoFreePort
            } else {
                Refusal::NoServer
            });
        };
        let affinity_key = wanted.affinity_key.as_deref();
        let waiting = self
            .reservations
            .wait(&wanted.filter, affinity_key, position);
        let mut waiting = waiting.ok_or(Refusal::QueueFull)?;
        let position = waiting.position();
        match timeout_at(wait_until, waiting.turn()).await {
            Ok(Some(reservation)) => Ok((reservation, position)),
            Ok(None) => Err(Refusal::ShuttingDown),
            Err(_) => Err(Refusal::NoFreePort),
        }
    }
}

impl Wanted {
    /// Whether this request could have made `session`.
    fn made(&self, session: &Session) -> bool {
        self.filter.admits(&session.port_name, session.protocol)
            && self.bound_client == session.bound_client
    }
}
