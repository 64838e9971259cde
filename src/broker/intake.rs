//! One producer's way in: to the subscribers, to the apps, into the journal. For the connections of
//! MQTT clients, and for other edges.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use rumqttd::protocol::{PublishProperties, QoS};

use super::Shared;
use super::fanout::Publisher;
use super::mailbox::Mailbox;
use super::message::Message;
use crate::event::via::{VIA, is_done};
use crate::event::{Event, Topic, unix_time_ns};
use crate::journal::{Journal, Origin, Receipt, Records};
use crate::pipeline::{Claim, Claims, DedupKey, Pressure, Tap, Treatment};

/// Collects messages and hands them over in one go. Whoever publishes hears that a message was taken
/// when [`Intake::settled`] has come back.
pub struct Intake {
    shared: Arc<Shared>,
    publisher: Publisher,
    tap: Tap,
    /// What of the last read the journal is to have, and the receipt that its events carry.
    records: Records,
    receipt: Option<Receipt>,
    /// The keys of those among them whose duplicates are looked for.
    claims: Option<Claims>,
    /// The last read had a duplicate of something that may still be on its way to the journal.
    owes_barrier: bool,
    /// The pipeline had no room for the events of the last read.
    pipeline_full: bool,
    /// What is to be on disk before anything is acknowledged.
    sync: Option<Sync>,
    /// Subscribers that are behind with what was published here: no more is to be read while one of
    /// them catches up.
    pub(super) behind: Vec<Arc<Mailbox>>,
}

