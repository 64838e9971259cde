//! What lies in the bucket: under each key a [`Claim`] as JSON, told in `docs/cluster.md`.

use std::fmt::Write as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// No claim blocks its key for longer, whatever it says.
pub const LONGEST_TTL: Duration = Duration::from_secs(60);

/// Who holds a key, and for how long after each write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    pub gateway: String,
    /// Random, new at each start: two gateways of one name are two instances.
    pub instance: String,
    /// Others wait this long after they have seen the last change.
    pub ttl_ms: u64,
    /// The revision with which the key was acquired; none in the write that acquires it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<u64>,
    /// The holder is done with it: nobody has to wait.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub released: bool,
    /// In the claim of a member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<About>,
}

/// What a member tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The machine, so that two gateways of one name can be found.
    pub host: String,
    /// All members must divide topics by the same number.
    pub shards: u16,
    /// What it runs where it has the right to. None: it doesn't say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runs: Option<Vec<String>>,
}

impl Claim {
    pub(super) fn new(gateway: &str, instance: &str, ttl: Duration) -> Claim {
        Claim {
            gateway: gateway.into(),
            instance: instance.into(),
            ttl_ms: ttl.as_millis() as u64,
            token: None,
            released: false,
            member: None,
        }
    }

    /// Marks a key that was missing.
    pub(super) fn of_nobody(ttl: Duration) -> Claim {
        Claim::new("", "", ttl)
    }

    pub(super) fn is_of_nobody(&self) -> bool {
        self.instance.is_empty()
    }

    pub(super) fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl_ms).min(LONGEST_TTL)
    }

    /// What somebody else has written there is the claim of nobody that we know, for the longest time.
    pub(super) fn read(json: &[u8]) -> Claim {
        serde_json::from_slice(json).unwrap_or_else(|_| Claim::of_nobody(LONGEST_TTL))
    }

    pub(super) fn write(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a claim has nothing that JSON can't say")
    }
}

/// What a key is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    Leader,
    Shard(u16),
    Member { gateway: String, instance: String },
}

impl Key {
    pub(super) fn name(&self) -> String {
        match self {
            Key::Leader => "leader".into(),
            Key::Shard(shard) => format!("shard.{shard}"),
            Key::Member { gateway, instance } => format!("member.{}.{instance}", quoted(gateway)),
        }
    }

    /// None for a key that is not ours.
    pub(super) fn of(name: &str, claim: Option<&Claim>) -> Option<Key> {
        match name.split_once('.') {
            None if name == "leader" => Some(Key::Leader),
            Some(("shard", shard)) => shard.parse().ok().map(Key::Shard),
            Some(("member", _)) => {
                let claim = claim?;
                let key = Key::Member {
                    gateway: claim.gateway.clone(),
                    instance: claim.instance.clone(),
                };
                (key.name() == name).then_some(key)
            }
            _ => None,
        }
    }
}

/// `name` with what a key may not have as `=` and two hex digits.
pub(crate) fn quoted(name: &str) -> String {
    let mut quoted = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => quoted.push(byte as char),
            _ => write!(quoted, "={byte:02X}").expect("a string takes everything"),
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_read_as_it_was_written() {
        let mut claim = Claim::new("a", "01", Duration::from_secs(5));
        assert_eq!(
            claim.write(),
            br#"{"gateway":"a","instance":"01","ttl_ms":5000}"#
        );
        claim.token = Some(7);
        claim.released = true;
        claim.member = Some(About {
            host: "h".into(),
            shards: 8,
            runs: Some(vec!["keeper".into()]),
        });
        assert_eq!(Claim::read(&claim.write()), claim);
    }

    #[test]
    fn what_is_no_claim_blocks_the_key_for_a_bounded_time() {
        assert_eq!(Claim::read(b"{}").ttl(), LONGEST_TTL);
        let ages = br#"{"gateway":"a","instance":"01","ttl_ms":99999999999}"#;
        assert_eq!(Claim::read(ages).ttl(), LONGEST_TTL);
    }

    #[test]
    fn each_key_has_a_name_of_which_it_can_be_told() {
        let claim = Claim::new("line 1.é", "01", Duration::ZERO);
        let member = Key::Member {
            gateway: claim.gateway.clone(),
            instance: claim.instance.clone(),
        };
        assert_eq!(member.name(), "member.line=201=2E=C3=A9.01");
        for key in [member, Key::Leader, Key::Shard(3)] {
            assert_eq!(Key::of(&key.name(), Some(&claim)), Some(key));
        }
        for name in ["", "shard.x", "shard.70000", "member.b.01", "leader.2"] {
            assert_eq!(Key::of(name, Some(&claim)), None, "{name}");
        }
    }
}
