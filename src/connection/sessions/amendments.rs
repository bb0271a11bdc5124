//! Amendments under way: administrators ask, the session's agent decides and reports
//! the session, and its answer comes back here.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Sessions;
use crate::selection::ToAgent;
use crate::session::{AmendRefusal, Amendment, SessionId};
use crate::table::Slot;

/// Most amendments under way. Each takes a round trip to an agent, so that more stand
/// for agents that do not answer.
const UNDER_WAY_MAX: usize = 64;

/// Why a session cannot be amended now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AmendError {
    /// No live session has this id.
    Unknown,
    /// The session's agent is not attached, or did not answer in time.
    OutOfReach,
    /// The session's agent is of a version that does not amend.
    TooOld,
    /// As many amendments are under way as may.
    TooMany,
    /// The agent has refused.
    Refused(AmendRefusal),
}

/// The questions that agents have not answered, and the agents that can be asked.
#[derive(Debug, Default)]
pub(super) struct Amendments {
    asked: Arc<Mutex<Asked>>,
    /// Whether it amends, for each agent that has welcomed us.
    capable: Mutex<HashMap<Slot, bool>>,
}

#[derive(Debug, Default)]
struct Asked {
    last_id: u64,
    answers: HashMap<u64, oneshot::Sender<Result<(), AmendRefusal>>>,
}

/// The answer to come. The question is forgotten when this is dropped.
#[derive(Debug)]
pub struct AmendAnswer {
    asked: Arc<Mutex<Asked>>,
    id: u64,
    answer: oneshot::Receiver<Result<(), AmendRefusal>>,
}

impl AmendAnswer {
    /// Waits for the agent.
    ///
    /// # Errors
    /// [`AmendError`]; nothing has changed then, unless the agent is out of reach.
    pub async fn wait(mut self) -> Result<(), AmendError> {
        let answer = (&mut self.answer).await;
        answer
            .map_err(|_| AmendError::OutOfReach)?
            .map_err(AmendError::Refused)
    }
}

impl Drop for AmendAnswer {
    fn drop(&mut self) {
        self.asked.lock().answers.remove(&self.id);
    }
}

impl Sessions {
    /// The agent of `slot` has answered the greeting, and `is_capable` of amendments or
    /// too old for them.
    pub fn amends(&self, slot: Slot, is_capable: bool) {
        self.amendments.capable.lock().insert(slot, is_capable);
    }

    /// Asks the agent of the live session `id` to change it.
    ///
    /// # Errors
    /// [`AmendError`]; the agent was not asked then.
    pub fn amend(&self, id: &SessionId, amendment: Amendment) -> Result<AmendAnswer, AmendError> {
        let inner = self.inner.read();
        let port = inner.port_by_id.get(id).ok_or(AmendError::Unknown)?;
        let slot = inner.live.get(port).ok_or(AmendError::Unknown)?.slot;
        if !inner.outboxes.contains_key(&slot) {
            return Err(AmendError::OutOfReach);
        }
        match self.amendments.capable.lock().get(&slot) {
            // What it knows is in its answer to the greeting.
            None => return Err(AmendError::OutOfReach),
            Some(false) => return Err(AmendError::TooOld),
            Some(true) => {}
        }
        let mut asked = self.amendments.asked.lock();
        if asked.answers.len() >= UNDER_WAY_MAX {
            return Err(AmendError::TooMany);
        }
        asked.last_id += 1;
        let request_id = asked.last_id;
        let (sender, answer) = oneshot::channel();
        asked.answers.insert(request_id, sender);
        drop(asked);
        let message = ToAgent::Amend {
            request_id,
            session_id: id.clone(),
            amendment,
        };
        inner.send(slot, message);
        Ok(AmendAnswer {
            asked: self.amendments.asked.clone(),
            id: request_id,
            answer,
        })
    }

    /// An agent's answer to the amendment `request_id`.
    pub fn amended(&self, request_id: u64, outcome: Result<(), AmendRefusal>) {
        let answer = self.amendments.asked.lock().answers.remove(&request_id);
        if let Some(answer) = answer {
            // Whoever asked may have given up.
            let _ = answer.send(outcome);
        }
    }

    /// The agent of `slot` is another one now, or none.
    pub(super) fn forget_agent(&self, slot: Slot) {
        self.amendments.capable.lock().remove(&slot);
    }
}
