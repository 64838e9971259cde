//! How events stand on disk: frames of records, in segments. The format is in `docs/journal.md`.

use bytes::{Buf, Bytes};
use bytestring::ByteString;

use crate::event::Topic;

pub(super) const HEADER_BYTES: usize = 32;
const SEGMENT_MAGIC: [u8; 8] = *b"HGJRNL\0\x01";
const RECORD_HEADER_BYTES: usize = 14;

/// In the length of a payload, which has 28 bits: a key follows, a link does, gateways do.
const WITH_KEY: u32 = 1 << 31;
const WITH_LINK: u32 = 1 << 30;
const WITH_VIA: u32 = 1 << 29;
const KEY_BYTES: usize = 16;
const LINK_BYTES: usize = 4;

/// Where an event came from, if that was another gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin<'a> {
    /// The link that it came by.
    pub link: Option<u32>,
    /// The names of the gateways that it came over, with commas between them. At most 65,535 bytes.
    pub via: &'a str,
}

/// Records of events that have no sequence yet.
#[derive(Debug, Default)]
pub struct Records {
    body: Vec<u8>,
    count: u32,
}

impl Records {
    /// `topic` has at most 65,535 bytes and `payload` at most 256 MiB, as in MQTT.
    /// `key` tells its duplicates.
    pub fn push(
        &mut self,
        topic: &Topic,
        payload: &[u8],
        timestamp_ns: u64,
        key: Option<[u8; KEY_BYTES]>,
        origin: Option<Origin<'_>>,
    ) {
        let origin = origin.unwrap_or_default();
        let topic = topic.as_bytes();
        let via = origin.via.as_bytes();
        let head_bytes = RECORD_HEADER_BYTES + KEY_BYTES + LINK_BYTES + 2 + via.len();
        self.body.reserve(head_bytes + topic.len() + payload.len());
        self.body.extend_from_slice(&timestamp_ns.to_le_bytes());
        self.body
            .extend_from_slice(&(topic.len() as u16).to_le_bytes());
        let mut length = payload.len() as u32;
        length |= key.map_or(0, |_| WITH_KEY) | origin.link.map_or(0, |_| WITH_LINK);
        if !via.is_empty() {
            length |= WITH_VIA;
        }
        self.body.extend_from_slice(&length.to_le_bytes());
        self.body
            .extend_from_slice(key.as_ref().map_or(&[], |key| key));
        if let Some(link) = origin.link {
            self.body.extend_from_slice(&link.to_le_bytes());
        }
        if !via.is_empty() {
            self.body
                .extend_from_slice(&(via.len() as u16).to_le_bytes());
            self.body.extend_from_slice(via);
        }
        self.body.extend_from_slice(topic);
        self.body.extend_from_slice(payload);
        self.count += 1;
    }

    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn frame_bytes(&self) -> usize {
        HEADER_BYTES + self.body.len()
    }

    /// The checksum of what is in it, to be made before anybody waits for it.
    pub(super) fn checksum(&self) -> u32 {
        crc32c::crc32c(&self.body)
    }

    /// Appends the frame to `out`.
    pub(super) fn write(&self, first: u64, time_ns: u64, checksum: u32, out: &mut Vec<u8>) {
        let header = FrameHeader {
            body_bytes: self.body.len() as u32,
            count: self.count,
            first,
            time_ns,
            checksum,
        };
        out.extend_from_slice(&header.to_bytes());
        out.extend_from_slice(&self.body);
    }
}

/// Appends a frame that says that all events before `cursor` are finished.
pub(super) fn write_cursor(cursor: u64, next: u64, time_ns: u64, out: &mut Vec<u8>) {
    let body = cursor.to_le_bytes();
    let header = FrameHeader {
        body_bytes: body.len() as u32,
        count: 0,
        first: next,
        time_ns,
        checksum: crc32c::crc32c(&body),
    };
    out.extend_from_slice(&header.to_bytes());
    out.extend_from_slice(&body);
}

pub(super) fn segment_header(first: u64, time_ns: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(&SEGMENT_MAGIC);
    bytes[8..16].copy_from_slice(&first.to_le_bytes());
    bytes[16..24].copy_from_slice(&time_ns.to_le_bytes());
    seal(&mut bytes);
    bytes
}

