//! portpool gives a client *its own port on its own server for a while*.
//!
//! A `ProcessingPool` is N processing servers behind a connection server. A
//! client asks one well-known load-sharing port, is told a connection port,
//! connects there, and is bridged to the processing server that chose the
//! port. Source: US 8,544,018 B2, claim 1, whose words the types use.
//!
//! # The parts
//!
//! ```text
//! ProcessingPool ─plan→ port-relationship table ─follow→ connection server, agents
//!
//! client ─POST /v1/sessions→ load sharing ─Select→ agent ─port→ client
//! client ─bytes→ connection port ─forward⇄ processing server
//! connection server ─opened, closed→ agent     agent ─counts, sessions→ connection servers
//! ```
//!
//! Who decides what:
//! - **The agent beside a workload decides the port.** It alone knows which
//!   are free, so any number of connection servers can serve a pool.
//! - **The connection server decides the server**, from counts that agents
//!   stream to it.
//! - **The table decides what leads where**; nothing in the data path waits
//!   for whoever writes it.
//!
//! # The modules
//!
//! An arrow means "uses". `tests/it/layering.rs` reads this drawing: it fails on
//! an arrow that the code uses and that is not drawn, and the other way round.
//! A module that is pure, or marked "no tokio", waits for nothing.
//!
//! ```text
//! pool         the ProcessingPool resource; no tokio
//! table        → pool                           no tokio
//! session      → pool, table
//! selection    → pool, table, session            the protocol between connection servers and agents
//! sock_diag    questions to the kernel about sockets; no tokio
//! plan         → pool, table                     pure
//! manifest     → pool, plan                      YAML files
//! cluster      kube's client, and how watches retry
//! follow       → table, cluster                  a file or ConfigMap as a watch
//! admin        → table                           /livez, /readyz, /metrics
//! forward      → pool, table, sock_diag          the data plane: epoll, own threads; no tokio
//! connection   → pool, table, session, selection, cluster, follow, admin, forward  a role
//! agent        → pool, table, selection, follow, admin, sock_diag  a role
//! client       → pool, session
//! operator     → pool, table, session, plan, cluster, client, admin  a role
//! local        → pool, table, session, plan, manifest, follow, client, forward
//! echo, telemetry
//! agent::book                          pure
//! connection::load_sharing::policy     pure
//! connection::load_sharing::servers    pure
//! connection::handover::values         pure
//! local::container                     pure
//! ```
//!
//! Decisions are functions of values: `plan`, `connection::load_sharing::policy`,
//! `connection::load_sharing::servers` and `agent::book` know no socket, clock or
//! lock. I/O is around them.
//!
//! # What may not happen
//!
//! A connection port serves one session at a time. A port is freed only when
//! every connection server has said that no connection of its session is left,
//! or has been out of reach for longer than it keeps connections itself. A
//! connection server that hands over to a new process (`connection::handover`)
//! has said nothing of the kind: to agents it is the same one.
//! `tests/it/model.rs` plays orders of events against these rules.

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
pub mod plan;
pub mod pool;
pub mod selection;
pub mod session;
pub mod sock_diag;
pub mod table;
pub mod telemetry;
