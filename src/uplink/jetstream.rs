//! Ships what a [`Feed`] has to a stream.

use std::ops::RangeInclusive;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_nats::jetstream::stream::Stream;
use async_nats::{Client, HeaderMap, HeaderName, PublishErrorKind, Subscriber};
use futures_util::stream::iter;
use futures_util::{FutureExt, StreamExt, TryFutureExt, TryStreamExt};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};

use super::connection::{PATIENCE, State, has_changed, is_other, told_to_stop, until_up};
use super::feed::{Feed, Message, SAVE_EVERY};
use super::links::Destination;
use super::stream::{self, Answer, EVENT_TIME, ID_IN_BATCH, MESSAGE_ID, MessageId, WAY};
use super::subject::Template;
use super::window::{BATCH_MESSAGES, Resumed, Tail};
use crate::event::Topic;
use crate::journal::{Epochs, Record};
use crate::remote::Remote;

/// Messages that are sent, or acknowledgements that are read, before the other is looked at.
const AT_ONCE: usize = 64;

/// While something is on its way, what is fewer than a batch waits so long for more to go with it.
const LINGER: Duration = Duration::from_millis(1);

/// When the gateway ends: for what is on its way to be acknowledged.
const FAREWELL: Duration = Duration::from_millis(500);

/// Headers take no more, beside names and topics.
const MOST_HEADER_BYTES: usize = 320;

const TOO_LARGE: &str =
    "with its headers it is larger than the server or the stream takes (max_payload, max_msg_size)";

/// A server ends the connection after a line of more than 4 KiB (`max_control_line`). Besides the subject, the
/// inbox for the answer is in it, and two lengths.
const MOST_SUBJECT_BYTES: usize = 3900;

const ID: HeaderName = HeaderName::from_static(MESSAGE_ID);
const OTHER_ID: HeaderName = HeaderName::from_static(ID_IN_BATCH);
const FOLLOWS: HeaderName = HeaderName::from_static("Nats-Expected-Last-Sequence");
pub(crate) const TIMESTAMP: HeaderName = HeaderName::from_static(EVENT_TIME);
const TOPIC: HeaderName = HeaderName::from_static("Headgate-Topic");
pub(crate) const VIA: HeaderName = HeaderName::from_static(WAY);

/// Messages with the same one of these are a batch: ADR-50 of NATS. They are counted from 1 on, and the last one says
/// that it is; only that one is answered. The server forgets what it has of a batch if the rest doesn't come within ten
/// seconds.
const BATCH: HeaderName = HeaderName::from_static("Nats-Batch-Id");
const PLACE: HeaderName = HeaderName::from_static("Nats-Batch-Sequence");
const COMMIT: HeaderName = HeaderName::from_static("Nats-Batch-Commit");

/// One way to a stream.
pub(super) struct Shipping {
    feed: Feed,
    state: State,
    remote: Arc<Remote>,
    stream: String,
    subject: Template,
    exclusive: bool,
    create: Option<Box<async_nats::jetstream::stream::Config>>,
    /// The stream has something else under this number, or nothing: when all on their way are answered, its end is
    /// looked for.
    displaced: Option<u64>,
    /// Whether the stream takes batches.
    batches: bool,
    /// The number of the stream's last message when the session began.
    end: u64,
}

/// Why a session with a stream has ended.
enum End {
    /// The gateway ends.
    Stopped,
    /// What was on its way may not have arrived.
    Again,
    /// Nothing goes for the time being.
    Failed(String),
}

impl Shipping {
    /// The destination is a stream.
    pub(super) fn new(feed: Feed, state: State, remote: Arc<Remote>) -> Shipping {
        let Destination::Stream {
            stream,
            subject,
            exclusive,
            create,
        } = feed.ship().to.clone()
        else {
            unreachable!("its link says so");
        };
        Shipping {
            feed,
            state,
            remote,
            stream,
            subject,
            exclusive,
            create,
            displaced: None,
            batches: false,
            end: 0,
        }
    }

