//! Copies events to another topic: one prefix goes, another comes. Payload and time stay.

#![deny(unsafe_code)]

use headgate_sdk::{App, Config, Event};

/// The app.
pub struct Relay {
    strip: String,
    prefix: String,
}

impl App for Relay {
    fn configure(config: &Config) -> Result<Self, String> {
        config.deny_unknown(&["strip", "prefix"])?;
        let strip: String = config.get_or("strip", String::new())?;
        let prefix: String = config.get_or("prefix", "relayed/".to_string())?;
        if prefix.is_empty() || prefix.contains(['+', '#', '\0']) {
            let why =
                "must not be empty (an event would come back to its own topic) and has no + or #";
            return Err(config.invalid("prefix", why).into());
        }
        Ok(Relay { strip, prefix })
    }

    fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String> {
        let relayed = batch.into_iter().filter_map(|event| {
            // What it has published itself may come back through a filter such as `#`.
            if event.topic.starts_with(&self.prefix) {
                return None;
            }
            let rest = event.topic.strip_prefix(&self.strip);
            let rest = rest.unwrap_or(&event.topic);
            let mut topic = String::with_capacity(self.prefix.len() + rest.len());
            topic.push_str(&self.prefix);
            topic.push_str(rest);
            Some(Event { topic, ..event })
        });
        Ok(relayed.collect())
    }
}

headgate_sdk::export!(Relay);

#[cfg(test)]
mod tests {
    use super::*;

    fn relayed(config: &[(&str, &str)], topic: &str) -> Vec<Event> {
        let config: Config = config.iter().copied().collect();
        let mut app = Relay::configure(&config).unwrap();
        let event = Event {
            topic: topic.into(),
            payload: b"x".to_vec(),
            timestamp: 7,
        };
        app.handle(vec![event]).unwrap()
    }

    #[test]
    fn one_prefix_goes_and_another_comes() {
        let config = [("strip", "a/"), ("prefix", "b/")];
        for (topic, expected) in [("a/c", "b/c"), ("c/a/d", "b/c/a/d")] {
            let events = relayed(&config, topic);
            assert_eq!(events.len(), 1);
            assert_eq!(events[0].topic, expected);
            assert_eq!((&*events[0].payload, events[0].timestamp), (&b"x"[..], 7));
        }
    }

    #[test]
    fn what_it_has_published_is_left_alone() {
        assert!(relayed(&[], "relayed/a").is_empty());
    }

    #[test]
    fn a_prefix_that_would_feed_itself_is_refused() {
        for prefix in ["", "a/#"] {
            let config = Config::from([("prefix", prefix)]);
            let error = Relay::configure(&config).err().unwrap();
            assert!(error.contains("prefix"), "{error}");
        }
    }
}
