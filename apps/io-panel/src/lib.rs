//! Publishes the edges of GPIO lines and the readings of sensors, and switches outputs by MQTT.
//!
//! What the manifest calls `NAME` is on `panel/state/NAME`: `1` or `0` for a line, a number for a sensor.
//! `1` and `0` on `panel/set/NAME` set the output `NAME`.

#![deny(unsafe_code)]

use headgate_sdk::{App, Config, Event, RateLimit, gpio, sensor, warn};

/// Lines about bad requests in the log, a second.
const BAD_REQUEST_LINES_PER_SECOND: u32 = 5;

/// The app.
pub struct IoPanel {
    bad_request_lines: RateLimit,
}

impl App for IoPanel {
    fn configure(config: &Config) -> Result<Self, String> {
        config.deny_unknown(&[])?;
        Ok(IoPanel {
            bad_request_lines: RateLimit::per_second(BAD_REQUEST_LINES_PER_SECOND),
        })
    }

    fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String> {
        let mut states = Vec::with_capacity(batch.len());
        for event in batch {
            if let Some((name, _)) = gpio::edge(&event) {
                states.push(state(name, event.payload.clone(), event.timestamp));
            } else if let Some((name, _)) = sensor::reading(&event) {
                states.push(state(name, event.payload.clone(), event.timestamp));
            } else if let Some(name) = event.topic.strip_prefix("panel/set/") {
                match set(name, &event.payload) {
                    Ok(()) => states.push(state(name, event.payload.clone(), event.timestamp)),
                    Err(why) => {
                        if let Some(held_back) = self.bad_request_lines.allow(event.timestamp) {
                            warn!(
                                "{}: {why}, skipped; {held_back} such lines held back",
                                event.topic
                            );
                        }
                    }
                }
            }
        }
        Ok(states)
    }
}

fn set(name: &str, payload: &[u8]) -> Result<(), String> {
    let value = match payload {
        b"1" => true,
        b"0" => false,
        _ => return Err("neither 1 nor 0".to_owned()),
    };
    gpio::set(name, value).map_err(|error| format!("can't be set: {error:?}"))
}

fn state(name: &str, payload: Vec<u8>, timestamp: u64) -> Event {
    Event {
        topic: format!("panel/state/{name}"),
        payload,
        timestamp,
    }
}

headgate_sdk::export!(IoPanel);

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(topic: &str, payload: &str) -> Vec<Event> {
        let mut app = IoPanel::configure(&Config::default()).unwrap();
        app.handle(vec![Event {
            topic: topic.into(),
            payload: payload.into(),
            timestamp: 7,
        }])
        .unwrap()
    }

    #[test]
    fn edges_and_readings_are_published_with_their_time() {
        for (topic, payload, expected) in [
            ("$gpio/door", "1", "panel/state/door"),
            ("$sensor/cpu", "48.312", "panel/state/cpu"),
        ] {
            let expected = state(expected.rsplit('/').next().unwrap(), payload.into(), 7);
            assert_eq!(handle(topic, payload), [expected]);
        }
    }

    #[test]
    fn an_output_is_set_and_its_state_is_published() {
        assert_eq!(handle("panel/set/lamp", "1")[0].payload, b"1");
        assert_eq!(gpio::get("lamp"), Ok(true));
        assert_eq!(handle("panel/set/lamp", "on"), []);
        assert_eq!(gpio::get("lamp"), Ok(true));
        assert_eq!(handle("panel/set/lamp", "0").len(), 1);
        assert_eq!(gpio::get("lamp"), Ok(false));
    }
}
