//! Converts measured values from one unit to another.
//!
//! Takes JSON objects such as `{"seq":4,"value":212.0,"unit":"F","note":"x"}` and publishes each
//! with its `value` converted and its `unit` replaced (or added after `value`):
//! `{"seq":4,"value":100.0,"unit":"celsius","note":"x"}`. Every other byte stays as it was: fields,
//! their order, how numbers are written, spaces.

#![deny(unsafe_code)]

mod conversion;
mod reading;

use conversion::Conversion;
use headgate_sdk::{App, Config, Event, RateLimit, warn};
use reading::Reading;
use std::fmt;

/// Lines about bad payloads in the log, a second.
const BAD_PAYLOAD_LINES_PER_SECOND: u32 = 5;

/// The app.
pub struct UnitConvert {
    conversion: Conversion,
    output_prefix: String,
    bad_payload_lines: RateLimit,
}

#[headgate_sdk::app]
impl App for UnitConvert {
    fn configure(config: &Config) -> Result<Self, String> {
        config.deny_unknown(&[
            "from",
            "to",
            "factor",
            "offset",
            "unit",
            "output_prefix",
            "decimals",
        ])?;
        let conversion = Conversion::from_config(config)?;
        let output_prefix: String = config.get_or("output_prefix", "converted/".to_string())?;
        if output_prefix.is_empty() || output_prefix.contains(['+', '#', '\0']) {
            let why = "must not be empty (a result would come back as a reading) and has no + or #";
            return Err(config.invalid("output_prefix", why).into());
        }
        Ok(UnitConvert {
            conversion,
            output_prefix,
            bad_payload_lines: RateLimit::per_second(BAD_PAYLOAD_LINES_PER_SECOND),
        })
    }

    fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String> {
        let mut outputs = Vec::with_capacity(batch.len());
        for event in batch {
            if event.topic.starts_with(&self.output_prefix) {
                continue; // A result of this app's own, through a filter such as `#`.
            }
            match self.convert(&event.payload) {
                Ok(payload) => outputs.push(Event {
                    topic: self.output_topic(&event.topic),
                    payload,
                    ..event
                }),
                Err(error) => self.on_bad_payload(&event, &error),
            }
        }
        Ok(outputs)
    }
}

impl UnitConvert {
    fn convert(&self, payload: &[u8]) -> Result<Vec<u8>, ConvertError> {
        let reading = Reading::parse(payload)?;
        if let Some(unit) = &reading.unit {
            if !self.conversion.accepts(unit) {
                return Err(ConvertError::OtherUnit(unit.to_string()));
            }
        }
        let value = self.conversion.apply(reading.value);
        if !value.is_finite() {
            return Err(ConvertError::OutOfRange(reading.value));
        }
        Ok(reading.with(value, self.conversion.unit_json()))
    }

    fn output_topic(&self, topic: &str) -> String {
        let mut output = String::with_capacity(self.output_prefix.len() + topic.len());
        output.push_str(&self.output_prefix);
        output.push_str(topic);
        output
    }

    fn on_bad_payload(&mut self, event: &Event, error: &ConvertError) {
        if let Some(held_back) = self.bad_payload_lines.allow(event.timestamp) {
            warn!(
                "{}: not converted, skipped: {error} ({held_back} such lines held back)",
                event.topic
            );
        }
    }
}

/// Why one reading is skipped.
#[derive(Debug)]
enum ConvertError {
    NotText(std::str::Utf8Error),
    NotAReading(serde_json::Error),
    OtherUnit(String),
    OutOfRange(f64),
}

