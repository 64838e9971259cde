//! `wasi:keyvalue`: checks what an app hands in, and keeps its handles.

use std::collections::VecDeque;

use wasmtime::StoreContextMut;
use wasmtime::component::{
    ComponentType, Linker, Lower, Resource, ResourceType, WasmList, WasmStr,
};

use super::{HostState, MAX_COPY_BYTES};
use crate::apps::kv::{
    AppState, MAX_BUCKET_NAME, MAX_BUCKETS, MAX_KEY_BYTES, MAX_VALUE_BYTES, StagedState, TooMuch,
};
use crate::apps::log::Complaint;
use crate::apps::manifest::Limits;

pub(super) const STORE: &str = "wasi:keyvalue/store@0.2.0-draft";
pub(super) const ATOMICS: &str = "wasi:keyvalue/atomics@0.2.0-draft";
pub(super) const BATCH: &str = "wasi:keyvalue/batch@0.2.0-draft";

/// Most handles on buckets that an instance has at a time.
const MAX_HANDLES: usize = 64;

/// Listings of an instance that can be gone on with.
const MAX_CURSORS: usize = 64;

/// The bucket of an app that doesn't name one.
const DEFAULT_BUCKET: &str = "default";

/// `bucket`. Its number is that of a name in [`Handles`].
pub(super) struct Bucket;

/// What an instance holds.
#[derive(Default)]
pub(super) struct Handles {
    /// Of the buckets that the instance has ever opened, with a NUL behind each.
    prefixes: Vec<String>,
    open: usize,
    /// Where listings are to go on, behind these keys, with the number that the app knows. The
    /// oldest ones are forgotten.
    cursors: VecDeque<(u64, String)>,
    last_cursor: u64,
}

/// `error` of `wasi:keyvalue/store`.
#[derive(ComponentType, Lower)]
#[component(variant)]
#[allow(dead_code, reason = "the interface has these cases")]
enum KvError {
    #[component(name = "no-such-store")]
    NoSuchStore,
    #[component(name = "access-denied")]
    AccessDenied,
    #[component(name = "other")]
    Other(String),
}

/// `key-response`
#[derive(ComponentType, Lower)]
#[component(record)]
struct KeyResponse {
    keys: Vec<String>,
    cursor: Option<u64>,
}

type Value = std::sync::Arc<[u8]>;

/// Why something is refused.
enum Refusal {
    Calls,
    Bytes,
    Argument(String),
}

type Answer<T> = wasmtime::Result<(Result<T, KvError>,)>;

pub(super) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut store = linker.instance(STORE)?;
    store.resource("bucket", ResourceType::host::<Bucket>(), |mut store, _| {
        store.data_mut().handles.open -= 1;
        Ok(())
    })?;
    store.func_wrap(
        "open",
        |mut store: StoreContextMut<HostState>, (name,): (WasmStr,)| {
            let name = super::cut(&name.to_str(&store)?, MAX_BUCKET_NAME + 1).to_owned();
            let state = store.data_mut();
            let opened = state.open_bucket(&name);
            state.answer(opened)
        },
    )?;
    store.func_wrap(
        "[method]bucket.get",
        |store: StoreContextMut<HostState>, (bucket, key): (Resource<Bucket>, WasmStr)| {
            on_key(store, bucket, key, |state, key| {
                let (kept, staged) = state.kv();
                Ok(kept.get(staged, key))
            })
        },
    )?;
    store.func_wrap(
        "[method]bucket.set",
        |store: StoreContextMut<HostState>,
         (bucket, key, value): (Resource<Bucket>, WasmStr, WasmList<u8>)| {
            let len = value.len();
            let value = match len <= MAX_VALUE_BYTES {
                true => value.as_le_slice(&store).to_vec(),
                false => Vec::new(),
            };
            on_key(store, bucket, key, |state, key| {
                check_value(len)?;
                state.set_value(key, &value)
            })
        },
    )?;
    store.func_wrap(
        "[method]bucket.delete",
        |store: StoreContextMut<HostState>, (bucket, key): (Resource<Bucket>, WasmStr)| {
            on_key(store, bucket, key, |state, key| {
                let (kept, staged) = state.kv();
                kept.remove(staged, key);
                Ok(())
            })
        },
    )?;
    store.func_wrap(
        "[method]bucket.exists",
        |store: StoreContextMut<HostState>, (bucket, key): (Resource<Bucket>, WasmStr)| {
            on_key(store, bucket, key, |state, key| {
                let (kept, staged) = state.kv();
                Ok(kept.get(staged, key).is_some())
            })
        },
    )?;
    store.func_wrap(
        "[method]bucket.list-keys",
        |mut store: StoreContextMut<HostState>,
         (bucket, cursor): (Resource<Bucket>, Option<u64>)| {
            let state = store.data_mut();
            let listed = state.list_keys(&bucket, cursor);
            state.answer(listed)
        },
    )?;

    linker.instance(ATOMICS)?.func_wrap(
        "increment",
        |store: StoreContextMut<HostState>,
         (bucket, key, delta): (Resource<Bucket>, WasmStr, u64)| {
            on_key(store, bucket, key, |state, key| state.increment(key, delta))
        },
    )?;

    let mut batch = linker.instance(BATCH)?;
    batch.func_wrap(
        "get-many",
        |mut store: StoreContextMut<HostState>, (bucket, keys): (Resource<Bucket>, Vec<String>)| {
            let state = store.data_mut();
            let values = state.get_many(&bucket, keys);
            state.answer(values)
        },
    )?;
    batch.func_wrap(
        "set-many",
        |mut store: StoreContextMut<HostState>,
         (bucket, entries): (Resource<Bucket>, Vec<(String, Vec<u8>)>)| {
            let state = store.data_mut();
            let set = state.set_many(&bucket, &entries);
            state.answer(set)
        },
    )?;
    batch.func_wrap(
        "delete-many",
        |mut store: StoreContextMut<HostState>, (bucket, keys): (Resource<Bucket>, Vec<String>)| {
            let state = store.data_mut();
            let deleted = state.delete_many(&bucket, &keys);
            state.answer(deleted)
        },
    )
}

