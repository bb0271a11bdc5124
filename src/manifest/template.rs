//! Rules of the API server about pods that their schema does not have, as far as
//! they concern containers and how they run. The API server checks the rest, such as
//! volumes and scheduling, when it creates a pod.
//!
//! Source: `ValidatePodTemplateSpec` of k8s.io/kubernetes.

use std::collections::HashSet;

use serde_json::Value;

use super::metadata::{DNS_LABEL_RULE, is_dns_label};
use crate::plan::FieldProblem;

const RESTART_POLICIES: [&str; 3] = ["Always", "OnFailure", "Never"];

/// What is wrong with the pod template `template`, which stands at `path` and matches
/// its schema.
pub(super) fn check(template: &Value, path: &str) -> Vec<FieldProblem> {
    let spec = template.get("spec").unwrap_or(&Value::Null);
    let path = format!("{path}.spec");
    let list = |name: &str| spec.get(name).and_then(Value::as_array);
    let mut problems = Vec::new();
    if list("containers").is_none_or(Vec::is_empty) {
        let message = "at least one container must run the workload";
        problems.push(FieldProblem::new(format!("{path}.containers"), message));
    }
    let policy = spec.get("restartPolicy").and_then(Value::as_str);
    if let Some(policy) = policy
        && !policy.is_empty()
        && !RESTART_POLICIES.contains(&policy)
    {
        let allowed = RESTART_POLICIES.join(", ");
        let message = format!("{policy:?} is not allowed; allowed: {allowed}");
        problems.push(FieldProblem::new(format!("{path}.restartPolicy"), message));
    }
    let mut names = HashSet::new();
    for field in ["initContainers", "containers"] {
        for (index, container) in list(field).into_iter().flatten().enumerate() {
            let path = format!("{path}.{field}[{index}]");
            let name = container.get("name").and_then(Value::as_str);
            let name = name.unwrap_or_default();
            let message = if !is_dns_label(name) {
                Some(format!("must be {DNS_LABEL_RULE}; this is {name:?}"))
            } else if !names.insert(name) {
                Some(format!("{name:?} occurs twice; it must be unique"))
            } else {
                None
            };
            problems.extend(message.map(|text| FieldProblem::new(format!("{path}.name"), text)));
            problems.extend(environment(container, &path));
            problems.extend(ports(container, &path));
        }
    }
    problems
}

fn environment(container: &Value, path: &str) -> Vec<FieldProblem> {
    let variables = container.get("env").and_then(Value::as_array);
    let mut problems = Vec::new();
    for (index, variable) in variables.into_iter().flatten().enumerate() {
        let path = format!("{path}.env[{index}]");
        let text = |field: &str| variable.get(field).and_then(Value::as_str);
        let name = text("name").unwrap_or_default();
        let is_good = |letter: char| (' '..='~').contains(&letter) && letter != '=';
        if name.is_empty() || !name.chars().all(is_good) {
            let message = format!("must be printable ASCII without '='; this is {name:?}");
            problems.push(FieldProblem::new(format!("{path}.name"), message));
        }
        let has_value = text("value").is_some_and(|value| !value.is_empty());
        if has_value && variable.get("valueFrom").is_some_and(Value::is_object) {
            let message = "must not be given beside value: remove one of them";
            problems.push(FieldProblem::new(format!("{path}.valueFrom"), message));
        }
    }
    problems
}

fn ports(container: &Value, path: &str) -> Vec<FieldProblem> {
    let ports = container.get("ports").and_then(Value::as_array);
    let ports = ports.into_iter().flatten().enumerate();
    let wrong = ports.filter_map(|(index, port)| {
        let port = port.get("containerPort")?.as_i64()?;
        let path = format!("{path}.ports[{index}].containerPort");
        let message = format!("must be 1 to 65535; this is {port}");
        (!(1..=65_535).contains(&port)).then(|| FieldProblem::new(path, message))
    });
    wrong.collect()
}
