//! What the NixOS module makes of a gateway: the checked files in tests/vm/fixture/, and where in a
//! root each of them, the service and its apps belong.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Where NixOS has its packages. The names in the fixture have no hash.
const STORE: &str = "/nix/store/";

pub struct Fixture {
    dir: PathBuf,
    pub unit: String,
    /// Where the apps are expected, of `headgate.toml`.
    pub preinstalled: String,
    /// The service with its arguments, of the unit.
    pub command: Vec<String>,
}

impl Fixture {
    pub fn read(dir: PathBuf) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).with_context(|| {
                format!(
                    "cannot read {}, which the module makes: cargo xtask nix --write",
                    path.display()
                )
            })
        };
        let unit = read("headgate.service")?;
        let command =
            command(&unit).context("headgate.service has no ExecStart= that can be used")?;
        let settings: toml::Table = read("headgate.toml")?
            .parse()
            .context("headgate.toml of the fixture is no TOML")?;
        let preinstalled = settings
            .get("apps")
            .and_then(|apps| apps.get("preinstalled"))
            .and_then(toml::Value::as_str)
            .context("headgate.toml of the fixture has no apps.preinstalled")?
            .to_owned();
        for path in [&command[0], &preinstalled] {
            ensure!(
                path.starts_with(STORE),
                "the fixture has {path}, which is not in {STORE}"
            );
        }
        Ok(Fixture {
            dir,
            unit,
            preinstalled,
            command,
        })
    }

    /// The script with which the module has the apps compiled, for apps that lie in `apps`.
    pub fn compile_apps(&self, apps: &Path) -> Result<String> {
        let script = self.text("compile-apps.sh")?;
        let from = script
            .split_whitespace()
            .find(|word| word.starts_with(STORE))
            .and_then(|path| Path::new(path).parent())
            .context("compile-apps.sh of the fixture compiles nothing of the store")?
            .to_string_lossy();
        Ok(script.replace(&*from, &apps.to_string_lossy()))
    }

    /// Puts the service, its configuration and its apps where they belong in `root`.
    pub fn install(&self, root: &Path, binary: &Path, apps: &Path) -> Result<()> {
        let service = within(root, &self.command[0]);
        copy(binary, &service)?;
        fs::set_permissions(&service, fs::Permissions::from_mode(0o755))?;
        copy_dir(apps, &within(root, &self.preinstalled))?;
        let settings = self
            .option("--config")
            .unwrap_or("/etc/headgate/headgate.toml");
        write(&within(root, settings), &self.text("headgate.toml")?)
    }

    /// Adds what systemd needs: the unit and its user.
    pub fn install_units(&self, root: &Path) -> Result<()> {
        let units = within(root, "/etc/systemd/system");
        write(&units.join("headgate.service"), &self.unit)?;
        enable(&units, "multi-user.target", "headgate.service")?;
        let tmpfiles = self.dir.join("tmpfiles.conf");
        if tmpfiles.exists() {
            copy(&tmpfiles, &within(root, "/etc/tmpfiles.d/headgate.conf"))?;
        }
        self.add_users(root)
    }

    pub fn settings(&self) -> Result<String> {
        self.text("headgate.toml")
    }

    /// Adds the users to the root that the service runs as.
    pub fn add_users(&self, root: &Path) -> Result<()> {
        add_users(root, &self.text("sysusers.conf")?)
    }

    fn option(&self, name: &str) -> Option<&str> {
        let mut words = self.command.iter();
        words.find(|word| *word == name)?;
        words.next().map(String::as_str)
    }

    fn text(&self, name: &str) -> Result<String> {
        let path = self.dir.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

/// Has `target` start `unit`, as its `[Install]` section or NixOS's `wantedBy` says.
pub fn enable(units: &Path, target: &str, unit: &str) -> Result<()> {
    let link = units.join(format!("{target}.wants")).join(unit);
    create_parent(&link)?;
    symlink(format!("../{unit}"), &link)
        .with_context(|| format!("cannot create {}", link.display()))
}

/// Copies all that is in `from` into `to`, which is created.
pub fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else {
            copy(&entry.path(), &target)?;
        }
    }
    Ok(())
}

pub fn copy(from: &Path, to: &Path) -> Result<()> {
    create_parent(to)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

pub fn write(path: &Path, text: &str) -> Result<()> {
    create_parent(path)?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().context("a file has a folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))
}

/// The guest's absolute `path` below `root`.
pub fn within(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// The words of `ExecStart=`.
fn command(unit: &str) -> Option<Vec<String>> {
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))?;
    let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    (!words.is_empty()).then_some(words)
}

/// As systemd-sysusers would; Debian's own runs when a machine is installed, which this one is not.
fn add_users(root: &Path, sysusers: &str) -> Result<()> {
    let (mut users, mut groups) = (String::new(), String::new());
    for (name, id) in user_names(sysusers).zip(900..) {
        users.push_str(&format!(
            "{name}:x:{id}:{id}::/var/empty:/usr/sbin/nologin\n"
        ));
        groups.push_str(&format!("{name}:x:{id}:\n"));
    }
    for (path, lines) in [("/etc/passwd", users), ("/etc/group", groups)] {
        let path = within(root, path);
        fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(lines.as_bytes()))
            .with_context(|| format!("cannot add to {}", path.display()))?;
    }
    Ok(())
}

fn user_names(sysusers: &str) -> impl Iterator<Item = &str> {
    sysusers
        .lines()
        .filter_map(|line| line.strip_prefix("u ")?.split_whitespace().next())
}

#[cfg(test)]
mod the_fixture {
    use super::*;

    #[test]
    fn says_what_is_run() {
        let unit =
            "[Service]\nExecStart=/nix/store/headgate/bin/headgate --config /etc/h.toml run\n";
        let words = command(unit).expect("there is one");
        assert_eq!(
            words,
            [
                "/nix/store/headgate/bin/headgate",
                "--config",
                "/etc/h.toml",
                "run"
            ]
        );
        assert!(command("[Service]\nExecStart=\n").is_none());
    }

    #[test]
    fn names_users_and_not_groups() {
        let names: Vec<_> =
            user_names("g headgate -\nu headgate -:headgate \"\" /var/empty -\n").collect();
        assert_eq!(names, ["headgate"]);
    }
}
