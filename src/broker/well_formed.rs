//! Whether a client's packet is well formed, from behind its fixed header to its last byte.
//!
//! rumqttd's codec takes properties twice, values that are reserved, and bytes behind the last
//! field. What a PUBLISH says goes on to other clients, and a strict one has to drop its connection
//! on it; so this module walks each packet before the codec does. It keeps nothing.
//!
//! A packet that can't be read is malformed; one that can, and says what it may not, is a protocol
//! error (MQTT 5.0, 4.13).

use super::codec::{
    CONNECT, DISCONNECT, DecodeError, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBSCRIBE,
    UNSUBSCRIBE, Version,
};

/// Checks what the codec does not. `first` is the packet's first byte, `body` what follows its
/// length. The fixed header, and of a CONNECT name, level and reserved flag, are checked already.
pub fn check(version: Version, first: u8, body: &[u8]) -> Result<(), DecodeError> {
    let mut fields = Fields(body);
    match (first >> 4, version) {
        // All of the rest is payload.
        (PUBLISH, Version::V4) => return Ok(()),
        (PUBLISH, Version::V5) => {
            let _topic = fields.binary()?;
            if first & 0b0110 != 0 {
                let _packet_id = fields.u16()?;
            }
            return fields.properties("PUBLISH", OF_PUBLISH);
        }
        (CONNECT, _) => connect(version, &mut fields)?,
        (PUBACK | PUBREC, _) => {
            acknowledgement(version, &mut fields, |reason| match reason {
                0x00 | 0x80 | 0x83 | 0x87 | 0x90 | 0x91 | 0x97 | 0x99 => Sender::Client,
                0x10 => Sender::Server,
                _ => Sender::Nobody,
            })?;
        }
        (PUBREL | PUBCOMP, _) => {
            acknowledgement(version, &mut fields, |reason| match reason {
                0x00 | 0x92 => Sender::Client,
                _ => Sender::Nobody,
            })?;
        }
        (SUBSCRIBE, _) => subscribe(version, &mut fields)?,
        (UNSUBSCRIBE, _) => {
            let _packet_id = fields.u16()?;
            if version == Version::V5 {
                fields.properties("UNSUBSCRIBE", &[38])?;
            }
            while !fields.is_empty() {
                let _filter = fields.text()?;
            }
        }
        (DISCONNECT, Version::V5) => {
            if !fields.is_empty() {
                check_sender("DISCONNECT", fields.byte()?, |reason| match reason {
                    0x00 | 0x04 | 0x80..=0x83 | 0x90 | 0x93..=0x99 => Sender::Client,
                    0x87 | 0x89 | 0x8b | 0x8d..=0x8f | 0x9a..=0xa2 => Sender::Server,
                    _ => Sender::Nobody,
                })?;
            }
            if !fields.is_empty() {
                fields.properties("DISCONNECT", &[17, 31, 38])?;
            }
        }
        // Nothing but a header: PINGREQ, and DISCONNECT of 3.1.1.
        _ => {}
    }
    if !fields.is_empty() {
        return Err(malformed("a packet goes on behind its last field"));
    }
    Ok(())
}

const OF_CONNECT: &[u8] = &[17, 21, 22, 23, 25, 33, 34, 38, 39];
const OF_WILL: &[u8] = &[1, 2, 3, 8, 9, 24, 38];
/// With the subscription identifier, which a PUBLISH can have. That a client's can't is the
/// session's to say.
const OF_PUBLISH: &[u8] = &[1, 2, 3, 8, 9, 11, 35, 38];

fn connect(version: Version, fields: &mut Fields) -> Result<(), DecodeError> {
    const WILL: u8 = 0x04;
    const PASSWORD: u8 = 0x40;
    const USER_NAME: u8 = 0x80;

    let _name = fields.binary()?;
    let _level = fields.byte()?;
    let flags = fields.byte()?;
    let _keep_alive = fields.u16()?;
    if version == Version::V5 {
        fields.properties("CONNECT", OF_CONNECT)?;
    } else if flags & PASSWORD != 0 && flags & USER_NAME == 0 {
        return Err(malformed(
            "CONNECT with a password and no user name (MQTT 3.1.1, 3.1.2-22)",
        ));
    }
    // Client id and topic of the will are looked at when there is a CONNACK to say what is wrong.
    let _client_id = fields.binary()?;
    if flags & WILL != 0 {
        if version == Version::V5 {
            fields.properties("the will", OF_WILL)?;
        }
        let _topic = fields.binary()?;
        let _payload = fields.binary()?;
    }
    if flags & USER_NAME != 0 {
        let _name = fields.text()?;
    }
    if flags & PASSWORD != 0 {
        let _password = fields.binary()?;
    }
    Ok(())
}

