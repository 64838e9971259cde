//! Apps: WASM components that take batches of events and hand out events.
//!
//! Owns an app's whole life: package and manifest, compilation and its cache, instances and their
//! limits, scheduling, supervision. Knows nothing of MQTT: batches come in through
//! [`Outlet`](crate::pipeline::Outlet)s that it puts into [`Routes`], results leave through a
//! [`Sink`].

mod aot;
mod app;
mod breaker;
mod compile;
mod device_host;
mod durations;
mod engine;
mod epoch;
mod error;
mod gpio;
mod host;
mod instance_devices;
mod instance_timers;
mod kv;
mod loader;
mod log;
mod manifest;
mod measures;
mod metrics;
mod precompiled;
mod preinstalled;
mod sensors;
mod services;
mod status;
mod supervisor;
mod suspects;
mod target;
mod timer;
mod timer_set;
mod workers;

#[cfg(test)]
pub(crate) mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use self::aot::AotCache;
use self::app::{App, Package};
use self::device_host::DeviceHost;
use self::engine::{LoadedComponent, WasmEngine};
use self::epoch::Ticker;
use self::gpio::{Chips, KernelChips};
use self::kv::KvStore;
use self::loader::Loader;
use self::manifest::Capability;
use self::measures::MeasuresText;
use self::preinstalled::{AppFolder, Code};
use self::timer::Timer;
use self::workers::{RunQueue, Shared, Workers};
use crate::config::AppNames;
use crate::dead_letters::DeadLetters;
use crate::pipeline::{Progress, Routes, Sink};
use crate::store::{AppRecord, ComponentId, Desired, Store};

pub use breaker::BreakerState;
pub use compile::Compiler;
#[cfg(feature = "compiler")]
pub use compile::{compile_ahead, compile_here};
pub use error::{AppError, AppErrorKind, ComponentProblem};
pub use manifest::{Limits, MANIFEST_FILE, Manifest, ManifestError};
pub use preinstalled::PRECOMPILED_EXTENSION;
pub use status::{
    AppCounters, AppInfo, AppState, DeviceCounters, Dropped, LogLevel, LogLine, Origin,
    RefusedCalls, Restarts, StateUsage,
};
pub use supervisor::RestartPolicy;
pub use target::{Target, TargetError};

/// How long a command waits for an app's `configure` to end. Longer than most deadlines; who has to
/// wait longer sees `starting`.
const SETTLE: Duration = Duration::from_secs(5);

/// How long `stop` lets an app work on what waits.
const DRAIN: Duration = Duration::from_secs(2);

/// How long a stopped app's instance may hold on. It is interrupted at the next epoch.
const LET_GO: Duration = Duration::from_secs(1);

/// How apps are run.
#[derive(Clone, Debug)]
pub struct AppsConfig {
    /// Threads that run apps; 0 for one a CPU.
    pub workers: usize,
    /// Events that may wait for an app whose manifest doesn't say.
    pub queue_events: usize,
    /// How often a running call is looked at: the grain of `limits.batch_deadline_ms`.
    pub epoch: Duration,
    /// Small batches that wait are put together up to this many events a call.
    pub max_batch_events: usize,
    /// Where compiled components are kept.
    pub aot_dir: PathBuf,
    /// The key that seals what is in `aot_dir`. Made at the first start.
    pub host_key: PathBuf,
    pub compiler: Compiler,
    /// The folder of the apps that are part of the system, if there are any.
    pub preinstalled: Option<PathBuf>,
    /// What happens to an app that fails.
    pub restart: RestartPolicy,
    /// The apps that may have GPIO lines.
    pub gpio: AppNames,
    /// The apps that may read sensors.
    pub sensors: AppNames,
    pub(crate) chips: Arc<dyn Chips>,
    /// Where the kernel shows its devices.
    pub(crate) sysfs: PathBuf,
}

impl AppsConfig {
    /// The defaults for a store at `store`, compiling with this very program.
    pub fn new(store: &Path) -> std::io::Result<AppsConfig> {
        Ok(AppsConfig {
            workers: 0,
            queue_events: 8192,
            epoch: Duration::from_millis(5),
            max_batch_events: 64,
            aot_dir: store.join("aot"),
            host_key: store.join("host.key"),
            compiler: Compiler::of_this_program()?,
            preinstalled: None,
            restart: RestartPolicy::default(),
            gpio: AppNames::default(),
            sensors: AppNames::default(),
            chips: Arc::new(KernelChips),
            sysfs: PathBuf::from("/sys"),
        })
    }
}

