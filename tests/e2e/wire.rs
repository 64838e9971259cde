//! An MQTT client that sends what no library would: bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use crate::gateway::{Gateway, PATIENCE};

/// A packet as it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub first: u8,
    pub body: Vec<u8>,
}

pub const CONNACK: u8 = 2;
pub const PUBLISH: u8 = 3;
pub const PUBACK: u8 = 4;
pub const PUBREC: u8 = 5;
pub const PUBCOMP: u8 = 7;
pub const SUBACK: u8 = 9;
pub const UNSUBACK: u8 = 11;
pub const PINGRESP: u8 = 13;
pub const DISCONNECT: u8 = 14;

impl Packet {
    pub fn kind(&self) -> u8 {
        self.first >> 4
    }

    pub fn qos(&self) -> u8 {
        self.first >> 1 & 3
    }

    pub fn is_retained(&self) -> bool {
        self.first & 1 == 1
    }

    fn topic_end(&self) -> usize {
        2 + usize::from(u16::from_be_bytes([self.body[0], self.body[1]]))
    }

    /// Of a PUBLISH, as are the following.
    pub fn topic(&self) -> &str {
        assert_eq!(self.kind(), PUBLISH, "{self:?}");
        std::str::from_utf8(&self.body[2..self.topic_end()]).unwrap()
    }

    /// Of a PUBACK, too.
    pub fn id(&self) -> u16 {
        let at = match self.kind() {
            PUBACK => 0,
            _ => self.topic_end(),
        };
        u16::from_be_bytes([self.body[at], self.body[at + 1]])
    }

    /// Of a 3.1.1 PUBLISH.
    pub fn payload(&self) -> &[u8] {
        let id = if self.qos() == 0 { 0 } else { 2 };
        &self.body[self.topic_end() + id..]
    }
}

/// One connection.
pub struct Wire {
    stream: TcpStream,
    input: Vec<u8>,
    /// Where in `input` the next packet begins.
    at: usize,
}

/// Protocol level 4 is MQTT 3.1.1, 5 is MQTT 5.
pub fn connect_packet(level: u8, id: &str, keep_alive_s: u16) -> Vec<u8> {
    const CLEAN: u8 = 2;
    connect_packet_with(level, id, keep_alive_s, CLEAN, &[])
}

pub fn connect_packet_with(
    level: u8,
    id: &str,
    keep_alive_s: u16,
    flags: u8,
    rest: &[u8],
) -> Vec<u8> {
    let mut body = b"\x00\x04MQTT".to_vec();
    body.extend([level, flags]);
    body.extend(keep_alive_s.to_be_bytes());
    if level == 5 {
        body.push(0);
    }
    body.extend(string(id));
    body.extend(rest);
    packet(0x10, &body)
}

pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u16).to_be_bytes()[..], text].concat()
}

pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![first];
    let mut length = body.len();
    loop {
        let low = (length % 128) as u8;
        length /= 128;
        packet.push(if length > 0 { low | 128 } else { low });
        if length == 0 {
            break;
        }
    }
    packet.extend(body);
    packet
}

/// The packet that `bytes` begin with, if it has come whole, and its length.
pub fn first_packet(bytes: &[u8]) -> Option<(Packet, usize)> {
    let mut length = 0;
    for (place, byte) in bytes.iter().skip(1).enumerate() {
        length |= usize::from(byte & 127) << (7 * place);
        if byte & 128 == 0 {
            let body = 2 + place;
            let packet = Packet {
                first: bytes[0],
                body: bytes.get(body..body + length)?.to_vec(),
            };
            return Some((packet, body + length));
        }
    }
    None
}

/// A 3.1.1 PUBLISH. The id is left out at QoS 0.
pub fn publish_packet(topic: impl AsRef<[u8]>, payload: &[u8], qos: u8, id: u16) -> Vec<u8> {
    let mut body = string(topic);
    if qos > 0 {
        body.extend(id.to_be_bytes());
    }
    body.extend(payload);
    packet(0x30 | qos << 1, &body)
}

/// A 3.1.1 SUBSCRIBE.
pub fn subscribe_packet(id: u16, filters: &[(&str, u8)]) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    for (filter, qos) in filters {
        body.extend(string(filter));
        body.push(*qos);
    }
    packet(0x82, &body)
}

impl Wire {
    /// A TCP connection and nothing more.
    pub fn open(gateway: &Gateway) -> Wire {
        let stream = TcpStream::connect(gateway.mqtt()).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Wire {
            stream,
            input: Vec::new(),
            at: 0,
        }
    }

    /// A 3.1.1 client with a clean session, if there is a gateway now.
    pub fn dial(address: SocketAddr, id: &str) -> Option<Wire> {
        let stream = TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut wire = Wire {
            stream,
            input: Vec::new(),
            at: 0,
        };
        wire.send_while_open(&connect_packet(4, id, 0));
        wire.next_or_end()?;
        Some(wire)
    }

