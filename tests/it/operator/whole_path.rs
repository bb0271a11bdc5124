//! The whole path in a cluster without a node: a real controller, API server,
//! connection server and agents; the pods' addresses are loopback addresses
//! where the agents run.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::cluster::{ApiServer, Space, metric, patch, patch_status, spec, until};
use crate::common::{Process, echo, is_cut};
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, PostParams, PropagationPolicy};
use portpool::client::Client;
use portpool::session::{Session, SessionRequest};
use portpool::table::{Row, TABLE_KEY};
use serde_json::json;

/// Address of the connection server. The agents' addresses begin at
/// 127.250.0.10, so that one test at a time may use them.
const CONNECTION_SERVER: &str = "127.251.0.1";

static ADDRESSES: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The programs of the pods: agents with workloads, and a connection server.
struct Node {
    space: Space,
    folder: tempfile::TempDir,
    running: BTreeMap<String, [Process; 2]>,
    connection_server: Option<Process>,
    _addresses: tokio::sync::MutexGuard<'static, ()>,
}

impl Node {
    /// A pool with `replicas` servers, everything running and attached.
    async fn new(server: Arc<ApiServer>, name: &str, replicas: u32) -> Self {
        let addresses = ADDRESSES.lock().await;
        let mut space = Space::without_controller(server, name).await;
        space.start_controller();
        // No Deployment controller and no node run here: the test makes the pod.
        let pod = serde_json::from_value(json!({
            "metadata": {
                "name": "games-connection-server",
                "labels": {
                    "app.kubernetes.io/managed-by": "portpool",
                    "portpool.dev/pool": "games",
                    "portpool.dev/component": "connection-server",
                },
                "annotations": { "test/address": CONNECTION_SERVER },
            },
            "spec": { "containers": [{ "name": "x", "image": "x" }] },
        }));
        let (pods, parameters) = (space.pods(), PostParams::default());
        pods.create(&parameters, &pod.unwrap()).await.unwrap();
        space.make_ready("games", spec(replicas)).await;
        let mut node = Self {
            space,
            folder: tempfile::tempdir().unwrap(),
            running: BTreeMap::new(),
            connection_server: None,
            _addresses: addresses,
        };
        node.mount().await;
        node.start_connection_server();
        node.run_pods().await;
        node
    }

    fn table_file(&self) -> String {
        self.folder.path().join(TABLE_KEY).display().to_string()
    }

    /// Writes the table to the file, as the kubelet does for the ConfigMap volume.
    async fn mount(&self) {
        let table = self.space.table("games").await.unwrap();
        portpool::follow::write_table(self.table_file().as_ref(), &table).unwrap();
    }

    fn start_connection_server(&mut self) {
        let kubeconfig = self.space.server.kubeconfig().display().to_string();
        let arguments = [
            "connection-server".to_owned(),
            format!("--table={}", self.table_file()),
            format!("--config-map={}/games-port-table", self.space.name),
            format!("--listen={CONNECTION_SERVER}"),
            format!("--advertise={CONNECTION_SERVER}"),
            format!("--admin={CONNECTION_SERVER}:7701"),
        ];
        let process = Process::start_with(&arguments, &[("KUBECONFIG", &kubeconfig)]);
        self.connection_server = Some(process);
    }

    /// Runs an agent and a workload for each pod, and ends those of other pods.
    async fn run_pods(&mut self) {
        let servers = ListParams::default().labels("portpool.dev/component=processing-server");
        let pods = self.space.pods().list(&servers).await.unwrap();
        let wanted: BTreeMap<String, (String, String)> = pods
            .into_iter()
            .filter_map(|pod| {
                let slot = pod.labels().get("portpool.dev/slot")?.clone();
                let address = pod.status.as_ref()?.pod_ip.clone()?;
                Some((pod.uid()?, (slot, address)))
            })
            .collect();
        self.running.retain(|uid, _| wanted.contains_key(uid));
        for (uid, (slot, address)) in wanted {
            let table = self.table_file();
            self.running.entry(uid).or_insert_with(|| {
                let agent = [
                    "processing-server".to_owned(),
                    format!("--table={table}"),
                    format!("--slot={slot}"),
                    format!("--address={address}"),
                    "--listen-scope=address".to_owned(),
                    format!("--admin={address}:7071"),
                ];
                let workload = [
                    "echo".to_owned(),
                    format!("--listen={address}"),
                    "--ports=7000-7003".to_owned(),
                ];
                [Process::start(&agent), Process::start(&workload)]
            });
        }
    }

