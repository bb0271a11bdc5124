//! Translates a container of the pod template into a process of this machine:
//! program, arguments, environment. Nothing runs here; `child` runs it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, EnvVar, EnvVarSource, PodTemplateSpec};

use super::addresses::Addresses;
use crate::plan::{FieldProblem, ValidPool, environment};
use crate::table::Row;

/// Grace period of a pod whose template has none.
///
/// Source: Kubernetes API reference, PodSpec v1 core, `terminationGracePeriodSeconds`.
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// A container as a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Name of the container.
    pub name: String,
    /// Path of the container in the manifest.
    pub path: String,
    /// Program and arguments.
    pub arguments: Vec<String>,
    /// Variables in addition to those of this process.
    pub environment: Vec<(String, String)>,
    /// Working directory.
    pub folder: Option<String>,
    /// Time that the process may take to end after SIGTERM.
    pub grace: Duration,
}

/// Values that the downward API gives a pod.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Name of the server.
    pub name: String,
    /// Uid of the server.
    pub uid: String,
    /// Namespace of the pool.
    pub namespace: String,
    /// Address of the server.
    pub address: IpAddr,
    /// What the workload learns about its place: names and values.
    pub variables: Vec<(String, String)>,
}

impl Pod {
    /// The pod of the server in `row`.
    pub(super) fn new(pool: &ValidPool, row: &Row, uid: String, addresses: &Addresses) -> Self {
        let address = pool.advertised_address.clone();
        let address = address.unwrap_or_else(|| addresses.connection(0).to_string());
        let own = addresses.server(row.slot);
        Self {
            name: row.server.clone(),
            uid,
            namespace: pool.namespace.clone(),
            address: own,
            variables: environment(pool, row, Some(&address), own),
        }
    }

    /// The field at `path` of a pod of `template`, as the downward API gives it.
    fn field(&self, path: &str, template: &PodTemplateSpec) -> Option<String> {
        let metadata = template.metadata.as_ref();
        let entry = |map: Option<&BTreeMap<String, String>>, key: &str| {
            // The value of an absent key is empty.
            Some(
                map.and_then(|map| map.get(key))
                    .cloned()
                    .unwrap_or_default(),
            )
        };
        if let Some(key) = key_of(path, "metadata.labels") {
            return entry(metadata.and_then(|metadata| metadata.labels.as_ref()), key);
        }
        if let Some(key) = key_of(path, "metadata.annotations") {
            return entry(
                metadata.and_then(|metadata| metadata.annotations.as_ref()),
                key,
            );
        }
        let account = || template.spec.as_ref()?.service_account_name.clone();
        match path {
            "metadata.name" => Some(self.name.clone()),
            "metadata.uid" => Some(self.uid.clone()),
            "metadata.namespace" => Some(self.namespace.clone()),
            "status.podIP" | "status.podIPs" => Some(self.address.to_string()),
            "status.hostIP" | "status.hostIPs" => Some("127.0.0.1".to_owned()),
            "spec.nodeName" => Some("localhost".to_owned()),
            "spec.serviceAccountName" => Some(account().unwrap_or_else(|| "default".to_owned())),
            _ => None,
        }
    }
}

/// The key in `path` if that is `map['key']`.
fn key_of<'a>(path: &'a str, map: &str) -> Option<&'a str> {
    let key = path.strip_prefix(map)?;
    key.strip_prefix("['")?.strip_suffix("']")
}

