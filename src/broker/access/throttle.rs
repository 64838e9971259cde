//! How often somebody may fail to log in, with time passed in.
//!
//! Failures count against the address that they come from and against the user name that they name.
//! Who has too many has to wait, whether the next password is right or wrong: else the answer would
//! say which it was. But a user who has logged in from an address before is counted for that pair
//! alone, so that nobody else's failures, neither from the same address nor under the same name, lock
//! this one out.
//!
//! Memory is bounded: each table forgets whoever is nearest to being forgiven.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Addresses, and names, with failures: 32 bytes each, so 128 KiB a table.
const MAX_FAILING: usize = 4096;

/// Pairs of user and address that have logged in; as many as a large plant has devices.
const MAX_KNOWN: usize = 16_384;

const MINUTE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Throttle {
    /// 0: no limit.
    per_minute: u32,
    addresses: Table,
    users: Table,
    known: Table,
    /// Secret, so that nobody can choose names that hash alike.
    hasher: RandomState,
}

/// Whose failures are counted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suspect<'a> {
    pub address: IpAddr,
    /// None where a login names none.
    pub user: Option<&'a str>,
}

impl Throttle {
    pub(super) fn new(per_minute: u32) -> Throttle {
        Throttle {
            per_minute,
            addresses: Table::new(MAX_FAILING),
            users: Table::new(MAX_FAILING),
            known: Table::new(MAX_KNOWN),
            hasher: RandomState::new(),
        }
    }

    /// Whether this one has failed too often to be listened to now.
    pub(super) fn is_locked_out(&self, suspect: Suspect<'_>, now: Instant) -> bool {
        if self.per_minute == 0 {
            return false;
        }
        let is_full = |failures: &Failures| failures.now(self.per_minute, now) > self.limit();
        let keys = self.keys(suspect);
        if let Some(pair) = keys.pair.and_then(|pair| self.known.rows.get(&pair)) {
            return is_full(pair);
        }
        let address = self.addresses.rows.get(&keys.address);
        let user = keys.user.and_then(|user| self.users.rows.get(&user));
        address.is_some_and(is_full) || user.is_some_and(is_full)
    }

    pub(super) fn failed(&mut self, suspect: Suspect<'_>, now: Instant) {
        if self.per_minute == 0 {
            return;
        }
        let keys = self.keys(suspect);
        match keys.pair.filter(|pair| self.known.rows.contains_key(pair)) {
            Some(pair) => self.known.add(pair, 1.0, self.per_minute, now),
            None => {
                self.addresses.add(keys.address, 1.0, self.per_minute, now);
                if let Some(user) = keys.user {
                    self.users.add(user, 1.0, self.per_minute, now);
                }
            }
        }
    }

    pub(super) fn succeeded(&mut self, suspect: Suspect<'_>, now: Instant) {
        if self.per_minute > 0
            && let Some(pair) = self.keys(suspect).pair
        {
            self.known.rows.remove(&pair);
            self.known.add(pair, 0.0, self.per_minute, now);
        }
    }

    /// One is left of the last failure: it has been forgiven only when a whole one is.
    fn limit(&self) -> f64 {
        f64::from(self.per_minute) - 1.0
    }

    fn keys(&self, suspect: Suspect<'_>) -> Keys {
        let network = network(suspect.address);
        Keys {
            address: self.key(("address", network)),
            user: suspect.user.map(|user| self.key(("user", user))),
            pair: suspect.user.map(|user| self.key((network, user))),
        }
    }

    fn key(&self, of: impl Hash) -> u64 {
        self.hasher.hash_one(of)
    }
}

struct Keys {
    address: u64,
    user: Option<u64>,
    pair: Option<u64>,
}

/// The address, or of IPv6 the /64, within which one host can take as many as it likes.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => {
            let prefix = v6.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(prefix.into())
        }
    }
}

/// Failures that are forgiven with time, at as many a minute as are allowed.
#[derive(Clone, Copy, Debug)]
struct Failures {
    count: f64,
    since: Instant,
}

impl Failures {
    fn now(&self, per_minute: u32, now: Instant) -> f64 {
        let minutes =
            now.saturating_duration_since(self.since).as_secs_f64() / MINUTE.as_secs_f64();
        (self.count - minutes * f64::from(per_minute)).max(0.0)
    }
}

#[derive(Debug)]
struct Table {
    rows: HashMap<u64, Failures>,
    max: usize,
}

impl Table {
    fn new(max: usize) -> Table {
        Table {
            rows: HashMap::new(),
            max,
        }
    }

    fn add(&mut self, key: u64, count: f64, per_minute: u32, now: Instant) {
        let before = self
            .rows
            .get(&key)
            .map_or(0.0, |row| row.now(per_minute, now));
        if self.rows.len() >= self.max && !self.rows.contains_key(&key) {
            self.make_room(per_minute, now);
        }
        // More than that would keep somebody out for longer than a minute after the last failure.
        let count = (before + count).min(per_minute.into());
        self.rows.insert(key, Failures { count, since: now });
    }

