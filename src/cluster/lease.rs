//! A lease on one key of the bucket: a state machine without I/O.
//!
//! Whoever writes the key last, by compare-and-set, holds it. The holder counts the lease from before it
//! sent the write, and ends it a margin early; the others count from when they saw the write, to the end.
//! So at any time at most one acts, as long as their clocks run at about the same rate
//! (`docs/cluster.md` has the proof). Answers that are late or lost shorten a lease and never extend it.
//!
//! The revision of the acquiring write is the fencing token: what is written downstream with it can be
//! told from what an earlier holder still writes.

use std::time::Duration;

use backon::ExponentialBackoff;

use super::claim::{About, Claim};
use super::clock::Moment;
use crate::remote::Patience;

/// How long a lease is, and what follows from that.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub ttl: Duration,
}

impl Timing {
    /// Two renewals may fail before the lease is over.
    fn renew_after(self) -> Duration {
        self.ttl / 3
    }

    /// So much earlier the holder stops. Good for clocks of which one runs a tenth faster than the other.
    fn margin(self) -> Duration {
        self.ttl / 10
    }

    /// For one call: a renewal that gets no answer can be repeated before the lease is over.
    pub(super) fn call_timeout(self) -> Duration {
        self.ttl / 4
    }

    /// The pauses after what failed.
    pub(super) fn patience(self) -> Patience {
        Patience {
            timeout: self.call_timeout(),
            first_pause: self.ttl / 50,
            longest_pause: self.ttl / 10,
            ..Patience::default()
        }
    }
}

/// What the machine wants of the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    Read,
    /// Write if the key's last revision is the expected one; 0 if it has none.
    Write {
        expected: u64,
        claim: Claim,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Written, with this revision.
    Written(u64),
    /// The key's last revision is another one.
    Refused,
    Read(Entry),
    /// No answer, or an error: what was asked may have been done, or may be done later.
    Unknown,
}

/// What is under a key. Revision 0 and no claim: nothing; a revision and no claim: it was deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub revision: u64,
    pub claim: Option<Claim>,
}

impl Entry {
    pub const MISSING: Entry = Entry {
        revision: 0,
        claim: None,
    };
}

/// The right to act, until a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    pub token: u64,
    pub until: Moment,
}

#[derive(Debug)]
pub struct Lease {
    timing: Timing,
    /// What this gateway writes.
    mine: Claim,
    /// Nobody else writes this key, so that there is nobody to wait for if it is missing.
    uncontended: bool,
    wanted: bool,
    /// None until something is known of the key.
    seen: Option<Seen>,
    held: Option<Held>,
    /// One thing at a time.
    asked: Option<Asked>,
    /// The last answer has left open what is under the key.
    doubtful: bool,
    /// Since the bucket is watched (again), something has come of this key.
    replayed: bool,
    /// After a failure: not earlier.
    pause_until: Moment,
    pauses: ExponentialBackoff,
    seed: u64,
    /// The highest revision that this key is known to have had: no token may be lower.
    highest: u64,
    went_back: bool,
}

#[derive(Debug)]
struct Seen {
    entry: Entry,
    /// When this gateway got to know it, which is after it was written.
    since: Moment,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    token: u64,
    /// When the last write was sent that is known to have been done.
    sent: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Read,
    /// The key is missing: it may have been deleted while somebody held it. From this write on, all who do
    /// not hold it wait for a whole lease.
    Mark,
    Acquire,
    Renew,
    Release,
}

#[derive(Debug)]
struct Asked {
    step: Step,
    sent: Moment,
    /// `highest`, then: the echo of the write may come before its answer.
    highest: u64,
}

impl Lease {
    /// `seed` makes the pauses of gateways differ.
    pub fn new(timing: Timing, mine: Claim, seed: u64) -> Lease {
        Lease {
            timing,
            mine,
            uncontended: false,
            wanted: false,
            seen: None,
            held: None,
            asked: None,
            doubtful: false,
            replayed: false,
            pause_until: Moment::ZERO,
            pauses: timing.patience().pauses_from_seed(seed),
            seed,
            highest: 0,
            went_back: false,
        }
    }

