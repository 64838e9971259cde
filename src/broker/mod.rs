//! The MQTT edge: listeners, sessions, fan-out.
//!
//! Takes in what clients send, gives it to the pipeline and to the clients that subscribed, and
//! owns every promise of MQTT. Knows nothing of apps and mappings.

pub mod access;
mod archive;
mod bell;
mod certificate;
mod codec;
mod connection;
mod door;
mod doorway;
mod fanout;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod intake;
mod introspection;
mod large_packets;
mod letter_topic;
mod link;
mod listener;
mod mailbox;
mod message;
mod rate;
mod reasons;
mod registry;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod rehearsal;
mod retained;
mod session;
mod share_group;
mod stored;
mod stream;
mod subscription;
mod system_topics;
mod tls;
mod tls_reload;
mod upgrade;
mod websocket;
mod well_formed;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rumqttd::protocol::{ConnectReturnCode, QoS, qos};
use rustc_hash::FxHashSet;
use rustls::pki_types::CertificateDer;
use tokio::sync::{Semaphore, watch};

use crate::dead_letters::{DeadLetter, DeadLetters, Reason};
use crate::event::{Event, unix_time_ns};
use crate::journal::Journal;
use crate::pipeline::Pipeline;
use crate::store::{Store, StoreError};
use access::{Access, AccessError, Identity};
use archive::{Archive, Restored};
use doorway::Doorway;
use fanout::{Fanout, Publisher, Subscriber};
use listener::ListenerStats;
use mailbox::{Bounds, Mailbox, Mailboxes};
use message::{Delivery, Message, SessionKey};
use rate::RateLimit;
use reasons::{Ending, Reasons};
use registry::{Due, Parked, Registry};
use session::{Limits, Session, Will};

pub use access::{LoginRefused, Permissions};
pub use certificate::CertificateNames;
pub use door::{Door, Entrant};
pub use intake::Intake;
pub use introspection::{ClientInfo, Listed, RetainedInfo, SubscriptionInfo, TopicInfo};
pub use listener::{Listener, Protocols, Transport};
pub use tls::{ClientFiles, TlsError, TlsFiles};
pub use tls_reload::TlsReloader;

pub(crate) use large_packets::{Place, Places};
pub(crate) use link::Link;

/// Connections beyond `max_connections` that may be between accept and CONNECT, so that a full
/// gateway can still tell a client that it is full, and a known client can take over its session.
/// When these are taken too, one in the [`doorway`] makes room.
const HANDSHAKES: usize = 64;

/// How the edge is set up. The keys of `mqtt` in the configuration, with their units.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    pub max_connections: usize,
    pub max_packet_bytes: usize,
    pub connect_timeout: Duration,
    pub write_timeout: Duration,
    /// Zero: the client's own wish stands.
    pub max_keep_alive: Duration,
    pub max_inflight: u16,
    pub receive_maximum: u16,
    pub max_queued_messages: usize,
    pub max_queued_bytes: usize,
    pub max_total_queued_bytes: usize,
    pub max_stored_bytes: usize,
    pub max_total_stored_bytes: u64,
    /// QoS 1 and 2 messages that are to be stored are acknowledged when they are.
    pub durable_acks: bool,
    pub max_subscriptions: usize,
    pub session_expiry_max: Duration,
    /// See [`Limits::response_information`].
    pub response_information: String,
    pub max_retained_messages: usize,
    /// How often the topics below `$SYS` are brought up to date. Zero: there are none.
    pub system_topics_every: Duration,
    pub max_retained_bytes: usize,
    /// Of all clients together.
    pub max_total_subscriptions: usize,
    /// Of all clients together, in large packets that have not come in whole.
    pub max_incoming_bytes: usize,
    /// Size of the largest packet, or frame of another edge.
    pub largest_incoming: usize,
    /// Per client. 0: no limit.
    pub max_messages_per_s: u32,
    /// Per client. 0: no limit.
    pub max_bytes_per_s: u64,
    /// From all clients together. 0: no limit.
    pub max_total_bytes_per_s: u64,
}

