//! A real API server with etcd, and with a controller manager on demand.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ListParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, ResourceExt};
use portpool::pool::ProcessingPool;
use serde_json::json;

use super::until;
use crate::common::SOON;

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
