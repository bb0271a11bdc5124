//! Every field of a pool's spec: invalid, unsatisfiable, changed, removed and
//! put back. The fields come from the resource's schema, so that a new one
//! needs a case here.
//!
//! Source of the method: Acto (SOSP '23), which changes one field at a time and
//! then takes the change back.

use std::collections::{BTreeMap, BTreeSet};

use std::fmt::Write;
use std::path::Path;

use crate::common::agree;
use crate::common::cluster::{KINDS, Space, quick, until};
use futures::StreamExt;
use kube::api::{ListParams, Patch, PatchParams};
use portpool::pool::ProxyProtocol;
use portpool::table::PortRange;
use serde_json::{Map, Value, json};

/// Values of a field, beside the invalid ones that its schema gives.
struct Case {
    path: &'static str,
    /// Another valid value.
    changed: Value,
    /// A value that cannot be satisfied, with words of the answer or the condition.
    unsatisfiable: Option<(Value, &'static str)>,
    /// Another field and the value that `changed` needs there.
    needs: Option<(&'static str, Value)>,
}

fn case(path: &'static str, changed: Value) -> Case {
    Case {
        path,
        changed,
        unsatisfiable: None,
        needs: None,
    }
}

impl Case {
    fn unsatisfiable(mut self, value: Value, words: &'static str) -> Self {
        self.unsatisfiable = Some((value, words));
        self
    }

    fn needs(mut self, path: &'static str, value: Value) -> Self {
        self.needs = Some((path, value));
        self
    }
}

/// One case for each field that holds a value, or a list.
fn cases() -> Vec<Case> {
    let second = json!({ "name": "more", "port": 8000 });
    let twice =
        json!([{ "name": "main", "port": 7000, "count": 4 }, { "name": "more", "port": 7003 }]);
    let mut template = quick(1)["template"].clone();
    template["spec"]["containers"][0]["image"] = "other:1".into();
    let mut nowhere = template.clone();
    nowhere["spec"]["containers"][0]["image"] = "nowhere:1".into();
    let no_room = "must not exceed the number of connectionServer.connectionPorts";
    vec![
        case("replicas", json!(3)).unsatisfiable(json!(26), no_room),
        case("ports", json!([quick(1)["ports"][0], second])).unsatisfiable(twice, "overlap"),
        case("ports[].name", json!("other")),
        case("ports[].port", json!(7100)).unsatisfiable(json!(7069), "portpool's agent"),
        case("ports[].count", json!(2)).unsatisfiable(json!(101), no_room),
        case("ports[].protocol", json!("TCPUDP")),
        case("ports[].mapping", json!("Shared")),
        case("ports[].offer", json!("Always")).unsatisfiable(json!("WhenAnyListens"), "TCPUDP"),
        case("ports[].admission", json!("Open"))
            .unsatisfiable(json!("Companion"), "no client could have a session"),
        case("ports[].proxyProtocol", json!("V2")),
        case("ports[].replies", json!("AnyPort"))
            .unsatisfiable(json!("AnyPort"), "needs protocol UDP or TCPUDP")
            .needs("ports[].protocol", json!("UDP")),
        case("connectionServer.replicas", json!(2)),
        case("connectionServer.loadSharingPort", json!(7800))
            .unsatisfiable(json!(20_001), "must lie outside connectionPorts"),
        case("connectionServer.connectionPorts.first", json!(20_010))
            .unsatisfiable(json!(20_098), no_room),
        case("connectionServer.connectionPorts.last", json!(20_010))
            .unsatisfiable(json!(20_002), no_room),
        case(
            "connectionServer.advertisedAddress",
            json!("games.example.org"),
        )
        .unsatisfiable(json!("games.example.org:443"), "without a port"),
        case(
            "connectionServer.allocateLoadBalancerNodePorts",
            json!(true),
        ),
        case("connectionServer.exposure", json!("HostNetwork")),
        case("loadSharing.policy", json!("Packed")),
        case("sessions.claimSeconds", json!(31)),
        case("sessions.idleTimeoutSeconds", json!(0)),
        case("sessions.udpIdleTimeoutSeconds", json!(61)),
        case("sessions.maxDurationSeconds", json!(9)),
        case("sessions.lingerSeconds", json!(0)),
        case("sessions.admission", json!("Open")),
        case("sessions.confirm", json!("Workload")),
        case("sessions.confirmSeconds", json!(4)),
        case("sessions.clientBinding", json!("Requester")),
        case("recycle.afterSessions", json!(3)),
        case("recycle.afterSeconds", json!(3_600)),
        case("drainSeconds", json!(1)),
        case("template", template).unsatisfiable(nowhere, "cannot be scheduled"),
    ]
}

/// The running pool that each case starts from.
fn base() -> Value {
    let mut spec = quick(1);
    spec["connectionServer"]["connectionPorts"] = json!({ "first": 20_000, "last": 20_099 });
    spec
}

/// The schemas of all fields by path, and the required ones.
fn fields() -> (BTreeMap<String, Value>, BTreeSet<String>) {
    fn walk(
        path: &str,
        schema: &Value,
        fields: &mut BTreeMap<String, Value>,
        required: &mut BTreeSet<String>,
    ) {
        let schema = match schema.get("items") {
            Some(items) => items,
            None => schema,
        };
        for name in schema["required"].as_array().into_iter().flatten() {
            required.insert(format!("{path}{}", name.as_str().unwrap()));
        }
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}{name}");
            fields.insert(path.clone(), schema.clone());
            let within = match schema.get("items") {
                Some(_) => format!("{path}[]."),
                None => format!("{path}."),
            };
            walk(&within, schema, fields, required);
        }
    }
    let crd = serde_json::to_value(portpool::manifest::crd()).unwrap();
    let schema = "/spec/versions/0/schema/openAPIV3Schema/properties/spec";
    let (mut fields, mut required) = (BTreeMap::new(), BTreeSet::new());
    walk("", crd.pointer(schema).unwrap(), &mut fields, &mut required);
    (fields, required)
}

