//! The Helm chart with a real API server: it accepts every object, the granted
//! rights are those that the controller uses, and Helm leaves nothing behind.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::common::cluster::{
    ApiServer, Space, metric, metrics, quick, until, with_image, write_kubeconfig_with,
};
use crate::common::helm::{CHART, documents, helm, render, the};
use crate::common::{COUNT, Pool, Process};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Pod, Service, ServiceAccount};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams,
};
use kube::core::GroupVersionKind;
use portpool::pool::ProcessingPool;
use serde_json::{Value, json};

const EVERYTHING: &str = "--values=tests/chart/everything.values.yaml";
const CRD: &str = "processingpools.portpool.dev";

/// The controllers' account in the chart's namespace.
const ACCOUNT: &str = "system:serviceaccount:portpool:portpool-controller";

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap()
}

/// Applies `object`, or only has it checked.
async fn apply(client: &Client, object: &Value, dry_run: bool) -> kube::Result<()> {
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
    let mut parameters = PatchParams::apply("test").force().validation_strict();
    parameters.dry_run = dry_run;
    let patch = Patch::Apply(object);
    api.patch(name(object), &parameters, &patch)
        .await
        .map(|_| ())
}

/// A namespace in which nothing runs that pod security `restricted` refuses.
async fn restricted(client: &Client, name: &str) {
    let labels = json!({ "pod-security.kubernetes.io/enforce": "restricted" });
    let object = json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels },
    });
    apply(client, &object, false).await.unwrap();
}

fn monitoring_crds() -> Vec<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/monitoring-crds");
    let output = Command::new(script).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    let folder = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    let kinds = ["podmonitors", "servicemonitors", "prometheusrules"];
    let crds = kinds.map(|kind| {
        let file = folder.join(format!("monitoring.coreos.com_{kind}.yaml"));
        let text = std::fs::read_to_string(file).unwrap();
        serde_saphyr::from_str(&text).unwrap()
    });
    crds.into()
}

#[tokio::test]
async fn the_api_server_takes_every_object_and_pod_security_every_pod() {
    let server = ApiServer::shared().await;
    let client = server.client().await;
    restricted(&client, "portpool").await;
    for crd in monitoring_crds() {
        apply(&client, &crd, false).await.unwrap();
    }
    for more in [&[][..], &[EVERYTHING]] {
        for object in render(more) {
            let kind = object["kind"].as_str().unwrap().to_owned();
            let called = format!("{kind} {}", name(&object));
            // A monitor's resource may take a moment to be served.
            until(&format!("{called} is taken"), async || {
                match apply(&client, &object, true).await {
                    Err(kube::Error::Api(status)) if status.code == 404 => false,
                    taken => taken
                        .map(|()| true)
                        .unwrap_or_else(|error| panic!("{called}: {error}")),
                }
            })
            .await;
            if ["Deployment", "ProcessingPool"].contains(&kind.as_str()) {
                let pod = pod_of(&object["spec"]["template"], "portpool");
                let taken = apply(&client, &pod, true).await;
                taken.unwrap_or_else(|error| panic!("pod of {called}: {error}"));
            }
        }
    }
    // The namespace does refuse.
    let loose = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "loose", "namespace": "portpool" },
        "spec": { "containers": [{ "name": "main", "image": "example.test/main" }] },
    });
    let refused = apply(&client, &loose, true).await.unwrap_err().to_string();
    assert!(refused.contains("PodSecurity"), "{refused}");
}

#[tokio::test]
async fn pools_run_under_pod_security_restricted() {
    let space = Space::new("strict").await;
    restricted(&space.client, "strict").await;
    let values = ["--show-only=templates/tests/allocation.yaml"];
    let mut pool = the(&render(&values), "ProcessingPool").clone();
    pool["metadata"]["namespace"] = "strict".into();
    apply(&space.client, &pool, false).await.unwrap();
    space.ready(name(&pool)).await;
    assert_eq!(space.servers(name(&pool)).await.len(), 2);
    // No Deployment controller runs here, so the test makes the connection server's pod.
    let deployments = space.objects("apps", "Deployment", "deployments");
    let deployment = format!("{}-connection-server", name(&pool));
    let deployment = deployments.get(&deployment).await.unwrap();
    let pod = pod_of(&deployment.data["spec"]["template"], "strict");
    apply(&space.client, &pod, true).await.unwrap();
}

