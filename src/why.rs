//! What became of the last events on a topic, and why nothing came out, from what all rooms know.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::apps::{AppInfo, AppState, Apps};
use crate::broker::{Broker, SubscriptionInfo};
use crate::dead_letters::{DeadLetterInfo, DeadLetters, Reason};
use crate::event::{Lane, Topic, TopicFilter, matches};
use crate::journal::Journal;
use crate::mappings::{self, Mappings, OutputStatus};
use crate::pipeline::{Dedup, Pipeline, Pressure, Routes, Step, Traced};

/// Subscriptions that are looked at.
const MAX_SUBSCRIPTIONS: usize = 100_000;

/// Subscribers and dead letters that are named.
const SHOWN: usize = 5;

/// Whom to ask.
pub struct Why {
    pub routes: Arc<Routes>,
    pub pipeline: Arc<Pipeline>,
    pub apps: Apps,
    pub mappings: Mappings,
    pub broker: Arc<Broker>,
    pub dead_letters: Arc<DeadLetters>,
    pub journal: Option<Journal>,
}

/// The answer, as the admin API has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    pub topic: String,
    /// The place of its rule in `pipeline.rules_file`, from 1 on.
    pub rule: Option<usize>,
    pub lane: Lane,
    pub durable: bool,
    /// `content`, or the name of the property with the id.
    pub dedup: Option<String>,
    /// Apps that subscribe to it.
    pub apps: Vec<Taker>,
    /// Apps that may publish it.
    pub publishers: Vec<String>,
    /// Mappings that read it.
    pub mappings: Vec<String>,
    /// The output of a mapping that goes there.
    pub mapped: Option<OutputStatus>,
    /// MQTT clients that are subscribed to it.
    pub subscribers: usize,
    /// Some of them.
    pub some_subscribers: Vec<SubscriptionInfo>,
    /// The last things that happened to its events, oldest first. Of many at once some are left out.
    pub steps: Vec<Traced>,
    /// The last ones of its topic, oldest first.
    pub dead_letters: Vec<DeadLetterInfo>,
    /// What follows from all that, in sentences.
    pub because: Vec<String>,
}

/// An app that subscribes to the topic.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Taker {
    pub app: String,
    pub state: String,
    pub reason: Option<String>,
    /// The filter that matches.
    pub filter: String,
    /// Events that wait for it, of all topics.
    pub queued: u64,
}

impl Why {
    /// May block for a moment.
    pub fn answer(&self, topic: &Topic) -> Explanation {
        let name = topic.as_str();
        let routes = self.routes.load_full();
        let found = routes.rules.find(name);
        let dedup = found.rule.and_then(|rule| rule.dedup.as_ref());
        let apps = self.apps.list();
        let mut subscribers = self.broker.subscriptions(None, MAX_SUBSCRIPTIONS).items;
        subscribers.retain(|subscription| matches(&subscription.filter, name));
        let exact = TopicFilter::new(name).ok();
        let letters = self.dead_letters.list(exact.as_ref(), SHOWN);
        let mut explanation = Explanation {
            topic: name.to_owned(),
            rule: found.number,
            lane: found.lane,
            durable: found.durable && self.journal.is_some(),
            dedup: dedup.map(|dedup| match dedup {
                Dedup::Content => "content".to_owned(),
                Dedup::Id(name) => name.clone(),
            }),
            apps: apps.iter().filter_map(|app| Taker::of(app, name)).collect(),
            publishers: apps
                .iter()
                .filter(|app| app.may_publish(name))
                .map(|app| app.name.clone())
                .collect(),
            mappings: self.mappings.readers_of(name),
            mapped: self.mappings.output_on(name),
            subscribers: subscribers.len(),
            some_subscribers: subscribers.into_iter().take(SHOWN).collect(),
            steps: self.routes.traces.of(topic),
            dead_letters: letters
                .iter()
                .map(|(id, letter)| letter.info(*id))
                .collect(),
            because: Vec::new(),
        };
        let journal_error = self
            .journal
            .as_ref()
            .and_then(|journal| journal.status().error);
        let window_ms = found.window.age.as_millis();
        explanation.conclude(self.pipeline.pressure(), journal_error, window_ms);
        explanation
    }
}

