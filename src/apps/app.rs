//! One app at run time: its queue, its accounting, its turns on a worker.
//!
//! Three kinds of threads meet here. The pipeline offers batches, workers take turns (never two at
//! once on one app), the control side and the timer change the state. What they share stands in
//! [`Inside`], behind a lock that is held for moments and never across a call into the app.

mod seat;
mod upgrade;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::breaker::Breaker;
use super::durations::Durations;
use super::engine::{CallError, Instance, LoadedComponent};
use super::fair_queue::{BASE_WEIGHT, VirtualTime};
use super::host::{Output, Tally, Watch};
use super::log::{AppLog, Complaint};
use super::manifest::{Limits, Manifest, QueueFull, Recycle, WASM_PAGE};
use super::measures::MeasuresText;
use super::preinstalled::AppFolder;
use super::services::{AppServices, Total};
use super::status::{AppCounters, AppInfo, AppState, LogLevel, Origin, Restarts, StateUsage};
use super::supervisor::{RestartPolicy, Supervisor, Verdict};
use super::suspects::Suspects;
use super::workers::Shared;
use crate::dead_letters::{DeadLetter, Reason};
use crate::event::{Batch, Event, Lane, TopicFilter, unix_time_ns};
use crate::pipeline::{
    Load, NotJournaled, Offer, Outlet, Pressure, Queue, Queued, Step, event_bytes,
};
use crate::site::Placement;
use crate::store::ComponentId;
pub(super) use upgrade::{Previous, Successor};

/// Of an app's memory, one call's events may fill an eighth, for the app needs some to work with;
/// so that large payloads make for smaller batches, not for apps that run out of memory. An event
/// that is larger than a quarter never gets to the app.
const CALL_SHARE: usize = 8;
const EVENT_SHARE: usize = 4;

/// An app rests after a long call that failed, or in which it was refused so much that it does little
/// else, so that such calls take no more than this part of one worker's time from the others. After
/// short ones that is not worth a timer.
const FAILURES_SHARE: u32 = 10;
const FLOOD: u64 = 1000;
const LONG_FAILURE: Duration = Duration::from_millis(1);

/// A new number whenever somebody starts, stops or replaces the app. What a worker brings back from
/// an older generation is counted, and otherwise forgotten.
type Generation = u64;

pub(super) struct App {
    name: Arc<str>,
    shared: Arc<Shared>,
    this: Weak<App>,
    inside: Mutex<Inside>,
    /// Notified when the state has changed and when a turn has ended.
    changed: Condvar,
    /// Held by the worker whose turn it is. There is an instance whenever the app is running.
    instance: Mutex<Option<Instance>>,
    /// A copy of what `inside` says, for [`Outlet::is_idle`].
    idle: AtomicBool,
    /// How much of the workers' time it has had.
    virtual_time: Mutex<VirtualTime>,
    watch: Arc<Watch>,
    log: Arc<AppLog>,
    services: Arc<AppServices>,
}

struct Inside {
    supervisor: Supervisor,
    generation: Generation,
    package: Package,
    /// To be run; none if it could not be loaded, or needn't be because the app is stopped.
    component: Option<LoadedComponent>,
    /// Is to stop once its queue is empty. Takes nothing more.
    draining: bool,
    reason: Option<String>,
    since_ms: u64,
    last_error: Option<String>,
    queue: Queue,
    realtime: RealtimeLoad,
    /// What is left of a batch that failed. Comes before the queue.
    suspects: Suspects<Event>,
    breaker: Breaker,
    /// Events that a worker is at.
    in_call: usize,
    /// Is in the run queue, or a worker has it.
    scheduled: bool,
    /// The pipeline holds a batch back until it is told of progress.
    refused: bool,
    /// Whether there is an instance that is to go on.
    alive: bool,
    /// Batches that the instance has had, and those of them that it failed with.
    uses: u64,
    failures: u64,
    /// The instance is to stay until the one that starts is configured.
    keeps_instance: bool,
    /// Gets no turn until an upgrade or a rollback is through.
    held: bool,
    /// Until when it rests.
    rests_until: Option<Instant>,
    /// What there is to go back to.
    previous: Option<Previous>,
    /// The subscriptions have changed.
    reroutes: bool,
    /// Is to be paused before it is handed anything.
    starts_paused: bool,
    counters: AppCounters,
    durations: Durations,
    /// The counters and restarts that the metrics know of.
    recorded: (AppCounters, Restarts),
    memory_bytes: usize,
    peak_memory_bytes: usize,
    /// How long the last start took.
    cold_start: Option<Duration>,
}

/// How realtime events have done since the pipeline asked last.
#[derive(Default)]
struct RealtimeLoad {
    load: Load,
    /// Time in calls with whatever events.
    busy: Duration,
    asked: Option<Instant>,
    /// When the call under way began, and since when the first event in it had waited if it is a realtime
    /// one.
    call: Option<(Instant, Option<Instant>)>,
}

/// What was counted since the last scrape.
pub(super) struct SinceLast {
    pub(super) counters: AppCounters,
    pub(super) restarts: Restarts,
    pub(super) durations: Durations,
}

/// What an app is made of.
#[derive(Clone)]
pub(super) struct Package {
    /// None if the stored manifest can't be read.
    pub(super) manifest: Option<Arc<Manifest>>,
    pub(super) component: ComponentId,
    pub(super) component_bytes: u64,
    /// Of an app that is part of the system; that of another is in the store.
    pub(super) folder: Option<AppFolder>,
}

impl Package {
    /// Whether it is this very one, and not one like it.
    pub(super) fn is(&self, other: &Package) -> bool {
        let manifests = (&self.manifest, &other.manifest);
        let same_manifest = match manifests {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        };
        same_manifest && self.component == other.component
    }

    /// Empty if the manifest can't be read.
    pub(super) fn version(&self) -> &str {
        let manifest = self.manifest.as_deref();
        manifest.map_or("", |manifest| &manifest.version)
    }

    pub(super) fn origin(&self) -> Origin {
        match self.folder {
            Some(_) => Origin::Preinstalled,
            None => Origin::Installed,
        }
    }

    /// For an app of which nothing but the name can be read.
    pub(super) fn unknown(folder: Option<AppFolder>) -> Package {
        Package {
            folder,
            manifest: None,
            component: ComponentId::of(&[]),
            component_bytes: 0,
        }
    }
}