    pub(super) async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut pauses = PATIENCE.pauses();
        loop {
            let shipped = self.feed.progress.events.load(Ordering::Relaxed);
            let end = self.session(&mut stop).await;
            self.feed.window.go_back();
            self.feed.tick(Instant::now());
            self.feed.show();
            if self.feed.progress.events.load(Ordering::Relaxed) > shipped {
                pauses = PATIENCE.pauses();
            }
            match end {
                End::Stopped => break,
                End::Again => {}
                End::Failed(why) => self.feed.progress.failed(&self.feed.link().name, &why),
            }
            let pause = pauses.next().unwrap_or(PATIENCE.longest_pause);
            if timeout(pause, told_to_stop(&mut stop)).await.is_ok() {
                break;
            }
        }
        self.feed.close().await;
    }

    /// Ships while all goes well.
    async fn session(&mut self, stop: &mut watch::Receiver<bool>) -> End {
        let connected = {
            let mut ticks = ticks();
            loop {
                tokio::select! {
                    connected = until_up(&mut self.state) => match connected {
                        Some(connected) => break connected,
                        None => return End::Stopped,
                    },
                    () = told_to_stop(stop) => return End::Stopped,
                    _ = ticks.tick() => self.tick(),
                }
            }
        };
        let client = connected.client.clone();
        let most_bytes = tokio::select! {
            begun = self.begin(&client) => match begun {
                Ok(most_bytes) => most_bytes,
                Err(end) => return end,
            },
            () = told_to_stop(stop) => return End::Stopped,
        };
        let inbox = client.new_inbox();
        let subscribed =
            timeout(PATIENCE.timeout, client.subscribe(format!("{inbox}.*.*.*"))).await;
        let mut answers = match subscribed {
            Ok(Ok(answers)) => answers,
            Ok(Err(error)) => {
                return End::Failed(format!("can't subscribe to acknowledgements: {error}"));
            }
            Err(_) => return End::Again,
        };
        let mut state = self.state.clone();
        let mut ticks = ticks();
        self.displaced = None;
        let mut lingers_to = Instant::now();
        loop {
            let mut moved = false;
            let lingers = self.feed.window.in_flight() > 0
                && self.feed.window.waiting() < BATCH_MESSAGES
                && Instant::now() < lingers_to;
            if self.displaced.is_none() && !lingers {
                if let Err(error) = self.fill(most_bytes) {
                    return End::Failed(format!("can't read the journal: {error}"));
                }
                match self.send(&client, &inbox, most_bytes).await {
                    Ok(0) => {}
                    Ok(_) => {
                        moved = true;
                        lingers_to = Instant::now() + LINGER;
                    }
                    Err(end) => return end,
                }
            } else if self.displaced.is_some() && self.feed.window.in_flight() == 0 {
                return End::Again;
            }
            match self.take_answers(&inbox, &mut answers) {
                Ok(taken) => moved |= taken > 0,
                Err(end) => return end,
            }
            if moved {
                // The connection works in the same thread.
                tokio::task::yield_now().await;
                if ticks.tick().now_or_never().is_some() {
                    self.tick();
                }
                let stops = *stop.borrow();
                if stops {
                    return self.leave(&inbox, &mut answers).await;
                }
                if is_other(&self.state.borrow(), connected.number) {
                    return End::Again;
                }
                continue;
            }
            let deadline = self.feed.window.deadline(self.feed.link().timeout);
            let overdue = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            let goes_on = self.displaced.is_none();
            let has_room = goes_on && !lingers && self.feed.window.has_room();
            tokio::select! {
                answer = answers.next() => match answer {
                    Some(answer) => if let Err(end) = self.take_answer(&inbox, &answer) {
                        return end;
                    },
                    None => return End::Again,
                },
                // When the journal is closed, the gateway ends.
                true = self.feed.ready(), if has_room => {}
                () = sleep_until(lingers_to.into()), if goes_on && lingers => {}
                () = overdue => {
                    let patience = self.feed.link().timeout;
                    // Whoever is silent for so long may be gone.
                    connected.silent.notify_one();
                    return End::Failed(format!("stream {:?} has acknowledged nothing for {patience:?}", self.stream));
                }
                () = has_changed(&mut state, connected.number) => return End::Again,
                () = told_to_stop(stop) => return self.leave(&inbox, &mut answers).await,
                _ = ticks.tick() => self.tick(),
            }
        }
    }

    fn tick(&mut self) {
        self.feed.tick(Instant::now());
        self.feed.show();
    }

    /// Finds the stream, and where to go on. Returns how large a payload may be.
    async fn begin(&mut self, client: &Client) -> Result<usize, End> {
        let found =
            stream::look_up(&self.remote, client, &self.stream, self.create.as_deref()).await;
        let found = found.map_err(End::Failed)?;
        let info = found.cached_info();
        self.end = info.state.last_sequence;
        let covering = self.subject.covering();
        if !stream::covers(&info.config.subjects, &covering) {
            return Err(End::Failed(format!(
                "stream {:?} takes {}, and not {covering}: add that to its subjects, or change `subject` of [[link.ship]]",
                self.stream,
                info.config.subjects.join(", ")
            )));
        }
        self.batches = self.exclusive && stream::takes_batches(client, &found);
        if self.exclusive {
            let number = info.state.last_sequence;
            let at = |number| stream::id_at(&self.remote, &found, number);
            let last = at(number).await.map_err(End::Failed)?;
            let ours = last.as_deref().and_then(|last| self.own(last));
            let in_place = match self.displaced {
                Some(number) => at(number).await.map_err(End::Failed)?,
                None => None,
            };
            let had = self.feed.window.last();
            let first = info.state.first_sequence;
            self.look_up_unsure(&found, first..=number).await?;
            if ours.is_none() && had.is_some() && info.state.messages > 0 {
                self.tell_of_other_writer(last.as_deref());
            } else if self.displaced.is_some_and(|displaced| displaced <= number)
                && in_place.as_deref().is_none_or(|id| self.own(id).is_none())
            {
                self.tell_of_other_writer(in_place.as_deref());
            }
            let tail = Tail { number, ours };
            let again = match self.feed.window.resume(tail) {
                Resumed::Onward => None,
                Resumed::Lost { from } => Some((from, tail.ours)),
                Resumed::Empty => Some((self.feed.safe(), None)),
            };
            if let Some((from, last)) = again {
                tracing::error!(
                    link = self.feed.link().name,
                    stream = self.stream,
                    from,
                    "the stream has lost what it had acknowledged: events go there again from this sequence on"
                );
                self.feed
                    .rewind(from, last)
                    .map_err(|error| End::Failed(error.to_string()))?;
                self.feed.window.resume(tail);
            }
        }
        let payload = client.max_payload();
        let message = usize::try_from(info.config.max_message_size).unwrap_or(payload);
        Ok(payload.min(message))
    }

    /// Looks whether the stream has, under these numbers, what was on its way: if somebody else writes to it, too, its
    /// end says nothing of those before.
    async fn look_up_unsure(
        &mut self,
        found: &Stream,
        numbers: RangeInclusive<u64>,
    ) -> Result<(), End> {
        let remote = self.remote.clone();
        let at = |(number, sequence)| {
            let at = stream::id_at(&remote, found, number);
            at.map_ok(move |id| (sequence, id))
        };
        let unsure = self.feed.window.unsure(numbers);
        let mut ids = iter(unsure).map(at).buffered(AT_ONCE);
        while let Some((sequence, id)) = ids.try_next().await.map_err(End::Failed)? {
            // What was removed since says nothing.
            let Some(id) = id else { continue };
            let own = self.own(&id);
            match own {
                Some(own) => self.feed.window.is_there(own),
                None => self.tell_of_other_writer(Some(&id)),
            }
            if own != Some(sequence) {
                self.feed.window.is_displaced(sequence);
            }
        }
        Ok(())
    }

    /// The sequence of a message of this journal, by its id.
    fn own(&self, id: &str) -> Option<u64> {
        let id: MessageId = id.parse().ok()?;
        let is_own = id.gateway == self.feed.gateway() && self.feed.knows(id.epoch, id.sequence);
        is_own.then_some(id.sequence)
    }

    fn tell_of_other_writer(&self, last: Option<&str>) {
        let who = match last.map(str::parse::<MessageId>) {
            Some(Ok(id)) if id.gateway == self.feed.gateway() => {
                format!(
                    "another gateway that is named {:?}, too (uplink.gateway), or this one with another journal,",
                    id.gateway
                )
            }
            Some(Ok(id)) => format!("gateway {:?}", id.gateway),
            _ => "somebody else".to_owned(),
        };
        let why = format!(
            "{who} writes to stream {:?}, which is to be exclusive: give each gateway a stream of its own, or set \
             exclusive = false in [[link.ship]] of both",
            self.stream
        );
        self.feed.progress.failed(&self.feed.link().name, &why);
    }

    fn fill(&mut self, most_bytes: usize) -> std::io::Result<()> {
        let sources = self.feed.sources().clone();
        let (subject, follows) = (&self.subject, self.exclusive.then_some(self.end));
        self.feed.fill(|record| {
            let Record { topic, via, .. } = record;
            if !fits_surely(&sources.gateway, topic, via, &record.payload, most_bytes) {
                let id = id(&sources.gateway, sources.journal.epochs(), record.sequence);
                let topic = (!subject.has_topic()).then_some(topic);
                let mut headers = headers(ID, id, record.timestamp_ns, topic, via);
                if let Some(follows) = follows {
                    headers.insert(FOLLOWS, follows.to_string());
                }
                if bytes_of(&headers) + record.payload.len() > most_bytes {
                    return Err(TOO_LARGE);
                }
            }
            let subject = subject.fill(record.topic.as_str());
            match subject.len() > MOST_SUBJECT_BYTES {
                true => Err(
                    "its topic makes a subject that is longer than servers take (max_control_line)",
                ),
                false => Ok(subject),
            }
        })
    }

    /// Sends a batch, or a few messages one by one.
    async fn send(
        &mut self,
        client: &Client,
        inbox: &str,
        most_bytes: usize,
    ) -> Result<usize, End> {
        let now = Instant::now();
        let most = match self.batches {
            true => BATCH_MESSAGES,
            false => 1,
        };
        // No other session of this or another gateway has the same.
        let session = inbox.rsplit('.').next().unwrap_or_default();
        let mut sent = 0;
        while sent < AT_ONCE {
            let sources = self.feed.sources().clone();
            let (patience, progress) = (self.feed.link().timeout, self.feed.progress.clone());
            let fits = |message: &Message| {
                let Message { topic, via, .. } = message;
                fits_surely(&sources.gateway, topic, via, &message.payload, most_bytes)
            };
            let Some(batch) = self.feed.window.send_batch(most, fits, now) else {
                break;
            };
            let count = batch.count();
            let mut unfit = None;
            for (place, (sequence, again, message)) in (1..).zip(batch.messages()) {
                if again {
                    progress.resent.fetch_add(1, Ordering::Relaxed);
                }
                let id = id(&sources.gateway, sources.journal.epochs(), sequence);
                let name = if place == 1 { ID } else { OTHER_ID };
                let topic = (!self.subject.has_topic()).then_some(&message.topic);
                let mut headers = headers(name, id, message.timestamp_ns, topic, &message.via);
                match batch.follows {
                    Some(follows) if place == 1 => headers.insert(FOLLOWS, follows.to_string()),
                    _ => {}
                }
                // The stream has got longer since it was taken in, and its number with it.
                if count == 1 && bytes_of(&headers) + message.payload.len() > most_bytes {
                    unfit = Some((sequence, TOO_LARGE.to_owned()));
                    break;
                }
                let (to, payload) = (message.to.clone(), message.payload.clone());
                let (first, last) = batch.sequences.clone().into_inner();
                if count > 1 {
                    headers.insert(BATCH, format!("{session}.{first:x}"));
                    headers.insert(PLACE, place.to_string());
                }
                let publish = async {
                    if place < count {
                        return client.publish_with_headers(to, headers, payload).await;
                    }
                    if count > 1 {
                        headers.insert(COMMIT, "1");
                    }
                    let reply = format!("{inbox}.{}.{first}.{last}", batch.attempt);
                    client
                        .publish_with_reply_and_headers(to, reply, headers, payload)
                        .await
                };
                // It waits for room where the connection is slow or gone.
                let mut publish = pin!(publish);
                let published = match publish.as_mut().now_or_never() {
                    Some(published) => published,
                    None => match timeout(patience, publish).await {
                        Ok(published) => published,
                        Err(_) => return Err(End::Again),
                    },
                };
                match published {
                    Ok(()) => {}
                    Err(error) if error.kind() == PublishErrorKind::Send => {
                        return Err(End::Again);
                    }
                    Err(error) => {
                        unfit = Some((sequence, error.to_string()));
                        break;
                    }
                }
            }
            if let Some((sequence, why)) = unfit {
                // This one can't be sent at all.
                self.feed.refuse(sequence, &why);
                return Err(End::Again);
            }
            sent += count;
        }
        Ok(sent)
    }

    /// Those that are there.
    fn take_answers(&mut self, inbox: &str, answers: &mut Subscriber) -> Result<usize, End> {
        let mut taken = 0;
        while taken < 2 * AT_ONCE {
            match answers.next().now_or_never() {
                Some(Some(answer)) => self.take_answer(inbox, &answer)?,
                Some(None) => return Err(End::Again),
                None => break,
            }
            taken += 1;
        }
        Ok(taken)
    }

    fn take_answer(&mut self, inbox: &str, message: &async_nats::Message) -> Result<(), End> {
        let numbers = message.subject.strip_prefix(inbox).and_then(|rest| {
            let mut numbers = rest.strip_prefix('.')?.split('.').map(str::parse::<u64>);
            let mut next = || numbers.next()?.ok();
            Some((next()?, next()?..=next()?))
        });
        let Some((attempt, sequences)) = numbers else {
            return Ok(());
        };
        let is_batch = sequences.start() < sequences.end();
        let feed = &mut self.feed;
        match Answer::of(message, &self.stream) {
            // A server that knows of no batches has perhaps not taken the others.
            Answer::Taken { batch: false, .. } if is_batch => Err(End::Again),
            Answer::Taken { duplicate, .. } => {
                if let Some(acknowledged) = feed.window.acknowledge_batch(&sequences) {
                    feed.progress.acknowledged(acknowledged, duplicate);
                }
                Ok(())
            }
            // What was given up does not matter.
            _ if !feed.window.is_current(attempt) => Ok(()),
            Answer::OutOfOrder => {
                let number = feed.window.miss(&sequences);
                self.displaced = self.displaced.or(number);
                Ok(())
            }
            Answer::Nobody(why) => Err(End::Failed(why)),
            Answer::Refused(why) | Answer::NotNow(why) if is_batch => {
                tracing::debug!(stream = self.stream, why, "a batch was not taken");
                feed.window.doubt(&sequences);
                let number = feed.window.miss(&sequences);
                self.displaced = self.displaced.or(number);
                Ok(())
            }
            Answer::Refused(why) => {
                feed.refuse(*sequences.start(), &why);
                match self.exclusive {
                    true => Err(End::Again),
                    false => Ok(()),
                }
            }
            Answer::NotNow(why) => Err(End::Failed(why)),
        }
    }

    /// Waits a little for what is on its way.
    async fn leave(&mut self, inbox: &str, answers: &mut Subscriber) -> End {
        let rest = async {
            while self.feed.window.in_flight() > 0 {
                match answers.next().await {
                    Some(answer) if self.take_answer(inbox, &answer).is_ok() => {}
                    _ => break,
                }
            }
        };
        // What is not acknowledged by then is sent again at the next start.
        let _ = timeout(FAREWELL, rest).await;
        End::Stopped
    }
}

