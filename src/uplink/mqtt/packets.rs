//! What comes from a broker: frames, and what their reason codes mean.
//!
//! The codec is that of rumqttc. It knows fewer reason codes than there are, so those that matter are read here.
//! Format: MQTT 5.0 (<https://docs.oasis-open.org/mqtt/mqtt/v5.0/os/mqtt-v5.0-os.html>).

use bytes::{Buf, BytesMut};
use rumqttc::v5::mqttbytes::v5::Packet;

const CONNACK: u8 = 2;
const PUBLISH: u8 = 3;
const PUBACK: u8 = 4;
const PUBREL: u8 = 6;
const DISCONNECT: u8 = 14;

#[derive(Debug, PartialEq)]
pub(super) enum Incoming {
    /// A message has arrived, or is refused.
    PubAck {
        id: u16,
        reason: Reason,
    },
    Disconnect(Reason),
    /// The answer of a broker that knows MQTT 3.1.1 at the most.
    OldConnAck,
    Other(Box<Packet>),
}

/// Why a broker does what it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reason {
    pub(super) code: u8,
    /// What it says itself.
    pub(super) said: Option<String>,
}

/// What it means for a message that it was answered with a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    Taken,
    /// This one will never be taken, others may.
    Refused,
    /// None are taken now.
    NotNow,
}

impl Reason {
    pub(super) fn meaning(&self) -> Meaning {
        match self.code {
            0..0x80 => Meaning::Taken,
            0x87 | 0x90 | 0x95 | 0x99 => Meaning::Refused,
            _ => Meaning::NotNow,
        }
    }

    /// Whether a connection can have ended by it because of one message.
    pub(super) fn blames_message(&self) -> bool {
        matches!(
            self.code,
            0x81 | 0x82 | 0x87 | 0x90 | 0x95 | 0x99 | 0x9a | 0x9b
        )
    }

    /// By what the specification calls it (2.4), and with what the broker says to it.
    pub(super) fn text(&self) -> String {
        let name = match self.code {
            0x00 => "normal disconnection",
            0x80 => "unspecified error",
            0x81 => "malformed packet",
            0x82 => "protocol error",
            0x83 => "implementation specific error",
            0x87 => "not authorized",
            0x88 => "server unavailable",
            0x89 => "server busy",
            0x8b => "server shutting down",
            0x8d => "keep alive time-out",
            0x8e => "session taken over",
            0x8f => "topic filter invalid",
            0x90 => "topic name invalid",
            0x91 => "packet identifier in use",
            0x93 => "receive maximum exceeded",
            0x95 => "packet too large",
            0x96 => "message rate too high",
            0x97 => "quota exceeded",
            0x98 => "administrative action",
            0x99 => "payload format invalid",
            0x9a => "retain not supported",
            0x9b => "QoS not supported",
            0x9c => "use another server",
            0x9d => "server moved",
            0x9f => "connection rate exceeded",
            0xa0 => "maximum connect time",
            _ => "no reason that is known",
        };
        let said = self.said.as_deref().filter(|said| !said.is_empty());
        match said {
            Some(said) => format!("{name}, {:#04x}: {said:?}", self.code),
            None => format!("{name}, {:#04x}", self.code),
        }
    }
}

/// Takes the first packet out of what has come, if it is there as a whole.
pub(super) fn take_packet(
    input: &mut BytesMut,
    max_bytes: usize,
) -> Result<Option<Incoming>, String> {
    let Some((head_bytes, rest_bytes)) = frame(input)? else {
        return Ok(None);
    };
    let bytes = head_bytes + rest_bytes;
    if bytes > max_bytes {
        return Err(format!(
            "the broker has sent {bytes} bytes at once, although it was told to send {max_bytes} at the most: make \
             max_packet_bytes of the link larger"
        ));
    }
    if input.len() < bytes {
        input.reserve(bytes - input.len());
        return Ok(None);
    }
    let mut packet = input.split_to(bytes);
    let body = &packet[head_bytes..];
    let (kind, code_at) = match packet[0] >> 4 {
        kind @ PUBACK if body.len() >= 2 => (kind, 2),
        kind @ DISCONNECT => (kind, 0),
        CONNACK if body.len() == 2 => return Ok(Some(Incoming::OldConnAck)),
        _ => {
            let packet = Packet::read(&mut packet, None);
            let packet = packet.map_err(|error| format!("the broker sends no MQTT: {error}"))?;
            return Ok(Some(Incoming::Other(packet.into())));
        }
    };
    let code = body.get(code_at).copied().unwrap_or(0);
    let id = body.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    // Most often there is nothing more to read.
    let said = match body.len() > code_at + 2 {
        true => match Packet::read(&mut packet, None) {
            Ok(Packet::PubAck(packet)) => packet.properties.and_then(|all| all.reason_string),
            Ok(Packet::Disconnect(packet)) => packet.properties.and_then(|all| all.reason_string),
            _ => None,
        },
        false => None,
    };
    let reason = Reason { code, said };
    Ok(Some(match kind {
        PUBACK => Incoming::PubAck { id, reason },
        _ => Incoming::Disconnect(reason),
    }))
}