/// What a worker is to do.
enum Turn {
    Start(Start),
    /// Events, and how often they were tried before.
    Handle(Generation, Batch, u32),
    Nothing,
    /// Let go of the instance, if there is one.
    Rest,
}

/// An instance that is to be made.
struct Start {
    generation: Generation,
    component: LoadedComponent,
    manifest: Arc<Manifest>,
    /// The instance that there is stays if this one does not come up.
    keeps_instance: bool,
}

/// How a call went, for the books.
struct CallReport {
    batch: Batch,
    /// How often it was tried before.
    tries: u32,
    error: Option<CallError>,
    published: usize,
    tally: Tally,
    refused_growth: u64,
    memory_bytes: usize,
    took: Duration,
}

/// To be done once the lock is released: writing logs may block.
#[must_use]
struct Note(LogLevel, String);

impl App {
    pub(super) fn new(name: &str, package: Package, shared: Arc<Shared>) -> Arc<App> {
        Arc::new_cyclic(|this: &Weak<App>| {
            let name: Arc<str> = name.into();
            let on_stall = {
                let this = this.clone();
                move || {
                    if let Some(app) = this.upgrade() {
                        app.on_stall();
                    }
                }
            };
            App {
                log: Arc::new(AppLog::new(name.clone())),
                this: this.clone(),
                inside: Mutex::new(Inside {
                    supervisor: Supervisor::new(shared.restart),
                    generation: 0,
                    package,
                    component: None,
                    draining: false,
                    reason: None,
                    since_ms: unix_time_ms(),
                    last_error: None,
                    queue: Queue::default(),
                    realtime: RealtimeLoad::default(),
                    suspects: Suspects::default(),
                    breaker: Breaker::default(),
                    in_call: 0,
                    scheduled: false,
                    refused: false,
                    alive: false,
                    uses: 0,
                    failures: 0,
                    keeps_instance: false,
                    held: false,
                    rests_until: None,
                    previous: None,
                    reroutes: false,
                    starts_paused: false,
                    counters: AppCounters::default(),
                    durations: Durations::default(),
                    recorded: (AppCounters::default(), Restarts::default()),
                    memory_bytes: 0,
                    peak_memory_bytes: 0,
                    cold_start: None,
                }),
                services: Arc::new(AppServices {
                    state: shared.kv.open(&name),
                    seats: Mutex::default(),
                    measures: Mutex::default(),
                    alarms: shared.timer.alarms(),
                    app: this.clone(),
                    timers: Total::default(),
                    devices: shared.devices.clone(),
                    lines: Total::default(),
                    sensors: Total::default(),
                }),
                name,
                shared,
                changed: Condvar::new(),
                instance: Mutex::new(None),
                idle: AtomicBool::new(false),
                virtual_time: Mutex::default(),
                watch: Arc::new(Watch::new(on_stall)),
            }
        })
    }

    pub(super) fn log(&self) -> &AppLog {
        &self.log
    }

    pub(super) fn services(&self) -> &Arc<AppServices> {
        &self.services
    }

    pub(super) fn render_measures(&self, text: &mut MeasuresText) {
        self.services.measures.lock().render(&self.name, text);
    }

    pub(super) fn package(&self) -> Package {
        self.inside.lock().package.clone()
    }

    /// What the app is to be run with, if it has been loaded.
    pub(super) fn component(&self) -> Option<LoadedComponent> {
        self.inside.lock().component.clone()
    }

    pub(super) fn state(&self) -> AppState {
        self.inside.lock().state()
    }