/// The headers of a message that goes alone. No topic: it can be told from the subject.
fn headers(
    name: HeaderName,
    id: String,
    timestamp_ns: u64,
    topic: Option<&Topic>,
    via: &str,
) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(name, id);
    headers.insert(TIMESTAMP, timestamp_ns.to_string());
    if let Some(topic) = topic {
        headers.insert(TOPIC, stream::quoted(topic.as_str()));
    }
    if !via.is_empty() {
        headers.insert(VIA, stream::quoted(via));
    }
    headers
}

/// As they go to the server: <https://docs.nats.io/reference/reference-protocols/nats-protocol#hpub>.
fn bytes_of(headers: &HeaderMap) -> usize {
    let line = |name: &str, value: &str| name.len() + ": ".len() + value.len() + "\r\n".len();
    let lines = headers.iter().flat_map(|(name, values)| {
        let values = values.iter();
        values.map(move |value| line(name.as_ref(), value.as_str()))
    });
    "NATS/1.0\r\n".len() + lines.sum::<usize>() + "\r\n".len()
}

/// Whether it is so small that it need not be reckoned, in a batch or not.
fn fits_surely(gateway: &str, topic: &Topic, via: &str, payload: &[u8], most_bytes: usize) -> bool {
    let names = gateway.len() + 3 * (topic.as_bytes().len() + via.len());
    payload.len() + names + MOST_HEADER_BYTES <= most_bytes
}

/// Tells an event from all others: `GATEWAY/EPOCH/SEQUENCE`.
pub(super) fn id(gateway: &str, epochs: &Epochs, sequence: u64) -> String {
    format!("{gateway}/{}/{sequence}", epochs.of(sequence))
}

fn ticks() -> tokio::time::Interval {
    let mut ticks = interval(SAVE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
