//! What must never break, at any moment and at the end.

use super::*;

/// The key of metadata that says which amendment was the last.
pub(super) const LATEST: &str = "latest";

impl World {
    /// Asserts that no connection server has come to know an older amendment of a
    /// session than before.
    pub(super) fn check_amendments(&mut self) {
        if self.amendments == 0 {
            return;
        }
        for server in &self.servers {
            for session in server.sessions.list(&Default::default(), 1000).items {
                let of = (server.name.clone(), session.id);
                let Some(latest) = session.metadata.get(LATEST) else {
                    let known = self.latest.get(&of);
                    assert_eq!(known, None, "the amendment is lost: {of:?}");
                    continue;
                };
                let latest = latest.parse().unwrap();
                let before = self.latest.insert(of, latest);
                assert!(before <= Some(latest), "{before:?} became {latest}");
            }
        }
    }

    /// Asserts what must hold at every moment.
    pub(super) fn check(&self) {
        self.check_offers();
        for (agent, book) in self.agents.iter().enumerate() {
            let counts = book.counts(self.now).ports[0].clone();
            let sum =
                counts.free + counts.held + counts.busy + counts.lingering + counts.not_listening;
            assert_eq!(
                sum,
                u32::from(PORTS),
                "a port is lost or counted twice: {counts:?}"
            );
            let is_recovering = self.now.monotonic < self.recovered_at[agent];
            let companions = self.connections.iter();
            let mut companions = companions.filter(|open| open.port == companion(agent));
            assert!(
                is_recovering || book.session_count() > 0 || companions.next().is_none(),
                "a companion connection outlives the last session of {agent}"
            );
            for offset in 0..PORTS {
                let port = port(agent, offset);
                let closing = self.closing.iter().map(|(_, connection)| connection);
                let here = self
                    .connections
                    .iter()
                    .chain(closing)
                    .filter(|connection| connection.port == port);
                let mut sessions: Vec<&SessionId> = here
                    .filter_map(|connection| connection.session.as_ref())
                    .collect();
                sessions.dedup();
                assert!(sessions.len() <= 1, "two sessions on {port}: {sessions:?}");
                let live = book.look_up(port);
                for further in live.iter().flat_map(|live| &live.ports.rest) {
                    let there = book.look_up(further.port);
                    assert_eq!(there, live, "a part of a session is another's");
                }
                let live = live.map(|live| live.id);
                assert!(
                    !live
                        .as_ref()
                        .is_some_and(|id| self.ended[agent].contains(id)),
                    "{live:?} was ended and is live"
                );
                let is_free = book.is_free(port);
                assert!(
                    !is_free || is_recovering || sessions.is_empty(),
                    "{port} is free and connected"
                );
            }
        }
    }

    /// Asserts, when everything has arrived, that no agent counts a session as
    /// live that is over for a connection server with a working stream.
    pub(super) fn check_over(&self) {
        self.check_asks();
        for server in &self.servers {
            for (agent, stream) in server.streams.iter().enumerate() {
                let is_up = |stream: &Stream| stream.broken.is_none() && !stream.is_former;
                if !stream.as_ref().is_some_and(is_up) {
                    continue;
                }
                for offset in 0..PORTS {
                    let live = self.agents[agent].look_up(port(agent, offset));
                    let Some(id) = live.map(|live| live.id) else {
                        continue;
                    };
                    assert!(
                        !self.over.contains(&(server.name.clone(), id.clone())),
                        "{id} is over for {} and live",
                        server.name
                    );
                }
            }
        }
    }

    /// Ends all connections and asserts that every port becomes free.
    pub(super) fn end(&mut self) {
        // Pending clients still get their answers.
        self.deliver_all();
        while !self.connections.is_empty() {
            self.happen(Event::Close);
        }
        // Longer than any claim, linger and grace together.
        for _ in 0..3 {
            self.happen(Event::Pass(30));
            for server in 0..SERVERS {
                for agent in 0..self.agents.len() {
                    self.happen(Event::Attach(server, agent));
                }
            }
        }
        self.deliver_all();
        for book in &self.agents {
            assert_eq!(
                book.counts(self.now).ports[0].free,
                u32::from(PORTS),
                "a port has leaked"
            );
            assert_eq!(book.session_count(), 0);
        }
    }
}
