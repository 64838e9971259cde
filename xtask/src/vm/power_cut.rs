//! Cuts the power of a machine while clients publish to the gateway's journal, and looks at disks that this
//! may have left: what was acknowledged has to be on every one of them. docs/vm-test.md says how.

use super::disk;
use super::disk_log::{DiskLog, Flush, Unflushed};
use super::gateway::{self, UNIT_CONVERT};
use super::machine::{Machine, Parts, SOON};
use super::mqtt::Numbered;
use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use serde::Deserialize;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

/// How disks are chosen that a power cut may have left.
#[derive(clap::Args)]
pub struct Options {
    /// How many disks that the power cut under load may have left are looked at
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    images: u32,
    /// Chooses where the power is cut, and what is left of what was not flushed; the next disk has the
    /// next seed [default: a random one, which is shown]
    #[arg(long, value_name = "N")]
    seed: Option<u32>,
}

impl Options {
    /// The same for the whole run.
    pub fn seeds(&self) -> Seeds {
        Seeds {
            images: self.images.into(),
            first: self.seed.unwrap_or_else(|| fastrand::u32(..)).into(),
        }
    }
}

#[derive(Clone, Copy)]
pub struct Seeds {
    images: u64,
    first: u64,
}

const CLIENTS: usize = 4;

/// Events that are acknowledged before the power is cut.
const ENOUGH: usize = 3000;

/// Most that a client sends: together no more than the queue of an app takes.
const MOST: u64 = 2000;

/// `unit-convert` is to get them.
const TOPIC: &str = "plant/cut/temperature_f";

/// A power cut under load.
pub struct Cut {
    log: DiskLog,
    /// For each client the length of the log when its first, second, … event was acknowledged.
    acknowledged: Vec<Vec<u64>>,
    /// The sequence before which all events were finished, on disk, when the clients began.
    finished: u64,
}

/// What the journals on some disks have.
#[derive(Default)]
struct Found {
    /// Events that were acknowledged before the flush that the power was cut behind.
    owed: usize,
    /// All events that are there, and those among them that are to be delivered again.
    events: usize,
    unfinished: usize,
    /// Events that were acknowledged, though later, and are not there.
    missing: usize,
}

/// Puts in the place of `parts.state` what a cut behind the last flush may have left of it.
pub fn leave(parts: &Parts, log: &DiskLog, seeds: Seeds) -> Result<()> {
    let flush = log.flushes().next_back();
    let flush = flush.context("the guest flushed nothing before the power was cut")?;
    let unflushed = log.cut(
        &writable(&parts.state)?,
        flush,
        &mut Rng::with_seed(seeds.first),
    )?;
    println!("seed {}: after the last flush {unflushed}", seeds.first);
    Ok(())
}

/// Cuts the power while clients publish readings for `unit-convert`, which is paused: none is finished.
pub fn under_load(mut machine: Machine, headgate: &str) -> Result<Cut> {
    let load = load(&mut machine, headgate);
    let (finished, clients) = load.map_err(|error| machine.explain(error))?;
    let log = machine.cut_power()?;
    let acknowledged: Result<_> = clients.into_iter().map(Numbered::end).collect();
    Ok(Cut {
        log,
        acknowledged: acknowledged?,
        finished,
    })
}

fn load(machine: &mut Machine, headgate: &str) -> Result<(u64, Vec<Numbered>)> {
    let finished = machine.until("all events to be finished, on disk", SOON, |machine| {
        let stat = machine.run(&format!("{headgate} --json journal stat"))?;
        let stat: Stat = serde_json::from_str(&stat)?;
        Ok((stat.finished == stat.next).then_some(stat.finished))
    })?;
    machine.run(&format!("{headgate} app pause {UNIT_CONVERT}"))?;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| Numbered::start(machine.mqtt, client, TOPIC, MOST, &machine.disk_log))
        .collect();
    machine.until("acknowledgements", SOON, |_| {
        let acknowledged: usize = clients.iter().map(Numbered::acknowledged).sum();
        Ok((acknowledged >= ENOUGH).then_some(()))
    })?;
    Ok((finished, clients))
}

