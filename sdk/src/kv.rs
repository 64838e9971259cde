//! What an app keeps from one call to the next, and over restarts, through `wasi:keyvalue`.
//!
//! All that one call writes comes into force when the call has ended well, and reaches the disk as a
//! whole soon after that (within a tenth of a second, usually). A call that returns an error or traps
//! leaves no trace. Nobody but the app sees what it keeps; an upgrade finds it, `headgate app remove`
//! removes it.
//!
//! ```
//! use headgate_sdk::kv::Bucket;
//!
//! # fn main() -> Result<(), headgate_sdk::kv::KvError> {
//! let totals = Bucket::open("totals")?;
//! totals.set("plant/line1", b"17")?;
//! assert_eq!(totals.get("plant/line1")?.as_deref(), Some(&b"17"[..]));
//! assert_eq!(totals.increment("seen", 2)?, 2);
//! # Ok(())
//! # }
//! ```
//!
//! Keys are 1 to 255 bytes of text, values up to 65,536 bytes. The manifest bounds the whole
//! (`limits.kv_bytes`, 1 MiB unless it is set, with 64 bytes for each key) and the calls of one batch
//! (`limits.kv_per_batch`, 1000 unless it is set).
//!
//! On the developer's machine, each thread has a memory of its own, which knows the lengths of names,
//! keys and values, but not the manifest's limits.

use std::fmt;

/// A set of keys with their values. An app has sixteen at most, and 64 open at a time.
#[derive(Debug)]
pub struct Bucket(imp::Bucket);

/// Why the gateway did not do it; the text names the limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvError(String);

/// The `state_version` of the manifest under which the app has kept what it keeps; its own if it keeps
/// nothing. `configure` looks at it to bring that up to date.
///
/// On the developer's machine it is 1.
#[must_use]
pub fn version() -> u32 {
    imp::version()
}

impl Bucket {
    /// The bucket with this name: up to 64 of the characters `A-Z a-z 0-9 _ . -`. It is there
    /// without being made. `""` stands for `"default"`.
    ///
    /// # Errors
    /// If the name is none, or if it is one bucket too many.
    pub fn open(name: &str) -> Result<Bucket, KvError> {
        imp::open(name).map(Bucket)
    }

    /// The value under `key`.
    ///
    /// # Errors
    /// If the key is none, or if the batch's calls are used up.
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, KvError> {
        self.0.get(key)
    }

    /// Puts `value` in the place of what is under `key`, if anything is.
    ///
    /// # Errors
    /// If there is no room for it, if key or value are too long, or if the batch's calls are used up.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), KvError> {
        self.0.set(key, value)
    }

    /// Removes what is under `key`, if anything is.
    ///
    /// # Errors
    /// If the key is none, or if the batch's calls are used up.
    pub fn delete(&self, key: &str) -> Result<(), KvError> {
        self.0.delete(key)
    }

    /// Whether there is something under `key`.
    ///
    /// # Errors
    /// If the key is none, or if the batch's calls are used up.
    pub fn exists(&self, key: &str) -> Result<bool, KvError> {
        self.0.exists(key)
    }

    /// Adds to the number under `key`, which is kept as decimal digits, and returns the sum. Where
    /// there is none, it begins at 0.
    ///
    /// # Errors
    /// As [`Bucket::set`]; or if what is there is no number, or the sum is none.
    pub fn increment(&self, key: &str, delta: u64) -> Result<u64, KvError> {
        self.0.increment(key, delta)
    }

    /// All keys, in order. One call for every 256 keys.
    ///
    /// # Errors
    /// If the batch's calls are used up.
    pub fn keys(&self) -> Result<Vec<String>, KvError> {
        self.0.keys()
    }

    /// The values under `keys`, in this order. Counts as one call for each key.
    ///
    /// # Errors
    /// If a key is none, if the batch's calls are used up, or if there are more than 16 MiB.
    pub fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, KvError> {
        self.0.get_many(keys)
    }

    /// Sets many keys. Counts as one call for each.
    ///
    /// # Errors
    /// As [`Bucket::set`]; some of them may be set then.
    pub fn set_many(&self, entries: &[(String, Vec<u8>)]) -> Result<(), KvError> {
        self.0.set_many(entries)
    }

    /// Removes many keys. Counts as one call for each.
    ///
    /// # Errors
    /// As [`Bucket::delete`]; some of them may be removed then.
    pub fn delete_many(&self, keys: &[String]) -> Result<(), KvError> {
        self.0.delete_many(keys)
    }
}

impl fmt::Display for KvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for KvError {}

/// So that `?` works in [`crate::App::handle`].
impl From<KvError> for String {
    fn from(error: KvError) -> String {
        error.0
    }
}

#[cfg(target_family = "wasm")]
mod imp {
    use super::KvError;
    use crate::bindings::headgate::app::state;
    use crate::bindings::wasi::keyvalue::{atomics, batch, store};

    pub use store::Bucket as Handle;

    pub fn version() -> u32 {
        state::version()
    }

    #[derive(Debug)]
    pub struct Bucket(Handle);

    pub fn open(name: &str) -> Result<Bucket, KvError> {
        Ok(Bucket(store::open(name)?))
    }

    impl Bucket {
        pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, KvError> {
            Ok(self.0.get(key)?)
        }

