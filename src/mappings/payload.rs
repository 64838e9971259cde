//! The messages' JSON, as Go's encoding/json reads and writes it: `{"value": …, "timestamp_ms": …}`.
//!
//! Written by hand because none of what Go does is what serde_json does: keys in any case, invalid
//! UTF-8 replaced, its own escapes; and because it is the hot path.

use std::borrow::Cow;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::value::{Items, Members, NumberText, Value};

/// As in Go.
const MAX_DEPTH: usize = 10_000;

/// A message that came in.
#[derive(Debug, PartialEq)]
pub struct Reading {
    pub value: Value,
    pub timestamp_ms: i64,
}

/// Why a message is not one of a time series.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    #[error("not JSON: {what} at byte {at}")]
    NotJson { what: &'static str, at: usize },
    #[error("the payload must be a JSON object with the keys value and timestamp_ms")]
    NotAnObject,
    #[error("a number in value is too large for a double")]
    NumberTooLarge,
    #[error(
        "timestamp_ms must be a whole number of milliseconds, written without point and exponent"
    )]
    BadTimestamp,
    #[error("missing or invalid timestamp_ms")]
    MissingTimestamp,
    #[error("missing value field")]
    MissingValue,
}

/// Reads one message.
pub fn read(payload: &[u8]) -> Result<Reading, Refusal> {
    let mut reader = Reader {
        bytes: payload,
        at: 0,
        refusal: None,
    };
    reader.skip_whitespace();
    let (value, timestamp_ms) = match reader.peek() {
        Some(b'{') => reader.message()?,
        // What is not JSON is called so before what is JSON and no object.
        Some(_) => {
            reader.value(0)?;
            reader.refusal = Some(Refusal::NotAnObject);
            (Value::Null, 0)
        }
        None => return Err(reader.error("it is empty")),
    };
    reader.skip_whitespace();
    if reader.at != payload.len() {
        return Err(reader.error("something follows the object"));
    }
    if let Some(refusal) = reader.refusal {
        return Err(refusal);
    }
    if timestamp_ms == 0 {
        return Err(Refusal::MissingTimestamp);
    }
    if value == Value::Null {
        return Err(Refusal::MissingValue);
    }
    Ok(Reading {
        value,
        timestamp_ms,
    })
}

enum Field {
    Value,
    Timestamp,
}

/// Go takes a key in any case, by Unicode's simple folding: `ſ` is an `s`.
fn field(key: &str) -> Option<Field> {
    let is = |name: &str| {
        key == name
            || key
                .chars()
                .map(|c| match c {
                    'ſ' => 's',
                    c => c.to_ascii_lowercase(),
                })
                .eq(name.chars())
    };
    if is("value") {
        Some(Field::Value)
    } else if is("timestamp_ms") {
        Some(Field::Timestamp)
    } else {
        None
    }
}

/// Reads any JSON value, for what was stored.
pub(super) fn read_value(bytes: &[u8]) -> Option<Value> {
    let mut reader = Reader {
        bytes,
        at: 0,
        refusal: None,
    };
    let value = reader.value(0).ok()?;
    (reader.at == bytes.len() && reader.refusal.is_none()).then_some(value)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// What is wrong although it is JSON: told only if all of it is JSON, as in Go.
    refusal: Option<Refusal>,
}

