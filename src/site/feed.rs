//! The events of a seat, out of the streams of all gateways of the site: each in its order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::OrderedConfig;
use async_nats::jetstream::stream::Info;
use async_nats::{HeaderMap, Message};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::log::{Position, Positions};
use super::outstanding::Outstanding;
use crate::dead_letters::{DeadLetter, DeadLetters, Reason};
use crate::event::via::hops;
use crate::event::{Event, Place, Topic, TopicFilter, unix_time_ns};
use crate::pipeline::MAX_HOPS;
use crate::remote::{Failure, Remote};
use crate::uplink::{TIMESTAMP, VIA, topic_of};

/// Messages that have come and were not handed on.
const WAITING: usize = 256;

/// How often it is looked for streams that are new.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Where events come from.
pub(super) struct Sources {
    pub(super) context: Context,
    pub(super) remote: Arc<Remote>,
    /// The subjects of all events of the site.
    pub(super) all: String,
    /// Those that come to the seat. No two of these filters match the same.
    pub(super) subjects: Vec<String>,
    /// Tokens before the topic.
    pub(super) before_topic: usize,
    pub(super) subscriptions: Vec<TopicFilter>,
    /// For whom they are.
    pub(super) worker: String,
    pub(super) dead_letters: Arc<DeadLetters>,
}

/// What has come.
pub(super) struct Arrived {
    stream: u32,
    number: u64,
    /// None: nobody wants it.
    event: Option<Event>,
}

pub(super) struct Feed {
    sources: Arc<Sources>,
    positions: Positions,
    /// By their numbers in this sitting.
    streams: Vec<(String, i64)>,
    readers: JoinSet<()>,
    sender: mpsc::Sender<Arrived>,
    arrived: mpsc::Receiver<Arrived>,
    looked: Option<Instant>,
}

#[derive(Deserialize)]
struct Names {
    streams: Option<Vec<String>>,
}

impl Feed {
    pub(super) fn new(sources: Sources, positions: Positions) -> Feed {
        let (sender, arrived) = mpsc::channel(WAITING);
        Feed {
            sources: Arc::new(sources),
            positions,
            streams: Vec::new(),
            readers: JoinSet::new(),
            sender,
            arrived,
            looked: None,
        }
    }

    /// Finds the streams that there are, and reads from those that are new.
    async fn look(&mut self) -> Result<(), String> {
        let sources = &self.sources;
        let asked = json!({ "subject": sources.all });
        let found = sources.context.request("STREAM.NAMES", &asked);
        let found: Names =
            sources.remote.call(found).await.map_err(|failure| {
                format!("can't list the streams of {}: {failure}", sources.all)
            })?;
        for name in found.streams.unwrap_or_default() {
            let stream = sources.remote.call(sources.context.get_stream(&name)).await;
            let stream = match stream {
                Ok(stream) => stream,
                // It was deleted just now.
                Err(Failure::Failed(_)) => continue,
                Err(failure) => return Err(format!("stream {name:?}: {failure}")),
            };
            let info: &Info = stream.cached_info();
            let made = info.created.unix_timestamp();
            if self.streams.contains(&(name.clone(), made)) {
                continue;
            }
            let position = self
                .positions
                .get(&name)
                .filter(|position| position.made == made);
            let after = position.map_or(0, |position| position.number);
            let first = info.state.first_sequence;
            if first > after + 1 && after > 0 {
                tracing::error!(
                    stream = name,
                    after,
                    first,
                    "events of the site have gone from the stream before they were handled here: give it more room"
                );
            }
            let number = self.streams.len() as u32;
            self.streams.push((name.clone(), made));
            let (sources, sender) = (self.sources.clone(), self.sender.clone());
            self.readers
                .spawn(read(sources, name, made, number, after, sender));
        }
        Ok(())
    }

    /// What comes next. Nothing is lost if this is dropped.
    pub(super) async fn next(&mut self) -> Result<Arrived, String> {
        loop {
            let due = self.looked.map_or(Duration::ZERO, |looked| {
                LOOK_EVERY.saturating_sub(looked.elapsed())
            });
            if due.is_zero() {
                self.look().await?;
                self.looked = Some(Instant::now());
                continue;
            }
            tokio::select! {
                arrived = self.arrived.recv() => return Ok(arrived.expect("there is a sender")),
                () = tokio::time::sleep(due) => {}
            }
        }
    }

    /// What has come already.
    pub(super) fn more(&mut self) -> Option<Arrived> {
        self.arrived.try_recv().ok()
    }

    /// Up to where these come.
    pub(super) fn positions(&self, places: impl Iterator<Item = Place>) -> Positions {
        let mut last: BTreeMap<u32, u64> = BTreeMap::new();
        for place in places {
            let number = last.entry(place.stream).or_default();
            *number = place.number.max(*number);
        }
        let named = |(stream, number): (u32, u64)| {
            let (name, made) = &self.streams[stream as usize];
            let position = Position {
                made: *made,
                number,
            };
            (name.clone(), position)
        };
        last.into_iter().map(named).collect()
    }
}

