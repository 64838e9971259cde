//! Bytes to packets and back, on rumqttd's codecs.
//!
//! Those codecs are lenient and in places wrong, so this module stands in front of them: it frames
//! packets itself, refuses what a client may not send before the codec sees it (some of it makes
//! the codec panic), and reads or writes by hand the few things that the codec gets wrong or hides.
//!
//! Formats: MQTT 3.1.1 (<https://docs.oasis-open.org/mqtt/mqtt/v3.1.1/os/mqtt-v3.1.1-os.html>) and
//! MQTT 5.0 (<https://docs.oasis-open.org/mqtt/mqtt/v5.0/os/mqtt-v5.0-os.html>).

use bytes::{BufMut, Bytes, BytesMut};
use rumqttd::protocol::v4::{self, V4};
use rumqttd::protocol::v5::V5;
use rumqttd::protocol::{
    ConnAck, ConnAckProperties, ConnectReturnCode, Disconnect, DisconnectProperties,
    DisconnectReasonCode, Error as CodecError, Packet, PingResp, Protocol, PubAck, PubAckReason,
    PubComp, PubCompReason, PubRec, PubRecReason, PubRel, PubRelReason, PublishProperties, QoS,
    SubAck, SubscribeReasonCode, UnsubAck, UnsubAckReason,
};

use super::session::ConnectRefused;
use super::well_formed;
use crate::event::via::{VIA, and_then};

/// Protocol version of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V4,
    V5,
}

impl Version {
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V4 => "3.1.1",
            Version::V5 => "5.0",
        }
    }
}

/// A packet as a client sends it.
#[derive(Debug)]
pub enum Incoming {
    Publish(IncomingPublish),
    /// Everything else, as the codec has it.
    Control(Packet),
}

impl Incoming {
    /// Acknowledgements and DISCONNECT: what is still read in a shutdown.
    pub fn ends_something(&self) -> bool {
        matches!(
            self,
            Incoming::Control(
                Packet::PubAck(..)
                    | Packet::PubRec(..)
                    | Packet::PubRel(..)
                    | Packet::PubComp(..)
                    | Packet::Disconnect(..)
            )
        )
    }
}

/// A PUBLISH from a client. The topic is not checked yet, and empty where an alias stands for it.
#[derive(Debug)]
pub struct IncomingPublish {
    pub qos: QoS,
    /// 0 at QoS 0.
    pub packet_id: u16,
    /// The client says that it has sent it before.
    pub dup: bool,
    pub retain: bool,
    pub topic: Bytes,
    pub payload: Bytes,
    pub properties: Option<PublishProperties>,
}

/// Why a connection's bytes can't be read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("malformed packet: {0}")]
    Malformed(String),
    #[error("protocol error: {0}")]
    Protocol(String),
    #[error("packet of {size} bytes; mqtt.max_packet_bytes allows {limit}")]
    TooLarge { size: usize, limit: usize },
    #[error("protocol {name:?} level {level} is not MQTT 3.1.1 (level 4) or 5.0 (level 5)")]
    UnsupportedVersion { name: String, level: u8 },
}

impl DecodeError {
    /// The reason code of a DISCONNECT that tells the client.
    pub fn reason(&self) -> DisconnectReasonCode {
        match self {
            DecodeError::Malformed(_) => DisconnectReasonCode::MalformedPacket,
            DecodeError::Protocol(_) => DisconnectReasonCode::ProtocolError,
            DecodeError::TooLarge { .. } => DisconnectReasonCode::PacketTooLarge,
            DecodeError::UnsupportedVersion { .. } => {
                DisconnectReasonCode::ImplementationSpecificError
            }
        }
    }
}

pub const CONNECT: u8 = 1;
pub const PUBLISH: u8 = 3;
pub const PUBACK: u8 = 4;
pub const PUBREC: u8 = 5;
pub const PUBREL: u8 = 6;
pub const PUBCOMP: u8 = 7;
pub const SUBSCRIBE: u8 = 8;
pub const UNSUBSCRIBE: u8 = 10;
const PINGREQ: u8 = 12;
pub const DISCONNECT: u8 = 14;

