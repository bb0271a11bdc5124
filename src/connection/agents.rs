//! Streams to the processing servers' agents: the first sending part and the
//! second receiving part of claim 1, as the client side of the selection
//! protocol.
//!
//! One task per processing server (`link`) keeps one stream up and passes what
//! arrives on to the sessions and to load sharing, which decide. Both send to
//! the agent through the stream's outbox. `host_identity` says who this connection
//! server is to them.
//!
//! ```text
//! allocation ─Select→ outbox ─stream→ agent
//! agent ─counts, answers→ allocation     agent ─session, end→ control
//! ```

pub(in crate::connection) mod host_identity;
mod link;

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use self::link::{LinkState, LinkTask};
use super::control::{Change, Control};
use super::load_sharing::allocation::Allocation;
use super::metrics::Metrics;
use super::sessions::Sessions;
use crate::selection::{ConnectionServerId, ToAgent};
use crate::table::{ListenPort, Row, Slot, Table};

/// How long agents may take to note that this connection server stops.
const LEAVE_DEADLINE: Duration = Duration::from_secs(1);

/// What a connection server starts with; a predecessor's, if there was one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentsSnapshot {
    /// The id that agents know it by.
    pub id: ConnectionServerId,
    /// The identity of its listening socket, as agents know it.
    pub host_identity: String,
    /// When a slot's agent was last in reach: its sessions are cut as early as
    /// if nothing had been handed over. Absent once they are cut.
    pub reached: HashMap<Slot, Instant>,
}

impl AgentsSnapshot {
    /// The state of a connection server that no agent knows yet.
    #[must_use]
    pub fn new(host_identity: String) -> Self {
        Self {
            id: ConnectionServerId::random(),
            host_identity,
            reached: HashMap::new(),
        }
    }
}

/// The streams to all processing servers.
pub struct Agents {
    /// The id of this connection server, which a successor goes on under.
    id: ConnectionServerId,
    /// The identity of its listening socket, which a successor goes on with.
    host_identity: String,
    /// When a predecessor last reached agents that no stream was opened to yet.
    reached: Mutex<HashMap<Slot, Instant>>,
    control: Arc<Control>,
    sessions: Arc<Sessions>,
    allocation: Arc<Allocation>,
    metrics: Arc<Metrics>,
    links: Mutex<HashMap<Slot, Link>>,
    leaving: AtomicBool,
}

struct Link {
    address: SocketAddr,
    server_uid: Option<String>,
    told: watch::Sender<Told>,
    task: AbortHandle,
    state: Arc<LinkState>,
}

/// What an agent receives of the table.
#[derive(Clone, Debug, PartialEq)]
struct Told {
    /// The table with the agent's row only.
    table: Table,
    /// The ports of the row that this connection server cannot listen on.
    unavailable: Vec<ListenPort>,
}

impl Told {
    fn new(slot: Slot, table: &Table, unavailable: &BTreeSet<ListenPort>) -> Self {
        let row = table.row(slot);
        let is_of_row = |port: &&ListenPort| row.is_some_and(|row| row.find(**port).is_some());
        Self {
            table: table.slice(slot),
            unavailable: unavailable.iter().filter(is_of_row).copied().collect(),
        }
    }
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
        snapshot: AgentsSnapshot,
        control: Arc<Control>,
        sessions: Arc<Sessions>,
        allocation: Arc<Allocation>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            id: snapshot.id,
            host_identity: snapshot.host_identity,
            reached: Mutex::new(snapshot.reached),
            control,
            sessions,
            allocation,
            metrics,
            links: Mutex::default(),
            leaving: AtomicBool::new(false),
        }
    }

    /// What a successor needs to know. Nothing changes here.
    #[must_use]
    pub fn export(&self) -> AgentsSnapshot {
        let links = self.links.lock();
        let reached = links.iter().filter_map(|(slot, link)| {
            let since = if link.state.is_attached() {
                Instant::now()
            } else {
                (*link.state.detached_since.lock())?
            };
            Some((*slot, since))
        });
        AgentsSnapshot {
            id: self.id.clone(),
            host_identity: self.host_identity.clone(),
            reached: reached.collect(),
        }
    }

    /// Follows `table`, of whose connection ports those `unavailable` cannot be
    /// listened on: streams to new servers, none to removed ones, and the row to the
    /// others. Sessions of removed and replaced servers end.
    pub fn set_table(
        self: &Arc<Self>,
        change: &Change<'_>,
        table: &Arc<Table>,
        unavailable: &BTreeSet<ListenPort>,
    ) {
        let mut links = self.links.lock();
        let removed: Vec<Slot> = links
            .iter()
            .filter(|(slot, link)| {
                !table
                    .row(**slot)
                    .is_some_and(|row| link.leads_to(row, table))
            })
            .map(|(slot, _)| *slot)
            .collect();
        for slot in removed {
            links.remove(&slot);
            self.allocation.detach(change, slot);
            change.forget_server(slot);
        }
        for row in &table.rows {
            let Some(address) = row.socket_address(table.agent_port) else {
                continue;
            };
            let told = Told::new(row.slot, table, unavailable);
            match links.get(&row.slot) {
                Some(link) => link.update(told),
                None => {
                    links.insert(row.slot, self.open(row, address, told));
                }
            }
        }
        drop(links);
        self.allocation.follow(change, table);
    }

    fn open(self: &Arc<Self>, row: &Row, address: SocketAddr, told: Told) -> Link {
        let (sender, receiver) = watch::channel(told);
        let reached = self.reached.lock().remove(&row.slot);
        let state = Arc::new(LinkState::new(reached.unwrap_or_else(Instant::now)));
        let task = LinkTask {
            agents: self.clone(),
            slot: row.slot,
            address,
            told: receiver,
            state: state.clone(),
        };
        let task = tokio::spawn(task.run());
        Link {
            address,
            server_uid: row.server_uid.clone(),
            told: sender,
            task: task.abort_handle(),
            state,
        }
    }

    /// Ends all streams without a goodbye: a successor goes on under the id.
    pub fn abandon(&self) {
        self.links.lock().clear();
    }

    /// Sends a goodbye to every agent, so that none waits for this connection
    /// server before it gives ports to others. No connection may be left.
    pub async fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        for link in self.links.lock().values() {
            if let Some(outbox) = link.state.outbox.lock().as_ref() {
                let _ = outbox.send(ToAgent::Goodbye);
            }
        }
        // The agent answers a goodbye by ending the stream.
        let ended = async {
            let is_attached = |link: &Link| link.state.is_attached();
            while self.links.lock().values().any(is_attached) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        if timeout(LEAVE_DEADLINE, ended).await.is_err() {
            warn!("some processing servers did not take note that this connection server stops");
        }
    }
}

impl Link {
    /// Whether the link's server is still the one of `row`.
    fn leads_to(&self, row: &Row, table: &Table) -> bool {
        let is_replaced = matches!(
            (&self.server_uid, &row.server_uid),
            (Some(before), Some(now)) if before != now
        );
        !is_replaced && row.socket_address(table.agent_port) == Some(self.address)
    }

    fn update(&self, told: Told) {
        self.told.send_if_modified(|current| {
            // The generation alone is nothing to an agent.
            current.table.generation = told.table.generation;
            let changed = *current != told;
            *current = told;
            changed
        });
    }
}
