//! The Helm chart as it is rendered: which objects it makes of values, and which
//! values it refuses. `BLESS=1 cargo test --test it generated` (`make generate`)
//! rewrites the files that are generated from it.

mod cluster;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use crate::common::helm::{CHART, documents, helm, of_kind, render, template, the};
use crate::common::{Pool, agree};
use portpool::connection::load_sharing::refusal::Refusal;
use serde_json::{Value, json};

/// How the committed `install.yaml` begins; the chart follows.
const INSTALL_HEAD: &str = "# Generated from charts/portpool by `make generate`.\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: portpool\n";

/// Values with everything on.
const EVERYTHING: &str = "--values=tests/chart/everything.values.yaml";

/// Heading in the chart's README; what follows is generated.
const VALUES_HEADING: &str = "## Values\n";

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn default_values() -> Value {
    serde_saphyr::from_str(&read("charts/portpool/values.yaml")).unwrap()
}

fn schema() -> Value {
    serde_json::from_str(&read("charts/portpool/values.schema.json")).unwrap()
}

fn kinds(objects: &[Value]) -> Vec<&str> {
    objects
        .iter()
        .filter_map(|object| object["kind"].as_str())
        .collect()
}

/// Whether a client is refused for want of ports or servers, and not because of what
/// it asked.
fn is_for_want(refusal: &Refusal) -> bool {
    match refusal {
        Refusal::AllInUse { .. }
        | Refusal::NotListening { .. }
        | Refusal::NotReady(_)
        | Refusal::Starting
        | Refusal::BeingReplaced
        | Refusal::Draining
        | Refusal::NotSelected
        | Refusal::Kept(_)
        | Refusal::NotTogether { .. }
        | Refusal::AgentsTooOld
        | Refusal::QueueFull => true,
        Refusal::UnknownPort { .. }
        | Refusal::CompanionPort { .. }
        | Refusal::InvalidPorts(_)
        | Refusal::UnknownServer
        | Refusal::UnknownSession
        | Refusal::KeyReused
        // What the workloads decide.
        | Refusal::NotConfirmed { .. }
        // Another connection server answers.
        | Refusal::ShuttingDown => false,
    }
}

#[test]
fn the_alert_on_refused_clients_knows_every_refusal_for_want_of_a_port() {
    let (not_ready, text) = (0, String::new);
    let refusals = [
        Refusal::AllInUse {
            in_use: 1,
            not_listening: 0,
            not_ready,
        },
        Refusal::NotListening {
            ports: 1,
            listening: 0,
            not_ready,
        },
        Refusal::NotReady(1),
        Refusal::Starting,
        Refusal::BeingReplaced,
        Refusal::Draining,
        Refusal::NotSelected,
        Refusal::Kept(1),
        Refusal::NotTogether {
            ports: 1,
            not_listening: 0,
            not_ready,
        },
        Refusal::AgentsTooOld,
        Refusal::QueueFull,
        Refusal::UnknownPort {
            field: text(),
            entries: text(),
        },
        Refusal::CompanionPort {
            field: text(),
            name: text(),
            entries: text(),
        },
        Refusal::InvalidPorts(text()),
        Refusal::UnknownServer,
        Refusal::UnknownSession,
        Refusal::KeyReused,
        Refusal::NotConfirmed {
            silent: 1,
            refused: 0,
            reason: None,
        },
        Refusal::ShuttingDown,
    ];
    let wanted = refusals.iter().filter(|refusal| is_for_want(refusal));
    let wanted: BTreeSet<&str> = wanted.map(Refusal::name).collect();
    let alerts: Value = serde_saphyr::from_str(&read("charts/portpool/files/alerts.yaml")).unwrap();
    let groups = alerts["groups"].as_array().unwrap().iter();
    let mut rules = groups.flat_map(|group| group["rules"].as_array().unwrap());
    let rule = rules.find(|rule| rule["alert"] == "PortpoolRequestsRefused");
    let expression = rule.unwrap()["expr"].as_str().unwrap();
    let (_, rest) = expression.split_once("outcome=~\"").unwrap();
    let (named, _) = rest.split_once('"').unwrap();
    assert_eq!(named.split('|').collect::<BTreeSet<_>>(), wanted);
}

