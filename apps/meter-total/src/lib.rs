//! Keeps a running total for each meter, over restarts, and publishes it every few seconds.
//!
//! Takes a decimal number as text on any topic `T`, adds it to the total of `T`, and publishes the
//! totals that have changed to `totals/T` every `publish_every_s` seconds. A total counts each event
//! once: it is kept together with the batch that it comes from.

#![deny(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use headgate_sdk::kv::{Bucket, KvError};
use headgate_sdk::{App, Config, Event, RateLimit, metrics, timer, warn};

/// The timer's name.
const PUBLISH: &str = "publish";

/// Longest topic that a total is kept for: the longest key.
const MAX_TOPIC_BYTES: usize = 255;

/// Totals that change between two publications. Others are kept and published the next time that
/// they change. At a publication each costs a call, of which a batch has 1000.
const MOST_CHANGED: usize = 900;

/// Lines about bad payloads in the log, a second.
const BAD_PAYLOAD_LINES_PER_SECOND: u32 = 5;

/// The app.
pub struct MeterTotal {
    totals: Bucket,
    /// Topics whose totals are to be published.
    changed: BTreeSet<String>,
    bad_payload_lines: RateLimit,
}

#[headgate_sdk::app]
impl App for MeterTotal {
    fn configure(config: &Config) -> Result<Self, String> {
        config.deny_unknown(&["publish_every_s"])?;
        let seconds = config.get_or("publish_every_s", 10_u64)?;
        if !(1..=86_400).contains(&seconds) {
            return Err(config.invalid("publish_every_s", "give 1 to 86400").into());
        }
        timer::every(PUBLISH, Duration::from_secs(seconds))
            .map_err(|error| format!("the timer can't be set: {error:?}"))?;
        let totals = Bucket::open("totals")?;
        // After a restart it isn't known which of them were published.
        let changed = totals.keys()?.into_iter().take(MOST_CHANGED).collect();
        Ok(MeterTotal {
            totals,
            changed,
            bad_payload_lines: RateLimit::per_second(BAD_PAYLOAD_LINES_PER_SECOND),
        })
    }

    fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String> {
        // One call for each topic, not for each event.
        let mut added: BTreeMap<&str, u64> = BTreeMap::new();
        let mut is_due = false;
        for event in &batch {
            if timer::name(event) == Some(PUBLISH) {
                is_due = true;
                continue;
            }
            match parse(event) {
                Ok(count) => {
                    let sum = added.entry(&event.topic).or_default();
                    *sum = sum.saturating_add(count);
                }
                Err(why) => {
                    if let Some(held_back) = self.bad_payload_lines.allow(event.timestamp) {
                        warn!(
                            "{}: {why}, skipped ({held_back} such lines held back)",
                            event.topic
                        );
                    }
                }
            }
        }
        for (topic, count) in added {
            // No room, or a total beyond all measure: fail the batch rather than lose count of it.
            self.totals
                .increment(topic, count)
                .map_err(|error| format!("{topic}: {error}"))?;
            if self.changed.len() < MOST_CHANGED {
                self.changed.insert(topic.to_string());
            }
        }
        if is_due {
            return Ok(self.publish()?);
        }
        Ok(Vec::new())
    }
}

fn parse(event: &Event) -> Result<u64, &'static str> {
    if event.topic.len() > MAX_TOPIC_BYTES {
        return Err("a topic too long for a key");
    }
    let text = std::str::from_utf8(&event.payload).map_err(|_| "not a text")?;
    text.trim().parse().map_err(|_| "not a whole number")
}

impl MeterTotal {
    fn publish(&mut self) -> Result<Vec<Event>, KvError> {
        let topics: Vec<String> = std::mem::take(&mut self.changed).into_iter().collect();
        let totals = match self.totals.get_many(&topics) {
            Ok(totals) => totals,
            Err(error) => {
                self.changed = topics.into_iter().collect();
                return Err(error);
            }
        };
        // Metrics are for the operator: the app works without.
        metrics::gauge("published", topics.len() as f64).ok();
        let published = topics.iter().zip(totals).filter_map(|(topic, total)| {
            Some(Event {
                topic: format!("totals/{topic}"),
                payload: total?,
                timestamp: 0,
            })
        });
        Ok(published.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(topic: &str, payload: &str) -> Event {
        Event {
            topic: topic.into(),
            payload: payload.into(),
            timestamp: 1,
        }
    }

    fn tick() -> Event {
        event("$timer/publish", "")
    }

    fn lines(app: &mut MeterTotal, batch: Vec<Event>) -> Vec<String> {
        let outputs = app.handle(batch).unwrap();
        let line = |event: &Event| {
            format!(
                "{} {}",
                event.topic,
                String::from_utf8_lossy(&event.payload)
            )
        };
        outputs.iter().map(line).collect()
    }

    #[test]
    fn totals_are_kept_and_published_when_they_have_changed() {
        let mut app = MeterTotal::configure(&Config::default()).unwrap();
        let batch = vec![event("a", "1"), event("b", " 2\n"), event("a", "40")];
        assert_eq!(lines(&mut app, batch), [""; 0]);
        assert_eq!(lines(&mut app, vec![tick()]), ["totals/a 41", "totals/b 2"]);
        assert_eq!(
            lines(&mut app, vec![event("a", "1"), tick()]),
            ["totals/a 42"]
        );
        assert_eq!(lines(&mut app, vec![tick()]), [""; 0]);
        // Another instance goes on where this one was.
        let mut app = MeterTotal::configure(&Config::default()).unwrap();
        let batch = vec![event("b", "1"), tick()];
        assert_eq!(lines(&mut app, batch), ["totals/a 42", "totals/b 3"]);
    }

    #[test]
    fn a_bad_payload_is_skipped() {
        let mut app = MeterTotal::configure(&Config::default()).unwrap();
        let long = "t".repeat(256);
        let mut batch: Vec<_> = ["", "-1", "1.5", "many", "99999999999999999999"]
            .map(|payload| event("a", payload))
            .into();
        batch.extend([event(&long, "1"), event("a", "1"), tick()]);
        assert_eq!(lines(&mut app, batch), ["totals/a 1"]);
    }

    #[test]
    fn an_impossible_pace_is_refused_by_name() {
        for pace in ["0", "86401"] {
            let config = Config::from([("publish_every_s", pace)]);
            let error = MeterTotal::configure(&config).err().unwrap();
            assert!(error.starts_with("config.publish_every_s = "), "{error}");
        }
    }
}
