//! Who is in the cluster: each gateway holds a lease on a key of its own, and counts the others in as long
//! as they renew theirs. Each does so by its own clock, so that they may differ for as long as a lease.
//!
//! Of two gateways that can't both be in (one name, different numbers of shards), both are told, and the
//! one that came later stands back until the other has left.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::claim::{About, Claim, Key};
use super::clock::Moment;
use super::lease::{Entry, Lease, Timing};

/// The bucket takes no values of more than 4 KiB.
const MOST_RUNS_BYTES: usize = 2 << 10;

/// One who is in the cluster, or was lately.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub gateway: String,
    pub instance: String,
    pub host: String,
    pub alive: bool,
    /// What it runs where it has the right to, if it says so.
    pub runs: Option<Vec<String>>,
}

/// Why two gateways can't both be in the cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Objection {
    #[error(
        "two gateways of this site have the name {gateway}: this one and one on host {host} (instance \
         {instance}); give one of them another name in uplink.gateway"
    )]
    SameName {
        gateway: String,
        host: String,
        instance: String,
    },
    #[error(
        "two gateways of this site have the name {gateway}: {first} and {second}; give one of them another name in \
         uplink.gateway"
    )]
    OthersOfOneName {
        gateway: String,
        first: String,
        second: String,
    },
    #[error(
        "gateway {gateway} on host {host} divides topics into {theirs} shards, this one into {ours}; set \
         cluster.shards to the same number on all gateways of the site"
    )]
    OtherShards {
        gateway: String,
        host: String,
        theirs: u16,
        ours: u16,
    },
}

#[derive(Debug)]
pub struct Members {
    own: Lease,
    gateway: String,
    about: About,
    instance: String,
    others: BTreeMap<Key, Other>,
    joined: bool,
    /// What lay in the bucket when the watch began is known.
    caught_up: bool,
}

#[derive(Debug)]
struct Other {
    claim: Claim,
    about: About,
    revision: u64,
    /// When it changed last, as far as this gateway knows.
    changed: Moment,
    /// It came or changed while the bucket was watched: it is no leftover of one that is gone.
    proven: bool,
}

impl Other {
    fn until(&self) -> Moment {
        self.changed + self.claim.ttl()
    }

    fn is_alive(&self, now: Moment) -> bool {
        !self.claim.released && now < self.until()
    }

    fn place(&self) -> String {
        format!(
            "one on host {} (instance {})",
            self.about.host, self.claim.instance
        )
    }

    /// The lower, the longer it has been a member.
    fn token(&self) -> u64 {
        self.claim.token.unwrap_or(self.revision)
    }

    /// Whether the two have one name, and the one that was there before has renewed since the other came: one that
    /// was started again after a crash does not.
    fn is_beside(&self, later: &Other) -> bool {
        self.claim.gateway == later.claim.gateway
            && self.token() < later.token()
            && later.token() < self.revision
    }
}

impl Members {
    pub fn new(timing: Timing, gateway: &str, instance: &str, about: About, seed: u64) -> Members {
        let mut claim = Claim::new(gateway, instance, timing.ttl);
        claim.member = Some(about.clone());
        let mut own = Lease::uncontended(timing, claim, seed);
        own.want(true);
        Members {
            own,
            gateway: gateway.into(),
            about,
            instance: instance.into(),
            others: BTreeMap::new(),
            joined: false,
            caught_up: false,
        }
    }

    /// What this gateway runs where it has the right to.
    pub fn tell(&mut self, runs: Vec<String>) {
        let bytes: usize = runs.iter().map(String::len).sum();
        self.about.runs = (bytes <= MOST_RUNS_BYTES).then_some(runs);
        self.own.tell(self.about.clone());
    }

    pub fn own_key(&self) -> Key {
        Key::Member {
            gateway: self.gateway.clone(),
            instance: self.instance.clone(),
        }
    }

    pub fn own(&mut self) -> &mut Lease {
        &mut self.own
    }

    pub fn own_lease(&self) -> &Lease {
        &self.own
    }

    /// Whether this gateway has been in, at some time: from then on the others know of it.
    pub fn has_joined(&mut self, now: Moment) -> bool {
        self.joined |= self.own.holding(now).is_some();
        self.joined
    }

    /// What comes now lies there already.
    pub fn watch_begins(&mut self) {
        self.caught_up = false;
    }

    pub fn watch_caught_up(&mut self) {
        self.caught_up = true;
    }

    /// Something has come of the key of another.
    pub fn observed(&mut self, key: Key, entry: Entry, now: Moment) {
        let Some(claim) = entry.claim else {
            self.others.remove(&key);
            return;
        };
        let Some(about) = claim.member.clone() else {
            return;
        };
        let proven = match self.others.get(&key) {
            Some(other) if other.revision == entry.revision => return,
            known => known.is_some() || self.caught_up,
        };
        let revision = entry.revision;
        self.others.insert(
            key,
            Other {
                claim,
                about,
                revision,
                changed: now,
                proven,
            },
        );
    }

