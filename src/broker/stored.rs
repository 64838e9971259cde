//! Sessions, messages and dead letters as they stand in the store.
//!
//! A record is one byte with the version of its layout, four with the CRC-32 of the rest, and the
//! rest in postcard's encoding. The checksum is there because LMDB has none: a card that goes bad
//! must not put made-up messages into a plant.
//!
//! In memory, times are [`Instant`]s, which mean nothing to another process. Stored is when by the
//! wall clock, and how long it was until then. The second bounds the first: a clock that jumped back
//! meanwhile makes nothing live longer than it had left.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rumqttd::protocol::{PublishProperties, QoS};
use serde::{Deserialize, Serialize, Serializer};

use super::codec::Version;
use super::message::{Delivery, Message, SessionKey};
use crate::dead_letters::{DeadLetter, Reason};
use crate::event::{Topic, TopicError};

/// Counts up when an older Headgate could not read the layout.
const LAYOUT: u8 = 1;

/// Layout and checksum.
const HEADER_BYTES: usize = 5;

/// One moment on both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    pub now: Instant,
    pub unix_ms: u64,
}

impl Clock {
    pub fn read() -> Clock {
        Clock {
            now: Instant::now(),
            unix_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_millis() as u64),
        }
    }
}

/// All that is kept of a session but what is queued for it.
#[derive(Clone, Debug)]
pub struct SessionRecord {
    /// Never used again for another session, also after a restart.
    pub number: u64,
    pub version: Version,
    /// None while the client is connected.
    pub expires: Option<Instant>,
    pub session_expiry: Duration,
    pub user: Option<String>,
    pub subscriptions: Vec<StoredSubscription>,
    /// Packet ids of QoS 2 messages that the client has sent and not released.
    pub unreleased: Vec<u16>,
    /// In the order of sending.
    pub inflight: Vec<(u16, StoredInflight)>,
    pub last_packet_id: u16,
    /// Of what is queued next.
    pub next_sequence: u64,
    pub will: Option<StoredWill>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSubscription {
    /// As the client wrote it, with the name of a shared subscription's group.
    pub filter: String,
    pub qos: QoS,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub id: Option<u32>,
}

/// A QoS 1 or 2 message that the client has not acknowledged in full.
#[derive(Clone, Debug)]
pub enum StoredInflight {
    Published(Delivery),
    Released,
}

/// A will that waits for its delay to pass.
#[derive(Clone, Debug)]
pub struct StoredWill {
    pub message: Arc<Message>,
    /// Life of the message from its publication on.
    pub life: Option<Duration>,
    pub due: Instant,
}

impl SessionRecord {
    /// When the session is over, if its client does not come back: for one that was connected when
    /// the gateway went down, the time counts from `now` on.
    pub fn expires_at(&self, now: Instant) -> Instant {
        self.expires
            .or_else(|| now.checked_add(self.session_expiry))
            .unwrap_or_else(|| far_future(now))
    }
}

/// An instant can't lie as far ahead as a number of milliseconds can.
fn far_future(now: Instant) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 86_400);
    now + CENTURY
}

