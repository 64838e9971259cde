//! From the edge to the apps: ring, batches, routing, accounting.
//!
//! Takes events in through [`Tap`]s, hands batches to [`Outlet`]s. Does not know what an outlet is
//! (an app, a mapping): it never calls back into where events come from.
//!
//! One at a time routes: whoever brings a few events does it at once, since waking another thread
//! costs more than that; large chunks, and what has to wait, are left to the pipeline's own thread.
//!
//! While an outlet's queue is full but moving, nothing is routed and the ring fills; when the ring
//! is full, producers wait, and the edge stops reading from its clients. So an outlet that works,
//! however slowly, loses nothing; one that is stuck drops (and counts) what finds no room, and
//! costs the others nothing.

mod batcher;
mod latency;
mod outlet;
mod ring;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::event::{Batch, Event, Topic};
use batcher::Batcher;
use ring::Ring;

pub use latency::Latency;
pub use outlet::{Offer, Outlet, Progress, Route, RouteTable, Routes, Sink};

/// How many apps an event may come through, one after the other. What goes beyond is most likely
/// two apps that feed each other.
const MAX_HOPS: u8 = 8;

/// Events that apps may add to a ring that producers have filled: they can't wait, since the
/// pipeline may be waiting for them.
const FEEDBACK_EVENTS: usize = 8192;

/// Topics whose outlets are remembered.
const CACHED_TOPICS: usize = 4096;

/// Most events that are routed before outlets are looked after again.
const ROUTED_AT_ONCE: usize = 1024;

/// A chunk of up to so many events is routed by who brings it.
const ROUTED_INLINE: usize = 64;

/// How often an outlet that had no room is asked again, besides when it says that it has.
const ASK_AGAIN: Duration = Duration::from_millis(1);

/// How the pipeline is set up.
#[derive(Clone, Copy, Debug)]
pub struct PipelineConfig {
    /// Events that wait between the edge and the routing thread.
    pub queue_events: usize,
    pub max_batch_events: usize,
    pub max_batch_delay: Duration,
}

/// See [`PipelineStatus`].
#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    filtered: AtomicU64,
    copies: AtomicU64,
    handed_over: AtomicU64,
    looped: AtomicU64,
    overflowed: AtomicU64,
    batches: AtomicU64,
}

/// What the pipeline has done since the start. It adds up:
/// `accepted + copies = filtered + handed_over + looped + overflowed + queued`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PipelineStatus {
    /// Events between edge and outlets, now.
    pub queued: u64,
    /// Events taken in, from clients and from apps.
    pub accepted: u64,
    /// Events that no outlet wants.
    pub filtered: u64,
    /// Further copies of events that more than one outlet wants.
    pub copies: u64,
    /// Events, copies included, that outlets got; these count what became of them.
    pub handed_over: u64,
    /// Dropped because they came through too many apps.
    pub looped: u64,
    /// Outputs of apps, meant for apps, that were dropped because the pipeline was full.
    pub overflowed: u64,
    /// Batches that outlets got.
    pub batches: u64,
}

/// The running pipeline.
pub struct Pipeline {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    ring: Ring,
    routes: Arc<Routes>,
    counters: Counters,
    /// Held by whoever routes.
    router: Mutex<Router>,
    /// Something has come up since the router last looked: it must look again.
    look_again: AtomicBool,
    /// The pipeline's own thread has been told, or knows, that something waits in the router.
    attended: AtomicBool,
    /// Events held by the router, between ring and outlets.
    in_hand: AtomicU64,
    stopping: AtomicBool,
    /// When somebody last routed, in milliseconds after `started`.
    last_round_ms: AtomicU64,
    started: Instant,
}

