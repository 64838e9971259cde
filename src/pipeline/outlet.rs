//! Where batches go, and where their results go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::{Load, Pressure, Rules, Traces};

use crate::event::{Batch, Event, TopicFilter, TopicTrie};

/// Something that works on batches: an app, a mapping.
pub trait Outlet: Send + Sync {
    /// For logs and metrics.
    fn name(&self) -> &str;

    /// Nothing is queued and nothing is being worked on: a batch that is offered now starts at
    /// once, so there is no gain in letting it grow.
    fn is_idle(&self) -> bool;

    /// Hands over a batch, of events of one lane. Never blocks. The outlet accounts for what it takes and
    /// for what it refuses.
    fn offer(&self, batch: Batch) -> Offer;

    /// How its realtime events have done since it was asked last.
    fn take_realtime_load(&self, _now: Instant) -> Load {
        Load::default()
    }

    /// Says which lanes stand back from now on.
    fn set_pressure(&self, _pressure: Pressure) {}
}

/// What became of an offered batch.
#[derive(Debug)]
pub enum Offer {
    /// The outlet has it, or has counted it as dropped.
    Taken,
    /// The queue is full but moving. Offer it again once the outlet has called [`Progress`]. Events
    /// that are missing from it the outlet has counted as dropped.
    Full(Batch),
}

/// Called by an outlet when it has become idle or its queue has room again. Cheap, from any thread.
pub type Progress = Arc<dyn Fn() + Send + Sync>;

/// Takes what outlets make of their batches. May be called from any thread that runs no tasks: it
/// can wait, within bounds, for whoever the results go to.
pub trait Sink: Send + Sync {
    /// `source` is the name of the outlet. When this has come back, what is to be in the journal is on its
    /// way there, before what comes after it.
    fn publish(&self, source: &str, events: Vec<Event>) -> Result<(), NotJournaled>;
}

/// Everybody got what was published, but the disk refuses the journal, which was to have some of it: what
/// it was made from is not finished.
#[derive(Debug)]
pub struct NotJournaled;

/// Events whose topic matches `filter` go to `outlet`. An outlet whose filters overlap still gets
/// each event once.
#[derive(Clone)]
pub struct Route {
    pub filter: TopicFilter,
    pub outlet: Arc<dyn Outlet>,
}

/// The routes in force: replaced as a whole by the control side, read without a lock by the edge
/// and the pipeline.
#[derive(Default)]
pub struct Routes {
    table: ArcSwap<RouteTable>,
    /// By whose they are.
    owned: Mutex<BTreeMap<&'static str, Vec<Route>>>,
    /// What became of the events that went by them.
    pub traces: Traces,
}

/// One set of routes.
#[derive(Default)]
pub struct RouteTable {
    /// Counts up with each replacement, so that caches know when they are stale.
    pub generation: u64,
    /// The outlets, each once.
    pub outlets: Vec<Arc<dyn Outlet>>,
    /// Indices into `outlets`.
    trie: TopicTrie<u32>,
    pub rules: Arc<Rules>,
}

impl Routes {
    /// Puts `routes` in the place of all that `owner` had so far.
    pub fn replace(&self, owner: &'static str, routes: Vec<Route>) {
        let mut owned = self.owned.lock();
        owned.insert(owner, routes);
        self.table.rcu(|current| {
            let mut table = RouteTable {
                generation: current.generation + 1,
                rules: current.rules.clone(),
                ..RouteTable::default()
            };
            for Route { filter, outlet } in owned.values().flatten() {
                let index = table
                    .outlets
                    .iter()
                    .position(|known| Arc::ptr_eq(known, outlet))
                    .unwrap_or_else(|| {
                        table.outlets.push(outlet.clone());
                        table.outlets.len() - 1
                    });
                table.trie.insert(filter, index as u32);
            }
            table
        });
    }

    /// Puts `rules` in the place of all rules so far.
    pub fn set_rules(&self, rules: Rules) {
        let rules = Arc::new(rules);
        self.table.rcu(|current| RouteTable {
            generation: current.generation + 1,
            outlets: current.outlets.clone(),
            trie: current.trie.clone(),
            rules: rules.clone(),
        });
    }

    pub fn load(&self) -> arc_swap::Guard<Arc<RouteTable>> {
        self.table.load()
    }

    pub fn load_full(&self) -> Arc<RouteTable> {
        self.table.load_full()
    }
}

impl RouteTable {
    /// Whether any outlet wants `topic`.
    pub fn is_wanted(&self, topic: &str) -> bool {
        let mut wanted = false;
        self.trie.for_each_match(topic, |_| wanted = true);
        wanted
    }

    /// The outlets for `topic`, as sorted indices into [`RouteTable::outlets`], each once.
    pub fn outlets_for(&self, topic: &str, found: &mut Vec<u32>) {
        found.clear();
        self.trie.for_each_match(topic, |index| found.push(*index));
        found.sort_unstable();
        found.dedup();
    }
}
