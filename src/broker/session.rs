//! The protocol of one client: a state machine without sockets, tasks or clocks.
//!
//! It takes packets and the time, writes bytes into the buffer that it is given, and says through
//! [`Effect`]s what the rest of the broker has to do. It must never decide who gets a message (that
//! is the fan-out's) nor wait for anything.
//!
//! A session outlives its connection when the client asked for that: [`Session::resume`] puts it on
//! a new one.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rumqttd::protocol::{
    ConnAckProperties, Connect, ConnectProperties, ConnectReturnCode, DisconnectReasonCode,
    LastWill, LastWillProperties, Login, Packet, PubAckReason, PubCompReason, PubRecReason,
    PubRelReason, PublishProperties, QoS, RetainForwardRule, Subscribe, SubscribeReasonCode,
    UnsubAckReason,
};
use rustc_hash::{FxHashMap, FxHashSet};

use super::access::Permissions;
use super::codec::{
    DecodeError, Encoder, Incoming, IncomingPublish, PublishHeader, Version, Written,
};
use super::message::{Delivery, Message, SessionKey};
use super::stored::{SessionRecord, StoredInflight, StoredSubscription, StoredWill};
use super::subscription::{Subscription, SubscriptionKey, SubscriptionOptions};
use crate::dead_letters::Reason;
use crate::event::via::LINK;
use crate::event::{Topic, TopicError};

/// Highest topic alias that a client may use. Bounds what a connection keeps.
const TOPIC_ALIAS_MAX: u16 = 64;

/// Most topic aliases that the gateway uses towards a client, for the same reason.
const SENT_ALIAS_MAX: u16 = 256;

/// Payloads up to this length are copied out of the read buffer, so that one message that is kept
/// long does not keep the buffer, with its 64 KiB, from being freed.
const COPIED_PAYLOAD_BYTES: usize = 4096;

/// Longest client id. It stands in logs and in the registry.
const MAX_CLIENT_ID_BYTES: usize = 256;

/// Topics whose checked form a connection remembers.
const KNOWN_TOPICS: usize = 512;

/// The bounds that a session keeps and announces.
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_packet_bytes: u32,
    /// Unacknowledged QoS 1 and 2 messages towards the client.
    pub max_inflight: u16,
    /// QoS 2 messages from the client that it has not released.
    pub receive_maximum: u16,
    pub max_subscriptions: usize,
    /// How many subscriptions all clients together have, now, and may have.
    pub all_subscriptions: Arc<AtomicUsize>,
    pub max_total_subscriptions: usize,
    pub session_expiry_max: Duration,
    /// None: the client's own wish stands.
    pub max_keep_alive: Option<Duration>,
    /// Where clients that ask for it may expect responses; `%c` stands for the client id. Empty:
    /// nothing is said.
    pub response_information: String,
    /// This gateway's name, once it is known: for clients that are links of others.
    pub gateway: Arc<OnceLock<Arc<str>>>,
}

/// What the rest of the broker has to do for the session.
#[derive(Debug)]
pub enum Effect {
    /// Hand `message` on, then call [`Session::accepted`] with the ticket.
    Publish {
        message: Message,
        ticket: Ticket,
    },
    /// The client published to a topic that it must not publish to; it has been told, as far as
    /// its version can be.
    Denied {
        topic: Topic,
        payload: Bytes,
        qos: QoS,
    },
    Subscribe(Vec<Subscription>),
    Unsubscribe(Vec<SubscriptionKey>),
    /// Send what is in the buffer, then close the connection.
    Close(Close),
}

/// Why a session closes its connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Close {
    /// DISCONNECT from the client.
    ByClient,
    /// The client broke a rule or a limit; for the log.
    Refused(String),
}

/// The acknowledgement that a PUBLISH is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Ticket {
    qos: QoS,
    packet_id: u16,
}

/// What CONNECT asks for, before there is a session.
#[derive(Debug)]
pub struct ConnectRequest {
    pub version: Version,
    /// The client's, or one that was assigned.
    pub client_id: String,
    pub assigned_id: bool,
    pub clean_start: bool,
    pub login: Option<Login>,
    /// Who the client is, once it has been found out; none for an anonymous one.
    pub user: Option<String>,
    pub keep_alive: Option<Duration>,
    /// How long the session is kept after the connection's end.
    pub session_expiry: Duration,
    receive_maximum: u16,
    max_packet_bytes: u32,
    topic_alias_max: u16,
    wants_response_information: bool,
    is_link: bool,
    will: Option<Will>,
}

/// What is published when a client goes without saying so.
#[derive(Debug)]
pub struct Will {
    pub message: Arc<Message>,
    /// Life of the message from its publication on.
    expiry: Option<Duration>,
    /// How long after the connection's end it is published, unless the session ends before.
    pub delay: Duration,
}

impl Will {
    /// The message as it is published at the time `now`.
    pub fn into_message(self, now: Instant) -> Message {
        let message = &*self.message;
        Message {
            topic: message.topic.clone(),
            payload: message.payload.clone(),
            properties: message.properties.clone(),
            expires: self.expiry.map(|life| now + life),
            ..*message
        }
    }

    /// One that waits since an earlier run of the gateway, and when it is due.
    pub fn restore(stored: StoredWill) -> (Instant, Will) {
        let will = Will {
            message: stored.message,
            expiry: stored.life,
            delay: Duration::ZERO,
        };
        (stored.due, will)
    }
}

/// A CONNECT that gets a CONNACK with an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct ConnectRefused {
    pub code: ConnectReturnCode,
    pub text: String,
}

impl ConnectRequest {
    /// Reads a CONNECT. `assign_id` makes a client id where the client has none.
    pub fn new(
        version: Version,
        packet: Packet,
        key: SessionKey,
        limits: &Limits,
        assign_id: impl FnOnce() -> String,
    ) -> Result<Self, ConnectRefused> {
        let Packet::Connect(connect, properties, will, will_properties, login) = packet else {
            unreachable!("the decoder lets nothing but CONNECT come first");
        };
        let Connect {
            keep_alive,
            client_id,
            clean_session,
        } = connect;
        let properties = properties.unwrap_or(ConnectProperties {
            session_expiry_interval: None,
            receive_maximum: None,
            max_packet_size: None,
            topic_alias_max: None,
            request_response_info: None,
            request_problem_info: None,
            user_properties: Vec::new(),
            authentication_method: None,
            authentication_data: None,
        });
        if properties.authentication_method.is_some() {
            return Err(ConnectRefused {
                code: ConnectReturnCode::BadAuthenticationMethod,
                text: "no authentication method is supported".into(),
            });
        }
        if properties.authentication_data.is_some() {
            return Err(ConnectRefused {
                code: ConnectReturnCode::ProtocolError,
                text: "authentication data without an authentication method".into(),
            });
        }
        if properties.receive_maximum == Some(0) || properties.max_packet_size == Some(0) {
            return Err(ConnectRefused {
                code: ConnectReturnCode::ProtocolError,
                text: "receive maximum and maximum packet size can't be 0".into(),
            });
        }
        if client_id.contains('\0') || client_id.chars().any(char::is_control) {
            return Err(ConnectRefused {
                code: ConnectReturnCode::ClientIdentifierNotValid,
                text: "the client id contains control characters".into(),
            });
        }
        if client_id.len() > MAX_CLIENT_ID_BYTES {
            return Err(ConnectRefused {
                code: ConnectReturnCode::ClientIdentifierNotValid,
                text: format!("the client id has more than {MAX_CLIENT_ID_BYTES} bytes"),
            });
        }
        let assigned_id = client_id.is_empty();
        if assigned_id && version == Version::V4 && !clean_session {
            return Err(ConnectRefused {
                code: ConnectReturnCode::ClientIdentifierNotValid,
                text: "an empty client id needs clean session (MQTT 3.1.1, 3.1.3-8)".into(),
            });
        }
        let session_expiry = match version {
            Version::V4 if clean_session => Duration::ZERO,
            Version::V4 => limits.session_expiry_max,
            Version::V5 => {
                let wish = properties.session_expiry_interval.unwrap_or(0);
                Duration::from_secs(wish.into()).min(limits.session_expiry_max)
            }
        };
        let keep_alive = (keep_alive > 0).then(|| Duration::from_secs(keep_alive.into()));
        Ok(ConnectRequest {
            version,
            client_id: if assigned_id { assign_id() } else { client_id },
            assigned_id,
            clean_start: clean_session,
            login,
            user: None,
            keep_alive,
            session_expiry,
            receive_maximum: properties.receive_maximum.unwrap_or(u16::MAX),
            max_packet_bytes: properties.max_packet_size.unwrap_or(u32::MAX),
            topic_alias_max: properties.topic_alias_max.unwrap_or(0),
            wants_response_information: properties.request_response_info == Some(1),
            is_link: properties
                .user_properties
                .iter()
                .any(|(key, _)| key == LINK),
            will: will
                .map(|will| Will::new(will, will_properties, key))
                .transpose()?,
        })
    }

