//! The protocol of one connection without I/O: bytes go in; logins, events and answers come out.

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use rustc_hash::FxHashMap;

use super::frame::{
    Answer, Code, Hello, MAGIC, Priority, Refusal, Version, begun_size, first_frame, whole_frames,
};
use crate::broker::Permissions;
use crate::event::Topic;

/// Topics that one connection remembers.
const KNOWN_TOPICS: usize = 4096;

/// The protocol state of one client.
pub struct Session {
    max_frame_bytes: usize,
    state: State,
    /// Frames that have come in whole.
    frames: Bytes,
    topics: FxHashMap<Bytes, Known>,
    /// Of the permissions that `topics` goes by.
    generation: u64,
    /// The last id that was handed out, and the last one that was acknowledged.
    last_id: u64,
    acknowledged: u64,
}

enum State {
    /// Nothing says yet which version the client speaks.
    Begun,
    /// Its handshake is on its way.
    Greeting,
    /// It waits for [`Session::admit`].
    Waiting(Version),
    Admitted(Version, Arc<Permissions>),
}

#[derive(Clone)]
struct Known {
    topic: Topic,
    allowed: bool,
}

/// What a client wants.
#[derive(Debug)]
pub enum Step {
    /// To be let in: with a handshake, in version 2. [`Session::admit`] is to follow.
    Login(Option<Hello>),
    Event(Event),
    /// To publish what it must not.
    Denied(Event),
}

#[derive(Debug)]
pub struct Event {
    pub topic: Topic,
    /// Shares the memory of what was read.
    pub payload: Bytes,
    pub priority: Priority,
    /// In version 2.
    pub id: Option<u64>,
}

impl Session {
    pub fn new(max_frame_bytes: usize) -> Session {
        Session {
            max_frame_bytes,
            state: State::Begun,
            frames: Bytes::new(),
            topics: FxHashMap::default(),
            generation: 0,
            last_id: 0,
            acknowledged: 0,
        }
    }

    /// Once it is known.
    pub fn version(&self) -> Option<Version> {
        match &self.state {
            State::Begun => None,
            State::Greeting => Some(Version::Two),
            State::Waiting(version) | State::Admitted(version, _) => Some(*version),
        }
    }

    /// The next step of what has come in; none if more has to come. After an error nothing follows.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Step>, Refusal> {
        loop {
            match &self.state {
                State::Begun => match input.first_chunk() {
                    Some(&MAGIC) => self.state = State::Greeting,
                    Some(_) => {
                        self.state = State::Waiting(Version::One);
                        return Ok(Some(Step::Login(None)));
                    }
                    None => return Ok(None),
                },
                State::Greeting => {
                    let hello = Hello::take(input)?;
                    if hello.is_some() {
                        self.state = State::Waiting(Version::Two);
                    }
                    return Ok(hello.map(|hello| Step::Login(Some(hello))));
                }
                State::Waiting(_) => return Ok(None),
                State::Admitted(version, permissions) => {
                    if self.frames.is_empty() {
                        let whole = whole_frames(input, *version, self.max_frame_bytes)?;
                        if whole == 0 {
                            return Ok(None);
                        }
                        self.frames = input.split_to(whole).freeze();
                        // Once a read is often enough.
                        let generation = permissions.generation();
                        if generation != self.generation {
                            self.topics.clear();
                            self.generation = generation;
                        }
                    }
                    return self.next_event().map(Some);
                }
            }
        }
    }

    fn next_event(&mut self) -> Result<Step, Refusal> {
        let State::Admitted(version, permissions) = &self.state else {
            unreachable!("there are no frames before");
        };
        let (frame, size) = first_frame(&self.frames, *version)?;
        if let Some(id) = frame.id.filter(|id| *id <= self.last_id) {
            let last = self.last_id;
            let text = format!("id {id} comes after {last}; ids start at 1 and ascend");
            return Err(Refusal::new(Code::BadId, text));
        }
        let known = match self.topics.get(frame.topic) {
            Some(known) => known.clone(),
            None => {
                let known = Known::new(frame.topic, permissions)?;
                if self.topics.len() >= KNOWN_TOPICS {
                    self.topics.clear();
                }
                if known.topic.is_worth_caching() {
                    let name = known.topic.as_bytes().clone();
                    self.topics.insert(name, known.clone());
                }
                known
            }
        };
        let event = Event {
            topic: known.topic,
            payload: frame.payload,
            priority: frame.priority,
            id: frame.id,
        };
        self.last_id = event.id.unwrap_or(0);
        self.frames.advance(size);
        Ok(match known.allowed {
            true => Step::Event(event),
            false => Step::Denied(event),
        })
    }

    /// How many bytes the frame has that begins with what [`Session::next`] has left; none if nothing has
    /// begun that could be large.
    pub fn begun_size(&self, input: &[u8]) -> Option<usize> {
        match self.state {
            State::Admitted(..) => begun_size(input),
            _ => None,
        }
    }

    /// Lets the client in that waits for it.
    pub fn admit(&mut self, permissions: Arc<Permissions>, output: &mut Vec<u8>) {
        let State::Waiting(version) = self.state else {
            unreachable!("nobody asked to be let in");
        };
        if version == Version::Two {
            let max_frame_bytes = self.max_frame_bytes as u32;
            Answer::Welcome { max_frame_bytes }.write(output);
        }
        self.state = State::Admitted(version, permissions);
    }

    /// All events that were handed out are taken, and on disk if they are to be.
    pub fn taken(&mut self, output: &mut Vec<u8>) {
        if self.last_id > self.acknowledged {
            self.acknowledged = self.last_id;
            Answer::Ack { id: self.last_id }.write(output);
        }
    }

    /// Tells the client why it has to go, if its version has words for that.
    pub fn refuse(&self, refusal: &Refusal, output: &mut Vec<u8>) {
        if self.version() == Some(Version::Two) {
            let refused = Answer::Refused {
                code: refusal.code as u8,
                text: refusal.text.clone(),
            };
            refused.write(output);
        }
    }
}