impl<'a> Reader<'a> {
    fn error(&self, what: &'static str) -> Refusal {
        Refusal::NotJson { what, at: self.at }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn skip_whitespace(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn literal(&mut self, literal: &'static str) -> Result<(), Refusal> {
        if !self.bytes[self.at..].starts_with(literal.as_bytes()) {
            return Err(self.error("this is no JSON value"));
        }
        self.at += literal.len();
        Ok(())
    }

    /// The message: an object whose `{` is next.
    fn message(&mut self) -> Result<(Value, i64), Refusal> {
        let mut value = Value::Null;
        let mut timestamp_ms = 0;
        self.at += 1;
        self.skip_whitespace();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok((value, timestamp_ms));
        }
        loop {
            let key = self.key()?;
            match field(&key) {
                Some(Field::Value) => value = self.value(1)?,
                Some(Field::Timestamp) => {
                    if let Some(read) = self.timestamp()? {
                        timestamp_ms = read;
                    }
                }
                None => self.skip_value()?,
            }
            if self.ends(b'}', "a comma or } is missing")? {
                return Ok((value, timestamp_ms));
            }
        }
    }

    /// A key and its colon.
    fn key(&mut self) -> Result<Cow<'a, str>, Refusal> {
        self.skip_whitespace();
        if self.peek() != Some(b'"') {
            return Err(self.error("a key in quotes is missing"));
        }
        let key = self.string()?;
        self.skip_whitespace();
        if self.peek() != Some(b':') {
            return Err(self.error("a colon is missing"));
        }
        self.at += 1;
        Ok(key)
    }

    /// Whether `end` is next, after an item or a member; else it must be a comma.
    fn ends(&mut self, end: u8, missing: &'static str) -> Result<bool, Refusal> {
        self.skip_whitespace();
        let next = self.peek();
        if next != Some(b',') && next != Some(end) {
            return Err(self.error(missing));
        }
        self.at += 1;
        Ok(next == Some(end))
    }

    /// What is under a key of which nothing is known: it must be JSON, no more. Go does not even mind
    /// numbers that no double holds.
    fn skip_value(&mut self) -> Result<(), Refusal> {
        let refusal = self.refusal;
        self.value(1)?;
        self.refusal = refusal;
        Ok(())
    }

    /// A value within `depth` others. Not by recursion: that would need 10,000 frames of stack.
    fn value(&mut self, depth: usize) -> Result<Value, Refusal> {
        let mut open: Vec<Open<'a>> = Vec::new();
        loop {
            self.skip_whitespace();
            let mut value = match self.peek() {
                Some(bracket @ (b'{' | b'[')) => {
                    if depth + open.len() >= MAX_DEPTH {
                        return Err(self.error("nested more than 10000 deep"));
                    }
                    self.at += 1;
                    self.skip_whitespace();
                    if bracket == b'{' {
                        if self.peek() == Some(b'}') {
                            self.at += 1;
                            Value::Object(Arc::default())
                        } else {
                            open.push(Open::Object(Gathered::default(), self.key()?));
                            continue;
                        }
                    } else if self.peek() == Some(b']') {
                        self.at += 1;
                        Value::Array(Arc::default())
                    } else {
                        open.push(Open::Array(Vec::new()));
                        continue;
                    }
                }
                _ => self.scalar()?,
            };
            loop {
                match open.pop() {
                    None => return Ok(value),
                    Some(Open::Array(mut items)) => {
                        items.push(value);
                        if !self.ends(b']', "a comma or ] is missing")? {
                            open.push(Open::Array(items));
                            break;
                        }
                        value = Value::Array(Arc::new(Items(items)));
                    }
                    Some(Open::Object(mut members, key)) => {
                        members.insert(key, value);
                        if !self.ends(b'}', "a comma or } is missing")? {
                            open.push(Open::Object(members, self.key()?));
                            break;
                        }
                        value = Value::Object(Arc::new(Members(members.members)));
                    }
                }
            }
        }
    }

    fn scalar(&mut self) -> Result<Value, Refusal> {
        match self.peek() {
            Some(b'"') => Ok(Value::String(Arc::from(self.string()?))),
            Some(b't') => self.literal("true").map(|()| Value::Bool(true)),
            Some(b'f') => self.literal("false").map(|()| Value::Bool(false)),
            Some(b'n') => self.literal("null").map(|()| Value::Null),
            Some(b'-' | b'0'..=b'9') => {
                let text = self.number()?;
                let number: f64 = text.parse().expect("JSON's numbers are Rust's, too");
                if number.is_infinite() {
                    self.refusal = Some(Refusal::NumberTooLarge);
                }
                Ok(Value::Number(number))
            }
            Some(_) => Err(self.error("this is no JSON value")),
            None => Err(self.error("it ends too early")),
        }
    }