    /// Scales the pool to `replicas` servers; returns how long that took.
    async fn scale(&self, replicas: u32) -> Duration {
        self.space.make_ready("games", spec(replicas)).await
    }

    /// Mounts the present table and runs what the present pods need.
    async fn follow(&mut self) {
        self.mount().await;
        self.run_pods().await;
    }

    /// Asserts that `pods`, uids by name, still exist.
    async fn expect_still(&self, pods: &BTreeMap<String, String>) {
        let now = self.space.servers("games").await;
        assert!(
            pods.iter().all(|(name, uid)| now.get(name) == Some(uid)),
            "no pod was restarted"
        );
    }

    fn client(&self) -> Client {
        Client::new(&format!("{CONNECTION_SERVER}:7700")).unwrap()
    }

    async fn until_free(&self, ports: u32) {
        let client = self.client();
        until(&format!("{ports} ports are free"), async || {
            let state = client.pool().await;
            state.is_ok_and(|state| state.free_ports == ports)
        })
        .await;
    }

    async fn session(&self) -> (Session, TcpStream) {
        let request = SessionRequest {
            wait_seconds: 10,
            ..SessionRequest::default()
        };
        let session = self.client().request(request).await.unwrap();
        assert_eq!(session.address, CONNECTION_SERVER);
        let stream = crate::common::connect(&session);
        (session, stream)
    }
}