/// Largest CONNECT: room for the longest will, and little to hold for those who never finish one.
const MAX_CONNECT_BYTES: usize = 128 * 1024;

/// Cuts a client's bytes into packets. The first packet decides on the version.
#[derive(Debug)]
pub struct Decoder {
    version: Option<Version>,
    /// Largest packet, in bytes, fixed header included.
    max_packet_bytes: usize,
}

impl Decoder {
    pub fn new(max_packet_bytes: usize) -> Self {
        Decoder {
            version: None,
            max_packet_bytes,
        }
    }

    /// Known from the first packet on, even if that one is refused.
    pub fn version(&self) -> Option<Version> {
        self.version
    }

    /// The next packet in `bytes`, or none while it has not come in whole. After an error the
    /// connection can only be closed.
    pub fn next(&mut self, bytes: &mut BytesMut) -> Result<Option<Incoming>, DecodeError> {
        let Some(&first) = bytes.first() else {
            return Ok(None);
        };
        let kind = first >> 4;
        check_fixed_header(first, self.version)?;
        // The length field is looked at before the body is awaited, so that neither an oversized
        // packet nor one of the wrong kind makes the gateway buffer anything.
        let (length_bytes, remaining) = match v4::length(bytes[1..].iter()) {
            Ok(header) => header,
            Err(CodecError::InsufficientBytes(_)) => return Ok(None),
            Err(error) => return Err(malformed(error)),
        };
        let size = 1 + length_bytes + remaining;
        let limit = match self.version {
            Some(_) => self.max_packet_bytes,
            None => self.max_packet_bytes.min(MAX_CONNECT_BYTES),
        };
        if size > limit {
            return Err(DecodeError::TooLarge { size, limit });
        }
        let body = 1 + length_bytes;
        let version = match self.version {
            Some(version) => version,
            None => match connect_version(&bytes[body..bytes.len().min(size)])? {
                Some(version) => version,
                None if bytes.len() < size => return Ok(None),
                None => return Err(DecodeError::Malformed("CONNECT is too short".into())),
            },
        };
        if bytes.len() < size {
            return Ok(None);
        }

        // Fields of PUBLISH that the codec keeps to itself.
        let (qos, packet_id) = if kind == PUBLISH {
            publish_header(first, &bytes[body..size])?
        } else {
            (QoS::AtMostOnce, 0)
        };
        // After the protocol's name and level, 2 + 4 + 1 bytes.
        let connect_flags = bytes[body..size].get(7).copied().unwrap_or(0);
        if kind == CONNECT && connect_flags & 1 != 0 {
            return Err(DecodeError::Malformed(
                "the reserved CONNECT flag is set".into(),
            ));
        }

        self.version = Some(version);
        well_formed::check(version, first, &bytes[body..size])?;

        let packet = match version {
            Version::V4 => V4.read_mut(bytes, self.max_packet_bytes),
            Version::V5 if kind == DISCONNECT && remaining == 1 => {
                // A reason code without properties: valid, but the codec wants properties.
                let packet = bytes.split_to(size);
                let mut longer = BytesMut::from(&[packet[0], 2, packet[body], 0][..]);
                V5.read_mut(&mut longer, self.max_packet_bytes)
            }
            Version::V5 => V5.read_mut(bytes, self.max_packet_bytes),
        }
        .map_err(malformed)?;
        Ok(Some(match packet {
            Packet::Publish(publish, properties) => Incoming::Publish(IncomingPublish {
                qos,
                packet_id,
                dup: first & 0b1000 != 0,
                retain: publish.retain,
                topic: publish.topic,
                payload: publish.payload,
                properties,
            }),
            packet => Incoming::Control(packet),
        }))
    }
}

/// The size of the packet that has begun in `bytes` and has not come in whole, once it is known.
/// To be asked when [`Decoder::next`] has found none.
pub fn begun_size(bytes: &[u8]) -> Option<usize> {
    let (length_bytes, remaining) = v4::length(bytes.get(1..)?.iter()).ok()?;
    Some(1 + length_bytes + remaining)
}

