//! The rule table: which lane the events of a topic take, whether they are on disk before they are
//! acknowledged, what tells their duplicates, and how often a batch with them is tried again.
//!
//! `docs/lanes.md` describes the file.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::windows::WindowLimits;
use crate::event::{Lane, TopicFilter, TopicTrie};
use crate::regular_file::{FileError, Flaw, line_of, parse_toml, read_and_parse};

/// More than anybody writes by hand.
const MAX_RULES: usize = 10_000;
const MAX_RETRIES: u8 = 20;
const MAX_WINDOW_EVENTS: usize = 4_096;
const MAX_WINDOW_BYTES: usize = 16 << 20;
const MAX_WINDOW_AGE: Duration = Duration::from_secs(3_600);

/// By what a duplicate is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dedup {
    /// Topic and payload.
    Content,
    /// Topic and the MQTT 5 user property of this name, or the number of a frame; the content, if there is
    /// none.
    Id(String),
}

/// How the events of some topics are treated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub topics: Vec<TopicFilter>,
    pub lane: Lane,
    pub durable: bool,
    pub dedup: Option<Dedup>,
    pub retries: Option<u8>,
    pub window: WindowLimits,
}

/// All rules. The first one that matches counts.
#[derive(Debug, Default)]
pub struct Rules {
    rules: Vec<Rule>,
    by_topic: TopicTrie<usize>,
    /// Durable whatever the rules say.
    durable: Vec<TopicFilter>,
    /// Of events for which there is no rule, and of rules that say nothing of windows.
    window: WindowLimits,
}

/// What holds for a topic.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// Its place in the file, from 1 on. None: there is no rule for it.
    pub number: Option<usize>,
    pub rule: Option<&'a Rule>,
    pub lane: Lane,
    pub durable: bool,
    pub window: WindowLimits,
}

impl Rules {
    /// Without a rule, all events are transactional; those on topics of `durable` are durable.
    pub fn new(rules: Vec<Rule>, durable: Vec<TopicFilter>, window: WindowLimits) -> Rules {
        let mut by_topic = TopicTrie::default();
        for (index, rule) in rules.iter().enumerate() {
            for filter in &rule.topics {
                by_topic.insert(filter, index);
            }
        }
        Rules {
            rules,
            by_topic,
            durable,
            window,
        }
    }

    /// Reads the rules of a file. What it leaves open is as in `window`.
    pub fn read(path: &Path, window: WindowLimits) -> Result<Vec<Rule>, FileError> {
        let if_missing = "make it, or set the key to \"\"";
        read_and_parse(path, if_missing, |contents| parse(contents, window))
    }

    /// Whether any event is to be on disk before it is acknowledged.
    pub fn want_journal(&self) -> bool {
        !self.durable.is_empty() || self.rules.iter().any(|rule| rule.durable)
    }

    /// Whether any rule looks for duplicates.
    pub fn want_dedup(&self) -> bool {
        self.rules.iter().any(|rule| rule.dedup.is_some())
    }

    /// By what the rule with this number tells duplicates.
    pub(super) fn dedup(&self, number: usize) -> Option<&Dedup> {
        self.rules.get(number - 1)?.dedup.as_ref()
    }

    /// What holds for a topic.
    pub fn find(&self, topic: &str) -> Found<'_> {
        let mut first = None;
        self.by_topic.for_each_match(topic, |index| {
            first = Some(first.map_or(*index, |first: usize| first.min(*index)));
        });
        let rule = first.map(|index| &self.rules[index]);
        Found {
            number: first.map(|index| index + 1),
            rule,
            lane: rule.map_or(Lane::default(), |rule| rule.lane),
            durable: rule.is_some_and(|rule| rule.durable)
                || self.durable.iter().any(|filter| filter.matches(topic)),
            window: rule.map_or(self.window, |rule| rule.window),
        }
    }
}

