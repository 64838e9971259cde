//! The payload: a sensor's reading as JSON, with a sequence number and a time inside that an app
//! hands on, so that loss, duplicates and latency can be told from what comes out at the other end.
//!
//! Numbers have a leading 1 and a fixed width, so that they are patched in place, and fit into a
//! double, so that they survive apps that read JSON numbers as such.

use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Result, ensure};

/// Readings a publisher can make: nine digits.
pub const MAX_SEQUENCE: u64 = 999_999_999;

/// Publishers that can be told apart: four digits.
pub const MAX_PUBLISHERS: usize = 10_000;

/// What a reading looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// With a value that apps convert, and number and time beside it.
    #[default]
    Measurement,
    /// Of the unified namespace: the number is its value, the time its time stamp, since mappings hand on
    /// nothing else.
    TimeSeries,
}

impl Form {
    fn sequence_key(self) -> &'static [u8] {
        match self {
            Form::Measurement => b"\"seq\":",
            Form::TimeSeries => b"\"value\":",
        }
    }

    fn time_key(self) -> &'static [u8] {
        match self {
            Form::Measurement => b"\"t\":",
            Form::TimeSeries => b"\"timestamp_ms\":",
        }
    }
}

const SEQUENCE_BASE: u64 = 10_000_000_000_000;
const TIME_BASE: u64 = 1_000_000_000_000_000;

/// Width of the time in digits.
pub const TIME_DIGITS: usize = 16;

/// Nanoseconds since the first call in this process.
pub fn now_ns() -> u64 {
    nanoseconds_at(Instant::now())
}

/// The same for a time that has been taken, or planned, already.
pub fn nanoseconds_at(instant: Instant) -> u64 {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    let epoch = *EPOCH.get_or_init(Instant::now);
    instant.saturating_duration_since(epoch).as_nanos() as u64
}

/// A reading of `size` bytes, and where in it the sequence number's last nine digits and the time
/// begin.
pub fn template(form: Form, publisher: usize, size: usize) -> Result<(Vec<u8>, usize, usize)> {
    ensure!(
        publisher < MAX_PUBLISHERS,
        "there can be {MAX_PUBLISHERS} publishers at most"
    );
    let sequence = SEQUENCE_BASE + publisher as u64 * (MAX_SEQUENCE + 1);
    let mut text = match form {
        Form::Measurement => format!(
            r#"{{"value":212.0,"timestamp_ms":1763725320000,"seq":{sequence},"t":{TIME_BASE},"pad":""#
        ),
        Form::TimeSeries => {
            format!(r#"{{"value":{sequence},"timestamp_ms":{TIME_BASE},"pad":""#)
        }
    };
    let least = text.len() + 2;
    ensure!(size >= least, "a payload has {least} bytes at least");
    let behind = |key: &[u8]| find(text.as_bytes(), key).map(|at| at + key.len());
    let sequence_at = behind(form.sequence_key()).map(|at| at + 5);
    let time_at = behind(form.time_key());
    text.extend(std::iter::repeat_n('x', size - least));
    text.push_str("\"}");
    Ok((
        text.into_bytes(),
        sequence_at.expect("the template has a sequence number"),
        time_at.expect("the template has a time"),
    ))
}

/// Writes `sequence` over its nine digits.
#[inline]
pub fn write_sequence(digits: &mut [u8], mut sequence: u64) {
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (sequence % 10) as u8;
        sequence /= 10;
    }
}

/// The digits of a time, to be copied into readings.
pub fn time_digits(nanoseconds: u64) -> [u8; TIME_DIGITS] {
    let mut digits = [0; TIME_DIGITS];
    write_sequence(&mut digits, TIME_BASE + nanoseconds);
    digits
}

/// Finds the numbers in payloads. Remembers where they were last: payloads of one app are alike.
#[derive(Default)]
pub struct Finder {
    form: Form,
    sequence_at: usize,
    time_at: usize,
}

impl Finder {
    pub fn of(form: Form) -> Finder {
        Finder {
            form,
            ..Finder::default()
        }
    }

