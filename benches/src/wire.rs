//! The few MQTT 3.1.1 packets that a load generator needs, without any copy on the way.
//!
//! Packet layouts: MQTT 3.1.1, section 3
//! (<http://docs.oasis-open.org/mqtt/mqtt/v3.1.1/os/mqtt-v3.1.1-os.html>).

use std::io::{self, Read, Write};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::stream::{Endpoint, Stream};

pub const CONNECT: u8 = 0x10;
pub const CONNACK: u8 = 0x20;
pub const PUBLISH: u8 = 0x30;
pub const PUBACK: u8 = 0x40;
pub const PUBREC: u8 = 0x50;
pub const PUBREL: u8 = 0x60;
pub const PUBCOMP: u8 = 0x70;
pub const SUBSCRIBE: u8 = 0x80;
pub const SUBACK: u8 = 0x90;
pub const UNSUBSCRIBE: u8 = 0xA0;
pub const PINGREQ: u8 = 0xC0;
pub const DISCONNECT: u8 = 0xE0;

/// How long a broker may take to answer CONNECT or SUBSCRIBE, or to take in what is written.
const PATIENCE: Duration = Duration::from_secs(30);

/// Seconds without a packet after which a broker may drop the generator's clients.
const KEEP_ALIVE_S: u16 = 600;

/// Connects as MQTT client `id` with a clean session and waits for the broker's yes.
pub fn connect(broker: &Endpoint, id: &str) -> Result<Stream> {
    let address = broker.address;
    let mut stream = Stream::open(broker, PATIENCE)?;
    let mut body = Vec::new();
    push_text(&mut body, "MQTT");
    body.push(4);
    body.push(0b10);
    body.extend(KEEP_ALIVE_S.to_be_bytes());
    push_text(&mut body, id);
    stream.write_all(&packet(CONNECT, &body))?;
    let mut answer = [0; 4];
    stream
        .read_exact(&mut answer)
        .context("no answer to CONNECT")?;
    ensure!(
        answer[0] == CONNACK && answer[3] == 0,
        "{address} refused client {id}: {answer:02x?}"
    );
    Ok(stream)
}

/// Subscribes to `filter` and waits for the broker's yes.
pub fn subscribe(stream: &mut Stream, filter: &str, qos: u8) -> Result<()> {
    let mut body = 1_u16.to_be_bytes().to_vec();
    push_text(&mut body, filter);
    body.push(qos);
    stream.write_all(&packet(SUBSCRIBE | 0b10, &body))?;
    let mut answer = [0; 5];
    stream
        .read_exact(&mut answer)
        .context("no answer to SUBSCRIBE")?;
    ensure!(
        answer[0] == SUBACK && answer[4] == qos,
        "subscription to {filter} with QoS {qos} refused: {answer:02x?}"
    );
    Ok(())
}

/// A whole PUBLISH, and where in it the packet identifier and the payload begin.
pub fn publish(topic: &str, qos: u8, payload: &[u8]) -> (Vec<u8>, usize, usize) {
    let mut body = Vec::new();
    push_text(&mut body, topic);
    let identifier = body.len();
    if qos > 0 {
        body.extend([0, 0]);
    }
    let start = body.len();
    body.extend(payload);
    let frame = packet(PUBLISH | qos << 1, &body);
    let header = frame.len() - body.len();
    (frame, header + identifier, header + start)
}

/// The packet with this first byte and this body.
pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    let mut length = body.len();
    loop {
        let seven = (length & 0x7F) as u8;
        length >>= 7;
        if length == 0 {
            frame.push(seven);
            break;
        }
        frame.push(seven | 0x80);
    }
    frame.extend(body);
    frame
}

fn push_text(body: &mut Vec<u8>, text: &str) {
    body.extend((text.len() as u16).to_be_bytes());
    body.extend(text.as_bytes());
}

/// A packet as it lies in a receive buffer.
pub struct Frame<'a> {
    pub first: u8,
    pub body: &'a [u8],
    /// Fixed header and body.
    pub whole: &'a [u8],
}

impl<'a> Frame<'a> {
    pub fn kind(&self) -> u8 {
        self.first & 0xF0
    }

    /// Of an acknowledgement.
    pub fn acknowledged(&self) -> Result<[u8; 2]> {
        let identifier = self.body.first_chunk().copied();
        identifier.context("an acknowledgement without an identifier")
    }

    /// Of a PUBLISH.
    pub fn qos(&self) -> u8 {
        self.first >> 1 & 0b11
    }

    /// Packet identifier (0 at QoS 0) and payload of a PUBLISH.
    pub fn publish(&self) -> Result<(u16, &'a [u8])> {
        let malformed = "a PUBLISH that is too short for its topic";
        let (length, rest) = self.body.split_first_chunk::<2>().context(malformed)?;
        let topic = usize::from(u16::from_be_bytes(*length));
        let rest = rest.get(topic..).context(malformed)?;
        if self.qos() == 0 {
            return Ok((0, rest));
        }
        let (identifier, payload) = rest.split_first_chunk::<2>().context(malformed)?;
        Ok((u16::from_be_bytes(*identifier), payload))
    }
}