#[test]
fn the_chart_passes_lint() {
    for more in [&[][..], &[EVERYTHING], &["--set=namespaces={red}"]] {
        let (passes, output) = helm(&[&["lint", "--strict", CHART], more].concat());
        assert!(passes, "{output}");
    }
}

#[test]
fn generated_install_yaml() {
    let text = template(&["--skip-tests"]);
    agree("charts/install.yaml", &format!("{INSTALL_HEAD}{text}"));
}

#[test]
fn generated_everything_on() {
    agree("tests/chart/everything.yaml", &template(&[EVERYTHING]));
}

#[test]
fn generated_rights() {
    let mut text = String::new();
    for (title, more) in [
        ("All namespaces", &[][..]),
        ("Namespaces red and blue", &["--set=namespaces={red,blue}"]),
    ] {
        writeln!(text, "{title}").unwrap();
        let objects = render(more);
        for object in &objects {
            let place = object["metadata"]["namespace"].as_str().unwrap_or("*");
            let role = format!("{} {}", object["kind"].as_str().unwrap(), name(object));
            if let Some(to) = object["roleRef"]["name"].as_str() {
                let to = format!("{} {to}", object["roleRef"]["kind"].as_str().unwrap());
                writeln!(text, "  {place}: {role} binds {to}").unwrap();
            }
            for rule in object["rules"].as_array().into_iter().flatten() {
                let words = |field: &str| {
                    let words = rule[field].as_array().into_iter().flatten();
                    let words = words.filter_map(Value::as_str);
                    words.collect::<Vec<_>>().join(",")
                };
                let group = words("apiGroups");
                let only = match words("resourceNames").as_str() {
                    "" => String::new(),
                    names => format!(" named {names}"),
                };
                let (resources, verbs) = (words("resources"), words("verbs"));
                writeln!(
                    text,
                    "  {place}: {role} may {verbs} {group}/{resources}{only}"
                )
                .unwrap();
            }
        }
    }
    agree("tests/chart/rights.txt", &text);
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap()
}

/// A value of `values.yaml` with its comment.
struct Documented {
    path: Vec<String>,
    description: String,
}

/// The values that have a comment, in order. Every value has one, or its parts
/// do.
fn documented(values: &str) -> Vec<Documented> {
    let (mut found, mut path) = (Vec::new(), Vec::<(usize, String)>::new());
    let mut description: Option<String> = None;
    for line in values.lines() {
        let text = line.trim_start();
        let indentation = line.len() - text.len();
        if let Some(comment) = text.strip_prefix("# -- ") {
            description = Some(comment.to_owned());
            continue;
        }
        let Some((key, rest)) = text.split_once(':') else {
            continue;
        };
        path.retain(|(outer, _)| *outer < indentation);
        let is_part = path.iter().any(|(_, key)| key.is_empty());
        match description.take() {
            Some(description) => {
                let keys = path.iter().map(|(_, key)| key.clone());
                found.push(Documented {
                    path: keys.chain([key.to_owned()]).collect(),
                    description,
                });
                // What is inside is a part of this value.
                path.push((indentation, String::new()));
            }
            None if is_part => {}
            None => {
                assert!(rest.is_empty(), "values.yaml: {key} has no comment");
                path.push((indentation, key.to_owned()));
            }
        }
    }
    found
}

fn at<'a>(value: &'a Value, path: &[String]) -> &'a Value {
    path.iter().fold(value, |value, key| &value[key])
}

#[test]
fn generated_readme() {
    let path = "charts/portpool/README.md";
    let readme = read(path);
    let (text, _) = readme
        .split_once(VALUES_HEADING)
        .expect("has the heading of its values");
    let mut readme =
        format!("{text}{VALUES_HEADING}\n| value | meaning | default |\n|---|---|---|\n");
    let values = default_values();
    for Documented { path, description } in documented(&read("charts/portpool/values.yaml")) {
        let default = at(&values, &path);
        let description = description.replace('|', "\\|");
        writeln!(
            readme,
            "| `{}` | {description} | `{default}` |",
            path.join(".")
        )
        .unwrap();
    }
    agree(path, &readme);
}

