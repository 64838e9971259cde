//! From MQTT topics to NATS subjects and back.
//!
//! `/` becomes `.`. What a token can't have (`.`, `*`, `>`, space, control characters; by
//! <https://docs.nats.io/nats-concepts/subjects>) and `%` is percent-encoded, and an empty level is `%`: each topic
//! has a subject of its own, from which it can be told.

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

use super::links::Place;
use crate::cluster::shards::shard_of;
use crate::event::TopicFilter;

/// What stands in no token as it is.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'.').add(b'*').add(b'>').add(b'%');

/// A token that would begin with it is the server's own.
const SYSTEM: char = '$';

/// A subject in which the topic is still to be filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Before and after the topic. None: it has none.
    before: String,
    after: Option<String>,
    /// Into so many shards the topics are divided; the number of that is a token before the topic.
    shards: Option<u16>,
}

impl Template {
    pub(super) fn parse(text: &str, place: Place<'_>) -> Result<Template, String> {
        let place = Place {
            gateway: &token(place.gateway),
            site: &token(place.site),
        };
        let filled = place.fill(text);
        let flaw = |what: &str| {
            format!(
                "subject {text:?}: {what}; it is made of tokens with . between them, with {{topic}} as one of them"
            )
        };
        let template = match filled.split_once("{topic}") {
            None => Template {
                before: filled.clone(),
                after: None,
                shards: None,
            },
            Some((before, after)) => {
                let is_token = (before.is_empty() || before.ends_with('.'))
                    && (after.is_empty() || after.starts_with('.'));
                if !is_token {
                    return Err(flaw("{topic} is not alone between its dots"));
                }
                Template {
                    before: before.into(),
                    after: Some(after.into()),
                    shards: None,
                }
            }
        };
        let sample = template.fill("topic");
        if sample.contains(['{', '}']) {
            return Err(flaw(
                "only {gateway}, {site} and, once, {topic} can be filled in",
            ));
        }
        if sample.contains(['*', '>']) || !is_filter(&sample) {
            return Err(flaw("not a subject"));
        }
        if sample.starts_with(SYSTEM) {
            return Err(flaw("begins with $, as what is the server's own"));
        }
        Ok(template)
    }

    /// The same, with the number of the topic's shard before the topic.
    pub(super) fn in_shards(self, shards: u16) -> Template {
        Template {
            shards: Some(shards),
            ..self
        }
    }

    /// The subject of a topic.
    pub fn fill(&self, topic: &str) -> String {
        let Some(after) = &self.after else {
            return self.before.clone();
        };
        let mut subject = String::with_capacity(self.before.len() + topic.len() + after.len());
        subject.push_str(&self.before);
        if let Some(shards) = self.shards {
            let shard = shard_of(topic.split('/'), shards);
            subject.push_str(&format!("{shard}."));
        }
        for (index, level) in topic.split('/').enumerate() {
            if index > 0 {
                subject.push('.');
            }
            match level {
                "" => subject.push('%'),
                level => subject.extend(utf8_percent_encode(level, ENCODED)),
            }
        }
        subject.push_str(after);
        subject
    }

    /// Whether the topic can be told from the subject.
    pub fn has_topic(&self) -> bool {
        self.after.is_some()
    }

    /// A filter for all its subjects.
    pub(super) fn covering(&self) -> String {
        match &self.after {
            None => self.before.clone(),
            // Nothing but > stands for several tokens, and nothing comes after it.
            Some(_) => format!("{}>", self.before),
        }
    }
}

/// One token, of whatever text.
pub(super) fn token(text: &str) -> String {
    match text {
        "" => "%".into(),
        text => utf8_percent_encode(text, ENCODED).to_string(),
    }
}

/// The topic whose subject this is, without its first levels. None: there is no such topic.
pub fn topic_of(subject: &str, skip_levels: usize) -> Option<String> {
    let mut levels = Vec::new();
    for token in subject.split('.').skip(skip_levels) {
        match token {
            "%" => levels.push(String::new()),
            token => levels.push(percent_decode_str(token).decode_utf8().ok()?.into_owned()),
        }
    }
    (!levels.is_empty()).then(|| levels.join("/"))
}