/// The containers of `template` as processes of `pod`.
///
/// # Errors
/// The fields that cannot be run here.
pub fn processes(template: &PodTemplateSpec, pod: &Pod) -> Result<Vec<Process>, Vec<FieldProblem>> {
    let Some(spec) = &template.spec else {
        return Err(vec![FieldProblem::new("spec.template.spec", "is missing")]);
    };
    let mut problems = Vec::new();
    if spec
        .init_containers
        .as_ref()
        .is_some_and(|containers| !containers.is_empty())
    {
        let message = "portpool local does not run init containers: start what they do from the containers' commands";
        problems.push(FieldProblem::new(
            "spec.template.spec.initContainers",
            message,
        ));
    }
    // Kubernetes takes a negative period as one second.
    let grace = spec.termination_grace_period_seconds;
    let grace = grace.map_or(DEFAULT_GRACE, |seconds| {
        Duration::from_secs(u64::try_from(seconds).unwrap_or(1))
    });
    let mut processes: Vec<Process> = Vec::new();
    for (index, container) in spec.containers.iter().enumerate() {
        let path = format!("spec.template.spec.containers[{index}]");
        match process(container, &path, pod, template) {
            Ok(process) => processes.push(Process { grace, ..process }),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() {
        Ok(processes)
    } else {
        Err(problems)
    }
}

fn process(
    container: &Container,
    path: &str,
    pod: &Pod,
    template: &PodTemplateSpec,
) -> Result<Process, FieldProblem> {
    let Some(command) = container
        .command
        .as_ref()
        .filter(|command| !command.is_empty())
    else {
        let message = "is missing: portpool local does not know what the image would start";
        return Err(FieldProblem::new(format!("{path}.command"), message));
    };
    if container.env_from.iter().flatten().any(|source| {
        let config_map = source.config_map_ref.as_ref().map(|source| source.optional);
        let secret = source.secret_ref.as_ref().map(|source| source.optional);
        config_map.or(secret) != Some(Some(true))
    }) {
        let message = "portpool local has no config maps and secrets: give env with values";
        return Err(FieldProblem::new(format!("{path}.envFrom"), message));
    }
    let mut environment = pod.variables.clone();
    for (index, variable) in container.env.iter().flatten().enumerate() {
        let path = format!("{path}.env[{index}]");
        if let Some(value) = value(variable, &path, pod, template, &environment)? {
            check_text(&value, &format!("{path}.value"))?;
            environment.push((variable.name.clone(), value));
        }
    }
    let mut arguments = Vec::new();
    for (field, texts) in [
        ("command", Some(command)),
        ("args", container.args.as_ref()),
    ] {
        for (index, text) in texts.into_iter().flatten().enumerate() {
            check_text(text, &format!("{path}.{field}[{index}]"))?;
            arguments.push(expand(text, &environment));
        }
    }
    if let Some(folder) = &container.working_dir {
        let path = format!("{path}.workingDir");
        check_text(folder, &path)?;
        if !folder.is_empty() && !folder.starts_with('/') {
            let message =
                format!("{folder:?} must be absolute: a container runtime takes no other");
            return Err(FieldProblem::new(path, message));
        }
    }
    Ok(Process {
        name: container.name.clone(),
        path: path.to_owned(),
        arguments,
        environment,
        folder: container
            .working_dir
            .clone()
            .filter(|folder| !folder.is_empty()),
        grace: DEFAULT_GRACE,
    })
}

/// Refuses text that no process can be given.
fn check_text(text: &str, path: &str) -> Result<(), FieldProblem> {
    if text.contains('\0') {
        let message = "has a NUL character, which no process can be given";
        return Err(FieldProblem::new(path, message));
    }
    Ok(())
}

/// The value of `variable`; `None` when it is not set, because it comes from an
/// optional object.
fn value(
    variable: &EnvVar,
    path: &str,
    pod: &Pod,
    template: &PodTemplateSpec,
    defined: &[(String, String)],
) -> Result<Option<String>, FieldProblem> {
    let Some(source) = &variable.value_from else {
        let value = variable.value.as_deref().unwrap_or_default();
        return Ok(Some(expand(value, defined)));
    };
    if is_optional(source) {
        return Ok(None);
    }
    let Some(field) = &source.field_ref else {
        let message = "portpool local knows fieldRef only: give a value";
        return Err(FieldProblem::new(format!("{path}.valueFrom"), message));
    };
    let value = pod.field(&field.field_path, template);
    value.map(Some).ok_or_else(|| {
        let message = format!("{} is not known to portpool local; it knows metadata.name, metadata.uid, metadata.namespace, metadata.labels['KEY'], metadata.annotations['KEY'], status.podIP, status.hostIP, spec.serviceAccountName and spec.nodeName", field.field_path);
        FieldProblem::new(format!("{path}.valueFrom.fieldRef.fieldPath"), message)
    })
}

/// Whether `source` is an object that need not exist. There is none here.
fn is_optional(source: &EnvVarSource) -> bool {
    let config_map = source.config_map_key_ref.as_ref().map(|key| key.optional);
    let secret = source.secret_key_ref.as_ref().map(|key| key.optional);
    config_map.or(secret) == Some(Some(true))
}

/// Expands `$(NAME)`; `$$` is a `$`, and an unknown name stays as it is.
///
/// Source: Kubernetes API reference, Container v1 core, `args`.
fn expand(text: &str, variables: &[(String, String)]) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let name = after
            .strip_prefix('(')
            .and_then(|inner| inner.split_once(')'));
        if let Some(after) = after.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some((name, after)) = name {
            // The last definition of a name counts.
            match variables.iter().rev().find(|(known, _)| known == name) {
                Some((_, value)) => expanded.push_str(value),
                None => expanded.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            expanded.push('$');
            rest = after;
        }
    }
    expanded.push_str(rest);
    expanded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        Pod {
            name: "echo-0".to_owned(),
            uid: "u".to_owned(),
            namespace: "games".to_owned(),
            address: IpAddr::from([127, 0, 0, 2]),
            variables: vec![("PORTPOOL_MAIN_PORT".to_owned(), "20000".to_owned())],
        }
    }

    #[test]
    fn variables_are_expanded_as_kubernetes_does() {
        let variables = [
            ("A".to_owned(), "1".to_owned()),
            ("B".to_owned(), "2".to_owned()),
        ];
        for (text, expanded) in [
            ("$(A)", "1"),
            ("x$(A)y$(B)z", "x1y2z"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$(C)", "$(C)"),
            ("$(A", "$(A"),
            ("$A $ $", "$A $ $"),
            ("", ""),
            ("$()", "$()"),
        ] {
            assert_eq!(expand(text, &variables), expanded, "{text:?}");
        }
    }

    #[test]
    fn a_container_gets_its_pods_name_and_address() {
        let template = serde_json::from_value(serde_json::json!({"spec": {"containers": [{
            "name": "main",
            "command": ["serve", "--on", "$(IP):$(PORT)"],
            "args": ["$(URL)", "$(PORTPOOL_MAIN_PORT)"],
            "env": [
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "PORT", "value": "7000"},
                {"name": "URL", "value": "http://$(IP):$(PORT)/"},
                {"name": "NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
                {"name": "ZONE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['zone']"}}},
                {"name": "NONE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['none']"}}},
                {"name": "UNSET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": true}}},
            ],
        }], "terminationGracePeriodSeconds": 45}, "metadata": {"labels": {"zone": "a"}}}))
        .unwrap();
        let processes = processes(&template, &pod()).unwrap();
        assert_eq!(
            processes[0].arguments,
            [
                "serve",
                "--on",
                "127.0.0.2:7000",
                "http://127.0.0.2:7000/",
                "20000"
            ]
        );
        let environment = &processes[0].environment;
        assert_eq!(environment[0], pod().variables[0]);
        let own = environment[1..].iter();
        let own: Vec<(&str, &str)> = own.map(|(name, value)| (&**name, &**value)).collect();
        assert_eq!(
            own,
            [
                ("IP", "127.0.0.2"),
                ("PORT", "7000"),
                ("URL", "http://127.0.0.2:7000/"),
                ("NAMESPACE", "games"),
                ("ZONE", "a"),
                ("NONE", ""),
            ]
        );
        assert_eq!(processes[0].grace, Duration::from_secs(45));
    }

    #[test]
    fn what_cannot_be_run_here_is_named() {
        let cases = [
            (
                serde_json::json!({"containers": [{"name": "a"}]}),
                "containers[0].command",
            ),
            (
                serde_json::json!({"containers": [{"name": "a", "command": ["x"], "env": [{"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}]}),
                "env[0].valueFrom",
            ),
            (
                serde_json::json!({"containers": [{"name": "a", "command": ["x"], "env": [{"name": "S", "valueFrom": {"fieldRef": {"fieldPath": "status.qos"}}}]}]}),
                "fieldPath",
            ),
            (
                serde_json::json!({"containers": [{"name": "a", "command": ["x"], "envFrom": [{"configMapRef": {"name": "m"}}]}]}),
                "envFrom",
            ),
            (
                serde_json::json!({"containers": [{"name": "a", "command": ["x"]}], "initContainers": [{"name": "i"}]}),
                "initContainers",
            ),
            (
                serde_json::json!({"containers": [{"name": "a", "command": ["x"], "env": [{"name": "A", "value": "a\0b"}]}]}),
                "env[0].value",
            ),
            (
                serde_json::json!({"containers": [{"name": "a", "command": ["x"], "args": ["a", "\0"]}]}),
                "args[1]",
            ),
            (
                serde_json::json!({"containers": [{"name": "a", "command": ["x"], "workingDir": "here"}]}),
                "workingDir",
            ),
        ];
        for (spec, path) in cases {
            let template = serde_json::from_value(serde_json::json!({"spec": spec})).unwrap();
            let problems = processes(&template, &pod()).unwrap_err();
            assert!(problems[0].path.ends_with(path), "{problems:?}");
        }
    }
}
