//! Apps: WASM components that take batches of events and hand out events.
//!
//! Owns an app's whole life: package and manifest, compilation and its cache, instances and their
//! limits, scheduling, supervision. Knows nothing of MQTT: batches come in through
//! [`Outlet`](crate::pipeline::Outlet)s that it puts into [`Routes`], results leave through a
//! [`Sink`].

mod error;
mod manifest;
mod status;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pipeline::{Progress, Routes, Sink};
use crate::store::Store;

pub use error::{AppError, AppErrorKind, ComponentProblem};
pub use manifest::{Limits, MANIFEST_FILE, Manifest, ManifestError};
pub use status::{AppCounters, AppInfo, AppState, Dropped, LogLevel, LogLine};

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
}

/// Where components are compiled.
#[derive(Clone, Debug)]
pub enum Compiler {
    /// By `PROGRAM app compile --output OUTPUT INPUT`, so that neither the compiler's memory nor
    /// its bugs are the gateway's.
    ChildProcess(PathBuf),
    /// In this process: for tests.
    InProcess,
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
            compiler: Compiler::ChildProcess(std::env::current_exe()?),
        })
    }
}

/// All apps of a gateway. Cheap to clone.
#[derive(Clone)]
pub struct Apps {}

impl Apps {
    /// Loads the installed apps and starts those that should run. An app that is broken says so in
    /// its [`AppInfo`]; it never keeps the others from running.
    pub fn open(
        config: AppsConfig,
        store: Store,
        routes: Arc<Routes>,
        sink: Arc<dyn Sink>,
        progress: Progress,
    ) -> Result<Apps, AppError> {
        let _ = (config, store, routes, sink, progress);
        unimplemented!()
    }

    /// Checks a package, stores it and starts the app. An app of the same name is replaced. Blocks
    /// for as long as the compiler takes. When it returns, the app has run its `configure`, or its
    /// state says why not.
    pub fn install(&self, manifest: &str, component: &[u8]) -> Result<AppInfo, AppError> {
        let _ = (manifest, component);
        unimplemented!()
    }

    /// All apps, by name.
    pub fn list(&self) -> Vec<AppInfo> {
        unimplemented!()
    }

    pub fn inspect(&self, name: &str) -> Result<AppInfo, AppError> {
        let _ = name;
        unimplemented!()
    }

    /// Starts a stopped or quarantined app. Blocks until it runs or has failed.
    pub fn start(&self, name: &str) -> Result<AppInfo, AppError> {
        let _ = name;
        unimplemented!()
    }

    /// Stops an app, and it stays stopped when the gateway starts again. What waits is still
    /// handled, for at most two seconds.
    pub fn stop(&self, name: &str) -> Result<AppInfo, AppError> {
        let _ = name;
        unimplemented!()
    }

    /// Gives an app a fresh instance and a clean slate of failures. What waits stays.
    pub fn restart(&self, name: &str) -> Result<AppInfo, AppError> {
        let _ = name;
        unimplemented!()
    }

    /// Stops an app and forgets it.
    pub fn remove(&self, name: &str) -> Result<(), AppError> {
        let _ = name;
        unimplemented!()
    }

    /// The last `last_n` lines of an app's log, oldest first.
    pub fn logs(&self, name: &str, last_n: usize) -> Result<Vec<LogLine>, AppError> {
        let _ = (name, last_n);
        unimplemented!()
    }

    /// Puts the apps' counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        unimplemented!()
    }

    /// Lets the apps finish what waits, until `deadline`; then stops them all. What is left is
    /// counted as dropped.
    pub fn shutdown(&self, deadline: Instant) {
        let _ = deadline;
        unimplemented!()
    }
}

/// Compiles the component in the file `input` for this machine into the file `output`: what
/// `headgate app compile` does. Lowers this process's priority and bounds its memory first. An
/// error's text is for the gateway that started this: print it to stderr as it is and exit with 1.
pub fn compile_file(input: &Path, output: &Path) -> Result<(), String> {
    let _ = (input, output);
    unimplemented!()
}