/// Of the messages that a session leaves undelivered at its end, so many are kept as dead letters, and
/// the others counted: one client must not push out the letters of all others.
const LETTERS_OF_A_SESSION: usize = 16;

/// How far the shutdown has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Running,
    /// Nothing more is read; what apps still make of it is sent.
    Draining,
    /// What waits is sent, then the connections are closed.
    Closing,
}

/// What the edge has done so far.
#[derive(Debug, Default)]
pub struct Stats {
    /// One for each [`Transport`].
    listeners: [ListenerStats; 4],
    /// Why connections have ended, and why CONNECTs were refused.
    endings: Reasons<Ending>,
    refusals: Reasons<ConnectReturnCode>,
    pub messages_received: AtomicU64,
    /// Their payloads.
    pub publish_bytes_received: AtomicU64,
    pub messages_denied: AtomicU64,
    /// CONNECT packets, of those that were refused too.
    pub connects: AtomicU64,
    pub packets_received: AtomicU64,
    pub bytes_received: AtomicU64,
    /// PUBLISH packets to clients.
    pub messages_sent: AtomicU64,
    /// Their payloads.
    pub publish_bytes_sent: AtomicU64,
    pub packets_sent: AtomicU64,
    pub bytes_sent: AtomicU64,
    /// Sessions whose time was up.
    pub expired: AtomicU64,
    pub most_connections: AtomicU64,
}

impl Stats {
    fn of(&self, transport: Transport) -> &ListenerStats {
        &self.listeners[transport as usize]
    }
}

/// The running edge.
pub struct Broker {
    shared: Arc<Shared>,
    phase: watch::Sender<Phase>,
    /// The way of what apps publish.
    publisher: Mutex<Publisher>,
}

/// What all connections share.
struct Shared {
    config: BrokerConfig,
    access: Access,
    limits: Limits,
    registry: Registry,
    fanout: Arc<Fanout>,
    mailboxes: Arc<Mailboxes>,
    pipeline: Arc<Pipeline>,
    /// Where events go that are on disk before they are acknowledged.
    journal: Option<Journal>,
    total_byte_rate: Mutex<RateLimit>,
    places: Places,
    stats: Stats,
    next_key: AtomicU64,
    phase: watch::Receiver<Phase>,
    sockets: Arc<Semaphore>,
    doorway: Arc<Doorway>,
    /// Makes assigned client ids unique over restarts.
    started_ns: u64,
    log_quota: Mutex<LogQuota>,
    /// Of the listeners, for the metrics.
    transports: Vec<Transport>,
    /// Shared by all listeners with TLS, if there are any.
    tls: Option<Arc<TlsReloader>>,
    /// Users, keys, rules or certificates have been read anew.
    access_changed: watch::Sender<()>,
    /// The name of this gateway, by which it knows what it has sent to others. Empty where it sends nothing.
    gateway: Arc<OnceLock<Arc<str>>>,
}