fn acknowledgement(
    version: Version,
    fields: &mut Fields,
    sender: fn(u8) -> Sender,
) -> Result<(), DecodeError> {
    if fields.u16()? == 0 {
        return Err(protocol("an acknowledgement of packet id 0"));
    }
    if version == Version::V5 && !fields.is_empty() {
        check_sender("an acknowledgement", fields.byte()?, sender)?;
        if !fields.is_empty() {
            fields.properties("an acknowledgement", &[31, 38])?;
        }
    }
    Ok(())
}

fn subscribe(version: Version, fields: &mut Fields) -> Result<(), DecodeError> {
    let _packet_id = fields.u16()?;
    if version == Version::V5 {
        fields.properties("SUBSCRIBE", &[11, 38])?;
        if fields.is_empty() {
            return Err(protocol("SUBSCRIBE without filters"));
        }
    }
    while !fields.is_empty() {
        let _filter = fields.text()?;
        let options = fields.byte()?;
        // In MQTT 3.1.1 all but the QoS is reserved, and a QoS of 3 is malformed (3.8.3-4).
        let reserved = match version {
            Version::V4 if options & 0b11 == 3 => true,
            Version::V4 => options & !0b11 != 0,
            Version::V5 => options & 0b1100_0000 != 0,
        };
        if reserved {
            return Err(malformed("SUBSCRIBE with reserved bits set"));
        }
        if options & 0b11 == 3 || options >> 4 == 3 {
            return Err(protocol("SUBSCRIBE with QoS or retain handling 3"));
        }
    }
    Ok(())
}

/// Who may send a reason code in some packet.
enum Sender {
    Client,
    Server,
    Nobody,
}

fn check_sender(packet: &str, reason: u8, sender: fn(u8) -> Sender) -> Result<(), DecodeError> {
    match sender(reason) {
        Sender::Client => Ok(()),
        Sender::Server => Err(DecodeError::Protocol(format!(
            "{packet} with the reason code {reason:#04x}, which only a server sends"
        ))),
        Sender::Nobody => Err(DecodeError::Malformed(format!(
            "{packet} with the unknown reason code {reason:#04x}"
        ))),
    }
}

#[derive(Clone, Copy)]
enum Type {
    /// A byte that is 0 or 1.
    Flag,
    U16,
    U32,
    VarInt,
    Text,
    Binary,
    TextPair,
}

const USER_PROPERTY: u8 = 38;

/// Name and type of the properties that a client can send (MQTT 5.0, 2.2.2.2).
fn property(id: u8) -> Option<(&'static str, Type)> {
    Some(match id {
        1 => ("payload format indicator", Type::Flag),
        2 => ("message expiry interval", Type::U32),
        3 => ("content type", Type::Text),
        8 => ("response topic", Type::Text),
        9 => ("correlation data", Type::Binary),
        11 => ("subscription identifier", Type::VarInt),
        17 => ("session expiry interval", Type::U32),
        21 => ("authentication method", Type::Text),
        22 => ("authentication data", Type::Binary),
        23 => ("request problem information", Type::Flag),
        24 => ("will delay interval", Type::U32),
        25 => ("request response information", Type::Flag),
        31 => ("reason string", Type::Text),
        33 => ("receive maximum", Type::U16),
        34 => ("topic alias maximum", Type::U16),
        35 => ("topic alias", Type::U16),
        USER_PROPERTY => ("user property", Type::TextPair),
        39 => ("maximum packet size", Type::U32),
        _ => return None,
    })
}