/// What a client may send, and with which flags (MQTT 5.0, 2.1.2 and 2.1.3).
fn check_fixed_header(first: u8, version: Option<Version>) -> Result<(), DecodeError> {
    let (kind, flags) = (first >> 4, first & 0x0f);
    if version.is_none() && kind != CONNECT {
        return Err(DecodeError::Protocol(
            "the first packet must be CONNECT".into(),
        ));
    }
    let wanted = match kind {
        PUBLISH => return Ok(()),
        PUBREL | SUBSCRIBE | UNSUBSCRIBE => 0b0010,
        CONNECT | PUBACK | PUBREC | PUBCOMP | PINGREQ | DISCONNECT => 0,
        15 if version == Some(Version::V5) => {
            return Err(DecodeError::Protocol(
                "AUTH without an authentication method in CONNECT".into(),
            ));
        }
        0 | 15 => {
            return Err(DecodeError::Malformed(format!(
                "packet type {kind} is reserved"
            )));
        }
        _ => {
            return Err(DecodeError::Protocol(
                "a client can't send this packet type".into(),
            ));
        }
    };
    if flags != wanted {
        return Err(DecodeError::Malformed(format!(
            "packet type {kind} with flags {flags:#06b}"
        )));
    }
    Ok(())
}

/// The version that a CONNECT body asks for; none while too little of it has come in.
fn connect_version(body: &[u8]) -> Result<Option<Version>, DecodeError> {
    let Some(length) = body.get(..2) else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    // "MQIsdp", the name of MQTT 3.1, is the longest that there is.
    if length > 6 {
        return Err(DecodeError::Protocol(
            "CONNECT names no MQTT protocol".into(),
        ));
    }
    let Some((name, level)) = body.get(2..2 + length).zip(body.get(2 + length).copied()) else {
        return Ok(None);
    };
    match (name, level) {
        (b"MQTT", 4) | (b"MQTT", 5) => {}
        (b"MQTT", _) | (b"MQIsdp", _) => {
            return Err(DecodeError::UnsupportedVersion {
                name: String::from_utf8_lossy(name).into_owned(),
                level,
            });
        }
        _ => {
            return Err(DecodeError::Protocol(
                "CONNECT names no MQTT protocol".into(),
            ));
        }
    }
    // The flags are looked at by the caller.
    if body.len() < 8 {
        return Ok(None);
    }
    Ok(Some(if level == 4 { Version::V4 } else { Version::V5 }))
}

/// QoS and packet identifier of a PUBLISH. `body` is what follows the fixed header.
fn publish_header(first: u8, body: &[u8]) -> Result<(QoS, u16), DecodeError> {
    let qos = rumqttd::protocol::qos((first >> 1) & 0b11)
        .ok_or_else(|| DecodeError::Malformed("PUBLISH with QoS 3".into()))?;
    if qos == QoS::AtMostOnce {
        if first & 0b1000 != 0 {
            return Err(DecodeError::Malformed("PUBLISH with QoS 0 and DUP".into()));
        }
        return Ok((qos, 0));
    }
    let truncated = || DecodeError::Malformed("PUBLISH ends within its header".into());
    let length = body.first_chunk::<2>().ok_or_else(truncated)?;
    let at = 2 + usize::from(u16::from_be_bytes(*length));
    let id = body.get(at..at + 2).ok_or_else(truncated)?;
    Ok((qos, u16::from_be_bytes([id[0], id[1]])))
}

fn malformed(error: CodecError) -> DecodeError {
    DecodeError::Malformed(match error {
        // The packet is framed already, so what is missing is missing for good.
        CodecError::InsufficientBytes(_) => "a field runs past the packet's end".into(),
        error => error.to_string(),
    })
}

/// Writes packets towards a client, and counts them.
#[derive(Debug)]
pub struct Encoder {
    pub version: Version,
    written: Written,
}

