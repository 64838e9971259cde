//! A gateway's seat in the cluster: its leases on the leadership and on shards, and its membership, which
//! decides which of those it wants. Without I/O: who runs it asks the bucket what [`Seat::wake`] says.

use std::time::Duration;

use super::claim::{About, Claim, Key};
use super::clock::Moment;
use super::lease::{Answer, Ask, Entry, Lease, Timing};
use super::members::Members;
use super::node::View;
use super::shards::Shards;

/// Who is gone is listed for so much longer.
const REMEMBERED: Duration = Duration::from_secs(600);

#[derive(Clone, Debug)]
pub struct Identity {
    pub gateway: String,
    /// New at each start.
    pub instance: String,
    pub host: String,
    pub shards: u16,
    pub seed: u64,
}

#[derive(Debug)]
pub struct Seat {
    identity: Identity,
    timing: Timing,
    members: Members,
    leader: Lease,
    shards: Shards,
    leaving: bool,
    /// When something was answered last.
    heard: Option<Moment>,
}

impl Seat {
    pub fn new(timing: Timing, identity: Identity) -> Seat {
        let Identity {
            gateway,
            instance,
            host,
            shards,
            seed,
        } = &identity;
        let claim = Claim::new(gateway, instance, timing.ttl);
        let about = About {
            host: host.clone(),
            shards: *shards,
            runs: None,
        };
        Seat {
            timing,
            members: Members::new(timing, gateway, instance, about, *seed),
            leader: Lease::new(timing, claim.clone(), seed ^ u64::MAX),
            shards: Shards::new(timing, &claim, *shards, *seed),
            leaving: false,
            heard: None,
            identity,
        }
    }

    /// Releases all that it has; after that, [`Seat::is_over`].
    pub fn leave(&mut self) {
        self.leaving = true;
        self.members.own().want(false);
    }

    /// What this gateway runs where it has the right to.
    pub fn tell(&mut self, runs: Vec<String>) {
        self.members.tell(runs);
    }

    pub fn is_over(&self) -> bool {
        self.leaving
            && self.members.own_lease().is_over()
            && self.leader.is_over()
            && self.shards.leases().iter().all(Lease::is_over)
    }

    pub fn watch_begins(&mut self) {
        self.members.watch_begins();
        self.leases().for_each(|(_, lease)| lease.watch_begins());
    }

    pub fn watch_caught_up(&mut self, now: Moment) {
        self.members.watch_caught_up();
        self.leases()
            .for_each(|(_, lease)| lease.watch_caught_up(now));
    }

    /// Something has come by way of the watch on the bucket.
    pub fn observed(&mut self, key: Key, entry: Entry, now: Moment) {
        match self.lease(&key) {
            Some(lease) => lease.observed(entry, now),
            None => self.members.observed(key, entry, now),
        }
    }

    /// What is to be asked of the bucket now, each to be answered.
    pub fn wake(&mut self, now: Moment) -> Vec<(Key, Ask)> {
        self.members.forget(REMEMBERED, now);
        let stands_back = self
            .members
            .objection(now)
            .is_some_and(|(_, stands_back)| stands_back);
        let takes_part = !self.leaving && !stands_back && self.members.has_joined(now);
        self.leader.want(takes_part);
        let sharing = if takes_part {
            self.members.sharing(now)
        } else {
            Vec::new()
        };
        self.shards.divide(&sharing);
        self.leases()
            .filter_map(|(key, lease)| Some((key, lease.wake(now)?)))
            .collect()
    }

    pub fn answered(&mut self, key: &Key, answer: Answer, now: Moment) {
        if answer != Answer::Unknown {
            self.heard = Some(now);
        }
        if let Some(lease) = self.lease(key) {
            lease.answered(answer, now);
        }
    }

    /// The connection has ended: whatever was asked is open.
    pub fn lost(&mut self, now: Moment) {
        self.leases()
            .for_each(|(_, lease)| lease.answered(Answer::Unknown, now));
    }

    /// When to wake it again if nothing comes; each call to it may change that.
    pub fn next(&self, now: Moment) -> Option<Moment> {
        let leases = self
            .shards
            .leases()
            .iter()
            .chain([&self.leader, self.members.own_lease()]);
        let due = leases.clone().filter_map(Lease::next);
        let ends = leases.filter_map(|lease| Some(lease.holding(now)?.until));
        due.chain(ends).chain(self.members.next(now)).min()
    }

    pub fn view(&self, now: Moment) -> View {
        let holder = |lease: &Lease| {
            let claim = lease
                .claim()
                .filter(|claim| !claim.released && !claim.is_of_nobody())?;
            Some(claim.gateway.clone())
        };
        let shards = self.shards.leases().iter();
        View {
            gateway: self.identity.gateway.clone(),
            instance: self.identity.instance.clone(),
            leader: self.leader.holding(now),
            leader_is: holder(&self.leader),
            shards: shards.clone().map(|lease| lease.holding(now)).collect(),
            shards_are: shards.map(holder).collect(),
            members: self.members.list(now),
            connected_until: self
                .heard
                .map_or(Moment::ZERO, |heard| heard + self.timing.ttl),
            objection: self.members.objection(now),
            went_back: self.leader.went_back() || self.shards.leases().iter().any(Lease::went_back),
            problem: None,
        }
    }

    fn lease(&mut self, key: &Key) -> Option<&mut Lease> {
        match key {
            Key::Leader => Some(&mut self.leader),
            Key::Shard(shard) => self.shards.lease(*shard),
            Key::Member { instance, .. } if *instance == self.identity.instance => {
                Some(self.members.own())
            }
            Key::Member { .. } => None,
        }
    }

    fn leases(&mut self) -> impl Iterator<Item = (Key, &mut Lease)> {
        let own = (self.members.own_key(), self.members.own());
        [own, (Key::Leader, &mut self.leader)]
            .into_iter()
            .chain(self.shards.leases_mut())
    }
}
