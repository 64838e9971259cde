//! What the outside sees of an app: its state, its counters, its log. Plain data, as it goes over
//! the admin API.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use super::breaker::BreakerState;
use super::manifest::Limits;
use crate::event::matches;
use crate::site::Placement;

/// Where an app stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AppState {
    /// In the store, and nothing more yet.
    Installed,
    /// Its component is being loaded (compiled, if need be), or `configure` runs.
    Starting,
    /// Takes batches.
    Running,
    /// Failed; is started again by itself in a moment. Takes events up to its queue's bound.
    BackingOff,
    /// On request: what comes waits.
    Paused,
    /// On request: takes nothing more, finishes what waits, and stops.
    Draining,
    /// To be run once in a site, and not by this gateway now.
    Standby,
    /// Failed too often, or can't be loaded: waits for `start` or `restart`.
    Quarantined,
    /// Stopped on request.
    Stopped,
}

impl AppState {
    pub fn as_str(self) -> &'static str {
        match self {
            AppState::Installed => "installed",
            AppState::Starting => "starting",
            AppState::Running => "running",
            AppState::BackingOff => "backing-off",
            AppState::Paused => "paused",
            AppState::Draining => "draining",
            AppState::Standby => "standby",
            AppState::Quarantined => "quarantined",
            AppState::Stopped => "stopped",
        }
    }

    pub const ALL: [AppState; 9] = [
        AppState::Installed,
        AppState::Starting,
        AppState::Running,
        AppState::BackingOff,
        AppState::Paused,
        AppState::Draining,
        AppState::Standby,
        AppState::Quarantined,
        AppState::Stopped,
    ];
}

impl fmt::Display for AppState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where an app comes from, and so who may replace or remove it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// From `headgate app install`; kept in the store.
    Installed,
    /// Part of the system: from the folder that `apps.preinstalled` names.
    Preinstalled,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Installed => "installed",
            Origin::Preinstalled => "preinstalled",
        })
    }
}

/// All there is to say about an app.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AppInfo {
    pub name: String,
    /// From the manifest; empty if the stored manifest can't be read (the reason says so).
    pub version: String,
    /// What `rollback` goes back to.
    pub previous_version: Option<String>,
    /// Batches that must go well before this version is trusted; until then a failure brings the
    /// one before back.
    pub trial_batches_left: Option<u32>,
    pub description: Option<String>,
    pub origin: Origin,
    pub state: AppState,
    /// Why the app is in this state, when that isn't plain from the state.
    pub reason: Option<String>,
    /// When the app came into this state, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// Whether it gets batches, going by how the last ones went.
    pub breaker: BreakerState,
    /// How often the instance was replaced since the gateway started.
    pub restarts: Restarts,
    /// The last failure of the instance or of a batch since the gateway started.
    pub last_error: Option<String>,
    /// SHA-256 of the component, in lower-case hex.
    pub component_sha256: String,
    pub component_bytes: u64,
    /// Which gateways of a site run it.
    #[serde(default)]
    pub placement: Placement,
    /// For how many shards of its site it acts here.
    #[serde(default)]
    pub shards: u64,
    /// Topic filters of the events that go to this app.
    pub subscribe: Vec<String>,
    /// Topic filters that cover what this app may publish.
    pub publish: Vec<String>,
    /// What the app reads through `wasi:config/store`.
    pub config: BTreeMap<String, String>,
    pub limits: Limits,
    pub counters: AppCounters,
    /// Linear memory of the live instance, in pages of 64 KiB; 0 if there is none.
    pub memory_pages: u64,
    /// The most that an instance has had since the gateway started.
    pub peak_memory_pages: u64,
    /// How long it took to make the last instance and run its `configure`.
    pub cold_start_seconds: Option<f64>,
    /// What the app keeps.
    pub kv: StateUsage,
    /// Timers that will fire.
    pub timers: u64,
    /// GPIO lines that the live instance holds.
    pub lines: u64,
    /// Sensors that are read for it.
    pub sensors: u64,
}

impl AppInfo {
    /// The filter by which it gets the events of a topic.
    pub fn subscription_to(&self, topic: &str) -> Option<&str> {
        let mut filters = self.subscribe.iter().map(String::as_str);
        filters.find(|filter| matches(filter, topic))
    }

    pub fn may_publish(&self, topic: &str) -> bool {
        self.publish.iter().any(|filter| matches(filter, topic))
    }
}

/// What an app keeps through `wasi:keyvalue`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateUsage {
    /// Keys with their bucket's name, values, and 64 bytes for each key. Bounded by
    /// `limits.kv_bytes`.
    pub bytes: u64,
    pub keys: u64,
    /// Whether all of it is on disk.
    pub synced: bool,
}

