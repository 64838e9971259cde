//! The systems that the machine is updated to and from: what NixOS would build, as far as the agent, the boot
//! entries and systemd look at it.

use super::store::Store;
use crate::vm::debian::{Debian, Pages};
use crate::vm::fixture::{self, Fixture};
use crate::vm::machine::KERNEL;
use crate::vm::roots;
use anyhow::{Context, Result};
use serde_json::json;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

/// Files that are other ones in each version, so that there are moments to cut the power at: many small ones and a
/// large one that can't be compressed.
const SMALL_FILES: usize = 200;
const LARGE_FILE_BYTES: usize = 24 << 20;

/// What is wrong with a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    None,
    /// The gateway can't listen where it is told to.
    Gateway,
    /// The first process ends: the kernel panics, and starts anew.
    Panic,
    /// The first process does nothing, so that somebody has to pull the plug.
    Hang,
}

/// What systems are made of.
pub struct Ingredients<'a> {
    pub debian: &'a Debian,
    pub fixture: &'a Fixture,
    /// The service.
    pub binary: &'a Path,
    /// tests/vm/.
    pub tools: &'a Path,
    /// tests/ota/.
    pub own: &'a Path,
    /// Where to work.
    pub run: &'a Path,
    /// `[ota]` of the gateway's configuration.
    pub ota: String,
}

impl Ingredients<'_> {
    /// Adds the system to the store; its path is returned.
    pub fn add(&self, store: &mut Store, version: &str, flaw: Flaw) -> Result<String> {
        let kernel = store.add("linux", &[], |out, _| {
            fixture::copy(&self.debian.kernel(Pages::Of4KiB), &out.join("Image"))
        })?;
        let initrd = self.initrd(store, version)?;
        let service = store.add("headgate", &[], |out, _| {
            let program = out.join("bin/headgate");
            fixture::copy(self.binary, &program)?;
            fs::set_permissions(program, fs::Permissions::from_mode(0o755))?;
            Ok(())
        })?;
        let settings = self.settings(flaw)?;
        let etc = store.add("etc", &[], |out, _| {
            fixture::write(&out.join("headgate/headgate.toml"), &settings)
        })?;
        let units = store.add("units", &[&service], |out, _| self.units(out, &service))?;
        let ballast = store.add(&format!("ballast-{version}"), &[], |out, _| {
            ballast(out, version)
        })?;
        let parts = [&kernel, &initrd, &etc, &units, &ballast];
        store.add(
            &format!("nixos-system-headgate-{version}"),
            &parts.map(String::as_str),
            |out, own| {
                let init = match flaw {
                    Flaw::None | Flaw::Gateway => {
                        fs::read_to_string(self.own.join("system/init"))?.replace("@system@", own)
                    }
                    Flaw::Panic => "#!/bin/sh\nexit 1\n".to_owned(),
                    Flaw::Hang => "#!/bin/sh\nexec sleep infinity\n".to_owned(),
                };
                roots::write_program(&out.join("init"), &init)?;
                let boot = boot_json(own, &kernel, &initrd, version);
                fixture::write(&out.join("boot.json"), &boot)?;
                fixture::write(&out.join("system"), "aarch64-linux")?;
                fixture::write(&out.join("version"), version)?;
                for (name, target) in [
                    ("kernel", format!("{kernel}/Image")),
                    ("initrd", format!("{initrd}/initrd")),
                    ("etc", etc.clone()),
                    ("units", units.clone()),
                    ("ballast", ballast.clone()),
                    ("sw", service.clone()),
                ] {
                    symlink(target, out.join(name))?;
                }
                Ok(())
            },
        )
    }

    /// Each version has its own, so that every update writes one to the ESP.
    fn initrd(&self, store: &mut Store, version: &str) -> Result<String> {
        let tree = self
            .run
            .join(format!("initrd-{}", version.replace('.', "-")));
        roots::add_start(
            self.debian,
            self.tools,
            &tree,
            Pages::Of4KiB,
            "start-system",
        )?;
        fixture::write(&tree.join("version"), version)?;
        let archive = roots::finish(&tree)?;
        store.add(&format!("initrd-{version}"), &[], |out, _| {
            fixture::copy(&archive, &out.join("initrd"))
        })
    }

    fn settings(&self, flaw: Flaw) -> Result<String> {
        let settings = self.fixture.settings()?;
        let settings: String = settings
            .lines()
            .filter(|line| !line.starts_with("ota."))
            .map(|line| match line.split(" = ").next() {
                Some("apps.preinstalled") => "apps.preinstalled = \"\"\n".to_owned(),
                // An address that is nobody's (RFC 5737).
                Some("mqtt.listen") if flaw == Flaw::Gateway => {
                    "mqtt.listen = \"192.0.2.1:1883\"\n".to_owned()
                }
                _ => format!("{line}\n"),
            })
            .collect();
        Ok(format!("{settings}{}", self.ota))
    }

    fn units(&self, out: &Path, service: &str) -> Result<()> {
        for folder in ["units"] {
            let from = self.own.join(folder);
            for entry in
                fs::read_dir(&from).with_context(|| format!("cannot list {}", from.display()))?
            {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                self.unit(out, &name, &fs::read_to_string(entry.path())?, service)?;
            }
        }
        self.unit(out, "headgate.service", &self.fixture.unit, service)
    }

    /// A unit, and what its `[Install]` section says.
    fn unit(&self, out: &Path, name: &str, text: &str, service: &str) -> Result<()> {
        let hashless = Path::new(&self.fixture.command[0]).ancestors().nth(2);
        let hashless = hashless.context("it is in the store")?.to_string_lossy();
        fixture::write(&out.join(name), &text.replace(&*hashless, service))?;
        for (key, folder) in [("WantedBy=", "wants"), ("RequiredBy=", "requires")] {
            for target in text.lines().filter_map(|line| line.strip_prefix(key)) {
                let link = out.join(format!("{target}.{folder}")).join(name);
                let parent = link.parent().context("it is in a folder")?;
                fs::create_dir_all(parent)?;
                symlink(format!("../{name}"), &link)?;
            }
        }
        Ok(())
    }
}

/// Bootspec, version 1.
fn boot_json(own: &str, kernel: &str, initrd: &str, version: &str) -> String {
    let parameters: Vec<&str> = KERNEL.split_whitespace().collect();
    json!({
        "org.nixos.bootspec.v1": {
            "system": "aarch64-linux",
            "toplevel": own,
            "init": format!("{own}/init"),
            "kernel": format!("{kernel}/Image"),
            "kernelParams": parameters,
            "initrd": format!("{initrd}/initrd"),
            "label": format!("Headgate {version}"),
        }
    })
    .to_string()
}

fn ballast(out: &Path, version: &str) -> Result<()> {
    let seed = version
        .bytes()
        .fold(0, |seed, byte| seed << 8 | u64::from(byte));
    let mut random = fastrand::Rng::with_seed(seed);
    for number in 0..SMALL_FILES {
        let path = out.join(format!("share/{}/{number}", number % 8));
        fixture::write(
            &path,
            &format!("{version} {number}\n").repeat(random.usize(1..500)),
        )?;
    }
    let mut large = vec![0; LARGE_FILE_BYTES];
    random.fill(&mut large);
    fs::write(out.join("large"), large).context("cannot write the ballast")?;
    symlink("share/0", out.join("link"))?;
    Ok(())
}
