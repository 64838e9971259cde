//! Installs, blesses, condemns and removes generations.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::bootspec::{self, Bootspec, store_name};
use super::entry::{Entry, Text, Tries, file_name};
use super::esp::{ENTRIES, Esp, KERNELS, Writer, is_same};
use super::{BootError, Doing};

/// What to install.
pub struct Install<'a> {
    /// Below which the store is.
    pub root: &'a Path,
    /// `/nix/store/…`
    pub toplevel: &'a str,
    pub generation: u64,
    /// How often it may be started before it is bad; None if it is good at once.
    pub tries: Option<u8>,
    /// For the title; else that is the bootspec's label.
    pub version: Option<&'a str>,
    /// Whether it takes the place of another system that has its number. Numbers come again on a NixOS
    /// whose newest generations were deleted.
    pub replaces: bool,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq, serde::Serialize)]
pub struct Installed {
    pub entry: PathBuf,
    /// Whether anything had to be written.
    pub is_new: bool,
}

/// A file of the store, and where on the partition it belongs.
struct Copy<'a> {
    source: &'a str,
    target: PathBuf,
    on_partition: String,
}

impl<'a> Copy<'a> {
    /// Named after the store path, whose contents never change.
    fn new(writer: &Writer, source: &'a str, suffix: &str) -> Copy<'a> {
        let name = store_name(source).expect("a bootspec's files are in the store");
        let below = format!("{KERNELS}/{name}-{suffix}");
        Copy {
            source,
            target: writer.path(&below),
            on_partition: format!("/{below}"),
        }
    }
}

/// Writes kernel and initrd, and last the entry. If it is interrupted, what booted before still does, and
/// another run finishes.
pub fn install(esp: &Esp, install: &Install) -> Result<Installed, BootError> {
    let spec = Bootspec::read(install.root, install.toplevel)?;
    let writer = esp.writer()?;
    let ours: Vec<Entry> = (writer.entries()?.into_iter())
        .filter(|entry| entry.generation == install.generation)
        .collect();
    let clash = ours.iter().find_map(|entry| {
        let there = entry.toplevel.as_ref()?;
        (there != install.toplevel).then_some((entry, there))
    });
    if let Some((entry, there)) = clash.filter(|_| !install.replaces) {
        return Err(BootError::Clash {
            file: entry.file.clone(),
            there: there.clone(),
            wanted: install.toplevel.to_owned(),
            generation: install.generation,
        });
    }

    let kernel = Copy::new(&writer, &spec.kernel, "kernel.efi");
    let initrd = (spec.initrd.as_deref()).map(|source| Copy::new(&writer, source, "initrd"));
    let title = match install.version {
        Some(version) => format!("Headgate {version}"),
        None => spec.label.clone(),
    };
    let text = Text {
        title: &title,
        generation: install.generation,
        kernel: &kernel.on_partition,
        initrd: initrd.as_ref().map(|initrd| initrd.on_partition.as_str()),
        init: &spec.init,
        kernel_params: &spec.kernel_params,
    }
    .render();
    let copies: Vec<Copy> = [kernel].into_iter().chain(initrd).collect();
    let targets: Vec<PathBuf> = copies.iter().map(|copy| copy.target.clone()).collect();
    writer.sweep(&targets)?;

    let mut missing = Vec::new();
    for copy in copies {
        let source = Path::new(copy.source);
        let mut file = bootspec::open(install.root, source)?;
        let about = file.metadata().doing("looking at", source)?;
        if !about.is_file() || about.len() == 0 {
            return Err(BootError::Bootspec {
                file: source.to_owned(),
                problem: "it is empty, or no file: the system is damaged (`headgate ota scrub`)"
                    .into(),
            });
        }
        if !is_same(&copy.target, &mut file).doing("comparing", &copy.target)? {
            missing.push((copy, about.len()));
        }
    }
    // What is as it should be stays, with the tries that it has had; what is bad gets new ones.
    let is_as_wanted =
        |entry: &&Entry| entry.toplevel.as_deref() == Some(install.toplevel) && !entry.is_bad();
    let known = ours.iter().find(is_as_wanted);
    let tries = match known {
        Some(entry) => entry.tries,
        None => install.tries.map(|left| Tries {
            left: left.into(),
            done: 0,
        }),
    };
    let entry = writer
        .path(ENTRIES)
        .join(file_name(install.generation, tries));
    let is_written = std::fs::read(&entry).is_ok_and(|there| there == text.as_bytes());
    let is_new = !is_written || !missing.is_empty();

    let sizes: Vec<u64> = (missing.iter().map(|(_, size)| *size))
        .chain([text.len() as u64])
        .collect();
    writer.check_room(&sizes)?;
    for (copy, _) in &missing {
        let source = bootspec::open(install.root, Path::new(copy.source))?;
        writer.put(source, &copy.target)?;
    }
    if !is_written {
        writer.put(text.as_bytes(), &entry)?;
    }
    for other in ours.iter().filter(|other| other.file != entry) {
        writer.remove(&other.file)?;
    }
    // What the entries named that this one has replaced.
    writer.sweep(&[])?;
    Ok(Installed { entry, is_new })
}

/// The boot loader itself, and its configuration.
pub struct Loader<'a> {
    pub systemd_boot: &'a Path,
    pub loader_conf: Option<&'a Path>,
    /// As UEFI has it in file names: `aa64`, `x64`.
    pub arch: &'a str,
}

