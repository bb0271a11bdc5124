//! A real API server with etcd, and namespaces with a controller in it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, ResourceExt};
use portpool::pool::ProcessingPool;
use portpool::table::{TABLE_KEY, Table};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Process, SOON};

const TOKEN: &str = "test-admin";

/// A program that ends with the test, even if the test is killed.
struct Server {
    child: Child,
    // The kernel ties a child to the thread that started it.
    _thread: Sender<()>,
}

impl Server {
    fn start(program: &Path, arguments: &[String], log: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_portpool"));
        let log = std::fs::File::create(log).unwrap();
        command
            .args(["run-program", "--"])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let (started, child) = channel();
        let (thread, ended) = channel::<()>();
        std::thread::spawn(move || {
            started.send(command.spawn().unwrap()).unwrap();
            let _ = ended.recv();
        });
        Self {
            child: child.recv().unwrap(),
            _thread: thread,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGKILL would leave the supervisor's program running. At the second
        // SIGTERM, the supervisor kills it without waiting.
        let pid = rustix::process::Pid::from_child(&self.child);
        for _ in 0..2 {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.wait();
    }
}

/// The folder of the programs, which `tools/control-plane` prints.
pub fn assets() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/control-plane");
    let output = Command::new(script)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "no API server to test with, see above"
    );
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// A port outside the kernel's ephemeral range. While a server is stopped, the
/// kernel could otherwise give its port to a client that tries to connect, and
/// the client would connect to itself.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let offset = std::process::id() * 61 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + u16::try_from(offset % 9_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A running API server that has the custom resource.
pub struct ApiServer {
    pub port: u16,
    kubeconfig: PathBuf,
    controller_manager: Mutex<Option<Server>>,
    api_server: Mutex<Option<Server>>,
    etcd: Server,
    arguments: Vec<String>,
    folder: tempfile::TempDir,
}

impl ApiServer {
    /// The shared server of this test process. It stops when no test uses it.
    pub async fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<ApiServer>> = Mutex::new(Weak::new());
        let server = {
            let mut shared = SHARED.lock().unwrap();
            match shared.upgrade() {
                Some(server) => server,
                None => {
                    let server = Arc::new(Self::start(&[]));
                    *shared = Arc::downgrade(&server);
                    server
                }
            }
        };
        server.installed().await;
        server
    }

    /// A server of one test, which may stop and start it.
    pub async fn own() -> Self {
        Self::own_with(&[]).await
    }

    /// The same with `more` arguments.
    pub async fn own_with(more: &[String]) -> Self {
        let server = Self::start(more);
        server.installed().await;
        server
    }

