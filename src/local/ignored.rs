//! Fields of a manifest that `portpool local` does not carry out, so that the user
//! is not surprised: a cluster honours them.
//!
//! What is carried out is listed here, so that a field that Kubernetes gets
//! later is reported.

use serde_json::{Map, Value};

/// Fields below `spec` that stand for the cluster only.
const SPEC: [&str; 1] = ["drainSeconds"];

/// Fields of `connectionServer` that are carried out.
const CONNECTION_SERVER: [&str; 4] = [
    "replicas",
    "loadSharingPort",
    "connectionPorts",
    "advertisedAddress",
];

/// Fields of the pod's spec that are carried out, or reported otherwise.
const POD: [&str; 3] = [
    "containers",
    "initContainers",
    "terminationGracePeriodSeconds",
];

/// Fields of a container that are carried out. `ports` informs readers only.
const CONTAINER: [&str; 7] = [
    "name",
    "command",
    "args",
    "env",
    "envFrom",
    "workingDir",
    "ports",
];

/// The paths of the fields in `manifest` that are ignored, in its order.
pub(super) fn ignored(manifest: &Value) -> Vec<String> {
    let mut paths = Vec::new();
    let fields = |pointer: &str| manifest.pointer(pointer).and_then(Value::as_object);
    let mut add =
        |fields: Option<&Map<String, Value>>, path: &str, ignores: &dyn Fn(&str) -> bool| {
            let given = fields
                .into_iter()
                .flatten()
                .filter(|(_, value)| !value.is_null());
            let names = given.map(|(name, _)| name.as_str());
            paths.extend(
                names
                    .filter(|name| ignores(name))
                    .map(|name| format!("{path}.{name}")),
            );
        };
    add(fields("/spec"), "spec", &|name| SPEC.contains(&name));
    let path = "spec.connectionServer";
    add(fields("/spec/connectionServer"), path, &|name| {
        !CONNECTION_SERVER.contains(&name)
    });
    let pod = fields("/spec/template/spec");
    let path = "spec.template.spec";
    let restarts = pod.and_then(|pod| pod.get("restartPolicy")?.as_str()) == Some("Always");
    add(pod, path, &|name| {
        let is_carried_out = POD.contains(&name) || (name == "restartPolicy" && restarts);
        !is_carried_out
    });
    let containers = pod.and_then(|pod| pod.get("containers")?.as_array());
    for (index, container) in containers.into_iter().flatten().enumerate() {
        let path = format!("{path}.containers[{index}]");
        add(container.as_object(), &path, &|name| {
            !CONTAINER.contains(&name)
        });
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_field_that_only_a_cluster_honours_is_named() {
        let manifest = json!({
            "spec": {
                "replicas": 1,
                "drainSeconds": 5,
                "connectionServer": {"exposure": "NodePort", "replicas": 1},
                "template": {
                    "metadata": {"labels": {"a": "b"}},
                    "spec": {
                        "containers": [
                            {"name": "a", "command": ["x"], "image": "i", "env": [], "ports": []},
                            {"name": "b", "securityContext": {"runAsUser": 7}, "livenessProbe": {}, "resources": null},
                        ],
                        "terminationGracePeriodSeconds": 5,
                        "volumes": [],
                        "restartPolicy": "Always",
                    },
                },
            },
        });
        assert_eq!(
            ignored(&manifest),
            [
                "spec.drainSeconds",
                "spec.connectionServer.exposure",
                "spec.template.spec.volumes",
                "spec.template.spec.containers[0].image",
                "spec.template.spec.containers[1].livenessProbe",
                "spec.template.spec.containers[1].securityContext",
            ]
        );
        let manifest = json!({"spec": {"template": {"spec": {"restartPolicy": "Never"}}}});
        assert_eq!(ignored(&manifest), ["spec.template.spec.restartPolicy"]);
    }
}