impl Arrived {
    /// The event, with its place; None: nobody wants it.
    pub(super) fn event(self, sitting: u64, outstanding: &Arc<Outstanding>) -> Option<Event> {
        let mut event = self.event?;
        let place = Place {
            sitting,
            stream: self.stream,
            number: self.number,
        };
        let bytes = event.topic.as_str().len() + event.payload.len();
        event.receipt = Some(outstanding.ticket(place, bytes));
        Some(event)
    }
}

/// Reads a stream from behind `after` on, for as long as it is that one.
async fn read(
    sources: Arc<Sources>,
    name: String,
    made: i64,
    number: u32,
    mut after: u64,
    sender: mpsc::Sender<Arrived>,
) {
    let mut pauses = sources.remote.patience().pauses();
    let mut told = None;
    loop {
        let before = after;
        let why = match read_on(&sources, &name, made, number, &mut after, &sender).await {
            Ok(()) => return,
            Err(why) => why,
        };
        if after > before {
            pauses = sources.remote.patience().pauses();
        }
        if told.as_ref() != Some(&why) {
            tracing::warn!(stream = name, "the site's events: {why}");
            told = Some(why);
        }
        tokio::time::sleep(pauses.next().unwrap_or_default()).await;
    }
}

/// Ends well if nobody wants it any more, or the stream is another one.
async fn read_on(
    sources: &Sources,
    name: &str,
    made: i64,
    number: u32,
    after: &mut u64,
    sender: &mpsc::Sender<Arrived>,
) -> Result<(), String> {
    let stream = sources.remote.call(sources.context.get_stream(name)).await;
    let stream = match stream {
        Ok(stream) => stream,
        Err(failure) => return Err(failure.to_string()),
    };
    if stream.cached_info().created.unix_timestamp() != made {
        return Ok(());
    }
    let config = OrderedConfig {
        filter_subjects: sources.subjects.clone(),
        deliver_policy: DeliverPolicy::ByStartSequence {
            start_sequence: *after + 1,
        },
        ..OrderedConfig::default()
    };
    let consumer = sources.remote.call(stream.create_consumer(config)).await;
    let consumer = consumer.map_err(|failure| failure.to_string())?;
    let messages = sources.remote.call(consumer.messages()).await;
    let mut messages = messages.map_err(|failure| failure.to_string())?;
    // The client makes it anew by itself, perhaps on another stream that has the name by now.
    let mut consumer = None;
    while let Some(message) = messages.next().await {
        let message = message.map_err(|error| error.to_string())?;
        let info = message.info().map_err(|error| error.to_string())?;
        let at = info.stream_sequence;
        if consumer.as_deref() != Some(info.consumer) {
            consumer = Some(info.consumer.to_owned());
            let now = sources.remote.call(sources.context.get_stream(name)).await;
            let now = now.map_err(|failure| failure.to_string())?;
            if now.cached_info().created.unix_timestamp() != made {
                return Ok(());
            }
        }
        // A consumer that the client makes anew before the first message has come begins at the beginning.
        if at <= *after {
            return Err("the client began anew".into());
        }
        let event = event(&message.message, sources);
        *after = at;
        if sender
            .send(Arrived {
                stream: number,
                number: at,
                event,
            })
            .await
            .is_err()
        {
            return Ok(());
        }
    }
    Err("the servers have stopped sending them".into())
}

fn event(message: &Message, sources: &Sources) -> Option<Event> {
    let topic = topic_of(&message.subject, sources.before_topic)?;
    if !sources
        .subscriptions
        .iter()
        .any(|filter| filter.matches(&topic))
    {
        return None;
    }
    let topic = Topic::new(topic).ok()?;
    let headers = message.headers.as_ref();
    let via = headers.and_then(|headers| headers.get(VIA));
    let hops = via.map_or(0, |via| hops(via.as_str()));
    let now = Instant::now();
    if hops > MAX_HOPS {
        sources.dead_letters.add(Reason::Looped, now, || DeadLetter {
            error: Some(format!(
                "it came through more than {MAX_HOPS} apps and mappings: does one of the site get what it publishes?"
            )),
            ..DeadLetter::new(Reason::Looped, &sources.worker, &topic, &message.payload, 1)
        });
        return None;
    }
    let time = headers.and_then(timestamp).unwrap_or_else(unix_time_ns);
    Some(Event {
        hops,
        ..Event::at(topic, message.payload.clone(), now, time)
    })
}

fn timestamp(headers: &HeaderMap) -> Option<u64> {
    headers.get(TIMESTAMP)?.as_str().parse().ok()
}