/// What is left of a packet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .ok_or_else(|| malformed("a field runs past the packet's end"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn binary(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = self.u16()?;
        self.take(length.into())
    }

    fn text(&mut self) -> Result<&'a str, DecodeError> {
        let text = std::str::from_utf8(self.binary()?)
            .map_err(|_| malformed("a text that is not UTF-8"))?;
        if text.contains('\0') {
            return Err(malformed("a text with the NUL character"));
        }
        Ok(text)
    }

    fn var_int(&mut self) -> Result<usize, DecodeError> {
        let mut value = 0;
        for digit in 0..4 {
            let byte = self.byte()?;
            value |= usize::from(byte & 0x7f) << (7 * digit);
            if byte & 0x80 == 0 {
                // As few bytes as will do (MQTT 5.0, 1.5.5-1).
                if byte == 0 && digit > 0 {
                    break;
                }
                return Ok(value);
            }
        }
        Err(malformed("a variable byte integer that is too long"))
    }

    /// A property section, of which `allowed` are the ids that `packet` may have in it.
    fn properties(&mut self, packet: &str, allowed: &[u8]) -> Result<(), DecodeError> {
        let length = self.var_int()?;
        if length == 0 {
            return Ok(());
        }
        let mut section = Fields(self.take(length)?);
        let mut seen = 0u64;
        while !section.is_empty() {
            let id = section.byte()?;
            let Some((name, kind)) = property(id).filter(|_| allowed.contains(&id)) else {
                return Err(DecodeError::Malformed(format!(
                    "{packet} with the property {id}, which it can't have"
                )));
            };
            if seen & 1 << id != 0 && id != USER_PROPERTY {
                return Err(DecodeError::Protocol(format!(
                    "{packet} with two of {name}"
                )));
            }
            seen |= 1 << id;
            match kind {
                Type::Flag => {
                    let value = section.byte()?;
                    if value > 1 {
                        return Err(DecodeError::Protocol(format!(
                            "{packet} with a {name} of {value}; it is 0 or 1"
                        )));
                    }
                }
                Type::U16 => drop(section.take(2)?),
                Type::U32 => drop(section.take(4)?),
                Type::VarInt => drop(section.var_int()?),
                Type::Text => drop(section.text()?),
                Type::Binary => drop(section.binary()?),
                Type::TextPair => {
                    section.text()?;
                    section.text()?;
                }
            }
        }
        Ok(())
    }
}

fn malformed(what: &str) -> DecodeError {
    DecodeError::Malformed(what.to_owned())
}

