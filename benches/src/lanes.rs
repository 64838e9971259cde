//! The lanes: hand-over between threads, duplicates, the tap of MQTT, the realtime lane end to end.

use std::fs;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bytes::Bytes;
use hdrhistogram::Histogram;
use headgate::event::{Event, Topic};
use headgate::pipeline::{Claim, DedupKey, DedupWindow, Ring};
use tempfile::NamedTempFile;

use crate::contest::LOST;
use crate::load::{Load, Pace};
use crate::report::{Floor, Line, Section};
use crate::server::{Broker, Site};
use crate::statistics::Rounds;
use crate::suite::{CONVERTING_APP, PAYLOAD_BYTES, PUBLISHERS, STEADY_RATE, Suite};

/// What the field's engines claim to sustain.
const SUSTAINED_RATE: u64 = 80_000;

/// So few that what is handed over stays in the cache.
const RING_EVENTS: usize = 4_096;

/// Keys that are known while others are looked up.
const LIVE_KEYS: u64 = 1_000_000;

impl Suite {
    pub(crate) fn lanes(&self) -> Result<Vec<Section>> {
        Ok(vec![
            self.hand_over()?,
            self.tap()?,
            self.realtime(STEADY_RATE, 150.0, 2_000.0)?,
            self.realtime(SUSTAINED_RATE, f64::INFINITY, 5_000.0)?,
        ])
    }

    fn hand_over(&self) -> Result<Section> {
        let [mut batches, mut singles, mut push, mut made] = <[Rounds; 4]>::default();
        let [mut dedup, mut hashed, mut bytes] = <[Rounds; 3]>::default();
        for _ in 0..self.rounds {
            batches.push(self.handed_over_per_second(64, false)?);
            made.push(self.handed_over_per_second(64, true)?);
            singles.push(self.handed_over_per_second(1, false)?);
            push.push(push_p50_ns()?);
            let (rate, with_hash, per_key) = self.dedup_per_second()?;
            dedup.push(rate);
            hashed.push(with_hash);
            bytes.push(per_key);
        }
        Ok(Section {
            title: "Hand-over and duplicates, in process".to_owned(),
            conditions: format!(
                "One thread pushes events of {PAYLOAD_BYTES} B into a ring of {RING_EVENTS}, another takes them out \
                 and gives them back through a second ring, for {:?}; or the first makes them, with topic and \
                 payload shared, and the other drops them; a push is timed with two reads of the clock, which count. Duplicates: one thread notes new \
                 keys in a window of {LIVE_KEYS} keys that is full, so that each throws out another; then the \
                 same with the key made of a topic, a client and a number.",
                self.time
            ),
            lines: vec![
                Line::new("ring, batches of 64", "events/s", batches)
                    .with_floor(Floor::AtLeast(20e6)),
                Line::new("the same, made and dropped", "events/s", made),
                Line::new("ring, one by one", "events/s", singles).with_floor(Floor::AtLeast(5e6)),
                Line::new("push, p50", "ns", push).with_floor(Floor::AtMost(60.0)),
                Line::new("check and insert a key", "keys/s", dedup)
                    .with_floor(Floor::AtLeast(5e6)),
                Line::new("make a key, check and insert it", "keys/s", hashed),
                Line::new("memory of a key, by the process", "B", bytes),
            ],
        })
    }