/// How many packets were written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written {
    pub packets: u64,
    /// Of these, PUBLISH.
    pub publishes: u64,
    /// Of the PUBLISH packets.
    pub payload_bytes: u64,
}

/// What a PUBLISH to a subscriber says, besides topic and payload.
#[derive(Debug, Clone, Copy, Default)]
pub struct PublishHeader<'a> {
    pub qos: QoS,
    /// Not 0 where the QoS is above 0.
    pub packet_id: u16,
    pub dup: bool,
    pub retain: bool,
    /// Ignored for a 3.1.1 client.
    pub properties: Option<&'a PublishProperties>,
    /// Seconds left of the message's life; stands in the place of the property.
    pub expires_in: Option<u32>,
    /// Of the subscriptions that matched.
    pub subscription_ids: &'a [u32],
    /// Stands for the topic if that is empty, or is to stand for it from now on.
    pub topic_alias: Option<u16>,
    /// To be added to the gateways that it came over.
    pub way: Option<&'a str>,
}

impl Encoder {
    pub fn new(version: Version) -> Self {
        Encoder {
            version,
            written: Written::default(),
        }
    }

    /// What was written since this was asked for last.
    pub fn take_written(&mut self) -> Written {
        std::mem::take(&mut self.written)
    }

    /// The last PUBLISH was taken back.
    pub fn unwrite_publish(&mut self, payload: &[u8]) {
        self.written.packets -= 1;
        self.written.publishes -= 1;
        self.written.payload_bytes -= payload.len() as u64;
    }

    /// Appends a PUBLISH to `out`.
    pub fn publish(
        &mut self,
        header: PublishHeader<'_>,
        topic: &str,
        payload: &[u8],
        out: &mut BytesMut,
    ) {
        let properties = match self.version {
            Version::V4 => None,
            Version::V5 => Some(publish_properties(&header)),
        };
        self.written.packets += 1;
        self.written.publishes += 1;
        self.written.payload_bytes += payload.len() as u64;
        let property_bytes = match &properties {
            None => 0,
            Some(properties) => var_int_len(properties.len()) + properties.len(),
        };
        let packet_id_bytes = if header.qos == QoS::AtMostOnce { 0 } else { 2 };
        let topic = topic.as_bytes();
        let remaining = 2 + topic.len() + packet_id_bytes + property_bytes + payload.len();
        out.reserve(5 + remaining);
        out.put_u8(
            0x30 | u8::from(header.dup) << 3 | (header.qos as u8) << 1 | u8::from(header.retain),
        );
        put_var_int(out, remaining);
        out.put_u16(topic.len() as u16);
        out.put_slice(topic);
        if header.qos != QoS::AtMostOnce {
            out.put_u16(header.packet_id);
        }
        if let Some(properties) = properties {
            put_var_int(out, properties.len());
            out.put_slice(&properties);
        }
        out.put_slice(payload);
    }

    pub fn connack(
        &mut self,
        session_present: bool,
        code: ConnectReturnCode,
        properties: ConnAckProperties,
        out: &mut BytesMut,
    ) {
        let ack = ConnAck {
            session_present,
            code,
        };
        self.write(Packet::ConnAck(ack, Some(properties)), out);
    }

    /// A CONNACK that says no.
    pub fn connack_refused(&mut self, refused: &ConnectRefused, out: &mut BytesMut) {
        let code = match (self.version, refused.code) {
            (Version::V5, code) => code,
            // The few codes of 3.1.1.
            (Version::V4, code @ ConnectReturnCode::ClientIdentifierNotValid) => code,
            (Version::V4, code @ ConnectReturnCode::ServiceUnavailable) => code,
            (Version::V4, code @ ConnectReturnCode::BadUserNamePassword) => code,
            (Version::V4, _) => ConnectReturnCode::NotAuthorized,
        };
        let properties = ConnAckProperties {
            reason_string: Some(refused.text.clone()),
            ..ConnAckProperties::default()
        };
        self.connack(false, code, properties, out);
    }

