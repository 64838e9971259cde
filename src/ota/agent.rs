//! Does the steps that [`super::update`] says, and remembers how far they have come.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix_derivation::StorePath;

use super::boot::{self, BootError, Counting, Esp, Install};
use super::cache::{self, CacheError, Caches, Missing, Plan, Progress};
use super::health::Baseline;
use super::keys::TrustedKey;
use super::machine::{Machine, version_of};
use super::release::{self, Gateway, Offer, Release, ReleaseError};
use super::state::{Phase, State, StateError};
use super::store_dir::{Scrubbed, StoreDir, StoreError};
use super::update::{self, Seen, Step};

/// Of a signature file: a few lines.
const MAX_SIGNATURE_BYTES: usize = 16 * 1024;

/// Between two tries to get the lock.
const LOCK_EVERY: Duration = Duration::from_millis(50);

/// An update has five, and some may come twice.
const MOST_STEPS: usize = 16;

/// The one that runs, and one to go back to.
const MIN_SYSTEMS: usize = 2;

#[derive(Clone, Debug)]
pub struct Settings {
    pub channel: String,
    /// The channel itself if there are none.
    pub caches: Vec<String>,
    pub trusted_keys: Vec<TrustedKey>,
    pub product: String,
    pub pin: Option<String>,
    pub keep_generations: usize,
    pub min_free_bytes: u64,
    pub bytes_per_second: Option<NonZeroU64>,
    pub ca_file: Option<PathBuf>,
    pub proxy: Option<String>,
    pub tries: u8,
    pub esp: PathBuf,
    pub state: PathBuf,
    pub root: PathBuf,
    pub nix_store: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("no channel is configured; set ota.channel to the URL of the folder with release.json")]
    NoChannel,
    #[error("no trusted key is configured, so no release could be believed; set ota.trusted_keys")]
    NoKeys,
    #[error("{url} {fault}")]
    Release {
        url: String,
        #[source]
        fault: Box<ReleaseError>,
    },
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("another update is under way ({}); wait until it has ended", .0.display())]
    Busy(PathBuf),
    #[error("{}: no system is booted from here; updates are for machines that run NixOS with Headgate's image", .0.display())]
    NotBooted(PathBuf),
    #[error("updates are off, because a bad one would be booted for ever: {0}")]
    NotCounting(&'static str),
    #[error(
        "{} has too little room: the update takes {needed} bytes and must leave {reserve} (ota.min_free_bytes), and {free} are free; `headgate ota gc` makes room", .store.display()
    )]
    NoRoom {
        store: PathBuf,
        needed: u64,
        reserve: u64,
        free: u64,
    },
    #[error(
        "Nix keeps its own list of store paths here, and would not know what an update brings; set ota.nix_store to the program nix-store"
    )]
    NixWouldNotKnow,
    #[error("{} could not register the paths with Nix: {why}", .program.display())]
    NotRegistered { program: PathBuf, why: String },
    #[error("store paths belong to Nix here; collect them with nix-collect-garbage")]
    NixCollects,
    #[error(
        "the system of release {version} was left before: {reason}; --retry tries it once more"
    )]
    FailedBefore { version: String, reason: String },
    #[error("updates are held since {0}; `headgate ota unhold` lets them go on")]
    Held(Timestamp),
    #[error(
        "{0:?}, which a profile link, a boot entry or /run names, is no store path, so nothing is removed; remove or mend what names it"
    )]
    OddRoot(String),
    #[error("release {0} would leave no trusted key, so it would be the last one; add a key to it")]
    NoKeyLeft(String),
    #[error(
        "the update comes back to the same step again and again; `headgate boot list` shows what is on the boot partition, and `headgate ota rollback` calls it off"
    )]
    Astray,
    #[error("there is no generation to go back to")]
    NothingBefore,
    #[error("there is no generation {0} that could be booted")]
    NoGeneration(u64),
    #[error("cannot {doing} {}: {source}", .path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl AgentError {
    pub fn io(doing: &'static str, path: &Path, source: io::Error) -> AgentError {
        AgentError::Io {
            doing,
            path: path.to_owned(),
            source,
        }
    }
}

