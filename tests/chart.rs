//! The Helm chart: what it renders, what it refuses, and whether its rights
//! are enough.

#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::Process;
use common::cluster::{ApiServer, Space, metric, quick, until, write_kubeconfig_with};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};

/// How the committed `install.yaml` begins; the chart follows.
const INSTALL_HEAD: &str = "# Generated from charts/portpool by `make generate`.\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: portpool\n";

fn helm(arguments: &[&str]) -> (bool, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = Command::new(root.join("tools/get-helm"))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(script.status.success(), "no helm to test with, see above");
    let program = String::from_utf8(script.stdout).unwrap();
    let output = Command::new(program.trim())
        .args(arguments)
        .current_dir(root)
        .output()
        .unwrap();
    let told = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(told).unwrap())
}

fn render(more: &[&str]) -> Vec<Value> {
    let mut arguments = vec![
        "template",
        "portpool",
        "charts/portpool",
        "--namespace=portpool",
    ];
    arguments.extend(more);
    let (is_rendered, text) = helm(&arguments);
    assert!(is_rendered, "{text}");
    documents(&text)
}

fn documents(text: &str) -> Vec<Value> {
    let documents = text
        .split("\n---\n")
        .filter(|text| text.lines().any(|line| line.starts_with("kind:")));
    documents
        .map(|text| serde_saphyr::from_str(text).unwrap())
        .collect()
}

fn kinds(objects: &[Value]) -> Vec<&str> {
    objects
        .iter()
        .filter_map(|object| object["kind"].as_str())
        .collect()
}

#[test]
fn the_chart_passes_lint_and_install_yaml_is_generated_from_it() {
    let (passes, told) = helm(&["lint", "--strict", "charts/portpool"]);
    assert!(passes, "{told}");
    let (is_rendered, text) = helm(&[
        "template",
        "portpool",
        "charts/portpool",
        "--namespace=portpool",
    ]);
    assert!(is_rendered, "{text}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/install.yaml");
    let expected = format!("{INSTALL_HEAD}{text}");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "charts/install.yaml is out of date: run `make generate` and review the diff"
    );
}

#[test]
fn values_of_wrong_type_or_name_are_refused() {
    for (value, words) in [
        ("replicas=two", "got string, want integer"),
        ("replica=2", "additional properties 'replica' not allowed"),
        ("image.pullPolicy=Sometimes", "value must be one of"),
        ("replicas=0", "minimum: got 0, want 1"),
    ] {
        let (passes, told) = helm(&["template", "portpool", "charts/portpool", "--set", value]);
        assert!(!passes && told.contains(words), "{value}: {told}");
    }
}

#[test]
fn toggles_do_what_they_say() {
    let usual = render(&[]);
    assert!(kinds(&usual).contains(&"CustomResourceDefinition"));
    assert!(!kinds(&usual).contains(&"NetworkPolicy") && !kinds(&usual).contains(&"PodMonitor"));
    assert!(!kinds(&render(&["--set=crds.install=false"])).contains(&"CustomResourceDefinition"));
    let more = render(&["--set=networkPolicy=true,podMonitor=true"]);
    assert!(kinds(&more).contains(&"NetworkPolicy") && kinds(&more).contains(&"PodMonitor"));
    let limited = render(&["--set=namespaces={red,blue}"]);
    let bound: Vec<&str> = limited
        .iter()
        .filter(|object| object["kind"] == "RoleBinding")
        .filter_map(|object| object["metadata"]["namespace"].as_str())
        .collect();
    assert_eq!(bound, ["portpool", "red", "blue"]);
    assert!(!kinds(&limited).contains(&"ClusterRoleBinding"));
}

#[test]
fn no_right_is_a_wildcard_or_reads_secrets() {
    for object in render(&[]) {
        for rule in object["rules"].as_array().into_iter().flatten() {
            let text = rule.to_string();
            assert!(!text.contains('*') && !text.contains("secrets"), "{text}");
        }
    }
}

/// A kubeconfig of the chart's service account.
async fn account(server: &ApiServer) -> (tempfile::TempDir, PathBuf) {
    let client = server.client().await;
    let accounts: Api<ServiceAccount> = Api::namespaced(client, "portpool");
    let request: TokenRequest =
        serde_json::from_value(json!({ "spec": { "audiences": [] } })).unwrap();
    let token = accounts
        .create_token_request("portpool-controller", &PostParams::default(), &request)
        .await
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    write_kubeconfig_with(
        &path,
        &format!("https://127.0.0.1:{}", server.port),
        &token.status.unwrap().token.unwrap(),
    );
    (folder, path)
}

#[tokio::test]
async fn what_is_installed_is_enough_to_make_pools_true() {
    let server = Arc::new(ApiServer::own().await);
    let client = server.client().await;
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/install.yaml"))
            .unwrap();
    for object in documents(&text) {
        let (group, version) = object["apiVersion"]
            .as_str()
            .unwrap()
            .rsplit_once('/')
            .unwrap_or(("", "v1"));
        let kind = GroupVersionKind::gvk(group, version, object["kind"].as_str().unwrap());
        let resource = ApiResource::from_gvk(&kind);
        let api: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
            None => Api::all_with(client.clone(), &resource),
        };
        let parameters = PatchParams::apply("test").force().validation_strict();
        let name = object["metadata"]["name"].as_str().unwrap();
        api.patch(name, &parameters, &Patch::Apply(&object))
            .await
            .unwrap_or_else(|error| panic!("{kind:?} {name}: {error}"));
    }
    let (_folder, kubeconfig) = account(&server).await;
    let space = Space::without_controller(server, "games").await;
    let arguments = [
        "controller".to_owned(),
        "--lease=portpool/portpool-controller".to_owned(),
        format!("--admin=127.0.0.1:{}", space.admin_port),
    ];
    let _controller = Process::start_with(
        &arguments,
        &[("KUBECONFIG", &kubeconfig.display().to_string())],
    );
    until("the controller leads", async || {
        metric(space.admin_port, "portpool_leader") == 1
    })
    .await;
    let exposed = |replicas: u32, exposure: &str| {
        let mut spec = quick(replicas);
        spec["connectionServer"] =
            json!({ "exposure": exposure, "connectionPorts": { "first": 31000, "last": 31999 } });
        spec
    };
    space
        .apply("inside", exposed(2, "ClusterIP"))
        .await
        .unwrap();
    space.apply("nodes", exposed(2, "NodePort")).await.unwrap();
    space.ready("inside").await;
    space.ready("nodes").await;
    let services = space.objects("", "Service", "services");
    let ports = services.get("nodes-ports-0").await.unwrap();
    assert_eq!(ports.data["spec"]["ports"][0]["nodePort"], 31_000);
    space.apply("nodes", exposed(0, "NodePort")).await.unwrap();
    until("the ports' Service is gone", async || {
        services.get_opt("nodes-ports-0").await.unwrap().is_none()
    })
    .await;
    space.ready("nodes").await;
    // Events are written with these rights too.
    let events = space.objects("events.k8s.io", "Event", "events");
    until("an event tells", async || {
        let listed = events
            .list(&kube::api::ListParams::default())
            .await
            .unwrap();
        listed
            .items
            .iter()
            .any(|event| event.data["reason"] == "Complete")
    })
    .await;
}
