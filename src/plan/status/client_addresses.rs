//! The condition `ClientAddressesKept`: whether connection servers see the addresses
//! of clients. Only pools that tell clients apart by them have it.

use super::{Blocker, Statement};
use crate::plan::ValidPool;
use crate::plan::validate::Entry;
use crate::pool::{ClientBinding, EntryAdmission, Exposure};

/// The condition of `pool`; `None` where it does not matter. `hiding` is a Service
/// whose clients come with the addresses of nodes, if there is one.
pub(super) fn statement(pool: &ValidPool, hiding: Option<&str>) -> Option<Statement> {
    let is_companion = |entry: &&Entry| entry.admission == Some(EntryAdmission::Companion);
    let companion = pool.entries.iter().find(is_companion);
    let is_bound = pool.sessions.client_binding == ClientBinding::Requester;
    let reason = match companion {
        Some(entry) => format!("entry {:?} of ports has admission Companion", entry.name),
        None if is_bound => "sessions.clientBinding is Requester".to_owned(),
        None => return None,
    };
    let is_behind_services = matches!(pool.exposure, Exposure::NodePort | Exposure::LoadBalancer);
    let hiding = hiding.filter(|_| is_behind_services);
    let Blocker { reason, message } = match hiding {
        Some(service) => Blocker::new(
            "HiddenByNodes",
            format!(
                "{reason}, but service {service} has externalTrafficPolicy Cluster, which gives clients the addresses of nodes: those of one node are taken for one client, and one that comes through two nodes for two; set externalTrafficPolicy Local in the Services of the pool, or use exposure HostNetwork"
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
