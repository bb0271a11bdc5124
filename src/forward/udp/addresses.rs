//! What names a flow among those of a port.

use std::net::{IpAddr, SocketAddr};

/// Both addresses of a flow on its client's side. They name the flow among
/// those of a port: one socket of a client may ask several addresses of this
/// machine, and each gets its own replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::forward) struct AddressPair {
    pub(in crate::forward) client: SocketAddr,
    /// The address that the client sends to, and that its replies come from.
    /// `None` where the port's socket has only one, or the system does not
    /// report it.
    pub(in crate::forward) local: Option<IpAddr>,
}
