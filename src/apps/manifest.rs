//! The manifest of an app: who it is, what it reads, what it may publish, what it may use.

mod devices;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use toml::{Spanned, Value};

use super::fair_queue::BASE_WEIGHT;
use super::gpio::GPIO_TOPICS;
use super::instance_timers::TIMER_TOPICS;
use super::sensors::SENSOR_TOPICS;
use super::supervisor::RestartPolicy;
use crate::event::TopicFilter;
use crate::site::Placement;

pub(crate) use devices::{
    Bias, Capability, Devices, Direction, Edges, GpioLine, LineOnChip, Sensor,
};
use devices::{RawGpio, RawSensor};

/// The file name of a manifest in an app's folder.
pub const MANIFEST_FILE: &str = "manifest.toml";

/// Longest manifest, in bytes. A sample is 500 bytes long.
const MAX_MANIFEST_BYTES: usize = 64 * 1024;

/// Longest name of an app. It goes into file names, metrics and log lines.
const MAX_NAME: usize = 64;

/// Most topic filters in `subscribe`, and in `publish`.
const MAX_FILTERS: usize = 64;

const MEMORY_PAGES: RangeInclusive<u64> = 1..=1024;
const BATCH_DEADLINE_MS: RangeInclusive<u64> = 1..=60_000;
const QUEUE_EVENTS: RangeInclusive<u64> = 1..=1_000_000;
const PUBLISH_PER_BATCH: RangeInclusive<u64> = 0..=1_000_000;
const LOG_PER_BATCH: RangeInclusive<u64> = 0..=10_000;
const RETRIES: RangeInclusive<u64> = 0..=10;
const TRIAL_BATCHES: RangeInclusive<u64> = 0..=1_000_000;
const STATE_VERSION: RangeInclusive<u64> = 1..=u32::MAX as u64;
const PAUSE_MS: RangeInclusive<u64> = 1..=3_600_000;
const MOST_FAILURES: RangeInclusive<u64> = 1..=1000;
const WINDOW_S: RangeInclusive<u64> = 1..=86_400;
/// All of it is in memory too.
const KV_BYTES: RangeInclusive<u64> = 0..=64 << 20;
const KV_PER_BATCH: RangeInclusive<u64> = 0..=1_000_000;
const TIMERS: RangeInclusive<u64> = 0..=1024;
const TABLE_ELEMENTS: RangeInclusive<u64> = 0..=1_000_000;
const INSTANCES: RangeInclusive<u64> = 1..=1000;
const WEIGHT: RangeInclusive<u64> = 1..=10_000;
const MAX_USES: RangeInclusive<u64> = 1..=u64::MAX;
const MAX_FAILURES: RangeInclusive<u64> = 1..=u64::MAX;

const DEFAULT_TRIAL_BATCHES: u32 = 10;
pub(super) const DEFAULT_TABLE_ELEMENTS: u32 = 100_000;
pub(super) const DEFAULT_INSTANCES: u32 = 64;

/// A checked manifest.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// `[a-z0-9][a-z0-9_.-]{0,63}`.
    pub name: String,
    /// A version as of semver.org.
    pub version: String,
    pub description: Option<String>,
    /// File name of the component, beside the manifest.
    pub component: String,
    /// Events on these topics go to the app. At least one, unless its devices make events.
    pub subscribe: Vec<TopicFilter>,
    /// The app may publish on these topics.
    pub publish: Vec<TopicFilter>,
    /// What the app reads through `wasi:config/store`.
    pub config: BTreeMap<String, String>,
    pub limits: Limits,
    pub restart: Restart,
    pub(crate) devices: Devices,
    pub recycle: Recycle,
    /// Batches that must go well after an upgrade to this version, or the one before comes back.
    pub trial_batches: u32,
    /// Of the format in which the app keeps what it keeps.
    pub state_version: u32,
    /// Which gateways of a site run it.
    pub placement: Placement,
}

/// When an instance that works is replaced by a fresh one, between two batches. By default never: what
/// it has in its memory goes with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recycle {
    /// Batches that one instance gets.
    pub max_uses: Option<u64>,
    /// Batches that one instance fails with, by an error; after anything else it is replaced anyway.
    pub max_failures: Option<u64>,
}

