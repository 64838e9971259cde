//! Raises an alarm when a temperature reaches a threshold, and clears it with hysteresis.
//!
//! Takes `{"value": 93.5, "timestamp_ms": 1763725320000}` on any topic `T` and publishes, on
//! transitions only, to `alarms/T`:
//! `{"alarm":"overheat","state":"raised","value":93.5,"threshold":90.0,"topic":"T","timestamp_ms":1763725320000}`.
//! Other fields of a reading are ignored; without `timestamp_ms` the time of arrival stands in.

#![deny(unsafe_code)]

mod raised;

use headgate_sdk::{App, Config, Event, RateLimit, warn};
use raised::{Bounds, RaisedTopics};
use serde::de::Error as _;
use serde::{Deserialize, Serialize};

/// The topics that are remembered while their alarm is raised; [`RaisedTopics`] says what happens
/// to one more. About 2 MiB with their bookkeeping.
const RAISED_BOUNDS: Bounds = Bounds {
    topics: 10_000,
    bytes: 1024 * 1024,
};

/// Lines about bad payloads in the log, a second.
const BAD_PAYLOAD_LINES_PER_SECOND: u32 = 5;

const NS_PER_MS: u64 = 1_000_000;

/// The app.
pub struct OverheatAlarm {
    /// Raised at this value and above.
    threshold: f64,
    /// Cleared below this value.
    clear_below: f64,
    raised: RaisedTopics,
    bad_payload_lines: RateLimit,
}

#[derive(Deserialize)]
struct Reading {
    value: f64,
    timestamp_ms: Option<i64>,
}

#[derive(Serialize)]
struct Alarm<'a> {
    alarm: &'static str,
    state: State,
    value: f64,
    threshold: f64,
    topic: &'a str,
    timestamp_ms: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Raised,
    Cleared,
}

#[headgate_sdk::app]
impl App for OverheatAlarm {
    fn configure(config: &Config) -> Result<Self, String> {
        config.deny_unknown(&["threshold", "hysteresis"])?;
        let threshold = config.get_or("threshold", 90.0)?;
        if !f64::is_finite(threshold) {
            return Err(config
                .invalid("threshold", "must be a finite number")
                .into());
        }
        let hysteresis = config.get_or("hysteresis", 5.0)?;
        if !f64::is_finite(hysteresis) || hysteresis < 0.0 {
            return Err(config
                .invalid("hysteresis", "must be a finite number, 0 or more")
                .into());
        }
        Ok(OverheatAlarm {
            threshold,
            clear_below: threshold - hysteresis,
            raised: RaisedTopics::new(RAISED_BOUNDS),
            bad_payload_lines: RateLimit::per_second(BAD_PAYLOAD_LINES_PER_SECOND),
        })
    }

    fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String> {
        let mut alarms = Vec::new();
        for event in &batch {
            match parse(&event.payload) {
                Ok(reading) => alarms.extend(self.on_reading(event, &reading)),
                Err(error) => self.on_bad_payload(event, &error),
            }
        }
        Ok(alarms)
    }
}

fn parse(payload: &[u8]) -> serde_json::Result<Reading> {
    if !payload.trim_ascii_start().starts_with(b"{") {
        // A derived `Deserialize` would take an array, too.
        return Err(serde_json::Error::custom("expected a JSON object"));
    }
    serde_json::from_slice(payload)
}

impl OverheatAlarm {
    /// The alarm to publish, if this reading is a transition.
    fn on_reading(&mut self, event: &Event, reading: &Reading) -> Option<Event> {
        let state = if reading.value >= self.threshold {
            self.raised.insert(&event.topic).then_some(State::Raised)?
        } else if reading.value < self.clear_below {
            self.raised.remove(&event.topic).then_some(State::Cleared)?
        } else {
            return None;
        };
        let alarm = Alarm {
            alarm: "overheat",
            state,
            value: reading.value,
            threshold: self.threshold,
            topic: &event.topic,
            timestamp_ms: reading
                .timestamp_ms
                .unwrap_or((event.timestamp / NS_PER_MS) as i64),
        };
        Some(Event {
            topic: format!("alarms/{}", event.topic),
            payload: serde_json::to_vec(&alarm).expect("an alarm has no map keys that JSON lacks"),
            timestamp: event.timestamp,
        })
    }

