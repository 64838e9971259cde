//! A link to an MQTT broker: one connection, by which events are shipped and commands come.
//!
//! Events go out as QoS 1 messages, as many at once as the broker allows, and the cursors move over contiguous
//! acknowledgements. `docs/uplink-mqtt.md` says what is promised.

mod dial;
mod packets;
mod taking;
mod wire;

use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use backon::ExponentialBackoff;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    Disconnect, DisconnectReasonCode, Packet, PingReq, PubAck, Publish, PublishProperties,
};
use rustc_hash::FxHashMap;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};

use super::connection::{PATIENCE, told_to_stop};
use super::feed::{Feed, Message, SAVE_EVERY};
use super::jetstream::id;
use super::links::{Destination, Link, Prefixes, Take};
use super::progress::{LinkProgress, TakeProgress};
use crate::broker::Door;
use crate::event::Topic;
use crate::event::via::{VIA, and_then};
use dial::{Dialled, Terms, dial};
use packets::{Incoming, Meaning, Reason};
use taking::Taking;
use wire::{Reader, Writer};

/// The user property that tells an event from all others: `GATEWAY/EPOCH/SEQUENCE`.
const HEADGATE_ID: &str = "headgate-id";
const HEADGATE_TIMESTAMP: &str = "headgate-timestamp";

/// Messages that are written for one destination before the next one has its turn.
const AT_ONCE: usize = 64;

/// Bytes that wait to be written.
const MOST_UNWRITTEN: usize = 256 << 10;

/// When the gateway ends: for what is on its way to be acknowledged.
const FAREWELL: Duration = Duration::from_millis(400);

/// How often a subscription is tried again that the broker refuses.
const SUBSCRIBE_AGAIN: Duration = Duration::from_secs(30);

pub(super) struct Bridge {
    link: Arc<Link>,
    ways: Vec<Way>,
    taking: Taking,
    progress: Arc<LinkProgress>,
    /// Of so many messages one has made the broker end the connection: they go one by one.
    suspects: usize,
}

/// What is shipped to one place.
struct Way {
    feed: Feed,
    prefixes: Prefixes,
    retain: bool,
    /// The broker takes nothing before.
    rests_until: Option<Instant>,
    pauses: ExponentialBackoff,
}

/// A message on its way.
struct Sent {
    way: usize,
    sequence: u64,
    attempt: u64,
}

/// Why a connection has ended.
enum End {
    Stopped,
    /// It is made anew. Why is known where it matters.
    Again,
    /// Without a word of the broker.
    Closed,
    Failed(String),
}

impl From<std::io::Error> for End {
    fn from(error: std::io::Error) -> End {
        End::Failed(format!("the connection is lost: {error}"))
    }
}

impl Bridge {
    /// The link leads to an MQTT broker.
    pub(super) fn new(
        link: Arc<Link>,
        feeds: Vec<Feed>,
        takes: Vec<(Take, Arc<TakeProgress>)>,
        gateway: Arc<str>,
        door: &Door,
        progress: Arc<LinkProgress>,
    ) -> Bridge {
        let ways = feeds.into_iter().map(|feed| {
            let Destination::Topic { prefixes, retain } = feed.ship().to.clone() else {
                unreachable!("its link says so");
            };
            Way {
                feed,
                prefixes,
                retain,
                rests_until: None,
                pauses: PATIENCE.pauses(),
            }
        });
        Bridge {
            ways: ways.collect(),
            taking: Taking::new(takes, link.clone(), gateway, door),
            link,
            progress,
            suspects: 0,
        }
    }

    pub(super) async fn run(
        mut self,
        drain: watch::Receiver<bool>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut pauses = PATIENCE.pauses();
        loop {
            let shipped = self.shipped();
            let end = match self.dial(&mut stop).await {
                Ok(dialled) => {
                    let end = self.session(dialled, &drain, &mut stop).await;
                    let end = end.err().unwrap_or(End::Stopped);
                    for way in &mut self.ways {
                        way.feed.window.go_back();
                    }
                    end
                }
                Err(end) => end,
            };
            self.tick();
            self.progress.disconnected();
            if self.shipped() > shipped {
                pauses = PATIENCE.pauses();
            }
            match end {
                End::Stopped => break,
                End::Again => {}
                End::Closed => self.progress.failed(&format!(
                    "the broker has closed the connection; if it does so again and again, see whether another client \
                     is named {:?}, too",
                    self.link.session.client_id
                )),
                End::Failed(why) => self.progress.failed(&why),
            }
            let pause = pauses.next().unwrap_or(PATIENCE.longest_pause);
            if timeout(pause, told_to_stop(&mut stop)).await.is_ok() {
                break;
            }
        }
        for way in self.ways {
            way.feed.close().await;
        }
    }

