use super::*;
use crate::plan::{Observed, plan};
use crate::pool::{Mapping, ProcessingPool};
use crate::table::Slot;
use jiff::Timestamp;

fn pool(change: impl FnOnce(&mut Value)) -> ValidPool {
    let mut value = json!({
        "apiVersion": "portpool.dev/v1alpha1",
        "kind": "ProcessingPool",
        "metadata": { "name": "games" },
        "spec": {
            "ports": [{ "name": "game", "port": 7000, "count": 2, "protocol": "TCPUDP" }],
            "template": {
                "metadata": { "labels": { "team": "red" } },
                "spec": { "containers": [{ "name": "game", "image": "game:1", "novelField": 1 }] },
            },
        },
    });
    change(&mut value);
    let pool: ProcessingPool = serde_json::from_value(value).unwrap();
    ValidPool::new(&pool).unwrap()
}

fn settings() -> Settings {
    Settings {
        image: "portpool:1".to_owned(),
        image_pull_policy: "IfNotPresent".to_owned(),
        image_pull_secrets: Vec::new(),
    }
}

fn owner(pool: &ValidPool) -> Owner<'_> {
    Owner {
        pool,
        namespace: "arena",
        uid: "uid",
    }
}

fn table(pool: &ValidPool) -> Table {
    plan(pool, &Observed::nothing("uid"), Timestamp::UNIX_EPOCH).table
}

fn find<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects
        .iter()
        .filter(|object| object["kind"] == kind)
        .collect()
}

#[test]
fn the_template_stays_as_written_beside_the_agent() {
    let pool = pool(|_| {});
    let pod = pod(owner(&pool), &settings(), Slot(3));
    assert_eq!(pod["metadata"]["name"], "games-3");
    assert_eq!(pod["metadata"]["labels"]["team"], "red");
    assert_eq!(pod["metadata"]["labels"][SLOT_LABEL], "3");
    assert_eq!(pod["spec"]["containers"][0]["novelField"], 1);
    assert_eq!(pod["spec"]["initContainers"][0]["restartPolicy"], "Always");
    assert_eq!(pod["spec"]["automountServiceAccountToken"], false);
}

#[test]
fn containers_are_told_their_place_and_keep_their_own_variables() {
    let pool = pool(|pool| {
        pool["spec"]["connectionServer"] = json!({ "advertisedAddress": "games.example.org" });
        pool["spec"]["ports"] = json!([
            { "name": "game", "port": 7000, "count": 2 },
            { "name": "rtp-data", "mapping": "Identity", "count": 3, "protocol": "UDP" },
        ]);
        let own = json!({ "name": "PORTPOOL_SLOT", "value": "mine" });
        pool["spec"]["template"]["spec"]["containers"][0]["env"] = json!([own]);
        pool["spec"]["template"]["spec"]["initContainers"] = json!([{ "name": "first" }]);
    });
    let table = table(&pool);
    let pod = pods(owner(&pool), &settings(), table.rows.iter()).nth(1);
    let spec = &pod.unwrap()["spec"];
    let variables = |container: &Value| -> Vec<String> {
        let env = container["env"].as_array().unwrap().iter();
        let text = |field: &Value| field.as_str().unwrap().to_owned();
        env.map(|env| format!("{}={}", text(&env["name"]), text(&env["value"])))
            .collect()
    };
    let told = [
        "PORTPOOL_POOL=games",
        "PORTPOOL_SERVER=games-1",
        "PORTPOOL_API=http://127.0.0.1:7072",
        "PORTPOOL_ADDRESS=games.example.org",
        "PORTPOOL_GAME_PORT=20006",
        "PORTPOOL_GAME_COUNT=2",
        "PORTPOOL_GAME_LAST=20007",
        "PORTPOOL_RTP_DATA_PORT=20008",
        "PORTPOOL_RTP_DATA_COUNT=3",
        "PORTPOOL_RTP_DATA_LAST=20010",
    ];
    let mut expected: Vec<&str> = told.to_vec();
    expected.push("PORTPOOL_SLOT=mine");
    assert_eq!(variables(&spec["containers"][0]), expected);
    expected.retain(|variable| *variable != "PORTPOOL_SLOT=mine");
    expected.insert(2, "PORTPOOL_SLOT=1");
    assert_eq!(variables(&spec["initContainers"][1]), expected);
    let agent = &spec["initContainers"][0];
    assert_eq!(agent["env"].as_array().unwrap().len(), 1, "POD_IP only");
}

#[test]
fn a_pod_carries_the_ports_of_its_slot() {
    let pool = pool(|_| {});
    let table = table(&pool);
    let pods: Vec<Value> = pods(owner(&pool), &settings(), table.rows.iter()).collect();
    for (pod, row) in pods.iter().zip(&table.rows) {
        let annotations = &pod["metadata"]["annotations"];
        let text = annotations[RANGES_ANNOTATION].as_str().unwrap().to_owned();
        assert_eq!(annotated_ranges(Some(&text)), row.ranges);
        assert_eq!(
            annotations[HASH_ANNOTATION],
            template_hash(owner(&pool), &settings()),
            "ports do not make a template another one"
        );
    }
    assert_eq!(annotated_ranges(Some(&"[{".to_owned())), []);
    let former = r#"[{"name":"main","connectionPort":20000,"serverPort":7000,"count":2,"protocol":"TCP","shared":true}]"#;
    let ranges = annotated_ranges(Some(&former.to_owned()));
    assert_eq!(
        ranges[0].mapping,
        Mapping::Shared,
        "written before format 2"
    );
}