#[test]
fn versions_are_those_of_the_program() {
    let chart: Value = serde_saphyr::from_str(&read("charts/portpool/Chart.yaml")).unwrap();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(chart["version"], version);
    assert_eq!(chart["appVersion"], version);
    for annotation in ["images", "crdsExamples"] {
        let text = &chart["annotations"][format!("artifacthub.io/{annotation}")];
        let image = format!("ghcr.io/portpool/portpool:{version}");
        assert!(text.as_str().unwrap().contains(&image), "{annotation}");
    }
    let label = format!("org.opencontainers.image.version={version} ");
    assert!(read("Dockerfile").contains(&label), "Dockerfile");
}

/// A value that is of the wrong type wherever `schema` is.
fn wrong(schema: &Value) -> Value {
    match schema["type"].as_str() {
        Some("array") => json!(7),
        _ => json!(["wrong"]),
    }
}

/// Every value and every group of values in the schema, by path.
fn named(schema: &Value, path: &str, found: &mut BTreeMap<String, Value>) {
    found.insert(path.to_owned(), schema.clone());
    for (key, part) in schema["properties"].as_object().into_iter().flatten() {
        named(part, &format!("{path}/{key}"), found);
    }
}

/// `value` with `part` at `path`, which is `/a/b`.
fn nested(path: &str, part: Value) -> Value {
    let keys = path.rsplit('/').filter(|key| !key.is_empty());
    keys.fold(part, |part, key| json!({ key: part }))
}

/// Helm's message about `values`, which it must refuse.
fn refusal(values: &Value) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("values.json");
    std::fs::write(&file, values.to_string()).unwrap();
    let more = format!("--values={}", file.display());
    let (passes, message) = helm(&["template", "portpool", CHART, &more]);
    assert!(!passes, "{values} is not refused");
    message
}

#[test]
fn a_wrong_type_and_an_unknown_key_are_refused_by_name_everywhere() {
    let mut all = BTreeMap::new();
    named(&schema(), "", &mut all);
    assert!(all.len() > 70, "the schema names {}", all.len());
    // One message reports the unknown keys of all objects.
    let mut unknown = json!({});
    for (path, schema) in &all {
        let is_open = schema["additionalProperties"] != false;
        if schema["type"] == "object" && !is_open {
            let part = nested(path, json!({ "surprise": 1 }));
            merge(&mut unknown, part);
        }
    }
    let message = refusal(&unknown);
    let mut wrongs = json!({});
    for (path, schema) in &all {
        if path.is_empty() {
            continue;
        }
        if schema["type"] == "object" && schema["additionalProperties"] == false {
            let place = format!("at '{path}': additional properties 'surprise' not allowed");
            assert!(message.contains(&place), "{place}: {message}");
        } else {
            merge(&mut wrongs, nested(path, wrong(schema)));
        }
    }
    assert!(message.contains("at '': additional properties 'surprise' not allowed"));
    let message = refusal(&wrongs);
    for (path, schema) in &all {
        if schema["additionalProperties"] != false {
            let place = format!("at '{path}'");
            assert!(message.contains(&place), "{place}: {message}");
        }
    }
    // An object's own type, which the values inside have hidden above.
    for path in ["/image", "/crds", "/rbac", "/podMonitor", "/resources"] {
        let message = refusal(&nested(path, json!("text")));
        let words = format!("at '{path}': got string, want object");
        assert!(message.contains(&words), "{message}");
    }
}

fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (key, value) in more {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, more) => *into = more,
    }
}

