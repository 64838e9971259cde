//! The bytes of TCP ingest, as `docs/ingest.md` has them. Knows no sockets and no sessions.
//!
//! All numbers are big-endian.

use bytes::{Bytes, BytesMut};

use crate::event::Lane;
use crate::pipeline::Pressure;

/// What a client of version 2 begins with. In version 1, whose first bytes are the length of a frame, it
/// would be one of 1.2 GB, which no gateway takes.
pub const MAGIC: [u8; 4] = *b"HGI2";

/// Below [`MAGIC`] as a length, and what a journal can have as one payload.
pub const MOST_FRAME_BYTES: u64 = 256 << 20;

/// Most bytes of a handshake, after its length.
pub const MAX_HELLO_BYTES: usize = 16 << 10;

const LENGTH_BYTES: usize = 4;

/// The version of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// That of EventStreamCore: frames, and no answers.
    One,
    /// With a handshake, ids and acknowledgements.
    Two,
}

impl Version {
    pub fn as_str(self) -> &'static str {
        match self {
            Version::One => "1",
            Version::Two => "2",
        }
    }

    /// Bytes after the length and before the topic.
    fn header_bytes(self) -> usize {
        match self {
            Version::One => 3,
            Version::Two => 11,
        }
    }
}

/// How urgent an event is, for the one who sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[repr(u8)]
pub enum Priority {
    Batch = 0,
    Low = 1,
    Medium = 2,
    High = 3,
    Critical = 4,
}

impl Priority {
    const ALL: [Priority; 5] = [
        Priority::Batch,
        Priority::Low,
        Priority::Medium,
        Priority::High,
        Priority::Critical,
    ];

    /// The lane that it asks for. High falls to medium while the realtime lane can't keep up.
    pub fn lane(self, pressure: Pressure) -> Lane {
        match self {
            Priority::Batch => Lane::Batch,
            Priority::High if pressure > Pressure::Healthy => Lane::Transactional,
            Priority::Low | Priority::Medium => Lane::Transactional,
            Priority::High | Priority::Critical => Lane::Realtime,
        }
    }
}

/// Why a connection is ended, as a client of version 2 is told it. The code is its place in the
/// documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    Malformed = 1,
    NotAuthorized = 2,
    TooLarge = 3,
    BadId = 4,
    BadTopic = 5,
    Busy = 6,
    TimedOut = 7,
    ShuttingDown = 8,
}

impl Code {
    /// Whether it can help to connect again and to send the same.
    pub fn passes(code: u8) -> bool {
        [Code::Busy, Code::TimedOut, Code::ShuttingDown]
            .iter()
            .any(|passing| *passing as u8 == code)
    }
}

/// What a client has sent that it may not send, or why it can't stay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    pub code: Code,
    pub text: String,
}

impl Refusal {
    pub fn new(code: Code, text: impl Into<String>) -> Refusal {
        Refusal {
            code,
            text: text.into(),
        }
    }
}

fn malformed(text: impl Into<String>) -> Refusal {
    Refusal::new(Code::Malformed, text)
}

/// The handshake of a client.
#[derive(Clone, PartialEq, Eq)]
pub struct Hello {
    pub name: String,
    /// A JSON Web Token, or a user name and a password with a colon between them; empty for none.
    pub token: String,
}

/// Tokens are secrets.
impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hello").field("name", &self.name).finish()
    }
}

impl Hello {
    /// Takes a whole handshake out of `input`, which begins with it. None: more is to come.
    pub fn take(input: &mut BytesMut) -> Result<Option<Hello>, Refusal> {
        let Some(head) = input.first_chunk::<8>().copied() else {
            return Ok(None);
        };
        let length = number(&head[4..]) as usize;
        if length > MAX_HELLO_BYTES {
            return Err(malformed(format!(
                "a handshake of {length} bytes; it has at most {MAX_HELLO_BYTES}"
            )));
        }
        if input.len() < head.len() + length {
            return Ok(None);
        }
        let body = input.split_to(8 + length).split_off(8).freeze();
        Hello::parse(&body).map(Some)
    }

