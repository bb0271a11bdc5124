//! A namespace with a controller and a stand-in for the kubelet.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use portpool::pool::ProcessingPool;
use portpool::table::{TABLE_KEY, Table};
use serde_json::{Value, json};

use super::api_server::{ApiServer, free_port};
use super::kubelet::kubelet;
use super::{KINDS, metric, until};
use crate::common::{Process, SOON};

/// A namespace with a controller of its own. A stand-in for the kubelet makes
/// its pods ready.
pub struct Space {
    pub server: Arc<ApiServer>,
    pub client: Client,
    pub name: String,
    pub controller: Option<Process>,
    pub admin_port: u16,
    kubelet: tokio::task::JoinHandle<()>,
}

impl Drop for Space {
    fn drop(&mut self) {
        self.kubelet.abort();
    }
}

impl Space {
    pub async fn new(name: &str) -> Self {
        let mut space = Self::without_controller(ApiServer::shared().await, name).await;
        space.start_controller();
        space
    }

    /// A namespace with a controller and the ready pool `games` of this spec.
    pub async fn with_pool(name: &str, spec: Value) -> Self {
        let space = Self::new(name).await;
        space.make_ready("games", spec).await;
        space
    }

    pub async fn without_controller(server: Arc<ApiServer>, name: &str) -> Self {
        let client = server.client().await;
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let object = serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap();
        namespaces
            .create(&PostParams::default(), &object)
            .await
            .unwrap();
        Self {
            kubelet: tokio::spawn(kubelet(client.clone(), name.to_owned())),
            server,
            client,
            name: name.to_owned(),
            controller: None,
            admin_port: free_port(),
        }
    }

    pub fn start_controller(&mut self) {
        let kubeconfig = self.server.kubeconfig().to_owned();
        self.controller = Some(self.controller_with(&kubeconfig, self.admin_port, &[]));
    }

    pub fn controller_with(&self, kubeconfig: &Path, admin_port: u16, more: &[String]) -> Process {
        let mut arguments = vec![
            "controller".to_owned(),
            format!("--namespace={}", self.name),
            format!("--admin=127.0.0.1:{admin_port}"),
            "--image=portpool:test".to_owned(),
        ];
        arguments.extend_from_slice(more);
        Process::start_with(
            &arguments,
            &[("KUBECONFIG", &kubeconfig.display().to_string())],
        )
    }

    pub fn pools(&self) -> Api<ProcessingPool> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    pub fn objects(&self, group: &str, kind: &str, plural: &str) -> Api<DynamicObject> {
        let kind = kube::api::GroupVersionKind::gvk(group, "v1", kind);
        let resource = kube::api::ApiResource::from_gvk_with_plural(&kind, plural);
        Api::namespaced_with(self.client.clone(), &self.name, &resource)
    }

    /// Kinds and names of the objects that portpool has created here.
    pub async fn owned(&self) -> Vec<String> {
        let ours = ListParams::default().labels("app.kubernetes.io/managed-by=portpool");
        let mut names = Vec::new();
        for (group, kind, plural) in KINDS {
            let listed = self.objects(group, kind, plural).list(&ours).await.unwrap();
            let called = |object: &DynamicObject| format!("{kind} {}", object.name_any());
            names.extend(listed.iter().map(called));
        }
        names
    }

    /// Creates or changes a pool by server-side apply, as a user would.
    pub async fn apply(&self, name: &str, spec: Value) -> kube::Result<ProcessingPool> {
        let object = json!({
            "apiVersion": "portpool.dev/v1alpha1",
            "kind": "ProcessingPool",
            "metadata": { "name": name },
            "spec": spec,
        });
        let parameters = PatchParams::apply("user").force().validation_strict();
        self.pools()
            .patch(name, &parameters, &Patch::Apply(&object))
            .await
    }

    /// Applies the spec and waits until the pool is as it says; returns how long
    /// that took.
    pub async fn make_ready(&self, pool: &str, spec: Value) -> Duration {
        self.apply(pool, spec).await.unwrap();
        self.ready(pool).await
    }

    /// Scales a pool through the scale subresource, as `kubectl scale` does.
    pub async fn scale(&self, pool: &str, replicas: u32) -> kube::Result<()> {
        let change = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        let parameters = PatchParams::default();
        let scaled = self.pools().patch_scale(pool, &parameters, &change).await;
        scaled.map(|_| ())
    }

    pub async fn pool(&self, name: &str) -> ProcessingPool {
        self.pools().get(name).await.unwrap()
    }

    /// Status, reason and message of a condition of the present spec.
    pub async fn condition(&self, pool: &str, kind: &str) -> (String, String, String) {
        let pool = self.pool(pool).await;
        let conditions = pool
            .status
            .map(|status| status.conditions)
            .unwrap_or_default();
        let current = conditions.into_iter().find(|condition| {
            condition.type_ == kind && condition.observed_generation == pool.metadata.generation
        });
        current.map_or_else(Default::default, |found| {
            (found.status, found.reason, found.message)
        })
    }

    pub async fn is_ready(&self, pool: &str) -> bool {
        self.condition(pool, "Ready").await.0 == "True"
    }

    /// Waits until the pool is as its spec says.
    pub async fn ready(&self, pool: &str) -> Duration {
        let started = Instant::now();
        while !self.is_ready(pool).await {
            let status = self.pool(pool).await.status;
            assert!(
                started.elapsed() < 2 * SOON,
                "{pool} is not ready: {status:#?}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        started.elapsed()
    }

    /// Waits until the pool is degraded, with `words` in the message.
    pub async fn degraded(&self, pool: &str, words: &str) {
        until(&format!("{pool} is degraded: {words}"), async || {
            let (status, _, message) = self.condition(pool, "Degraded").await;
            status == "True" && message.contains(words)
        })
        .await;
    }

    pub async fn config_map(&self, pool: &str) -> Option<ConfigMap> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.name);
        api.get_opt(&format!("{pool}-port-table")).await.unwrap()
    }

    pub async fn table(&self, pool: &str) -> Option<Table> {
        let text = self.config_map(pool).await?.data?.remove(TABLE_KEY)?;
        Table::decode(&text).ok()
    }

    /// Names and uids of the processing servers' pods.
    pub async fn servers(&self, pool: &str) -> BTreeMap<String, String> {
        let selector = format!("portpool.dev/pool={pool},portpool.dev/component=processing-server");
        let pods = self
            .pods()
            .list(&ListParams::default().labels(&selector))
            .await
            .unwrap();
        pods.into_iter()
            .map(|pod| (pod.name_any(), pod.uid().unwrap_or_default()))
            .collect()
    }

    /// A counter or gauge of the controller, summed over all labels.
    pub async fn metric(&self, name: &str) -> u64 {
        metric(self.admin_port, name)
    }
}
