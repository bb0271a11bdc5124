//! Statistics of samples: medians, ratios with an interval, and which samples
//! count. Pure: no clock, and randomness from a fixed seed.

use fastrand::Rng;

/// Resamples of a bootstrap: the bounds of a 95 % interval move by less than
/// a hundredth of its width from one seed to the next.
const RESAMPLES: usize = 4_000;

/// Most of a sample's time that the hypervisor may have taken away.
pub const MOST_STEAL: f64 = 0.2;

/// Most of a sample's time that a proxy with a core of its own may have waited
/// for it: its own threads wait for each other a little.
pub const MOST_WAITED: f64 = 0.25;

/// A median with its interval: at 95 % it lies between `low` and `high`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub median: f64,
    pub low: f64,
    pub high: f64,
    /// Number of rounds that it is made of.
    pub rounds: usize,
}

/// The conditions that decide whether a sample counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conditions {
    /// Errors, lost messages, wrong bytes.
    pub faults: usize,
    /// Part of the time taken away by the hypervisor, 0 to 1.
    pub steal: f64,
    /// Part of the time that the proxy was kept from its core, 0 to 1.
    pub waited: f64,
    /// The rate per second that the lane carried.
    pub rate: f64,
    /// The rate per second of the direct lane in the same round: the most that
    /// generator and sink can do, because no proxy is in between.
    pub direct_rate: Option<f64>,
    /// The rate per second that was to be carried, if it was set.
    pub offered_rate: Option<f64>,
}

/// Why a sample does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Discard {
    /// Something went wrong in the lane.
    Faults,
    /// The direct lane did less than this one, so the generator was the limit.
    DirectSaturated,
    /// The lane fell behind what was offered.
    Overload,
    /// The hypervisor took the machine away.
    Steal,
    /// Other programs used the proxy's core.
    OtherLoad,
}

impl Discard {
    pub fn name(self) -> &'static str {
        match self {
            Self::Faults => "faults",
            Self::DirectSaturated => "direct lane saturated",
            Self::Overload => "fell behind the offered rate",
            Self::Steal => "steal",
            Self::OtherLoad => "other load",
        }
    }
}

/// Whether a sample taken under `conditions` is to be left out.
pub fn discard(conditions: &Conditions) -> Option<Discard> {
    /// A set rate is reached up to what is under way at the end.
    const REACHED: f64 = 0.95;
    if conditions.faults > 0 {
        return Some(Discard::Faults);
    }
    if conditions.steal > MOST_STEAL {
        return Some(Discard::Steal);
    }
    if conditions.waited > MOST_WAITED {
        return Some(Discard::OtherLoad);
    }
    if let Some(offered) = conditions.offered_rate {
        let falls_behind = |rate: f64| rate < offered * REACHED;
        if conditions.direct_rate.is_some_and(falls_behind) {
            return Some(Discard::DirectSaturated);
        }
        if falls_behind(conditions.rate) {
            return Some(Discard::Overload);
        }
    } else if conditions
        .direct_rate
        .is_some_and(|direct| direct < conditions.rate)
    {
        return Some(Discard::DirectSaturated);
    }
    None
}

/// The middle of `values`, between the two middle ones of an even number;
/// `None` for no values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    median_of_sorted(&sorted)
}

fn median_of_sorted(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some(f64::midpoint(sorted[middle - 1], upper))
}

/// The median of `values` and where it lies at 95 %: the percentile bootstrap.
/// The same values give the same result.
///
/// Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
pub fn bootstrap(values: &[f64]) -> Option<Estimate> {
    let median = median(values)?;
    let mut random = Rng::with_seed(0x9e37_79b9_7f4a_7c15);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            let mut resample: Vec<f64> = values
                .iter()
                .map(|_| values[random.usize(..values.len())])
                .collect();
            resample.sort_by(f64::total_cmp);
            median_of_sorted(&resample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    Some(Estimate {
        median,
        low: medians[RESAMPLES * 25 / 1000],
        high: medians[RESAMPLES * 975 / 1000 - 1],
        rounds: values.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[4.0]), Some(4.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[9.0, 1.0, 5.0, 6.0]), Some(5.5));
    }

    #[test]
    fn an_interval_holds_the_median_and_stays_within_the_values() {
        let values = [1.02, 1.31, 1.10, 1.24, 1.18, 0.97, 1.22, 1.15, 1.40];
        let estimate = bootstrap(&values).unwrap();
        assert_eq!(estimate.median, 1.18);
        assert_eq!(estimate.rounds, 9);
        assert!(
            0.97 <= estimate.low && estimate.low < estimate.median,
            "{estimate:?}"
        );
        assert!(
            estimate.median < estimate.high && estimate.high <= 1.40,
            "{estimate:?}"
        );
        assert_eq!(bootstrap(&values), Some(estimate), "the same every time");
        assert_eq!(bootstrap(&[]), None);
    }

    /// The median of a resample of 9 is at most the k-th smallest value when 5
    /// draws or more are: binomial with p = k/9. That is 0.1 % for k = 1 and
    /// 3.0 % for k = 2, so 2.5 % is reached at the second.
    #[test]
    fn an_interval_is_as_wide_as_theory_says() {
        let values: Vec<f64> = (1..=9).map(f64::from).collect();
        let estimate = bootstrap(&values).unwrap();
        assert_eq!((estimate.low, estimate.high), (2.0, 8.0));
    }

    #[test]
    fn equal_values_leave_no_doubt() {
        let estimate = bootstrap(&[2.0; 9]).unwrap();
        assert_eq!(
            (estimate.low, estimate.median, estimate.high),
            (2.0, 2.0, 2.0)
        );
    }

    #[test]
    fn what_does_not_count_is_left_out() {
        let good = Conditions {
            rate: 100.0,
            direct_rate: Some(200.0),
            ..Conditions::default()
        };
        let open = Conditions {
            offered_rate: Some(100.0),
            ..good
        };
        let cases = [
            (good, None),
            (open, None),
            (
                Conditions {
                    direct_rate: None,
                    ..good
                },
                None,
            ),
            (Conditions { faults: 1, ..good }, Some(Discard::Faults)),
            (
                Conditions {
                    steal: 0.21,
                    ..good
                },
                Some(Discard::Steal),
            ),
            (
                Conditions {
                    waited: 0.26,
                    ..good
                },
                Some(Discard::OtherLoad),
            ),
            (
                Conditions {
                    direct_rate: Some(99.0),
                    ..good
                },
                Some(Discard::DirectSaturated),
            ),
            (
                Conditions {
                    direct_rate: Some(94.0),
                    ..open
                },
                Some(Discard::DirectSaturated),
            ),
            // Only the set rate is asked for, however little more direct can do.
            (
                Conditions {
                    direct_rate: Some(99.0),
                    ..open
                },
                None,
            ),
            (Conditions { rate: 94.0, ..open }, Some(Discard::Overload)),
        ];
        for (conditions, expected) in cases {
            assert_eq!(discard(&conditions), expected, "{conditions:?}");
        }
    }
}