    /// For a key that carries this instance in its name.
    pub fn uncontended(timing: Timing, mine: Claim, seed: u64) -> Lease {
        let seen = Some(Seen {
            entry: Entry::MISSING,
            since: Moment::ZERO,
        });
        Lease {
            uncontended: true,
            seen,
            ..Lease::new(timing, mine, seed)
        }
    }

    /// What goes with the claim from the next write on.
    pub fn tell(&mut self, about: About) {
        self.mine.member = Some(about);
    }

    /// Whether to get and keep it, or to leave it to others.
    pub fn want(&mut self, wanted: bool) {
        self.wanted = wanted;
        if !wanted {
            // Before it is released: whoever sees that may act.
            self.held = None;
        }
    }

    /// Whether this gateway may act, and with which token.
    pub fn holding(&self, now: Moment) -> Option<Holding> {
        let held = self.held?;
        let until = held.sent + self.timing.ttl - self.timing.margin();
        (now < until).then_some(Holding {
            token: held.token,
            until,
        })
    }

    /// Who has written the key last.
    pub fn claim(&self) -> Option<&Claim> {
        self.seen.as_ref()?.entry.claim.as_ref()
    }

    /// The key's revisions have become lower: it can't give a token that others would heed.
    pub fn went_back(&self) -> bool {
        self.went_back
    }

    /// Nothing to do, nothing under way, and the key is left to others.
    pub fn is_over(&self) -> bool {
        !self.wanted && self.asked.is_none() && self.due().is_none()
    }

    /// When [`Lease::wake`] has something to do. Until then only what comes from outside changes anything,
    /// and the time [`Holding::until`].
    pub fn next(&self) -> Option<Moment> {
        if self.asked.is_some() {
            return None;
        }
        let (when, _) = self.due()?;
        Some(when.max(self.pause_until))
    }

    /// What is to be asked now. Must be answered by [`Lease::answered`], as unknown if need be.
    pub fn wake(&mut self, now: Moment) -> Option<Ask> {
        if self.holding(now).is_none() {
            self.held = None;
        }
        if self.next()? > now {
            return None;
        }
        let (_, step) = self.due()?;
        self.asked = Some(Asked {
            step,
            sent: now,
            highest: self.highest,
        });
        if step == Step::Read {
            return Some(Ask::Read);
        }
        let claim = self.writes(step);
        let expected = self.seen.as_ref().map_or(0, |seen| seen.entry.revision);
        Some(Ask::Write { expected, claim })
    }

    /// What is next, and not before when.
    fn due(&self) -> Option<(Moment, Step)> {
        const NOW: Moment = Moment::ZERO;
        let seen = self.seen.as_ref()?;
        if self.doubtful {
            return Some((NOW, Step::Read));
        }
        let claim = seen.entry.claim.as_ref().filter(|claim| !claim.released);
        let is_mine = claim.is_some_and(|claim| self.is_mine(claim));
        match self.held {
            _ if !self.wanted => is_mine.then_some((NOW, Step::Release)),
            _ if seen.entry.claim.is_none() && !self.uncontended => Some((NOW, Step::Mark)),
            Some(held) if is_mine => Some((held.sent + self.timing.renew_after(), Step::Renew)),
            // Somebody has marked it as missing: the others wait, the holder need not.
            Some(_) => Some((NOW, Step::Renew)),
            // An own write of which the answer came late or never, or a lease that ran out: a new token.
            None if is_mine => Some((NOW, Step::Acquire)),
            None => Some((
                seen.since + claim.map_or(Duration::ZERO, Claim::ttl),
                Step::Acquire,
            )),
        }
    }

    fn writes(&self, step: Step) -> Claim {
        let mut claim = self.mine.clone();
        match step {
            Step::Mark => return Claim::of_nobody(self.timing.ttl),
            Step::Renew => claim.token = self.held.map(|held| held.token),
            Step::Release => claim.released = true,
            Step::Read | Step::Acquire => {}
        }
        claim
    }

    fn is_mine(&self, claim: &Claim) -> bool {
        claim.instance == self.mine.instance && claim.gateway == self.mine.gateway
    }

