//! The step observe: what there is of a pool, according to the watches and to a
//! connection server. What objects mean is in `observation`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::context::Reconcile;
use super::observation::{Observation, Pods};
use super::requests::Error;
use super::silence::Told;
use crate::client;
use crate::plan::status::{Blocker, NOT_LISTENING, PARTLY_LISTENING};
use crate::pool::{CONNECTION_ADMIN_PORT, Exposure};
use crate::session::PoolState;

/// Most ports that a message names.
const MAX_NAMED_PORTS: usize = 5;

/// How long a connection server may take to report its numbers.
const ASK_DEADLINE: Duration = Duration::from_secs(1);

impl Reconcile<'_> {
    /// Observes the pool. `None` while the watches are behind. Needs the client,
    /// to list the pods now and then, and a connection server, for live numbers.
    ///
    /// # Errors
    /// The pods could not be listed.
    pub(super) async fn observe(&self) -> Result<Option<Observation>, Error> {
        let (stores, memory) = (&self.context.stores, &self.context.memory);
        let uid = self.owner.uid;
        stores.ready().await;
        let live = ask(&Pods::of(stores, self.owner), self.owner.pool.exposure).await;
        // As they are after that wait, so that the listing hardly finds newer ones.
        let pods = Pods::of(stores, self.owner);
        let mut observation = Observation::new(
            stores,
            self.owner,
            &self.template_hash,
            &pods,
            live,
            Timestamp::now(),
        );
        let unavailable = observation.live.as_ref().and_then(ports_blocker);
        observation.blockers.extend(unavailable);
        if memory.is_due_for_listing(uid) {
            let listed = self.list_pods().await?;
            if memory.compare_listing(uid, &pods.versions(self.owner), &listed) {
                return Ok(None);
            }
            memory.forget_deleted(&self.context.pools);
        }
        memory.correct(uid, &mut observation);
        let conditions = self.resource.status.iter().flat_map(|it| &it.conditions);
        let has = |reason: &str| conditions.clone().any(|it| it.reason == reason);
        let told = Told {
            is_silent: has(NOT_LISTENING),
            is_partial: has(PARTLY_LISTENING),
        };
        observation.is_any_silent = memory.with(uid, |memory| {
            let (servers, live) = (&mut observation.servers, observation.live.as_ref());
            let silences = &mut memory.silences;
            silences.keep_lasting(servers, live, told, Instant::now())
        });
        Ok(Some(observation))
    }
}

/// Asks the connection servers on their admin ports, one after another, until
/// one answers. Where each has a host with other programs on it, all are asked, for
/// the ports that they cannot listen on.
async fn ask(pods: &Pods, exposure: Exposure) -> Option<PoolState> {
    let mut answer: Option<PoolState> = None;
    for address in pods.connection_addresses() {
        let address = SocketAddr::new(address, CONNECTION_ADMIN_PORT).to_string();
        let Ok(client) = client::Client::new(&address) else {
            continue;
        };
        let Ok(Ok(state)) = tokio::time::timeout(ASK_DEADLINE, client.pool()).await else {
            continue;
        };
        match &mut answer {
            Some(answer) => answer.unavailable_ports.extend(state.unavailable_ports),
            None => answer = Some(state),
        }
        if exposure != Exposure::HostNetwork {
            break;
        }
    }
    answer
}

/// What says which connection ports cannot be listened on, according to `live`;
/// `None` if all can be.
fn ports_blocker(live: &PoolState) -> Option<Blocker> {
    let ports = live.unavailable_ports.iter();
    let by_port: BTreeMap<_, _> = ports
        .map(|port| ((port.port, port.protocol.name()), port.reason.as_str()))
        .collect();
    let ((first, protocol), reason) = by_port.first_key_value()?;
    let others: Vec<String> = by_port
        .keys()
        .map(|(port, protocol)| format!("{port}/{protocol}"))
        .skip(1)
        .collect();
    let others = match others.len() {
        0 => String::new(),
        1..MAX_NAMED_PORTS => format!(", nor on {}", others.join(", ")),
        count => format!(
            ", nor on {} and {} more",
            others[..MAX_NAMED_PORTS - 1].join(", "),
            count + 1 - MAX_NAMED_PORTS
        ),
    };
    let message = format!(
        "a connection server cannot listen on connection port {first}/{protocol}: {reason}{others}; it tries again and offers none of them until then"
    );
    Some(Blocker::new("PortsUnavailable", message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::PortProtocol;
    use crate::session::UnavailablePort;
    use crate::table::ListenPort;

    #[test]
    fn ports_that_cannot_be_listened_on_are_named_with_the_cause() {
        let mut live = PoolState::default();
        assert_eq!(ports_blocker(&live), None);
        let message = |live: &PoolState| ports_blocker(live).unwrap().message;
        let mut add = |port: u16| {
            live.unavailable_ports.push(UnavailablePort {
                port: ListenPort::new(port).unwrap(),
                protocol: PortProtocol::UDP,
                reason: "in use".to_owned(),
            });
            message(&live)
        };
        assert!(
            add(9).starts_with(
                "a connection server cannot listen on connection port 9/UDP: in use; "
            )
        );
        let several = add(3);
        assert!(
            several.contains("port 3/UDP: in use, nor on 9/UDP; "),
            "{several}"
        );
        (10..20).for_each(|port| drop(add(port)));
        let many = add(20);
        assert!(
            many.contains("nor on 9/UDP, 10/UDP, 11/UDP, 12/UDP and 8 more; "),
            "{many}"
        );
    }
}