/// All apps of a gateway. Cheap to clone. When the last clone goes, the apps are stopped.
#[derive(Clone)]
pub struct Apps {
    control: Arc<Control>,
}

struct Control {
    queue_events: usize,
    preinstalled: Option<PathBuf>,
    allowed: Allowed,
    store: Store,
    loader: Arc<Loader>,
    shared: Arc<Shared>,
    /// Held while a command changes what is stored and what runs. None once all is shut down.
    workers: Mutex<Option<Workers>>,
    /// Compiles at the start what isn't in the cache.
    starter: Mutex<Option<JoinHandle<()>>>,
}

/// Which apps may have which capabilities.
struct Allowed {
    gpio: AppNames,
    sensors: AppNames,
}

impl Allowed {
    fn check(&self, manifest: &Manifest) -> Result<(), AppError> {
        for asked in &manifest.devices.capabilities {
            let apps = match asked.capability {
                Capability::Gpio => &self.gpio,
                Capability::Sensors => &self.sensors,
            };
            if !apps.contains(&manifest.name) {
                return Err(AppError::NotAllowed {
                    name: manifest.name.clone(),
                    line: asked.line,
                    capability: asked.capability.as_str(),
                });
            }
        }
        Ok(())
    }
}

impl Apps {
    /// Loads the preinstalled and the installed apps and starts those that should run. An app that
    /// is broken says so in its [`AppInfo`]; it never keeps the others from running. Apps whose
    /// component has to be compiled are started from a thread of their own, after this has returned.
    pub fn open(
        config: AppsConfig,
        store: Store,
        routes: Arc<Routes>,
        sink: Arc<dyn Sink>,
        progress: Progress,
        dead_letters: Arc<DeadLetters>,
    ) -> Result<Apps, AppError> {
        let engine = WasmEngine::new().map_err(|error| AppError::Engine(format!("{error:#}")))?;
        let cache = AotCache::open(&config.aot_dir, &config.host_key, engine.compatibility())?;
        let thread_error = |error| AppError::Engine(format!("cannot start a thread: {error}"));
        let ticker = Ticker::start(engine.engine().clone(), config.epoch).map_err(thread_error)?;
        let shared = Arc::new(Shared {
            apps: RwLock::default(),
            sink,
            progress,
            dead_letters,
            max_batch_events: config.max_batch_events,
            restart: config.restart,
            ticker,
            timer: Timer::start().map_err(thread_error)?,
            kv: KvStore::start(store.clone()).map_err(thread_error)?,
            devices: Arc::new(DeviceHost::start(config.chips, config.sysfs).map_err(thread_error)?),
            routes,
            routing: Mutex::new(()),
            run_queue: RunQueue::default(),
        });
        let workers = match config.workers {
            0 => thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        let workers = Workers::start(workers, &shared).map_err(thread_error)?;
        let apps = Apps {
            control: Arc::new(Control {
                queue_events: config.queue_events,
                preinstalled: config.preinstalled,
                allowed: Allowed {
                    gpio: config.gpio,
                    sensors: config.sensors,
                },
                store,
                loader: Arc::new(Loader::new(engine, cache, config.compiler)),
                shared,
                workers: Mutex::new(Some(workers)),
                starter: Mutex::new(None),
            }),
        };
        apps.control.start_stored()?;
        Ok(apps)
    }

    /// Checks a package, stores it and starts the app. An app of the same name is replaced; if that
    /// was stopped, the new one stays so. Blocks for as long as the compiler takes. When it
    /// returns, the app has run its `configure`, or its state says why not.
    pub fn install(&self, manifest: &str, component: &[u8]) -> Result<AppInfo, AppError> {
        let control = &self.control;
        let checked = Arc::new(Manifest::parse(manifest, control.queue_events)?);
        control.allowed.check(&checked)?;
        let name = checked.name.clone();
        let id = ComponentId::of(component);
        let package = Package {
            manifest: Some(checked),
            component: id,
            component_bytes: component.len() as u64,
            folder: None,
        };
        control.refuse_preinstalled(&name)?;
        let loaded = control.loader.load(&name, id, component)?;

        let workers = control.workers_unless_shut_down()?;
        let present = control.app(&name).ok();
        let desired = match present.as_ref().map(|app| app.state()) {
            Some(AppState::Stopped | AppState::Draining) => Desired::Stopped,
            Some(AppState::Paused) => Desired::Paused,
            _ => Desired::Running,
        };
        let record = AppRecord {
            manifest: manifest.to_owned(),
            component: id,
            component_bytes: component.len() as u64,
            desired,
        };
        let unused = control.store.put_app(&name, &record, component)?;
        control.loader.forget(&unused);
        let app = present.unwrap_or_else(|| control.add(&name, package.clone()));
        app.log()
            .gateway_line(LogLevel::Info, &format!("installed, component {id}"));
        match desired {
            Desired::Running => app.start(package, loaded, None),
            Desired::Paused => {
                app.start_paused();
                app.start(package, loaded, None);
            }
            Desired::Stopped => app.replace_package(package),
        }
        control.shared.update_routes();
        drop(workers);
        app.wait_until_settled(Instant::now() + SETTLE);
        Ok(app.info())
    }

    /// All apps, by name.
    pub fn list(&self) -> Vec<AppInfo> {
        let apps = self.control.shared.apps.read();
        apps.values().map(|app| app.info()).collect()
    }

    pub fn inspect(&self, name: &str) -> Result<AppInfo, AppError> {
        Ok(self.control.app(name)?.info())
    }

    /// Starts a stopped or quarantined app, or one that backs off. Blocks until it runs or has
    /// failed.
    pub fn start(&self, name: &str) -> Result<AppInfo, AppError> {
        let app = self.control.app(name)?;
        match app.state() {
            AppState::Starting | AppState::Running => Ok(app.info()),
            _ => self.restart(name),
        }
    }

    /// Stops an app, and it stays stopped when the gateway starts again. What waits is still
    /// handled, for at most two seconds.
    pub fn stop(&self, name: &str) -> Result<AppInfo, AppError> {
        let control = &self.control;
        let _workers = control.workers_unless_shut_down()?;
        let app = control.app(name)?;
        control.set_desired(&app, Desired::Stopped)?;
        control.stop(&app);
        Ok(app.info())
    }

    /// Lets what comes for an app wait, until `resume`, also when the gateway starts again.
    pub fn pause(&self, name: &str) -> Result<AppInfo, AppError> {
        let control = &self.control;
        let _workers = control.workers_unless_shut_down()?;
        let app = control.app(name)?;
        if !app.pause() {
            return Err(AppError::WrongState {
                name: name.to_owned(),
                state: app.state(),
                remedy: "only an app that runs can be paused",
            });
        }
        control.set_desired(&app, Desired::Paused)?;
        Ok(app.info())
    }

    /// Has a paused app go on.
    pub fn resume(&self, name: &str) -> Result<AppInfo, AppError> {
        let control = &self.control;
        let workers = control.workers_unless_shut_down()?;
        let app = control.app(name)?;
        if !app.resume() {
            return Err(AppError::WrongState {
                name: name.to_owned(),
                state: app.state(),
                remedy: "only a paused app can be resumed; `headgate app start` starts one that is \
                         stopped or quarantined",
            });
        }
        control.set_desired(&app, Desired::Running)?;
        drop(workers);
        app.wait_until_settled(Instant::now() + SETTLE);
        Ok(app.info())
    }

    /// Has an app take nothing more, finish all that waits, and stop; what it has not finished
    /// after `patience` is dropped and counted. Blocks for as long.
    pub fn drain(&self, name: &str, patience: Duration) -> Result<AppInfo, AppError> {
        let control = &self.control;
        let app = {
            let _workers = control.workers_unless_shut_down()?;
            let app = control.app(name)?;
            if !app.drain() {
                return Err(AppError::WrongState {
                    name: name.to_owned(),
                    state: app.state(),
                    remedy: "only an app that runs or is paused can be drained",
                });
            }
            control.set_desired(&app, Desired::Stopped)?;
            control.shared.update_routes();
            app
        };
        let deadline = Instant::now() + patience;
        // Others may go on with their commands meanwhile.
        app.wait_until_drained(deadline);
        let _workers = control.workers_unless_shut_down()?;
        if app.state() == AppState::Draining {
            app.halt(Instant::now() + LET_GO);
        }
        Ok(app.info())
    }

    /// Gives an app a fresh instance and a clean slate of failures. What waits stays.
    pub fn restart(&self, name: &str) -> Result<AppInfo, AppError> {
        let control = &self.control;
        let app = control.app(name)?;
        let package = control.readable(&app)?;
        let component = match app.component() {
            Some(component) => component,
            None => load(&control.store, &control.loader, name, &package)?,
        };
        let workers = control.workers_unless_shut_down()?;
        // It may have been removed or replaced in the meantime.
        let app = control.app(name)?;
        if app.package().component == package.component {
            control.set_desired(&app, Desired::Running)?;
            app.start(app.package(), component, None);
            control.shared.update_routes();
        }
        drop(workers);
        app.wait_until_settled(Instant::now() + SETTLE);
        Ok(app.info())
    }

    /// Stops an app and forgets it.
    pub fn remove(&self, name: &str) -> Result<(), AppError> {
        let control = &self.control;
        let _workers = control.workers_unless_shut_down()?;
        let app = control.app(name)?;
        control.refuse_preinstalled(name)?;
        // What it has kept goes with it, at once; what it writes from here on goes nowhere.
        let state = &app.services().state;
        state.close();
        let unused = control.store.remove_app(name);
        let unused = unused.inspect_err(|_| state.reopen())?;
        control.stop(&app);
        control.shared.apps.write().remove(name);
        control.loader.forget(&unused);
        metrics::forget(&app);
        app.log().gateway_line(LogLevel::Info, "removed");
        Ok(())
    }

    /// The last `last_n` lines of an app's log, oldest first.
    pub fn logs(&self, name: &str, last_n: usize) -> Result<Vec<LogLine>, AppError> {
        Ok(self.control.app(name)?.log().last(last_n))
    }

    /// Puts the apps' counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        let apps = self.control.shared.apps.read();
        apps.values().for_each(|app| metrics::record(app));
        metrics::record_store(&self.control.shared.kv);
    }

