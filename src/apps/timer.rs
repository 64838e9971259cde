//! Wakes apps whose pause is over. Sleeps without a timeout when there are none.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::app::App;

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
    stop: bool,
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
            let Some(Reverse(next)) = state.due.peek() else {
                self.changed.wait(&mut state);
                continue;
            };
            let at = next.at;
            if Instant::now() < at {
                self.changed.wait_until(&mut state, at);
                continue;
            }
            let entry = state.due.pop();
            if let Some(app) = entry.and_then(|Reverse(entry)| entry.app.upgrade()) {
                parking_lot::MutexGuard::unlocked(&mut state, || app.retry());
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