/// Why a lane or an app drops an event.
pub(crate) fn meaning(reason: Reason) -> &'static str {
    match reason {
        Reason::QueueFull => "there was no room for it",
        Reason::TooLarge => "it is too large",
        Reason::Shed => "the realtime lane could not keep up",
        Reason::Looped => "it came through too many apps",
        Reason::Unreadable => "no mapping could read it",
        Reason::NotShipped => "the other side of a link does not take it",
        other => other.as_str(),
    }
}

/// Of an app, or of the mappings, which are noted together.
fn who(name: &str) -> String {
    match name {
        mappings::SOURCE => "a mapping".to_owned(),
        app => format!("the app {app}"),
    }
}

impl Taker {
    fn of(app: &AppInfo, topic: &str) -> Option<Taker> {
        let filter = app.subscription_to(topic)?;
        Some(Taker {
            app: app.name.clone(),
            state: app.state.as_str().to_owned(),
            reason: app.reason.clone(),
            filter: filter.to_owned(),
            queued: app.counters.queued,
        })
    }

    fn runs(&self) -> bool {
        self.state == AppState::Running.as_str()
    }
}

impl Explanation {
    fn conclude(&mut self, pressure: Pressure, journal_error: Option<String>, window_ms: u128) {
        let mut because = Vec::new();
        if self.steps.is_empty() {
            because.push(
                "no event on this topic was seen since the start, or it is so long ago that it was forgotten"
                    .to_owned(),
            );
        }
        if let Some(mapped) = &self.mapped {
            let explanation = &mapped.explanation;
            because.push(format!(
                "the mapping {} makes it ({}): {}",
                mapped.mapping, explanation.path, explanation.state
            ));
        }
        if self.apps.is_empty() && self.mappings.is_empty() {
            because.push("no app subscribes to it, and no mapping reads it".to_owned());
        }
        for app in self.apps.iter().filter(|app| !app.runs()) {
            let reason = app.reason.as_ref().map(|reason| format!(": {reason}"));
            because.push(format!(
                "the app {} is {}{}",
                app.app,
                app.state,
                reason.unwrap_or_default()
            ));
        }
        if let Some(error) = journal_error.filter(|_| self.durable) {
            because.push(format!(
                "the journal can't be written, so that its publishers get no acknowledgement: {error}"
            ));
        }
        let stands_back = match self.lane {
            Lane::Realtime => false,
            Lane::Transactional => pressure >= Pressure::Critical,
            Lane::Batch => pressure >= Pressure::Degraded,
        };
        if stands_back {
            because.push(format!(
                "the {} lane stands back, because the realtime lane can't keep up ({})",
                self.lane.as_str(),
                pressure.as_str()
            ));
        }
        because.extend(
            self.steps
                .last()
                .map(|last| self.meaning(&last.step, window_ms)),
        );
        if self.subscribers == 0 {
            because.push("no MQTT client is subscribed to it".to_owned());
        }
        if let Some(letter) = self.dead_letters.last() {
            because.push(format!(
                "it has dead letters, the last one for {}: {}",
                letter.source,
                letter.reason.as_str()
            ));
        }
        self.because = because;
    }

