//! Which workloads have not listened on their ports for so long that the status says
//! so. No client and no clock.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::plan::ObservedServer;
use crate::plan::status::NotListening;
use crate::session::{PoolState, ServerState};
use crate::table::Slot;

/// How long a workload must not listen before the status says so: programs that serve
/// one client close their socket with it.
const SILENCE: Duration = Duration::from_secs(20);

/// How long while the server has offered no port yet: programs load before they
/// listen.
const START: Duration = Duration::from_secs(120);

/// What the status says of workloads that do not listen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Told {
    /// That one listens on no port of an entry.
    pub(super) is_silent: bool,
    /// That one listens on some ports of an entry only.
    pub(super) is_partial: bool,
}

/// What is remembered of the workloads of a pool that do not listen.
#[derive(Clone, Debug, Default)]
pub(super) struct Silences {
    /// By the uid of their servers.
    of_servers: HashMap<String, OfServer>,
    /// Whether the pool was observed before.
    is_begun: bool,
}

#[derive(Clone, Debug, Default)]
struct OfServer {
    /// Whether a port of the server was offered, as far as this process has seen.
    has_offered: bool,
    /// What the status may have said of the server before this process has heard of it:
    /// then that has lasted.
    told: Told,
    silent: Vec<Silence>,
}

#[derive(Clone, Debug)]
struct Silence {
    ports: NotListening,
    since: Instant,
    has_lasted: bool,
}

impl Silences {
    /// Drops from `servers` what is reported of workloads that do not listen until that
    /// has lasted, and adds what has lasted of servers that are not in `live`: one
    /// answer that is missing takes nothing back. A controller that has just started goes
    /// on with what the status has `told`.
    /// Returns whether that may soon be otherwise.
    pub(super) fn keep_lasting(
        &mut self,
        servers: &mut [ObservedServer],
        live: Option<&PoolState>,
        told: Told,
        now: Instant,
    ) -> bool {
        let is_begun = std::mem::replace(&mut self.is_begun, true);
        let told = if is_begun { Told::default() } else { told };
        let mut former = std::mem::take(&mut self.of_servers);
        let reports = live.iter().flat_map(|live| &live.servers);
        let reports: HashMap<Slot, &ServerState> = reports
            .filter(|report| report.attached)
            .map(|report| (report.slot, report))
            .collect();
        let mut may_change = false;
        for server in servers {
            let mut known = former.remove(&server.uid).unwrap_or_else(|| OfServer {
                told,
                ..OfServer::default()
            });
            if server.end.is_some() || server.is_stopping {
                known.silent.clear();
            } else if let Some(report) = reports.get(&server.slot) {
                known.hear(report, &server.not_listening, now);
            }
            let mut silent = known.silent.iter();
            let lasting = silent.clone().filter(|it| it.has_lasted);
            server.not_listening = lasting.map(|it| it.ports.clone()).collect();
            may_change |= silent.any(|it| !it.has_lasted || !it.ports.is_partial);
            self.of_servers.insert(server.uid.clone(), known);
        }
        may_change
    }
}

