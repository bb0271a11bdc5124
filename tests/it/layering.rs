//! Modules use only what the crate documentation's arrows allow.

use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

/// Module, and what of the crate it may use. The first that a path begins with
/// counts.
const ARROWS: &[(&str, &[&str])] = &[
    ("pool", &[]),
    ("table", &["pool"]),
    ("session", &["pool", "table"]),
    ("selection", &[]),
    ("sock_diag", &[]),
    ("plan", &["pool", "table"]),
    ("manifest", &["pool", "plan"]),
    ("follow", &["table", "pool"]),
    ("admin", &["table"]),
    ("forward", &["pool", "table", "sock_diag"]),
    (
        "connection",
        &[
            "pool",
            "table",
            "session",
            "selection",
            "follow",
            "admin",
            "forward",
        ],
    ),
    (
        "agent",
        &["pool", "table", "selection", "follow", "admin", "sock_diag"],
    ),
    ("client", &["pool", "session"]),
    (
        "operator",
        &[
            "pool", "table", "session", "plan", "follow", "client", "admin",
        ],
    ),
    (
        "local",
        &[
            "pool", "table", "session", "plan", "manifest", "follow", "client", "forward",
        ],
    ),
    ("echo", &[]),
    ("telemetry", &[]),
];

/// Modules that decide, and so wait for nothing.
const PURE: &[&str] = &[
    "pool",
    "table",
    "plan",
    "sock_diag",
    "connection/load_sharing/policy",
    "connection/load_sharing/servers",
    "connection/handover/values",
    "forward",
    "agent/book",
    "local/container",
];

/// Every source file with its path below `src`, without the extension.
fn sources(folder: &Path, found: &mut Vec<(String, PathBuf)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
            let name = path.strip_prefix(root).unwrap().with_extension("");
            found.push((name.to_str().unwrap().to_owned(), path));
        }
    }
}

fn is_in(name: &str, module: &str) -> bool {
    name == module
        || name
            .strip_prefix(module)
            .is_some_and(|rest| rest.starts_with('/'))
}

/// What of `text`, a file of module `name`, goes against the rules.
fn violations(name: &str, text: &str) -> Vec<String> {
    let Some((module, allowed)) = ARROWS.iter().find(|(module, _)| is_in(name, module)) else {
        return vec![format!("{name} has no arrows in tests/layering.rs")];
    };
    let own = module.split('/').next().unwrap();
    let paths = Regex::new(r"crate::(?:\{([^}]*)\}|(\w+))").unwrap();
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.contains("#[cfg(test)]") {
            break;
        }
        let line = line.split("//").next().unwrap_or_default();
        for used in paths.captures_iter(line) {
            let list = used.get(1).or(used.get(2)).unwrap().as_str();
            for item in list.split(',') {
                let item = item.trim().split("::").next().unwrap();
                if item != own && !allowed.contains(&item) {
                    found.push(format!(
                        "src/{name}.rs:{}: uses {item}; it may use {allowed:?}",
                        number + 1
                    ));
                }
            }
        }
        if line.contains("tokio") && PURE.iter().any(|pure| is_in(name, pure)) {
            found.push(format!(
                "src/{name}.rs:{}: uses tokio, but is to wait for nothing",
                number + 1
            ));
        }
        let is_edge = is_in(name, "operator") || name == "follow/cluster";
        if !is_edge && (line.contains("kube::Client") || line.contains("kube::client")) {
            found.push(format!("src/{name}.rs:{}: uses kube's client", number + 1));
        }
    }
    found
}

#[test]
fn modules_use_only_what_their_arrows_allow() {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    assert!(files.len() > 30);
    let found: Vec<String> = files
        .iter()
        .filter(|(name, _)| name != "main" && name != "lib")
        .flat_map(|(name, path)| violations(name, &fs::read_to_string(path).unwrap()))
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_forbidden_line_is_found() {
    assert_eq!(
        violations("plan/ports", "use crate::client::Client;").len(),
        1
    );
    assert_eq!(violations("table", "use crate::{pool, admin};").len(), 1);
    assert_eq!(violations("agent/book", "use tokio::time::sleep;").len(), 1);
    assert_eq!(
        violations("client", "use crate::session::Session;").len(),
        0
    );
    assert_eq!(violations("nowhere", "").len(), 1);
}
