//! One gateway: its clock, its seat while it runs, and what it has asked.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Bug;
use super::shipper::Shipper;
use crate::cluster::claim::Key;
use crate::cluster::clock::Moment;
use crate::cluster::lease::{Holding, Timing};
use crate::cluster::node::View;
use crate::cluster::seat::{Identity, Seat};

pub(super) const TTL: Duration = Duration::from_secs(5);
pub(super) const SHARDS: u16 = 4;

pub(super) struct Gateway {
    pub(super) name: String,
    /// Counts starts: what was on its way to an earlier run is not for this one.
    pub(super) run: u64,
    /// None while it is down.
    pub(super) seat: Option<Seat>,
    /// What hot paths read.
    pub(super) view: View,
    /// Its clock: what it shows at 0, and how fast it runs.
    offset: Duration,
    rate: f64,
    /// Stands still until then.
    pub(super) paused_until: Duration,
    /// Cut off until then.
    pub(super) cut_until: Duration,
    /// Requests without an answer so far.
    pub(super) asked: BTreeMap<u64, Key>,
    /// Counts watches, and says when the last news of this one arrive.
    pub(super) watch: u64,
    pub(super) watching: bool,
    pub(super) news_until: Duration,
    /// Counts plans to wake up: the last one is valid.
    pub(super) wakes: u64,
    pub(super) ships: u64,
    pub(super) shipper: Shipper,
}

impl Gateway {
    pub(super) fn new(name: String, offset: Duration, rate: f64, shipper: Shipper) -> Gateway {
        Gateway {
            name,
            run: 0,
            seat: None,
            view: View::default(),
            offset,
            rate,
            paused_until: Duration::ZERO,
            cut_until: Duration::ZERO,
            asked: BTreeMap::new(),
            watch: 0,
            watching: false,
            news_until: Duration::ZERO,
            wakes: 0,
            ships: 0,
            shipper,
        }
    }

    pub(super) fn start(&mut self, instance: String, seed: u64) {
        self.run += 1;
        let identity = Identity {
            gateway: self.name.clone(),
            instance,
            host: "simulated".into(),
            shards: SHARDS,
            seed,
        };
        self.seat = Some(Seat::new(Timing { ttl: TTL }, identity));
        self.shipper.start();
    }

    pub(super) fn crash(&mut self) {
        self.seat = None;
        self.view = View::default();
        self.watching = false;
        self.asked.clear();
        self.shipper.crash();
    }

    /// What its clock shows.
    pub(super) fn clock(&self, now: Duration) -> Moment {
        self.offset + now.mul_f64(self.rate)
    }

    /// When its clock shows that.
    pub(super) fn when(&self, moment: Moment) -> Duration {
        moment.saturating_sub(self.offset).div_f64(self.rate)
    }

    /// The same clock, for what wants another type.
    pub(super) fn instant(&self, origin: Instant, now: Duration) -> Instant {
        origin + self.clock(now)
    }

    /// The token with which it acts.
    pub(super) fn acts(&self, key: &Key, now: Duration, bug: Bug) -> Option<u64> {
        let holding = match key {
            Key::Leader => self.view.leader,
            Key::Shard(shard) => self.view.shards.get(usize::from(*shard)).copied().flatten(),
            Key::Member { .. } => None,
        };
        let valid =
            |holding: &Holding| bug == Bug::ActsOnOldNews || self.clock(now) < holding.until;
        holding.filter(valid).map(|holding| holding.token)
    }
}

/// What at most one may act for.
pub(super) fn rights() -> impl Iterator<Item = Key> {
    (0..SHARDS).map(Key::Shard).chain([Key::Leader])
}
