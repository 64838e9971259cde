//! What became of the last events, by topic: for people who ask why nothing came out.
//!
//! Noting must cost next to nothing, so that of many events at once only some are noted, and topics that
//! were not seen for long are forgotten.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use crate::dead_letters::Reason;
use crate::event::{Topic, unix_time_ns};

/// Topics of a generation. The one before it is kept, too.
const TOPICS: usize = 4_096;

/// Steps that are kept of a topic.
const STEPS: usize = 12;

/// Of up to so many events at once all are noted, of more than that only [`SAMPLE`].
const ALL_OF: usize = 16;
const SAMPLE: usize = 4;

/// Bytes that are kept of an error.
const ERROR_BYTES: usize = 200;

/// Something that has happened to an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// It is on its way to the apps.
    Taken,
    /// No app wants it.
    Unwanted,
    /// It had come before.
    Duplicate,
    /// A lane or an app dropped it.
    Dropped { by: Arc<str>, reason: Reason },
    /// An app has handled it, and has published so much in the same call.
    Handled {
        app: Arc<str>,
        events: usize,
        published: usize,
        refused: u64,
    },
    /// An app has failed with the batch that it was in.
    Failed { app: Arc<str>, error: String },
    /// An app has published it.
    Published { app: Arc<str> },
}

/// A step, and when it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traced {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    #[serde(flatten)]
    pub step: Step,
}

/// What became of the last events.
#[derive(Debug, Default)]
pub struct Traces(Mutex<Generations>);

#[derive(Debug, Default)]
struct Generations {
    recent: FxHashMap<Topic, VecDeque<Traced>>,
    older: FxHashMap<Topic, VecDeque<Traced>>,
}

impl Traces {
    /// Notes the same step for events that took it together.
    pub fn note<'a>(&self, topics: impl ExactSizeIterator<Item = &'a Topic>, step: &Step) {
        let steps = sampled(topics).map(|topic| (topic, step.clone()));
        self.write(steps);
    }

    /// Notes a step for each topic.
    pub(super) fn write<'a>(&self, steps: impl Iterator<Item = (&'a Topic, Step)>) {
        let time_ms = unix_time_ns() / 1_000_000;
        let mut generations = self.0.lock();
        for (topic, step) in steps.filter(|(topic, _)| topic.is_worth_caching()) {
            let steps = generations.of(topic);
            if steps.len() >= STEPS {
                steps.pop_front();
            }
            steps.push_back(Traced { time_ms, step });
        }
    }

    /// The last steps of events on a topic, oldest first.
    pub fn of(&self, topic: &Topic) -> Vec<Traced> {
        let generations = self.0.lock();
        let recent = generations.recent.get(topic);
        let steps = recent.or_else(|| generations.older.get(topic));
        steps.into_iter().flatten().cloned().collect()
    }
}

impl Generations {
    fn of(&mut self, topic: &Topic) -> &mut VecDeque<Traced> {
        if !self.recent.contains_key(topic) {
            if self.recent.len() >= TOPICS {
                self.older = std::mem::take(&mut self.recent);
            }
            let before = self.older.remove(topic).unwrap_or_default();
            self.recent.insert(topic.clone(), before);
        }
        self.recent
            .get_mut(topic)
            .expect("it has just been put there")
    }
}

/// As many of the events as are noted: the last ones.
fn sampled<T>(events: impl ExactSizeIterator<Item = T>) -> impl Iterator<Item = T> {
    let left_out = match events.len() {
        ..=ALL_OF => 0,
        many => many - SAMPLE,
    };
    events.skip(left_out)
}

/// Steps that one producer has to note.
#[derive(Debug, Default)]
pub(super) struct Notes(VecDeque<(Topic, Step)>);

impl Notes {
    pub(super) fn push(&mut self, topic: &Topic, step: Step) {
        if self.0.len() >= ALL_OF {
            self.0.pop_front();
        }
        self.0.push_back((topic.clone(), step));
    }

    pub(super) fn flush(&mut self, traces: &Traces) {
        if !self.0.is_empty() {
            traces.write(self.0.iter().map(|(topic, step)| (topic, step.clone())));
            self.0.clear();
        }
    }
}

impl Step {
    pub fn failed(app: Arc<str>, error: &str) -> Step {
        let mut end = error.len().min(ERROR_BYTES);
        while !error.is_char_boundary(end) {
            end -= 1;
        }
        Step::Failed {
            app,
            error: error[..end].to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(number: usize) -> Topic {
        Topic::new(format!("t/{number}")).unwrap()
    }

    #[test]
    fn the_last_steps_of_a_topic_are_kept() {
        let traces = Traces::default();
        for number in 0..STEPS + 3 {
            let step = Step::failed("a".into(), &number.to_string());
            traces.note([&topic(1)].into_iter(), &step);
        }
        let steps = traces.of(&topic(1));
        assert_eq!(steps.len(), STEPS);
        assert_eq!(steps[0].step, Step::failed("a".into(), "3"));
        assert!(traces.of(&topic(2)).is_empty());
    }

    #[test]
    fn topics_that_were_not_seen_for_long_are_forgotten() {
        let traces = Traces::default();
        for number in 0..10 * TOPICS {
            traces.note([&topic(0), &topic(number)].into_iter(), &Step::Taken);
        }
        assert_eq!(traces.of(&topic(0)).len(), STEPS);
        assert!(!traces.of(&topic(10 * TOPICS - 1)).is_empty());
        assert!(traces.of(&topic(1)).is_empty());
        let generations = traces.0.lock();
        assert!(generations.recent.len() + generations.older.len() <= 2 * TOPICS);
    }

    #[test]
    fn of_many_events_at_once_some_are_noted() {
        let traces = Traces::default();
        let topics = vec![topic(1); 64];
        traces.note(topics.iter(), &Step::Taken);
        assert_eq!(traces.of(&topic(1)).len(), SAMPLE);
    }

    #[test]
    fn a_long_error_is_cut_between_two_characters() {
        let Step::Failed { error, .. } = Step::failed("a".into(), &"ü€".repeat(100)) else {
            unreachable!()
        };
        assert!(error.len() <= ERROR_BYTES && error.len() > ERROR_BYTES - 4);
    }
}
