//! The numbers of a mapping: upstream's, under names of ours.

use metrics::{counter, gauge};

use super::Mapping;

const NANOSECOND: f64 = 1e-9;

/// Puts them into the `metrics` crate's recorder.
pub(super) fn record(name: &str, mapping: &Mapping) {
    let counters = mapping.counters();
    for (metric, count) in [
        (
            "headgate_mapping_messages_processed_total",
            counters.messages_processed,
        ),
        (
            "headgate_mapping_messages_errored_total",
            counters.messages_errored,
        ),
        (
            "headgate_mapping_messages_dropped_total",
            counters.messages_dropped,
        ),
        (
            "headgate_mapping_messages_late_total",
            counters.messages_late,
        ),
        (
            "headgate_mapping_invalid_data_type_total",
            counters.invalid_data_type,
        ),
        (
            "headgate_mapping_outputs_generated_total",
            counters.outputs_generated,
        ),
        (
            "headgate_mapping_javascript_errors_total",
            counters.javascript_errors,
        ),
        (
            "headgate_mapping_javascript_executions_total",
            counters.javascript_executions,
        ),
        (
            "headgate_mapping_fast_executions_total",
            counters.fast_executions,
        ),
        (
            "headgate_mapping_stopped_executions_total",
            counters.stopped_executions,
        ),
        (
            "headgate_mapping_timed_messages_total",
            counters.messages_timed,
        ),
    ] {
        counter!(metric, "mapping" => name.to_owned()).absolute(count);
    }
    for (metric, nanoseconds) in [
        (
            "headgate_mapping_javascript_execution_seconds",
            counters.javascript_execution_ns,
        ),
        (
            "headgate_mapping_message_processing_seconds",
            counters.message_processing_ns,
        ),
    ] {
        // A gauge, because counters are whole numbers.
        let seconds = nanoseconds as f64 * NANOSECOND;
        gauge!(metric, "mapping" => name.to_owned()).set(seconds);
    }
    gauge!("headgate_mapping_outputs", "mapping" => name.to_owned())
        .set(mapping.outputs().len() as f64);
    gauge!("headgate_mapping_active_variables", "mapping" => name.to_owned())
        .set(mapping.active_variables() as f64);
}