    pub fn answered(&mut self, answer: Answer, now: Moment) {
        let Some(asked) = self.asked.take() else {
            return;
        };
        match answer {
            Answer::Written(revision) => self.written(&asked, revision, now),
            Answer::Read(entry) => {
                self.doubtful = false;
                let newer = self
                    .seen
                    .as_ref()
                    .is_none_or(|seen| entry.revision > seen.entry.revision);
                if newer {
                    self.changed(entry, now);
                } else if self.seen.as_ref().is_some_and(|seen| entry != seen.entry) {
                    // The bucket was made anew, or this is old. Neither is a reason to end a lease, and
                    // a write on grounds of what is old is refused.
                    self.seen = Some(Seen { entry, since: now });
                }
            }
            Answer::Refused | Answer::Unknown => {
                self.doubtful = true;
                self.pause(now);
            }
        }
    }

    fn written(&mut self, asked: &Asked, revision: u64, now: Moment) {
        if asked.step == Step::Acquire && revision <= asked.highest {
            self.went_back = true;
            self.doubtful = true;
            self.pause(now);
            return;
        }
        self.went_back = false;
        self.pauses = self
            .timing
            .patience()
            .pauses_from_seed(self.seed ^ revision);
        let since_then = self.seen.as_ref().map_or(0, |seen| seen.entry.revision);
        if since_then > revision {
            // Somebody was faster than this answer.
            return;
        }
        let claim = self.writes(asked.step);
        let still_held = self.holding(now);
        match asked.step {
            Step::Acquire if self.wanted => {
                self.held = Some(Held {
                    token: revision,
                    sent: asked.sent,
                })
            }
            // Over is over: what stopped meanwhile starts with a new token.
            Step::Renew => {
                self.held = still_held.map(|held| Held {
                    token: held.token,
                    sent: asked.sent,
                });
            }
            Step::Acquire | Step::Mark | Step::Release | Step::Read => {}
        }
        self.highest = self.highest.max(revision);
        self.seen = Some(Seen {
            entry: Entry {
                revision,
                claim: Some(claim),
            },
            since: now,
        });
        if self.holding(now).is_none() {
            self.held = None;
        }
    }

    /// Something has come of the key by way of the watch on the bucket.
    pub fn observed(&mut self, entry: Entry, now: Moment) {
        self.replayed = true;
        if self
            .seen
            .as_ref()
            .is_none_or(|seen| entry.revision > seen.entry.revision)
        {
            self.changed(entry, now);
        }
    }

    fn changed(&mut self, entry: Entry, now: Moment) {
        self.highest = self.highest.max(entry.revision);
        if entry
            .claim
            .as_ref()
            .is_some_and(|claim| !self.is_mine(claim) && !claim.is_of_nobody())
        {
            self.held = None;
        }
        self.seen = Some(Seen { entry, since: now });
    }

    /// The bucket is about to be watched (again): all that is in it comes first.
    pub fn watch_begins(&mut self) {
        self.replayed = false;
    }

    /// All that was in the bucket has come.
    pub fn watch_caught_up(&mut self, now: Moment) {
        let known_missing = self
            .seen
            .as_ref()
            .is_some_and(|seen| seen.entry.claim.is_none());
        if !self.replayed && !known_missing {
            self.seen = Some(Seen {
                entry: Entry::MISSING,
                since: now,
            });
        }
    }

    fn pause(&mut self, now: Moment) {
        self.pause_until = now + self.pauses.next().unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);
    const TIMING: Timing = Timing { ttl: TTL };

    fn at(seconds: f64) -> Moment {
        Duration::from_secs_f64(1000.0 + seconds)
    }

    fn claim(instance: &str) -> Claim {
        Claim::new(instance, instance, TTL)
    }

    fn entry(revision: u64, instance: &str) -> Entry {
        Entry {
            revision,
            claim: Some(claim(instance)),
        }
    }

    /// That of "a", which wants it and has marked it as missing at 0 s.
    fn lease() -> Lease {
        let mut lease = Lease::new(TIMING, claim("a"), 1);
        lease.want(true);
        lease.watch_begins();
        lease.watch_caught_up(at(0.0));
        let mark = Ask::Write {
            expected: 0,
            claim: Claim::of_nobody(TTL),
        };
        assert_eq!(lease.wake(at(0.0)), Some(mark));
        lease.answered(Answer::Written(2), at(0.0));
        lease
    }

