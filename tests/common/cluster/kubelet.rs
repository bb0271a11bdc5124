//! The stand-in for the kubelet and the Deployment controller.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

/// Reports the status of pods and Deployments as a node and the Deployment
/// controller would. Pods whose image begins with `bad` or `nowhere` do not run; a
/// node rejects those with `rejected`.
pub(super) async fn kubelet(client: Client, namespace: String) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let deployments: Api<Deployment> = Api::namespaced(client, &namespace);
    loop {
        let listed = pods
            .list(&ListParams::default())
            .await
            .map(|list| list.items)
            .unwrap_or_default();
        for pod in listed {
            let phase = pod.status.as_ref().and_then(|status| status.phase.clone());
            let keeps = pod.annotations().contains_key("test/hands-off");
            if !keeps && phase.as_deref() == Some("Pending") {
                let _ = pods
                    .patch_status(
                        &pod.name_any(),
                        &PatchParams::default(),
                        &Patch::Merge(pod_status(&pod)),
                    )
                    .await;
            }
        }
        let listed = deployments
            .list(&ListParams::default())
            .await
            .map(|list| list.items)
            .unwrap_or_default();
        for deployment in listed {
            let replicas = deployment.spec.replicas.unwrap_or(1);
            let seen = deployment
                .status
                .as_ref()
                .and_then(|status| status.observed_generation);
            if seen != deployment.metadata.generation {
                let status = json!({ "status": {
                    "observedGeneration": deployment.metadata.generation,
                    "replicas": replicas, "updatedReplicas": replicas, "readyReplicas": replicas, "availableReplicas": replicas,
                } });
                let _ = deployments
                    .patch_status(
                        &deployment.name_any(),
                        &PatchParams::default(),
                        &Patch::Merge(status),
                    )
                    .await;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn pod_status(pod: &Pod) -> Value {
    let image = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.containers[0].image.clone())
        .unwrap_or_default();
    if image.starts_with("bad") {
        return json!({ "status": { "containerStatuses": [{
            "name": "main", "image": image, "imageID": "", "ready": false, "restartCount": 0,
            "state": { "waiting": { "reason": "ImagePullBackOff", "message": "no such image" } },
        }] } });
    }
    if image.starts_with("rejected") {
        return json!({ "status": {
            "phase": "Failed", "reason": "NodePorts",
            "message": "Pod was rejected: node(s) didn't have free ports",
        } });
    }
    if image.starts_with("nowhere") {
        return json!({ "status": { "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available",
        }] } });
    }
    let slot: u8 = pod
        .labels()
        .get("portpool.dev/slot")
        .and_then(|slot| slot.parse().ok())
        .unwrap_or(200);
    let address = pod.annotations().get("test/address").cloned();
    let address = address.unwrap_or_else(|| format!("127.250.0.{}", 10 + slot % 200));
    json!({ "status": {
        "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }],
        "conditions": [{ "type": "Ready", "status": "True" }],
    } })
}
