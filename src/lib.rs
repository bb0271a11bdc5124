//! portpool gives a client its own port on its own server for a while.
pub mod admin;
pub mod client;
pub mod connection;
pub mod echo;
pub mod follow;
pub mod local;
pub mod manifest;
pub mod plan;
pub mod pool;
pub mod processing;
pub mod selection;
pub mod session;
pub mod table;
pub mod telemetry;