    fn start(more: &[String]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let (client, peer, port) = (free_port(), free_port(), free_port());
        let etcd = Server::start(
            &assets().join("etcd"),
            &[
                format!("--data-dir={}", path("etcd")),
                format!("--listen-client-urls=http://127.0.0.1:{client}"),
                format!("--advertise-client-urls=http://127.0.0.1:{client}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                "--unsafe-no-fsync".to_owned(),
                "--log-level=error".to_owned(),
            ],
            &folder.path().join("etcd.log"),
        );
        let key = rcgen::KeyPair::generate().unwrap();
        std::fs::write(path("key.pem"), key.serialize_pem()).unwrap();
        std::fs::write(path("public.pem"), key.public_key_pem()).unwrap();
        std::fs::write(
            path("tokens"),
            format!("{TOKEN},admin,admin,system:masters\n"),
        )
        .unwrap();
        let mut arguments = vec![
            format!("--etcd-servers=http://127.0.0.1:{client}"),
            format!("--secure-port={port}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", path("certificates")),
            "--service-account-issuer=https://portpool.test".to_owned(),
            format!("--service-account-key-file={}", path("public.pem")),
            format!("--service-account-signing-key-file={}", path("key.pem")),
            format!("--token-auth-file={}", path("tokens")),
            "--authorization-mode=RBAC,Node".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            "--service-cluster-ip-range=10.99.0.0/16".to_owned(),
            // This plugin needs a controller manager.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
        ];
        arguments.extend_from_slice(more);
        let kubeconfig = folder.path().join("kubeconfig");
        write_kubeconfig(&kubeconfig, &format!("https://127.0.0.1:{port}"));
        let server = Self {
            port,
            kubeconfig,
            controller_manager: Mutex::new(None),
            api_server: Mutex::new(None),
            etcd,
            arguments,
            folder,
        };
        server.resume();
        server
    }

    /// Starts the API server again.
    pub fn resume(&self) {
        let log = self.folder.path().join("api-server.log");
        let server = Server::start(&assets().join("kube-apiserver"), &self.arguments, &log);
        *self.api_server.lock().unwrap() = Some(server);
    }

    /// Kills the API server; etcd keeps its objects.
    pub fn stop(&self) {
        self.api_server.lock().unwrap().take();
    }

    /// Stops etcd with SIGSTOP or continues it.
    pub fn pause_etcd(&self, is_paused: bool) {
        let signal = match is_paused {
            true => rustix::process::Signal::STOP,
            false => rustix::process::Signal::CONT,
        };
        // Signal the program, not its supervisor.
        let supervisor = self.etcd.child.id();
        let threads = std::fs::read_dir(format!("/proc/{supervisor}/task")).unwrap();
        let mut paused = 0;
        for thread in threads {
            let children = thread.unwrap().path().join("children");
            for child in std::fs::read_to_string(children)
                .unwrap()
                .split_whitespace()
            {
                let pid = rustix::process::Pid::from_raw(child.parse().unwrap()).unwrap();
                rustix::process::kill_process(pid, signal).unwrap();
                paused += 1;
            }
        }
        assert_eq!(paused, 1, "etcd is the supervisor's only child");
    }

    /// Starts kube-controller-manager, which collects garbage and runs Deployments.
    pub fn start_controller_manager(&self, more: &[&str]) {
        let key = self.folder.path().join("key.pem").display().to_string();
        let mut arguments = vec![
            format!("--kubeconfig={}", self.kubeconfig.display()),
            format!("--service-account-private-key-file={key}"),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", free_port()),
            "--controllers=*,-nodeipam,-cloud-node-lifecycle".to_owned(),
        ];
        arguments.extend(more.iter().map(|&more| more.to_owned()));
        let log = self.folder.path().join("controller-manager.log");
        let server = Server::start(&assets().join("kube-controller-manager"), &arguments, &log);
        *self.controller_manager.lock().unwrap() = Some(server);
    }

    pub fn stop_controller_manager(&self) {
        self.controller_manager.lock().unwrap().take();
    }

    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    pub async fn client(&self) -> Client {
        let config = Kubeconfig::read_from(&self.kubeconfig).unwrap();
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(config, &options)
            .await
            .unwrap();
        Client::try_from(config).unwrap()
    }

    /// Waits until the server answers, and installs the custom resource.
    pub async fn installed(&self) {
        let client = self.client().await;
        let started = Instant::now();
        while client
            .request_text(http::Request::get("/readyz").body(Vec::new()).unwrap())
            .await
            .is_err()
        {
            assert!(
                started.elapsed() < 3 * SOON,
                "the API server does not come up: {}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let crd = portpool::manifest::crd();
        let api: Api<CustomResourceDefinition> = Api::all(client.clone());
        let parameters = PatchParams::apply("test").force();
        api.patch(&crd.name_any(), &parameters, &Patch::Apply(&crd))
            .await
            .unwrap();
        let pools: Api<ProcessingPool> = Api::all(client.clone());
        until("the resource is served", async || {
            pools.list(&ListParams::default()).await.is_ok()
        })
        .await;
        // The garbage collector looks for new kinds only every 30 s.
        until("the resource is discovered", async || {
            let request = http::Request::get("/apis").header(
                http::header::ACCEPT,
                "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            );
            let answer = client.request_text(request.body(Vec::new()).unwrap()).await;
            answer.is_ok_and(|text| text.contains("processingpools"))
        })
        .await;
    }

    fn log(&self) -> String {
        let log =
            std::fs::read_to_string(self.folder.path().join("api-server.log")).unwrap_or_default();
        log.lines().rev().take(10).collect::<Vec<_>>().join("\n")
    }
}

pub fn write_kubeconfig(path: &Path, server: &str) {
    write_kubeconfig_with(path, server, TOKEN);
}

pub fn write_kubeconfig_with(path: &Path, server: &str, token: &str) {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
        "clusters": [{ "name": "test", "cluster": { "server": server, "insecure-skip-tls-verify": true } }],
        "users": [{ "name": "test", "user": { "token": token } }],
    });
    std::fs::write(path, config.to_string()).unwrap();
}

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

/// Reports the status of pods and Deployments as a node and the Deployment
/// controller would. Pods whose image begins with `bad` or `nowhere` do not run.
async fn kubelet(client: Client, namespace: String) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let deployments: Api<Deployment> = Api::namespaced(client, &namespace);
    loop {
        let listed = pods
            .list(&ListParams::default())
            .await
            .map(|list| list.items)
            .unwrap_or_default();
        for pod in listed {
            let phase = pod.status.as_ref().and_then(|status| status.phase.clone());
            let keeps = pod.annotations().contains_key("test/hands-off");
            if !keeps && phase.as_deref() == Some("Pending") {
                let _ = pods
                    .patch_status(
                        &pod.name_any(),
                        &PatchParams::default(),
                        &Patch::Merge(pod_status(&pod)),
                    )
                    .await;
            }
        }
        let listed = deployments
            .list(&ListParams::default())
            .await
            .map(|list| list.items)
            .unwrap_or_default();
        for deployment in listed {
            let replicas = deployment.spec.replicas.unwrap_or(1);
            let seen = deployment
                .status
                .as_ref()
                .and_then(|status| status.observed_generation);
            if seen != deployment.metadata.generation {
                let status = json!({ "status": {
                    "observedGeneration": deployment.metadata.generation,
                    "replicas": replicas, "updatedReplicas": replicas, "readyReplicas": replicas, "availableReplicas": replicas,
                } });
                let _ = deployments
                    .patch_status(
                        &deployment.name_any(),
                        &PatchParams::default(),
                        &Patch::Merge(status),
                    )
                    .await;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn pod_status(pod: &Pod) -> Value {
    let image = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.containers[0].image.clone())
        .unwrap_or_default();
    if image.starts_with("bad") {
        return json!({ "status": { "containerStatuses": [{
            "name": "main", "image": image, "imageID": "", "ready": false, "restartCount": 0,
            "state": { "waiting": { "reason": "ImagePullBackOff", "message": "no such image" } },
        }] } });
    }
    if image.starts_with("nowhere") {
        return json!({ "status": { "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available",
        }] } });
    }
    let slot: u8 = pod
        .labels()
        .get("portpool.dev/slot")
        .and_then(|slot| slot.parse().ok())
        .unwrap_or(200);
    let address = pod.annotations().get("test/address").cloned();
    let address = address.unwrap_or_else(|| format!("127.250.0.{}", 10 + slot % 200));
    json!({ "status": {
        "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }],
        "conditions": [{ "type": "Ready", "status": "True" }],
    } })
}