    /// Forgets who has been gone for so long that nobody asks.
    pub fn forget(&mut self, after: Duration, now: Moment) {
        self.others.retain(|_, other| now < other.until() + after);
    }

    /// The names of those who share the work, this gateway's among them.
    pub fn sharing(&self, now: Moment) -> Vec<&str> {
        let others = self.others.values().filter(|other| other.is_alive(now));
        let alike = others.filter(|other| other.about.shards == self.about.shards);
        let mut names: Vec<&str> = alike.map(|other| other.claim.gateway.as_str()).collect();
        names.push(&self.gateway);
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Why this gateway and another can't both be in, and whether it is this one that stands back.
    pub fn objection(&self, now: Moment) -> Option<(Objection, bool)> {
        let since = self.own.holding(now).map_or(u64::MAX, |own| own.token);
        let alive = self
            .others
            .values()
            .filter(|other| other.proven && other.is_alive(now));
        let objections = alive.clone().filter_map(|other| {
            let Other { claim, about, .. } = other;
            let objection = if claim.gateway == self.gateway {
                Objection::SameName {
                    gateway: claim.gateway.clone(),
                    host: about.host.clone(),
                    instance: claim.instance.clone(),
                }
            } else if about.shards != self.about.shards {
                Objection::OtherShards {
                    gateway: claim.gateway.clone(),
                    host: about.host.clone(),
                    theirs: about.shards,
                    ours: self.about.shards,
                }
            } else {
                return None;
            };
            Some((objection, other.token() < since))
        });
        let others = alive.clone().find_map(|first| {
            let second = alive.clone().find(|second| first.is_beside(second))?;
            let objection = Objection::OthersOfOneName {
                gateway: first.claim.gateway.clone(),
                first: first.place(),
                second: second.place(),
            };
            Some((objection, false))
        });
        // Rather one because of which it stands back.
        objections
            .max_by_key(|(_, stands_back)| *stands_back)
            .or(others)
    }

    /// When the next of those who are alive is silent for too long.
    pub fn next(&self, now: Moment) -> Option<Moment> {
        let alive = self.others.values().filter(|other| other.is_alive(now));
        alive.map(Other::until).min()
    }

    /// Those who are in, and who was and has not come back.
    pub fn list(&self, now: Moment) -> Vec<Member> {
        let own = Member {
            gateway: self.gateway.clone(),
            instance: self.instance.clone(),
            host: self.about.host.clone(),
            alive: self.own.holding(now).is_some(),
            runs: self.about.runs.clone(),
        };
        let others = self.others.values();
        let (certain, rest): (Vec<&Other>, Vec<&Other>) =
            others.partition(|other| other.proven && other.is_alive(now));
        let is_in = |name: &str| {
            name == self.gateway || certain.iter().any(|other| other.claim.gateway == name)
        };
        let mut last = BTreeMap::<&str, &Other>::new();
        for other in rest {
            let name = other.claim.gateway.as_str();
            let known = last.get(name).map_or(0, |known| known.revision);
            if !is_in(name) && other.revision > known {
                last.insert(name, other);
            }
        }
        let others = certain.iter().chain(last.values()).map(|other| Member {
            gateway: other.claim.gateway.clone(),
            instance: other.claim.instance.clone(),
            host: other.about.host.clone(),
            alive: other.is_alive(now),
            runs: other.about.runs.clone(),
        });
        let mut list: Vec<Member> = others.chain([own]).collect();
        list.sort_by(|one, other| {
            (&one.gateway, &one.instance).cmp(&(&other.gateway, &other.instance))
        });
        list
    }
}

#[cfg(test)]
mod tests {
    use super::super::lease::{Answer, Ask};
    use super::*;

    const TTL: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> Moment {
        Duration::from_secs(1000 + seconds)
    }

    fn about(shards: u16) -> About {
        About {
            host: "host".into(),
            shards,
            runs: None,
        }
    }

    /// Gateway "a" with 8 shards, in since 0 s with this token.
    fn members(token: u64) -> Members {
        let mut members = Members::new(Timing { ttl: TTL }, "a", "01", about(8), 1);
        members.watch_caught_up();
        members.own.watch_caught_up(at(0));
        assert!(matches!(
            members.own.wake(at(0)),
            Some(Ask::Write { expected: 0, .. })
        ));
        members.own.answered(Answer::Written(token), at(0));
        assert!(members.has_joined(at(0)));
        members
    }

    fn beat(members: &mut Members, gateway: &str, shards: u16, revision: u64, now: Moment) {
        beat_of(members, gateway, "02", shards, revision, now);
    }

    fn beat_of(
        members: &mut Members,
        gateway: &str,
        instance: &str,
        shards: u16,
        revision: u64,
        now: Moment,
    ) {
        let mut claim = Claim::new(gateway, instance, TTL);
        claim.member = Some(about(shards));
        write(members, claim, revision, now);
    }

    fn renew(
        members: &mut Members,
        gateway: &str,
        instance: &str,
        token: u64,
        revision: u64,
        now: Moment,
    ) {
        let mut claim = Claim::new(gateway, instance, TTL);
        claim.member = Some(about(8));
        claim.token = Some(token);
        write(members, claim, revision, now);
    }