    /// Has held it since 10 s, with token 5.
    fn held() -> Lease {
        let mut lease = lease();
        assert_eq!(
            lease.wake(at(10.0)),
            Some(Ask::Write {
                expected: 2,
                claim: claim("a")
            })
        );
        lease.answered(Answer::Written(5), at(10.5));
        assert_eq!(
            lease.holding(at(10.5)),
            Some(Holding {
                token: 5,
                until: at(19.0)
            })
        );
        lease
    }

    fn expected(ask: Option<Ask>) -> u64 {
        match ask {
            Some(Ask::Write { expected, .. }) => expected,
            other => panic!("a write, not {other:?}"),
        }
    }

    #[test]
    fn a_key_that_is_missing_is_marked_and_taken_after_a_whole_lease() {
        let mut lease = lease();
        assert_eq!(lease.next(), Some(at(10.0)));
        assert_eq!(lease.wake(at(9.9)), None);
        assert_eq!(expected(lease.wake(at(10.0))), 2);
    }

    #[test]
    fn a_lease_counts_from_before_the_request_and_ends_before_others_may_act() {
        let lease = held();
        assert!(lease.holding(at(18.9)).is_some());
        assert_eq!(lease.holding(at(19.0)), None);
    }

    #[test]
    fn a_third_of_the_lease_later_it_is_renewed_and_keeps_its_token() {
        let mut lease = held();
        assert_eq!(lease.wake(at(13.3)), None);
        let Some(Ask::Write { expected: 5, claim }) = lease.wake(at(13.4)) else {
            panic!()
        };
        assert_eq!(claim.token, Some(5));
        lease.answered(Answer::Written(6), at(14.0));
        assert_eq!(
            lease.holding(at(14.0)),
            Some(Holding {
                token: 5,
                until: at(22.4)
            })
        );
    }

    #[test]
    fn an_answer_that_comes_when_the_lease_is_over_does_not_extend_it() {
        let mut lease = held();
        assert_eq!(expected(lease.wake(at(18.0))), 5);
        lease.answered(Answer::Written(6), at(19.5));
        assert_eq!(lease.holding(at(19.5)), None);
        // The key is its own, and nobody can have acted: it may act again, with a token of its own.
        assert_eq!(expected(lease.wake(at(19.5))), 6);
        lease.answered(Answer::Written(7), at(19.6));
        assert_eq!(
            lease.holding(at(19.6)),
            Some(Holding {
                token: 7,
                until: at(28.5)
            })
        );
    }

    #[test]
    fn an_acquisition_whose_answer_comes_a_lease_late_is_none() {
        let mut lease = lease();
        lease.wake(at(10.0));
        lease.answered(Answer::Written(5), at(19.0));
        assert_eq!(lease.holding(at(19.0)), None);
    }

    #[test]
    fn after_a_renewal_without_an_answer_it_is_read_what_came_of_it() {
        let mut lease = held();
        lease.wake(at(14.0));
        lease.answered(Answer::Unknown, at(16.5));
        assert_eq!(lease.wake(at(16.5)), None, "there is a pause");
        assert_eq!(lease.wake(at(17.0)), Some(Ask::Read));
        lease.answered(Answer::Read(entry(6, "a")), at(17.1));
        assert_eq!(
            lease.holding(at(17.1)),
            Some(Holding {
                token: 5,
                until: at(19.0)
            })
        );
        assert_eq!(expected(lease.wake(at(17.1))), 6);
        lease.answered(Answer::Written(7), at(17.2));
        assert_eq!(
            lease.holding(at(17.2)),
            Some(Holding {
                token: 5,
                until: at(26.1)
            })
        );
    }

    #[test]
    fn the_lease_of_another_is_taken_when_it_has_not_changed_for_as_long_as_it_says() {
        let mut lease = lease();
        lease.observed(entry(5, "b"), at(1.0));
        lease.observed(entry(6, "b"), at(4.0));
        lease.observed(entry(5, "b"), at(8.0));
        assert_eq!(lease.wake(at(13.9)), None);
        assert_eq!(expected(lease.wake(at(14.0))), 6);
    }

    #[test]
    fn an_own_lease_from_before_a_restart_is_that_of_another() {
        let mut lease = lease();
        let mut before = claim("a");
        before.instance = "an earlier one".into();
        lease.observed(
            Entry {
                revision: 5,
                claim: Some(before),
            },
            at(1.0),
        );
        assert_eq!(lease.wake(at(10.9)), None);
    }

