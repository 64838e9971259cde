//! From the edge to the apps: ring, batches, routing, accounting.
//!
//! Takes events in through [`Tap`]s, hands batches to [`Outlet`]s. Does not know what an outlet is
//! (an app, a mapping): it never calls back into where events come from.
//!
//! One thread routes. While an outlet's queue is full but moving, the thread waits for it and the
//! ring fills; when the ring is full, producers wait, and the edge stops reading from its clients.
//! So an outlet that works, however slowly, loses nothing; one that is stuck drops (and counts)
//! what finds no room, and costs the others nothing.

mod batcher;
mod latency;
mod outlet;
mod ring;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
    /// Events held by the routing thread, between ring and outlets.
    in_hand: AtomicU64,
    stopping: AtomicBool,
    /// When the routing thread last came round, in milliseconds after `started`.
    last_round_ms: AtomicU64,
    started: Instant,
}

impl Pipeline {
    /// Starts the routing thread.
    pub fn start(config: PipelineConfig, routes: Arc<Routes>) -> std::io::Result<Pipeline> {
        let shared = Arc::new(Shared {
            ring: Ring::new(config.queue_events),
            routes,
            counters: Counters::default(),
            in_hand: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            last_round_ms: AtomicU64::new(0),
            started: Instant::now(),
        });
        let router = Router {
            shared: shared.clone(),
            config,
            generation: 0,
            lanes: Vec::new(),
            cache: FxHashMap::default(),
        };
        let thread = std::thread::Builder::new()
            .name("pipeline".into())
            .spawn(move || router.run())?;
        Ok(Pipeline {
            shared,
            thread: Some(thread),
        })
    }

    /// A way in, for one producer.
    pub fn tap(&self) -> Tap {
        Tap::new(self.shared.clone())
    }

