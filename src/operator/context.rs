//! What a reconcile works with: [`Context`], which all reconciles share, and
//! [`Reconcile`], one pool in that context. The steps are methods of
//! [`Reconcile`], each in the module of its name.

use std::sync::Arc;

use kube::Client;
use kube::runtime::events::Recorder;
use kube::runtime::reflector::Store;
use tokio::sync::Semaphore;

use super::memory::Memory;
use super::metrics::Metrics;
use super::stores::Stores;
use crate::plan::ValidPool;
use crate::plan::objects::{self, Owner, Settings};
use crate::pool::ProcessingPool;

/// What all reconciles share.
pub(super) struct Context {
    pub(super) client: Client,
    /// The ProcessingPools that are watched.
    pub(super) pools: Store<ProcessingPool>,
    /// The objects that pools own.
    pub(super) stores: Stores,
    pub(super) settings: Settings,
    pub(super) recorder: Recorder,
    pub(super) metrics: Arc<Metrics>,
    pub(super) memory: Memory,
    /// The reconciles that may go on at the same time.
    pub(super) at_once: Semaphore,
}

/// One reconcile of a pool whose spec is valid.
pub(super) struct Reconcile<'a> {
    /// The resource as the watch shows it.
    pub(super) resource: &'a ProcessingPool,
    /// The pool that the resource describes, and the owner of its objects.
    pub(super) owner: Owner<'a>,
    /// The hash of what the pool's pods should be created from.
    pub(super) template_hash: String,
    pub(super) context: &'a Context,
}

impl<'a> Reconcile<'a> {
    pub(super) fn new(
        resource: &'a ProcessingPool,
        pool: &'a ValidPool,
        context: &'a Context,
    ) -> Self {
        let metadata = &resource.metadata;
        let owner = Owner {
            pool,
            namespace: metadata.namespace.as_deref().unwrap_or_default(),
            uid: metadata.uid.as_deref().unwrap_or_default(),
        };
        Self {
            resource,
            owner,
            template_hash: objects::template_hash(owner, &context.settings),
            context,
        }
    }
}
