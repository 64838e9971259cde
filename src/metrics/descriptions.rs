//! What the metrics of the edge and the pipeline mean, as `/metrics` says it. Apps describe their
//! own, which carry an `app` label.

use metrics::Recorder;

const COUNTERS: &[(&str, &str)] = &[
    (
        "headgate_mqtt_connections_total",
        "Connections of MQTT clients, by listener and by whether they were let in.",
    ),
    (
        "headgate_mqtt_disconnections_total",
        "Connections of MQTT clients that have ended, by listener and reason.",
    ),
    (
        "headgate_mqtt_refused_connects_total",
        "CONNECT packets that were refused, by listener and reason code.",
    ),
    (
        "headgate_mqtt_sent_messages_total",
        "PUBLISH packets to clients.",
    ),
    (
        "headgate_mqtt_sent_packets_total",
        "MQTT packets to clients.",
    ),
    (
        "headgate_mqtt_sent_bytes_total",
        "Bytes sent to MQTT clients.",
    ),
    (
        "headgate_mqtt_tls_handshake_failures_total",
        "Connections whose TLS handshake failed or never ended, by listener.",
    ),
    (
        "headgate_mqtt_tls_reload_failures_total",
        "Times that the files of mqtt.tls could not be used after the start.",
    ),
    (
        "headgate_mqtt_received_messages_total",
        "Messages that clients have published.",
    ),
    (
        "headgate_mqtt_received_packets_total",
        "MQTT packets of any kind from clients.",
    ),
    (
        "headgate_mqtt_received_bytes_total",
        "Bytes received from clients.",
    ),
    (
        "headgate_mqtt_delivered_messages_total",
        "Messages handed to subscribers, one count each.",
    ),
    (
        "headgate_mqtt_dropped_messages_total",
        "Messages that a subscriber's full queue did not take.",
    ),
    (
        "headgate_mqtt_store_commits_total",
        "Transactions that wrote MQTT state to the store.",
    ),
    (
        "headgate_mqtt_store_failures_total",
        "Transactions that could not be written to the store and were tried again.",
    ),
    (
        "headgate_mqtt_store_damaged_records_total",
        "Records of MQTT state in the store that can't be read and were left out.",
    ),
    (
        "headgate_dead_letters_total",
        "Messages that a policy dropped, by which it was.",
    ),
    (
        "headgate_dead_letters_left_out_total",
        "Messages among the dropped that were too many to be kept as dead letters.",
    ),
    (
        "headgate_dead_letters_retried_total",
        "Dead letters that were handed over again.",
    ),
    (
        "headgate_mqtt_failed_logins_total",
        "Connections that were refused because of their login, by reason.",
    ),
    (
        "headgate_pipeline_events_total",
        "Events by what became of them on the way to the apps; accepted = filtered + those that \
         were routed.",
    ),
    ("headgate_pipeline_batches_total", "Batches handed to apps."),
    (
        "headgate_ingest_connections_total",
        "Connections to TCP ingest: all, and those that were never let in.",
    ),
    (
        "headgate_ingest_errors_total",
        "Connections to TCP ingest that were ended for what came on them, or did not.",
    ),
    (
        "headgate_ingest_frames_total",
        "Frames, by whether their client may publish to their topic.",
    ),
    (
        "headgate_ingest_received_bytes_total",
        "Bytes received by TCP ingest.",
    ),
    (
        "headgate_journal_events_total",
        "Events that were appended to the journal.",
    ),
    (
        "headgate_journal_commits_total",
        "Writes of the journal, each with an fdatasync.",
    ),
    (
        "headgate_journal_write_failures_total",
        "Writes of the journal that failed and were tried again.",
    ),
    (
        "headgate_journal_lost_unfinished_events_total",
        "Events that were removed from the journal, for want of room, before all apps had finished them.",
    ),
    (
        "headgate_mapping_messages_processed_total",
        "Messages of a mapping that have led to an output.",
    ),
    (
        "headgate_mapping_messages_errored_total",
        "Messages of a mapping that could not be read, and outputs that failed.",
    ),
    (
        "headgate_mapping_messages_dropped_total",
        "Messages of a mapping that have led to no output.",
    ),
    (
        "headgate_mapping_messages_late_total",
        "Messages of a mapping that came too late, by the policy of their source.",
    ),
    (
        "headgate_mapping_invalid_data_type_total",
        "Messages of a mapping that could not be read.",
    ),
    (
        "headgate_mapping_outputs_generated_total",
        "Events that a mapping made.",
    ),
    (
        "headgate_mapping_javascript_errors_total",
        "Evaluations of a mapping that threw or had no result.",
    ),
    (
        "headgate_mapping_javascript_executions_total",
        "Evaluations of a mapping by the JavaScript engine.",
    ),
    (
        "headgate_mapping_javascript_execution_seconds",
        "Time that these took.",
    ),
    (
        "headgate_mapping_fast_executions_total",
        "Evaluations of a mapping without the JavaScript engine.",
    ),
    (
        "headgate_mapping_stopped_executions_total",
        "Evaluations of a mapping that were stopped at a limit.",
    ),
    (
        "headgate_mapping_timed_messages_total",
        "Messages of a mapping whose time was taken: one of 64.",
    ),
    (
        "headgate_mapping_message_processing_seconds",
        "Time that these took.",
    ),
    ("headgate_mapping_outputs", "Outputs of a mapping."),
    (
        "headgate_mapping_active_variables",
        "Sources of a mapping that have a value.",
    ),
    (
        "headgate_mappings_queued_events",
        "Events that wait for the mappings.",
    ),
    (
        "headgate_mappings_dropped_events_total",
        "Events for which the mappings had no room.",
    ),
    (
        "headgate_mappings_save_failures_total",
        "Attempts to store the values of mappings' sources that failed.",
    ),
    (
        "headgate_journal_refused_outputs_total",
        "Events that apps made and that are not in the journal, because the disk refused what was to be written.",
    ),
    (
        "headgate_uplink_connected",
        "Whether a link is up (1) or not (0).",
    ),
    (
        "headgate_uplink_connections_total",
        "How often a link came up.",
    ),
    (
        "headgate_uplink_shipped_events_total",
        "Events that the other side has acknowledged.",
    ),
    (
        "headgate_uplink_shipped_bytes_total",
        "Their bytes, with about what headers take.",
    ),
    (
        "headgate_uplink_resent_events_total",
        "Events that were sent again, as nobody knew whether they had arrived.",
    ),
    (
        "headgate_uplink_duplicate_events_total",
        "Those among them that had.",
    ),
    (
        "headgate_uplink_refused_events_total",
        "Events that the other side never takes: dead letters.",
    ),
    (
        "headgate_uplink_lost_events_total",
        "Events that were gone from the journal before they were shipped.",
    ),
    (
        "headgate_uplink_lost_upstream_events_total",
        "Sequences that were shipped again, as the other side had lost what it had acknowledged.",
    ),
    (
        "headgate_uplink_behind_events",
        "Events of the journal that a link has not come past.",
    ),
    (
        "headgate_uplink_behind_seconds",
        "How old the oldest event is that waits for its acknowledgement.",
    ),
    ("headgate_uplink_in_flight_events", "Events on their way."),
    (
        "headgate_uplink_acknowledgement_seconds",
        "From sending an event to its acknowledgement, since the start.",
    ),
    (
        "headgate_uplink_taken_events_total",
        "Commands that came by a link.",
    ),
    (
        "headgate_uplink_taken_bytes_total",
        "Bytes of their payloads.",
    ),
    (
        "headgate_uplink_taken_refused_events_total",
        "Commands that can be no event here, for their topic.",
    ),
    (
        "headgate_cluster_connected",
        "Whether the servers of the site's cluster have answered within a lease (1) or not (0).",
    ),
    (
        "headgate_cluster_leader",
        "Whether this gateway leads its site (1) or not (0).",
    ),
    ("headgate_cluster_members", "Gateways of the site."),
    (
        "headgate_cluster_owned_shards",
        "Shards of the topics that this gateway acts for.",
    ),
    (
        "headgate_cluster_acting_seats",
        "Seats, of apps and mappings that the site has once or once for each shard, that this gateway acts for.",
    ),
    (
        "headgate_cluster_failing_seats",
        "Seats that this gateway is to act for, and can't: `headgate cluster status` says why.",
    ),
    (
        "headgate_cluster_missing_apps",
        "Apps and mappings that run here, and not on another gateway that is to run them: `headgate cluster status` names both.",
    ),
    ("headgate_journal_bytes", "Bytes of the journal on disk."),
    ("headgate_journal_segments", "Files of the journal."),
    (
        "headgate_journal_unfinished_events",
        "Events in the journal that some app has not finished.",
    ),
    (
        "headgate_event_latency_seconds_count",
        "Results whose latency was taken.",
    ),
];