    /// The filters of the events that go here now.
    pub(super) fn subscriptions(&self) -> Vec<TopicFilter> {
        let inside = self.inside.lock();
        match &inside.package.manifest {
            // What it gets of the site comes by another way.
            Some(manifest) if inside.is_open() && !self.is_placed(manifest) => {
                manifest.subscribe.clone()
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn info(&self) -> AppInfo {
        self.info_of(&self.inside.lock())
    }

    fn info_of(&self, inside: &Inside) -> AppInfo {
        let manifest = inside.manifest();
        let state = self.services.state().usage();
        let texts = |filters: &[TopicFilter]| filters.iter().map(|f| f.to_string()).collect();
        AppInfo {
            name: self.name.to_string(),
            version: inside.package.version().to_owned(),
            previous_version: inside.previous.as_ref().map(Previous::version),
            trial_batches_left: inside.trial(),
            description: manifest.and_then(|m| m.description.clone()),
            origin: inside.package.origin(),
            state: inside.state(),
            breaker: inside.breaker.state(),
            reason: inside.reason.clone(),
            since_ms: inside.since_ms,
            restarts: inside.supervisor.restarts(),
            last_error: inside.last_error.clone(),
            component_sha256: inside.package.component.to_string(),
            component_bytes: inside.package.component_bytes,
            placement: manifest.map_or_else(Placement::default, |m| m.placement),
            shards: self.shards(),
            subscribe: manifest.map_or_else(Vec::new, |m| texts(&m.subscribe)),
            publish: manifest.map_or_else(Vec::new, |m| texts(&m.publish)),
            config: manifest.map_or_else(Default::default, |m| m.config.clone()),
            limits: manifest.map_or_else(|| Limits::new(0), |m| m.limits.clone()),
            counters: inside.counters(),
            memory_pages: (inside.memory_bytes / WASM_PAGE) as u64,
            peak_memory_pages: (inside.peak_memory_bytes / WASM_PAGE) as u64,
            cold_start_seconds: inside.cold_start.map(|took| took.as_secs_f64()),
            kv: StateUsage {
                bytes: state.bytes as u64,
                keys: state.keys as u64,
                synced: state.synced,
            },
            timers: self.services.timers.get() as u64,
            lines: self.services.lines.get() as u64,
            sensors: self.services.sensors.get() as u64,
        }
    }

    /// How the app is, and what has come to its counters since this was last called.
    pub(super) fn info_for_metrics(&self) -> (AppInfo, SinceLast) {
        let mut inside = self.inside.lock();
        let info = self.info_of(&inside);
        let last = std::mem::replace(&mut inside.recorded, (info.counters.clone(), info.restarts));
        let since_last = SinceLast {
            counters: info.counters.since(&last.0),
            restarts: info.restarts.since(&last.1),
            durations: std::mem::take(&mut inside.durations),
        };
        (info, since_last)
    }

    // ---- Changes of state, from the control side and the timer ----

    /// Notes that the app is to run as soon as it is loaded. Events may queue up from now on.
    /// Returns what [`App::start`] wants to hear.
    pub(super) fn loading(&self) -> Generation {
        let mut inside = self.inside.lock();
        inside.supervisor.start();
        inside.enter(Some("its component is being compiled".into()));
        inside.generation
    }

    /// Starts the app, with a clean slate; its running instance, if there is one, finishes its
    /// batch and is replaced. With `only_if`, does nothing if somebody has changed the state since.
    pub(super) fn start(
        &self,
        package: Package,
        component: LoadedComponent,
        only_if: Option<Generation>,
    ) {
        let mut inside = self.inside.lock();
        if only_if.is_some_and(|generation| generation != inside.generation) {
            return;
        }
        inside.package = package;
        // Who has asked for a drain meanwhile gets it.
        inside.draining &= only_if.is_some();
        self.begin(inside, component, false);
    }

    /// [`App::start`] with the package that it has, if `component` is of that still. Returns whether.
    pub(super) fn start_again(&self, id: ComponentId, component: LoadedComponent) -> bool {
        let mut inside = self.inside.lock();
        let is_of_it = inside.package.component == id;
        if is_of_it {
            inside.draining = false;
            self.begin(inside, component, false);
        }
        is_of_it
    }

    /// Has a worker make an instance; with `keeps`, the one that there is stays until then.
    fn begin(&self, mut inside: MutexGuard<Inside>, component: LoadedComponent, keeps: bool) {
        if self.watch.is_stalled() {
            // Who starts an app anew that hangs in a call doesn't want to wait for it.
            self.watch.set_abort(true);
        }
        inside.component = Some(component);
        inside.keeps_instance = keeps && inside.alive;
        inside.start_afresh(self.shared.restart);
        if self.waits_for_seat(&inside) {
            self.stand_by(&mut inside);
        } else {
            inside.enter(None);
        }
        self.update_idle(&inside);
        self.schedule(&mut inside);
        drop(inside);
        self.changed.notify_all();
    }

    /// Lets what comes wait, from the end of the present call on. Returns whether it did: only what
    /// is up can be paused.
    pub(super) fn pause(&self) -> bool {
        let mut inside = self.inside.lock();
        let pauses = inside.is_up() && !inside.draining && inside.component.is_some();
        if pauses {
            inside.supervisor.pause();
            inside.enter(None);
            let progress = inside.take_refused();
            self.update_idle(&inside);
            drop(inside);
            self.changed.notify_all();
            self.tell_progress(progress);
            self.log.gateway_line(LogLevel::Info, "paused");
        }
        pauses
    }

    /// Whether the app is to be paused as soon as it is up.
    pub(super) fn start_paused(&self, paused: bool) {
        self.inside.lock().starts_paused = paused;
    }

    /// Whether it is paused, or will be as soon as it is up.
    pub(super) fn is_to_pause(&self) -> bool {
        let inside = self.inside.lock();
        inside.starts_paused || inside.supervisor.state() == AppState::Paused
    }

    /// Goes on after [`App::pause`], with the same instance if it still has one. Returns whether it
    /// did.
    pub(super) fn resume(&self) -> bool {
        let mut inside = self.inside.lock();
        let resumes = inside.supervisor.state() == AppState::Paused;
        if resumes {
            let alive = inside.alive;
            inside.supervisor.resume(alive);
            // If it backed off when it was paused, that is over.
            inside.breaker.retry();
            inside.enter(None);
            self.schedule(&mut inside);
            self.update_idle(&inside);
            drop(inside);
            self.changed.notify_all();
            self.log.gateway_line(LogLevel::Info, "resumed");
        }
        resumes
    }

    /// Puts another package in the place of a stopped app's.
    pub(super) fn replace_package(&self, package: Package) {
        let mut inside = self.inside.lock();
        inside.package = package;
        inside.component = None;
    }

    /// Called when a pause or a rest is over.
    pub(super) fn retry(&self) {
        let mut inside = self.inside.lock();
        let now = Instant::now();
        if inside.rests_until.take_if(|until| *until <= now).is_some() {
            self.schedule(&mut inside);
        }
        if inside.supervisor.retry(now) {
            inside.breaker.retry();
            inside.enter(None);
            self.schedule(&mut inside);
        }
    }

    /// The app can't be run at all, for `reason`. With `only_if`, does nothing if somebody has
    /// changed the state since.
    pub(super) fn quarantine(&self, reason: String, only_if: Option<Generation>) {
        let mut inside = self.inside.lock();
        if only_if.is_some_and(|generation| generation != inside.generation) {
            return;
        }
        inside.supervisor.quarantine();
        inside.draining = false;
        inside.last_error = Some(reason.clone());
        inside.enter(Some(reason.clone()));
        inside.close();
        let progress = inside.take_refused();
        self.update_idle(&inside);
        drop(inside);
        self.changed.notify_all();
        self.tell_progress(progress);
        self.log
            .gateway_line(LogLevel::Error, &format!("quarantined: {reason}"));
    }

    /// Takes no more events from now on, and finishes what waits. [`App::wait_until_drained`]
    /// waits for that.
    /// Returns whether it does: only what is up, or paused, can be drained.
    pub(super) fn drain(&self) -> bool {
        let mut inside = self.inside.lock();
        if !inside.keeps_events() {
            return false;
        }
        inside.starts_paused = false;
        if inside.supervisor.state() == AppState::Paused {
            let alive = inside.alive;
            inside.supervisor.resume(alive);
            self.schedule(&mut inside);
        }
        inside.draining = true;
        inside.since_ms = unix_time_ms();
        // It is not told of pressure any more, and nothing of what it has is to stand back.
        inside.queue.set_pressure(Pressure::Healthy);
        if inside.supervisor.state() == AppState::Running {
            self.schedule(&mut inside);
        }
        true
    }

    /// Waits until nothing is queued and nothing runs, or nothing ever will.
    pub(super) fn wait_until_drained(&self, deadline: Instant) {
        self.wait_while(deadline, |inside| {
            matches!(
                inside.supervisor.state(),
                AppState::Starting | AppState::Running
            ) && inside.unfinished() > 0
        });
    }

    /// Waits until all that it keeps is on disk.
    pub(super) fn wait_until_synced(&self, deadline: Instant) {
        self.services.state.wait_until_synced(deadline);
    }

    /// Waits until all that waits is done and accounted for, or the app has failed too often to go
    /// on at once.
    #[cfg(feature = "compiler")]
    pub(super) fn wait_until_done(&self, deadline: Instant) {
        self.wait_while(deadline, |inside| {
            let more = match inside.supervisor.state() {
                AppState::Starting => true,
                AppState::Running => inside.unfinished() > 0,
                _ => false,
            };
            more || inside.scheduled || inside.waits()
        });
    }

    /// Waits until the app runs, or has failed to.
    pub(super) fn wait_until_settled(&self, deadline: Instant) {
        self.wait_while(deadline, |inside| {
            inside.supervisor.state() == AppState::Starting
        });
    }

    /// Stops the app now. What waits is counted as dropped, a call that runs is ended. When this
    /// returns, its instance is gone, unless it holds on for longer than until `deadline`.
    pub(super) fn halt(&self, deadline: Instant) {
        let mut inside = self.inside.lock();
        inside.starts_paused = false;
        let was_up = inside.is_up();
        inside.supervisor.stop();
        inside.enter(None);
        inside.draining = false;
        inside.close();
        self.watch.set_abort(true);
        let progress = inside.take_refused();
        self.update_idle(&inside);
        self.schedule(&mut inside);
        drop(inside);
        self.changed.notify_all();
        self.tell_progress(progress);
        if was_up {
            self.log.gateway_line(LogLevel::Info, "stopped");
        }
        self.wait_while(deadline, |inside| inside.scheduled);
    }

    fn wait_while(&self, deadline: Instant, mut condition: impl FnMut(&Inside) -> bool) {
        let mut inside = self.inside.lock();
        while condition(&inside) {
            if self.changed.wait_until(&mut inside, deadline).timed_out() {
                return;
            }
        }
    }

    // ---- A worker's turn ----

    pub(super) fn virtual_time(&self) -> VirtualTime {
        *self.virtual_time.lock()
    }

    /// Does the next thing that there is to do. Returns whether there is more. `time_after` says
    /// what time the app has had then, for its weight.
    pub(super) fn take_turn(&self, time_after: impl FnOnce(u32) -> VirtualTime) -> bool {
        let mut instance = self.instance.lock();
        match self.next_turn() {
            Turn::Start(start) => {
                let before = instance.take().filter(|_| start.keeps_instance);
                *instance = self.start_instance(start, before);
            }
            Turn::Handle(generation, batch, tries) => {
                self.handle(&mut instance, generation, batch, tries);
            }
            Turn::Nothing => {}
            Turn::Rest => *instance = None,
        }
        self.end_turn(&instance, time_after)
    }

    fn next_turn(&self) -> Turn {
        let mut inside = self.inside.lock();
        let generation = inside.generation;
        if inside.waits() {
            return Turn::Nothing;
        }
        match inside.supervisor.state() {
            AppState::Starting => {
                let keeps_instance = inside.keeps_instance;
                match (&inside.component, &inside.package.manifest) {
                    (Some(component), Some(manifest)) => {
                        self.watch.set_abort(false);
                        Turn::Start(Start {
                            generation,
                            component: component.clone(),
                            manifest: manifest.clone(),
                            keeps_instance,
                        })
                    }
                    _ => inside.rest(),
                }
            }
            AppState::Running => match inside.next_batch(self.shared.max_batch_events) {
                Some((batch, tries)) => {
                    inside.in_call = batch.len();
                    Turn::Handle(generation, batch, tries)
                }
                None => Turn::Nothing,
            },
            AppState::Paused => Turn::Nothing,
            _ => inside.rest(),
        }
    }

    /// There is no instance to handle a batch, which should never be: another one takes it.
    fn give_back(&self, batch: Batch, tries: u32) {
        let mut inside = self.inside.lock();
        inside.in_call = 0;
        inside.realtime.call = None;
        inside.suspects.push_front(batch, tries);
        inside.alive = false;
        if inside.supervisor.state() == AppState::Running {
            inside.supervisor.replace();
            inside.enter(Some("its instance is missing".into()));
        }
    }

    /// Returns the instance that there is then.
    fn start_instance(&self, start: Start, before: Option<Instance>) -> Option<Instance> {
        let Start {
            generation,
            component,
            manifest,
            ..
        } = start;
        let began = Instant::now();
        let started = {
            let _running = self.shared.ticker.running();
            let (log, watch) = (self.log.clone(), self.watch.clone());
            let services = self.services.clone();
            catch_unwind(AssertUnwindSafe(|| {
                Instance::start(&component, manifest, log, watch, services)
            }))
        };
        let took = began.elapsed();
        self.watch.call_ended();
        let (result, outputs, tally, refused_growth) = match started {
            Ok(start) => (
                start.instance,
                start.outputs,
                start.tally,
                start.refused_growth,
            ),
            Err(_) => (Err(PANICKED.into()), Vec::new(), Tally::default(), 0),
        };
        let published = self.publish(outputs, Instant::now(), 0, &[]);

        let mut inside = self.inside.lock();
        inside.counters.published += published as u64;
        inside.count_refusals(tally, refused_growth);
        let (instance, note) = match result {
            _ if generation != inside.generation => (before, None),
            Ok(instance) => {
                inside.keeps_instance = false;
                inside.cold_start = Some(took);
                let passed = self.passed(&mut inside, generation, 0);
                inside.started(instance.memory_bytes());
                let up = match self.shared.cold_start_target {
                    Some(target) if took > target => Note(
                        LogLevel::Warn,
                        format!(
                            "took {:.1} ms to start, and `apps.cold_start_target_ms` is {}",
                            took.as_secs_f64() * 1e3,
                            target.as_millis()
                        ),
                    ),
                    _ => Note(LogLevel::Info, inside.supervisor.state().as_str().into()),
                };
                (Some(instance), passed.or(Some(up)))
            }
            Err(reason) if inside.fails_trial(generation) => {
                let note = self.roll_back(&mut inside, &reason);
                if let Some(before) = &before {
                    inside.started(before.memory_bytes());
                }
                (before, note)
            }
            Err(reason) => {
                self.rest_after(&mut inside, took);
                (None, self.fail(&mut inside, generation, reason))
            }
        };
        self.after_change(inside, note);
        instance
    }

    fn handle(
        &self,
        slot: &mut Option<Instance>,
        generation: Generation,
        batch: Batch,
        tries: u32,
    ) {
        let Some(instance) = slot.as_mut() else {
            return self.give_back(batch, tries);
        };
        let sitting = batch.first().and_then(Event::sitting);
        let Some(kept) = self.services.state_of(sitting) else {
            return self.leave(batch);
        };
        let began = Instant::now();
        let result = {
            let _running = self.shared.ticker.running();
            let call = || instance.handle(&batch, kept);
            catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
                Err(CallError::Trapped {
                    message: PANICKED.into(),
                    backtrace: String::new(),
                })
            })
        };
        let took = began.elapsed();
        self.watch.call_ended();

        let mut report = CallReport {
            batch,
            tries,
            error: None,
            published: 0,
            tally: instance.take_tally(),
            refused_growth: 0,
            memory_bytes: instance.memory_bytes(),
            took,
        };
        match result {
            Ok(outputs) => {
                let batch = &report.batch;
                let received = batch.iter().map(|event| event.received).min();
                let hops = batch.iter().map(|event| event.hops).max();
                report.published = self.publish(
                    outputs,
                    received.unwrap_or(began),
                    hops.map_or(0, |hops| hops.saturating_add(1)),
                    batch,
                );
            }
            Err(error) => {
                if let CallError::Trapped { .. } = error {
                    report.refused_growth = instance.refused_growth();
                    report.memory_bytes = 0;
                    *slot = None;
                }
                report.error = Some(error);
            }
        }
        self.trace(&report);
        self.account(generation, report);
    }

    /// Notes what became of the events of a call.
    fn trace(&self, report: &CallReport) {
        let step = match &report.error {
            None => Step::Handled {
                app: self.name.clone(),
                events: report.batch.len(),
                published: report.published,
                refused: report.tally.refused(),
            },
            Some(error) => Step::failed(self.name.clone(), error.message()),
        };
        let topics = report.batch.iter().map(|event| &event.topic);
        self.shared.routes.traces.note(topics, &step);
    }

    /// `causes`: what they were made from.
    fn publish(
        &self,
        outputs: Vec<Output>,
        received: Instant,
        hops: u8,
        causes: &[Event],
    ) -> usize {
        let count = outputs.len();
        if count > 0 {
            let events = outputs
                .into_iter()
                .map(|output| Event {
                    topic: output.topic,
                    payload: output.payload,
                    timestamp_ns: output.timestamp_ns,
                    received,
                    hops,
                    lane: Lane::default(),
                    retries: None,
                    receipt: None,
                })
                .collect();
            if let Err(NotJournaled) = self.shared.sink.publish(&self.name, events) {
                abandon(causes);
            }
        }
        count
    }

    fn account(&self, generation: Generation, report: CallReport) {
        let mut inside = self.inside.lock();
        inside.in_call = 0;
        inside.counters.batches += 1;
        inside.counters.handle_ns += report.took.as_nanos() as u64;
        inside.counters.published += report.published as u64;
        inside.count_refusals(report.tally, report.refused_growth);
        inside.durations.record(report.took);
        inside.note_memory(report.memory_bytes);
        let events = report.batch.len() as u64;
        inside.realtime.handled(report.batch.len());
        let Some(error) = report.error else {
            inside.counters.handled += events;
            inside.breaker.succeeded();
            if report.tally.refused() >= FLOOD {
                self.rest_after(&mut inside, report.took);
            }
            let note = self.passed(&mut inside, generation, 1);
            inside.recycle_if_worn(false);
            self.after_change(inside, note);
            return;
        };
        let trapped = matches!(error, CallError::Trapped { .. });
        inside.alive &= !trapped;
        if !inside.keeps_events() {
            // It was stopped in the middle of it.
            inside.counters.dropped.stopped += events;
            seat::give_back(&report.batch);
            self.after_change(inside, None);
            return;
        }
        let message = error.message().to_owned();
        if inside.fails_trial(generation) {
            inside.counters.retried += 1;
            inside.suspects.push_front(report.batch, report.tries);
            let note = self.roll_back(&mut inside, &message);
            self.after_change(inside, note);
            return;
        }
        inside.last_error = Some(message.clone());
        self.rest_after(&mut inside, report.took);
        let by_rule = report.batch.iter().filter_map(|event| event.retries).max();
        let retries = by_rule.map_or_else(|| inside.retries(), u32::from);
        let tries = report.tries + 1;
        let blamed = inside.suspects.failed(report.batch, tries, retries);
        let mut opens = false;
        match &blamed {
            Some(_) => {
                inside.counters.failed += 1;
                // What an instance before did says nothing of this one.
                opens = generation == inside.generation && inside.breaker.failed();
            }
            None => inside.counters.retried += 1,
        }
        let mut note = None;
        if opens {
            let reason = format!("most of its batches fail, the last one: {message}");
            note = self.fail(&mut inside, generation, reason);
        }
        if note.is_some() {
            // It backs off, or is given up.
        } else if trapped && inside.supervisor.state() == AppState::Running {
            inside.supervisor.replace();
            inside.enter(Some(format!("a fresh instance after: {message}")));
        } else {
            inside.recycle_if_worn(true);
        }
        self.after_change(inside, note);
        self.log.complain(Complaint::BatchFailed, || {
            format!("a batch failed: {message}")
        });
        if let Some(event) = blamed {
            self.bury(&event, &message, error.backtrace());
        }
    }

    /// Lets the app rest after a call that was good for nothing.
    fn rest_after(&self, inside: &mut Inside, took: Duration) {
        if took >= LONG_FAILURE {
            let until = Instant::now() + took * (FAILURES_SHARE - 1);
            inside.rests_until = Some(until);
            self.shared.timer.retry_at(until, self.this.clone());
        }
    }

    /// The app can't handle an event, not even alone.
    fn bury(&self, event: &Event, message: &str, backtrace: &str) {
        let letters = &self.shared.dead_letters;
        letters.add(Reason::AppFailed, Instant::now(), || DeadLetter {
            error: Some(match backtrace {
                "" => message.to_owned(),
                backtrace => format!("{message}\n{backtrace}"),
            }),
            ..DeadLetter::new(
                Reason::AppFailed,
                &self.name,
                &event.topic,
                &event.payload,
                0,
            )
        });
    }

    /// The instance is lost, or could not be made.
    fn fail(&self, inside: &mut Inside, generation: Generation, reason: String) -> Option<Note> {
        if generation != inside.generation {
            return None;
        }
        inside.last_error = Some(reason.clone());
        // If there is one, it goes with the next turn.
        inside.alive = false;
        let now = Instant::now();
        Some(match inside.supervisor.failed(now, fastrand::f64()) {
            Verdict::RetryAt(at) => {
                inside.enter(Some(reason.clone()));
                self.shared.timer.retry_at(at, self.this.clone());
                let pause = at.duration_since(now).as_millis();
                Note(
                    LogLevel::Warn,
                    format!("failed: {reason}; starting again in {pause} ms"),
                )
            }
            Verdict::Quarantine => {
                let reason = format!("failed too often, the last time: {reason}");
                inside.draining = false;
                inside.enter(Some(reason.clone()));
                inside.close();
                Note(
                    LogLevel::Error,
                    format!(
                        "quarantined: {reason}; `headgate app start {}` starts it again",
                        self.name
                    ),
                )
            }
        })
    }

    /// Tells everybody what concerns them after a worker has changed something.
    fn after_change(&self, mut inside: MutexGuard<Inside>, note: Option<Note>) {
        self.update_idle(&inside);
        let is_roomy = |lane| inside.queue.lane_len(lane) <= inside.bound() / 2;
        let room = is_roomy(Lane::Transactional) || is_roomy(Lane::Batch);
        let idle = inside.is_idle();
        let progress = if idle || room || inside.waits() || !inside.is_up() {
            inside.take_refused() || idle
        } else {
            false
        };
        let quarantined = inside.supervisor.state() == AppState::Quarantined;
        let reroutes = std::mem::take(&mut inside.reroutes) || quarantined;
        drop(inside);
        self.changed.notify_all();
        self.tell_progress(progress);
        if reroutes {
            self.shared.update_routes();
        }
        if let Some(Note(level, message)) = note {
            self.log.gateway_line(level, &message);
        }
    }

    fn end_turn(
        &self,
        instance: &Option<Instance>,
        time_after: impl FnOnce(u32) -> VirtualTime,
    ) -> bool {
        let mut inside = self.inside.lock();
        *self.virtual_time.lock() = time_after(inside.weight());
        let more = match inside.supervisor.state() {
            _ if inside.waits() => false,
            AppState::Starting => inside.component.is_some(),
            AppState::Running => inside.has_work(),
            AppState::Paused => false,
            _ => instance.is_some(),
        };
        inside.scheduled = more;
        drop(inside);
        if !more {
            self.changed.notify_all();
        }
        more
    }

    /// Puts the app into the run queue, unless it is there or at a worker.
    fn schedule(&self, inside: &mut Inside) {
        if !inside.scheduled {
            inside.scheduled = true;
            let this = self.this.upgrade();
            self.shared.run(this.expect("`self` is borrowed from it"));
        }
    }

    fn update_idle(&self, inside: &Inside) {
        self.idle.store(inside.is_idle(), Ordering::Release);
    }

    fn tell_progress(&self, progress: bool) {
        if progress {
            (self.shared.progress)();
        }
    }

    /// Takes the events of timers, one each. A full queue is no reason to refuse them: a timer has
    /// at most one event in it. False: the app takes nothing now.
    pub(super) fn timers_fired(&self, batch: Batch) -> bool {
        let mut inside = self.inside.lock();
        if !inside.is_open() {
            return false;
        }
        let events = batch.len();
        inside.counters.offered += events as u64;
        // Those that instances before this one have left count as well.
        let waiting = inside.queue.lane_len(Lane::Transactional);
        if waiting + events > inside.bound() + 2 * inside.most_timers() {
            self.drop_for_room(&mut inside, &batch);
            return false;
        }
        self.enqueue(&mut inside, Lane::Transactional, Queued::new(batch));
        true
    }

    /// Takes edges of a GPIO line. `missed` is how many more there were that nobody took in time.
    pub(super) fn gpio_edges(&self, batch: Batch, missed: u64) {
        let mut inside = self.inside.lock();
        inside.counters.devices.edges += batch.len() as u64;
        inside.counters.devices.missed_edges += missed;
        self.take_device_events(inside, batch);
    }

    /// Takes a reading of a sensor.
    pub(super) fn sensor_read(&self, reading: Event) {
        let mut inside = self.inside.lock();
        inside.counters.devices.readings += 1;
        self.take_device_events(inside, vec![reading]);
    }

    pub(super) fn sensor_failed(&self) {
        self.inside.lock().counters.devices.failed_readings += 1;
    }

    /// Takes events from a device if the queue has room for them: a device does not wait.
    fn take_device_events(&self, mut inside: MutexGuard<Inside>, batch: Batch) {
        let events = batch.len();
        if events == 0 {
            return;
        }
        inside.counters.offered += events as u64;
        let queued = Queued::new(batch);
        if !inside.is_open() {
            inside.counters.dropped.stopped += events as u64;
        } else if !inside.has_room(Lane::Transactional, events, queued.bytes) {
            self.drop_for_room(&mut inside, &queued.batch);
        } else {
            self.enqueue(&mut inside, Lane::Transactional, queued);
        }
    }

    /// Has events wait for their turn.
    fn enqueue(&self, inside: &mut Inside, lane: Lane, queued: Queued) {
        inside.queue.push(lane, queued);
        self.update_idle(inside);
        if inside.supervisor.state() == AppState::Running {
            self.schedule(inside);
        }
    }

    /// Counts and buries events for which the queue has no room.
    fn drop_for_room(&self, inside: &mut Inside, events: &[Event]) {
        inside.counters.dropped.queue_full += events.len() as u64;
        self.bury_dropped(Reason::QueueFull, events);
    }

    fn bury_dropped(&self, reason: Reason, events: &[Event]) {
        let now = Instant::now();
        let by = self.name.clone();
        let topics = events.iter().map(|event| &event.topic);
        let traces = &self.shared.routes.traces;
        traces.note(topics, &Step::Dropped { by, reason });
        for event in events {
            self.shared.dead_letters.add(reason, now, || {
                DeadLetter::new(reason, &self.name, &event.topic, &event.payload, 0)
            });
        }
    }

    /// Room for events, once what has waited longest is dropped, if lane or manifest want that.
    fn make_room(&self, inside: &mut Inside, lane: Lane, events: usize, bytes: usize) -> bool {
        while !inside.has_room(lane, events, bytes) {
            if lane != Lane::Realtime && inside.queue_full() != QueueFull::DropOldest {
                return false;
            }
            let bound = inside.bound();
            let too_many = (inside.queue.lane_len(lane) + events).saturating_sub(bound);
            // Where nothing waits, there is room.
            let Some(oldest) = inside.queue.pop_oldest(lane, too_many.max(1)) else {
                return true;
            };
            if lane == Lane::Realtime {
                inside.realtime.load.dropped += oldest.len() as u64;
            }
            self.drop_for_room(inside, &oldest);
        }
        true
    }

    /// A line of the running instance has gone with its chip: a fresh one takes it again.
    pub(super) fn lost_line(&self, reason: String) {
        let mut inside = self.inside.lock();
        if inside.supervisor.state() == AppState::Running {
            let generation = inside.generation;
            let note = self.fail(&mut inside, generation, reason);
            self.schedule(&mut inside);
            self.after_change(inside, note);
        }
    }

    /// A call has become long: what the pipeline holds back for this app would be dropped now.
    fn on_stall(&self) {
        let progress = self.inside.lock().take_refused();
        self.tell_progress(progress);
    }
}

/// They are not finished although the app has them no more: those of the journal come again at the next
/// start.
fn abandon(events: &[Event]) {
    for receipt in events.iter().filter_map(|event| event.receipt.as_ref()) {
        receipt.abandon();
    }
}

/// For the message of a failure that should never be.
const PANICKED: &str = "a function of the host panicked: this is a bug in Headgate";

impl Outlet for App {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_idle(&self) -> bool {
        self.idle.load(Ordering::Acquire)
    }

