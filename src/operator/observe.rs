//! The step observe: what there is of a pool, according to the watches and to a
//! connection server. What objects mean is in `observation`.

use std::net::SocketAddr;
use std::time::Duration;

use jiff::Timestamp;

use super::context::Reconcile;
use super::observation::{Observation, Pods};
use super::requests::Error;
use crate::client;
use crate::pool::CONNECTION_ADMIN_PORT;
use crate::session::PoolState;

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
        let live = ask(&Pods::of(stores, self.owner)).await;
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
        if memory.is_due_for_listing(uid) {
            let listed = self.list_pods().await?;
            if memory.compare_listing(uid, &pods.versions(self.owner), &listed) {
                return Ok(None);
            }
            memory.forget_deleted(&self.context.pools);
        }
        memory.correct(uid, &mut observation);
        let told = self.resource.status.iter().flat_map(|it| &it.conditions);
        let is_told = told.into_iter().any(|it| it.reason == "PortsNotListening");
        memory.keep_lasting_silence(uid, &mut observation.servers, is_told);
        Ok(Some(observation))
    }
}

/// Asks the connection servers on their admin ports, one after another, until
/// one answers.
async fn ask(pods: &Pods) -> Option<PoolState> {
    for address in pods.connection_addresses() {
        let address = SocketAddr::new(address, CONNECTION_ADMIN_PORT).to_string();
        let Ok(client) = client::Client::new(&address) else {
            continue;
        };
        if let Ok(Ok(state)) = tokio::time::timeout(ASK_DEADLINE, client.pool()).await {
            return Some(state);
        }
    }
    None
}
