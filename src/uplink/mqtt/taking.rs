//! Takes commands from a broker: each becomes an event here, once it is on disk it is acknowledged.
//!
//! A broker sends again what was not acknowledged when a connection ended. Of a gateway, an event has an id, by which
//! a second copy of it is known. Of others, a message only has a packet identifier, which the broker gives to another
//! message as soon as it has the acknowledgement: so a copy is known by it only while no acknowledgement was sent, and
//! not after a restart. What may have been acknowledged is taken twice, rather than a command be lost that looks like another one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    Filter, Publish, RetainForwardRule, SubAck, Subscribe, SubscribeReasonCode,
};
use rustc_hash::FxHashMap;

use super::HEADGATE_ID;
use crate::broker::{Door, Intake};
use crate::event::Topic;
use crate::event::via::{VIA, is_done};
use crate::journal::Origin;
use crate::pipeline::DedupKey;
use crate::uplink::links::{Link, Source, Start, Take};
use crate::uplink::progress::TakeProgress;

/// All that one link takes.
pub(super) struct Taking {
    takes: Vec<(Take, Arc<TakeProgress>)>,
    link: Arc<Link>,
    gateway: Arc<str>,
    intake: Intake,
    /// What is to be acknowledged when all is on disk that was handed in.
    owed: Vec<u16>,
    /// By what they were handed in, of those that were not acknowledged yet.
    keys: FxHashMap<u16, DedupKey>,
    /// Which filter of which take is the next to be answered by the broker.
    asked: Vec<usize>,
    /// The broker takes no subscription to some of them.
    is_refused: bool,
    /// The broker has had a session.
    had_session: bool,
}

impl Taking {
    pub(super) fn new(
        takes: Vec<(Take, Arc<TakeProgress>)>,
        link: Arc<Link>,
        gateway: Arc<str>,
        door: &Door,
    ) -> Taking {
        Taking {
            takes,
            link,
            gateway,
            intake: door.intake(),
            owed: Vec::new(),
            keys: FxHashMap::default(),
            asked: Vec::new(),
            is_refused: false,
            had_session: false,
        }
    }

    /// A new connection: the broker sends again what was not acknowledged, if it still knows the session. What to
    /// subscribe to; nothing if nothing is taken.
    pub(super) fn begin(&mut self, session_present: bool) -> Option<Subscribe> {
        self.owed.clear();
        if !session_present {
            self.keys.clear();
            if self.had_session && !self.takes.is_empty() {
                tracing::warn!(
                    link = self.link.name,
                    "the broker has forgotten the session, and with it what was sent while the link was down: make \
                     session_expiry_s of the link longer, or look at what the broker allows"
                );
            }
        }
        self.had_session = true;
        self.subscribe()
    }

    /// To be asked for now and then: what was refused may be allowed by now.
    pub(super) fn subscribe_again(&mut self) -> Option<Subscribe> {
        match self.is_refused {
            true => self.subscribe(),
            false => None,
        }
    }

    fn subscribe(&mut self) -> Option<Subscribe> {
        self.is_refused = false;
        self.asked.clear();
        let mut wanted = Vec::new();
        for (index, (take, _)) in self.takes.iter().enumerate() {
            let Source::Topics { filters, .. } = &take.from else {
                unreachable!("its link says so");
            };
            for filter in filters {
                self.asked.push(index);
                wanted.push(Filter {
                    path: filter.as_str().to_owned(),
                    qos: QoS::AtLeastOnce,
                    nolocal: true,
                    preserve_retain: false,
                    retain_forward_rule: match take.start {
                        Start::New => RetainForwardRule::Never,
                        Start::Oldest => RetainForwardRule::OnNewSubscribe,
                    },
                });
            }
        }
        (!wanted.is_empty()).then(|| Subscribe::new_many(wanted, None))
    }

