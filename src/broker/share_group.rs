//! Share groups: subscribers that have the messages of a filter among them (MQTT 5.0, 4.8.2).

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use super::fanout::Subscriber;
use super::message::SessionKey;

/// The members of one `$share/GROUP/FILTER`.
#[derive(Debug, Default)]
pub struct ShareGroup {
    members: RwLock<Vec<Member>>,
    /// Counted up for ever.
    turn: AtomicU64,
}

#[derive(Debug)]
struct Member {
    subscriber: Subscriber,
    /// When it last had its turn. Whoever is passed over, since it may not have a message or is
    /// behind, has not had it.
    last_turn: AtomicU64,
}

impl ShareGroup {
    /// Adds a member, or puts it in the place of the same client's earlier subscription. Returns
    /// whether it is new.
    pub fn join(&self, member: Subscriber) -> bool {
        let mut members = self.members.write();
        match members
            .iter_mut()
            .find(|known| known.subscriber.key == member.key)
        {
            Some(known) => {
                known.subscriber = member;
                false
            }
            None => {
                // At the end, so that nobody comes first by joining again and again.
                members.push(Member {
                    subscriber: member,
                    last_turn: AtomicU64::new(self.take_turn()),
                });
                true
            }
        }
    }

    /// Returns whether it was a member.
    pub fn leave(&self, key: SessionKey) -> bool {
        let mut members = self.members.write();
        let before = members.len();
        members.retain(|member| member.subscriber.key != key);
        members.len() < before
    }

    pub fn is_empty(&self) -> bool {
        self.members.read().is_empty()
    }

    /// Calls `found` with each member.
    pub fn for_each_member(&self, mut found: impl FnMut(&Subscriber)) {
        let members = self.members.read();
        members.iter().for_each(|member| found(&member.subscriber));
    }

