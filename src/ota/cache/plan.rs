//! Which paths an update needs, and which of them are missing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicBool;
use std::thread;

use nix_derivation::StorePath;
use nix_narinfo::NarInfo;
use parking_lot::{Condvar, Mutex};

use super::fault::CacheError;
use super::{Caches, NARINFO_JOBS_MOST};
use crate::ota::store_dir::StoreDir;

/// No system has that many; a cache that goes on for ever does.
const MOST_PATHS: usize = 100_000;

/// A closure, and what of it has to be fetched.
#[derive(Debug)]
pub struct Plan {
    pub toplevel: StorePath,
    /// Every path of the closure with what it refers to.
    pub closure: BTreeMap<StorePath, Vec<StorePath>>,
    pub missing: Vec<Missing>,
    /// Paths that are there, but of which only now it is known what they should be.
    pub(super) described: Vec<NarInfo>,
    /// Compressed, as far as the cache says so.
    pub download_bytes: u64,
    pub unpacked_bytes: u64,
}

/// A path to fetch.
#[derive(Clone, Debug)]
pub struct Missing {
    pub info: NarInfo,
    /// Which cache said so.
    pub(super) cache: usize,
}

impl Missing {
    pub fn download_bytes(&self) -> u64 {
        self.info.file_size().unwrap_or(self.info.nar_size())
    }
}

/// Walks the closure of `toplevel`, breadth first. A path that is there is walked too: an installation that
/// was interrupted may have left it without what it refers to.
pub fn plan(caches: &Caches, store: &StoreDir, toplevel: &StorePath) -> Result<Plan, CacheError> {
    caches.begin();
    let never = AtomicBool::new(false);
    let walk = Walk {
        state: Mutex::new(State {
            closure: BTreeMap::from([(toplevel.clone(), Vec::new())]),
            waiting: VecDeque::from([toplevel.clone()]),
            asked: 0,
            missing: Vec::new(),
            described: Vec::new(),
            failed: None,
        }),
        changed: Condvar::new(),
    };
    thread::scope(|scope| {
        for _ in 0..NARINFO_JOBS_MOST {
            scope.spawn(|| walk.run(caches, store, toplevel, &never));
        }
    });
    let state = walk.state.into_inner();
    if let Some(error) = state.failed {
        return Err(error);
    }
    Ok(Plan {
        toplevel: toplevel.clone(),
        download_bytes: state
            .missing
            .iter()
            .map(Missing::download_bytes)
            .fold(0, u64::saturating_add),
        unpacked_bytes: state
            .missing
            .iter()
            .map(|missing| missing.info.nar_size())
            .fold(0, u64::saturating_add),
        closure: state.closure,
        missing: state.missing,
        described: state.described,
    })
}

struct Walk {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    closure: BTreeMap<StorePath, Vec<StorePath>>,
    waiting: VecDeque<StorePath>,
    /// Paths that a thread is asking about.
    asked: usize,
    missing: Vec<Missing>,
    described: Vec<NarInfo>,
    failed: Option<CacheError>,
}

/// What there is to know about one path.
enum Found {
    /// In the store, with these references.
    Present(Vec<StorePath>),
    /// In the store, but only a cache knows what it should be.
    Described(NarInfo),
    Missing(Missing),
}

impl Walk {
    fn run(&self, caches: &Caches, store: &StoreDir, toplevel: &StorePath, never: &AtomicBool) {
        let mut state = self.state.lock();
        loop {
            if state.failed.is_some() {
                return;
            }
            let Some(path) = state.waiting.pop_front() else {
                if state.asked == 0 {
                    return;
                }
                self.changed.wait(&mut state);
                continue;
            };
            state.asked += 1;
            drop(state);
            let found = look_up(caches, store, &path, never);
            state = self.state.lock();
            state.asked -= 1;
            match found {
                Ok(found) => state.add(path, found, toplevel),
                Err(error) => state.failed = state.failed.take().or(Some(error)),
            }
            self.changed.notify_all();
        }
    }
}

impl State {
    fn add(&mut self, path: StorePath, found: Found, toplevel: &StorePath) {
        let references: Vec<StorePath> = match found {
            Found::Present(references) => references,
            Found::Described(info) => {
                let references = info.references().iter().cloned().collect();
                self.described.push(info);
                references
            }
            Found::Missing(missing) => {
                let references = missing.info.references().iter().cloned().collect();
                self.missing.push(missing);
                references
            }
        };
        for reference in &references {
            if !self.closure.contains_key(reference) {
                self.closure.insert(reference.clone(), Vec::new());
                self.waiting.push_back(reference.clone());
            }
        }
        self.closure.insert(path, references);
        if self.closure.len() > MOST_PATHS {
            self.failed = Some(CacheError::ClosureTooLarge {
                toplevel: toplevel.clone(),
                limit: MOST_PATHS,
            });
        }
    }
}

fn look_up(
    caches: &Caches,
    store: &StoreDir,
    path: &StorePath,
    never: &AtomicBool,
) -> Result<Found, CacheError> {
    if !store.contains(path) {
        let (cache, info) = caches.narinfo(path, never)?;
        return Ok(Found::Missing(Missing { info, cache }));
    }
    if let Some(known) = store.known(path)? {
        return Ok(Found::Present(known.references));
    }
    // Somebody has put it there. What is in it tells which of the paths that are there it refers to, but a
    // cache tells all.
    match caches.narinfo(path, never) {
        Ok((_, info)) => Ok(Found::Described(info)),
        Err(_) => Ok(Found::Present(store.references(path)?)),
    }
}
