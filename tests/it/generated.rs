//! Committed generated files agree with their sources. `BLESS=1 cargo test
//! --test it generated` (`make generate`) rewrites them.

use std::fs;
use std::path::Path;

use crate::common::agree;

#[test]
fn selection_protocol_code_is_generated_from_its_proto() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let descriptors = protox::compile(["selection.proto"], [&source]).unwrap();
    let out = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .out_dir(out.path())
        .compile_fds(descriptors)
        .unwrap();
    let code = fs::read_to_string(out.path().join("portpool.selection.v1.rs")).unwrap();
    agree("src/selection/v1.rs", &code);
}

#[test]
fn openapi_document_is_generated_from_the_handlers() {
    let mut document = portpool::connection::load_sharing::api::openapi()
        .to_pretty_json()
        .unwrap();
    document.push('\n');
    agree("docs/openapi.json", &document);
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