    fn take_turn(&self) -> u64 {
        self.turn.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Calls `take` with whose turn it is to get a message on `topic`: of those that
    /// are connected and not behind, who has waited longest, if there is one; else of those that are
    /// connected; else of those that will come back for it. Returns none if nobody may have it.
    pub fn next_for<T>(
        &self,
        topic: &str,
        except: Option<SessionKey>,
        take: impl FnOnce(&Subscriber) -> T,
    ) -> Option<T> {
        let members = self.members.read();
        let longest_waiting = |fits: fn(&Subscriber) -> bool| {
            let mut found: Option<(u64, &Member)> = None;
            for member in members.iter() {
                let last_turn = member.last_turn.load(Ordering::Relaxed);
                let Member { subscriber, .. } = member;
                // What the rules say takes longest to find out, so that is asked last.
                if found.is_none_or(|(earliest, _)| last_turn < earliest)
                    && Some(subscriber.key) != except
                    && fits(subscriber)
                    && subscriber.permissions.may_receive(topic)
                {
                    found = Some((last_turn, member));
                }
            }
            found.map(|(_, member)| member)
        };
        let member = longest_waiting(|one| !one.mailbox.is_offline() && !one.mailbox.is_behind())
            .or_else(|| longest_waiting(|one| !one.mailbox.is_offline()))
            .or_else(|| longest_waiting(|_| true))?;
        member.last_turn.store(self.take_turn(), Ordering::Relaxed);
        Some(take(&member.subscriber))
    }

    /// Whether somebody other than `key` is connected.
    pub fn has_others(&self, key: SessionKey) -> bool {
        // Asked with a mailbox locked, which `take` above may be waiting for: behind somebody who waits
        // to join, neither would ever go on.
        let members = self.members.read_recursive();
        members.iter().any(|Member { subscriber, .. }| {
            subscriber.key != key && !subscriber.mailbox.is_offline()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use rumqttd::protocol::QoS;

    use super::super::access::{Access, AccessConfig, Identity, Permissions};
    use super::super::mailbox::{Bounds, Mailbox, Mailboxes};
    use super::super::subscription::SubscriptionOptions;
    use super::*;
    use crate::config::Anonymous;
    use crate::dead_letters::DeadLetters;

    fn member(key: SessionKey, permissions: Arc<Permissions>) -> Subscriber {
        let bounds = Bounds {
            max_messages: 1000,
            max_bytes: usize::MAX,
            max_total_bytes: usize::MAX,
            max_stored_bytes: usize::MAX,
        };
        let dead_letters = Arc::new(DeadLetters::new(Instant::now()));
        let all = Arc::new(Mailboxes::new(bounds, None, dead_letters));
        Subscriber {
            key,
            mailbox: Arc::new(Mailbox::new(key, "c", true, all)),
            permissions,
            options: SubscriptionOptions {
                qos: QoS::AtLeastOnce,
                no_local: false,
                retain_as_published: false,
                id: None,
            },
        }
    }

    fn group(members: impl IntoIterator<Item = Subscriber>) -> ShareGroup {
        let group = ShareGroup::default();
        for member in members {
            assert!(group.join(member));
        }
        group
    }

    fn turns(group: &ShareGroup, topics: &[&str]) -> Vec<SessionKey> {
        let turn = |topic: &&str| group.next_for(topic, None, |member| member.key);
        topics.iter().filter_map(turn).collect()
    }

    #[test]
    fn members_have_turns_in_the_order_in_which_they_came() {
        let group = group((1..=3).map(|key| member(key, Permissions::everything())));
        assert_eq!(turns(&group, &["t"; 5]), [1, 2, 3, 1, 2]);
        assert!(group.leave(3));
        assert!(group.join(member(3, Permissions::everything())));
        assert_eq!(turns(&group, &["t"; 3]), [1, 2, 3]);
        assert!(!group.join(member(1, Permissions::everything())));
        assert_eq!(turns(&group, &["t"; 3]), [1, 2, 3]);
        let other = group.next_for("t", Some(1), |member| member.key);
        assert_eq!(other, Some(2));
    }

    #[test]
    fn a_member_that_may_not_see_a_message_keeps_its_turn_for_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let acl_file = folder.path().join("acl.toml");
        let rules = r##"
            [[rule]]
            users = ["olga"]
            allow = ["subscribe"]
            topics = ["#"]
            [[rule]]
            users = ["press"]
            allow = ["subscribe"]
            topics = ["open"]
        "##;
        std::fs::write(&acl_file, rules).unwrap();
        let access = Access::load(AccessConfig {
            anonymous: Anonymous::Never,
            password_file: None,
            jwt_key: None,
            acl_file: Some(acl_file),
            max_failures_per_minute: 0,
        });
        let access = access.unwrap();
        let [press, olga] = [(1, "press"), (2, "olga")].map(|(key, user)| {
            let user = Identity::remembered(Some(user));
            member(key, access.permissions(&user, "c"))
        });
        // Whoever comes first, and whichever topic does.
        for members in [[press.clone(), olga.clone()], [olga, press]] {
            let group = group(members);
            for topics in [["secret", "open"], ["open", "secret"]] {
                let taken = turns(&group, &topics.repeat(10));
                let press = taken.iter().filter(|key| **key == 1).count();
                // All but, at most, the first that it may see.
                assert!((9..=10).contains(&press), "{taken:?}");
                assert_eq!(taken.len(), 20);
            }
            assert_eq!(turns(&group, &["secret", "secret"]), [2, 2]);
        }
    }

    #[test]
    fn who_is_away_is_passed_over_while_another_is_there() {
        let members = [1, 2].map(|key| member(key, Permissions::everything()));
        let first = members[0].mailbox.clone();
        let group = group(members);
        first.set_offline();
        assert_eq!(turns(&group, &["t"; 3]), [2, 2, 2]);
        first.set_online();
        assert_eq!(turns(&group, &["t"; 3]), [1, 2, 1]);
    }
}
