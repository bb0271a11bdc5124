//! What the data plane must do after a change of the sessions, outside their
//! lock. `control` carries it out.

use std::net::IpAddr;

use crate::forward::{Decision, PendingId, SessionKey};
use crate::session::OneOrMore;
use crate::table::ListenPort;

/// One thing that the data plane must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Cut the session's connections and refuse the clients that wait on its
    /// ports, then report the cut itself as a closed flow of each port. Cut the
    /// companion connections of clients that have no other session, too.
    Cut(OneOrMore<ListenPort>, SessionKey, Vec<CompanionCut>),
    /// Cut companion connections on a port that is no companion port any more.
    CutCompanions(CompanionCut),
    /// Cut the connections without a session on a port that was open for everyone
    /// and is a companion port now.
    CutOpen(ListenPort, SessionKey),
    /// Decide on a pending client.
    Answer(ListenPort, PendingId, Decision),
}

/// A cut of a client's companion connections on a port. Only this client is refused
/// if it waits there: others wait for their own sessions. The cut is reported as a
/// closed flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompanionCut {
    /// The companion port.
    pub port: ListenPort,
    /// What the connections were admitted under.
    pub key: SessionKey,
    /// The client's address.
    pub client: IpAddr,
}

/// Everything that the data plane must do after one change, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "an ended session's connections go on until the data plane cuts them"]
pub struct Actions(Vec<Action>);

impl Actions {
    /// The number of actions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the data plane has nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn push(&mut self, action: Action) {
        self.0.push(action);
    }
}

impl Extend<Action> for Actions {
    fn extend<I: IntoIterator<Item = Action>>(&mut self, actions: I) {
        self.0.extend(actions);
    }
}

impl FromIterator<Action> for Actions {
    fn from_iter<I: IntoIterator<Item = Action>>(actions: I) -> Self {
        Self(actions.into_iter().collect())
    }
}

impl IntoIterator for Actions {
    type Item = Action;
    type IntoIter = std::vec::IntoIter<Action>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
