//! What is asked of a JetStream server about a stream, and what it answers.

use std::str::FromStr;

use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config, RawMessageErrorKind, Stream};
use async_nats::jetstream::{self, Context, ErrorCode};
use async_nats::{Client, HeaderMap, HeaderValue, Message, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::connection::PATIENCE;
use crate::event::via::and_then;
use crate::journal::Epoch;
use crate::remote::{Failure, Remote};

/// The id of a message, by which a server leaves out what it has had within the stream's `duplicate_window`.
pub(super) const MESSAGE_ID: &str = "Nats-Msg-Id";

/// The same for messages of a batch behind its first one: a batch is taken as a whole, so that the server needs to
/// remember one id of it. To remember all is a third of its work.
pub(super) const ID_IN_BATCH: &str = "Headgate-Id";

/// When the event came; each message of a gateway has it.
pub(super) const EVENT_TIME: &str = "Headgate-Timestamp";

/// The gateways that it came over, before the one in its id.
pub(super) const WAY: &str = "Headgate-Via";

/// The oldest server that is given batches.
const OLDEST_WITH_BATCHES: (i64, i64, i64) = (2, 12, 1);

/// Who has published a message: `GATEWAY/EPOCH/SEQUENCE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MessageId {
    pub(super) gateway: String,
    pub(super) epoch: Epoch,
    pub(super) sequence: u64,
}

impl FromStr for MessageId {
    type Err = ();

    fn from_str(text: &str) -> Result<MessageId, ()> {
        let mut parts = text.rsplitn(3, '/');
        let (Some(sequence), Some(epoch), Some(gateway)) =
            (parts.next(), parts.next(), parts.next())
        else {
            return Err(());
        };
        Ok(MessageId {
            gateway: gateway.to_owned(),
            epoch: epoch.parse().map_err(|_| ())?,
            sequence: sequence.parse().map_err(|_| ())?,
        })
    }
}

/// What stands in no header as it is.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'%');

/// The value of a header. Line breaks would end it.
pub(super) fn quoted(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

/// The gateways that a message came over.
pub(super) fn via(message: &Message) -> String {
    let Some(headers) = &message.headers else {
        return String::new();
    };
    let header = |name| headers.get(name).map(HeaderValue::as_str);
    let id = id_of(headers).parse::<MessageId>().ok();
    match id.filter(|_| header(EVENT_TIME).is_some()) {
        Some(id) => {
            let way = percent_decode_str(header(WAY).unwrap_or_default());
            and_then(&way.decode_utf8_lossy(), &id.gateway)
        }
        None => String::new(),
    }
}

/// What a server says to a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Taken {
        duplicate: bool,
        /// As a batch.
        batch: bool,
    },
    /// It comes not after what it was to follow.
    OutOfOrder,
    /// This one will never be taken, others may.
    Refused(String),
    /// None are taken now.
    NotNow(String),
    /// Nobody is there who could take any.
    Nobody(String),
}

#[derive(Deserialize)]
struct Acknowledgement {
    #[serde(default)]
    stream: String,
    #[serde(default)]
    duplicate: bool,
    /// The id of a batch.
    batch: Option<IgnoredAny>,
    error: Option<jetstream::Error>,
}

impl Answer {
    pub(super) fn of(message: &Message, stream: &str) -> Answer {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            return Answer::Nobody(format!(
                "stream {stream:?} has no leader now, or takes no such subject"
            ));
        }
        let parsed: Acknowledgement = match serde_json::from_slice(&message.payload) {
            Ok(parsed) => parsed,
            Err(error) => {
                return Answer::NotNow(format!(
                    "what stream {stream:?} answers can't be read: {error}"
                ));
            }
        };
        match parsed.error {
            None if parsed.stream != stream => Answer::NotNow(format!(
                "stream {:?} took what was meant for {stream:?}: it takes the same subjects",
                parsed.stream
            )),
            None => Answer::Taken {
                duplicate: parsed.duplicate,
                batch: parsed.batch.is_some(),
            },
            Some(error) => match error.error_code() {
                ErrorCode::STREAM_WRONG_LAST_SEQUENCE
                | ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT
                | ErrorCode::STREAM_WRONG_LAST_MESSAGE_ID => Answer::OutOfOrder,
                ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM
                | ErrorCode::STREAM_HEADER_EXCEEDS_MAXIMUM => {
                    Answer::Refused(format!("stream {stream:?}: {error}"))
                }
                _ if error.to_string().contains("exceeded") => Answer::NotNow(format!(
                    "stream {stream:?} is full ({error}): make room there; what it is to get waits in the journal"
                )),
                _ => Answer::NotNow(format!("stream {stream:?}: {error}")),
            },
        }
    }
}