    /// A running app whose queue is full gets the batch offered again, for as long as its calls are
    /// short. Whoever isn't running or sits in a long call loses what doesn't fit, so that the
    /// pipeline never waits for it.
    fn offer(&self, mut batch: Batch) -> Offer {
        let Some(lane) = batch.first().map(|event| event.lane) else {
            return Offer::Taken;
        };
        let mut bytes: usize = batch.iter().map(event_bytes).sum();
        let mut inside = self.inside.lock();
        if bytes > inside.memory_bound() / EVENT_SHARE && inside.is_open() {
            let dropped = inside.take_too_large(&mut batch);
            self.bury_dropped(Reason::TooLarge, &dropped);
            bytes = batch.iter().map(event_bytes).sum();
        }
        let events = batch.len();
        if events == 0 {
            return Offer::Taken;
        }
        if !inside.is_open() {
            seat::give_back(&batch);
            inside.counters.dropped.stopped += events as u64;
        } else if self.make_room(&mut inside, lane, events, bytes) {
            let since = Instant::now();
            let queued = Queued {
                batch,
                bytes,
                since,
            };
            self.enqueue(&mut inside, lane, queued);
        } else if inside.queue_full() == QueueFull::DropNewest
            || !matches!(
                inside.supervisor.state(),
                AppState::Running | AppState::Starting
            )
            || inside.component.is_none()
            || inside.rests()
        {
            if inside.queue_full() != QueueFull::DropNewest {
                abandon(&batch);
            }
            self.drop_for_room(&mut inside, &batch);
        } else if self.watch.is_stalled() {
            abandon(&batch);
            inside.counters.dropped.stalled += events as u64;
            self.bury_dropped(Reason::QueueFull, &batch);
        } else {
            inside.refused = true;
            return Offer::Full(batch);
        }
        inside.counters.offered += events as u64;
        Offer::Taken
    }