    /// Where the will would be published.
    pub fn will_topic(&self) -> Option<&Topic> {
        self.will.as_ref().map(|will| &will.message.topic)
    }
}

impl Will {
    fn new(
        will: LastWill,
        properties: Option<LastWillProperties>,
        key: SessionKey,
    ) -> Result<Self, ConnectRefused> {
        let topic = publishable(will.topic).map_err(|error| ConnectRefused {
            code: ConnectReturnCode::TopicNameInvalid,
            text: format!("will: {error}"),
        })?;
        let response_topic = properties.as_ref().and_then(|p| p.response_topic.clone());
        if let Some(Err(error)) = response_topic.map(Topic::new) {
            return Err(ConnectRefused {
                code: ConnectReturnCode::ProtocolError,
                text: format!("response topic of the will: {error}"),
            });
        }
        let (expiry, delay, properties) = match properties {
            None => (None, None, None),
            Some(properties) => (
                properties.message_expiry_interval,
                properties.delay_interval,
                Some(PublishProperties {
                    payload_format_indicator: properties.payload_format_indicator,
                    response_topic: properties.response_topic,
                    correlation_data: properties.correlation_data,
                    user_properties: properties.user_properties,
                    content_type: properties.content_type,
                    ..PublishProperties::default()
                }),
            ),
        };
        Ok(Will {
            message: Arc::new(Message {
                topic,
                payload: Bytes::copy_from_slice(&will.message),
                qos: will.qos,
                retain: will.retain,
                publisher: key,
                properties: properties.map(Box::new),
                expires: None,
            }),
            expiry: expiry.map(|seconds| Duration::from_secs(seconds.into())),
            delay: Duration::from_secs(delay.unwrap_or(0).into()),
        })
    }
}

/// Why a client can't publish to a topic.
#[derive(Debug, thiserror::Error)]
enum PublishRefused {
    #[error(transparent)]
    Topic(#[from] TopicError),
    #[error("topics that start with $ belong to the gateway")]
    Reserved(Topic),
    #[error("the client may not publish there")]
    NotAuthorized(Topic),
}

fn publishable(topic: Bytes) -> Result<Topic, PublishRefused> {
    let topic = Topic::new(topic)?;
    if topic.as_str().starts_with('$') {
        return Err(PublishRefused::Reserved(topic));
    }
    Ok(topic)
}

/// A QoS 1 or 2 message that the client has not acknowledged in full.
#[derive(Debug)]
enum Inflight {
    /// PUBLISH is sent; PUBACK or PUBREC is awaited.
    Published(Delivery),
    /// PUBREL is sent; PUBCOMP is awaited.
    Released,
}

/// The protocol state of one client.
#[derive(Debug)]
pub struct Session {
    key: SessionKey,
    limits: Limits,

    // Kept for as long as the session lives.
    session_expiry: Duration,
    /// In the order of sending, which is the order of sending again.
    inflight: VecDeque<(u16, Inflight)>,
    /// How many at the end of `inflight` have yet to be sent again on this connection.
    unsent: usize,
    /// Await a place in `inflight`, or a connection.
    waiting: VecDeque<Delivery>,
    /// Deliveries that are in the archive and needn't be any more.
    done: Vec<u64>,
    /// What is not to be sent, and why.
    undeliverable: Vec<(Reason, Arc<Message>)>,
    last_packet_id: u16,
    /// How many packet ids after the last one are known to be free: so none has to be looked for.
    free_packet_ids: u16,
    /// QoS 2 messages that the client has sent and not released: seen again, they are duplicates.
    unreleased: FxHashSet<u16>,
    /// Those of `unreleased` that may have been released since the store was told, before a crash.
    unsure: FxHashSet<u16>,
    subscriptions: FxHashMap<SubscriptionKey, SubscriptionOptions>,
    /// Whose session it is; none for an anonymous client. Nobody else may go on with it.
    user: Option<String>,

    // Of the present connection.
    encoder: Encoder,
    /// The client is a link of another gateway.
    is_link: bool,
    keep_alive: Option<Duration>,
    last_heard: Instant,
    inflight_max: usize,
    max_packet_bytes: usize,
    will: Option<Will>,
    permissions: Arc<Permissions>,
    /// What the client's topic aliases stand for, and which the gateway has given to topics.
    aliases: FxHashMap<u16, Topic>,
    sent_aliases: FxHashMap<Topic, u16>,
    sent_alias_max: u16,
    /// Topics as they stand in packets, whether the client may publish there, and the state of
    /// the permissions of which that is true.
    known_topics: FxHashMap<Bytes, (Topic, bool)>,
    known_generation: u64,
    closed: bool,
    refused: Option<DisconnectReasonCode>,
}

impl Session {
    /// A new session for an accepted CONNECT. The CONNACK goes to `out`.
    pub fn new(
        request: ConnectRequest,
        permissions: Arc<Permissions>,
        key: SessionKey,
        limits: Limits,
        now: Instant,
        out: &mut BytesMut,
    ) -> Self {
        let mut session = Session {
            key,
            limits,
            session_expiry: Duration::ZERO,
            inflight: VecDeque::new(),
            unsent: 0,
            waiting: VecDeque::new(),
            done: Vec::new(),
            undeliverable: Vec::new(),
            last_packet_id: 0,
            free_packet_ids: 0,
            unreleased: FxHashSet::default(),
            unsure: FxHashSet::default(),
            subscriptions: FxHashMap::default(),
            user: request.user.clone(),
            encoder: Encoder::new(request.version),
            is_link: false,
            keep_alive: None,
            last_heard: now,
            inflight_max: 0,
            max_packet_bytes: 0,
            will: None,
            permissions: permissions.clone(),
            aliases: FxHashMap::default(),
            sent_aliases: FxHashMap::default(),
            sent_alias_max: 0,
            known_topics: FxHashMap::default(),
            known_generation: 0,
            closed: false,
            refused: None,
        };
        session.connect(request, permissions, false, now, out);
        session
    }

    /// The session of an earlier run of the gateway. Nothing is kept of subscriptions that can't be
    /// read.
    pub fn restore(record: SessionRecord, limits: Limits, now: Instant) -> Self {
        let subscriptions = record.subscriptions.into_iter().filter_map(|stored| {
            let key = SubscriptionKey::parse(stored.filter).ok()?;
            let options = SubscriptionOptions {
                qos: stored.qos,
                no_local: stored.no_local,
                retain_as_published: stored.retain_as_published,
                id: stored.id,
            };
            Some((key, options))
        });
        let inflight = record.inflight.into_iter().map(|(id, stored)| {
            let inflight = match stored {
                StoredInflight::Published(delivery) => Inflight::Published(delivery),
                StoredInflight::Released => Inflight::Released,
            };
            (id, inflight)
        });
        // The record of a session that was connected to the end may be some time old: its client
        // must not take new messages for those that it got meanwhile, by their packet ids.
        let skipped = if record.expires.is_none() { 0x8000 } else { 0 };
        Session {
            key: record.number,
            limits,
            session_expiry: record.session_expiry,
            inflight: inflight.collect(),
            unsent: 0,
            waiting: VecDeque::new(),
            done: Vec::new(),
            undeliverable: Vec::new(),
            last_packet_id: record.last_packet_id.wrapping_add(skipped),
            free_packet_ids: 0,
            unsure: match record.expires {
                None => record.unreleased.iter().copied().collect(),
                Some(_) => FxHashSet::default(),
            },
            unreleased: record.unreleased.into_iter().collect(),
            subscriptions: subscriptions.collect(),
            user: record.user,
            encoder: Encoder::new(record.version),
            is_link: false,
            keep_alive: None,
            last_heard: now,
            inflight_max: 0,
            max_packet_bytes: 0,
            will: None,
            permissions: Permissions::everything(),
            aliases: FxHashMap::default(),
            sent_aliases: FxHashMap::default(),
            sent_alias_max: 0,
            known_topics: FxHashMap::default(),
            known_generation: 0,
            closed: true,
            refused: None,
        }
    }