    /// Publisher and sequence number.
    #[inline]
    pub fn sequence(&mut self, payload: &[u8]) -> Option<(usize, u64)> {
        let number = number(payload, self.form.sequence_key(), &mut self.sequence_at)?;
        let number = number.checked_sub(SEQUENCE_BASE)?;
        let publisher = (number / (MAX_SEQUENCE + 1)) as usize;
        (publisher < MAX_PUBLISHERS).then_some((publisher, number % (MAX_SEQUENCE + 1)))
    }

    /// When the reading was sent, or should have been, on the clock of [`now_ns`].
    #[inline]
    pub fn time(&mut self, payload: &[u8]) -> Option<u64> {
        number(payload, self.form.time_key(), &mut self.time_at)?.checked_sub(TIME_BASE)
    }
}

#[inline]
fn number(payload: &[u8], key: &[u8], hint: &mut usize) -> Option<u64> {
    if payload.get(*hint..*hint + key.len()) != Some(key) {
        *hint = find(payload, key)?;
    }
    let digits = &payload[*hint + key.len()..];
    let mut value: u64 = 0;
    let mut count = 0;
    for digit in digits.iter().skip_while(|byte| **byte == b' ') {
        match digit.wrapping_sub(b'0') {
            digit @ 0..=9 => value = value.wrapping_mul(10).wrapping_add(u64::from(digit)),
            _ => break,
        }
        count += 1;
    }
    (1..=TIME_DIGITS).contains(&count).then_some(value)
}

fn find(text: &[u8], key: &[u8]) -> Option<usize> {
    text.windows(key.len()).position(|window| window == key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(publisher: usize, sequence: u64, time: u64) -> Vec<u8> {
        let (mut payload, sequence_at, time_at) =
            template(Form::Measurement, publisher, 100).unwrap();
        write_sequence(&mut payload[sequence_at..sequence_at + 9], sequence);
        payload[time_at..time_at + TIME_DIGITS].copy_from_slice(&time_digits(time));
        payload
    }

    #[test]
    fn a_reading_is_valid_json_of_exactly_the_wanted_size() {
        for size in [95, 100, 1000] {
            assert_eq!(template(Form::Measurement, 0, size).unwrap().0.len(), size);
        }
        assert!(template(Form::Measurement, 0, 94).is_err());
        let json: serde_json::Value = serde_json::from_slice(&reading(3, 42, 7)).unwrap();
        assert_eq!(json["value"], 212.0);
        assert_eq!(json["seq"], 10_003_000_000_042_u64);
    }

    #[test]
    fn numbers_are_found_wherever_an_app_has_moved_them() {
        let mut finder = Finder::default();
        for sequence in [0, 1, 99, MAX_SEQUENCE] {
            let payload = reading(MAX_PUBLISHERS - 1, sequence, 123_456_789);
            assert_eq!(
                finder.sequence(&payload),
                Some((MAX_PUBLISHERS - 1, sequence))
            );
            assert_eq!(finder.time(&payload), Some(123_456_789));
            // Keys in another order, with spaces, and every number through a double.
            let json: serde_json::Value = serde_json::from_slice(&payload).unwrap();
            let moved = format!(
                r#"{{"t": {}, "unit": "celsius", "seq": {}}}"#,
                json["t"].as_f64().unwrap(),
                json["seq"].as_f64().unwrap()
            );
            assert_eq!(
                finder.sequence(moved.as_bytes()),
                Some((MAX_PUBLISHERS - 1, sequence))
            );
            assert_eq!(finder.time(moved.as_bytes()), Some(123_456_789));
        }
    }

    #[test]
    fn what_is_no_reading_has_no_numbers() {
        let mut finder = Finder::default();
        for payload in [
            &b""[..],
            b"{}",
            b"{\"seq\":",
            b"{\"seq\":x}",
            b"{\"seq\":12}",
        ] {
            assert_eq!(finder.sequence(payload), None);
            assert_eq!(finder.time(payload), None);
        }
    }
}
