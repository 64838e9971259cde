//! What an app can do to the world outside: the host side of the interface in `wit/`, with its
//! quotas and limits.
//!
//! Nothing that an app hands out leaves before its call has ended well: [`CallState`] gathers it.

mod clocks;
mod gpio;
mod keyvalue;
mod measures;
mod random;
mod state;
mod timers;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rustc_hash::FxHashMap;
use wasmtime::component::{ComponentType, Lift, Linker, Lower, WasmStr};
use wasmtime::{ResourceLimiter, StoreContextMut, UpdateDeadline};

use super::instance_devices::InstanceDevices;
use super::instance_timers::InstanceTimers;
use super::kv::{AppState, StagedState};
use super::log::{AppLog, Complaint, MAX_CONTEXT, MAX_MESSAGE, cut};
use super::manifest::{Limits, Manifest, WASM_PAGE};
use super::measures::Measures;
use super::services::AppServices;
use super::status::{LogLevel, RefusedCalls};
use super::timer_set::Requests;
use crate::event::{Event, Topic, unix_time_ns};

pub(super) const LOGGING: &str = "wasi:logging/logging@0.1.0-draft";
pub(super) const CONFIG: &str = "wasi:config/store@0.2.0-draft";
pub(super) const PUBLISHER: &str = "headgate:app/publisher@0.1.0";
pub(super) const TYPES: &str = "headgate:app/types@0.1.0";

/// All that an app can import.
pub(super) const INTERFACES: [&str; 16] = [
    LOGGING,
    CONFIG,
    PUBLISHER,
    TYPES,
    keyvalue::STORE,
    keyvalue::ATOMICS,
    keyvalue::BATCH,
    state::STATE,
    clocks::MONOTONIC,
    clocks::WALL,
    random::SECURE,
    random::INSECURE,
    random::SEED,
    timers::TIMERS,
    measures::METRICS,
    gpio::GPIO,
];

/// The functions in them.
pub(super) const FUNCTIONS: [(&str, &str); 33] = [
    (LOGGING, "log"),
    (CONFIG, "get"),
    (CONFIG, "get-all"),
    (PUBLISHER, "publish"),
    (keyvalue::STORE, "open"),
    (keyvalue::STORE, "[method]bucket.get"),
    (keyvalue::STORE, "[method]bucket.set"),
    (keyvalue::STORE, "[method]bucket.delete"),
    (keyvalue::STORE, "[method]bucket.exists"),
    (keyvalue::STORE, "[method]bucket.list-keys"),
    (keyvalue::ATOMICS, "increment"),
    (keyvalue::BATCH, "get-many"),
    (keyvalue::BATCH, "set-many"),
    (keyvalue::BATCH, "delete-many"),
    (state::STATE, "version"),
    (clocks::MONOTONIC, "now"),
    (clocks::MONOTONIC, "resolution"),
    (clocks::WALL, "now"),
    (clocks::WALL, "resolution"),
    (random::SECURE, "get-random-bytes"),
    (random::SECURE, "get-random-u64"),
    (random::INSECURE, "get-insecure-random-bytes"),
    (random::INSECURE, "get-insecure-random-u64"),
    (random::SEED, "insecure-seed"),
    (timers::TIMERS, "set-interval"),
    (timers::TIMERS, "set-once"),
    (timers::TIMERS, "set-wall"),
    (timers::TIMERS, "cancel"),
    (measures::METRICS, "counter-add"),
    (measures::METRICS, "gauge-set"),
    (measures::METRICS, "histogram-record"),
    (gpio::GPIO, "get"),
    (gpio::GPIO, "set"),
];

/// Most bytes that cross from an app to the host in one step (an argument list, a result). Bounds
/// what lists of overlapping strings could blow up to.
pub(super) const MAX_COPY_BYTES: usize = 16 << 20;

/// Most bytes that one call can hand out, over all its events.
const MAX_OUTPUT_BYTES: usize = 32 << 20;