/// Makes disks that the cut may have left, and looks at the journal on each of them. The last one is put in the
/// place of `parts.state`. How many events are to be delivered again from there is returned.
pub fn check_images(cut: &Cut, parts: &Parts, headgate: &Path, seeds: Seeds) -> Result<usize> {
    let flushes: Vec<_> = cut.flushes().collect();
    let acknowledged = cut.acknowledged.iter().map(Vec::len).sum::<usize>();
    let image = parts.logs.join("cut.img");
    let (mut all, mut all_unflushed, mut unfinished) = (Found::default(), Unflushed::default(), 0);
    for seed in seeds.first..seeds.first + seeds.images {
        let mut random = Rng::with_seed(seed);
        let index = random.usize(0..flushes.len().max(1));
        let flush = *flushes.get(index).with_context(|| {
            format!(
                "{acknowledged} events were acknowledged, and the guest has flushed nothing since the first \
                 of them"
            )
        })?;
        disk::copy(&parts.state, &image)?;
        let unflushed = cut.log.cut(&writable(&image)?, flush, &mut random)?;
        let found = cut
            .check_image(&image, flush, parts, headgate)
            .with_context(|| {
                format!(
                    "on {}, left by a power cut with --seed {seed}",
                    image.display()
                )
            })?;
        unfinished = found.unfinished;
        all.owed += found.owed;
        all.events += found.events;
        all.missing += found.missing;
        all_unflushed += unflushed;
    }
    let Seeds { images, first } = seeds;
    println!(
        "{acknowledged} events were acknowledged while the guest flushed {} times. Seeds {first} to {}: {images} \
         disks, of what was not flushed {all_unflushed}. They have {} events; {} had been acknowledged by then, \
         and {} later are not there",
        flushes.len(),
        first + images - 1,
        all.events,
        all.owed,
        all.missing,
    );
    ensure!(
        all.missing > 0,
        "no disk lacks any event, so none would be missed: was nothing flushed before the last of them?"
    );
    fs::rename(&image, &parts.state)
        .with_context(|| format!("cannot rename {}", image.display()))?;
    Ok(unfinished)
}

impl Cut {
    /// Those since the first acknowledgement.
    fn flushes(&self) -> impl Iterator<Item = Flush> {
        let first = self.acknowledged.iter().flatten().min().copied();
        let since = move |flush: &Flush| first.is_some_and(|first| flush.log_bytes >= first);
        self.log.flushes().filter(since)
    }

    fn check_image(
        &self,
        image: &Path,
        flush: Flush,
        parts: &Parts,
        headgate: &Path,
    ) -> Result<Found> {
        // The image itself is as the power cut has left it: a machine may boot from it.
        let work = tempfile::tempdir_in(&parts.logs).context("cannot create a folder")?;
        let recovered = work.path().join("disk.img");
        disk::copy(image, &recovered)?;
        disk::recover(&recovered)?;
        disk::take_out(&recovered, "journal", work.path())?;
        let journal = work.path().join("journal");
        let ask = |arguments: &[&str]| {
            let mut ask = Command::new(headgate);
            ask.args(["--json", "journal"]).args(arguments);
            let output = ask.arg("--folder").arg(&journal).output();
            let output = output.with_context(|| format!("cannot start {}", headgate.display()))?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(
                output.status.success(),
                "headgate journal {} says: {text}{}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr)
            );
            Ok(text)
        };
        ask(&["verify"])?;
        let stat: Stat = serde_json::from_str(&ask(&["stat"])?)?;
        let lines = ask(&["tail", "--topic", TOPIC, "-n", "1000000"])?;
        let records: Result<Vec<Record>, _> = lines.lines().map(serde_json::from_str).collect();
        let found = check_records(
            &records?,
            &self.acknowledged,
            flush.log_bytes,
            stat.finished,
        )?;
        ensure!(
            stat.finished >= self.finished,
            "the events before {} were finished, and from {} on they would be delivered again",
            self.finished,
            stat.finished
        );
        Ok(found)
    }
}

