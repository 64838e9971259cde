//! Several clients and the broker between them, without sockets, tasks and clocks.
//!
//! Sessions, fan-out, mailboxes and registry are the broker's own. What [`super::connection`] and
//! [`super::Shared`] do with them is done here in the same order, and the clients keep the rules of
//! MQTT. Every message that reaches a client is compared with the [`Ledger`] at once, and when all is
//! quiet, nothing may be missing.

mod client;
mod ledger;

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::BytesMut;

use self::client::{Memory, RECEIVE_MAXIMUM, Read, packet, string};
use self::ledger::{Ledger, Name, Number};
use super::access::{Identity, Permissions};
use super::codec::{Decoder, Incoming, Version};
use super::end_session;
use super::fanout::{Fanout, Publisher, Subscriber};
use super::mailbox::{Bounds, Mailbox, Mailboxes};
use super::message::{Delivery, Message, SessionKey};
use super::registry::{Due, Eviction, Online, Parked, Registry};
use super::session::{Close, ConnectRequest, Effect, Limits, Session, Will};
use super::subscription::SubscriptionKey;
use crate::dead_letters::DeadLetters;

const CLIENTS: usize = 4;

const TOPICS: [&str; 4] = ["a", "b", "b/c", "b/c/d"];

const FILTERS: [Name; 8] = [
    (None, "a"),
    (None, "b/#"),
    (None, "+"),
    (None, "b/+"),
    (None, "#"),
    (Some("g"), "b/#"),
    (Some("g"), "a"),
    (Some("h"), "+/c"),
];

/// Seconds that a session outlives its connection, and that a will waits.
const EXPIRIES_S: [u32; 3] = [0, 5, 60];
const DELAYS_S: [u32; 3] = [0, 2, 30];

/// Small, so that messages wait.
const MAX_INFLIGHT: u16 = 3;

/// More than there can be: here nothing is to be dropped.
const PLENTY: usize = 1 << 30;

/// Turns after which everything must be quiet.
const MAX_TURNS: usize = 10_000;