impl Broker {
    /// Starts what needs no client; [`Broker::listen`] does the rest. `tls` is what all listeners with TLS
    /// share, those of other edges, too.
    #[allow(clippy::too_many_arguments)]
    pub fn start(
        config: BrokerConfig,
        access: Access,
        listeners: &[Listener],
        tls: Option<Arc<TlsReloader>>,
        pipeline: Arc<Pipeline>,
        journal: Option<Journal>,
        store: Store,
        dead_letters: Arc<DeadLetters>,
    ) -> Result<Broker, StoreError> {
        let (phase, phase_seen) = watch::channel(Phase::Running);
        let (archive, restored) =
            Archive::open(store, config.max_total_stored_bytes, dead_letters.clone())?;
        let fanout = Arc::new(Fanout::new(
            config.max_retained_messages,
            config.max_retained_bytes,
            Some(archive.clone()),
        ));
        let bounds = Bounds {
            max_messages: config.max_queued_messages,
            max_bytes: config.max_queued_bytes,
            max_total_bytes: config.max_total_queued_bytes,
            max_stored_bytes: config.max_stored_bytes,
        };
        let gateway = Arc::new(OnceLock::new());
        let shared = Arc::new(Shared {
            limits: Limits {
                gateway: gateway.clone(),
                max_packet_bytes: config.max_packet_bytes as u32,
                max_inflight: config.max_inflight,
                receive_maximum: config.receive_maximum,
                max_subscriptions: config.max_subscriptions,
                all_subscriptions: fanout.subscription_counter(),
                max_total_subscriptions: config.max_total_subscriptions,
                session_expiry_max: config.session_expiry_max,
                max_keep_alive: (!config.max_keep_alive.is_zero()).then_some(config.max_keep_alive),
                response_information: config.response_information.clone(),
            },
            access,
            registry: Registry::default(),
            fanout: fanout.clone(),
            mailboxes: Arc::new(Mailboxes::new(bounds, Some(archive), dead_letters)),
            pipeline,
            journal,
            total_byte_rate: Mutex::new(RateLimit::new(
                config.max_total_bytes_per_s,
                Instant::now(),
            )),
            places: Places::new(
                config.max_incoming_bytes,
                config.largest_incoming,
                config.write_timeout,
            ),
            stats: Stats::default(),
            next_key: AtomicU64::new(restored.first_number.max(message::NO_SESSION + 1)),
            phase: phase_seen,
            sockets: Arc::new(Semaphore::new(config.max_connections + HANDSHAKES)),
            doorway: Arc::default(),
            started_ns: unix_time_ns(),
            log_quota: Mutex::new(LogQuota {
                since: Instant::now(),
                used: 0,
                left_out: 0,
            }),
            transports: listeners
                .iter()
                .map(|one| one.protocols.transport())
                .collect(),
            tls,
            access_changed: watch::Sender::new(()),
            gateway: gateway.clone(),
            config,
        });
        let wills = shared.restore(restored);
        tokio::spawn(shared.clone().publish_wills(wills));
        if let Some(tls) = &shared.tls {
            let on_change = {
                let shared = shared.clone();
                move || shared.log_out_uncertified()
            };
            tokio::spawn(tls.clone().watch(on_change));
        }
        tokio::spawn(shared.clone().reap_sessions());
        tokio::spawn(letter_topic::publish(shared.clone()));
        if !shared.config.system_topics_every.is_zero() {
            tokio::spawn(system_topics::publish(shared.clone()));
        }
        Ok(Broker {
            shared,
            phase,
            publisher: Mutex::new(Publisher::new(fanout)),
        })
    }

    /// Serves MQTT on the listeners that it was started with, until [`Broker::close`].
    pub fn listen(&self, listeners: Vec<Listener>) {
        for listener in listeners {
            tokio::spawn(listener::accept(listener, self.shared.clone()));
        }
    }

    /// The way in for other edges.
    pub fn door(&self) -> Door {
        Door::new(self.shared.clone())
    }

    /// Sends what an app made to those who subscribed to it. Called from the apps' threads; waits,
    /// within bounds, for subscribers that are behind.
    pub fn publish(&self, events: Vec<Event>) {
        let pressed = {
            let mut publisher = self.publisher.lock();
            for Event { topic, payload, .. } in events {
                let bytes = payload.len();
                publisher.add(&topic, bytes, || Message::new(topic.clone(), payload));
            }
            publisher.flush(Instant::now()).pressed
        };
        for mailbox in pressed {
            mailbox.eased_blocking();
        }
    }

    /// Publishes a message that was dropped before, as the gateway's own: to all that have subscribed to it by
    /// now, apps and clients. Waits, within bounds, for subscribers that are behind. False: too much waits for
    /// the apps, and nobody was sent anything.
    pub fn publish_again(&self, letter: &DeadLetter) -> bool {
        let (topic, payload) = (&letter.topic, &letter.payload);
        let mut tap = self.shared.pipeline.tap();
        let treatment = tap.treatment(topic);
        let event = Event::new(topic.clone(), payload.clone(), Instant::now());
        tap.add(event, treatment);
        if !tap.flush() {
            return false;
        }
        let message = || Message {
            qos: qos(letter.qos).unwrap_or(QoS::AtMostOnce),
            ..Message::new(topic.clone(), payload.clone())
        };
        let mut publisher = Publisher::new(self.shared.fanout.clone());
        publisher.add(topic, payload.len(), message);
        for mailbox in publisher.flush(Instant::now()).pressed {
            mailbox.eased_blocking();
        }
        true
    }