/// Most tables and memories of one app. Components as the toolchains make them have one or two.
const MAX_TABLES: usize = 16;
const MAX_MEMORIES: usize = 16;

/// `event` on its way into an app.
#[derive(Clone, Copy, ComponentType, Lower)]
#[component(record)]
pub(super) struct EventIn<'a> {
    pub(super) topic: &'a str,
    pub(super) payload: &'a [u8],
    pub(super) timestamp: u64,
}

impl<'a> From<&'a Event> for EventIn<'a> {
    fn from(event: &'a Event) -> EventIn<'a> {
        EventIn {
            topic: event.topic.as_str(),
            payload: &event.payload,
            timestamp: event.timestamp_ns,
        }
    }
}

/// `event` as an app hands it out.
#[derive(Clone, ComponentType, Lift)]
#[component(record)]
pub(super) struct OwnedEvent {
    topic: String,
    payload: Vec<u8>,
    timestamp: u64,
}

/// An event that an app hands out, in whichever way.
pub(super) struct EventOut<'a> {
    pub(super) topic: Cow<'a, str>,
    pub(super) payload: Cow<'a, [u8]>,
    pub(super) timestamp: u64,
}

impl From<OwnedEvent> for EventOut<'_> {
    fn from(event: OwnedEvent) -> Self {
        EventOut {
            topic: event.topic.into(),
            payload: event.payload.into(),
            timestamp: event.timestamp,
        }
    }
}

#[derive(Clone, Copy, ComponentType, Lift)]
#[component(enum)]
#[allow(dead_code, reason = "values come from apps only")]
#[repr(u8)]
enum Level {
    #[component(name = "trace")]
    Trace,
    #[component(name = "debug")]
    Debug,
    #[component(name = "info")]
    Info,
    #[component(name = "warn")]
    Warn,
    #[component(name = "error")]
    Error,
    #[component(name = "critical")]
    Critical,
}

impl From<Level> for LogLevel {
    fn from(level: Level) -> LogLevel {
        match level {
            Level::Trace => LogLevel::Trace,
            Level::Debug => LogLevel::Debug,
            Level::Info => LogLevel::Info,
            Level::Warn => LogLevel::Warn,
            Level::Error => LogLevel::Error,
            Level::Critical => LogLevel::Critical,
        }
    }
}

/// `publish-error`
#[derive(ComponentType, Lower)]
#[component(variant)]
enum PublishError {
    #[component(name = "invalid-topic")]
    InvalidTopic(String),
    #[component(name = "denied")]
    Denied(String),
    #[component(name = "quota-exceeded")]
    QuotaExceeded,
}

/// `error` of `wasi:config/store`. Reading a map never fails.
#[derive(ComponentType, Lower)]
#[component(variant)]
#[allow(dead_code, reason = "the interface has these cases")]
enum ConfigError {
    #[component(name = "upstream")]
    Upstream(String),
    #[component(name = "io")]
    Io(String),
}

/// Puts what the world imports into `linker`.
pub(super) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker.instance(TYPES)?;

    linker.instance(LOGGING)?.func_wrap(
        "log",
        |mut store: StoreContextMut<HostState>,
         (level, context, message): (Level, WasmStr, WasmStr)| {
            if store.data_mut().call.may_log() {
                let context = cut(&context.to_str(&store)?, MAX_CONTEXT).to_owned();
                let message = cut(&message.to_str(&store)?, MAX_MESSAGE).to_owned();
                store.data().log.app_line(level.into(), &context, &message);
            }
            Ok(())
        },
    )?;

    let mut config = linker.instance(CONFIG)?;
    config.func_wrap(
        "get",
        |store: StoreContextMut<HostState>, (key,): (WasmStr,)| {
            let value = store.data().config().get(&*key.to_str(&store)?).cloned();
            Ok((Ok::<Option<String>, ConfigError>(value),))
        },
    )?;
    config.func_wrap("get-all", |store: StoreContextMut<HostState>, (): ()| {
        let all: Vec<(String, String)> = store
            .data()
            .config()
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        Ok((Ok::<_, ConfigError>(all),))
    })?;

    linker.instance(PUBLISHER)?.func_wrap(
        "publish",
        |mut store: StoreContextMut<HostState>, (events,): (Vec<OwnedEvent>,)| {
            Ok((store.data_mut().publish(events),))
        },
    )?;
    keyvalue::add_to_linker(linker)?;
    state::add_to_linker(linker)?;
    clocks::add_to_linker(linker)?;
    random::add_to_linker(linker)?;
    timers::add_to_linker(linker)?;
    gpio::add_to_linker(linker)?;
    measures::add_to_linker(linker)
}

