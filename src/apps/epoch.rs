//! The clock that interrupts apps: while a call runs, it moves the engine's epoch on, and at each
//! step the running code calls back into [`super::host`]. When nothing runs, it sleeps without a
//! timeout: an idle gateway costs no CPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

use wasmtime::Engine;

/// After this many ticks without a call, the ticker goes to sleep. Enough that at any rate which
/// matters, no call has to wake it.
const IDLE_TICKS: u32 = 20;

/// Ticks while calls run, until it is dropped.
pub(super) struct Ticker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Calls that run now.
    running: AtomicU32,
    asleep: AtomicBool,
    stop: AtomicBool,
}

/// A call that runs: keeps the ticker ticking.
pub(super) struct Running<'a> {
    ticker: &'a Ticker,
}

impl Ticker {
    pub(super) fn start(engine: Engine, period: Duration) -> std::io::Result<Ticker> {
        let shared = Arc::new(Shared {
            running: AtomicU32::new(0),
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let thread = thread::Builder::new().name("apps-epoch".into()).spawn({
            let shared = shared.clone();
            move || shared.tick(&engine, period)
        })?;
        Ok(Ticker {
            shared,
            thread: Some(thread),
        })
    }

    /// To be held for as long as a call runs.
    pub(super) fn running(&self) -> Running<'_> {
        self.shared.running.fetch_add(1, Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::SeqCst) {
            self.thread().unpark();
        }
        Running { ticker: self }
    }

    fn thread(&self) -> &Thread {
        let thread = self.thread.as_ref();
        thread.expect("taken only when dropped").thread()
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.ticker.shared.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.thread().unpark();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the ticker does nothing that panics");
        }
    }
}

impl Shared {
    fn tick(&self, engine: &Engine, period: Duration) {
        let mut idle_ticks = 0;
        while !self.stop.load(Ordering::SeqCst) {
            // Between two looks at `running`, short calls may have come and gone: going to sleep
            // early is harmless, for the next call looks at `asleep`.
            if self.running.load(Ordering::SeqCst) > 0 {
                idle_ticks = 0;
            } else {
                idle_ticks += 1;
            }
            if idle_ticks <= IDLE_TICKS {
                thread::park_timeout(period);
                engine.increment_epoch();
                continue;
            }
            // The order matters: a call adds to `running` first and looks at `asleep` then; here it
            // is the other way round, so that one of the two sees the other.
            self.asleep.store(true, Ordering::SeqCst);
            while self.running.load(Ordering::SeqCst) == 0 && !self.stop.load(Ordering::SeqCst) {
                thread::park();
            }
            self.asleep.store(false, Ordering::SeqCst);
            idle_ticks = 0;
        }
    }
}
