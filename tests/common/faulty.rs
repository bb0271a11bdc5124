//! A controller behind the faulty proxy, a scenario for it, and what must hold
//! after it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::cluster::{ApiServer, Space, quick};
use super::proxy::{Call, Fault, Proxy};

/// A namespace whose controller goes through a proxy.
pub struct Faulty {
    pub space: Space,
    pub proxy: Arc<Proxy>,
}

impl Faulty {
    pub async fn new(name: &str) -> Self {
        let server = ApiServer::shared().await;
        let space = Space::without_controller(server, name).await;
        let proxy = Proxy::start(space.client.clone()).await;
        Self { space, proxy }
    }

    /// With the controller started and the ready pool `games` of this spec.
    pub async fn with_pool(name: &str, spec: Value) -> Self {
        let mut faulty = Self::new(name).await;
        faulty.start();
        faulty.space.make_ready("games", spec).await;
        faulty
    }

    pub fn start(&mut self) {
        // The former controller is killed before its successor starts.
        self.space.controller.take();
        let kubeconfig = self.proxy.kubeconfig.clone();
        let more = ["--resync-seconds=2".to_owned()];
        let controller = self
            .space
            .controller_with(&kubeconfig, self.space.admin_port, &more);
        self.space.controller = Some(controller);
    }

    /// Pods created and pods deleted.
    pub fn counts(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (
            count(&self.proxy.pods_created),
            count(&self.proxy.pods_deleted),
        )
    }

    /// Creates two servers, grows to three, shrinks to one.
    pub async fn scenario(&self) {
        for replicas in [2, 3, 1] {
            self.space.make_ready("games", quick(replicas)).await;
        }
    }

    /// Runs the whole scenario under a fault.
    pub async fn survives(name: &str, rule: impl Fn(&Call) -> Fault + Send + Sync + 'static) {
        let mut faulty = Self::new(name).await;
        faulty.proxy.rule(rule);
        faulty.start();
        faulty.scenario().await;
        faulty.check().await;
    }

    /// Asserts what must hold, and continue to hold, after [`Self::scenario`].
    pub async fn check(&self) {
        for _ in 0..2 {
            assert_eq!(self.space.servers("games").await.len(), 1);
            let table = self.space.table("games").await.unwrap();
            assert_eq!(table.rows.len(), 1);
            assert!(self.space.is_ready("games").await);
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
        assert_eq!(self.counts(), (3, 2), "pods created and deleted");
    }
}