    /// What the last step says.
    fn meaning(&self, step: &Step, window_ms: u128) -> String {
        match step {
            Step::Taken if self.lane == Lane::Batch => {
                format!(
                    "the last event waits in a window, for {window_ms} ms at most, or for its app"
                )
            }
            Step::Taken => "the last event waits for its app".to_owned(),
            Step::Unwanted => "when the last event came, no app wanted it".to_owned(),
            Step::Duplicate => "the last event was a duplicate, and went to no app".to_owned(),
            Step::Dropped { by, reason } => {
                format!("the last event was dropped: {by}, {}", meaning(*reason))
            }
            Step::Handled {
                app,
                published: 0,
                refused: 0,
                ..
            } => format!(
                "{} has handled the last event and published nothing",
                who(app)
            ),
            Step::Handled {
                app,
                published,
                refused,
                events,
            } => {
                let refused = match refused {
                    0 => String::new(),
                    refused => format!(
                        ", and was refused {refused} calls (a topic that its manifest does not allow, or a \
                         quota: `headgate app inspect {app}`)"
                    ),
                };
                format!(
                    "{} has handled the last event, with {} others, and published {published} events then{refused}",
                    who(app),
                    events - 1
                )
            }
            Step::Failed { app, error } => {
                format!("{} has failed with the last event: {error}", who(app))
            }
            Step::Published { app } => format!("the last event was published by {}", who(app)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explanation(lane: Lane, steps: Vec<Step>) -> Explanation {
        Explanation {
            topic: "a/b".into(),
            rule: None,
            lane,
            durable: true,
            dedup: None,
            apps: vec![],
            publishers: vec![],
            mappings: vec![],
            mapped: None,
            subscribers: 0,
            some_subscribers: vec![],
            steps: steps
                .into_iter()
                .map(|step| Traced { time_ms: 0, step })
                .collect(),
            dead_letters: vec![],
            because: vec![],
        }
    }

    fn taker(state: AppState) -> Taker {
        Taker {
            app: "relay".into(),
            state: state.as_str().into(),
            reason: Some("it was told to".into()),
            filter: "a/#".into(),
            queued: 0,
        }
    }

    fn because(mut explanation: Explanation, pressure: Pressure, error: Option<&str>) -> String {
        explanation.conclude(pressure, error.map(str::to_owned), 500);
        explanation.because.join("\n")
    }

    #[test]
    fn it_says_what_stands_in_the_way() {
        let nothing = because(
            explanation(Lane::Transactional, vec![]),
            Pressure::Healthy,
            None,
        );
        assert!(nothing.contains("no event on this topic"), "{nothing}");
        assert!(
            nothing.contains("no app subscribes to it, and no mapping"),
            "{nothing}"
        );
        assert!(nothing.contains("no MQTT client"), "{nothing}");

        let paused = Explanation {
            apps: vec![taker(AppState::Paused)],
            subscribers: 1,
            ..explanation(Lane::Transactional, vec![Step::Taken])
        };
        assert_eq!(
            because(paused, Pressure::Healthy, None),
            "the app relay is paused: it was told to\nthe last event waits for its app"
        );

        let back = explanation(Lane::Batch, vec![Step::Taken]);
        let back = because(back, Pressure::Degraded, Some("No space left"));
        assert!(back.contains("the batch lane stands back"), "{back}");
        assert!(back.contains("for 500 ms at most"), "{back}");
        assert!(back.contains("No space left"), "{back}");
    }

    #[test]
    fn it_says_what_the_last_step_means() {
        let handled = |published, refused| Step::Handled {
            app: "relay".into(),
            events: 3,
            published,
            refused,
        };
        for (step, expected) in [
            (handled(0, 0), "published nothing"),
            (handled(2, 0), "with 2 others, and published 2 events then"),
            (handled(0, 1), "was refused 1 calls"),
            (
                Step::failed("relay".into(), "no"),
                "the app relay has failed with the last event: no",
            ),
            (Step::Duplicate, "a duplicate"),
            (
                Step::Dropped {
                    by: "realtime".into(),
                    reason: Reason::QueueFull,
                },
                "dropped: realtime, there was no room for it",
            ),
            (
                Step::Published {
                    app: "relay".into(),
                },
                "published by the app relay",
            ),
        ] {
            let text = because(
                explanation(Lane::Realtime, vec![Step::Taken, step]),
                Pressure::Emergency,
                None,
            );
            assert!(text.contains(expected), "{text}");
            assert!(!text.contains("stands back"), "{text}");
        }
    }
}
