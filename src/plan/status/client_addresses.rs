//! The condition `ClientAddressesKept`: whether connection servers see the addresses
//! of clients. Only pools that tell clients apart by them have it.

use super::{Blocker, Statement};
use crate::plan::ValidPool;
use crate::pool::Exposure;

/// The condition of `pool`; `None` where it does not matter. `hiding` is a Service
/// whose clients come with the addresses of nodes, if there is one.
pub(super) fn statement(pool: &ValidPool, hiding: Option<&str>) -> Option<Statement> {
    let reason = pool.needs_client_addresses()?;
    let is_behind_services = matches!(pool.exposure, Exposure::NodePort | Exposure::LoadBalancer);
    let hiding = hiding.filter(|_| is_behind_services);
    let Blocker { reason, message } = match hiding {
        Some(service) => Blocker::new(
            "HiddenByNodes",
            format!(
                "{reason}, but service {service} has externalTrafficPolicy Cluster, which gives clients the addresses of nodes: those of one node are taken for one client, and one that comes through two nodes for two; the controller sets externalTrafficPolicy Local, unless something else keeps changing it"
            ),
        ),
        None if is_behind_services => Blocker::new(
            "LocalTrafficPolicy",
            "the Services of the pool keep the addresses of clients",
        ),
        None => Blocker::new("NoNodeBetween", "clients reach connection servers directly"),
    };
    Some(Statement {
        kind: "ClientAddressesKept",
        holds: hiding.is_none(),
        reason,
        message,
    })
}
