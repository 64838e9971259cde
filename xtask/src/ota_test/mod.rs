//! Updates the gateway over the air on an emulated aarch64 machine with UEFI: well, badly, and with its power cut
//! in between. docs/vm-test.md says what for; `surroundings` what it needs.

mod board;
mod channel;
mod guest;
mod image;
mod power_cuts;
mod server;
mod store;
mod system;
mod trials;

use crate::child;
use crate::tree::Tree;
use crate::vm::debian::Debian;
use crate::vm::fixture::{self, Fixture, within};
use crate::vm::{self, cross, roots, stage};
use anyhow::{Context, Result};
use channel::Channel;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use store::Store;
use system::{Flaw, Ingredients};
use trials::Trials;

/// A program, and Debian's package with it.
const PROGRAMS: [(&str, &str); 6] = [
    ("nix", "nix-bin"),
    ("nix-hash", "nix-bin"),
    ("nix-store", "nix-bin"),
    ("mcopy", "mtools"),
    ("mkfs.vfat", "dosfstools"),
    ("sfdisk", "fdisk"),
];

/// What `cargo xtask ota-test` can be told.
#[derive(clap::Args)]
pub struct Options {
    /// Where Debian's packages come from, if not from the mirror that mmdebstrap chooses; they are
    /// kept for the next run
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    #[command(flatten)]
    power_cuts: power_cuts::Options,
    /// Leave out the systems that panic or hang as they start: they take their time
    #[arg(long)]
    quick: bool,
    /// Only the healthy update, and the power cuts of the next one
    #[arg(long)]
    only_cuts: bool,
    /// The service for aarch64, instead of building it
    #[arg(long, value_name = "FILE")]
    service: Option<PathBuf>,
    /// The service for this machine, instead of building it
    #[arg(long, value_name = "FILE")]
    headgate: Option<PathBuf>,
}

pub fn run(tree: &Tree, options: &Options) -> Result<()> {
    vm::surroundings::check(&PROGRAMS, &[(board::CODE, "qemu-efi-aarch64")])?;
    let work = tree.target.join("vm");
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let _lock = vm::lock(&work)?;
    let tools = tree.root.join("tests").join("vm");
    let own = tree.root.join("tests").join("ota");
    let fixture = Fixture::read(own.join("fixture"))?;
    let run = work.join("ota-run");
    if run.exists() {
        fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
    }
    fs::create_dir_all(&run).with_context(|| format!("cannot create {}", run.display()))?;

    stage("Debian");
    let debian = Debian::get(work.join("debian"), options.mirror.as_deref(), &tools)?;
    stage("cross build");
    let build = |given: &Option<PathBuf>, build: fn(&Tree) -> Result<PathBuf>| match given {
        Some(file) => Ok(file.clone()),
        None => build(tree),
    };
    let binary = build(&options.service, cross::build)?;
    let headgate = build(&options.headgate, cross::build_own)?;

    stage("apps");
    crate::guest::build_apps(tree)?;
    let apps = run.join("apps");
    cross::compile_apps(&headgate, tree, &fixture, &apps)?;

    stage("systems");
    let mut store = Store::new(run.join("store"))?;
    let channel = Channel::new(run.join("channel"), headgate.clone())?;
    let ingredients = Ingredients {
        debian: &debian,
        fixture: &fixture,
        binary: &binary,
        apps: &apps,
        tools: &tools,
        own: &own,
        run: &run,
        settings: [
            ("ota.channel", channel.url()),
            ("ota.trusted_keys", store.public_key.clone()),
        ],
    };
    let factory = ingredients.add(&mut store, trials::FACTORY, Flaw::None)?;

    stage("disk");
    let image = disk(&ingredients, &store, &factory, &headgate)?;
    let trials = Trials {
        ingredients: &ingredients,
        store,
        channel,
        factory,
    };
    trials.run(image, options)?;
    println!("Good updates stay, bad ones do not, and a power cut leaves a machine that boots.");
    Ok(())
}

/// The disk of a gateway as it leaves the factory, with the system `factory`.
fn disk(
    ingredients: &Ingredients,
    store: &Store,
    factory: &str,
    headgate: &Path,
) -> Result<PathBuf> {
    let run = ingredients.run;
    let root = run.join("root");
    roots::debian(ingredients.debian, ingredients.tools, &root)?;
    fixture::copy_dir(&ingredients.own.join("guest"), &root)?;
    ingredients.fixture.add_users(&root)?;
    fs::create_dir_all(root.join("boot"))?;
    symlink(
        "/run/current-system/etc/headgate",
        root.join("etc/headgate"),
    )?;

    let closure = store.closure(factory);
    for path in &closure {
        store.copy(path, &root)?;
    }
    let profiles = within(&root, "/nix/var/nix/profiles");
    fs::create_dir_all(&profiles)?;
    symlink("system-1-link", profiles.join("system"))?;
    symlink(factory, profiles.join("system-1-link"))?;
    let registration = within(&root, "/nix/var/headgate/registration");
    fixture::write(&registration, &store.registration(&closure)?)?;

    let esp = run.join("esp");
    fs::create_dir_all(&esp).with_context(|| format!("cannot create {}", esp.display()))?;
    let loader = within(&root, "/usr/lib/systemd/boot/efi/systemd-bootaa64.efi");
    child::run(
        Command::new(headgate)
            .args(["boot", "install", "--offline", "--efi-arch", "aa64"])
            .arg("--esp")
            .arg(&esp)
            .arg("--root")
            .arg(&root)
            .arg("--systemd-boot")
            .arg(loader)
            .arg("--loader-conf")
            .arg(ingredients.own.join("fixture/loader.conf"))
            .args(["--generation", "1", "--tries", &trials::TRIES.to_string()])
            .arg(factory),
    )?;
    let disk = run.join("factory.img");
    image::make(&disk, &esp, &root)?;
    Ok(disk)
}