/// One thing that happens.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Also when it is connected: the new connection takes over.
    Connect {
        client: usize,
        version: Version,
        is_clean: bool,
        expiry_s: u32,
        will: Option<(&'static str, u8, u32)>,
    },
    Leave(usize),
    Break(usize),
    Subscribe(usize, Name, u8),
    Unsubscribe(usize, Name),
    Publish(usize, &'static str, u8),
    /// The broker reads what a client has sent.
    Hear(usize),
    /// The broker sends what waits for a client.
    Send(usize),
    /// The client reads so many packets.
    Read(usize, usize),
    /// The client sends so many of the acknowledgements that it owes.
    Acknowledge(usize, usize),
    Wait(Duration),
}

/// Everything.
pub struct Rehearsal {
    now: Instant,
    fanout: Arc<Fanout>,
    mailboxes: Arc<Mailboxes>,
    registry: Registry,
    limits: Limits,
    last_key: SessionKey,
    last_number: Number,
    clients: [Client; CLIENTS],
    ledger: Ledger,
}

struct Client {
    id: String,
    memory: Memory,
    /// Of the last connection.
    version: Version,
    connection: Option<Connection>,
}

/// Both ends of a connection.
struct Connection {
    online: Arc<Online>,
    key: SessionKey,
    session: Session,
    mailbox: Arc<Mailbox>,
    publisher: Publisher,
    decoder: Decoder,
    taken: VecDeque<Delivery>,
    to_broker: BytesMut,
    to_client: BytesMut,
    will: Option<(Number, Duration)>,
}

impl Default for Rehearsal {
    fn default() -> Self {
        let now = Instant::now();
        let fanout = Arc::new(Fanout::new(0, 0, None));
        let bounds = Bounds {
            max_messages: PLENTY,
            max_bytes: PLENTY,
            max_total_bytes: PLENTY,
            max_stored_bytes: 0,
        };
        let dead_letters = Arc::new(DeadLetters::new(now));
        Rehearsal {
            now,
            mailboxes: Arc::new(Mailboxes::new(bounds, None, dead_letters)),
            registry: Registry::default(),
            limits: Limits {
                gateway: Arc::default(),
                max_packet_bytes: 1 << 20,
                max_inflight: MAX_INFLIGHT,
                receive_maximum: RECEIVE_MAXIMUM,
                max_subscriptions: PLENTY,
                all_subscriptions: fanout.subscription_counter(),
                max_total_subscriptions: PLENTY,
                session_expiry_max: Duration::from_secs(3600),
                max_keep_alive: None,
                response_information: String::new(),
            },
            fanout,
            last_key: 0,
            last_number: 0,
            clients: std::array::from_fn(|index| Client {
                id: format!("client-{index}"),
                memory: Memory::default(),
                version: Version::V4,
                connection: None,
            }),
            ledger: Ledger::default(),
        }
    }
}

impl Rehearsal {
    /// Does what `bytes` say, whatever they are, and then lets everything come to rest.
    pub fn play(bytes: &[u8]) {
        let mut rehearsal = Rehearsal::default();
        let mut bytes = bytes.iter().copied();
        while let Some(step) = Step::decode(&mut bytes) {
            rehearsal.take(step);
        }
        rehearsal.settle();
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Connect {
                client,
                version,
                is_clean,
                expiry_s,
                will,
            } => self.connect(client, version, is_clean, expiry_s, will),
            Step::Leave(client) => {
                if let Some(connection) = &mut self.clients[client].connection {
                    connection.to_broker.extend_from_slice(&[0xe0, 0]);
                    self.hear(client);
                }
            }
            Step::Break(client) => self.lose(client),
            Step::Subscribe(client, name, qos) => self.ask(client, |memory, version| {
                memory.subscribe(version, &written(name), qos)
            }),
            Step::Unsubscribe(client, name) => self.ask(client, |memory, version| {
                memory.unsubscribe(version, &written(name))
            }),
            Step::Publish(client, topic, qos) => {
                self.last_number += 1;
                let number = self.last_number;
                self.ask(client, |memory, version| {
                    memory.publish(version, number, topic, qos)
                });
            }
            Step::Hear(client) => self.hear(client),
            Step::Send(client) => self.send(client),
            Step::Read(client, count) => {
                for _ in 0..count {
                    self.read(client);
                }
            }
            Step::Acknowledge(client, count) => {
                for _ in 0..count {
                    self.ask(client, |memory, _| Some(memory.acknowledge()?.to_vec()));
                }
            }
            Step::Wait(time) => self.wait(time),
        }
    }

    /// A client sends what `packet` makes, if it is connected.
    fn ask(&mut self, client: usize, packet: impl FnOnce(&mut Memory, Version) -> Option<Vec<u8>>) {
        let client = &mut self.clients[client];
        if let Some(connection) = &mut client.connection
            && let Some(packet) = packet(&mut client.memory, client.version)
        {
            connection.to_broker.extend_from_slice(&packet);
        }
    }

    // ---- What the connection does ----

    fn connect(
        &mut self,
        client: usize,
        version: Version,
        is_clean: bool,
        expiry_s: u32,
        will: Option<(&'static str, u8, u32)>,
    ) {
        self.lose(client);
        let will = will.map(|(topic, qos, delay_s)| {
            self.last_number += 1;
            (self.last_number, topic, qos, delay_s)
        });
        let id = self.clients[client].id.clone();
        let connect = connect_packet(version, &id, is_clean, expiry_s, will);
        let mut decoder = Decoder::new(self.limits.max_packet_bytes as usize);
        let first = decoder.next(&mut BytesMut::from(&connect[..]));
        let Ok(Some(Incoming::Control(packet))) = first else {
            panic!("CONNECT is not understood: {connect:02x?}");
        };
        self.last_key += 1;
        let key = self.last_key;
        let request = ConnectRequest::new(version, packet, key, &self.limits, || unreachable!());
        let request = request.expect("a CONNECT that keeps the rules");
        let identity = Identity::remembered(None);
        let attached = now_or_never(self.registry.attach(&id, &identity, |_| true, PLENTY));
        let (online, parked) = attached.expect("there is room, and nobody has a name");

        let parked = match parked {
            Some(parked) if request.clean_start || parked.expires <= self.now => {
                self.end_parked(parked);
                None
            }
            parked => parked,
        };
        let permissions = Permissions::everything();
        let mut to_client = BytesMut::new();
        let (key, session, mailbox) = match parked {
            Some(mut parked) => {
                if let Some((_, will)) = parked.will.take() {
                    self.ledger.will_cancelled(number(&will.message));
                }
                let mut session = parked.session;
                session.resume(request, permissions, self.now, &mut to_client);
                parked.mailbox.set_online();
                (session.key(), session, parked.mailbox)
            }
            None => {
                // A client that loses its connection before it has read that it has a new session
                // would take the next CONNACK for one about the old session, and send again what
                // the gateway can't know any more. MQTT has no remedy, so here it knows at once.
                self.clients[client].memory.forget_session();
                let limits = self.limits.clone();
                let session =
                    Session::new(request, permissions, key, limits, self.now, &mut to_client);
                let is_kept = !session.session_expiry().is_zero();
                let mailbox = Mailbox::new(key, &id, is_kept, self.mailboxes.clone());
                (key, session, Arc::new(mailbox))
            }
        };
        let will = will.map(|(number, _, _, delay_s)| {
            self.ledger.will_held(number);
            let delay_s = if version == Version::V5 { delay_s } else { 0 };
            (number, Duration::from_secs(delay_s.into()))
        });
        let client = &mut self.clients[client];
        client.version = version;
        client.connection = Some(Connection {
            online,
            key,
            session,
            mailbox,
            publisher: Publisher::new(self.fanout.clone()),
            decoder,
            taken: VecDeque::new(),
            to_broker: BytesMut::new(),
            to_client,
            will,
        });
    }

    /// The broker reads all that a client has sent.
    fn hear(&mut self, index: usize) {
        let Some(mut connection) = self.clients[index].connection.take() else {
            return;
        };
        let mut effects = Vec::new();
        loop {
            let packet = connection.decoder.next(&mut connection.to_broker);
            match packet.expect("a client that keeps the rules") {
                Some(packet) => connection.session.on_packet(
                    packet,
                    self.now,
                    &mut connection.to_client,
                    &mut effects,
                ),
                None => break,
            }
        }
        let mut tickets = Vec::new();
        let mut has_left = false;
        for effect in effects {
            match effect {
                Effect::Publish { message, ticket } => {
                    self.enter(&message);
                    connection.publish(message);
                    tickets.push(ticket);
                }
                Effect::Subscribe(subscriptions) => {
                    connection.publisher.flush(self.now);
                    for subscription in subscriptions {
                        let qos = subscription.options.qos as u8;
                        let name = name_of(&subscription.key);
                        self.ledger.subscribed(connection.key, name, qos);
                        let subscriber = Subscriber {
                            key: connection.key,
                            mailbox: connection.mailbox.clone(),
                            permissions: Permissions::everything(),
                            options: subscription.options,
                        };
                        self.fanout.subscribe(&subscription.key, subscriber);
                    }
                }
                Effect::Unsubscribe(subscriptions) => {
                    connection.publisher.flush(self.now);
                    for subscription in &subscriptions {
                        let name = name_of(subscription);
                        self.ledger.unsubscribed(connection.key, name);
                    }
                    self.fanout.unsubscribe(connection.key, &subscriptions);
                }
                Effect::Denied { topic, .. } => panic!("{topic} is denied"),
                Effect::Close(Close::ByClient) => has_left = true,
                Effect::Close(Close::Refused(why)) => panic!("a client is refused: {why}"),
            }
        }
        connection.publisher.flush(self.now);
        for ticket in tickets {
            connection
                .session
                .accepted(ticket, &mut connection.to_client);
        }
        if has_left && let Some((number, _)) = connection.will.take() {
            self.ledger.will_cancelled(number);
        }
        self.clients[index].connection = Some(connection);
        if has_left {
            self.lose(index);
        }
    }

    /// What waits for a client goes out, as far as it may.
    fn send(&mut self, index: usize) {
        let Some(connection) = &mut self.clients[index].connection else {
            return;
        };
        let Connection {
            session,
            mailbox,
            taken,
            to_client,
            ..
        } = connection;
        while !session.is_congested() {
            if taken.is_empty() {
                mailbox.take(5, taken).expect("there is no disk");
            }
            let Some(delivery) = taken.pop_front() else {
                break;
            };
            session.deliver(delivery, self.now, to_client);
        }
        assert!(session.take_undeliverable().is_empty());
        assert!(session.inflight() <= usize::from(MAX_INFLIGHT));
    }

    /// The connection ends, from whichever side; what was on its way is lost.
    fn lose(&mut self, index: usize) {
        let client = &mut self.clients[index];
        let Some(connection) = client.connection.take() else {
            return;
        };
        client.memory.disconnected();
        let id = client.id.clone();
        let Connection {
            online,
            key,
            mut session,
            mailbox,
            taken,
            will: promised,
            ..
        } = connection;
        online.evict(Eviction::TakenOver);
        let expiry = session.session_expiry();
        if let Some((number, delay)) = promised {
            self.ledger.will_due(number, self.now + delay.min(expiry));
        }
        let will = match session.on_connection_lost() {
            Some(will) if !expiry.is_zero() && !will.delay.is_zero() => {
                Some((self.now + will.delay, will))
            }
            Some(will) => {
                self.publish_will(will);
                None
            }
            None => None,
        };
        mailbox.put_back(taken);
        if expiry.is_zero() {
            self.end_session(&mut session, &mailbox);
            self.registry.detach(&id, &online, None, 0);
        } else {
            mailbox.put_back(session.park());
            let left = self.fanout.pass_on(mailbox.take_shared(), key, self.now);
            mailbox.put_back(left.into());
            mailbox.set_offline();
            let parked = Parked {
                session,
                mailbox,
                expires: self.now + expiry,
                will,
            };
            let evicted = self.registry.detach(&id, &online, Some(parked), PLENTY);
            assert!(evicted.is_none());
        }
    }

    // ---- What the broker does for sessions without a connection ----

    fn end_session(&mut self, session: &mut Session, mailbox: &Mailbox) {
        self.ledger.ended(session.key());
        end_session(&self.fanout, "rehearsal", session, mailbox, self.now);
    }

    fn end_parked(&mut self, parked: Parked) {
        let Parked {
            mut session,
            mailbox,
            will,
            ..
        } = parked;
        self.end_session(&mut session, &mailbox);
        if let Some((_, will)) = will {
            // The end of the session is what it waited for, if nothing before.
            self.ledger.will_due(number(&will.message), self.now);
            self.publish_will(will);
        }
    }

    fn publish_will(&mut self, will: Will) {
        let message = will.into_message(self.now);
        self.ledger.will_published(number(&message), self.now);
        self.enter(&message);
        let mut publisher = Publisher::new(self.fanout.clone());
        let topic = message.topic.clone();
        publisher.add(&topic, message.payload.len(), || message);
        publisher.flush(self.now);
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        for due in self.registry.take_due(self.now) {
            match due {
                Due::Will(will, ..) => self.publish_will(will),
                Due::Expired(_, parked) => self.end_parked(*parked),
            }
        }
        self.ledger.check_wills(self.now);
    }

    /// Writes down that the broker has taken a message.
    fn enter(&mut self, message: &Message) {
        let mut topics = TOPICS.into_iter();
        let topic = topics.find(|topic| *topic == message.topic.as_str());
        let topic = topic.expect("a topic that somebody has named");
        let qos = message.qos as u8;
        self.ledger.published(number(message), topic, qos);
    }

    // ---- What a client does ----

    /// Reads one packet. False: there is none.
    fn read(&mut self, index: usize) -> bool {
        let client = &mut self.clients[index];
        let Some(connection) = &mut client.connection else {
            return false;
        };
        match client
            .memory
            .read(client.version, &mut connection.to_client)
        {
            Read::Nothing => return false,
            Read::Connected(is_present) => {
                let again = client.memory.connected(client.version, is_present);
                connection.to_broker.extend_from_slice(&again);
            }
            Read::Message(Some(arrived)) => self.ledger.received(
                connection.key,
                arrived.number,
                &arrived.topic,
                arrived.qos,
                arrived.is_again,
            ),
            Read::Disconnected => panic!("the broker has said goodbye to {}", client.id),
            Read::Message(None) | Read::Other => {}
        }
        true
    }

    /// Everybody comes back, reads and acknowledges, until nothing more comes.
    fn settle(&mut self) {
        for client in 0..CLIENTS {
            if self.clients[client].connection.is_none() {
                let version = self.clients[client].version;
                self.connect(client, version, false, 60, None);
            }
        }
        for _ in 0..MAX_TURNS {
            let mut is_quiet = true;
            for client in 0..CLIENTS {
                self.send(client);
                while self.read(client) {
                    is_quiet = false;
                }
                is_quiet &= self.clients[client].memory.is_quiet();
                self.take(Step::Acknowledge(client, usize::from(MAX_INFLIGHT) * 4));
                self.hear(client);
            }
            if is_quiet {
                self.ledger.check_complete();
                self.ledger.check_wills(self.now);
                return;
            }
        }
        panic!("it never comes to rest");
    }
}

impl Connection {
    fn publish(&mut self, message: Message) {
        let topic = message.topic.clone();
        let bytes = message.payload.len();
        self.publisher.add(&topic, bytes, || message);
    }
}

impl Step {
    fn decode(bytes: &mut impl Iterator<Item = u8>) -> Option<Step> {
        let kind = bytes.next()?;
        let mut next = || usize::from(bytes.next().unwrap_or(0));
        let client = next() % CLIENTS;
        Some(match kind % 24 {
            0..=2 => {
                let (how, of_will) = (next(), next());
                let topic = TOPICS[of_will % TOPICS.len()];
                let qos = (of_will / 4 % 3) as u8;
                let delay_s = DELAYS_S[of_will / 12 % DELAYS_S.len()];
                Step::Connect {
                    client,
                    version: [Version::V4, Version::V5][how % 2],
                    is_clean: how / 2 % 3 == 0,
                    expiry_s: EXPIRIES_S[how / 6 % EXPIRIES_S.len()],
                    will: (of_will >= 128).then_some((topic, qos, delay_s)),
                }
            }
            3 => Step::Leave(client),
            4 => Step::Break(client),
            5..=7 => Step::Subscribe(client, FILTERS[next() % FILTERS.len()], (next() % 3) as u8),
            8 => Step::Unsubscribe(client, FILTERS[next() % FILTERS.len()]),
            9..=13 => Step::Publish(client, TOPICS[next() % TOPICS.len()], (next() % 3) as u8),
            14 | 15 => Step::Hear(client),
            16 | 17 => Step::Send(client),
            18 | 19 => Step::Read(client, next() % 8),
            20..=22 => Step::Acknowledge(client, next() % 8),
            _ => Step::Wait(Duration::from_millis(next() as u64 * 50)),
        })
    }
}

fn connect_packet(
    version: Version,
    id: &str,
    is_clean: bool,
    expiry_s: u32,
    will: Option<(Number, &str, u8, u32)>,
) -> Vec<u8> {
    let is_v5 = version == Version::V5;
    let mut flags = u8::from(is_clean) << 1;
    if let Some((_, _, qos, _)) = will {
        flags |= 0b100 | qos << 3;
    }
    let mut body = string("MQTT");
    body.extend([if is_v5 { 5 } else { 4 }, flags, 0, 0]);
    if is_v5 {
        body.extend([5, 0x11]);
        body.extend(expiry_s.to_be_bytes());
    }
    body.extend(string(id));
    if let Some((number, topic, _, delay_s)) = will {
        if is_v5 {
            body.extend([5, 0x18]);
            body.extend(delay_s.to_be_bytes());
        }
        body.extend(string(topic));
        body.extend([0, 4]);
        body.extend(number.to_be_bytes());
    }
    packet(0x10, &body)
}

/// As it stands in SUBSCRIBE.
fn written((group, filter): Name) -> String {
    match group {
        Some(group) => format!("$share/{group}/{filter}"),
        None => filter.to_owned(),
    }
}

fn name_of(key: &SubscriptionKey) -> Name {
    let mut names = FILTERS.into_iter();
    let name = names.find(|name| written(*name) == key.to_string());
    name.expect("a filter that somebody has named")
}

fn number(message: &Message) -> Number {
    let payload = message.payload[..].try_into();
    Number::from_be_bytes(payload.expect("a payload is a number"))
}

/// The result of a future that has nothing to wait for.
fn now_or_never<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("somebody else holds the client id"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn whatever_happens_messages_come_as_their_qos_says(
            bytes in proptest::collection::vec(any::<u8>(), 0..600)
        ) {
            Rehearsal::play(&bytes);
        }
    }

    /// What the property is worth: it covers what it is meant to cover.
    #[test]
    fn a_message_that_is_lost_or_doubled_is_noticed() {
        let mut ledger = Ledger::default();
        ledger.subscribed(1, (None, "#"), 2);
        ledger.published(7, "a", 2);
        let complete = std::panic::catch_unwind(|| {
            let mut ledger = Ledger::default();
            ledger.subscribed(1, (None, "#"), 1);
            ledger.published(7, "a", 1);
            ledger.check_complete();
        });
        assert!(complete.is_err());
        ledger.received(1, 7, "a", 2, false);
        ledger.check_complete();
        let twice = std::panic::AssertUnwindSafe(|| ledger.received(1, 7, "a", 2, false));
        assert!(std::panic::catch_unwind(twice).is_err());
    }
}
