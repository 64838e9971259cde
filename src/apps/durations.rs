//! A histogram of how long calls take, kept where it costs two additions a call, and handed to the
//! metrics recorder at a scrape.

use std::time::Duration;

/// Upper bounds of the buckets, in seconds. The last bucket, without a bound, is not listed. To be
/// given to the exporter for `headgate_app_batch_seconds`.
pub const BATCH_SECONDS_BUCKETS: [f64; 16] = [
    10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3,
    250e-3, 1.0, 10.0,
];

/// Counts and sums since they were last taken, one of each a bucket.
#[derive(Clone, Debug, Default)]
pub(super) struct Durations {
    buckets: [Bucket; BATCH_SECONDS_BUCKETS.len() + 1],
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    count: u64,
    sum: f64,
}

impl Durations {
    pub(super) fn record(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let index = BATCH_SECONDS_BUCKETS.partition_point(|bound| *bound < seconds);
        self.buckets[index].count += 1;
        self.buckets[index].sum += seconds;
    }

    /// Calls `record` with a value and how often it occurred: each bucket's mean, so that counts
    /// and sum come out right.
    pub(super) fn replay(&self, mut record: impl FnMut(f64, usize)) {
        for bucket in &self.buckets {
            if bucket.count > 0 {
                record(bucket.sum / bucket.count as f64, bucket.count as usize);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_buckets_and_sum_survive_a_replay() {
        let mut durations = Durations::default();
        for micros in [10, 11, 12, 60, 20_000_000] {
            durations.record(Duration::from_micros(micros));
        }
        let mut replayed = Vec::new();
        durations.replay(|seconds, count| replayed.push(((seconds * 1e7).round(), count)));
        assert_eq!(replayed, [(100.0, 1), (115.0, 2), (600.0, 1), (2e8, 1)]);
    }
}
