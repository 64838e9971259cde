//! The log of a worker and seat, on the servers: a subject of its own in one stream for all of the site. Each
//! message says which one of this subject it follows, so the server takes it from one writer only: from the one
//! who has read all that there is.

use async_nats::HeaderMap;
use async_nats::header::{NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, NATS_MESSAGE_ID};
use async_nats::jetstream::consumer::pull::OrderedConfig;
use async_nats::jetstream::context::{GetStreamErrorKind, PublishErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, LastRawMessageErrorKind, Stream};
use async_nats::jetstream::{Context, ErrorCode};
use futures_util::StreamExt;

use super::Seat;
use super::log::{Change, Image, Part, Replay};
use super::names::Names;
use crate::remote::{Failure, Remote};

/// Of entries in one message. A single entry can make one larger by up to 64 KiB.
const PART_BYTES: usize = 256 << 10;

/// What a message has besides, at the most.
const OVERHEAD_BYTES: usize = 8 << 10;

/// A log is made short when it has so many bytes, and so many times what is kept.
const SHORT_BYTES: usize = 256 << 10;
const SHORT_TIMES: usize = 2;

/// A log that this gateway writes.
pub(super) struct Record<'a> {
    context: Context,
    remote: &'a Remote,
    config: Config,
    stream: Stream,
    subject: String,
    token: u64,
    /// At random: no other record of any gateway has it.
    sitting: u64,
    /// Of entries in one message.
    part_bytes: usize,
    gateway: &'a str,
    /// The number of its last message.
    last: u64,
    changes: u64,
    /// Of what has been written since all was written.
    bytes: usize,
    /// And what that was.
    whole: usize,
}

/// Why nothing can be written any more.
#[derive(Debug)]
pub(super) enum Broken {
    /// Another gateway writes it.
    Fenced(String),
    /// The stream was deleted.
    Gone,
    Failed(String),
}

impl From<String> for Broken {
    fn from(why: String) -> Broken {
        Broken::Failed(why)
    }
}

async fn make(context: &Context, remote: &Remote, config: &Config) -> Result<Stream, String> {
    let made = remote
        .call(context.get_or_create_stream(config.clone()))
        .await;
    made.map_err(|failure| format!("stream {:?}: {failure}", config.name))
}

/// Limits by which the servers would remove what is kept.
fn check(config: &Config) -> Result<(), String> {
    let removes = config.discard == DiscardPolicy::Old;
    let limits = [
        ("max_age", !config.max_age.is_zero()),
        ("max_msgs_per_subject", config.max_messages_per_subject > 0),
        ("max_bytes", removes && config.max_bytes > 0),
        ("max_msgs", removes && config.max_messages > 0),
    ];
    let limits: Vec<&str> = limits
        .iter()
        .filter(|limit| limit.1)
        .map(|limit| limit.0)
        .collect();
    match limits.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "stream {:?} has limits by which what apps keep would be removed ({}): take them away with `nats stream edit`",
            config.name,
            limits.join(", ")
        )),
    }
}

impl<'a> Record<'a> {
    /// Reads the log, and has nobody else write it from here on.
    pub(super) async fn take_over(
        context: Context,
        remote: &'a Remote,
        names: &Names,
        replicas: usize,
        max_payload: usize,
        (worker, seat): (&str, Seat),
        (gateway, token): (&'a str, u64),
    ) -> Result<(Record<'a>, Image), Broken> {
        let config = Config {
            name: names.log_stream(),
            subjects: vec![names.logs()],
            num_replicas: replicas,
            // If somebody sets a limit, nothing goes on account of it that was kept.
            discard: DiscardPolicy::New,
            description: Some(
                "What the apps of a site keep. Headgate makes it short by itself.".into(),
            ),
            ..Config::default()
        };
        let stream = make(&context, remote, &config).await?;
        check(&stream.cached_info().config)?;
        let mut record = Record {
            subject: names.log(worker, seat),
            context,
            remote,
            config,
            stream,
            token,
            sitting: fastrand::u64(..),
            part_bytes: PART_BYTES.min(max_payload.saturating_sub(OVERHEAD_BYTES)),
            gateway,
            last: 0,
            changes: 0,
            bytes: 0,
            whole: 0,
        };
        let image = record.read().await?;
        if image.token > token {
            return Err(Broken::Fenced(format!(
                "gateway {:?} has written {} with a newer right to it",
                image.gateway, record.subject
            )));
        }
        // A log begins with all that is kept. If it doesn't, its beginning is gone.
        let change = Change {
            replaces: record.last == 0,
            ..Change::default()
        };
        record.append(change).await?;
        Ok((record, image))
    }

    async fn read(&mut self) -> Result<Image, String> {
        let subject = &self.subject;
        let failed = |why: &dyn std::fmt::Display| format!("can't read the log {subject}: {why}");
        let last = self.stream.get_last_raw_message_by_subject(subject);
        let last = match self.remote.call(last).await {
            Ok(message) => message.sequence,
            Err(Failure::Failed(error))
                if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) =>
            {
                return Ok(Image::default());
            }
            Err(failure) => return Err(failed(&failure)),
        };
        let config = OrderedConfig {
            filter_subject: subject.clone(),
            ..OrderedConfig::default()
        };
        let consumer = self.remote.call(self.stream.create_consumer(config)).await;
        let messages = self
            .remote
            .call(consumer.map_err(|error| failed(&error))?.messages())
            .await;
        let mut messages = messages.map_err(|error| failed(&error))?;
        let mut replay = Replay::default();
        let mut is_first = true;
        while self.last < last {
            let next = self.remote.call(async {
                let message = messages.next().await.ok_or("it has ended")?;
                message.map_err(|_| "the servers have stopped sending it")
            });
            let message = next.await.map_err(|error| failed(&error))?;
            let info = message.info().map_err(|error| failed(&error))?;
            self.last = info.stream_sequence;
            let part = Part::decode(&message.payload)
                .map_err(|error| failed(&format!("message {}: {error}", self.last)))?;
            if part.replaces {
                self.bytes = 0;
            } else if is_first {
                return Err(failed(
                    &"its beginning is gone, by a limit of the stream or a purge; to begin from nothing, purge all of it",
                ));
            }
            is_first = false;
            self.bytes += message.payload.len();
            replay.add(part);
        }
        let image = replay.image();
        self.whole = image
            .entries
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum();
        Ok(image)
    }