    /// To be called by outlets.
    pub fn progress(&self) -> Progress {
        let shared = self.shared.clone();
        Arc::new(move || {
            // The outlet has just said that it is idle. If the routing thread has not seen that, it
            // has counted what it holds before it looked, and the count is seen here. (Were it not,
            // the batch's delay would still end.)
            fence(Ordering::SeqCst);
            if shared.in_hand.load(Ordering::SeqCst) > 0 {
                shared.ring.wake();
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

    /// Whether the routing thread still comes round when there is work for it.
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

    /// Collects an event. One that no outlet wants is counted and goes no further.
    pub fn add(&mut self, topic: &Topic, event: impl FnOnce() -> Event) {
        let routes = self.shared.routes.load();
        if routes.generation != self.generation || self.wanted.len() >= CACHED_TOPICS {
            self.wanted.clear();
            self.generation = routes.generation;
        }
        let wanted = match self.wanted.get(topic) {
            Some(wanted) => *wanted,
            None => {
                let wanted = routes.is_wanted(topic.as_str());
                self.wanted.insert(topic.clone(), wanted);
                wanted
            }
        };
        if wanted {
            self.pending.push(event());
        } else {
            self.filtered += 1;
        }
    }

    /// Hands over what was collected. False: there is no room; [`Tap::room`] says when to try
    /// again. Until then more can be added, but had better not be.
    pub fn flush(&mut self) -> bool {
        self.count_filtered();
        if self.pending.is_empty() {
            return true;
        }
        let chunk = std::mem::take(&mut self.pending);
        let count = chunk.len() as u64;
        match self.shared.ring.push(chunk, 0) {
            Ok(()) => {
                self.shared
                    .counters
                    .accepted
                    .fetch_add(count, Ordering::Relaxed);
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
        if let Err(chunk) = self.shared.ring.push(chunk, FEEDBACK_EVENTS) {
            counters
                .overflowed
                .fetch_add(chunk.len() as u64, Ordering::Relaxed);
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

/// The routing thread.
struct Router {
    shared: Arc<Shared>,
    config: PipelineConfig,
    generation: u64,
    lanes: Vec<Lane>,
    cache: FxHashMap<Topic, Box<[u32]>>,
}

/// One outlet with what is collected for it.
struct Lane {
    outlet: Arc<dyn Outlet>,
    batcher: Batcher,
    /// A batch for which the outlet had no room. While there is one, nothing more is routed.
    refused: Option<Batch>,
}

impl Router {
    fn run(mut self) {
        self.shared.ring.set_consumer();
        loop {
            let round = self.shared.started.elapsed().as_millis() as u64;
            self.shared.last_round_ms.store(round, Ordering::Relaxed);
            self.follow_routes();
            let routed = self.route();
            self.hand_over();
            let blocked = self.is_blocked();
            if routed && !blocked {
                continue;
            }
            if self.shared.stopping.load(Ordering::SeqCst) {
                return;
            }
            // Sleep until a chunk comes, an outlet makes progress, or a batch is due. What an
            // outlet does between the look and the park leaves a token that ends the park at once.
            self.shared.ring.announce_sleep();
            if !blocked && self.shared.ring.has_chunks() {
                self.shared.ring.stay_awake();
                continue;
            }
            let due = self.lanes.iter().filter_map(|lane| match lane.refused {
                Some(_) => Some(Duration::from_millis(1)),
                None => {
                    let deadline = lane.batcher.deadline()?;
                    Some(deadline.saturating_duration_since(Instant::now()))
                }
            });
            match due.min() {
                Some(wait) => std::thread::park_timeout(wait),
                None => std::thread::park(),
            }
            self.shared.ring.stay_awake();
        }
    }

    /// Takes over a new route table, handing out first what was collected under the old one.
    fn follow_routes(&mut self) {
        let routes = self.shared.routes.load_full();
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
                        refused: None,
                    },
                }
            })
            .collect();
        for mut lane in old {
            // An outlet without routes is stopped or about to be: it counts what it can't take.
            for batch in [lane.refused.take(), Some(lane.batcher.take())] {
                if let Some(batch) = batch.filter(|batch| !batch.is_empty()) {
                    self.shared.hand_over(&*lane.outlet, batch, true);
                }
            }
        }
        self.cache.clear();
        self.generation = routes.generation;
    }

    /// Distributes events over the lanes. Whether there were any.
    fn route(&mut self) -> bool {
        let mut routed = 0;
        let routes = self.shared.routes.load_full();
        if routes.generation != self.generation {
            return true;
        }
        let mut found = Vec::new();
        while routed < ROUTED_AT_ONCE && !self.is_blocked() {
            let Some(chunk) = self.shared.ring.pop() else {
                break;
            };
            let now = Instant::now();
            routed += chunk.len();
            let mut copies = 0;
            let mut filtered = 0;
            let mut in_hand = 0;
            for event in chunk {
                if self.cache.len() >= CACHED_TOPICS {
                    self.cache.clear();
                }
                let outlets = match self.cache.get(&event.topic) {
                    Some(outlets) => outlets,
                    None => {
                        routes.outlets_for(event.topic.as_str(), &mut found);
                        self.cache
                            .entry(event.topic.clone())
                            .or_insert(found.as_slice().into())
                    }
                };
                let Some((last, others)) = outlets.split_last() else {
                    filtered += 1;
                    continue;
                };
                copies += others.len() as u64;
                in_hand += outlets.len() as u64;
                for index in others {
                    self.lanes[*index as usize].push(event.clone(), now);
                }
                self.lanes[*last as usize].push(event, now);
            }
            let counters = &self.shared.counters;
            counters.copies.fetch_add(copies, Ordering::Relaxed);
            counters.filtered.fetch_add(filtered, Ordering::Relaxed);
            self.shared.in_hand.fetch_add(in_hand, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            for lane in &mut self.lanes {
                if lane.batcher.is_full() {
                    lane.hand_over(&self.shared);
                }
            }
        }
        routed > 0
    }

    fn hand_over(&mut self) {
        let now = Instant::now();
        for lane in &mut self.lanes {
            let due = lane.batcher.is_due(now, lane.outlet.is_idle());
            if due || lane.refused.is_some() {
                lane.hand_over(&self.shared);
            }
        }
    }

    fn is_blocked(&self) -> bool {
        self.lanes.iter().any(|lane| lane.refused.is_some())
    }
}

impl Lane {
    fn push(&mut self, event: Event, now: Instant) {
        self.batcher.push(event, now);
    }

    fn hand_over(&mut self, shared: &Shared) {
        if let Some(batch) = self.refused.take() {
            self.refused = shared.hand_over(&*self.outlet, batch, false);
            if self.refused.is_some() {
                return;
            }
        }
        if !self.batcher.is_empty() {
            self.refused = shared.hand_over(&*self.outlet, self.batcher.take(), false);
        }
    }
}

impl Shared {
    /// Offers a batch; gives it back if the outlet has no room for it, unless it is `last`.
    fn hand_over(&self, outlet: &dyn Outlet, batch: Batch, last: bool) -> Option<Batch> {
        let count = batch.len() as u64;
        match outlet.offer(batch) {
            Offer::Full(batch) if !last => return Some(batch),
            Offer::Full(_) => {
                self.counters.overflowed.fetch_add(count, Ordering::Relaxed);
            }
            Offer::Taken => {
                self.counters
                    .handed_over
                    .fetch_add(count, Ordering::Relaxed);
                self.counters.batches.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.in_hand.fetch_sub(count, Ordering::SeqCst);
        None
    }
}
