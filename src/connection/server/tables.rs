//! Has the parts of a connection server follow the table. One table is applied
//! to all of them, in an order in which no client gets a port that is not open.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::Parts;
use crate::connection::control::Change;
use crate::forward;
use crate::table::Table;

impl Parts {
    /// Has every part follow `table`, agents last: no client is sent to a port
    /// that is not open.
    pub(super) fn apply(
        &self,
        change: &Change<'_>,
        table: &Arc<Table>,
    ) -> Result<(), forward::ApplyError> {
        change.set_table(table)?;
        self.agents.set_table(change, table);
        Ok(())
    }

    /// Applies every newer table that is followed, then publishes it in `in_use`.
    /// One that cannot be applied is logged, and the last one stays in force.
    pub(super) async fn keep_applying(
        self,
        mut followed: watch::Receiver<Option<Arc<Table>>>,
        in_use: watch::Sender<Arc<Table>>,
        stopping: CancellationToken,
    ) {
        loop {
            tokio::select! {
                changed = followed.changed() => if changed.is_err() { return },
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
            match self.apply(&change, &current) {
                Ok(()) => {
                    in_use.send_replace(current);
                    info!(generation, "table applied");
                }
                Err(error) => {
                    error!(generation, %error, "failed to apply the table; the last one stays in force")
                }
            }
        }
    }
}
