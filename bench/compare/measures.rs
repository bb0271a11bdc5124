//! All measures, under the names that reports and aims use.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use crate::lanes::Lane;
use crate::load::{self, Direction, Found, Times};
use crate::process::{Members, Ticks};
use crate::sink::Asking;
use crate::statistics::Conditions;

/// Parts of the capacity that latency is measured at; the middle one gives the
/// names in the table of aims.
pub const LOADS: [u8; 3] = [60, 30, 80];

/// One figure, and its aim in relation to the better rival's.
pub struct Metric {
    pub name: &'static str,
    pub unit: &'static str,
    /// Whether a larger figure is better.
    pub more: bool,
    pub aim: Option<f64>,
}

const fn metric(name: &'static str, unit: &'static str, more: bool, aim: f64) -> Metric {
    let aim = if aim > 0.0 { Some(aim) } else { None };
    Metric {
        name,
        unit,
        more,
        aim,
    }
}

/// Every figure in the order of reports.
pub const METRICS: &[Metric] = &[
    metric("bulk_1", "GB per CPU-s", true, 1.05),
    metric("bulk_16", "GB per CPU-s", true, 1.25),
    metric("bulk_4_up", "GB per CPU-s", true, 1.25),
    metric("latency_64_p50", "µs", false, 1.0),
    metric("latency_64_p99", "µs", false, 0.9),
    metric("latency_64_p999", "µs", false, 0.9),
    metric("latency_1024_p50", "µs", false, 1.0),
    metric("latency_1024_p99", "µs", false, 0.9),
    metric("latency_1024_p999", "µs", false, 0.9),
    metric("message", "per CPU-s", true, 1.05),
    metric("connect", "per CPU-s", true, 1.25),
    metric("udp", "per CPU-s", true, 1.15),
    metric("udp_burst", "per CPU-s", true, 2.0),
    metric("idle_session_bytes", "bytes", false, 0.1),
    metric("listen_port_bytes", "bytes", false, 0.05),
    metric("start_18000", "ms", false, 0.4),
    metric("reload_10000", "ms", false, 0.1),
    metric("reload_10000_removed", "ms", false, 0.0),
    metric("reload_10000_cut", "sessions", false, 0.0),
    metric("reload_10000_worst", "ms", false, 0.0),
    metric("reload_10000_worst_before", "ms", false, 0.0),
    metric("latency_64_load30_p50", "µs", false, 0.0),
    metric("latency_64_load30_p99", "µs", false, 0.0),
    metric("latency_64_load30_p999", "µs", false, 0.0),
    metric("latency_64_load80_p50", "µs", false, 0.0),
    metric("latency_64_load80_p99", "µs", false, 0.0),
    metric("latency_64_load80_p999", "µs", false, 0.0),
    metric("latency_1024_load30_p50", "µs", false, 0.0),
    metric("latency_1024_load30_p99", "µs", false, 0.0),
    metric("latency_1024_load30_p999", "µs", false, 0.0),
    metric("latency_1024_load80_p50", "µs", false, 0.0),
    metric("latency_1024_load80_p99", "µs", false, 0.0),
    metric("latency_1024_load80_p999", "µs", false, 0.0),
    metric("bulk_1_rate", "GB/s", true, 0.0),
    metric("bulk_16_rate", "GB/s", true, 0.0),
    metric("bulk_4_up_rate", "GB/s", true, 0.0),
    metric("message_rate", "per s", true, 0.0),
    metric("connect_rate", "per s", true, 0.0),
    metric("udp_rate", "per s", true, 0.0),
    metric("udp_burst_rate", "per s", true, 0.0),
];

/// One run, which gives one or more figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    Bulk1,
    Bulk16,
    Bulk4Up,
    /// Size of a message in bytes, and the load in percent of the capacity.
    Latency(usize, u8),
    Message,
    Connect,
    Udp,
    UdpBurst,
    IdleSessions,
    Start,
    Reload,
}

pub const MEASURES: &[Measure] = &[
    Measure::Bulk1,
    Measure::Bulk16,
    Measure::Bulk4Up,
    Measure::Latency(64, LOADS[0]),
    Measure::Latency(64, LOADS[1]),
    Measure::Latency(64, LOADS[2]),
    Measure::Latency(1024, LOADS[0]),
    Measure::Latency(1024, LOADS[1]),
    Measure::Latency(1024, LOADS[2]),
    Measure::Message,
    Measure::Connect,
    Measure::Udp,
    Measure::UdpBurst,
    Measure::IdleSessions,
    Measure::Start,
    Measure::Reload,
];

