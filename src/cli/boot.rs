//! `headgate boot …`: the entries on the EFI system partition.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::json;

use super::output::{Output, one_line};
use crate::ota::boot::{self, BootError, Entry, Esp, Install, Loader};

#[derive(Subcommand)]
pub(super) enum BootCommand {
    /// Write the boot entry of a NixOS system
    ///
    /// Kernel and initrd are copied to the partition, and last the entry is written, with tries: if the
    /// system is never declared good, the boot loader goes back to the one before. NixOS calls this through
    /// boot.loader.external.installHook.
    Install(InstallArgs),
    /// List the entries, in the order in which the boot loader takes them
    List {
        #[command(flatten)]
        place: Place,
    },
    /// Declare a generation good: it is booted from now on, without counting
    Bless {
        /// Its number [default: that of the running system]
        #[arg(long, value_name = "N")]
        generation: Option<u64>,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Args)]
pub(super) struct Place {
    /// Where the EFI system partition is mounted
    #[arg(long, value_name = "DIR", default_value = "/boot")]
    esp: PathBuf,
    /// Folder below which /nix is
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// The partition is a folder, of which an image will be made
    #[arg(long)]
    offline: bool,
}

#[derive(Args)]
pub(super) struct InstallArgs {
    /// The system, /nix/store/…
    #[arg(value_name = "TOPLEVEL")]
    toplevel: String,
    /// How often it may be started before the boot loader goes back; 0 declares it good at once
    #[arg(long, value_name = "N", default_value_t = 3)]
    tries: u8,
    /// Its number [default: that of the profile link that leads to it; with --offline, 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    generation: Option<u64>,
    /// Version for the entry's title [default: what the system calls itself]
    #[arg(long, value_name = "VERSION")]
    version: Option<String>,
    /// Boot loader to copy to the partition, if it differs from the one that is there
    #[arg(long, value_name = "FILE")]
    systemd_boot: Option<PathBuf>,
    /// What UEFI calls the processor in names of files
    #[arg(long, value_name = "ARCH", default_value = default_arch())]
    efi_arch: String,
    /// Configuration of the boot loader to copy, if it differs
    #[arg(long, value_name = "FILE", requires = "systemd_boot")]
    loader_conf: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

fn default_arch() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "aa64",
        "riscv64" => "riscv64",
        _ => "x64",
    }
}

impl Place {
    fn esp(&self) -> Esp {
        match self.offline {
            true => Esp::offline(&self.esp),
            false => Esp::new(&self.esp),
        }
    }

    fn efivars(&self) -> PathBuf {
        self.root.join("sys/firmware/efi/efivars")
    }
}

pub(super) fn run(command: BootCommand, output: &Output) -> anyhow::Result<()> {
    match command {
        BootCommand::Install(args) => install(&args, output),
        BootCommand::List { place } => list(&place, output),
        BootCommand::Bless { generation, place } => bless(generation, &place, output),
    }
}

fn install(args: &InstallArgs, output: &Output) -> anyhow::Result<()> {
    let Place { root, offline, .. } = &args.place;
    let esp = args.place.esp();
    let generation = match args.generation {
        Some(generation) => generation,
        None if *offline => 1,
        None => generation_of(root, &args.toplevel)?,
    };
    if let Some(systemd_boot) = &args.systemd_boot {
        boot::install_loader(
            &esp,
            &Loader {
                systemd_boot,
                loader_conf: args.loader_conf.as_deref(),
                arch: &args.efi_arch,
            },
        )?;
    }
    if !offline {
        keep_what_runs(&esp, root, generation)?;
    }
    // The profile's links say what a number stands for: numbers of generations that were deleted come
    // again, and their entries must not.
    let installed = boot::install(
        &esp,
        &Install {
            root,
            toplevel: &args.toplevel,
            generation,
            tries: (args.tries > 0).then_some(args.tries),
            version: args.version.as_deref(),
            replaces: !offline && args.generation.is_none(),
        },
    )?;
    let mut gone = Vec::new();
    if !offline {
        let running = boot::booted(&args.place.efivars())?.generation();
        gone = boot::retain(&esp, |entry| {
            Some(entry.generation) == running
                || entry.generation == generation
                || link(root, entry.generation).is_symlink()
        })?;
    }
    if output.json {
        return output.value(&json!({
            "generation": generation,
            "entry": installed.entry,
            "is_new": installed.is_new,
            "removed": gone,
        }));
    }
    let entry = installed.entry.display();
    let mut text = match installed.is_new {
        true => format!("{entry} starts {}", args.toplevel),
        false => format!("{entry} starts {} already", args.toplevel),
    };
    for generation in gone {
        text += &format!("\nremoved generation {generation}, which the profile no longer has");
    }
    output.text(text)
}