    /// Returns when the servers have all of it. What was not acknowledged is sent again until it is: the caller
    /// drops this when the right to write ends.
    pub(super) async fn append(&mut self, change: Change) -> Result<(), Broken> {
        let replaces = change.replaces;
        let parts = change.into_parts(self.token, self.gateway, self.changes, self.part_bytes);
        self.changes += 1;
        let (mut first, mut bytes) = (None, 0);
        for (number, part) in parts.iter().enumerate() {
            let payload = part.encode();
            bytes += payload.len();
            self.write(payload, part.change, number).await?;
            first.get_or_insert(self.last);
        }
        self.bytes = self.bytes.saturating_add(bytes);
        if replaces && let Some(first) = first {
            (self.whole, self.bytes) = (bytes, bytes);
            let before = self.stream.purge().filter(&self.subject).sequence(first);
            // What is left of it does no harm, and goes the next time.
            if let Err(error) = self.remote.call(async { before.await }).await {
                tracing::warn!(log = self.subject, %error, "the log could not be made short");
            }
        }
        Ok(())
    }

    async fn write(&mut self, payload: Vec<u8>, change: u64, number: usize) -> Result<(), Broken> {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, self.last.to_string());
        // With one token there can be several sittings.
        let id = format!("{:016x}/{change}/{number}", self.sitting);
        headers.insert(NATS_MESSAGE_ID, id);
        let payload = bytes::Bytes::from(payload);
        let mut pauses = self.remote.patience().pauses();
        loop {
            let sent = self.remote.call(async {
                let (subject, headers) = (self.subject.clone(), headers.clone());
                let acknowledged =
                    self.context
                        .publish_with_headers(subject, headers, payload.clone());
                acknowledged.await?.await
            });
            let error = match sent.await {
                Ok(acknowledged) => {
                    self.last = acknowledged.sequence;
                    return Ok(());
                }
                Err(Failure::Failed(error)) => error,
                Err(Failure::Busy(_) | Failure::TimedOut(_)) => continue,
            };
            match error.kind() {
                PublishErrorKind::WrongLastSequence => {
                    return Err(Broken::Fenced(format!(
                        "another gateway has written {}",
                        self.subject
                    )));
                }
                PublishErrorKind::StreamNotFound if self.is_gone().await => {
                    return Err(Broken::Gone);
                }
                PublishErrorKind::TimedOut
                | PublishErrorKind::BrokenPipe
                | PublishErrorKind::StreamNotFound => {
                    let pause = pauses
                        .next()
                        .unwrap_or(self.remote.patience().longest_pause);
                    tokio::time::sleep(pause).await;
                }
                PublishErrorKind::MaxPayloadExceeded => {
                    return Err(Broken::Failed(format!(
                        "can't write the log {}: {error}; max_payload of the nats-servers has to be 128 KiB or more",
                        self.subject
                    )));
                }
                _ => {
                    return Err(Broken::Failed(format!(
                        "can't write the log {}: {error}",
                        self.subject
                    )));
                }
            }
        }
    }

    /// Whether somebody has set limits by which what is kept would go.
    pub(super) async fn check_limits(&self) -> Result<(), Broken> {
        let found = self.context.get_stream(&self.config.name);
        match self.remote.call(found).await {
            Ok(stream) => Ok(check(&stream.cached_info().config)?),
            // It is found out when something is written.
            Err(_) => Ok(()),
        }
    }

    /// Whether there is no such stream any more, and not only nobody who answers for it.
    async fn is_gone(&self) -> bool {
        let found = self.context.get_stream(&self.config.name);
        match self.remote.call(found).await {
            Err(Failure::Failed(error)) => match error.kind() {
                GetStreamErrorKind::JetStream(error) => {
                    error.error_code() == ErrorCode::STREAM_NOT_FOUND
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// After that. All is to be written.
    pub(super) async fn make_anew(&mut self) -> Result<(), Broken> {
        tracing::error!(
            stream = self.config.name,
            "somebody has deleted the stream of what the site's apps keep: it is made anew, from what is known here"
        );
        self.stream = make(&self.context, self.remote, &self.config).await?;
        (self.last, self.bytes, self.whole) = (0, usize::MAX, 0);
        Ok(())
    }

    /// Whether all is to be written anew, so that the log becomes short.
    pub(super) fn is_long(&self) -> bool {
        self.bytes > SHORT_BYTES.max(SHORT_TIMES * self.whole)
    }
}
