//! What is measured, the same for both sides.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bytes::Bytes;
use headgate::event::{Topic, TopicFilter};
use headgate_bench::process;

use crate::mailbox::TrieHub;
use crate::router::RouterHub;
use crate::{Scenario, Side};

/// Messages that a publisher hands over at once, as an edge does with what one read gave.
const BATCH: usize = 64;

/// Bytes of a payload.
const PAYLOAD: usize = 100;

/// How long a silence means that nothing more will come.
const SILENCE: Duration = Duration::from_millis(500);

pub trait Hub {
    type Publisher: Publisher + Send + 'static;
    type Subscriber: Subscriber + Send + 'static;

    fn publisher(&self, name: &str) -> Self::Publisher;
    fn subscriber(&self, name: &str, filter: &TopicFilter) -> Self::Subscriber;

    /// How many messages a publisher may be ahead of the slowest subscriber before messages are
    /// lost; none if the hub itself makes publishers wait.
    fn lossless_window(&self) -> Option<u64>;
}

pub trait Publisher {
    /// Takes all of `batch` and leaves it empty.
    fn publish(&mut self, batch: &mut Vec<(Topic, Bytes)>);
    fn close(self);
}

pub trait Subscriber {
    /// Hands what has come to `each`; false if nothing came within `patience`.
    fn receive(&mut self, patience: Duration, each: &mut dyn FnMut(&[u8])) -> bool;
    fn subscribe(&mut self, filter: &TopicFilter);
    fn unsubscribe(&mut self, filter: &TopicFilter);
}

type Measured = Vec<(String, f64)>;

pub fn run(side: Side, scenario: Scenario, shrink: usize) -> Result<Measured> {
    match side {
        Side::Router => scenario_on(|| RouterHub::new(4 << 20, 4), scenario, shrink),
        Side::RouterTiny => scenario_on(|| RouterHub::new(1024, 2), scenario, shrink),
        Side::Trie => scenario_on(TrieHub::default, scenario, shrink),
    }
}

fn scenario_on<H: Hub>(
    hub: impl FnOnce() -> H,
    scenario: Scenario,
    shrink: usize,
) -> Result<Measured> {
    let hub = hub();
    match scenario {
        Scenario::IdleOwnTopics => idle(&hub, 10_000 / shrink, |client| {
            format!("plant/line{}/machine{client}/command", client % 10)
        }),
        Scenario::IdleSameFilter => idle(&hub, 10_000 / shrink, |_| "plant/#".to_owned()),
        Scenario::OneToOne => throughput(&hub, 1, 2_000_000 / shrink as u64),
        Scenario::OneToTen => throughput(&hub, 10, 400_000 / shrink as u64),
        Scenario::Flood => flood(&hub, 2_000_000 / shrink as u64),
        Scenario::ManyTopics => many_topics(&hub, 1_000_000 / shrink),
        Scenario::PassingFilters => passing_filters(&hub, 20_000 / shrink),
    }
}

fn topic(name: impl Into<Bytes>) -> Topic {
    Topic::new(name).expect("a topic name made here is valid")
}

fn filter(name: &str) -> TopicFilter {
    TopicFilter::new(name).expect("a filter made here is valid")
}

/// A payload that starts with `sequence`.
fn payload(sequence: u64) -> Bytes {
    let mut bytes = [b'.'; PAYLOAD];
    bytes[..8].copy_from_slice(&sequence.to_le_bytes());
    Bytes::copy_from_slice(&bytes)
}

fn sequence(payload: &[u8]) -> u64 {
    payload
        .first_chunk()
        .map_or(u64::MAX, |bytes| u64::from_le_bytes(*bytes))
}

fn resident() -> Result<f64> {
    Ok(process::resident_bytes(std::process::id())? as f64)
}

