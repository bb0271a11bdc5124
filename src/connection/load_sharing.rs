//! The load-sharing port of claim 1: receives a client's request, allocates
//! the processing server, and answers with the connection port that the server
//! selected.
//!
//! ```text
//! client ─POST /v1/sessions→ http → api → allocation ─reserve→ reservations → servers → policy
//!                                             └─select→ agents ⇄ processing servers
//! ```
//!
//! - `http`: connections of the port; `api`: its paths; `problem`: its refusals;
//! - `allocation`: from a request to a session;
//! - `reservations`: shares `servers` between requests;
//! - `servers`, `policy`: pure: which server a request gets, and which request
//!   is next.

pub mod allocation;
pub mod api;
pub(in crate::connection) mod http;
pub mod policy;
pub mod problem;
pub mod reservations;
pub mod servers;
