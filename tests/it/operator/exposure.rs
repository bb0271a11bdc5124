//! How clients outside reach a pool: node ports that others hold, low ports, and the
//! addresses of clients.

use kube::api::PostParams;
use serde_json::{Value, json};

use crate::common::cluster::{Space, delete, patch, quick, until};

/// A pool of `replicas` servers with four node ports each, from `first` on.
fn on_nodes(replicas: u32, first: u16) -> Value {
    let mut spec = quick(replicas);
    let ports = json!({ "first": first, "last": first + 99 });
    spec["connectionServer"] = json!({ "exposure": "NodePort", "connectionPorts": ports });
    spec
}

/// Whether each row of the pool gets sessions.
async fn offered(space: &Space, pool: &str) -> Vec<bool> {
    let rows = space.table(pool).await.unwrap().rows.into_iter();
    rows.map(|row| !row.not_ready).collect()
}

#[tokio::test]
async fn a_pool_whose_node_ports_another_pool_holds_offers_none_of_them() {
    let space = Space::new("taken-range").await;
    space.make_ready("first", on_nodes(1, 30_100)).await;
    assert_eq!(offered(&space, "first").await, [true]);
    space.apply("second", on_nodes(1, 30_100)).await.unwrap();
    let words = "node port 30100/TCP belongs to service taken-range/first-ports-0, and 3 more";
    space.degraded("second", words).await;
    until("its server runs", async || {
        space.servers("second").await.len() == 1
    })
    .await;
    assert_eq!(offered(&space, "second").await, [false]);
    assert!(!space.is_ready("second").await);
    assert_eq!(offered(&space, "first").await, [true], "and serves on");

    delete(&space.pools(), "first").await;
    // No garbage collector runs here.
    let services = space.objects("", "Service", "services");
    delete(&services, "first-ports-0").await;
    let took = space.ready("second").await;
    println!("healed after {took:?}");
    assert_eq!(offered(&space, "second").await, [true]);
}

#[tokio::test]
async fn a_pool_that_grows_into_a_taken_node_port_offers_what_it_had() {
    let space = Space::new("taken-port").await;
    space.make_ready("games", on_nodes(1, 30_300)).await;
    let services = space.objects("", "Service", "services");
    let port = json!({ "name": "web", "port": 80, "nodePort": 30_305 });
    let web = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "web" },
        "spec": { "type": "NodePort", "ports": [port] },
    });
    let web = serde_json::from_value(web).unwrap();
    services.create(&PostParams::default(), &web).await.unwrap();
    space.scale("games", 2).await.unwrap();
    let words = "node port 30305/TCP belongs to service taken-port/web:";
    space.degraded("games", words).await;
    until("its server runs", async || {
        space.servers("games").await.len() == 2
    })
    .await;
    assert_eq!(offered(&space, "games").await, [true, false]);
    delete(&services, "web").await;
    space.ready("games").await;
    assert_eq!(offered(&space, "games").await, [true, true]);
    // Someone removes the Service: it is made again, and the ports are offered again.
    delete(&services, "games-ports-0").await;
    until("the Service is back", async || {
        let service = services.get_opt("games-ports-0").await.unwrap();
        service.is_some() && offered(&space, "games").await == [true, true]
    })
    .await;
}

#[tokio::test]
async fn low_ports_need_no_privilege_but_on_the_network_of_hosts() {
    let space = Space::new("low-ports").await;
    let with = |exposure: &str| {
        let mut spec = quick(1);
        spec["connectionServer"] = json!({
            "exposure": exposure,
            "loadSharingPort": 80,
            "connectionPorts": { "first": 1, "last": 70 },
        });
        spec
    };
    space.make_ready("low", with("ClusterIP")).await;
    let deployments = space.objects("apps", "Deployment", "deployments");
    let sysctls = async |pool: &str| {
        let deployment = deployments.get(&format!("{pool}-connection-server")).await;
        let template = &deployment.unwrap().data["spec"]["template"]["spec"];
        template["securityContext"]["sysctls"].clone()
    };
    let expected = json!([{ "name": "net.ipv4.ip_unprivileged_port_start", "value": "0" }]);
    assert_eq!(sysctls("low").await, expected);
    space.make_ready("high", quick(1)).await;
    assert_eq!(sysctls("high").await, Value::Null);
    let refused = space.apply("host", with("HostNetwork")).await.unwrap_err();
    let words = "connection servers have no privilege on a node: choose higher ports";
    assert!(refused.to_string().contains(words), "{refused}");
}

#[tokio::test]
async fn services_keep_the_addresses_of_clients_where_these_matter() {
    let space = Space::new("kept-clients").await;
    let services = space.objects("", "Service", "services");
    let policy = async |name: &str| {
        let service = services.get(name).await.unwrap();
        service.data["spec"]["externalTrafficPolicy"].clone()
    };
    let mut plain = on_nodes(1, 30_500);
    space.make_ready("games", plain.clone()).await;
    assert_eq!(policy("games").await, "Cluster");
    let kept = async || space.condition("games", "ClientAddressesKept").await.0;
    assert_eq!(kept().await, "", "it does not matter");

    let mut changes = vec![plain.clone(), plain.clone(), plain.clone()];
    changes[0]["sessions"] = json!({ "clientBinding": "Requester" });
    changes[1]["ports"][0]["proxyProtocol"] = "V2".into();
    let data = json!({ "name": "data", "mapping": "Identity", "admission": "Companion" });
    changes[2]["ports"].as_array_mut().unwrap().push(data);
    for spec in changes {
        space.make_ready("games", spec).await;
        until("the addresses are kept", async || kept().await == "True").await;
        for service in ["games", "games-ports-0"] {
            assert_eq!(policy(service).await, "Local", "{service}");
        }
        space.make_ready("games", plain.clone()).await;
        until("the default is back", async || {
            policy("games").await == "Cluster"
        })
        .await;
    }

    plain["sessions"] = json!({ "clientBinding": "Requester" });
    plain["connectionServer"]["exposure"] = "LoadBalancer".into();
    plain["connectionServer"]["connectionPorts"] = json!({ "first": 20_000, "last": 20_099 });
    space.apply("balanced", plain).await.unwrap();
    until("its Service is there", async || {
        services.get_opt("balanced").await.unwrap().is_some()
    })
    .await;
    assert_eq!(policy("balanced").await, "Local");
    // Someone sets it back: the controller does not leave it so.
    let cluster = json!({ "spec": { "externalTrafficPolicy": "Cluster" } });
    patch(&services, "balanced", cluster).await;
    until("it is Local again", async || {
        policy("balanced").await == "Local"
    })
    .await;
}
