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

/// The README's figures of the data plane are those of the published run.
#[test]
fn readme_shows_the_published_benchmark() {
    const ROWS: &[(&str, &str)] = &[
        ("bulk_1", "bytes per processor second, 1 stream"),
        ("bulk_16", "the same, 16 streams down"),
        ("bulk_4_up", "the same, 4 streams up"),
        ("message", "64-byte messages per processor second"),
        (
            "connect",
            "connections per processor second, over 1,000 ports",
        ),
        ("udp", "datagrams per processor second, 32 scattered flows"),
        ("udp_burst", "the same, bursts of 16 on one flow"),
        (
            "latency_64_p50",
            "latency of 64 bytes at 60 % of capacity, p50",
        ),
        ("latency_64_p99", "the same, p99"),
        ("latency_64_p999", "the same, p99.9"),
        (
            "latency_1024_p50",
            "latency of 1024 bytes at 60 % of capacity, p50",
        ),
        ("latency_1024_p99", "the same, p99"),
        ("latency_1024_p999", "the same, p99.9"),
        ("idle_session_bytes", "memory of an idle session"),
        ("listen_port_bytes", "memory of a connection port"),
        (
            "start_18000",
            "18,000 ports: from the start until all answer",
        ),
        (
            "reload_10000",
            "a port added to 10,000 under 2,000 sessions: until it answers",
        ),
        ("reload_10000_cut", "sessions cut by that"),
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let summary = fs::read(root.join("docs/bench/summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_slice(&summary).unwrap();
    let mut table =
        String::from("| what | ratio to the better of HAProxy and nginx | aim |\n|---|---|---|\n");
    for &(name, what) in ROWS {
        let lanes = &summary["lanes"]["portpool"][name];
        if name == "reload_10000_cut" {
            let cut = lanes["median"].as_f64().unwrap();
            table += &format!("| {what} | {cut:.0} of 2,000 | 0 |\n");
            continue;
        }
        let ratio = &summary["ratios"][name];
        let number = |field: &str| ratio[field].as_f64().unwrap();
        // More is better where the aim is a least one.
        let sign = match lanes["unit"].as_str().unwrap() {
            unit if unit.ends_with("per CPU-s") => "≥",
            _ => "≤",
        };
        table += &format!(
            "| {what} | {:.3} [{:.3}, {:.3}] | {sign} {} |\n",
            number("median"),
            number("low"),
            number("high"),
            ratio["aim"]
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