    pub fn stats(&self) -> BrokerStats {
        let (connected, parked) = self.shared.registry.counts();
        let stats = &self.shared.stats;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let sum = |counter: fn(&ListenerStats) -> &AtomicU64| {
            let counters = stats.listeners.iter().map(counter);
            counters.map(get).sum()
        };
        BrokerStats {
            connected,
            parked,
            accepted: sum(|listener| &listener.accepted),
            refused: sum(|listener| &listener.refused),
            messages_received: get(&stats.messages_received),
            messages_denied: get(&stats.messages_denied),
            packets_received: get(&stats.packets_received),
            bytes_received: get(&stats.bytes_received),
            messages_sent: get(&stats.messages_sent),
            packets_sent: get(&stats.packets_sent),
            bytes_sent: get(&stats.bytes_sent),
            messages_delivered: get(&self.shared.fanout.delivered),
            messages_dropped: get(&self.shared.mailboxes.dropped),
            subscriptions: self.shared.fanout.subscription_count(),
            retained: self.shared.fanout.retained_count(),
        }
    }

    /// Puts the counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        let stats = self.stats();
        metrics::gauge!("headgate_mqtt_parked_sessions").set(stats.parked as f64);
        metrics::gauge!("headgate_mqtt_subscriptions").set(stats.subscriptions as f64);
        metrics::gauge!("headgate_mqtt_retained_messages").set(stats.retained as f64);
        self.record_listeners();
        metrics::counter!("headgate_mqtt_received_messages_total")
            .absolute(stats.messages_received);
        metrics::counter!("headgate_mqtt_denied_messages_total").absolute(stats.messages_denied);
        metrics::counter!("headgate_mqtt_received_packets_total").absolute(stats.packets_received);
        metrics::counter!("headgate_mqtt_received_bytes_total").absolute(stats.bytes_received);
        metrics::counter!("headgate_mqtt_sent_messages_total").absolute(stats.messages_sent);
        metrics::counter!("headgate_mqtt_sent_packets_total").absolute(stats.packets_sent);
        metrics::counter!("headgate_mqtt_sent_bytes_total").absolute(stats.bytes_sent);
        metrics::counter!("headgate_mqtt_delivered_messages_total")
            .absolute(stats.messages_delivered);
        metrics::counter!("headgate_mqtt_dropped_messages_total").absolute(stats.messages_dropped);
        if let Some(archive) = &self.shared.mailboxes.archive {
            archive.record_metrics();
        }
        for (reason, count) in self.shared.access.failed_logins() {
            metrics::counter!("headgate_mqtt_failed_logins_total", "reason" => reason)
                .absolute(count);
        }
    }

    /// Reads the files that decide on access anew. Clients that couldn't log in any more are
    /// disconnected, and the others have new permissions. If a file is wrong, everything stays as it
    /// was. Blocks while it reads.
    pub fn reload_access(&self) -> Result<(), AccessError> {
        let Shared {
            access,
            registry,
            access_changed,
            ..
        } = &*self.shared;
        access.reload()?;
        registry.log_out_unless(|identity| access.still_valid(identity));
        access_changed.send_replace(());
        Ok(())
    }

    fn record_listeners(&self) {
        for &transport in &self.shared.transports {
            let listener = transport.as_str();
            let stats = self.shared.stats.of(transport);
            let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            metrics::gauge!("headgate_mqtt_clients", "listener" => listener)
                .set(get(&stats.clients) as f64);
            for (result, counter) in [("accepted", &stats.accepted), ("refused", &stats.refused)] {
                metrics::counter!(
                    "headgate_mqtt_connections_total", "listener" => listener, "result" => result
                )
                .absolute(get(counter));
            }
            if transport.has_tls() {
                metrics::counter!(
                    "headgate_mqtt_tls_handshake_failures_total", "listener" => listener
                )
                .absolute(get(&stats.tls_failures));
            }
        }
        if let Some(tls) = &self.shared.tls {
            tls.record_metrics();
        }
        reasons::record(&self.shared.stats.endings, &self.shared.stats.refusals);
    }

    /// Reads the files of `mqtt.tls` again, if there is a listener with TLS. Clients whose
    /// certificates hold no more are disconnected. On an error all stays as it was.
    pub fn reload_tls(&self) -> Result<(), TlsError> {
        if let Some(tls) = &self.shared.tls {
            tls.reload(SystemTime::now())?;
            self.shared.log_out_uncertified();
        }
        Ok(())
    }

    fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
        // Who connects after this sees the phase: both take the registry's lock.
        self.shared.registry.ring_all();
    }

    /// Accepts nobody and reads nothing any more.
    pub fn drain(&self) {
        self.enter(Phase::Draining);
    }

    /// Sends what waits and closes all connections. Returns when all are gone.
    pub async fn close(&self) {
        self.enter(Phase::Closing);
        let all = (self.shared.config.max_connections + HANDSHAKES) as u32;
        // The semaphore is never closed.
        let _ = self.shared.sockets.acquire_many(all).await;
        if let Some(archive) = self.shared.mailboxes.archive.clone() {
            // It waits for the disk.
            let _ = tokio::task::spawn_blocking(move || archive.close()).await;
        }
    }
}

