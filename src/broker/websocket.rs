//! MQTT over WebSocket (RFC 6455; MQTT 5.0, section 6) without I/O: what the network brings goes in and
//! MQTT comes out, and the other way round.
//!
//! To MQTT a WebSocket is one stream of bytes: packets may span frames and share them. So nothing here
//! waits for a whole frame or a whole message, however large they are: what came in is unmasked where
//! it lies, and all that is kept is a begun header or control frame, 125 bytes at most. That is why
//! only the formats are tungstenite's (the request, the header of a frame), and not its messages,
//! which it collects.

use std::io::Cursor;
use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{CloseCode, Control, Data, OpCode};

use super::upgrade::{self, Answer};

/// The longest header: length of eight bytes, mask of four.
const MAX_HEADER_BYTES: usize = 14;

/// What a ping or a close may carry.
const MAX_CONTROL_BYTES: u64 = 125;

/// One client's WebSocket.
pub(super) struct WebSocket {
    stage: Stage,
    reader: Reader,
    writer: Writer,
}

enum Stage {
    /// The request has not come whole.
    Upgrading {
        head: Vec<u8>,
        /// Where MQTT is.
        path: Arc<str>,
    },
    Open,
    /// The client has said that it sends nothing more.
    Closed,
    /// The client broke a rule and has been told; what it still sends is of no interest.
    Failed,
}

/// Why a WebSocket is closed by the gateway.
#[derive(Debug, thiserror::Error)]
pub(super) enum WebSocketError {
    #[error("WebSocket: {0}")]
    Refused(&'static str),
    #[error("WebSocket: {}", .0.why)]
    Violation(Violation),
}

#[derive(Debug)]
pub(super) struct Violation {
    code: CloseCode,
    why: &'static str,
}

const fn protocol(why: &'static str) -> Violation {
    Violation {
        code: CloseCode::Protocol,
        why,
    }
}

impl WebSocket {
    pub(super) fn new(path: Arc<str>) -> WebSocket {
        WebSocket {
            stage: Stage::Upgrading {
                head: Vec::new(),
                path,
            },
            reader: Reader::default(),
            writer: Writer::default(),
        }
    }

    /// Takes what the network brought, from byte `start` of `input` on, and leaves the MQTT in it in
    /// its place. What is to be answered is in [`WebSocket::unsent`].
    pub(super) fn receive(
        &mut self,
        input: &mut BytesMut,
        start: usize,
    ) -> Result<(), WebSocketError> {
        match &mut self.stage {
            Stage::Upgrading { head, path } => {
                head.extend_from_slice(&input[start..]);
                input.truncate(start);
                match upgrade::answer(head, path) {
                    Answer::Incomplete => return Ok(()),
                    Answer::Accepted { length, response } => {
                        input.extend_from_slice(&head[length..]);
                        self.writer.unsent.extend_from_slice(&response);
                        self.stage = Stage::Open;
                    }
                    Answer::Refused { response, reason } => {
                        self.writer.unsent.extend_from_slice(&response);
                        self.stage = Stage::Failed;
                        return Err(WebSocketError::Refused(reason));
                    }
                }
            }
            Stage::Open => {}
            Stage::Closed | Stage::Failed => {
                input.truncate(start);
                return Ok(());
            }
        }
        match self.reader.unframe(&mut input[start..], &mut self.writer) {
            Ok(count) => {
                input.truncate(start + count);
                if self.reader.closed {
                    self.stage = Stage::Closed;
                    self.writer.close(CloseCode::Normal);
                }
                Ok(())
            }
            Err(violation) => {
                input.truncate(start);
                self.stage = Stage::Failed;
                self.writer.close(violation.code);
                Err(WebSocketError::Violation(violation))
            }
        }
    }

    /// Whether the client has closed.
    pub(super) fn is_closed(&self) -> bool {
        matches!(self.stage, Stage::Closed)
    }

    /// Begins a frame for the next `length` bytes of MQTT, unless one has been begun. Returns how
    /// many of them may be sent now, after [`WebSocket::unsent`]. None: the WebSocket is closed, and
    /// nobody wants them.
    pub(super) fn frame(&mut self, length: usize) -> Option<usize> {
        self.writer.frame(length)
    }

    /// What is to be sent before anything else.
    pub(super) fn unsent(&mut self) -> &[u8] {
        self.writer.add_control();
        &self.writer.unsent
    }