        pub fn set(&self, key: &str, value: &[u8]) -> Result<(), KvError> {
            Ok(self.0.set(key, value)?)
        }

        pub fn delete(&self, key: &str) -> Result<(), KvError> {
            Ok(self.0.delete(key)?)
        }

        pub fn exists(&self, key: &str) -> Result<bool, KvError> {
            Ok(self.0.exists(key)?)
        }

        pub fn increment(&self, key: &str, delta: u64) -> Result<u64, KvError> {
            Ok(atomics::increment(&self.0, key, delta)?)
        }

        pub fn keys(&self) -> Result<Vec<String>, KvError> {
            let mut keys = Vec::new();
            let mut cursor = None;
            loop {
                let page = self.0.list_keys(cursor)?;
                keys.extend(page.keys);
                cursor = page.cursor;
                if cursor.is_none() {
                    return Ok(keys);
                }
            }
        }

        pub fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, KvError> {
            let found = batch::get_many(&self.0, keys)?.into_iter();
            Ok(found.map(|entry| entry.map(|(_, value)| value)).collect())
        }

        pub fn set_many(&self, entries: &[(String, Vec<u8>)]) -> Result<(), KvError> {
            Ok(batch::set_many(&self.0, entries)?)
        }

        pub fn delete_many(&self, keys: &[String]) -> Result<(), KvError> {
            Ok(batch::delete_many(&self.0, keys)?)
        }
    }

    impl From<store::Error> for KvError {
        fn from(error: store::Error) -> KvError {
            KvError(match error {
                store::Error::NoSuchStore => "there is no such bucket".to_string(),
                store::Error::AccessDenied => "the bucket is not this app's".to_string(),
                store::Error::Other(why) => why,
            })
        }
    }
}

#[cfg(not(target_family = "wasm"))]
mod imp {
    use std::collections::BTreeMap;

    use super::KvError;
    use crate::native;

    type Entries = BTreeMap<String, Vec<u8>>;

    const MAX_NAME_BYTES: usize = 64;
    const MAX_KEY_BYTES: usize = 255;
    const MAX_VALUE_BYTES: usize = 65_536;

    pub fn version() -> u32 {
        1
    }

    #[derive(Debug)]
    pub struct Bucket(String);

    pub fn open(name: &str) -> Result<Bucket, KvError> {
        let name = if name.is_empty() { "default" } else { name };
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if name.len() > MAX_NAME_BYTES || !name.chars().all(allowed) {
            let why = format!(
                "{name:?} is no bucket: give up to {MAX_NAME_BYTES} of the characters A-Z a-z 0-9 _ . -"
            );
            return Err(KvError(why));
        }
        Ok(Bucket(name.to_string()))
    }

    impl Bucket {
        fn with<R>(&self, what: impl FnOnce(&mut Entries) -> R) -> R {
            native::with(|host| what(host.state.buckets.entry(self.0.clone()).or_default()))
        }

        fn with_key<R>(
            &self,
            key: &str,
            what: impl FnOnce(&mut Entries) -> R,
        ) -> Result<R, KvError> {
            match key.len() {
                1..=MAX_KEY_BYTES => Ok(self.with(what)),
                length => Err(KvError(format!(
                    "a key has 1 to {MAX_KEY_BYTES} bytes, not {length}"
                ))),
            }
        }

        pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, KvError> {
            self.with_key(key, |entries| entries.get(key).cloned())
        }

        pub fn set(&self, key: &str, value: &[u8]) -> Result<(), KvError> {
            if value.len() > MAX_VALUE_BYTES {
                let length = value.len();
                let why = format!("a value has up to {MAX_VALUE_BYTES} bytes, not {length}");
                return Err(KvError(why));
            }
            self.with_key(key, |entries| {
                entries.insert(key.to_string(), value.to_vec());
            })
        }

        pub fn delete(&self, key: &str) -> Result<(), KvError> {
            self.with_key(key, |entries| {
                entries.remove(key);
            })
        }

        pub fn exists(&self, key: &str) -> Result<bool, KvError> {
            self.with_key(key, |entries| entries.contains_key(key))
        }

        pub fn increment(&self, key: &str, delta: u64) -> Result<u64, KvError> {
            let present = match self.get(key)? {
                None => Some(0),
                Some(value) => String::from_utf8(value)
                    .ok()
                    .and_then(|text| text.parse().ok()),
            };
            let sum = present
                .and_then(|present: u64| present.checked_add(delta))
                .ok_or_else(|| KvError("the value is no number in decimal digits".to_string()))?;
            self.set(key, sum.to_string().as_bytes())?;
            Ok(sum)
        }

        pub fn keys(&self) -> Result<Vec<String>, KvError> {
            Ok(self.with(|entries| entries.keys().cloned().collect()))
        }

        pub fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, KvError> {
            keys.iter().map(|key| self.get(key)).collect()
        }

        pub fn set_many(&self, entries: &[(String, Vec<u8>)]) -> Result<(), KvError> {
            entries
                .iter()
                .try_for_each(|(key, value)| self.set(key, value))
        }

        pub fn delete_many(&self, keys: &[String]) -> Result<(), KvError> {
            keys.iter().try_for_each(|key| self.delete(key))
        }
    }
}