/// The sequence of the first event, and when the segment was begun, if this is a segment's header.
pub(super) fn parse_segment_header(bytes: &[u8; HEADER_BYTES]) -> Option<(u64, u64)> {
    (is_sealed(bytes) && bytes.starts_with(&SEGMENT_MAGIC))
        .then(|| (u64_at(bytes, 8), u64_at(bytes, 16)))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameHeader {
    pub(super) body_bytes: u32,
    pub(super) count: u32,
    pub(super) first: u64,
    pub(super) time_ns: u64,
    pub(super) checksum: u32,
}

impl FrameHeader {
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.count.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.first.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.time_ns.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.checksum.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<FrameHeader> {
        is_sealed(bytes).then(|| FrameHeader {
            body_bytes: u32_at(bytes, 0),
            count: u32_at(bytes, 4),
            first: u64_at(bytes, 8),
            time_ns: u64_at(bytes, 16),
            checksum: u32_at(bytes, 24),
        })
    }

    /// The sequence behind the last event.
    pub(super) fn next(&self) -> u64 {
        self.first.saturating_add(u64::from(self.count))
    }
}

/// An event as the journal has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub sequence: u64,
    /// Nanoseconds since 1970.
    pub timestamp_ns: u64,
    pub topic: Topic,
    pub payload: Bytes,
    /// What tells its duplicates.
    pub key: Option<[u8; KEY_BYTES]>,
    /// The link that it came by.
    pub link: Option<u32>,
    /// The gateways that it came over, with commas between them.
    pub via: ByteString,
}

/// A frame whose checksums are right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Events(Vec<Record>),
    Cursor(u64),
}

/// None if the body is not what the header says.
pub(super) fn parse_body(header: &FrameHeader, body: Bytes) -> Option<Frame> {
    if crc32c::crc32c(&body) != header.checksum {
        return None;
    }
    if header.count == 0 {
        let cursor = body.as_ref().try_into().ok()?;
        return Some(Frame::Cursor(u64::from_le_bytes(cursor)));
    }
    let mut records = Vec::new();
    let mut rest = body;
    for sequence in header.first..header.next() {
        if rest.len() < RECORD_HEADER_BYTES {
            return None;
        }
        let head = rest.split_to(RECORD_HEADER_BYTES);
        let topic_bytes = usize::from(u16::from_le_bytes([head[8], head[9]]));
        let length = u32_at(&head, 10);
        let payload_bytes = (length & !(WITH_KEY | WITH_LINK | WITH_VIA)) as usize;
        let key = match length & WITH_KEY {
            0 => None,
            _ if rest.len() < KEY_BYTES => return None,
            _ => rest.split_to(KEY_BYTES).first_chunk().copied(),
        };
        let link = match length & WITH_LINK {
            0 => None,
            _ if rest.len() < LINK_BYTES => return None,
            _ => Some(u32_at(&rest.split_to(LINK_BYTES), 0)),
        };
        let via = match length & WITH_VIA {
            0 => ByteString::new(),
            _ => {
                let via_bytes = usize::from(rest.try_get_u16_le().ok()?);
                if rest.len() < via_bytes {
                    return None;
                }
                rest.split_to(via_bytes).try_into().ok()?
            }
        };
        if rest.len() < topic_bytes + payload_bytes {
            return None;
        }
        let topic = Topic::new(rest.split_to(topic_bytes)).ok()?;
        records.push(Record {
            sequence,
            timestamp_ns: u64_at(&head, 0),
            topic,
            payload: rest.split_to(payload_bytes),
            key,
            link,
            via,
        });
    }
    rest.is_empty().then_some(Frame::Events(records))
}

fn seal(bytes: &mut [u8; HEADER_BYTES]) {
    let checksum = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..].copy_from_slice(&checksum.to_le_bytes());
}

fn is_sealed(bytes: &[u8; HEADER_BYTES]) -> bool {
    crc32c::crc32c(&bytes[..HEADER_BYTES - 4]) == u32_at(bytes, HEADER_BYTES - 4)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("8 bytes"))
}
