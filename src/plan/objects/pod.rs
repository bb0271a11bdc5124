//! The pod of a processing server: the template with the agent as a native sidecar,
//! and what the workload learns about its place (`environment`).

use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Map, Value, json};

use super::{
    HASH_ANNOTATION, MANAGED_BY, MANAGER, Owner, PROCESSING_SERVER, RANGES_ANNOTATION, SLOT_LABEL,
    Settings, TABLE_FOLDER, field_env, hash, owner_reference, probe, pull_secrets, restricted,
    selector, table_name,
};
use crate::plan::{environment, server_name};
use crate::pool::{AGENT_ADMIN_PORT, AGENT_API_PORT, AGENT_PORT};
use crate::table::{PortRange, Row, Slot, TABLE_KEY};

/// Where the agent's local API is: only the containers of the pod reach it.
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Name of the agent's container.
pub const AGENT: &str = "portpool-agent";

/// Most bytes of [`RANGES_ANNOTATION`]: a quarter of what all annotations of an
/// object may have, 256 KiB. A slot whose ports are in hundreds of pieces goes
/// without it.
const MAX_RANGES_BYTES: usize = 64 * 1024;

/// The pods of the processing servers in `rows`, lazily.
pub fn pods<'a>(
    owner: Owner<'a>,
    settings: &'a Settings,
    rows: impl Iterator<Item = &'a Row>,
) -> impl Iterator<Item = Value> {
    let hash = template_hash(owner, settings);
    rows.map(move |row| {
        let mut pod = with_hash(for_slot(owner, settings, row.slot), &hash);
        if let Some(ranges) = encode_ranges(&row.ranges) {
            pod["metadata"]["annotations"][RANGES_ANNOTATION] = ranges.into();
        }
        let address = owner.pool.advertised_address.as_deref();
        inform(
            &mut pod["spec"],
            &environment(owner.pool, row, address, LOOPBACK),
        );
        pod
    })
}

/// The pod of the processing server in `slot`, whatever its ports are.
#[must_use]
pub fn pod(owner: Owner<'_>, settings: &Settings, slot: Slot) -> Value {
    let hash = template_hash(owner, settings);
    with_hash(for_slot(owner, settings, slot), &hash)
}

fn with_hash(mut pod: Value, hash: &str) -> Value {
    pod["metadata"]["annotations"][HASH_ANNOTATION] = hash.into();
    pod
}

/// `ranges` as the value of [`RANGES_ANNOTATION`]; `None` where it would be too
/// long.
fn encode_ranges(ranges: &[PortRange]) -> Option<String> {
    let text = serde_json::to_string(ranges).expect("ranges are plain data");
    (text.len() <= MAX_RANGES_BYTES).then_some(text)
}

/// The ranges in `annotation`, the value of [`RANGES_ANNOTATION`]; none where it
/// is absent or unreadable.
#[must_use]
pub fn annotated_ranges(annotation: Option<&String>) -> Vec<PortRange> {
    let decoded = annotation.and_then(|text| serde_json::from_str(text).ok());
    decoded.unwrap_or_default()
}

/// The hash of what all pods of the pool are created from.
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
    // The agent is the first, so that it runs before any other container.
    list(&mut spec, "initContainers").insert(0, agent(settings, slot));
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

/// The container of the agent: it has no token and no privilege, and restarts alone.
fn agent(settings: &Settings, slot: Slot) -> Value {
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
            format!("--api={LOOPBACK}:{AGENT_API_PORT}"),
            "--state-file=/run/portpool/agent",
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

/// Gives `variables` to all containers of the pod `spec` but the agent. They come
/// first, so that values of the template may refer to them; where the template has
/// a variable of the same name, that one counts.
fn inform(spec: &mut Value, variables: &[(String, String)]) {
    for field in ["initContainers", "containers"] {
        let containers = spec[field].as_array_mut().into_iter().flatten();
        let containers = containers.filter_map(Value::as_object_mut);
        for container in containers.filter(|container| container["name"] != AGENT) {
            let env = list(container, "env");
            let is_new = |(name, _): &&(String, String)| {
                env.iter().all(|variable| variable["name"] != name.as_str())
            };
            let added = variables.iter().filter(is_new);
            let added: Vec<Value> = added
                .map(|(name, value)| json!({ "name": name, "value": value }))
                .collect();
            env.splice(0..0, added);
        }
    }
}

fn default(spec: &mut Map<String, Value>, field: &str, value: Value) {
    spec.entry(field).or_insert(value);
}

/// The list `field` of `spec`. A value that is no list is put into one, so that the
/// API server refuses it.
fn list<'a>(spec: &'a mut Map<String, Value>, field: &str) -> &'a mut Vec<Value> {
    let value = spec.entry(field).or_insert_with(|| json!([]));
    if !value.is_array() {
        *value = json!([value.take()]);
    }
    value.as_array_mut().expect("it was made an array")
}