/// What [`Broker::stats`] counts. Totals since the start, except where a count of now is meant.
#[derive(Clone, Debug, serde::Serialize)]
pub struct BrokerStats {
    /// Clients, now.
    pub connected: usize,
    /// Sessions without a connection, now.
    pub parked: usize,
    /// TCP connections.
    pub accepted: u64,
    /// TCP connections that never became a client.
    pub refused: u64,
    pub messages_received: u64,
    /// Published to topics that clients must not publish to; not among the received.
    pub messages_denied: u64,
    pub packets_received: u64,
    pub bytes_received: u64,
    /// PUBLISH packets to clients.
    pub messages_sent: u64,
    pub packets_sent: u64,
    pub bytes_sent: u64,
    /// Put into subscribers' mailboxes.
    pub messages_delivered: u64,
    /// Not put in, because a mailbox was full.
    pub messages_dropped: u64,
    /// Now.
    pub subscriptions: usize,
    /// Now.
    pub retained: usize,
}

/// A session is over: nothing is kept for it.
fn end_session(
    fanout: &Fanout,
    client_id: &str,
    session: &mut Session,
    mailbox: &Mailbox,
    now: Instant,
) {
    let key = session.key();
    let subscriptions = session.subscriptions();
    fanout.unsubscribe(key, subscriptions.map(|(key, _)| key));
    let (mut shared, mut lost) = session.take_shared();
    if mailbox.archive().is_none() {
        // It has nothing to come back for. What was a share group's alone is nobody's now.
        lost.retain(|delivery| delivery.group.is_some());
    }
    let mut waiting = VecDeque::new();
    if let Err(error) = mailbox.take(LETTERS_OF_A_SESSION, &mut waiting) {
        tracing::error!(
            client = client_id,
            %error,
            "what waits for a session that is over can't be read, and is dropped"
        );
    }
    waiting.extend(mailbox.close());
    for delivery in waiting {
        match delivery.group {
            Some(_) => shared.push(delivery),
            None => lost.push(delivery),
        }
    }
    // Of what was in flight at QoS 2, nobody else may have anything (MQTT 5.0, 4.8.2).
    lost.extend(fanout.pass_on(shared, key, now));
    lost.retain(|delivery| delivery.qos != QoS::AtMostOnce);
    for delivery in lost.iter().take(LETTERS_OF_A_SESSION) {
        mailbox.dead_letter(Reason::SessionEnded, &delivery.message, now);
    }
    let others = lost.len().saturating_sub(LETTERS_OF_A_SESSION);
    mailbox.count_dead_letters(Reason::SessionEnded, others as u64);
    if let Some(archive) = mailbox.archive() {
        // What is left on disk is counted there, when it is removed.
        let stored = lost.iter().filter(|delivery| delivery.is_stored);
        archive.remove(key, stored.map(|delivery| delivery.sequence));
        archive.remove_session(client_id, key);
    }
}

