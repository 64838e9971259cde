//! The other end of a connection: a client that keeps the rules, and answers when it is told to.

use std::collections::{HashSet, VecDeque};

use bytes::BytesMut;

use super::super::codec::Version;
use super::ledger::Number;

/// What a client remembers from one connection to the next.
#[derive(Default)]
pub struct Memory {
    last_packet_id: u16,
    /// Sent at QoS 1 and 2 and not acknowledged in full, in this order.
    unacknowledged: VecDeque<Outgoing>,
    /// The CONNACK has come. This client publishes nothing before: what it sends again comes first.
    is_connected: bool,
    /// QoS 2 messages that have come and are not released.
    begun: HashSet<u16>,
    /// Acknowledgements that it owes; forgotten when the connection breaks.
    owed: VecDeque<[u8; 4]>,
    /// SUBSCRIBE and UNSUBSCRIBE that wait for an answer.
    asked: HashSet<(u8, u16)>,
}

struct Outgoing {
    packet_id: u16,
    number: Number,
    topic: &'static str,
    qos: u8,
    is_received: bool,
}

/// A message that a client has read.
pub struct Arrived {
    pub number: Number,
    pub topic: String,
    pub qos: u8,
    pub is_again: bool,
}

const PUBACK: u8 = 4;
const PUBREC: u8 = 5;
const PUBREL: u8 = 6;
const PUBCOMP: u8 = 7;
const SUBACK: u8 = 9;
const UNSUBACK: u8 = 11;

/// QoS 2 messages that a client may have unreleased: the gateway's receive maximum.
pub const RECEIVE_MAXIMUM: u16 = 8;

/// Questions that a client has open at most: with what it publishes, fewer than it has packet ids.
const MOST_ASKED: usize = 32;

impl Memory {
    fn next_packet_id(&mut self) -> u16 {
        // Few ids, so that they are used again soon.
        const IDS: u16 = 64;
        loop {
            self.last_packet_id = self.last_packet_id % IDS + 1;
            let id = self.last_packet_id;
            let is_asked = [SUBACK, UNSUBACK].map(|kind| self.asked.contains(&(kind, id)));
            let mut sent = self.unacknowledged.iter();
            if is_asked == [false; 2] && !sent.any(|sent| sent.packet_id == id) {
                return id;
            }
        }
    }

    /// A PUBLISH; none if the client has to wait for acknowledgements first.
    pub fn publish(
        &mut self,
        version: Version,
        number: Number,
        topic: &'static str,
        qos: u8,
    ) -> Option<Vec<u8>> {
        if !self.is_connected || self.unacknowledged.len() >= usize::from(RECEIVE_MAXIMUM) {
            return None;
        }
        let packet_id = if qos > 0 { self.next_packet_id() } else { 0 };
        let outgoing = Outgoing {
            packet_id,
            number,
            topic,
            qos,
            is_received: false,
        };
        let packet = outgoing.packet(version, false);
        if qos > 0 {
            self.unacknowledged.push_back(outgoing);
        }
        Some(packet)
    }

    /// A SUBSCRIBE; none if too many wait for an answer.
    pub fn subscribe(&mut self, version: Version, filter: &str, qos: u8) -> Option<Vec<u8>> {
        if self.asked.len() >= MOST_ASKED {
            return None;
        }
        let id = self.next_packet_id();
        self.asked.insert((SUBACK, id));
        let mut body = id.to_be_bytes().to_vec();
        body.extend((version == Version::V5).then_some(0));
        body.extend(string(filter));
        body.push(qos);
        Some(packet(0x82, &body))
    }

    pub fn unsubscribe(&mut self, version: Version, filter: &str) -> Option<Vec<u8>> {
        if self.asked.len() >= MOST_ASKED {
            return None;
        }
        let id = self.next_packet_id();
        self.asked.insert((UNSUBACK, id));
        let mut body = id.to_be_bytes().to_vec();
        body.extend((version == Version::V5).then_some(0));
        body.extend(string(filter));
        Some(packet(0xa2, &body))
    }

    /// One of the acknowledgements that it owes. In which order it sends them is its own affair, but
    /// for those of QoS 2 (MQTT 5.0, 4.6); this client keeps to the order.
    pub fn acknowledge(&mut self) -> Option<[u8; 4]> {
        self.owed.pop_front()
    }

    /// The connection is gone.
    pub fn disconnected(&mut self) {
        self.is_connected = false;
        self.owed.clear();
        self.asked.clear();
    }

    /// The gateway has no session of this client's.
    pub fn forget_session(&mut self) {
        self.unacknowledged.clear();
        self.begun.clear();
    }

    /// A new connection. What the client sends again if the gateway has its session, and forgets
    /// if not.
    pub fn connected(&mut self, version: Version, is_present: bool) -> Vec<u8> {
        self.is_connected = true;
        if !is_present {
            self.forget_session();
        }
        let again = self
            .unacknowledged
            .iter()
            .map(|sent| match sent.is_received {
                true => acknowledgement(PUBREL, sent.packet_id).to_vec(),
                false => sent.packet(version, true),
            });
        again.collect::<Vec<_>>().concat()
    }

