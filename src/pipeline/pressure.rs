//! How hard it is for the realtime lane to keep up, and which lanes stand back for it. A state machine
//! without a clock: it is told once a cycle how things are.

use std::time::Duration;

use serde::Serialize;

/// How often the controller looks.
pub const CYCLE: Duration = Duration::from_millis(100);

/// A state is left for a worse one after so many cycles that ask for it, and for a better one after as
/// many that would do with that.
const CYCLES: u32 = 5;

/// To leave a state, what had led to it must have fallen to this part of its threshold.
const RECOVERED: f64 = 0.8;

/// Each state includes what those before it do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pressure {
    #[default]
    Healthy,
    /// Apps get nothing from the batch lane.
    Degraded,
    /// Apps get nothing from the transactional lane: its publishers wait.
    Critical,
    /// What comes for the batch lane goes to the dead letters.
    Overload,
    /// Nothing is taken in for the transactional lane.
    Emergency,
}

impl Pressure {
    pub const ALL: [Pressure; 5] = [
        Pressure::Healthy,
        Pressure::Degraded,
        Pressure::Critical,
        Pressure::Overload,
        Pressure::Emergency,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Pressure::Healthy => "healthy",
            Pressure::Degraded => "degraded",
            Pressure::Critical => "critical",
            Pressure::Overload => "overload",
            Pressure::Emergency => "emergency",
        }
    }

    /// How many times a threshold must be reached for it.
    fn factor(self) -> f64 {
        match self {
            Pressure::Healthy => 0.0,
            Pressure::Degraded => 1.0,
            Pressure::Critical => 2.0,
            Pressure::Overload => 4.0,
            Pressure::Emergency => 8.0,
        }
    }

    pub(super) fn of_index(index: u8) -> Pressure {
        Pressure::ALL[usize::from(index)]
    }
}

/// What is too much for the realtime lane.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// Events that wait.
    pub events: usize,
    /// From an event's arrival until it was handled.
    pub latency: Duration,
    /// Events that were dropped, of all that came, in percent.
    pub dropped_percent: u32,
}

/// How the realtime lane has done in one cycle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Events that wait now.
    pub waiting: usize,
    /// The longest that an event has taken, or has waited so far.
    pub slowest: Duration,
    pub handled: u64,
    pub dropped: u64,
}

impl std::ops::AddAssign for Load {
    fn add_assign(&mut self, other: Load) {
        self.waiting += other.waiting;
        self.slowest = self.slowest.max(other.slowest);
        self.handled += other.handled;
        self.dropped += other.dropped;
    }
}

#[derive(Debug)]
pub struct Controller {
    thresholds: Thresholds,
    state: Pressure,
    /// Cycles in a row that have asked for a worse state.
    worse: u32,
    /// Cycles in a row that would have done with a better one.
    better: u32,
}

impl Controller {
    pub fn new(thresholds: Thresholds) -> Controller {
        Controller {
            thresholds,
            state: Pressure::Healthy,
            worse: 0,
            better: 0,
        }
    }

    /// Looks at one cycle. Returns the state from now on.
    pub fn on_cycle(&mut self, load: Load) -> Pressure {
        let strain = self.strain(load);
        let next = Pressure::ALL.into_iter().find(|next| *next > self.state);
        let is_worse = next.is_some_and(|next| strain >= next.factor());
        let is_better = self.state > Pressure::Healthy && strain < self.state.factor() * RECOVERED;
        self.worse = if is_worse { self.worse + 1 } else { 0 };
        self.better = if is_better { self.better + 1 } else { 0 };
        if self.worse >= CYCLES {
            self.state = next.expect("there is a worse one");
            self.worse = 0;
        } else if self.better >= CYCLES {
            self.state = Pressure::of_index(self.state as u8 - 1);
            self.better = 0;
        }
        self.state
    }

