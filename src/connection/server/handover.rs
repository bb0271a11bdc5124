//! Everything of a running connection server from one process to the next: what
//! is done here before, while and after [`handover`]'s protocol runs. This side
//! decides which part stands still and when; it alone pauses changes and the
//! data plane.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{InitialState, Server};
use crate::connection::control::{Control, Imported, Pause};
use crate::connection::handover::{self, Export, Import};
use crate::connection::{Error, Options};
use crate::table::Table;

/// How long a successor lets requests queue until its agents are attached.
const ATTACH_LIMIT: Duration = Duration::from_secs(2);

/// How often it checks whether they are.
const ATTACH_CHECK: Duration = Duration::from_millis(2);

/// Everything of a running predecessor, if there is one of the pool of `first`.
pub(super) async fn import(
    options: &Options,
    first: &Table,
) -> Result<Option<handover::State>, Error> {
    let Some(path) = options.handover.clone() else {
        return Ok(None);
    };
    let pool_uid = first.pool_uid.clone();
    let importing = tokio::task::spawn_blocking(move || {
        let Some(import) = Import::request(&path)? else {
            return Ok(None);
        };
        if import.state().table.pool_uid != pool_uid {
            return Err(handover::Error::Malformed(
                "the running connection server is another pool's",
            ));
        }
        import.complete().map(Some)
    });
    let imported = importing.await.expect("importing does not panic")?;
    Ok(imported)
}

impl InitialState {
    /// Has `control` go on with what a predecessor had.
    pub(super) fn imported(
        state: handover::State,
        control: &Control,
    ) -> Result<Self, handover::Error> {
        let Imported { connections, flows } = control.import(state.control, &state.table);
        info!(connections, flows, "taken over from the former process");
        Ok(Self {
            agents: state.agents,
            table: state.table,
            load_sharing: state.load_sharing.into(),
            admin: TcpListener::from_std(state.admin.into())?,
            is_successor: true,
        })
    }
}

impl Server {
    /// Waits until the agents are attached, but not for long: before that, a
    /// successor would answer that nothing is free.
    pub(super) async fn until_attached(&self) {
        let is_attached = || {
            let table = self.table.borrow();
            let mut rows = table.rows.iter().filter(|row| row.address.is_some());
            self.parts.allocation.inspect(|queue| {
                rows.all(|row| {
                    let server = queue.servers().get(row.slot);
                    server.is_some_and(|server| server.attached && !server.ports.is_empty())
                })
            })
        };
        let deadline = Instant::now() + ATTACH_LIMIT;
        while !is_attached() && Instant::now() < deadline {
            tokio::time::sleep(ATTACH_CHECK).await;
        }
    }

    /// Hands everything over to the process at the other end of `stream`.
    /// Returns whether that process has it now; this one must only close what
    /// is left then.
    pub(in crate::connection) async fn hand_over(&mut self, stream: UnixStream) -> bool {
        let accepting = tokio::task::spawn_blocking(move || Export::accept(stream));
        let export = match accepting.await.expect("accepting does not panic") {
            Ok(export) => export,
            Err(error) => {
                warn!(%error, "hand-over refused");
                return false;
            }
        };
        info!("a successor requests a hand-over");
        self.stop_serving().await;
        let pause = self.parts.control.pause().await;
        let started = Instant::now();
        match self.export(export, &pause).await {
            Ok(()) => {
                info!(paused = ?started.elapsed(), "handed over");
                pause.make_permanent();
                true
            }
            Err(error) => {
                drop(pause);
                self.serve();
                warn!(paused = ?started.elapsed(), %error, "hand-over failed; this connection server goes on");
                false
            }
        }
    }

    /// Pauses the data plane and gives everything away, or goes on.
    async fn export(&self, mut export: Export, pause: &Pause) -> Result<(), handover::Error> {
        let (load_sharing, admin) = (self.load_sharing.try_clone()?, self.admin.try_clone()?);
        let table = self.table.borrow().clone();
        let control = self.parts.control.export(pause)?;
        let state = handover::State {
            agents: self.parts.agents.export(),
            table,
            load_sharing: load_sharing.into(),
            admin,
            control,
        };
        let exporting = tokio::task::spawn_blocking(move || (export.complete(&state), state));
        let (exported, state) = exporting.await.expect("exporting does not panic");
        if exported.is_err() {
            self.parts.control.resume(state.control.forwarder);
        }
        exported
    }

    /// Closes what is left after everything was handed over, and sends nothing
    /// to agents or clients.
    pub(in crate::connection) fn retire(&self) {
        self.stopping.cancel();
        self.parts.agents.abandon();
        self.parts.forwarder.shutdown();
    }

    pub(in crate::connection) fn has_retired(&self) -> bool {
        self.stopping.is_cancelled()
    }
}
