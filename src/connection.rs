//! The connection server.

pub mod forward;
