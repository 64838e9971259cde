//! Connections that are no clients yet, or no more. When there is no place for another connection, one
//! of these is closed for it, so that sockets that say nothing keep nobody out.
//!
//! It is the one that has been here longest, of those from the address from which most are here: who
//! opens a thousand sockets closes their own, and a client from elsewhere is left alone.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::Notify;

#[derive(Default)]
pub(super) struct Doorway {
    guests: Mutex<Guests>,
}

#[derive(Default)]
struct Guests {
    entered: u64,
    by_origin: FxHashMap<Origin, BTreeMap<u64, Arc<Notify>>>,
    /// One for each origin: how many are here from it, and who of them has been here longest.
    by_number: BTreeSet<(usize, Reverse<u64>, Origin)>,
}

/// An IPv4 address; of an IPv6 address the half that is a network's, since the other half can be
/// chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Origin(IpAddr);

impl Origin {
    pub(super) fn of(address: IpAddr) -> Origin {
        Origin(match address.to_canonical() {
            IpAddr::V6(address) => {
                let network = address.to_bits() & !u128::from(u64::MAX);
                IpAddr::V6(Ipv6Addr::from_bits(network))
            }
            v4 => v4,
        })
    }
}

/// A connection in the doorway. It leaves when this is dropped.
pub(super) struct Guest {
    doorway: Arc<Doorway>,
    origin: Origin,
    number: u64,
    shown_out: Arc<Notify>,
}

impl Doorway {
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Guest {
        let origin = Origin::of(address);
        let shown_out = Arc::<Notify>::default();
        let mut guests = self.guests.lock();
        guests.entered += 1;
        let number = guests.entered;
        guests.change(origin, |from_there| {
            from_there.insert(number, shown_out.clone())
        });
        drop(guests);
        Guest {
            doorway: self.clone(),
            origin,
            number,
            shown_out,
        }
    }

    /// Shows somebody out, who will be gone soon. Returns whether there was anybody.
    pub(super) fn make_room(&self) -> bool {
        let mut guests = self.guests.lock();
        let Some(&(_, Reverse(number), origin)) = guests.by_number.last() else {
            return false;
        };
        let guest = guests.change(origin, |from_there| from_there.remove(&number));
        if let Some(shown_out) = guest {
            shown_out.notify_one();
        }
        true
    }
}

impl Guests {
    fn change<T>(
        &mut self,
        origin: Origin,
        change: impl FnOnce(&mut BTreeMap<u64, Arc<Notify>>) -> T,
    ) -> T {
        let place = |from_there: &BTreeMap<u64, Arc<Notify>>| {
            let (longest, _) = from_there.first_key_value()?;
            Some((from_there.len(), Reverse(*longest), origin))
        };
        let from_there = self.by_origin.entry(origin).or_default();
        if let Some(place) = place(from_there) {
            self.by_number.remove(&place);
        }
        let changed = change(from_there);
        match place(from_there) {
            Some(place) => {
                self.by_number.insert(place);
            }
            None => {
                self.by_origin.remove(&origin);
            }
        }
        changed
    }
}

impl Guest {
    /// Returns when the connection must be closed.
    pub(super) async fn shown_out(&self) {
        self.shown_out.notified().await;
    }

    /// Leaves the doorway to stay. Returns false if it is too late for that.
    pub(super) fn stay(self) -> bool {
        self.leave()
    }

    fn leave(&self) -> bool {
        let mut guests = self.doorway.guests.lock();
        let left = guests.change(self.origin, |from_there| from_there.remove(&self.number));
        left.is_some()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Whether it has been shown out.
    fn is_out(guest: Guest) -> bool {
        !guest.stay()
    }

    #[test]
    fn who_brings_most_loses_the_one_that_has_been_here_longest() {
        let doorway = Arc::<Doorway>::default();
        let client = doorway.enter(address("10.0.0.1"));
        let mut crowd: Vec<_> = (0..3).map(|_| doorway.enter(address("10.0.0.2"))).collect();
        assert!(doorway.make_room());
        assert!(doorway.make_room());
        assert!(!is_out(crowd.pop().unwrap()));
        assert!(crowd.into_iter().all(is_out));
        assert!(!is_out(client));
    }

    #[test]
    fn of_guests_from_everywhere_it_is_the_one_that_has_been_here_longest() {
        let doorway = Arc::<Doorway>::default();
        let first = doorway.enter(address("10.0.0.9"));
        let second = doorway.enter(address("10.0.0.1"));
        assert!(doorway.make_room());
        assert!(is_out(first));
        assert!(!is_out(second));
    }

    #[test]
    fn a_network_of_ipv6_is_one_origin_and_an_ipv4_address_one_however_it_is_written() {
        let doorway = Arc::<Doorway>::default();
        let v4 = doorway.enter(address("10.0.0.1"));
        let mapped = doorway.enter(address("::ffff:10.0.0.1"));
        let client = doorway.enter(address("2001:db8:0:1::1"));
        let crowd: Vec<_> = ["2001:db8::1", "2001:db8::2:1", "2001:db8::ffff:0:0:1"]
            .map(|text| doorway.enter(address(text)))
            .into();
        assert!(doorway.make_room());
        assert!(doorway.make_room());
        assert_eq!(crowd.into_iter().map(is_out).filter(|out| *out).count(), 1);
        assert!(is_out(v4));
        assert!(!is_out(mapped));
        assert!(!is_out(client));
    }

    #[test]
    fn who_has_left_or_stays_is_not_shown_out() {
        let doorway = Arc::<Doorway>::default();
        drop(doorway.enter(address("10.0.0.1")));
        assert!(doorway.enter(address("10.0.0.1")).stay());
        assert!(!doorway.make_room());
        let guests = doorway.guests.lock();
        assert!(guests.by_origin.is_empty() && guests.by_number.is_empty());
    }

    #[tokio::test]
    async fn a_guest_learns_that_it_is_shown_out_even_if_it_asks_later() {
        let doorway = Arc::<Doorway>::default();
        let guest = doorway.enter(address("10.0.0.1"));
        assert!(doorway.make_room());
        guest.shown_out().await;
        assert!(is_out(guest));
    }
}