/// Memory of subscribers that have nothing to do, and again after some traffic.
fn idle<H: Hub>(hub: &H, count: usize, filter_of: impl Fn(usize) -> String) -> Result<Measured> {
    const MESSAGES: usize = 100;
    let before = resident()?;
    let start = Instant::now();
    let mut clients: Vec<H::Subscriber> = (0..count)
        .map(|client| hub.subscriber(&format!("client-{client}"), &filter(&filter_of(client))))
        .collect();
    let connecting = start.elapsed();
    let connected = resident()?;
    let mut measured = vec![
        (
            "KiB a client, connected and subscribed".to_owned(),
            (connected - before) / count as f64 / 1024.0,
        ),
        (
            "µs to connect and subscribe".to_owned(),
            connecting.as_secs_f64() * 1e6 / count as f64,
        ),
    ];
    // Only with topics of their own: each client gets 100 messages and takes them out.
    if filter_of(0) != filter_of(1) {
        let mut publisher = hub.publisher("publisher");
        for (client, subscriber) in clients.iter_mut().enumerate() {
            let name = topic(filter_of(client));
            let mut batch = (0..MESSAGES)
                .map(|message| (name.clone(), payload(message as u64)))
                .collect();
            publisher.publish(&mut batch);
            let mut received = 0;
            while received < MESSAGES {
                // The smallest segments hold fewer than 100 messages: the rest is lost at once.
                if !subscriber.receive(Duration::from_millis(20), &mut |_| received += 1) {
                    break;
                }
            }
        }
        measured.push((
            "KiB a client after 100 messages each, all read".to_owned(),
            (resident()? - before) / count as f64 / 1024.0,
        ));
    }
    Ok(measured)
}

/// One publisher at full speed, `count` subscribers, nothing lost.
fn throughput<H: Hub>(hub: &H, count: usize, messages: u64) -> Result<Measured> {
    let progress: Arc<Vec<AtomicU64>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
    let receivers: Vec<_> = (0..count)
        .map(|index| {
            let mut subscriber = hub.subscriber(&format!("subscriber-{index}"), &filter("plant/#"));
            let progress = progress.clone();
            thread::spawn(move || {
                let mut received = 0;
                let mut next = 0;
                let mut ordered = true;
                while received < messages {
                    let some = subscriber.receive(Duration::from_secs(5), &mut |payload| {
                        ordered &= sequence(payload) == next;
                        next += 1;
                        received += 1;
                        // A counter a message would cost as much as the message.
                        if received % 256 == 0 {
                            progress[index].store(received, Ordering::Relaxed);
                        }
                    });
                    if !some {
                        break;
                    }
                }
                (received, ordered)
            })
        })
        .collect();
    let mut publisher = hub.publisher("publisher");
    let name = topic("plant/line1/temperature");
    let window = hub.lossless_window();
    let cpu = process::cpu_time(std::process::id())?;
    let start = Instant::now();
    let mut sent = 0;
    let mut batch = Vec::with_capacity(BATCH);
    while sent < messages {
        let size = (BATCH as u64).min(messages - sent);
        batch.extend((sent..sent + size).map(|sequence| (name.clone(), payload(sequence))));
        publisher.publish(&mut batch);
        sent += size;
        if let Some(window) = window {
            let slowest = || {
                let each = progress.iter().map(|one| one.load(Ordering::Relaxed));
                each.min().unwrap_or(0)
            };
            while sent > slowest() + window {
                thread::sleep(Duration::from_micros(50));
            }
        }
    }
    let mut received = 0;
    for receiver in receivers {
        let (count, ordered) = receiver.join().expect("a subscriber does not panic");
        ensure!(ordered, "messages came out of order or some were lost");
        received += count;
    }
    let elapsed = start.elapsed();
    let cpu = process::cpu_time(std::process::id())? - cpu;
    ensure!(received == messages * count as u64, "messages were lost");
    Ok(vec![
        (
            "messages delivered a second".to_owned(),
            received as f64 / elapsed.as_secs_f64(),
        ),
        (
            "CPU µs a delivered message".to_owned(),
            cpu.as_secs_f64() * 1e6 / received as f64,
        ),
    ])
}

/// A publisher that nothing but the hub slows down, a subscriber that works 1 µs a message.
fn flood<H: Hub>(hub: &H, messages: u64) -> Result<Measured> {
    let mut subscriber = hub.subscriber("subscriber", &filter("plant/#"));
    let before = resident()?;
    let receiver = thread::spawn(move || {
        let mut received = 0_u64;
        while subscriber.receive(SILENCE, &mut |_| {
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(1) {
                std::hint::spin_loop();
            }
            received += 1;
        }) {}
        received
    });
    let mut publisher = hub.publisher("publisher");
    let name = topic("plant/line1/temperature");
    let mut batch = Vec::with_capacity(BATCH);
    let start = Instant::now();
    let mut sent = 0;
    while sent < messages {
        let size = (BATCH as u64).min(messages - sent);
        batch.extend((sent..sent + size).map(|sequence| (name.clone(), payload(sequence))));
        publisher.publish(&mut batch);
        sent += size;
    }
    let publishing = start.elapsed();
    let received = receiver.join().expect("the subscriber does not panic");
    let peak = process::peak_resident_bytes(std::process::id())? as f64;
    Ok(vec![
        ("messages published".to_owned(), messages as f64),
        (
            "messages lost without an error".to_owned(),
            (messages - received) as f64,
        ),
        (
            "% lost".to_owned(),
            (messages - received) as f64 * 100.0 / messages as f64,
        ),
        (
            "seconds that the publisher took".to_owned(),
            publishing.as_secs_f64(),
        ),
        ("peak MiB".to_owned(), (peak - before) / f64::from(1 << 20)),
    ])
}

