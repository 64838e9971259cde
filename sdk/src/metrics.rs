//! The app's own counters, gauges and histograms, for the gateway's `/metrics`.
//!
//! They stand there as `headgate_app_counter_total`, `headgate_app_gauge` and
//! `headgate_app_histogram`, with the labels `app` and `name`. What a call records counts when the
//! call has ended well. An app has 64 at most. On the developer's machine nothing is recorded.

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

    pub fn count(_name: &str, _more: u64) -> Result<(), MetricError> {
        Ok(())
    }

    pub fn gauge(_name: &str, _value: f64) -> Result<(), MetricError> {
        Ok(())
    }

    pub fn observe(_name: &str, _value: f64) -> Result<(), MetricError> {
        Ok(())
    }
}