/// Why a record can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("it is cut short")]
    Short,
    #[error("its layout is version {0}, and this Headgate knows version {LAYOUT}")]
    Layout(u8),
    #[error("its checksum is wrong")]
    Checksum,
    #[error("its content makes no sense: {0}")]
    Content(#[from] postcard::Error),
    #[error("it has a wrong topic: {0}")]
    Topic(#[from] TopicError),
    #[error("it has a QoS of {0}")]
    QoS(u8),
    #[error("it has an MQTT version of {0}")]
    Version(u8),
}

/// Puts the record for `value` in the place of what is in `record`.
pub fn seal(value: &impl Serialize, record: &mut Vec<u8>) {
    record.clear();
    record.push(LAYOUT);
    record.extend([0; HEADER_BYTES - 1]);
    *record = postcard::to_extend(value, std::mem::take(record))
        .expect("plain data always has an encoding, and memory has room for it");
    let checksum = crc32fast::hash(&record[HEADER_BYTES..]);
    record[1..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

/// What [`seal`] was given.
pub fn unseal<'a, T: Deserialize<'a>>(record: &'a [u8]) -> Result<T, Unreadable> {
    let (header, content) = record
        .split_at_checked(HEADER_BYTES)
        .ok_or(Unreadable::Short)?;
    if header[0] != LAYOUT {
        return Err(Unreadable::Layout(header[0]));
    }
    if header[1..] != crc32fast::hash(content).to_le_bytes() {
        return Err(Unreadable::Checksum);
    }
    Ok(postcard::from_bytes(content)?)
}

pub fn encode_session(session: &SessionRecord, clock: Clock, record: &mut Vec<u8>) {
    seal(&SessionOnDisk::new(session, clock), record);
}

pub fn decode_session(record: &[u8], clock: Clock) -> Result<SessionRecord, Unreadable> {
    unseal::<SessionOnDisk>(record)?.into_session(clock)
}

pub fn encode_delivery(delivery: &Delivery, clock: Clock, record: &mut Vec<u8>) {
    seal(&DeliveryOnDisk::new(delivery, clock), record);
}

/// A message that has expired meanwhile comes back with an `expires` that is not in the future:
/// whether it is sent all the same is for the session to say.
pub fn decode_delivery(record: &[u8], clock: Clock) -> Result<Delivery, Unreadable> {
    unseal::<DeliveryOnDisk>(record)?.into_delivery(clock)
}

pub fn encode_message(message: &Message, clock: Clock, record: &mut Vec<u8>) {
    seal(&MessageOnDisk::new(message, clock), record);
}

/// As with [`decode_delivery`] for one that has expired.
pub fn decode_message(record: &[u8], clock: Clock) -> Result<Message, Unreadable> {
    unseal::<MessageOnDisk>(record)?.into_message(clock)
}

pub fn encode_dead_letter(letter: &DeadLetter, record: &mut Vec<u8>) {
    seal(
        &DeadLetterOnDisk {
            time_ms: letter.time_ms,
            reason: letter.reason,
            source: &letter.source,
            topic: letter.topic.as_str(),
            qos: letter.qos,
            payload_bytes: letter.payload_bytes,
            payload: &letter.payload,
            error: letter.error.as_deref(),
        },
        record,
    );
}

pub fn decode_dead_letter(record: &[u8]) -> Result<DeadLetter, Unreadable> {
    let stored: DeadLetterOnDisk = unseal(record)?;
    Ok(DeadLetter {
        time_ms: stored.time_ms,
        reason: stored.reason,
        source: stored.source.to_owned(),
        topic: Topic::new(Bytes::copy_from_slice(stored.topic.as_bytes()))?,
        qos: stored.qos,
        payload_bytes: stored.payload_bytes,
        payload: Bytes::copy_from_slice(stored.payload),
        error: stored.error.map(str::to_owned),
    })
}

/// At most so many bytes is the record of a delivery, near enough for a limit.
pub fn delivery_bytes(delivery: &Delivery) -> usize {
    /// Numbers, lengths and flags at their longest.
    const FIXED: usize = 80;
    let message = &delivery.message;
    let properties = message.properties.as_ref().map_or(0, |properties| {
        let user = properties.user_properties.iter();
        user.map(|(key, value)| key.len() + value.len() + 6)
            .sum::<usize>()
            + properties.response_topic.as_ref().map_or(0, String::len)
            + properties.correlation_data.as_ref().map_or(0, Bytes::len)
            + properties.content_type.as_ref().map_or(0, String::len)
    });
    let ids = delivery.subscription_ids.as_ref();
    FIXED
        + message.topic.as_str().len()
        + message.payload.len()
        + properties
        + ids.map_or(0, |ids| 5 * ids.len())
}

#[derive(Serialize, Deserialize)]
struct Deadline {
    unix_ms: u64,
    left_ms: u64,
}

impl Deadline {
    fn new(at: Instant, clock: Clock) -> Deadline {
        let left_ms = at.saturating_duration_since(clock.now).as_millis() as u64;
        Deadline {
            unix_ms: clock.unix_ms.saturating_add(left_ms),
            left_ms,
        }
    }

    /// Not before now: an instant can't lie before the machine's start.
    fn at(&self, clock: Clock) -> Instant {
        let left = self.unix_ms.saturating_sub(clock.unix_ms).min(self.left_ms);
        clock
            .now
            .checked_add(Duration::from_millis(left))
            .unwrap_or_else(|| far_future(clock.now))
    }
}

#[derive(Serialize, Deserialize)]
struct MessageOnDisk<'a> {
    topic: &'a str,
    #[serde(serialize_with = "as_bytes")]
    payload: &'a [u8],
    qos: u8,
    retain: bool,
    publisher: SessionKey,
    #[serde(borrow)]
    properties: Option<PropertiesOnDisk<'a>>,
    expires: Option<Deadline>,
}

/// Without what [`Message::properties`] never has.
#[derive(Serialize, Deserialize)]
struct PropertiesOnDisk<'a> {
    payload_format_indicator: Option<u8>,
    response_topic: Option<&'a str>,
    #[serde(borrow)]
    correlation_data: Option<&'a [u8]>,
    #[serde(borrow)]
    user_properties: Vec<(&'a str, &'a str)>,
    content_type: Option<&'a str>,
}

#[derive(Serialize, Deserialize)]
struct DeliveryOnDisk<'a> {
    #[serde(borrow)]
    message: MessageOnDisk<'a>,
    qos: u8,
    retain: bool,
    subscription_ids: Option<Vec<u32>>,
}

