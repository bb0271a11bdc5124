//! The cluster, and what a test does in a namespace of its own.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use portpool::pool::ProcessingPool;
use portpool::session::PoolState;
use portpool::table::{TABLE_KEY, Table};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Name and namespace of the release.
pub const RELEASE: &str = "portpool";

/// Longest that anything but starting images and draining may take.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Load-sharing port of pools that are reached from outside, and their
/// connection ports: kind maps these, and the API server gives no other
/// Service a node port so low.
pub const LOAD_SHARING_PORT: u16 = 30_000;

/// Label of the tests' namespaces.
const OURS: &str = "portpool.dev/test=e2e";

/// The image that the chart names, which is also the echo server's.
pub fn image() -> String {
    format!("ghcr.io/portpool/portpool:{}", env!("CARGO_PKG_VERSION"))
}

/// Runs `program` and returns its output, or its error output if it fails.
pub fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, String> {
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    let mut stdin = child.stdin.take().unwrap();
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {text}{error}", arguments.join(" ")))
}

pub fn helm(arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/get-helm");
    let program = run(&script.display().to_string(), &[], "").unwrap();
    run(program.trim(), arguments, "").unwrap()
}

/// Installs or upgrades the chart and waits until it serves.
pub fn install(more: &[&str]) {
    let mut arguments = vec!["upgrade", "--install", RELEASE, "charts/portpool"];
    arguments.extend(["--namespace", RELEASE, "--create-namespace"]);
    arguments.extend([
        "--reset-values",
        "--force-conflicts",
        "--wait",
        "--timeout=120s",
    ]);
    arguments.extend(more);
    helm(&arguments);
}