/// The pod that `template` makes in `namespace`.
fn pod_of(template: &Value, namespace: &str) -> Value {
    let mut pod = template.clone();
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = "of-template".into();
    pod["metadata"]["namespace"] = namespace.into();
    pod
}

/// An API server that writes down who does what, and demands the right to
/// finalizers, as some distributions do.
struct Audited {
    server: Arc<ApiServer>,
    folder: tempfile::TempDir,
}

impl Audited {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let policy = json!({
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [{ "level": "Metadata", "users": [ACCOUNT] }, { "level": "None" }],
        });
        let file = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(file("policy"), policy.to_string()).unwrap();
        let server = ApiServer::own_with(&[
            format!("--audit-policy-file={}", file("policy")),
            format!("--audit-log-path={}", file("log")),
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement".to_owned(),
        ])
        .await;
        Self {
            server: Arc::new(server),
            folder,
        }
    }

    /// What the controllers' account has done: namespace (of the pools', or the
    /// release's), group/resource and verb; and what it was forbidden.
    fn done(&self) -> (BTreeSet<Right>, BTreeSet<Right>) {
        let text = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let (mut done, mut forbidden) = (BTreeSet::new(), BTreeSet::new());
        for line in text.lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            let object = &event["objectRef"];
            let Some(resource) = object["resource"].as_str() else {
                continue;
            };
            let part = object["subresource"].as_str();
            let part = part.map(|part| format!("/{part}")).unwrap_or_default();
            let right = |verb: &str| Right {
                namespace: object["namespace"].as_str().unwrap_or_default().to_owned(),
                resource: format!(
                    "{}/{resource}{part}",
                    object["apiGroup"].as_str().unwrap_or_default()
                ),
                verb: verb.to_owned(),
            };
            let verb = event["verb"].as_str().unwrap();
            match event["responseStatus"]["code"].as_u64().unwrap_or_default() {
                403 => forbidden.insert(right(verb)),
                // To apply what is not there also takes the right to create it.
                201 => done.insert(right("create")) | done.insert(right(verb)),
                _ => done.insert(right(verb)),
            };
        }
        (done, forbidden)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    namespace: String,
    resource: String,
    verb: String,
}

/// What the roles in `objects` that are bound to the controllers grant, by
/// resource and verb.
fn granted(objects: &[Value]) -> BTreeSet<(String, String)> {
    let roles = objects.iter().filter(|object| {
        let is_role = ["Role", "ClusterRole"].contains(&object["kind"].as_str().unwrap());
        is_role && (name(object) == "portpool-controller" || name(object).ends_with("-lease"))
    });
    let texts = |value: &Value| -> Vec<String> {
        let texts = value.as_array().unwrap().iter().filter_map(Value::as_str);
        texts.map(str::to_owned).collect()
    };
    let mut granted = BTreeSet::new();
    for rule in roles.flat_map(|role| role["rules"].as_array().unwrap()) {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    granted.insert((format!("{group}/{resource}"), verb));
                }
            }
        }
    }
    granted
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

/// Starts the controller as the Deployment in `objects` has it, with the
/// rights of its account.
async fn start_controller(space: &Space, objects: &[Value], kubeconfig: &Path) -> Process {
    let container = &the(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0];
    let admin = format!("--admin=127.0.0.1:{}", space.admin_port);
    let arguments = container["args"].as_array().unwrap().iter();
    let arguments = arguments.map(|argument| match argument.as_str().unwrap() {
        "--admin=[::]:7702" => admin.clone(),
        argument => argument.to_owned(),
    });
    let arguments: Vec<String> = arguments.collect();
    let environment = [("KUBECONFIG", &*kubeconfig.display().to_string())];
    let controller = Process::start_with(&arguments, &environment);
    until("the controller leads", async || {
        metric(space.admin_port, "portpool_leader") == 1
    })
    .await;
    controller
}

