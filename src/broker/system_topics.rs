//! What the gateway says of itself below `$SYS/broker`, with mosquitto's names
//! (<https://mosquitto.org/man/mosquitto-8.html>), so that what reads those works here, too.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustc_hash::FxHashMap;

use super::archive::Archive;
use super::fanout::Publisher;
use super::mailbox::Mailbox;
use super::message::Message;
use super::{Phase, Shared};
use crate::event::Topic;
use crate::metrics::process::Usage;

/// Over how many minutes loads are averaged.
const PERIODS_MIN: [u32; 3] = [1, 5, 15];

/// Publishes what has changed, every `system_topics_every`, until the shutdown begins.
pub(super) async fn publish(shared: Arc<Shared>) {
    let every = shared.config.system_topics_every;
    let mut publisher = Publisher::new(shared.fanout.clone());
    let mut said: FxHashMap<&'static str, String> = FxHashMap::default();
    let mut loads = Loads::default();
    let started = Instant::now();
    loop {
        let now = Instant::now();
        shared.fanout.sweep_retained(now);
        let mut values = values(&shared, now.duration_since(started));
        values.extend(loads.update(&totals(&shared), every));
        for (name, value) in values {
            if said.get(name) != Some(&value) {
                let message = Arc::new(message(name, &value));
                shared.fanout.retain_system(message.clone());
                publisher.add(&message.topic, message.payload.len(), || Message {
                    topic: message.topic.clone(),
                    payload: message.payload.clone(),
                    properties: None,
                    ..*message
                });
                said.insert(name, value);
            }
        }
        publisher.flush(now);
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = shared.leaves(Phase::Running) => return,
        }
    }
}

fn message(name: &str, value: &str) -> Message {
    let topic = Topic::new(format!("$SYS/broker/{name}")).expect("the names below are topics");
    Message {
        retain: true,
        ..Message::new(topic, Bytes::copy_from_slice(value.as_bytes()))
    }
}

fn values(shared: &Shared, uptime: Duration) -> Vec<(&'static str, String)> {
    let stats = &shared.stats;
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed).to_string();
    let (connected, away) = shared.registry.counts();
    let mailboxes = &shared.mailboxes;
    let (retained, retained_bytes) = shared.fanout.retained_size();
    let stored = (retained + queued_messages(shared)).to_string();
    let on_disk = mailboxes.archive.as_ref().map(Archive::queued_bytes);
    let stored_bytes = retained_bytes as u64
        + mailboxes.queued_bytes.load(Ordering::Relaxed) as u64
        + on_disk.unwrap_or(0);
    let mut values = vec![
        (
            "version",
            concat!("headgate ", env!("CARGO_PKG_VERSION")).to_owned(),
        ),
        ("uptime", format!("{} seconds", uptime.as_secs())),
        ("clients/connected", connected.to_string()),
        ("clients/active", connected.to_string()),
        ("clients/disconnected", away.to_string()),
        ("clients/inactive", away.to_string()),
        ("clients/total", (connected + away).to_string()),
        ("clients/maximum", get(&stats.most_connections)),
        ("clients/expired", get(&stats.expired)),
        ("messages/received", get(&stats.packets_received)),
        ("messages/sent", get(&stats.packets_sent)),
        ("publish/messages/received", get(&stats.messages_received)),
        ("publish/messages/sent", get(&stats.messages_sent)),
        ("publish/messages/dropped", get(&mailboxes.dropped)),
        ("publish/bytes/received", get(&stats.publish_bytes_received)),
        ("publish/bytes/sent", get(&stats.publish_bytes_sent)),
        ("bytes/received", get(&stats.bytes_received)),
        ("bytes/sent", get(&stats.bytes_sent)),
        ("retained messages/count", retained.to_string()),
        ("store/messages/count", stored.clone()),
        ("store/messages/bytes", stored_bytes.to_string()),
        ("messages/stored", stored),
        (
            "subscriptions/count",
            shared.fanout.subscription_count().to_string(),
        ),
    ];
    // What mosquitto counts in its allocator. Here apps and the database's cache are in it too.
    if let Some(usage) = Usage::now() {
        values.extend([
            ("heap/current", usage.resident_memory_bytes.to_string()),
            ("heap/maximum", usage.peak_memory_bytes.to_string()),
        ]);
    }
    values
}

/// Messages that wait for clients, in memory and on disk; one that waits for two is two.
fn queued_messages(shared: &Shared) -> usize {
    let queued = Cell::new(0);
    let count = |mailbox: &Mailbox| {
        let (in_memory, _, on_disk) = mailbox.lengths();
        queued.set(queued.get() + in_memory + on_disk);
    };
    shared.registry.for_each(
        |_, online| count(&online.mailbox),
        |_, parked| count(&parked.mailbox),
    );
    queued.get()
}

/// What loads are the growth of, with their names by period.
fn totals(shared: &Shared) -> [([&'static str; 3], u64); 9] {
    let stats = &shared.stats;
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    macro_rules! names {
        ($name:literal) => {
            [
                concat!("load/", $name, "/1min"),
                concat!("load/", $name, "/5min"),
                concat!("load/", $name, "/15min"),
            ]
        };
    }
    [
        (names!("messages/received"), get(&stats.packets_received)),
        (names!("messages/sent"), get(&stats.packets_sent)),
        (names!("publish/received"), get(&stats.messages_received)),
        (names!("publish/sent"), get(&stats.messages_sent)),
        (names!("publish/dropped"), get(&shared.mailboxes.dropped)),
        (names!("bytes/received"), get(&stats.bytes_received)),
        (names!("bytes/sent"), get(&stats.bytes_sent)),
        (names!("connections"), get(&stats.connects)),
        (
            names!("sockets"),
            stats
                .listeners
                .iter()
                .map(|listener| get(&listener.accepted))
                .sum(),
        ),
    ]
}

/// Moving averages of what happens in a minute.
#[derive(Debug, Default)]
struct Loads {
    before: FxHashMap<&'static str, u64>,
    averages: FxHashMap<&'static str, f64>,
}

impl Loads {
    fn update(
        &mut self,
        totals: &[([&'static str; 3], u64)],
        every: Duration,
    ) -> Vec<(&'static str, String)> {
        let minutes = every.as_secs_f64() / 60.0;
        let mut values = Vec::new();
        for (names, total) in totals {
            let before = self.before.insert(names[0], *total).unwrap_or(*total);
            let a_minute = (total - before) as f64 / minutes;
            for (name, period) in names.iter().zip(PERIODS_MIN) {
                let kept = (-minutes / f64::from(period)).exp();
                let average = self.averages.entry(name).or_default();
                *average = a_minute + kept * (*average - a_minute);
                values.push((*name, format!("{average:.2}")));
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_comes_near_to_what_happens_in_a_minute_and_fades_when_nothing_does() {
        let mut loads = Loads::default();
        let every = Duration::from_secs(10);
        let names = ["1min", "5min", "15min"];
        let mut after = |total| -> Vec<f64> {
            let values = loads.update(&[(names, total)], every);
            values
                .iter()
                .map(|(_, value)| value.parse().unwrap())
                .collect()
        };
        after(0);
        let mut last = Vec::new();
        for step in 1..=60 {
            last = after(step * 100);
        }
        // 100 each 10 seconds, for ten minutes.
        assert!((last[0] - 600.0).abs() < 1.0, "{last:?}");
        assert!(last[1] > 500.0 && last[1] < 600.0, "{last:?}");
        assert!(last[2] < last[1], "{last:?}");
        for _ in 0..60 {
            last = after(6000);
        }
        assert!(last[0] < 1.0, "{last:?}");
    }
}