#[test]
fn values_out_of_bounds_are_refused_by_name() {
    for (value, words) in [
        ("replicas=two", "at '/replicas': got string, want integer"),
        ("replicas=0", "at '/replicas': minimum: got 0, want 1"),
        ("replica=2", "additional properties 'replica' not allowed"),
        ("image.pullPolicy=Sometimes", "at '/image/pullPolicy'"),
        ("image.digest=latest", "at '/image/digest'"),
        ("namespaces={Red}", "at '/namespaces/0'"),
        ("namespaces={red,red}", "at '/namespaces'"),
        ("imagePullSecrets={registry}", "at '/imagePullSecrets/0'"),
        ("tolerations[0].effekt=NoSchedule", "at '/tolerations/0'"),
        (
            "resources.limits.memory=true",
            "at '/resources/limits/memory'",
        ),
        (
            "podDisruptionBudget.maxUnavailable=half",
            "at '/podDisruptionBudget/maxUnavailable'",
        ),
        ("podMonitor.interval=soon", "at '/podMonitor/interval'"),
        ("extraObjects[0].kind=ConfigMap", "at '/extraObjects/0'"),
        ("fullnameOverride=9lives", "at '/fullnameOverride'"),
    ] {
        let (passes, message) = helm(&["template", "portpool", CHART, "--set", value]);
        assert!(!passes && message.contains(words), "{value}: {message}");
    }
}

#[test]
fn the_schema_knows_the_values_and_no_others() {
    fn compare(values: &Value, schema: &Value, path: &str) {
        let Some(properties) = schema["properties"].as_object() else {
            return;
        };
        let Some(values) = values.as_object() else {
            return;
        };
        for (key, value) in values {
            let part = properties.get(key);
            let part = part.unwrap_or_else(|| panic!("the schema lacks {path}/{key}"));
            compare(value, part, &format!("{path}/{key}"));
        }
        // Kubernetes' own structures have parts that no default names.
        if ["", "/image", "/crds", "/rbac", "/podMonitor"].contains(&path) {
            for key in properties.keys() {
                let is_known = values.contains_key(key) || key == "global";
                assert!(is_known, "values.yaml lacks {path}/{key}");
            }
        }
    }
    compare(&default_values(), &schema(), "");
}

#[test]
fn toggles_do_what_they_say() {
    let toggles = [
        ("networkPolicy.enabled", "NetworkPolicy"),
        ("podMonitor.enabled", "PodMonitor"),
        ("serviceMonitor.enabled", "ServiceMonitor"),
        ("prometheusRule.enabled", "PrometheusRule"),
        ("crds.install", "CustomResourceDefinition"),
        ("podDisruptionBudget.enabled", "PodDisruptionBudget"),
        ("serviceAccount.create", "ServiceAccount"),
        ("rbac.create", "ClusterRoleBinding"),
    ];
    for (toggle, kind) in toggles {
        for is_on in [true, false] {
            let objects = render(&[&format!("--set={toggle}={is_on}")]);
            assert_eq!(kinds(&objects).contains(&kind), is_on, "{toggle}={is_on}");
        }
    }
    // What needs more than a plain cluster is off by itself.
    let usual = render(&[]);
    for (_, kind) in &toggles[..4] {
        assert!(!kinds(&usual).contains(kind), "{kind}");
    }
}

#[test]
fn a_chart_without_cluster_rights_is_possible() {
    let usual = render(&["--set=namespaces={red,blue}"]);
    assert!(of_kind(&usual, "ClusterRoleBinding").is_empty());
    let bound = of_kind(&usual, "RoleBinding").into_iter();
    let bound = bound.filter_map(|binding| binding["metadata"]["namespace"].as_str());
    assert_eq!(bound.collect::<Vec<_>>(), ["portpool", "red", "blue"]);
    let least = render(&[
        "--set=namespaces={red,blue},rbac.aggregateClusterRoles=false,crds.install=false",
    ]);
    for object in &least {
        let place = &object["metadata"]["namespace"];
        assert!(place.is_string(), "{} {}", object["kind"], name(object));
    }
}

#[test]
fn no_right_is_a_wildcard_or_reads_secrets() {
    for more in [&[][..], &[EVERYTHING], &["--set=namespaces={red}"]] {
        for object in render(more) {
            for rule in object["rules"].as_array().into_iter().flatten() {
                let text = rule.to_string();
                assert!(!text.contains('*') && !text.contains("secrets"), "{text}");
            }
        }
    }
}