    /// The first `count` bytes of what was unsent, and then of the frame, are sent. Returns how many
    /// of the frame.
    pub(super) fn sent(&mut self, count: usize) -> usize {
        let ours = count.min(self.writer.unsent.len());
        self.writer.unsent.advance(ours);
        self.writer.left -= count - ours;
        count - ours
    }

    /// Whether there is something to send besides MQTT.
    pub(super) fn is_sending(&self) -> bool {
        self.writer.is_sending()
    }

    /// Says that nothing more comes.
    pub(super) fn close(&mut self) {
        if matches!(self.stage, Stage::Open) {
            self.writer.close(CloseCode::Normal);
        }
    }
}

/// Takes frames apart.
#[derive(Default)]
struct Reader {
    /// The header of the next frame, as far as it has come.
    header: [u8; MAX_HEADER_BYTES],
    header_bytes: usize,
    /// The frame whose payload is coming.
    frame: Option<Frame>,
    /// The control frame whose payload is coming. Data frames are handed on as they come.
    control: Vec<u8>,
    /// A message has begun and its last frame has not.
    in_message: bool,
    closed: bool,
}

struct Frame {
    opcode: OpCode,
    /// Bytes that are still to come.
    left: u64,
    /// For the next byte on.
    mask: [u8; 4],
}

impl Reader {
    /// Moves the payload of data frames to the beginning of `bytes`. Returns how much that is.
    fn unframe(&mut self, bytes: &mut [u8], writer: &mut Writer) -> Result<usize, Violation> {
        let (mut from, mut to) = (0, 0);
        while !self.closed {
            let Some(frame) = &mut self.frame else {
                if from == bytes.len() {
                    break;
                }
                from += self.read_header(&bytes[from..])?;
                continue;
            };
            let count = (bytes.len() - from).min(usize::try_from(frame.left).unwrap_or(usize::MAX));
            let payload = from..from + count;
            unmask(&mut bytes[payload.clone()], &mut frame.mask);
            frame.left -= count as u64;
            from += count;
            let ended = frame.left == 0;
            match frame.opcode {
                OpCode::Data(_) => {
                    bytes.copy_within(payload, to);
                    to += count;
                }
                OpCode::Control(control) => {
                    self.control.extend_from_slice(&bytes[payload]);
                    if ended {
                        self.on_control(control, writer)?;
                    }
                }
            }
            if !ended {
                break;
            }
            self.frame = None;
        }
        Ok(to)
    }

    /// Returns how many of `bytes` belong to the header.
    fn read_header(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let known = self.header_bytes;
        let more = bytes.len().min(MAX_HEADER_BYTES - known);
        self.header[known..known + more].copy_from_slice(&bytes[..more]);
        let mut cursor = Cursor::new(&self.header[..known + more]);
        let parsed = FrameHeader::parse(&mut cursor)
            .map_err(|_| protocol("a frame of a kind that there is not"))?;
        let Some((header, length)) = parsed else {
            self.header_bytes += more;
            return Ok(more);
        };
        let header_bytes = cursor.position() as usize;
        self.header_bytes = 0;
        let Some(mask) = header.mask else {
            return Err(protocol("a frame without a mask; clients must mask theirs"));
        };
        if header.rsv1 || header.rsv2 || header.rsv3 {
            return Err(protocol(
                "a frame with an extension, and none was agreed upon",
            ));
        }
        if header_bytes != header.len(length) || length > i64::MAX as u64 {
            return Err(protocol("a frame's length is written wrongly"));
        }
        match header.opcode {
            OpCode::Data(Data::Text) => {
                return Err(Violation {
                    code: CloseCode::Unsupported,
                    why: "a text frame; MQTT comes in binary frames",
                });
            }
            OpCode::Data(kind) if self.in_message != (kind == Data::Continue) => {
                return Err(protocol("a frame that does not continue what was begun"));
            }
            OpCode::Data(_) => self.in_message = !header.is_final,
            OpCode::Control(_) if length > MAX_CONTROL_BYTES || !header.is_final => {
                return Err(protocol("a ping, pong or close in parts or too long"));
            }
            OpCode::Control(_) => self.control.clear(),
        }
        self.frame = Some(Frame {
            opcode: header.opcode,
            left: length,
            mask,
        });
        Ok(header_bytes - known)
    }