    /// Appends what the apps measure themselves to what `/metrics` answers.
    pub fn render_measures(&self, text: &mut String) {
        let mut measures = MeasuresText::default();
        let apps = self.control.shared.apps.read();
        apps.values()
            .for_each(|app| app.render_measures(&mut measures));
        measures.append_to(text);
    }

    /// Waits until every app that is to run does so, or has failed to. Blocks, for as long as the
    /// compiler takes at most.
    pub fn wait_until_settled(&self) {
        let apps: Vec<_> = self.control.shared.apps.read().values().cloned().collect();
        for app in apps {
            app.wait_until_settled(Instant::now() + compile::TIME_LIMIT);
        }
    }

    /// Lets the apps finish what waits, until `deadline`; then stops them all. What is left is
    /// counted as dropped.
    pub fn shutdown(&self, deadline: Instant) {
        self.control.shut_down(deadline);
    }
}

impl Control {
    fn start_stored(self: &Arc<Self>) -> Result<(), AppError> {
        let mut uncompiled = Vec::new();
        let mut used = Vec::new();
        let folders = match &self.preinstalled {
            Some(folder) => preinstalled::scan(folder)?,
            None => Vec::new(),
        };
        let stopped = self.store.stopped_preinstalled()?;
        for folder in folders {
            let is_stopped = stopped.contains(&folder.name);
            uncompiled.extend(self.start_one_preinstalled(folder, is_stopped, &mut used));
        }
        let stored = self.store.apps()?;
        let ids = stored
            .iter()
            .filter_map(|(_, record)| Some(record.as_ref().ok()?.component));
        used.extend(ids);
        self.loader.keep_only(&used);
        for (name, record) in stored {
            if self.app(&name).is_ok() {
                tracing::warn!(
                    app = name,
                    "the installed app is left aside: one of this name is part of the system"
                );
                continue;
            }
            uncompiled.extend(self.start_one_stored(&name, record));
        }
        self.shared.update_routes();
        if !uncompiled.is_empty() {
            let (store, loader) = (self.store.clone(), self.loader.clone());
            let shared = self.shared.clone();
            let starter = thread::Builder::new()
                .name("apps-starter".into())
                .spawn(move || {
                    for (app, generation) in uncompiled {
                        compile_and_start(&store, &loader, &app, generation);
                        shared.update_routes();
                    }
                });
            let starter =
                starter.map_err(|e| AppError::Engine(format!("cannot start a thread: {e}")))?;
            *self.starter.lock() = Some(starter);
        }
        Ok(())
    }

