//! Amendments of live sessions: what an administrator or the workload changes.

use std::time::Duration;

use super::times::time_after;
use super::{Book, Notice, Now, To};
use crate::selection::{self, ConnectionServerId, FromAgent};
use crate::session::{AmendRefusal, Amendment, MAX_EXPIRY_SECONDS, SessionId};

/// How far ahead the end of a session may be.
const MAX_EXPIRY: Duration = Duration::from_secs(MAX_EXPIRY_SECONDS.unsigned_abs() as u64);

/// The precision of times in messages.
const A_MILLISECOND: Duration = Duration::from_millis(1);

/// A session that was to be changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Amended {
    /// The session as it is now.
    pub session: selection::Session,
    /// Whether it was otherwise before.
    pub is_changed: bool,
}

impl Book {
    /// Changes the live session `id`.
    ///
    /// # Errors
    /// [`AmendRefusal`]; nothing has changed then.
    pub fn amend(
        &mut self,
        id: &SessionId,
        amendment: &Amendment,
        now: Now,
    ) -> Result<Amended, AmendRefusal> {
        let known = self.sessions.get(id).filter(|session| session.is_live());
        let known = known.ok_or(AmendRefusal::UnknownSession)?;
        let metadata = match &amendment.metadata {
            Some(patch) => known.metadata.amended(patch),
            None => Ok(known.metadata.clone()),
        };
        let metadata = metadata.map_err(|_| AmendRefusal::MetadataTooLarge)?;
        if let Some(Some(expires)) = amendment.expires {
            if expires <= now.time {
                return Err(AmendRefusal::ExpiresPassed);
            }
            if now.until(expires) > MAX_EXPIRY {
                return Err(AmendRefusal::ExpiresTooFar);
            }
        }
        let is_changed = metadata != known.metadata
            || amendment
                .expires
                .is_some_and(|expires| expires != known.expires || !known.has_own_expiry);
        let amended = if is_changed {
            // Later than the one before, whatever the clock says.
            let later = known.amended.map(|at| time_after(at, A_MILLISECOND));
            later.max(Some(now.time))
        } else {
            known.amended
        };
        let mut notices = Vec::new();
        self.update(id, &mut notices, |session| {
            session.metadata = metadata;
            session.amended = amended;
            if let Some(expires) = amendment.expires {
                session.set_expiry(expires, now);
            }
        });
        debug_assert!(notices.is_empty(), "its state stays");
        Ok(Amended {
            is_changed,
            session: self.describe(id, &self.sessions[id]),
        })
    }

    /// Takes over the last amendment of a session as `from` reports it, if it is later
    /// than the one known here, and what its workload has said: the agent was restarted,
    /// and connection servers that missed it have greeted before. The others learn it.
    pub(super) fn catch_up(
        &mut self,
        from: &ConnectionServerId,
        known: &selection::Session,
        now: Now,
        notices: &mut Vec<Notice>,
    ) {
        let Some(session) = self.sessions.get(&known.id).filter(|it| it.is_live()) else {
            return;
        };
        let is_later = known.amended > session.amended;
        // What a workload has said at its confirmation never changes afterwards.
        let has_more = session.workload_metadata.is_empty() && !known.workload_metadata.is_empty();
        if !is_later && !has_more {
            return;
        }
        self.update(&known.id, notices, |session| {
            if has_more {
                session.workload_metadata = known.workload_metadata.clone();
            }
            if !is_later {
                return;
            }
            session.metadata = known.metadata.clone();
            session.amended = known.amended;
            if known.has_own_expiry {
                session.set_expiry(known.expires, now);
            }
        });
        notices.push(Notice {
            to: To::AllBut(from.clone()),
            message: FromAgent::Session(self.describe(&known.id, &self.sessions[&known.id])),
        });
    }
}