impl Known {
    fn new(name: &[u8], permissions: &Permissions) -> Result<Known, Refusal> {
        // Copied, so that it does not keep what was read from being freed.
        let topic = Topic::new(Bytes::copy_from_slice(name)).map_err(|error| {
            let name = String::from_utf8_lossy(&name[..name.len().min(256)]);
            Refusal::new(Code::BadTopic, format!("topic {name:?}: {error}"))
        })?;
        // Those that start with $ are the gateway's own.
        let allowed = !topic.as_str().starts_with('$') && permissions.may_publish(topic.as_str());
        Ok(Known { topic, allowed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingest::frame::write_frame;
    use proptest::prelude::*;

    const MAX: usize = 1000;

    fn hello() -> Vec<u8> {
        let hello = Hello {
            name: "n".into(),
            token: String::new(),
        };
        let mut bytes = Vec::new();
        hello.write(&mut bytes).unwrap();
        bytes
    }

    fn frame(id: Option<u64>, topic: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_frame(Priority::Medium, id, topic.as_bytes(), b"x", &mut bytes);
        bytes
    }

    /// A client with all rights.
    struct Peer {
        session: Session,
        input: BytesMut,
        output: Vec<u8>,
    }

    /// What came of some bytes: ids or topics, and how it ended.
    #[derive(Debug, Default, PartialEq)]
    struct Seen {
        events: Vec<(Option<u64>, String)>,
        denied: usize,
        refused: Option<Code>,
    }

    impl Peer {
        fn new() -> Peer {
            Peer {
                session: Session::new(MAX),
                input: BytesMut::new(),
                output: Vec::new(),
            }
        }

        fn receive(&mut self, bytes: &[u8], seen: &mut Seen) {
            self.input.extend_from_slice(bytes);
            while seen.refused.is_none() {
                match self.session.next(&mut self.input) {
                    Ok(None) => break,
                    Ok(Some(Step::Login(_))) => {
                        let everything = Permissions::everything();
                        self.session.admit(everything, &mut self.output);
                    }
                    Ok(Some(Step::Event(event))) => {
                        seen.events.push((event.id, event.topic.to_string()));
                    }
                    Ok(Some(Step::Denied(_))) => seen.denied += 1,
                    Err(refusal) => {
                        self.session.taken(&mut self.output);
                        self.session.refuse(&refusal, &mut self.output);
                        seen.refused = Some(refusal.code);
                    }
                }
            }
        }
    }

    fn seen(bytes: &[u8]) -> (Seen, Vec<u8>) {
        let (mut peer, mut seen) = (Peer::new(), Seen::default());
        peer.receive(bytes, &mut seen);
        peer.session.taken(&mut peer.output);
        (seen, peer.output)
    }

    #[test]
    fn version_1_gets_no_answers() {
        let (seen, output) = seen(&[frame(None, "a"), frame(None, "b"), vec![0; 4]].concat());
        assert_eq!(seen.events, [(None, "a".into()), (None, "b".into())]);
        assert_eq!((seen.refused, output), (Some(Code::Malformed), vec![]));
    }

    #[test]
    fn version_2_is_welcomed_and_gets_one_acknowledgement_for_all() {
        let bytes = [hello(), frame(Some(3), "a"), frame(Some(9), "$a")].concat();
        let (seen, output) = seen(&bytes);
        assert_eq!((seen.events.len(), seen.denied), (1, 1));
        assert_eq!(output, b"\0\0\0\x03\xe8\x01\0\0\0\0\0\0\0\x09");
    }

    #[test]
    fn each_wrong_thing_has_its_code_and_what_came_before_counts() {
        let bad_topic_len = b"\0\0\0\x0c\x02\xff\xff\0\0\0\0\0\0\0\x02t".to_vec();
        let no_topic = b"\0\0\0\x0b\x02\0\0\0\0\0\0\0\0\0\x02".to_vec();
        let priority = b"\0\0\0\x0c\x05\0\x01\0\0\0\0\0\0\0\x02t".to_vec();
        for (bytes, code) in [
            (vec![0; 4], Code::Malformed),
            (b"\0\0\x03\xe9".to_vec(), Code::TooLarge),
            (bad_topic_len, Code::Malformed),
            (no_topic, Code::BadTopic),
            (priority, Code::Malformed),
            (frame(Some(1), "b"), Code::BadId),
            (frame(Some(2), "b/#"), Code::BadTopic),
            (frame(Some(2), "b\0"), Code::BadTopic),
        ] {
            let all = [hello(), frame(Some(1), "a"), bytes.clone()].concat();
            let (seen, output) = seen(&all);
            assert_eq!(seen.refused, Some(code), "{bytes:?}");
            assert_eq!(seen.events.len(), 1, "{bytes:?}");
            let (_welcome, answers) = output.split_at(5);
            let expected = [b"\x01\0\0\0\0\0\0\0\x01\x02", &[code as u8][..]].concat();
            assert!(answers.starts_with(&expected), "{bytes:?}");
        }
        let id_0 = [hello(), frame(Some(0), "a")].concat();
        assert_eq!(seen(&id_0).0.refused, Some(Code::BadId));
        let not_utf8 = b"\0\0\0\x04\x02\0\x01\xff";
        assert_eq!(seen(not_utf8).0.refused, Some(Code::BadTopic));
    }

    #[test]
    fn a_handshake_that_is_none_is_refused() {
        for bytes in [
            &b"HGI2\xff\xff\xff\xff"[..],
            b"HGI2\0\0\0\0",
            b"HGI2\0\0\0\x05\0\0\0\0\0",
            b"HGI2\0\0\0\x06\x01\0\x01n\0\0",
            b"HGI2\0\0\0\x06\0\0\x09n\0\0",
            b"HGI2\0\0\0\x07\0\0\x01n\0\0x",
            b"HGI2\0\0\0\x06\0\0\x01\xff\0\0",
        ] {
            assert_eq!(seen(bytes).0.refused, Some(Code::Malformed), "{bytes:?}");
        }
    }

    #[test]
    fn payloads_share_the_memory_of_what_was_read() {
        let mut input = BytesMut::from(&[frame(None, "a"), frame(None, "b")].concat()[..]);
        let memory = input.as_ptr_range();
        let mut session = Session::new(MAX);
        assert!(matches!(
            session.next(&mut input),
            Ok(Some(Step::Login(None)))
        ));
        session.admit(Permissions::everything(), &mut Vec::new());
        for _ in 0..2 {
            let Ok(Some(Step::Event(event))) = session.next(&mut input) else {
                panic!("no event");
            };
            assert!(memory.contains(&event.payload.as_ptr()));
        }
    }

    proptest! {
        /// However the bytes are cut, the same comes of them.
        #[test]
        fn cuts_make_no_difference(
            parts in prop::collection::vec(prop_oneof![
                4 => (1..50u64, "[a-c$#]").prop_map(|(id, topic)| frame(Some(id), &topic)),
                1 => prop::collection::vec(any::<u8>(), 1..20),
            ], 0..20),
            two: bool,
            cuts in prop::collection::vec(1..40usize, 0..40),
        ) {
            let bytes = [if two { hello() } else { Vec::new() }, parts.concat()].concat();
            let (whole, output) = seen(&bytes);
            let (mut peer, mut in_pieces) = (Peer::new(), Seen::default());
            let mut rest = &bytes[..];
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                peer.receive(piece, &mut in_pieces);
                rest = after;
            }
            peer.receive(rest, &mut in_pieces);
            peer.session.taken(&mut peer.output);
            prop_assert_eq!(in_pieces, whole);
            prop_assert_eq!(peer.output, output);
        }
    }
}