    #[test]
    fn a_lease_that_was_released_is_taken_at_once() {
        let mut lease = lease();
        let mut released = claim("b");
        released.released = true;
        lease.observed(
            Entry {
                revision: 5,
                claim: Some(released),
            },
            at(1.0),
        );
        assert_eq!(expected(lease.wake(at(1.0))), 5);
    }

    #[test]
    fn who_does_not_want_it_any_more_does_not_act_and_then_releases_it() {
        let mut lease = held();
        lease.want(false);
        assert_eq!(lease.holding(at(11.0)), None);
        let Some(Ask::Write { expected: 5, claim }) = lease.wake(at(11.0)) else {
            panic!()
        };
        assert!(claim.released);
        assert!(!lease.is_over());
        lease.answered(Answer::Written(6), at(11.1));
        assert!(lease.is_over());
    }

    #[test]
    fn what_is_acquired_after_it_was_given_up_is_released_and_not_held() {
        let mut lease = lease();
        lease.wake(at(10.0));
        lease.want(false);
        lease.answered(Answer::Written(5), at(10.1));
        assert_eq!(lease.holding(at(10.1)), None);
        assert_eq!(expected(lease.wake(at(10.1))), 5);
    }

    #[test]
    fn a_lease_that_another_has_got_is_lost_at_once() {
        let mut lease = held();
        lease.observed(entry(6, "b"), at(12.0));
        assert_eq!(lease.holding(at(12.0)), None);
        assert_eq!(lease.next(), Some(at(22.0)));
    }

    #[test]
    fn the_holder_of_a_key_that_was_deleted_keeps_it_while_the_others_wait() {
        let mut holder = held();
        holder.wake(at(14.0));
        holder.answered(Answer::Refused, at(14.1));
        assert_eq!(holder.wake(at(15.0)), Some(Ask::Read));
        holder.answered(Answer::Read(Entry::MISSING), at(15.1));
        assert_eq!(expected(holder.wake(at(15.1))), 0);
        holder.answered(Answer::Written(100), at(15.2));
        assert_eq!(
            holder.holding(at(15.2)),
            Some(Holding {
                token: 5,
                until: at(19.0)
            })
        );
        assert_eq!(expected(holder.wake(at(15.2))), 100);
        holder.answered(Answer::Written(101), at(15.3));
        assert_eq!(
            holder.holding(at(15.3)),
            Some(Holding {
                token: 5,
                until: at(24.2)
            })
        );
    }

    #[test]
    fn a_mark_of_another_does_not_end_a_lease() {
        let mut holder = held();
        let mark = Entry {
            revision: 100,
            claim: Some(Claim::of_nobody(TTL)),
        };
        holder.observed(mark.clone(), at(12.0));
        assert_eq!(expected(holder.wake(at(12.0))), 100);
        holder.answered(Answer::Written(101), at(12.1));
        assert_eq!(
            holder.holding(at(12.1)),
            Some(Holding {
                token: 5,
                until: at(21.0)
            })
        );

        let mut other = lease();
        other.observed(mark, at(12.0));
        assert_eq!(other.next(), Some(at(22.0)));
    }

    #[test]
    fn a_token_that_is_no_higher_than_one_before_is_not_used() {
        let mut lease = lease();
        lease.observed(entry(5, "b"), at(1.0));
        lease.watch_begins();
        lease.watch_caught_up(at(2.0));
        lease.wake(at(2.0));
        lease.answered(Answer::Written(1), at(2.0));
        assert_eq!(expected(lease.wake(at(12.0))), 1);
        lease.answered(Answer::Written(2), at(12.1));
        assert!(lease.went_back());
        assert_eq!(lease.holding(at(12.1)), None);
    }

    #[test]
    fn a_read_that_shows_an_older_holder_does_not_end_the_lease() {
        let mut lease = held();
        lease.wake(at(14.0));
        lease.answered(Answer::Unknown, at(15.0));
        assert_eq!(lease.wake(at(16.0)), Some(Ask::Read));
        lease.answered(Answer::Read(entry(4, "b")), at(16.1));
        assert!(lease.holding(at(16.1)).is_some());
    }
}