/// The JSON pointer of `path` in a spec whose lists have one entry.
fn pointer(path: &str) -> String {
    format!("/{}", path.replace("[]", ".0").replace('.', "/"))
}

/// The API server's name for the field at `path`.
fn called(path: &str) -> String {
    format!("spec.{}", path.replace("[]", "[0]"))
}

fn set(spec: &mut Value, path: &str, value: Value) {
    let pointer = pointer(path);
    let mut at = spec;
    for step in pointer.split('/').skip(1) {
        at = match step.parse::<usize>() {
            Ok(index) => &mut at[index],
            Err(_) => &mut at[step],
        };
    }
    *at = value;
}

fn remove(spec: &mut Value, path: &str) {
    let pointer = pointer(path);
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    if let Some(Value::Object(parent)) = spec.pointer_mut(parent) {
        parent.remove(field);
    }
}

/// Values that `schema` does not allow, at least one of each kind of bound.
fn invalid(schema: &Value) -> Vec<Value> {
    let number = |bound: &str| schema[bound].as_f64().map(|bound| bound as i64);
    let mut values = match schema["type"].as_str().unwrap() {
        "integer" => vec![
            json!(number("minimum").expect("has a lower bound") - 1),
            json!(number("maximum").expect("has an upper bound") + 1),
            json!("many"),
            json!(1.5),
        ],
        "string" => vec![json!("Not one of these"), json!(7)],
        "boolean" => vec![json!("perhaps")],
        "array" => {
            let most = usize::try_from(number("maxItems").expect("has a bound")).unwrap();
            let entry = |index: usize| json!({ "name": format!("p{index}"), "port": 1000 + index });
            let many: Vec<Value> = (0..=most).map(entry).collect();
            vec![json!([]), many.into(), json!("none")]
        }
        "object" => vec![json!("none"), json!([])],
        other => panic!("what is a wrong {other}?"),
    };
    if let Some(most) = number("maxLength") {
        values.push("x".repeat(usize::try_from(most).unwrap() + 1).into());
        values.push("".into());
    }
    values
}