#[test]
fn secrets_to_pull_the_image_are_named_once_beside_the_templates_own() {
    let pool = pool(|value| {
        value["spec"]["template"]["spec"]["imagePullSecrets"] =
            json!([{ "name": "theirs" }, { "name": "both" }]);
    });
    let settings = Settings {
        image_pull_secrets: vec!["both".to_owned(), "ours".to_owned()],
        ..settings()
    };
    let named = |spec: &Value| {
        let secrets = spec["imagePullSecrets"].as_array().unwrap().iter();
        let names = secrets.map(|secret| secret["name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    let pod = pod(owner(&pool), &settings, Slot(0));
    assert_eq!(named(&pod["spec"]), ["theirs", "both", "ours"]);
    let objects = objects(owner(&pool), &table(&pool), &settings, false);
    let deployment = find(&objects, "Deployment")[0];
    assert_eq!(
        named(&deployment["spec"]["template"]["spec"]),
        ["both", "ours"]
    );
}

#[test]
fn pods_of_one_template_have_one_hash_and_others_another() {
    let (one, other) = (
        pool(|_| {}),
        pool(|value| value["spec"]["template"]["spec"]["hostname"] = "x".into()),
    );
    let hash_of = |pool: &ValidPool, slot| {
        pod(owner(pool), &settings(), slot)["metadata"]["annotations"][HASH_ANNOTATION].clone()
    };
    assert_eq!(hash_of(&one, Slot(0)), hash_of(&one, Slot(7)));
    assert_ne!(hash_of(&one, Slot(0)), hash_of(&other, Slot(0)));
    let scaled = pool(|value| value["spec"]["replicas"] = 9.into());
    assert_eq!(
        hash_of(&one, Slot(0)),
        hash_of(&scaled, Slot(0)),
        "scaling replaces no server"
    );
}

#[test]
fn every_exposure_has_its_services() {
    let kinds = |exposure: &str, first: u16| {
        let pool = pool(|value| {
            value["spec"]["connectionServer"] = json!({
                "exposure": exposure,
                "connectionPorts": { "first": first, "last": first + 999 },
            });
        });
        let objects = objects(owner(&pool), &table(&pool), &settings(), false);
        let services = find(&objects, "Service").into_iter();
        let shape = services.map(|service| {
            let ports = service["spec"]["ports"].as_array().unwrap();
            let on_nodes = ports
                .iter()
                .filter(|port| port["nodePort"] == port["port"])
                .count();
            (
                service["spec"]["type"].as_str().unwrap().to_owned(),
                ports.len(),
                on_nodes,
            )
        });
        shape.collect::<Vec<_>>()
    };
    // Two servers with two ports each, TCP and UDP: eight.
    assert_eq!(kinds("ClusterIP", 20_000), [("ClusterIP".to_owned(), 1, 0)]);
    assert_eq!(
        kinds("HostNetwork", 20_000),
        [("ClusterIP".to_owned(), 1, 0)]
    );
    assert_eq!(
        kinds("LoadBalancer", 20_000),
        [("LoadBalancer".to_owned(), 9, 0)]
    );
    assert_eq!(
        kinds("NodePort", 31_000),
        [("NodePort".to_owned(), 8, 8), ("NodePort".to_owned(), 1, 0)]
    );
}

#[test]
fn the_connection_server_may_read_its_table_and_nothing_else() {
    let pool = pool(|_| {});
    let objects = objects(owner(&pool), &table(&pool), &settings(), false);
    let role = find(&objects, "Role")[0];
    assert_eq!(
        role["rules"],
        json!([{
            "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["games-port-table"], "verbs": ["get", "list", "watch"],
        }])
    );
}

#[test]
fn an_observed_object_covers_the_desired_one_until_it_differs() {
    let desired = json!({ "a": { "b": [1, { "c": "x" }] }, "e": {} });
    let cases = [
        (
            json!({ "a": { "b": [1, { "c": "x", "default": true }] }, "more": 1 }),
            true,
        ),
        (json!({ "a": { "b": [1, { "c": "y" }] } }), false),
        (json!({ "a": { "b": [1] } }), false),
        (json!({ "a": { "b": [1, { "c": "x" }, 2] } }), false),
        (json!({}), false),
    ];
    for (observed, is_covered) in cases {
        assert_eq!(covers(&observed, &desired), is_covered, "{observed}");
    }
}

#[test]
fn a_load_balancer_takes_node_ports_only_when_it_is_asked_to() {
    for wanted in [None, Some(false), Some(true)] {
        let pool = pool(|value| {
            let server = &mut value["spec"]["connectionServer"];
            *server = json!({ "exposure": "LoadBalancer" });
            if let Some(wanted) = wanted {
                server["allocateLoadBalancerNodePorts"] = wanted.into();
            }
        });
        let objects = objects(owner(&pool), &table(&pool), &settings(), false);
        let service = &find(&objects, "Service")[0];
        let expected = wanted.unwrap_or(false);
        assert_eq!(service["spec"]["allocateLoadBalancerNodePorts"], expected);
    }
}