    fn parse(body: &[u8]) -> Result<Hello, Refusal> {
        let short = || malformed("the handshake ends before its fields do");
        let (flags, rest) = body.split_first().ok_or_else(short)?;
        if *flags != 0 {
            return Err(malformed(format!(
                "the flags of the handshake are {flags:#04x}, and none is known"
            )));
        }
        let (name, rest) = text(rest).ok_or_else(short)?;
        let (token, rest) = text(rest).ok_or_else(short)?;
        if !rest.is_empty() {
            return Err(malformed(format!(
                "{} bytes follow the token of the handshake",
                rest.len()
            )));
        }
        let utf8 = |bytes: &[u8], field: &str| {
            let text = std::str::from_utf8(bytes);
            text.map(str::to_owned)
                .map_err(|_| malformed(format!("the {field} of the handshake is no UTF-8")))
        };
        let name = utf8(name, "name")?;
        if name.is_empty() || name.contains(char::is_control) {
            return Err(malformed(
                "the name of the handshake is empty or has control characters",
            ));
        }
        Ok(Hello {
            name,
            token: utf8(token, "token")?,
        })
    }

    /// Appends it to `out`. None: it is too long.
    pub fn write(&self, out: &mut Vec<u8>) -> Option<()> {
        let length = 1 + 2 + self.name.len() + 2 + self.token.len();
        if length > MAX_HELLO_BYTES {
            return None;
        }
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&(length as u32).to_be_bytes());
        out.push(0);
        for field in [&self.name, &self.token] {
            out.extend_from_slice(&(field.len() as u16).to_be_bytes());
            out.extend_from_slice(field.as_bytes());
        }
        Some(())
    }
}

/// A field with its length before it, and what follows.
fn text(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(*bytes.first_chunk().expect("4 bytes"))
}

/// One event, as it came in. The payload shares the memory of what was read.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub priority: Priority,
    /// In version 2.
    pub id: Option<u64>,
    pub topic: &'a [u8],
    pub payload: Bytes,
}

/// How many bytes at the beginning of `input` are whole frames. An error only if the first one can't be
/// one.
pub fn whole_frames(
    input: &[u8],
    version: Version,
    max_frame_bytes: usize,
) -> Result<usize, Refusal> {
    let mut whole = 0;
    while let Some(head) = input[whole..].first_chunk::<LENGTH_BYTES>() {
        let length = number(head) as usize;
        // One of an empty topic is refused when it is there.
        let fault = if length < version.header_bytes() {
            malformed(format!(
                "a frame of length {length}; a header alone has {}",
                version.header_bytes()
            ))
        } else if length > max_frame_bytes {
            Refusal::new(
                Code::TooLarge,
                format!("a frame of length {length}; ingest.max_frame_bytes is {max_frame_bytes}"),
            )
        } else {
            let end = whole + LENGTH_BYTES + length;
            if end > input.len() {
                break;
            }
            whole = end;
            continue;
        };
        if whole == 0 {
            return Err(fault);
        }
        break;
    }
    Ok(whole)
}

/// How many bytes the frame has with which `input` begins, if that is there yet.
pub fn begun_size(input: &[u8]) -> Option<usize> {
    let head = input.first_chunk::<LENGTH_BYTES>()?;
    Some(LENGTH_BYTES + number(head) as usize)
}

/// How many bytes a frame has at the most, of which the length may be up to `max_frame_bytes`.
pub fn largest_frame(max_frame_bytes: usize) -> usize {
    LENGTH_BYTES + max_frame_bytes
}

/// The first frame of `frames`, which are whole and not empty, and its size.
pub fn first_frame(frames: &Bytes, version: Version) -> Result<(Frame<'_>, usize), Refusal> {
    let end = LENGTH_BYTES + number(frames) as usize;
    let priority = frames[4];
    let topic_bytes = usize::from(u16::from_be_bytes([frames[5], frames[6]]));
    let topic_at = LENGTH_BYTES + version.header_bytes();
    let payload_at = topic_at + topic_bytes;
    if payload_at > end {
        return Err(malformed(format!(
            "topic_len is {topic_bytes}, and the frame has {} bytes after its header",
            end - topic_at
        )));
    }
    if topic_bytes == 0 {
        return Err(Refusal::new(Code::BadTopic, "topic_len is 0"));
    }
    let Some(priority) = Priority::ALL.get(usize::from(priority)) else {
        return Err(malformed(format!(
            "priority is {priority}, and must be 0 to 4"
        )));
    };
    let id = match version {
        Version::One => None,
        Version::Two => Some(u64::from_be_bytes(
            *frames[7..].first_chunk().expect("a whole header"),
        )),
    };
    let frame = Frame {
        priority: *priority,
        id,
        topic: &frames[topic_at..payload_at],
        payload: frames.slice(payload_at..end),
    };
    Ok((frame, end))
}

