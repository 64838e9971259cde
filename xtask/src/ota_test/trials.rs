//! What a gateway goes through, from the factory on.

use super::Options;
use super::board::Board;
use super::channel::Channel;
use super::guest::{self, Boot, HEADGATE};
use super::power_cuts::{self, System};
use super::store::Store;
use super::system::{Flaw, Ingredients};
use crate::vm::stage;
use anyhow::{Context, Result, anyhow, ensure};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

pub const FACTORY: &str = "1.0.0";

/// Boots that a new system gets, as in the fixture.
pub const TRIES: u32 = 2;
/// A system that does nothing has nothing done to it for so long.
const HANGS: Duration = Duration::from_secs(60);
/// For one that is not healthy to be given up, where others compute, too.
const GIVEN_UP: Duration = Duration::from_secs(400);

pub struct Trials<'a> {
    pub ingredients: &'a Ingredients<'a>,
    pub store: Store,
    pub channel: Channel,
    /// The system that the disk has from the factory.
    pub factory: String,
}

impl Trials<'_> {
    pub fn run(mut self, image: PathBuf, options: &Options) -> Result<()> {
        let run = self.ingredients.run;
        stage("first boot from the factory");
        let board = Board::new("board", image, run)?;
        let fresh = run.join("fresh");
        board.save(&fresh)?;
        self.first_boot(&board)?;

        stage("a healthy update");
        let good = self.healthy(&board, "2.0.0", 2)?;
        let committed = run.join("committed");
        board.save(&committed)?;

        if !options.only_cuts {
            self.unhealthy_updates(&board, options.quick)?;
            stage("a boot loader that does not count boots");
            self.uncounted(Board::restore("uncounted", &fresh, run)?)?;
        }

        let new = self.offer("6.0.0", Flaw::None)?;
        let board = Board::restore("recorded", &committed, run)?;
        let mut test = power_cuts::Test {
            store: &self.store,
            channel: &mut self.channel,
            old: System {
                version: "2.0.0",
                toplevel: &good,
            },
            new: System {
                version: "6.0.0",
                toplevel: &new,
            },
            generation: 3,
            run,
        };
        test.run(&board, &options.power_cuts)
    }

    fn unhealthy_updates(&mut self, board: &Board, quick: bool) -> Result<()> {
        let flaws = [
            ("3.0.0", Flaw::Gateway),
            ("4.0.0", Flaw::Panic),
            ("5.0.0", Flaw::Hang),
        ];
        for (version, flaw) in flaws.into_iter().take(if quick { 1 } else { 3 }) {
            stage(&format!("an update that is not healthy: {flaw:?}"));
            self.unhealthy(board, version, flaw)?;
        }
        Ok(())
    }

    fn first_boot(&self, board: &Board) -> Result<()> {
        board.run(|machine| {
            let version = guest::until_ready(machine)?;
            ensure!(version == FACTORY, "{version} was booted");
            guest::until_committed(machine, 1)
        })
    }

    /// Has the cache offer a system from now on.
    fn offer(&mut self, version: &str, flaw: Flaw) -> Result<String> {
        let system = self.ingredients.add(&mut self.store, version, flaw)?;
        self.channel.release(&self.store, version, &system)?;
        Ok(system)
    }

    /// Has the gateway fetch what is offered, and switches it off.
    fn update(&self, board: &Board) -> Result<()> {
        board.run(|machine| {
            guest::until_ready(machine)?;
            guest::update(machine)
        })?;
        stage("installed");
        Ok(())
    }

    /// Its system is returned.
    fn healthy(&mut self, board: &Board, version: &str, generation: u64) -> Result<String> {
        let system = self.offer(version, Flaw::None)?;
        self.channel.server.take_answered();
        self.update(board)?;
        let nars = self.channel.server.nars();
        let missing = self.store.missing(&system, &self.factory);
        ensure!(
            nars == missing,
            "{nars} paths were fetched, and {missing} were missing"
        );

        board.run(|machine| {
            let booted = guest::until_ready(machine)?;
            ensure!(
                booted == version,
                "{booted} was booted after the update to {version}"
            );
            stage("the new version is ready");
            guest::until_committed(machine, generation)?;
            let entries = guest::entries(machine)?;
            let old = format!("headgate-{}.conf", generation - 1);
            ensure!(
                entries.contains(&old),
                "the version before is not kept: {entries:?}"
            );
            self.channel.server.take_answered();
            guest::update(machine)?;
            let asked = self.channel.server.take_answered();
            ensure!(
                asked.iter().all(|path| path.starts_with("/release.json")),
                "a second update fetches {asked:?}"
            );
            Ok(())
        })?;
        stage("committed");
        Ok(system)
    }

    /// The update is tried, and then the version before is back.
    fn unhealthy(&mut self, board: &Board, version: &str, flaw: Flaw) -> Result<()> {
        self.offer(version, flaw)?;
        self.update(board)?;
        let (patience, wanted) = match flaw {
            Flaw::Hang => (HANGS, Boot::Hangs),
            _ => (GIVEN_UP, Boot::Ended),
        };
        for boot in 1..=TRIES {
            let mut machine = board.boot()?;
            let became = guest::watch(&mut machine, patience)?;
            if became != wanted {
                let error = anyhow!("boot {boot} of {version}: {became:?}, not {wanted:?}");
                return Err(machine.explain(error));
            }
            board.keep(machine)?;
            stage(&format!("boot {boot} has failed"));
        }
        board.run(|machine| {
            let booted = guest::until_ready(machine)?;
            ensure!(
                booted == "2.0.0",
                "{booted} was booted after {version} has failed"
            );
            guest::until_settled(machine)?;
            let status = machine.run(&format!("{HEADGATE} ota status"))?;
            let begin = format!("left again {version}, ");
            let left = status.lines().find(|line| line.starts_with(&begin));
            let left =
                left.with_context(|| format!("ota status doesn't tell of {version}: {status}"))?;
            println!("{left}");
            Ok(())
        })
    }

    /// Updates are off, and the agent says so.
    fn uncounted(&mut self, mut board: Board) -> Result<()> {
        let part = |name| {
            let link = fs::read_link(self.store.real(&self.factory).join(name));
            link.map(|link| self.store.real(&link.to_string_lossy()))
        };
        board.without_firmware(part("kernel")?, part("initrd")?, &self.factory);
        board.run(|machine| {
            guest::until_ready(machine)?;
            guest::until_settled(machine)?;
            let update = machine.output(&format!("{HEADGATE} ota update --reboot never"))?;
            ensure!(
                !update.succeeded && update.text.contains("updates are off"),
                "it says: {}",
                update.text
            );
            println!("{}", update.text.trim());
            Ok(())
        })
    }
}
