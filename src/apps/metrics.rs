//! The apps' metrics: names, descriptions, and how counters get from the apps to the recorder.

use std::sync::Once;

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

use super::app::App;
use super::breaker::BreakerState;
use super::kv::KvStore;
use super::status::AppState;

const EVENTS: &str = "headgate_app_events_total";
const RETRIED: &str = "headgate_app_retried_batches_total";
const DROPPED: &str = "headgate_app_dropped_events_total";
const QUEUED: &str = "headgate_app_queue_length";
const PUBLISHED: &str = "headgate_app_published_events_total";
const REFUSED: &str = "headgate_app_refused_outputs_total";
/// Together a histogram, as PromQL's `histogram_quantile` takes it.
const BATCH_BUCKET: &str = "headgate_app_batch_seconds_bucket";
const BATCH_SUM: &str = "headgate_app_batch_seconds_sum";
const BATCH_COUNT: &str = "headgate_app_batch_seconds_count";
const LOG_DROPPED: &str = "headgate_app_dropped_log_lines_total";
const RESTARTS: &str = "headgate_app_restarts_total";
const BREAKER: &str = "headgate_app_breaker_state";
const STATE: &str = "headgate_app_state";
const MEMORY: &str = "headgate_app_memory_pages";
const PEAK_MEMORY: &str = "headgate_app_peak_memory_pages";
const REFUSED_GROWTH: &str = "headgate_app_memory_grow_refused_total";
const COLD_START: &str = "headgate_app_cold_start_seconds";
const AOT_HITS: &str = "headgate_app_aot_cache_hits_total";
const AOT_MISSES: &str = "headgate_app_aot_cache_misses_total";
const REFUSED_CALLS: &str = "headgate_app_refused_calls_total";
const STATE_BYTES: &str = "headgate_app_kv_bytes";
const STATE_KEYS: &str = "headgate_app_kv_keys";
const TIMERS: &str = "headgate_app_timers";
const LINES: &str = "headgate_app_gpio_lines";
const EDGES: &str = "headgate_app_gpio_edges_total";
const MISSED_EDGES: &str = "headgate_app_gpio_missed_edges_total";
const UNSET_OUTPUTS: &str = "headgate_app_gpio_failed_outputs_total";
const SENSORS: &str = "headgate_app_sensors";
const READINGS: &str = "headgate_app_sensor_readings_total";
const STORE_COMMITS: &str = "headgate_app_store_commits_total";
const STORE_FAILURES: &str = "headgate_app_store_failures_total";

fn describe() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        describe_counter!(EVENTS, "Events routed to the app, by what became of them");
        describe_counter!(
            RETRIED,
            "Batches that failed and were tried again, whole or in halves"
        );
        describe_counter!(DROPPED, "Events that never reached the app, by reason");
        describe_gauge!(
            QUEUED,
            "Events that wait for the app or are being worked on"
        );
        describe_counter!(PUBLISHED, "Events that the app handed out and that went on");
        describe_counter!(
            REFUSED,
            "Events that the app handed out and may not, by reason"
        );
        describe_counter!(
            BATCH_BUCKET,
            "Calls of the app's handler that took no longer than `le` seconds"
        );
        describe_gauge!(BATCH_SUM, Unit::Seconds, "Time in the app's handler");
        describe_counter!(BATCH_COUNT, "Calls of the app's handler");
        describe_counter!(LOG_DROPPED, "Log lines beyond the app's quota");
        describe_counter!(RESTARTS, "Instances replaced after a failure, by reason");
        describe_gauge!(
            BREAKER,
            "The circuit breaker: 1 for the state that it is in, 0 for the others"
        );
        describe_gauge!(
            STATE,
            "1 for the state that the app is in, 0 for the others"
        );
        describe_gauge!(
            MEMORY,
            "Linear memory of the app's instance, in pages of 64 KiB"
        );
        describe_gauge!(
            PEAK_MEMORY,
            "Most pages that an instance of the app has had since the gateway started"
        );
        describe_gauge!(
            COLD_START,
            Unit::Seconds,
            "How long it took to make and configure the app's instance"
        );
        describe_counter!(
            AOT_HITS,
            "Loads of the app's component that found it compiled"
        );
        describe_counter!(
            AOT_MISSES,
            "Loads of the app's component that had to compile it"
        );
        describe_counter!(REFUSED_GROWTH, "Refused growths of memory or tables");
        describe_counter!(
            REFUSED_CALLS,
            "Calls of the app to the host that got an error, by reason"
        );
        describe_gauge!(STATE_BYTES, Unit::Bytes, "What the app keeps");
        describe_gauge!(STATE_KEYS, "Keys under which the app keeps something");
        describe_gauge!(TIMERS, "Timers of the app that will fire");
        describe_gauge!(LINES, "GPIO lines that the app holds");
        describe_counter!(EDGES, "Edges of the app's GPIO lines");
        describe_counter!(
            MISSED_EDGES,
            "Edges of the app's GPIO lines that the kernel dropped, there being too many"
        );
        describe_counter!(
            UNSET_OUTPUTS,
            "GPIO lines that could not be set when a call of the app had ended"
        );
        describe_gauge!(SENSORS, "Sensors that are read for the app");
        describe_counter!(READINGS, "Attempts to read the app's sensors, by result");
        describe_counter!(
            STORE_COMMITS,
            "Transactions that brought what apps keep to the store"
        );
        describe_counter!(
            STORE_FAILURES,
            "Transactions of what apps keep that failed and are tried again"
        );
    });
}