    /// The time stamp, or none for `null`, which leaves it as it was.
    fn timestamp(&mut self) -> Result<Option<i64>, Refusal> {
        self.skip_whitespace();
        if !matches!(self.peek(), Some(b'-' | b'0'..=b'9')) {
            if self.value(1)? != Value::Null {
                self.refusal = Some(Refusal::BadTimestamp);
            }
            return Ok(None);
        }
        let parsed = self.number()?.parse().ok();
        if parsed.is_none() {
            self.refusal = Some(Refusal::BadTimestamp);
        }
        Ok(parsed)
    }

    fn number(&mut self) -> Result<&'a str, Refusal> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(str::from_utf8(&self.bytes[start..self.at]).expect("only ASCII was taken"))
    }

    fn digits(&mut self) -> Result<(), Refusal> {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if self.at == start {
            return Err(self.error("a digit is missing"));
        }
        Ok(())
    }

    /// A string whose opening quote is next.
    fn string(&mut self) -> Result<Cow<'a, str>, Refusal> {
        self.at += 1;
        let start = self.at;
        loop {
            match self.peek() {
                Some(b'"') => {
                    let raw = &self.bytes[start..self.at];
                    self.at += 1;
                    // Like Go, each byte that is no UTF-8 becomes a replacement character.
                    return Ok(match str::from_utf8(raw) {
                        Ok(text) => Cow::Borrowed(text),
                        Err(_) => Cow::Owned(replace_invalid(raw)),
                    });
                }
                Some(b'\\') => break,
                Some(0..=0x1f) => return Err(self.error("a control character in a string")),
                Some(_) => self.at += 1,
                None => return Err(self.error("a string does not end")),
            }
        }
        let mut raw = self.bytes[start..self.at].to_vec();
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(Cow::Owned(
                        String::from_utf8(raw)
                            .unwrap_or_else(|error| replace_invalid(error.as_bytes())),
                    ));
                }
                Some(b'\\') => {
                    self.at += 1;
                    let c = self.escape()?;
                    raw.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
                Some(0..=0x1f) => return Err(self.error("a control character in a string")),
                Some(byte) => {
                    raw.push(byte);
                    self.at += 1;
                }
                None => return Err(self.error("a string does not end")),
            }
        }
    }

    fn escape(&mut self) -> Result<char, Refusal> {
        let byte = self.peek().ok_or(self.error("a string does not end"))?;
        self.at += 1;
        Ok(match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let first = self.four_hex()?;
                if !(0xd800..0xdc00).contains(&first) {
                    return Ok(char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER));
                }
                // A pair of surrogates is one character; half a pair is replaced.
                let behind = self.at;
                if self.bytes[self.at..].starts_with(b"\\u") {
                    self.at += 2;
                    let second = self.four_hex()?;
                    if (0xdc00..0xe000).contains(&second) {
                        let code = 0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00);
                        return Ok(
                            char::from_u32(code).expect("a pair of surrogates is a character")
                        );
                    }
                    self.at = behind;
                }
                char::REPLACEMENT_CHARACTER
            }
            _ => return Err(self.error("an unknown escape in a string")),
        })
    }

    fn four_hex(&mut self) -> Result<u32, Refusal> {
        let digits = self
            .bytes
            .get(self.at..self.at + 4)
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .ok_or(self.error("\\u takes four hexadecimal digits"))?;
        self.at += 4;
        let digits = str::from_utf8(digits).expect("hexadecimal digits are ASCII");
        Ok(u32::from_str_radix(digits, 16).expect("four hexadecimal digits"))
    }
}

/// A list or object that is being read.
enum Open<'a> {
    Array(Vec<Value>),
    /// And the key of the value that is next.
    Object(Gathered<'a>, Cow<'a, str>),
}

/// The members of an object that is being read.
#[derive(Default)]
struct Gathered<'a> {
    members: Vec<(Box<str>, Value)>,
    /// By key, once there are many: else an object of many keys would take quadratic time.
    places: Option<FxHashMap<Cow<'a, str>, usize>>,
}