    pub fn puback(&mut self, pkid: u16, reason: PubAckReason, out: &mut BytesMut) {
        self.write(Packet::PubAck(PubAck { pkid, reason }, None), out);
    }

    pub fn pubrec(&mut self, pkid: u16, reason: PubRecReason, out: &mut BytesMut) {
        self.write(Packet::PubRec(PubRec { pkid, reason }, None), out);
    }

    pub fn pubrel(&mut self, pkid: u16, reason: PubRelReason, out: &mut BytesMut) {
        self.write(Packet::PubRel(PubRel { pkid, reason }, None), out);
    }

    pub fn pubcomp(&mut self, pkid: u16, reason: PubCompReason, out: &mut BytesMut) {
        self.write(Packet::PubComp(PubComp { pkid, reason }, None), out);
    }

    pub fn suback(
        &mut self,
        pkid: u16,
        return_codes: Vec<SubscribeReasonCode>,
        out: &mut BytesMut,
    ) {
        self.write(Packet::SubAck(SubAck { pkid, return_codes }, None), out);
    }

    pub fn unsuback(&mut self, pkid: u16, reasons: Vec<UnsubAckReason>, out: &mut BytesMut) {
        self.write(Packet::UnsubAck(UnsubAck { pkid, reasons }, None), out);
    }

    pub fn pingresp(&mut self, out: &mut BytesMut) {
        self.write(Packet::PingResp(PingResp), out);
    }

    /// A DISCONNECT, where the version knows one from the server.
    /// Leaves the text out where the packet would be larger than `max_bytes` (MQTT 5.0, 3.14.2-3).
    pub fn disconnect(
        &mut self,
        reason_code: DisconnectReasonCode,
        text: &str,
        max_bytes: usize,
        out: &mut BytesMut,
    ) {
        if self.version == Version::V4 {
            return;
        }
        let properties = DisconnectProperties {
            session_expiry_interval: None,
            reason_string: Some(text.to_owned()),
            user_properties: Vec::new(),
            server_reference: None,
        };
        let start = out.len();
        self.write(
            Packet::Disconnect(Disconnect { reason_code }, Some(properties)),
            out,
        );
        if out.len() - start > max_bytes {
            // The codec can't write a reason alone: what it makes of that says that all is well.
            let packet = out.split_off(start);
            let length_bytes = 1 + packet[1..].iter().take_while(|byte| **byte > 127).count();
            out.put_slice(&[DISCONNECT << 4, 1, packet[1 + length_bytes]]);
        }
    }

    fn write(&mut self, packet: Packet, out: &mut BytesMut) {
        self.written.packets += 1;
        let result = match self.version {
            Version::V4 => V4.write(packet, out),
            Version::V5 => V5.write(packet, out),
        };
        result.expect("acks are far below MQTT's longest packet");
    }
}

/// The property section of a PUBLISH (MQTT 5.0, 3.3.2.3), without its length.
fn publish_properties(header: &PublishHeader<'_>) -> BytesMut {
    fn put_bytes(out: &mut BytesMut, id: u8, bytes: &[u8]) {
        out.put_u8(id);
        out.put_u16(bytes.len() as u16);
        out.put_slice(bytes);
    }
    let mut out = BytesMut::new();
    if let Some(seconds) = header.expires_in {
        out.put_u8(2);
        out.put_u32(seconds);
    }
    if let Some(alias) = header.topic_alias {
        out.put_u8(35);
        out.put_u16(alias);
    }
    for id in header.subscription_ids {
        out.put_u8(11);
        put_var_int(&mut out, *id as usize);
    }
    let user_property = |out: &mut BytesMut, key: &str, value: &str| {
        put_bytes(out, 38, key.as_bytes());
        out.put_u16(value.len() as u16);
        out.put_slice(value.as_bytes());
    };
    let user_properties = header
        .properties
        .iter()
        .flat_map(|all| &all.user_properties);
    if let Some(gateway) = header.way {
        let known = user_properties.clone().find(|(key, _)| key == VIA);
        let way = and_then(known.map_or("", |(_, way)| way), gateway);
        user_property(&mut out, VIA, &way);
    }
    for (key, value) in user_properties {
        if header.way.is_none() || key != VIA {
            user_property(&mut out, key, value);
        }
    }
    let Some(properties) = header.properties else {
        return out;
    };
    if let Some(format) = properties.payload_format_indicator {
        out.put_slice(&[1, format]);
    }
    if let Some(content_type) = &properties.content_type {
        put_bytes(&mut out, 3, content_type.as_bytes());
    }
    if let Some(topic) = &properties.response_topic {
        put_bytes(&mut out, 8, topic.as_bytes());
    }
    if let Some(data) = &properties.correlation_data {
        put_bytes(&mut out, 9, data);
    }
    out
}