#[tokio::test]
async fn sessions_go_through_and_hold_servers_while_a_pool_shrinks() {
    let mut node = Node::new(ApiServer::shared().await, "path", 2).await;
    node.until_free(8).await;
    let (session, mut stream) = node.session().await;
    echo(&mut stream, "through the cluster");
    until("the status counts the session", async || {
        let status = node.space.pool("games").await.status.unwrap();
        status.sessions == Some(1) && status.free_ports == Some(7)
    })
    .await;
    // Growing: the new server serves.
    node.scale(3).await;
    node.follow().await;
    node.until_free(11).await;
    // Shrinking: the server with the session stays until it ends.
    node.space.apply("games", spec(0)).await.unwrap();
    until("only the busy one is left", async || {
        node.space
            .servers("games")
            .await
            .into_keys()
            .eq([session.server.clone()])
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    echo(&mut stream, "still here");
    assert_eq!(node.space.servers("games").await.len(), 1);
    drop(stream);
    until("all are gone", async || {
        node.space.servers("games").await.is_empty()
    })
    .await;
    node.space.ready("games").await;
    // And back from nothing.
    node.scale(2).await;
    node.follow().await;
    node.until_free(8).await;
    let (_, mut stream) = node.session().await;
    echo(&mut stream, "again");
}

#[tokio::test]
async fn a_spent_server_is_replaced_and_its_successor_has_its_ports() {
    let mut node = Node::new(ApiServer::shared().await, "recycle", 2).await;
    node.until_free(8).await;
    let mut recycled = spec(2);
    recycled["recycle"] = json!({ "afterSessions": 1 });
    node.space.make_ready("games", recycled).await;
    node.follow().await;
    let before = node.space.servers("games").await;
    let rows = node.space.table("games").await.unwrap().rows;
    let (session, mut stream) = node.session().await;
    // Its other ports are not offered any more.
    node.until_free(4).await;
    echo(&mut stream, "the only one");
    tokio::time::sleep(Duration::from_secs(3)).await;
    node.expect_still(&before).await;
    drop(stream);
    node.client().release(&session.id).await.unwrap();
    until("the server is another one", async || {
        let now = node.space.servers("games").await;
        let replaced = now.get(&session.server);
        replaced.is_some() && replaced != before.get(&session.server)
    })
    .await;
    node.space.ready("games").await;
    node.follow().await;
    node.until_free(8).await;
    let ranges = |rows: &[Row]| {
        rows.iter()
            .map(|row| row.ranges.clone())
            .collect::<Vec<_>>()
    };
    let after = node.space.table("games").await.unwrap().rows;
    assert_eq!(ranges(&after), ranges(&rows));
    let now = node.space.servers("games").await;
    let kept = before
        .iter()
        .filter(|(name, uid)| now.get(*name) == Some(uid));
    assert_eq!(kept.count(), 1, "the other server stays");
}

#[tokio::test]
async fn without_the_api_server_sessions_are_made_and_connection_servers_restart() {
    let server = Arc::new(ApiServer::own().await);
    let mut node = Node::new(server.clone(), "absence", 2).await;
    node.until_free(8).await;
    let (_, mut before) = node.session().await;
    echo(&mut before, "before");
    node.mount().await;
    let pods = node.space.servers("games").await;
    server.stop();
    tokio::time::sleep(Duration::from_secs(1)).await;
    echo(&mut before, "meanwhile");
    let (_, mut meanwhile) = node.session().await;
    echo(&mut meanwhile, "made without the API server");
    // Its connections go with it; the mounted copy is enough to start.
    node.connection_server.take();
    assert!(is_cut(&mut before));
    node.start_connection_server();
    let started = Instant::now();
    let (_, mut after) = node.session().await;
    echo(&mut after, "made after a restart without the API server");
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    server.resume();
    server.installed().await;
    let took = node.scale(3).await;
    assert!(took < Duration::from_secs(20), "{took:?}");
    node.expect_still(&pods).await;
    node.follow().await;
    let client = node.client();
    until("the new table is followed", async || {
        client.pool().await.is_ok_and(|state| {
            state
                .servers
                .iter()
                .filter(|server| server.attached)
                .count()
                == 3
        })
    })
    .await;
    echo(&mut after, "no connection was cut");
}

#[tokio::test]
async fn an_etcd_that_stands_still_disturbs_no_session() {
    let server = Arc::new(ApiServer::own().await);
    let mut node = Node::new(server.clone(), "standstill", 2).await;
    node.until_free(8).await;
    let (_, mut stream) = node.session().await;
    let pods = node.space.servers("games").await;
    server.pause_etcd(true);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(30) {
        echo(&mut stream, "through the standstill");
        let (_, mut another) = node.session().await;
        echo(&mut another, "made in the standstill");
        drop(another);
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    server.pause_etcd(false);
    let resumed = Instant::now();
    while node.space.apply("games", spec(3)).await.is_err() {
        assert!(resumed.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    node.space.ready("games").await;
    let took = resumed.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
    node.expect_still(&pods).await;
    node.follow().await;
    node.until_free(11).await;
    echo(&mut stream, "no connection was cut");
}

#[tokio::test]
async fn a_changed_pool_ends_sessions_only_on_ports_that_go() {
    let node = Node::new(ApiServer::shared().await, "changed", 2).await;
    node.until_free(8).await;
    let (session, mut stream) = node.session().await;
    echo(&mut stream, "before");
    // Times, policy, address and a wider range take no port away.
    let mut other = spec(2);
    other["sessions"] = json!({ "claimSeconds": 40, "lingerSeconds": 1 });
    other["loadSharing"] = json!({ "policy": "Packed" });
    other["connectionServer"] = json!({ "connectionPorts": { "first": 19_000, "last": 29_999 } });
    node.space.make_ready("games", other.clone()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    echo(&mut stream, "still here");
    // Another range does.
    other["connectionServer"] = json!({ "connectionPorts": { "first": 21_000, "last": 21_099 } });
    node.space.make_ready("games", other).await;
    until("the port is closed", async || {
        TcpStream::connect((CONNECTION_SERVER, session.port)).is_err()
    })
    .await;
    assert!(is_cut(&mut stream));
    node.until_free(8).await;
    let (session, mut stream) = node.session().await;
    assert!(
        (21_000..=21_099).contains(&session.port),
        "{}",
        session.port
    );
    echo(&mut stream, "on a new port");
}

#[tokio::test]
async fn a_deleted_pool_leaves_nothing_also_while_it_is_being_made() {
    let server = Arc::new(ApiServer::own().await);
    server.start_controller_manager(&[]);
    let mut space = Space::without_controller(server, "deleted").await;
    space.start_controller();
    for (parameters, wait_ready) in [
        (DeleteParams::background(), true),
        (DeleteParams::foreground(), true),
        (DeleteParams::background(), false),
        (DeleteParams::foreground(), false),
    ] {
        space.apply("games", spec(3)).await.unwrap();
        if wait_ready {
            space.ready("games").await;
        } else {
            until("it is being made", async || {
                space.config_map("games").await.is_some()
            })
            .await;
        }
        space.pools().delete("games", &parameters).await.unwrap();
        until("the pool is gone", async || {
            space.pools().get_opt("games").await.unwrap().is_none()
        })
        .await;
        // The garbage collector tries again after ever longer pauses.
        let started = Instant::now();
        while !space.owned().await.is_empty() && started.elapsed() < Duration::from_secs(90) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(space.owned().await, Vec::<String>::new(), "{parameters:?}");
    }
    // Orphans have no owner: they stay, and a new pool of the name reports them.
    space.make_ready("games", spec(2)).await;
    let (servers, table) = (space.servers("games").await, space.table("games").await);
    let orphan = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Orphan),
        ..DeleteParams::default()
    };
    space.pools().delete("games", &orphan).await.unwrap();
    let started = Instant::now();
    while space.pools().get_opt("games").await.unwrap().is_some() {
        assert!(started.elapsed() < Duration::from_secs(90));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    space.apply("games", spec(3)).await.unwrap();
    space.degraded("games", "belongs to someone else").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(space.servers("games").await, servers);
    assert_eq!(space.table("games").await, table);
}

#[tokio::test]
async fn servers_that_are_not_ready_hold_up_no_drain_while_they_have_no_session() {
    let mut node = Node::new(ApiServer::shared().await, "drained", 2).await;
    node.until_free(8).await;
    let space = &node.space;
    let budgets = space.objects("policy", "PodDisruptionBudget", "poddisruptionbudgets");
    let becomes = async |expected: &str| {
        until(expected, async || {
            let budget = budgets.get("games-processing-servers").await.unwrap();
            budget.data["spec"]["unhealthyPodEvictionPolicy"] == expected
        })
        .await;
    };
    let connection_servers = budgets.get("games-connection-servers").await.unwrap();
    let policy = &connection_servers.data["spec"]["unhealthyPodEvictionPolicy"];
    assert_eq!(policy, "AlwaysAllow");
    becomes("IfHealthyBudget").await;
    let report = async |pod: &str, status: &str| {
        let ready = json!({ "status": { "conditions": [{ "type": "Ready", "status": status }] } });
        patch_status(&space.pods(), pod, ready).await;
    };
    report("games-0", "False").await;
    report("games-1", "False").await;
    becomes("AlwaysAllow").await;
    report("games-0", "True").await;
    becomes("IfHealthyBudget").await;
    report("games-0", "False").await;
    becomes("AlwaysAllow").await;
    // They may have sessions of which no one says anything.
    drop(node.connection_server.take());
    let touched = json!({ "metadata": { "annotations": { "test/touched": "" } } });
    patch(&space.pods(), "games-0", touched).await;
    becomes("IfHealthyBudget").await;
}

/// Longest time until the status names a workload that does not listen: it must last
/// for 20 s, and is looked at now and then.
const NAMED: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_workload_that_does_not_listen_is_named_until_it_listens() {
    let mut node = Node::new(ApiServer::shared().await, "half", 1).await;
    node.until_free(4).await;
    let pod = node.space.pods().get("games-0").await.unwrap();
    let address = pod.status.unwrap().pod_ip.unwrap();
    let workload = |ports: &str| {
        let listen = format!("--listen={address}");
        Process::start(&["echo".to_owned(), listen, format!("--ports={ports}")])
    };
    let mut listen = |ports: &str| {
        let programs = node.running.values_mut().next().unwrap();
        programs[1].kill();
        programs[1] = workload(ports);
    };
    listen("7000-7001");
    // With some ports, the pool is as it should be: it may open the others later.
    let becomes = async |space: &Space, kind: &str, expected: &str, words: &str| {
        let started = Instant::now();
        loop {
            let (status, reason, message) = space.condition("games", kind).await;
            if reason == expected {
                assert_eq!(status, "True");
                assert!(message.contains(words), "{message}");
                break;
            }
            assert!(started.elapsed() < NAMED, "{reason}: {message}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        println!("{expected} after {:?}", started.elapsed());
    };
    let words = "games-0 does not listen on some of the ports 7000-7003/TCP";
    becomes(&node.space, "Ready", "PartlyListening", words).await;
    let (status, ..) = node.space.condition("games", "Degraded").await;
    assert_eq!(status, "False");
    listen("7100");
    let words = "games-0 does not listen on 7000-7003/TCP";
    becomes(&node.space, "Degraded", "PortsNotListening", words).await;
    // Another controller does not take it back.
    node.space.controller.take();
    node.space.start_controller();
    until("the new controller has looked at the pool", async || {
        metric(node.space.admin_port, "portpool_reconciles_total") > 0
    })
    .await;
    let restarted = Instant::now();
    while restarted.elapsed() < Duration::from_secs(5) {
        assert!(!node.space.is_ready("games").await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    listen("7000-7003");
    node.space.ready("games").await;
}