/// The pool's objects, without the parts that are new each time.
async fn world(space: &Space, pool: &str) -> BTreeMap<String, Value> {
    let of_pool = ListParams::default().labels(&format!("portpool.dev/pool={pool}"));
    let mut world = BTreeMap::new();
    for (group, kind, plural) in KINDS {
        for object in space
            .objects(group, kind, plural)
            .list(&of_pool)
            .await
            .unwrap()
        {
            let mut value = serde_json::to_value(&object).unwrap();
            let name = value["metadata"]["name"].as_str().unwrap().to_owned();
            let mut kept: Map<String, Value> = ["spec", "rules", "data"]
                .into_iter()
                .map(|part| (part.to_owned(), value[part].take()))
                .collect();
            kept.insert("labels".to_owned(), value["metadata"]["labels"].take());
            let mut kept = Value::Object(kept);
            if let Some(text) = kept["data"]["table.json"].as_str() {
                let mut table: Value = serde_json::from_str(text).unwrap();
                table["generation"].take();
                for row in table["rows"].as_array_mut().unwrap() {
                    row["serverUid"].take();
                }
                kept["data"] = table;
            }
            world.insert(format!("{kind} {name}"), kept);
        }
    }
    world
}

#[tokio::test]
async fn every_field_refuses_or_reports_a_wrong_value_and_recovers() {
    let (fields, required) = fields();
    let cases = cases();
    let is_value = |schema: &Value| schema.get("properties").is_none();
    let values = fields.iter().filter(|(_, schema)| is_value(schema));
    let values: BTreeSet<&str> = values.map(|(path, _)| path.as_str()).collect();
    let tested: BTreeSet<&str> = cases.iter().map(|case| case.path).collect();
    assert_eq!(values, tested, "fields of the schema, and cases here");
    let space = Space::new("fields").await;
    let run = |(index, case): (usize, Case)| {
        let (space, schema) = (&space, &fields[case.path]);
        // A rule says where a port is required.
        let is_required = required.contains(case.path) || case.path == "ports[].port";
        async move {
            let pool = format!("field-{index}");
            refused(space, &pool, case.path, schema).await;
            let replaced = changed_and_back(space, &pool, &case, is_required).await;
            (case.path, replaced)
        }
    };
    let replaced = futures::stream::iter(cases.into_iter().enumerate())
        .map(run)
        .buffered(4)
        .collect::<Vec<_>>()
        .await;
    agree_with_docs(&replaced);
    // Fields that only group others.
    for (path, schema) in fields.iter().filter(|(_, schema)| !is_value(schema)) {
        refused(&space, "groups", path, schema).await;
        let mut without = base();
        remove(&mut without, path);
        space.make_ready("groups", without).await;
    }
}

/// Gives the field of a running pool invalid values and expects refusals.
async fn refused(space: &Space, pool: &str, path: &str, schema: &Value) {
    space.make_ready(pool, base()).await;
    let (before, generation) = (
        world(space, pool).await,
        space.pool(pool).await.metadata.generation,
    );
    for value in invalid(schema) {
        let mut wrong = base();
        set(&mut wrong, path, value.clone());
        let answer = space.apply(pool, wrong.clone()).await.map(|_| ());
        let error = answer.expect_err(&format!("{path}: {value}")).to_string();
        let name = path.rsplit('.').next().unwrap().trim_end_matches("[]");
        assert!(error.contains(name), "{path}: {value}: {error}");
        // Errors about bounds name the whole path, errors about types the position.
        let (pools, parameters) = (space.pools(), PatchParams::default());
        let change = Patch::Merge(json!({ "spec": wrong }));
        let patched = pools.patch(pool, &parameters, &change).await;
        let error = patched.expect_err(&format!("{path}: {value}")).to_string();
        assert!(error.contains(&called(path)), "{path}: {value}: {error}");
    }
    let after = space.pool(pool).await;
    assert_eq!(after.metadata.generation, generation, "{path}");
    assert_eq!(world(space, pool).await, before, "{path}");
}

