//! Rules of the API server about metadata that its schema does not have.
//!
//! Source: Kubernetes documentation, "Labels and Selectors", "Annotations" and
//! "Object Names and IDs"; `ValidateObjectMeta` of k8s.io/apimachinery.

use regex::Regex;
use serde_json::Value;

use crate::plan::FieldProblem;

/// Most characters of a label's value and of the name in a key.
const MAX_NAME: usize = 63;

/// Most characters of the prefix of a key.
const MAX_PREFIX: usize = 253;

/// Most bytes of all annotations together, keys included.
const MAX_ANNOTATIONS: usize = 256 * 1024;

const KEY_RULE: &str = "is at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends; a DNS name and '/' may stand before it";

/// What is wrong with `metadata`, which stands at `path` and matches its schema.
pub(super) fn check(metadata: &Value, path: &str) -> Vec<FieldProblem> {
    let mut problems = labels(metadata, path);
    problems.extend(annotations(metadata, path));
    let finalizers = metadata.get("finalizers").and_then(Value::as_array);
    for (index, finalizer) in finalizers.into_iter().flatten().enumerate() {
        if !finalizer.as_str().is_some_and(is_key) {
            let message = format!("a finalizer {KEY_RULE}; this is {finalizer}");
            problems.push(FieldProblem::new(
                format!("{path}.finalizers[{index}]"),
                message,
            ));
        }
    }
    if let Some(namespace) = metadata.get("namespace").and_then(Value::as_str)
        && !namespace.is_empty()
        && !is_dns_label(namespace)
    {
        let message = format!("must be {DNS_LABEL_RULE}; this is {namespace:?}");
        problems.push(FieldProblem::new(format!("{path}.namespace"), message));
    }
    problems
}

fn labels(metadata: &Value, path: &str) -> Vec<FieldProblem> {
    let labels = metadata.get("labels").and_then(Value::as_object);
    let mut problems = Vec::new();
    for (key, value) in labels.into_iter().flatten() {
        let path = format!("{path}.labels.{key}");
        let text = value.as_str().unwrap_or_default();
        if !is_key(key) {
            problems.push(FieldProblem::new(path, format!("a key {KEY_RULE}")));
        } else if !text.is_empty() && !is_name(text) {
            let message = format!(
                "a label is empty, or at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends; this is {text:?}"
            );
            problems.push(FieldProblem::new(path, message));
        }
    }
    problems
}

fn annotations(metadata: &Value, path: &str) -> Vec<FieldProblem> {
    let annotations = metadata.get("annotations").and_then(Value::as_object);
    let mut problems = Vec::new();
    let mut bytes = 0;
    for (key, value) in annotations.into_iter().flatten() {
        bytes += key.len() + value.as_str().map_or(0, str::len);
        // The API server lets upper-case letters pass here, in labels not.
        if !is_key(&key.to_lowercase()) {
            let path = format!("{path}.annotations.{key}");
            problems.push(FieldProblem::new(path, format!("a key {KEY_RULE}")));
        }
    }
    if bytes > MAX_ANNOTATIONS {
        let message = format!("have {bytes} bytes; at most {MAX_ANNOTATIONS} are allowed");
        problems.push(FieldProblem::new(format!("{path}.annotations"), message));
    }
    problems
}

pub(super) const DNS_LABEL_RULE: &str =
    "at most 63 lower-case letters, digits and hyphens, without a hyphen at either end";

/// Whether `text` can be a part of a DNS name.
pub(super) fn is_dns_label(text: &str) -> bool {
    text.len() <= MAX_NAME && matches("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", text)
}

fn is_key(key: &str) -> bool {
    match key.split_once('/') {
        None => is_name(key),
        Some((prefix, name)) => {
            let pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
            prefix.len() <= MAX_PREFIX && matches(pattern, prefix) && is_name(name)
        }
    }
}

fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME && matches("^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", text)
}

fn matches(pattern: &str, text: &str) -> bool {
    Regex::new(pattern)
        .expect("the patterns are fixed")
        .is_match(text)
}