    /// A 3.1.1 client with a clean session.
    pub fn connect(gateway: &Gateway, id: &str) -> Wire {
        let mut wire = Wire::open(gateway);
        wire.send(&connect_packet(4, id, 0));
        wire.accepted();
        wire
    }

    /// The same in MQTT 5.
    pub fn connect_v5(gateway: &Gateway, id: &str) -> Wire {
        let mut wire = Wire::open(gateway);
        wire.send(&connect_packet(5, id, 0));
        wire.accepted();
        wire
    }

    /// Waits for a CONNACK that says yes.
    /// A 3.1.1 client whose session is kept. Whether it had one.
    pub fn connect_kept(gateway: &Gateway, id: &str) -> (Wire, bool) {
        let mut wire = Wire::open(gateway);
        wire.send(&connect_packet_with(4, id, 0, 0, &[]));
        let connack = wire.next();
        assert_eq!((connack.kind(), connack.body[1]), (CONNACK, 0));
        (wire, connack.body[0] == 1)
    }

    pub fn accepted(&mut self) {
        let packet = self.next();
        assert_eq!((packet.kind(), packet.body[1]), (CONNACK, 0), "{packet:?}");
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends as much as the gateway takes.
    pub fn send_while_open(&mut self, bytes: &[u8]) {
        // A connection that is closed meanwhile is what the caller waits for.
        let _ = self.stream.write_all(bytes);
    }

    pub fn subscribe(&mut self, filter: &str, qos: u8) {
        self.send(&subscribe_packet(1, &[(filter, qos)]));
        let packet = self.next();
        assert_eq!(
            (packet.kind(), &packet.body[..]),
            (SUBACK, &[0, 1, qos][..])
        );
    }

    /// Publishes at QoS 1 and waits for the acknowledgement.
    pub fn publish(&mut self, topic: &str, payload: &[u8]) {
        self.send(&publish_packet(topic, payload, 1, 7));
        let packet = self.next();
        assert_eq!(
            (packet.kind(), &packet.body[..]),
            (PUBACK, &[0, 7][..]),
            "{packet:?}"
        );
    }

    /// The next packet. Must come.
    pub fn next(&mut self) -> Packet {
        match self.next_or_end() {
            Some(packet) => packet,
            None => panic!("the gateway has closed the connection"),
        }
    }

    /// The next PUBLISH; acknowledged, if it wants to be.
    pub fn next_message(&mut self) -> Packet {
        let packet = self.next();
        assert_eq!(packet.kind(), PUBLISH, "{packet:?}");
        if packet.qos() == 1 {
            let id = packet.id().to_be_bytes();
            self.send(&[0x40, 2, id[0], id[1]]);
        }
        packet
    }

    /// The next packet, or none when the connection is closed. One of both must come.
    pub fn next_or_end(&mut self) -> Option<Packet> {
        loop {
            if let Some(packet) = self.parse() {
                return Some(packet);
            }
            let mut chunk = [0; 64 * 1024];
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(count) => {
                    self.input.drain(..self.at);
                    self.at = 0;
                    self.input.extend(&chunk[..count]);
                }
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                // Somebody has paused this process.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("nothing came: {error}"),
            }
        }
    }

    fn parse(&mut self) -> Option<Packet> {
        let (packet, length) = first_packet(&self.input[self.at..])?;
        self.at += length;
        Some(packet)
    }

    /// Nothing has come that was not looked at. A gateway that does not read now could not answer a ping.
    pub fn assert_nothing_yet(&mut self) {
        self.stream.set_nonblocking(true).unwrap();
        let came = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false).unwrap();
        let error = came.expect_err("something has come");
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    }

    /// What comes before the gateway closes the connection, which it must.
    pub fn until_closed(mut self) -> Vec<Packet> {
        std::iter::from_fn(|| self.next_or_end()).collect()
    }

    /// Nothing has come that was not asked for: a ping is answered next.
    pub fn assert_quiet(&mut self) {
        self.send(&[0xc0, 0]);
        let packet = self.next();
        assert_eq!(packet.kind(), PINGRESP, "{packet:?}");
    }

    /// Closes without a word, in order.
    pub fn close(self) {
        // It may be closed from the other side.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Closes as a crash does: with a reset.
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
    }

    pub fn try_clone(&self) -> Wire {
        Wire {
            stream: self.stream.try_clone().unwrap(),
            input: Vec::new(),
            at: 0,
        }
    }

    pub fn set_receive_buffer(&self, bytes: usize) {
        socket2::SockRef::from(&self.stream)
            .set_recv_buffer_size(bytes)
            .unwrap();
    }
}
