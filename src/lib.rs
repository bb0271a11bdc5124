//! portpool gives a client *its own port on its own server for a while*.
//!
//! A `ProcessingPool` is N processing servers behind a connection server. A
//! client asks the one well-known load-sharing port, receives a connection
//! port, connects there, and is bridged to the processing server that selected
//! the port. Source: US 8,544,018 B2, claim 1, whose words the types use.
//!
//! # The processes
//!
//! ```text
//!           ┌ connection server, one or more ──────────┐        ┌ processing server, N ┐
//! client ←HTTP→ load_sharing ←→ agents ←──────────────────gRPC──→ agent                │
//!           │        sessions, changed by control      │        │   │ opens? listens?  │
//!           │           ↑ may this client connect?     │        │   ↓                  │
//! client ←TCP, UDP→ forward, a thread per processor ←──TCP, UDP─→ workload             │
//!           └──────────────────────────────────────────┘        └──────────────────────┘
//!              ↑ table                                             ↑ table   ↑ starts, stops
//! controller: watches pools, plans, writes the table into a ConfigMap ───────┘
//! ```
//!
//! The data plane has its own threads. The rest of a connection server, and the
//! controller, are tasks of a runtime with a thread per processor. An agent has one
//! thread, because a machine may have many.
//!
//! A processing server is a pod of the Kubernetes cluster. `portpool local` does
//! the controller's work on one machine: processes instead of pods, and a file
//! instead of the ConfigMap. Who decides what:
//!
//! - **The agent decides the port** of its processing server. It alone knows
//!   which ports are free there, so the connection servers of a pool need not
//!   agree among themselves.
//! - **The connection server decides the processing server**, from counts that
//!   the agents stream to it.
//! - **The controller decides the table.** Nothing in the data path waits for
//!   it, or for the API server; only a server that is marked as not ready when
//!   they fail gets no new sessions until they are back.
//!
//! # A session's life
//!
//! 1. `connection::load_sharing` receives `POST /v1/sessions` and chooses a
//!    processing server, or lets the request wait in a queue.
//! 2. `connection::agents` sends `Select` to that server's agent.
//! 3. The agent's book takes the port that has been free for longest. The
//!    session is *held*; the agent reports it to every connection server.
//! 4. The client connects to the port. `forward` asks the gate
//!    (`connection::sessions`). It admits the client of a known session and
//!    reports `Opened` to the agent; for an unknown one it asks the agent first.
//! 5. The session is *busy* while any connection server has a connection of it.
//! 6. After the last `Closed` it *lingers*: the client may come back. If no
//!    connection has claimed it, it is held again until the claim deadline.
//! 7. The agent sends `End` to all connection servers; each closes what is
//!    left of the session and answers `Ended`.
//! 8. When all have answered, the port is free. A connection server that is dead
//!    or out of reach counts as answered once its connections must be closed.
//!
//! A connection port serves one session at a time: that is what may never
//! break. `tests/it/model.rs` plays random orders of events, crashes included,
//! and checks it.
//!
//! # Where to look
//!
//! | question | file |
//! |---|---|
//! | Which request gets a free port, who waits, who leaves? | the rules in `connection/load_sharing/queue.rs` |
//! | Why was this request refused? | `refusal.rs` and `problem.rs` beside it have the reasons |
//! | Which processing server does a request get? | `servers.rs` and `policy.rs` beside it |
//! | May this client use this port? | `connection/sessions/gate.rs` |
//! | What happens to a datagram of a client whose session ended? | `forward/udp/datagrams.rs`; `connection/sessions/gate.rs` decides |
//! | When does a connection or a flow end, and how? | the diagrams in `forward/tcp.rs` and `forward/udp.rs` |
//! | Who frees a port, also after a crash? | the diagram in `agent/book.rs`; `connection_servers.rs` below it when a connection server crashed, `attachment.rs` when the agent did |
//! | Which pods start and stop, also when a node is lost? | `plan.rs`, from what `operator/observation.rs` makes of their pods |
//! | Which server is not ready? | the same for its pod; `agent/workload_api.rs` for what its workload says |
//! | What may a workload see and decide itself? | `agent/workload_api.rs`; `client/workload.rs` asks there |
//! | Which session waits for its workload to confirm it? | `agent/book/offers.rs`; rule 10 in `queue.rs` |
//! | Which connection ports does a slot get? | `plan/ports.rs` |
//! | How does a new process take over the connections? | `connection/handover.rs` |
//!
//! # Glossary
//!
//! - **slot**: a place in a pool, numbered from 0. It keeps its connection
//!   ports when its pod is replaced.
//! - **processing server**: the pod (or processes) in a slot: one workload and
//!   one agent.
//! - **workload**: the user's program. It listens on the server ports.
//! - **agent**: portpool's sidecar beside a workload. It owns the sessions.
//! - **connection server**: the process that clients reach. A pool may have
//!   several.
//! - **load-sharing port**: the connection server's HTTP port, where clients ask for sessions.
//! - **connection port**: a port of the connection server that leads to one
//!   port of one processing server.
//! - **table**: the port-relationship table, which says which connection port
//!   leads where.
//! - **generation**: the table's version. It only grows, and readers refuse
//!   an older one.
//! - **entry**: a group of ports of the pool with one name and the same settings.
//! - **session**: one client's right to one connection port, or several on one
//!   server, for a while.
//! - **companion port**: a port without sessions of its own, open to clients that have
//!   a session on the same server.
//! - **free** is a connection port that the next request may get; **held** one
//!   whose client has not connected yet; **busy** one with open connections;
//!   **lingering** one whose client may come back; **not listening** one whose
//!   workload does not listen.
//! - **unavailable** is a connection port that a connection server cannot listen on.
//! - **offered** is a session that the workload has yet to confirm, where the pool
//!   asks it. Its port counts as held.
//! - **claim**: the client's first connection of a session, due before the
//!   claim deadline. One that does not reach the workload, or that carries nothing
//!   from the client and is soon gone, does not count.
//! - **book**: the agent's record of its ports and sessions.
//! - **trial**: the time after a session in which a port must show that its socket
//!   does not go with the session, before it is free again.
//! - **spent**: a server that has had its sessions (`recycle`) gets no new ones, and is
//!   replaced when it is empty.
//! - **host identity**: the address that a connection server listens on, with
//!   its host and boot. No two processes have the same at a time, so a new
//!   process that shows it proves that the former one is dead.
//! - **gate**: what the data plane asks whether a client may use a port. Its
//!   answer is a **decision**.
//! - **pending**: a client whose decision waits for the agent's answer.
//! - **flow**: what the data plane forwards between one client and one port: a TCP
//!   connection, or the datagrams from one of the client's addresses.
//! - **drain**: to take nothing new while what is there goes on, up to a
//!   deadline.
//! - **hand-over**: a new process takes the connections of the old one: the
//!   old one exports a **snapshot**, the new one imports it.
//!
//! # The modules
//!
//! A module uses those behind its arrow, and no other of this crate;
//! `src/main.rs` picks the role. `tests/it/layering.rs` reads this drawing and
//! fails when the code differs, either way. A pure module decides from values
//! alone: no socket, file, clock, lock or await. "no tokio" means no async code.
//!
//! ```text
//! operator     → pool, table, session, plan, cluster, client, admin  a role: the controller
//! connection   → pool, table, session, selection, cluster, follow, admin, forward  a role; its head draws its inside
//! agent        → pool, table, session, selection, follow, admin, sock_diag  a role
//! local        → pool, table, session, plan, manifest, follow, client, forward, output, sock_diag  a whole pool on one machine
//! client       → pool, session                  request, connect, release; workload: the agent's local API
//! echo         a workload to try things with
//!
//! forward      → pool, table, sock_diag          the data plane: epoll, own threads; no tokio
//! plan         → pool, table                     pure: the next table, which pods start and stop, their objects
//! manifest     → pool, plan                      YAML files
//! follow       → table, cluster                  a file or ConfigMap as a watch of the last valid table
//! cluster      kube's client, and how watches retry
//! selection    → pool, table, session            the protocol between connection servers and agents
//! admin        → table, session                  /livez, /readyz, /metrics, streams of events
//! session      → pool, table                     the types of the load-sharing API and of agents' local API
//! table        → pool                            the port-relationship table; no tokio
//! pool         the ProcessingPool resource; no tokio
//! sock_diag    questions to the kernel about sockets; no tokio
//! signals      SIGINT, SIGTERM and SIGHUP
//! telemetry    → output                       logs
//! output       lines that a slow reader does not hold up
//!
//! agent::book                          pure
//! connection::load_sharing::policy     pure
//! connection::load_sharing::queue      pure
//! connection::load_sharing::refusal    pure
//! connection::load_sharing::servers    pure
//! connection::handover::values         pure, with descriptors as values
//! local::container                     pure
//! local::ignored                       pure
//! ```

pub mod admin;
pub mod agent;
pub mod client;
pub mod cluster;
pub mod connection;
pub mod echo;
pub mod follow;
pub mod forward;
pub mod local;
pub mod manifest;
pub mod operator;
pub mod output;
pub mod plan;
pub mod pool;
pub mod selection;
pub mod session;
pub mod signals;
pub mod sock_diag;
pub mod table;
pub mod telemetry;