/// What becomes of an app that fails, where its manifest says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// How often a batch that failed is tried again as a whole, before it is halved.
    pub retries: u32,
    first_pause: Option<Duration>,
    longest_pause: Option<Duration>,
    most_failures: Option<usize>,
    window: Option<Duration>,
}

impl Default for Restart {
    fn default() -> Restart {
        Restart {
            retries: 1,
            first_pause: None,
            longest_pause: None,
            most_failures: None,
            window: None,
        }
    }
}

impl Restart {
    /// `default` in all that the manifest doesn't mention.
    pub(super) fn policy(&self, default: RestartPolicy) -> RestartPolicy {
        let first_pause = self.first_pause.unwrap_or(default.first_pause);
        let longest_pause = self.longest_pause.unwrap_or(default.longest_pause);
        RestartPolicy {
            first_pause,
            longest_pause: longest_pause.max(first_pause),
            most_failures: self.most_failures.unwrap_or(default.most_failures),
            window: self.window.unwrap_or(default.window),
            ..default
        }
    }
}

/// What an app may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Linear memory, in pages of 64 KiB.
    pub memory_pages: u32,
    /// CPU time of one call, in milliseconds.
    pub batch_deadline_ms: u64,
    /// Events that may wait.
    pub queue_events: usize,
    /// Events that one call may publish.
    pub publish_per_batch: u32,
    /// Lines that one call may log.
    pub log_per_batch: u32,
    /// What the app may keep, in bytes: keys, values, and 64 for each key.
    pub kv_bytes: usize,
    /// Calls about what it keeps that one call may make.
    pub kv_per_batch: u32,
    /// Timers that may be set at a time.
    pub timers: usize,
    /// Elements of all tables together; each takes 8 bytes.
    pub table_elements: usize,
    /// Core instances that the component consists of.
    pub instances: usize,
    /// Share of the workers' time where there is not enough for all; 100 is what others have.
    pub weight: u32,
    /// What becomes of events for which the queue has no room.
    pub queue_full: QueueFull,
}

/// What becomes of events for which an app's queue has no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QueueFull {
    /// Whoever brings them waits, as long as the app runs and its calls are short; else they are
    /// dropped.
    #[default]
    Wait,
    /// They are dropped.
    DropNewest,
    /// Those that have waited longest are dropped.
    DropOldest,
}

/// A page of linear memory, in bytes.
pub(super) const WASM_PAGE: usize = 64 * 1024;

impl Limits {
    /// `memory_pages` in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        self.memory_pages as usize * WASM_PAGE
    }

    /// Those of a manifest that doesn't mention any.
    pub fn new(queue_events: usize) -> Limits {
        Limits {
            memory_pages: 256,
            batch_deadline_ms: 100,
            queue_events,
            publish_per_batch: 4096,
            log_per_batch: 64,
            kv_bytes: 1 << 20,
            kv_per_batch: 1000,
            timers: 8,
            table_elements: DEFAULT_TABLE_ELEMENTS as usize,
            instances: DEFAULT_INSTANCES as usize,
            weight: BASE_WEIGHT,
            queue_full: QueueFull::Wait,
        }
    }
}

/// What a manifest has that doesn't say.
#[derive(Clone, Debug)]
pub struct Defaults {
    pub limits: Limits,
    pub max_uses: Option<u64>,
}

impl Defaults {
    /// Those of a gateway whose configuration says nothing about it.
    pub fn new(queue_events: usize) -> Defaults {
        Defaults {
            limits: Limits::new(queue_events),
            max_uses: None,
        }
    }
}

/// The most that a manifest can ask of this gateway.
#[derive(Clone, Copy, Debug)]
pub struct MostLimits {
    pub memory_pages: u32,
    pub batch_deadline_ms: u64,
    pub kv_bytes: usize,
}

impl Default for MostLimits {
    fn default() -> MostLimits {
        MostLimits {
            memory_pages: *MEMORY_PAGES.end() as u32,
            batch_deadline_ms: *BATCH_DEADLINE_MS.end(),
            kv_bytes: *KV_BYTES.end() as usize,
        }
    }
}

