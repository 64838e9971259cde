//! Apps: WASM components that take batches of events and hand out events.
//!
//! Owns an app's whole life: package and manifest, compilation and its cache, instances and their
//! limits, scheduling, supervision. Knows nothing of MQTT: batches come in through
//! [`Outlet`](crate::pipeline::Outlet)s that it puts into [`Routes`], results leave through a
//! [`Sink`].

mod aot;
mod app;
mod breaker;
mod columns;
mod compile;
mod device_host;
mod durations;
mod engine;
mod epoch;
mod error;
mod fair_queue;
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
#[cfg(feature = "compiler")]
mod tryout;
mod upkeep;
mod workers;

#[cfg(test)]
pub(crate) mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use self::aot::AotCache;
use self::app::{App, Package, Previous, Successor};
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
use self::upkeep::Upkeep;
use self::workers::{RunQueue, Shared, Workers};
use crate::config::AppNames;
use crate::dead_letters::DeadLetters;
use crate::pipeline::{Progress, Routes, Sink};
use crate::site::Worker;
use crate::store::{AppRecord, ComponentId, Desired, PreviousVersion, Store};

pub use breaker::BreakerState;
pub use compile::Compiler;
#[cfg(feature = "compiler")]
pub use compile::{compile_ahead, compile_here};
pub use engine::EngineConfig;
pub use error::{AppError, AppErrorKind, ComponentProblem};
pub use manifest::{Defaults, Limits, MANIFEST_FILE, Manifest, ManifestError, MostLimits, TooMuch};
pub use preinstalled::PRECOMPILED_EXTENSION;
pub use status::{
    AppCounters, AppInfo, AppState, DeviceCounters, Dropped, LogLevel, LogLine, Origin,
    RefusedCalls, Restarts, StateUsage,
};
pub use supervisor::RestartPolicy;
pub use target::{Target, TargetError};
#[cfg(feature = "compiler")]
pub use tryout::{Outcome, Tryout};

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
    /// What a manifest has that doesn't say.
    pub defaults: Defaults,
    /// What a manifest may ask for.
    pub most: MostLimits,
    pub engine: EngineConfig,
    /// How often a running call is looked at: the grain of `limits.batch_deadline_ms`.
    pub epoch: Duration,
    /// Small batches that wait are put together up to this many events a call.
    pub max_batch_events: usize,
    /// Where compiled components are kept.
    pub aot_dir: PathBuf,
    /// Whether they are.
    pub aot_cache: bool,
    /// A start that takes longer is worth a line in the app's log.
    pub cold_start_target: Option<Duration>,
    /// Whether this gateway is one of a site, so that where an app runs is not its alone to say.
    pub in_site: bool,
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
            defaults: Defaults::new(8192),
            most: MostLimits::default(),
            engine: EngineConfig::default(),
            epoch: Duration::from_millis(5),
            max_batch_events: 64,
            aot_dir: store.join("aot"),
            aot_cache: true,
            cold_start_target: None,
            in_site: false,
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
    defaults: Defaults,
    most: MostLimits,
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
        let engine = WasmEngine::new(config.engine)
            .map_err(|error| AppError::Engine(format!("{error:#}")))?;
        let cache = AotCache::open(&config.aot_dir, &config.host_key, engine.compatibility())?;
        let thread_error = |error| AppError::Engine(format!("cannot start a thread: {error}"));
        let loader = Arc::new(Loader::new(
            engine.clone(),
            config.engine,
            cache,
            config.aot_cache,
            config.compiler,
        ));
        let ticker = Ticker::start(engine.engine().clone(), config.epoch).map_err(thread_error)?;
        let shared = Arc::new(Shared {
            apps: RwLock::default(),
            sink,
            progress,
            dead_letters,
            max_batch_events: config.max_batch_events,
            cold_start_target: config.cold_start_target,
            in_site: config.in_site,
            restart: config.restart,
            ticker,
            timer: Timer::start().map_err(thread_error)?,
            kv: KvStore::start(store.clone()).map_err(thread_error)?,
            upkeep: Upkeep::new(store.clone(), loader.clone()),
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
                defaults: config.defaults,
                most: config.most,
                preinstalled: config.preinstalled,
                allowed: Allowed {
                    gpio: config.gpio,
                    sensors: config.sensors,
                },
                store,
                loader,
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
        let checked = Arc::new(control.manifest(manifest)?);
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
        control.shared.upkeep.settle();
        let present = control.app(&name).ok();
        let desired = match &present {
            Some(app) => desired(app),
            None => Desired::Running,
        };
        let record = AppRecord {
            manifest: manifest.to_owned(),
            component: id,
            component_bytes: component.len() as u64,
            desired,
            previous: None,
            on_trial: false,
        };
        let unused = control.store.put_app(&name, &record, component)?;
        control.loader.forget(&unused);
        let app = present.unwrap_or_else(|| control.add(&name, package.clone()));
        app.set_previous(None);
        app.log()
            .gateway_line(LogLevel::Info, &format!("installed, component {id}"));
        match desired {
            Desired::Running | Desired::Paused => {
                app.start_paused(desired == Desired::Paused);
                app.start(package, loaded, None);
            }
            Desired::Stopped => app.replace_package(package),
        }
        control.shared.update_routes();
        drop(workers);
        app.wait_until_settled(Instant::now() + SETTLE);
        Ok(app.info())
    }

    /// Has another version of an app take over between two batches, with all that waits and all
    /// that the app keeps. If it does not start, or fails with one of its first batches
    /// (`upgrade.trial_batches`), the version before takes over again, that batch first. Blocks for
    /// as long as the compiler takes, and until the new version has run its `configure`.
    pub fn upgrade(&self, manifest: &str, component: &[u8]) -> Result<AppInfo, AppError> {
        let control = &self.control;
        let checked = Arc::new(control.manifest(manifest)?);
        let name = checked.name.clone();
        let id = ComponentId::of(component);
        control.refuse_preinstalled(&name)?;
        control.app(&name)?;
        let loaded = control.loader.load(&name, id, component)?;

        let workers = control.workers_unless_shut_down()?;
        let app = control.app(&name)?;
        let wrong_state = |remedy| {
            Err(AppError::WrongState {
                name: name.clone(),
                state: app.state(),
                remedy,
            })
        };
        if app.state() == AppState::Draining {
            return wrong_state("wait until it has stopped");
        }
        // From here on the app does not change by itself.
        let Some(held) = app.hold(Instant::now() + SETTLE) else {
            return wrong_state("and in a call that doesn't end; try again");
        };
        control.shared.upkeep.settle();
        let before = control.readable(&app)?;
        if app.is_on_trial() {
            return wrong_state(
                "and its last upgrade is on trial still; let it handle some batches, or go back \
                 with `headgate app rollback`",
            );
        }
        if before.component == id && before.manifest.as_deref() == Some(&*checked) {
            return wrong_state("and this very version of it is installed already");
        }
        let stored = control.store.app(&name)?;
        let Some(Ok(stored)) = stored else {
            return Err(AppError::Unreadable { name });
        };
        let record = AppRecord {
            manifest: manifest.to_owned(),
            component: id,
            component_bytes: component.len() as u64,
            desired: desired(&app),
            previous: Some(stored.to_previous()),
            on_trial: true,
        };
        let migrates = before
            .manifest
            .as_ref()
            .is_some_and(|before| before.state_version != checked.state_version);
        if migrates && app.is_shared() {
            return wrong_state(
                "and what it keeps for the site can't be put aside: install the version instead, on all gateways",
            );
        }
        if migrates && app.services().state.unreadable().is_some() {
            return wrong_state("and what it keeps can't be read, so it can't be put aside");
        }
        let kept = migrates.then(|| app.services().state.kept());
        let entries = kept.iter().flatten().map(|(key, value)| (&**key, &**value));
        let unused = control
            .store
            .upgrade_app(&name, &record, component, entries)?;
        control.loader.forget(&unused);
        let version = checked.version.clone();
        app.log().gateway_line(
            LogLevel::Info,
            &format!(
                "upgraded from {} to {version}, component {id}",
                before.version()
            ),
        );
        let rollbacks = app.info().restarts.rollback;
        app.switch(Successor {
            previous: Some(Previous {
                component: app.component(),
                package: before,
                kept,
                trial: Some(checked.trial_batches),
            }),
            package: Package {
                manifest: Some(checked),
                component: id,
                component_bytes: component.len() as u64,
                folder: None,
            },
            component: loaded,
            kept: None,
        });
        drop(held);
        control.shared.update_routes();
        drop(workers);
        app.wait_until_settled(Instant::now() + SETTLE);
        let info = app.info();
        if info.restarts.rollback > rollbacks {
            let reason = info.last_error.unwrap_or_default();
            return Err(AppError::RolledBack { name, reason });
        }
        Ok(info)
    }

    /// Has the version before the last upgrade take over again, between two batches. If that keeps
    /// what it keeps in another format, it finds what there was before the upgrade.
    pub fn rollback(&self, name: &str) -> Result<AppInfo, AppError> {
        let control = &self.control;
        control.refuse_preinstalled(name)?;
        let app = control.app(name)?;
        let no_way_back = |app: &App, remedy| AppError::WrongState {
            name: name.to_owned(),
            state: app.state(),
            remedy,
        };
        let nothing = "and there is no version before this one to go back to";
        let previous = app.previous().ok_or_else(|| no_way_back(&app, nothing))?;
        if let Some(manifest) = &previous.package.manifest {
            control.check_demands(manifest)?;
        }
        let component = match previous.component {
            Some(component) => component,
            None => load(&control.store, &control.loader, name, &previous.package)?,
        };

        let workers = control.workers_unless_shut_down()?;
        let app = control.app(name)?;
        let package = previous.package;
        // From here on the app does not change by itself; a call that hangs is not waited for.
        let held = app.hold(Instant::now() + SETTLE).or_else(|| {
            app.interrupt();
            app.hold(Instant::now() + LET_GO)
        });
        let Some(held) = held else {
            let remedy = "and in a call that doesn't end; try again";
            return Err(no_way_back(&app, remedy));
        };
        control.shared.upkeep.settle();
        let present = app.package();
        let Some(still) = app.previous() else {
            // It may have failed on trial meanwhile, and be back already.
            return match present.is(&package) {
                true => Ok(app.info()),
                false => Err(no_way_back(&app, nothing)),
            };
        };
        if !still.package.is(&package) {
            return Err(no_way_back(&app, "and another version took over meanwhile"));
        }
        let version = |package: &Package| package.manifest.as_ref().map(|m| m.state_version);
        let migrates = version(&package) != version(&present);
        let state = &app.services().state;
        let go_back = || {
            let kept = match migrates {
                true => {
                    // What waits to be written belongs to the version that goes.
                    state.close();
                    Some(kv::kept(control.store.state_before_upgrade(name)?))
                }
                false => None,
            };
            let rolled_back = control
                .store
                .roll_back_app(name, present.component, migrates);
            Ok::<_, AppError>((kept, rolled_back?))
        };
        let went_back = go_back();
        let (kept, Some(unused)) = went_back.inspect_err(|_| state.reopen())? else {
            state.reopen();
            return Err(AppError::Unreadable {
                name: name.to_owned(),
            });
        };
        control.loader.forget(&unused);
        app.log().gateway_line(
            LogLevel::Info,
            &format!(
                "rolled back from {} to {}",
                present.version(),
                package.version()
            ),
        );
        app.switch(Successor {
            package,
            component,
            previous: None,
            kept,
        });
        drop(held);
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
            app.start_paused(false);
            if app.start_again(package.component, component) {
                control.shared.update_routes();
            }
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
        control.shared.upkeep.settle();
        state.retire();
        let unused = control.store.remove_app(name);
        let unused = unused.inspect_err(|_| state.bring_back())?;
        control.stop(&app);
        control.shared.apps.write().remove(name);
        control.loader.forget(&unused);
        metrics::forget(&app);
        app.log().gateway_line(LogLevel::Info, "removed");
        Ok(())
    }

    /// The manifest of an app and its component, as they were installed.
    pub fn package(&self, name: &str) -> Result<(String, Vec<u8>), AppError> {
        let control = &self.control;
        // No command takes the component away meanwhile.
        let _workers = control.workers_unless_shut_down()?;
        let app = control.app(name)?;
        if app.package().origin() == Origin::Installed {
            return stored_package(&control.store, name);
        }
        let package = control.readable(&app)?;
        let (Some(folder), Some(manifest)) = (package.folder, package.manifest) else {
            unreachable!("a preinstalled app that is readable has both");
        };
        let found = folder.package(&manifest);
        let found = found.map_err(|reason| AppError::PreinstalledFile {
            name: name.to_owned(),
            reason,
        })?;
        found.ok_or_else(|| AppError::OnlyPrecompiled {
            name: name.to_owned(),
        })
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

    /// The apps whose place is the site's to say.
    pub(crate) fn placed(&self) -> Vec<Arc<dyn Worker>> {
        let apps = self.control.shared.apps.read();
        let placed = apps.values().filter(|app| app.is_shared());
        placed.map(|app| app.clone() as Arc<dyn Worker>).collect()
    }

    /// Lets the apps finish what waits, until `deadline`; then stops them all. What is left is
    /// dropped, after `before_dropping`, and counted.
    pub fn shutdown(&self, deadline: Instant, before_dropping: impl FnOnce()) {
        self.control.shut_down(deadline, before_dropping);
    }
}

/// The manifest of an installed app and its component, for whoever needs them without a gateway that runs.
pub fn stored_package(store: &Store, name: &str) -> Result<(String, Vec<u8>), AppError> {
    let record = store.app(name)?.ok_or_else(|| AppError::NotFound {
        name: name.to_owned(),
    })?;
    let record = record.map_err(|_| AppError::Unreadable {
        name: name.to_owned(),
    })?;
    Ok((record.manifest, store.component(record.component)?))
}

impl Control {
    fn start_stored(self: &Arc<Self>) -> Result<(), AppError> {
        let mut uncompiled = Vec::new();
        let mut used = Vec::new();
        let folders = match &self.preinstalled {
            Some(folder) => preinstalled::scan(folder)?,
            None => Vec::new(),
        };
        let desired = self.store.preinstalled()?;
        for folder in folders {
            let desired = desired.get(&folder.name).copied();
            let desired = desired.unwrap_or(Desired::Running);
            uncompiled.extend(self.start_one_preinstalled(folder, desired, &mut used));
        }
        let stored = self.store.apps()?;
        let records = stored.iter().filter_map(|(_, record)| record.as_ref().ok());
        used.extend(records.flat_map(AppRecord::components));
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
        desired: Desired,
        used: &mut Vec<ComponentId>,
    ) -> Option<(Arc<App>, u64)> {
        let name = folder.name.clone();
        let read = folder
            .manifest(&self.defaults)
            .and_then(|manifest| Ok((folder.code(&manifest)?, manifest)));
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
        if !begin(&app, desired) {
            return None;
        }
        if let Err(error) = self.readable(&app) {
            app.quarantine(error.to_string(), None);
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
            Ok(record) => (Manifest::parse(&record.manifest, &self.defaults), record),
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
        if let Err(error) = manifest {
            app.quarantine(
                format!(
                    "its manifest doesn't fit this version of Headgate ({error}); install it again"
                ),
                None,
            );
            return None;
        }
        if let Some(previous) = &record.previous {
            self.remember_previous(&app, previous, record.on_trial);
        }
        if !begin(&app, record.desired) {
            return None;
        }
        if let Err(error) = self.readable(&app) {
            app.quarantine(error.to_string(), None);
            return None;
        }
        let loaded = self.loader.cached(name, record.component);
        self.start_or_compile(app, package, loaded)
    }

    /// Tells an app of the version before it, and goes on with its trial.
    fn remember_previous(&self, app: &App, previous: &PreviousVersion, on_trial: bool) {
        let (name, present) = (app.info().name, app.package());
        let manifest = match Manifest::parse(&previous.manifest, &self.defaults) {
            Ok(manifest) => manifest,
            Err(error) => {
                tracing::warn!(
                    app = name,
                    "there is no way back to the app's version before: its manifest doesn't fit \
                     this version of Headgate ({error})"
                );
                return;
            }
        };
        let Some(present) = present.manifest.filter(|_| on_trial) else {
            return app.set_previous(Some(without_code(previous, manifest)));
        };
        let component = self.loader.cached(&name, previous.component);
        let kept = match present.state_version != manifest.state_version {
            true => self
                .store
                .state_before_upgrade(&name)
                .map(|kept| Some(kv::kept(kept))),
            false => Ok(None),
        };
        match kept {
            Ok(kept) => app.set_previous(Some(Previous {
                component: component.and_then(Result::ok),
                kept,
                trial: Some(present.trial_batches),
                ..without_code(previous, manifest)
            })),
            Err(error) => {
                tracing::error!(app = name, %error, "what the app kept before its upgrade can't be read, so it stays as it is");
            }
        }
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
            Origin::Preinstalled => self.store.set_preinstalled(&name, desired)?,
        }
        Ok(())
    }

    /// Reads a manifest that somebody hands in.
    fn manifest(&self, text: &str) -> Result<Manifest, AppError> {
        let manifest = Manifest::parse(text, &self.defaults)?;
        self.check_demands(&manifest)?;
        Ok(manifest)
    }

    /// A manifest can ask for more than this gateway gives.
    fn check_demands(&self, manifest: &Manifest) -> Result<(), AppError> {
        self.allowed.check(manifest)?;
        let checked = self.most.check(&manifest.limits);
        checked.map_err(|problem| AppError::TooMuch {
            name: manifest.name.clone(),
            problem,
        })
    }

    /// The app's package, if its manifest can be read, and asks for no more than it may; else the
    /// error that says why not.
    fn readable(&self, app: &App) -> Result<Package, AppError> {
        let package = app.package();
        if let Some(manifest) = &package.manifest {
            self.check_demands(manifest)?;
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

    fn shut_down(&self, deadline: Instant, before_dropping: impl FnOnce()) {
        let Some(workers) = self.workers.lock().take() else {
            return;
        };
        let apps: Vec<_> = self.shared.apps.read().values().cloned().collect();
        apps.iter().for_each(|app| app.wait_until_drained(deadline));
        apps.iter().for_each(|app| app.wait_until_synced(deadline));
        before_dropping();
        let let_go = deadline.max(Instant::now()) + LET_GO;
        apps.iter().for_each(|app| app.halt(let_go));
        self.shared.update_routes();
        self.shared.timer.stop();
        self.shared.devices.stop();
        workers.stop(&self.shared);
        self.shared.upkeep.settle();
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
        self.shut_down(Instant::now(), || {});
        // The apps hold what is shared, and that holds the apps.
        self.shared.apps.write().clear();
    }
}

/// What the operator wants of an app, going by the state that he has brought it to.
fn desired(app: &App) -> Desired {
    match app.state() {
        AppState::Stopped | AppState::Draining => Desired::Stopped,
        _ if app.is_to_pause() => Desired::Paused,
        _ => Desired::Running,
    }
}

/// A version that is to be loaded when somebody goes back to it.
fn without_code(previous: &PreviousVersion, manifest: Manifest) -> Previous {
    Previous {
        package: Package {
            manifest: Some(Arc::new(manifest)),
            component: previous.component,
            component_bytes: previous.component_bytes,
            folder: None,
        },
        component: None,
        kept: None,
        trial: None,
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
        if let Some(loaded) = loader.cached(name, package.component) {
            return loaded;
        }
        let bytes = store.component(package.component)?;
        return loader.compile(name, package.component, &bytes);
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

/// Has an app begin as it is wanted to be. Whether it is to be loaded.
fn begin(app: &App, desired: Desired) -> bool {
    match desired {
        Desired::Running => {}
        Desired::Paused => app.start_paused(true),
        Desired::Stopped => app.halt(Instant::now()),
    }
    desired != Desired::Stopped
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