/// Hands the app's counters to the recorder.
pub(super) fn record(app: &App) {
    describe();
    let (info, since_last) = app.info_for_metrics();
    let name = || info.name.clone();
    // Increments, not totals: an app that was removed and is installed again counts on.
    let counters = &since_last.counters;
    for (result, count) in [
        ("handled", counters.handled),
        ("failed", counters.failed),
        ("dropped", counters.dropped.total()),
    ] {
        counter!(EVENTS, "app" => name(), "result" => result).increment(count);
    }
    counter!(RETRIED, "app" => name()).increment(counters.retried);
    for (reason, count) in counters.dropped.by_name() {
        counter!(DROPPED, "app" => name(), "reason" => reason).increment(count);
    }
    gauge!(QUEUED, "app" => name()).set(info.counters.queued as f64);
    counter!(PUBLISHED, "app" => name()).increment(counters.published);
    for (reason, count) in [
        ("denied", counters.denied),
        ("quota", counters.over_publish_quota),
    ] {
        counter!(REFUSED, "app" => name(), "reason" => reason).increment(count);
    }
    for (le, count) in since_last.durations.cumulative() {
        counter!(BATCH_BUCKET, "app" => name(), "le" => le).increment(count);
    }
    gauge!(BATCH_SUM, "app" => name()).increment(since_last.durations.sum_seconds());
    counter!(BATCH_COUNT, "app" => name()).increment(counters.batches);
    counter!(LOG_DROPPED, "app" => name()).increment(counters.over_log_quota);
    for (reason, count) in since_last.restarts.by_name() {
        counter!(RESTARTS, "app" => name(), "reason" => reason).increment(count);
    }
    for state in BreakerState::ALL {
        let is = if state == info.breaker { 1.0 } else { 0.0 };
        gauge!(BREAKER, "app" => name(), "state" => state.as_str()).set(is);
    }
    for state in AppState::ALL {
        let is = if state == info.state { 1.0 } else { 0.0 };
        gauge!(STATE, "app" => name(), "state" => state.as_str()).set(is);
    }
    gauge!(MEMORY, "app" => name()).set(info.memory_pages as f64);
    gauge!(PEAK_MEMORY, "app" => name()).set(info.peak_memory_pages as f64);
    if let Some(seconds) = info.cold_start_seconds {
        gauge!(COLD_START, "app" => name()).set(seconds);
    }
    counter!(AOT_HITS, "app" => name()).increment(0);
    counter!(AOT_MISSES, "app" => name()).increment(0);
    counter!(REFUSED_GROWTH, "app" => name()).increment(counters.refused_growth);
    for (reason, count) in counters.refused_calls.by_name() {
        counter!(REFUSED_CALLS, "app" => name(), "reason" => reason).increment(count);
    }
    gauge!(STATE_BYTES, "app" => name()).set(info.kv.bytes as f64);
    gauge!(STATE_KEYS, "app" => name()).set(info.kv.keys as f64);
    gauge!(TIMERS, "app" => name()).set(info.timers as f64);
    let devices = &counters.devices;
    gauge!(LINES, "app" => name()).set(info.lines as f64);
    counter!(EDGES, "app" => name()).increment(devices.edges);
    counter!(MISSED_EDGES, "app" => name()).increment(devices.missed_edges);
    counter!(UNSET_OUTPUTS, "app" => name()).increment(devices.unset_outputs);
    gauge!(SENSORS, "app" => name()).set(info.sensors as f64);
    for (result, count) in [
        ("ok", devices.readings),
        ("failed", devices.failed_readings),
    ] {
        counter!(READINGS, "app" => name(), "result" => result).increment(count);
    }
}

/// A component was to be loaded for an app.
pub(super) fn count_load(app: &str, was_compiled: bool) {
    let name = if was_compiled { AOT_HITS } else { AOT_MISSES };
    counter!(name, "app" => app.to_owned()).increment(1);
}

/// Hands the counters of the store of what apps keep to the recorder.
pub(super) fn record_store(kv: &KvStore) {
    describe();
    let (commits, failures) = kv.commits_and_failures();
    counter!(STORE_COMMITS).absolute(commits);
    counter!(STORE_FAILURES).absolute(failures);
}

/// Records a removed app for the last time: it is in no state and holds nothing any more.
pub(super) fn forget(app: &App) {
    record(app);
    let name = || app.info().name;
    gauge!(QUEUED, "app" => name()).set(0.0);
    gauge!(MEMORY, "app" => name()).set(0.0);
    gauge!(STATE_BYTES, "app" => name()).set(0.0);
    gauge!(STATE_KEYS, "app" => name()).set(0.0);
    gauge!(TIMERS, "app" => name()).set(0.0);
    gauge!(LINES, "app" => name()).set(0.0);
    gauge!(SENSORS, "app" => name()).set(0.0);
    for state in AppState::ALL {
        gauge!(STATE, "app" => name(), "state" => state.as_str()).set(0.0);
    }
    for state in BreakerState::ALL {
        gauge!(BREAKER, "app" => name(), "state" => state.as_str()).set(0.0);
    }
}
