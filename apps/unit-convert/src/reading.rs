//! A reading, parsed in place: where in its JSON text the value and the unit stand, so that they
//! can be replaced and all the rest be copied.

use crate::ConvertError;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::ops::Range;

/// A JSON object with a number `value` and, perhaps, a string `unit`.
pub struct Reading<'a> {
    text: &'a str,
    pub value: f64,
    value_at: Range<usize>,
    pub unit: Option<Cow<'a, str>>,
    /// Of the unit, or of the `null` that stands there.
    unit_at: Option<Range<usize>>,
}

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    value: &'a RawValue,
    #[serde(borrow, default, deserialize_with = "some")]
    unit: Option<&'a RawValue>,
}

/// Keeps a `null` apart from a field that is not there: the `null` has a place to put the unit.
fn some<'de, D: Deserializer<'de>>(json: D) -> Result<Option<&'de RawValue>, D::Error> {
    Deserialize::deserialize(json).map(Some)
}

/// A string without a copy, where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// The longest text of a finite f64.
const MAX_NUMBER_LEN: usize = 24;

impl<'a> Reading<'a> {
    pub fn parse(payload: &'a [u8]) -> Result<Self, ConvertError> {
        let text = std::str::from_utf8(payload).map_err(ConvertError::NotText)?;
        if !text.trim_ascii_start().starts_with('{') {
            // A derived `Deserialize` would take an array, too.
            return Err(ConvertError::NotAReading(serde_json::Error::custom(
                "expected a JSON object",
            )));
        }
        let Fields { value, unit } =
            serde_json::from_str(text).map_err(ConvertError::NotAReading)?;
        let said_unit: Option<Text> = match unit {
            Some(raw) => serde_json::from_str(raw.get()).map_err(ConvertError::NotAReading)?,
            None => None,
        };
        Ok(Reading {
            text,
            value: serde_json::from_str(value.get()).map_err(ConvertError::NotAReading)?,
            value_at: position(value, text),
            unit: said_unit.map(|text| text.0),
            unit_at: unit.map(|raw| position(raw, text)),
        })
    }

    /// The reading's text with another value and, if given, another unit (a JSON string).
    pub fn with(&self, value: f64, unit_json: Option<&str>) -> Vec<u8> {
        let added = unit_json.map_or(0, |unit| unit.len() + r#","unit":"#.len());
        let mut output = Vec::with_capacity(self.text.len() + MAX_NUMBER_LEN + added);
        let mut copied = 0;
        let mut copy_until = |output: &mut Vec<u8>, at: &Range<usize>| {
            output.extend_from_slice(&self.text.as_bytes()[copied..at.start]);
            copied = at.end;
        };
        let put_value = |output: &mut Vec<u8>| {
            serde_json::to_writer(output, &value).expect("a Vec takes all that is written to it");
        };
        match (unit_json, &self.unit_at) {
            (Some(unit), Some(unit_at)) if unit_at.start < self.value_at.start => {
                copy_until(&mut output, unit_at);
                output.extend_from_slice(unit.as_bytes());
                copy_until(&mut output, &self.value_at);
                put_value(&mut output);
            }
            (Some(unit), Some(unit_at)) => {
                copy_until(&mut output, &self.value_at);
                put_value(&mut output);
                copy_until(&mut output, unit_at);
                output.extend_from_slice(unit.as_bytes());
            }
            (Some(unit), None) => {
                copy_until(&mut output, &self.value_at);
                put_value(&mut output);
                output.extend_from_slice(br#","unit":"#);
                output.extend_from_slice(unit.as_bytes());
            }
            (None, _) => {
                copy_until(&mut output, &self.value_at);
                put_value(&mut output);
            }
        }
        output.extend_from_slice(&self.text.as_bytes()[copied..]);
        output
    }
}

/// Where `raw` stands in `text`, which it was borrowed from.
fn position(raw: &RawValue, text: &str) -> Range<usize> {
    let start = raw.get().as_ptr() as usize - text.as_ptr() as usize;
    start..start + raw.get().len()
}