    /// The largest of what is measured, each as a part of its threshold.
    fn strain(&self, load: Load) -> f64 {
        let Thresholds {
            events,
            latency,
            dropped_percent,
        } = self.thresholds;
        let came = load.handled + load.dropped;
        let dropped = match came {
            0 => 0.0,
            came => load.dropped as f64 * 100.0 / came as f64,
        };
        (load.waiting as f64 / events as f64)
            .max(load.slowest.as_secs_f64() / latency.as_secs_f64())
            .max(dropped / f64::from(dropped_percent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const THRESHOLDS: Thresholds = Thresholds {
        events: 5000,
        latency: Duration::from_millis(100),
        dropped_percent: 2,
    };

    fn waiting(waiting: usize) -> Load {
        Load {
            waiting,
            ..Load::default()
        }
    }

    fn after(controller: &mut Controller, cycles: u32, load: Load) -> Pressure {
        for _ in 0..cycles {
            controller.on_cycle(load);
        }
        controller.state
    }

    #[test]
    fn a_moment_of_strain_changes_nothing() {
        let mut controller = Controller::new(THRESHOLDS);
        assert_eq!(
            after(&mut controller, 4, waiting(50_000)),
            Pressure::Healthy
        );
        assert_eq!(after(&mut controller, 1, waiting(0)), Pressure::Healthy);
        assert_eq!(
            after(&mut controller, 4, waiting(50_000)),
            Pressure::Healthy
        );
        assert_eq!(
            after(&mut controller, 1, waiting(50_000)),
            Pressure::Degraded
        );
    }

    #[test]
    fn strain_that_lasts_leads_as_far_as_it_is_strong() {
        for (load, expected) in [
            (waiting(4_999), Pressure::Healthy),
            (waiting(5_000), Pressure::Degraded),
            (waiting(10_000), Pressure::Critical),
            (waiting(20_000), Pressure::Overload),
            (waiting(40_000), Pressure::Emergency),
            (waiting(4_000_000), Pressure::Emergency),
        ] {
            let mut controller = Controller::new(THRESHOLDS);
            assert_eq!(after(&mut controller, 100, load), expected, "{load:?}");
        }
    }

    #[test]
    fn latency_and_drops_count_as_much_as_what_waits() {
        let slow = Load {
            slowest: Duration::from_millis(250),
            ..Load::default()
        };
        let lossy = Load {
            handled: 96,
            dropped: 4,
            ..Load::default()
        };
        for load in [slow, lossy] {
            let mut controller = Controller::new(THRESHOLDS);
            assert_eq!(after(&mut controller, 100, load), Pressure::Critical);
        }
    }

    #[test]
    fn it_recovers_step_by_step_and_not_before_there_is_some_room() {
        let mut controller = Controller::new(THRESHOLDS);
        after(&mut controller, 100, waiting(10_000));
        // Below the threshold, but not far enough.
        assert_eq!(
            after(&mut controller, 100, waiting(8_001)),
            Pressure::Critical
        );
        assert_eq!(after(&mut controller, 5, waiting(0)), Pressure::Degraded);
        assert_eq!(after(&mut controller, 4, waiting(0)), Pressure::Degraded);
        assert_eq!(after(&mut controller, 1, waiting(0)), Pressure::Healthy);
        assert_eq!(after(&mut controller, 100, waiting(0)), Pressure::Healthy);
    }

    proptest! {
        /// Whatever happens, it goes one step at a time, and back to healthy once all is well.
        #[test]
        fn it_never_jumps_and_always_recovers(loads in prop::collection::vec((0..100_000usize, 0..2_000u64), 0..300)) {
            let mut controller = Controller::new(THRESHOLDS);
            let mut before = Pressure::Healthy;
            for (events, millis) in loads {
                let load = Load { slowest: Duration::from_millis(millis), ..waiting(events) };
                let state = controller.on_cycle(load);
                prop_assert!((state as i8 - before as i8).abs() <= 1);
                before = state;
            }
            prop_assert_eq!(after(&mut controller, 4 * CYCLES, Load::default()), Pressure::Healthy);
        }
    }
}