    /// Returns the app if it has to be compiled first. What may be in the cache for it goes to
    /// `used`.
    fn start_one_preinstalled(
        &self,
        folder: AppFolder,
        is_stopped: bool,
        used: &mut Vec<ComponentId>,
    ) -> Option<(Arc<App>, u64)> {
        let name = folder.name.clone();
        let read = folder.manifest(self.queue_events).and_then(|manifest| {
            let allowed = self.allowed.check(&manifest);
            allowed.map_err(|error| error.to_string())?;
            Ok((folder.code(&manifest)?, manifest))
        });
        let (code, manifest) = match read {
            Ok(read) => read,
            Err(reason) => {
                let app = self.add(&name, Package::unknown(Some(folder)));
                app.quarantine(reason, None);
                return None;
            }
        };
        let (component, component_bytes) = match &code {
            Code::Precompiled { file, .. } => (file.component, file.header.component_bytes),
            Code::Component(bytes) => (ComponentId::of(bytes), bytes.len() as u64),
        };
        let package = Package {
            manifest: Some(manifest),
            component,
            component_bytes,
            folder: Some(folder),
        };
        let app = self.add(&name, package.clone());
        if matches!(code, Code::Component(_)) {
            used.push(component);
        }
        if is_stopped {
            app.halt(Instant::now());
            return None;
        }
        let loaded = match &code {
            Code::Component(_) => self.loader.cached(&name, component),
            Code::Precompiled { path, file } => Some(self.loader.precompiled(&name, path, file)),
        };
        self.start_or_compile(app, package, loaded)
    }

