//! What is on the machine: the booted system, generations, boot entries, room on disks.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::agent::AgentError;
use super::boot::{self, Esp};
use super::update::{Seen, Tries};

/// Of links `system-N-link` and of the link that names the current one.
const PROFILES: &str = "nix/var/nix/profiles";

/// Numbers beyond that are nobody's who counts.
const MOST_GENERATIONS: u64 = 1 << 32;

/// Begins the names of what is being written.
const TEMPORARY: &str = ".headgate-";

/// A machine, below a folder that is `/` on a gateway.
#[derive(Debug)]
pub struct Machine {
    pub root: PathBuf,
    pub esp: Esp,
}

impl Machine {
    /// Store path of the system that is booted.
    pub fn booted(&self) -> Result<String, AgentError> {
        booted_system(&self.root)
            .ok_or_else(|| AgentError::NotBooted(self.root.join("run/booted-system")))
    }

    pub fn seen(&self) -> Result<Seen, AgentError> {
        let mut entries = BTreeMap::new();
        for entry in self.esp.entries()? {
            let tries = match entry.tries {
                None => Tries::Good,
                Some(boot::Tries { left, done }) => Tries::Counted { left, done },
            };
            // Of two for one generation, the first one is what the boot loader takes.
            if entry.broken.is_none() && entry.generation < MOST_GENERATIONS {
                entries.entry(entry.generation).or_insert(tries);
            }
        }
        Ok(Seen {
            booted: self.booted()?,
            booted_generation: self.boot_loader()?.generation(),
            boot: self.boot_id()?,
            generations: self.generations()?,
            entries,
        })
    }

    fn boot_id(&self) -> Result<String, AgentError> {
        let path = self.root.join("proc/sys/kernel/random/boot_id");
        let id =
            fs::read_to_string(&path).map_err(|source| AgentError::io("read", &path, source))?;
        Ok(id.trim().to_owned())
    }

    /// Who it is in rollouts.
    pub fn id(&self) -> Result<String, AgentError> {
        let path = self.root.join("etc/machine-id");
        let id =
            fs::read_to_string(&path).map_err(|source| AgentError::io("read", &path, source))?;
        Ok(id.trim().to_owned())
    }

    /// Store paths by generation.
    pub fn generations(&self) -> Result<BTreeMap<u64, String>, AgentError> {
        let folder = self.root.join(PROFILES);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(source) => return Err(AgentError::io("read", &folder, source)),
        };
        let mut generations = BTreeMap::new();
        for entry in entries {
            let entry = entry.map_err(|source| AgentError::io("read", &folder, source))?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| {
                let number = name.strip_prefix("system-")?.strip_suffix("-link")?;
                number.parse().ok()
            });
            let number = number.filter(|number| *number < MOST_GENERATIONS);
            if let (Some(number), Ok(target)) = (number, fs::read_link(entry.path())) {
                generations.insert(number, target.to_string_lossy().into_owned());
            }
        }
        Ok(generations)
    }

    pub fn make_generation(&self, toplevel: &str) -> Result<u64, AgentError> {
        let last = self.generations()?.keys().next_back().copied().unwrap_or(0);
        // Numbers of generations whose links are gone may still be on the boot partition.
        let entries = self.esp.entries()?;
        let last = entries
            .iter()
            .map(|entry| entry.generation)
            .filter(|number| *number < MOST_GENERATIONS)
            .fold(last, u64::max);
        self.link(&link_name(last + 1), toplevel)?;
        Ok(last + 1)
    }

    /// What tools of Nix take for the current system.
    pub fn set_current(&self, generation: u64) -> Result<(), AgentError> {
        self.link("system", &link_name(generation))
    }

    fn link(&self, name: &str, target: &str) -> Result<(), AgentError> {
        let folder = self.root.join(PROFILES);
        let path = folder.join(name);
        let failed = |source| AgentError::io("write", &path, source);
        fs::create_dir_all(&folder).map_err(failed)?;
        let link = |temporary: &Path| std::os::unix::fs::symlink(target, temporary);
        let temporary = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .make_in(&folder, link)
            .map_err(failed)?;
        temporary
            .persist(&path)
            .map_err(|error| failed(error.error))?;
        sync(&folder).map_err(failed)
    }

    pub fn remove_generation(&self, generation: u64) -> Result<(), AgentError> {
        boot::remove(&self.esp, generation)?;
        let path = self.root.join(PROFILES).join(link_name(generation));
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(AgentError::io("remove", &path, source))
            }
            _ => Ok(()),
        }
    }

    /// Store paths that are in use whatever generations there are.
    pub fn running(&self) -> Vec<String> {
        let links = ["run/booted-system", "run/current-system"];
        let targets = links.iter().map(|link| fs::read_link(self.root.join(link)));
        targets
            .filter_map(|target| Some(target.ok()?.to_string_lossy().into_owned()))
            .collect()
    }

    /// Whether Nix keeps a database of its store here.
    pub fn has_nix(&self) -> bool {
        self.root.join("nix/var/nix/db/db.sqlite").exists()
    }

    /// Whether boots are counted here, as far as this boot shows.
    pub fn counting(&self) -> Result<boot::Counting, AgentError> {
        Ok(self.boot_loader()?.counting(&self.esp.entries()?))
    }

    /// What the boot loader says about this boot.
    fn boot_loader(&self) -> Result<boot::Booted, AgentError> {
        Ok(boot::booted(&self.root.join("sys/firmware/efi/efivars"))?)
    }

    /// Removes what was left by whoever was interrupted.
    pub fn sweep(&self, state: &Path) {
        for folder in [state, &self.root.join(PROFILES)] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry
                    .file_name()
                    .as_encoded_bytes()
                    .starts_with(TEMPORARY.as_bytes())
                {
                    // It is in nobody's way.
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
    }

    /// Bytes that can be written to the store's file system.
    pub fn free_bytes(&self) -> Result<u64, AgentError> {
        let store = self.root.join("nix/store");
        let found = rustix::fs::statvfs(&store)
            .map_err(|error| AgentError::io("look at", &store, error.into()))?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }
}

/// Store path of the system that is booted, where systems are.
pub fn booted_system(root: &Path) -> Option<String> {
    let target = fs::read_link(root.join("run/booted-system")).ok()?;
    Some(target.to_string_lossy().into_owned())
}

/// What a system calls itself, in its `os-release`.
pub fn version_of(root: &Path, toplevel: &str) -> Option<String> {
    let below = Path::new(toplevel).strip_prefix("/").ok()?;
    let text = fs::read_to_string(root.join(below).join("etc/os-release")).ok()?;
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix("IMAGE_VERSION="))?;
    Some(value.trim_matches(['"', '\'']).to_owned()).filter(|version| !version.is_empty())
}

fn link_name(generation: u64) -> String {
    format!("system-{generation}-link")
}

fn sync(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}