fn protocol(what: &str) -> DecodeError {
    DecodeError::Protocol(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: Version = Version::V4;
    const V5: Version = Version::V5;

    fn connect_v5(flags: u8, properties: &[u8], payload: &[u8]) -> Vec<u8> {
        let head = [0, 4, b'M', b'Q', b'T', b'T', 5, flags, 0, 0];
        [&head[..], &[properties.len() as u8], properties, payload].concat()
    }

    fn connect_v4(flags: u8, payload: &[u8]) -> Vec<u8> {
        let head = [0, 4, b'M', b'Q', b'T', b'T', 4, flags, 0, 0];
        [&head[..], payload].concat()
    }

    fn with_will(properties: &[u8]) -> Vec<u8> {
        let length = [properties.len() as u8];
        let payload = [b"\0\x01c", &length[..], properties, b"\0\x01w\0\x01x"].concat();
        connect_v5(0x06, &[], &payload)
    }

    fn publish(properties: &[u8]) -> Vec<u8> {
        [b"\0\x01a", &[properties.len() as u8][..], properties, b"{}"].concat()
    }

    #[test]
    fn what_can_not_be_read_is_malformed() {
        for (what, version, first, body) in [
            ("bytes behind it", V4, 0x10, connect_v4(2, b"\0\x01czz")),
            (
                "bytes behind it",
                V5,
                0x10,
                connect_v5(2, b"", b"\0\x01czz"),
            ),
            (
                "password alone",
                V4,
                0x10,
                connect_v4(0x42, b"\0\x01c\0\x01p"),
            ),
            (
                "NUL in the user name",
                V4,
                0x10,
                connect_v4(0x82, b"\0\x01c\0\x02u\0"),
            ),
            (
                "a property of PUBLISH",
                V5,
                0x10,
                connect_v5(2, b"\x23\0\x01", b"\0\x01c"),
            ),
            ("a property of PUBLISH", V5, 0x10, with_will(b"\x23\0\x01")),
            ("a property of CONNECT", V5, 0x30, publish(b"\x21\0\x01")),
            ("an unknown property", V5, 0x30, publish(b"\x7e\0")),
            ("an unknown property", V5, 0x30, publish(b"\xff\0")),
            (
                "NUL in the content type",
                V5,
                0x30,
                publish(b"\x03\0\x02a\0"),
            ),
            (
                "content type not UTF-8",
                V5,
                0x30,
                publish(b"\x03\0\x01\xff"),
            ),
            (
                "user property not UTF-8",
                V5,
                0x30,
                publish(b"\x26\0\x01k\0\x01\xff"),
            ),
            (
                "a property past the section's end",
                V5,
                0x30,
                publish(b"\x02\0\0"),
            ),
            (
                "a section past the packet's end",
                V5,
                0x30,
                b"\0\x01a\x7f".to_vec(),
            ),
            (
                "an overlong section length",
                V5,
                0x30,
                b"\0\x01a\x80\0".to_vec(),
            ),
            (
                "a section length without end",
                V5,
                0x30,
                b"\0\x01a\xff\xff\xff\xff\x01".to_vec(),
            ),
            ("no section", V5, 0x32, b"\0\x01a\0\x01".to_vec()),
            ("PUBACK of one byte", V4, 0x40, b"\0".to_vec()),
            ("PUBACK with a reason", V4, 0x40, b"\0\x01\0".to_vec()),
            ("unknown reason", V5, 0x40, b"\0\x01\x55".to_vec()),
            ("unknown reason", V5, 0x62, b"\0\x01\x80".to_vec()),
            ("bytes behind it", V5, 0x70, b"\0\x01\0\0\0".to_vec()),
            ("reserved bits", V5, 0x82, b"\0\x01\0\0\x01a\x40".to_vec()),
            ("reserved bits", V4, 0x82, b"\0\x01\0\x01a\x04".to_vec()),
            ("QoS 3", V4, 0x82, b"\0\x01\0\x01a\x03".to_vec()),
            ("no options", V5, 0x82, b"\0\x01\0\0\x01a".to_vec()),
            ("NUL in a filter", V4, 0x82, b"\0\x01\0\x03a\0b\0".to_vec()),
            ("NUL in a filter", V5, 0xa2, b"\0\x01\0\0\x03a\0b".to_vec()),
            ("PINGREQ with a body", V4, 0xc0, b"x".to_vec()),
            ("PINGREQ with a body", V5, 0xc0, b"x".to_vec()),
            ("DISCONNECT with a body", V4, 0xe0, b"\0".to_vec()),
            ("unknown reason", V5, 0xe0, b"\x55".to_vec()),
            ("bytes behind it", V5, 0xe0, b"\0\0\0".to_vec()),
            (
                "a server's property",
                V5,
                0xe0,
                b"\0\x04\x1c\0\x01a".to_vec(),
            ),
        ] {
            let result = check(version, first, &body);
            assert!(
                matches!(result, Err(DecodeError::Malformed(_))),
                "{first:#04x} {what}: {result:?}"
            );
        }
    }

    #[test]
    fn what_may_not_be_said_is_a_protocol_error() {
        let twice = |property: &[u8]| publish(&property.repeat(2));
        for (what, version, first, body) in [
            (
                "session expiry twice",
                V5,
                0x10,
                connect_v5(2, &b"\x11\0\0\0\x01".repeat(2), b"\0\x01c"),
            ),
            (
                "request response information 2",
                V5,
                0x10,
                connect_v5(2, b"\x19\x02", b"\0\x01c"),
            ),
            (
                "request problem information 2",
                V5,
                0x10,
                connect_v5(2, b"\x17\x02", b"\0\x01c"),
            ),
            ("payload format 2", V5, 0x10, with_will(b"\x01\x02")),
            (
                "will delay twice",
                V5,
                0x10,
                with_will(&b"\x18\0\0\0\x01".repeat(2)),
            ),
            ("payload format 2", V5, 0x30, publish(b"\x01\x02")),
            ("payload format twice", V5, 0x30, twice(b"\x01\x01")),
            ("expiry twice", V5, 0x30, twice(b"\x02\0\0\0\x01")),
            ("content type twice", V5, 0x30, twice(b"\x03\0\x01a")),
            ("response topic twice", V5, 0x30, twice(b"\x08\0\x01a")),
            ("correlation data twice", V5, 0x30, twice(b"\x09\0\x01a")),
            ("alias twice", V5, 0x30, twice(b"\x23\0\x01")),
            (
                "subscription id twice",
                V5,
                0x82,
                b"\0\x01\x04\x0b\x01\x0b\x02\0\x01a\0".to_vec(),
            ),
            ("no filters", V5, 0x82, b"\0\x01\0".to_vec()),
            ("QoS 3", V5, 0x82, b"\0\x01\0\0\x01a\x03".to_vec()),
            (
                "retain handling 3",
                V5,
                0x82,
                b"\0\x01\0\0\x01a\x30".to_vec(),
            ),
            ("packet id 0", V4, 0x40, b"\0\0".to_vec()),
            ("packet id 0", V5, 0x50, b"\0\0".to_vec()),
            ("packet id 0", V5, 0x62, b"\0\0".to_vec()),
            ("packet id 0", V4, 0x70, b"\0\0".to_vec()),
            ("no matching subscribers", V5, 0x40, b"\0\x01\x10".to_vec()),
            ("session taken over", V5, 0xe0, b"\x8e".to_vec()),
            ("server shutting down", V5, 0xe0, b"\x8b\0".to_vec()),
            (
                "reason string twice",
                V5,
                0xe0,
                b"\0\x08\x1f\0\x01a\x1f\0\x01b".to_vec(),
            ),
        ] {
            let result = check(version, first, &body);
            assert!(
                matches!(result, Err(DecodeError::Protocol(_))),
                "{first:#04x} {what}: {result:?}"
            );
        }
    }

    #[test]
    fn what_a_client_may_say_is_taken() {
        let all_of_publish = b"\x01\x01\x02\0\0\0\x01\x03\0\x01t\x08\0\x01r\x09\0\x01\xff\
            \x23\0\x01\x26\0\x01k\0\x01v\x26\0\x01k\0\x01w";
        let all_of_connect = b"\x11\0\0\0\x01\x15\0\x01m\x16\0\x01\xff\x17\0\x19\x01\x21\0\x01\
            \x22\0\x01\x27\0\0\0\xff\x26\0\0\0\0\x26\0\0\0\0";
        let all_of_will = b"\x18\0\0\0\x01\x01\0\x02\0\0\0\x01\x03\0\x01t\x08\0\x01r\x09\0\x01\xff\
            \x26\0\x01k\0\x01v";
        for (version, first, body) in [
            (V4, 0x10, connect_v4(0xc2, b"\0\x01c\0\x01u\0\x01p")),
            (
                V5,
                0x10,
                connect_v5(0x42, all_of_connect, b"\0\x01c\0\x01p"),
            ),
            (V5, 0x10, with_will(all_of_will)),
            (V4, 0x30, b"\0\x01a\xff\xff".to_vec()),
            (V5, 0x30, publish(all_of_publish)),
            (V5, 0x30, publish(b"")),
            (V4, 0x40, b"\0\x01".to_vec()),
            (V5, 0x50, b"\0\x01\x97".to_vec()),
            (V5, 0x62, b"\0\x01\x92\0".to_vec()),
            (V5, 0x70, b"\0\x01\0\x04\x1f\0\x01a".to_vec()),
            (V4, 0x82, b"\0\x01\0\x01a\x02\0\0\x01".to_vec()),
            (V5, 0x82, b"\0\x01\x02\x0b\x01\0\x01a\x2e".to_vec()),
            (V4, 0xa2, b"\0\x01\0\x01a".to_vec()),
            (V5, 0xa2, b"\0\x01\0\0\x01a\0\x01b".to_vec()),
            (V4, 0xc0, vec![]),
            (V4, 0xe0, vec![]),
            (V5, 0xe0, vec![]),
            (V5, 0xe0, b"\x04".to_vec()),
            (V5, 0xe0, b"\x80\x05\x11\0\0\0\x01".to_vec()),
        ] {
            assert_eq!(
                check(version, first, &body),
                Ok(()),
                "{first:#04x} {body:?}"
            );
        }
    }
}
