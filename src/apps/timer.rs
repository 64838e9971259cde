//! Wakes apps whose pause is over, and rings the timers of instances. One thread for all; sleeps
//! without a timeout when there is nothing to wait for.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::app::App;
use super::instance_timers::InstanceTimers;

pub(super) struct Timer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// One for each app that backs off; earliest first.
    due: BinaryHeap<Reverse<Entry>>,
    /// One for each instance that has timers, at the time of the first of them.
    alarms: BTreeMap<(Instant, AlarmId), Weak<InstanceTimers>>,
    last_id: u64,
    stop: bool,
}

/// Whose alarm it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct AlarmId(u64);

/// Where instances have their alarms. Cheap to clone.
#[derive(Clone)]
pub(super) struct Alarms {
    shared: Arc<Shared>,
}

impl Alarms {
    pub(super) fn new_id(&self) -> AlarmId {
        let mut state = self.shared.state.lock();
        state.last_id += 1;
        AlarmId(state.last_id)
    }

    /// [`InstanceTimers::ring`] is to be called at `at`, and no more at `before`.
    pub(super) fn change(
        &self,
        id: AlarmId,
        before: Option<Instant>,
        at: Option<Instant>,
        timers: &Weak<InstanceTimers>,
    ) {
        let mut state = self.shared.state.lock();
        if let Some(before) = before {
            state.alarms.remove(&(before, id));
        }
        if let Some(at) = at {
            state.alarms.insert((at, id), timers.clone());
            let is_first = state.next().is_none_or(|next| at <= next);
            drop(state);
            if is_first {
                self.shared.changed.notify_one();
            }
        }
    }

    /// Instances that wait for an alarm.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shared.state.lock().alarms.len()
    }
}

impl State {
    fn next(&self) -> Option<Instant> {
        let retry = self.due.peek().map(|Reverse(entry)| entry.at);
        let alarm = self.alarms.keys().next().map(|(at, _)| *at);
        retry.into_iter().chain(alarm).min()
    }
}

struct Entry {
    at: Instant,
    app: Weak<App>,
}

impl Timer {
    pub(super) fn start() -> std::io::Result<Timer> {
        let shared = Arc::<Shared>::default();
        let thread = thread::Builder::new().name("apps-timer".into()).spawn({
            let shared = shared.clone();
            move || shared.run()
        })?;
        Ok(Timer {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Calls [`App::retry`] at `at`.
    pub(super) fn retry_at(&self, at: Instant, app: Weak<App>) {
        self.shared
            .state
            .lock()
            .due
            .push(Reverse(Entry { at, app }));
        self.shared.changed.notify_one();
    }

    pub(super) fn alarms(&self) -> Alarms {
        Alarms {
            shared: self.shared.clone(),
        }
    }

    pub(super) fn stop(&self) {
        self.shared.state.lock().stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.lock().take() {
            thread.join().expect("the timer does nothing that panics");
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock();
        while !state.stop {
            let Some(next) = state.next() else {
                self.changed.wait(&mut state);
                continue;
            };
            let now = Instant::now();
            if now < next {
                self.changed.wait_until(&mut state, next);
                continue;
            }
            if state
                .due
                .peek()
                .is_some_and(|Reverse(entry)| entry.at <= now)
            {
                let entry = state.due.pop();
                if let Some(app) = entry.and_then(|Reverse(entry)| entry.app.upgrade()) {
                    MutexGuard::unlocked(&mut state, || app.retry());
                }
            }
            if state.alarms.keys().next().is_some_and(|(at, _)| *at <= now) {
                let alarm = state.alarms.pop_first();
                // Dropped unlocked, too: it may be the last to let go of the timers.
                MutexGuard::unlocked(&mut state, || {
                    if let Some(timers) = alarm.and_then(|(_, timers)| timers.upgrade()) {
                        timers.ring();
                    }
                });
            }
        }
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}
