//! The disk of a machine with UEFI: an ESP and a root on one GPT disk, made without loop devices.

use crate::child;
use crate::vm::disk;
use anyhow::{Context, Result, ensure};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const MIB: u64 = 1 << 20;
const ESP_AT: u64 = MIB;
const ESP_BYTES: u64 = 128 * MIB;
const ROOT_AT: u64 = ESP_AT + ESP_BYTES;
const ROOT_BYTES: u64 = 1024 * MIB;
/// Behind the partitions is the second table.
const DISK_BYTES: u64 = ROOT_AT + ROOT_BYTES + MIB;

const ESP_TYPE: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
/// A root of aarch64.
const ROOT_TYPE: &str = "B921B045-1DF0-41C3-AF44-4C6F280D3FAE";

/// Makes `image` of what is in the two folders.
pub fn make(image: &Path, esp: &Path, root: &Path) -> Result<()> {
    File::create(image)
        .and_then(|file| file.set_len(DISK_BYTES))
        .with_context(|| format!("cannot create {}", image.display()))?;
    partition(image)?;
    child::run(
        disk::e2fsprogs("mkfs.vfat")
            .args(["-F", "32", "-s", "1", "-n", "ESP", "--offset"])
            .arg((ESP_AT / 512).to_string())
            .arg(image)
            .arg((ESP_BYTES / 1024).to_string())
            .stdout(Stdio::null()),
    )?;
    let mut copy = Command::new("mcopy");
    copy.args(["-s", "-Q", "-i"])
        .arg(format!("{}@@{ESP_AT}", image.display()));
    for entry in fs::read_dir(esp).with_context(|| format!("cannot list {}", esp.display()))? {
        copy.arg(entry?.path());
    }
    child::run(copy.arg("::/"))?;
    child::run(
        disk::e2fsprogs("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-E"])
            .arg(format!("offset={ROOT_AT}"))
            .arg("-d")
            .arg(root)
            .arg(image)
            .arg(format!("{}k", ROOT_BYTES / 1024))
            .stdin(Stdio::null()),
    )
}

fn partition(image: &Path) -> Result<()> {
    let table = format!(
        "label: gpt\nunit: sectors\n\
         start={}, size={}, type={ESP_TYPE}\n\
         start={}, size={}, type={ROOT_TYPE}\n",
        ESP_AT / 512,
        ESP_BYTES / 512,
        ROOT_AT / 512,
        ROOT_BYTES / 512,
    );
    let mut sfdisk = disk::e2fsprogs("sfdisk")
        .args(["--quiet", "--no-reread", "--no-tell-kernel"])
        .arg(image)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start sfdisk")?;
    let mut stdin = sfdisk.stdin.take().context("it has an input")?;
    stdin.write_all(table.as_bytes())?;
    drop(stdin);
    ensure!(sfdisk.wait()?.success(), "sfdisk failed");
    Ok(())
}

/// Copies the root of `image` to a file of its own: e2fsck forgets an offset when it has played back a journal.
/// Holes stay holes.
pub fn take_root(image: &Path, to: &Path) -> Result<()> {
    let mut dd = Command::new("dd");
    dd.args(["bs=1M", "conv=sparse", "status=none"])
        .arg(format!("skip={}", ROOT_AT / MIB))
        .arg(format!("count={}", ROOT_BYTES / MIB));
    for (name, file) in [("if=", image), ("of=", to)] {
        let mut argument = OsString::from(name);
        argument.push(file);
        dd.arg(argument);
    }
    child::run(&mut dd)
}
