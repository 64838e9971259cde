//! What must come of it: the promises of MQTT in a few lines, to compare the broker with.
//!
//! Knows nothing of packets. Each message has a number of its own, which is its payload.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::super::message::SessionKey;

/// Names a message.
pub type Number = u32;

/// A filter that a client has subscribed to, and the group if it is in one.
pub type Name = (Option<&'static str>, &'static str);

#[derive(Default)]
pub struct Ledger {
    sessions: BTreeMap<SessionKey, Promise>,
    messages: BTreeMap<Number, Sent>,
    groups: BTreeMap<Name, Group>,
    wills: BTreeMap<Number, Will>,
    /// Messages that the broker took, in this order.
    taken: u64,
}

/// What a session was promised, for as long as it lives.
#[derive(Default)]
struct Promise {
    subscriptions: BTreeMap<Name, u8>,
    is_over: bool,
    seen: BTreeMap<Number, Seen>,
    /// The last message of each topic and QoS that was new to it.
    last: BTreeMap<(&'static str, u8), u64>,
}

#[derive(Default)]
struct Seen {
    /// Copies that were not marked as sent again.
    copies: u32,
}

struct Sent {
    topic: &'static str,
    qos: u8,
    /// How often the broker took it, and when it did first.
    times: u32,
    order: u64,
    /// Who is to have it, and at which QoS each time.
    direct: BTreeMap<SessionKey, BTreeSet<u8>>,
    /// The groups of which one member is to have it.
    groups: BTreeSet<Name>,
}

#[derive(Default)]
struct Group {
    members: BTreeSet<SessionKey>,
    /// All that there have ever been, and the QoS that they asked for.
    ever: BTreeMap<SessionKey, BTreeSet<u8>>,
    /// Messages before this one may be lost: there was nobody left who could have had them.
    excused_before: u64,
}

enum Will {
    /// Its client is connected.
    Held,
    /// It is to be published then.
    Due(Instant),
    Published,
    Cancelled,
}

impl Ledger {
    pub fn subscribed(&mut self, session: SessionKey, name: Name, qos: u8) {
        let promise = self.sessions.entry(session).or_default();
        promise.subscriptions.insert(name, qos);
        if name.0.is_some() {
            let group = self.groups.entry(name).or_default();
            group.members.insert(session);
            group.ever.entry(session).or_default().insert(qos);
        }
    }

    pub fn unsubscribed(&mut self, session: SessionKey, name: Name) {
        let promise = self.sessions.entry(session).or_default();
        promise.subscriptions.remove(&name);
        if name.0.is_some() {
            self.left(session, name);
        }
    }

    fn left(&mut self, session: SessionKey, name: Name) {
        let group = self.groups.entry(name).or_default();
        group.members.remove(&session);
        if group.members.is_empty() {
            group.excused_before = self.taken + 1;
        }
    }

    /// Nothing of the session is kept.
    pub fn ended(&mut self, session: SessionKey) {
        let promise = self.sessions.entry(session).or_default();
        promise.is_over = true;
        for name in std::mem::take(&mut promise.subscriptions).into_keys() {
            if name.0.is_some() {
                self.left(session, name);
            }
        }
        // What it had in flight at QoS 2 nobody else may have, and neither what it was to pass on
        // when nobody was left.
        for group in self.groups.values_mut() {
            let may_have_begun = group
                .ever
                .get(&session)
                .is_some_and(|asked| asked.contains(&2));
            if may_have_begun || group.ever.contains_key(&session) && group.members.is_empty() {
                group.excused_before = self.taken + 1;
            }
        }
    }

    /// The broker has taken a message from a client, or a will.
    pub fn published(&mut self, number: Number, topic: &'static str, qos: u8) {
        self.taken += 1;
        let order = self.taken;
        let sent = self.messages.entry(number).or_insert(Sent {
            topic,
            qos,
            times: 0,
            order,
            direct: BTreeMap::new(),
            groups: BTreeSet::new(),
        });
        sent.times += 1;
        assert!(
            qos < 2 || sent.times == 1,
            "message {number} of QoS 2 was taken twice"
        );
        for (session, promise) in &self.sessions {
            let matching = promise
                .subscriptions
                .iter()
                .filter(|((group, filter), _)| group.is_none() && matches(filter, topic));
            if let Some(wanted) = matching.map(|(_, qos)| *qos).max() {
                let direct = sent.direct.entry(*session).or_default();
                direct.insert(wanted.min(qos));
            }
        }
        for (name, group) in &self.groups {
            if !group.members.is_empty() && matches(name.1, topic) {
                sent.groups.insert(*name);
            }
        }
    }

