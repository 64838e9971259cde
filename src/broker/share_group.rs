//! Share groups: subscribers that have the messages of a filter among them (MQTT 5.0, 4.8.2).

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;

use super::fanout::Subscriber;
use super::message::SessionKey;

/// The members of one `$share/GROUP/FILTER`.
#[derive(Debug, Default)]
pub struct ShareGroup {
    members: RwLock<Vec<Subscriber>>,
    /// Whose turn it is, counted up for ever.
    turn: AtomicUsize,
}

impl ShareGroup {
    /// Adds a member, or puts it in the place of the same client's earlier subscription. Returns
    /// whether it is new.
    pub fn join(&self, member: Subscriber) -> bool {
        let mut members = self.members.write();
        match members.iter_mut().find(|known| known.key == member.key) {
            Some(known) => {
                *known = member;
                false
            }
            None => {
                members.push(member);
                true
            }
        }
    }

    /// Returns whether it was a member.
    pub fn leave(&self, key: SessionKey) -> bool {
        let mut members = self.members.write();
        let before = members.len();
        members.retain(|member| member.key != key);
        members.len() < before
    }

    pub fn is_empty(&self) -> bool {
        self.members.read().is_empty()
    }

    /// Calls `found` with each member.
    pub fn for_each_member(&self, found: impl FnMut(&Subscriber)) {
        self.members.read().iter().for_each(found);
    }

    /// Calls `take` with whose turn it is to get a message on `topic`: one after the other of those
    /// that are connected and not behind, if there is one; else one that is connected; else one that
    /// will come back for it. Returns none if nobody may have it.
    pub fn next_for<T>(
        &self,
        topic: &str,
        except: Option<SessionKey>,
        take: impl FnOnce(&Subscriber) -> T,
    ) -> Option<T> {
        let members = self.members.read();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let in_turn = || {
            let at = turn % members.len().max(1);
            let (before, after) = members.split_at(at);
            after.iter().chain(before).filter(|member| {
                Some(member.key) != except && member.permissions.may_receive(topic)
            })
        };
        in_turn()
            .find(|member| !member.mailbox.is_offline() && !member.mailbox.is_behind())
            .or_else(|| in_turn().find(|member| !member.mailbox.is_offline()))
            .or_else(|| in_turn().next())
            .map(take)
    }

    /// Whether somebody other than `key` is connected.
    pub fn has_others(&self, key: SessionKey) -> bool {
        let members = self.members.read();
        let mut others = members.iter().filter(|member| member.key != key);
        others.any(|member| !member.mailbox.is_offline())
    }
}