    /// Returns the app if it has to be compiled first.
    fn start_one_stored(
        &self,
        name: &str,
        record: Result<AppRecord, String>,
    ) -> Option<(Arc<App>, u64)> {
        let (manifest, record) = match record {
            Ok(record) => (Manifest::parse(&record.manifest, self.queue_events), record),
            Err(why) => {
                let app = self.add(name, Package::unknown(None));
                app.quarantine(
                    format!("its record in the store can't be read ({why}); install it again"),
                    None,
                );
                return None;
            }
        };
        let package = Package {
            component: record.component,
            component_bytes: record.component_bytes,
            manifest: manifest.as_ref().ok().cloned().map(Arc::new),
            folder: None,
        };
        let app = self.add(name, package.clone());
        let manifest = match manifest {
            Ok(manifest) => manifest,
            Err(error) => {
                app.quarantine(
                format!(
                    "its manifest doesn't fit this version of Headgate ({error}); install it again"
                ),
                None,
            );
                return None;
            }
        };
        match record.desired {
            Desired::Running => {}
            Desired::Paused => app.start_paused(),
            Desired::Stopped => {
                app.halt(Instant::now());
                return None;
            }
        }
        if let Err(error) = self.allowed.check(&manifest) {
            app.quarantine(error.to_string(), None);
            return None;
        }
        let loaded = self.loader.cached(name, record.component);
        self.start_or_compile(app, package, loaded)
    }

    /// Starts an app with what was loaded, or returns it if that has to be compiled first.
    fn start_or_compile(
        &self,
        app: Arc<App>,
        package: Package,
        loaded: Option<Result<LoadedComponent, AppError>>,
    ) -> Option<(Arc<App>, u64)> {
        match loaded {
            Some(Ok(component)) => app.start(package, component, None),
            Some(Err(error)) => app.quarantine(error.to_string(), None),
            None => {
                let generation = app.loading();
                return Some((app, generation));
            }
        }
        None
    }

    fn add(&self, name: &str, package: Package) -> Arc<App> {
        let app = App::new(name, package, self.shared.clone());
        self.shared
            .apps
            .write()
            .insert(name.to_owned(), app.clone());
        app
    }