impl<'a> Gathered<'a> {
    const MANY: usize = 16;

    fn insert(&mut self, key: Cow<'a, str>, value: Value) {
        if self.members.len() == Self::MANY && self.places.is_none() {
            let known = self.members.iter().enumerate();
            self.places = Some(
                known
                    .map(|(place, (key, _))| (Cow::Owned(key.to_string()), place))
                    .collect(),
            );
        }
        let place = match &self.places {
            Some(places) => places.get(&key).copied(),
            None => self.members.iter().position(|(known, _)| **known == *key),
        };
        if let Some(place) = place {
            self.members[place].1 = value;
            return;
        }
        self.members.push((key.as_ref().into(), value));
        if let Some(places) = &mut self.places {
            places.insert(key, self.members.len() - 1);
        }
    }
}

/// One replacement character for each byte that is not part of valid UTF-8.
pub(super) fn replace_invalid(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    text
}

/// Writes what Go's `json.Marshal` does of a value that came in. Not by recursion, as it is not read so.
pub(super) fn write_value(value: &Value, out: &mut Vec<u8>) {
    enum Next<'v> {
        Value(&'v Value),
        Member(&'v str, &'v Value),
        Text(&'static [u8]),
    }
    let mut next = vec![Next::Value(value)];
    while let Some(step) = next.pop() {
        let value = match step {
            Next::Text(text) => {
                out.extend_from_slice(text);
                continue;
            }
            Next::Member(key, value) => {
                write_string(key, out);
                out.push(b':');
                value
            }
            Next::Value(value) => value,
        };
        match value {
            Value::Null => out.extend_from_slice(b"null"),
            Value::Bool(true) => out.extend_from_slice(b"true"),
            Value::Bool(false) => out.extend_from_slice(b"false"),
            Value::Number(number) => write_number(*number, out),
            Value::String(text) => write_string(text, out),
            Value::Array(items) => {
                out.push(b'[');
                next.push(Next::Text(b"]"));
                for (at, item) in items.0.iter().enumerate().rev() {
                    next.push(Next::Value(item));
                    if at > 0 {
                        next.push(Next::Text(b","));
                    }
                }
            }
            Value::Object(members) => {
                let mut sorted: Vec<_> = members.0.iter().collect();
                sorted.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
                out.push(b'{');
                next.push(Next::Text(b"}"));
                for (at, (key, value)) in sorted.into_iter().enumerate().rev() {
                    next.push(Next::Member(key, value));
                    if at > 0 {
                        next.push(Next::Text(b","));
                    }
                }
            }
        }
    }
}

/// A finite number. Go and JavaScript agree on its text, but for the sign of -0, which Go keeps.
pub(super) fn write_number(number: f64, out: &mut Vec<u8>) {
    debug_assert!(number.is_finite());
    if number == 0.0 && number.is_sign_negative() {
        out.push(b'-');
    }
    out.extend_from_slice(NumberText::new(number).as_str().as_bytes());
}

pub(super) fn write_string(text: &str, out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut written = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        let escape: &[u8] = match byte {
            b'"' => b"\\\"",
            b'\\' => b"\\\\",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            8 => b"\\b",
            12 => b"\\f",
            b'<' => b"\\u003c",
            b'>' => b"\\u003e",
            b'&' => b"\\u0026",
            0..0x20 => &[
                b'\\',
                b'u',
                b'0',
                b'0',
                HEX[usize::from(byte >> 4)],
                HEX[usize::from(byte & 15)],
            ],
            // The line separators U+2028 and U+2029.
            0xe2 if bytes[at..].starts_with("\u{2028}".as_bytes()) => b"\\u2028",
            0xe2 if bytes[at..].starts_with("\u{2029}".as_bytes()) => b"\\u2029",
            _ => continue,
        };
        out.extend_from_slice(&bytes[written..at]);
        out.extend_from_slice(escape);
        written = at + if byte == 0xe2 { 3 } else { 1 };
    }
    out.extend_from_slice(&bytes[written..]);
    out.push(b'"');
}