/// One call about one key.
fn on_key<T>(
    mut store: StoreContextMut<HostState>,
    bucket: Resource<Bucket>,
    key: WasmStr,
    what: impl FnOnce(&mut HostState, &str) -> Result<T, Refusal>,
) -> Answer<T> {
    let key = store.data().handles.full_key(&bucket, &key.to_str(&store)?);
    let state = store.data_mut();
    let result = match state.use_calls(1) {
        Ok(()) => key.and_then(|key| what(state, &key)),
        Err(refusal) => Err(refusal),
    };
    state.answer(result)
}

impl HostState {
    fn kv(&mut self) -> (&AppState, &mut StagedState) {
        let staged = self.call.staged(&self.manifest.limits);
        (&self.state, &mut staged.state)
    }

    /// Takes calls out of the quota. What is about many keys counts as many.
    fn use_calls(&mut self, calls: usize) -> Result<(), Refusal> {
        let left = &mut self.call.staged(&self.manifest.limits).kv_calls_left;
        match u32::try_from(calls) {
            Ok(calls) if calls <= *left => {
                *left -= calls;
                Ok(())
            }
            _ => Err(Refusal::Calls),
        }
    }

    fn open_bucket(&mut self, name: &str) -> Result<Resource<Bucket>, Refusal> {
        self.use_calls(1)?;
        if let Some(why) = self.state.unreadable() {
            return Err(Refusal::Argument(format!("the state can't be read: {why}")));
        }
        let name = match name {
            "" => DEFAULT_BUCKET,
            name => name,
        };
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"_.-".contains(&c);
        if name.len() > MAX_BUCKET_NAME || !name.bytes().all(allowed) {
            return Err(Refusal::Argument(format!(
                "a bucket's name has 1 to {MAX_BUCKET_NAME} of the characters A-Z a-z 0-9 _ . -"
            )));
        }
        if self.handles.open >= MAX_HANDLES {
            return Err(Refusal::Argument(format!(
                "{MAX_HANDLES} handles on buckets are open, and no more are allowed; drop some"
            )));
        }
        let prefix = format!("{name}\0");
        let known = self
            .handles
            .prefixes
            .iter()
            .position(|known| *known == prefix);
        let number = match known {
            Some(number) => number,
            None => self.new_bucket(prefix)?,
        };
        self.handles.open += 1;
        Ok(Resource::new_own(number as u32))
    }

    fn new_bucket(&mut self, prefix: String) -> Result<usize, Refusal> {
        let mut names = self.state.buckets();
        names.extend(
            self.handles
                .prefixes
                .iter()
                .map(|p| p.trim_end_matches('\0').to_owned()),
        );
        names.push(prefix.trim_end_matches('\0').to_owned());
        names.sort_unstable();
        names.dedup();
        if names.len() > MAX_BUCKETS {
            return Err(Refusal::Argument(format!(
                "an app has {MAX_BUCKETS} buckets at most"
            )));
        }
        self.handles.prefixes.push(prefix);
        Ok(self.handles.prefixes.len() - 1)
    }

    fn set_value(&mut self, key: &str, value: &[u8]) -> Result<(), Refusal> {
        let most = self.manifest.limits.kv_bytes;
        let (kept, staged) = self.kv();
        let set = kept.set(staged, most, key, value);
        set.map_err(|TooMuch| Refusal::Bytes)
    }

    fn list_keys(
        &mut self,
        bucket: &Resource<Bucket>,
        cursor: Option<u64>,
    ) -> Result<KeyResponse, Refusal> {
        self.use_calls(1)?;
        let handles = &mut self.handles;
        let after = match cursor {
            None => None,
            Some(cursor) => {
                let found = handles.cursors.iter().find(|(number, _)| *number == cursor);
                let Some((_, after)) = found else {
                    return Err(Refusal::Argument(format!(
                        "there is no cursor {cursor}, or it is too old; list the keys anew"
                    )));
                };
                Some(after.as_str())
            }
        };
        let staged = self.call.staged(&self.manifest.limits);
        let prefix = handles.prefix(bucket);
        let (keys, more) = self.state.list(&staged.state, prefix, after);
        let last = keys.last().filter(|_| more);
        let cursor = last.cloned().map(|last| handles.remember(last));
        Ok(KeyResponse { keys, cursor })
    }

