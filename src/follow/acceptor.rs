//! Which texts become the table in force: the rule that a reader never goes back,
//! and what counts and logs the texts that are turned down. Knows nothing of
//! where texts come from.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tracing::warn;

use crate::table::{Table, TableError};

/// Why a new text leaves the last table in force.
#[derive(Debug, thiserror::Error)]
pub enum Rejected {
    /// Not a table.
    #[error(transparent)]
    Invalid(#[from] TableError),
    /// Older than the one in force.
    #[error("generation {found} is older than {current}, which is in force")]
    Older {
        /// Of the new text.
        found: u64,
        /// In force.
        current: u64,
    },
    /// Of another pool.
    #[error("table belongs to pool uid {found}, not to {current}")]
    OtherPool {
        /// Of the new text.
        found: String,
        /// In force.
        current: String,
    },
}

impl Rejected {
    /// Static name, for metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Older { .. } => "older",
            Self::OtherPool { .. } => "other_pool",
        }
    }
}

/// Decides whether `text` replaces `current`: `Ok(None)` when it is the same.
///
/// # Errors
/// [`Rejected`] when `current` stays in force.
pub fn accept(current: Option<&Table>, text: &str) -> Result<Option<Table>, Rejected> {
    let table = Table::decode(text)?;
    let Some(current) = current else {
        return Ok(Some(table));
    };
    if table.pool_uid != current.pool_uid {
        let (found, current) = (table.pool_uid, current.pool_uid.clone());
        return Err(Rejected::OtherPool { found, current });
    }
    if table.generation < current.generation {
        let (found, current) = (table.generation, current.generation);
        return Err(Rejected::Older { found, current });
    }
    Ok((table.generation > current.generation).then_some(table))
}

/// Counts the tables that were turned down, by cause. Clones share the counts.
#[derive(Clone, Debug)]
pub struct RejectedTables(Family<Cause, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

impl Default for RejectedTables {
    fn default() -> Self {
        let counts = Family::<Cause, Counter>::default();
        // All from the start, so that a first one shows as a step from nought.
        for cause in ["invalid", "older", "other_pool"] {
            drop(counts.get_or_create(&Cause { cause }));
        }
        Self(counts)
    }
}

impl RejectedTables {
    /// Shows the counts in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "portpool_tables_rejected",
            "Port-relationship tables that left the last one in force, by cause",
            self.0.clone(),
        );
    }

    /// A table was turned down for `reason`.
    pub fn count(&self, reason: &Rejected) {
        let cause = reason.name();
        self.0.get_or_create(&Cause { cause }).inc();
    }
}

/// Decides on texts, and publishes the tables among them.
pub(super) struct TableAcceptor {
    last_text: Option<String>,
    sender: watch::Sender<Option<Arc<Table>>>,
    rejected: RejectedTables,
}

impl TableAcceptor {
    /// Publishes by `sender`, and counts what it turns down in `rejected`.
    pub(super) fn new(sender: watch::Sender<Option<Arc<Table>>>, rejected: RejectedTables) -> Self {
        Self {
            last_text: None,
            sender,
            rejected,
        }
    }

    /// There is no text now. Whether that is news: there was one, or no table
    /// has come yet.
    pub(super) fn lose(&mut self) -> bool {
        self.last_text.take().is_some() || self.sender.borrow().is_none()
    }

    /// Judges `text`, unless it is the one before.
    pub(super) fn take(&mut self, text: String) {
        if self.last_text.as_ref() == Some(&text) {
            return;
        }
        let accepted = accept(self.sender.borrow().as_deref(), &text);
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