impl fmt::Display for ConvertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConvertError::NotText(error) => write!(f, "{error}"),
            ConvertError::NotAReading(error) => write!(f, "{error}"),
            ConvertError::OtherUnit(unit) => write!(f, "its unit is {unit:?}"),
            ConvertError::OutOfRange(value) => write!(f, "{value} is too large to be converted"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn app(config: &[(&str, &str)]) -> UnitConvert {
        UnitConvert::configure(&config.iter().copied().collect()).unwrap()
    }

    fn refused(config: &[(&str, &str)]) -> String {
        UnitConvert::configure(&config.iter().copied().collect())
            .err()
            .unwrap()
    }

    const F_TO_C: &[(&str, &str)] = &[("from", "fahrenheit"), ("to", "celsius")];

    fn event(topic: &str, payload: impl AsRef<[u8]>) -> Event {
        Event {
            topic: topic.into(),
            payload: payload.as_ref().to_vec(),
            timestamp: 42,
        }
    }

    /// The one result's payload.
    fn converted(app: &mut UnitConvert, payload: &str) -> String {
        let outputs = app.handle(vec![event("t", payload)]).unwrap();
        assert_eq!(outputs.len(), 1, "{payload} is converted");
        String::from_utf8(outputs[0].payload.clone()).unwrap()
    }

    #[test]
    fn a_reading_comes_out_converted_under_the_prefix_with_its_timestamp() {
        let batch = vec![event("plant/line1/temperature_f", r#"{"value":212}"#)];
        let outputs = app(F_TO_C).handle(batch).unwrap();
        assert_eq!(outputs.len(), 1);
        assert_eq!(outputs[0].topic, "converted/plant/line1/temperature_f");
        assert_eq!(outputs[0].payload, br#"{"value":100.0,"unit":"celsius"}"#);
        assert_eq!(outputs[0].timestamp, 42);
    }

    #[test]
    fn every_other_byte_stays_as_it_was() {
        let payload = r#" { "seq": 18446744073709551616 ,"value":  32.0 , "nested":{"value":1,"unit":"psi"}, "unit":"F","e":1.50e+3,"t":"\u00e9"} "#;
        let expected = r#" { "seq": 18446744073709551616 ,"value":  0.0 , "nested":{"value":1,"unit":"psi"}, "unit":"celsius","e":1.50e+3,"t":"\u00e9"} "#;
        assert_eq!(converted(&mut app(F_TO_C), payload), expected);
    }

    #[test]
    fn a_unit_before_the_value_is_replaced_too() {
        assert_eq!(
            converted(&mut app(F_TO_C), r#"{"unit":null,"value":50}"#),
            r#"{"unit":"celsius","value":10.0}"#
        );
    }

    #[test]
    fn results_are_rounded_to_the_decimals_asked_for() {
        assert_eq!(
            converted(&mut app(F_TO_C), r#"{"value":100}"#),
            r#"{"value":37.778,"unit":"celsius"}"#
        );
        let whole = [F_TO_C, &[("decimals", "0")]].concat();
        assert_eq!(
            converted(&mut app(&whole), r#"{"value":100}"#),
            r#"{"value":38.0,"unit":"celsius"}"#
        );
    }

    #[test]
    fn a_factor_and_an_offset_make_any_linear_conversion() {
        let mut inches = app(&[
            ("factor", "25.4"),
            ("unit", "mm"),
            ("output_prefix", "metric/"),
        ]);
        let outputs = inches
            .handle(vec![event("width", r#"{"value":2,"unit":"in"}"#)])
            .unwrap();
        assert_eq!(outputs[0].topic, "metric/width");
        assert_eq!(outputs[0].payload, br#"{"value":50.8,"unit":"mm"}"#);
    }

    #[test]
    fn a_bad_payload_is_skipped_and_the_rest_of_the_batch_is_converted() {
        let bad: [&[u8]; 13] = [
            b"",
            b"hot",
            b"{}",
            b"[1]",
            b"[1,\"F\"]",
            b"5",
            b"{\"value\":\"5\"}",
            b"{\"value\":5",
            b"{\"value\":5}x",
            b"{\"value\":5,\"value\":6}",
            b"{\"value\":1e999}",
            b"{\"value\":5,\"s\":\"\xff\"}",
            b"{\"value\":5,\"unit\":\"psi\"}",
        ];
        let mut batch: Vec<Event> = bad.iter().map(|payload| event("bad", payload)).collect();
        batch.push(event("good", r#"{"value":5}"#));
        let outputs = app(F_TO_C).handle(batch).unwrap();
        assert_eq!(
            outputs
                .iter()
                .map(|output| output.topic.as_str())
                .collect::<Vec<_>>(),
            ["converted/good"]
        );
    }

    #[test]
    fn a_result_that_json_cannot_write_is_skipped() {
        let mut huge = app(&[("factor", "1e300"), ("unit", "x")]);
        assert_eq!(
            huge.handle(vec![event("t", r#"{"value":1e300}"#)]),
            Ok(vec![])
        );
    }

    #[test]
    fn its_own_results_are_not_converted_again() {
        assert_eq!(
            app(F_TO_C).handle(vec![event("converted/t", r#"{"value":5}"#)]),
            Ok(vec![])
        );
    }

    #[test]
    fn an_impossible_configuration_is_refused_by_name() {
        assert!(refused(&[]).starts_with("config.from: is missing"));
        assert!(refused(&[("from", "fahrenheit")]).starts_with("config.to: is missing"));
        assert!(
            refused(&[("from", "parsec"), ("to", "celsius")])
                .starts_with(r#"config.from = "parsec": "#)
        );
        assert!(
            refused(&[("from", "bar"), ("to", "celsius")])
                .starts_with(r#"config.to = "celsius": "#)
        );
        assert!(refused(&[("factor", "inf")]).starts_with(r#"config.factor = "inf": "#));
        assert!(
            refused(&[("factor", "2"), ("from", "bar")]).starts_with(r#"config.from = "bar": "#)
        );
        assert!(
            refused(&[("from", "bar"), ("to", "psi"), ("offset", "1")])
                .starts_with(r#"config.offset = "1": "#)
        );
        assert!(refused(&[("form", "bar")]).starts_with("config.form: unknown key"));
        assert!(
            refused(&[F_TO_C, &[("output_prefix", "")]].concat())
                .starts_with(r#"config.output_prefix = "": "#)
        );
        assert!(
            refused(&[F_TO_C, &[("output_prefix", "a/#")]].concat())
                .starts_with(r#"config.output_prefix = "a/#": "#)
        );
        assert!(
            refused(&[F_TO_C, &[("decimals", "10")]].concat())
                .starts_with(r#"config.decimals = "10": "#)
        );
    }

    proptest! {
        #[test]
        fn no_payload_makes_the_app_panic_or_fail_the_batch(payload in prop::collection::vec(any::<u8>(), 0..60)) {
            prop_assert!(app(F_TO_C).handle(vec![event("t", payload)]).is_ok());
        }

        #[test]
        fn almost_valid_json_comes_out_as_valid_json_or_not_at_all(
            fields in prop::collection::vec(r#" ?"(value|unit|seq|a)" ?: ?(-?[0-9]{1,3}(\.[0-9]{1,3})?|null|"F"|\[1,\{\}\]|true) ?"#, 0..5),
            tail in r"(\}|,\}|)",
        ) {
            let payload = format!("{{{}{tail}", fields.join(","));
            for output in app(F_TO_C).handle(vec![event("t", payload)]).unwrap() {
                let body: serde_json::Value = serde_json::from_slice(&output.payload).unwrap();
                prop_assert_eq!(&body["unit"], "celsius");
                prop_assert!(body["value"].is_f64());
            }
        }

        #[test]
        fn there_and_back_again_is_where_it_was(value in -1e6..1e6_f64) {
            let there = converted(&mut app(&[("from", "kelvin"), ("to", "fahrenheit"), ("decimals", "9")]), &format!(r#"{{"value":{value}}}"#));
            let back = converted(&mut app(&[("from", "fahrenheit"), ("to", "kelvin"), ("decimals", "9")]), &there);
            let body: serde_json::Value = serde_json::from_str(&back).unwrap();
            prop_assert!((body["value"].as_f64().unwrap() - value).abs() < 1e-6);
        }
    }
}
