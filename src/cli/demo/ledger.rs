//! What the plant has sent and what has come back: the demo's own books, against which the gateway
//! is held.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

/// A result that hasn't come after this long is given up. Bounds what the books hold.
const GIVE_UP_AFTER: Duration = Duration::from_secs(30);

/// Latencies are told to two digits, up to the time after which a result is given up.
const MAX_LATENCY_US: u64 = 60_000_000;

/// Shared by the sensors, the observer and the view.
pub struct Ledger {
    lines: Vec<Line>,
    sent: AtomicU64,
    sent_temperatures: AtomicU64,
    answered: AtomicU64,
    given_up: AtomicU64,
    raised: Expected,
    cleared: Expected,
    latencies: Mutex<Latencies>,
}

/// One production line of the plant.
#[derive(Default)]
struct Line {
    /// When each reading was published whose conversion hasn't come back, by sequence number.
    unanswered: Mutex<FxHashMap<u64, Instant>>,
}

/// A kind of alarm: how many must come, and how many came.
#[derive(Default)]
struct Expected {
    due: AtomicU64,
    seen: AtomicU64,
}

/// From publish to result, in microseconds.
struct Latencies {
    all: Histogram<u64>,
    /// Since the last [`Ledger::take_recent`].
    recent: Histogram<u64>,
}

/// Percentiles of a set of latencies, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Percentiles {
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

/// Where the books stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Totals {
    /// Events that the sensors have published.
    pub sent: u64,
    /// Those of them that the alarm app reads.
    pub sent_temperatures: u64,
    /// Conversions that have come back.
    pub answered: u64,
    /// Conversions that haven't come back: on their way, or given up.
    pub unanswered: u64,
    /// Alarms that the readings must have raised, and that came.
    pub alarms_due: u64,
    pub alarms_raised: u64,
    /// Alarms that the readings must have cleared, and that came.
    pub clearances_due: u64,
    pub alarms_cleared: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    Raised,
    Cleared,
}

impl Ledger {
    pub fn new(lines: usize) -> Ledger {
        let histogram =
            || Histogram::new_with_max(MAX_LATENCY_US, 2).expect("the bounds are valid");
        Ledger {
            lines: (0..lines).map(|_| Line::default()).collect(),
            sent: AtomicU64::new(0),
            sent_temperatures: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            given_up: AtomicU64::new(0),
            raised: Expected::default(),
            cleared: Expected::default(),
            latencies: Mutex::new(Latencies {
                all: histogram(),
                recent: histogram(),
            }),
        }
    }