    fn app(&self, name: &str) -> Result<Arc<App>, AppError> {
        let apps = self.shared.apps.read();
        apps.get(name).cloned().ok_or_else(|| AppError::NotFound {
            name: name.to_owned(),
        })
    }

    fn refuse_preinstalled(&self, name: &str) -> Result<(), AppError> {
        match self.app(name).map(|app| app.package().origin()) {
            Ok(Origin::Preinstalled) => Err(AppError::Preinstalled {
                name: name.to_owned(),
            }),
            Ok(Origin::Installed) | Err(_) => Ok(()),
        }
    }

    fn set_desired(&self, app: &App, desired: Desired) -> Result<(), AppError> {
        let name = app.info().name;
        match app.package().origin() {
            Origin::Installed => self.store.set_desired(&name, desired)?,
            Origin::Preinstalled => {
                let is_stopped = desired == Desired::Stopped;
                self.store.set_preinstalled_stopped(&name, is_stopped)?;
            }
        }
        Ok(())
    }

    /// The app's package, if its manifest can be read and asks for nothing that it may not have; else
    /// the error that says why not.
    fn readable(&self, app: &App) -> Result<Package, AppError> {
        let package = app.package();
        if let Some(manifest) = &package.manifest {
            self.allowed.check(manifest)?;
            return Ok(package);
        }
        let info = app.info();
        Err(match package.origin() {
            Origin::Installed => AppError::Unreadable { name: info.name },
            Origin::Preinstalled => AppError::PreinstalledFile {
                name: info.name,
                reason: info.reason.unwrap_or_default(),
            },
        })
    }

    fn workers_unless_shut_down(
        &self,
    ) -> Result<parking_lot::MutexGuard<'_, Option<Workers>>, AppError> {
        let workers = self.workers.lock();
        match *workers {
            Some(_) => Ok(workers),
            None => Err(AppError::ShuttingDown),
        }
    }

    fn stop(&self, app: &App) {
        let now = Instant::now();
        // One that is down has nothing to finish.
        let _ = app.drain();
        self.shared.update_routes();
        app.wait_until_drained(now + DRAIN);
        app.halt(now + DRAIN + LET_GO);
    }

    fn shut_down(&self, deadline: Instant) {
        let Some(workers) = self.workers.lock().take() else {
            return;
        };
        let apps: Vec<_> = self.shared.apps.read().values().cloned().collect();
        apps.iter().for_each(|app| app.wait_until_drained(deadline));
        let let_go = deadline.max(Instant::now()) + LET_GO;
        apps.iter().for_each(|app| app.halt(let_go));
        self.shared.update_routes();
        self.shared.timer.stop();
        self.shared.devices.stop();
        workers.stop(&self.shared);
        self.shared.kv.close();
        if let Some(starter) = self.starter.lock().take()
            && starter.is_finished()
            && starter.join().is_err()
        {
            tracing::error!("the thread that starts apps has panicked");
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shut_down(Instant::now());
        // The apps hold what is shared, and that holds the apps.
        self.shared.apps.write().clear();
    }
}

/// Loads what a package says, compiling it if need be.
fn load(
    store: &Store,
    loader: &Loader,
    name: &str,
    package: &Package,
) -> Result<LoadedComponent, AppError> {
    let (Some(folder), Some(manifest)) = (&package.folder, &package.manifest) else {
        let bytes = store.component(package.component)?;
        return loader.load(name, package.component, &bytes);
    };
    let code = folder.code(manifest);
    match code.map_err(|reason| AppError::PreinstalledFile {
        name: name.to_owned(),
        reason,
    })? {
        Code::Precompiled { path, file } => loader.precompiled(name, &path, &file),
        Code::Component(bytes) => loader.load(name, ComponentId::of(&bytes), &bytes),
    }
}

/// Loads an app that is marked as starting, and starts it unless somebody has stopped it since.
fn compile_and_start(store: &Store, loader: &Loader, app: &App, generation: u64) {
    let package = app.package();
    let name = app.info().name;
    match load(store, loader, &name, &package) {
        Ok(component) => app.start(package, component, Some(generation)),
        Err(error) => app.quarantine(error.to_string(), Some(generation)),
    }
}
