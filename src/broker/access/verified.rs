//! Passwords that have been right: devices that come back all at once, after a power cut perhaps, need
//! not wait for each other's slow hashes again.

use std::sync::LazyLock;

use parking_lot::Mutex;
use ring::rand::{SecureRandom, SystemRandom};
use rustc_hash::FxHashMap;

/// Users that are remembered.
const MAX_USERS: usize = 10_000;

#[derive(Debug, Default)]
pub(super) struct Verified {
    /// By user: the hash in the password file, and a keyed hash of the password that belongs to it.
    users: Mutex<FxHashMap<Box<str>, Known>>,
}

#[derive(Debug)]
struct Known {
    hash: Box<str>,
    password: blake3::Hash,
}

/// None if the system gives no random numbers: then nothing is remembered.
static KEY: LazyLock<Option<[u8; 32]>> = LazyLock::new(|| {
    let mut key = [0; 32];
    SystemRandom::new().fill(&mut key).ok().map(|()| key)
});

impl Verified {
    /// Whether this password was right for this hash. Compared in constant time.
    pub fn knows(&self, user: &str, hash: &str, password: &[u8]) -> bool {
        let Some(key) = &*KEY else { return false };
        let users = self.users.lock();
        let known = users.get(user).filter(|known| *known.hash == *hash);
        known.is_some_and(|known| known.password == blake3::keyed_hash(key, password))
    }

    pub fn remember(&self, user: &str, hash: &str, password: &[u8]) {
        let Some(key) = &*KEY else { return };
        let mut users = self.users.lock();
        if users.len() >= MAX_USERS && !users.contains_key(user) {
            users.clear();
        }
        let known = Known {
            hash: hash.into(),
            password: blake3::keyed_hash(key, password),
        };
        users.insert(user.into(), known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_password_that_was_right_for_this_hash_is_known() {
        let verified = Verified::default();
        verified.remember("anna", "hash", b"right");
        assert!(verified.knows("anna", "hash", b"right"));
        assert!(!verified.knows("anna", "hash", b"wrong"));
        assert!(!verified.knows("anna", "another hash", b"right"));
        assert!(!verified.knows("otto", "hash", b"right"));
    }
}
