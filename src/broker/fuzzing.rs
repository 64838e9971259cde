//! One client of the edge without sockets and clocks, for the fuzz targets in `fuzz/`.
//!
//! Does with bytes what [`super::connection`] does with them, and checks on the way what must hold
//! whatever a client sends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rumqttd::protocol::QoS;

use super::access::Permissions;
use super::codec::{Decoder, Incoming};
use super::message::{Delivery, Message};
use super::session::{ConnectRequest, Effect, Limits, Session};
use crate::event::Topic;

/// Small, so that a few bytes reach each bound.
const MAX_PACKET_BYTES: usize = 1024;
const MAX_INFLIGHT: u16 = 3;
const RECEIVE_MAXIMUM: u16 = 3;
const MAX_SUBSCRIPTIONS: usize = 4;

/// A client, and its session if it has one.
pub struct Client {
    decoder: Decoder,
    session: Option<Session>,
    input: BytesMut,
    out: BytesMut,
    now: Instant,
    closed: bool,
}

impl Default for Client {
    fn default() -> Self {
        Client {
            decoder: Decoder::new(MAX_PACKET_BYTES),
            session: None,
            input: BytesMut::new(),
            out: BytesMut::new(),
            now: Instant::now(),
            closed: false,
        }
    }
}

impl Client {
    /// Takes bytes as a socket brings them.
    pub fn receive(&mut self, bytes: &[u8]) {
        if self.closed {
            return;
        }
        self.input.extend_from_slice(bytes);
        let mut effects = Vec::new();
        while !self.closed {
            let before = self.input.len();
            match self.decoder.next(&mut self.input) {
                Ok(None) => {
                    assert!(before < MAX_PACKET_BYTES + 5, "too much is awaited");
                    break;
                }
                Ok(Some(packet)) => {
                    assert!(self.input.len() < before, "a packet takes bytes");
                    self.on_packet(packet, &mut effects);
                }
                Err(error) => {
                    if let Some(session) = &mut self.session {
                        effects.push(session.on_decode_error(&error, &mut self.out));
                    }
                    self.closed = true;
                }
            }
        }
        self.apply(effects);
        self.check();
    }

    fn on_packet(&mut self, packet: Incoming, effects: &mut Vec<Effect>) {
        if let Some(session) = &mut self.session {
            session.on_packet(packet, self.now, &mut self.out, effects);
            return;
        }
        let Incoming::Control(packet) = packet else {
            panic!("the decoder lets nothing but CONNECT come first");
        };
        let version = self.decoder.version().expect("a packet has been decoded");
        let limits = limits();
        match ConnectRequest::new(version, packet, 1, &limits, || "assigned".into()) {
            Ok(request) => {
                let session = Session::new(
                    request,
                    Permissions::everything(),
                    1,
                    limits,
                    self.now,
                    &mut self.out,
                );
                self.session = Some(session);
            }
            Err(_) => self.closed = true,
        }
    }

    fn apply(&mut self, effects: Vec<Effect>) {
        let session = self.session.as_mut();
        let Some(session) = session else {
            return assert!(effects.is_empty());
        };
        for effect in effects {
            match effect {
                Effect::Publish { message, ticket } => {
                    let topic = message.topic.as_str();
                    assert!(!topic.is_empty() && !topic.starts_with('$'));
                    assert!(!topic.contains(['+', '#', '\0']));
                    session.accepted(ticket, &mut self.out);
                }
                Effect::Denied { .. } | Effect::Subscribe(_) | Effect::Unsubscribe(_) => {}
                Effect::Close(_) => {
                    self.closed = true;
                    return;
                }
            }
        }
    }

    /// Another client publishes something that this one has subscribed to.
    pub fn deliver(&mut self, qos: u8, payload: &[u8]) {
        let (Some(session), false) = (&mut self.session, self.closed) else {
            return;
        };
        // As the connection does: what is more stays in the mailbox.
        if session.is_congested() {
            return;
        }
        let qos = rumqttd::protocol::qos(qos % 3).expect("0, 1 or 2");
        let topic = Topic::new("a/b").expect("a valid topic");
        let message = Arc::new(Message {
            qos,
            ..Message::new(topic, Bytes::copy_from_slice(payload))
        });
        let delivery = Delivery {
            message,
            qos,
            retain: false,
            group: None,
            sequence: 0,
            is_stored: false,
            subscription_ids: (qos == QoS::AtMostOnce).then(|| [1, 2].as_slice().into()),
        };
        session.deliver(delivery, self.now, &mut self.out);
        self.check();
    }

    /// Time goes by.
    pub fn wait(&mut self, time: Duration) {
        self.now += time;
        if let Some(session) = &mut self.session
            && !self.closed
            && session.on_timeout(self.now, &mut self.out).is_some()
        {
            self.closed = true;
        }
        self.check();
    }

    /// The connection breaks; the client comes back with `connect`, and has its session again if it
    /// was to be kept.
    pub fn reconnect(&mut self, connect: &[u8]) {
        let mut kept = self.session.take();
        if let Some(session) = &mut kept {
            let _will = session.on_connection_lost();
        }
        let now = self.now;
        *self = Client {
            now,
            ..Client::default()
        };
        let mut input = BytesMut::from(connect);
        let Ok(Some(Incoming::Control(packet))) = self.decoder.next(&mut input) else {
            return;
        };
        let Some(version) = self.decoder.version() else {
            return;
        };
        let limits = limits();
        let Ok(request) = ConnectRequest::new(version, packet, 2, &limits, || "assigned".into())
        else {
            self.closed = true;
            return;
        };
        self.session = Some(match kept {
            Some(mut session) if !session.session_expiry().is_zero() && !request.clean_start => {
                session.resume(request, Permissions::everything(), now, &mut self.out);
                session
            }
            _ => Session::new(
                request,
                Permissions::everything(),
                2,
                limits,
                now,
                &mut self.out,
            ),
        });
        self.check();
    }

    /// What goes to the client is whole packets that a server sends.
    fn check(&mut self) {
        let mut rest = &self.out.split()[..];
        while let [first, after @ ..] = rest {
            assert!(
                matches!(first >> 4, 2 | 3 | 4 | 5 | 6 | 7 | 9 | 11 | 13 | 14),
                "packet type {} to a client",
                first >> 4
            );
            let mut length = 0;
            let mut digits = 0;
            for digit in after {
                length |= usize::from(digit & 127) << (7 * digits);
                digits += 1;
                if digit & 128 == 0 {
                    break;
                }
            }
            assert!((1..=4).contains(&digits));
            rest = &after[digits + length..];
        }
        if let Some(session) = &self.session {
            assert!(session.subscriptions().count() <= MAX_SUBSCRIPTIONS);
        }
    }
}

fn limits() -> Limits {
    Limits {
        gateway: Arc::default(),
        max_packet_bytes: MAX_PACKET_BYTES as u32,
        max_inflight: MAX_INFLIGHT,
        receive_maximum: RECEIVE_MAXIMUM,
        max_subscriptions: MAX_SUBSCRIPTIONS,
        all_subscriptions: Arc::default(),
        max_total_subscriptions: 1000,
        session_expiry_max: Duration::from_secs(100),
        max_keep_alive: None,
        response_information: "response/%c".into(),
    }
}