#[derive(Serialize, Deserialize)]
struct SessionOnDisk<'a> {
    number: u64,
    version: u8,
    expires: Option<Deadline>,
    session_expiry_s: u64,
    user: Option<&'a str>,
    #[serde(borrow)]
    subscriptions: Vec<SubscriptionOnDisk<'a>>,
    unreleased: Vec<u16>,
    #[serde(borrow)]
    inflight: Vec<(u16, InflightOnDisk<'a>)>,
    last_packet_id: u16,
    next_sequence: u64,
    #[serde(borrow)]
    will: Option<WillOnDisk<'a>>,
}

#[derive(Serialize, Deserialize)]
struct SubscriptionOnDisk<'a> {
    filter: &'a str,
    qos: u8,
    no_local: bool,
    retain_as_published: bool,
    id: Option<u32>,
}

#[derive(Serialize, Deserialize)]
enum InflightOnDisk<'a> {
    #[serde(borrow)]
    Published(DeliveryOnDisk<'a>),
    Released,
}

#[derive(Serialize, Deserialize)]
struct WillOnDisk<'a> {
    #[serde(borrow)]
    message: MessageOnDisk<'a>,
    life_s: Option<u64>,
    due: Deadline,
}

#[derive(Serialize, Deserialize)]
struct DeadLetterOnDisk<'a> {
    time_ms: u64,
    /// By its place in the enum: new ones come last.
    reason: Reason,
    source: &'a str,
    topic: &'a str,
    qos: u8,
    payload_bytes: u64,
    #[serde(serialize_with = "as_bytes")]
    payload: &'a [u8],
    error: Option<&'a str>,
}

/// In one go, where serde by itself writes a slice number by number. The encoding is the same.
fn as_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

fn qos(number: u8) -> Result<QoS, Unreadable> {
    rumqttd::protocol::qos(number).ok_or(Unreadable::QoS(number))
}