impl Pipeline {
    /// Starts the pipeline's own thread.
    pub fn start(config: PipelineConfig, routes: Arc<Routes>) -> std::io::Result<Pipeline> {
        let shared = Arc::new(Shared {
            ring: Ring::new(config.queue_events),
            routes,
            counters: Counters::default(),
            router: Mutex::new(Router {
                config,
                generation: 0,
                lanes: Vec::new(),
                cache: FxHashMap::default(),
            }),
            look_again: AtomicBool::new(false),
            attended: AtomicBool::new(false),
            in_hand: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            last_round_ms: AtomicU64::new(0),
            started: Instant::now(),
        });
        let thread = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("pipeline".into())
                .spawn(move || shared.attend())?
        };
        shared.ring.set_consumer(thread.thread().clone());
        Ok(Pipeline {
            shared,
            thread: Some(thread),
        })
    }

    /// A way in, for one producer.
    pub fn tap(&self) -> Tap {
        Tap::new(self.shared.clone())
    }

    /// Offers an event to one outlet alone, whatever it has subscribed to. None: there is none of this name.
    pub fn offer_to(&self, name: &str, event: Event) -> Option<Offer> {
        let routes = self.shared.routes.load();
        let outlet = routes.outlets.iter().find(|one| one.name() == name)?;
        let offer = outlet.offer(vec![event]);
        if let Offer::Taken = offer {
            let counters = &self.shared.counters;
            for counter in [&counters.accepted, &counters.handed_over, &counters.batches] {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
        Some(offer)
    }

    /// To be called by outlets.
    pub fn progress(&self) -> Progress {
        let shared = self.shared.clone();
        Arc::new(move || {
            // The outlet has just said that it is idle or has room. Whoever routes now has counted
            // what it holds before it looked at the outlet, so that the count is seen here.
            fence(Ordering::SeqCst);
            if shared.in_hand.load(Ordering::SeqCst) > 0 {
                shared.route();
            }
        })
    }

    /// The counters, for people and scripts.
    pub fn status(&self) -> PipelineStatus {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.shared.counters;
        PipelineStatus {
            queued: self.queued(),
            accepted: get(&counters.accepted),
            filtered: get(&counters.filtered),
            copies: get(&counters.copies),
            handed_over: get(&counters.handed_over),
            looped: get(&counters.looped),
            overflowed: get(&counters.overflowed),
            batches: get(&counters.batches),
        }
    }

    /// Puts the counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        let status = self.status();
        metrics::gauge!("headgate_pipeline_queued_events").set(status.queued as f64);
        for (result, count) in [
            ("accepted", status.accepted),
            ("filtered", status.filtered),
            ("copied", status.copies),
            ("handed_over", status.handed_over),
            ("looped", status.looped),
            ("overflowed", status.overflowed),
        ] {
            metrics::counter!("headgate_pipeline_events_total", "result" => result).absolute(count);
        }
        metrics::counter!("headgate_pipeline_batches_total").absolute(status.batches);
    }

    /// Events that have come in and not reached an outlet.
    pub fn queued(&self) -> u64 {
        self.shared.ring.len() as u64 + self.shared.in_hand.load(Ordering::SeqCst)
    }

    /// Whether events that wait are still looked after.
    pub fn is_responsive(&self) -> bool {
        const PATIENCE_MS: u64 = 5_000;
        let now = self.shared.started.elapsed().as_millis() as u64;
        let last = self.shared.last_round_ms.load(Ordering::Relaxed);
        self.queued() == 0 || now.saturating_sub(last) < PATIENCE_MS
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.ring.wake();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// One producer's way into the pipeline. Collects events and hands them over in one go.
pub struct Tap {
    shared: Arc<Shared>,
    generation: u64,
    /// Whether any outlet wants a topic.
    wanted: FxHashMap<Topic, bool>,
    pending: Vec<Event>,
    filtered: u64,
}

impl Tap {
    fn new(shared: Arc<Shared>) -> Self {
        Tap {
            shared,
            generation: u64::MAX,
            wanted: FxHashMap::default(),
            pending: Vec::new(),
            filtered: 0,
        }
    }

    /// Collects an event that somebody wants; see [`Tap::wants`].
    pub fn add(&mut self, event: Event) {
        self.pending.push(event);
    }

    /// Whether any outlet wants an event on `topic`. If none does, the event is counted here.
    pub fn wants(&mut self, topic: &Topic) -> bool {
        let routes = self.shared.routes.load();
        if routes.generation != self.generation || self.wanted.len() >= CACHED_TOPICS {
            self.wanted.clear();
            self.generation = routes.generation;
        }
        let wanted = match self.wanted.get(topic) {
            Some(wanted) => *wanted,
            None => {
                let wanted = routes.is_wanted(topic.as_str());
                if topic.is_worth_caching() {
                    self.wanted.insert(topic.clone(), wanted);
                }
                wanted
            }
        };
        self.filtered += u64::from(!wanted);
        wanted
    }

    /// Hands over what was collected. False: there is no room; [`Tap::room`] says when to try
    /// again. Until then more can be added, but had better not be.
    pub fn flush(&mut self) -> bool {
        self.count_filtered();
        if self.pending.is_empty() {
            return true;
        }
        let chunk = std::mem::take(&mut self.pending);
        let count = chunk.len();
        match self.shared.ring.push(chunk, 0) {
            Ok(()) => {
                let accepted = &self.shared.counters.accepted;
                accepted.fetch_add(count as u64, Ordering::Relaxed);
                self.shared.route_chunk(count);
                true
            }
            Err(chunk) => {
                self.pending = chunk;
                false
            }
        }
    }

    /// Waits for room. May be dropped at any time.
    pub async fn room(&self) {
        self.shared.ring.room().await;
    }

    /// Hands over what an app made. Never waits: what finds no room is dropped and counted.
    pub fn flush_feedback(&mut self) {
        self.count_filtered();
        let counters = &self.shared.counters;
        let mut chunk = std::mem::take(&mut self.pending);
        let before = chunk.len();
        counters
            .accepted
            .fetch_add(before as u64, Ordering::Relaxed);
        chunk.retain(|event| event.hops <= MAX_HOPS);
        let looped = before - chunk.len();
        if looped > 0 {
            counters.looped.fetch_add(looped as u64, Ordering::Relaxed);
            tracing::warn!(
                events = looped,
                "dropped events that came through more than {MAX_HOPS} apps: do two apps feed each other?"
            );
        }
        if chunk.is_empty() {
            return;
        }
        let count = chunk.len();
        match self.shared.ring.push(chunk, FEEDBACK_EVENTS) {
            Ok(()) => self.shared.route_chunk(count),
            Err(_) => {
                counters
                    .overflowed
                    .fetch_add(count as u64, Ordering::Relaxed);
            }
        }
    }

    fn count_filtered(&mut self) {
        let filtered = std::mem::take(&mut self.filtered);
        if filtered > 0 {
            let counters = &self.shared.counters;
            counters.accepted.fetch_add(filtered, Ordering::Relaxed);
            counters.filtered.fetch_add(filtered, Ordering::Relaxed);
        }
    }
}

impl Shared {
    /// Routes what has come in, here or on the pipeline's thread. `count`: how much that is.
    fn route_chunk(&self, count: usize) {
        if count <= ROUTED_INLINE {
            self.route();
        } else {
            self.ring.wake();
        }
    }

    /// Routes what there is, unless somebody else does, who then looks again.
    fn route(&self) {
        self.look_again.store(true, Ordering::SeqCst);
        while self.look_again.load(Ordering::SeqCst) {
            let Some(mut router) = self.router.try_lock() else {
                return;
            };
            self.look_again.store(false, Ordering::SeqCst);
            let left = router.round(self);
            drop(router);
            match left {
                Left::Nothing => {}
                Left::ToRoute => return self.ring.wake(),
                Left::Waiting => {
                    if !self.attended.swap(true, Ordering::SeqCst) {
                        self.ring.wake();
                    }
                }
            }
        }
    }

    /// The pipeline's own thread: routes large chunks, and hands over batches when they are due.
    fn attend(&self) {
        while !self.stopping.load(Ordering::SeqCst) {
            // Whoever finds something waiting from here on wakes this thread once more, so that
            // nothing is missed between the look and the park.
            self.attended.store(false, Ordering::SeqCst);
            let (left, due) = {
                let mut router = self.router.lock();
                self.look_again.store(false, Ordering::SeqCst);
                (router.round(self), router.next_due())
            };
            if let Left::ToRoute = left {
                continue;
            }
            if self.look_again.load(Ordering::SeqCst) {
                continue;
            }
            match due {
                None => std::thread::park(),
                Some(due) => {
                    self.attended.store(true, Ordering::SeqCst);
                    std::thread::park_timeout(due.saturating_duration_since(Instant::now()));
                }
            }
        }
    }
}

/// What is left after a round.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    /// Chunks in the ring, which can be routed at once.
    ToRoute,
    /// Batches that are not due yet, or whose outlet has no room.
    Waiting,
}

/// Distributes events over the outlets.
struct Router {
    config: PipelineConfig,
    generation: u64,
    lanes: Vec<Lane>,
    cache: FxHashMap<Topic, Box<[u32]>>,
}

/// One outlet with what is collected for it.
struct Lane {
    outlet: Arc<dyn Outlet>,
    batcher: Batcher,
    /// Batches for which the outlet had no room, oldest first. While there are any, no further
    /// chunk is routed, so that these are at most what one chunk makes.
    refused: VecDeque<Batch>,
}

impl Router {
    /// Routes a bounded number of events and hands over what is due.
    fn round(&mut self, shared: &Shared) -> Left {
        let now = shared.started.elapsed().as_millis() as u64;
        shared.last_round_ms.store(now, Ordering::Relaxed);
        self.follow_routes(shared);
        self.route(shared);
        self.hand_over(shared);
        if !self.is_blocked() && shared.ring.has_chunks() {
            Left::ToRoute
        } else if self.lanes.iter().any(Lane::holds_something) {
            Left::Waiting
        } else {
            Left::Nothing
        }
    }

    /// When the next batch is due, or a refused one is to be offered again.
    fn next_due(&self) -> Option<Instant> {
        let due = self
            .lanes
            .iter()
            .filter_map(|lane| match lane.refused.is_empty() {
                false => Some(Instant::now() + ASK_AGAIN),
                true => lane.batcher.deadline(),
            });
        due.min()
    }

    /// Takes over a new route table, handing out first what was collected under the old one.
    fn follow_routes(&mut self, shared: &Shared) {
        let routes = shared.routes.load_full();
        if routes.generation == self.generation {
            return;
        }
        let mut old = std::mem::take(&mut self.lanes);
        self.lanes = routes
            .outlets
            .iter()
            .map(|outlet| {
                let known = old
                    .iter()
                    .position(|lane| Arc::ptr_eq(&lane.outlet, outlet));
                match known {
                    Some(at) => old.swap_remove(at),
                    None => Lane {
                        outlet: outlet.clone(),
                        batcher: Batcher::new(
                            self.config.max_batch_events,
                            self.config.max_batch_delay,
                        ),
                        refused: VecDeque::new(),
                    },
                }
            })
            .collect();
        for mut lane in old {
            // An outlet without routes is stopped or about to be: it counts what it can't take.
            lane.refused.push_back(lane.batcher.take());
            for batch in lane.refused.drain(..).filter(|batch| !batch.is_empty()) {
                shared.hand_over(&*lane.outlet, batch, true);
            }
        }
        self.cache.clear();
        self.generation = routes.generation;
    }

    /// Distributes events over the lanes.
    fn route(&mut self, shared: &Shared) {
        let mut routed = 0;
        let routes = shared.routes.load();
        if routes.generation != self.generation {
            // Replaced this very moment: the next round follows.
            shared.look_again.store(true, Ordering::SeqCst);
            return;
        }
        let mut found = Vec::new();
        while routed < ROUTED_AT_ONCE && !self.is_blocked() {
            let Some(chunk) = shared.ring.pop() else {
                break;
            };
            let now = Instant::now();
            routed += chunk.len();
            let mut copies = 0;
            let mut filtered = 0;
            for event in chunk {
                if self.cache.len() >= CACHED_TOPICS {
                    self.cache.clear();
                }
                let outlets = match self.cache.get(&event.topic) {
                    Some(outlets) => &**outlets,
                    None => {
                        routes.outlets_for(event.topic.as_str(), &mut found);
                        if event.topic.is_worth_caching() {
                            let outlets = found.as_slice().into();
                            self.cache.insert(event.topic.clone(), outlets);
                        }
                        &found
                    }
                };
                let Some((last, others)) = outlets.split_last() else {
                    filtered += 1;
                    continue;
                };
                copies += others.len() as u64;
                shared
                    .in_hand
                    .fetch_add(outlets.len() as u64, Ordering::Relaxed);
                for index in others {
                    self.lanes[*index as usize].push(event.clone(), now, shared);
                }
                self.lanes[*last as usize].push(event, now, shared);
            }
            let counters = &shared.counters;
            counters.copies.fetch_add(copies, Ordering::Relaxed);
            counters.filtered.fetch_add(filtered, Ordering::Relaxed);
        }
    }

    fn hand_over(&mut self, shared: &Shared) {
        if self.lanes.iter().all(|lane| !lane.holds_something()) {
            return;
        }
        // Before outlets are looked at: see `Pipeline::progress`.
        fence(Ordering::SeqCst);
        let now = Instant::now();
        for lane in &mut self.lanes {
            let due = lane.batcher.is_due(now, lane.outlet.is_idle());
            if due || !lane.refused.is_empty() {
                lane.hand_over(shared);
            }
        }
    }

    fn is_blocked(&self) -> bool {
        self.lanes.iter().any(|lane| !lane.refused.is_empty())
    }
}

impl Lane {
    fn holds_something(&self) -> bool {
        !self.refused.is_empty() || !self.batcher.is_empty()
    }

    /// Collects an event, and hands the batch over when it is full.
    fn push(&mut self, event: Event, now: Instant, shared: &Shared) {
        self.batcher.push(event, now);
        if self.batcher.is_full() {
            let batch = self.batcher.take();
            let refused = match self.refused.is_empty() {
                true => shared.hand_over(&*self.outlet, batch, false),
                false => Some(batch),
            };
            self.refused.extend(refused);
        }
    }

    fn hand_over(&mut self, shared: &Shared) {
        while let Some(batch) = self.refused.pop_front() {
            if let Some(batch) = shared.hand_over(&*self.outlet, batch, false) {
                self.refused.push_front(batch);
                return;
            }
        }
        if !self.batcher.is_empty() {
            let batch = self.batcher.take();
            self.refused
                .extend(shared.hand_over(&*self.outlet, batch, false));
        }
    }
}

impl Shared {
    /// Offers a batch; gives it back if the outlet has no room for it, unless it is `last`.
    fn hand_over(&self, outlet: &dyn Outlet, batch: Batch, last: bool) -> Option<Batch> {
        let offered = batch.len() as u64;
        let refused = match outlet.offer(batch) {
            Offer::Full(batch) => Some(batch),
            Offer::Taken => None,
        };
        // An outlet may have dealt with a part of what it had no room for.
        let left = refused.as_ref().map_or(0, |batch| batch.len() as u64);
        let mut settled = offered - left;
        let counters = &self.counters;
        counters.handed_over.fetch_add(settled, Ordering::Relaxed);
        if refused.is_none() {
            counters.batches.fetch_add(1, Ordering::Relaxed);
        } else if last {
            counters.overflowed.fetch_add(left, Ordering::Relaxed);
            settled = offered;
        }
        self.in_hand.fetch_sub(settled, Ordering::SeqCst);
        refused.filter(|_| !last)
    }
}