    fn shipped(&self) -> u64 {
        let ways = self.ways.iter();
        ways.map(|way| way.feed.progress.events.load(Ordering::Relaxed))
            .sum()
    }

    /// Connects to the first of the servers that lets the gateway in.
    async fn dial(&mut self, stop: &mut watch::Receiver<bool>) -> Result<Dialled, End> {
        let mut refusals = Vec::new();
        for server in &self.link.servers {
            let dialled = tokio::select! {
                dialled = dial(&self.link, server) => dialled,
                () = told_to_stop(stop) => return Err(End::Stopped),
            };
            match dialled {
                Ok(dialled) => {
                    tracing::info!(link = self.link.name, server, "connected");
                    self.progress.connected();
                    return Ok(dialled);
                }
                Err(why) => refusals.push(why),
            }
        }
        Err(End::Failed(refusals.join("; ")))
    }

    /// Ships and takes while all goes well.
    async fn session(
        &mut self,
        dialled: Dialled,
        drain: &watch::Receiver<bool>,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<(), End> {
        let terms = dialled.terms;
        let max_packet = self.link.session.max_packet_bytes as usize;
        let mut reader = Reader::new(dialled.reader, dialled.input, max_packet);
        let mut writer = Writer::new(dialled.writer);
        let mut ids = Ids::default();
        if let Some(mut subscribe) = self.taking.begin(terms.session_present) {
            subscribe.pkid = ids.next();
            writer.push(Packet::Subscribe(subscribe))?;
        }
        let mut subscribed = Instant::now();
        let mut ticks = interval(SAVE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut leaves: Option<Instant> = None;
        // What came with the answer to CONNECT.
        self.handle(&mut reader, &mut ids, *drain.borrow())?;
        loop {
            match leaves {
                None => {
                    self.fill()?;
                    self.send(&mut writer, &mut ids, &terms)?;
                }
                Some(until) => {
                    let is_done = ids.sent.is_empty() && !self.taking.owes();
                    if is_done || Instant::now() >= until {
                        let reason = DisconnectReasonCode::NormalDisconnection;
                        writer.push(Packet::Disconnect(Disconnect::new(reason)))?;
                        // Whatever comes of it, the gateway ends.
                        let _ = timeout(FAREWELL / 4, writer.flush()).await;
                        return Ok(());
                    }
                }
            }
            let patience = self.link.timeout;
            let Bridge { ways, taking, .. } = &mut *self;
            let wake = ways.iter().flat_map(|way| {
                let deadline = way.feed.window.deadline(patience);
                deadline.into_iter().chain(way.rests_until)
            });
            let wake = wake.chain(leaves).min();
            let wake = async {
                match wake {
                    Some(wake) => sleep_until(wake.into()).await,
                    None => std::future::pending().await,
                }
            };
            let more = async {
                let ways = ways.iter().filter(|way| way.wants_more());
                let mut ready: FuturesUnordered<_> = ways.map(|way| way.feed.ready()).collect();
                ready.next().await
            };
            tokio::select! {
                read = reader.read() => {
                    read?;
                    self.handle(&mut reader, &mut ids, *drain.borrow())?;
                }
                written = writer.flush(), if writer.has_more() => written?,
                // When the journal is closed, the gateway ends.
                Some(true) = more, if leaves.is_none() => {}
                () = taking.settled(), if taking.owes() => {
                    for id in taking.acknowledge() {
                        writer.push(Packet::PubAck(PubAck::new(id, None)))?;
                    }
                }
                () = wake => self.look_at_clock()?,
                _ = ticks.tick() => {
                    self.tick();
                    if let Some(quiet) = reader.is_dead(&mut writer, terms.keep_alive, patience)? {
                        return Err(End::Failed(format!("the broker has said nothing for {quiet:?}")));
                    }
                    if subscribed.elapsed() >= SUBSCRIBE_AGAIN {
                        subscribed = Instant::now();
                        if let Some(mut subscribe) = self.taking.subscribe_again() {
                            subscribe.pkid = ids.next();
                            writer.push(Packet::Subscribe(subscribe))?;
                        }
                    }
                }
                () = told_to_stop(stop), if leaves.is_none() => {
                    leaves = Some(Instant::now() + FAREWELL);
                }
            }
        }
    }

    fn tick(&mut self) {
        for way in &mut self.ways {
            way.feed.tick(Instant::now());
            way.feed.show();
        }
    }

    /// Something is due.
    fn look_at_clock(&mut self) -> Result<(), End> {
        let now = Instant::now();
        let patience = self.link.timeout;
        for way in &mut self.ways {
            way.rests_until = way.rests_until.filter(|until| *until > now);
            if way
                .feed
                .window
                .deadline(patience)
                .is_some_and(|deadline| deadline <= now)
            {
                let why = format!("the broker has acknowledged nothing for {patience:?}");
                way.feed.progress.failed(&self.link.name, &why);
                return Err(End::Again);
            }
        }
        Ok(())
    }

    fn fill(&mut self) -> Result<(), End> {
        for way in &mut self.ways {
            let prefixes = &way.prefixes;
            let filled = way.feed.fill(|record| {
                let topic = prefixes.apply(record.topic.as_str());
                match Topic::new(topic.clone()) {
                    Ok(_) => Ok(topic),
                    Err(_) => {
                        Err("with its prefixes its topic is none: it has to have 1 to 65,535 bytes")
                    }
                }
            });
            filled.map_err(|error| End::Failed(format!("can't read the journal: {error}")))?;
        }
        Ok(())
    }

    /// Writes what may go.
    fn send(&mut self, writer: &mut Writer, ids: &mut Ids, terms: &Terms) -> Result<(), End> {
        let most = match self.suspects {
            0 => terms.receive_maximum,
            _ => 1,
        };
        loop {
            let mut sent = false;
            for turn in 0..self.ways.len() {
                let index = (ids.turn + turn) % self.ways.len();
                let way = &mut self.ways[index];
                for _ in 0..AT_ONCE {
                    let is_full = ids.sent.len() >= most || writer.len() >= MOST_UNWRITTEN;
                    if is_full || way.rests_until.is_some() {
                        break;
                    }
                    match way.send(index, writer, ids, terms)? {
                        true => sent = true,
                        false => break,
                    }
                }
            }
            ids.turn += 1;
            if !sent {
                return Ok(());
            }
        }
    }

    /// Does what the packets say that have come.
    fn handle(&mut self, reader: &mut Reader, ids: &mut Ids, draining: bool) -> Result<(), End> {
        let now = Instant::now();
        let mut taken = false;
        while let Some(packet) = reader.next().map_err(End::Failed)? {
            let packet = match packet {
                Incoming::PubAck { id, reason } => {
                    self.acknowledged(id, &reason, ids);
                    continue;
                }
                Incoming::Disconnect(reason) => return Err(self.dismissed(&reason, ids)),
                Incoming::OldConnAck => return Err(unexpected(&packet)),
                Incoming::Other(packet) => *packet,
            };
            match packet {
                // It comes again to who takes it then.
                Packet::Publish(_) if draining => {}
                Packet::Publish(message) => {
                    if message.qos == QoS::ExactlyOnce {
                        let why =
                            "the broker sends what must come exactly once, which was not asked for";
                        return Err(End::Failed(why.into()));
                    }
                    self.taking.take_in(message, now);
                    taken = true;
                }
                Packet::SubAck(answer) => self.taking.subscribed(&answer),
                Packet::PingResp(_) => {}
                other => return Err(unexpected(&other)),
            }
        }
        if taken {
            self.taking.flush(now);
        }
        Ok(())
    }

    fn acknowledged(&mut self, id: u16, reason: &Reason, ids: &mut Ids) {
        let Some(sent) = ids.sent.remove(&id) else {
            return;
        };
        self.suspects = self.suspects.saturating_sub(1);
        let way = &mut self.ways[sent.way];
        let link = &self.link.name;
        match reason.meaning() {
            Meaning::Taken => {
                if let Some(acknowledged) = way.feed.window.acknowledge(sent.sequence) {
                    way.feed.progress.acknowledged(acknowledged, false);
                    way.pauses = PATIENCE.pauses();
                }
            }
            // What was given up does not matter.
            _ if !way.feed.window.is_current(sent.attempt) => {}
            Meaning::Refused => {
                let why = format!("the broker refuses it: {}", reason.text());
                way.feed.refuse(sent.sequence, &why);
            }
            Meaning::NotNow => {
                let why = format!(
                    "the broker takes no more now ({}); it is tried again and again",
                    reason.text()
                );
                way.feed.progress.failed(link, &why);
                way.feed.window.go_back();
                let pause = way.pauses.next().unwrap_or(PATIENCE.longest_pause);
                way.rests_until = Some(Instant::now() + pause);
            }
        }
    }

    /// The broker ends the connection.
    fn dismissed(&mut self, reason: &Reason, ids: &mut Ids) -> End {
        let why = format!("the broker ends the connection: {}", reason.text());
        if reason.blames_message() && !ids.sent.is_empty() {
            if self.suspects > 0 && ids.sent.len() == 1 {
                // It went alone, so it is the one.
                for sent in ids.sent.values() {
                    self.ways[sent.way].feed.refuse(sent.sequence, &why);
                }
                self.suspects -= 1;
            } else {
                self.suspects = ids.sent.len();
            }
            return End::Failed(why);
        }
        match reason.code {
            0x8e => End::Failed(format!(
                "{why}: another client is named {:?}, too; give each gateway a name (uplink.gateway) or a client_id of \
                 its own",
                self.link.session.client_id
            )),
            _ => End::Failed(why),
        }
    }
}

impl Way {
    fn wants_more(&self) -> bool {
        self.rests_until.is_none() && self.feed.window.has_room()
    }

    /// Writes the next message, if there is one.
    fn send(
        &mut self,
        index: usize,
        writer: &mut Writer,
        ids: &mut Ids,
        terms: &Terms,
    ) -> Result<bool, End> {
        let sources = self.feed.sources().clone();
        let progress = self.feed.progress.clone();
        let Some(outgoing) = self.feed.window.send(Instant::now()) else {
            return Ok(false);
        };
        let sequence = outgoing.sequence;
        let Message {
            to,
            payload,
            timestamp_ns,
            via,
            ..
        } = outgoing.message;
        let mut publish = Publish::new(
            to.as_str(),
            QoS::AtLeastOnce,
            payload.clone(),
            Some(PublishProperties {
                user_properties: vec![
                    (
                        HEADGATE_ID.into(),
                        id(&sources.gateway, sources.journal.epochs(), sequence),
                    ),
                    (HEADGATE_TIMESTAMP.into(), timestamp_ns.to_string()),
                    (VIA.into(), and_then(via, &sources.gateway)),
                ],
                ..PublishProperties::default()
            }),
        );
        publish.dup = outgoing.again;
        publish.retain = self.retain;
        publish.pkid = ids.next();
        if outgoing.again {
            progress.resent.fetch_add(1, Ordering::Relaxed);
        }
        let size = publish.size();
        if size > terms.max_packet_bytes {
            let why = format!(
                "it makes a packet of {size} bytes, and the broker takes {} at the most",
                terms.max_packet_bytes
            );
            self.feed.refuse(sequence, &why);
            return Ok(true);
        }
        let sent = Sent {
            way: index,
            sequence,
            attempt: outgoing.attempt,
        };
        ids.sent.insert(publish.pkid, sent);
        writer.push(Packet::Publish(publish))?;
        Ok(true)
    }
}

/// The packet identifiers of one connection.
#[derive(Default)]
struct Ids {
    last: u16,
    sent: FxHashMap<u16, Sent>,
    /// Which way begins.
    turn: usize,
}

impl Ids {
    /// One that no message has that is on its way.
    fn next(&mut self) -> u16 {
        loop {
            self.last = self.last.checked_add(1).unwrap_or(1);
            if let Entry::Vacant(_) = self.sent.entry(self.last) {
                return self.last;
            }
        }
    }
}

fn unexpected(packet: &impl std::fmt::Debug) -> End {
    End::Failed(format!(
        "the broker sends what no client expects: {packet:?}"
    ))
}
