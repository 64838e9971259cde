//! The threads that run apps, and what they share.
//!
//! Each app is in the run queue at most once and gets one batch a turn, so that all that have work
//! take turns; idle workers sleep on the queue.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex, RwLock};

use super::app::App;
use super::device_host::DeviceHost;
use super::epoch::Ticker;
use super::kv::KvStore;
use super::supervisor::RestartPolicy;
use super::timer::Timer;
use crate::dead_letters::DeadLetters;
use crate::pipeline::{Progress, Route, Routes, Sink};

/// What all apps and workers share.
pub(super) struct Shared {
    pub(super) apps: RwLock<BTreeMap<String, Arc<App>>>,
    pub(super) sink: Arc<dyn Sink>,
    pub(super) progress: Progress,
    pub(super) dead_letters: Arc<DeadLetters>,
    pub(super) max_batch_events: usize,
    pub(super) restart: RestartPolicy,
    pub(super) ticker: Ticker,
    pub(super) timer: Timer,
    pub(super) kv: KvStore,
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
    tasks: Mutex<VecDeque<Task>>,
    filled: Condvar,
}

impl RunQueue {
    fn push(&self, task: Task) {
        self.tasks.lock().push_back(task);
        self.filled.notify_one();
    }

    fn pop(&self) -> Task {
        let mut tasks = self.tasks.lock();
        loop {
            if let Some(task) = tasks.pop_front() {
                return task;
            }
            self.filled.wait(&mut tasks);
        }
    }
}

pub(super) enum Task {
    Turn(Arc<App>),
    /// Ends one worker.
    Stop,
}

impl Shared {
    /// Gives `app` a turn.
    pub(super) fn run(&self, app: Arc<App>) {
        self.run_queue.push(Task::Turn(app));
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
        self.routes.replace(routes);
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
        for _ in &self.threads {
            shared.run_queue.push(Task::Stop);
        }
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker thread has panicked");
            }
        }
    }
}

fn work(shared: &Shared) {
    while let Task::Turn(app) = shared.run_queue.pop() {
        if app.take_turn() {
            shared.run(app);
        }
    }
}