/// A manifest asks for more than this gateway allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`limits.{key}` is {wanted}, and this gateway allows {allowed} (`apps.max_{key}`); ask for less, \
     or have the gateway allow more"
)]
pub struct TooMuch {
    key: &'static str,
    wanted: u64,
    allowed: u64,
}

impl MostLimits {
    pub(super) fn check(&self, limits: &Limits) -> Result<(), TooMuch> {
        let all = [
            (
                "memory_pages",
                limits.memory_pages.into(),
                self.memory_pages.into(),
            ),
            (
                "batch_deadline_ms",
                limits.batch_deadline_ms,
                self.batch_deadline_ms,
            ),
            ("kv_bytes", limits.kv_bytes as u64, self.kv_bytes as u64),
        ];
        match all
            .into_iter()
            .find(|(_, wanted, allowed)| wanted > allowed)
        {
            Some((key, wanted, allowed)) => Err(TooMuch {
                key,
                wanted,
                allowed,
            }),
            None => Ok(()),
        }
    }
}

/// Says which key is wrong, on which line, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", .line.map(|line| format!("line {line}: ")).unwrap_or_default())]
pub struct ManifestError {
    /// Line in the manifest, from 1.
    pub line: Option<usize>,
    pub message: String,
}

/// A manifest as TOML has it, with the places of what is checked further.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawManifest {
    name: Spanned<String>,
    version: Spanned<String>,
    description: Option<String>,
    component: Option<Spanned<String>>,
    subscribe: Spanned<Vec<Spanned<String>>>,
    #[serde(default)]
    publish: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(default)]
    config: BTreeMap<String, Spanned<Value>>,
    #[serde(default)]
    limits: RawLimits,
    #[serde(default)]
    restart: RawRestart,
    #[serde(default)]
    capabilities: Vec<Spanned<String>>,
    #[serde(default)]
    gpio: Vec<RawGpio>,
    #[serde(default)]
    sensor: Vec<RawSensor>,
    #[serde(default)]
    recycle: RawRecycle,
    #[serde(default)]
    upgrade: RawUpgrade,
    state_version: Option<Spanned<i64>>,
    #[serde(default)]
    placement: Placement,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRecycle {
    max_uses: Option<Spanned<i64>>,
    max_failures: Option<Spanned<i64>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUpgrade {
    trial_batches: Option<Spanned<i64>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRestart {
    retries: Option<Spanned<i64>>,
    first_pause_ms: Option<Spanned<i64>>,
    longest_pause_ms: Option<Spanned<i64>>,
    most_failures: Option<Spanned<i64>>,
    window_s: Option<Spanned<i64>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLimits {
    memory_pages: Option<Spanned<i64>>,
    batch_deadline_ms: Option<Spanned<i64>>,
    queue_events: Option<Spanned<i64>>,
    publish_per_batch: Option<Spanned<i64>>,
    log_per_batch: Option<Spanned<i64>>,
    kv_bytes: Option<Spanned<i64>>,
    kv_per_batch: Option<Spanned<i64>>,
    timers: Option<Spanned<i64>>,
    table_elements: Option<Spanned<i64>>,
    instances: Option<Spanned<i64>>,
    weight: Option<Spanned<i64>>,
    queue_full: Option<QueueFull>,
}

impl Manifest {
    /// Reads and checks a manifest. What it doesn't mention, `defaults` has.
    pub fn parse(text: &str, defaults: &Defaults) -> Result<Manifest, ManifestError> {
        if text.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError {
                line: None,
                message: format!(
                    "the manifest has {} bytes, and at most {MAX_MANIFEST_BYTES} are allowed",
                    text.len()
                ),
            });
        }
        let raw: RawManifest = toml::from_str(text).map_err(|error| ManifestError {
            line: error.span().map(|span| line_of(text, &span)),
            message: error.message().to_owned(),
        })?;
        let check = Check { text };
        check.name(&raw.name)?;
        check.version(&raw.version)?;
        let name = raw.name.into_inner();
        let component = match raw.component {
            Some(component) => check.component(component)?,
            None => format!("{name}.wasm"),
        };
        let devices = check.devices(&raw.capabilities, &raw.gpio, &raw.sensor)?;
        Ok(Manifest {
            component,
            version: raw.version.into_inner(),
            description: raw.description,
            subscribe: check.subscribe(&raw.subscribe, devices.make_events())?,
            publish: match &raw.publish {
                Some(filters) => check.publish(filters)?,
                None => Vec::new(),
            },
            config: check.config(raw.config)?,
            limits: check.limits(&raw.limits, &defaults.limits)?,
            restart: check.restart(&raw.restart)?,
            recycle: Recycle {
                max_uses: check
                    .number("recycle.max_uses", &raw.recycle.max_uses, MAX_USES)?
                    .or(defaults.max_uses),
                max_failures: check.number(
                    "recycle.max_failures",
                    &raw.recycle.max_failures,
                    MAX_FAILURES,
                )?,
            },
            trial_batches: check
                .number(
                    "upgrade.trial_batches",
                    &raw.upgrade.trial_batches,
                    TRIAL_BATCHES,
                )?
                .map_or(DEFAULT_TRIAL_BATCHES, |batches| batches as u32),
            state_version: check
                .number("state_version", &raw.state_version, STATE_VERSION)?
                .map_or(1, |version| version as u32),
            placement: raw.placement,
            devices,
            name,
        })
    }
}

/// The checks that TOML's types don't make.
struct Check<'a> {
    text: &'a str,
}