impl<'a> MessageOnDisk<'a> {
    fn new(message: &'a Message, clock: Clock) -> Self {
        MessageOnDisk {
            topic: message.topic.as_str(),
            payload: &message.payload,
            qos: message.qos as u8,
            retain: message.retain,
            publisher: message.publisher,
            properties: message.properties.as_deref().map(PropertiesOnDisk::new),
            expires: message.expires.map(|at| Deadline::new(at, clock)),
        }
    }

    fn into_message(self, clock: Clock) -> Result<Message, Unreadable> {
        Ok(Message {
            topic: Topic::new(Bytes::copy_from_slice(self.topic.as_bytes()))?,
            payload: Bytes::copy_from_slice(self.payload),
            qos: qos(self.qos)?,
            retain: self.retain,
            publisher: self.publisher,
            properties: self
                .properties
                .map(|properties| Box::new(properties.into_properties())),
            expires: self.expires.map(|expires| expires.at(clock)),
        })
    }
}

impl<'a> PropertiesOnDisk<'a> {
    fn new(properties: &'a PublishProperties) -> Self {
        PropertiesOnDisk {
            payload_format_indicator: properties.payload_format_indicator,
            response_topic: properties.response_topic.as_deref(),
            correlation_data: properties.correlation_data.as_deref(),
            user_properties: properties
                .user_properties
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()))
                .collect(),
            content_type: properties.content_type.as_deref(),
        }
    }

    fn into_properties(self) -> PublishProperties {
        let owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        PublishProperties {
            payload_format_indicator: self.payload_format_indicator,
            response_topic: self.response_topic.map(str::to_owned),
            correlation_data: self.correlation_data.map(Bytes::copy_from_slice),
            user_properties: self.user_properties.into_iter().map(owned).collect(),
            content_type: self.content_type.map(str::to_owned),
            ..PublishProperties::default()
        }
    }
}

impl<'a> DeliveryOnDisk<'a> {
    fn new(delivery: &'a Delivery, clock: Clock) -> Self {
        DeliveryOnDisk {
            message: MessageOnDisk::new(&delivery.message, clock),
            qos: delivery.qos as u8,
            retain: delivery.retain,
            subscription_ids: delivery.subscription_ids.as_deref().map(<[u32]>::to_vec),
        }
    }

    fn into_delivery(self, clock: Clock) -> Result<Delivery, Unreadable> {
        Ok(Delivery {
            message: Arc::new(self.message.into_message(clock)?),
            qos: qos(self.qos)?,
            retain: self.retain,
            subscription_ids: self.subscription_ids.map(Arc::from),
            group: None,
            sequence: 0,
            is_stored: false,
        })
    }
}