    fn on_control(&mut self, control: Control, writer: &mut Writer) -> Result<(), Violation> {
        match control {
            Control::Ping => writer.pong(&self.control),
            Control::Close if self.control.len() == 1 => {
                return Err(protocol("a close with half a reason"));
            }
            Control::Close => self.closed = true,
            // A pong that nobody asked for is allowed; the parser refuses the others.
            Control::Pong | Control::Reserved(_) => {}
        }
        Ok(())
    }
}

/// `mask` comes back as it applies to what follows `bytes`.
fn unmask(bytes: &mut [u8], mask: &mut [u8; 4]) {
    let [a, b, c, d] = *mask;
    let twice = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, rest) = bytes.as_chunks_mut();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ twice).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
    mask.rotate_left(rest.len() % 4);
}

/// Puts frames together.
#[derive(Default)]
struct Writer {
    /// What must be sent before anything else.
    unsent: BytesMut,
    /// Bytes of MQTT that the frame that has been begun still wants.
    left: usize,
    /// The payload of the last ping, which has not been answered. Those before it need not be.
    pong: Option<Vec<u8>>,
    goodbye: Goodbye,
}

#[derive(Default)]
enum Goodbye {
    #[default]
    No,
    /// To be said when the frame that has been begun is over.
    Due(CloseCode),
    Said,
}

impl Writer {
    fn frame(&mut self, length: usize) -> Option<usize> {
        if self.left == 0 && length > 0 {
            self.add_control();
            if matches!(self.goodbye, Goodbye::Said) {
                return None;
            }
            self.add_header(OpCode::Data(Data::Binary), length);
            self.left = length;
        }
        Some(length.min(self.left))
    }

    /// A control frame can't be inside another frame. Pongs are not heaped up for a client that only
    /// pings and reads nothing.
    fn add_control(&mut self) {
        if self.left > 0 || matches!(self.goodbye, Goodbye::Said) {
            return;
        }
        if self.unsent.is_empty()
            && let Some(payload) = self.pong.take()
        {
            self.add_header(OpCode::Control(Control::Pong), payload.len());
            self.unsent.extend_from_slice(&payload);
        }
        if let Goodbye::Due(code) = self.goodbye {
            self.add_header(OpCode::Control(Control::Close), 2);
            self.unsent
                .extend_from_slice(&u16::from(code).to_be_bytes());
            self.goodbye = Goodbye::Said;
        }
    }

    fn add_header(&mut self, opcode: OpCode, length: usize) {
        let header = FrameHeader {
            opcode,
            ..FrameHeader::default()
        };
        header
            .format(length as u64, &mut (&mut self.unsent).writer())
            .expect("a buffer takes what is written");
    }

    fn pong(&mut self, payload: &[u8]) {
        self.pong = Some(payload.to_vec());
    }

    fn close(&mut self, code: CloseCode) {
        if matches!(self.goodbye, Goodbye::No) {
            self.goodbye = Goodbye::Due(code);
        }
    }

