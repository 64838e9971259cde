//! Cuts the power at random moments of an update and of the boot after it, and looks at the disks that this may
//! have left: each boots into the old system or the new one, with every file of it as it should be, and the update
//! can be finished.
//!
//! One update is recorded, with all that it has the disk do. A cut is then a flush of the recording, all that was
//! written before it, and some of what was written after it.

use super::board::Board;
use super::channel::Channel;
use super::guest::{self, UPDATE, UPDATE_COMMAND};
use super::image;
use super::store::{self, STORE, Store};
use crate::vm::disk;
use crate::vm::disk_log::{DiskLog, Flush, Unflushed};
use crate::vm::machine::{Machine, log_bytes};
use crate::vm::stage;
use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// How the moments are chosen.
#[derive(clap::Args)]
pub struct Options {
    /// How many times the power is cut
    #[arg(long, value_name = "N", default_value_t = 20)]
    cuts: u32,
    /// Chooses the moments, and what is left of what was not flushed; the next cut has the next seed [default: a
    /// random one, which is shown]
    #[arg(long, value_name = "N")]
    seed: Option<u32>,
}

/// What the machine is at when its power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Paths come in, are unpacked, and are moved to the store.
    Download,
    /// All paths are there; kernel, initrd and entry are written to the ESP.
    Entry,
    /// The firmware, the boot loader and the new system start.
    FirstBoot,
    /// The gateway is ready; the entry is blessed, old generations go.
    Commit,
}

const MOMENTS: [Moment; 4] = [
    Moment::Download,
    Moment::Entry,
    Moment::FirstBoot,
    Moment::Commit,
];

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Moment::Download => "download and unpacking",
            Moment::Entry => "writing the entry",
            Moment::FirstBoot => "first boot",
            Moment::Commit => "commit",
        })
    }
}

/// What one boot had the disk do.
struct Recording {
    /// The disk, and what the firmware keeps, as they were before it.
    board: PathBuf,
    log: DiskLog,
    /// Where in the log the first and the second of its two moments end; the first begins at `from`.
    from: u64,
    between: u64,
    to: u64,
}

/// A system that may be booted after a cut.
pub struct System<'a> {
    pub version: &'a str,
    pub toplevel: &'a str,
}

pub struct Test<'a> {
    pub store: &'a Store,
    pub channel: &'a mut Channel,
    pub old: System<'a>,
    pub new: System<'a>,
    /// The generation that `new` becomes.
    pub generation: u64,
    pub run: &'a Path,
}

