//! Which gateway does the work for which topics: topics are divided into shards, each shard has one heir
//! among the members (rendezvous hashing: when one joins or leaves, only its share moves), and the heir
//! gets the shard's lease. Who is the heir no more releases it; so at most one acts for a shard, even
//! while members differ about who is in.

use super::claim::{Claim, Key};
use super::clock::Moment;
use super::lease::{Lease, Timing};

pub const MOST_SHARDS: u16 = 1024;

/// The shard of a topic, from the tokens of its subject one after the other: what a server makes of
/// `{{partition(shards, 1, 2, …)}}` (32-bit FNV-1a, `server/subject_transform.go` of nats-server).
pub fn shard_of<T: AsRef<[u8]>>(tokens: impl IntoIterator<Item = T>, shards: u16) -> u16 {
    const OFFSET: u32 = 0x811c_9dc5;
    const PRIME: u32 = 0x0100_0193;
    let hash = tokens.into_iter().fold(OFFSET, |hash, token| {
        token.as_ref().iter().fold(hash, |hash, byte| {
            (hash ^ u32::from(*byte)).wrapping_mul(PRIME)
        })
    });
    (hash % u32::from(shards.max(1))) as u16
}

/// Who of the members is to have a shard.
fn heir<'a>(shard: u16, members: &[&'a str]) -> Option<&'a str> {
    let weight = |member: &str| {
        let hash = blake3::Hasher::new()
            .update(&shard.to_le_bytes())
            .update(member.as_bytes())
            .finalize();
        *hash.as_bytes()
    };
    members.iter().copied().max_by_key(|member| weight(member))
}

/// The leases of all shards.
#[derive(Debug)]
pub struct Shards {
    leases: Vec<Lease>,
    gateway: String,
    /// Those among whom the shards were divided last; nobody if this gateway is to have none.
    members: Vec<String>,
}

impl Shards {
    pub fn new(timing: Timing, claim: &Claim, shards: u16, seed: u64) -> Shards {
        let lease = |shard| Lease::new(timing, claim.clone(), seed ^ u64::from(shard));
        Shards {
            leases: (0..shards.min(MOST_SHARDS)).map(lease).collect(),
            gateway: claim.gateway.clone(),
            members: Vec::new(),
        }
    }

    /// Divides the shards among these, of which this gateway is one, or not.
    pub fn divide(&mut self, members: &[&str]) {
        if self.members == members {
            return;
        }
        self.members = members.iter().map(|member| member.to_string()).collect();
        for (shard, lease) in self.leases.iter_mut().enumerate() {
            lease.want(heir(shard as u16, members) == Some(&self.gateway));
        }
    }

    pub fn lease(&mut self, shard: u16) -> Option<&mut Lease> {
        self.leases.get_mut(usize::from(shard))
    }

    pub fn leases(&self) -> &[Lease] {
        &self.leases
    }

    pub fn leases_mut(&mut self) -> impl Iterator<Item = (Key, &mut Lease)> {
        self.leases
            .iter_mut()
            .enumerate()
            .map(|(shard, lease)| (Key::Shard(shard as u16), lease))
    }

    /// Those that this gateway acts for.
    pub fn owned(&self, now: Moment) -> usize {
        self.leases
            .iter()
            .filter(|lease| lease.holding(now).is_some())
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_has_the_shard_that_a_server_gives_it() {
        // The first three are test vectors of FNV-1a: "", "a", "foobar".
        assert_eq!(shard_of([""], 1000), (0x811c_9dc5_u32 % 1000) as u16);
        assert_eq!(shard_of(["a"], 1000), (0xe40c_292c_u32 % 1000) as u16);
        assert_eq!(
            shard_of(["foo", "bar"], 1000),
            (0xbf9c_f968_u32 % 1000) as u16
        );
        assert_eq!(shard_of(["plant", "1"], 1), 0);
    }

    #[test]
    fn all_have_about_as_many_shards() {
        let members = ["a", "b", "c", "d"];
        let share = |member| {
            (0..MOST_SHARDS)
                .filter(|shard| heir(*shard, &members) == Some(member))
                .count()
        };
        for member in members {
            assert!(
                (200..=312).contains(&share(member)),
                "{member}: {}",
                share(member)
            );
        }
    }

    #[test]
    fn when_one_leaves_only_its_shards_move() {
        for shard in 0..MOST_SHARDS {
            let before = heir(shard, &["a", "b", "c"]);
            let after = heir(shard, &["a", "c"]);
            assert!(before == after || before == Some("b"));
        }
        assert_eq!(heir(0, &[]), None);
    }
}