/// What a change of a pool can replace.
#[derive(PartialEq)]
struct Replaceable {
    /// The template of the connection servers' pods.
    connection_servers: Value,
    /// The uids of the processing servers' pods, by name.
    processing_servers: BTreeMap<String, String>,
    /// The connection ports of each slot, and where they lead.
    connection_ports: BTreeMap<String, Vec<PortRange>>,
}

impl Replaceable {
    async fn of(space: &Space, pool: &str) -> Self {
        let deployments = space.objects("apps", "Deployment", "deployments");
        let name = format!("{pool}-connection-server");
        let mut deployment = deployments.get(&name).await.unwrap();
        let rows = space.table(pool).await.unwrap().rows.into_iter();
        Self {
            connection_servers: deployment.data["spec"]["template"].take(),
            processing_servers: space.servers(pool).await,
            connection_ports: rows.map(|row| (row.server, row.ranges)).collect(),
        }
    }

    /// What is no longer there `after` a change, in words.
    fn replaced(&self, after: &Self) -> Vec<&'static str> {
        let is_same_server = |(name, uid): (&String, &String)| {
            let now = after.processing_servers.get(name);
            now.is_none_or(|now| now == uid)
        };
        let are_same_ports = |(name, ranges): (&String, &Vec<PortRange>)| {
            // A session ends when one of these changes.
            let ports = |ranges: &[PortRange]| -> BTreeSet<_> {
                let ports = ranges.iter().flat_map(|range| {
                    let kind = (range.name.clone(), range.protocol.name());
                    let sends_address = range.proxy_protocol == ProxyProtocol::V2;
                    let ports = range.connection_ports();
                    ports.map(move |port| (port, range.target(port), kind.clone(), sends_address))
                });
                ports.collect()
            };
            let now = after.connection_ports.get(name);
            now.is_none_or(|now| ports(now).is_superset(&ports(ranges)))
        };
        let mut replaced = Vec::new();
        if self.connection_servers != after.connection_servers {
            replaced.push("connection servers");
        }
        if !self.processing_servers.iter().all(is_same_server) {
            replaced.push("processing servers");
        }
        if !self.connection_ports.iter().all(are_same_ports) {
            replaced.push("connection ports");
        }
        replaced
    }
}

/// Compares the table in the documentation with what was seen to be replaced.
fn agree_with_docs(replaced: &[(&str, Option<Vec<&str>>)]) {
    const PATH: &str = "docs/operations.md";
    let mut table = String::from("| field | what a change replaces |\n|---|---|\n");
    for (path, replaced) in replaced {
        let words = match replaced.as_deref() {
            None => "cannot be changed".to_owned(),
            Some([]) => "nothing".to_owned(),
            Some(replaced) => replaced.join(", "),
        };
        writeln!(table, "| `{path}` | {words} |").unwrap();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PATH);
    let page = std::fs::read_to_string(path).unwrap();
    let (before, rest) = page.split_once("<!-- replaces -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- /replaces -->\n").unwrap();
    let page = format!("{before}<!-- replaces -->\n{table}<!-- /replaces -->\n{after}");
    agree(PATH, &page);
}

