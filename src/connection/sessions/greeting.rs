//! Which of the sessions known here go into a greeting, and with what: an agent takes
//! no larger messages than [`MAX_MESSAGE_BYTES`], and has little memory.
//!
//! Every session is in it, for an agent that was restarted gives the ports of others to
//! the next client. The protocol's bounds leave room for all that a connection server
//! may have; metadata and clients are what must be left out.
//!
//! [`MAX_MESSAGE_BYTES`]: crate::selection::MAX_MESSAGE_BYTES

use crate::selection::{GREETING_CLIENTS, GREETING_METADATA_BYTES, Session};
use crate::session::Metadata;

/// Most bytes that the encoding adds to those of a key and its value: a tag of up to two
/// bytes and two of one, and three lengths of up to two.
const ENTRY_BYTES: usize = 10;

/// The `sessions` for a greeting. Those whose metadata does not fit beside what comes
/// before it are without, and those whose clients do not fit have their first client
/// only. An agent that was restarted does not know theirs then.
pub(super) fn within_budget(sessions: impl Iterator<Item = Session>) -> Vec<Session> {
    let (mut bytes_left, mut clients_left) = (GREETING_METADATA_BYTES, GREETING_CLIENTS);
    let take = |mut session: Session| {
        match bytes_left.checked_sub(encoded_bytes(&session.metadata)) {
            Some(less) => bytes_left = less,
            // What is not whole must not replace what another one knows.
            None => (session.metadata, session.amended) = (Metadata::default(), None),
        }
        match bytes_left.checked_sub(encoded_bytes(&session.workload_metadata)) {
            Some(less) => bytes_left = less,
            None => session.workload_metadata = Metadata::default(),
        }
        match clients_left.checked_sub(session.clients.len()) {
            Some(less) => clients_left = less,
            None => session.clients.truncate(1),
        }
        session
    };
    sessions.map(take).collect()
}

/// Most bytes that `metadata` takes in a message.
fn encoded_bytes(metadata: &Metadata) -> usize {
    metadata.bytes() + metadata.keys() * ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::selection::v1;
    use crate::session::{MAX_METADATA_BYTES, MAX_METADATA_KEYS};

    fn session(index: usize, metadata: &Metadata) -> Session {
        Session {
            metadata: metadata.clone(),
            amended: Some(jiff::Timestamp::UNIX_EPOCH),
            ..Session::example(&format!("session-{index}"), 20_000)
        }
    }

    /// An agent takes no larger greetings.
    #[test]
    fn a_greeting_has_metadata_up_to_its_bound_and_every_session() {
        let largest = Metadata::new([("k", "v".repeat(MAX_METADATA_BYTES - 1))]).unwrap();
        let small = Metadata::new([("k", "v")]).unwrap();
        let all = (0..3_000)
            .map(|index| session(index, &largest))
            .chain([session(3_000, &small)]);
        let greeting = within_budget(all);
        let is_with = |it: &&Session| !it.metadata.is_empty() && it.amended.is_some();
        let with = greeting.iter().filter(is_with).count();
        assert_eq!((greeting.len(), with), (3_001, 2_044));
        assert_eq!(
            greeting.iter().filter(|it| it.amended.is_some()).count(),
            with
        );
        assert_eq!(greeting[3_000].metadata, small, "it fits in what is left");
    }

    #[test]
    fn a_greeting_has_clients_up_to_their_bound() {
        let client = |last: u8| std::net::Ipv4Addr::new(192, 0, 2, last).into();
        let all = (0..2_000).map(|index| Session {
            clients: (1..=64).map(client).collect(),
            ..session(index, &Metadata::default())
        });
        let greeting = within_budget(all);
        let with = |clients: usize| {
            let sessions = greeting.iter();
            sessions.filter(|it| it.clients.len() == clients).count()
        };
        assert_eq!((with(64), with(1)), (1_024, 976));
    }

    #[test]
    fn metadata_takes_no_more_bytes_than_are_counted() {
        let many = (0..MAX_METADATA_KEYS).map(|key| (format!("{key:02}"), "v".repeat(62)));
        let few = [("k".repeat(2_000), "v".repeat(2_096))];
        for metadata in [
            Metadata::default(),
            Metadata::new([("", "")]).unwrap(),
            Metadata::new(many).unwrap(),
            Metadata::new(few).unwrap(),
        ] {
            let encoded =
                |metadata: &Metadata| v1::Session::from(session(0, metadata)).encoded_len();
            let taken = encoded(&metadata) - encoded(&Metadata::default());
            assert!(taken <= encoded_bytes(&metadata), "{metadata:?}: {taken}");
        }
    }
}