    /// The number under `key` is kept as decimal digits.
    fn increment(&mut self, key: &str, delta: u64) -> Result<u64, Refusal> {
        let (kept, staged) = self.kv();
        let present = match kept.get(staged, key) {
            None => Some(0),
            Some(value) => std::str::from_utf8(&value)
                .ok()
                .and_then(|text| text.parse().ok()),
        };
        let present: u64 = present.ok_or_else(|| {
            Refusal::Argument("the value is no number in decimal digits".to_owned())
        })?;
        let sum = present.checked_add(delta).ok_or_else(|| {
            Refusal::Argument(format!("{present} + {delta} is more than {}", u64::MAX))
        })?;
        self.set_value(key, sum.to_string().as_bytes())?;
        Ok(sum)
    }

    fn get_many(
        &mut self,
        bucket: &Resource<Bucket>,
        keys: Vec<String>,
    ) -> Result<Vec<Option<(String, Value)>>, Refusal> {
        self.use_calls(keys.len())?;
        let mut bytes = 0;
        let mut found = Vec::with_capacity(keys.len());
        for key in keys {
            let full = self.handles.full_key(bucket, &key)?;
            let (kept, staged) = self.kv();
            let value = kept.get(staged, &full);
            bytes += key.len() + value.as_ref().map_or(0, |value| value.len());
            if bytes > MAX_COPY_BYTES {
                return Err(Refusal::Argument(format!(
                    "the values have more than {MAX_COPY_BYTES} bytes together; ask for fewer"
                )));
            }
            found.push(value.map(|value| (key, value)));
        }
        Ok(found)
    }

    fn set_many(
        &mut self,
        bucket: &Resource<Bucket>,
        entries: &[(String, Vec<u8>)],
    ) -> Result<(), Refusal> {
        self.use_calls(entries.len())?;
        for (key, value) in entries {
            self.handles.full_key(bucket, key)?;
            check_value(value.len())?;
        }
        for (key, value) in entries {
            let key = self.handles.full_key(bucket, key)?;
            self.set_value(&key, value)?;
        }
        Ok(())
    }

    fn delete_many(&mut self, bucket: &Resource<Bucket>, keys: &[String]) -> Result<(), Refusal> {
        self.use_calls(keys.len())?;
        for key in keys {
            let key = self.handles.full_key(bucket, key)?;
            let (kept, staged) = self.kv();
            kept.remove(staged, &key);
        }
        Ok(())
    }

    /// Counts and tells what was refused.
    fn answer<T>(&mut self, result: Result<T, Refusal>) -> Answer<T> {
        let refusal = match result {
            Ok(value) => return Ok((Ok(value),)),
            Err(refusal) => refusal,
        };
        let calls = &mut self.call.tally.calls;
        match refusal {
            Refusal::Calls => calls.kv_per_batch += 1,
            Refusal::Bytes => calls.kv_bytes += 1,
            Refusal::Argument(_) => calls.kv_invalid += 1,
        }
        let text = refusal.text(&self.manifest.limits);
        self.log.complain(Complaint::Refused, || {
            format!("a call about its state was refused: {text}")
        });
        Ok((Err(KvError::Other(text)),))
    }
}

impl Handles {
    fn prefix(&self, bucket: &Resource<Bucket>) -> &str {
        &self.prefixes[bucket.rep() as usize]
    }

    /// The key in [`crate::apps::kv`].
    fn full_key(&self, bucket: &Resource<Bucket>, key: &str) -> Result<String, Refusal> {
        match key.len() {
            1..=MAX_KEY_BYTES => Ok(format!("{}{key}", self.prefix(bucket))),
            bytes => Err(Refusal::Argument(format!(
                "a key of {bytes} bytes; 1 to {MAX_KEY_BYTES} are allowed"
            ))),
        }
    }

    fn remember(&mut self, key: String) -> u64 {
        if self.cursors.len() == MAX_CURSORS {
            self.cursors.pop_front();
        }
        self.last_cursor += 1;
        self.cursors.push_back((self.last_cursor, key));
        self.last_cursor
    }
}

impl Refusal {
    fn text(&self, limits: &Limits) -> String {
        match self {
            Refusal::Calls => format!(
                "`limits.kv_per_batch` is used up: a call may make {} such calls",
                limits.kv_per_batch
            ),
            Refusal::Bytes => format!(
                "`limits.kv_bytes` is reached: {} bytes of keys and values, with 64 for each key",
                limits.kv_bytes
            ),
            Refusal::Argument(why) => why.clone(),
        }
    }
}

fn check_value(bytes: usize) -> Result<(), Refusal> {
    match bytes > MAX_VALUE_BYTES {
        true => Err(Refusal::Argument(format!(
            "a value of {bytes} bytes; {MAX_VALUE_BYTES} are the most"
        ))),
        false => Ok(()),
    }
}
