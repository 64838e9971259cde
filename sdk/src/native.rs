//! The host on the developer's machine: what an app asks of it, kept in memory. Each thread has one of
//! its own, so that tests side by side don't meet.
//!
//! [`testing`](crate::testing) looks into it and moves its clock.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use crate::{Event, Level};

thread_local! {
    static HOST: RefCell<Host> = RefCell::default();
}

#[derive(Default)]
pub(crate) struct Host {
    /// What a call that fails leaves as it was.
    pub(crate) state: State,
    /// What was published from inside the call; none if nobody collects it.
    pub(crate) published: Option<Vec<Event>>,
    pub(crate) log: Vec<LogLine>,
    /// None as long as nobody holds the clocks: then they are the machine's.
    pub(crate) clock: Option<Clock>,
}

#[derive(Clone, Default)]
pub(crate) struct State {
    pub(crate) buckets: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    pub(crate) timers: BTreeMap<String, Timer>,
    pub(crate) metrics: BTreeMap<String, Metric>,
}

#[derive(Clone, Copy)]
pub(crate) struct Clock {
    pub(crate) monotonic: Duration,
    pub(crate) unix_ns: u64,
}

impl Clock {
    pub(crate) fn advance(&mut self, by: Duration) {
        self.monotonic += by;
        self.unix_ns += by.as_nanos() as u64;
    }
}

/// A timer that was set.
#[derive(Clone, Copy)]
pub(crate) struct Timer {
    /// In [`crate::clock::monotonic`] time.
    pub(crate) due: Duration,
    pub(crate) period: Option<Duration>,
}

/// What was recorded under one name.
#[derive(Clone, Debug, PartialEq)]
pub enum Metric {
    /// The sum.
    Counter(u64),
    /// The last value.
    Gauge(f64),
    /// All values, in order.
    Histogram(Vec<f64>),
}

/// A line that was logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// How grave it is.
    pub level: Level,
    /// The module that spoke.
    pub context: String,
    /// The text.
    pub message: String,
}

/// Must not be called from inside `what`.
pub(crate) fn with<R>(what: impl FnOnce(&mut Host) -> R) -> R {
    HOST.with_borrow_mut(what)
}
