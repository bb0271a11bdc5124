//! Which texts become the table in force: the rule that a reader never goes back.
//! Texts that are rejected are counted and logged here. Where texts come from is
//! in `file` and `config_map`.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tracing::warn;

use crate::table::{Table, TableError};

/// Why a new table does not replace the one in force.
#[derive(Debug, thiserror::Error)]
pub enum Rejected {
    /// The text is no table.
    #[error(transparent)]
    Invalid(#[from] TableError),
    /// The table is older than the one in force.
    #[error("generation {found} is older than {current}, which is in force")]
    Older {
        /// Generation of the new table.
        found: u64,
        /// Generation of the table in force.
        current: u64,
    },
    /// The table belongs to another pool.
    #[error("table belongs to pool uid {found}, not to {current}")]
    OtherPool {
        /// Uid of the pool that the new table belongs to.
        found: String,
        /// Uid of the pool that the table in force belongs to.
        current: String,
    },
}

impl Rejected {
    /// The name of the cause in metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Older { .. } => "older",
            Self::OtherPool { .. } => "other_pool",
        }
    }
}

/// Whether `table` replaces `current`; not if it is of the same generation.
///
/// # Errors
/// [`Rejected`] when `table` is older or another pool's.
pub fn is_newer(table: &Table, current: Option<&Table>) -> Result<bool, Rejected> {
    let Some(current) = current else {
        return Ok(true);
    };
    if table.pool_uid != current.pool_uid {
        return Err(Rejected::OtherPool {
            found: table.pool_uid.clone(),
            current: current.pool_uid.clone(),
        });
    }
    if table.generation < current.generation {
        let (found, current) = (table.generation, current.generation);
        return Err(Rejected::Older { found, current });
    }
    Ok(table.generation > current.generation)
}

/// The table that `text` encodes if it replaces `current`, else `None`.
fn accept(text: &str, current: Option<&Table>) -> Result<Option<Table>, Rejected> {
    let table = Table::decode(text)?;
    Ok(is_newer(&table, current)?.then_some(table))
}

/// Counts of the tables that were rejected, by cause. Clones share the counts.
#[derive(Clone, Debug)]
pub struct RejectedTables(Family<Cause, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

impl Default for RejectedTables {
    fn default() -> Self {
        let counts = Family::<Cause, Counter>::default();
        // All causes are there from the start, so that the first rejection shows
        // as a step from 0.
        for cause in ["invalid", "older", "other_pool"] {
            drop(counts.get_or_create(&Cause { cause }));
        }
        Self(counts)
    }
}

impl RejectedTables {
    /// Registers the counts in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "portpool_tables_rejected",
            "Port-relationship tables that left the last one in force, by cause",
            self.0.clone(),
        );
    }

    /// Counts a table that was rejected for `reason`.
    pub fn count(&self, reason: &Rejected) {
        let cause = reason.name();
        self.0.get_or_create(&Cause { cause }).inc();
    }
}

/// Decides which texts become the table in force, and publishes that table.
pub(super) struct TableAcceptor {
    /// The text that was decided on last; `None` while there is none.
    last_text: Option<String>,
    sender: watch::Sender<Option<Arc<Table>>>,
    rejected: RejectedTables,
}

impl TableAcceptor {
    /// An acceptor that publishes tables by `sender`, and counts in `rejected`
    /// those that it rejects.
    pub(super) fn new(sender: watch::Sender<Option<Arc<Table>>>, rejected: RejectedTables) -> Self {
        Self {
            last_text: None,
            sender,
            rejected,
        }
    }

    /// Notes that there is no text now. Returns whether that is worth a message:
    /// there was a text before, or there was never a valid table.
    pub(super) fn lose(&mut self) -> bool {
        self.last_text.take().is_some() || self.sender.borrow().is_none()
    }

    /// Decides on `text`, unless it is the same as the last one.
    pub(super) fn take(&mut self, text: String) {
        if self.last_text.as_ref() == Some(&text) {
            return;
        }
        let accepted = accept(&text, self.sender.borrow().as_deref());
        match accepted {
            Ok(Some(table)) => {
                self.sender.send_replace(Some(Arc::new(table)));
            }
            Ok(None) => {}
            Err(reason) => {
                self.rejected.count(&reason);
                warn!(%reason, "port-relationship table not accepted");
            }
        }
        self.last_text = Some(text);
    }
}
