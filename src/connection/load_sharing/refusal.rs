//! Why a request for a session gets none.

use crate::selection::GONE_AFTER;

/// Why a request gets no session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Every matching port that the workload listens on has a session.
    #[error(
        "{} in use{}{}; try again, or let the request wait with waitSeconds",
        all(*.in_use),
        not_listening_too(*.not_listening),
        not_ready_too(*.not_ready)
    )]
    AllInUse {
        /// The number of matching ports with a session.
        in_use: u32,
        /// The number of those that are not offered.
        not_listening: u32,
        /// The number of servers that are not ready, whose ports do not count.
        not_ready: usize,
    },
    /// Too few matching ports are offered, even without the sessions on them.
    #[error(
        "the workload {}: it is starting, or it must listen on them at its pod's address; see notListening in GET /v1/pool; {}{}",
        not_listening(*.ports, *.listening), after_restart(), not_ready_too(*.not_ready)
    )]
    NotListening {
        /// The number of matching ports that are not offered.
        ports: u32,
        /// The number of the others, which do not suffice for a request for several.
        listening: u32,
        /// The number of servers that are not ready, whose ports do not count.
        not_ready: usize,
    },
    /// Every server that could take sessions is not ready.
    #[error("{}; see notReady in GET /v1/pool", not_ready(*.0))]
    NotReady(usize),
    /// No agent is attached, or those that are have not reported ports yet.
    #[error(
        "no processing server is attached yet: they are starting; see GET /v1/pool, and try again in a moment"
    )]
    Starting,
    /// Every attached server that the request can use has had the sessions that it
    /// takes, none of which is left.
    #[error(
        "every processing server for this request has had all the sessions that it takes (recycle, or its workload asked for it) and is being replaced; let the request wait with waitSeconds"
    )]
    BeingReplaced,
    /// Every attached server that the request can use is being removed.
    #[error("every processing server for this request is being removed; see GET /v1/pool")]
    Draining,
    /// A matching port is free, but its agent did not select one in time.
    #[error(
        "a matching port is free, but its processing server did not answer or would not give it; try again in a moment"
    )]
    NotSelected,
    /// The workloads of the servers that were asked have not confirmed the session.
    #[error("no workload has taken the session: {}; ask again, or ask for something else", unconfirmed(*.silent, *.refused, .reason.as_deref()))]
    NotConfirmed {
        /// The number of workloads that did not decide in time.
        silent: usize,
        /// The number of those that have refused.
        refused: usize,
        /// What one of these has said, if one did.
        reason: Option<String>,
    },
    /// The only free ports are kept for an earlier request for several ports.
    #[error(
        "{} kept for an earlier request that asks for several ports; try again, or let the request wait with waitSeconds",
        kept(*.0)
    )]
    Kept(u32),
    /// No server has all ports of a request for several to spare.
    #[error(
        "no processing server has all {ports} requested ports free at once, adjacent ones where count asks for them{}{}; try again, or let the request wait with waitSeconds",
        not_listening_too(*.not_listening),
        not_ready_too(*.not_ready)
    )]
    NotTogether {
        /// The number of requested ports.
        ports: u32,
        /// The number of matching ports that are not offered.
        not_listening: u32,
        /// The number of servers that are not ready, whose ports do not count.
        not_ready: usize,
    },
    /// No agent knows sessions of several ports.
    #[error(
        "the agents of all processing servers are of a version that selects single ports only: request the ports one by one, or update the processing servers"
    )]
    AgentsTooOld,
    /// Too many requests wait already.
    #[error("too many requests are waiting; try again later")]
    QueueFull,
    /// The pool has no port entry of that name and protocol.
    #[error("{field}no port entry has name and protocol as requested; the pool has {entries}")]
    UnknownPort {
        /// The element of `ports` with a colon; empty for a request without `ports`.
        field: String,
        /// The pool's entries.
        entries: String,
    },
    /// The request names an entry of companion ports.
    #[error(
        "{field}{name:?} is an entry of companion ports, which no request gets: clients with a session on the same server connect to them without asking; ask for one of {entries}"
    )]
    CompanionPort {
        /// The element of `ports` with a colon; empty for a request without `ports`.
        field: String,
        /// The entry that the request names.
        name: String,
        /// The pool's entries that requests get ports of.
        entries: String,
    },
    /// A field that asks for ports is wrong, or asks for more than there can be.
    #[error("{0}")]
    InvalidPorts(String),
    /// The pool has no processing server of the name in `server`.
    #[error("server: the pool has no processing server of this name; see servers in GET /v1/pool")]
    UnknownServer,
    /// No session has the id in `near`.
    #[error("near: no live session has this id; it may be over")]
    UnknownSession,
    /// The idempotency key is another request's.
    #[error(
        "idempotencyKey belongs to a different request that waits or has a live session; use a new key"
    )]
    KeyReused,
    /// The connection server stops.
    #[error("this connection server is shutting down; ask again and another one answers")]
    ShuttingDown,
}