    /// Forgets the row with the fewest failures; among equals, the oldest.
    fn make_room(&mut self, per_minute: u32, now: Instant) {
        let least = self.rows.iter().min_by(|(_, a), (_, b)| {
            let by_count = a.now(per_minute, now).total_cmp(&b.now(per_minute, now));
            by_count.then(a.since.cmp(&b.since))
        });
        if let Some(key) = least.map(|(key, _)| *key) {
            self.rows.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn from(last: u8, user: &str) -> Suspect<'_> {
        Suspect {
            address: IpAddr::from([10, 0, 0, last]),
            user: Some(user),
        }
    }

    #[test]
    fn whoever_fails_too_often_has_to_wait() {
        let start = Instant::now();
        let mut throttle = Throttle::new(6);
        for _ in 0..6 {
            assert!(!throttle.is_locked_out(from(1, "anna"), start));
            throttle.failed(from(1, "anna"), start);
        }
        assert!(throttle.is_locked_out(from(1, "anna"), start));
        assert!(
            throttle.is_locked_out(from(1, "otto"), start),
            "same address"
        );
        assert!(throttle.is_locked_out(from(2, "anna"), start), "same user");
        assert!(!throttle.is_locked_out(from(2, "otto"), start));
        assert!(throttle.is_locked_out(from(1, "anna"), start + 9 * SECOND));
        assert!(
            !throttle.is_locked_out(from(1, "anna"), start + 11 * SECOND),
            "one every ten seconds"
        );
        throttle.failed(from(1, "anna"), start + 11 * SECOND);
        assert!(throttle.is_locked_out(from(1, "anna"), start + 12 * SECOND));
        assert!(!throttle.is_locked_out(from(1, "anna"), start + 90 * SECOND));
    }

    #[test]
    fn a_lock_out_ends_within_a_minute_of_the_last_failure() {
        let start = Instant::now();
        let mut throttle = Throttle::new(3);
        for _ in 0..1000 {
            throttle.failed(from(1, "anna"), start);
        }
        assert!(!throttle.is_locked_out(from(1, "anna"), start + 21 * SECOND));
    }

    #[test]
    fn the_failures_of_others_do_not_lock_out_a_known_user() {
        let start = Instant::now();
        let mut throttle = Throttle::new(3);
        throttle.succeeded(from(1, "anna"), start);
        for _ in 0..20 {
            throttle.failed(from(1, "otto"), start);
            throttle.failed(from(2, "anna"), start);
        }
        assert!(!throttle.is_locked_out(from(1, "anna"), start));
        assert!(throttle.is_locked_out(from(1, "uwe"), start));
        assert!(throttle.is_locked_out(from(3, "anna"), start));
        for _ in 0..3 {
            throttle.failed(from(1, "anna"), start);
        }
        assert!(
            throttle.is_locked_out(from(1, "anna"), start),
            "its own failures count"
        );
        throttle.succeeded(from(1, "anna"), start);
        assert!(!throttle.is_locked_out(from(1, "anna"), start));
    }

    #[test]
    fn a_host_with_a_whole_ipv6_network_is_one() {
        let start = Instant::now();
        let mut throttle = Throttle::new(3);
        let host = |network: u16, host: u16| Suspect {
            address: Ipv6Addr::new(0x2001, 0xdb8, 0, network, 0, 0, 0, host).into(),
            user: None,
        };
        for last in 0..3 {
            throttle.failed(host(1, last), start);
        }
        assert!(throttle.is_locked_out(host(1, 99), start));
        assert!(!throttle.is_locked_out(host(2, 1), start));
        let mapped = Suspect {
            address: "::ffff:10.0.0.1".parse().unwrap(),
            user: None,
        };
        for _ in 0..3 {
            throttle.failed(mapped, start);
        }
        assert!(throttle.is_locked_out(from(1, "x"), start));
        assert!(!throttle.is_locked_out(from(2, "x"), start));
    }

    #[test]
    fn many_addresses_neither_fill_the_memory_nor_free_one_that_is_locked_out() {
        let start = Instant::now();
        let mut throttle = Throttle::new(3);
        for _ in 0..3 {
            throttle.failed(from(1, "anna"), start);
        }
        for number in 0..2 * MAX_FAILING as u32 {
            let suspect = Suspect {
                address: IpAddr::V4((0x0b00_0000 + number).into()),
                user: Some(&number.to_string()),
            };
            throttle.failed(suspect, start + Duration::from_millis(number.into()) / 10);
        }
        assert_eq!(throttle.addresses.rows.len(), MAX_FAILING);
        assert_eq!(throttle.users.rows.len(), MAX_FAILING);
        assert!(throttle.is_locked_out(from(1, "anna"), start + SECOND));
        assert!(!throttle.is_locked_out(from(7, "uwe"), start + SECOND));
        for number in 0..MAX_KNOWN as u32 + 10 {
            let suspect = Suspect {
                address: IpAddr::V4(number.into()),
                user: Some("x"),
            };
            throttle.succeeded(suspect, start);
        }
        assert_eq!(throttle.known.rows.len(), MAX_KNOWN);
    }

    #[test]
    fn without_a_limit_nobody_has_to_wait() {
        let start = Instant::now();
        let mut throttle = Throttle::new(0);
        for _ in 0..1000 {
            throttle.failed(from(1, "anna"), start);
        }
        assert!(!throttle.is_locked_out(from(1, "anna"), start));
        assert_eq!(throttle.addresses.rows.len(), 0);
    }
}
