//! A real API server with etcd, and namespaces with a controller in it.

mod api_server;
mod kubelet;
mod space;

use std::fmt::Debug;
use std::time::{Duration, Instant};

use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

#[allow(unused_imports, reason = "not every program of tests uses all of it")]
pub use self::api_server::{ApiServer, assets, free_port, write_kubeconfig, write_kubeconfig_with};
pub use self::space::Space;
use super::SOON;

/// Waits until `holds`; returns how long that took.
pub async fn until(what: &str, holds: impl AsyncFn() -> bool) -> Duration {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < 2 * SOON, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    started.elapsed()
}

/// Merges `change` into an object.
pub async fn patch<K>(api: &Api<K>, name: &str, change: Value)
where
    K: Clone + DeserializeOwned + Debug,
{
    let parameters = PatchParams::default();
    let patched = api.patch(name, &parameters, &Patch::Merge(change)).await;
    patched.unwrap();
}

/// Merges `change` into an object's status.
pub async fn patch_status<K: DeserializeOwned>(api: &Api<K>, name: &str, change: Value) {
    let parameters = PatchParams::default();
    let change = Patch::Merge(change);
    let patched = api.patch_status(name, &parameters, &change).await;
    patched.unwrap();
}

pub async fn delete<K>(api: &Api<K>, name: &str)
where
    K: Clone + DeserializeOwned + Debug,
{
    api.delete(name, &DeleteParams::default()).await.unwrap();
}

/// The metrics of the admin port at `address`; empty if it does not answer.
pub fn metrics(address: &str) -> String {
    use std::io::{Read, Write};
    let mut text = String::new();
    if let Ok(mut stream) = std::net::TcpStream::connect(address) {
        write!(stream, "GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        stream.read_to_string(&mut text).unwrap();
    }
    text
}

/// The sum of a metric of a program.
pub fn metric(admin_port: u16, name: &str) -> u64 {
    let text = metrics(&format!("127.0.0.1:{admin_port}"));
    let values = text.lines().filter(|line| line.starts_with(name));
    values
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum::<f64>() as u64
}

/// A small spec with `replicas` servers.
pub fn spec(replicas: u32) -> Value {
    json!({
        "replicas": replicas,
        "ports": [{ "name": "main", "port": 7000, "count": 4 }],
        "template": { "spec": { "containers": [{ "name": "main", "image": "example.test/echo:1" }] } },
    })
}

/// The same without draining, which would take its full time: nothing reports
/// idle servers here.
pub fn quick(replicas: u32) -> Value {
    let mut spec = spec(replicas);
    spec["drainSeconds"] = 0.into();
    spec
}

/// `spec` with another image of the workload.
pub fn with_image(mut spec: Value, image: &str) -> Value {
    spec["template"]["spec"]["containers"][0]["image"] = image.into();
    spec
}

/// Group, kind and plural of the objects that a pool may own.
pub const KINDS: [(&str, &str, &str); 9] = [
    ("", "Pod", "pods"),
    ("", "ConfigMap", "configmaps"),
    ("", "Service", "services"),
    ("", "ServiceAccount", "serviceaccounts"),
    ("apps", "Deployment", "deployments"),
    ("rbac.authorization.k8s.io", "Role", "roles"),
    ("rbac.authorization.k8s.io", "RoleBinding", "rolebindings"),
    ("networking.k8s.io", "NetworkPolicy", "networkpolicies"),
    ("policy", "PodDisruptionBudget", "poddisruptionbudgets"),
];