    /// Whose session it is; none for an anonymous client.
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// What the store has to keep of the session; with `expires`, of one whose client is away.
    pub fn record(
        &self,
        expires: Option<Instant>,
        next_sequence: u64,
        will: Option<&(Instant, Will)>,
    ) -> SessionRecord {
        let subscriptions = self
            .subscriptions
            .iter()
            .map(|(key, options)| StoredSubscription {
                filter: key.to_string(),
                qos: options.qos,
                no_local: options.no_local,
                retain_as_published: options.retain_as_published,
                id: options.id,
            });
        let inflight = self.inflight.iter().map(|(id, inflight)| {
            let stored = match inflight {
                Inflight::Published(delivery) => StoredInflight::Published(delivery.clone()),
                Inflight::Released => StoredInflight::Released,
            };
            (*id, stored)
        });
        SessionRecord {
            number: self.key,
            version: self.encoder.version,
            expires,
            session_expiry: self.session_expiry,
            user: self.user.clone(),
            subscriptions: subscriptions.collect(),
            unreleased: self.unreleased.iter().copied().collect(),
            inflight: inflight.collect(),
            last_packet_id: self.last_packet_id,
            next_sequence,
            will: will.map(|(due, will)| StoredWill {
                message: will.message.clone(),
                life: will.expiry,
                due: *due,
            }),
        }
    }

    /// The connection is gone and the session is kept: what has not been sent goes back to where
    /// it came from, and what is in the archive of what has been sent needn't be there any more,
    /// since [`Session::record`] has it.
    pub fn park(&mut self) -> VecDeque<Delivery> {
        for (_, inflight) in &mut self.inflight {
            if let Inflight::Published(delivery) = inflight
                && std::mem::take(&mut delivery.is_stored)
            {
                self.done.push(delivery.sequence);
            }
        }
        std::mem::take(&mut self.waiting)
    }

    /// What could not be sent since this was asked for last.
    pub fn take_undeliverable(&mut self) -> Vec<(Reason, Arc<Message>)> {
        std::mem::take(&mut self.undeliverable)
    }

    /// Sequences of deliveries that the archive needn't keep any more.
    pub fn take_done(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.done)
    }

    /// Goes on with this session on a new connection: CONNACK, then again what was not
    /// acknowledged (MQTT 5.0, 4.4), then what has been waiting.
    pub fn resume(
        &mut self,
        request: ConnectRequest,
        permissions: Arc<Permissions>,
        now: Instant,
        out: &mut BytesMut,
    ) {
        self.connect(request, permissions, true, now, out);
        self.unsent = self.inflight.len();
        if self.refused.is_none() {
            self.send_waiting(now, out);
        }
    }

    fn connect(
        &mut self,
        request: ConnectRequest,
        permissions: Arc<Permissions>,
        resumed: bool,
        now: Instant,
        out: &mut BytesMut,
    ) {
        let keep_alive = match (request.keep_alive, self.limits.max_keep_alive) {
            (Some(wish), Some(max)) => Some(wish.min(max)),
            (wish, max) => wish.or(max),
        };
        let mut properties = ConnAckProperties {
            session_expiry_interval: Some(request.session_expiry.as_secs() as u32),
            receive_max: Some(self.limits.receive_maximum),
            max_packet_size: Some(self.limits.max_packet_bytes),
            assigned_client_identifier: request.assigned_id.then(|| request.client_id.clone()),
            topic_alias_max: Some(TOPIC_ALIAS_MAX),
            response_information: (request.wants_response_information
                && !self.limits.response_information.is_empty())
            .then(|| {
                self.limits
                    .response_information
                    .replace("%c", &request.client_id)
            }),
            server_keep_alive: (keep_alive != request.keep_alive)
                .then(|| keep_alive.map_or(0, |keep_alive| keep_alive.as_secs() as u16)),
            ..ConnAckProperties::default()
        };
        self.encoder = Encoder::new(request.version);
        self.is_link = request.is_link;
        self.session_expiry = request.session_expiry;
        // A 3.1.1 client can't be told of another keep-alive, so its own stands.
        self.keep_alive = match request.version {
            Version::V4 => request.keep_alive,
            Version::V5 => keep_alive,
        };
        self.last_heard = now;
        self.inflight_max = request.receive_maximum.min(self.limits.max_inflight).into();
        self.max_packet_bytes = request.max_packet_bytes as usize;
        self.will = request.will;
        self.permissions = permissions;
        self.aliases.clear();
        self.sent_aliases.clear();
        self.sent_alias_max = request.topic_alias_max.min(SENT_ALIAS_MAX);
        self.known_topics.clear();
        self.closed = false;
        self.refused = None;
        let start = out.len();
        self.encoder
            .connack(resumed, ConnectReturnCode::Success, properties.clone(), out);
        if out.len() - start > self.max_packet_bytes && properties.response_information.is_some() {
            // The only property that a client can do without.
            properties.response_information = None;
            out.truncate(start);
            let code = ConnectReturnCode::Success;
            self.encoder.connack(resumed, code, properties, out);
        }
        if out.len() - start > self.max_packet_bytes {
            // It must not be sent (MQTT 5.0, 3.1.2.11.4), and nothing may come before it.
            out.truncate(start);
            self.closed = true;
            self.refused = Some(DisconnectReasonCode::PacketTooLarge);
        }
    }

    /// Whether the will may be published now: the rules may have changed since CONNECT.
    pub fn allows(&self, will: &Will) -> bool {
        self.permissions.may_publish(will.message.topic.as_str())
    }

    pub fn key(&self) -> SessionKey {
        self.key
    }

    /// What was written since this was asked for last.
    pub fn take_written(&mut self) -> Written {
        self.encoder.take_written()
    }

    /// Of the last connection.
    pub fn version(&self) -> Version {
        self.encoder.version
    }

    /// What has been agreed on for the present connection.
    pub fn keep_alive(&self) -> Option<Duration> {
        self.keep_alive
    }

    /// How many messages the client has to acknowledge.
    pub fn inflight(&self) -> usize {
        self.inflight.len()
    }

    /// How long the session lives on after its connection; zero: not at all.
    pub fn session_expiry(&self) -> Duration {
        self.session_expiry
    }

    pub fn subscriptions(&self) -> impl Iterator<Item = (&SubscriptionKey, &SubscriptionOptions)> {
        self.subscriptions.iter()
    }

    /// When [`Session::on_timeout`] wants to be called.
    pub fn deadline(&self) -> Option<Instant> {
        // One and a half times the keep-alive (MQTT 5.0, 3.1.2.10).
        self.keep_alive
            .map(|keep_alive| self.last_heard + keep_alive * 3 / 2)
    }

    pub fn on_timeout(&mut self, now: Instant, out: &mut BytesMut) -> Option<Effect> {
        let expired = self.deadline().is_some_and(|deadline| deadline <= now);
        expired.then(|| {
            self.refuse(
                DisconnectReasonCode::KeepAliveTimeout,
                "nothing heard for 1.5 times the keep-alive",
                out,
            )
        })
    }

    /// Ends the connection from this side, telling a client that can be told.
    pub fn refuse(
        &mut self,
        reason: DisconnectReasonCode,
        text: &str,
        out: &mut BytesMut,
    ) -> Effect {
        self.encoder
            .disconnect(reason, text, self.max_packet_bytes, out);
        self.closed = true;
        self.refused.get_or_insert(reason);
        Effect::Close(Close::Refused(text.to_owned()))
    }

    /// Why the connection ends, if it ends from this side.
    pub fn refused(&self) -> Option<DisconnectReasonCode> {
        self.refused
    }

