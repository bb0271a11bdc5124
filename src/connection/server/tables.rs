//! Has the parts of a connection server follow the table. One table is applied
//! to all of them, in an order in which no client gets a port that is not open.
//!
//! A port that cannot be listened on keeps nothing else from being applied. Agents
//! do not select it, and it is tried again, with growing pauses.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Parts;
use crate::connection::control::Change;
use crate::forward::UnavailablePort;
use crate::table::{ListenPort, Table};

/// Pause after the first try of a port that cannot be listened on, and the longest
/// one. A try costs a few system calls for each port.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);

impl Parts {
    /// Has every part follow `table`, agents last: no client is sent to a port
    /// that is not open. Returns whether all of its ports are.
    pub(super) fn apply(&self, change: &Change<'_>, table: &Arc<Table>) -> bool {
        let former = self.control.unavailable_ports();
        let unavailable = change.set_table(table);
        if unavailable != former {
            report(&unavailable);
        }
        let ports: BTreeSet<ListenPort> = unavailable
            .iter()
            .filter_map(UnavailablePort::port)
            .collect();
        self.agents.set_table(change, table, &ports);
        ports.is_empty()
    }

    /// Applies every newer table that is followed, then publishes it in `in_use`,
    /// and tries ports again that cannot be listened on.
    pub(super) async fn keep_applying(
        self,
        mut followed: watch::Receiver<Option<Arc<Table>>>,
        in_use: watch::Sender<Arc<Table>>,
        stopping: CancellationToken,
    ) {
        let mut is_complete = self.control.unavailable_ports().is_empty();
        let mut pause = FIRST_RETRY;
        loop {
            let retry = async {
                if is_complete {
                    return std::future::pending().await;
                }
                sleep(pause).await;
            };
            tokio::select! {
                changed = followed.changed() => if changed.is_err() { return },
                () = retry => {
                    let table = in_use.borrow().clone();
                    let change = self.control.begin_change().await;
                    is_complete = self.apply(&change, &table);
                    pause = (pause * 2).min(LAST_RETRY);
                    continue;
                }
                () = stopping.cancelled() => return,
            }
            let Some(current) = followed.borrow_and_update().clone() else {
                continue;
            };
            let generation = current.generation;
            // A predecessor may have had a newer one.
            if generation <= in_use.borrow().generation {
                continue;
            }
            // Until the table is in use: a hand-over takes that one along.
            let change = self.control.begin_change().await;
            is_complete = self.apply(&change, &current);
            pause = FIRST_RETRY;
            in_use.send_replace(current);
            info!(generation, "table applied");
        }
    }
}

/// Logs which ports cannot be listened on, or that all can be.
fn report(unavailable: &[UnavailablePort]) {
    match unavailable.first() {
        Some(first) => warn!(
            ports = unavailable.len(),
            %first,
            "connection ports cannot be listened on: they are not offered, and tried again"
        ),
        None => info!("all connection ports can be listened on again"),
    }
}
