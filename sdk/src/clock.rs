//! The gateway's clocks and random numbers. `std::time` panics on `wasm32-unknown-unknown`.
//!
//! In a [harness](crate::testing), the clocks stand until the test moves them.

use std::time::Duration;

/// Nanoseconds since 1970-01-01T00:00:00Z. Goes back when the gateway's clock is set back.
pub fn unix_time_ns() -> u64 {
    imp::unix_time_ns()
}

/// The time since some moment before the app started. Never goes back.
pub fn monotonic() -> Duration {
    Duration::from_nanos(imp::monotonic_ns())
}

/// A number that nobody can foresee.
#[cfg(target_family = "wasm")]
pub fn random_u64() -> u64 {
    crate::bindings::wasi::random::random::get_random_u64()
}

/// A number. On the developer's machine, it is not for secrets.
#[cfg(not(target_family = "wasm"))]
pub fn random_u64() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

#[cfg(target_family = "wasm")]
mod imp {
    use crate::bindings::wasi::clocks::{monotonic_clock, wall_clock};

    pub fn unix_time_ns() -> u64 {
        let now = wall_clock::now();
        now.seconds * 1_000_000_000 + u64::from(now.nanoseconds)
    }

    pub fn monotonic_ns() -> u64 {
        monotonic_clock::now()
    }
}

#[cfg(not(target_family = "wasm"))]
mod imp {
    use std::sync::OnceLock;
    use std::time::{Instant, SystemTime, UNIX_EPOCH};

    fn held() -> Option<crate::native::Clock> {
        crate::native::with(|host| host.clock)
    }

    pub fn unix_time_ns() -> u64 {
        if let Some(clock) = held() {
            return clock.unix_ns;
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(0, |since| since.as_nanos() as u64)
    }

    pub fn monotonic_ns() -> u64 {
        if let Some(clock) = held() {
            return clock.monotonic.as_nanos() as u64;
        }
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}
