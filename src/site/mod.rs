//! What a site has once although it has several gateways: apps and mappings that one gateway at a time runs
//! for all of it, or for a shard of its topics.
//!
//! They get the events of all gateways out of the streams that these ship to, and what they keep goes to a log
//! that all can read ([`log`]), together with up to where their events have been handled. Who gets the right to
//! act ([`crate::cluster`]) goes on from there; who had it before can't write any more from then on. Told in
//! `docs/cluster.md`.

mod feed;
pub mod log;
mod names;
mod outstanding;
mod record;
mod sitting;
mod unit;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::event::{Batch, Receipt, TopicFilter};
pub use names::Names;
pub(crate) use sitting::Room;
pub use unit::{Missing, SeatStatus, Seats, Workers};

/// Which gateways of a site run something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Each, with its own events.
    #[default]
    Everywhere,
    /// One, with those of all.
    Singleton,
    /// Each, with those of its shards of the topics.
    Partition,
}

/// What a gateway acts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Seat {
    /// The whole site.
    Whole,
    /// One shard of its topics.
    Shard(u16),
}

pub type Key = Arc<str>;
pub type Value = Arc<[u8]>;
/// All that a worker keeps for a seat.
pub type Entries = BTreeMap<Key, Value>;

/// An app, or the mappings, with a place in the site.
pub trait Worker: Send + Sync {
    fn name(&self) -> &str;

    fn placement(&self) -> Placement;

    /// The events that it gets.
    fn subscriptions(&self) -> Vec<TopicFilter>;

    /// Whether it is to run, where this gateway has the right to.
    fn is_wanted(&self) -> bool;

    /// It acts for a seat from now on, and goes on from what is kept. `changed` is notified when there is
    /// something to be written.
    fn sit(
        &self,
        seat: Seat,
        sitting: u64,
        kept: Entries,
        changed: Arc<Notify>,
    ) -> Arc<dyn SharedState>;

    /// No more.
    fn rise(&self, sitting: u64);

    /// Hands it events of one sitting. It gives them back if it has no room for them.
    fn offer(&self, batch: Batch) -> Result<(), Batch>;
}

/// What a worker keeps for a seat.
pub trait SharedState: Send + Sync {
    /// What has changed since this was called last, if anything; with `all`, everything that there is. Calls to
    /// [`SharedState::written`] come between.
    fn take(&self, all: bool) -> Option<Changes>;

    /// These are safe, or not: then they come with the next ones again.
    fn written(&self, changes: Changes, safe: bool);
}

/// What has changed, and by which events.
#[derive(Debug, Default)]
pub struct Changes {
    /// All that was before is void.
    pub replaces: bool,
    /// None: is removed.
    pub entries: BTreeMap<Key, Option<Value>>,
    pub receipts: Vec<Arc<dyn Receipt>>,
    /// For the worker.
    pub version: u64,
}