    /// The connection's bytes can't be read on.
    pub fn on_decode_error(&mut self, error: &DecodeError, out: &mut BytesMut) -> Effect {
        self.refuse(error.reason(), &error.to_string(), out)
    }

    /// The connection is gone. The will, if the client has left one; it is due after its delay, or
    /// when the session ends.
    pub fn on_connection_lost(&mut self) -> Option<Will> {
        self.will.take()
    }

    /// The session is over. What it has not got, or not acknowledged at QoS 1, of messages to share
    /// groups: their other members can have it (MQTT 5.0, 4.8.2).
    /// Besides, what nobody gets any more.
    pub fn take_shared(&mut self) -> (Vec<Delivery>, Vec<Delivery>) {
        let sent = self.inflight.drain(..).filter_map(|(_, sent)| match sent {
            Inflight::Published(delivery) => Some(delivery),
            Inflight::Released => None,
        });
        let (mut shared, mut lost): (Vec<_>, Vec<_>) =
            sent.partition(|delivery| delivery.group.is_some() && delivery.qos == QoS::AtLeastOnce);
        for delivery in self.waiting.drain(..) {
            match delivery.group {
                Some(_) => shared.push(delivery),
                None => lost.push(delivery),
            }
        }
        (shared, lost)
    }

    /// Works on one packet; `effects` gets what is to be done, in order.
    pub fn on_packet(
        &mut self,
        packet: Incoming,
        now: Instant,
        out: &mut BytesMut,
        effects: &mut Vec<Effect>,
    ) {
        self.last_heard = now;
        if self.closed {
            return;
        }
        match packet {
            Incoming::Publish(publish) => self.on_publish(publish, now, out, effects),
            Incoming::Control(packet) => self.on_control(packet, now, out, effects),
        }
    }

    fn on_control(
        &mut self,
        packet: Packet,
        now: Instant,
        out: &mut BytesMut,
        effects: &mut Vec<Effect>,
    ) {
        match packet {
            Packet::PubAck(ack, _) => self.on_puback(ack.pkid, now, out),
            Packet::PubRec(rec, _) => {
                let accepted = rec.reason == PubRecReason::Success;
                self.on_pubrec(rec.pkid, accepted, now, out);
            }
            Packet::PubRel(rel, _) => {
                self.unsure.remove(&rel.pkid);
                let reason = match self.unreleased.remove(&rel.pkid) {
                    true => PubCompReason::Success,
                    false => PubCompReason::PacketIdentifierNotFound,
                };
                // A 3.1.1 PUBCOMP has no reason; the client only wants to get on.
                self.encoder.pubcomp(rel.pkid, reason, out);
            }
            Packet::PubComp(comp, _) => self.on_pubcomp(comp.pkid, now, out),
            Packet::Subscribe(subscribe, properties) => {
                let id = properties.and_then(|properties| properties.id);
                self.on_subscribe(subscribe, id, out, effects);
            }
            Packet::Unsubscribe(unsubscribe, _) => {
                if unsubscribe.pkid == 0 || unsubscribe.filters.is_empty() {
                    effects.push(self.refuse(
                        DisconnectReasonCode::ProtocolError,
                        "UNSUBSCRIBE without packet id or filters",
                        out,
                    ));
                    return;
                }
                self.on_unsubscribe(unsubscribe.pkid, unsubscribe.filters, out, effects);
            }
            Packet::PingReq(_) => self.encoder.pingresp(out),
            Packet::Disconnect(disconnect, properties) => {
                let expiry = properties.and_then(|p| p.session_expiry_interval);
                // Zero can't become another value now (MQTT 5.0, 3.14.2.2.2).
                if self.session_expiry.is_zero() && expiry.is_some_and(|expiry| expiry > 0) {
                    effects.push(self.refuse(
                        DisconnectReasonCode::ProtocolError,
                        "DISCONNECT with a session expiry for a session that was to have none",
                        out,
                    ));
                    return;
                }
                if let Some(expiry) = expiry {
                    self.session_expiry =
                        Duration::from_secs(expiry.into()).min(self.limits.session_expiry_max);
                }
                // With any other reason, it is due (MQTT 5.0, 3.14.4-3).
                if disconnect.reason_code == DisconnectReasonCode::NormalDisconnection {
                    self.will = None;
                }
                self.closed = true;
                effects.push(Effect::Close(Close::ByClient));
            }
            Packet::Connect(..) => effects.push(self.refuse(
                DisconnectReasonCode::ProtocolError,
                "a second CONNECT",
                out,
            )),
            // The decoder refuses what a client can't send.
            _ => effects.push(self.refuse(
                DisconnectReasonCode::ProtocolError,
                "a packet that only a server sends",
                out,
            )),
        }
    }

    fn on_publish(
        &mut self,
        publish: IncomingPublish,
        now: Instant,
        out: &mut BytesMut,
        effects: &mut Vec<Effect>,
    ) {
        let ticket = Ticket {
            qos: publish.qos,
            packet_id: publish.packet_id,
        };
        let mut properties = publish.properties;
        let alias = properties.as_mut().and_then(|p| p.topic_alias.take());
        let topic = match self.topic(publish.topic, alias) {
            Ok(topic) => topic,
            Err(PublishRefused::Topic(error)) => {
                effects.push(self.refuse(
                    DisconnectReasonCode::TopicNameInvalid,
                    &error.to_string(),
                    out,
                ));
                return;
            }
            Err(PublishRefused::Reserved(topic) | PublishRefused::NotAuthorized(topic)) => {
                effects.push(Effect::Denied {
                    topic,
                    payload: Bytes::copy_from_slice(&publish.payload),
                    qos: publish.qos,
                });
                // Acknowledged, so that the client goes on, and sent nowhere.
                match ticket.qos {
                    QoS::AtMostOnce => {}
                    QoS::AtLeastOnce => self.encoder.puback(
                        ticket.packet_id,
                        self.v5_reason(PubAckReason::NotAuthorized, PubAckReason::Success),
                        out,
                    ),
                    QoS::ExactlyOnce => self.encoder.pubrec(
                        ticket.packet_id,
                        self.v5_reason(PubRecReason::NotAuthorized, PubRecReason::Success),
                        out,
                    ),
                }
                return;
            }
        };
        let Some(topic) = topic else {
            effects.push(self.refuse(
                DisconnectReasonCode::TopicAliasInvalid,
                "a topic alias that is 0, too high, or stands for no topic yet",
                out,
            ));
            return;
        };
        let expires = properties
            .as_mut()
            .and_then(|p| p.message_expiry_interval.take())
            .map(|seconds| now + Duration::from_secs(seconds.into()));
        if let Some(properties) = &properties {
            let bad_response = properties
                .response_topic
                .as_ref()
                .is_some_and(|topic| Topic::new(topic.clone()).is_err());
            if !properties.subscription_identifiers.is_empty() || bad_response {
                effects.push(self.refuse(
                    DisconnectReasonCode::ProtocolError,
                    "PUBLISH with a subscription id or an invalid response topic",
                    out,
                ));
                return;
            }
        }
        if publish.qos == QoS::ExactlyOnce {
            let is_new = !publish.dup && self.unsure.remove(&publish.packet_id);
            if is_new {
                self.unreleased.remove(&publish.packet_id);
            }
            if self.unreleased.contains(&publish.packet_id) {
                // Sent again before it was released: it has been handed on already.
                self.encoder
                    .pubrec(publish.packet_id, PubRecReason::Success, out);
                return;
            }
            if self.unreleased.len() >= usize::from(self.limits.receive_maximum) {
                effects.push(self.refuse(
                    DisconnectReasonCode::ReceiveMaximumExceeded,
                    "more unreleased QoS 2 messages than mqtt.receive_maximum",
                    out,
                ));
                return;
            }
            self.unreleased.insert(publish.packet_id);
        }
        let payload = if publish.payload.len() <= COPIED_PAYLOAD_BYTES {
            Bytes::copy_from_slice(&publish.payload)
        } else {
            publish.payload
        };
        effects.push(Effect::Publish {
            message: Message {
                topic,
                payload,
                qos: publish.qos,
                retain: publish.retain,
                publisher: self.key,
                properties: properties
                    .filter(|p| *p != PublishProperties::default())
                    .map(Box::new),
                expires,
            },
            ticket,
        });
    }

