//! Amendments of live sessions: what an administrator or the workload changes.

use std::time::Duration;

use super::{Book, Now};
use crate::selection;
use crate::session::{AmendRefusal, Amendment, MAX_EXPIRY_SECONDS, SessionId};

/// How far ahead the end of a session may be.
const MAX_EXPIRY: Duration = Duration::from_secs(MAX_EXPIRY_SECONDS.unsigned_abs() as u64);

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
        let former = self.describe(id, known);
        let mut notices = Vec::new();
        self.update(id, &mut notices, |session| {
            session.metadata = metadata;
            if let Some(expires) = amendment.expires {
                session.expires = expires;
                session.at_most = expires.map(|at| now.monotonic + now.until(at));
                session.has_own_expiry = true;
            }
        });
        debug_assert!(notices.is_empty(), "its state stays");
        let session = self.describe(id, &self.sessions[id]);
        Ok(Amended {
            is_changed: session != former,
            session,
        })
    }
}