impl Test<'_> {
    /// `board` runs `old`, which is committed, and `new` is offered.
    pub fn run(&mut self, board: &Board, options: &Options) -> Result<()> {
        if options.cuts == 0 {
            return Ok(());
        }
        stage("power cuts: an update is recorded");
        let update = self.record(board, "update", |test, machine| test.update(machine))?;
        stage("power cuts: the boot after it is recorded");
        let boot = self.record(board, "boot", |test, machine| test.first_boot(machine))?;

        let first = u64::from(options.seed.unwrap_or_else(|| fastrand::u32(..)));
        for (seed, moment) in (first..first + u64::from(options.cuts)).zip(MOMENTS.iter().cycle()) {
            let (recording, from, to) = match moment {
                Moment::Download => (&update, update.from, update.between),
                Moment::Entry => (&update, update.between, update.to),
                Moment::FirstBoot => (&boot, boot.from, boot.between),
                Moment::Commit => (&boot, boot.between, boot.to),
            };
            let mut random = Rng::with_seed(seed);
            let flush = choose(&recording.log, from, to, &mut random)
                .with_context(|| format!("the guest flushed nothing during {moment}"))?;
            let cut = Board::restore("cut", &recording.board, self.run)?;
            let file = File::options().write(true).open(cut.disk())?;
            let unflushed = recording.log.cut(&file, flush, &mut random)?;
            drop(file);
            self.check(&cut, *moment, unflushed).with_context(|| {
                format!("after a power cut during {moment}, of --seed {seed} --cuts 1")
            })?;
        }
        Ok(())
    }

    /// Boots `board`, does `what`, which returns where in the log its moments end, and shuts down.
    fn record(
        &mut self,
        board: &Board,
        name: &str,
        what: impl FnOnce(&mut Self, &mut Machine) -> Result<[u64; 3]>,
    ) -> Result<Recording> {
        let before = self.run.join(format!("before-{name}"));
        board.save(&before)?;
        let mut machine = board.boot()?;
        let moments = what(self, &mut machine).map_err(|error| machine.explain(error))?;
        let [from, between, to] = moments;
        let log = DiskLog::read(&machine.disk_log, to)?;
        let flushes = |from, to| {
            let is_within = |flush: &Flush| (from..=to).contains(&flush.log_bytes);
            log.flushes().filter(is_within).count()
        };
        stage(&format!(
            "{name}: {} and {} flushes to cut the power at",
            flushes(from, between),
            flushes(between, to)
        ));
        machine.halt("systemctl poweroff")?;
        // The next boot begins another one in its place.
        fs::rename(&machine.disk_log, before.join("disk.log"))
            .context("cannot keep the log of the disk")?;
        board.keep(machine)?;
        Ok(Recording {
            board: before,
            log,
            from,
            between,
            to,
        })
    }

    fn update(&mut self, machine: &mut Machine) -> Result<[u64; 3]> {
        let version = guest::until_ready(machine)?;
        ensure!(version == self.old.version, "{version} runs");
        guest::until_settled(machine)?;
        let missing = self.store.missing(self.new.toplevel, self.old.toplevel);
        self.channel.server.take_answered();
        let from = log_bytes(&machine.disk_log)?;
        machine.run(&format!(
            "({UPDATE_COMMAND}; echo $? >/run/update.status) >/run/update.log 2>&1 &"
        ))?;
        let mut between = None;
        machine.until("the update to be installed", UPDATE, |machine| {
            if between.is_none() && self.channel.server.nars() >= missing {
                between = Some(log_bytes(&machine.disk_log)?);
            }
            Ok(machine
                .output("test -s /run/update.status")?
                .succeeded
                .then_some(()))
        })?;
        let to = log_bytes(&machine.disk_log)?;
        let log = machine.run("cat /run/update.log")?;
        let status = machine.run("cat /run/update.status")?;
        ensure!(status.trim() == "0", "headgate ota update failed: {log}");
        Ok([from, between.context("not all paths were fetched")?, to])
    }

    fn first_boot(&mut self, machine: &mut Machine) -> Result<[u64; 3]> {
        let version = guest::until_ready(machine)?;
        ensure!(
            version == self.new.version,
            "{version} runs, not the new version"
        );
        let between = log_bytes(&machine.disk_log)?;
        guest::until_committed(machine, self.generation)?;
        Ok([0, between, log_bytes(&machine.disk_log)?])
    }

    fn check(&mut self, board: &Board, moment: Moment, unflushed: Unflushed) -> Result<()> {
        let present = self.present(board)?;
        let (version, ready) = board.run(|machine| {
            let version = self.check_boot(machine, &present)?;
            let ready = machine.started.elapsed();
            if version == self.old.version {
                guest::update(machine)?;
            } else {
                guest::until_committed(machine, self.generation)?;
            }
            Ok((version, ready))
        })?;
        if version == self.old.version {
            board.run(|machine| {
                let version = guest::until_ready(machine)?;
                ensure!(
                    version == self.new.version,
                    "{version} is booted, though the update was finished"
                );
                guest::until_committed(machine, self.generation)
            })?;
        }
        self.check_whole(self.new.toplevel, &self.present(board)?)?;
        stage(&format!(
            "a power cut during {moment} ({unflushed}): {version} is ready after {} s, and the update finished",
            ready.as_secs()
        ));
        Ok(())
    }

    /// The store paths on the disk. All that are there are whole: Nix's own hash says so.
    fn present(&self, board: &Board) -> Result<BTreeSet<String>> {
        let work = tempfile::tempdir_in(self.run).context("cannot create a folder")?;
        let root = work.path().join("root.img");
        image::take_root(board.disk(), &root)?;
        disk::recover(&root)?;
        disk::take_out(&root, "nix", work.path())?;
        let mut present = BTreeSet::new();
        let folder = work.path().join(STORE.trim_start_matches('/'));
        for entry in
            fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?
        {
            let entry = entry?;
            let path = format!("{STORE}{}", entry.file_name().to_string_lossy());
            // What is not moved to its place yet.
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            let wanted = self.store.nar_hash(&path);
            let wanted = wanted.with_context(|| format!("nobody has made {path}"))?;
            let found = store::nix_hash("sha256", &entry.path())?;
            ensure!(
                found == wanted,
                "{path} is there, and not as it was made: {found} instead of {wanted}"
            );
            present.insert(path);
        }
        Ok(present)
    }

    /// Which version was booted.
    fn check_boot(&self, machine: &mut Machine, present: &BTreeSet<String>) -> Result<String> {
        let version = guest::until_ready(machine)?;
        let systems = [&self.old, &self.new];
        let booted = systems.into_iter().find(|system| system.version == version);
        let booted =
            booted.with_context(|| format!("{version} was booted, which nobody has installed"))?;
        self.check_whole(booted.toplevel, present)?;
        Ok(version)
    }

    fn check_whole(&self, toplevel: &str, present: &BTreeSet<String>) -> Result<()> {
        let closure = self.store.closure(toplevel);
        let missing: Vec<_> = closure.difference(present).collect();
        ensure!(
            missing.is_empty(),
            "of {toplevel}, there are not {missing:?}"
        );
        Ok(())
    }
}

/// A flush between the two places of the log; if there is none, the last before them.
fn choose(log: &DiskLog, from: u64, to: u64, random: &mut Rng) -> Option<Flush> {
    let (before, within): (Vec<_>, Vec<_>) = log
        .flushes()
        .filter(|flush| flush.log_bytes <= to)
        .partition(|flush| flush.log_bytes < from);
    let last = before.last().copied();
    let all: Vec<_> = last.into_iter().chain(within).collect();
    random.choice(all)
}