    /// What an app that has no time left, or rests, has not got to is none of the other lanes' fault: that
    /// they stand back does not help it.
    fn take_realtime_load(&self, now: Instant) -> Load {
        const NO_TIME_LEFT: f64 = 0.8;
        let mut inside = self.inside.lock();
        let call = inside.realtime.call;
        let realtime = std::mem::replace(
            &mut inside.realtime,
            RealtimeLoad {
                asked: Some(now),
                call,
                ..RealtimeLoad::default()
            },
        );
        let asked = realtime.asked.unwrap_or(now);
        let under_way = call.map_or(Duration::ZERO, |(began, _)| {
            now.saturating_duration_since(began.max(asked))
        });
        let since = now.saturating_duration_since(asked);
        if inside.supervisor.state() != AppState::Running
            || inside.rests()
            || realtime.busy + under_way >= since.mul_f64(NO_TIME_LEFT)
        {
            return Load {
                handled: realtime.load.handled,
                ..Load::default()
            };
        }
        let waits = inside.queue.since(Lane::Realtime);
        let waits = waits.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        Load {
            waiting: inside.queue.lane_len(Lane::Realtime),
            slowest: realtime.load.slowest.max(waits),
            ..realtime.load
        }
    }

    fn set_pressure(&self, pressure: Pressure) {
        let mut inside = self.inside.lock();
        // One that is to finish what it has does not stand back.
        if inside.draining {
            return;
        }
        inside.queue.set_pressure(pressure);
        if inside.supervisor.state() == AppState::Running && inside.has_work() {
            self.schedule(&mut inside);
        }
    }
}

impl RealtimeLoad {
    /// The call under way has ended.
    fn handled(&mut self, events: usize) {
        let Some((began, since)) = self.call.take() else {
            return;
        };
        let now = Instant::now();
        self.busy += now.saturating_duration_since(began.max(self.asked.unwrap_or(began)));
        if let Some(since) = since {
            self.load.handled += events as u64;
            let took = now.saturating_duration_since(since);
            self.load.slowest = self.load.slowest.max(took);
        }
    }
}

impl Inside {
    /// Runs, or will without anybody's doing.
    fn is_up(&self) -> bool {
        matches!(
            self.supervisor.state(),
            AppState::Starting | AppState::Running | AppState::BackingOff
        )
    }