fn var_int_len(value: usize) -> usize {
    match value {
        0..=127 => 1,
        128..=16_383 => 2,
        16_384..=2_097_151 => 3,
        _ => 4,
    }
}

fn put_var_int(out: &mut BytesMut, mut value: usize) {
    while value > 127 {
        out.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rumqttd::protocol::{Filter, RetainForwardRule, Subscribe, SubscribeProperties};

    const LIMIT: usize = 1024;

    /// CONNECT of a 3.1.1 client "c" with a clean session.
    pub(crate) const CONNECT_V4: &[u8] = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01c";
    /// The same for 5.0.
    pub(crate) const CONNECT_V5: &[u8] = b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01c";

    fn decode_all(bytes: &[u8]) -> Result<Vec<Incoming>, DecodeError> {
        let mut decoder = Decoder::new(LIMIT);
        let mut bytes = BytesMut::from(bytes);
        let mut packets = Vec::new();
        while let Some(packet) = decoder.next(&mut bytes)? {
            packets.push(packet);
        }
        Ok(packets)
    }

    fn after_connect(connect: &[u8], packet: &[u8]) -> Result<Vec<Incoming>, DecodeError> {
        let mut packets = decode_all(&[connect, packet].concat())?;
        packets.remove(0);
        Ok(packets)
    }

    #[test]
    fn the_first_packet_must_be_connect() {
        for first in [
            &b"\xc0\x00"[..],
            b"\x30\x05\x00\x01ahi",
            b"GET / HTTP/1.1\r\n",
            b"\x16\x03\x01",
        ] {
            assert!(
                matches!(
                    decode_all(first),
                    Err(DecodeError::Protocol(_) | DecodeError::Malformed(_))
                ),
                "{first:?}"
            );
        }
    }

    #[test]
    fn other_versions_are_named() {
        let mqtt_3_1 = b"\x10\x0f\x00\x06MQIsdp\x03\x02\x00\x3c\x00\x01c";
        let expected = DecodeError::UnsupportedVersion {
            name: "MQIsdp".into(),
            level: 3,
        };
        assert_eq!(decode_all(mqtt_3_1).unwrap_err(), expected);
    }

    #[test]
    fn a_packet_over_the_limit_is_refused_before_its_body_has_come() {
        let header = [CONNECT_V4, b"\x30\xff\x7f"].concat();
        let expected = DecodeError::TooLarge {
            size: 3 + 16_383,
            limit: LIMIT,
        };
        assert_eq!(decode_all(&header).unwrap_err(), expected);
    }

    #[test]
    fn what_only_a_server_sends_is_refused() {
        for (name, packet) in [
            ("CONNACK", &b"\x20\x03\x00\x00\x00"[..]),
            ("SUBACK", b"\x90\x04\x00\x01\x00\x00"),
            ("UNSUBACK", b"\xb0\x04\x00\x01\x00\x00"),
            ("PINGRESP", b"\xd0\x00"),
            ("AUTH", b"\xf0\x00"),
            ("type 0", b"\x00\x00"),
        ] {
            assert!(after_connect(CONNECT_V5, packet).is_err(), "{name}");
            assert!(after_connect(CONNECT_V4, packet).is_err(), "{name}");
        }
    }

    #[test]
    fn wrong_flags_and_truncated_fields_are_malformed() {
        for (name, packet) in [
            (
                "SUBSCRIBE without its flag",
                &b"\x80\x06\x00\x01\x00\x01a\x00"[..],
            ),
            ("PUBREL without its flag", b"\x60\x02\x00\x01"),
            ("PINGREQ with a flag", b"\xc1\x00"),
            ("PUBLISH with QoS 3", b"\x36\x06\x00\x01a\x00\x01x"),
            ("PUBLISH with QoS 0 and DUP", b"\x38\x04\x00\x01ax"),
            (
                "PUBLISH whose topic runs past the end",
                b"\x30\x04\x00\x09ax",
            ),
            ("PUBLISH with QoS 1 and no packet id", b"\x32\x03\x00\x01a"),
            ("PUBLISH with packet id 0", b"\x32\x05\x00\x01a\x00\x00"),
            ("empty PUBLISH", b"\x30\x00"),
            ("SUBSCRIBE without filters", b"\x82\x02\x00\x01"),
            ("SUBSCRIBE with QoS 3", b"\x82\x06\x00\x01\x00\x01a\x03"),
            (
                "SUBSCRIBE with reserved bits",
                b"\x82\x06\x00\x01\x00\x01a\x40",
            ),
            (
                "remaining length of five bytes",
                b"\x30\xff\xff\xff\xff\x01",
            ),
        ] {
            let result = after_connect(CONNECT_V4, packet);
            assert!(
                matches!(result, Err(DecodeError::Malformed(_))),
                "{name}: {result:?}"
            );
        }
    }

    #[test]
    fn a_disconnect_with_only_a_reason_code_is_read() {
        let packets = after_connect(CONNECT_V5, b"\xe0\x01\x04").unwrap();
        let Incoming::Control(Packet::Disconnect(disconnect, _)) = &packets[0] else {
            panic!("{packets:?}");
        };
        let with_will = DisconnectReasonCode::DisconnectWithWillMessage;
        assert_eq!(disconnect.reason_code, with_will);
    }

    #[test]
    fn a_disconnect_is_framed_as_its_length_says() {
        let mut out = BytesMut::new();
        Encoder::new(Version::V5).disconnect(
            DisconnectReasonCode::ServerBusy,
            "busy",
            100,
            &mut out,
        );
        assert_eq!(out.len(), 2 + usize::from(out[1]));
        assert_eq!(out[2], 0x89);
    }

    #[test]
    fn a_link_is_told_that_the_message_came_over_this_gateway() {
        let way_of = |known: Option<&str>| {
            let user_properties = known.map(|way| (VIA.to_owned(), way.to_owned()));
            let properties = PublishProperties {
                user_properties: user_properties.into_iter().collect(),
                ..PublishProperties::default()
            };
            let header = PublishHeader {
                properties: known.map(|_| &properties),
                way: Some("press"),
                ..PublishHeader::default()
            };
            let mut out = BytesMut::from(CONNECT_V5);
            Encoder::new(Version::V5).publish(header, "t", b"", &mut out);
            match decode_all(&out).unwrap().remove(1) {
                Incoming::Publish(read) => read.properties.unwrap().user_properties,
                _ => panic!("no PUBLISH"),
            }
        };
        let list = |way: &str| vec![(VIA.to_owned(), way.to_owned())];
        assert_eq!(way_of(None), list("press"));
        assert_eq!(way_of(Some("oven")), list("oven,press"));
    }

    #[test]
    fn a_publish_comes_out_as_it_went_in() {
        let properties = PublishProperties {
            content_type: Some("text/plain".into()),
            user_properties: vec![("k".into(), "v".into())],
            response_topic: Some("r".into()),
            correlation_data: Some(Bytes::from_static(b"id")),
            payload_format_indicator: Some(1),
            ..PublishProperties::default()
        };
        let header = PublishHeader {
            qos: QoS::AtLeastOnce,
            packet_id: 7,
            retain: true,
            properties: Some(&properties),
            expires_in: Some(9),
            ..PublishHeader::default()
        };
        let mut out = BytesMut::from(CONNECT_V5);
        Encoder::new(Version::V5).publish(header, "ä/b", b"payload", &mut out);
        let Incoming::Publish(read) = decode_all(&out).unwrap().remove(1) else {
            panic!("no PUBLISH");
        };
        assert_eq!(
            (read.qos, read.packet_id, read.retain),
            (QoS::AtLeastOnce, 7, true)
        );
        assert_eq!(
            (&read.topic[..], &read.payload[..]),
            ("ä/b".as_bytes(), &b"payload"[..])
        );
        let expected = PublishProperties {
            message_expiry_interval: Some(9),
            ..properties
        };
        assert_eq!(read.properties, Some(expected));
    }

    fn samples() -> Vec<Vec<u8>> {
        let mut subscribe = BytesMut::new();
        let filter = Filter {
            path: "a/#".into(),
            qos: QoS::AtLeastOnce,
            nolocal: true,
            preserve_retain: false,
            retain_forward_rule: RetainForwardRule::OnNewSubscribe,
        };
        let packet = Packet::Subscribe(
            Subscribe {
                pkid: 3,
                filters: vec![filter],
            },
            Some(SubscribeProperties {
                id: Some(300),
                user_properties: vec![("a".into(), "b".into())],
            }),
        );
        V5.write(packet, &mut subscribe).unwrap();
        let will = b"\x10\x1d\x00\x04MQTT\x05\xc6\x00\x3c\x00\x00\x01c\x00\x00\x01w\x00\x01m\x00\x01u\x00\x01p";
        vec![
            CONNECT_V4.to_vec(),
            CONNECT_V5.to_vec(),
            will.to_vec(),
            subscribe.to_vec(),
            b"\x32\x0e\x00\x01a\x00\x01\x06\x26\x00\x01k\x00\x00hi".to_vec(),
            b"\x40\x02\x00\x01".to_vec(),
            b"\x50\x04\x00\x01\x97\x00".to_vec(),
            b"\x62\x03\x00\x01\x92".to_vec(),
            b"\xa2\x06\x00\x04\x00\x00\x01a".to_vec(),
            b"\xe0\x07\x00\x05\x11\x00\x00\x00\x0a".to_vec(),
            b"\xc0\x00".to_vec(),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Valid packets with some bytes changed, after a CONNECT of either version.
        #[test]
        fn mutated_packets_never_panic(
            v5 in any::<bool>(),
            picks in prop::collection::vec(0usize..11, 1..6),
            mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        ) {
            let samples = samples();
            let mut bytes: Vec<u8> = picks.iter().flat_map(|i| samples[*i].clone()).collect();
            for (at, value) in mutations {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let connect = if v5 { CONNECT_V5 } else { CONNECT_V4 };
            let _ = decode_all(&[connect, &bytes].concat());
            let _ = decode_all(&bytes);
        }

        #[test]
        fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_all(&bytes);
            let _ = after_connect(CONNECT_V5, &bytes);
        }

        /// TCP may cut the stream anywhere.
        #[test]
        fn how_the_stream_is_cut_makes_no_difference(cuts in prop::collection::vec(0usize..80, 0..8)) {
            let samples = samples();
            let stream: Vec<u8> = [1, 3, 4, 5, 10, 8, 9].iter().flat_map(|i| samples[*i].clone()).collect();
            let whole = format!("{:?}", decode_all(&stream).unwrap());
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).collect();
            cuts.push(stream.len());
            cuts.sort();
            let mut decoder = Decoder::new(LIMIT);
            let (mut buffer, mut packets, mut fed) = (BytesMut::new(), Vec::new(), 0);
            for cut in cuts {
                buffer.extend_from_slice(&stream[fed..cut]);
                fed = cut;
                while let Some(packet) = decoder.next(&mut buffer).unwrap() {
                    packets.push(packet);
                }
            }
            prop_assert_eq!(format!("{packets:?}"), whole);
        }
    }
}