/// Has the controller do everything that it ever does.
async fn exercise(space: &Space) {
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
    // Fewer servers: pods and a Service go.
    space.apply("nodes", exposed(0, "NodePort")).await.unwrap();
    until("the ports' Service is gone", async || {
        services.get_opt("nodes-ports-0").await.unwrap().is_none()
    })
    .await;
    // Another object has the name of the next pod. The controller then reads it.
    let foreign = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "inside-2", "namespace": space.name, "annotations": { "test/hands-off": "" } },
        "spec": { "containers": [{ "name": "main", "image": "example.test/main" }] },
    });
    apply(&space.client, &foreign, false).await.unwrap();
    space
        .apply("inside", exposed(3, "ClusterIP"))
        .await
        .unwrap();
    space.degraded("inside", "inside-2").await;
    let gone = DeleteParams::default();
    space.pods().delete("inside-2", &gone).await.unwrap();
    space.ready("inside").await;
    // The same events again are counted on the first ones.
    space
        .apply("inside", exposed(1, "ClusterIP"))
        .await
        .unwrap();
    space.ready("inside").await;
    let events = space.objects("events.k8s.io", "Event", "events");
    until("an event is repeated", async || {
        let listed = events.list(&ListParams::default()).await.unwrap();
        listed
            .iter()
            .any(|event| event.data["series"]["count"].as_u64() >= Some(2))
    })
    .await;
}

/// Asserts that the rights in `objects` are those that the audit log shows, and
/// one that the API server demands without a request of its own.
fn compare(objects: &[Value], done: &BTreeSet<Right>) {
    let finalizers = (
        "portpool.dev/processingpools/finalizers".to_owned(),
        "update".to_owned(),
    );
    let mut used: BTreeSet<_> = done
        .iter()
        .map(|right| (right.resource.clone(), right.verb.clone()))
        .collect();
    used.insert(finalizers);
    let granted = granted(objects);
    let superfluous: Vec<_> = granted.difference(&used).collect();
    assert!(superfluous.is_empty(), "granted, not used: {superfluous:?}");
    let missing: Vec<_> = used.difference(&granted).collect();
    assert!(missing.is_empty(), "used, not granted: {missing:?}");
}

#[tokio::test]
async fn what_is_granted_is_what_is_used() {
    let audited = Audited::start().await;
    let client = audited.server.client().await;
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/install.yaml"))
            .unwrap();
    let objects = documents(&text);
    for object in &objects {
        let applied = apply(&client, object, false).await;
        applied.unwrap_or_else(|error| panic!("{}: {error}", name(object)));
    }
    // The chart's Lease was deleted: the controllers make another.
    let leases: Api<Lease> = Api::namespaced(client.clone(), "portpool");
    let gone = DeleteParams::default();
    leases.delete("portpool-controller", &gone).await.unwrap();
    let (_folder, kubeconfig) = account(&audited.server).await;
    let space = Space::without_controller(audited.server.clone(), "games").await;
    let mut controller = start_controller(&space, &objects, &kubeconfig).await;
    exercise(&space).await;
    // It gives the Lease back.
    controller.terminate();
    assert!(controller.ends());
    let (done, forbidden) = audited.done();
    assert!(forbidden.is_empty(), "{forbidden:?}");
    compare(&objects, &done);
}

