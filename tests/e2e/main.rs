//! End to end: the chart, pools and real bytes on a real cluster, the one that
//! KUBECONFIG names. `make e2e` and `make e2e-kind` make one; each test needs
//! the images that `tools/e2e` loads, and the cluster for itself.

#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

#[path = "../common/mod.rs"]
mod common;
mod traffic;
mod world;

mod examples;
mod exposure;
mod faults;
mod mistakes;
mod readiness;
mod release;
