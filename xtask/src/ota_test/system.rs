//! The systems that the machine is updated to and from: what NixOS would build, as far as the agent, the boot
//! entries and systemd look at it.

use super::store::{STORE, Store};
use crate::vm::debian::{Debian, Pages};
use crate::vm::fixture::{self, Fixture};
use crate::vm::machine::KERNEL;
use crate::vm::roots;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::collections::BTreeMap;
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
    /// The compiled apps, a folder each.
    pub apps: &'a Path,
    /// tests/vm/.
    pub tools: &'a Path,
    /// tests/ota/.
    pub own: &'a Path,
    /// Where to work.
    pub run: &'a Path,
    /// Of the gateway's configuration, instead of what the fixture has.
    pub settings: [(&'a str, String); 2],
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
        let apps = store.add("headgate-apps", &[], |out, _| {
            fixture::copy_dir(self.apps, out)
        })?;
        let links = Links {
            fixture: self.fixture,
            service: &service,
            apps: &apps,
        };
        let settings = links.resolve(&self.settings(flaw)?);
        let etc = store.add("etc", &[&apps], |out, _| {
            fixture::write(&out.join("headgate/headgate.toml"), &settings)?;
            let release = format!("ID=nixos\nIMAGE_VERSION=\"{version}\"\n");
            fixture::write(&out.join("os-release"), &release)
        })?;
        let units = store.add("units", &[&service], |out, _| self.units(out, &links))?;
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
        let mut others: BTreeMap<&str, &str> = self
            .settings
            .iter()
            .map(|(key, value)| (*key, value.as_str()))
            .collect();
        if flaw == Flaw::Gateway {
            // An address that is nobody's (RFC 5737).
            others.insert("mqtt.listen", "192.0.2.1:1883");
        }
        let mut text = String::new();
        for line in self.fixture.settings()?.lines() {
            let key = line.split(" = ").next().unwrap_or_default();
            match others.remove(key) {
                Some(value) => text.push_str(&format!("{key} = \"{value}\"\n")),
                None => text.push_str(&format!("{line}\n")),
            }
        }
        ensure!(
            others.is_empty(),
            "the fixture's headgate.toml has no {others:?}"
        );
        Ok(text)
    }

    fn units(&self, out: &Path, links: &Links) -> Result<()> {
        let own = self.own.join("fixture/units");
        fixture::copy_dir(&own, out)?;
        fixture::write(&out.join("headgate.service"), &self.fixture.unit)?;
        for folder in [out.to_owned(), out.join("boot-complete.target.d")] {
            for entry in fs::read_dir(&folder)
                .with_context(|| format!("cannot list {}", folder.display()))?
            {
                let path = entry?.path();
                if path.is_file() {
                    let text = fs::read_to_string(&path)?;
                    fixture::write(&path, &links.resolve(&text))?;
                    enable(&path, &text)?;
                }
            }
        }
        Ok(())
    }
}

/// What names of the fixture, which have no hashes, stand for.
struct Links<'a> {
    fixture: &'a Fixture,
    service: &'a str,
    apps: &'a str,
}

impl Links<'_> {
    /// What is not the gateway's comes from Debian.
    fn resolve(&self, text: &str) -> String {
        let mut parts = text.split(STORE);
        let mut resolved = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let is_name = |c: char| c.is_ascii_alphanumeric() || "+-._?=".contains(c);
            let (name, rest) = part.split_at(part.find(|c| !is_name(c)).unwrap_or(part.len()));
            let path = format!("{STORE}{name}");
            resolved.push_str(
                if self.fixture.command[0].starts_with(&format!("{path}/")) {
                    self.service
                } else if self.fixture.preinstalled == path {
                    self.apps
                } else {
                    "/usr"
                },
            );
            resolved.push_str(rest);
        }
        resolved
    }
}

/// Does what the `[Install]` section of the unit `text` says.
fn enable(unit: &Path, text: &str) -> Result<()> {
    let name = unit.file_name().context("a unit has a name")?;
    for (key, kind) in [("WantedBy=", "wants"), ("RequiredBy=", "requires")] {
        for targets in text.lines().filter_map(|line| line.strip_prefix(key)) {
            for target in targets.split_whitespace() {
                let folder = unit.with_file_name(format!("{target}.{kind}"));
                fs::create_dir_all(&folder)
                    .with_context(|| format!("cannot create {}", folder.display()))?;
                symlink(Path::new("..").join(name), folder.join(name))?;
            }
        }
    }
    Ok(())
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