#[test]
fn placement_and_secrets_reach_every_pod() {
    let objects = render(&[EVERYTHING]);
    let pods = [
        &the(&objects, "Deployment")["spec"]["template"]["spec"],
        &the(&objects, "ProcessingPool")["spec"]["template"]["spec"],
        &the(&objects, "Pod")["spec"],
    ];
    for pod in pods {
        assert_eq!(pod["imagePullSecrets"], json!([{ "name": "registry" }]));
        assert_eq!(pod["nodeSelector"]["kubernetes.io/os"], "linux");
        assert_eq!(pod["tolerations"][0]["key"], "dedicated");
        let image = pod["containers"][0]["image"].as_str().unwrap();
        assert!(image.starts_with("registry.example/portpool@sha256:"));
    }
    let arguments = pods[0]["containers"][0]["args"].to_string();
    assert!(arguments.contains("--image-pull-secret=registry"));
}

#[test]
fn names_are_short_and_of_the_release() {
    let long = "a-release-whose-name-is-as-long-as-helm-lets-it-be-53";
    for (release, base) in [
        ("portpool", "portpool"),
        ("my-portpool", "my-portpool"),
        ("games", "games-portpool"),
        ("games.eu", "games-eu-portpool"),
        ("9lives", "portpool-9lives"),
        (long, "a-release-whose-name-is-as-long-as-helm-lets"),
    ] {
        let more = ["--set=serviceMonitor.enabled=true,podMonitor.enabled=true"];
        let arguments = [&["template", release, CHART], &more[..]].concat();
        let (is_rendered, text) = helm(&arguments);
        assert!(is_rendered, "{text}");
        for object in documents(&text) {
            let (kind, name) = (object["kind"].as_str().unwrap(), name(&object));
            if kind != "CustomResourceDefinition" {
                assert!(name.len() <= 63 && name.starts_with(base), "{kind} {name}");
            }
        }
    }
}

#[tokio::test]
async fn the_pod_of_helm_test_passes_bytes_through_a_pool_and_notices_when_it_cannot() {
    let objects = render(&["--show-only=templates/tests/allocation.yaml"]);
    let service = name(the(&objects, "Service"));
    // The kubelet's name for it.
    let variable = service.to_uppercase().replace('-', "_");
    let variable = format!("$({variable}_SERVICE_HOST)");
    let mut pool = Pool::running(1, |_| {}).await;
    let address = pool.connection_address(0).to_string();
    let containers = &the(&objects, "Pod")["spec"]["containers"];
    let run = |container: &Value| {
        let arguments = container["args"].as_array().unwrap().iter();
        let arguments = arguments.map(|argument| {
            let argument = argument.as_str().unwrap();
            argument.replace(&variable, &address).replace("=180", "=1")
        });
        Command::new(env!("CARGO_BIN_EXE_portpool"))
            .args(arguments)
            .output()
            .unwrap()
    };
    let containers = containers.as_array().unwrap();
    let transports: Vec<_> = containers
        .iter()
        .map(|container| &container["name"])
        .collect();
    assert_eq!(transports, ["tcp", "udp"]);
    for container in containers {
        let output = run(container);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{errors}");
    }
    // No workload: nothing is free.
    pool.workloads.clear();
    pool.until(|state| state.free_ports == 0).await;
    for container in containers {
        assert_eq!(run(container).status.code(), Some(3));
    }
}

#[test]
fn the_pool_of_helm_test_is_in_a_namespace_that_controllers_manage() {
    for (more, place) in [
        ("--set=replicas=1", "portpool"),
        ("--set=namespaces={red,portpool}", "portpool"),
        ("--set=namespaces={red,blue}", "red"),
    ] {
        let objects = render(&[more]);
        for kind in ["ProcessingPool", "Pod"] {
            let found = &the(&objects, kind)["metadata"]["namespace"];
            assert_eq!(found, place, "{kind} {more}");
        }
    }
}