    /// The topic of a PUBLISH, checked; none for a wrong alias.
    fn topic(&mut self, name: Bytes, alias: Option<u16>) -> Result<Option<Topic>, PublishRefused> {
        if let Some(alias) = alias {
            if alias == 0 || alias > TOPIC_ALIAS_MAX {
                return Ok(None);
            }
            if name.is_empty() {
                let Some(topic) = self.aliases.get(&alias).cloned() else {
                    return Ok(None);
                };
                return self.known_topic(topic.as_bytes().clone()).map(Some);
            }
        }
        let known = self.known_topic(name);
        if let Some(alias) = alias
            && let Ok(topic)
            | Err(PublishRefused::Reserved(topic) | PublishRefused::NotAuthorized(topic)) =
                &known
        {
            self.aliases.insert(alias, topic.clone());
        }
        known.map(Some)
    }

    /// The topic of that name, if the client may publish there.
    fn known_topic(&mut self, name: Bytes) -> Result<Topic, PublishRefused> {
        let generation = self.permissions.generation();
        if generation != self.known_generation {
            self.known_topics.clear();
            self.known_generation = generation;
        }
        let (topic, allowed) = match self.known_topics.get(&name) {
            Some((topic, allowed)) => (topic.clone(), *allowed),
            None => {
                let topic = publishable(Bytes::copy_from_slice(&name))?;
                let allowed = self.permissions.may_publish(topic.as_str());
                if self.known_topics.len() >= KNOWN_TOPICS {
                    self.known_topics.clear();
                }
                if topic.is_worth_caching() {
                    self.known_topics
                        .insert(topic.as_bytes().clone(), (topic.clone(), allowed));
                }
                (topic, allowed)
            }
        };
        match allowed {
            true => Ok(topic),
            false => Err(PublishRefused::NotAuthorized(topic)),
        }
    }

    /// A reason that 3.1.1 can't express becomes `old`.
    fn v5_reason<R>(&self, reason: R, old: R) -> R {
        match self.encoder.version {
            Version::V4 => old,
            Version::V5 => reason,
        }
    }

    /// A message of this client's has been handed on: the acknowledgement that it is owed.
    pub fn accepted(&mut self, ticket: Ticket, out: &mut BytesMut) {
        match ticket.qos {
            QoS::AtMostOnce => {}
            QoS::AtLeastOnce => self
                .encoder
                .puback(ticket.packet_id, PubAckReason::Success, out),
            QoS::ExactlyOnce => self
                .encoder
                .pubrec(ticket.packet_id, PubRecReason::Success, out),
        }
    }

    fn on_subscribe(
        &mut self,
        subscribe: Subscribe,
        id: Option<usize>,
        out: &mut BytesMut,
        effects: &mut Vec<Effect>,
    ) {
        if subscribe.pkid == 0 || id == Some(0) {
            effects.push(self.refuse(
                DisconnectReasonCode::ProtocolError,
                "SUBSCRIBE with packet id or subscription id 0",
                out,
            ));
            return;
        }
        let mut codes = Vec::with_capacity(subscribe.filters.len());
        let mut granted = Vec::with_capacity(subscribe.filters.len());
        for wish in subscribe.filters {
            let Ok(key) = SubscriptionKey::parse(wish.path) else {
                codes.push(self.v5_reason(
                    SubscribeReasonCode::TopicFilterInvalid,
                    SubscribeReasonCode::Failure,
                ));
                continue;
            };
            if key.group.is_some() && wish.nolocal {
                effects.push(self.refuse(
                    DisconnectReasonCode::ProtocolError,
                    "SUBSCRIBE with no-local on a shared subscription (MQTT 5.0, 3.8.3.1)",
                    out,
                ));
                return;
            }
            if !self.permissions.may_subscribe(&key.filter) {
                // "Unspecified error": Eclipse's conformance suite wants it here.
                codes.push(self.v5_reason(
                    SubscribeReasonCode::Unspecified,
                    SubscribeReasonCode::Failure,
                ));
                continue;
            }
            let is_new = !self.subscriptions.contains_key(&key);
            let limits = &self.limits;
            let all = limits.all_subscriptions.load(Ordering::Relaxed) + granted.len();
            let is_full = self.subscriptions.len() >= limits.max_subscriptions
                || all >= limits.max_total_subscriptions;
            if is_new && is_full {
                codes.push(self.v5_reason(
                    SubscribeReasonCode::QuotaExceeded,
                    SubscribeReasonCode::Failure,
                ));
                continue;
            }
            let options = SubscriptionOptions {
                qos: wish.qos,
                no_local: wish.nolocal,
                retain_as_published: wish.preserve_retain,
                id: id.map(|id| id as u32),
            };
            self.subscriptions.insert(key.clone(), options);
            codes.push(SubscribeReasonCode::Success(wish.qos));
            // A share group gets no retained messages (MQTT 5.0, 4.8.2).
            let send_retained = key.group.is_none()
                && match wish.retain_forward_rule {
                    RetainForwardRule::OnEverySubscribe => true,
                    RetainForwardRule::OnNewSubscribe => is_new,
                    RetainForwardRule::Never => false,
                };
            granted.push(Subscription {
                key,
                options,
                send_retained,
            });
        }
        let start = out.len();
        self.encoder.suback(subscribe.pkid, codes, out);
        if !granted.is_empty() {
            effects.push(Effect::Subscribe(granted));
        }
        self.check_size(start, out, effects);
    }

    /// An answer that is larger than the client takes must not be sent (MQTT 5.0, 3.1.2.11.4), and
    /// can't be done without.
    fn check_size(&mut self, start: usize, out: &mut BytesMut, effects: &mut Vec<Effect>) {
        if out.len() - start > self.max_packet_bytes {
            out.truncate(start);
            let text = "the answer is larger than the client's maximum packet size";
            effects.push(self.refuse(DisconnectReasonCode::PacketTooLarge, text, out));
        }
    }

    fn on_unsubscribe(
        &mut self,
        packet_id: u16,
        filters: Vec<String>,
        out: &mut BytesMut,
        effects: &mut Vec<Effect>,
    ) {
        let mut removed = Vec::new();
        let mut reasons = Vec::with_capacity(filters.len());
        for filter in filters {
            let Ok(key) = SubscriptionKey::parse(filter) else {
                reasons.push(UnsubAckReason::TopicFilterInvalid);
                continue;
            };
            if self.subscriptions.remove(&key).is_some() {
                reasons.push(UnsubAckReason::Success);
                removed.push(key);
            } else {
                reasons.push(UnsubAckReason::NoSubscriptionExisted);
            }
        }
        let start = out.len();
        self.encoder.unsuback(packet_id, reasons, out);
        if !removed.is_empty() {
            effects.push(Effect::Unsubscribe(removed));
        }
        self.check_size(start, out, effects);
    }

    /// Takes a message for the client: sends it, or keeps it until there is room.
    pub fn deliver(&mut self, delivery: Delivery, now: Instant, out: &mut BytesMut) {
        if delivery.qos == QoS::AtMostOnce {
            self.write(&delivery, 0, false, now, out);
        } else if self.waiting.is_empty() && self.inflight.len() < self.inflight_max {
            self.send(delivery, now, out);
        } else {
            self.waiting.push_back(delivery);
        }
    }

    /// Whether the client takes QoS 1 and 2 messages faster than it acknowledges them: what comes
    /// now is better left where it is counted and bounded.
    pub fn is_congested(&self) -> bool {
        self.waiting.len() >= self.inflight_max
    }

    /// A packet id that nothing in flight has.
    fn next_packet_id(&mut self) -> u16 {
        if self.free_packet_ids == 0 {
            self.find_free_packet_ids();
        }
        self.free_packet_ids -= 1;
        self.last_packet_id = self.last_packet_id % u16::MAX + 1;
        self.last_packet_id
    }

    /// Passes over those in flight that come next. There are free ones after them: there are 65,535
    /// ids, and who sends has fewer in flight.
    fn find_free_packet_ids(&mut self) {
        const IDS: usize = u16::MAX as usize;
        if self.inflight.is_empty() {
            self.free_packet_ids = u16::MAX;
            return;
        }
        let last = usize::from(self.last_packet_id) % IDS;
        // By how many ids they come after the last one.
        let mut used = vec![false; IDS];
        for (id, _) in &self.inflight {
            used[(usize::from(*id) + IDS - last - 1) % IDS] = true;
        }
        let passed = used.iter().take_while(|used| **used).count();
        let free = used[passed..].iter().take_while(|used| !**used).count();
        self.last_packet_id = ((last + passed) % IDS) as u16;
        self.free_packet_ids = free as u16;
    }

