//! Helm, and the chart as it renders it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

/// The chart's folder.
pub const CHART: &str = "charts/portpool";

/// Runs helm in the repository; returns whether it succeeded, and its output.
pub fn helm(arguments: &[&str]) -> (bool, String) {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = PROGRAM.get_or_init(|| {
        let script = Command::new(root.join("tools/get-helm"))
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert!(script.status.success(), "no helm to test with, see above");
        String::from_utf8(script.stdout).unwrap().trim().to_owned()
    });
    let output = Command::new(program)
        .args(arguments)
        .current_dir(root)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// The chart rendered with the arguments `more`; release and namespace are
/// `portpool`.
pub fn template(more: &[&str]) -> String {
    let mut arguments = vec!["template", "portpool", CHART, "--namespace=portpool"];
    arguments.extend(more);
    let (is_rendered, text) = helm(&arguments);
    assert!(is_rendered, "{text}");
    text
}

/// The objects that [`template`] renders.
pub fn render(more: &[&str]) -> Vec<Value> {
    documents(&template(more))
}

/// The objects of a YAML file.
pub fn documents(text: &str) -> Vec<Value> {
    let documents = text
        .split("\n---\n")
        .filter(|text| text.lines().any(|line| line.starts_with("kind:")));
    documents
        .map(|text| serde_saphyr::from_str(text).unwrap())
        .collect()
}

/// The objects of `kind`.
pub fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects
        .iter()
        .filter(|object| object["kind"] == kind)
        .collect()
}

/// The one object of `kind`.
pub fn the<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let found = of_kind(objects, kind);
    assert_eq!(found.len(), 1, "{kind}");
    found[0]
}
