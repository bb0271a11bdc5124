//! The load-sharing port of claim 1: receives a client's request, allocates
//! the processing server, and answers with the connection port that the server
//! selected.
//!
//! ```text
//! client ─POST /v1/sessions→ http → api → allocation → queue → servers → policy
//!                                             └─Select→ agents ⇄ processing servers
//! ```
//!
//! - `http`: connections of the port; `room`: how many, and who gives way;
//!   `client_stream`: one of them, and whether its client is still there; `api`: its paths; `problem`: its refusals;
//! - `allocation`: carries out what the queue decides;
//! - `queue`: pure: the rules by which requests get ports, wait and leave;
//! - `servers`, `policy`: pure: which server a request is sent to;
//! - `possible`: pure: what no server of the pool can ever give;
//! - `refusal`: why a request gets no session.

pub mod allocation;
pub mod api;
mod client_stream;
pub(in crate::connection) mod http;
pub mod policy;
mod possible;
pub mod problem;
pub mod queue;
pub mod refusal;
pub(in crate::connection) mod room;
pub mod servers;