impl Shared {
    fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Returns when the phase is another than `phase`.
    async fn leaves(&self, phase: Phase) {
        // An error means that the broker is gone, which ends the phase too.
        let _ = self.phase.clone().wait_for(|now| *now != phase).await;
    }

    fn assign_client_id(&self, key: SessionKey) -> String {
        format!("headgate-{:x}-{key:x}", self.started_ns)
    }

    /// Takes up the sessions and retained messages of an earlier run.
    /// Returns the wills that came due while no gateway ran.
    fn restore(&self, restored: Restored) -> Vec<Will> {
        let now = Instant::now();
        self.fanout.restore_retained(restored.retained);
        for (client_id, mut record) in restored.sessions {
            let key = record.number;
            let stored = restored.queued.get(&key).cloned();
            let expires = record.expires_at(now);
            let will = record.will.take().map(Will::restore);
            let next = record.next_sequence;
            let session = Session::restore(record, self.limits.clone(), now);
            let mailbox = Mailbox::restored(key, &client_id, next, stored, self.mailboxes.clone());
            let mailbox = Arc::new(mailbox);
            let identity = Identity::remembered(session.user());
            let permissions = self.access.permissions(&identity, &client_id);
            for (subscription, options) in session.subscriptions() {
                let subscriber = Subscriber {
                    key,
                    mailbox: mailbox.clone(),
                    permissions: permissions.clone(),
                    options: *options,
                };
                self.fanout.subscribe(subscription, subscriber);
            }
            let parked = Parked {
                session,
                mailbox,
                expires,
                will,
            };
            self.registry.restore(client_id, parked);
        }
        let due = restored.wills.into_iter();
        due.map(|stored| Will::restore(stored).1).collect()
    }

    async fn publish_wills(self: Arc<Self>, wills: Vec<Will>) {
        let now = Instant::now();
        for will in wills {
            self.publish_alone(will.into_message(now), now).await;
        }
    }

    /// A client has gone and will come back: what other members of its share groups can have
    /// instead does not wait for that.
    fn share_out(&self, session: &Session, mailbox: &Mailbox, now: Instant) {
        let shared = mailbox.take_shared();
        let stored = |deliveries: &[Delivery]| -> FxHashSet<u64> {
            let stored = deliveries.iter().filter(|delivery| delivery.is_stored);
            stored.map(|delivery| delivery.sequence).collect()
        };
        let before = stored(&shared);
        let left = self.fanout.pass_on(shared, session.key(), now);
        if let Some(archive) = mailbox.archive().filter(|_| !before.is_empty()) {
            let after = stored(&left);
            archive.remove(session.key(), before.difference(&after).copied());
        }
        mailbox.put_back(left.into());
    }

    /// The will, if the rules still let it be published.
    fn allowed_will(
        &self,
        will: Option<Will>,
        session: &Session,
        mailbox: &Mailbox,
        now: Instant,
    ) -> Option<Will> {
        will.filter(|will| {
            let is_allowed = session.allows(will);
            if !is_allowed {
                self.deny_will(will, mailbox, now);
            }
            is_allowed
        })
    }

    fn deny_will(&self, will: &Will, mailbox: &Mailbox, now: Instant) {
        self.stats.messages_denied.fetch_add(1, Ordering::Relaxed);
        mailbox.dead_letter(Reason::Denied, &will.message, now);
    }