/// What belongs to one live instance.
pub(super) struct HostState {
    pub(super) manifest: Arc<Manifest>,
    log: Arc<AppLog>,
    pub(super) limiter: Limiter,
    pub(super) call: CallState,
    pub(super) watch: CallWatch,
    /// Topics that this instance has published to and may: checking costs more than looking up.
    known_topics: FxHashMap<Box<str>, Topic>,
    /// What the app keeps for what the present call is about.
    state: Arc<AppState>,
    services: Arc<AppServices>,
    handles: keyvalue::Handles,
    /// None until the instance sets the first one.
    timers: Option<Arc<InstanceTimers>>,
    /// None if the manifest names none.
    devices: Option<InstanceDevices>,
}

/// Topics that an instance's outputs are looked up in.
const KNOWN_TOPICS: usize = 512;

/// What one call has handed out and used so far.
#[derive(Default)]
pub(super) struct CallState {
    /// Checked and within the quota.
    outputs: Vec<Output>,
    output_bytes: usize,
    publish_left: u32,
    log_left: u32,
    tally: Tally,
    /// None as long as the call uses none of it, as most do.
    staged: Option<Box<Staged>>,
}

/// What takes effect when the call has ended well, besides the outputs.
#[derive(Default)]
struct Staged {
    state: StagedState,
    kv_calls_left: u32,
    timers: Requests,
    measures: Measures,
    outputs: gpio::Outputs,
}

/// An event that an app hands out, checked.
pub(super) struct Output {
    pub(super) topic: Topic,
    pub(super) payload: Bytes,
    pub(super) timestamp_ns: u64,
}

/// What a call was refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) denied: u64,
    pub(super) over_publish_quota: u64,
    pub(super) over_log_quota: u64,
    pub(super) calls: RefusedCalls,
    /// GPIO lines that could not be set when the call had ended.
    pub(super) unset_outputs: u64,
}

impl Tally {
    /// Everything together.
    pub(super) fn refused(&self) -> u64 {
        self.denied + self.over_publish_quota + self.over_log_quota + self.calls.total()
    }
}

/// Why an output can't go out.
enum Refusal {
    InvalidTopic(String),
    Denied(String),
}

impl CallState {
    fn may_log(&mut self) -> bool {
        let may = self.log_left > 0;
        if may {
            self.log_left -= 1;
        } else {
            self.tally.over_log_quota += 1;
        }
        may
    }

    fn staged(&mut self, limits: &Limits) -> &mut Staged {
        self.staged.get_or_insert_with(|| {
            Box::new(Staged {
                kv_calls_left: limits.kv_per_batch,
                ..Staged::default()
            })
        })
    }

    /// Whether `count` more events of `bytes` fit in the quota.
    fn fits(&self, count: usize, bytes: usize) -> bool {
        count <= self.publish_left as usize && bytes <= MAX_OUTPUT_BYTES - self.output_bytes
    }
}

