//! A producer that sends any bytes, in any pieces: what comes of them is the same, and what is taken keeps its
//! promises.
#![no_main]

use bytes::BytesMut;
use headgate::broker::Permissions;
use headgate::ingest::frame::Refusal;
use headgate::ingest::session::{Session, Step};
use libfuzzer_sys::fuzz_target;

const MAX_FRAME_BYTES: usize = 256;

/// What came of it: topics, payloads and ids, the error, and what was answered.
type Seen = (
    Vec<(String, Vec<u8>, Option<u64>)>,
    Option<Refusal>,
    Vec<u8>,
);

fn run(pieces: &[&[u8]]) -> Seen {
    let mut session = Session::new(MAX_FRAME_BYTES);
    let (mut input, mut output) = (BytesMut::new(), Vec::new());
    let mut events = Vec::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match session.next(&mut input) {
                Ok(None) => break,
                Ok(Some(Step::Login(_))) => session.admit(Permissions::everything(), &mut output),
                Ok(Some(Step::Event(event) | Step::Denied(event))) => {
                    assert!(event.payload.len() < MAX_FRAME_BYTES);
                    assert!(event.id.is_none_or(|id| id > 0));
                    events.push((event.topic.to_string(), event.payload.to_vec(), event.id));
                }
                Err(refusal) => {
                    session.taken(&mut output);
                    session.refuse(&refusal, &mut output);
                    return (events, Some(refusal), output);
                }
            }
        }
        // A whole frame or handshake is never left.
        assert!(input.len() < 16 * 1024 + 8);
    }
    session.taken(&mut output);
    assert!(events.is_sorted_by(|a, b| a.2.is_none() || a.2 < b.2));
    (events, None, output)
}

fuzz_target!(|input: (Vec<u8>, Vec<u8>, bool)| {
    let (bytes, cuts, greets) = input;
    let hello: &[u8] = b"HGI2\0\0\0\x06\0\0\x01n\0\0";
    let bytes = [if greets { hello } else { &[] }, &bytes].concat();
    let mut pieces = Vec::new();
    let mut rest = &bytes[..];
    for cut in cuts {
        let (piece, after) = rest.split_at(rest.len().min(cut.into()));
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    assert_eq!(run(&[&bytes]), run(&pieces));
});
