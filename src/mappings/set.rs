//! All mappings of a gateway: which of them a message is for is looked up once, by its topic, whatever
//! their number.

use std::time::Duration;

use rustc_hash::FxHashMap;

use super::mapping::{Mapping, Metadata, Sent};
use super::payload::{self, Refusal};

/// Mappings by name.
#[derive(Debug, Default)]
pub struct Set {
    /// None where one was removed.
    mappings: Vec<Option<(Box<str>, Mapping)>>,
    by_name: FxHashMap<Box<str>, usize>,
    /// By MQTT topic: mappings, each with its sources of that topic.
    routes: FxHashMap<Box<str>, Vec<Route>>,
}

#[derive(Debug)]
struct Route {
    mapping: usize,
    sources: Box<[usize]>,
}

impl Set {
    /// Puts a mapping in, in place of the one of its name, whose values it takes over.
    pub fn install(&mut self, name: &str, mut mapping: Mapping) {
        let old = self.remove(name);
        if let Some(old) = &old {
            mapping.adopt(old);
        }
        let number = self
            .mappings
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                self.mappings.push(None);
                self.mappings.len() - 1
            });
        for (topic, sources) in mapping.topics() {
            let route = Route {
                mapping: number,
                sources: sources.into(),
            };
            match self.routes.get_mut(topic) {
                Some(routes) => routes.push(route),
                None => {
                    self.routes.insert(topic.into(), vec![route]);
                }
            }
        }
        self.by_name.insert(name.into(), number);
        self.mappings[number] = Some((name.into(), mapping));
    }

    pub fn remove(&mut self, name: &str) -> Option<Mapping> {
        let number = self.by_name.remove(name)?;
        let (_, mapping) = self.mappings[number].take()?;
        for (topic, _) in mapping.topics() {
            if let Some(routes) = self.routes.get_mut(topic) {
                routes.retain(|route| route.mapping != number);
                if routes.is_empty() {
                    self.routes.remove(topic);
                }
            }
        }
        Some(mapping)
    }

    pub fn get(&self, name: &str) -> Option<&Mapping> {
        self.entry(*self.by_name.get(name)?)
            .map(|(_, mapping)| mapping)
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut Mapping> {
        let number = *self.by_name.get(name)?;
        self.mappings[number].as_mut().map(|(_, mapping)| mapping)
    }

    fn entry(&self, number: usize) -> Option<&(Box<str>, Mapping)> {
        self.mappings.get(number)?.as_ref()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Mapping)> {
        self.mappings
            .iter()
            .flatten()
            .map(|(name, mapping)| (&**name, mapping))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Mapping)> {
        self.mappings
            .iter_mut()
            .flatten()
            .map(|(name, mapping)| (&**name, mapping))
    }

    /// Whether any mapping reads this MQTT topic.
    pub fn wants(&self, topic: &str) -> bool {
        self.routes.contains_key(topic)
    }

    /// Takes a message, reads it once, and appends what all mappings make of it.
    pub fn on_message(
        &mut self,
        topic: &str,
        payload: &[u8],
        metadata: Option<&Metadata>,
        now_ms: u64,
        sent: &mut Vec<Sent>,
    ) -> Result<(), Refusal> {
        let Some(routes) = self.routes.get(topic) else {
            return Ok(());
        };
        let reading = payload::read(payload);
        for route in routes {
            let Some((_, mapping)) = &mut self.mappings[route.mapping] else {
                continue;
            };
            match &reading {
                Ok(reading) => {
                    mapping.on_reading(&route.sources, reading, metadata, now_ms, sent);
                }
                Err(refusal) => {
                    mapping.refuse(*refusal);
                }
            }
        }
        reading.map(|_| ())
    }

    /// How long a message may wait for earlier ones.
    pub fn longest_wait(&self) -> Duration {
        let waits = self.iter().map(|(_, mapping)| mapping.longest_wait());
        waits.max().unwrap_or_default()
    }

    /// When [`Set::on_time`] has something to do.
    pub fn next_time(&self) -> Option<u64> {
        self.iter()
            .filter_map(|(_, mapping)| mapping.next_time())
            .min()
    }

    pub fn on_time(&mut self, now_ms: u64, sent: &mut Vec<Sent>) {
        for (_, mapping) in self.iter_mut() {
            mapping.on_time(now_ms, sent);
        }
    }
}
