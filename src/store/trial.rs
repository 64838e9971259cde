//! A system on probation works on a copy of the database, which takes the original's place when the system has
//! passed. Whoever goes back to the system before finds what that one has left, in its own format.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use heed::{CompactionOption, EnvOpenOptions};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{StoreConfig, StoreError, error, fill_up, make_folder, open_error};

/// The database, below the store's folder.
const ORIGINAL: &str = "lmdb";

/// Its copy, for the system on probation.
const COPY: &str = "lmdb-trial";

/// In the copy: the store path of the system that it is for.
const SYSTEM: &str = "SYSTEM";

/// How sure it is that the system stays on which the gateway runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It may be left again. `before` is what has passed last.
    OnTrial {
        system: String,
        before: Option<String>,
    },
    /// It stays.
    Passed { system: String },
    /// It came by no update, or was left and is still booted. Nothing at all is known of a gateway that runs elsewhere.
    Unknown { system: Option<String> },
}

/// The folder of the database to open. Needs the store's lock.
pub(super) fn folder(config: &StoreConfig, standing: &Standing) -> Result<PathBuf, StoreError> {
    let original = config.path.join(ORIGINAL);
    let copy = config.path.join(COPY);
    let copy_is_for = fs::read_to_string(copy.join(SYSTEM)).ok();
    match standing {
        Standing::OnTrial { system, before } => {
            if copy_is_for.as_ref() != Some(system) {
                // Nobody could tell the gateway that the system before had passed.
                if copy_is_for.is_some() && copy_is_for == *before {
                    promote(&original, &copy)?;
                }
                make_copy(config, &original, &copy, system)?;
            }
            return Ok(copy);
        }
        Standing::Passed { system } if copy_is_for.as_ref() == Some(system) => {
            promote(&original, &copy)?;
        }
        // It goes on as it began, and is not what counts.
        Standing::Unknown { system } if system.is_some() && copy_is_for == *system => {
            return Ok(copy);
        }
        Standing::Unknown { system: None } => {}
        // Of a system that was left again, or half made.
        Standing::Passed { .. } | Standing::Unknown { .. } => {
            if remove(&copy)? {
                tracing::info!("what the system on probation has stored is gone with it");
            }
        }
    }
    make_folder(&original)?;
    remove_file(&original.join(SYSTEM))?;
    Ok(original)
}

fn make_copy(
    config: &StoreConfig,
    original: &Path,
    copy: &Path,
    system: &str,
) -> Result<(), StoreError> {
    remove(copy)?;
    let half_made = copy.with_extension("new");
    remove(&half_made)?;
    make_folder(&half_made)?;
    if original.join("data.mdb").exists() {
        let file = half_made.join("data.mdb");
        tracing::info!("this system is on probation: it works on a copy of the database");
        fill_up(&original.join("data.mdb"), config.map_bytes as u64)
            .map_err(|error| open_error(config, error.into()))?;
        let mut options = EnvOpenOptions::new();
        options.map_size(config.map_bytes.next_multiple_of(64 * 1024));
        // SAFETY: as for the store itself: the lock keeps others out.
        #[allow(unsafe_code)]
        let env = unsafe { options.open(original) }.map_err(|error| open_error(config, error))?;
        env.copy_to_path(&file, CompactionOption::Disabled)
            .map_err(|error| match error {
                heed::Error::Io(source) => at(&half_made, "cannot copy the database", source),
                error => open_error(config, error),
            })?
            .sync_all()
            .map_err(|source| at(&file, "cannot copy the database", source))?;
        // Else opening the copy could find the original's address space still taken.
        env.prepare_for_closing().wait();
    }
    let name = half_made.join(SYSTEM);
    fs::write(&name, system)
        .and_then(|()| File::open(&name)?.sync_all())
        .and_then(|()| File::open(&half_made)?.sync_all())
        .and_then(|()| fs::rename(&half_made, copy))
        .and_then(|()| sync_parent(copy))
        .map_err(|source| at(copy, "cannot copy the database", source))
}

/// Puts the copy into the place of the original.
pub(super) fn promote(original: &Path, copy: &Path) -> Result<(), StoreError> {
    let exchanged = match renameat_with(CWD, copy, CWD, original, RenameFlags::EXCHANGE) {
        // There was none yet.
        Err(rustix::io::Errno::NOENT) => fs::rename(copy, original),
        other => other.map_err(io::Error::from),
    };
    exchanged
        .and_then(|()| sync_parent(original))
        .map_err(|source| at(copy, "cannot put the copy in the database's place", source))?;
    remove_file(&original.join(SYSTEM))?;
    remove(copy)?;
    tracing::info!("this system has passed its probation: its database is the one that counts");
    Ok(())
}

/// The copy that a store works on, if it does.
pub(super) fn copy_in_use(store: &Path, folder: &Path) -> Option<(PathBuf, PathBuf)> {
    let copy = store.join(COPY);
    (folder == copy).then(|| (store.join(ORIGINAL), copy))
}

/// Whether there was anything.
fn remove(folder: &Path) -> Result<bool, StoreError> {
    match fs::remove_dir_all(folder) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(at(folder, "cannot remove the folder", source)),
    }
}

