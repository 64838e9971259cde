//! Takes commands from a stream: each becomes an event here, once it is on disk it is acknowledged.
//!
//! What is on disk is noted until the stream knows it: when that comes again, it is left out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_nats::Client;
use async_nats::jetstream::consumer::pull::{Config, Stream};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use async_nats::jetstream::{AckKind, Message};
use bytes::Bytes;
use futures_util::stream::iter;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::time::timeout;

use super::connection::{PATIENCE, State, has_changed, told_to_stop, until_up};
use super::feed::Sources;
use super::links::{Link, Source, Start, Take};
use super::progress::TakeProgress;
use super::{stream, subject};
use crate::broker::{Door, Intake};
use crate::event::Topic;
use crate::event::via::is_done;
use crate::journal::Origin;
use crate::pipeline::DedupKey;
use crate::remote::{Failure, Remote};
use crate::store::Taken;

/// Messages that are taken at once.
const AT_ONCE: usize = 256;

/// What was not acknowledged for so long comes again.
const ACK_WAIT: Duration = Duration::from_secs(30);

/// One way from a stream.
pub(super) struct Taking {
    take: Take,
    link: Arc<Link>,
    consumer: String,
    sources: Sources,
    taken: Taken,
    /// The highest number that was taken of that stream, as far as is known.
    last: u64,
    /// It has had a stream since the gateway was started.
    has_begun: bool,
    intake: Intake,
    state: State,
    remote: Arc<Remote>,
    progress: Arc<TakeProgress>,
}

enum End {
    Stopped,
    Again,
    Failed(String),
}

impl Taking {
    pub(super) fn new(
        take: Take,
        link: Arc<Link>,
        sources: Sources,
        door: Door,
        state: State,
        remote: Arc<Remote>,
        progress: Arc<TakeProgress>,
    ) -> Taking {
        // A consumer's name has no more than that of a key.
        let gateway = crate::cluster::claim::quoted(&sources.gateway);
        Taking {
            consumer: format!("headgate-{gateway}-{}-{}", link.name, take.name),
            take,
            link,
            sources,
            taken: Taken::default(),
            last: 0,
            has_begun: false,
            intake: door.intake(),
            state,
            remote,
            progress,
        }
    }