impl<'a> SessionOnDisk<'a> {
    fn new(session: &'a SessionRecord, clock: Clock) -> Self {
        let subscription = |subscription: &'a StoredSubscription| SubscriptionOnDisk {
            filter: &subscription.filter,
            qos: subscription.qos as u8,
            no_local: subscription.no_local,
            retain_as_published: subscription.retain_as_published,
            id: subscription.id,
        };
        let inflight = |(packet_id, inflight): &'a (u16, StoredInflight)| {
            let inflight = match inflight {
                StoredInflight::Published(delivery) => {
                    InflightOnDisk::Published(DeliveryOnDisk::new(delivery, clock))
                }
                StoredInflight::Released => InflightOnDisk::Released,
            };
            (*packet_id, inflight)
        };
        SessionOnDisk {
            number: session.number,
            version: match session.version {
                Version::V4 => 4,
                Version::V5 => 5,
            },
            expires: session.expires.map(|at| Deadline::new(at, clock)),
            session_expiry_s: session.session_expiry.as_secs(),
            user: session.user.as_deref(),
            subscriptions: session.subscriptions.iter().map(subscription).collect(),
            unreleased: session.unreleased.clone(),
            inflight: session.inflight.iter().map(inflight).collect(),
            last_packet_id: session.last_packet_id,
            next_sequence: session.next_sequence,
            will: session.will.as_ref().map(|will| WillOnDisk {
                message: MessageOnDisk::new(&will.message, clock),
                life_s: will.life.map(|life| life.as_secs()),
                due: Deadline::new(will.due, clock),
            }),
        }
    }

    fn into_session(self, clock: Clock) -> Result<SessionRecord, Unreadable> {
        let subscription = |subscription: SubscriptionOnDisk| {
            Ok(StoredSubscription {
                filter: subscription.filter.to_owned(),
                qos: qos(subscription.qos)?,
                no_local: subscription.no_local,
                retain_as_published: subscription.retain_as_published,
                id: subscription.id,
            })
        };
        let inflight = |(packet_id, inflight)| {
            let inflight = match inflight {
                InflightOnDisk::Published(delivery) => {
                    StoredInflight::Published(delivery.into_delivery(clock)?)
                }
                InflightOnDisk::Released => StoredInflight::Released,
            };
            Ok((packet_id, inflight))
        };
        let will = |will: WillOnDisk| {
            Ok::<_, Unreadable>(StoredWill {
                message: Arc::new(will.message.into_message(clock)?),
                life: will.life_s.map(Duration::from_secs),
                due: will.due.at(clock),
            })
        };
        Ok(SessionRecord {
            number: self.number,
            version: match self.version {
                4 => Version::V4,
                5 => Version::V5,
                other => return Err(Unreadable::Version(other)),
            },
            expires: self.expires.map(|expires| expires.at(clock)),
            session_expiry: Duration::from_secs(self.session_expiry_s),
            user: self.user.map(str::to_owned),
            subscriptions: collect(self.subscriptions, subscription)?,
            unreleased: self.unreleased,
            inflight: collect(self.inflight, inflight)?,
            last_packet_id: self.last_packet_id,
            next_sequence: self.next_sequence,
            will: self.will.map(will).transpose()?,
        })
    }
}