impl Measure {
    pub fn name(self) -> String {
        match self {
            Self::Bulk1 => "bulk_1".to_owned(),
            Self::Bulk16 => "bulk_16".to_owned(),
            Self::Bulk4Up => "bulk_4_up".to_owned(),
            Self::Latency(size, part) if part == LOADS[0] => format!("latency_{size}"),
            Self::Latency(size, part) => format!("latency_{size}_load{part}"),
            Self::Message => "message".to_owned(),
            Self::Connect => "connect".to_owned(),
            Self::Udp => "udp".to_owned(),
            Self::UdpBurst => "udp_burst".to_owned(),
            Self::IdleSessions => "idle_session_bytes".to_owned(),
            Self::Start => "start_18000".to_owned(),
            Self::Reload => "reload_10000".to_owned(),
        }
    }

    /// Whether `asked` means this: its name, one of its figures, or
    /// `latency_64` for all its loads.
    pub fn is_meant_by(self, asked: &str) -> bool {
        let name = self.name();
        let is_figure = asked
            .strip_prefix(&name)
            .is_some_and(|rest| ["_p50", "_p99", "_p999"].contains(&rest));
        let of_latency =
            matches!(self, Self::Latency(..)) && name.starts_with(&format!("{asked}_"));
        let of_start = self == Self::Start && asked == "listen_port_bytes";
        name == asked || is_figure || of_latency || of_start
    }

    /// Whether it is about a proxy's life, not about what it carries.
    pub fn is_lifecycle(self) -> bool {
        matches!(self, Self::IdleSessions | Self::Start | Self::Reload)
    }

    pub fn is_udp(self) -> bool {
        matches!(self, Self::Udp | Self::UdpBurst)
    }

    pub fn is_for(self, lane: Lane) -> bool {
        (lane.has_udp() || !self.is_udp()) && (lane != Lane::Direct || !self.is_lifecycle())
    }

    /// Whether it is repeated with the proxy on both cores.
    pub fn on_both_cores(self) -> bool {
        matches!(
            self,
            Self::Bulk16 | Self::Bulk4Up | Self::Message | Self::Connect | Self::Udp
        )
    }
}

/// One measurement of one lane.
#[derive(Clone, Debug)]
pub struct Sample {
    /// `one_core` or `two_cores`: the proxy's processors.
    pub pass: &'static str,
    pub round: usize,
    pub lane: Lane,
    pub measure: Measure,
    pub figures: BTreeMap<String, f64>,
    pub conditions: Conditions,
    /// Part of the time that the machine's processors were busy.
    pub busy: f64,
}

/// Figures, what decides whether they count, and how busy the machine was.
pub type Outcome = io::Result<(BTreeMap<String, f64>, Conditions, f64)>;

/// Loads `lane` as `measure` says. `capacity` is messages per second for each
/// size that latency is measured with.
pub fn run(
    measure: Measure,
    lane: Lane,
    proxy: Option<&Members>,
    sink: &mut Asking,
    capacity: &BTreeMap<usize, f64>,
    measured: Duration,
) -> Outcome {
    let times = Times {
        warm: measured / 5,
        measured,
    };
    let ticks = Ticks::now();
    let mut offered_rate = None;
    let found = match measure {
        Measure::Bulk1 => load::bulk(lane, proxy, sink, 1, Direction::Down, times)?,
        Measure::Bulk16 => load::bulk(lane, proxy, sink, 16, Direction::Down, times)?,
        Measure::Bulk4Up => load::bulk(lane, proxy, sink, 4, Direction::Up, times)?,
        Measure::Latency(size, part) => {
            let rate = capacity[&size] * f64::from(part) / 100.0;
            offered_rate = Some(rate);
            load::open_loop(lane, proxy, size, rate, times)?
        }
        Measure::Message => load::closed_loop(lane, proxy, 64, times)?,
        Measure::Connect => load::connect(lane, proxy, times)?,
        Measure::Udp => load::datagrams(lane, proxy, 32, 1, times)?,
        Measure::UdpBurst => load::datagrams(lane, proxy, 1, 16, times)?,
        Measure::IdleSessions | Measure::Start | Measure::Reload => {
            unreachable!("run by lifecycle")
        }
    };
    let (steal, busy) = ticks.since();
    let mut faults = found.faults;
    if load::settle(sink)? > 0 {
        faults += 1;
    }
    let conditions = Conditions {
        faults,
        steal,
        waited: found.waited_seconds / found.seconds,
        rate: found.rate(),
        direct_rate: None,
        offered_rate,
    };
    Ok((figures(measure, &found), conditions, busy))
}

fn figures(measure: Measure, found: &Found) -> BTreeMap<String, f64> {
    let name = measure.name();
    let mut figures = BTreeMap::new();
    if matches!(measure, Measure::Latency(..)) {
        for (suffix, part) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999)] {
            if let Some(value) = found.percentile(part) {
                figures.insert(format!("{name}_{suffix}"), value);
            }
        }
        return figures;
    }
    let is_bulk = matches!(measure, Measure::Bulk1 | Measure::Bulk16 | Measure::Bulk4Up);
    let scale = if is_bulk { 1e9 } else { 1.0 };
    figures.insert(format!("{name}_rate"), found.rate() / scale);
    if let Some(efficiency) = found.efficiency() {
        figures.insert(name, efficiency / scale);
    }
    figures
}
