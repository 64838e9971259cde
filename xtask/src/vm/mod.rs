//! Boots the gateway on an emulated aarch64 machine, as NixOS would run it, and looks at it from
//! outside. docs/vm-test.md says what for; `surroundings` what it needs.

pub mod agent;
mod analyze;
mod bare;
pub mod cross;
pub mod debian;
mod devices;
pub mod disk;
pub mod disk_log;
pub mod fixture;
mod full;
pub mod gateway;
pub mod http;
pub mod initramfs;
pub mod machine;
mod mqtt;
mod power_cut;
mod report;
pub mod roots;
pub mod surroundings;
pub mod wait;

use crate::guest;
use crate::tree::Tree;
use anyhow::{Context, Result, bail};
use debian::{Debian, Pages};
use fixture::Fixture;
use machine::{Network, Parts, Start};
use report::Report;
use roots::Ingredients;
use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::sync::LazyLock;
use std::time::Instant;

/// What `cargo xtask vm-test` can be told.
#[derive(clap::Args)]
pub struct Options {
    /// Where Debian's packages come from, if not from the mirror that mmdebstrap chooses; they are
    /// kept for the next run
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// Write what was measured to docs/benchmarks.md
    #[arg(long)]
    write: bool,
    #[command(flatten)]
    power_cut: power_cut::Options,
}

pub fn run(tree: &Tree, options: &Options) -> Result<()> {
    surroundings::check(&[], &[])?;
    let work = tree.target.join("vm");
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let _lock = lock(&work)?;
    let tools = tree.root.join("tests").join("vm");
    let fixture = Fixture::read(tools.join("fixture"))?;
    let run = work.join("run");
    if run.exists() {
        fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
    }
    fs::create_dir_all(&run).with_context(|| format!("cannot create {}", run.display()))?;

    // First, since it is what fails soonest.
    let begin = Instant::now();
    stage("Debian");
    let debian = Debian::get(work.join("debian"), options.mirror.as_deref(), &tools)?;
    let download = begin.elapsed();

    stage("cross build");
    let binary = cross::build(tree)?;
    let size = cross::check_size(&binary)?;
    stage("apps");
    guest::build_apps(tree)?;
    let apps = run.join("apps");
    let own = cross::build_own(tree)?;
    cross::compile_apps(&own, tree, &fixture, &apps)?;
    let device_apps = run.join("device-apps");
    cross::compile_device_apps(&own, tree, &tools.join("devices"), &device_apps)?;

    let begin = Instant::now();
    stage("disks");
    let ingredients = Ingredients {
        debian: &debian,
        fixture: &fixture,
        binary: &binary,
        apps: &apps,
        device_apps: &device_apps,
        tools: &tools,
        run: &run,
    };
    let seeds = options.power_cut.seeds();
    let full = full::test(&full_machine(&ingredients)?, &fixture, &own, seeds)?;
    let bare = bare::test(&bare_machine(&ingredients)?, &fixture, seeds)?;

    let report = Report::new(size, &full, &bare);
    println!("\n{}\n\n{}", full.analysis.trim(), report.section());
    if options.write {
        let page = tree.root.join("docs").join("benchmarks.md");
        report.write(&page)?;
        println!("written to {}", page.display());
    }
    let missed = report.missed();
    if !missed.is_empty() {
        bail!("limits not kept:\n- {}", missed.join("\n- "));
    }
    println!(
        "The gateway boots, works and survives a power cut, with 4 KiB and 16 KiB pages: {} s, besides building.",
        (download + begin.elapsed()).as_secs()
    );
    Ok(())
}

fn full_machine(ingredients: &Ingredients) -> Result<Parts> {
    let root = ingredients.root()?;
    let state = ingredients.run.join("state-4k.img");
    disk::make_state(&state)?;
    Ok(Parts {
        name: "4k",
        processor: "cortex-a72",
        start: Start::Kernel {
            kernel: ingredients.debian.kernel(Pages::Of4KiB),
            initramfs: ingredients.root_initramfs()?,
            parameters: String::new(),
        },
        network: Network::Alone,
        root: Some(root),
        state,
        logs: ingredients.run.to_owned(),
    })
}

fn bare_machine(ingredients: &Ingredients) -> Result<Parts> {
    let state = ingredients.run.join("state-16k.img");
    disk::make_state(&state)?;
    Ok(Parts {
        name: "16k",
        // The Cortex-A72 has no such pages.
        processor: "cortex-a76",
        start: Start::Kernel {
            kernel: ingredients.debian.kernel(Pages::Of16KiB),
            initramfs: ingredients.gateway_initramfs()?,
            parameters: String::new(),
        },
        network: Network::Alone,
        root: None,
        state,
        logs: ingredients.run.to_owned(),
    })
}

/// Held until the end, since two runs would share their disks.
pub fn lock(work: &Path) -> Result<File> {
    let path = work.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "another test of an emulated machine works in {}: wait until it has ended, or give this one a folder of its \
             own with CARGO_TARGET_DIR",
            work.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Says what comes now, and when.
pub fn stage(what: &str) {
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    println!("[{:6.1} s] {what}", BEGIN.elapsed().as_secs_f64());
}