    /// Nothing is on its way between the client and the gateway.
    pub fn is_quiet(&self) -> bool {
        self.unacknowledged.is_empty() && self.owed.is_empty()
    }

    /// Reads one packet, if a whole one is there.
    pub fn read(&mut self, version: Version, bytes: &mut BytesMut) -> Read {
        let Some((first, body)) = take_packet(bytes) else {
            return Read::Nothing;
        };
        let id = || u16::from_be_bytes([body[0], body[1]]);
        match first >> 4 {
            2 => return Read::Connected(body[0] == 1),
            3 => return Read::Message(self.on_publish(version, first, &body)),
            PUBACK => self.on_puback(id()),
            PUBREC => {
                let sent = self.find(id(), 2, "PUBREC");
                sent.is_received = true;
                self.owed.push_back(acknowledgement(PUBREL, id()));
            }
            PUBREL => {
                self.begun.remove(&id());
                self.owed.push_back(acknowledgement(PUBCOMP, id()));
            }
            PUBCOMP => {
                let sent = self.find(id(), 2, "PUBCOMP");
                assert!(sent.is_received, "PUBCOMP before PUBREC");
                self.forget(id());
            }
            kind @ (SUBACK | UNSUBACK) => {
                let was_asked = self.asked.remove(&(kind, id()));
                assert!(was_asked, "an answer to nothing: {first:#x} {body:02x?}");
            }
            14 => return Read::Disconnected,
            _ => panic!("a packet that no server sends: {first:#x} {body:02x?}"),
        }
        Read::Other
    }

    fn on_puback(&mut self, id: u16) {
        self.find(id, 1, "PUBACK");
        self.forget(id);
    }

    fn find(&mut self, id: u16, qos: u8, what: &str) -> &mut Outgoing {
        let mut sent = self.unacknowledged.iter_mut();
        sent.find(|sent| sent.packet_id == id && sent.qos == qos)
            .unwrap_or_else(|| panic!("{what} of nothing: {id}"))
    }

    fn forget(&mut self, id: u16) {
        self.unacknowledged.retain(|sent| sent.packet_id != id);
    }

    /// None: a QoS 2 message that has come before.
    fn on_publish(&mut self, version: Version, first: u8, body: &[u8]) -> Option<Arrived> {
        let qos = first >> 1 & 3;
        let (topic, mut rest) = take_string(body);
        let mut id = 0;
        if qos > 0 {
            id = u16::from_be_bytes([rest[0], rest[1]]);
            assert_ne!(id, 0);
            rest = &rest[2..];
        }
        if version == Version::V5 {
            rest = &rest[1 + usize::from(rest[0])..];
        }
        let number = Number::from_be_bytes(rest.try_into().expect("a payload is a number"));
        match qos {
            1 => self.owed.push_back(acknowledgement(PUBACK, id)),
            2 => {
                self.owed.push_back(acknowledgement(PUBREC, id));
                if !self.begun.insert(id) {
                    assert!(
                        first & 8 != 0,
                        "{number} came again as if for the first time"
                    );
                    return None;
                }
            }
            _ => {}
        }
        Some(Arrived {
            number,
            topic: topic.to_owned(),
            qos,
            // At QoS 2 one that the client has not seen is new, whatever it is marked as.
            is_again: qos == 1 && first & 8 != 0,
        })
    }
}

/// What a client has read.
pub enum Read {
    Nothing,
    /// Whether the gateway had its session.
    Connected(bool),
    Message(Option<Arrived>),
    Disconnected,
    Other,
}

impl Outgoing {
    fn packet(&self, version: Version, is_again: bool) -> Vec<u8> {
        let mut body = string(self.topic);
        if self.qos > 0 {
            body.extend(self.packet_id.to_be_bytes());
        }
        body.extend((version == Version::V5).then_some(0));
        body.extend(self.number.to_be_bytes());
        packet(0x30 | self.qos << 1 | u8::from(is_again) << 3, &body)
    }
}

fn acknowledgement(kind: u8, id: u16) -> [u8; 4] {
    let flags = if kind == PUBREL { 2 } else { 0 };
    let [high, low] = id.to_be_bytes();
    [kind << 4 | flags, 2, high, low]
}

/// The body has at most 127 bytes.
pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    assert!(body.len() < 128);
    [&[first, body.len() as u8], body].concat()
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u16).to_be_bytes(), text.as_bytes()].concat()
}

fn take_string(bytes: &[u8]) -> (&str, &[u8]) {
    let length = usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
    let text = std::str::from_utf8(&bytes[2..2 + length]).expect("topics are UTF-8");
    (text, &bytes[2 + length..])
}

fn take_packet(bytes: &mut BytesMut) -> Option<(u8, Vec<u8>)> {
    let first = *bytes.first()?;
    let mut length = 0;
    let mut header = 1;
    loop {
        let digit = *bytes.get(header)?;
        length |= usize::from(digit & 127) << (7 * (header - 1));
        header += 1;
        if digit & 128 == 0 {
            break;
        }
    }
    assert!(bytes.len() >= header + length, "half a packet was written");
    let packet = bytes.split_to(header + length);
    Some((first, packet[header..].to_vec()))
}
