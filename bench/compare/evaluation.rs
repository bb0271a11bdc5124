//! Samples to figures and ratios.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::lanes::Lane;
use crate::measures::{METRICS, Metric, Sample};
use crate::statistics::{self, Discard, Estimate};

/// One figure of one lane over the rounds that count.
#[derive(Debug)]
pub struct Figure {
    /// The figure in each round.
    pub values: BTreeMap<usize, f64>,
    pub median: f64,
    pub minimum: f64,
    pub maximum: f64,
}

/// A ratio of portpool's figure to another lane's.
#[derive(Debug)]
pub struct Ratio {
    pub estimate: Estimate,
    pub to: Lane,
}

/// The figures of a pass, and the samples that do not count.
#[derive(Default)]
pub struct Evaluation {
    pub figures: BTreeMap<(&'static str, Lane), Figure>,
    pub discarded: BTreeMap<(Lane, String, Discard), usize>,
}

/// Discards the samples that do not count and groups the others.
pub fn evaluate(samples: &[Sample], pass: &str) -> Evaluation {
    let of_pass: Vec<&Sample> = samples
        .iter()
        .filter(|sample| sample.pass == pass)
        .collect();
    let direct: BTreeMap<_, f64> = of_pass
        .iter()
        .filter(|sample| sample.lane == Lane::Direct && sample.conditions.faults == 0)
        .map(|sample| ((sample.round, sample.measure), sample.conditions.rate))
        .collect();
    let mut evaluation = Evaluation::default();
    let mut values: BTreeMap<(&'static str, Lane), BTreeMap<usize, f64>> = BTreeMap::new();
    for sample in of_pass {
        let mut conditions = sample.conditions;
        if sample.lane != Lane::Direct {
            conditions.direct_rate = direct.get(&(sample.round, sample.measure)).copied();
        }
        if let Some(why) = statistics::discard(&conditions) {
            let key = (sample.lane, sample.measure.name(), why);
            *evaluation.discarded.entry(key).or_default() += 1;
            continue;
        }
        for metric in METRICS {
            if let Some(value) = sample.figures.get(metric.name) {
                let of_lane = values.entry((metric.name, sample.lane)).or_default();
                of_lane.insert(sample.round, *value);
            }
        }
    }
    for (key, values) in values {
        let all: Vec<f64> = values.values().copied().collect();
        let Some(median) = statistics::median(&all) else {
            continue;
        };
        let figure = Figure {
            median,
            minimum: all.iter().copied().fold(f64::INFINITY, f64::min),
            maximum: all.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            values,
        };
        evaluation.figures.insert(key, figure);
    }
    evaluation
}

impl Evaluation {
    /// The ratio of portpool to the rival whose median is better.
    pub fn ratio(&self, metric: &Metric) -> Option<Ratio> {
        let rivals = self
            .figures
            .iter()
            .filter(|((name, lane), _)| *name == metric.name && lane.is_rival());
        let ((_, to), _) = rivals.max_by(|(_, left), (_, right)| {
            let order = left.median.total_cmp(&right.median);
            if metric.more { order } else { order.reverse() }
        })?;
        self.ratio_to(metric, *to)
    }

    /// The ratio of portpool to `to`, over the rounds in which both count.
    pub fn ratio_to(&self, metric: &Metric, to: Lane) -> Option<Ratio> {
        let ours = self.figures.get(&(metric.name, Lane::Portpool))?;
        let theirs = self.figures.get(&(metric.name, to))?;
        let ratios: Vec<f64> = ours
            .values
            .iter()
            .filter_map(|(round, value)| {
                let other = theirs.values.get(round)?;
                (*other > 0.0).then(|| value / other)
            })
            .collect();
        let estimate = statistics::bootstrap(&ratios)?;
        Some(Ratio { estimate, to })
    }
}

impl Metric {
    pub fn meets(&self, ratio: f64) -> Option<bool> {
        self.aim.map(|aim| {
            if self.more {
                ratio >= aim
            } else {
                ratio <= aim
            }
        })
    }

    pub fn aim_text(&self) -> String {
        let sign = if self.more { "≥" } else { "≤" };
        self.aim
            .map_or_else(|| "-".to_owned(), |aim| format!("{sign} {aim}"))
    }
}

/// A round in one line: the ratios of portpool's figures to the better rival's,
/// or to the base where no rival runs.
pub fn brief(samples: &[Sample]) -> String {
    let pass = samples.first().map_or("", |sample| sample.pass);
    let evaluation = evaluate(samples, pass);
    let mut text = String::new();
    for metric in METRICS {
        let to_base = evaluation.ratio_to(metric, Lane::PortpoolBase);
        for ratio in [evaluation.ratio(metric), to_base].into_iter().flatten() {
            let wanted = metric.aim.is_some() || pass != "one_core";
            if wanted {
                let base = if ratio.to == Lane::PortpoolBase {
                    "/base"
                } else {
                    ""
                };
                let _ = write!(text, "{}{base} {:.2}  ", metric.name, ratio.estimate.median);
            }
        }
    }
    let mut discarded: BTreeMap<&str, usize> = BTreeMap::new();
    for ((_, _, why), count) in &evaluation.discarded {
        *discarded.entry(why.name()).or_default() += count;
    }
    for (why, count) in discarded {
        let _ = write!(text, "({count} discarded: {why}) ");
    }
    text
}

/// `value` with three significant digits.
pub fn rounded(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 || size == 0.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}