fn all(count: u32) -> String {
    match count {
        1 => "the only matching port is".to_owned(),
        count => format!("all {count} matching ports are"),
    }
}

fn unconfirmed(silent: usize, refused: usize, reason: Option<&str>) -> String {
    let silent = (silent > 0).then(|| format!("{silent} did not confirm it in time"));
    let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
    let refused = (refused > 0).then(|| format!("{refused} refused it{reason}"));
    let all: Vec<String> = silent.into_iter().chain(refused).collect();
    all.join(", ")
}

fn kept(count: u32) -> String {
    match count {
        1 => "the only free matching port is".to_owned(),
        count => format!("all {count} free matching ports are"),
    }
}

fn not_listening(ports: u32, listening: u32) -> String {
    match listening {
        0 => format!("listens on none of the {ports} matching ports"),
        _ => format!(
            "does not listen on {ports} of the {} matching ports, and the others do not suffice",
            ports + listening
        ),
    }
}

fn not_listening_too(count: u32) -> String {
    match count {
        0 => String::new(),
        count => format!(
            ", and the workload does not listen on {count} more ({})",
            after_restart()
        ),
    }
}

fn not_ready_too(count: usize) -> String {
    match count {
        0 => String::new(),
        count => format!(", and {}", not_ready(count)),
    }
}

fn not_ready(count: usize) -> String {
    let servers = match count {
        1 => "1 processing server is".to_owned(),
        count => format!("{count} processing servers are"),
    };
    format!(
        "{servers} not ready: the workload says so itself (PUT /v1/readiness), or in a cluster, the pod is not Ready: look at the Status of kubectl get processingpools, at kubectl get pods and at the readinessProbe"
    )
}

/// Why ports that the workload listens on may count as others: an agent that was
/// restarted first learns of its sessions.
fn after_restart() -> String {
    let seconds = GONE_AFTER.as_secs();
    format!("or its agent was restarted: it offers ports again after {seconds} s")
}

impl Refusal {
    /// Static name, for metrics and problem types.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::AllInUse { .. } | Self::Kept(_) | Self::NotTogether { .. } => "no-free-port",
            Self::NotListening { .. } => "not-listening",
            Self::NotReady(_) => "not-ready",
            Self::Starting | Self::BeingReplaced | Self::Draining | Self::AgentsTooOld => {
                "no-server"
            }
            Self::NotSelected => "not-selected",
            Self::NotConfirmed { .. } => "not-confirmed",
            Self::QueueFull => "queue-full",
            Self::UnknownPort { .. } => "unknown-port",
            Self::CompanionPort { .. } => "companion-port",
            Self::UnknownServer => "unknown-server",
            Self::UnknownSession => "unknown-session",
            Self::InvalidPorts(_) => "invalid-field",
            Self::KeyReused => "key-reused",
            Self::ShuttingDown => "shutting-down",
        }
    }
}
