//! Sessions that the workload has yet to confirm, where the pool says so.
//!
//! ```text
//!   select ──→ offered ──confirm──→ held: the connection servers that asked get it
//!                 │ refuse, confirm deadline, stop; all who asked have withdrawn or are gone
//!                 ↓
//!               free: those who asked are refused
//! ```
//!
//! Only the workload knows an offered session, so that no client can connect, and its
//! ports are free at once when it ends. Requests with the same key, also of several
//! connection servers, wait for the same decision. Each is answered once: one that is
//! withdrawn says nothing about the others.

use super::session::{Asker, Offer, Session, State};
use super::{Book, Notice, Now, To};
use crate::selection::{ConnectionServerId, EndCause, FromAgent, RefusalCause, Select};
use crate::session::{Metadata, SessionId};

/// Most requests that wait for the same session to be confirmed: one of each connection
/// server, and some that were repeated.
const ASKERS_MAX: usize = 64;

/// Why a session cannot be confirmed or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotOffered {
    /// No live session has the id; its time may be over.
    Unknown,
    /// The workload was not asked about it.
    NotAsked,
    /// The workload has confirmed it before.
    Confirmed,
}

impl Session {
    /// Why the workload cannot decide about it any more.
    fn not_offered(&self) -> NotOffered {
        if self.is_confirmed {
            NotOffered::Confirmed
        } else {
            NotOffered::NotAsked
        }
    }
}

impl Book {
    /// Confirms the offered session `id` for the workload, which says `metadata` to the
    /// client. The same again changes nothing.
    ///
    /// # Errors
    /// [`NotOffered`]; nothing has changed then.
    pub fn confirm(
        &mut self,
        id: &SessionId,
        metadata: Metadata,
        now: Now,
    ) -> Result<Vec<Notice>, NotOffered> {
        let claim = self.times.claim;
        let session = self
            .sessions
            .get_mut(id)
            .filter(|session| session.is_live());
        let session = session.ok_or(NotOffered::Unknown)?;
        let State::Offered(Offer { askers, .. }) = &session.state else {
            let is_again = session.is_confirmed && session.workload_metadata == metadata;
            return if is_again {
                Ok(Vec::new())
            } else {
                Err(session.not_offered())
            };
        };
        let askers = askers.clone();
        // Who has made it may have withdrawn: if this one is gone, its clients are.
        session.owner.clone_from(&askers[0].from);
        session.is_confirmed = true;
        session.workload_metadata = metadata;
        let mut reports = Vec::new();
        self.update(id, &mut reports, |session| {
            session.state = State::Held;
            session.claim_deadline = now.time_in(claim);
            session.claim_until = now.monotonic + claim;
            session.until = Some(now.monotonic + claim);
        });
        let counts = self.counts(now);
        let session = self.describe(id, &self.sessions[id]);
        // Who asked gets it as an answer first, and knows it when it is reported to all.
        let answer = |Asker { from, request_id }| Notice {
            to: To::One(from),
            message: FromAgent::Selected {
                request_id,
                session: session.clone(),
                counts: counts.clone(),
            },
        };
        let answers = askers.into_iter().map(answer);
        Ok(answers.chain(reports).collect())
    }

    /// Refuses the offered session `id` for the workload, which gives the `reason`.
    ///
    /// # Errors
    /// [`NotOffered`]; nothing has changed then.
    pub fn refuse(
        &mut self,
        id: &SessionId,
        reason: Option<&str>,
        now: Now,
    ) -> Result<Vec<Notice>, NotOffered> {
        let session = self.sessions.get(id).filter(|session| session.is_live());
        let session = session.ok_or(NotOffered::Unknown)?;
        if !session.is_offered() {
            return Err(session.not_offered());
        }
        let mut notices = Vec::new();
        self.end_for(id, EndCause::DeclinedByWorkload, reason, now, &mut notices);
        Ok(notices)
    }

    /// Notes that `request` of `from` is for the session `id` as well, if that is
    /// offered. Returns whether it is.
    ///
    /// # Errors
    /// The cause of the refusal when the request is not for a session that the workload
    /// confirms, or too many are.
    pub(super) fn join_offer(
        &mut self,
        id: &SessionId,
        from: &ConnectionServerId,
        request: &Select,
    ) -> Result<bool, RefusalCause> {
        let session = self.sessions.get_mut(id);
        let Some(State::Offered(offer)) = session.map(|session| &mut session.state) else {
            return Ok(false);
        };
        if request.confirm_within.is_none() || offer.askers.len() >= ASKERS_MAX {
            return Err(RefusalCause::DuplicateId);
        }
        offer.askers.push(Asker {
            from: from.clone(),
            request_id: request.request_id,
        });
        Ok(true)
    }

    /// Takes back the request `request_id` of `from`, if the workload has yet to decide.
    pub(super) fn withdraw(
        &mut self,
        from: &ConnectionServerId,
        request_id: u64,
        now: Now,
        notices: &mut Vec<Notice>,
    ) {
        let gone = Asker {
            from: from.clone(),
            request_id,
        };
        if self.remove_askers(|it| *it == gone, EndCause::Released, now, notices) {
            notices.push(refusal(&gone, RefusalCause::Withdrawn, None));
        }
    }

    /// Forgets what `from` has asked: its stream has ended, and with it the numbers of
    /// its requests.
    pub(super) fn forget_asker(
        &mut self,
        from: &ConnectionServerId,
        now: Now,
        notices: &mut Vec<Notice>,
    ) {
        self.remove_askers(|it| it.from == *from, EndCause::OwnerGone, now, notices);
    }

    /// Removes the requests that are `over`. Sessions that no one else asked for end for
    /// `cause`. Returns whether there was one.
    fn remove_askers(
        &mut self,
        is_over: impl Fn(&Asker) -> bool,
        cause: EndCause,
        now: Now,
        notices: &mut Vec<Notice>,
    ) -> bool {
        let (mut is_any, mut over) = (false, Vec::new());
        for (id, session) in &mut self.sessions {
            if let State::Offered(offer) = &mut session.state {
                let before = offer.askers.len();
                offer.askers.retain(|asker| !is_over(asker));
                is_any |= offer.askers.len() < before;
                if offer.askers.is_empty() {
                    over.push(id.clone());
                }
            }
        }
        for id in over {
            self.end(&id, cause, now, notices);
        }
        is_any
    }
}

/// The answers to those who asked for a session that ends for `cause` before it is
/// confirmed.
pub(super) fn refusals(offer: &Offer, cause: EndCause, reason: Option<&str>) -> Vec<Notice> {
    let cause = match cause {
        // Otherwise a workload that is silent would be asked again at once.
        EndCause::NotConfirmedInTime | EndCause::MaxDuration => RefusalCause::NotConfirmed,
        EndCause::DeclinedByWorkload | EndCause::EndedByWorkload => RefusalCause::RefusedByWorkload,
        _ => RefusalCause::Draining,
    };
    let askers = offer.askers.iter();
    askers.map(|asker| refusal(asker, cause, reason)).collect()
}

fn refusal(asker: &Asker, cause: RefusalCause, reason: Option<&str>) -> Notice {
    Notice {
        to: To::One(asker.from.clone()),
        message: FromAgent::Refused {
            request_id: asker.request_id,
            cause,
            reason: reason.map(str::to_owned),
        },
    }
}