const GAUGES: &[(&str, &str)] = &[
    (
        "headgate_ota_phase",
        "1 for where the update of the machine is: idle, fetching, or ready to be booted or on probation.",
    ),
    (
        "headgate_ota_on_probation",
        "Whether the system that runs may be left again.",
    ),
    ("headgate_ota_held", "Whether updates are held."),
    (
        "headgate_ota_counts_boots",
        "Whether a boot has been counted on this machine, without which it is not updated.",
    ),
    (
        "headgate_ota_last_attempt_failed",
        "Whether the last attempt to update has failed.",
    ),
    (
        "headgate_ota_last_check_timestamp_seconds",
        "When the channel was last asked; 0 for never.",
    ),
    (
        "headgate_ota_last_rollback_timestamp_seconds",
        "When a system was last left again; 0 for never.",
    ),
    (
        "headgate_ota_download_bytes",
        "Bytes of the update that have come.",
    ),
    (
        "headgate_ota_download_size_bytes",
        "Bytes of the update that is being fetched.",
    ),
    (
        "headgate_ota_download_paths",
        "Store paths of the update that have come.",
    ),
    (
        "headgate_ota_download_size_paths",
        "Store paths of the update that are being fetched.",
    ),
    (
        "headgate_mqtt_clients",
        "MQTT clients that are connected, by listener.",
    ),
    (
        "headgate_ingest_connections",
        "Connections to TCP ingest that are open.",
    ),
    (
        "headgate_mqtt_tls_certificate_expiry_seconds",
        "When the TLS certificate in use expires, in Unix time.",
    ),
    (
        "headgate_mqtt_parked_sessions",
        "Sessions kept for clients that are gone and may come back.",
    ),
    (
        "headgate_mqtt_subscriptions",
        "Subscriptions of all clients.",
    ),
    ("headgate_mqtt_retained_messages", "Retained messages."),
    (
        "headgate_mqtt_store_queued_bytes",
        "What messages that wait for clients take up in the store.",
    ),
    (
        "headgate_pipeline_queued_events",
        "Events that have come in and not reached an app's queue.",
    ),
    (
        "headgate_pressure",
        "1 for the state of the lanes: which of them stand back for the realtime lane.",
    ),
    (
        "headgate_dedup_keys",
        "Events by which duplicates are known.",
    ),
    (
        "headgate_event_latency_seconds",
        "From an event's arrival to the publication of what an app made of it, since the start.",
    ),
];

/// Tells `recorder` what the metrics mean.
pub(super) fn install(recorder: &impl Recorder) {
    for (name, text) in COUNTERS {
        recorder.describe_counter((*name).into(), None, (*text).into());
    }
    for (name, text) in GAUGES {
        recorder.describe_gauge((*name).into(), None, (*text).into());
    }
}