impl Check<'_> {
    fn error<T>(&self, at: &Spanned<T>, message: impl Display) -> ManifestError {
        ManifestError {
            line: Some(line_of(self.text, &at.span())),
            message: message.to_string(),
        }
    }

    fn name(&self, name: &Spanned<String>) -> Result<(), ManifestError> {
        let text = name.get_ref();
        let starts_well = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_.-".contains(c);
        if starts_well && text.len() <= MAX_NAME && text.chars().all(allowed) {
            return Ok(());
        }
        Err(self.error(
            name,
            format!(
                "`name`: {text:?} is no name for an app; take 1 to {MAX_NAME} of the characters \
                 a-z 0-9 _ . - and begin with a letter or a digit"
            ),
        ))
    }

    fn version(&self, version: &Spanned<String>) -> Result<(), ManifestError> {
        match semver::Version::parse(version.get_ref()) {
            Ok(_) => Ok(()),
            Err(error) => Err(self.error(
                version,
                format!(
                    "`version`: {:?} is no version ({error}); write it as in \"1.2.3\"",
                    version.get_ref()
                ),
            )),
        }
    }

    fn component(&self, component: Spanned<String>) -> Result<String, ManifestError> {
        let text = component.get_ref();
        if matches!(text.as_str(), "" | "." | "..") || text.contains(['/', '\\', '\0']) {
            return Err(self.error(
                &component,
                format!(
                    "`component`: {text:?} is no file name; put the component beside the manifest \
                     and name it without a folder"
                ),
            ));
        }
        Ok(component.into_inner())
    }

    fn subscribe(
        &self,
        filters: &Spanned<Vec<Spanned<String>>>,
        devices_make_events: bool,
    ) -> Result<Vec<TopicFilter>, ManifestError> {
        if filters.get_ref().is_empty() && !devices_make_events {
            return Err(self.error(
                filters,
                "`subscribe` is empty: an app without a topic filter would never get an event",
            ));
        }
        for filter in filters.get_ref() {
            if filter.get_ref().starts_with("$share/") {
                return Err(self.error(
                    filter,
                    format!(
                        "`subscribe`: {:?}: an app has no shared subscriptions; leave out the \
                         first two levels",
                        filter.get_ref()
                    ),
                ));
            }
            for (topics, sources) in [
                (TIMER_TOPICS, "timers"),
                (GPIO_TOPICS, "lines"),
                (SENSOR_TOPICS, "sensors"),
            ] {
                if filter.get_ref().starts_with(topics) {
                    return Err(self.error(
                        filter,
                        format!(
                            "`subscribe`: {:?}: an app gets the events of its {sources} without \
                             subscribing to them; leave this out",
                            filter.get_ref()
                        ),
                    ));
                }
            }
        }
        self.filters("subscribe", filters)
    }

    fn publish(
        &self,
        filters: &Spanned<Vec<Spanned<String>>>,
    ) -> Result<Vec<TopicFilter>, ManifestError> {
        for filter in filters.get_ref() {
            if filter.get_ref().starts_with('$') {
                return Err(self.error(
                    filter,
                    format!(
                        "`publish`: {:?}: topics that start with $ are the gateway's own; choose \
                         another",
                        filter.get_ref()
                    ),
                ));
            }
        }
        self.filters("publish", filters)
    }

    fn filters(
        &self,
        key: &str,
        filters: &Spanned<Vec<Spanned<String>>>,
    ) -> Result<Vec<TopicFilter>, ManifestError> {
        let count = filters.get_ref().len();
        if count > MAX_FILTERS {
            return Err(self.error(
                filters,
                format!(
                    "`{key}` has {count} topic filters, and at most {MAX_FILTERS} are allowed; \
                     put some together with + or #"
                ),
            ));
        }
        let parse = |filter: &Spanned<String>| {
            TopicFilter::new(filter.get_ref().as_str()).map_err(|error| {
                self.error(filter, format!("`{key}`: {:?}: {error}", filter.get_ref()))
            })
        };
        filters.get_ref().iter().map(parse).collect()
    }

    fn config(
        &self,
        config: BTreeMap<String, Spanned<Value>>,
    ) -> Result<BTreeMap<String, String>, ManifestError> {
        let to_text = |(key, value): (String, Spanned<Value>)| {
            let text = match value.get_ref() {
                Value::String(text) => text.clone(),
                Value::Integer(number) => number.to_string(),
                Value::Float(number) => number.to_string(),
                Value::Boolean(yes) => yes.to_string(),
                other => {
                    return Err(self.error(
                        &value,
                        format!(
                            "`config.{key}` is {} {}; give a string, a number or a boolean",
                            if matches!(other, Value::Array(_)) {
                                "an"
                            } else {
                                "a"
                            },
                            other.type_str()
                        ),
                    ));
                }
            };
            Ok((key, text))
        };
        config.into_iter().map(to_text).collect()
    }

    fn number(
        &self,
        key: &str,
        value: &Option<Spanned<i64>>,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, ManifestError> {
        let Some(value) = value else {
            return Ok(None);
        };
        let number = u64::try_from(*value.get_ref()).ok();
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.error(
                value,
                format!(
                    "`{key}`: {} is out of range; give {} to {}",
                    value.get_ref(),
                    range.start(),
                    range.end()
                ),
            )),
        }
    }

    fn restart(&self, raw: &RawRestart) -> Result<Restart, ManifestError> {
        let number = |key, value, range| self.number(&format!("restart.{key}"), value, range);
        let millis = |key, value| -> Result<_, ManifestError> {
            Ok(number(key, value, PAUSE_MS)?.map(Duration::from_millis))
        };
        let default = Restart::default();
        let retries = number("retries", &raw.retries, RETRIES)?;
        let most_failures = number("most_failures", &raw.most_failures, MOST_FAILURES)?;
        Ok(Restart {
            retries: retries.map_or(default.retries, |number| number as u32),
            first_pause: millis("first_pause_ms", &raw.first_pause_ms)?,
            longest_pause: millis("longest_pause_ms", &raw.longest_pause_ms)?,
            most_failures: most_failures.map(|number| number as usize),
            window: number("window_s", &raw.window_s, WINDOW_S)?.map(Duration::from_secs),
        })
    }

    fn limits(&self, raw: &RawLimits, default: &Limits) -> Result<Limits, ManifestError> {
        let number = |key, value: &Option<Spanned<i64>>, range, default| {
            let number = self.number(&format!("limits.{key}"), value, range)?;
            Ok(number.unwrap_or(default))
        };
        Ok(Limits {
            memory_pages: number(
                "memory_pages",
                &raw.memory_pages,
                MEMORY_PAGES,
                default.memory_pages.into(),
            )? as u32,
            batch_deadline_ms: number(
                "batch_deadline_ms",
                &raw.batch_deadline_ms,
                BATCH_DEADLINE_MS,
                default.batch_deadline_ms,
            )?,
            queue_events: number(
                "queue_events",
                &raw.queue_events,
                QUEUE_EVENTS,
                default.queue_events as u64,
            )? as usize,
            publish_per_batch: number(
                "publish_per_batch",
                &raw.publish_per_batch,
                PUBLISH_PER_BATCH,
                default.publish_per_batch.into(),
            )? as u32,
            log_per_batch: number(
                "log_per_batch",
                &raw.log_per_batch,
                LOG_PER_BATCH,
                default.log_per_batch.into(),
            )? as u32,
            kv_bytes: number("kv_bytes", &raw.kv_bytes, KV_BYTES, default.kv_bytes as u64)?
                as usize,
            kv_per_batch: number(
                "kv_per_batch",
                &raw.kv_per_batch,
                KV_PER_BATCH,
                default.kv_per_batch.into(),
            )? as u32,
            timers: number("timers", &raw.timers, TIMERS, default.timers as u64)? as usize,
            table_elements: number(
                "table_elements",
                &raw.table_elements,
                TABLE_ELEMENTS,
                default.table_elements as u64,
            )? as usize,
            instances: number(
                "instances",
                &raw.instances,
                INSTANCES,
                default.instances as u64,
            )? as usize,
            weight: number("weight", &raw.weight, WEIGHT, default.weight.into())? as u32,
            queue_full: raw.queue_full.unwrap_or_default(),
        })
    }
}