/// Memory that topics leave behind once their messages have been read.
fn many_topics<H: Hub>(hub: &H, count: usize) -> Result<Measured> {
    let mut subscriber = hub.subscriber("subscriber", &filter("#"));
    let mut publisher = hub.publisher("publisher");
    let same = topic("plant/line1/machine1000000/temperature");
    // The same messages on one topic fill everything that does not depend on topics.
    exchange(&mut publisher, &mut subscriber, count, |_| same.clone());
    let one_topic = resident()?;
    let start = Instant::now();
    exchange(&mut publisher, &mut subscriber, count, |index| {
        topic(format!("plant/line1/machine{index:07}/temperature"))
    });
    let elapsed = start.elapsed();
    let all_topics = resident()?;
    let mib = f64::from(1 << 20);
    let start = Instant::now();
    for index in 0..20 {
        subscriber.subscribe(&filter(&format!("response/{index}")));
    }
    let subscribing = start.elapsed();
    publisher.close();
    thread::sleep(SILENCE);
    let publisher_gone = resident()?;
    Ok(vec![
        ("MiB that stay".to_owned(), (all_topics - one_topic) / mib),
        (
            "bytes a topic that stay".to_owned(),
            (all_topics - one_topic) / count as f64,
        ),
        (
            "MiB that stay when the publisher has left".to_owned(),
            (publisher_gone - one_topic) / mib,
        ),
        (
            "µs a message".to_owned(),
            elapsed.as_secs_f64() * 1e6 / count as f64,
        ),
        (
            "µs a new subscription afterwards".to_owned(),
            subscribing.as_secs_f64() * 1e6 / 20.0,
        ),
    ])
}

/// Publishes `count` messages and takes each out again, a batch at a time.
fn exchange(
    publisher: &mut impl Publisher,
    subscriber: &mut impl Subscriber,
    count: usize,
    name: impl Fn(usize) -> Topic,
) {
    // Small enough for segments of 1 KiB.
    const AT_ONCE: usize = 4;
    let mut batch = Vec::new();
    let mut sent = 0;
    let mut received = 0;
    while sent < count {
        let size = AT_ONCE.min(count - sent);
        batch.extend((sent..sent + size).map(|index| (name(index), payload(index as u64))));
        publisher.publish(&mut batch);
        sent += size;
        while received < sent {
            let some = subscriber.receive(Duration::from_secs(5), &mut |_| received += 1);
            assert!(some, "a message was lost");
        }
    }
}

/// Memory and time that filters leave behind once they are unsubscribed.
fn passing_filters<H: Hub>(hub: &H, count: usize) -> Result<Measured> {
    let mut subscriber = hub.subscriber("requester", &filter("warm/up"));
    let mut publisher = hub.publisher("responder");
    let before = resident()?;
    let start = Instant::now();
    for index in 0..count {
        let name = format!("response/{index:05}/to/one/request");
        let filter = filter(&name);
        subscriber.subscribe(&filter);
        let name = topic(name);
        exchange(&mut publisher, &mut subscriber, 1, |_| name.clone());
        subscriber.unsubscribe(&filter);
    }
    let elapsed = start.elapsed();
    let after = resident()?;
    // What everyone else pays from now on: the first message on a topic that nobody has used yet.
    let fresh = 1000.min(count);
    subscriber.subscribe(&filter("plant/#"));
    let start = Instant::now();
    exchange(&mut publisher, &mut subscriber, fresh, |index| {
        topic(format!("plant/line1/machine{index}"))
    });
    let first_messages = start.elapsed();
    Ok(vec![
        (
            "MiB that stay".to_owned(),
            (after - before) / f64::from(1 << 20),
        ),
        (
            "bytes a filter that stay".to_owned(),
            (after - before) / count as f64,
        ),
        (
            "µs a request (subscribe, message, unsubscribe)".to_owned(),
            elapsed.as_secs_f64() * 1e6 / count as f64,
        ),
        (
            "µs afterwards for a first message on a new topic".to_owned(),
            first_messages.as_secs_f64() * 1e6 / fresh as f64,
        ),
    ])
}