/// The file as it stands there.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RulesFile {
    #[serde(default)]
    rule: Vec<Spanned<RuleEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleEntry {
    topics: Vec<Spanned<String>>,
    #[serde(default)]
    lane: Lane,
    durable: Option<bool>,
    dedup: Option<Spanned<DedupEntry>>,
    dedup_property: Option<Spanned<String>>,
    retries: Option<Spanned<u64>>,
    window_events: Option<Spanned<u64>>,
    window_bytes: Option<Spanned<u64>>,
    window_age_ms: Option<Spanned<u64>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum DedupEntry {
    Off,
    Content,
    Id,
}

/// A flaw and where it is.
type At = (Range<usize>, String);

fn parse(contents: &[u8], window: WindowLimits) -> Result<Vec<Rule>, Flaw> {
    let file: RulesFile = parse_toml(contents)?;
    if file.rule.len() > MAX_RULES {
        return Err(Flaw {
            line: None,
            reason: format!("more than {MAX_RULES} rules"),
        });
    }
    let rules = file.rule.into_iter().map(|entry| {
        let span = entry.span();
        rule(entry.into_inner(), span, window).map_err(|(span, reason)| Flaw {
            line: Some(line_of(contents, span.start)),
            reason,
        })
    });
    rules.collect()
}

fn rule(entry: RuleEntry, span: Range<usize>, window: WindowLimits) -> Result<Rule, At> {
    if entry.topics.is_empty() {
        let reason = "topics is empty, so the rule is about nothing; [\"#\"] stands for all topics";
        return Err((span, reason.into()));
    }
    let topics = entry.topics.into_iter().map(|topic| {
        let span = topic.span();
        let filter = TopicFilter::new(topic.into_inner());
        filter.map_err(|error| (span, error.to_string()))
    });
    let windows = [
        &entry.window_events,
        &entry.window_bytes,
        &entry.window_age_ms,
    ];
    if let Some(key) = windows.into_iter().flatten().next()
        && entry.lane != Lane::Batch
    {
        let reason = format!(
            "only the batch lane has windows, and this rule's lane is {}; leave the window_ keys out, \
             or set lane = \"batch\"",
            entry.lane.as_str()
        );
        return Err((key.span(), reason));
    }
    Ok(Rule {
        topics: topics.collect::<Result<_, _>>()?,
        lane: entry.lane,
        durable: entry.durable.unwrap_or(entry.lane == Lane::Transactional),
        dedup: dedup(entry.dedup, entry.dedup_property)?,
        retries: number("retries", entry.retries, 0, MAX_RETRIES.into())?.map(|n| n as u8),
        window: WindowLimits {
            events: number(
                "window_events",
                entry.window_events,
                1,
                MAX_WINDOW_EVENTS as u64,
            )?
            .map_or(window.events, |n| n as usize),
            bytes: number(
                "window_bytes",
                entry.window_bytes,
                1,
                MAX_WINDOW_BYTES as u64,
            )?
            .map_or(window.bytes, |n| n as usize),
            age: number(
                "window_age_ms",
                entry.window_age_ms,
                1,
                MAX_WINDOW_AGE.as_millis() as u64,
            )?
            .map_or(window.age, Duration::from_millis),
        },
    })
}

fn dedup(
    kind: Option<Spanned<DedupEntry>>,
    property: Option<Spanned<String>>,
) -> Result<Option<Dedup>, At> {
    let kind = kind.map_or(DedupEntry::Off, Spanned::into_inner);
    match (kind, property) {
        (DedupEntry::Id, None) => Ok(Some(Dedup::Id("id".into()))),
        (DedupEntry::Id, Some(name)) if name.get_ref().is_empty() => Err((
            name.span(),
            "dedup_property is empty; name a user property".into(),
        )),
        (DedupEntry::Id, Some(name)) => Ok(Some(Dedup::Id(name.into_inner()))),
        (_, Some(name)) => Err((
            name.span(),
            "dedup_property is for dedup = \"id\" only; leave one out".into(),
        )),
        (DedupEntry::Content, None) => Ok(Some(Dedup::Content)),
        (DedupEntry::Off, None) => Ok(None),
    }
}

fn number(key: &str, value: Option<Spanned<u64>>, min: u64, max: u64) -> Result<Option<u64>, At> {
    match value {
        Some(value) if !(min..=max).contains(value.get_ref()) => Err((
            value.span(),
            format!("{key} is {}, and must be {min} to {max}", value.get_ref()),
        )),
        value => Ok(value.map(Spanned::into_inner)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WINDOW: WindowLimits = WindowLimits {
        events: 1000,
        bytes: 256 << 10,
        age: Duration::from_secs(5),
    };

    fn rules(text: &str) -> Rules {
        Rules::new(parse(text.as_bytes(), WINDOW).unwrap(), Vec::new(), WINDOW)
    }

    fn flaw(text: &str) -> (usize, String) {
        let flaw = parse(text.as_bytes(), WINDOW).unwrap_err();
        (flaw.line.unwrap(), flaw.reason)
    }

    #[test]
    fn the_first_rule_that_matches_counts() {
        let rules = rules(
            r#"
            [[rule]]
            topics = ["plant/+/alarm", "alarms/#"]
            lane = "realtime"

            [[rule]]
            topics = ["plant/#"]
            lane = "batch"
            window_age_ms = 250
            "#,
        );
        let lane = |topic| rules.find(topic).lane;
        assert_eq!(lane("plant/1/alarm"), Lane::Realtime);
        assert_eq!(lane("alarms"), Lane::Realtime);
        assert_eq!(lane("plant/1/temperature"), Lane::Batch);
        assert_eq!(lane("other"), Lane::Transactional);
        assert_eq!(rules.find("other").number, None);
        let batch = rules.find("plant/1");
        assert_eq!(batch.number, Some(2));
        assert_eq!(batch.window.age, Duration::from_millis(250));
        assert_eq!(batch.window.events, WINDOW.events);
    }

    #[test]
    fn a_transactional_rule_is_durable_unless_it_says_otherwise() {
        let rules = rules(
            r#"
            [[rule]]
            topics = ["a"]
            [[rule]]
            topics = ["b"]
            durable = false
            [[rule]]
            topics = ["c"]
            lane = "realtime"
            [[rule]]
            topics = ["d"]
            lane = "batch"
            durable = true
            "#,
        );
        let durable = ["a", "b", "c", "d", "e"].map(|topic| rules.find(topic).durable);
        assert_eq!(durable, [true, false, false, true, false]);
        assert!(rules.want_journal() && !rules.want_dedup());
    }

    #[test]
    fn topics_of_the_journal_are_durable_whatever_the_rules_say() {
        let filter = TopicFilter::new("a/#").unwrap();
        let rule = parse(b"[[rule]]\ntopics = ['a/b']\ndurable = false", WINDOW).unwrap();
        let rules = Rules::new(rule, vec![filter], WINDOW);
        assert!(rules.find("a/b").durable && !rules.find("b").durable);
        assert!(rules.want_journal());
    }

    #[test]
    fn duplicates_are_told_by_content_or_by_an_id() {
        let dedup = |text: &str| {
            let rules = rules(&format!("[[rule]]\ntopics = ['a']\n{text}"));
            rules.find("a").rule.unwrap().dedup.clone()
        };
        assert_eq!(dedup(""), None);
        assert_eq!(dedup("dedup = 'off'"), None);
        assert_eq!(dedup("dedup = 'content'"), Some(Dedup::Content));
        assert_eq!(dedup("dedup = 'id'"), Some(Dedup::Id("id".into())));
        assert_eq!(
            dedup("dedup = 'id'\ndedup_property = 'message-id'"),
            Some(Dedup::Id("message-id".into()))
        );
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, line, reason) in [
            ("[[rule]]\ntopics = []", 1, "topics is empty"),
            (
                "[[rule]]\ntopics = ['a/#/b']",
                2,
                "`#` must be the last level",
            ),
            ("[[rule]]\nlane = 'realtime'", 1, "missing field `topics`"),
            (
                "[[rule]]\ntopics = ['a']\nlane = 'fast'",
                3,
                "unknown variant `fast`",
            ),
            (
                "[[rule]]\ntopics = ['a']\nlanes = 'batch'",
                3,
                "unknown field `lanes`",
            ),
            ("[[rules]]\ntopics = ['a']", 1, "unknown field `rules`"),
            (
                "[[rule]]\ntopics = ['a']\nretries = 21",
                3,
                "retries is 21, and must be 0 to 20",
            ),
            (
                "[[rule]]\ntopics = ['a']\nwindow_events = 5",
                3,
                "only the batch lane has windows",
            ),
            (
                "[[rule]]\ntopics = ['a']\nlane = 'batch'\nwindow_age_ms = 0",
                4,
                "must be 1 to 3600000",
            ),
            (
                "[[rule]]\ntopics = ['a']\ndedup_property = 'x'",
                3,
                "for dedup = \"id\" only",
            ),
            (
                "[[rule]]\ntopics = ['a']\ndedup = 'id'\ndedup_property = ''",
                4,
                "is empty",
            ),
            ("[[rule]\n", 1, ""),
        ] {
            let (found, said) = flaw(text);
            assert_eq!(found, line, "{text}: {said}");
            assert!(said.contains(reason), "{text}: {said}");
        }
        assert!(parse(b"[[rule]]\n\xff", WINDOW).is_err());
    }

    proptest! {
        #[test]
        fn no_file_panics(text in "(\\[\\[rule\\]\\]\n|topics = |lane = |'[a-z/+#]*'|\\[|\\]|[0-9]+|\n|dedup = |,){0,40}") {
            let _ = parse(text.as_bytes(), WINDOW);
        }

        /// The trie finds the rule that trying one after the other finds.
        #[test]
        fn the_rule_that_is_found_is_the_first_that_matches(
            filters in prop::collection::vec("(\\+|a|b)(/(\\+|a|b)){0,2}(/#)?|#", 0..8),
            topic in "(a|b)(/(a|b)){0,3}",
        ) {
            let rule = |filter: &String| Rule {
                topics: vec![TopicFilter::new(filter.clone()).unwrap()],
                lane: Lane::Realtime,
                durable: false,
                dedup: None,
                retries: None,
                window: WINDOW,
            };
            let list: Vec<_> = filters.iter().map(rule).collect();
            let expected = list.iter().position(|rule| rule.topics[0].matches(&topic));
            let rules = Rules::new(list, Vec::new(), WINDOW);
            prop_assert_eq!(rules.find(&topic).number, expected.map(|index| index + 1));
        }
    }
}