    /// What it has taken waits for it.
    fn keeps_events(&self) -> bool {
        self.is_up() || self.supervisor.state() == AppState::Paused
    }

    /// Takes events.
    fn is_open(&self) -> bool {
        self.keeps_events() && !self.draining
    }

    /// As others see it.
    fn state(&self) -> AppState {
        match self.supervisor.state() {
            _ if self.draining && self.is_up() => AppState::Draining,
            state => state,
        }
    }

    fn is_idle(&self) -> bool {
        self.supervisor.state() == AppState::Running && self.unfinished() == 0
    }

    /// Events that were taken and not handled yet.
    fn unfinished(&self) -> usize {
        self.queue.len() + self.suspects.len() + self.in_call
    }

    fn has_work(&self) -> bool {
        self.queue.is_ready() || !self.suspects.is_empty()
    }

    /// It is to have no instance for now.
    fn rest(&mut self) -> Turn {
        self.alive = false;
        self.memory_bytes = 0;
        Turn::Rest
    }

    /// Has the app start with a clean slate, without the instance that there may be.
    fn start_afresh(&mut self, default: RestartPolicy) {
        let policy = self.restart_policy(default);
        self.supervisor.set_policy(policy);
        self.supervisor.start();
        self.breaker.reset();
        self.rests_until = None;
        self.alive = false;
    }

