//! What updates remember over restarts, power cuts and rollbacks: `state.json` in `ota.state`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::health::Baseline;
use super::keys::TrustedKey;
use super::release::Release;

const FILE: &str = "state.json";

/// Most systems that are remembered as failed; of more, the oldest are forgotten.
const MAX_FAILED: usize = 32;

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    pub phase: Phase,
    /// The last release that has passed its probation.
    pub committed: Option<Release>,
    /// When the newest release that was ever begun was made: none that is older is taken.
    pub newest_seen: Option<Timestamp>,
    /// Keys that releases have added.
    pub added_keys: Vec<String>,
    /// Names of keys that releases have revoked.
    pub revoked_keys: Vec<String>,
    /// Since when nothing is updated.
    pub held_since: Option<Timestamp>,
    /// Whether a boot has been counted here, which says that the firmware can.
    pub counts_boots: bool,
    pub last_rollback: Option<Rollback>,
    /// Store paths of systems that were left again; only who insists gets them once more.
    pub failed: Vec<String>,
    pub last_check: Option<Timestamp>,
    /// What the last attempt has failed with.
    pub last_error: Option<String>,
}

/// How far the update that is under way has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "name")]
pub enum Phase {
    /// None is.
    #[default]
    Idle,
    /// Store paths are on their way.
    Fetching { release: Release },
    /// All of them are there. What follows is seen in boot entries and in what is booted.
    Ready {
        release: Release,
        /// What flowed before.
        baseline: Baseline,
        /// The generation that was made for it. An older one may be of the same system.
        generation: Option<u64>,
        /// The boot in which the boot entry was written, by the kernel's boot id.
        armed_in: Option<String>,
        /// Why the last try was given up.
        failure: Option<String>,
    },
}

/// A system that was left again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollback {
    pub version: String,
    pub toplevel: String,
    pub reason: String,
    pub at: Timestamp,
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{}: can't be read: {source}; remove it to begin anew: then the gateway forgets which releases it has seen and which have failed, and which keys were added and revoked", .path.display()
    )]
    Damaged {
        path: PathBuf,
        source: serde_json::Error,
    },
}

impl State {
    /// Reads it; the state of a gateway that was never updated if there is none.
    pub fn read(folder: &Path) -> Result<State, StateError> {
        let path = folder.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::default()),
            Err(source) => return Err(StateError::Io { path, source }),
        };
        serde_json::from_slice(&text).map_err(|source| StateError::Damaged { path, source })
    }

    /// On disk when this returns, as a whole or not at all.
    pub fn write(&self, folder: &Path) -> Result<(), StateError> {
        let text = serde_json::to_vec_pretty(self).expect("texts, numbers and times are JSON");
        replace(&folder.join(FILE), &text)
    }

    pub fn release(&self) -> Option<&Release> {
        match &self.phase {
            Phase::Idle => None,
            Phase::Fetching { release } | Phase::Ready { release, .. } => Some(release),
        }
    }

    /// The system that may be left again, once it is booted.
    pub fn on_trial(&self) -> Option<&str> {
        match &self.phase {
            Phase::Ready { release, .. } => Some(&release.toplevel),
            Phase::Idle | Phase::Fetching { .. } => None,
        }
    }

    /// Whether a system is the last one that has passed its probation.
    pub fn is_committed(&self, system: &str) -> bool {
        let committed = self.committed.as_ref();
        matches!(self.phase, Phase::Idle | Phase::Fetching { .. })
            && committed.is_some_and(|release| release.toplevel == system)
    }

    /// The keys that count: those of the configuration and those that releases have added, without those that
    /// releases have revoked.
    pub fn keys(&self, configured: &[TrustedKey]) -> Vec<TrustedKey> {
        let added = self.added_keys.iter().filter_map(|key| key.parse().ok());
        let mut keys: Vec<TrustedKey> = configured.iter().cloned().chain(added).collect();
        keys.retain(|key| !self.revoked_keys.contains(&key.key.name));
        keys
    }

    /// The time, for what expires: never before what the gateway has seen, so that a clock that was lost does not
    /// bring old keys and releases back to life.
    pub fn no_earlier(&self, now: Timestamp) -> Timestamp {
        self.newest_seen.map_or(now, |seen| now.max(seen))
    }

    pub fn begin(&mut self, release: Release) {
        self.newest_seen = Some(
            self.newest_seen
                .map_or(release.created, |seen| seen.max(release.created)),
        );
        self.phase = Phase::Fetching { release };
    }

    pub fn on_fetched(&mut self, baseline: Baseline) {
        if let Phase::Fetching { release } = std::mem::take(&mut self.phase) {
            self.phase = Phase::Ready {
                release,
                baseline,
                generation: None,
                armed_in: None,
                failure: None,
            };
        }
    }

    pub fn on_generation(&mut self, number: u64) {
        if let Phase::Ready { generation, .. } = &mut self.phase {
            *generation = Some(number);
        }
    }

    /// The generation of the update that is under way.
    pub fn generation(&self) -> Option<u64> {
        match self.phase {
            Phase::Ready { generation, .. } => generation,
            Phase::Idle | Phase::Fetching { .. } => None,
        }
    }

    /// Goes before the boot entry is written.
    pub fn on_arming(&mut self, boot: &str) {
        if let Phase::Ready { armed_in, .. } = &mut self.phase {
            *armed_in = Some(boot.to_owned());
        }
    }

    /// This boot of the new system is given up.
    pub fn on_failure(&mut self, reason: &str) {
        if let Phase::Ready { failure, .. } = &mut self.phase {
            *failure = Some(reason.to_owned());
        }
    }

    /// The new system stays.
    pub fn on_committed(&mut self) {
        if let Phase::Ready { release, .. } = std::mem::take(&mut self.phase) {
            self.failed.retain(|failed| *failed != release.toplevel);
            self.change_keys(&release);
            self.committed = Some(release);
            self.last_error = None;
        }
    }

    /// What a release says about keys counts from now on.
    pub fn change_keys(&mut self, release: &Release) {
        for key in &release.add_keys {
            if !self.added_keys.contains(key) {
                self.added_keys.push(key.clone());
            }
            let name = key.split(':').next();
            self.revoked_keys
                .retain(|revoked| Some(revoked.as_str()) != name);
        }
        for name in &release.revoke_keys {
            self.added_keys
                .retain(|key| key.split(':').next() != Some(name));
            if !self.revoked_keys.contains(name) {
                self.revoked_keys.push(name.clone());
            }
        }
    }

    /// The new system was left again, or never came.
    pub fn on_rolled_back(&mut self, reason: String, at: Timestamp) {
        if let Some(release) = self.release() {
            let (version, toplevel) = (release.version.clone(), release.toplevel.clone());
            self.remember_rollback(version, toplevel, reason, at);
        }
        self.phase = Phase::Idle;
    }

    pub fn remember_rollback(
        &mut self,
        version: String,
        toplevel: String,
        reason: String,
        at: Timestamp,
    ) {
        self.failed.retain(|failed| *failed != toplevel);
        self.failed.push(toplevel.clone());
        let too_many = self.failed.len().saturating_sub(MAX_FAILED);
        self.failed.drain(..too_many);
        self.last_rollback = Some(Rollback {
            version,
            toplevel,
            reason,
            at,
        });
    }
}