/// Looks the stream up, and makes it if it is to be made.
pub(super) async fn look_up(
    remote: &Remote,
    client: &Client,
    name: &str,
    create: Option<&Config>,
) -> Result<Stream, String> {
    let context = context(client);
    let found = remote.call(context.get_stream(name)).await;
    let error = match found {
        Ok(stream) => {
            return Ok(match create {
                Some(_) => with_batches(remote, client, stream).await,
                None => stream,
            });
        }
        Err(Failure::Failed(error)) => error,
        Err(failure) => return Err(format!("stream {name:?}: {failure}")),
    };
    match (error.kind(), create) {
        (GetStreamErrorKind::JetStream(error), Some(config))
            if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
        {
            let mut config = config.clone();
            config.allow_atomic_publish = gains_by_batches(client, &config);
            let made = remote.call(context.create_stream(config.clone())).await;
            match made {
                Ok(stream) => {
                    tracing::info!(stream = name, subjects = ?config.subjects, replicas = config.num_replicas, "made the stream");
                    Ok(stream)
                }
                Err(Failure::Failed(error)) => Err(match error.kind() {
                    CreateStreamErrorKind::JetStream(error) => {
                        format!(
                            "can't make stream {name:?}: {error}; look at `create` of [[link.ship]], or at `cluster` of the link"
                        )
                    }
                    _ => format!("can't make stream {name:?}: {error}"),
                }),
                Err(failure) => Err(format!("can't make stream {name:?}: {failure}")),
            }
        }
        (GetStreamErrorKind::JetStream(error), None)
            if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
        {
            Err(format!(
                "there is no stream {name:?}; make it, or, where it is shipped to, say `create` in [[link.ship]]"
            ))
        }
        (GetStreamErrorKind::JetStream(error), _)
            if matches!(
                error.error_code(),
                ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT
            ) =>
        {
            Err(format!("JetStream is not enabled for this login: {error}"))
        }
        (GetStreamErrorKind::Request, _) => Err(format!(
            "stream {name:?}: {error}; is JetStream enabled there, and may the link's user publish to $JS.API.>?"
        )),
        _ => Err(format!("stream {name:?}: {error}")),
    }
}

/// Whether a stream like this is to be given batches. With one replica it stages them on the disk, which makes them
/// several times as dear as messages that come one by one.
fn gains_by_batches(client: &Client, config: &Config) -> bool {
    let (major, minor, patch) = OLDEST_WITH_BATCHES;
    config.num_replicas > 1 && client.is_server_compatible(major, minor, patch)
}

/// Whether it is, and takes them.
pub(super) fn takes_batches(client: &Client, stream: &Stream) -> bool {
    let config = &stream.cached_info().config;
    config.allow_atomic_publish && gains_by_batches(client, config)
}

/// The stream, which takes batches from now on if that can be had.
async fn with_batches(remote: &Remote, client: &Client, stream: Stream) -> Stream {
    let config = &stream.cached_info().config;
    if config.allow_atomic_publish || !gains_by_batches(client, config) {
        return stream;
    }
    let config = Config {
        allow_atomic_publish: true,
        ..config.clone()
    };
    let context = context(client);
    let name = &config.name;
    let changed = remote.call(context.update_stream(&config)).await;
    if let Err(error) = changed {
        tracing::info!(stream = name, %error, "it can't be changed so that it takes batches");
        return stream;
    }
    let changed = remote.call(context.get_stream(name)).await;
    changed.unwrap_or(stream)
}

/// The id of the message with this number, if the stream still has that. Empty: it has none.
pub(super) async fn id_at(
    remote: &Remote,
    stream: &Stream,
    number: u64,
) -> Result<Option<String>, String> {
    let state = &stream.cached_info().state;
    if number == 0 || state.messages == 0 {
        return Ok(None);
    }
    let message = remote.call(stream.get_raw_message(number)).await;
    match message {
        Ok(message) => Ok(Some(id_of(&message.headers))),
        // It was removed; the one before it says nothing.
        Err(Failure::Failed(error))
            if matches!(error.kind(), RawMessageErrorKind::NoMessageFound) =>
        {
            Ok(None)
        }
        Err(failure) => Err(format!(
            "message {number} of stream {:?}: {failure}",
            stream.cached_info().config.name
        )),
    }
}

fn id_of(headers: &HeaderMap) -> String {
    let id = headers.get(MESSAGE_ID).or_else(|| headers.get(ID_IN_BATCH));
    id.map(|id| id.as_str().to_owned()).unwrap_or_default()
}

pub(super) fn context(client: &Client) -> Context {
    jetstream::context::ContextBuilder::new()
        .timeout(PATIENCE.timeout)
        .build(client.clone())
}

/// Whether all subjects that match `filter` match one of `patterns`.
pub(super) fn covers(patterns: &[String], filter: &str) -> bool {
    patterns.iter().any(|pattern| {
        let (mut pattern, mut filter) = (pattern.split('.'), filter.split('.'));
        loop {
            match (pattern.next(), filter.next()) {
                (Some(">"), Some(_)) | (None, None) => return true,
                (Some("*"), Some(token)) if token != ">" => {}
                (Some(one), Some(other)) if one == other => {}
                _ => return false,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_names_gateway_epoch_and_sequence() {
        let id: MessageId = "press/7/00000000000000ff/12".parse().unwrap();
        assert_eq!((id.gateway.as_str(), id.sequence), ("press/7", 12));
        assert_eq!(id.epoch.to_string(), "00000000000000ff");
        for text in ["", "a/b", "a/b/c", "a/ff/x", "a/zz/1"] {
            assert!(text.parse::<MessageId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_stream_has_to_take_all_subjects() {
        let patterns = |texts: &[&str]| {
            texts
                .iter()
                .map(|text| text.to_string())
                .collect::<Vec<_>>()
        };
        for (stream, filter, covered) in [
            (&["a.>"][..], "a.b.>", true),
            (&["x", "a.*"], "a.b", true),
            (&["a.*"], "a.>", false),
            (&["a.b"], "a.>", false),
            (&["a.>"], "a", false),
            (&[">"], ">", true),
            (&["a.b.c"], "a.b", false),
        ] {
            assert_eq!(
                covers(&patterns(stream), filter),
                covered,
                "{stream:?} {filter}"
            );
        }
    }
}