/// How long the head of the first packet is, and what follows it.
fn frame(input: &[u8]) -> Result<Option<(usize, usize)>, String> {
    let mut length = 0;
    let mut rest = input;
    if rest.is_empty() {
        return Ok(None);
    }
    let (kind, flags) = (rest.get_u8() >> 4, input[0] & 0xf);
    if flags != 0 && kind != PUBLISH && kind != PUBREL {
        return Err(format!(
            "the broker sends no MQTT: it begins a packet with {:#04x}",
            input[0]
        ));
    }
    for place in 0..4 {
        let Some(&byte) = rest.get(place) else {
            return Ok(None);
        };
        length |= usize::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Ok(Some((2 + place, length)));
        }
    }
    Err("the broker sends no MQTT: a packet without an end to its length".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Option<Incoming>, String> {
        take_packet(&mut bytes.into(), 1000)
    }

    fn puback(id: u16, code: u8, said: Option<&str>) -> Incoming {
        let said = said.map(str::to_owned);
        Incoming::PubAck {
            id,
            reason: Reason { code, said },
        }
    }

    #[test]
    fn acknowledgements_with_and_without_a_reason() {
        assert_eq!(read(&[0x40, 2, 1, 2]), Ok(Some(puback(0x102, 0, None))));
        // mosquitto says so, and the codec does not know it.
        assert_eq!(
            read(&[0x40, 4, 0, 1, 0x95, 0]),
            Ok(Some(puback(1, 0x95, None)))
        );
        let said = [&[0x40, 9, 0, 1, 0x97, 5, 0x1f, 0, 2], &b"no"[..]].concat();
        let Ok(Some(Incoming::PubAck { reason, .. })) = read(&said) else {
            panic!("{:?}", read(&said));
        };
        assert_eq!(reason.text(), "quota exceeded, 0x97: \"no\"");
        assert_eq!(reason.meaning(), Meaning::NotNow);
    }

    #[test]
    fn reasons_that_are_about_one_message() {
        let reason = |code| Reason { code, said: None };
        for (code, meaning, blames) in [
            (0x00, Meaning::Taken, false),
            (0x10, Meaning::Taken, false),
            (0x80, Meaning::NotNow, false),
            (0x83, Meaning::NotNow, false),
            (0x87, Meaning::Refused, true),
            (0x90, Meaning::Refused, true),
            (0x95, Meaning::Refused, true),
            (0x97, Meaning::NotNow, false),
            (0x99, Meaning::Refused, true),
        ] {
            assert_eq!(reason(code).meaning(), meaning, "{code:#x}");
            assert_eq!(reason(code).blames_message(), blames, "{code:#x}");
        }
    }

    #[test]
    fn a_connection_ends_with_or_without_words() {
        let ended = |code| {
            let reason = Reason { code, said: None };
            Ok(Some(Incoming::Disconnect(reason)))
        };
        assert_eq!(read(&[0xe0, 0]), ended(0));
        assert_eq!(read(&[0xe0, 1, 0x8e]), ended(0x8e));
        assert_eq!(read(&[0xe0, 2, 0x95, 0]), ended(0x95));
        assert_eq!(read(&[0x20, 2, 0, 1]), Ok(Some(Incoming::OldConnAck)));
    }

    #[test]
    fn what_is_not_there_as_a_whole_is_waited_for() {
        let whole = [0x40, 2, 1, 2];
        for end in 0..whole.len() {
            assert_eq!(read(&whole[..end]), Ok(None));
        }
        let mut two = BytesMut::from(&[0x40, 2, 0, 1, 0xd0, 0][..]);
        assert!(take_packet(&mut two, 10).unwrap().is_some());
        assert!(matches!(
            take_packet(&mut two, 10),
            Ok(Some(Incoming::Other(_)))
        ));
        assert_eq!(take_packet(&mut two, 10), Ok(None));
    }

    #[test]
    fn what_can_be_no_packet_is_told_at_once() {
        let error = read(&[0x30, 0xff, 0xff, 0x7f]).unwrap_err();
        assert!(error.contains("max_packet_bytes"), "{error}");
        let error = read(&[0x30, 0xff, 0xff, 0xff, 0xff]).unwrap_err();
        assert!(error.contains("length"), "{error}");
        let error = read(b"HTTP").unwrap_err();
        assert!(error.contains("no MQTT"), "{error}");
    }

    proptest! {
        /// A broker may send anything.
        #[test]
        fn no_bytes_make_it_panic(
            kind in any::<u8>(),
            body in prop::collection::vec(prop_oneof![0u8..40, any::<u8>()], 0..60),
        ) {
            let packet = [&[kind, body.len() as u8], &body[..]].concat();
            let _ = read(&packet);
        }
    }
}
