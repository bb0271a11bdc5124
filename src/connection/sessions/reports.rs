//! What agents report: they come and leave, and their sessions begin, change and
//! end.

use parking_lot::Mutex;

use super::actions::{Action, Actions};
use super::events::SessionChange;
use super::flows::Flows;
use super::span::SessionSpan;
use super::{Inner, Live, Outbox, Sessions, greeting};
use crate::selection::{EndCause, Session, ToAgent};
use crate::session::{SessionId, SessionPort};
use crate::table::Slot;

impl Sessions {
    /// An agent's stream is up: from now on its messages go to `outbox`, the
    /// greeting first. `greet` makes it from the sessions known on this server.
    pub fn attach(&self, slot: Slot, outbox: Outbox, greet: impl FnOnce(Vec<Session>) -> ToAgent) {
        self.forget_agent(slot);
        let mut inner = self.inner.write();
        let of_slot = inner.live.values().filter(|live| live.slot == slot);
        let known = of_slot.map(|live| inner.report(live));
        let _ = outbox.send(greet(greeting::within_budget(known)));
        // These may have been lost with the former stream.
        for used in inner.companions_used(slot) {
            let _ = outbox.send(used);
        }
        for (id, _) in inner.released.iter().filter(|(_, of)| **of == slot) {
            let _ = outbox.send(ToAgent::Release(id.clone()));
        }
        inner.outboxes.insert(slot, outbox);
    }

    /// An agent's stream has ended: it is sent nothing more. Does nothing when a
    /// newer stream than `outbox` is up.
    pub fn detach(&self, slot: Slot, outbox: &Outbox) {
        let mut inner = self.inner.write();
        if inner
            .outboxes
            .get(&slot)
            .is_some_and(|current| current.same_channel(outbox))
        {
            inner.outboxes.remove(&slot);
        }
    }

    /// Forgets every session of `slot` and has its connections cut: the server
    /// was removed, or out of reach for too long.
    pub fn forget_server(&self, slot: Slot) -> Actions {
        let mut inner = self.inner.write();
        let ids: Vec<SessionId> = inner
            .live
            .values()
            .filter(|live| live.slot == slot)
            .map(|live| live.session.id.clone())
            .collect();
        ids.iter()
            .filter_map(|id| inner.end(id, "SERVER_GONE"))
            .collect()
    }

    /// An agent reports a session, new or changed. A new one is logged under
    /// the span that `span` gives.
    pub fn learn(
        &self,
        slot: Slot,
        session: Session,
        span: impl FnOnce() -> SessionSpan,
    ) -> Actions {
        let port = session.ports.first.port;
        let mut inner = self.inner.write();
        // Another server cannot speak for these ports.
        let is_its = |it: &SessionPort| inner.slot(it.port) == Some(slot);
        if !session.ports.iter().all(is_its) {
            return Actions::default();
        }
        let known = inner.live.get(&port);
        if known.is_some_and(|live| live.session.id == session.id) {
            inner.follow(session);
            return Actions::default();
        }
        let id = &session.id;
        if inner.is_ending(id) || inner.released.contains_key(id) {
            return Actions::default();
        }
        if inner.last_ended.get(&port) == Some(id) {
            // Another connection server brought it back; the agent reports its
            // end to that one now.
            inner.send(slot, ToAgent::Release(id.clone()));
            return Actions::default();
        }
        let cut = inner.make_room(&session, slot);
        let span = span();
        let server = inner.row(port).map_or("", |row| &row.server);
        span.selected(&session, server);
        let live = Live {
            key: inner.new_key(),
            slot,
            bound_client: session.bound_client.map(|client| client.to_canonical()),
            has_companions: inner.has_companions(slot),
            flows: Mutex::new(Flows::of(&session)),
            session,
            span,
        };
        inner.insert(live);
        cut.into_iter().collect()
    }

    /// An agent ends a session. `Ended` is sent to it when no connection is
    /// left.
    pub fn end(&self, slot: Slot, id: &SessionId, cause: EndCause) -> Actions {
        let mut inner = self.inner.write();
        inner.released.remove(id);
        inner.note_end(id);
        let action = inner.end(id, cause.name());
        if action.is_none() && !inner.is_ending(id) {
            inner.send(slot, ToAgent::Ended(id.clone()));
        }
        action.into_iter().collect()
    }
}

impl Inner {
    /// Takes over what `session`, which is live, has become.
    fn follow(&mut self, session: Session) {
        let first = session.ports.first.port;
        let Some(live) = self.live.get_mut(&first) else {
            return;
        };
        let known = std::mem::replace(&mut live.session, session);
        // A session keeps its ports.
        live.session.ports.clone_from(&known.ports);
        let live = &self.live[&first];
        let (is, was) = (&live.session, &known);
        if is.state != was.state {
            self.announce(live, SessionChange::State);
        } else if is.metadata != was.metadata || is.expires != was.expires {
            self.announce(live, SessionChange::Amendment);
        }
        // Also without companion ports, which the server may get later.
        self.change_flows(live, |flows| flows.follow(&live.session));
        self.join_known(first);
    }

    /// Ends what is on the ports of `session`, which is new on the server of `slot`.
    fn make_room(&mut self, session: &Session, slot: Slot) -> Vec<Action> {
        // A successor on a port means that we missed the end of the former.
        let mut cut = Vec::new();
        for port in session.ports.iter() {
            if let Some(former) = self.on(port.port).map(|live| live.session.id.clone()) {
                cut.extend(self.end(&former, "SUPERSEDED"));
            }
        }
        // Where the table of the agent is newer than ours, a port of the session may
        // be a companion port here.
        let is_its = |port| session.ports.iter().any(|it| it.port == port);
        if session.ports.iter().any(|it| self.is_companion(it.port)) {
            cut.extend(self.cut_companions(|of, port| of == slot && is_its(port)));
        }
        cut
    }
}