    fn is_sending(&self) -> bool {
        let control = self.pong.is_some() || matches!(self.goodbye, Goodbye::Due(_));
        let open = !matches!(self.goodbye, Goodbye::Said);
        !self.unsent.is_empty() || (self.left == 0 && open && control)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REQUEST: &[u8] = b"GET /mqtt HTTP/1.1\r\nHost: plant\r\nConnection: Upgrade\r\n\
        Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n";

    const CONTINUE: u8 = 0;
    const TEXT: u8 = 1;
    const BINARY: u8 = 2;
    const CLOSE: u8 = 8;
    const PING: u8 = 9;
    const PONG: u8 = 10;
    const FINAL: u8 = 0x80;

    /// A frame as a client sends it.
    fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [0x12, 0x34, 0x56, 0x78];
        let mut frame = vec![first];
        match payload.len() {
            length @ ..126 => frame.push(0x80 | length as u8),
            length @ 126..65536 => {
                frame.push(0x80 | 126);
                frame.extend((length as u16).to_be_bytes());
            }
            length => {
                frame.push(0x80 | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b));
        frame
    }

    fn binary(payload: &[u8]) -> Vec<u8> {
        masked(FINAL | BINARY, payload)
    }

    fn open() -> WebSocket {
        let mut websocket = WebSocket::new("/mqtt".into());
        assert_eq!(received(&mut websocket, REQUEST).unwrap(), b"");
        assert!(sent(&mut websocket).starts_with(b"HTTP/1.1 101 "));
        websocket
    }

    /// The MQTT in what the network brings.
    fn received(websocket: &mut WebSocket, bytes: &[u8]) -> Result<Vec<u8>, WebSocketError> {
        let mut input = BytesMut::from(&b"earlier"[..]);
        input.extend_from_slice(bytes);
        websocket.receive(&mut input, 7)?;
        assert_eq!(&input[..7], b"earlier");
        Ok(input[7..].to_vec())
    }

    /// What is to be sent besides MQTT.
    fn sent(websocket: &mut WebSocket) -> Vec<u8> {
        let mut all = Vec::new();
        while websocket.is_sending() {
            let unsent = websocket.unsent().to_vec();
            websocket.sent(unsent.len());
            all.extend(unsent);
        }
        all
    }

    fn violation(bytes: &[u8]) -> (u16, String) {
        let mut websocket = open();
        let error = received(&mut websocket, bytes).unwrap_err();
        let close = sent(&mut websocket);
        assert_eq!(close[..2], [FINAL | CLOSE, 2]);
        // Whatever comes afterwards is of no interest, and nothing may follow a close.
        assert_eq!(received(&mut websocket, &binary(b"x")).unwrap(), b"");
        assert_eq!(websocket.frame(1), None);
        websocket.close();
        assert_eq!(sent(&mut websocket), b"");
        let code = u16::from_be_bytes([close[2], close[3]]);
        (code, error.to_string())
    }

    #[test]
    fn packets_span_frames_and_share_them() {
        let mut websocket = open();
        let mut frames = binary(b"one");
        frames.extend(masked(BINARY, b" t"));
        frames.extend(masked(CONTINUE, b""));
        frames.extend(masked(FINAL | PONG, b"unasked"));
        frames.extend(masked(FINAL | CONTINUE, b"wo three"));
        frames.extend(binary(&[7; 126]));
        frames.extend(binary(&[8; 70_000]));
        let expected = [b"one two three".as_slice(), &[7; 126], &[8; 70_000]].concat();
        assert_eq!(received(&mut websocket, &frames).unwrap(), expected);
    }

    #[test]
    fn the_request_and_the_first_frame_may_come_together() {
        let mut websocket = WebSocket::new("/mqtt".into());
        let both = [REQUEST, &binary(b"CONNECT")].concat();
        assert_eq!(received(&mut websocket, &both).unwrap(), b"CONNECT");
    }

    #[test]
    fn a_refused_request_is_answered_once() {
        let mut websocket = WebSocket::new("/elsewhere".into());
        let error = received(&mut websocket, REQUEST).unwrap_err();
        assert!(error.to_string().contains("mqtt.websocket.path"), "{error}");
        let answer = sent(&mut websocket);
        assert!(answer.starts_with(b"HTTP/1.1 404 "));
        assert_eq!(received(&mut websocket, REQUEST).unwrap(), b"");
        websocket.close();
        assert_eq!(sent(&mut websocket), b"");
    }

    #[test]
    fn a_ping_is_answered_between_frames() {
        let mut websocket = open();
        assert_eq!(websocket.frame(10), Some(10));
        assert_eq!(websocket.sent(2 + 4), 4);
        received(&mut websocket, &masked(FINAL | PING, b"first")).unwrap();
        received(&mut websocket, &masked(FINAL | PING, b"last")).unwrap();
        assert!(!websocket.is_sending());
        // The rest of the frame, however much more there is by now.
        assert_eq!(websocket.frame(100), Some(6));
        assert_eq!(websocket.sent(6), 6);
        assert_eq!(
            sent(&mut websocket),
            [&[FINAL | PONG, 4], &b"last"[..]].concat()
        );
    }

    #[test]
    fn a_close_is_answered_and_ends_what_comes() {
        let mut websocket = open();
        let mut bytes = binary(b"DISCONNECT");
        bytes.extend(masked(FINAL | CLOSE, &[3, 0xe8]));
        bytes.extend(binary(b"more"));
        assert_eq!(received(&mut websocket, &bytes).unwrap(), b"DISCONNECT");
        assert!(websocket.is_closed());
        assert_eq!(sent(&mut websocket), [FINAL | CLOSE, 2, 3, 0xe8]);
        websocket.close();
        assert_eq!(sent(&mut websocket), b"");
    }

    #[test]
    fn a_close_waits_for_the_end_of_the_frame() {
        let mut websocket = open();
        assert_eq!(websocket.frame(2), Some(2));
        assert_eq!(websocket.sent(2 + 1), 1);
        websocket.close();
        assert_eq!(sent(&mut websocket), b"");
        assert_eq!(websocket.frame(1), Some(1));
        assert_eq!(websocket.sent(1), 1);
        assert_eq!(sent(&mut websocket), [FINAL | CLOSE, 2, 3, 0xe8]);
    }

    #[test]
    fn each_broken_rule_closes_with_its_code() {
        let mut unmasked = binary(b"x");
        unmasked[1] &= 0x7f;
        let long_for_short = [FINAL | BINARY, 0x80 | 126, 0, 5, 0, 0, 0, 0];
        let longer = [FINAL | BINARY, 0xff, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        let endless = [FINAL | BINARY, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut interrupted = masked(BINARY, b"x");
        assert_eq!(received(&mut open(), &longer).unwrap(), b"");
        interrupted.extend(binary(b"y"));
        for (what, bytes, code, why) in [
            ("text", masked(FINAL | TEXT, b"x"), 1003, "text frame"),
            ("no mask", unmasked, 1002, "must mask"),
            (
                "reserved bit",
                masked(0x40 | FINAL | BINARY, b""),
                1002,
                "extension",
            ),
            ("reserved kind", masked(FINAL | 3, b""), 1002, "kind"),
            ("reserved control", masked(FINAL | 11, b""), 1002, "kind"),
            (
                "no beginning",
                masked(FINAL | CONTINUE, b""),
                1002,
                "continue",
            ),
            ("two beginnings", interrupted, 1002, "continue"),
            ("long length", long_for_short.to_vec(), 1002, "length"),
            ("too long", endless.to_vec(), 1002, "length"),
            ("ping in parts", masked(PING, b""), 1002, "in parts"),
            (
                "long ping",
                masked(FINAL | PING, &[0; 126]),
                1002,
                "too long",
            ),
            (
                "odd close",
                masked(FINAL | CLOSE, &[3]),
                1002,
                "half a reason",
            ),
        ] {
            let (found, error) = violation(&bytes);
            assert_eq!(found, code, "{what}");
            assert!(error.starts_with("WebSocket: "), "{what}: {error}");
            assert!(error.contains(why), "{what}: {error}");
        }
    }

    #[test]
    fn a_client_that_only_pings_and_reads_nothing_costs_no_memory() {
        let mut websocket = open();
        for _ in 0..1000 {
            received(&mut websocket, &masked(FINAL | PING, &[0; 125])).unwrap();
            assert!(websocket.unsent().len() <= 127);
        }
    }

    proptest! {
        #[test]
        fn what_is_sent_arrives_however_it_is_cut(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            pings in prop::collection::vec(any::<bool>(), 8),
            cuts in prop::collection::vec(1usize..40, 1..50),
        ) {
            let mut bytes = Vec::new();
            for (part, ping) in parts.iter().zip(pings) {
                bytes.extend(binary(part));
                if ping {
                    bytes.extend(masked(FINAL | PING, b"?"));
                }
            }
            let mut websocket = open();
            let mut found = Vec::new();
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (next, later) = rest.split_at(rest.len().min(*cut));
                found.extend(received(&mut websocket, next).unwrap());
                rest = later;
            }
            prop_assert_eq!(found, parts.concat());
        }

        #[test]
        fn whatever_comes_is_kept_within_bounds(
            mut bytes in prop::collection::vec(any::<u8>(), 0..2000),
            upgraded in any::<bool>(),
            masks in any::<bool>(),
            cut in 1usize..200,
        ) {
            let mut websocket = if upgraded { open() } else { WebSocket::new("/mqtt".into()) };
            if masks {
                // Else hardly anything would pass for a frame.
                bytes.iter_mut().step_by(7).for_each(|byte| *byte = FINAL | BINARY);
                bytes.iter_mut().skip(1).step_by(7).for_each(|byte| *byte |= 0x80);
            }
            for chunk in bytes.chunks(cut) {
                match received(&mut websocket, chunk) {
                    Ok(mqtt) => prop_assert!(mqtt.len() <= chunk.len()),
                    Err(error) => prop_assert!(error.to_string().starts_with("WebSocket: ")),
                }
                websocket.frame(chunk.len());
                prop_assert!(websocket.unsent().len() < 512);
                let kept = match &websocket.stage {
                    Stage::Upgrading { head, .. } => head.len(),
                    _ => websocket.reader.control.len(),
                };
                prop_assert!(kept <= upgrade::MAX_REQUEST_BYTES + chunk.len());
            }
        }
    }
}