    /// A message has reached a client. `is_again`: marked as one that was perhaps sent before.
    pub fn received(
        &mut self,
        session: SessionKey,
        number: Number,
        topic: &str,
        qos: u8,
        is_again: bool,
    ) {
        let sent = self.messages.get(&number);
        let sent = sent.unwrap_or_else(|| panic!("message {number} was never published"));
        assert_eq!(topic, sent.topic, "the topic of message {number}");
        let direct = sent.direct.get(&session);
        let through_groups: Vec<_> = sent
            .groups
            .iter()
            .filter_map(|name| self.groups[name].ever.get(&session))
            .collect();
        let asked = through_groups.iter().flat_map(|asked| asked.iter());
        let mut allowed: BTreeSet<u8> = asked.map(|asked| (*asked).min(sent.qos)).collect();
        allowed.extend(direct.into_iter().flatten());
        assert!(
            allowed.contains(&qos),
            "message {number} on {topic} came at QoS {qos} to session {session}, which may have it \
             at {allowed:?}"
        );
        let promise = self.sessions.entry(session).or_default();
        let is_new = !promise.seen.contains_key(&number);
        let seen = promise.seen.entry(number).or_default();
        if !is_again {
            seen.copies += 1;
        }
        let most = sent.times * (usize::from(direct.is_some()) + through_groups.len()) as u32;
        assert!(
            seen.copies <= most,
            "message {number} came {} times to session {session}, which may have it {most} times",
            seen.copies
        );
        // Members of a group get from others what these leave, in whatever order. A message that its
        // publisher sent again may come in its first place or in its last.
        if is_new && through_groups.is_empty() && sent.times == 1 {
            let last = promise.last.entry((sent.topic, qos)).or_default();
            assert!(
                *last < sent.order,
                "message {number} on {topic} of QoS {qos} came to session {session} after a later one"
            );
            *last = sent.order;
        }
    }

    pub fn will_held(&mut self, number: Number) {
        self.wills.insert(number, Will::Held);
    }

    pub fn will_due(&mut self, number: Number, when: Instant) {
        self.wills.insert(number, Will::Due(when));
    }

    pub fn will_cancelled(&mut self, number: Number) {
        if !matches!(self.wills.get(&number), Some(Will::Published)) {
            self.wills.insert(number, Will::Cancelled);
        }
    }

    /// The broker has published a will.
    pub fn will_published(&mut self, number: Number, now: Instant) {
        match self.wills.insert(number, Will::Published) {
            Some(Will::Due(when)) => assert!(when <= now, "will {number} came early"),
            Some(Will::Held) => panic!("will {number} came, but its client is connected"),
            Some(Will::Published) => panic!("will {number} came twice"),
            Some(Will::Cancelled) => panic!("will {number} came, but its client has said goodbye"),
            None => panic!("nobody has left a will {number}"),
        }
    }

    /// No will is late.
    pub fn check_wills(&self, now: Instant) {
        for (number, will) in &self.wills {
            if let Will::Due(when) = will {
                assert!(*when > now, "will {number} has not come");
            }
        }
    }

    /// Everything that was promised has come. Only true when all clients are connected and all is
    /// sent and acknowledged.
    pub fn check_complete(&self) {
        for (number, sent) in &self.messages {
            for (session, allowed) in &sent.direct {
                let promise = &self.sessions[session];
                let has_come = promise.seen.contains_key(number);
                assert!(
                    has_come || allowed.contains(&0) || promise.is_over,
                    "message {number} of QoS {allowed:?} has not come to session {session}"
                );
            }
            for name in &sent.groups {
                let group = &self.groups[name];
                let mut members = group.ever.keys();
                let has_come =
                    members.any(|member| self.sessions[member].seen.contains_key(number));
                let is_promised = group
                    .ever
                    .values()
                    .flatten()
                    .all(|asked| (*asked).min(sent.qos) > 0);
                assert!(
                    has_come || !is_promised || sent.order < group.excused_before,
                    "message {number} of QoS {} has not come to anybody in {name:?}",
                    sent.qos
                );
            }
        }
    }
}

/// MQTT 5.0, 4.7, for topics that don't begin with $.
fn matches(filter: &str, topic: &str) -> bool {
    let mut levels = topic.split('/');
    for wanted in filter.split('/') {
        match (wanted, levels.next()) {
            ("#", _) => return true,
            ("+", Some(_)) => {}
            (wanted, Some(level)) if wanted == level => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}
