//! What clients subscribe to.

use std::fmt;

use bytestring::ByteString;
use rumqttd::protocol::QoS;

use crate::event::{FilterError, TopicFilter};

/// Names a subscription within its session: a topic filter, alone or in a share group.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubscriptionKey {
    /// The group's name: its members share the messages of the filter among them (MQTT 5.0, 4.8.2).
    pub group: Option<ByteString>,
    pub filter: TopicFilter,
}

/// Why SUBSCRIBE can't have a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubscriptionError {
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error("a shared subscription is written $share/GROUP/FILTER, with no wildcard in GROUP")]
    Group,
}

impl SubscriptionKey {
    /// Reads what stands in SUBSCRIBE and UNSUBSCRIBE.
    pub fn parse(text: impl Into<ByteString>) -> Result<SubscriptionKey, SubscriptionError> {
        let text = text.into();
        let (group, filter) = match text.strip_prefix("$share/") {
            // A group's name alone is no shared subscription, but no other one either.
            None if &*text == "$share" => return Err(SubscriptionError::Group),
            None => (None, text.clone()),
            Some(rest) => {
                let (group, filter) = rest.split_once('/').ok_or(SubscriptionError::Group)?;
                if group.is_empty() || group.contains(['+', '#']) {
                    return Err(SubscriptionError::Group);
                }
                (Some(text.slice_ref(group)), text.slice_ref(filter))
            }
        };
        Ok(SubscriptionKey {
            group,
            filter: TopicFilter::new(filter)?,
        })
    }
}

impl fmt::Display for SubscriptionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(group) = &self.group {
            write!(f, "$share/{group}/")?;
        }
        self.filter.fmt(f)
    }
}

/// How a subscription's messages are to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubscriptionOptions {
    pub qos: QoS,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub id: Option<u32>,
}

/// One granted subscription.
#[derive(Debug, Clone)]
pub struct Subscription {
    pub key: SubscriptionKey,
    pub options: SubscriptionOptions,
    /// Retained messages are to be sent now.
    pub send_retained: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_subscription_has_a_group_and_a_filter() {
        let key = SubscriptionKey::parse("$share/line 1/plant/+/temperature").unwrap();
        assert_eq!(key.group.as_deref(), Some("line 1"));
        assert_eq!(key.filter.as_str(), "plant/+/temperature");
        assert_eq!(key.to_string(), "$share/line 1/plant/+/temperature");
        let key = SubscriptionKey::parse("$share/g//").unwrap();
        assert_eq!(key.filter.as_str(), "/");
        let key = SubscriptionKey::parse("$shared/a").unwrap();
        assert_eq!((key.group, key.filter.as_str()), (None, "$shared/a"));
    }

    #[test]
    fn groups_that_are_none_are_refused() {
        for text in [
            "$share",
            "$share/",
            "$share/g",
            "$share//a",
            "$share/+/a",
            "$share/g#/a",
        ] {
            let error = SubscriptionKey::parse(text).unwrap_err();
            assert_eq!(error, SubscriptionError::Group, "{text}");
        }
        for text in ["$share/g/", "$share/g/a#", ""] {
            let error = SubscriptionKey::parse(text).unwrap_err();
            assert!(matches!(error, SubscriptionError::Filter(_)), "{text}");
        }
    }
}
