//! Committed generated files agree with their sources. `BLESS=1 cargo test
//! --test it generated` (`make generate`) rewrites them.

use std::fs;
use std::path::Path;

use crate::common::agree;
use portpool::agent::workload_api;
use portpool::connection::{inspection, load_sharing};

#[test]
fn protocol_code_is_generated_from_its_proto() {
    let protocols = [
        ("selection", "src/selection/v1.rs"),
        ("handover", "src/connection/handover/v1.rs"),
    ];
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (name, path) in protocols {
        let descriptors = protox::compile([format!("{name}.proto")], [&source]).unwrap();
        // Sorted, so that equal messages have equal bytes.
        let mut generator = tonic_prost_build::configure().btree_map(".");
        if name != "selection" {
            generator = generator.extern_path(".portpool.selection.v1", "crate::selection::v1");
        }
        let out = tempfile::tempdir().unwrap();
        let out_dir = generator.out_dir(out.path());
        out_dir.compile_fds(descriptors).unwrap();
        let code = out.path().join(format!("portpool.{name}.v1.rs"));
        agree(path, &fs::read_to_string(code).unwrap());
    }
}

#[test]
fn openapi_documents_are_generated_from_the_handlers() {
    let documents = [
        ("docs/openapi.json", load_sharing::api::openapi()),
        ("docs/openapi-admin.json", inspection::openapi()),
        ("docs/openapi-workload.json", workload_api::openapi()),
    ];
    for (path, document) in documents {
        agree(path, &(document.to_pretty_json().unwrap() + "\n"));
    }
}

#[test]
fn crd_is_generated_from_the_types() {
    let crd = portpool::manifest::crd_yaml();
    agree("crds/processingpools.portpool.dev.yaml", &crd);
    agree(
        "charts/portpool/files/processingpools.portpool.dev.yaml",
        &crd,
    );
}

/// The README's figures of the data plane are those of the published run. Rows
/// that miss their aim belong among them.
#[test]
fn readme_shows_the_published_benchmark() {
    const ROWS: &[(&str, &str)] = &[
        ("bulk_16", "bytes per processor second, 16 streams"),
        (
            "connect",
            "connections per processor second, over 1,000 ports",
        ),
        ("udp", "datagrams per processor second (nginx only)"),
        (
            "latency_64_p99",
            "latency of 64 bytes at 60 % of capacity, p99",
        ),
        ("idle_session_bytes", "memory of an idle session"),
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let summary = fs::read(root.join("docs/bench/summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_slice(&summary).unwrap();
    let ratios = summary["ratios"].as_object().unwrap();
    let mut table = String::from("| measure | ratio |\n|---|---|\n");
    for &(name, what) in ROWS {
        let number = |field: &str| ratios[name][field].as_f64().unwrap();
        table += &format!(
            "| {what} | {:.2} [{:.2}, {:.2}] |\n",
            number("median"),
            number("low"),
            number("high"),
        );
    }
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let (before, rest) = readme.split_once("<!-- bench -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- /bench -->\n").unwrap();
    agree(
        "README.md",
        &format!("{before}<!-- bench -->\n{table}<!-- /bench -->\n{after}"),
    );
}