    fn on_bad_payload(&mut self, event: &Event, error: &serde_json::Error) {
        if let Some(held_back) = self.bad_payload_lines.allow(event.timestamp) {
            warn!(
                "{}: not a reading, skipped: {error} ({held_back} such lines held back)",
                event.topic
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ARRIVAL_NS: u64 = 1_763_725_320_000 * NS_PER_MS;

    fn app() -> OverheatAlarm {
        OverheatAlarm::configure(&Config::default()).unwrap()
    }

    fn event(topic: &str, payload: impl AsRef<[u8]>) -> Event {
        Event {
            topic: topic.into(),
            payload: payload.as_ref().to_vec(),
            timestamp: ARRIVAL_NS,
        }
    }

    fn reading(topic: &str, value: f64) -> Event {
        event(topic, format!(r#"{{"value":{value},"timestamp_ms":7}}"#))
    }

    /// `topic state` of each alarm.
    fn alarms(app: &mut OverheatAlarm, batch: Vec<Event>) -> Vec<String> {
        let alarms = app.handle(batch).unwrap();
        let describe = |alarm: &Event| {
            let body: serde_json::Value = serde_json::from_slice(&alarm.payload).unwrap();
            format!("{} {}", alarm.topic, body["state"].as_str().unwrap())
        };
        alarms.iter().map(describe).collect()
    }

    fn refused(entries: [(&str, &str); 1]) -> String {
        OverheatAlarm::configure(&Config::from(entries))
            .err()
            .unwrap()
    }

    #[test]
    fn a_reading_at_the_threshold_raises_an_alarm_with_all_fields() {
        let batch = vec![event(
            "plant/line1/temperature",
            r#"{"value": 93.5, "timestamp_ms": 1763725320001, "seq": 4}"#,
        )];
        let alarms = app().handle(batch).unwrap();
        assert_eq!(alarms.len(), 1);
        assert_eq!(alarms[0].topic, "alarms/plant/line1/temperature");
        assert_eq!(
            String::from_utf8(alarms[0].payload.clone()).unwrap(),
            r#"{"alarm":"overheat","state":"raised","value":93.5,"threshold":90.0,"topic":"plant/line1/temperature","timestamp_ms":1763725320001}"#
        );
        assert_eq!(alarms[0].timestamp, ARRIVAL_NS);
    }

    #[test]
    fn without_a_timestamp_the_time_of_arrival_stands_in() {
        let alarms = app().handle(vec![event("t", r#"{"value":90}"#)]).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&alarms[0].payload).unwrap();
        assert_eq!(body["timestamp_ms"], 1_763_725_320_000_i64);
    }

    #[test]
    fn only_transitions_are_published_and_clearing_takes_the_whole_hysteresis() {
        let mut app = app();
        let values = [89.9, 90.0, 95.0, 89.0, 85.0, 84.9, 84.0, 91.0];
        let batch = values.map(|value| reading("t", value)).to_vec();
        assert_eq!(
            alarms(&mut app, batch),
            ["alarms/t raised", "alarms/t cleared", "alarms/t raised"]
        );
    }

    #[test]
    fn each_topic_has_a_state_of_its_own_that_outlives_the_batch() {
        let mut app = app();
        assert_eq!(
            alarms(&mut app, vec![reading("a", 99.0), reading("b", 20.0)]),
            ["alarms/a raised"]
        );
        assert_eq!(
            alarms(&mut app, vec![reading("b", 99.0), reading("a", 99.0)]),
            ["alarms/b raised"]
        );
        assert_eq!(
            alarms(&mut app, vec![reading("a", 20.0)]),
            ["alarms/a cleared"]
        );
    }

    #[test]
    fn a_bad_payload_is_skipped_and_the_rest_of_the_batch_is_handled() {
        let bad = [
            "",
            "hot",
            "93.5",
            "[]",
            "[93.5,1]",
            "{}",
            r#"{"value":"93.5"}"#,
            r#"{"value":93.5"#,
            r#"{"value":1e999}"#,
            r#"{"value":null}"#,
        ];
        let mut batch: Vec<Event> = bad.iter().map(|payload| event("bad", payload)).collect();
        batch.push(event("bad", b"{\"value\":\xff}"));
        batch.push(reading("good", 99.0));
        assert_eq!(alarms(&mut app(), batch), ["alarms/good raised"]);
    }

    #[test]
    fn threshold_and_hysteresis_come_from_the_configuration() {
        let config = Config::from([("threshold", "-18"), ("hysteresis", "0")]);
        let mut freezer = OverheatAlarm::configure(&config).unwrap();
        let batch = [-18.0, -18.5].map(|value| reading("t", value)).to_vec();
        assert_eq!(
            alarms(&mut freezer, batch),
            ["alarms/t raised", "alarms/t cleared"]
        );
    }

    #[test]
    fn an_impossible_configuration_is_refused_by_name() {
        assert_eq!(
            refused([("threshold", "hot")]),
            r#"config.threshold = "hot": is no f64"#
        );
        assert_eq!(
            refused([("threshold", "NaN")]),
            r#"config.threshold = "NaN": must be a finite number"#
        );
        assert_eq!(
            refused([("hysteresis", "-1")]),
            r#"config.hysteresis = "-1": must be a finite number, 0 or more"#
        );
        assert!(refused([("treshold", "90")]).contains("config.treshold: unknown key"));
    }

    proptest! {
        #[test]
        fn no_payload_makes_the_app_panic_or_fail_the_batch(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8)) {
            let batch = payloads.iter().map(|payload| event("t", payload)).collect();
            prop_assert!(app().handle(batch).is_ok());
        }

        #[test]
        fn almost_valid_json_makes_no_panic(text in r#"\{ ?"value" ?: ?[-0-9.eE]{0,6}[,}] ?("timestamp_ms":[-0-9]{0,22})?\}?"#) {
            prop_assert!(app().handle(vec![event("t", text)]).is_ok());
        }

        #[test]
        fn raised_and_cleared_alternate_whatever_the_values(values in prop::collection::vec(80.0..100.0_f64, 0..50)) {
            let batch = values.iter().map(|&value| reading("t", value)).collect();
            let states = alarms(&mut app(), batch);
            for (index, state) in states.iter().enumerate() {
                prop_assert_eq!(state.as_str(), if index % 2 == 0 { "alarms/t raised" } else { "alarms/t cleared" });
            }
        }
    }
}
