//! Payloads that are JSON, typed.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Event;

/// A payload that is not what was asked for, or a value that JSON has no form for; the text names the
/// topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonError(String);

impl Event {
    /// The payload as a `T`.
    ///
    /// ```
    /// use headgate_sdk::Event;
    ///
    /// #[derive(serde::Deserialize)]
    /// struct Reading {
    ///     value: f64,
    /// }
    ///
    /// let event = Event { topic: "a/b".into(), payload: br#"{"value": 21.5}"#.to_vec(), timestamp: 0 };
    /// assert_eq!(event.json::<Reading>().unwrap().value, 21.5);
    ///
    /// let event = Event { topic: "a/b".into(), payload: b"{}".to_vec(), timestamp: 0 };
    /// let error = event.json::<Reading>().err().unwrap();
    /// assert_eq!(error.to_string(), "a/b: missing field `value` at line 1 column 2");
    /// ```
    ///
    /// # Errors
    /// If the payload is no JSON or no `T`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, JsonError> {
        serde_json::from_slice(&self.payload)
            .map_err(|error| JsonError(format!("{}: {error}", self.topic)))
    }

    /// An event to publish, whose payload is `value` and whose time is the one when it goes out. For
    /// another time, set `timestamp`.
    ///
    /// # Errors
    /// If the value can't be written as JSON: a map whose keys are no strings.
    pub fn json_output<T: Serialize + ?Sized>(
        topic: impl Into<String>,
        value: &T,
    ) -> Result<Event, JsonError> {
        let topic = topic.into();
        match serde_json::to_vec(value) {
            Ok(payload) => Ok(Event {
                topic,
                payload,
                timestamp: 0,
            }),
            Err(error) => Err(JsonError(format!("{topic}: not published: {error}"))),
        }
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for JsonError {}

/// So that `?` works in [`crate::App::handle`].
impl From<JsonError> for String {
    fn from(error: JsonError) -> String {
        error.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let value = BTreeMap::from([("a".to_string(), 1.5)]);
        let event = Event::json_output("t", &value).unwrap();
        assert_eq!(event.payload, br#"{"a":1.5}"#);
        assert_eq!(event.json::<BTreeMap<String, f64>>(), Ok(value));
    }

    #[test]
    fn an_error_names_the_topic() {
        let event = Event {
            topic: "plant/line1".into(),
            payload: vec![0xff],
            timestamp: 0,
        };
        let error = event.json::<f64>().unwrap_err().to_string();
        assert!(error.starts_with("plant/line1: "), "{error}");
        let error = Event::json_output("out", &BTreeMap::from([([1], 2)])).unwrap_err();
        assert!(String::from(error).starts_with("out: not published: "));
    }
}