/// A stopped program of the node. It starts again when this is dropped.
pub struct Away(&'static str);

impl Away {
    /// Stops `program`; `None` if no script for that is configured.
    pub fn new(program: &'static str) -> Option<Self> {
        if std::env::var_os("PORTPOOL_E2E_CLUSTER").is_none() {
            println!("left out: PORTPOOL_E2E_CLUSTER names no script that stops {program}");
            return None;
        }
        node_program("stop", program);
        Some(Self(program))
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        node_program("start", self.0);
    }
}

fn node_program(verb: &str, program: &str) {
    let cluster = std::env::var("PORTPOOL_E2E_CLUSTER").unwrap();
    run(&cluster, &[verb, program], "").unwrap();
}

/// Kills a container with SIGKILL. If no script for that is configured, deletes
/// its pod without a grace period.
pub async fn crash(pods: &Api<Pod>, pod: &str, container: &str) {
    match std::env::var("PORTPOOL_E2E_CLUSTER") {
        Ok(cluster) => {
            run(&cluster, &["crash", pod, container], "").unwrap();
        }
        Err(_) => {
            let at_once = DeleteParams::default().grace_period(0);
            pods.delete(pod, &at_once).await.unwrap();
        }
    }
}

/// Waits until `look` succeeds; its error is what it saw instead. Returns the
/// result and how long it took.
pub async fn until<T>(
    what: &str,
    limit: Duration,
    look: impl AsyncFn() -> Result<T, String>,
) -> (T, Duration) {
    let started = Instant::now();
    loop {
        match look().await {
            Ok(found) => return (found, started.elapsed()),
            Err(seen) => assert!(
                started.elapsed() < limit,
                "not within {limit:?}: {what}; last seen: {seen}"
            ),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// `value` if it is as wanted, else its text as the error.
pub fn expect<T: Debug>(value: T, is_wanted: impl FnOnce(&T) -> bool) -> Result<T, String> {
    if is_wanted(&value) {
        Ok(value)
    } else {
        Err(format!("{value:?}"))
    }
}

/// A namespace on a cluster where the release serves.
pub struct World {
    pub client: Client,
    pub name: String,
    /// Where node ports are reached from here.
    pub address: String,
}

impl World {
    /// A namespace called `name`, once those of earlier tests are gone.
    pub async fn new(name: &str) -> Self {
        let world = Self::without_release(name).await;
        install(&[]);
        world
    }

    /// The same with a pool `games` of `replicas` servers, where every port is
    /// offered at the node.
    pub async fn with_pool(name: &str, replicas: u32) -> Self {
        let world = Self::new(name).await;
        world.apply("games", &echo_pool(replicas)).await;
        print_time("pool: ready", world.ready("games").await);
        print_time("all ports offered after", world.all_offered(replicas).await);
        world
    }

    async fn without_release(name: &str) -> Self {
        let client = Client::try_default()
            .await
            .expect("KUBECONFIG names a cluster");
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let old = ListParams::default().labels(OURS);
        for namespace in namespaces.list(&old).await.unwrap() {
            let _ = namespaces
                .delete(&namespace.name_any(), &DeleteParams::default())
                .await;
        }
        until("earlier tests' namespaces are gone", LIMIT, async || {
            let left = namespaces.list(&old).await.map_err(|e| e.to_string())?;
            let left = left.iter().map(|one| (one.name_any(), one.status.clone()));
            expect(left.collect::<Vec<_>>(), Vec::is_empty)
        })
        .await;
        let (key, value) = OURS.split_once('=').unwrap();
        let object = json!({ "metadata": { "name": name, "labels": { key: value } } });
        namespaces
            .create(
                &PostParams::default(),
                &serde_json::from_value(object).unwrap(),
            )
            .await
            .unwrap();
        let address = match std::env::var("PORTPOOL_E2E_ADDRESS") {
            Ok(address) => address,
            Err(_) => node_address(&client).await,
        };
        println!("\n== {name}");
        Self {
            client,
            name: name.to_owned(),
            address,
        }
    }

    /// Deletes the pools, waits until all that they own is gone, and deletes the
    /// namespace. Deleting the namespace alone takes longer: its controller
    /// looks again only after half of the pods' grace period.
    pub async fn end(self) {
        let pools: Api<ProcessingPool> = self.api();
        let pods: Api<Pod> = self.api();
        let all = ListParams::default();
        pools
            .delete_collection(&DeleteParams::foreground(), &all)
            .await
            .unwrap();
        let ours = ListParams::default().labels("app.kubernetes.io/managed-by=portpool");
        let (_, took) = until("pools and their pods are gone", LIMIT, async || {
            let pools = pools.list(&all).await.map_err(|error| error.to_string())?;
            let pods = pods.list(&ours).await.map_err(|error| error.to_string())?;
            let pools = pools.iter().map(ResourceExt::name_any);
            let left = pools.chain(pods.iter().map(ResourceExt::name_any));
            expect(left.collect::<Vec<_>>(), Vec::is_empty)
        })
        .await;
        print_time("pool deleted: all its objects are gone", took);
        self.delete_namespace().await;
    }

    pub async fn delete_namespace(self) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces
            .delete(&self.name, &DeleteParams::default())
            .await
            .unwrap();
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Debug,
    {
        Api::namespaced(self.client.clone(), &self.name)
    }

    pub async fn pool(&self, name: &str) -> ProcessingPool {
        self.api().get(name).await.unwrap()
    }

    /// Creates or changes a pool, as a user would.
    pub async fn apply(&self, name: &str, spec: &Value) {
        let object = json!({
            "apiVersion": "portpool.dev/v1alpha1",
            "kind": "ProcessingPool",
            "metadata": { "name": name },
            "spec": spec,
        });
        let api: Api<ProcessingPool> = self.api();
        let parameters = PatchParams::apply("user").force().validation_strict();
        api.patch(name, &parameters, &Patch::Apply(&object))
            .await
            .unwrap();
    }

    /// Scales the pool, as `kubectl scale` does.
    pub async fn scale(&self, name: &str, replicas: u32) {
        let api: Api<ProcessingPool> = self.api();
        let patch = json!({ "spec": { "replicas": replicas } });
        api.patch_scale(name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .unwrap();
    }

    /// A condition of the pool's present spec: status, reason and message.
    pub async fn condition(&self, pool: &str, kind: &str) -> Result<[String; 3], String> {
        let api: Api<ProcessingPool> = self.api();
        let pool = api.get(pool).await.map_err(|error| error.to_string())?;
        let status = pool.status.ok_or("no status")?;
        let found = status.conditions.into_iter().find(|condition| {
            condition.type_ == kind && condition.observed_generation == pool.metadata.generation
        });
        let found = found.ok_or("no condition of the present spec")?;
        Ok([found.status, found.reason, found.message])
    }

    /// Waits until the pool is as its spec says.
    pub async fn ready(&self, pool: &str) -> Duration {
        let what = format!("pool {pool} is ready");
        let look = async || {
            expect(self.condition(pool, "Ready").await?, |[is, ..]| {
                is == "True"
            })
        };
        until(&what, LIMIT, look).await.1
    }

    /// Waits until the pool is degraded, with `words` in its condition and in
    /// an event.
    pub async fn degraded(&self, pool: &str, words: &str) -> Duration {
        let what = format!("pool {pool} is degraded: {words}");
        let (condition, took) = until(&what, LIMIT, async || {
            let condition = self.condition(pool, "Degraded").await?;
            expect(condition, |[is, _, text]| {
                is == "True" && text.contains(words)
            })
        })
        .await;
        println!("condition Degraded: {}: {}", condition[1], condition[2]);
        let events: Api<k8s_openapi::api::events::v1::Event> = self.api();
        let what = format!("an event says {words}");
        until(&what, LIMIT, async || {
            let events = events.list(&ListParams::default()).await;
            let events = events.map_err(|error| error.to_string())?;
            let of_pool = events.into_iter().filter(|event| {
                let regarding = event.regarding.as_ref();
                regarding.and_then(|object| object.kind.as_deref()) == Some("ProcessingPool")
            });
            let notes: Vec<_> = of_pool.filter_map(|event| event.note).collect();
            expect(notes, |notes| notes.iter().any(|note| note.contains(words)))
        })
        .await;
        took
    }

    /// The node's own address, which pods reach.
    pub async fn node_address(&self) -> String {
        node_address(&self.client).await
    }

    /// A client of the pool's load-sharing port, which is a node port.
    pub fn asker(&self) -> portpool::client::Client {
        portpool::client::Client::new(&format!("{}:{LOAD_SHARING_PORT}", self.address)).unwrap()
    }

    /// Waits until the state that a connection server reports `holds`.
    pub async fn live(&self, what: &str, holds: impl Fn(&PoolState) -> bool) -> Duration {
        let client = self.asker();
        let look = async || {
            let state = client.pool().await.map_err(|error| error.to_string())?;
            expect(state, |state| holds(state))
        };
        until(what, LIMIT, look).await.1
    }

    /// Waits until each port of `replicas` servers is free or has a session.
    pub async fn all_offered(&self, replicas: u32) -> Duration {
        let what = format!("all ports of {replicas} servers are free");
        let is_so = |state: &PoolState| {
            let servers = u32::try_from(state.servers.len()).unwrap();
            servers == replicas && state.free_ports + state.sessions == replicas * 4
        };
        self.live(&what, is_so).await
    }

    pub async fn table(&self, pool: &str) -> Result<Table, String> {
        let api: Api<ConfigMap> = self.api();
        let found = api.get(&format!("{pool}-port-table")).await;
        let data = found.map_err(|error| error.to_string())?.data;
        let text = data.unwrap_or_default().remove(TABLE_KEY);
        Table::decode(&text.unwrap_or_default()).map_err(|error| error.to_string())
    }

    /// Pods of a component by name, without those that are being deleted.
    pub async fn pods(&self, component: &str) -> BTreeMap<String, Pod> {
        let api: Api<Pod> = self.api();
        let selector = format!("portpool.dev/component={component}");
        let pods = api.list(&ListParams::default().labels(&selector)).await;
        let stays = |pod: &Pod| pod.metadata.deletion_timestamp.is_none();
        let pods = pods.unwrap().into_iter().filter(stays);
        pods.map(|pod| (pod.name_any(), pod)).collect()
    }

    /// Gives a server the highest deletion cost of all.
    pub async fn replace_last(&self, server: &str) {
        let cost = json!({ "controller.kubernetes.io/pod-deletion-cost": "1" });
        let patch = Patch::Merge(json!({ "metadata": { "annotations": cost } }));
        let pods: Api<Pod> = self.api();
        let patched = pods.patch(server, &PatchParams::default(), &patch).await;
        patched.unwrap();
    }

    /// Starts a pod in which [`Self::exec`] runs clients inside of the cluster.
    /// Its own program is `idle`.
    pub async fn client_pod(&self, name: &str, image: &str, idle: &[&str]) {
        let pods: Api<Pod> = self.api();
        let pod = json!({
            "metadata": { "name": name },
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "containers": [{ "name": "main", "image": image, "imagePullPolicy": "IfNotPresent", "command": idle }],
            },
        });
        let pod = serde_json::from_value(pod).unwrap();
        pods.create(&PostParams::default(), &pod).await.unwrap();
        until(&format!("pod {name} runs"), LIMIT, async || {
            let pod = pods.get(name).await.map_err(|error| error.to_string())?;
            let phase = pod.status.and_then(|status| status.phase);
            expect(phase, |phase| phase.as_deref() == Some("Running"))
        })
        .await;
    }

    /// Runs a program in a pod.
    pub fn exec(&self, pod: &str, command: &[&str], input: &str) -> Result<String, String> {
        let mut arguments = vec!["exec", "--stdin", "--namespace", &self.name, pod, "--"];
        arguments.extend(command);
        run("kubectl", &arguments, input)
    }
}

async fn node_address(client: &Client) -> String {
    let nodes: Api<Node> = Api::all(client.clone());
    let nodes = nodes.list(&ListParams::default()).await.unwrap();
    let addresses = nodes.into_iter().filter_map(|node| node.status?.addresses);
    let mut internal = addresses
        .flatten()
        .filter(|address| address.type_ == "InternalIP");
    internal.next().expect("a node has an address").address
}

/// A pool of echo servers, TCP and UDP, that is reached at the node's ports.
pub fn echo_pool(replicas: u32) -> Value {
    json!({
        "replicas": replicas,
        "drainSeconds": 60,
        "ports": [{ "name": "main", "port": 7000, "count": 4, "protocol": "TCPUDP" }],
        "sessions": { "lingerSeconds": 0, "udpIdleTimeoutSeconds": 1 },
        "connectionServer": {
            "replicas": 2,
            "exposure": "NodePort",
            "loadSharingPort": LOAD_SHARING_PORT,
            "connectionPorts": { "first": LOAD_SHARING_PORT + 1, "last": LOAD_SHARING_PORT + 31 },
        },
        "template": { "spec": { "containers": [{
            "name": "echo",
            "image": image(),
            "command": ["portpool", "echo", "--listen", "$(POD_IP)", "--ports", "7000-7003"],
            "env": [{ "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } }],
        }] } },
    })
}

/// Prints a measured time.
pub fn print_time(what: &str, took: Duration) {
    println!("{what}: {:.1} s", took.as_secs_f64());
}