/// Of each client, the first events up to any are there, once and in order; and all that were acknowledged while
/// the log had no more than `log_bytes`.
fn check_records(
    records: &[Record],
    acknowledged: &[Vec<u64>],
    log_bytes: u64,
    finished: u64,
) -> Result<Found> {
    let mut found = Found::default();
    let mut last = vec![0; acknowledged.len()];
    for record in records {
        let Reading { client, number } = serde_json::from_str(&record.payload)?;
        let last = last.get_mut(client).context("there is no such client")?;
        ensure!(
            number == *last + 1,
            "client {client}: behind event {last} comes {number}"
        );
        *last = number;
        found.unfinished += usize::from(record.sequence >= finished);
    }
    for (client, (acknowledged, last)) in acknowledged.iter().zip(last).enumerate() {
        let owed = acknowledged.partition_point(|at| *at <= log_bytes);
        ensure!(
            last >= owed,
            "events are lost: of client {client}, {owed} were acknowledged before the flush that the power was \
             cut behind, and only the first {last} are in the journal"
        );
        found.owed += owed;
        found.events += last;
        found.missing += acknowledged.len().saturating_sub(last);
    }
    Ok(found)
}

/// The gateway on a machine that was booted from one of the disks is the one from before, and `unit-convert`
/// gets each of so many events again.
pub fn check_delivered_again(
    machine: &mut Machine,
    headgate: &str,
    unfinished: usize,
) -> Result<()> {
    gateway::until_ready(machine)?;
    gateway::until_app(machine, UNIT_CONVERT, "paused")?;
    machine.run(&format!("{headgate} app resume {UNIT_CONVERT}"))?;
    let what = format!("{unfinished} events to be delivered again");
    machine.until(&what, SOON, |machine| {
        let handled = gateway::events(machine, UNIT_CONVERT, "handled")?;
        Ok((handled >= unfinished).then_some(()))
    })?;
    for (result, wanted) in [("handled", unfinished), ("failed", 0), ("dropped", 0)] {
        let events = gateway::events(machine, UNIT_CONVERT, result)?;
        ensure!(
            events == wanted,
            "{UNIT_CONVERT} has {events} events {result}, and {unfinished} were to be delivered again"
        );
    }
    gateway::check_accounting(machine)?;
    machine.run(&format!("{headgate} journal verify"))?;
    gateway::check_conversion(machine)
}

fn writable(image: &Path) -> Result<File> {
    let file = File::options().write(true).open(image);
    file.with_context(|| format!("cannot write to {}", image.display()))
}

/// Of `headgate --json journal stat`.
#[derive(Deserialize)]
struct Stat {
    next: u64,
    finished: u64,
}

/// Of `headgate --json journal tail`.
#[derive(Deserialize)]
struct Record {
    sequence: u64,
    payload: String,
}

/// What [`Numbered`] sends.
#[derive(Deserialize)]
struct Reading {
    client: usize,
    number: usize,
}

#[cfg(test)]
mod a_journal {
    use super::*;

    /// Client 0 had two events acknowledged, when the log had 100 and 200 bytes; client 1 one, at 150.
    fn check(readings: &[(usize, usize)], log_bytes: u64) -> Result<Found> {
        let record = |(sequence, (client, number)): (u64, &(usize, usize))| Record {
            sequence,
            payload: format!(r#"{{"value":68,"client":{client},"number":{number}}}"#),
        };
        let records: Vec<_> = (10..).zip(readings).map(record).collect();
        check_records(&records, &[vec![100, 200], vec![150]], log_bytes, 11)
    }

    #[test]
    fn has_what_was_acknowledged_before_the_flush_and_may_have_more() -> Result<()> {
        let found = check(&[(0, 1), (1, 1)], 199)?;
        assert_eq!((found.owed, found.events, found.missing), (2, 2, 1));
        // The first is before the cursor.
        assert_eq!(found.unfinished, 1);
        assert_eq!(check(&[], 99)?.missing, 3);
        check(&[(1, 1), (0, 1), (1, 2), (0, 2), (0, 3)], 300)?;
        Ok(())
    }

    #[test]
    fn that_lacks_repeats_or_mixes_up_events_is_an_error() {
        for (readings, log_bytes, error) in [
            (&[(0, 1)][..], 150, "of client 1, 1 were acknowledged"),
            (&[(0, 1), (1, 1)], 200, "of client 0, 2 were acknowledged"),
            (&[], 100, "events are lost"),
            (&[(0, 1), (0, 1)], 0, "client 0: behind event 1 comes 1"),
            (&[(1, 2)], 0, "client 1: behind event 0 comes 2"),
        ] {
            let found = check(readings, log_bytes).err().expect("it is wrong");
            assert!(found.to_string().contains(error), "{found}");
        }
    }
}
