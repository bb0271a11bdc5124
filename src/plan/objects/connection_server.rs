//! The Deployment of the connection servers, and their right to read the table.

use serde_json::{Value, json};

use super::{
    CONNECTION_SERVER, Owner, Settings, TABLE_FOLDER, connection_server_name, field_env, labels,
    metadata, probe, pull_secrets, restricted, selector, table_name,
};
use crate::pool::{CONNECTION_ADMIN_PORT, Exposure, WEEK_SECONDS};
use crate::table::TABLE_KEY;

/// The longest drain that a pool may have. The process itself ends after the drain of
/// the table, which may change while it runs; a grace period of a pod may not. A grace
/// period that followed the pool would replace every connection server, and cut its
/// sessions, to let other sessions go on for longer.
const LONGEST_DRAIN_SECONDS: u32 = WEEK_SECONDS.unsigned_abs();

/// Time beyond the drain in which requests are answered and the process exits.
const STOP_SECONDS: u32 = 5;

/// How long a connection server that must stop still serves as before: nodes and
/// load balancers learn a little later that they must send nothing more to it.
const FAREWELL_SECONDS: u32 = 5;

/// The ServiceAccount, the Role and the RoleBinding.
pub(super) fn access(owner: Owner<'_>) -> Vec<Value> {
    let name = connection_server_name(&owner.pool.name);
    let metadata = metadata(owner, &name, CONNECTION_SERVER);
    vec![
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": metadata,
            "automountServiceAccountToken": false,
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": metadata,
            "rules": [{
                "apiGroups": [""],
                "resources": ["configmaps"],
                "resourceNames": [table_name(&owner.pool.name)],
                "verbs": ["get", "list", "watch"],
            }],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name },
            "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": owner.namespace }],
        }),
    ]
}

/// The Deployment.
pub(super) fn deployment(owner: Owner<'_>, settings: &Settings) -> Value {
    let pool = owner.pool;
    let name = connection_server_name(&pool.name);
    let on_host = pool.exposure == Exposure::HostNetwork;
    // Two connection servers on the network of one host cannot have the same ports.
    let (most_more, most_less) = if on_host { (0, 1) } else { (1, 0) };
    let selector = selector(&pool.name, CONNECTION_SERVER);
    let dns_policy = if on_host {
        "ClusterFirstWithHostNet"
    } else {
        "ClusterFirst"
    };
    let mut spec = json!({
        "serviceAccountName": name,
        "automountServiceAccountToken": true,
        "enableServiceLinks": false,
        "dnsPolicy": dns_policy,
        "terminationGracePeriodSeconds": FAREWELL_SECONDS + LONGEST_DRAIN_SECONDS + STOP_SECONDS,
        "securityContext": { "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } },
        "topologySpreadConstraints": [{
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": { "matchLabels": selector },
        }],
        "containers": [container(owner, settings)],
        "volumes": [{ "name": "table", "configMap": { "name": table_name(&pool.name) } }],
    });
    if on_host {
        spec["hostNetwork"] = true.into();
    } else if pool.needs_low_ports() {
        // A safe sysctl, which Pod Security allows. It needs no capability, and holds
        // for IPv6, too.
        let every_port = json!({ "name": "net.ipv4.ip_unprivileged_port_start", "value": "0" });
        spec["securityContext"]["sysctls"] = json!([every_port]);
    }
    if !settings.image_pull_secrets.is_empty() {
        spec["imagePullSecrets"] = pull_secrets(settings).collect();
    }
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(owner, &name, CONNECTION_SERVER),
        "spec": {
            "replicas": pool.connection_servers,
            "selector": { "matchLabels": selector },
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": { "maxSurge": most_more, "maxUnavailable": most_less },
            },
            "template": {
                "metadata": { "labels": labels(&pool.name, CONNECTION_SERVER) },
                "spec": spec,
            },
        },
    })
}

fn container(owner: Owner<'_>, settings: &Settings) -> Value {
    let pool = owner.pool;
    let mut args = vec![
        "connection-server".to_owned(),
        // The mounted copy serves a start without the API server.
        format!("--table={TABLE_FOLDER}/{TABLE_KEY}"),
        format!(
            "--config-map={}/{}",
            owner.namespace,
            table_name(&pool.name)
        ),
        format!("--load-sharing-port={}", pool.load_sharing_port),
        format!("--admin=[::]:{CONNECTION_ADMIN_PORT}"),
    ];
    let mut env = Vec::new();
    // Clients outside use the address that they sent the request to. Clients inside
    // came through a Service, which does not have the connection ports.
    let address = match pool.exposure {
        Exposure::ClusterIP => Some("status.podIP"),
        Exposure::HostNetwork => Some("status.hostIP"),
        Exposure::NodePort | Exposure::LoadBalancer => None,
    };
    if let Some(field) = address {
        args.push("--advertise=$(ADVERTISE)".to_owned());
        env.push(field_env("ADVERTISE", field));
    }
    json!({
        "name": CONNECTION_SERVER,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": args,
        "env": env,
        "ports": [
            { "name": "load-sharing", "containerPort": pool.load_sharing_port, "protocol": "TCP" },
            { "name": "admin", "containerPort": CONNECTION_ADMIN_PORT, "protocol": "TCP" },
        ],
        "lifecycle": { "preStop": { "sleep": { "seconds": FAREWELL_SECONDS } } },
        "livenessProbe": probe("/livez", CONNECTION_ADMIN_PORT, 10),
        "readinessProbe": probe("/readyz", CONNECTION_ADMIN_PORT, 2),
        "resources": {
            "requests": { "cpu": "100m", "memory": "64Mi" },
            "limits": { "memory": "1Gi" },
        },
        "securityContext": restricted(),
        "volumeMounts": [{ "name": "table", "mountPath": TABLE_FOLDER, "readOnly": true }],
    })
}