    /// Is up, but gets no turn now.
    fn waits(&self) -> bool {
        (self.held || self.rests()) && self.keeps_events()
    }

    fn rests(&self) -> bool {
        self.rests_until.is_some_and(|until| Instant::now() < until)
    }

    /// There is an instance, and it is configured.
    fn started(&mut self, memory_bytes: usize) {
        self.note_memory(memory_bytes);
        self.uses = 0;
        self.failures = 0;
        self.alive = true;
        self.supervisor.started();
        if std::mem::take(&mut self.starts_paused) {
            self.supervisor.pause();
        }
        self.enter(None);
    }

    /// The instance has had another batch. Has it replaced if that was as many as the manifest allows.
    fn recycle_if_worn(&mut self, failed: bool) {
        self.uses += 1;
        self.failures += u64::from(failed);
        let Recycle {
            max_uses,
            max_failures,
        } = self.manifest().map_or_else(Recycle::default, |m| m.recycle);
        let reason = if max_uses.is_some_and(|most| self.uses >= most) {
            "a fresh instance after `recycle.max_uses` batches"
        } else if max_failures.is_some_and(|most| self.failures >= most) {
            "a fresh instance after `recycle.max_failures` failures"
        } else {
            return;
        };
        if self.alive && self.supervisor.state() == AppState::Running {
            self.alive = false;
            self.supervisor.recycle();
            self.enter(Some(reason.into()));
        }
    }

