//! A histogram of how long calls take, kept where it costs two additions a call.
//!
//! The recorder's own histograms keep every sample until a scrape: at thousands of calls a second
//! with nobody scraping, that is no place for them.

use std::time::Duration;

/// Upper bounds of the buckets, in seconds, as number and as label; the last has no bound.
const BUCKETS: [(f64, &str); 16] = [
    (0.000_01, "0.00001"),
    (0.000_025, "0.000025"),
    (0.000_05, "0.00005"),
    (0.000_1, "0.0001"),
    (0.000_25, "0.00025"),
    (0.000_5, "0.0005"),
    (0.001, "0.001"),
    (0.002_5, "0.0025"),
    (0.005, "0.005"),
    (0.01, "0.01"),
    (0.025, "0.025"),
    (0.05, "0.05"),
    (0.1, "0.1"),
    (0.5, "0.5"),
    (5.0, "5"),
    (f64::INFINITY, "+Inf"),
];

/// Calls by duration, since the last time that this was taken.
#[derive(Clone, Debug, Default)]
pub(super) struct Durations {
    counts: [u64; BUCKETS.len()],
    sum: Duration,
}

impl Durations {
    pub(super) fn record(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let index = BUCKETS.partition_point(|(bound, _)| *bound < seconds);
        self.counts[index] += 1;
        self.sum += duration;
    }

    /// For each bucket, its label and how many calls were no longer than its bound: as Prometheus
    /// has it, each bucket contains those before it.
    pub(super) fn cumulative(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let mut total = 0;
        self.counts
            .iter()
            .zip(BUCKETS)
            .map(move |(count, (_, label))| {
                total += count;
                (label, total)
            })
    }

    pub(super) fn sum_seconds(&self) -> f64 {
        self.sum.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bucket_contains_those_before_it() {
        let mut durations = Durations::default();
        for micros in [10, 11, 12, 60, 20_000_000] {
            durations.record(Duration::from_micros(micros));
        }
        let buckets: Vec<_> = durations.cumulative().collect();
        assert_eq!(
            buckets[..4],
            [
                ("0.00001", 1),
                ("0.000025", 3),
                ("0.00005", 3),
                ("0.0001", 4)
            ]
        );
        assert_eq!(buckets[14..], [("5", 4), ("+Inf", 5)]);
        assert_eq!(durations.sum_seconds(), 20.000_093);
    }
}