/// Puts `text` into the place of a file: as a whole, and on disk when this returns.
pub fn replace(path: &Path, text: &[u8]) -> Result<(), StateError> {
    let failed = |source| StateError::Io {
        path: path.to_owned(),
        source,
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::Builder::new()
        .prefix(".headgate-")
        .tempfile_in(folder)
        .map_err(failed)?;
    file.write_all(text).map_err(failed)?;
    // Whoever may look at the folder may read it.
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.as_file().set_permissions(readable).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ota::keys::SecretKey;

    fn release(key: &str, revoke: &[&str]) -> Release {
        Release {
            schema: 1,
            product: "headgate".into(),
            version: "2".into(),
            system: "aarch64-linux".into(),
            toplevel: "/nix/store/11111111111111111111111111111111-nixos-system-2".into(),
            created: "2026-11-22T00:00:00Z".parse().unwrap(),
            expires: None,
            rollout: None,
            add_keys: vec![key.to_owned()],
            revoke_keys: revoke.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    fn names(keys: &[TrustedKey]) -> Vec<&str> {
        keys.iter().map(|key| key.key.name.as_str()).collect()
    }

    #[test]
    fn keys_change_with_the_system_that_brings_them_and_not_before() {
        let old: TrustedKey = SecretKey::generate("old")
            .unwrap()
            .public()
            .parse()
            .unwrap();
        let new = SecretKey::generate("new").unwrap().public();
        let configured = [old];
        let mut state = State::default();
        state.begin(release(&new, &["old"]));
        state.on_fetched(Baseline::default());
        assert_eq!(names(&state.keys(&configured)), ["old"]);

        let mut back = state.clone();
        back.on_rolled_back("bad".into(), Timestamp::UNIX_EPOCH);
        assert_eq!(names(&back.keys(&configured)), ["old"]);

        state.on_committed();
        assert_eq!(names(&state.keys(&configured)), ["new"]);
        let again = configured[0].to_string();
        state.begin(release(&again, &["new"]));
        state.on_fetched(Baseline::default());
        state.on_committed();
        assert_eq!(names(&state.keys(&configured)), ["old", "old"]);
    }

    #[test]
    fn the_clock_goes_no_further_back_than_the_newest_release() {
        let mut state = State::default();
        let begin: Timestamp = "2026-11-22T00:00:00Z".parse().unwrap();
        assert_eq!(
            state.no_earlier(Timestamp::UNIX_EPOCH),
            Timestamp::UNIX_EPOCH
        );
        let key = SecretKey::generate("k").unwrap().public();
        state.begin(release(&key, &[]));
        assert_eq!(state.no_earlier(Timestamp::UNIX_EPOCH), begin);
    }

    #[test]
    fn what_is_written_is_read_and_damage_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(State::read(folder.path()).unwrap(), State::default());
        let key = SecretKey::generate("k").unwrap().public();
        let mut state = State::default();
        state.begin(release(&key, &[]));
        state.write(folder.path()).unwrap();
        assert_eq!(State::read(folder.path()).unwrap(), state);
        state.on_fetched(Baseline::default());
        state.on_arming("boot 1");
        state.on_failure("no broker");
        state.write(folder.path()).unwrap();
        assert_eq!(State::read(folder.path()).unwrap(), state);
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);

        fs::write(folder.path().join(FILE), "{\"phase\":").unwrap();
        let error = State::read(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("state.json") && error.contains("remove it"),
            "{error}"
        );
    }
}