    fn write(members: &mut Members, claim: Claim, revision: u64, now: Moment) {
        let key = Key::Member {
            gateway: claim.gateway.clone(),
            instance: claim.instance.clone(),
        };
        members.observed(
            key,
            Entry {
                revision,
                claim: Some(claim),
            },
            now,
        );
    }

    #[test]
    fn who_is_silent_for_a_lease_is_out() {
        let mut members = members(1);
        beat(&mut members, "b", 8, 5, at(1));
        beat(&mut members, "b", 8, 5, at(9));
        assert_eq!(members.sharing(at(10)), ["a", "b"]);
        assert_eq!(members.next(at(10)), Some(at(11)));
        assert_eq!(members.sharing(at(11)), ["a"]);
        assert_eq!(members.next(at(11)), None);
        assert!(!members.list(at(11))[1].alive);
        members.forget(TTL, at(21));
        assert_eq!(members.list(at(21)).len(), 1);
    }

    #[test]
    fn of_two_gateways_with_one_name_both_are_told_and_the_later_one_stands_back() {
        for (token, stands_back) in [(4, false), (6, true)] {
            let mut members = members(token);
            beat(&mut members, "a", 8, 5, at(1));
            let Some((objection, back)) = members.objection(at(1)) else {
                panic!()
            };
            assert_eq!(back, stands_back);
            assert!(
                objection.to_string().contains("on host host (instance 02)"),
                "{objection}"
            );
            if token == 4 {
                assert_eq!(members.objection(at(11)), None, "the other is gone");
            }
        }
    }

    #[test]
    fn a_third_gateway_tells_of_two_that_have_one_name_but_not_of_one_that_was_started_again() {
        let mut members = members(4);
        beat_of(&mut members, "b", "02", 8, 5, at(1));
        beat_of(&mut members, "b", "03", 8, 6, at(2));
        assert_eq!(
            members.objection(at(2)),
            None,
            "the first one may have crashed"
        );
        renew(&mut members, "b", "02", 5, 7, at(3));
        let Some((objection, stands_back)) = members.objection(at(3)) else {
            panic!()
        };
        assert!(!stands_back);
        assert!(objection.to_string().contains("the name b:"), "{objection}");
        assert_eq!(
            members.objection(at(12)),
            None,
            "the second one has been gone for a lease"
        );
    }

    #[test]
    fn what_an_earlier_run_has_left_is_no_second_gateway_until_it_moves() {
        let mut members = members(9);
        // Its own write may be answered before the watch has told what lay there.
        members.watch_begins();
        beat(&mut members, "a", 8, 5, at(1));
        members.watch_caught_up();
        assert_eq!(members.objection(at(1)), None);
        beat(&mut members, "a", 8, 6, at(4));
        assert!(members.objection(at(4)).is_some());
    }

    #[test]
    fn what_earlier_runs_have_left_is_not_listed_beside_the_one_that_is_in() {
        let mut members = members(9);
        beat_of(&mut members, "a", "03", 8, 5, at(1));
        beat_of(&mut members, "b", "04", 8, 6, at(1));
        beat_of(&mut members, "b", "05", 8, 7, at(1));
        let listed = |members: &Members, now| -> Vec<(String, bool)> {
            let list = members.list(now).into_iter();
            list.map(|one| (one.gateway + &one.instance, one.alive))
                .collect()
        };
        let all = ["a01", "a03", "b04", "b05"].map(|name| (name.into(), true));
        assert_eq!(listed(&members, at(2)), all);
        let later = at(11);
        let gone = listed(&members, later);
        assert_eq!(
            gone[1..],
            [("b05".into(), false)],
            "the last that was there"
        );
        beat_of(&mut members, "b", "06", 8, 8, later);
        assert_eq!(listed(&members, later)[1..], [("b06".into(), true)]);
    }

    #[test]
    fn what_a_gateway_runs_is_told_with_its_next_renewal() {
        let mut members = members(4);
        let told = |members: &mut Members, now| {
            let Some(Ask::Write { claim, .. }) = members.own.wake(now) else {
                panic!("a renewal")
            };
            members.own.answered(Answer::Written(5), now);
            claim.member.unwrap().runs
        };
        members.tell(vec!["keeper".into()]);
        assert_eq!(told(&mut members, at(4)), Some(vec!["keeper".into()]));
        members.tell(vec!["long".repeat(200); 3]);
        assert_eq!(told(&mut members, at(8)), None, "more than a value takes");
    }

    #[test]
    fn who_divides_topics_otherwise_shares_no_work() {
        let mut members = members(4);
        beat(&mut members, "b", 16, 5, at(1));
        assert_eq!(members.sharing(at(1)), ["a"]);
        let Some((objection, false)) = members.objection(at(1)) else {
            panic!()
        };
        assert!(
            objection
                .to_string()
                .contains("into 16 shards, this one into 8"),
            "{objection}"
        );
    }
}