fn collect<A, B>(
    stored: Vec<A>,
    convert: impl FnMut(A) -> Result<B, Unreadable>,
) -> Result<Vec<B>, Unreadable> {
    stored.into_iter().map(convert).collect()
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clock() -> Clock {
        Clock {
            now: Instant::now(),
            unix_ms: 1_763_725_320_000,
        }
    }

    fn any_qos() -> impl Strategy<Value = QoS> {
        prop::sample::select(vec![QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce])
    }

    fn any_properties() -> impl Strategy<Value = PublishProperties> {
        let text = || "[ -~]{0,20}";
        (
            prop::option::of(0..2u8),
            prop::option::of(text()),
            prop::option::of(prop::collection::vec(any::<u8>(), 0..20)),
            prop::collection::vec((text(), text()), 0..4),
            prop::option::of(text()),
        )
            .prop_map(
                |(format, response_topic, correlation, user, content_type)| PublishProperties {
                    payload_format_indicator: format,
                    response_topic,
                    correlation_data: correlation.map(Bytes::from),
                    user_properties: user,
                    content_type,
                    ..PublishProperties::default()
                },
            )
    }

    fn any_message(now: Instant) -> impl Strategy<Value = Message> {
        (
            "[a-zäß/]{1,40}",
            prop::collection::vec(any::<u8>(), 0..300),
            any_qos(),
            any::<bool>(),
            any::<u64>(),
            prop::option::of(any_properties()),
            prop::option::of(0..10_000_000u64),
        )
            .prop_map(
                move |(topic, payload, qos, retain, publisher, properties, left)| Message {
                    topic: Topic::new(topic).unwrap(),
                    payload: payload.into(),
                    qos,
                    retain,
                    publisher,
                    properties: properties.map(Box::new),
                    expires: left.map(|left| now + Duration::from_millis(left)),
                },
            )
    }

    fn any_delivery(now: Instant) -> impl Strategy<Value = Delivery> {
        (
            any_message(now),
            any_qos(),
            any::<bool>(),
            prop::option::of(prop::collection::vec(1..268_435_455u32, 1..4)),
        )
            .prop_map(|(message, qos, retain, ids)| Delivery {
                message: Arc::new(message),
                qos,
                retain,
                subscription_ids: ids.map(Arc::from),
                group: None,
                sequence: 0,
                is_stored: false,
            })
    }

    fn any_session(now: Instant) -> impl Strategy<Value = SessionRecord> {
        let subscription = (
            "[a-z/+]{1,20}",
            any_qos(),
            any::<bool>(),
            any::<bool>(),
            any::<u32>(),
        );
        let inflight = (
            any::<u16>(),
            prop_oneof![
                any_delivery(now).prop_map(StoredInflight::Published),
                Just(StoredInflight::Released)
            ],
        );
        let will = (
            any_message(now),
            prop::option::of(0..1000u64),
            0..1_000_000u64,
        );
        (
            (
                any::<u64>(),
                any::<bool>(),
                prop::option::of(1..1_000_000u64),
                any::<u32>(),
            ),
            prop::option::of("[a-z]{0,10}"),
            prop::collection::vec(subscription, 0..4),
            prop::collection::vec(any::<u16>(), 0..10),
            prop::collection::vec(inflight, 0..4),
            (any::<u16>(), any::<u64>()),
            prop::option::of(will),
        )
            .prop_map(
                move |(fixed, user, subscriptions, unreleased, inflight, numbers, will)| {
                    let subscription =
                        |(filter, qos, no_local, retain_as_published, id)| StoredSubscription {
                            filter,
                            qos,
                            no_local,
                            retain_as_published,
                            id: Some(id),
                        };
                    SessionRecord {
                        number: fixed.0,
                        version: if fixed.1 { Version::V5 } else { Version::V4 },
                        expires: fixed.2.map(|left| now + Duration::from_millis(left)),
                        session_expiry: Duration::from_secs(fixed.3.into()),
                        user,
                        subscriptions: subscriptions.into_iter().map(subscription).collect(),
                        unreleased,
                        inflight,
                        last_packet_id: numbers.0,
                        next_sequence: numbers.1,
                        will: will.map(|(message, life, due)| StoredWill {
                            message: Arc::new(message),
                            life: life.map(Duration::from_secs),
                            due: now + Duration::from_millis(due),
                        }),
                    }
                },
            )
    }

    /// All that a value has, times included: as long as both clocks stand still, these come back
    /// to the millisecond.
    fn text(value: &impl std::fmt::Debug) -> String {
        format!("{value:?}")
    }

    proptest! {
        #[test]
        fn a_delivery_comes_back_as_it_was(
            (clock, delivery) in Just(clock()).prop_flat_map(|clock| {
                (Just(clock), any_delivery(clock.now))
            })
        ) {
            let mut record = vec![1; 3];
            encode_delivery(&delivery, clock, &mut record);
            prop_assert!(record.len() <= delivery_bytes(&delivery));
            prop_assert_eq!(text(&decode_delivery(&record, clock).unwrap()), text(&delivery));
        }

        #[test]
        fn a_session_comes_back_as_it_was(
            (clock, session) in Just(clock()).prop_flat_map(|clock| {
                (Just(clock), any_session(clock.now))
            })
        ) {
            let mut record = Vec::new();
            encode_session(&session, clock, &mut record);
            prop_assert_eq!(text(&decode_session(&record, clock).unwrap()), text(&session));
        }

        #[test]
        fn a_dead_letter_comes_back_as_it_was(
            message in any_message(Instant::now()),
            source in "[a-z]{0,10}",
        ) {
            let (topic, payload) = (&message.topic, &message.payload);
            let mut letter = DeadLetter::new(Reason::AppFailed, &source, topic, payload, 2);
            letter.error = (!source.is_empty()).then(|| source.clone());
            let mut record = Vec::new();
            encode_dead_letter(&letter, &mut record);
            prop_assert_eq!(decode_dead_letter(&record).unwrap(), letter);
        }

        #[test]
        fn a_record_with_a_wrong_bit_is_refused(bit in any::<prop::sample::Index>()) {
            let mut record = Vec::new();
            encode_message(&message("a/b"), clock(), &mut record);
            let bit = bit.index(8 * record.len());
            record[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode_message(&record, clock()).is_err());
        }

        #[test]
        fn rubbish_with_a_right_checksum_is_refused_or_read_but_never_a_panic(
            content in prop::collection::vec(any::<u8>(), 0..100)
        ) {
            let mut record = vec![LAYOUT];
            record.extend(crc32fast::hash(&content).to_le_bytes());
            record.extend(content);
            let _ = decode_session(&record, clock());
            let _ = decode_delivery(&record, clock());
            let _ = decode_message(&record, clock());
            let _ = decode_dead_letter(&record);
        }
    }

    pub fn message(topic: &'static str) -> Message {
        Message::new(Topic::new(topic).unwrap(), Bytes::from_static(b"21.5"))
    }

    fn reread(message: &Message, written: Clock, read: Clock) -> Message {
        let mut record = Vec::new();
        encode_message(message, written, &mut record);
        decode_message(&record, read).unwrap()
    }

    #[test]
    fn records_stay_readable_by_later_versions() {
        let mut record = Vec::new();
        encode_message(&message("a/b"), clock(), &mut record);
        assert_eq!(record, b"\x01\xa5\xfb\xdc\x97\x03a/b\x0421.5\0\0\0\0\0");
    }

    #[test]
    fn a_record_of_a_later_layout_is_told_from_damage() {
        let mut record = Vec::new();
        encode_message(&message("a/b"), clock(), &mut record);
        record[0] = 9;
        assert_eq!(
            decode_message(&record, clock()).unwrap_err(),
            Unreadable::Layout(9)
        );
        assert_eq!(
            decode_message(&record[..4], clock()).unwrap_err(),
            Unreadable::Short
        );
    }

    #[test]
    fn time_passes_while_a_message_is_stored() {
        let written = clock();
        let mut message = message("a");
        message.expires = Some(written.now + Duration::from_secs(60));
        let later = |seconds: u64| Clock {
            now: Instant::now(),
            unix_ms: written.unix_ms + 1000 * seconds,
        };
        let read = later(20);
        let left = reread(&message, written, read).expires_in(read.now);
        assert_eq!(left, Some(40));
        let read = later(61);
        assert!(reread(&message, written, read).is_expired(read.now));
    }

    #[test]
    fn a_clock_that_jumps_back_makes_nothing_live_longer() {
        let written = clock();
        let mut message = message("a");
        message.expires = Some(written.now + Duration::from_secs(60));
        let read = Clock {
            now: Instant::now(),
            unix_ms: 0,
        };
        let left = reread(&message, written, read).expires_in(read.now);
        assert_eq!(left, Some(60));
    }

    #[test]
    fn a_session_whose_client_was_connected_lives_on_from_the_start() {
        let now = Instant::now();
        let mut session = session(1);
        session.session_expiry = Duration::from_secs(30);
        assert_eq!(session.expires_at(now), now + Duration::from_secs(30));
        session.expires = Some(now + Duration::from_secs(10));
        assert_eq!(session.expires_at(now), now + Duration::from_secs(10));
        session.expires = None;
        session.session_expiry = Duration::MAX;
        assert!(session.expires_at(now) > now);
    }

    pub fn session(number: u64) -> SessionRecord {
        SessionRecord {
            number,
            version: Version::V5,
            expires: None,
            session_expiry: Duration::from_secs(3600),
            user: None,
            subscriptions: Vec::new(),
            unreleased: Vec::new(),
            inflight: Vec::new(),
            last_packet_id: 0,
            next_sequence: 0,
            will: None,
        }
    }
}
