//! QoS 1 with the journal: a message is acknowledged when it is on disk.

use std::fs::File;
use std::io::Write;
use std::time::Instant;

use anyhow::Result;
use tempfile::TempDir;

use crate::contest::LOST;
use crate::load::Load;
use crate::report::{Floor, Line, Section};
use crate::server::Site;
use crate::statistics::Rounds;
use crate::suite::{PAYLOAD_BYTES, PUBLISHERS, Suite, WINDOW};

impl Suite {
    pub(crate) fn durable(&self) -> Result<Section> {
        let site = Site::new(&self.gateway)?.set("HEADGATE_JOURNAL_TOPICS", "#".into());
        let gateway = site.start()?;
        let [mut rate, mut lost, mut reference, mut ratio] = <[Rounds; 4]>::default();
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
        }
        gateway.stop()?;
        Ok(Section {
            title: "Durable QoS 1".to_owned(),
            conditions: format!(
                "All topics are in the journal. {PUBLISHERS} publishers flat out for {:?} with {WINDOW} messages of \
                 {PAYLOAD_BYTES} B in flight each, QoS 1, one subscriber to everything; a message is acknowledged \
                 after the fdatasync that covers it. The reference, in turns: a loop that writes as many bytes and \
                 calls fdatasync, on the same disk.",
                self.time
            ),
            lines: vec![
                Line::new("acknowledged", "events/s", rate).with_floor(Floor::AtLeast(50_000.0)),
                Line::new(LOST, "events", lost).with_floor(Floor::AtMost(0.0)),
                Line::new("a write and an fdatasync each", "1/s", reference),
                Line::new("acknowledged ÷ that", "×", ratio),
            ],
        })
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