/// Changes the pool's field, removes it, makes it unsatisfiable and puts it back.
/// Returns what the change has replaced; `None` where it was refused.
async fn changed_and_back(
    space: &Space,
    pool: &str,
    case: &Case,
    is_required: bool,
) -> Option<Vec<&'static str>> {
    let path = case.path;
    let back = async || {
        space.make_ready(pool, base()).await;
        world(space, pool).await
    };
    let before = back().await;
    let (mut changed, mut unchanged) = (base(), before.clone());
    if let Some((other, value)) = &case.needs {
        set(&mut changed, other, value.clone());
        space.make_ready(pool, changed.clone()).await;
        unchanged = world(space, pool).await;
    }
    set(&mut changed, path, case.changed.clone());
    let former = Replaceable::of(space, pool).await;
    let mut replaced = None;
    let answer = space.apply(pool, changed).await;
    if path == "connectionServer.exposure" {
        let error = answer.unwrap_err().to_string();
        assert!(error.contains("exposure cannot change"), "{error}");
    } else {
        answer.unwrap();
        space.ready(pool).await;
        replaced = Some(former.replaced(&Replaceable::of(space, pool).await));
        // The end of the range has an effect only when the range is full, and node
        // ports only with a load balancer.
        let is_idle = path.ends_with("connectionPorts.last") || path.ends_with("NodePorts");
        if !is_idle {
            assert_ne!(world(space, pool).await, unchanged, "{path} has no effect");
        }
    }
    let mut without = base();
    remove(&mut without, path);
    let answer = space.apply(pool, without).await;
    match (is_required, path) {
        (true, _) => {
            let error = answer.unwrap_err().to_string();
            assert!(
                error.contains("equired") || error.contains("key"),
                "{path}: {error}"
            );
        }
        // The default is 600. Nothing reports idle servers here, so that a drain
        // would take all of it.
        (false, "drainSeconds") => {
            answer.unwrap();
            until("the default is in force", async || {
                space.table(pool).await.unwrap().drain_seconds == Some(600)
            })
            .await;
        }
        (false, "replicas" | "ports[].count") => {
            answer.unwrap();
            space.ready(pool).await;
        }
        (false, _) => {
            answer.unwrap();
            space.ready(pool).await;
            assert_eq!(world(space, pool).await, before, "{path}: removed");
        }
    }
    let after = back().await;
    // A slot keeps the ports it has while the range has them.
    if path != "connectionServer.connectionPorts.first" {
        assert_eq!(after, before, "{path}: put back");
    }
    if let Some((value, words)) = &case.unsatisfiable {
        let mut wrong = base();
        set(&mut wrong, path, value.clone());
        match space.apply(pool, wrong).await {
            Err(error) => assert!(error.to_string().contains(words), "{path}: {error}"),
            Ok(_) => {
                space.degraded(pool, words).await;
                assert!(!space.is_ready(pool).await);
            }
        }
        assert_eq!(back().await, after, "{path}: corrected");
    }
    replaced
}

#[tokio::test]
async fn wrong_names_unknown_fields_and_combinations_are_refused() {
    let space = Space::new("admission").await;
    let mut unknown = quick(1);
    unknown["replica"] = 3.into();
    let error = space.apply("games", unknown).await.unwrap_err().to_string();
    assert!(error.contains("replica"), "{error}");
    for name in ["9-games", "a.b", &"x".repeat(53)] {
        let error = space.apply(name, quick(1)).await.unwrap_err().to_string();
        assert!(error.contains("begin with a letter"), "{error}");
    }
    // More than one field together.
    let cases: [(&str, Value, &str); 5] = [
        (
            "ports[].port",
            json!(65_533),
            "port + count - 1 must not exceed 65535",
        ),
        (
            "connectionServer",
            json!({ "connectionPorts": { "first": 9, "last": 8 } }),
            "first must not be above last",
        ),
        (
            "connectionServer",
            json!({ "loadSharingPort": 7701 }),
            "admin pages",
        ),
        (
            "connectionServer",
            json!({ "connectionPorts": { "first": 7702, "last": 29_999 }, "loadSharingPort": 7701 }),
            "admin pages",
        ),
        (
            "ports",
            json!([{ "name": "a", "port": 1 }, { "name": "a", "port": 2 }]),
            "spec.ports",
        ),
    ];
    for (path, value, words) in cases {
        let mut wrong = quick(1);
        set(&mut wrong, path, value);
        let error = space.apply("games", wrong).await.unwrap_err().to_string();
        assert!(error.contains(words), "{path}: {error}");
    }
    let entry = |index: u16| json!({ "name": format!("p{index}"), "port": 1000 + index });
    let mut large = quick(751);
    large["ports"] = (0..8).map(entry).collect();
    let error = space.apply("games", large).await.unwrap_err().to_string();
    assert!(error.contains("fits into a ConfigMap"), "{error}");
    // The scale subresource obeys the rules too.
    space.apply("games", base()).await.unwrap();
    let error = space.scale("games", 26).await.unwrap_err().to_string();
    assert!(error.contains("must not exceed the number of"), "{error}");
}
