//! Memory and descriptors of processes that live from start to end.

use std::fs;
use std::time::Instant;

/// Seconds until memory has settled. A shorter run prints its trend but does not
/// fail because of it.
const SETTLED_AFTER: f64 = 600.0;

/// Growth over the time watched that counts as noise of the allocator: the
/// larger of both.
const GROWTH_BYTES: f64 = 2.0 * 1024.0 * 1024.0;
const GROWTH_PART: f64 = 0.1;

/// One process and what it used.
pub struct Watched {
    pub name: &'static str,
    pid: u32,
    begun: Instant,
    /// Seconds since `begun`, allocated bytes.
    memory: Vec<(f64, f64)>,
    pub most_descriptors: usize,
}

impl Watched {
    pub fn new(name: &'static str, pid: u32) -> Self {
        Self {
            name,
            pid,
            begun: Instant::now(),
            memory: Vec::new(),
            most_descriptors: 0,
        }
    }

    /// Records the memory and the descriptors of now.
    pub fn sample(&mut self) {
        if let Some(bytes) = allocated(self.pid) {
            self.memory
                .push((self.begun.elapsed().as_secs_f64(), bytes));
        }
        self.most_descriptors = self.most_descriptors.max(self.descriptors());
    }

    /// Number of open descriptors; 0 once the process has ended.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid)).map_or(0, Iterator::count)
    }

    /// Most allocated bytes.
    pub fn most_memory(&self) -> f64 {
        self.memory
            .iter()
            .map(|(_, bytes)| *bytes)
            .fold(0.0, f64::max)
    }

    /// Growth of the trend in bytes over the last three quarters of the time,
    /// because the first quarter fills caches; and whether that is flat, or the
    /// time is too short.
    pub fn growth(&self) -> (f64, bool) {
        let tail = &self.memory[self.memory.len() / 4..];
        let Some((first, last)) = tail.first().zip(tail.last()) else {
            return (0.0, false);
        };
        let growth = slope(tail) * (last.0 - first.0);
        let mean = tail.iter().map(|(_, bytes)| bytes).sum::<f64>() / tail.len() as f64;
        let is_short = last.0 < SETTLED_AFTER;
        (
            growth,
            is_short || growth <= GROWTH_BYTES.max(GROWTH_PART * mean),
        )
    }
}

/// Allocated bytes. Pages of the program's file do not count: they come and go
/// as other programs need memory, and are most of a debug build.
fn allocated(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kibibytes * 1024.0)
}

/// The slope of the line through `points` by least squares: y per x.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let both: f64 = points
        .iter()
        .map(|point| (point.0 - x) * (point.1 - y))
        .sum();
    let square: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    if square == 0.0 { 0.0 } else { both / square }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(bytes: impl Fn(f64) -> f64) -> Watched {
        let mut watched = Watched::new("test", 0);
        // Every ten seconds for a quarter of an hour.
        watched.memory = (0..100)
            .map(|sample| (f64::from(sample) * 10.0, bytes(f64::from(sample))))
            .collect();
        watched
    }

    #[test]
    fn a_leak_is_distinguished_from_noise() {
        let mebibyte = 1024.0 * 1024.0;
        let noisy = watched(|sample| 20.0 * mebibyte + (sample * 7.0 % 3.0) * mebibyte);
        assert!(noisy.growth().1, "{:?}", noisy.growth());
        let filling = watched(|sample| (20.0 + sample.min(20.0)) * mebibyte);
        assert!(filling.growth().1, "{:?}", filling.growth());
        let leaking = watched(|sample| 20.0 * mebibyte + sample * 0.1 * mebibyte);
        assert!(!leaking.growth().1, "{:?}", leaking.growth());
        let mut short = leaking;
        short.memory.truncate(50);
        assert!(short.growth().1, "{:?}", short.growth());
    }

    #[test]
    fn a_line_has_its_slope() {
        assert_eq!(slope(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]), 2.0);
        assert_eq!(slope(&[(1.0, 1.0)]), 0.0);
    }
}
