//! Committed generated files agree with their sources. `BLESS=1 cargo test
//! --test generated` (`make generate`) rewrites them.

#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

mod common;

use std::fs;
use std::path::Path;

use common::agree;

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
    let mut document = portpool::connection::api::openapi()
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
