//! The machine with UEFI that is booted again and again from one disk.

use crate::vm::disk;
use crate::vm::machine::{Machine, Network, Parts, Start};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

pub const CODE: &str = "/usr/share/AAVMF/AAVMF_CODE.fd";
const VARIABLES: &str = "/usr/share/AAVMF/AAVMF_VARS.fd";

/// A board, switched off. What it was left with is in `parts.state`.
pub struct Board {
    parts: Parts,
    /// What its firmware keeps between two boots.
    variables: PathBuf,
}

impl Board {
    /// One that has just been flashed with the disk `image`, which becomes its own.
    pub fn new(name: &'static str, image: PathBuf, run: &Path) -> Result<Self> {
        Self::with_variables(name, image, Path::new(VARIABLES), run)
    }

    fn with_variables(
        name: &'static str,
        image: PathBuf,
        factory: &Path,
        run: &Path,
    ) -> Result<Self> {
        let variables = run.join(format!("{name}-variables.fd"));
        disk::copy(factory, &variables)?;
        Ok(Board {
            variables: variables.clone(),
            parts: Parts {
                name,
                processor: "cortex-a72",
                start: Start::Firmware {
                    code: CODE.into(),
                    variables,
                },
                network: Network::Host,
                root: None,
                state: image,
                logs: run.to_owned(),
            },
        })
    }

    /// From now on a boot loader that counts nothing starts it: QEMU's, with `system` of the disk.
    pub fn without_firmware(&mut self, kernel: PathBuf, initramfs: PathBuf, system: &str) {
        self.parts.start = Start::Kernel {
            kernel,
            initramfs,
            parameters: format!("init={system}/init"),
        };
    }

    pub fn boot(&self) -> Result<Machine> {
        Machine::boot(&self.parts)
    }

    /// Boots, does `what`, and switches off.
    pub fn run<T>(&self, what: impl FnOnce(&mut Machine) -> Result<T>) -> Result<T> {
        let mut machine = self.boot()?;
        let result = what(&mut machine).map_err(|error| machine.explain(error))?;
        machine.halt("systemctl poweroff")?;
        self.keep(machine)?;
        Ok(result)
    }

    /// After a boot that has ended: what is on the disk now is what the next one begins with.
    pub fn keep(&self, machine: Machine) -> Result<()> {
        let disk = machine.disk.clone();
        drop(machine);
        fs::rename(&disk, &self.parts.state)
            .with_context(|| format!("cannot rename {}", disk.display()))
    }

    /// Puts all that it was left with into the folder `to`.
    pub fn save(&self, to: &Path) -> Result<()> {
        fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
        disk::copy(&self.parts.state, &to.join("disk.img"))?;
        disk::copy(&self.variables, &to.join("variables.fd"))
    }

    /// A board called `name` that was left with what is in the folder `saved`.
    pub fn restore(name: &'static str, saved: &Path, run: &Path) -> Result<Self> {
        let image = run.join(format!("{name}.img"));
        disk::copy(&saved.join("disk.img"), &image)?;
        Self::with_variables(name, image, &saved.join("variables.fd"), run)
    }

    /// The disk, as it is while the board is switched off.
    pub fn disk(&self) -> &Path {
        &self.parts.state
    }
}