impl OfServer {
    /// Takes in that the workload does not listen on the ports in `silent`, and what
    /// else `report` says of the server.
    fn hear(&mut self, report: &ServerState, silent: &[NotListening], now: Instant) {
        let told = std::mem::take(&mut self.told);
        self.has_offered |= report.ports.iter().any(|ports| ports.offered() > 0);
        let limit = if self.has_offered { SILENCE } else { START };
        let former = std::mem::take(&mut self.silent);
        let silent = silent.iter().map(|ports| {
            // One that has offered some of its ports begins anew when it offers none.
            let known = former.iter().find(|it| it.ports == *ports);
            let since = known.map_or(now, |it| it.since);
            let is_told = if ports.is_partial {
                told.is_partial
            } else {
                told.is_silent
            };
            Silence {
                ports: ports.clone(),
                since,
                has_lasted: is_told
                    || known.is_some_and(|it| it.has_lasted)
                    || now.duration_since(since) >= limit,
            }
        });
        self.silent = silent.collect();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::plan::End;
    use crate::pool::PortProtocol;

    /// Some seconds of one pool.
    struct World {
        silences: Silences,
        begin: Instant,
    }

    impl World {
        fn new() -> Self {
            Self {
                silences: Silences::default(),
                begin: Instant::now(),
            }
        }

        /// Which of two servers are named at `second`. Each has so many ports offered
        /// and so many silent, or is not attached; `None` where no one has answered.
        fn named(
            &mut self,
            second: u64,
            is_told: bool,
            servers: Option<[Option<(u32, u32)>; 2]>,
        ) -> Vec<u32> {
            let now = self.begin + Duration::from_secs(second);
            let mut observed = observed(servers);
            let live = servers.map(live);
            let told = told(is_told);
            self.silences
                .keep_lasting(&mut observed, live.as_ref(), told, now);
            let named = observed.iter().filter(|it| !it.not_listening.is_empty());
            named.map(|server| server.slot.0).collect()
        }
    }

    /// That the status says of a workload that it listens on none, if it `is_told`.
    fn told(is_told: bool) -> Told {
        Told {
            is_silent: is_told,
            is_partial: false,
        }
    }

    fn live(servers: [Option<(u32, u32)>; 2]) -> PoolState {
        let servers = (0..).zip(servers).map(|(slot, ports)| {
            let (free, silent) = ports.unwrap_or_default();
            let state = json!({
                "slot": slot, "server": "x", "attached": ports.is_some(), "draining": false,
                "sessions": 0,
                "ports": [{
                    "name": "main", "protocol": "TCP", "free": free, "held": 0, "busy": 0,
                    "lingering": 0, "notListening": silent,
                }],
            });
            serde_json::from_value(state).unwrap()
        });
        PoolState {
            servers: servers.collect(),
            ..PoolState::default()
        }
    }

    fn observed(servers: Option<[Option<(u32, u32)>; 2]>) -> Vec<ObservedServer> {
        let servers = servers.unwrap_or_default();
        let observed = (0..).zip(servers).map(|(slot, ports)| ObservedServer {
            slot: Slot(slot),
            uid: slot.to_string(),
            not_listening: ports
                .filter(|(_, silent)| *silent > 0)
                .map(|(free, _)| NotListening {
                    entry: "main".to_owned(),
                    protocol: PortProtocol::TCP,
                    is_partial: free > 0,
                })
                .into_iter()
                .collect(),
            ..ObservedServer::default()
        });
        observed.collect()
    }

    const LISTENS: Option<(u32, u32)> = Some((2, 0));
    const SILENT: Option<(u32, u32)> = Some((0, 2));
    const PARTLY: Option<(u32, u32)> = Some((1, 1));

    #[test]
    fn each_server_is_named_when_its_own_silence_has_lasted() {
        let mut world = World::new();
        assert!(world.named(0, false, Some([LISTENS, LISTENS])).is_empty());
        assert!(world.named(1, false, Some([SILENT, LISTENS])).is_empty());
        assert!(world.named(20, false, Some([SILENT, SILENT])).is_empty());
        // That the status names one shortens the time of no other.
        assert_eq!(world.named(21, true, Some([SILENT, SILENT])), [0]);
        assert_eq!(world.named(39, true, Some([SILENT, SILENT])), [0]);
        assert_eq!(world.named(40, true, Some([SILENT, SILENT])), [0, 1]);
        assert_eq!(world.named(41, true, Some([LISTENS, SILENT])), [1]);
        assert_eq!(world.named(42, true, Some([SILENT, SILENT])), [1]);
    }

    #[test]
    fn a_missing_answer_takes_nothing_back_and_names_no_one() {
        let mut world = World::new();
        world.named(0, false, Some([LISTENS, LISTENS]));
        world.named(1, false, Some([SILENT, LISTENS]));
        world.named(15, false, Some([SILENT, SILENT]));
        assert_eq!(world.named(25, false, Some([SILENT, SILENT])), [0]);
        assert_eq!(world.named(50, true, None), [0], "no one answers");
        assert_eq!(world.named(51, true, Some([None, None])), [0], "just begun");
        assert_eq!(world.named(52, true, Some([LISTENS, None])), [0; 0]);
        assert_eq!(world.named(53, true, None), [0; 0]);
        // One that has ended is not waited for.
        world.named(60, false, Some([SILENT, SILENT]));
        assert_eq!(world.named(90, false, Some([SILENT, SILENT])), [0, 1]);
        let mut servers = observed(None);
        servers[0].end = Some(End {
            is_success: false,
            cause: "Evicted".to_owned(),
        });
        let now = world.begin + Duration::from_secs(91);
        let told = told(true);
        world.silences.keep_lasting(&mut servers, None, told, now);
        assert!(servers[0].not_listening.is_empty());
        assert!(!servers[1].not_listening.is_empty());
    }

    #[test]
    fn a_program_has_time_to_load() {
        let mut world = World::new();
        for second in [0, 60, 119] {
            assert!(
                world
                    .named(second, false, Some([SILENT, SILENT]))
                    .is_empty()
            );
        }
        assert_eq!(world.named(120, false, Some([SILENT, PARTLY])), [0]);
        assert_eq!(world.named(140, true, Some([SILENT, PARTLY])), [0, 1]);
        // It offers none where it offered some: that is news.
        assert_eq!(world.named(141, true, Some([SILENT, SILENT])), [0]);
        assert_eq!(world.named(161, true, Some([SILENT, SILENT])), [0, 1]);
    }

    #[test]
    fn a_new_controller_goes_on_with_what_the_status_says() {
        for is_told in [false, true] {
            let mut world = World::new();
            // The second server is not attached yet when the first one is heard of.
            let named = world.named(0, is_told, Some([SILENT, None]));
            assert_eq!(named == [0], is_told);
            let named = world.named(1, is_told, Some([SILENT, SILENT]));
            assert_eq!(named == [0, 1], is_told);
            world.named(2, is_told, Some([LISTENS, SILENT]));
            let named = world.named(3, is_told, Some([SILENT, SILENT]));
            assert_eq!(named == [1], is_told, "only once");
        }
    }
    #[test]
    fn what_the_status_says_later_or_in_part_shortens_no_time() {
        let mut world = World::new();
        let now = world.begin;
        let silences = &mut world.silences;
        silences.keep_lasting(&mut [], None, Told::default(), now);
        let new = world.named(1, true, Some([SILENT, LISTENS]));
        assert_eq!(new, [0; 0], "they are new");
        let named = World::new().named(0, true, Some([PARTLY, SILENT]));
        assert_eq!(named, [1], "it was another that was named");
    }
}