/// Writes those of the boot loader's files that differ.
pub fn install_loader(esp: &Esp, loader: &Loader) -> Result<(), BootError> {
    let writer = esp.writer()?;
    let arch = loader.arch;
    let targets = [
        (
            Some(loader.systemd_boot),
            format!("EFI/systemd/systemd-boot{arch}.efi"),
        ),
        (
            Some(loader.systemd_boot),
            format!("EFI/BOOT/BOOT{}.EFI", arch.to_uppercase()),
        ),
        (loader.loader_conf, "loader/loader.conf".into()),
    ];
    let mut differing = Vec::new();
    for (source, target) in targets {
        let Some(source) = source else { continue };
        let target = writer.path(&target);
        let mut file = File::open(source).doing("opening", source)?;
        if !is_same(&target, &mut file).doing("comparing", &target)? {
            let size = file.metadata().doing("looking at", source)?.len();
            differing.push((source, target, size));
        }
    }
    writer.check_room(
        &differing
            .iter()
            .map(|(_, _, size)| *size)
            .collect::<Vec<_>>(),
    )?;
    for (source, target, _) in differing {
        writer.put(File::open(source).doing("opening", source)?, &target)?;
    }
    Ok(())
}

/// Declares a generation good, as systemd-bless-boot does.
pub fn bless(esp: &Esp, generation: u64) -> Result<(), BootError> {
    rename(esp, generation, |_| None)
}

/// What no count of boots leads to: systemd-bless-boot, which looks for the name under which the entry was booted,
/// must not find it.
pub const CONDEMNED: Tries = Tries { left: 0, done: 100 };

/// Declares a generation bad: systemd-boot takes the one before.
pub fn condemn(esp: &Esp, generation: u64) -> Result<(), BootError> {
    rename(esp, generation, |_| Some(CONDEMNED))
}

/// Leaves one entry of the generation, with other tries.
fn rename(
    esp: &Esp,
    generation: u64,
    tries: impl Fn(Option<Tries>) -> Option<Tries>,
) -> Result<(), BootError> {
    let writer = esp.writer()?;
    let (mut ours, others): (Vec<Entry>, _) =
        (writer.entries()?.into_iter()).partition(|entry| entry.generation == generation);
    // The first of them is the best one.
    let best = match ours.first() {
        Some(best) if best.broken.is_none() => ours.remove(0),
        _ => {
            return Err(BootError::NoEntry {
                esp: esp.path().to_owned(),
                generation,
            });
        }
    };
    let tries = tries(best.tries);
    if tries.is_some_and(|tries| tries.left == 0) {
        check_another_boots(esp, generation, &others)?;
    }
    let file = writer.path(ENTRIES).join(file_name(generation, tries));
    if best.file != file {
        writer.rename(&best.file, &file)?;
    }
    for other in ours.iter().filter(|other| other.file != file) {
        writer.remove(&other.file)?;
    }
    Ok(())
}

/// Removes a generation's entry, and the kernel that only it has named. Done if it is not there.
pub fn remove(esp: &Esp, generation: u64) -> Result<(), BootError> {
    retain(esp, |entry| entry.generation != generation).map(|_| ())
}

/// Removes the entries of ours that are not to be kept, unless then no entry boots, and the kernels
/// that only they have named. Tells which generations are gone.
pub fn retain(esp: &Esp, is_kept: impl Fn(&Entry) -> bool) -> Result<Vec<u64>, BootError> {
    let writer = esp.writer()?;
    let (kept, gone): (Vec<Entry>, Vec<Entry>) = writer.entries()?.into_iter().partition(is_kept);
    if let Some(entry) = gone.first() {
        check_another_boots(esp, entry.generation, &kept)?;
    }
    for entry in &gone {
        writer.remove(&entry.file)?;
    }
    writer.sweep(&[])?;
    Ok(gone.iter().map(|entry| entry.generation).collect())
}

fn check_another_boots(esp: &Esp, generation: u64, others: &[Entry]) -> Result<(), BootError> {
    let boots = |entry: &Entry| entry.broken.is_none() && !entry.is_bad();
    if others.iter().any(boots) {
        return Ok(());
    }
    Err(BootError::LastEntry {
        esp: esp.path().to_owned(),
        generation,
    })
}