    pub(super) async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut pauses = PATIENCE.pauses();
        loop {
            let taken = self.progress.events.load(Ordering::Relaxed);
            let end = tokio::select! {
                end = self.session() => end,
                () = told_to_stop(&mut stop) => End::Stopped,
            };
            if self.progress.events.load(Ordering::Relaxed) > taken {
                pauses = PATIENCE.pauses();
            }
            match end {
                End::Stopped => break,
                End::Again => {}
                End::Failed(why) => self.progress.failed(&self.link.name, &why),
            }
            let pause = pauses.next().unwrap_or(PATIENCE.longest_pause);
            if timeout(pause, told_to_stop(&mut stop)).await.is_ok() {
                break;
            }
        }
    }

    /// May be dropped at any time: what is not acknowledged comes again.
    async fn session(&mut self) -> End {
        let Some(connected) = until_up(&mut self.state).await else {
            return End::Stopped;
        };
        let mut messages = match self.begin(&connected.client).await {
            Ok(messages) => messages,
            Err(end) => return end,
        };
        self.progress.went_well();
        loop {
            let first = tokio::select! {
                message = messages.next() => message,
                () = has_changed(&mut self.state, connected.number) => return End::Again,
            };
            let mut batch = Vec::new();
            let mut next = first;
            loop {
                match next {
                    None => return End::Again,
                    Some(Err(error)) => {
                        return End::Failed(format!(
                            "can't take from {}: {error}",
                            self.progress.from
                        ));
                    }
                    Some(Ok(message)) => batch.push(message),
                }
                match messages.next().now_or_never() {
                    Some(more) if batch.len() < AT_ONCE => next = more,
                    _ => break,
                }
            }
            if let Err(end) = self.take_in(&connected.client, batch).await {
                return end;
            }
        }
    }

    async fn begin(&mut self, client: &Client) -> Result<Stream, End> {
        let Source::Stream { stream, .. } = &self.take.from else {
            unreachable!("its link says so");
        };
        let found = stream::look_up(&self.remote, client, stream, None)
            .await
            .map_err(End::Failed)?;
        let made_ns = found.cached_info().created.unix_timestamp_nanos();
        let first = self.remember(made_ns)?;
        let Source::Stream {
            stream, subjects, ..
        } = &self.take.from
        else {
            unreachable!("its link says so");
        };
        let config = Config {
            durable_name: Some(self.consumer.clone()),
            filter_subjects: match subjects.as_slice() {
                [_] => Vec::new(),
                several => several.to_vec(),
            },
            filter_subject: match subjects.as_slice() {
                [one] => one.clone(),
                _ => String::new(),
            },
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            deliver_policy: first,
            max_ack_pending: 2 * AT_ONCE as i64,
            ..Config::default()
        };
        let consumer = self
            .remote
            .call(found.get_or_create_consumer(&self.consumer, config.clone()))
            .await;
        let mut consumer = consumer.map_err(|failure| {
            let hint = match &failure {
                Failure::Failed(_) if self.take.start == Start::New => {
                    "; a stream that is a work queue wants start = \"oldest\" in [[link.take]]"
                }
                _ => "",
            };
            End::Failed(format!(
                "can't make consumer {:?} of stream {stream:?}: {failure}{hint}",
                self.consumer
            ))
        })?;
        let has = &consumer.cached_info().config;
        if (&has.filter_subject, &has.filter_subjects)
            != (&config.filter_subject, &config.filter_subjects)
        {
            let config = Config {
                // It can't be changed.
                deliver_policy: has.deliver_policy,
                ..config
            };
            let changed = self.remote.call(found.update_consumer(config)).await;
            consumer = changed.map_err(|failure| {
                End::Failed(format!(
                    "consumer {:?} of stream {stream:?} can't be given the subjects {}: {failure}; delete it, and it is \
                     made anew",
                    self.consumer,
                    subjects.join(", ")
                ))
            })?;
        }
        let messages = consumer
            .stream()
            .max_messages_per_batch(AT_ONCE)
            .heartbeat(Duration::from_secs(3))
            .expires(Duration::from_secs(15))
            .messages();
        let messages = self.remote.call(messages).await.map_err(|failure| {
            End::Failed(format!("can't take from stream {stream:?}: {failure}"))
        })?;
        // Of what the stream knows nothing comes again.
        let floor = consumer.cached_info().ack_floor.stream_sequence;
        self.taken.open = self.taken.open.split_off(&(floor + 1));
        Ok(messages)
    }

    /// Names what is taken here in the store.
    fn key(&self) -> String {
        format!("{}/{}", self.link.name, self.take.name)
    }

    /// What may come again of a stream that was made then, and where a consumer is to begin that is not there yet.
    fn remember(&mut self, stream_made_ns: i128) -> Result<DeliverPolicy, End> {
        if self.taken == Taken::default() {
            let taken = self.sources.cursors.taken(&self.key());
            self.taken = taken.map_err(|error| End::Failed(error.to_string()))?;
            self.last = self.taken.open.last().copied().unwrap_or(0);
        }
        let is_other = self.taken.stream_made_ns != stream_made_ns;
        if is_other {
            self.last = 0;
            self.taken = Taken {
                stream_made_ns,
                ..Taken::default()
            };
        }
        let had_another = is_other && self.has_begun;
        self.has_begun = true;
        Ok(match self.take.start {
            _ if self.last > 0 => DeliverPolicy::ByStartSequence {
                start_sequence: self.last + 1,
            },
            // All that is in it came after what the one before had.
            _ if had_another => DeliverPolicy::All,
            Start::New => DeliverPolicy::New,
            Start::Oldest => DeliverPolicy::All,
        })
    }

    /// Notes that these are in the journal.
    async fn note(&mut self, numbers: Vec<u64>) -> Result<(), End> {
        if numbers.is_empty() {
            return Ok(());
        }
        self.last = numbers.iter().copied().fold(self.last, u64::max);
        self.taken.open.extend(numbers);
        let (cursors, key, taken) = (self.sources.cursors.clone(), self.key(), self.taken.clone());
        let noted = tokio::task::spawn_blocking(move || cursors.put_taken(&key, &taken));
        match noted.await {
            Ok(Err(error)) => Err(End::Failed(error.to_string())),
            // A panic there has been reported by the panic hook.
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    }

    /// Hands a batch in, and acknowledges it when it is on disk.
    async fn take_in(&mut self, client: &Client, batch: Vec<Message>) -> Result<(), End> {
        let Source::Stream {
            stream,
            add,
            skip_levels,
            ..
        } = &self.take.from
        else {
            unreachable!("its link says so");
        };
        let now = Instant::now();
        let (mut answers, mut numbers) = (Vec::with_capacity(batch.len()), Vec::new());
        let mut bytes = 0;
        for message in batch {
            let subject = message.subject.as_str();
            let Some(reply) = message.reply.clone() else {
                continue;
            };
            let topic = subject::topic_of(subject, *skip_levels).map(|rest| format!("{add}{rest}"));
            let topic = topic.and_then(|topic| Topic::new(topic).ok());
            let info = message
                .info()
                .map(|info| (info.stream_sequence, info.published.unix_timestamp_nanos()));
            let (Some(topic), Ok((sequence, published))) = (topic, info) else {
                self.progress.refused.fetch_add(1, Ordering::Relaxed);
                let why =
                    format!("subject {subject:?} makes no topic here, so the message is left out");
                self.progress.failed(&self.link.name, &why);
                answers.push((reply, AckKind::Term, None));
                continue;
            };
            answers.push((reply, AckKind::Ack, Some(sequence)));
            let via = stream::via(&message);
            if self.taken.open.contains(&sequence) || is_done(&via, &self.sources.gateway) {
                continue;
            }
            numbers.push(sequence);
            // A stream that was made anew counts from 1 again.
            let key = DedupKey::of_id(
                &topic,
                format!("{}/{stream}/{sequence}/{published}", self.link.name).as_bytes(),
            );
            let payload = message.payload.clone();
            bytes += payload.len() as u64;
            let origin = Origin {
                link: Some(self.link.origin()),
                via: &via,
            };
            self.intake.publish_linked(topic, payload, key, origin, now);
        }
        self.intake.flush_events(now);
        self.intake.settled().await;
        let events = numbers.len() as u64;
        self.note(numbers).await?;
        self.progress.events.fetch_add(events, Ordering::Relaxed);
        self.progress.bytes.fetch_add(bytes, Ordering::Relaxed);
        if events > 0 {
            self.progress.went_well();
        }
        self.intake.eased().await;
        let acknowledge = |(reply, kind, sequence)| async move {
            let answer = client.request(reply, Bytes::from(kind));
            let answer = timeout(PATIENCE.timeout, answer).await;
            matches!(answer, Ok(Ok(_))).then_some(sequence)
        };
        let mut answered = iter(answers).map(acknowledge).buffer_unordered(AT_ONCE);
        while let Some(answered) = answered.next().await {
            // Without an answer it comes again, and is known here then.
            match answered {
                Some(Some(sequence)) => drop(self.taken.open.remove(&sequence)),
                Some(None) => {}
                None => return Err(End::Again),
            }
        }
        Ok(())
    }
}