    /// Sends with a packet id of its own.
    fn send(&mut self, delivery: Delivery, now: Instant, out: &mut BytesMut) {
        let packet_id = self.next_packet_id();
        if self.write(&delivery, packet_id, false, now, out) {
            self.inflight
                .push_back((packet_id, Inflight::Published(delivery)));
        } else {
            self.is_done(&delivery);
        }
    }

    /// Sends what there is room for: first what has to be sent again, then what waits.
    fn send_waiting(&mut self, now: Instant, out: &mut BytesMut) {
        while self.unsent > 0 && self.inflight.len() - self.unsent < self.inflight_max {
            let at = self.inflight.len() - self.unsent;
            self.unsent -= 1;
            let packet_id = self.inflight[at].0;
            let written = match &self.inflight[at].1 {
                Inflight::Published(delivery) => {
                    let delivery = delivery.clone();
                    self.write(&delivery, packet_id, true, now, out)
                }
                Inflight::Released => {
                    self.encoder.pubrel(packet_id, PubRelReason::Success, out);
                    true
                }
            };
            if !written {
                self.finish(at);
            }
        }
        while self.inflight.len() < self.inflight_max {
            let Some(delivery) = self.waiting.pop_front() else {
                return;
            };
            self.send(delivery, now, out);
        }
    }

    /// Whether it was written: a message whose time is up, that is larger than the client takes, or
    /// that the client may no longer have, counts as delivered (MQTT 5.0, 3.1.2.11.4). What was sent once is sent again in any case.
    fn write(
        &mut self,
        delivery: &Delivery,
        packet_id: u16,
        dup: bool,
        now: Instant,
        out: &mut BytesMut,
    ) -> bool {
        let message = &delivery.message;
        // The rules may have changed while it waited.
        let is_allowed = self.permissions.may_receive(message.topic.as_str());
        if !is_allowed || message.is_expired(now) && !dup {
            let reason = match is_allowed {
                true => Reason::Expired,
                false => Reason::Denied,
            };
            self.undeliverable.push((reason, message.clone()));
            return false;
        }
        let start = out.len();
        let alias = self.sent_alias(&message.topic);
        self.encoder.publish(
            PublishHeader {
                qos: delivery.qos,
                packet_id,
                dup,
                retain: delivery.retain,
                properties: message.properties.as_deref(),
                expires_in: message.expires_in(now),
                subscription_ids: delivery.subscription_ids.as_deref().unwrap_or_default(),
                topic_alias: alias.map(|alias| alias.number),
                way: self
                    .limits
                    .gateway
                    .get()
                    .filter(|_| self.is_link)
                    .map(|name| &**name),
            },
            match alias {
                Some(Alias { is_known: true, .. }) => "",
                _ => message.topic.as_str(),
            },
            &message.payload,
            out,
        );
        let fits = out.len() - start <= self.max_packet_bytes;
        if !fits {
            out.truncate(start);
            self.encoder.unwrite_publish(&message.payload);
            self.undeliverable.push((Reason::TooLarge, message.clone()));
        } else if let Some(Alias {
            number,
            is_known: false,
        }) = alias
        {
            self.sent_aliases.insert(message.topic.clone(), number);
        }
        fits
    }

    /// The alias that stands for a topic towards this client, or could from now on.
    fn sent_alias(&self, topic: &Topic) -> Option<Alias> {
        if self.sent_alias_max == 0 || self.encoder.version == Version::V4 {
            return None;
        }
        if let Some(number) = self.sent_aliases.get(topic) {
            return Some(Alias {
                number: *number,
                is_known: true,
            });
        }
        let next = self.sent_aliases.len() as u16 + 1;
        (next <= self.sent_alias_max && topic.is_worth_caching()).then_some(Alias {
            number: next,
            is_known: false,
        })
    }

    /// Of what has been sent on this connection.
    fn position(&self, packet_id: u16) -> Option<usize> {
        let sent = self.inflight.len() - self.unsent;
        let mut sent = self.inflight.iter().take(sent);
        sent.position(|(id, _)| *id == packet_id)
    }

    /// Whether the client owes acknowledgements, or would if there were room.
    pub fn awaits_acks(&self) -> bool {
        !self.inflight.is_empty() || !self.waiting.is_empty()
    }

    fn on_puback(&mut self, packet_id: u16, now: Instant, out: &mut BytesMut) {
        // An id that is not in flight is a duplicate of an earlier ack: nothing to do.
        if let Some(at) = self.position(packet_id)
            && let Inflight::Published(delivery) = &self.inflight[at].1
            && delivery.qos == QoS::AtLeastOnce
        {
            self.finish(at);
            self.send_waiting(now, out);
        }
    }

    /// Nothing more is to be sent of a message, or its content is not to be sent again.
    fn is_done(&mut self, delivery: &Delivery) {
        if delivery.is_stored {
            self.done.push(delivery.sequence);
        }
    }

    fn finish(&mut self, at: usize) {
        if let Some((_, Inflight::Published(delivery))) = self.inflight.remove(at) {
            self.is_done(&delivery);
        }
    }

    fn on_pubrec(&mut self, packet_id: u16, accepted: bool, now: Instant, out: &mut BytesMut) {
        let Some(at) = self.position(packet_id) else {
            let reason = self.v5_reason(
                PubRelReason::PacketIdentifierNotFound,
                PubRelReason::Success,
            );
            self.encoder.pubrel(packet_id, reason, out);
            return;
        };
        match (&self.inflight[at].1, accepted) {
            (Inflight::Published(delivery), _) if delivery.qos != QoS::ExactlyOnce => {}
            (Inflight::Published(_), false) => {
                self.finish(at);
                self.send_waiting(now, out);
            }
            _ => {
                let sent = std::mem::replace(&mut self.inflight[at].1, Inflight::Released);
                if let Inflight::Published(delivery) = sent {
                    self.is_done(&delivery);
                }
                self.encoder.pubrel(packet_id, PubRelReason::Success, out);
            }
        }
    }

    fn on_pubcomp(&mut self, packet_id: u16, now: Instant, out: &mut BytesMut) {
        if let Some(at) = self.position(packet_id)
            && matches!(self.inflight[at].1, Inflight::Released)
        {
            self.inflight.remove(at);
            self.send_waiting(now, out);
        }
    }
}

/// A topic alias towards the client.
#[derive(Clone, Copy, Debug)]
struct Alias {
    number: u16,
    /// The client has been told what it stands for.
    is_known: bool,
}

