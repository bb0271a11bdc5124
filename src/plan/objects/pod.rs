//! A processing server's pod: the template, with the agent as a native sidecar.

use serde_json::{Map, Value, json};

use super::{
    HASH_ANNOTATION, MANAGED_BY, MANAGER, Owner, PROCESSING_SERVER, SLOT_LABEL, Settings,
    TABLE_FOLDER, field_env, hash, owner_reference, probe, pull_secrets, restricted, selector,
    table_name,
};
use crate::plan::server_name;
use crate::pool::{AGENT_ADMIN_PORT, AGENT_PORT};
use crate::table::{Slot, TABLE_KEY};

/// Name of the agent's container.
const AGENT: &str = "portpool-agent";

/// The pods of the processing servers in `slots`, each made when it is asked
/// for.
pub fn pods(
    owner: Owner<'_>,
    settings: &Settings,
    slots: impl Iterator<Item = Slot>,
) -> impl Iterator<Item = Value> {
    let hash = template_hash(owner, settings);
    slots.map(move |slot| {
        let mut pod = for_slot(owner, settings, slot);
        pod["metadata"]["annotations"][HASH_ANNOTATION] = hash.as_str().into();
        pod
    })
}

/// The pod of the processing server in `slot`.
#[must_use]
pub fn pod(owner: Owner<'_>, settings: &Settings, slot: Slot) -> Value {
    pods(owner, settings, std::iter::once(slot))
        .next()
        .expect("one slot makes one pod")
}

/// The hash of what all pods of the pool are made from.
#[must_use]
pub fn template_hash(owner: Owner<'_>, settings: &Settings) -> String {
    hash(&for_slot(owner, settings, Slot(0)))
}

fn for_slot(owner: Owner<'_>, settings: &Settings, slot: Slot) -> Value {
    let template = &owner.pool.raw_template.0;
    let from_template = |path: &str| {
        let found = template.pointer(path).and_then(Value::as_object);
        found.cloned().unwrap_or_default()
    };
    let mut labels = from_template("/metadata/labels");
    if let Value::Object(own) = selector(&owner.pool.name, PROCESSING_SERVER) {
        labels.extend(own);
    }
    labels.insert(MANAGED_BY.to_owned(), MANAGER.into());
    labels.insert(SLOT_LABEL.to_owned(), slot.to_string().into());
    let mut spec = from_template("/spec");
    default(&mut spec, "automountServiceAccountToken", json!(false));
    default(&mut spec, "enableServiceLinks", json!(false));
    let volumes = [
        json!({ "name": "portpool-table", "configMap": { "name": table_name(&owner.pool.name) } }),
        json!({ "name": "portpool-state", "emptyDir": {} }),
    ];
    list(&mut spec, "volumes").extend(volumes);
    if !settings.image_pull_secrets.is_empty() {
        let secrets = list(&mut spec, "imagePullSecrets");
        let more: Vec<Value> = pull_secrets(settings)
            .filter(|secret| !secrets.contains(secret))
            .collect();
        secrets.extend(more);
    }
    // First, so that it is there before any other container.
    list(&mut spec, "initContainers").insert(0, agent(owner, settings, slot));
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": server_name(&owner.pool.name, slot),
            "namespace": owner.namespace,
            "labels": labels,
            "annotations": from_template("/metadata/annotations"),
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": spec,
    })
}

/// The agent: no token, no privilege, and a restart of its own.
fn agent(owner: Owner<'_>, settings: &Settings, slot: Slot) -> Value {
    let drain = owner.pool.drain_limit.as_secs();
    json!({
        "name": AGENT,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "restartPolicy": "Always",
        "args": [
            "processing-server",
            format!("--table={TABLE_FOLDER}/{TABLE_KEY}"),
            format!("--slot={slot}"),
            format!("--admin=[::]:{AGENT_ADMIN_PORT}"),
            "--state-file=/run/portpool/agent",
            format!("--drain-seconds={drain}"),
        ],
        "env": [field_env("POD_IP", "status.podIP")],
        "ports": [
            { "name": "selection", "containerPort": AGENT_PORT, "protocol": "TCP" },
            { "name": "agent-admin", "containerPort": AGENT_ADMIN_PORT, "protocol": "TCP" },
        ],
        "livenessProbe": probe("/livez", AGENT_ADMIN_PORT, 10),
        "readinessProbe": probe("/readyz", AGENT_ADMIN_PORT, 2),
        "resources": {
            "requests": { "cpu": "10m", "memory": "16Mi" },
            "limits": { "memory": "128Mi" },
        },
        "securityContext": restricted(),
        "volumeMounts": [
            { "name": "portpool-table", "mountPath": TABLE_FOLDER, "readOnly": true },
            { "name": "portpool-state", "mountPath": "/run/portpool" },
        ],
    })
}

fn default(spec: &mut Map<String, Value>, field: &str, value: Value) {
    spec.entry(field).or_insert(value);
}

/// The list `field` of `spec`. Something else in its place is left to the API
/// server to refuse.
fn list<'a>(spec: &'a mut Map<String, Value>, field: &str) -> &'a mut Vec<Value> {
    let value = spec.entry(field).or_insert_with(|| json!([]));
    if !value.is_array() {
        *value = json!([value.take()]);
    }
    value.as_array_mut().expect("it was made an array")
}