    /// A parked session is over; what was waiting for that happens.
    async fn end_parked(self: &Arc<Self>, client_id: &str, parked: Parked) {
        let now = Instant::now();
        let Parked {
            mut session,
            mailbox,
            will,
            ..
        } = parked;
        let will = will.map(|(_, will)| will);
        let will = self.allowed_will(will, &session, &mailbox, now);
        end_session(&self.fanout, client_id, &mut session, &mailbox, now);
        if let Some(will) = will {
            self.publish_alone(will.into_message(now), now).await;
        }
    }

    /// Publishes a message for which there is no connection.
    async fn publish_alone(self: &Arc<Self>, message: Message, now: Instant) {
        if message.retain
            && let Err(error) = self.fanout.retain(&message, now)
        {
            tracing::warn!(topic = %message.topic, %error);
        }
        let mut intake = Intake::new(self.clone());
        intake.publish_message(message, now);
        intake.flush_events(now);
        intake.in_pipeline().await;
        if !intake.is_settled() {
            // Nobody waits for an acknowledgement; the journal has it as soon as the disk takes it.
            tokio::spawn(async move { intake.settled().await });
        }
    }

    /// Publishes delayed wills and ends parked sessions when their time is up.
    async fn reap_sessions(self: Arc<Self>) {
        /// Looking takes a walk over all sessions, so it is not done more often.
        const GRAIN: Duration = Duration::from_millis(200);
        loop {
            let next = self.registry.next_due();
            tokio::select! {
                () = async {
                    match next {
                        Some(at) => tokio::time::sleep_until(at.into()).await,
                        None => std::future::pending().await,
                    }
                } => {}
                () = self.registry.parked.notified() => {}
                () = self.leaves(Phase::Running) => return,
            }
            tokio::time::sleep(GRAIN).await;
            let now = Instant::now();
            for due in self.registry.take_due(now) {
                match due {
                    Due::Will(will, true, _) => {
                        self.publish_alone(will.into_message(now), now).await;
                    }
                    Due::Will(will, false, mailbox) => self.deny_will(&will, &mailbox, now),
                    Due::Expired(client, parked) => {
                        self.stats.expired.fetch_add(1, Ordering::Relaxed);
                        self.end_parked(&client, *parked).await;
                        tracing::debug!(client, "session expired");
                    }
                }
            }
        }
    }

    /// Whether somebody may still come as `user`, for all that can be known.
    fn may_log_in(&self, user: &str) -> bool {
        let tls = self.tls.as_ref();
        self.access.may_know(user) || tls.is_some_and(|tls| tls.asks_for_certificates())
    }

    /// Whether a client with these certificates would be let in now.
    fn vouches_for(&self, certificates: &[CertificateDer<'static>]) -> bool {
        let tls = self.tls.as_ref();
        tls.is_some_and(|tls| tls.vouches_for(certificates))
    }

    /// Disconnects the clients whose certificates hold no more.
    fn log_out_uncertified(&self) {
        self.registry
            .log_out_unless_certified(|certificates| self.vouches_for(certificates));
        self.access_changed.send_replace(());
    }

    /// Whether a line about a client may be logged: clients that come and go quickly must not fill
    /// the disk. What is left out is counted, and said with the next line that is not.
    fn may_log(&self) -> bool {
        const LINES: u32 = 100;
        const PERIOD: Duration = Duration::from_secs(1);
        let mut quota = self.log_quota.lock();
        let now = Instant::now();
        if now.duration_since(quota.since) >= PERIOD {
            if quota.left_out > 0 {
                tracing::warn!(lines = quota.left_out, "lines about clients were left out");
            }
            *quota = LogQuota {
                since: now,
                used: 0,
                left_out: 0,
            };
        }
        let allowed = quota.used < LINES;
        match allowed {
            true => quota.used += 1,
            false => quota.left_out += 1,
        }
        allowed
    }
}

/// The lines about clients in the present second.
#[derive(Debug)]
struct LogQuota {
    since: Instant,
    used: u32,
    left_out: u64,
}