#[tokio::test]
async fn what_is_granted_for_namespaces_is_what_is_used_there() {
    let audited = Audited::start().await;
    let space = Space::without_controller(audited.server.clone(), "games").await;
    let other = Space::without_controller(audited.server.clone(), "other").await;
    let values = ["--set=namespaces={games},crds.install=false"];
    let cluster = format!("--kubeconfig={}", audited.server.kubeconfig().display());
    let into = ["--namespace=portpool", "--create-namespace", &cluster];
    let arguments = [&["install", "portpool", CHART][..], &into, &values].concat();
    let (is_installed, output) = helm(&arguments);
    assert!(is_installed, "{output}");
    // Another controller had the Lease and has crashed.
    let spec = json!({
        "holderIdentity": "crashed", "leaseDurationSeconds": 1,
        "renewTime": "2026-01-01T00:00:00.000000Z",
    });
    let leases: Api<Lease> = Api::namespaced(audited.server.client().await, "portpool");
    let held = Patch::Merge(json!({ "spec": spec }));
    let parameters = PatchParams::default();
    leases
        .patch("portpool-controller", &parameters, &held)
        .await
        .unwrap();
    // Also when one of the namespaces was deleted, and the rights in it.
    let mut objects = render(&values);
    let deployment = objects
        .iter_mut()
        .find(|object| object["kind"] == "Deployment")
        .unwrap();
    let arguments = &mut deployment["spec"]["template"]["spec"]["containers"][0]["args"];
    let arguments = arguments.as_array_mut().unwrap();
    arguments.insert(1, "--namespace=gone".into());
    let (_folder, kubeconfig) = account(&audited.server).await;
    let controller = start_controller(&space, &objects, &kubeconfig).await;
    other.apply("ignored", quick(2)).await.unwrap();
    exercise(&space).await;
    drop(controller);
    let (mut done, forbidden) = audited.done();
    let places: BTreeSet<&str> = done.iter().map(|right| &*right.namespace).collect();
    assert_eq!(places, BTreeSet::from(["games", "portpool"]));
    let places: BTreeSet<&str> = forbidden.iter().map(|right| &*right.namespace).collect();
    assert_eq!(places, BTreeSet::from(["gone"]), "{forbidden:?}");
    assert!(done.insert(Right {
        namespace: "portpool".to_owned(),
        resource: "coordination.k8s.io/leases".to_owned(),
        // The chart's Lease was not deleted.
        verb: "create".to_owned(),
    }));
    compare(&objects, &done);
    assert!(other.owned().await.is_empty());
}

/// Runs helm with the cluster of `server`.
fn helm_in(server: &ApiServer, arguments: &[&str]) -> (bool, String) {
    let cluster = format!("--kubeconfig={}", server.kubeconfig().display());
    helm(&[arguments, &[&cluster]].concat())
}

fn helm_must(server: &ApiServer, arguments: &[&str]) -> String {
    let (is_done, output) = helm_in(server, arguments);
    assert!(is_done, "helm {arguments:?}: {output}");
    output
}

/// The pool that the chart's notes have the reader apply, as the shell gives
/// it to kubectl.
fn noted_pool(notes: &str) -> Value {
    let (_, rest) = notes.split_once("kubectl apply -f -").unwrap();
    let (document, _) = rest.split_once("\nEND\n").unwrap();
    let script = format!("cat{document}\nEND\n");
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let mut pool: Value =
        serde_saphyr::from_str(&String::from_utf8(output.stdout).unwrap()).unwrap();
    let command = pool["spec"]["template"]["spec"]["containers"][0]["command"].to_string();
    assert!(command.contains("$(POD_IP)"), "{command}");
    pool["metadata"]["namespace"] = "default".into();
    pool
}

#[tokio::test]
async fn helm_installs_upgrades_and_uninstalls() {
    let server = ApiServer::own().await;
    let client = server.client().await;
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let pools: Api<ProcessingPool> = Api::namespaced(client.clone(), "default");
    let there = "--namespace=portpool";
    let install = ["install", "portpool", CHART, there, "--create-namespace"];
    let uninstall = ["uninstall", "portpool", there];
    // The resource is there already, from `portpool crd | kubectl apply`.
    let (is_done, message) = helm_in(&server, &install);
    let words = "invalid ownership metadata";
    assert!(!is_done && message.contains(words), "{message}");
    let take = ["--take-ownership", "--force-conflicts"];
    let notes = helm_must(&server, &[&install[..], &take].concat());
    apply(&client, &noted_pool(&notes), false).await.unwrap();
    let upgrade = ["upgrade", "portpool", CHART, there, "--set=replicas=3"];
    helm_must(&server, &upgrade);
    helm_must(&server, &uninstall);
    // The resource stays with the pools, and the next installation takes it over.
    assert!(pools.get_opt("small").await.unwrap().is_some());
    helm_must(
        &server,
        &[&install[..], &["--set=crds.keep=false"]].concat(),
    );
    assert!(pools.get_opt("small").await.unwrap().is_some());
    helm_must(&server, &uninstall);
    until("the resource is gone", async || {
        crds.get_opt(CRD).await.unwrap().is_none()
    })
    .await;
}