/// Appends a frame to `out`: of version 2, if it has an id. The topic has 1 to 65,535 bytes.
pub fn write_frame(
    priority: Priority,
    id: Option<u64>,
    topic: &[u8],
    payload: &[u8],
    out: &mut Vec<u8>,
) {
    let version = match id {
        Some(_) => Version::Two,
        None => Version::One,
    };
    let length = version.header_bytes() + topic.len() + payload.len();
    out.extend_from_slice(&(length as u32).to_be_bytes());
    out.push(priority as u8);
    out.extend_from_slice(&(topic.len() as u16).to_be_bytes());
    out.extend(id.iter().flat_map(|id| id.to_be_bytes()));
    out.extend_from_slice(topic);
    out.extend_from_slice(payload);
}

/// What the gateway says, in version 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The client is let in.
    Welcome { max_frame_bytes: u32 },
    /// All events up to this id are taken.
    Ack { id: u64 },
    /// Why the connection ends. The code may be one that a newer gateway has.
    Refused { code: u8, text: String },
}

const WELCOME: u8 = 0;
const ACK: u8 = 1;
const REFUSED: u8 = 2;

impl Answer {
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Answer::Welcome { max_frame_bytes } => {
                out.push(WELCOME);
                out.extend_from_slice(&max_frame_bytes.to_be_bytes());
            }
            Answer::Ack { id } => {
                out.push(ACK);
                out.extend_from_slice(&id.to_be_bytes());
            }
            Answer::Refused { code, text } => {
                let end = text.floor_char_boundary(usize::from(u16::MAX));
                out.extend_from_slice(&[REFUSED, *code]);
                out.extend_from_slice(&(end as u16).to_be_bytes());
                out.extend_from_slice(&text.as_bytes()[..end]);
            }
        }
    }

    /// The first answer of `input`, and its size. None: more is to come. An error: what comes is none.
    pub fn first(input: &[u8]) -> Result<Option<(Answer, usize)>, u8> {
        let Some((kind, rest)) = input.split_first() else {
            return Ok(None);
        };
        let answer = match *kind {
            WELCOME => rest.first_chunk().map(|bytes| {
                let max_frame_bytes = u32::from_be_bytes(*bytes);
                (Answer::Welcome { max_frame_bytes }, 5)
            }),
            ACK => rest.first_chunk().map(|bytes| {
                let id = u64::from_be_bytes(*bytes);
                (Answer::Ack { id }, 9)
            }),
            REFUSED => rest.split_first().and_then(|(code, rest)| {
                let (text, _) = text(rest)?;
                let refused = Answer::Refused {
                    code: *code,
                    text: String::from_utf8_lossy(text).into_owned(),
                };
                Some((refused, 4 + text.len()))
            }),
            other => return Err(other),
        };
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_stand_as_they_are_documented() {
        let mut bytes = Vec::new();
        write_frame(Priority::High, None, b"a/b", b"hi", &mut bytes);
        assert_eq!(bytes, b"\x00\x00\x00\x08\x03\x00\x03a/bhi");
        bytes.clear();
        write_frame(Priority::Batch, Some(7), b"a/b", b"hi", &mut bytes);
        assert_eq!(
            bytes,
            b"\x00\x00\x00\x10\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x07a/bhi"
        );
        bytes.clear();
        let hello = Hello {
            name: "press".into(),
            token: "u:p".into(),
        };
        hello.write(&mut bytes).unwrap();
        assert_eq!(bytes, b"HGI2\x00\x00\x00\x0d\x00\x00\x05press\x00\x03u:p");
        for (answer, expected) in [
            (
                Answer::Welcome {
                    max_frame_bytes: 1 << 20,
                },
                &b"\x00\x00\x10\x00\x00"[..],
            ),
            (Answer::Ack { id: 258 }, b"\x01\0\0\0\0\0\0\x01\x02"),
            (
                Answer::Refused {
                    code: 4,
                    text: "no".into(),
                },
                b"\x02\x04\x00\x02no",
            ),
        ] {
            bytes.clear();
            answer.write(&mut bytes);
            assert_eq!(bytes, expected);
        }
    }

    #[test]
    fn a_length_that_cannot_be_is_told_of_once_all_frames_before_it_are_taken() {
        let mut bytes = Vec::new();
        write_frame(Priority::Low, None, b"t", b"", &mut bytes);
        let whole = bytes.len();
        bytes.extend_from_slice(&[0, 0, 0, 2]);
        assert_eq!(whole_frames(&bytes, Version::One, 100), Ok(whole));
        let refused = whole_frames(&bytes[whole..], Version::One, 100).unwrap_err();
        assert_eq!(refused.code, Code::Malformed);
        let refused = whole_frames(&MAGIC, Version::One, MOST_FRAME_BYTES as usize).unwrap_err();
        assert_eq!(refused.code, Code::TooLarge);
    }

    fn version(two: bool) -> Version {
        match two {
            true => Version::Two,
            false => Version::One,
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(
            frames in prop::collection::vec(("[a-z/]{1,20}", prop::collection::vec(any::<u8>(), 0..50), 0..5usize, any::<u64>()), 1..20),
            two: bool,
            cut in 0..2000usize,
        ) {
            let version = version(two);
            let mut bytes = Vec::new();
            let mut ends = Vec::new();
            for (topic, payload, priority, id) in &frames {
                let id = two.then_some(*id);
                write_frame(Priority::ALL[*priority], id, topic.as_bytes(), payload, &mut bytes);
                ends.push(bytes.len());
            }
            // Only those that are whole.
            let cut = cut.min(bytes.len());
            let whole = whole_frames(&bytes[..cut], version, 1000).unwrap();
            prop_assert_eq!(whole, ends.iter().copied().rfind(|end| *end <= cut).unwrap_or(0));
            let mut rest = Bytes::from(bytes).slice(..whole);
            for (topic, payload, priority, id) in &frames {
                if rest.is_empty() {
                    break;
                }
                let (frame, size) = first_frame(&rest, version).unwrap();
                prop_assert_eq!(frame.topic, topic.as_bytes());
                prop_assert_eq!(&frame.payload, payload);
                prop_assert_eq!(frame.priority, Priority::ALL[*priority]);
                prop_assert_eq!(frame.id, two.then_some(*id));
                rest = rest.slice(size..);
            }
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn a_handshake_is_read_as_it_was_written(name in "[^\\p{Cc}]{1,100}", token in ".{0,100}", cut in 0..400usize) {
            let hello = Hello { name, token };
            let mut bytes = Vec::new();
            hello.write(&mut bytes).unwrap();
            let mut part = BytesMut::from(&bytes[..cut.min(bytes.len() - 1)]);
            prop_assert_eq!(Hello::take(&mut part), Ok(None));
            bytes.push(b'x');
            let mut all = BytesMut::from(&bytes[..]);
            prop_assert_eq!(Hello::take(&mut all), Ok(Some(hello)));
            prop_assert_eq!(&all[..], b"x");
        }

        #[test]
        fn answers_are_read_as_they_were_written(id: u64, code: u8, text in ".{0,100}", rest in prop::collection::vec(any::<u8>(), 0..4)) {
            for answer in [Answer::Ack { id }, Answer::Refused { code, text: text.clone() }] {
                let mut bytes = Vec::new();
                answer.write(&mut bytes);
                let size = bytes.len();
                for cut in 0..size {
                    prop_assert_eq!(Answer::first(&bytes[..cut]), Ok(None));
                }
                bytes.extend_from_slice(&rest);
                prop_assert_eq!(Answer::first(&bytes), Ok(Some((answer, size))));
            }
        }
    }
}
