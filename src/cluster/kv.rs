//! The bucket on the servers: `HEADGATE_<site>`, a JetStream key-value store.
//!
//! Its revisions begin at the microseconds since 1970 at which it was made. So fencing tokens grow even
//! if it is deleted and made anew, and nothing else depends on the wall clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::context::CreateStreamErrorKind;
use async_nats::jetstream::kv::{Operation, Store, UpdateErrorKind, Watch};
use async_nats::jetstream::stream::{Config, DiscardPolicy, LastRawMessageErrorKind};
use async_nats::jetstream::{Context, ErrorCode};

use super::claim::{Claim, Key, LONGEST_TTL};
use super::lease::{Answer, Ask, Entry};

/// What nobody has renewed for so long goes. Only to tidy up: who holds what is not decided by it.
const AGE: Duration = Duration::from_secs(3600);
/// An entry that goes earlier would be missing while its holder lives.
const LEAST_AGE: Duration = Duration::from_secs(4 * LONGEST_TTL.as_secs());
const LARGEST_CLAIM: i32 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the bucket {bucket} can't be opened or made: {why}")]
    Open { bucket: String, why: String },
    #[error(
        "the bucket {bucket} with {replicas} replicas can't be made: {why}; cluster.replicas says how \
         many servers of the cluster are to have a copy"
    )]
    Make {
        bucket: String,
        replicas: usize,
        why: String,
    },
    #[error(
        "the bucket {bucket} forgets entries after {age:?}, which is too early; delete it, so that it is made \
         anew, or set its max_age to {LEAST_AGE:?} or more"
    )]
    ShortAge { bucket: String, age: Duration },
    #[error("the bucket {bucket} can't be watched: {why}")]
    Watch { bucket: String, why: String },
    #[error("{key} in the bucket {bucket}: {why}")]
    Ask {
        bucket: String,
        key: String,
        why: String,
    },
}

pub(super) struct Bucket {
    store: Store,
}

impl Bucket {
    /// Opens the bucket, and makes it if there is none.
    pub(super) async fn open(
        context: &Context,
        bucket: &str,
        replicas: usize,
    ) -> Result<Bucket, Error> {
        let config = Config {
            name: format!("KV_{bucket}"),
            description: Some(
                "Headgate: who is in the cluster of the site, and who does what".into(),
            ),
            subjects: vec![format!("$KV.{bucket}.>")],
            max_messages_per_subject: 1,
            max_message_size: LARGEST_CLAIM,
            max_age: AGE,
            discard: DiscardPolicy::New,
            num_replicas: replicas,
            allow_rollup: true,
            allow_direct: true,
            deny_delete: true,
            first_sequence: Some(microseconds()),
            ..Config::default()
        };
        let name = config.name.clone();
        let stream = match context.get_or_create_stream(config).await {
            // Another gateway has made it in the meantime.
            Err(error) if is(error.kind(), ErrorCode::STREAM_NAME_EXIST) => context
                .get_stream(name)
                .await
                .map_err(|error| Error::Open {
                    bucket: bucket.into(),
                    why: error.to_string(),
                })?,
            made => made.map_err(|error| match error.kind() {
                CreateStreamErrorKind::JetStream(_) => Error::Make {
                    bucket: bucket.into(),
                    replicas,
                    why: error.to_string(),
                },
                _ => Error::Open {
                    bucket: bucket.into(),
                    why: error.to_string(),
                },
            })?,
        };
        let age = stream.cached_info().config.max_age;
        if !age.is_zero() && age < LEAST_AGE {
            return Err(Error::ShortAge {
                bucket: bucket.into(),
                age,
            });
        }
        let store = context
            .get_key_value(bucket)
            .await
            .map_err(|error| Error::Open {
                bucket: bucket.into(),
                why: error.to_string(),
            })?;
        Ok(Bucket { store })
    }

    /// All that is in it, and then what comes.
    pub(super) async fn watch(&self) -> Result<Watch, Error> {
        let bucket = || self.store.name.clone();
        let watch = self.store.watch_many_with_history([">"]).await;
        watch.map_err(|error| Error::Watch {
            bucket: bucket(),
            why: error.to_string(),
        })
    }

    pub(super) async fn ask(&self, key: &Key, ask: Ask) -> Result<Answer, Error> {
        let name = key.name();
        match ask {
            Ask::Write { expected, claim } => {
                match self
                    .store
                    .update(&name, claim.write().into(), expected)
                    .await
                {
                    Ok(revision) => Ok(Answer::Written(revision)),
                    Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                        Ok(Answer::Refused)
                    }
                    Err(error) => Err(self.failed(name, error)),
                }
            }
            Ask::Read => {
                // Of the stream's leader: what another replica has may be older.
                let subject = format!("{}{name}", self.store.prefix);
                match self
                    .store
                    .stream
                    .get_last_raw_message_by_subject(&subject)
                    .await
                {
                    Ok(message) => {
                        let deleted = message.headers.get("KV-Operation").is_some();
                        let claim = (!deleted).then(|| Claim::read(&message.payload));
                        Ok(Answer::Read(Entry {
                            revision: message.sequence,
                            claim,
                        }))
                    }
                    Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => {
                        Ok(Answer::Read(Entry::MISSING))
                    }
                    Err(error) => Err(self.failed(name, error)),
                }
            }
        }
    }

    fn failed(&self, key: String, error: impl ToString) -> Error {
        Error::Ask {
            bucket: self.store.name.clone(),
            key,
            why: error.to_string(),
        }
    }
}

/// What a watch tells, if it is about something of ours.
pub(super) fn change(entry: async_nats::jetstream::kv::Entry) -> Option<(Key, Entry)> {
    let claim = (entry.operation == Operation::Put).then(|| Claim::read(&entry.value));
    let key = Key::of(&entry.key, claim.as_ref())?;
    Some((
        key,
        Entry {
            revision: entry.revision,
            claim,
        },
    ))
}

fn is(kind: CreateStreamErrorKind, code: ErrorCode) -> bool {
    matches!(kind, CreateStreamErrorKind::JetStream(error) if error.error_code() == code)
}

fn microseconds() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (since.as_micros() as u64).max(1)
}