/// The filters that match the subjects of just those topics that this filter matches.
pub fn filters_of(filter: &TopicFilter) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    for level in filter.as_str().split('/') {
        match level {
            "+" => tokens.push("*".into()),
            // The level above is meant, too.
            "#" if tokens.is_empty() => return vec![">".into()],
            "#" => return vec![tokens.join("."), format!("{}.>", tokens.join("."))],
            level => tokens.push(token(level)),
        }
    }
    vec![tokens.join(".")]
}

/// Whether this is a subject, with or without wildcards.
pub(super) fn is_filter(text: &str) -> bool {
    let tokens: Vec<&str> = text.split('.').collect();
    let last = tokens.len() - 1;
    tokens.iter().enumerate().all(|(index, token)| {
        let is_wildcard = matches!(*token, "*" | ">");
        let is_legal =
            |part: char| !part.is_whitespace() && !part.is_control() && !"*>".contains(part);
        !token.is_empty()
            && (is_wildcard || token.chars().all(is_legal))
            && (*token != ">" || index == last)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLACE: Place<'static> = Place {
        gateway: "press.7",
        site: "north",
    };

    fn template(text: &str) -> Template {
        Template::parse(text, PLACE).unwrap()
    }

    #[test]
    fn a_topic_has_a_subject() {
        let plain = template("headgate.{gateway}.{topic}");
        assert_eq!(
            plain.fill("plant/oven/1"),
            "headgate.press%2E7.plant.oven.1"
        );
        assert_eq!(
            plain.fill("/a//b.c/d e/*/>/100%"),
            "headgate.press%2E7.%.a.%.b%2Ec.d%20e.%2A.%3E.100%25"
        );
        assert_eq!(plain.covering(), "headgate.press%2E7.>");
        let ended = template("{topic}.of.{site}");
        assert_eq!(ended.fill("a/b"), "a.b.of.north");
        assert_eq!(ended.covering(), ">");
        let fixed = template("all");
        assert_eq!(
            (fixed.fill("a/b"), fixed.has_topic()),
            ("all".into(), false)
        );
    }

    #[test]
    fn the_shard_of_a_topic_stands_before_it() {
        let sharded = template("site.{gateway}.{topic}").in_shards(16);
        let shard = shard_of(["plant", "oven 1"], 16);
        assert_eq!(
            sharded.fill("plant/oven 1"),
            format!("site.press%2E7.{shard}.plant.oven%201")
        );
        assert_eq!(sharded.covering(), "site.press%2E7.>");
    }

    #[test]
    fn what_is_no_template_is_told() {
        for text in [
            "",
            "a..b",
            "a b",
            "a.{topic}x",
            "a.{topic}.{topic}",
            "a.{other}",
            "a.*",
            "a.>",
            "$SYS.{topic}",
            "a.",
        ] {
            let said = Template::parse(text, PLACE).unwrap_err();
            assert!(said.contains(&format!("subject {text:?}")), "{said}");
        }
    }

    #[test]
    fn filters_are_told_from_what_is_none() {
        for text in ["a", "a.*.b", "a.>", ">", "*"] {
            assert!(is_filter(text), "{text}");
        }
        for text in ["", ".", "a.", ">.a", "a b", "a.b*", "a\u{0}"] {
            assert!(!is_filter(text), "{text}");
        }
    }

    proptest! {
        #[test]
        fn the_filters_of_a_topic_filter_match_what_it_matches(
            topic in "[ab+/. ]{1,8}",
            filter in "([ab. ]|\\+)(/([ab. ]|\\+)){0,3}(/#)?",
        ) {
            let topic = topic.replace('+', "");
            prop_assume!(!topic.is_empty());
            let filter = TopicFilter::new(filter).unwrap();
            let subject = template("{topic}").fill(&topic);
            let matched = filters_of(&filter).iter().any(|filter| {
                super::super::stream::covers(std::slice::from_ref(filter), &subject)
            });
            prop_assert_eq!(matched, filter.matches(&topic), "{} {:?} {}", topic, filter, subject);
        }

        #[test]
        fn the_topic_can_be_told_from_its_subject(topic in "[^#+\u{0}]{1,40}") {
            let subject = template("a.{topic}").fill(&topic);
            prop_assert!(is_filter(&subject) && !subject.contains(['*', '>']), "{}", subject);
            prop_assert_eq!(topic_of(&subject, 1), Some(topic));
        }
    }
}
