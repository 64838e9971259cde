//! Topic names and topic filters, valid by construction.

use std::fmt;

use bytes::Bytes;
use bytestring::ByteString;

/// Most levels of a topic filter, as in mosquitto. Bounds the depth of a [`super::TopicTrie`], which
/// is walked by recursion.
const MAX_FILTER_LEVELS: usize = 200;

/// Longest topic name or filter that MQTT can carry, in bytes.
const MAX_LEN: usize = 65_535;

/// A topic name: UTF-8, 1 to 65,535 bytes, no NUL, no wildcards. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(ByteString);

/// Why some bytes are no topic name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    #[error("a topic name can't be empty")]
    Empty,
    #[error("a topic name has at most 65535 bytes")]
    TooLong,
    #[error("a topic name must be UTF-8")]
    NotUtf8,
    #[error("a topic name can't contain the NUL character")]
    Nul,
    #[error("a topic name can't contain the wildcards + and #")]
    Wildcard,
}

impl Topic {
    /// Checks `name`; shares its memory.
    pub fn new(name: impl Into<Bytes>) -> Result<Topic, TopicError> {
        let name = name.into();
        if name.is_empty() {
            return Err(TopicError::Empty);
        }
        if name.len() > MAX_LEN {
            return Err(TopicError::TooLong);
        }
        for byte in &name {
            match byte {
                0 => return Err(TopicError::Nul),
                b'+' | b'#' => return Err(TopicError::Wildcard),
                _ => {}
            }
        }
        ByteString::try_from(name)
            .map(Topic)
            .map_err(|_| TopicError::NotUtf8)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether caches by topic should remember it. Long topics are rare, and bound in number they
    /// would still take much memory.
    pub fn is_worth_caching(&self) -> bool {
        const LONG: usize = 256;
        self.0.len() <= LONG
    }

    pub fn as_bytes(&self) -> &Bytes {
        self.0.as_bytes()
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A topic filter: UTF-8, 1 to 65,535 bytes, no NUL, `+` only as a whole level, `#` only as the
/// whole last level.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicFilter(ByteString);

/// Why some text is no topic filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    #[error("a topic filter can't be empty")]
    Empty,
    #[error("a topic filter has at most 65535 bytes")]
    TooLong,
    #[error("a topic filter has at most 200 levels")]
    TooDeep,
    #[error("a topic filter can't contain the NUL character")]
    Nul,
    #[error("`+` must stand alone between two slashes")]
    PartialPlus,
    #[error("`#` must be the last level and stand alone in it")]
    MisplacedHash,
}

impl TopicFilter {
    pub fn new(filter: impl Into<ByteString>) -> Result<TopicFilter, FilterError> {
        let filter = filter.into();
        if filter.is_empty() {
            return Err(FilterError::Empty);
        }
        if filter.len() > MAX_LEN {
            return Err(FilterError::TooLong);
        }
        if filter.contains('\0') {
            return Err(FilterError::Nul);
        }
        if filter.split('/').count() > MAX_FILTER_LEVELS {
            return Err(FilterError::TooDeep);
        }
        let mut levels = filter.split('/').peekable();
        while let Some(level) = levels.next() {
            if level.contains('#') && (level != "#" || levels.peek().is_some()) {
                return Err(FilterError::MisplacedHash);
            }
            if level.contains('+') && level != "+" {
                return Err(FilterError::PartialPlus);
            }
        }
        Ok(TopicFilter(filter))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a message on `topic` goes to a subscription with this filter. A leading wildcard
    /// does not match a topic that starts with `$` (MQTT 5.0, 4.7.2).
    pub fn matches(&self, topic: &str) -> bool {
        let mut levels = topic.split('/');
        for (depth, wanted) in self.0.split('/').enumerate() {
            let starts_with_dollar = depth == 0 && topic.starts_with('$');
            match (wanted, levels.next()) {
                ("#", _) => return !starts_with_dollar,
                ("+", Some(_)) if !starts_with_dollar => {}
                (_, Some(level)) if wanted == level => {}
                _ => return false,
            }
        }
        levels.next().is_none()
    }
}

impl fmt::Display for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The same for a filter as text; one that is none matches nothing.
pub fn matches(filter: &str, topic: &str) -> bool {
    TopicFilter::new(filter).is_ok_and(|filter| filter.matches(topic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topic_names_are_checked() {
        assert!(Topic::new("plant/line1/temperature").is_ok());
        assert!(Topic::new("/").is_ok());
        assert!(Topic::new("ü/temperature").is_ok());
        assert_eq!(Topic::new(""), Err(TopicError::Empty));
        assert_eq!(Topic::new("a/+/b"), Err(TopicError::Wildcard));
        assert_eq!(Topic::new("a/#"), Err(TopicError::Wildcard));
        assert_eq!(Topic::new("a\0"), Err(TopicError::Nul));
        assert_eq!(Topic::new(&b"a/\xff"[..]), Err(TopicError::NotUtf8));
        assert_eq!(Topic::new("a".repeat(65_536)), Err(TopicError::TooLong));
    }

    #[test]
    fn filters_are_checked() {
        for valid in ["#", "+", "/", "a/#", "+/+", "/+", "a/+/b", "a//b", "$SYS/#"] {
            assert!(TopicFilter::new(valid).is_ok(), "{valid}");
        }
        for (invalid, error) in [
            ("", FilterError::Empty),
            ("a#", FilterError::MisplacedHash),
            ("a/#/b", FilterError::MisplacedHash),
            ("#/", FilterError::MisplacedHash),
            ("a+", FilterError::PartialPlus),
            ("a/b+/c", FilterError::PartialPlus),
            ("a\0", FilterError::Nul),
        ] {
            assert_eq!(TopicFilter::new(invalid), Err(error), "{invalid:?}");
        }
    }

    /// The examples of MQTT 5.0, section 4.7.
    pub(crate) const MATCHES: &[(&str, &str, bool)] = &[
        ("sport/tennis/player1/#", "sport/tennis/player1", true),
        (
            "sport/tennis/player1/#",
            "sport/tennis/player1/ranking",
            true,
        ),
        (
            "sport/tennis/player1/#",
            "sport/tennis/player1/score/wimbledon",
            true,
        ),
        ("sport/#", "sport", true),
        ("#", "sport/tennis", true),
        ("#", "$SYS/uptime", false),
        ("+/monitor/Clients", "$SYS/monitor/Clients", false),
        ("$SYS/#", "$SYS/uptime", true),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", true),
        ("sport/tennis/+", "sport/tennis/player1", true),
        ("sport/tennis/+", "sport/tennis/player1/ranking", false),
        ("sport/+", "sport", false),
        ("sport/+", "sport/", true),
        ("+/+", "/finance", true),
        ("/+", "/finance", true),
        ("+", "/finance", false),
        ("ACCOUNTS", "Accounts", false),
        ("a/b", "a/b/c", false),
        ("a/b/c", "a/b", false),
    ];

    #[test]
    fn filters_match_as_the_specification_says() {
        for (filter, topic, expected) in MATCHES {
            let filter = TopicFilter::new(*filter).unwrap();
            assert_eq!(filter.matches(topic), *expected, "{filter} {topic}");
        }
    }
}
