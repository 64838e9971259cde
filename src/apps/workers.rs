//! The threads that run apps, and what they share.
//!
//! Each app is in the run queue at most once and gets one batch a turn; who has had the least time for
//! its weight comes next. Idle workers sleep on the queue.

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};

use super::app::App;
use super::device_host::DeviceHost;
use super::epoch::Ticker;
use super::fair_queue::{FairQueue, VirtualTime};
use super::kv::KvStore;
use super::supervisor::RestartPolicy;
use super::timer::Timer;
use super::upkeep::Upkeep;
use crate::dead_letters::DeadLetters;
use crate::pipeline::{Progress, Route, Routes, Sink};

/// What all apps and workers share.
pub(super) struct Shared {
    pub(super) apps: RwLock<BTreeMap<String, Arc<App>>>,
    pub(super) sink: Arc<dyn Sink>,
    pub(super) progress: Progress,
    pub(super) dead_letters: Arc<DeadLetters>,
    pub(super) max_batch_events: usize,
    pub(super) cold_start_target: Option<Duration>,
    /// Whether this gateway is one of a site, so that where an app runs is not its alone to say.
    pub(super) in_site: bool,
    pub(super) restart: RestartPolicy,
    pub(super) ticker: Ticker,
    pub(super) timer: Timer,
    pub(super) kv: KvStore,
    pub(super) upkeep: Upkeep,
    pub(super) devices: Arc<DeviceHost>,
    pub(super) routes: Arc<Routes>,
    /// Held while routes are gathered and replaced, so that the last to gather is the last to
    /// replace.
    pub(super) routing: Mutex<()>,
    pub(super) run_queue: RunQueue,
}

/// The apps that have something to do, at most each once. A channel would serve, but the usual ones
/// spin before they sleep, which costs a gateway with little to do more than its events.
#[derive(Default)]
pub(super) struct RunQueue {
    tasks: Mutex<Tasks>,
    filled: Condvar,
}

#[derive(Default)]
struct Tasks {
    turns: FairQueue<Arc<App>>,
    /// Once nobody wants a turn any more, the workers end.
    ends: bool,
}

impl RunQueue {
    fn push(&self, app: Arc<App>, time: VirtualTime) {
        self.tasks.lock().turns.push(app, time);
        self.filled.notify_one();
    }

    /// None: there is nothing more to do, ever.
    fn pop(&self) -> Option<(Arc<App>, VirtualTime)> {
        let mut tasks = self.tasks.lock();
        loop {
            if let Some(turn) = tasks.turns.pop() {
                return Some(turn);
            }
            if tasks.ends {
                return None;
            }
            self.filled.wait(&mut tasks);
        }
    }

    fn end(&self) {
        self.tasks.lock().ends = true;
        self.filled.notify_all();
    }
}

impl Shared {
    /// Gives `app` a turn.
    pub(super) fn run(&self, app: Arc<App>) {
        let time = app.virtual_time();
        self.run_queue.push(app, time);
    }

    /// Puts the routes of the apps that take events into force.
    pub(super) fn update_routes(&self) {
        let _last_wins = self.routing.lock();
        let apps: Vec<_> = self.apps.read().values().cloned().collect();
        let mut routes = Vec::new();
        for app in apps {
            for filter in app.subscriptions() {
                routes.push(Route {
                    filter,
                    outlet: app.clone(),
                });
            }
        }
        self.routes.replace("apps", routes);
    }
}

/// The threads, until they are stopped.
pub(super) struct Workers {
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(super) fn start(count: usize, shared: &Arc<Shared>) -> io::Result<Workers> {
        let threads = (0..count).map(|number| {
            let shared = shared.clone();
            thread::Builder::new()
                .name(format!("apps-{number}"))
                .spawn(move || work(&shared))
        });
        Ok(Workers {
            threads: threads.collect::<io::Result<_>>()?,
        })
    }

    /// Waits for the workers' current turns and ends them.
    pub(super) fn stop(self, shared: &Shared) {
        shared.run_queue.end();
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker thread has panicked");
            }
        }
    }
}

fn work(shared: &Shared) {
    while let Some((app, time)) = shared.run_queue.pop() {
        let began = Instant::now();
        // Set before the turn ends: from there on somebody else may give it the next one.
        let time_after = |weight| time.after(began.elapsed(), weight);
        match catch_unwind(AssertUnwindSafe(|| app.take_turn(time_after))) {
            Ok(true) => shared.run(app),
            Ok(false) => {}
            // The others need this thread.
            Err(_) => tracing::error!("a turn of an app has panicked: this is a bug in Headgate"),
        }
    }
}