impl HostState {
    pub(super) fn new(
        manifest: Arc<Manifest>,
        log: Arc<AppLog>,
        watch: Arc<Watch>,
        services: Arc<AppServices>,
    ) -> HostState {
        let limiter = Limiter::new(&manifest.limits);
        let deadline = Duration::from_millis(manifest.limits.batch_deadline_ms);
        HostState {
            manifest,
            log,
            limiter,
            call: CallState::default(),
            state: services.state(),
            known_topics: FxHashMap::default(),
            services,
            handles: keyvalue::Handles::default(),
            timers: None,
            devices: None,
            watch: CallWatch {
                deadline,
                began: None,
                watch,
            },
        }
    }

    /// Takes the devices that the manifest names. To be called before the first call.
    pub(super) fn open_devices(&mut self) -> Result<(), String> {
        let devices = &self.manifest.devices;
        if !devices.gpio.is_empty() || !devices.sensors.is_empty() {
            let open = InstanceDevices::open(&self.manifest.name, devices, &self.services)?;
            self.devices = Some(open);
        }
        Ok(())
    }

    /// To be called before each call, with what the app keeps for what the call is about.
    pub(super) fn begin_call(&mut self, state: Arc<AppState>) {
        self.state = state;
        self.call = CallState {
            publish_left: self.manifest.limits.publish_per_batch,
            log_left: self.manifest.limits.log_per_batch,
            ..CallState::default()
        };
        self.watch.began = None;
    }

    /// The app gets this batch next.
    pub(super) fn arrive(&self, batch: &[Event]) {
        if let Some(timers) = &self.timers {
            timers.arrive(batch);
        }
    }

    /// The call about these events has ended well: what it has staged takes effect.
    pub(super) fn commit(&mut self, events: &[Event]) {
        let mut staged = self.call.staged.take();
        let state = staged
            .as_mut()
            .map(|staged| std::mem::take(&mut staged.state));
        self.state.commit(state.unwrap_or_default(), events);
        if let Some(staged) = staged {
            if !staged.measures.is_empty() {
                self.services.measures.lock().commit(staged.measures);
            }
            self.commit_timers(staged.timers);
            self.commit_outputs(staged.outputs);
        }
    }

    /// The call has failed: what it has staged never was.
    pub(super) fn abandon(&mut self) {
        self.call.staged = None;
    }

