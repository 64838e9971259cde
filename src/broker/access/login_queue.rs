//! Who waits for a password to be checked: so few from one address that all addresses have a turn.

use std::net::IpAddr;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::broker::doorway::Origin;

/// Logins of one address, or of one IPv6 network, that wait or are being checked. A check takes some
/// 50 ms, two at a time, so that others wait for two seconds behind one that does its worst.
const MAX_FROM_ONE: usize = 64;

#[derive(Debug, Default)]
pub(super) struct LoginQueue {
    waiting: Mutex<FxHashMap<Origin, usize>>,
}

/// A place in the queue. It is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place<'a> {
    queue: &'a LoginQueue,
    origin: Origin,
}

impl LoginQueue {
    /// None: too many from there wait already.
    pub fn enter(&self, address: IpAddr) -> Option<Place<'_>> {
        let origin = Origin::of(address);
        let mut waiting = self.waiting.lock();
        let from_there = waiting.entry(origin).or_default();
        if *from_there >= MAX_FROM_ONE {
            return None;
        }
        *from_there += 1;
        Some(Place {
            queue: self,
            origin,
        })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut waiting = self.queue.waiting.lock();
        if let Some(from_there) = waiting.get_mut(&self.origin) {
            *from_there -= 1;
            if *from_there == 0 {
                waiting.remove(&self.origin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_a_few_places_and_leaves_others_theirs() {
        let queue = LoginQueue::default();
        let [one, other] = [1, 2].map(|last| IpAddr::from([10, 0, 0, last]));
        let places: Vec<_> = (0..MAX_FROM_ONE)
            .map(|_| queue.enter(one).unwrap())
            .collect();
        assert!(queue.enter(one).is_none());
        assert!(queue.enter(other).is_some());
        drop(places);
        assert!(queue.enter(one).is_some());
        assert!(queue.waiting.lock().is_empty());
    }
}
