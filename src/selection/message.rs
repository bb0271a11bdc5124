//! The messages of the selection protocol as the rest of the code uses them:
//! every id, port and address in them is a valid one.

use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;

use crate::session::{
    AmendRefusal, Amendment, Block, Metadata, OneOrMore, PortState, SessionId, SessionPort,
    SessionState, text_id,
};
use crate::table::ListenPort;

text_id! {
    /// Names a connection server to agents: 1 to 64 bytes, chosen at random when
    /// it starts. A process that takes over from another one keeps its id.
    ConnectionServerId
}

/// Most client addresses of a session that may use companion ports: as many players
/// as share a game, and few enough to be sent with the session. An agent keeps the
/// first; a connection server lets others replace those that are idle there.
pub const MAX_CLIENTS: usize = 64;

/// A message from a connection server to an agent.
#[derive(Clone, Debug, PartialEq)]
pub enum ToAgent {
    /// The greeting, which is the first message.
    Hello(Hello),
    /// A newer table, or other ports that the sender cannot listen on.
    TableUpdate {
        /// The table cut down to this server's row, encoded.
        table: String,
        /// The connection ports of this server that the sender cannot listen on.
        unavailable: Vec<ListenPort>,
    },
    /// The request to select one of the available connection ports.
    Select(Select),
    /// The sender needs no answer to a request whose session is offered any more.
    Withdraw {
        /// The request.
        request_id: u64,
    },
    /// The first connection on the session is open at the sender.
    Opened(SessionId),
    /// A client of another address than those before has a connection on the session
    /// at the sender, and may use companion ports.
    Joined {
        /// The session.
        session_id: SessionId,
        /// The client's address.
        client: IpAddr,
        /// Whether it is the first of the session's clients on a companion port at the
        /// sender, so that the session has used the server.
        is_companion: bool,
    },
    /// The last connection on the session has closed at the sender.
    Closed {
        /// The session.
        session_id: SessionId,
        /// Whether a connection at the sender has claimed the session.
        is_claimed: bool,
    },
    /// The client gave the session back; or the session was over at the sender
    /// before the agent was restarted and reported it as live.
    Release(SessionId),
    /// The answer to [`FromAgent::End`]: the sender has no connection of the
    /// session and will admit none.
    Ended(SessionId),
    /// The question which session a connection port belongs to now.
    Lookup {
        /// Unique among the unanswered requests of the stream.
        request_id: u64,
        /// The connection port in question.
        port: ListenPort,
    },
    /// The request to change a live session.
    Amend {
        /// Unique among the unanswered requests of the stream.
        request_id: u64,
        /// The session.
        session_id: SessionId,
        /// The change.
        amendment: Amendment,
    },
    /// The last message of a connection server that stops for good.
    Goodbye,
}

/// Who attaches, and what it knows of this processing server already.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// The pool's uid.
    pub pool_uid: String,
    /// The id of the sender.
    pub connection_server: ConnectionServerId,
    /// The table cut down to this server's row, encoded.
    pub table: String,
    /// Sessions that the sender believes to be live on this server.
    pub sessions: Vec<Session>,
    /// Where the sender listens, such that no two processes have the same at a
    /// time; empty where the kernel does not report it. At most 256 bytes.
    pub host_identity: String,
    /// The connection ports of this server that the sender cannot listen on.
    pub unavailable: Vec<ListenPort>,
}

/// The request to select connection ports for a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Select {
    /// Unique among the unanswered requests of the stream.
    pub request_id: u64,
    /// The id of the session to make.
    pub session_id: SessionId,
    /// The key under which the same request gives the same live session.
    pub idempotency_key: Option<String>,
    /// The ports that the request asks for: all of them or none.
    pub ports: OneOrMore<Block>,
    /// The requester's address when only it may connect.
    pub bound_client: Option<IpAddr>,
    /// What the client says to the workload.
    pub metadata: Metadata,
    /// The requester's address, if it is known.
    pub requester: Option<IpAddr>,
    /// The time that the workload has to confirm the session; `None` if it is not
    /// asked. To the millisecond.
    pub confirm_within: Option<Duration>,
}

/// A message from an agent to a connection server.
#[derive(Clone, Debug, PartialEq)]
pub enum FromAgent {
    /// The answer to a greeting, which is the first message.
    Welcome(Welcome),
    /// The ports by name and state, after the change that caused the message.
    Counts(Counts),
    /// The processing server has selected a port.
    Selected {
        /// The request that this answers.
        request_id: u64,
        /// The session on the selected port.
        session: Session,
        /// The ports by name and state after this selection.
        counts: Counts,
    },
    /// The processing server has not selected a port.
    Refused {
        /// The request that this answers.
        request_id: u64,
        /// Why it has not.
        cause: RefusalCause,
        /// What the workload says about it, if it has refused.
        reason: Option<String>,
    },
    /// The workload is asked whether it takes the session.
    Offered {
        /// The request whose answer waits for that.
        request_id: u64,
        /// The ports by name and state, with that of the session as taken.
        counts: Counts,
    },
    /// A session that is new to the receiver, or whose state has changed.
    Session(Session),
    /// A session is over: its connections are to be cut.
    End {
        /// The session.
        session_id: SessionId,
        /// Why it is over.
        cause: EndCause,
    },
    /// The answer to [`ToAgent::Lookup`].
    LookedUp {
        /// The request that this answers.
        request_id: u64,
        /// The session on the port, if one is live there.
        session: Option<Session>,
    },
    /// The answer to [`ToAgent::Amend`]. A session that has changed is reported before.
    Amended {
        /// The request that this answers.
        request_id: u64,
        /// Whether it is done, or why it is not.
        outcome: Result<(), AmendRefusal>,
    },
}