#[tokio::test]
async fn a_namespace_that_does_not_exist_is_named() {
    let server = ApiServer::shared().await;
    let values = "--set=namespaces={nowhere},crds.install=false,rbac.aggregateClusterRoles=false";
    let there = ["--namespace=lost", "--create-namespace"];
    let install = [&["install", "lost", CHART, values][..], &there].concat();
    let (is_done, message) = helm_in(&server, &install);
    let words = r#"namespaces "nowhere" not found"#;
    assert!(!is_done && message.contains(words), "{message}");
}

#[tokio::test]
async fn a_test_that_fails_leaves_nothing() {
    let server = ApiServer::shared().await;
    let client = server.client().await;
    restricted(&client, "failing").await;
    let there = "--namespace=failing";
    let values = "--set=crds.install=false";
    helm_must(&server, &["install", "failing", CHART, there, values]);
    // Without a node the pod does not end.
    let test = ["test", "failing", there, "--timeout=3s"];
    let (passes, output) = helm_in(&server, &test);
    assert!(!passes, "{output}");
    let pods: Api<Pod> = Api::namespaced(client.clone(), "failing");
    let services: Api<Service> = Api::namespaced(client.clone(), "failing");
    let pools: Api<ProcessingPool> = Api::namespaced(client.clone(), "failing");
    let all = ListParams::default();
    until("nothing of the test is left", async || {
        pods.list(&all).await.unwrap().items.is_empty()
            && services.list(&all).await.unwrap().items.is_empty()
            && pools.list(&all).await.unwrap().items.is_empty()
    })
    .await;
}

#[tokio::test]
async fn alerts_are_about_metrics_that_exist() {
    let space = Space::new("alerts").await;
    let blocked = with_image(quick(2), "");
    space.apply("blocked", blocked).await.unwrap();
    space.degraded("blocked", "image").await;
    let pool = Pool::running(1, |_| {}).await;
    for _ in 0..COUNT {
        pool.request().await.unwrap();
    }
    assert!(pool.request().await.unwrap_err().is_exhausted());
    let pages = [
        metrics(&format!("127.0.0.1:{}", space.admin_port)),
        metrics(&format!("{}:7701", pool.connection_address(0))),
    ]
    .concat();
    let objects = render(&["--set=prometheusRule.enabled=true"]);
    let groups = the(&objects, "PrometheusRule")["spec"]["groups"].as_array();
    let rules = groups
        .unwrap()
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap());
    let selector = regex::Regex::new(r"(portpool_\w+)(?:\{([^}]*)\})?").unwrap();
    let matcher = regex::Regex::new(r#"(\w+)=~?"([^"]+)""#).unwrap();
    let mut count = 0;
    for expression in rules.map(|rule| rule["expr"].as_str().unwrap()) {
        let selected = selector.captures(expression).unwrap();
        let name = &selected[1];
        let samples: Vec<&str> = pages
            .lines()
            .filter(|line| line.split(['{', ' ']).next() == Some(name))
            .collect();
        assert!(!samples.is_empty(), "{name} of {expression}");
        let labels = selected.get(2).map_or("", |labels| labels.as_str());
        for label in matcher.captures_iter(labels) {
            // Prometheus adds the namespace; no error is provoked here.
            if &label[1] == "namespace" || &label[2] == "error" {
                continue;
            }
            let is_seen = label[2].split('|').any(|value| {
                let label = format!("{}=\"{value}\"", &label[1]);
                samples.iter().any(|sample| sample.contains(&label))
            });
            assert!(is_seen, "{} of {expression}: {samples:?}", &label[0]);
        }
        count += 1;
    }
    assert_eq!(count, 8);
}
