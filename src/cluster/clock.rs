//! The clock of the cluster: how long this machine has run, the time it slept included. It can't be set,
//! so that nothing here follows from the wall clock; and a gateway that was asleep finds its leases over.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A time, since the machine was started. Means nothing on another machine.
pub type Moment = Duration;

pub fn now() -> Moment {
    let time = clock_gettime(ClockId::Boottime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
