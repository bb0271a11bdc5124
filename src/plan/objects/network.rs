//! The Services, the NetworkPolicy and the PodDisruptionBudgets of a pool.

use std::ops::RangeInclusive;

use serde_json::{Value, json};

use super::{CONNECTION_SERVER, Owner, PROCESSING_SERVER, metadata, selector};
use crate::pool::Exposure;
use crate::table::Table;

/// Most connection ports in one NodePort Service: kube-proxy and the API server
/// handle objects of this size without effort.
const PORTS_PER_SERVICE: usize = 500;

/// The range that a cluster takes node ports from by default.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;

/// The Service of the load-sharing port, and those of the connection ports
/// where the exposure needs them.
pub(super) fn services(owner: Owner<'_>, table: &Table) -> Vec<Value> {
    let pool = owner.pool;
    let first = |kind: &str, ports: &[Value]| service(owner, &pool.name, kind, ports);
    match pool.exposure {
        // Clients reach the ports of a host without a Service.
        Exposure::ClusterIP | Exposure::HostNetwork => {
            vec![first("ClusterIP", &[load_sharing_port(owner, false)])]
        }
        Exposure::LoadBalancer => {
            let mut ports = vec![load_sharing_port(owner, false)];
            ports.extend(connection_ports(table, false));
            let mut service = first("LoadBalancer", &ports);
            service["spec"]["allocateLoadBalancerNodePorts"] =
                pool.allocate_load_balancer_node_ports.into();
            vec![service]
        }
        Exposure::NodePort => {
            let ports = connection_ports(table, true);
            let chunks = ports.chunks(PORTS_PER_SERVICE).enumerate();
            let mut services: Vec<Value> = chunks
                .map(|(index, ports)| {
                    let name = format!("{}-ports-{index}", pool.name);
                    service(owner, &name, "NodePort", ports)
                })
                .collect();
            // It comes last because the cluster chooses its node port, which must
            // not be one that the others ask for.
            services.push(first("NodePort", &[load_sharing_port(owner, true)]));
            services
        }
    }
}

fn service(owner: Owner<'_>, name: &str, kind: &str, ports: &[Value]) -> Value {
    let mut service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(owner, name, CONNECTION_SERVER),
        "spec": {
            "type": kind,
            "selector": selector(&owner.pool.name, CONNECTION_SERVER),
            "ports": ports,
        },
    });
    // Else every node answers, and clients come with its address.
    if kind != "ClusterIP" && owner.pool.needs_client_addresses().is_some() {
        service["spec"]["externalTrafficPolicy"] = "Local".into();
    }
    service
}

fn load_sharing_port(owner: Owner<'_>, on_nodes: bool) -> Value {
    let port = owner.pool.load_sharing_port;
    service_port(
        "load-sharing",
        port,
        "TCP",
        on_nodes && NODE_PORTS.contains(&port),
    )
}

fn connection_ports(table: &Table, on_nodes: bool) -> Vec<Value> {
    let mut ports = Vec::new();
    for range in table.rows.iter().flat_map(|row| &row.ranges) {
        for port in range.connection_ports() {
            let number = port.get();
            if range.protocol.has_tcp() {
                ports.push(service_port(
                    &format!("tcp-{number}"),
                    number,
                    "TCP",
                    on_nodes,
                ));
            }
            if range.protocol.has_udp() {
                ports.push(service_port(
                    &format!("udp-{number}"),
                    number,
                    "UDP",
                    on_nodes,
                ));
            }
        }
    }
    ports
}

fn service_port(name: &str, port: u16, protocol: &str, is_node_port: bool) -> Value {
    let mut value = json!({ "name": name, "port": port, "targetPort": port, "protocol": protocol });
    if is_node_port {
        value["nodePort"] = port.into();
    }
    value
}

/// Lets only the pool's connection servers reach its processing servers. A policy
/// cannot select pods on the network of a host, so there is none for HostNetwork.
pub(super) fn policies(owner: Owner<'_>) -> Vec<Value> {
    if owner.pool.exposure == Exposure::HostNetwork {
        return Vec::new();
    }
    let name = format!("{}-processing-servers", owner.pool.name);
    let from = selector(&owner.pool.name, CONNECTION_SERVER);
    vec![json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(owner, &name, PROCESSING_SERVER),
        "spec": {
            "podSelector": { "matchLabels": selector(&owner.pool.name, PROCESSING_SERVER) },
            "policyTypes": ["Ingress"],
            "ingress": [{ "from": [{ "podSelector": { "matchLabels": from } }] }],
        },
    })]
}

/// Allows the eviction of one server of each role at a time. Those that are not ready
/// do not hold it up, but for processing servers that may have sessions.
///
/// Source: Kubernetes documentation, Specifying a Disruption Budget, "Unhealthy Pod
/// Eviction Policy".
pub(super) fn budgets(owner: Owner<'_>, unready_may_go: bool) -> Vec<Value> {
    let budget = |(component, unready_may_go): (&str, bool)| {
        let policy = if unready_may_go {
            "AlwaysAllow"
        } else {
            "IfHealthyBudget"
        };
        let name = format!("{}-{component}s", owner.pool.name);
        json!({
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata(owner, &name, component),
            "spec": {
                "maxUnavailable": 1,
                "unhealthyPodEvictionPolicy": policy,
                "selector": { "matchLabels": selector(&owner.pool.name, component) },
            },
        })
    };
    // A connection server that is not ready has never been, and so has no clients.
    let roles = [
        (PROCESSING_SERVER, unready_may_go),
        (CONNECTION_SERVER, true),
    ];
    roles.map(budget).to_vec()
}
