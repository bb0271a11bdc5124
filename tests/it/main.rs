//! Everything that needs no cluster of its own: the parts in one process, the
//! roles as processes on loopback, and the controller with a real API server.
//! One module is one part.

#![allow(
    clippy::unwrap_used,
    reason = "a test stops at what it does not expect"
)]

#[path = "../common/mod.rs"]
mod common;

mod agent;
mod api;
mod bad_input;
mod chart;
mod claim;
mod cli;
mod client;
mod ending;
mod forward;
mod generated;
mod handover;
mod http;
mod image;
mod inspection;
mod layering;
mod local;
mod manifest;
mod model;
mod openapi;
mod operator;
mod pool;
mod queue;
mod several;
