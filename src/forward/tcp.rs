//! TCP through a connection port: each connection is two sockets and two
//! directions.
//!
//! ```text
//!   accepted ──Refuse, no place──────────────────────────────→ reset
//!    │   │                                                       ↑
//!    │   └─Ask─→ pending ──Refuse, 2 s, cut──────────────────────┤
//!    │ Admit        │ Admit                                      │
//!    ↓              ↓                                            │
//!   connecting ─────────── unreachable, 3 s, client lost, cut ───┤
//!    │ connected                                                 │
//!    ↓                                                           │
//!   open ───────────────── idle time, cut ───────────────────────┤
//!    │   │                                                       │
//!    │   └─one side lost─→ final flush ─ delivered, 5 s without ─┤
//!    │ one end                  ↑        progress, 30 s, cut     │
//!    ↓                          │                                │
//!   half-closed ─one side lost──┤                                │
//!    │   └──────────────────────┼─ idle time, cut ───────────────┘
//!    │ the other end            │
//!    ↓                          │
//!   finished ────one side lost──┘
//!    │
//!    └─ delivered, 30 s, cut ─→ closed
//! ```
//!
//! - *accepted*: `Streams::accept` has taken the client from its port's queue
//!   and asks the gate.
//! - *pending*: the gate asks control for the client's session; the client is
//!   in `PendingClients`, outside this module. `Forwarder::answer` decides.
//! - *connecting*: `Streams::connect` has begun to connect to the server. What
//!   the client has sent may already be held for it.
//! - *open*: bytes move both ways; each event of a socket, and each poll of a
//!   busy one, gives the connection a turn.
//! - *half-closed*: one peer has ended its sending, and the other one has
//!   received all of it and the end.
//! - *finished*: both directions have ended. The sockets stay open until both
//!   peers have acknowledged everything, as the kernel may discard what closed
//!   sockets hold. The 30 s count from the last event before that.
//! - *final flush*: one side was reset or has timed out, while the other one
//!   lives. What was read of the lost side goes to the other one, which is reset
//!   when its peer has acknowledged it. Without a side that lives, and above
//!   1024 final flushes of a thread, it ends at once.
//! - *reset* and *closed*: the sockets are closed, with a reset or in order;
//!   after that `Gate::closed` reports the end of an admitted client.
//!
//! Bytes keep their order, and an urgent one its place: `EPOLLPRI` reports it,
//! a read or a splice stops there, and it is sent as urgent.
//!
//! Events move the arrows without a time, and the thread's tick those with
//! one. A lost peer that sends no reset is found by the kernel's probes
//! (`liveness`). `Streams::end` is the only way out of *connecting*, *open*,
//! *half-closed* and *finished*; `FinalFlushes::end` is the only way out of
//! *final flush*. An export takes out all of them, as they are.
//!
//! - `acceptor`: the ports; `streams`: the arrows; `connection`: one
//!   connection at an event; `direction`: how bytes move one way;
//! - `coalescing`: reading busy sources less often; `pipes`: what their bytes
//!   move through; `final_flush`; `send_queue`: what a peer has not acknowledged;
//! - `stream`: a socket, real or of a test; `liveness`; `proxy_protocol`.

mod acceptor;
mod coalescing;
pub(super) mod connection;
mod direction;
mod final_flush;
mod liveness;
pub(super) mod pipes;
mod proxy_protocol;
mod send_queue;
pub(super) mod stream;
pub(super) mod streams;
