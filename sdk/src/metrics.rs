//! The app's own counters, gauges and histograms, for the gateway's `/metrics`.
//!
//! They stand there as `headgate_app_counter_total`, `headgate_app_gauge` and
//! `headgate_app_histogram`, with the labels `app` and `name`. What a call records counts when the
//! call has ended well. An app has 64 at most. On the developer's machine,
//! [`Harness::metric`](crate::testing::Harness::metric) has them.

/// Why nothing was recorded.
pub use crate::bindings::headgate::app::metrics::MetricError;

/// Adds to a counter.
///
/// # Errors
/// If `name` is not `[a-z_][a-z0-9_]{0,63}`, or that of a metric of another kind, or one too many.
pub fn count(name: &str, more: u64) -> Result<(), MetricError> {
    imp::count(name, more)
}

/// Says how much there is of something now.
///
/// # Errors
/// As [`count`]; or if the value is not a finite number.
pub fn gauge(name: &str, value: f64) -> Result<(), MetricError> {
    imp::gauge(name, value)
}

/// Adds one observation to a histogram. Its buckets go from 0.001 to 10,000, three a decade.
///
/// # Errors
/// As [`gauge`].
pub fn observe(name: &str, value: f64) -> Result<(), MetricError> {
    imp::observe(name, value)
}

#[cfg(target_family = "wasm")]
mod imp {
    pub use crate::bindings::headgate::app::metrics::{
        counter_add as count, gauge_set as gauge, histogram_record as observe,
    };
}

#[cfg(not(target_family = "wasm"))]
mod imp {
    use super::MetricError;
    use crate::native::{self, Metric};

    fn record(
        name: &str,
        new: Metric,
        add: impl FnOnce(&mut Metric) -> bool,
    ) -> Result<(), MetricError> {
        let first = |c: char| c.is_ascii_lowercase() || c == '_';
        let allowed = |c: char| first(c) || c.is_ascii_digit();
        if name.len() > 64 || !name.starts_with(first) || !name.chars().all(allowed) {
            let why = format!("{name:?}: give [a-z_][a-z0-9_]{{0,63}}");
            return Err(MetricError::InvalidName(why));
        }
        let is_kind = native::with(|host| {
            let metric = host.state.metrics.entry(name.to_string()).or_insert(new);
            add(metric)
        });
        is_kind.then_some(()).ok_or(MetricError::OtherKind)
    }

    fn finite(value: f64) -> Result<f64, MetricError> {
        match value.is_finite() {
            true => Ok(value),
            false => Err(MetricError::InvalidValue),
        }
    }

    pub fn count(name: &str, more: u64) -> Result<(), MetricError> {
        record(name, Metric::Counter(0), |metric| match metric {
            Metric::Counter(sum) => {
                *sum += more;
                true
            }
            _ => false,
        })
    }

    pub fn gauge(name: &str, value: f64) -> Result<(), MetricError> {
        let value = finite(value)?;
        record(name, Metric::Gauge(value), |metric| match metric {
            Metric::Gauge(last) => {
                *last = value;
                true
            }
            _ => false,
        })
    }

    pub fn observe(name: &str, value: f64) -> Result<(), MetricError> {
        let value = finite(value)?;
        record(name, Metric::Histogram(Vec::new()), |metric| match metric {
            Metric::Histogram(values) => {
                values.push(value);
                true
            }
            _ => false,
        })
    }
}