    /// Takes what the call has handed out, and `results`, what it has returned.
    pub(super) fn take_outputs<'a>(
        &mut self,
        results: impl ExactSizeIterator<Item = EventOut<'a>>,
    ) -> Vec<Output> {
        let now = unix_time_ns();
        self.call
            .outputs
            .reserve(results.len().min(self.call.publish_left as usize));
        let mut refused_by_quota = 0;
        for event in results {
            if !self.call.fits(1, event.bytes()) {
                refused_by_quota += 1;
                continue;
            }
            match self.check(event, now) {
                Ok(output) => self.accept(output),
                Err(Refusal::InvalidTopic(why) | Refusal::Denied(why)) => {
                    self.call.tally.denied += 1;
                    self.log.complain(Complaint::Denied, || {
                        format!("an output was dropped: {why}")
                    });
                }
            }
        }
        self.over_quota(refused_by_quota);
        mem::take(&mut self.call.outputs)
    }

    /// Takes what the call was refused.
    pub(super) fn take_tally(&mut self) -> Tally {
        mem::take(&mut self.call.tally)
    }

    /// All of `events`, or none.
    fn publish(&mut self, events: Vec<OwnedEvent>) -> Result<(), PublishError> {
        let bytes = events.iter().map(|e| e.topic.len() + e.payload.len()).sum();
        if !self.call.fits(events.len(), bytes) {
            self.over_quota(events.len() as u64);
            return Err(PublishError::QuotaExceeded);
        }
        let now = unix_time_ns();
        let count = events.len() as u64;
        let checked: Result<Vec<_>, _> = events
            .into_iter()
            .map(|e| self.check(e.into(), now))
            .collect();
        match checked {
            Ok(outputs) => {
                outputs.into_iter().for_each(|output| self.accept(output));
                Ok(())
            }
            Err(refusal) => {
                self.call.tally.denied += count;
                let (why, error) = match refusal {
                    Refusal::InvalidTopic(why) => (why.clone(), PublishError::InvalidTopic(why)),
                    Refusal::Denied(why) => (why.clone(), PublishError::Denied(why)),
                };
                self.log
                    .complain(Complaint::Denied, || format!("publish was refused: {why}"));
                Err(error)
            }
        }
    }

    fn accept(&mut self, output: Output) {
        self.call.publish_left -= 1;
        self.call.output_bytes += output.topic.as_bytes().len() + output.payload.len();
        self.call.outputs.push(output);
    }

    fn over_quota(&mut self, events: u64) {
        if events == 0 {
            return;
        }
        self.call.tally.over_publish_quota += events;
        self.log.complain(Complaint::OverQuota, || {
            format!(
                "handed out more than a call may ({} events, {MAX_OUTPUT_BYTES} bytes): the rest \
                 was dropped; raise `limits.publish_per_batch` if the app is right",
                self.manifest.limits.publish_per_batch
            )
        });
    }

    fn check(&mut self, event: EventOut<'_>, now: u64) -> Result<Output, Refusal> {
        let topic = match self.known_topics.get(&*event.topic) {
            Some(topic) => topic.clone(),
            None => {
                let topic = self.check_topic(&event.topic)?;
                if self.known_topics.len() >= KNOWN_TOPICS {
                    self.known_topics.clear();
                }
                self.known_topics
                    .insert((*event.topic).into(), topic.clone());
                topic
            }
        };
        Ok(Output {
            topic,
            payload: event.payload.into_owned().into(),
            timestamp_ns: match event.timestamp {
                0 => now,
                timestamp => timestamp,
            },
        })
    }

    fn check_topic(&self, name: &str) -> Result<Topic, Refusal> {
        if name.starts_with('$') {
            return Err(Refusal::Denied(format!(
                "{:?}: topics that start with $ are the gateway's own",
                cut(name, 128)
            )));
        }
        if !self
            .manifest
            .publish
            .iter()
            .any(|filter| filter.matches(name))
        {
            return Err(Refusal::Denied(format!(
                "no filter in the manifest's `publish` covers the topic {:?}",
                cut(name, 128)
            )));
        }
        Topic::new(name.to_owned()).map_err(|error| Refusal::InvalidTopic(error.to_string()))
    }

    fn config(&self) -> &BTreeMap<String, String> {
        &self.manifest.config
    }
}

impl EventOut<'_> {
    fn bytes(&self) -> usize {
        self.topic.len() + self.payload.len()
    }
}

/// Bounds the memory of one instance. A refused growth is a trap: hardly any program survives a
/// refused allocation in an orderly way, and a trap says what it was.
pub(super) struct Limiter {
    max_bytes: usize,
    max_table_elements: usize,
    max_instances: usize,
    /// Over all memories.
    bytes: usize,
    /// Over all tables.
    table_elements: usize,
    refused: u64,
}

impl Limiter {
    fn new(limits: &Limits) -> Limiter {
        Limiter {
            max_bytes: limits.memory_bytes(),
            max_table_elements: limits.table_elements,
            max_instances: limits.instances,
            bytes: 0,
            table_elements: 0,
            refused: 0,
        }
    }

    /// Linear memory of the instance now.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Growths that were refused.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let bytes = self.bytes + (desired - current);
        if bytes > self.max_bytes {
            self.refused += 1;
            return Err(Interruption::Memory {
                wanted_pages: bytes.div_ceil(WASM_PAGE),
                max_pages: self.max_bytes / WASM_PAGE,
            }
            .into());
        }
        self.bytes = bytes;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let elements = self.table_elements + (desired - current);
        if elements > self.max_table_elements {
            self.refused += 1;
            return Err(Interruption::Tables {
                wanted: elements,
                max: self.max_table_elements,
            }
            .into());
        }
        self.table_elements = elements;
        Ok(true)
    }

    fn instances(&self) -> usize {
        self.max_instances
    }

    fn tables(&self) -> usize {
        MAX_TABLES
    }

    fn memories(&self) -> usize {
        MAX_MEMORIES
    }
}