/// The packet at the start of `bytes`; none if it has not come in as a whole.
#[inline]
pub fn next_frame(bytes: &[u8]) -> Result<Option<Frame<'_>>> {
    let mut length = 0;
    for index in 1..=4 {
        let Some(byte) = bytes.get(index) else {
            return Ok(None);
        };
        length |= usize::from(byte & 0x7F) << (7 * (index - 1));
        if byte & 0x80 == 0 {
            let start = index + 1;
            return Ok(bytes.get(..start + length).map(|whole| Frame {
                first: whole[0],
                body: &whole[start..],
                whole,
            }));
        }
    }
    bail!("a packet length of more than four bytes")
}

/// Takes packets out of a stream in pieces as large as they come.
pub struct Connection {
    stream: Stream,
    buffer: Vec<u8>,
    /// Bytes at the buffer's start that have come in and are not yet a whole packet.
    filled: usize,
    /// How long to let bytes gather after a read that brought few.
    gathering: Option<Duration>,
    /// Whether the last read brought so little.
    was_small: bool,
    is_drained: bool,
}

/// A read of fewer bytes and fewer packets is hardly worth its cost: a message, or some
/// acknowledgements.
const FEW_BYTES: usize = 256;
const FEW_PACKETS: usize = 16;

impl Connection {
    /// `timeout`: how long one call may wait for bytes.
    pub fn new(stream: Stream, timeout: Duration) -> Result<Self> {
        stream.socket().set_read_timeout(Some(timeout))?;
        Ok(Connection {
            stream,
            buffer: vec![0; 256 * 1024],
            filled: 0,
            gathering: None,
            was_small: false,
            is_drained: true,
        })
    }

    /// Lets bytes gather for `time` after a read that brought few. A broker that writes every packet
    /// on its own would otherwise cost a read each, and the reader would take the CPU away from it.
    pub fn gathering(self, time: Option<Duration>) -> Self {
        Connection {
            gathering: time,
            ..self
        }
    }

    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// Whether the last read took all that there was.
    pub fn is_drained(&self) -> bool {
        self.is_drained
    }

    /// Reads once. `arrived` is called with what came in, before it is taken apart, and `each` with
    /// every whole packet. False if nothing came in time; an error if the broker hung up.
    pub fn receive<T>(
        &mut self,
        arrived: impl FnOnce() -> T,
        mut each: impl FnMut(&T, Frame<'_>) -> Result<()>,
    ) -> Result<bool> {
        if let Some(time) = self.gathering.filter(|_| self.was_small) {
            thread::sleep(time);
        }
        if self.filled == self.buffer.len() {
            self.buffer.resize(self.filled * 2, 0);
        }
        let read = match self.stream.read(&mut self.buffer[self.filled..]) {
            Ok(0) => bail!("the broker closed the connection"),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                return Ok(false);
            }
            Err(error) => return Err(error).context("can't read from the broker"),
        };
        self.is_drained = read < self.buffer.len() - self.filled;
        let context = arrived();
        let end = self.filled + read;
        let mut start = 0;
        let mut packets = 0;
        while let Some(frame) = next_frame(&self.buffer[start..end])? {
            start += frame.whole.len();
            packets += 1;
            each(&context, frame)?;
        }
        self.was_small = read < FEW_BYTES && packets < FEW_PACKETS;
        self.buffer.copy_within(start..end, 0);
        self.filled = end - start;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publish_is_read_back_as_it_was_written() {
        for qos in [0, 1] {
            for size in [0, 100, 20_000] {
                let payload = vec![b'x'; size];
                let (mut bytes, identifier, start) = publish("plant/line1", qos, &payload);
                assert_eq!(&bytes[start..], payload);
                if qos == 1 {
                    bytes[identifier..identifier + 2].copy_from_slice(&[1, 2]);
                }
                bytes.push(PINGREQ);
                let frame = next_frame(&bytes).unwrap().unwrap();
                assert_eq!((frame.kind(), frame.qos()), (PUBLISH, qos));
                assert_eq!(frame.whole.len(), bytes.len() - 1);
                let (identifier, read) = frame.publish().unwrap();
                assert_eq!(identifier, if qos == 1 { 0x0102 } else { 0 });
                assert_eq!(read, payload);
            }
        }
    }

    #[test]
    fn a_packet_that_has_not_come_in_as_a_whole_is_waited_for() {
        let (bytes, ..) = publish("a", 0, &[7; 200]);
        for end in 0..bytes.len() {
            assert!(next_frame(&bytes[..end]).unwrap().is_none());
        }
    }

    #[test]
    fn malformed_packets_are_errors() {
        assert!(next_frame(&[PUBLISH, 0xFF, 0xFF, 0xFF, 0xFF]).is_err());
        let short = packet(PUBLISH, &[0, 9, b'a']);
        assert!(next_frame(&short).unwrap().unwrap().publish().is_err());
    }
}
