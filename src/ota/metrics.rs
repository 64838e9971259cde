//! How updates are, as metrics of the gateway, which only reads what the updater has written down.

use std::path::Path;

use metrics::gauge;

use super::state::{Phase, State, StateError};
use super::status::Report;

/// Puts them into the `metrics` crate's recorder. `folder` is `ota.state`.
pub fn record(folder: &Path, root: &Path) -> Result<(), StateError> {
    let state = State::read(folder)?;
    let report = Report::new(&state, folder, root);
    let is = |condition: bool| f64::from(u8::from(condition));
    for (phase, is_it) in [
        ("idle", matches!(state.phase, Phase::Idle)),
        ("fetching", matches!(state.phase, Phase::Fetching { .. })),
        ("ready", matches!(state.phase, Phase::Ready { .. })),
    ] {
        gauge!("headgate_ota_phase", "phase" => phase).set(is(is_it));
    }
    gauge!("headgate_ota_on_probation").set(is(report.on_probation));
    gauge!("headgate_ota_held").set(is(report.held_since.is_some()));
    gauge!("headgate_ota_counts_boots").set(is(report.counts_boots));
    gauge!("headgate_ota_last_attempt_failed").set(is(report.last_error.is_some()));
    for (metric, time) in [
        (
            "headgate_ota_last_check_timestamp_seconds",
            report.last_check,
        ),
        (
            "headgate_ota_last_rollback_timestamp_seconds",
            report.last_rollback.map(|rollback| rollback.at),
        ),
    ] {
        let seconds = time.map_or(0.0, |time| time.as_millisecond() as f64 / 1000.0);
        gauge!(metric).set(seconds);
    }
    let download = report.download.unwrap_or_default();
    for (metric, value) in [
        ("headgate_ota_download_bytes", download.bytes_done),
        ("headgate_ota_download_size_bytes", download.bytes_total),
        ("headgate_ota_download_paths", download.paths_done),
        ("headgate_ota_download_size_paths", download.paths_total),
    ] {
        gauge!(metric).set(value as f64);
    }
    Ok(())
}