fn remove_file(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(at(path, "cannot remove the file", source))
        }
        _ => Ok(()),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent()
        .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

fn at(path: &Path, doing: &'static str, source: io::Error) -> StoreError {
    error::io(path, doing, source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    const OLD: &str = "/nix/store/00000000000000000000000000000000-system-1";
    const NEW: &str = "/nix/store/11111111111111111111111111111111-system-2";

    struct Machine {
        config: StoreConfig,
        _folder: tempfile::TempDir,
    }

    impl Machine {
        fn new() -> Machine {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("store");
            Machine {
                config: StoreConfig {
                    path,
                    map_bytes: 16 << 20,
                },
                _folder: folder,
            }
        }

        fn passed(&self, system: &str) -> Store {
            let system = system.to_owned();
            Store::open_as(&self.config, &Standing::Passed { system }).unwrap()
        }

        fn on_trial(&self, system: &str) -> Store {
            let (system, before) = (system.to_owned(), Some(OLD.to_owned()));
            Store::open_as(&self.config, &Standing::OnTrial { system, before }).unwrap()
        }

        fn folders(&self) -> Vec<String> {
            let entries = self.config.path.read_dir().unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<_> = names.filter(|name| name.starts_with("lmdb")).collect();
            names.sort();
            names
        }
    }

    fn keep(store: &Store, value: &str) {
        let mut changes = store.write_app_state().unwrap();
        changes.put("app", "key", value.as_bytes()).unwrap();
        changes.commit().unwrap();
    }

    fn kept(store: &Store) -> String {
        let state = store.app_state("app").unwrap();
        String::from_utf8(state[0].1.clone()).unwrap()
    }

    #[test]
    fn whoever_goes_back_finds_what_was_there_before() {
        let machine = Machine::new();
        keep(&machine.passed(OLD), "old");
        for _ in 0..2 {
            let trial = machine.on_trial(NEW);
            assert!(["old", "new"].contains(&kept(&trial).as_str()));
            keep(&trial, "new");
        }
        assert_eq!(
            kept(&machine.on_trial(NEW)),
            "new",
            "a restart goes on with the copy"
        );
        assert_eq!(kept(&machine.passed(OLD)), "old");
        assert_eq!(machine.folders(), ["lmdb"]);
        let again = machine.on_trial(NEW);
        assert_eq!(
            kept(&again),
            "old",
            "another try begins with what is there now"
        );
    }

    #[test]
    fn the_copy_counts_once_the_system_has_passed() {
        for passes_while_it_runs in [true, false] {
            let machine = Machine::new();
            keep(&machine.passed(OLD), "old");
            let trial = machine.on_trial(NEW);
            keep(&trial, "new");
            if passes_while_it_runs {
                assert!(trial.pass_trial().unwrap());
                assert!(!trial.pass_trial().unwrap(), "once");
                keep(&trial, "newer");
                assert_eq!(machine.folders(), ["lmdb"]);
            }
            drop(trial);
            let store = machine.passed(NEW);
            assert_eq!(
                kept(&store),
                if passes_while_it_runs { "newer" } else { "new" }
            );
            assert_eq!(machine.folders(), ["lmdb"]);
        }
    }

    #[test]
    fn what_has_passed_unseen_is_what_the_next_system_begins_with() {
        let machine = Machine::new();
        keep(&machine.on_trial(OLD), "old");
        assert_eq!(kept(&machine.on_trial(NEW)), "old");
        assert_eq!(kept(&machine.passed(OLD)), "old");
    }

    #[test]
    fn one_that_is_being_left_never_writes_the_original() {
        let machine = Machine::new();
        keep(&machine.passed(OLD), "old");
        keep(&machine.on_trial(NEW), "new");
        let system = Some(NEW.to_owned());
        let left = Store::open_as(&machine.config, &Standing::Unknown { system }).unwrap();
        assert_eq!(kept(&left), "new");
        keep(&left, "newer");
        drop(left);
        assert_eq!(kept(&machine.passed(OLD)), "old");
    }

    #[test]
    fn a_store_that_begins_on_probation_has_nothing_to_copy() {
        let machine = Machine::new();
        let trial = machine.on_trial(NEW);
        keep(&trial, "new");
        assert!(trial.pass_trial().unwrap());
        drop(trial);
        assert_eq!(kept(&machine.passed(NEW)), "new");
    }

    #[test]
    fn a_copy_that_was_half_made_is_made_again() {
        let machine = Machine::new();
        keep(&machine.passed(OLD), "old");
        let half_made = machine.config.path.join("lmdb-trial.new");
        fs::create_dir(&half_made).unwrap();
        fs::write(half_made.join("data.mdb"), "half").unwrap();
        fs::create_dir(machine.config.path.join("lmdb-trial")).unwrap();
        assert_eq!(kept(&machine.on_trial(NEW)), "old");
    }

    #[test]
    fn one_that_knows_nothing_of_updates_leaves_the_copy_alone() {
        let machine = Machine::new();
        keep(&machine.passed(OLD), "old");
        keep(&machine.on_trial(NEW), "new");
        assert_eq!(kept(&Store::open(&machine.config).unwrap()), "old");
        assert_eq!(kept(&machine.on_trial(NEW)), "new");
    }
}