    /// A reading that the alarm app reads goes out.
    pub fn temperature_sent(&self, transition: Option<Transition>) {
        self.sent.fetch_add(1, Ordering::Relaxed);
        self.sent_temperatures.fetch_add(1, Ordering::Relaxed);
        if let Some(transition) = transition {
            self.expected(transition)
                .due
                .fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A reading that will be converted is about to go out on `line`.
    pub fn conversion_asked(&self, line: usize, seq: u64) {
        self.lines[line]
            .unanswered
            .lock()
            .insert(seq, Instant::now());
        self.sent.fetch_add(1, Ordering::Relaxed);
    }

    /// The reading did not go out after all.
    pub fn conversion_withdrawn(&self, line: usize, seq: u64) {
        if self.lines[line].unanswered.lock().remove(&seq).is_some() {
            self.sent.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// A conversion came back. Those that nobody waits for don't count.
    pub fn conversion_came(&self, line: usize, seq: u64, now: Instant) {
        let Some(line) = self.lines.get(line) else {
            return;
        };
        let Some(asked) = line.unanswered.lock().remove(&seq) else {
            return;
        };
        self.answered.fetch_add(1, Ordering::Relaxed);
        let latency_us = now.saturating_duration_since(asked).as_micros() as u64;
        let mut latencies = self.latencies.lock();
        latencies.all.saturating_record(latency_us);
        latencies.recent.saturating_record(latency_us);
    }

    /// An alarm came for one of the plant's lines.
    pub fn alarm_came(&self, transition: Transition) {
        self.expected(transition)
            .seen
            .fetch_add(1, Ordering::Relaxed);
    }

    /// Gives up what is overdue at `now`.
    pub fn give_up_overdue(&self, now: Instant) {
        for line in &self.lines {
            let mut unanswered = line.unanswered.lock();
            let before = unanswered.len();
            unanswered.retain(|_, asked| now.saturating_duration_since(*asked) < GIVE_UP_AFTER);
            let overdue = (before - unanswered.len()) as u64;
            self.given_up.fetch_add(overdue, Ordering::Relaxed);
        }
    }

    pub fn totals(&self) -> Totals {
        let waiting: usize = self
            .lines
            .iter()
            .map(|line| line.unanswered.lock().len())
            .sum();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Totals {
            sent: read(&self.sent),
            sent_temperatures: read(&self.sent_temperatures),
            answered: read(&self.answered),
            unanswered: waiting as u64 + read(&self.given_up),
            alarms_due: read(&self.raised.due),
            alarms_raised: read(&self.raised.seen),
            clearances_due: read(&self.cleared.due),
            alarms_cleared: read(&self.cleared.seen),
        }
    }

    /// Latencies of all results so far.
    pub fn latencies(&self) -> Percentiles {
        Percentiles::of(&self.latencies.lock().all)
    }

    /// Latencies of the results since the last call.
    pub fn take_recent(&self) -> Percentiles {
        let mut latencies = self.latencies.lock();
        let percentiles = Percentiles::of(&latencies.recent);
        latencies.recent.reset();
        percentiles
    }

    fn expected(&self, transition: Transition) -> &Expected {
        match transition {
            Transition::Raised => &self.raised,
            Transition::Cleared => &self.cleared,
        }
    }
}

impl Totals {
    /// Results that had to come and haven't.
    pub fn missing(&self) -> u64 {
        self.unanswered
            + self.alarms_due.saturating_sub(self.alarms_raised)
            + self.clearances_due.saturating_sub(self.alarms_cleared)
    }

    /// Results that have come.
    pub fn results(&self) -> u64 {
        self.answered + self.alarms_raised + self.alarms_cleared
    }
}

impl Percentiles {
    fn of(histogram: &Histogram<u64>) -> Percentiles {
        Percentiles {
            p50_us: histogram.value_at_quantile(0.5),
            p99_us: histogram.value_at_quantile(0.99),
            max_us: histogram.max(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_and_has_not_come_back_is_missing() {
        let ledger = Ledger::new(2);
        ledger.conversion_asked(0, 1);
        ledger.conversion_asked(1, 1);
        ledger.conversion_asked(1, 2);
        ledger.temperature_sent(Some(Transition::Raised));
        ledger.temperature_sent(None);
        assert_eq!(ledger.totals().sent, 5);
        assert_eq!(ledger.totals().missing(), 4);

        ledger.conversion_came(0, 1, Instant::now());
        ledger.conversion_came(1, 2, Instant::now());
        ledger.alarm_came(Transition::Raised);
        assert_eq!(ledger.totals().missing(), 1);
        ledger.conversion_withdrawn(1, 1);
        assert_eq!(ledger.totals().missing(), 0);
        assert_eq!(ledger.totals().sent, 4);
    }

    #[test]
    fn what_nobody_asked_for_does_not_count() {
        let ledger = Ledger::new(1);
        ledger.conversion_asked(0, 1);
        ledger.conversion_came(0, 1, Instant::now());
        ledger.conversion_came(0, 1, Instant::now());
        ledger.conversion_came(0, 99, Instant::now());
        ledger.conversion_came(7, 1, Instant::now());
        assert_eq!(ledger.totals().answered, 1);
    }

    #[test]
    fn an_overdue_result_stays_missing_even_if_it_comes_later() {
        let ledger = Ledger::new(1);
        ledger.conversion_asked(0, 1);
        ledger.give_up_overdue(Instant::now() + GIVE_UP_AFTER);
        assert_eq!(ledger.totals().unanswered, 1);
        ledger.conversion_came(0, 1, Instant::now());
        assert_eq!(ledger.totals().missing(), 1);
    }

    #[test]
    fn latencies_count_from_the_publish() {
        let ledger = Ledger::new(1);
        ledger.conversion_asked(0, 1);
        ledger.conversion_came(0, 1, Instant::now() + Duration::from_secs(3));
        let recent = ledger.take_recent();
        assert!(
            (2_990_000..3_100_000).contains(&recent.p50_us),
            "{recent:?}"
        );
        assert_eq!(ledger.take_recent(), Percentiles::default());
        assert_eq!(ledger.latencies(), recent);
    }
}