/// What one asks of an update.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish {
    pub allow_downgrade: bool,
    /// Also a system that was left before.
    pub retry: bool,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The newest release runs.
    UpToDate,
    /// It is not this gateway's turn.
    NotYet {
        version: String,
        percent: f64,
        place: f64,
    },
    /// The boot loader will try it.
    Restart {
        version: String,
    },
    /// It runs, and has to show that it is healthy.
    OnProbation {
        version: String,
    },
    Committed {
        version: String,
    },
    RolledBack {
        version: String,
        reason: String,
    },
}

/// Who updates a machine. Holds the lock that keeps others from doing so.
pub struct Agent {
    pub settings: Settings,
    pub machine: Machine,
    pub state: State,
    now: Timestamp,
    _lock: File,
}

/// What the store is like.
#[derive(Debug, Default)]
pub struct Scrub {
    pub sound: usize,
    pub damaged: Vec<StorePath>,
    /// Paths of which nobody has written down what they should be.
    pub unknown: usize,
    /// Boot entries that start nothing, and why.
    pub broken_entries: Vec<String>,
}

/// What a channel offers.
#[derive(Debug)]
pub struct Checked {
    pub release: Release,
    pub offer: Offer,
}

impl Agent {
    /// Waits for as long as `patience` if another one is at work.
    pub fn open(
        settings: Settings,
        now: Timestamp,
        patience: Duration,
    ) -> Result<Agent, AgentError> {
        let folder = &settings.state;
        fs::create_dir_all(folder).map_err(|source| AgentError::io("make", folder, source))?;
        let path = folder.join("lock");
        // Whoever can open it can keep others from updating.
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .and_then(|lock| {
                lock.set_permissions(Permissions::from_mode(0o600))?;
                Ok(lock)
            })
            .map_err(|source| AgentError::io("open", &path, source))?;
        let deadline = Instant::now() + patience;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_EVERY);
                }
                Err(TryLockError::WouldBlock) => return Err(AgentError::Busy(path)),
                Err(TryLockError::Error(source)) => {
                    return Err(AgentError::io("lock", &path, source));
                }
            }
        }
        let state = State::read(folder)?;
        let machine = Machine {
            root: settings.root.clone(),
            esp: Esp::new(&settings.esp),
        };
        machine.sweep(folder);
        Ok(Agent {
            now: state.no_earlier(now),
            settings,
            machine,
            state,
            _lock: lock,
        })
    }

    pub fn save(&self) -> Result<(), AgentError> {
        Ok(self.state.write(&self.settings.state)?)
    }

    /// Asks the channel.
    pub fn check(&mut self, wish: Wish) -> Result<Checked, AgentError> {
        let (caches, keys) = self.caches(&[])?;
        let channel = self.settings.channel.trim_end_matches('/');
        let name = match &self.settings.pin {
            Some(version) => format!("release-{version}.json"),
            None => "release.json".to_owned(),
        };
        let url = format!("{channel}/{name}");
        let document = caches.document(&url, release::MAX_BYTES)?;
        let signatures = caches.document(&format!("{url}.sig"), MAX_SIGNATURE_BYTES)?;
        let signatures = String::from_utf8_lossy(&signatures);
        let of_release = |fault| AgentError::Release {
            url: url.clone(),
            fault: Box::new(fault),
        };
        let release = Release::read(&document, &signatures, &keys, self.now).map_err(of_release)?;
        let booted = self.machine.booted()?;
        let committed = self.state.committed.as_ref();
        let version = version_of(&self.machine.root, &booted).or_else(|| {
            let committed = committed.filter(|release| release.toplevel == booted)?;
            Some(committed.version.clone())
        });
        let gateway = Gateway {
            product: &self.settings.product,
            system: &system(),
            id: &self.machine.id()?,
            version: version.as_deref(),
            toplevel: &booted,
            pin: self.settings.pin.as_deref(),
            newest_seen: self.state.newest_seen,
            allow_downgrade: wish.allow_downgrade,
        };
        let offer = release.offer(&gateway, self.now).map_err(of_release)?;
        self.state.last_check = Some(self.now);
        Ok(Checked { release, offer })
    }

    /// The caches, with the keys that count and further ones.
    fn caches(&self, added: &[TrustedKey]) -> Result<(Caches, Vec<TrustedKey>), AgentError> {
        if self.settings.channel.is_empty() {
            return Err(AgentError::NoChannel);
        }
        let mut keys = self.state.keys(&self.settings.trusted_keys);
        if keys.is_empty() {
            return Err(AgentError::NoKeys);
        }
        keys.extend_from_slice(added);
        let urls = match self.settings.caches.as_slice() {
            [] => vec![self.settings.channel.clone()],
            caches => caches.to_vec(),
        };
        let alive = keys.iter().filter(|key| !key.has_expired(self.now));
        let caches = Caches::new(cache::Settings {
            urls,
            trusted_keys: alive.map(|key| key.key.clone()).collect(),
            bytes_per_second: self.settings.bytes_per_second,
            ca_file: self.settings.ca_file.clone(),
            proxy: self.settings.proxy.clone(),
            spool: Some(self.settings.state.join("spool")),
            ..cache::Settings::default()
        })?;
        Ok((caches, keys))
    }

    /// Has the machine run what the channel offers, as far as that goes without a restart. `baseline` is asked
    /// once all is there; `progress` shows how the download is.
    pub fn update(
        &mut self,
        wish: Wish,
        progress: &Progress,
        baseline: impl FnOnce() -> Baseline,
    ) -> Result<Outcome, AgentError> {
        let outcome = self.try_update(wish, progress, baseline);
        self.state.last_error = outcome.as_ref().err().map(ToString::to_string);
        self.save()?;
        outcome
    }

    fn try_update(
        &mut self,
        wish: Wish,
        progress: &Progress,
        baseline: impl FnOnce() -> Baseline,
    ) -> Result<Outcome, AgentError> {
        // One that is ready to be booted, or is, comes to its end first.
        if !matches!(self.state.phase, Phase::Ready { .. }) {
            if let Some(since) = self.state.held_since {
                return Err(AgentError::Held(since));
            }
            self.may_update()?;
            match self.check(wish) {
                Ok(Checked { release, offer }) => match offer {
                    Offer::Running => {
                        self.state.phase = Phase::Idle;
                        self.take_keys(release)?;
                        return Ok(Outcome::UpToDate);
                    }
                    Offer::NotYet { percent, place } => {
                        self.state.phase = Phase::Idle;
                        let version = release.version;
                        return Ok(Outcome::NotYet {
                            version,
                            percent,
                            place,
                        });
                    }
                    Offer::Update => self.take(release, wish)?,
                },
                // What is offered no more, or never should have been, is not gone on with.
                Err(error @ AgentError::Release { .. }) => {
                    self.state.phase = Phase::Idle;
                    return Err(error);
                }
                // A download that was interrupted goes on while the channel can't be reached.
                Err(AgentError::Cache(error)) if self.state.release().is_some() => {
                    tracing::warn!(%error, "the channel does not answer: going on with the last release");
                }
                Err(error) => return Err(error),
            }
        }
        self.go_on(progress, baseline)
    }

    /// What is wrong with the machine, before a byte is fetched.
    fn may_update(&mut self) -> Result<(), AgentError> {
        if self.machine.has_nix() && self.settings.nix_store.is_none() {
            return Err(AgentError::NixWouldNotKnow);
        }
        self.note_counting()?;
        if !self.state.counts_boots {
            return Err(AgentError::NotCounting(
                "no boot of this machine has ever been counted, so its firmware may not be able to (see docs/ota.md)",
            ));
        }
        Ok(())
    }

    /// Looks whether this boot was counted; that it was once is remembered.
    pub fn note_counting(&mut self) -> Result<(), AgentError> {
        let why = match self.machine.counting()? {
            Counting::Works => {
                self.state.counts_boots = true;
                return Ok(());
            }
            Counting::Unknown => return Ok(()),
            Counting::NoLoader => "systemd-boot has not started this system",
            Counting::NotKnown => {
                "the boot loader does not count boots; systemd-boot 248 and newer do"
            }
            Counting::NotRenamed => {
                "the firmware could not rename the boot entry, so its tries never end (U-Boot needs 2025.07 or newer)"
            }
        };
        self.state.counts_boots = false;
        Err(AgentError::NotCounting(why))
    }

    /// A release of the system that runs can still say something about keys.
    fn take_keys(&mut self, release: Release) -> Result<(), AgentError> {
        if self
            .state
            .newest_seen
            .is_some_and(|seen| release.created <= seen)
        {
            return Ok(());
        }
        self.check_keys(&release)?;
        self.state.change_keys(&release);
        self.state.newest_seen = Some(release.created);
        Ok(())
    }

    /// A release that leaves no key is the last one.
    fn check_keys(&self, release: &Release) -> Result<(), AgentError> {
        let mut after = self.state.clone();
        after.change_keys(release);
        let left = after.keys(&self.settings.trusted_keys);
        match left.iter().all(|key| key.has_expired(self.now)) {
            true => Err(AgentError::NoKeyLeft(release.version.clone())),
            false => Ok(()),
        }
    }

    fn take(&mut self, release: Release, wish: Wish) -> Result<(), AgentError> {
        self.check_keys(&release)?;
        if !wish.retry && self.state.failed.contains(&release.toplevel) {
            let last = self.state.last_rollback.as_ref();
            let last = last.filter(|rollback| rollback.toplevel == release.toplevel);
            return Err(AgentError::FailedBefore {
                version: release.version,
                reason: last.map_or_else(|| "it failed".into(), |rollback| rollback.reason.clone()),
            });
        }
        tracing::info!(version = release.version, "updating");
        self.state.begin(release);
        self.save()
    }

    /// The steps that are left of the update under way.
    pub fn go_on(
        &mut self,
        progress: &Progress,
        baseline: impl FnOnce() -> Baseline,
    ) -> Result<Outcome, AgentError> {
        let mut baseline = Some(baseline);
        for _ in 0..MOST_STEPS {
            let Some(release) = self.state.release().cloned() else {
                return Ok(Outcome::UpToDate);
            };
            let version = release.version.clone();
            match update::next(&self.state.phase, &self.machine.seen()?) {
                Step::Rest => return Ok(Outcome::UpToDate),
                Step::Fetch => {
                    self.fetch(&release, progress)?;
                    let baseline = baseline.take().map(|baseline| baseline());
                    self.state.on_fetched(baseline.unwrap_or_default());
                    self.save()?;
                }
                Step::MakeGeneration => {
                    let generation = self.machine.make_generation(&release.toplevel)?;
                    self.state.on_generation(generation);
                    self.save()?;
                }
                Step::WriteEntry { generation } => {
                    self.state.on_arming(&self.machine.seen()?.boot);
                    self.save()?;
                    boot::install(
                        &self.machine.esp,
                        &Install {
                            root: &self.machine.root,
                            toplevel: &release.toplevel,
                            generation,
                            tries: Some(self.settings.tries),
                            version: Some(&version),
                            replaces: false,
                        },
                    )?;
                }
                Step::Restart => return Ok(Outcome::Restart { version }),
                Step::Probation { .. } => return Ok(Outcome::OnProbation { version }),
                Step::Commit { generation } => {
                    self.machine.set_current(generation)?;
                    self.state.on_committed();
                    self.save()?;
                    return Ok(Outcome::Committed { version });
                }
                Step::RollBack { generation, reason } => {
                    boot::condemn(&self.machine.esp, generation)?;
                    self.state.on_rolled_back(reason.clone(), self.now);
                    self.save()?;
                    self.machine.remove_generation(generation)?;
                    return Ok(Outcome::RolledBack { version, reason });
                }
            }
        }
        Err(AgentError::Astray)
    }

    fn fetch(&mut self, release: &Release, progress: &Progress) -> Result<(), AgentError> {
        let of_release = |fault| AgentError::Release {
            url: release.toplevel.clone(),
            fault: Box::new(fault),
        };
        let toplevel = release.toplevel().map_err(of_release)?;
        let (caches, _) = self.caches(&release.added_keys().map_err(of_release)?)?;
        let store = StoreDir::open(&self.machine.root)?;
        store.sweep()?;
        let plan = cache::plan(&caches, &store, &toplevel)?;
        if self.check_room(&plan).is_err() {
            // What older generations take up may be enough.
            self.collect()?;
            self.check_room(&plan)?;
        }
        cache::install(&caches, &store, &plan, progress)?;
        self.register(&plan)
    }

    fn check_room(&self, plan: &Plan) -> Result<(), AgentError> {
        let (free, reserve) = (self.machine.free_bytes()?, self.settings.min_free_bytes);
        // Files take whole blocks, and large downloads are kept until they are unpacked.
        let blocks = plan.unpacked_bytes / 8;
        let spooled = plan.missing.iter().map(Missing::download_bytes).max();
        let parts = [plan.unpacked_bytes, blocks, spooled.unwrap_or(0)];
        let needed = parts.into_iter().fold(0, u64::saturating_add);
        if needed.saturating_add(reserve) > free {
            return Err(AgentError::NoRoom {
                store: self.machine.root.join("nix/store"),
                needed,
                reserve,
                free,
            });
        }
        Ok(())
    }

    /// Tells Nix about the paths, where it is.
    fn register(&self, plan: &Plan) -> Result<(), AgentError> {
        let Some(program) = self
            .settings
            .nix_store
            .as_ref()
            .filter(|_| self.machine.has_nix())
        else {
            return Ok(());
        };
        let failed = |why: String| AgentError::NotRegistered {
            program: program.clone(),
            why,
        };
        let mut child = Command::new(program)
            .arg("--load-db")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        let registration = self.registration(plan)?;
        let mut input = child.stdin.take().expect("it was asked for");
        // What it has against the list, it says itself.
        let _ = input.write_all(registration.as_bytes());
        drop(input);
        let output = child
            .wait_with_output()
            .map_err(|error| failed(error.to_string()))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(failed(
                String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            )),
        }
    }

    /// A closure as `nix-store --load-db` reads it.
    fn registration(&self, plan: &Plan) -> Result<String, AgentError> {
        let store = StoreDir::open(&self.machine.root)?;
        let mut text = String::new();
        for path in plan.closure.keys() {
            if let Some(known) = store.known(path)? {
                let digits = known.nar_hash.digest_as_bytes().iter();
                let hash: String = digits.map(|byte| format!("{byte:02x}")).collect();
                let path = path.to_absolute_path();
                let (size, count) = (known.nar_size, known.references.len());
                // Who has made it is not known.
                text.push_str(&format!("{path}\n{hash}\n{size}\n\n{count}\n"));
                for reference in &known.references {
                    text.push_str(&reference.to_absolute_path());
                    text.push('\n');
                }
            }
        }
        Ok(text)
    }

    /// Goes back to an older generation, at the next boot. Of an update that was not booted yet, nothing is left.
    pub fn roll_back(&mut self, to: Option<u64>, reason: &str) -> Result<u64, AgentError> {
        let seen = self.machine.seen()?;
        let under_way = self.state.release();
        if to.is_none() && under_way.is_some_and(|release| release.toplevel != seen.booted) {
            return self.call_off(&seen, reason);
        }
        let is_bootable = |generation: &u64| match seen.entries.get(generation) {
            Some(update::Tries::Good) => seen.generations.contains_key(generation),
            _ => false,
        };
        let current = seen
            .generations
            .iter()
            .rev()
            .find(|(_, path)| **path == seen.booted);
        let current = current.map(|(generation, _)| *generation);
        let target = match to {
            Some(generation) if is_bootable(&generation) => generation,
            Some(generation) => return Err(AgentError::NoGeneration(generation)),
            None => {
                let before = seen.generations.keys().rev();
                let mut before =
                    before.filter(|generation| current.is_none_or(|now| **generation < now));
                *before
                    .find(|generation| is_bootable(generation))
                    .ok_or(AgentError::NothingBefore)?
            }
        };
        // First what is remembered: an update must not bring it back.
        self.state.phase = Phase::Idle;
        for (generation, toplevel) in seen.generations.range(target + 1..) {
            if Some(toplevel) != seen.generations.get(&target) {
                let version = version_of(&self.machine.root, toplevel);
                let version = version.unwrap_or_else(|| format!("of generation {generation}"));
                self.state.remember_rollback(
                    version,
                    toplevel.clone(),
                    reason.to_owned(),
                    self.now,
                );
            }
        }
        self.save()?;
        for generation in seen
            .entries
            .keys()
            .filter(|generation| **generation > target)
        {
            boot::condemn(&self.machine.esp, *generation)?;
        }
        self.machine.set_current(target)?;
        Ok(target)
    }

    /// Ends an update before its system was booted. Returns the generation that stays.
    fn call_off(&mut self, seen: &Seen, reason: &str) -> Result<u64, AgentError> {
        let newest = |system: Option<&str>| {
            let mut generations = seen.generations.iter().rev();
            let found = generations.find(|(_, path)| Some(path.as_str()) == system);
            found.map(|(generation, _)| *generation)
        };
        let new = newest(self.state.on_trial());
        if let Some(generation) = new.filter(|generation| seen.entries.contains_key(generation)) {
            boot::condemn(&self.machine.esp, generation)?;
        }
        self.state.on_rolled_back(reason.to_owned(), self.now);
        self.save()?;
        if let Some(generation) = new {
            self.machine.remove_generation(generation)?;
        }
        newest(Some(&seen.booted)).ok_or(AgentError::NothingBefore)
    }

    /// Removes generations beyond those to keep, and store paths that none of the others needs, nor what was fetched
    /// for an update that is not ready. Returns how many of each.
    pub fn collect(&self) -> Result<(usize, usize), AgentError> {
        let seen = self.machine.seen()?;
        let (mut kept, mut removed) = (0, 0);
        // The newest that can be booted stay, and what runs, and what is about to.
        for (generation, toplevel) in seen.generations.iter().rev() {
            let is_bad = matches!(
                seen.entries.get(generation),
                None | Some(update::Tries::Counted { left: 0, .. })
            );
            let is_needed =
                seen.booted == *toplevel || self.state.generation() == Some(*generation);
            let is_kept = !is_bad && kept < self.settings.keep_generations.max(MIN_SYSTEMS);
            if is_needed || is_kept {
                kept += 1;
                continue;
            }
            self.machine.remove_generation(*generation)?;
            removed += 1;
        }
        if self.machine.has_nix() {
            return match self.settings.nix_store {
                Some(_) => Ok((removed, 0)),
                None => Err(AgentError::NixCollects),
            };
        }
        let store = StoreDir::open(&self.machine.root)?;
        store.sweep()?;
        let unreachable = store.unreachable(&self.roots()?)?;
        store.remove(&unreachable)?;
        Ok((removed, unreachable.len()))
    }

    /// All that can be booted, or runs. What can't be read may be needed, so then nothing is removed.
    fn roots(&self) -> Result<Vec<StorePath>, AgentError> {
        let links = self.machine.generations()?.into_values();
        let entries = self.machine.esp.entries()?.into_iter();
        let systems = entries.filter_map(|entry| entry.toplevel);
        let all = links.chain(systems).chain(self.machine.running());
        all.map(
            |path| match StorePath::from_absolute_path(path.as_bytes()) {
                Ok(path) => Ok(path),
                Err(_) => Err(AgentError::OddRoot(path)),
            },
        )
        .collect()
    }

    /// Hashes every path of the store. With `repairs`, those that are damaged are fetched anew.
    pub fn scrub(&self, repairs: bool, progress: &Progress) -> Result<Scrub, AgentError> {
        let store = StoreDir::open(&self.machine.root)?;
        let mut found = Scrub::default();
        for path in store.paths()? {
            match store.scrub(&path)? {
                Scrubbed::Sound => found.sound += 1,
                Scrubbed::Damaged => found.damaged.push(path),
                Scrubbed::Unknown => found.unknown += 1,
            }
        }
        if repairs && !found.damaged.is_empty() {
            let (caches, _) = self.caches(&[])?;
            cache::repair(&caches, &store, &found.damaged, progress)?;
        }
        for entry in self.machine.esp.entries()? {
            let (Some(broken), Some(toplevel)) = (&entry.broken, &entry.toplevel) else {
                continue;
            };
            // What was left needs nothing any more.
            if entry.is_bad() {
                continue;
            }
            found
                .broken_entries
                .push(format!("{}: {broken}", entry.file.display()));
            if repairs {
                boot::install(
                    &self.machine.esp,
                    &Install {
                        root: &self.machine.root,
                        toplevel,
                        generation: entry.generation,
                        tries: None,
                        version: version_of(&self.machine.root, toplevel).as_deref(),
                        replaces: false,
                    },
                )?;
            }
        }
        Ok(found)
    }

    pub fn now(&self) -> Timestamp {
        self.now
    }
}

/// What Nix calls machines of this kind.
pub fn system() -> String {
    format!("{}-linux", std::env::consts::ARCH)
}
