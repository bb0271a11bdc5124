//! portpool gives a client its own port on its own server for a while.

pub mod connection;
pub mod pool;
pub mod selection;
pub mod session;
pub mod table;