/// The line, from 1, on which `span` begins.
fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = &text.as_bytes()[..span.start.min(text.len())];
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMALLEST: &str = "name = \"a\"\nversion = \"0.1.0\"\nsubscribe = [\"plant/#\"]\n";

    fn error(text: &str) -> String {
        match Manifest::parse(text, &Defaults::new(100)) {
            Ok(manifest) => panic!("accepted: {manifest:?}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_smallest_manifest_gets_the_defaults() {
        let manifest = Manifest::parse(SMALLEST, &Defaults::new(100)).unwrap();
        assert_eq!(manifest.component, "a.wasm");
        assert_eq!(manifest.limits, Limits::new(100));
        assert_eq!(manifest.publish, []);
        assert!(manifest.config.is_empty());
    }

    #[test]
    fn a_full_manifest_is_read() {
        let manifest = Manifest::parse(
            r##"
            name = "overheat-alarm"
            version = "1.2.3-rc.1"
            description = "Raises alarms"
            component = "alarm.wasm"
            state_version = 2
            subscribe = ["plant/+/temperature", "lab/#"]
            publish = ["alarms/#"]

            [config]
            limit = 90
            hysteresis = 2.5
            unit = "C"
            verbose = true

            [limits]
            memory_pages = 64
            batch_deadline_ms = 20
            queue_events = 10
            publish_per_batch = 0
            log_per_batch = 1
            kv_bytes = 67108864
            kv_per_batch = 0
            timers = 1024
            table_elements = 10
            instances = 3
            weight = 300
            queue_full = "drop-oldest"

            [restart]
            retries = 0
            first_pause_ms = 50
            most_failures = 3

            [recycle]
            max_uses = 1000

            [upgrade]
            trial_batches = 3
            "##,
            &Defaults::new(100),
        )
        .unwrap();
        assert_eq!(manifest.component, "alarm.wasm");
        let config: Vec<_> = manifest.config.iter().map(|(k, v)| (&**k, &**v)).collect();
        assert_eq!(
            config,
            [
                ("hysteresis", "2.5"),
                ("limit", "90"),
                ("unit", "C"),
                ("verbose", "true")
            ]
        );
        let limits = Limits {
            memory_pages: 64,
            batch_deadline_ms: 20,
            queue_events: 10,
            publish_per_batch: 0,
            log_per_batch: 1,
            kv_bytes: 64 << 20,
            kv_per_batch: 0,
            timers: 1024,
            table_elements: 10,
            instances: 3,
            weight: 300,
            queue_full: QueueFull::DropOldest,
        };
        assert_eq!(manifest.limits, limits);
        assert_eq!((manifest.trial_batches, manifest.state_version), (3, 2));
        assert_eq!(manifest.recycle.max_uses, Some(1000));
        assert_eq!(manifest.recycle.max_failures, None);
        let default = RestartPolicy::default();
        let policy = manifest.restart.policy(default);
        assert_eq!(
            (
                manifest.restart.retries,
                policy.first_pause,
                policy.most_failures
            ),
            (0, Duration::from_millis(50), 3)
        );
        assert_eq!(
            (policy.longest_pause, policy.window),
            (default.longest_pause, default.window)
        );
    }

    #[test]
    fn names_are_checked() {
        for name in ["a", "0", "a.b_c-d", &"a".repeat(64)] {
            let text = SMALLEST.replace("\"a\"", &format!("{name:?}"));
            assert_eq!(
                Manifest::parse(&text, &Defaults::new(1)).unwrap().name,
                name
            );
        }
        for name in ["", "a/b", "A", ".a", "-a", "ä", "a b", &"a".repeat(65)] {
            let message = error(&SMALLEST.replace("\"a\"", &format!("{name:?}")));
            assert!(message.starts_with("line 1: `name`:"), "{message}");
            assert!(message.contains("a-z 0-9"), "{message}");
        }
    }

    #[test]
    fn a_wrong_manifest_is_told_line_key_and_remedy() {
        let with = |line: &str| format!("{SMALLEST}{line}\n");
        let cases = [
            (
                SMALLEST.replace("plant/#", "plant/#/x"),
                "line 3: `subscribe`: \"plant/#/x\": `#` must be the last level",
            ),
            (
                SMALLEST.replace("\"plant/#\"", ""),
                "line 3: `subscribe` is empty",
            ),
            (
                SMALLEST.replace("plant/#", "$share/g/plant"),
                "no shared subscriptions",
            ),
            (
                SMALLEST.replace("0.1.0", "1"),
                "line 2: `version`: \"1\" is no version",
            ),
            (
                SMALLEST.replace("version = \"0.1.0\"", ""),
                "missing field `version`",
            ),
            (
                with("publish = [\n\"ok\",\n\"a+\"]"),
                "line 6: `publish`: \"a+\": `+` must stand alone",
            ),
            (
                with("publish = [\"$SYS/x\"]"),
                "line 4: `publish`: \"$SYS/x\": topics that start with $",
            ),
            (
                with("subscribes = []"),
                "line 4: unknown field `subscribes`",
            ),
            (
                with("component = \"../a.wasm\""),
                "line 4: `component`: \"../a.wasm\" is no file name",
            ),
            (with("component = \"\""), "is no file name"),
            (
                with("[limits]\nmemory_pages = 1025"),
                "line 5: `limits.memory_pages`: 1025 is out of range; give 1 to 1024",
            ),
            (with("[limits]\nbatch_deadline_ms = 0"), "give 1 to 60000"),
            (
                with("[restart]\nretries = 11"),
                "line 5: `restart.retries`: 11 is out of range; give 0 to 10",
            ),
            (
                with("[restart]\nwindow = 1"),
                "line 5: unknown field `window`",
            ),
            (
                with("[limits]\nqueue_events = -1"),
                "line 5: `limits.queue_events`: -1 is out of range",
            ),
            (
                with("[limits]\nkv_bytes = 67108865"),
                "line 5: `limits.kv_bytes`: 67108865 is out of range; give 0 to 67108864",
            ),
            (with("[limits]\ntimers = 1025"), "give 0 to 1024"),
            (
                SMALLEST.replace("plant/#", "$timer/tick"),
                "line 3: `subscribe`: \"$timer/tick\": an app gets the events of its timers",
            ),
            (
                with("[limits]\nmemory = 1"),
                "line 5: unknown field `memory`",
            ),
            (
                with("[limits]\nlog_per_batch = \"many\""),
                "line 5: invalid type",
            ),
            (
                with("[config]\nlist = [1]"),
                "line 5: `config.list` is an array; give a string",
            ),
            (
                with("[config]\nday = 2026-01-01"),
                "`config.day` is a datetime",
            ),
            (with("name = \"b\""), "line 4: duplicate key"),
            (with("= 1"), "line 4: "),
            (
                with(&format!("publish = [{}]", "\"a\",".repeat(65))),
                "`publish` has 65 topic filters",
            ),
            (with(&"#".repeat(70_000)), "at most 65536 are allowed"),
        ];
        for (text, expected) in cases {
            let message = error(&text);
            assert!(
                message.contains(expected),
                "expected {expected:?}, got {message:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(name|version|subscribe|\\[limits\\]|=|\"|\\[|\\]|a|1|\n|,|'|\\PC){0,40}") {
            let _ = Manifest::parse(&text, &Defaults::new(1));
        }
    }
}
