//! Events as lines of JSON: what an app is handed, what it has published, what is expected of it.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::event::{Event, Topic, unix_time_ns};
use crate::regular_file::{self, ReadError, RegularFile};

/// Most bytes of a file of events. All of it is read before the first event is handed over, so that a
/// wrong line is told at once.
const MAX_BYTES: u64 = 256 << 20;

/// A line that was read, and where.
pub(super) struct Line {
    /// From 1.
    pub(super) number: usize,
    pub(super) topic: Topic,
    pub(super) payload: Payload,
    pub(super) timestamp_ns: Option<u64>,
}

#[derive(Debug, PartialEq)]
pub(super) enum Payload {
    Bytes(Vec<u8>),
    /// However it is spelled.
    Json(Value),
}

#[derive(Debug, thiserror::Error)]
pub(super) enum EventsError {
    #[error("{file}, line {line}: {why}")]
    Line {
        file: String,
        line: usize,
        why: String,
    },
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: ReadError },
    #[error("standard input: {0}")]
    Stdin(io::Error),
    #[error("standard input: larger than {MAX_BYTES} bytes; split it")]
    StdinTooLarge,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLine {
    topic: String,
    payload: Option<String>,
    payload_base64: Option<String>,
    /// `null` is a payload too.
    #[serde(default, deserialize_with = "present")]
    payload_json: Option<Value>,
    timestamp_ns: Option<u64>,
}

fn present<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(value).map(Some)
}

/// The lines of a file; blank ones are skipped.
pub(super) fn read_file(path: &Path) -> Result<Vec<Line>, EventsError> {
    let contents = RegularFile::open(path, 0).and_then(|file| file.read(MAX_BYTES));
    let contents = contents.map_err(|source| EventsError::File {
        path: path.to_owned(),
        source,
    })?;
    parse(&path.display().to_string(), &contents)
}

pub(super) fn read_stdin() -> Result<Vec<Line>, EventsError> {
    let mut contents = Vec::new();
    io::stdin()
        .lock()
        .take(MAX_BYTES + 1)
        .read_to_end(&mut contents)
        .map_err(EventsError::Stdin)?;
    if contents.len() as u64 > MAX_BYTES {
        return Err(EventsError::StdinTooLarge);
    }
    parse("standard input", &contents)
}

fn parse(file: &str, contents: &[u8]) -> Result<Vec<Line>, EventsError> {
    let lines = regular_file::without_mark(contents).split(|byte| *byte == b'\n');
    let numbered = lines
        .zip(1..)
        .map(|(line, number)| (number, line.trim_ascii()));
    let parsed = numbered.filter(|(_, line)| !line.is_empty());
    parsed
        .map(|(number, line)| {
            parse_line(number, line).map_err(|why| EventsError::Line {
                file: file.to_owned(),
                line: number,
                why,
            })
        })
        .collect()
}

pub(super) fn parse_line(number: usize, line: &[u8]) -> Result<Line, String> {
    let raw: RawLine = serde_json::from_slice(line).map_err(|error| {
        // A line has one line: its number says nothing.
        let why = error.to_string();
        let why = why.split(" at line 1 column").next().unwrap_or(&why);
        format!("no event, at column {}: {why}", error.column())
    })?;
    let topic = Topic::new(raw.topic).map_err(|error| format!("`topic`: {error}"))?;
    let payload = match (raw.payload, raw.payload_base64, raw.payload_json) {
        (None, None, None) => Payload::Bytes(Vec::new()),
        (Some(text), None, None) => Payload::Bytes(text.into_bytes()),
        (None, Some(text), None) => STANDARD
            .decode(text)
            .map(Payload::Bytes)
            .map_err(|error| format!("`payload_base64`: {error}"))?,
        (None, None, Some(value)) => Payload::Json(value),
        _ => {
            return Err(
                "more than one payload: take one of `payload`, `payload_base64`, `payload_json`"
                    .to_owned(),
            );
        }
    };
    Ok(Line {
        number,
        topic,
        payload,
        timestamp_ns: raw.timestamp_ns,
    })
}

impl Line {
    /// The event that this line describes, as if it came in now.
    pub(super) fn event(&self) -> Event {
        let payload = match &self.payload {
            Payload::Bytes(bytes) => bytes.clone(),
            Payload::Json(value) => value.to_string().into_bytes(),
        };
        let event = Event::new(self.topic.clone(), payload.into(), Instant::now());
        Event {
            timestamp_ns: self.timestamp_ns.unwrap_or(event.timestamp_ns),
            ..event
        }
    }

    /// Whether this line, as an expectation, is met by what was published. A timestamp that it leaves
    /// out can be any.
    pub(super) fn is_met_by(&self, event: &Event) -> bool {
        let timestamp_fits = self
            .timestamp_ns
            .is_none_or(|timestamp| timestamp == event.timestamp_ns);
        let payload_fits = match &self.payload {
            Payload::Bytes(bytes) => bytes[..] == event.payload[..],
            Payload::Json(value) => {
                serde_json::from_slice::<Value>(&event.payload).is_ok_and(|json| json == *value)
            }
        };
        timestamp_fits && payload_fits && self.topic == event.topic
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.payload {
            Payload::Bytes(bytes) => Shown::new(&self.topic, bytes, self.timestamp_ns).fmt(f),
            Payload::Json(value) => Shown {
                topic: self.topic.as_str(),
                payload: None,
                payload_base64: None,
                payload_json: Some(value),
                timestamp_ns: self.timestamp_ns,
            }
            .fmt(f),
        }
    }
}