    fn note_memory(&mut self, bytes: usize) {
        self.memory_bytes = bytes;
        self.peak_memory_bytes = self.peak_memory_bytes.max(bytes);
    }

    fn manifest(&self) -> Option<&Manifest> {
        self.package.manifest.as_deref()
    }

    fn limits(&self) -> Option<&Limits> {
        self.manifest().map(|manifest| &manifest.limits)
    }

    fn restart_policy(&self, default: RestartPolicy) -> RestartPolicy {
        self.manifest()
            .map_or(default, |manifest| manifest.restart.policy(default))
    }

    /// How often a batch that failed is tried again before it is halved.
    fn retries(&self) -> u32 {
        self.manifest()
            .map_or(0, |manifest| manifest.restart.retries)
    }

    /// Events for a call, and how often they were tried before.
    fn next_batch(&mut self, most: usize) -> Option<(Batch, u32)> {
        let (mut batch, tries, since) = match self.suspects.pop() {
            Some((part, tries)) => (part, tries, None),
            None => {
                let most_bytes = self.memory_bound() / CALL_SHARE;
                let (batch, since) = self.queue.pop(most, most_bytes)?;
                (batch, 0, Some(since))
            }
        };
        // A call is for one sitting.
        let others = seat::split_off_others(&mut batch);
        self.suspects.push_front(others, tries);
        let is_realtime = batch
            .first()
            .is_some_and(|event| event.lane == Lane::Realtime);
        self.realtime.call = Some((Instant::now(), since.filter(|_| is_realtime)));
        Some((batch, tries))
    }

    /// Events that may wait.
    fn bound(&self) -> usize {
        self.limits().map_or(0, |limits| limits.queue_events)
    }

    fn queue_full(&self) -> QueueFull {
        self.limits()
            .map_or(QueueFull::Wait, |limits| limits.queue_full)
    }

    fn weight(&self) -> u32 {
        self.limits().map_or(BASE_WEIGHT, |limits| limits.weight)
    }

    fn most_timers(&self) -> usize {
        self.limits().map_or(0, |limits| limits.timers)
    }

    /// Bytes of memory that the app may have.
    fn memory_bound(&self) -> usize {
        self.limits().map_or(0, |limits| limits.memory_bytes())
    }

    fn has_room(&self, lane: Lane, events: usize, bytes: usize) -> bool {
        self.queue.has_room(lane, events, bytes, self.bound())
    }

    /// Takes out of `batch` what would not fit into the app's memory, and counts it.
    fn take_too_large(&mut self, batch: &mut Batch) -> Batch {
        let most = self.memory_bound() / EVENT_SHARE;
        let dropped: Batch = batch
            .extract_if(.., |event| event_bytes(event) > most)
            .collect();
        self.counters.offered += dropped.len() as u64;
        self.counters.dropped.too_large += dropped.len() as u64;
        dropped
    }

    /// Drops what waits, because the app has come to rest.
    fn close(&mut self) {
        let (mut dropped, mut batches) = (0, Vec::new());
        while let Some((part, _)) = self.suspects.pop() {
            batches.push(part);
        }
        for lane in Lane::ALL {
            while let Some(oldest) = self.queue.pop_oldest(lane, usize::MAX) {
                batches.push(oldest);
            }
        }
        for batch in batches {
            seat::give_back(&batch);
            dropped += batch.len() as u64;
        }
        self.counters.dropped.stopped += dropped;
    }

    /// Notes that the supervisor has come into another state.
    fn enter(&mut self, reason: Option<String>) {
        self.reason = reason;
        self.since_ms = unix_time_ms();
        if !matches!(
            self.supervisor.state(),
            AppState::Running | AppState::BackingOff
        ) {
            self.generation += 1;
        }
    }

    fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    fn count_refusals(&mut self, tally: Tally, refused_growth: u64) {
        self.counters.denied += tally.denied;
        self.counters.over_publish_quota += tally.over_publish_quota;
        self.counters.over_log_quota += tally.over_log_quota;
        self.counters.refused_growth += refused_growth;
        self.counters.refused_calls += tally.calls;
        self.counters.devices.unset_outputs += tally.unset_outputs;
    }

    fn counters(&self) -> AppCounters {
        AppCounters {
            queued: self.unfinished() as u64,
            ..self.counters.clone()
        }
    }
}

fn unix_time_ms() -> u64 {
    unix_time_ns() / 1_000_000
}