/// Why the host ended a call.
#[derive(Debug)]
pub(super) enum Interruption {
    Deadline {
        limit: Duration,
    },
    Stopped,
    Memory {
        wanted_pages: usize,
        max_pages: usize,
    },
    Tables {
        wanted: usize,
        max: usize,
    },
    Random {
        wanted: u64,
    },
}

impl fmt::Display for Interruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Interruption::Deadline { limit } => write!(
                f,
                "took more CPU time than `limits.batch_deadline_ms` ({}) allows",
                limit.as_millis()
            ),
            Interruption::Stopped => f.write_str("was interrupted because the app is to stop"),
            Interruption::Memory {
                wanted_pages,
                max_pages,
            } => write!(
                f,
                "wanted {wanted_pages} pages of memory, and `limits.memory_pages` is {max_pages}"
            ),
            Interruption::Tables { wanted, max } => write!(
                f,
                "wanted tables of {wanted} elements, and `limits.table_elements` is {max}"
            ),
            Interruption::Random { wanted } => write!(
                f,
                "wanted {wanted} random bytes at once, and {} are the most",
                random::MAX_RANDOM_BYTES
            ),
        }
    }
}

impl std::error::Error for Interruption {}

/// A call that has used this much CPU time counts as stalled.
const STALLED: Duration = Duration::from_millis(20);

/// How a running call and the outside see each other.
pub(super) struct Watch {
    /// From outside: end the call.
    abort: AtomicBool,
    /// From inside: the call has used more CPU time than [`STALLED`].
    stalled: AtomicBool,
    /// Called once a call when it becomes stalled.
    on_stall: Box<dyn Fn() + Send + Sync>,
}

impl Watch {
    pub(super) fn new(on_stall: impl Fn() + Send + Sync + 'static) -> Watch {
        Watch {
            abort: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            on_stall: Box::new(on_stall),
        }
    }

    pub(super) fn set_abort(&self, abort: bool) {
        self.abort.store(abort, Ordering::Release);
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Acquire)
    }

    /// To be called when a call has ended.
    pub(super) fn call_ended(&self) {
        if self.is_stalled() {
            self.stalled.store(false, Ordering::Release);
        }
    }
}

/// A [`Watch`] from the side of the call.
pub(super) struct CallWatch {
    deadline: Duration,
    /// The thread's CPU time at the first look at this call. Counting from there instead of from
    /// the beginning is wrong by one epoch at most, and spares short calls two system calls.
    began: Option<Duration>,
    watch: Arc<Watch>,
}

impl CallWatch {
    /// A look at the running call, once an epoch. CPU time decides, not the time of day: on a busy
    /// or suspended machine, an app isn't to blame for the time that it didn't get.
    pub(super) fn look(&mut self) -> wasmtime::Result<UpdateDeadline> {
        if self.watch.abort.load(Ordering::Acquire) {
            return Err(Interruption::Stopped.into());
        }
        let now = thread_cpu_time();
        let used = now.saturating_sub(*self.began.get_or_insert(now));
        if used >= self.deadline {
            return Err(Interruption::Deadline {
                limit: self.deadline,
            }
            .into());
        }
        if used >= STALLED && !self.watch.stalled.swap(true, Ordering::AcqRel) {
            (self.watch.on_stall)();
        }
        Ok(UpdateDeadline::Continue(1))
    }
}

/// CPU time that this thread has used.
pub(super) fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for writes, and this clock is there on every Linux.
    #[allow(unsafe_code)]
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0, "the thread's CPU clock can be read");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