/// An event as a line.
#[derive(Serialize)]
struct Shown<'a> {
    topic: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_json: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp_ns: Option<u64>,
}

impl<'a> Shown<'a> {
    fn new(topic: &'a Topic, payload: &'a [u8], timestamp_ns: Option<u64>) -> Shown<'a> {
        let text = std::str::from_utf8(payload).ok();
        Shown {
            topic: topic.as_str(),
            payload: text,
            payload_base64: text.is_none().then(|| STANDARD.encode(payload)),
            payload_json: None,
            timestamp_ns,
        }
    }
}

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| std::fmt::Error)?)
    }
}

/// Writes events that were published during one run as lines.
pub(super) struct Writer {
    /// When the run began, and what a timestamp may be that the run has made itself: that would make
    /// each run another one, and is left out.
    began_ns: u64,
}

impl Writer {
    pub(super) fn new() -> Writer {
        Writer {
            began_ns: unix_time_ns(),
        }
    }

    pub(super) fn line(&self, event: &Event) -> String {
        let own = (self.began_ns..=unix_time_ns()).contains(&event.timestamp_ns);
        let timestamp = (!own).then_some(event.timestamp_ns);
        Shown::new(&event.topic, &event.payload, timestamp).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line {
        parse("events.jsonl", text.as_bytes()).unwrap().remove(0)
    }

    fn error(text: &str) -> String {
        match parse("events.jsonl", text.as_bytes()) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{text} was taken"),
        }
    }

    #[test]
    fn a_payload_is_text_base64_json_or_empty() {
        for (text, payload) in [
            (r#"{"topic":"a"}"#, &b""[..]),
            (r#"{"topic":"a","payload":"größer"}"#, "größer".as_bytes()),
            (r#"{"topic":"a","payload_base64":"AP8="}"#, &[0, 255]),
            (
                r#"{"topic":"a","payload_json":{"b":[1, null]}}"#,
                br#"{"b":[1,null]}"#,
            ),
            (r#"{"topic":"a","payload_json":null}"#, b"null"),
        ] {
            assert_eq!(&line(text).event().payload[..], payload, "{text}");
        }
    }

    #[test]
    fn a_timestamp_that_is_left_out_is_now() {
        let before = unix_time_ns();
        assert!(line(r#"{"topic":"a"}"#).event().timestamp_ns >= before);
        let given = line(r#"{"topic":"a","timestamp_ns":18446744073709551615}"#);
        assert_eq!(given.event().timestamp_ns, u64::MAX);
    }

    #[test]
    fn blank_lines_are_skipped_and_counted() {
        let lines = parse(
            "f",
            b"\xef\xbb\xbf\n{\"topic\":\"a\"}\r\n \n{\"topic\":\"b\"}",
        )
        .unwrap();
        let found: Vec<_> = lines.iter().map(|l| (l.number, l.topic.as_str())).collect();
        assert_eq!(found, [(2, "a"), (4, "b")]);
    }

    #[test]
    fn a_wrong_line_is_named_with_what_is_wrong() {
        for (text, expected) in [
            ("\n{", "events.jsonl, line 2: no event, at column 1: EOF"),
            ("[]", "line 1: no event"),
            (r#"{"payload":""}"#, "missing field `topic`"),
            (r#"{"topic":"a","qos":1}"#, "unknown field `qos`"),
            (
                r#"{"topic":"a/#"}"#,
                "`topic`: a topic name can't contain the wildcards",
            ),
            (r#"{"topic":""}"#, "`topic`: a topic name can't be empty"),
            (r#"{"topic":"a","timestamp_ns":-1}"#, "line 1: no event"),
            (r#"{"topic":"a","payload_base64":"ä"}"#, "`payload_base64`"),
            (
                r#"{"topic":"a","payload":"","payload_json":1}"#,
                "more than one payload",
            ),
            ("{\"topic\":\"\u{0}\"}", "line 1: no event"),
        ] {
            let error = error(text);
            assert!(error.contains(expected), "{error}");
        }
        assert!(parse("f", b"{\"topic\":\"\xff\"}").is_err());
    }

    #[test]
    fn what_is_written_can_be_expected() {
        let writer = Writer::new();
        for text in [
            r#"{"topic":"a","payload":"x\n"}"#,
            r#"{"topic":"a","payload_base64":"AP8=","timestamp_ns":7}"#,
            r#"{"topic":"a","payload":""}"#,
        ] {
            let event = line(text).event();
            assert_eq!(writer.line(&event), text);
            assert!(line(&writer.line(&event)).is_met_by(&event));
        }
    }

    #[test]
    fn an_expectation_compares_json_as_json_and_the_timestamp_if_it_has_one() {
        let event =
            line(r#"{"topic":"a","payload":"{\"x\": 1, \"y\":2}","timestamp_ns":7}"#).event();
        for (expected, met) in [
            (r#"{"topic":"a","payload_json":{"y":2,"x":1}}"#, true),
            (
                r#"{"topic":"a","payload_json":{"y":2,"x":1},"timestamp_ns":7}"#,
                true,
            ),
            (
                r#"{"topic":"a","payload_json":{"y":2,"x":1},"timestamp_ns":8}"#,
                false,
            ),
            (r#"{"topic":"a","payload_json":{"y":2}}"#, false),
            (r#"{"topic":"b","payload_json":{"y":2,"x":1}}"#, false),
            (r#"{"topic":"a","payload":"{\"x\":1,\"y\":2}"}"#, false),
        ] {
            assert_eq!(line(expected).is_met_by(&event), met, "{expected}");
        }
    }
}
