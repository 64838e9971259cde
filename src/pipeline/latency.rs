//! How long events take from their arrival to the publication of what an app made of them.

use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;

/// Latencies since the start, from a microsecond to a minute, within 1 %.
pub struct Latency(Mutex<Histogram<u64>>);

const LONGEST: Duration = Duration::from_secs(60);

impl Default for Latency {
    fn default() -> Self {
        let longest = LONGEST.as_micros() as u64;
        Latency(Mutex::new(
            Histogram::new_with_bounds(1, longest, 2).expect("the bounds are valid"),
        ))
    }
}

impl Latency {
    /// Counts the latencies of one batch.
    pub fn record(&self, latencies: impl Iterator<Item = Duration>) {
        let mut histogram = self.0.lock();
        for latency in latencies {
            histogram.saturating_record(latency.as_micros() as u64);
        }
    }

    /// The latency that the share `quantile` (0 to 1) of events stay below.
    pub fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.0.lock().value_at_quantile(quantile))
    }

    /// Puts the quantiles into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        for (label, quantile) in [("0.5", 0.5), ("0.99", 0.99), ("0.999", 0.999), ("1", 1.0)] {
            metrics::gauge!("headgate_event_latency_seconds", "quantile" => label)
                .set(self.quantile(quantile).as_secs_f64());
        }
        metrics::counter!("headgate_event_latency_seconds_count").absolute(self.count());
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.0.lock().len()
    }
}
