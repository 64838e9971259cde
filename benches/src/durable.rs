//! QoS 1 with the journal: a message is acknowledged when it is on disk.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use tempfile::TempDir;

use crate::contest::LOST;
use crate::load::{Load, precise_sleeps};
use crate::report::{Floor, Line, Section};
use crate::server::{Broker, Mosquitto, Site};
use crate::statistics::Rounds;
use crate::suite::{PAYLOAD_BYTES, PUBLISHERS, Suite, WINDOW};
use crate::wire;

/// Messages a second while the time of an acknowledgement is measured.
const ACK_RATE: u32 = 10_000;

const PATIENCE: Duration = Duration::from_secs(30);

impl Suite {
    pub(crate) fn durable(&self) -> Result<Section> {
        let site = Site::new(&self.gateway)?.set("HEADGATE_JOURNAL_TOPICS", "#".into());
        let gateway = site.start()?;
        let mosquitto = self.mosquitto.as_ref();
        let mosquitto = mosquitto.map(|program| Mosquitto::start_persistent(program));
        let mosquitto = mosquitto.transpose()?;
        let [mut rate, mut lost, mut reference, mut ratio] = <[Rounds; 4]>::default();
        let [mut theirs, mut p50, mut p99] = <[Rounds; 3]>::default();
        for _ in 0..self.rounds {
            let outcome = Load {
                qos: 1,
                ..self.load(&gateway)
            }
            .run()?;
            let alone = self.one_by_one()?;
            lost.push(outcome.lost as f64);
            rate.push(outcome.per_second());
            ratio.push(outcome.per_second() / alone);
            reference.push(alone);
            if let Some(mosquitto) = &mosquitto {
                let outcome = Load {
                    qos: 1,
                    ..self.load(mosquitto)
                }
                .run()?;
                theirs.push(outcome.per_second());
            }
            let acks = self.acknowledgements(&gateway)?;
            p50.push(acks.value_at_quantile(0.5) as f64 / 1e6);
            p99.push(acks.value_at_quantile(0.99) as f64 / 1e6);
        }
        gateway.stop()?;
        Ok(Section {
            title: "Durable QoS 1".to_owned(),
            conditions: format!(
                "All topics are in the journal. {PUBLISHERS} publishers flat out for {:?} with {WINDOW} messages of \
                 {PAYLOAD_BYTES} B in flight each, QoS 1, one subscriber to everything; a message is acknowledged \
                 after the fdatasync that covers it. The reference, in turns: a loop that writes as many bytes and \
                 calls fdatasync, on the same disk; and mosquitto with persistence, which writes its whole database \
                 a second after a change at the latest and acknowledges before that. Then {ACK_RATE} evenly \
                 spaced messages/s from {PUBLISHERS} publishers: from when a message was due until its \
                 acknowledgement was read.",
                self.time
            ),
            lines: vec![
                Line::new("acknowledged", "events/s", rate).with_floor(Floor::AtLeast(50_000.0)),
                Line::new(LOST, "events", lost).with_floor(Floor::AtMost(0.0)),
                Line::new("a write and an fdatasync each", "1/s", reference),
                Line::new("acknowledged ÷ that", "×", ratio),
                Line::new("mosquitto, before it is on disk", "events/s", theirs),
                Line::new("acknowledgement, p50", "ms", p50),
                Line::new("acknowledgement, p99", "ms", p99).with_floor(Floor::AtMost(10.0)),
            ],
        })
    }

    /// Nanoseconds from when messages were due until they were acknowledged.
    fn acknowledgements(&self, broker: &dyn Broker) -> Result<Histogram<u64>> {
        precise_sleeps();
        let (mut frame, identifier, _) =
            wire::publish("plant/line1/temperature_f", 1, &[b'x'; PAYLOAD_BYTES]);
        let mut publishers = Vec::new();
        let mut readers = Vec::new();
        for number in 0..PUBLISHERS {
            let stream = wire::connect(&broker.endpoint(), &format!("acknowledged-{number}"))?;
            let stream = stream.socket().try_clone()?;
            let (due, sent) = mpsc::channel();
            let socket = stream.try_clone()?;
            readers.push(thread::spawn(move || read_acks(socket, &sent)));
            publishers.push((stream, due));
        }
        let began = Instant::now();
        let all = (self.time.as_secs_f64() * f64::from(ACK_RATE)) as u32;
        for message in 0..all {
            let due = began + Duration::from_secs(1) * message / ACK_RATE;
            if let Some(wait) = due.checked_duration_since(Instant::now()) {
                thread::sleep(wait);
            }
            let (stream, sent) = &mut publishers[message as usize % PUBLISHERS];
            sent.send(due).context("a reader has failed")?;
            let number = (message % 65_535) as u16 + 1;
            frame[identifier..identifier + 2].copy_from_slice(&number.to_be_bytes());
            stream.write_all(&frame)?;
        }
        drop(publishers);
        let mut all = Histogram::new_with_max(60_000_000_000, 3)?;
        for reader in readers {
            all.add(reader.join().expect("a reader does not panic")?)?;
        }
        Ok(all)
    }

    /// Messages a second that a loop writes that waits for the disk after each.
    fn one_by_one(&self) -> Result<f64> {
        let folder = TempDir::new()?;
        let mut file = File::create(folder.path().join("log"))?;
        let (began, mut written) = (Instant::now(), 0);
        while began.elapsed() < self.time {
            file.write_all(&[b'x'; PAYLOAD_BYTES])?;
            file.sync_data()?;
            written += 1;
        }
        Ok(f64::from(written) / began.elapsed().as_secs_f64())
    }
}

/// Takes the time of each acknowledgement, which come in the order of the messages.
fn read_acks(mut stream: std::net::TcpStream, sent: &Receiver<Instant>) -> Result<Histogram<u64>> {
    let mut times = Histogram::new_with_max(60_000_000_000, 3)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    while let Ok(due) = sent.recv() {
        let mut ack = [0; 4];
        stream.read_exact(&mut ack)?;
        ensure!(ack[0] == wire::PUBACK, "{ack:?} is no PUBACK");
        times.saturating_record(due.elapsed().as_nanos() as u64);
    }
    Ok(times)
}
