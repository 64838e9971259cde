//! Passes on readings that are too high.
//!
//! Takes `{"value": 93.5}` on a topic `T`, and publishes `{"value": 93.5, "threshold": 90.0}` to
//! `high/T` if the value reaches the threshold.

use headgate_sdk::{App, Config, Event, RateLimit, warn};
use serde::{Deserialize, Serialize};

pub struct HighReadings {
    threshold: f64,
    /// So that a device gone mad doesn't fill the log.
    bad_payloads: RateLimit,
}

#[derive(Deserialize)]
struct Reading {
    value: f64,
}

#[derive(Serialize)]
struct High {
    value: f64,
    threshold: f64,
}

#[headgate_sdk::app]
impl App for HighReadings {
    fn configure(config: &Config) -> Result<Self, String> {
        config.deny_unknown(&["threshold"])?;
        Ok(HighReadings {
            threshold: config.get("threshold")?,
            bad_payloads: RateLimit::per_second(5),
        })
    }

    fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String> {
        let mut outputs = Vec::new();
        for event in batch {
            let value = match event.json::<Reading>() {
                Ok(reading) => reading.value,
                // An error returned from here would fail the whole batch.
                Err(error) => {
                    if self.bad_payloads.allow(event.timestamp).is_some() {
                        warn!("skipped: {error}");
                    }
                    continue;
                }
            };
            if value >= self.threshold {
                let high = High {
                    value,
                    threshold: self.threshold,
                };
                outputs.push(Event {
                    timestamp: event.timestamp,
                    ..Event::json_output(format!("high/{}", event.topic), &high)?
                });
            }
        }
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests {
    use headgate_sdk::testing::{Harness, event};

    use super::*;

    fn app() -> Harness<HighReadings> {
        Harness::start(&Config::from([("threshold", "90")])).unwrap()
    }

    #[test]
    fn a_reading_that_reaches_the_threshold_is_passed_on() {
        let readings = ["89.9", "90", "91"];
        let batch = readings.map(|value| event("a", format!(r#"{{"value":{value}}}"#)));
        let published = app().handle(batch).unwrap();
        assert_eq!(
            published,
            [
                event("high/a", r#"{"value":90.0,"threshold":90.0}"#),
                event("high/a", r#"{"value":91.0,"threshold":90.0}"#),
            ]
        );
    }

    #[test]
    fn what_is_no_reading_is_skipped_and_logged() {
        let mut app = app();
        let batch = [event("a", "warm"), event("b", r#"{"value":95}"#)];
        assert_eq!(app.handle(batch).unwrap().len(), 1);
        assert!(app.take_log()[0].message.starts_with("skipped: a: "));
    }

    #[test]
    fn a_threshold_that_is_missing_is_named() {
        let error = Harness::<HighReadings>::start(&Config::default()).err();
        assert_eq!(error.as_deref(), Some("config.threshold: is missing"));
    }
}