    /// Events a second that come out of a ring. The chunks come back through another one and are sent again,
    /// or, if they are `made`, are copied from events that both threads share, and dropped.
    fn handed_over_per_second(&self, batch: usize, made: bool) -> Result<f64> {
        let (ring, back) = (Ring::new(RING_EVENTS), Ring::new(RING_EVENTS));
        let chunk = vec![event()?; batch];
        if !made {
            for _ in 0..RING_EVENTS / batch {
                let events: Result<Vec<_>> = (0..batch).map(|_| event()).collect();
                let pushed = back.push(events?, 0);
                ensure!(pushed.is_ok(), "the ring has no room for its events");
            }
        }
        let stop = AtomicBool::new(false);
        let began = Instant::now();
        let taken = thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let next = match made {
                        true => Some(chunk.clone()),
                        false => back.pop(),
                    };
                    let Some(mut next) = next else {
                        thread::yield_now();
                        continue;
                    };
                    while let Err(refused) = ring.push(next, 0) {
                        next = refused;
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        thread::yield_now();
                    }
                }
            });
            let mut taken = 0;
            while began.elapsed() < self.time {
                for _ in 0..1_000 {
                    match ring.pop() {
                        Some(chunk) => {
                            taken += chunk.len();
                            if made {
                                drop(black_box(chunk));
                            } else {
                                back.push(chunk, 0).expect("as many as it had");
                            }
                        }
                        None => thread::yield_now(),
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
            taken
        });
        Ok(taken as f64 / began.elapsed().as_secs_f64())
    }

    /// Keys that are noted in a second, the same if each is hashed first, and the memory of one in bytes.
    fn dedup_per_second(&self) -> Result<(f64, f64, f64)> {
        let memory = || crate::process::resident_bytes(std::process::id());
        let topic = Topic::new("plant/line1/temperature")?;
        let before = memory()?;
        let began = Instant::now();
        let window = DedupWindow::new(Duration::from_secs(3600), LIVE_KEYS as usize, began);
        let mut number = 0;
        while window.known() < LIVE_KEYS as usize * 99 / 100 {
            for _ in 0..10_000 {
                window.claim(scattered(number), true, began);
                number += 1;
            }
        }
        let per_key = (memory()? - before) as f64 / window.known() as f64;
        let mut rate = |key: &dyn Fn(u64) -> DedupKey| {
            let (began, first) = (Instant::now(), number);
            while began.elapsed() < self.time {
                for _ in 0..10_000 {
                    let claim = window.claim(key(number), true, began);
                    ensure!(claim == Claim::New, "a new key was known");
                    number += 1;
                }
            }
            Ok((number - first) as f64 / began.elapsed().as_secs_f64())
        };
        let noted = rate(&scattered)?;
        let hashed = rate(&|number| DedupKey::of_number(&topic, "client", number))?;
        Ok((noted, hashed, per_key))
    }

    /// QoS 0 that ends in the tap, since no app wants it.
    fn tap(&self) -> Result<Section> {
        let site = Site::new(&self.gateway)?;
        let gateway = site.start()?;
        let mut rate = Rounds::default();
        let mut before = 0;
        for _ in 0..self.rounds {
            let began = Instant::now();
            let outcome = Load {
                subscribers: 0,
                server: None,
                ..self.load(&gateway)
            }
            .run()?;
            // What is still in the sockets counts only once it has come in.
            while gateway.accepted()? < before + outcome.sent {
                ensure!(
                    began.elapsed() < self.time * 10,
                    "the gateway has lost some"
                );
            }
            rate.push(outcome.sent as f64 / began.elapsed().as_secs_f64());
            before += outcome.sent;
        }
        gateway.stop()?;
        Ok(Section {
            title: "QoS 0 into the tap".to_owned(),
            conditions: format!(
                "{PUBLISHERS} publishers flat out for {:?}, {PAYLOAD_BYTES} B, QoS 0; no app and no client wants it. \
                 Counted by the gateway.",
                self.time
            ),
            lines: vec![Line::new("taken in", "events/s", rate).with_floor(Floor::AtLeast(1.5e6))],
        })
    }

    fn realtime(&self, events_per_s: u64, p50_floor: f64, p99_floor: f64) -> Result<Section> {
        let rules = NamedTempFile::new()?;
        fs::write(
            rules.path(),
            "[[rule]]\ntopics = ['#']\nlane = 'realtime'\n",
        )?;
        let rules_file = rules.path().display().to_string();
        let site = Site::new(&self.gateway)?.set("HEADGATE_PIPELINE_RULES_FILE", rules_file);
        let gateway = self.with_apps(&site, &[CONVERTING_APP])?;
        let [mut p50, mut p99, mut lost, mut memory] = <[Rounds; 4]>::default();
        for _ in 0..self.rounds {
            let outcome = Load {
                pace: Pace::PerSecond(events_per_s),
                ..self.app_load(&gateway)
            }
            .run()?;
            p50.push(outcome.latency.value_at_quantile(0.5) as f64 / 1e3);
            p99.push(outcome.latency.value_at_quantile(0.99) as f64 / 1e3);
            lost.push(outcome.lost as f64);
            memory.push(crate::process::peak_resident_bytes(gateway.pid())? as f64 / 1e6);
        }
        gateway.stop()?;
        let mut median = Line::new("p50", "µs", p50);
        if p50_floor.is_finite() {
            median = median.with_floor(Floor::AtMost(p50_floor));
        }
        Ok(Section {
            title: format!("Realtime lane through a WASM app at {events_per_s} events/s"),
            conditions: format!(
                "As above, with a rule that has all topics take the realtime lane: external publishers → \
                 `{CONVERTING_APP}` → external subscriber, {PAYLOAD_BYTES} B, QoS 0, for {:?}.",
                self.time
            ),
            lines: vec![
                median,
                Line::new("p99", "µs", p99).with_floor(Floor::AtMost(p99_floor)),
                Line::new(LOST, "events", lost).with_floor(Floor::AtMost(0.0)),
                Line::new("gateway's memory at its highest", "MB", memory)
                    .with_floor(Floor::AtMost(100.0)),
            ],
        })
    }
}

/// A key that is as good as random, and takes no time to make.
fn scattered(number: u64) -> DedupKey {
    let half = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let other = half.rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mut key = [0; 16];
    key[..8].copy_from_slice(&half.to_le_bytes());
    key[8..].copy_from_slice(&other.to_le_bytes());
    DedupKey(key)
}

/// Of static memory: counting its references would be measured with the ring.
fn event() -> Result<Event> {
    static PAYLOAD: [u8; PAYLOAD_BYTES] = [b'x'; PAYLOAD_BYTES];
    let topic = Topic::new("plant/line1/temperature")?;
    Ok(Event::new(
        topic,
        Bytes::from_static(&PAYLOAD),
        Instant::now(),
    ))
}

/// Nanoseconds that half of the pushes of one event take at most.
fn push_p50_ns() -> Result<f64> {
    let ring = Ring::new(65_536);
    let event = event()?;
    let mut times = Histogram::<u64>::new_with_max(1_000_000_000, 3)?;
    for _ in 0..200_000 {
        let chunk = vec![event.clone()];
        let began = Instant::now();
        let refused = ring.push(chunk, 0).is_err();
        times.saturating_record(began.elapsed().as_nanos() as u64);
        ensure!(!refused, "the ring is full");
        ring.pop();
    }
    Ok(times.value_at_quantile(0.5) as f64)
}