/// A struct of counters that only grow, one a reason, with all that is done to each of them alike.
macro_rules! counters {
    (
        $(#[$about:meta])*
        pub struct $name:ident { $($(#[$doc:meta])* pub $counter:ident: u64,)+ }
    ) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $name { $($(#[$doc])* pub $counter: u64,)+ }

        impl $name {
            /// Each with its name.
            pub fn by_name(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$((stringify!($counter), self.$counter)),+].into_iter()
            }

            pub fn total(&self) -> u64 {
                self.by_name().map(|(_, count)| count).sum()
            }

            /// What has come since `earlier`.
            pub(super) fn since(&self, earlier: &$name) -> $name {
                $name { $($counter: self.$counter - earlier.$counter),+ }
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, more: $name) {
                $(self.$counter += more.$counter;)+
            }
        }
    };
}

counters! {
    /// How often the instance was replaced, by reason.
    pub struct Restarts {
        /// It trapped on a batch, and that was tried again with a fresh one.
        pub trap: u64,
        /// It could not be made, or most of its batches failed; after a pause.
        pub failure: u64,
        /// A new version failed on trial, and the one before took over.
        pub rollback: u64,
        /// It had as many batches or failures as the manifest's `recycle` allows.
        pub recycle: u64,
    }
}

/// Counted since the gateway started. `offered = handled + failed + dropped + queued`, at any time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppCounters {
    /// Events that were routed to this app and taken or dropped by it.
    pub offered: u64,
    /// Events in batches that `handle` returned from without an error.
    pub handled: u64,
    /// Events that the app could not handle, each tried alone: a trap, a time-out, an error from
    /// `handle`. They are among the dead letters.
    pub failed: u64,
    /// Batches that failed and were tried again, whole or in halves.
    pub retried: u64,
    pub dropped: Dropped,
    /// Events that wait or are being worked on now.
    pub queued: u64,
    /// Calls of `handle`.
    pub batches: u64,
    /// Nanoseconds in them, what it costs to hand events in and out included.
    pub handle_ns: u64,
    /// Events that the app handed out and that went on.
    pub published: u64,
    /// Outputs on a topic that the manifest doesn't cover, or on no valid topic.
    pub denied: u64,
    /// Outputs beyond `limits.publish_per_batch`.
    pub over_publish_quota: u64,
    /// Log lines beyond `limits.log_per_batch`.
    pub over_log_quota: u64,
    /// Refused attempts to grow a memory or a table beyond the limits.
    pub refused_growth: u64,
    pub refused_calls: RefusedCalls,
    pub devices: DeviceCounters,
}

counters! {
    /// What came of GPIO lines and sensors.
    pub struct DeviceCounters {
        /// Edges of GPIO lines; those that did not fit into the queue are among `dropped`, too.
        pub edges: u64,
        /// Edges that the kernel has dropped, because there were more than are taken.
        pub missed_edges: u64,
        /// Outputs that could not be set when a call had ended.
        pub unset_outputs: u64,
        /// Readings of sensors; those that did not fit into the queue are among `dropped`, too.
        pub readings: u64,
        /// Attempts to read a sensor that failed.
        pub failed_readings: u64,
    }
}

counters! {
    /// Calls to the host that got an error, by reason.
    pub struct RefusedCalls {
        /// What the app keeps would be more than `limits.kv_bytes`.
        pub kv_bytes: u64,
        /// Calls beyond `limits.kv_per_batch`.
        pub kv_per_batch: u64,
        /// A key, a value, a bucket or a cursor is none.
        pub kv_invalid: u64,
        /// Timers beyond `limits.timers`, or without a good name or period.
        pub timers: u64,
        /// Metrics beyond the limit, or without a good name or value.
        pub metrics: u64,
        /// GPIO lines that there are not, that are inputs and were to be set, or could not be read.
        pub gpio: u64,
    }
}

counters! {
    /// Events that never reached `handle`, by reason.
    pub struct Dropped {
        /// The app was not running (backing off, starting) and its queue was full.
        pub queue_full: u64,
        /// The app sat in a long call while its queue was full.
        pub stalled: u64,
        /// The app was stopped, quarantined or removed.
        pub stopped: u64,
        /// The event alone would have filled more than a quarter of `limits.memory_pages`.
        pub too_large: u64,
    }
}

impl AppCounters {
    /// What has come since `earlier`. `queued` is no counter and stays as it is.
    pub(super) fn since(&self, earlier: &AppCounters) -> AppCounters {
        AppCounters {
            offered: self.offered - earlier.offered,
            handled: self.handled - earlier.handled,
            failed: self.failed - earlier.failed,
            retried: self.retried - earlier.retried,
            dropped: self.dropped.since(&earlier.dropped),
            queued: self.queued,
            batches: self.batches - earlier.batches,
            handle_ns: self.handle_ns - earlier.handle_ns,
            published: self.published - earlier.published,
            denied: self.denied - earlier.denied,
            over_publish_quota: self.over_publish_quota - earlier.over_publish_quota,
            over_log_quota: self.over_log_quota - earlier.over_log_quota,
            refused_growth: self.refused_growth - earlier.refused_growth,
            refused_calls: self.refused_calls.since(&earlier.refused_calls),
            devices: self.devices.since(&earlier.devices),
        }
    }
}

/// One line of an app's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Counts up by one with each line of this app, from 0 at the start of the gateway.
    pub sequence: u64,
    /// Milliseconds since the Unix epoch.
    pub time_ms: u64,
    pub level: LogLevel,
    /// Free-form, from the app. `headgate` on lines that the gateway itself writes about the app.
    pub context: String,
    pub message: String,
}

/// As in `wasi:logging`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
    Critical,
}

impl LogLevel {
    pub fn as_str(self) -> &'static str {
        match self {
            LogLevel::Trace => "trace",
            LogLevel::Debug => "debug",
            LogLevel::Info => "info",
            LogLevel::Warn => "warn",
            LogLevel::Error => "error",
            LogLevel::Critical => "critical",
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