    pub(super) fn subscribed(&mut self, answer: &SubAck) {
        let mut troubles = vec![None; self.takes.len()];
        for (&index, code) in self.asked.iter().zip(&answer.return_codes) {
            match code {
                SubscribeReasonCode::Success(QoS::AtMostOnce) => {
                    troubles[index] = Some(
                        "the broker sends these topics without acknowledgement, so commands may get lost".to_owned(),
                    );
                }
                SubscribeReasonCode::Success(_) => {}
                code => {
                    self.is_refused = true;
                    troubles[index] = Some(format!(
                        "the broker refuses a subscription: {code:?}; look at topics of [[link.take]], and at what the \
                         broker allows to this client"
                    ));
                }
            }
        }
        for ((_, progress), trouble) in self.takes.iter().zip(troubles) {
            match trouble {
                Some(why) => progress.failed(&self.link.name, &why),
                None => progress.went_well(),
            }
        }
    }

    /// Hands a message in. To be followed by [`Taking::flush`].
    pub(super) fn take_in(&mut self, message: Publish, now: Instant) {
        let id = message.pkid;
        if id != 0 {
            self.owed.push(id);
        }
        let properties = message.properties.as_ref();
        let property = |name: &str| {
            let mut all = properties.iter().flat_map(|all| &all.user_properties);
            all.find(|(key, _)| key == name)
                .map(|(_, value)| value.as_str())
        };
        let via = property(VIA).unwrap_or_default();
        if is_done(via, &self.gateway) {
            return;
        }
        let Ok(topic) = Topic::new(message.topic.clone()) else {
            tracing::warn!(link = self.link.name, topic = ?message.topic, "a message without a topic is left out");
            return;
        };
        let found = self.takes.iter().find_map(|(take, progress)| {
            let Source::Topics { filters, prefixes } = &take.from else {
                unreachable!("its link says so");
            };
            let mut filters = filters.iter();
            let takes = filters.any(|filter| filter.matches(topic.as_str()));
            takes.then_some((prefixes, progress))
        });
        let Some((prefixes, progress)) = found else {
            // The broker keeps a subscription that is in the file no more.
            tracing::warn!(
                link = self.link.name,
                topic = topic.as_str(),
                "nothing takes this topic: it is left out"
            );
            return;
        };
        let Ok(here) = Topic::new(prefixes.apply(topic.as_str())) else {
            progress.refused.fetch_add(1, Ordering::Relaxed);
            let why = format!(
                "topic {:?} makes no topic here with its prefixes, so the message is left out",
                topic.as_str()
            );
            progress.failed(&self.link.name, &why);
            return;
        };
        let key = match property(HEADGATE_ID) {
            Some(id) => DedupKey::of_id(&here, id.as_bytes()),
            None => match self.keys.get(&id) {
                Some(key) if message.dup => *key,
                _ => DedupKey(fastrand::u128(..).to_le_bytes()),
            },
        };
        if id != 0 {
            self.keys.insert(id, key);
        }
        progress.events.fetch_add(1, Ordering::Relaxed);
        // Not a piece of what was read at once: it may be kept for long.
        let payload = Bytes::copy_from_slice(&message.payload);
        progress
            .bytes
            .fetch_add(payload.len() as u64, Ordering::Relaxed);
        let origin = Origin {
            link: Some(self.link.origin()),
            via,
        };
        self.intake.publish_linked(here, payload, key, origin, now);
    }

    pub(super) fn flush(&mut self, now: Instant) {
        self.intake.flush_events(now);
    }

    /// Whether something is to be acknowledged.
    pub(super) fn owes(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Waits until it may be. May be dropped at any time.
    pub(super) async fn settled(&mut self) {
        self.intake.settled().await;
        self.intake.eased().await;
    }

    /// What may be acknowledged now.
    pub(super) fn acknowledge(&mut self) -> Vec<u16> {
        for id in &self.owed {
            self.keys.remove(id);
        }
        std::mem::take(&mut self.owed)
    }
}