/// Ends when what was asked for is on disk.
type Sync = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Intake {
    pub(super) fn new(shared: Arc<Shared>) -> Intake {
        Intake {
            publisher: Publisher::new(shared.fanout.clone()),
            tap: shared.pipeline.tap(),
            shared,
            records: Records::default(),
            receipt: None,
            claims: None,
            owes_barrier: false,
            pipeline_full: false,
            sync: None,
            behind: Vec::new(),
        }
    }

    /// How events on `topic` are treated.
    pub fn treatment(&mut self, topic: &Topic) -> Treatment {
        self.tap.treatment(topic)
    }

    pub fn pressure(&self) -> Pressure {
        self.tap.pressure()
    }

    /// Collects an event that its producer wants to be sure of. `id` makes the key that tells it from
    /// others, where its rule goes by ids.
    pub fn publish_event(
        &mut self,
        topic: Topic,
        payload: Bytes,
        treatment: Treatment,
        id: impl FnOnce(&Topic) -> Option<DedupKey>,
        now: Instant,
    ) {
        let key = match treatment.dedup {
            true => self
                .tap
                .dedup_key(treatment, &topic, &payload, |_| id(&topic)),
            false => None,
        };
        let message = Message {
            qos: QoS::AtLeastOnce,
            ..Message::new(topic, payload)
        };
        self.publish(message, treatment, key, None, now);
    }

    /// Collects an event that came by a link: it is on disk when it is settled, and `key` tells it from others,
    /// whatever the rules say of its topic.
    pub fn publish_linked(
        &mut self,
        topic: Topic,
        payload: Bytes,
        key: DedupKey,
        origin: Origin<'_>,
        now: Instant,
    ) {
        let mut treatment = self.tap.treatment(&topic);
        treatment.durable = true;
        // Whoever hands it on is to know it, too.
        let via = (!origin.via.is_empty()).then(|| PublishProperties {
            user_properties: vec![(VIA.to_owned(), origin.via.to_owned())],
            ..PublishProperties::default()
        });
        let message = Message {
            qos: QoS::AtLeastOnce,
            properties: via.map(Box::new),
            ..Message::new(topic, payload)
        };
        self.publish(message, treatment, Some(key), origin.link, now);
    }

    /// Collects an MQTT message.
    pub(super) fn publish_message(&mut self, message: Message, now: Instant) {
        if let Some(via) = message.user_property(VIA)
            && let Some(gateway) = self.shared.gateway.get()
            && is_done(via, gateway)
        {
            // It has been here, and is on a way that leads in a circle.
            return;
        }
        let treatment = self.tap.treatment(&message.topic);
        let key = match treatment.dedup {
            true => self
                .tap
                .dedup_key(treatment, &message.topic, &message.payload, |property| {
                    let id = message.user_property(property)?;
                    Some(DedupKey::of_id(&message.topic, id.as_bytes()))
                }),
            false => None,
        };
        self.publish(message, treatment, key, None, now);
    }

    /// Collects a message for everyone who is to get it.
    fn publish(
        &mut self,
        message: Message,
        treatment: Treatment,
        key: Option<DedupKey>,
        link: Option<u32>,
        now: Instant,
    ) {
        let topic = message.topic.clone();
        let timestamp_ns = match treatment.wanted || treatment.durable {
            true => unix_time_ns(),
            false => 0,
        };
        let journal = self.shared.journal.as_ref().filter(|_| treatment.durable);
        // What nobody wants has not been taken in: somebody may want the next one.
        let key = key.filter(|_| treatment.wanted || journal.is_some());
        let claim = key.map(|key| self.tap.dedup().claim(key, journal.is_none(), now));
        let is_duplicate = match (claim, key, &self.claims) {
            (Some(Claim::Duplicate), ..) => true,
            // It waits here for the same write, and both are acknowledged after that.
            (Some(Claim::InFlight), Some(key), Some(claims)) => claims.contains(key),
            _ => false,
        };
        let mut receipt = None;
        if let Some(journal) = journal {
            if is_duplicate {
                // What it repeats may still be on its way to the disk.
                self.owes_barrier |= message.qos != QoS::AtMostOnce;
            } else {
                let id = key.map(|key| key.0);
                let via = message.user_property(VIA).unwrap_or("");
                let origin = Some(Origin { link, via });
                self.records
                    .push(&topic, &message.payload, timestamp_ns, id, origin);
                if let Some(key) = key
                    && claim == Some(Claim::New)
                {
                    let claims = || Claims::new(self.tap.dedup().clone());
                    self.claims.get_or_insert_with(claims).push(key);
                }
                let journaled = self.receipt.get_or_insert_with(|| journal.receipt());
                receipt = Some(journaled.hold());
            }
        }
        let takes = treatment.wanted && !is_duplicate;
        let message_bytes = message.payload.len();
        // Sharing a payload costs an allocation, so it is only done for more than one taker.
        let mut payload = Bytes::new();
        let mut message = Some(message);
        self.publisher.add(&topic, message_bytes, || {
            let message = message.take().expect("called at most once");
            if takes {
                payload = message.payload.clone();
            }
            message
        });
        if is_duplicate {
            self.tap.count_duplicate(&topic, treatment);
        } else if takes {
            let payload = message.map_or(payload, |message| message.payload);
            let event = Event {
                receipt,
                ..Event::at(topic, payload, now, timestamp_ns)
            };
            self.tap.add(event, treatment);
        } else {
            self.tap.count_filtered(&topic, treatment);
        }
    }

    /// Hands over what was collected. `owes_sync`: something else is on its way to the archive, and is to
    /// be there before anything is acknowledged.
    pub(super) fn flush(&mut self, owes_sync: bool, now: Instant) {
        let flushed = self.publisher.flush(now);
        self.behind.extend(flushed.pressed);
        let owes_sync = owes_sync || flushed.stored;
        let archive = self.shared.mailboxes.archive.as_ref().filter(|archive| {
            owes_sync && (self.shared.config.durable_acks || archive.is_pressed())
        });
        let journaled = self.receipt.take().zip(self.shared.journal.as_ref());
        let journaled = journaled.map(|(receipt, journal)| {
            let records = std::mem::take(&mut self.records);
            let claims = self.claims.take();
            journal.append(records, receipt, || {
                claims.into_iter().for_each(Claims::keep);
            })
        });
        let owes_barrier = std::mem::take(&mut self.owes_barrier) && journaled.is_none();
        let barrier = self.shared.journal.as_ref().filter(|_| owes_barrier);
        let barrier = barrier.map(Journal::barrier);
        if archive.is_some() || journaled.is_some() || barrier.is_some() {
            let archive = archive.cloned();
            // One read may flush more than once.
            let before = self.sync.take();
            // What can't be written is logged and counted there, and is tried again.
            self.sync = Some(Box::pin(async move {
                if let Some(before) = before {
                    before.await;
                }
                if let Some(on_disk) = journaled
                    && !on_disk.await
                {
                    // It never will be, so it is never acknowledged.
                    std::future::pending::<()>().await;
                }
                if let Some(barrier) = barrier
                    && !barrier.await
                {
                    std::future::pending::<()>().await;
                }
                if let Some(archive) = archive {
                    drop(archive.synced().await);
                }
            }));
        }
        self.pipeline_full = !self.tap.flush();
    }

    /// Hands over the events that were collected.
    pub fn flush_events(&mut self, now: Instant) {
        self.flush(false, now);
    }

    /// Whether the pipeline has all that was handed over, and what is to be on disk is there.
    pub fn is_settled(&self) -> bool {
        !self.pipeline_full && self.sync.is_none()
    }

    /// Waits for that. May be dropped at any time.
    pub async fn settled(&mut self) {
        self.in_pipeline().await;
        if let Some(sync) = &mut self.sync {
            sync.await;
            self.sync = None;
        }
    }

    /// Waits until the pipeline has all that was collected. May be dropped at any time.
    pub async fn in_pipeline(&mut self) {
        self.pipeline_full = !self.tap.flush();
        while self.pipeline_full {
            self.tap.room().await;
            self.pipeline_full = !self.tap.flush();
        }
    }

    /// Whether a subscriber of the last topics has to catch up before more is read. `own` is not waited
    /// for.
    pub(super) fn has_to_wait(&mut self, own: Option<&Arc<Mailbox>>) -> bool {
        if self.shared.mailboxes.pressed.load(Ordering::Relaxed) > 0 {
            self.publisher.find_pressed(&mut self.behind);
        }
        self.behind.retain(|mailbox| {
            mailbox.is_pressed() && own.is_none_or(|own| !Arc::ptr_eq(mailbox, own))
        });
        !self.behind.is_empty()
    }

    /// Waits until all subscribers of the last topics have caught up, or are waited for no longer. May
    /// be dropped at any time.
    pub async fn eased(&mut self) {
        while self.has_to_wait(None) {
            self.behind[0].eased().await;
        }
    }
}
