//! Delays and losses between gateways and servers.

use std::time::Duration;

use fastrand::Rng;

/// One way of one message: when each copy of it arrives. None if it is lost.
pub(super) fn way(rng: &mut Rng, calm: bool) -> Vec<Duration> {
    let usual = Duration::from_micros(rng.u64(300..5000));
    if calm {
        return vec![usual];
    }
    let delay = match rng.u32(0..1000) {
        0..30 => return Vec::new(),
        30..80 => Duration::from_millis(rng.u64(5..600)),
        80..90 => Duration::from_millis(rng.u64(600..10_000)),
        _ => usual,
    };
    if rng.u32(0..1000) < 20 {
        vec![delay, delay + Duration::from_millis(rng.u64(0..3000))]
    } else {
        vec![delay]
    }
}