/// The lower of two QoS.
pub fn lower(a: QoS, b: QoS) -> QoS {
    if a < b { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::codec::Decoder;
    use proptest::prelude::*;

    const CONNECT_V4: &[u8] = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01c";
    /// With a session that outlives its connection.
    const CONNECT_V4_KEPT: &[u8] = b"\x10\x0d\x00\x04MQTT\x04\x00\x00\x3c\x00\x01c";
    const CONNECT_V5: &[u8] = b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01c";
    /// Will "m" on topic "w", QoS 1.
    const CONNECT_V4_WILL: &[u8] =
        b"\x10\x13\x00\x04MQTT\x04\x0e\x00\x3c\x00\x01c\x00\x01w\x00\x01m";

    fn limits() -> Limits {
        Limits {
            gateway: Arc::default(),
            max_packet_bytes: 4096,
            max_inflight: 2,
            receive_maximum: 2,
            max_subscriptions: 3,
            all_subscriptions: Arc::default(),
            max_total_subscriptions: 1000,
            session_expiry_max: Duration::from_secs(100),
            max_keep_alive: None,
            response_information: String::new(),
        }
    }

    fn everything() -> Arc<Permissions> {
        Permissions::everything()
    }

    /// A session with the wire around it, driven by bytes.
    struct Client {
        session: Session,
        decoder: Decoder,
        out: BytesMut,
        now: Instant,
    }

    fn request(connect: &[u8]) -> (ConnectRequest, Decoder) {
        let mut decoder = Decoder::new(4096);
        let mut bytes = BytesMut::from(connect);
        let Ok(Some(Incoming::Control(packet))) = decoder.next(&mut bytes) else {
            panic!("no CONNECT");
        };
        let version = decoder.version().unwrap();
        let request = ConnectRequest::new(version, packet, 1, &limits(), || "assigned".into());
        (request.unwrap(), decoder)
    }

    impl Client {
        fn connect(connect: &[u8]) -> Client {
            let (request, decoder) = request(connect);
            let now = Instant::now();
            let mut out = BytesMut::new();
            let session = Session::new(request, everything(), 1, limits(), now, &mut out);
            assert_eq!(out[0], 0x20, "CONNACK comes first");
            assert_eq!(out[3], 0, "accepted");
            out.clear();
            Client {
                session,
                decoder,
                out,
                now,
            }
        }

        fn send(&mut self, bytes: &[u8]) -> Vec<Effect> {
            let mut bytes = BytesMut::from(bytes);
            let mut effects = Vec::new();
            loop {
                match self.decoder.next(&mut bytes) {
                    Ok(Some(packet)) => {
                        self.session
                            .on_packet(packet, self.now, &mut self.out, &mut effects);
                    }
                    Ok(None) => return effects,
                    Err(error) => {
                        effects.push(self.session.on_decode_error(&error, &mut self.out));
                        return effects;
                    }
                }
            }
        }

        fn sent(&mut self) -> Vec<u8> {
            self.out.split().to_vec()
        }

        fn deliver(&mut self, text: &'static str, qos: QoS) {
            let message = Message {
                qos,
                ..Message::new(Topic::new("t").unwrap(), Bytes::from(text))
            };
            let delivery = Delivery {
                message: Arc::new(message),
                qos,
                retain: false,
                subscription_ids: None,
                group: None,
                sequence: 0,
                is_stored: false,
            };
            self.session.deliver(delivery, self.now, &mut self.out);
        }
    }

    fn publish_qos1(id: u8, payload: &str, dup: bool) -> Vec<u8> {
        let header = if dup { 0x3a } else { 0x32 };
        [
            &[header, 5 + payload.len() as u8, 0, 1, b't', 0, id],
            payload.as_bytes(),
        ]
        .concat()
    }

    #[test]
    fn a_qos_1_publish_is_acknowledged_only_when_it_was_handed_on() {
        let mut client = Client::connect(CONNECT_V4);
        let mut effects = client.send(b"\x32\x07\x00\x01a\x00\x09hi");
        assert!(client.sent().is_empty());
        let Some(Effect::Publish { message, ticket }) = effects.pop() else {
            panic!("{effects:?}");
        };
        assert_eq!(
            (message.topic.as_str(), &message.payload[..]),
            ("a", &b"hi"[..])
        );
        client.session.accepted(ticket, &mut client.out);
        assert_eq!(client.sent(), b"\x40\x02\x00\x09");
    }

    #[test]
    fn a_qos_2_publish_that_is_sent_again_is_handed_on_once() {
        let mut client = Client::connect(CONNECT_V4);
        assert_eq!(client.send(b"\x34\x06\x00\x01a\x00\x01x").len(), 1);
        assert!(client.send(b"\x3c\x06\x00\x01a\x00\x01x").is_empty());
        assert_eq!(client.sent(), b"\x50\x02\x00\x01");
        client.send(b"\x62\x02\x00\x01");
        assert_eq!(client.sent(), b"\x70\x02\x00\x01");
        assert_eq!(client.send(b"\x34\x06\x00\x01a\x00\x01x").len(), 1);
    }

    #[test]
    fn more_unreleased_messages_than_announced_end_the_connection() {
        let mut client = Client::connect(CONNECT_V5);
        for id in 1..=2u8 {
            client.send(&[0x34, 7, 0, 1, b'a', 0, id, 0, b'x']);
        }
        let effects = client.send(b"\x34\x07\x00\x01a\x00\x03\x00x");
        assert!(matches!(effects[..], [Effect::Close(Close::Refused(_))]));
        assert_eq!(client.sent()[2], 0x93);
    }

    #[test]
    fn no_more_than_the_window_is_in_flight_and_the_order_is_kept() {
        let mut client = Client::connect(CONNECT_V4);
        for text in ["1", "2", "3", "4"] {
            client.deliver(text, QoS::AtLeastOnce);
        }
        let first_two = [publish_qos1(1, "1", false), publish_qos1(2, "2", false)].concat();
        assert_eq!(client.sent(), first_two);
        assert!(client.session.is_congested());
        client.send(b"\x40\x02\x00\x01");
        assert_eq!(client.sent(), publish_qos1(3, "3", false));
        // An ack that comes twice lets nothing more through.
        client.send(b"\x40\x02\x00\x01");
        assert!(client.sent().is_empty());
        client.send(b"\x40\x02\x00\x02");
        assert_eq!(client.sent(), publish_qos1(4, "4", false));
        assert!(!client.session.is_congested());
    }

    #[test]
    fn packet_ids_go_round_and_pass_over_what_is_still_in_flight() {
        let mut client = Client::connect(CONNECT_V4);
        for _ in 0..5 {
            client.deliver("x", QoS::AtLeastOnce);
            let sent = client.sent();
            if sent[6] != 4 {
                client.send(&[0x40, 2, sent[5], sent[6]]);
            }
        }
        // The fourth is never acknowledged. Two rounds and a half, without another 4.
        let mut last = 5;
        for _ in 0..160_000_u32 {
            client.deliver("x", QoS::AtLeastOnce);
            let sent = client.sent();
            let id = u16::from_be_bytes([sent[5], sent[6]]);
            let next = match last {
                u16::MAX => 1,
                3 => 5,
                last => last + 1,
            };
            assert_eq!(id, next);
            client.send(&[0x40, 2, sent[5], sent[6]]);
            last = id;
        }
        assert_eq!(client.session.inflight(), 1);
    }

    #[test]
    fn acks_may_come_in_any_order() {
        let mut client = Client::connect(CONNECT_V4);
        for text in ["1", "2", "3"] {
            client.deliver(text, QoS::AtLeastOnce);
        }
        client.sent();
        client.send(b"\x40\x02\x00\x02");
        assert_eq!(client.sent(), publish_qos1(3, "3", false));
    }

    #[test]
    fn what_was_not_acknowledged_is_sent_again_on_the_next_connection() {
        let mut client = Client::connect(CONNECT_V4_KEPT);
        client.deliver("1", QoS::AtLeastOnce);
        client.deliver("2", QoS::ExactlyOnce);
        client.deliver("3", QoS::AtLeastOnce);
        client.send(b"\x50\x02\x00\x02"); // PUBREC for the second
        client.sent();
        let (request, _) = request(CONNECT_V4_KEPT);
        client
            .session
            .resume(request, everything(), client.now, &mut client.out);
        let connack = b"\x20\x02\x01\x00";
        let again = publish_qos1(1, "1", true);
        let pubrel = b"\x62\x02\x00\x02";
        assert_eq!(client.sent(), [&connack[..], &again, pubrel].concat());
        client.send(b"\x40\x02\x00\x01");
        assert_eq!(client.sent(), publish_qos1(3, "3", false));
    }

    #[test]
    fn a_message_larger_than_the_client_takes_is_left_out() {
        // Maximum packet size 32.
        let mut client = Client::connect(
            b"\x10\x13\x00\x04MQTT\x05\x02\x00\x3c\x05\x27\x00\x00\x00\x20\x00\x01c",
        );
        client.deliver("more than thirty-two bytes in all", QoS::AtLeastOnce);
        client.deliver("more than thirty-two bytes in all", QoS::AtMostOnce);
        assert!(client.sent().is_empty());
        client.deliver("ok", QoS::AtMostOnce);
        assert_eq!(client.sent(), b"\x30\x06\x00\x01t\x00ok");
    }

    #[test]
    fn silence_for_one_and_a_half_keep_alives_ends_the_connection() {
        let mut client = Client::connect(CONNECT_V5);
        let deadline = client.session.deadline().unwrap();
        assert_eq!(deadline - client.now, Duration::from_secs(90));
        let before = deadline - Duration::from_millis(1);
        assert!(client.session.on_timeout(before, &mut client.out).is_none());
        assert!(
            client
                .session
                .on_timeout(deadline, &mut client.out)
                .is_some()
        );
        assert_eq!(client.sent()[2], 0x8d);
        client.now = before;
        client.send(b"\xc0\x00");
        assert_eq!(
            client.session.deadline(),
            Some(before + Duration::from_secs(90))
        );
    }

    #[test]
    fn the_will_is_due_unless_the_client_says_goodbye() {
        let mut client = Client::connect(CONNECT_V4_WILL);
        let will = client
            .session
            .on_connection_lost()
            .unwrap()
            .into_message(client.now);
        assert_eq!((will.topic.as_str(), &will.payload[..]), ("w", &b"m"[..]));
        assert_eq!(will.qos, QoS::AtLeastOnce);

        let mut client = Client::connect(CONNECT_V4_WILL);
        client.send(b"\xe0\x00");
        assert!(client.session.on_connection_lost().is_none());
    }

    #[test]
    fn a_second_connect_ends_the_connection() {
        let mut client = Client::connect(CONNECT_V4);
        let effects = client.send(CONNECT_V4);
        assert!(matches!(effects[..], [Effect::Close(Close::Refused(_))]));
        // What comes behind it is not looked at.
        assert!(client.send(b"\x32\x07\x00\x01a\x00\x09hi").is_empty());
    }

    #[test]
    fn a_publish_with_a_wildcard_or_without_utf_8_ends_the_connection() {
        for packet in [
            &b"\x30\x04\x00\x01+x"[..],
            b"\x30\x05\x00\x02a#x",
            b"\x30\x04\x00\x01\xffx",
            b"\x30\x03\x00\x00x",
        ] {
            let mut client = Client::connect(CONNECT_V5);
            let packet = [
                &packet[..1],
                &[packet[1] + 1],
                &packet[2..packet.len() - 1],
                b"\x00x",
            ]
            .concat();
            let effects = client.send(&packet);
            assert!(
                matches!(effects[..], [Effect::Close(Close::Refused(_))]),
                "{packet:?} {effects:?}"
            );
            assert_eq!(client.sent()[2], 0x90, "topic name invalid");
        }
    }

    #[test]
    fn a_publish_to_a_dollar_topic_is_acknowledged_and_goes_nowhere() {
        let mut client = Client::connect(CONNECT_V4);
        let effects = client.send(b"\x32\x08\x00\x02$a\x00\x01hi");
        assert!(
            matches!(&effects[..], [Effect::Denied { .. }]),
            "{effects:?}"
        );
        assert_eq!(client.sent(), b"\x40\x02\x00\x01");
        let mut client = Client::connect(CONNECT_V5);
        client.send(b"\x32\x09\x00\x02$a\x00\x01\x00hi");
        assert_eq!(client.sent(), b"\x40\x04\x00\x01\x87\x00", "not authorized");
    }

    #[test]
    fn invalid_filters_are_refused_one_by_one() {
        let mut client = Client::connect(CONNECT_V4);
        let effects = client.send(b"\x82\x0a\x00\x05\x00\x01a\x01\x00\x01b\x00");
        assert!(matches!(&effects[..], [Effect::Subscribe(granted)] if granted.len() == 2));
        assert_eq!(client.sent(), b"\x90\x04\x00\x05\x01\x00");
        let effects = client.send(b"\x82\x0b\x00\x06\x00\x02a#\x01\x00\x01c\x00");
        assert!(matches!(&effects[..], [Effect::Subscribe(granted)] if granted.len() == 1));
        assert_eq!(client.sent(), b"\x90\x04\x00\x06\x80\x00");
        // The fourth is one more than max_subscriptions.
        assert!(client.send(b"\x82\x06\x00\x07\x00\x01d\x00").is_empty());
        assert_eq!(client.sent(), b"\x90\x03\x00\x07\x80");
    }

    #[test]
    fn a_topic_alias_stands_for_the_topic_that_it_was_given_with() {
        let mut client = Client::connect(CONNECT_V5);
        let effects = client.send(b"\x30\x08\x00\x01a\x03\x23\x00\x01x");
        assert!(
            matches!(&effects[..], [Effect::Publish { message, .. }] if message.topic.as_str() == "a")
        );
        let effects = client.send(b"\x30\x07\x00\x00\x03\x23\x00\x01x");
        assert!(
            matches!(&effects[..], [Effect::Publish { message, .. }] if message.topic.as_str() == "a")
        );
        let effects = client.send(b"\x30\x07\x00\x00\x03\x23\x00\x02x");
        assert!(matches!(effects[..], [Effect::Close(Close::Refused(_))]));
        assert_eq!(client.sent()[2], 0x94);
    }

    #[test]
    fn a_resumed_session_keeps_to_the_new_connections_limits() {
        let mut client = Client::connect(CONNECT_V4_KEPT);
        client.deliver("1", QoS::AtLeastOnce);
        client.deliver(
            "much longer than the next connection takes",
            QoS::AtLeastOnce,
        );
        client.sent();
        // Receive maximum 1 and maximum packet size 32.
        let (request, decoder) = request(
            b"\x10\x16\x00\x04MQTT\x05\x00\x00\x3c\x08\x21\x00\x01\x27\x00\x00\x00\x20\x00\x01c",
        );
        client.decoder = decoder;
        client
            .session
            .resume(request, everything(), client.now, &mut client.out);
        let sent = client.sent();
        assert_eq!(&sent[sent.len() - 9..], b"\x3a\x07\x00\x01t\x00\x01\x001");
        client.deliver("3", QoS::AtLeastOnce);
        assert!(client.sent().is_empty());
        client.send(b"\x40\x02\x00\x01");
        assert_eq!(client.sent(), b"\x32\x07\x00\x01t\x00\x03\x003");
    }

    /// Near both ends, where ids start again.
    fn packet_id() -> impl Strategy<Value = u16> {
        prop_oneof![1..40u16, 65_500..=65_535u16]
    }

    proptest! {
        /// The first ones that come after the last one, whatever is in flight.
        #[test]
        fn packet_ids_are_given_out_in_turn_but_for_those_in_flight(
            used in prop::collection::btree_set(packet_id(), 0..60),
            last in packet_id(),
        ) {
            let mut client = Client::connect(CONNECT_V4_KEPT);
            let released = used.iter().map(|id| (*id, Inflight::Released));
            client.session.inflight = released.collect();
            client.session.last_packet_id = last;
            let ids = (last..=u16::MAX).chain(1..).skip(1);
            for id in ids.filter(|id| !used.contains(id)).take(200) {
                prop_assert_eq!(client.session.next_packet_id(), id);
            }
        }

        /// Whatever order packets and deliveries come in, the window holds, ids in flight differ,
        /// and nothing panics.
        #[test]
        fn the_window_holds_whatever_the_client_does(
            steps in prop::collection::vec((0u8..9, 1u8..5), 1..200),
        ) {
            let mut client = Client::connect(CONNECT_V4_KEPT);
            for (step, id) in steps {
                match step {
                    0 | 1 => client.deliver("x", QoS::AtLeastOnce),
                    2 => client.deliver("x", QoS::ExactlyOnce),
                    3 => drop(client.send(&[0x40, 2, 0, id])),
                    4 => drop(client.send(&[0x50, 2, 0, id])),
                    5 => drop(client.send(&[0x70, 2, 0, id])),
                    6 => drop(client.send(&[0x34, 6, 0, 1, b'a', 0, id, b'x'])),
                    7 => drop(client.send(&[0x62, 2, 0, id])),
                    _ => {
                        let (request, _) = request(CONNECT_V4_KEPT);
                        client
            .session
            .resume(request, everything(), client.now, &mut client.out);
                    }
                }
                let inflight = &client.session.inflight;
                prop_assert!(inflight.len() <= 2);
                let ids: FxHashSet<u16> = inflight.iter().map(|(id, _)| *id).collect();
                prop_assert_eq!(ids.len(), inflight.len());
                prop_assert!(client.session.waiting.is_empty() || inflight.len() == 2);
                prop_assert!(client.session.unreleased.len() <= 2);
            }
        }
    }
}
