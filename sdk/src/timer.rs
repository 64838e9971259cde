//! Timers. One that is due comes as an event: [`name`] says whose it is.
//!
//! Timers belong to the instance. Set them in [`App::configure`](crate::App::configure), so that a
//! new instance has them too. What a call sets and cancels takes effect when the call has ended well,
//! and times count from there. An app has as many as the manifest's `limits.timers` says (8 unless it
//! is set). One that is late comes once, not once for each time that it has missed.
//!
//! ```
//! use std::time::Duration;
//! use headgate_sdk::{Event, timer};
//!
//! timer::every("report", Duration::from_secs(10)).unwrap();
//!
//! // In `handle`:
//! # let event = Event { topic: "$timer/report".into(), payload: vec![], timestamp: 0 };
//! if timer::name(&event) == Some("report") {
//!     // event.timestamp is the time when it was due.
//! }
//! ```
//!
//! On the developer's machine, timers fire in a [harness](crate::testing) whose time moves on.

use std::time::Duration;

use crate::Event;

/// Why a timer was not set.
pub use crate::bindings::headgate::app::timers::TimerError;

/// The name of the timer whose event this is, if it is one.
pub fn name(event: &Event) -> Option<&str> {
    event.topic.strip_prefix("$timer/")
}

/// Sets a timer that fires every `period`, a millisecond at least, for the first time in one
/// `period`. Takes the place of one of the same name.
///
/// # Errors
/// If the name is not 1 to 64 of the characters `A-Z a-z 0-9 _ . -`, if the period is too short, or if
/// the timers are used up.
pub fn every(name: &str, period: Duration) -> Result<(), TimerError> {
    imp::every(name, nanoseconds(period))
}

/// Sets a timer that fires once, in `delay`, but not sooner than in a millisecond.
///
/// # Errors
/// As [`every`].
pub fn once(name: &str, delay: Duration) -> Result<(), TimerError> {
    imp::once(name, nanoseconds(delay))
}

/// Sets a timer that fires once, when the gateway's wall clock has reached this time, in nanoseconds
/// since 1970-01-01T00:00:00Z; also if the clock is set meanwhile.
///
/// # Errors
/// As [`every`].
pub fn at(name: &str, unix_ns: u64) -> Result<(), TimerError> {
    imp::at(name, unix_ns)
}

/// Cancels a timer. False: there is none of this name. An event that waits already may come still.
pub fn cancel(name: &str) -> bool {
    imp::cancel(name)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(target_family = "wasm")]
mod imp {
    pub use crate::bindings::headgate::app::timers::{
        cancel, set_interval as every, set_once as once, set_wall as at,
    };
}

#[cfg(not(target_family = "wasm"))]
mod imp {
    use std::time::Duration;

    use super::TimerError;
    use crate::native::{self, Timer};

    /// The shortest period and delay.
    const SHORTEST: Duration = Duration::from_millis(1);

    fn set(name: &str, delay: Duration, period: Option<Duration>) -> Result<(), TimerError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) {
            let why = format!("{name:?}: give 1 to 64 of the characters A-Z a-z 0-9 _ . -");
            return Err(TimerError::InvalidName(why));
        }
        let due = crate::clock::monotonic() + delay.max(SHORTEST);
        native::with(|host| {
            let timers = &mut host.state.timers;
            timers.insert(name.to_string(), Timer { due, period });
        });
        Ok(())
    }

    pub fn every(name: &str, ns: u64) -> Result<(), TimerError> {
        let period = Duration::from_nanos(ns);
        if period < SHORTEST {
            let why = format!("{name}: {ns} ns is shorter than a millisecond");
            return Err(TimerError::InvalidPeriod(why));
        }
        set(name, period, Some(period))
    }

    pub fn once(name: &str, ns: u64) -> Result<(), TimerError> {
        set(name, Duration::from_nanos(ns), None)
    }

    pub fn at(name: &str, ns: u64) -> Result<(), TimerError> {
        once(name, ns.saturating_sub(crate::clock::unix_time_ns()))
    }

    pub fn cancel(name: &str) -> bool {
        native::with(|host| host.state.timers.remove(name).is_some())
    }
}