/// Where another boot loader has been so far there is nothing of ours to go back to: what runs now, then.
fn keep_what_runs(esp: &Esp, root: &Path, new: u64) -> anyhow::Result<()> {
    let boots =
        |entry: &Entry| entry.generation != new && entry.broken.is_none() && !entry.is_bad();
    if esp.entries()?.iter().any(boots) {
        return Ok(());
    }
    let running = std::fs::read_link(root.join("run/booted-system"));
    let Some(toplevel) = running.as_deref().ok().and_then(Path::to_str) else {
        return Ok(());
    };
    let generation = match generation_of(root, toplevel) {
        Ok(generation) if generation != new => generation,
        _ => return Ok(()),
    };
    let running = Install {
        root,
        toplevel,
        generation,
        tries: None,
        version: None,
        replaces: true,
    };
    match boot::install(esp, &running) {
        // It needs what no entry of ours can give it, such as secrets in its initrd.
        Ok(_) | Err(BootError::Bootspec { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn link(root: &Path, generation: u64) -> PathBuf {
    root.join(format!("nix/var/nix/profiles/system-{generation}-link"))
}

/// The newest generation that is this system.
fn generation_of(root: &Path, toplevel: &str) -> anyhow::Result<u64> {
    let profiles = root.join("nix/var/nix/profiles");
    let listed =
        std::fs::read_dir(&profiles).with_context(|| format!("listing {}", profiles.display()))?;
    let mut newest = None;
    for link in listed {
        let link = link.with_context(|| format!("listing {}", profiles.display()))?;
        let name = link.file_name();
        let generation = name
            .to_str()
            .and_then(|name| name.strip_prefix("system-")?.strip_suffix("-link"))
            .and_then(|number| number.parse::<u64>().ok());
        let leads_there = std::fs::read_link(link.path()).is_ok_and(|to| to == Path::new(toplevel));
        newest = newest.max(generation.filter(|_| leads_there));
    }
    newest.with_context(|| {
        format!(
            "no system-N-link in {} leads to {toplevel}: set the profile first \
             (nix-env --profile /nix/var/nix/profiles/system --set), or give --generation",
            profiles.display()
        )
    })
}

fn list(place: &Place, output: &Output) -> anyhow::Result<()> {
    let entries = place.esp().entries()?;
    let booted = boot::booted(&place.efivars())?;
    let counting = booted.counting(&entries);
    if output.json {
        let entries: Vec<_> = (entries.iter())
            .map(|entry| {
                json!({
                    "generation": entry.generation,
                    "state": state(entry),
                    "tries_left": entry.tries.map(|tries| tries.left),
                    "tries_done": entry.tries.map(|tries| tries.done),
                    "title": entry.title,
                    "toplevel": entry.toplevel,
                    "broken": entry.broken,
                    "file": entry.file,
                })
            })
            .collect();
        return output.value(&json!({
            "entries": entries,
            "running": booted.generation(),
            "loader": booted.loader,
            "counting": counting,
        }));
    }
    if entries.is_empty() {
        return output.text(format!(
            "{} has no entries of Headgate's",
            place.esp.display()
        ));
    }
    let rows: Vec<[String; 5]> = (entries.iter())
        .map(|entry| {
            let mark = match Some(entry.generation) == booted.generation() {
                true => "running",
                false => "",
            };
            [
                entry.generation.to_string(),
                state(entry).into(),
                mark.into(),
                one_line(entry.title.as_deref().unwrap_or("")),
                one_line(
                    entry
                        .broken
                        .as_deref()
                        .or(entry.toplevel.as_deref())
                        .unwrap_or(""),
                ),
            ]
        })
        .collect();
    output.table(["GENERATION", "STATE", "", "TITLE", "SYSTEM"], &rows)
}

fn state(entry: &Entry) -> &'static str {
    match entry.tries {
        _ if entry.broken.is_some() => "broken",
        None => "good",
        Some(_) if entry.is_bad() => "bad",
        Some(_) => "on probation",
    }
}

fn bless(generation: Option<u64>, place: &Place, output: &Output) -> anyhow::Result<()> {
    let Some(generation) = generation.map_or_else(
        || boot::booted(&place.efivars()).map(|booted| booted.generation()),
        |generation| Ok(Some(generation)),
    )?
    else {
        bail!(
            "the boot loader does not say which entry this system was started by: give --generation, one of \
             those that `headgate boot list` has"
        );
    };
    boot::bless(&place.esp(), generation)?;
    if output.json {
        return output.value(&json!({ "generation": generation }));
    }
    output.text(format!("generation {generation} is good"))
}