/// The first message of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Random per process of the agent.
    pub agent: String,
    /// The generation of the row in use after the greeting; 0 when there is none.
    pub generation: u64,
    /// Whether the agent knows sessions of several ports. One that does not has
    /// adopted their first ports only.
    pub knows_several_ports: bool,
    /// Whether the agent changes live sessions.
    pub knows_amendments: bool,
}

/// The ports of a processing server by name and state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// One entry per name and protocol.
    pub ports: Vec<PortState>,
    /// Whether no port is offered any more, because the server is being removed.
    pub draining: bool,
    /// Ports whose session is over and that become free by themselves. They count
    /// as lingering, too.
    pub returning: u32,
    /// Whether no port is offered any more, because the server has had all the
    /// sessions that it takes, or its workload wants to be replaced.
    pub spent: bool,
    /// Whether no port is offered now, because the server's row, or the workload
    /// itself, says that it is not ready.
    pub not_ready: bool,
    /// Ports that count as in use besides one for each session: its further ones, and
    /// those whose session is over and that are not free yet.
    pub further: u32,
}

/// A session on a processing server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The id, chosen by the connection server that requested the session.
    pub id: SessionId,
    /// The key under which the same request gives this session.
    pub idempotency_key: Option<String>,
    /// The connection ports that were selected for it, in the order of the
    /// request.
    pub ports: OneOrMore<SessionPort>,
    /// The only address that may connect, if it is bound to one.
    pub bound_client: Option<IpAddr>,
    /// The addresses that may use companion ports of its server, each once, at most
    /// [`MAX_CLIENTS`]: those that requested it or have had a connection on it.
    pub clients: Vec<IpAddr>,
    /// Where it is in its life.
    pub state: SessionState,
    /// While it is held: when the claim ends. To the millisecond.
    pub claim_deadline: Timestamp,
    /// When the port was selected. To the millisecond.
    pub created: Timestamp,
    /// While it lingers: when its last connection closed. To the millisecond.
    pub lingering_since: Option<Timestamp>,
    /// Whether a connection has claimed it; in a greeting, one of the sender too.
    pub is_claimed: bool,
    /// In a greeting: whether the sender has connections open on it.
    pub open_here: bool,
    /// What the client says to the workload.
    pub metadata: Metadata,
    /// When it ends in any state. To the millisecond.
    pub expires: Option<Timestamp>,
    /// Whether `expires` is from an amendment, not from the pool's longest duration.
    pub has_own_expiry: bool,
    /// When its metadata and its end were set last, by the request or an amendment; absent
    /// if the metadata is left out here. To the millisecond.
    pub amended: Option<Timestamp>,
    /// What the workload has said when it confirmed the session.
    pub workload_metadata: Metadata,
    /// While the workload has yet to confirm it: until when. Only the agent knows of
    /// such a session; it is not sent.
    pub confirm_deadline: Option<Timestamp>,
}

#[cfg(test)]
impl Session {
    /// A held session on `port`, for tests.
    pub(crate) fn example(id: &str, port: u16) -> Self {
        Self {
            id: SessionId::new(id).unwrap(),
            idempotency_key: None,
            ports: OneOrMore::one(SessionPort::example("main", port)),
            bound_client: None,
            clients: Vec::new(),
            state: SessionState::Held,
            claim_deadline: Timestamp::UNIX_EPOCH,
            created: Timestamp::UNIX_EPOCH,
            lingering_since: None,
            is_claimed: false,
            open_here: false,
            metadata: Metadata::default(),
            expires: None,
            has_own_expiry: false,
            amended: None,
            workload_metadata: Metadata::default(),
            confirm_deadline: None,
        }
    }
}

/// Why a processing server selected no port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalCause {
    /// A cause that this version does not know.
    Unspecified,
    /// Nothing that matches is free.
    NoFreePort,
    /// The server is being removed.
    Draining,
    /// The server's row has no port of that name or protocol.
    UnknownPort,
    /// The session id is in use; or the session of the key is offered to the workload,
    /// and the request is not for that, or too many are.
    DuplicateId,
    /// The agent was restarted and offers no ports before connection servers
    /// have had time to report their sessions.
    Recovering,
    /// A field is not as `selection.proto` says.
    Malformed,
    /// The key belongs to a live session that a different request made.
    KeyReused,
    /// The server's row, or the workload itself, says that it is not ready.
    NotReady,
    /// The workload has not confirmed the session in time.
    NotConfirmed,
    /// The workload has refused the session.
    RefusedByWorkload,
    /// The sender has taken the request back.
    Withdrawn,
}

/// Why a session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndCause {
    /// A cause that this version does not know.
    Unspecified,
    /// No one connected before the claim deadline.
    Unclaimed,
    /// The client gave it back.
    Released,
    /// The last connection closed and the linger time passed.
    Finished,
    /// It reached the longest time that the pool or an amendment allows.
    MaxDuration,
    /// Its server or its port was removed, the server stopped, or its drain deadline
    /// passed.
    Drained,
    /// The connection server that made it is gone.
    OwnerGone,
    /// The agent does not know it, or its port belongs to another one now.
    Unknown,
    /// The workload ended it.
    EndedByWorkload,
    /// The workload has not confirmed it in time.
    NotConfirmedInTime,
    /// The workload has refused it.
    DeclinedByWorkload,
}
