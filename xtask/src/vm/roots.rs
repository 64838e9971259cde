//! What the emulated machines start from: initramfs and root, put together anew in each run.

use super::debian::{Debian, Pages};
use super::devices;
use super::fixture::{self, Fixture, within};
use super::{disk, initramfs};
use crate::child;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the service is linked against, besides what the kernel brings.
const LIBRARIES: [&str; 4] = [
    "ld-linux-aarch64.so.1",
    "aarch64-linux-gnu/libc.so.6",
    "aarch64-linux-gnu/libm.so.6",
    "aarch64-linux-gnu/libgcc_s.so.1",
];

/// Units of Debian's that do nothing for a gateway, and take an emulated machine seconds each.
const MASKED: [&str; 26] = [
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "e2scrub_reap.service",
    "getty-static.service",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "run-lock.mount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-binfmt.service",
    "systemd-hibernate-clear.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-modules-load.service",
    "systemd-networkd-persistent-storage.service",
    "systemd-random-seed.service",
    "systemd-sysext.socket",
    "systemd-udev-load-credentials.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
];

pub struct Ingredients<'a> {
    pub debian: &'a Debian,
    pub fixture: &'a Fixture,
    /// The service.
    pub binary: &'a Path,
    /// The compiled apps, a folder each.
    pub apps: &'a Path,
    /// The compiled apps that use devices, a folder each.
    pub device_apps: &'a Path,
    /// tests/vm/.
    pub tools: &'a Path,
    /// Where to work.
    pub run: &'a Path,
}

impl Ingredients<'_> {
    /// A disk with Debian, and on it what the NixOS module makes.
    pub fn root(&self) -> Result<PathBuf> {
        let tree = self.run.join("root");
        debian(self.debian, self.tools, &tree)?;
        self.fixture.install(&tree, self.binary, self.apps)?;
        self.fixture.install_units(&tree)?;
        fixture::copy_dir(self.device_apps, &within(&tree, devices::APPS))?;
        let image = self.run.join("root.img");
        disk::make_root(&tree, &image)?;
        Ok(image)
    }

    /// What finds that disk.
    pub fn root_initramfs(&self) -> Result<PathBuf> {
        let tree = self.run.join("root-initramfs");
        add_start(self.debian, self.tools, &tree, Pages::Of4KiB, "start-root")?;
        finish(&tree)
    }

    /// The gateway without a root, with the libraries of the one that was made before.
    pub fn gateway_initramfs(&self) -> Result<PathBuf> {
        let tree = self.run.join("gateway-initramfs");
        add_start(
            self.debian,
            self.tools,
            &tree,
            Pages::Of16KiB,
            "start-gateway",
        )?;
        for library in LIBRARIES {
            let name = format!("usr/lib/{library}");
            let target = tree.join("lib").join(library);
            fixture::copy(&self.run.join("root").join(name), &target)?;
        }
        let agent = "usr/local/lib/vm-agent";
        fixture::copy(&self.tools.join("guest").join(agent), &tree.join(agent))?;
        self.fixture.install(&tree, self.binary, self.apps)?;
        let command = format!("#!/bin/sh\nexec {}\n", self.fixture.command.join(" "));
        write_program(&tree.join("gateway"), &command)?;
        finish(&tree)
    }
}

/// Debian with the agent, its network and its disks.
pub fn debian(debian: &Debian, tools: &Path, tree: &Path) -> Result<()> {
    unpack_debian(debian, tree)?;
    prepare_debian(tree)?;
    fixture::copy_dir(&tools.join("guest"), tree)?;
    let units = within(tree, "/etc/systemd/system");
    fixture::enable(&units, "sysinit.target", "vm-agent.service")
}

fn unpack_debian(debian: &Debian, tree: &Path) -> Result<()> {
    fs::create_dir_all(tree).with_context(|| format!("cannot create {}", tree.display()))?;
    child::run(
        Command::new("tar")
            .args([
                "--extract",
                "--numeric-owner",
                "--same-permissions",
                "--file",
            ])
            .arg(debian.root_tar())
            .arg("--directory")
            .arg(tree),
    )
}

/// What loads the modules, and goes on with the script `start` of tests/vm/initramfs.
pub fn add_start(
    debian: &Debian,
    tools: &Path,
    tree: &Path,
    pages: Pages,
    start: &str,
) -> Result<()> {
    let own = tools.join("initramfs");
    fixture::copy(&own.join("init"), &tree.join("init"))?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;
    fixture::copy(&own.join(start), &tree.join("start"))?;
    fixture::copy(&debian.busybox(), &tree.join("bin/busybox"))?;
    for module in debian.modules(pages)? {
        let name = module.file_name().context("a module has a name")?;
        fixture::copy(&module, &tree.join("modules").join(name))?;
    }
    Ok(())
}

/// The archive of it.
pub fn finish(tree: &Path) -> Result<PathBuf> {
    let archive = tree.with_extension("cpio");
    initramfs::write(tree, &archive)?;
    Ok(archive)
}

/// What the packages' scripts would have done: they have not run, being arm64's.
fn prepare_debian(tree: &Path) -> Result<()> {
    for name in ["passwd", "group"] {
        let master = format!("/usr/share/base-passwd/{name}.master");
        let own = within(tree, &format!("/etc/{name}"));
        fixture::copy(&within(tree, &master), &own)?;
    }
    // A machine without one is set up as for its first boot, which asks questions.
    fixture::write(
        &within(tree, "/etc/machine-id"),
        "0123456789abcdef0123456789abcdef\n",
    )?;
    let units = within(tree, "/etc/systemd/system");
    fs::create_dir_all(&units)?;
    symlink(
        "/usr/lib/systemd/system/multi-user.target",
        units.join("default.target"),
    )?;
    for unit in MASKED {
        symlink("/dev/null", units.join(unit))?;
    }
    mask_generators(tree)?;
    // The same as its own [Install] section.
    let wants = units.join("multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    symlink(
        "/usr/lib/systemd/system/systemd-networkd.service",
        wants.join("systemd-networkd.service"),
    )?;
    for dir in ["dev", "proc", "sys", "run", "var/empty", "var/lib/headgate"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    Ok(())
}

/// Of the programs that make units at boot, only those for /etc/fstab and for boot loaders that count boots have
/// something to do.
fn mask_generators(tree: &Path) -> Result<()> {
    let masks = within(tree, "/etc/systemd/system-generators");
    fs::create_dir_all(&masks)?;
    let generators = within(tree, "/usr/lib/systemd/system-generators");
    for generator in fs::read_dir(&generators)
        .with_context(|| format!("cannot list {}", generators.display()))?
    {
        let name = generator?.file_name();
        if name != "systemd-fstab-generator" && name != "systemd-bless-boot-generator" {
            symlink("/dev/null", masks.join(name))?;
        }
    }
    Ok(())
}

pub fn write_program(path: &Path, text: &str) -> Result<()> {
    fixture::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} a program", path.display()))
}
