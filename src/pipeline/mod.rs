//! From the edge to the apps: ring, batches, routing, accounting.
//!
//! Takes events in through [`Tap`]s, hands batches to [`Outlet`]s. Does not know what an outlet is
//! (an app, a mapping): it never calls back into where events come from.
//!
//! One at a time routes: whoever brings a few events does it at once, since waking another thread
//! costs more than that; large chunks, and what has to wait, are left to the pipeline's own thread.
//!
//! Each event takes one of three lanes, as the rules say ([`Rules`]; `docs/lanes.md`):
//!
//! - transactional: while an outlet's queue is full but moving, nothing is routed and the ring fills;
//!   when the ring is full, producers wait, and the edge stops reading from its clients. So an outlet
//!   that works, however slowly, loses nothing; one that is stuck drops (and counts) what finds no
//!   room, and costs the others nothing.
//! - realtime: comes first and never waits. Where there is no room, the oldest is dropped.
//! - batch: comes last, in windows by topic. Where there is no room, the newest is dropped.
//!
//! While the realtime lane can't keep up, the others stand back: see [`Controller`].

mod batcher;
mod dedup;
mod latency;
mod outlet;
mod pressure;
mod queue;
mod ring;
mod rules;
#[cfg(test)]
mod tests;
mod traces;
mod windows;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::dead_letters::{DeadLetter, DeadLetters, Reason};
use crate::event::{Batch, Event, Lane, Topic};
use batcher::Batcher;
use pressure::{CYCLE, Controller};
use ring::payload_bytes;
use traces::Notes;
use windows::Windows;

pub use dedup::{Claim, Claims, DedupKey, DedupWindow};
pub use latency::Latency;
pub use outlet::{NotJournaled, Offer, Outlet, Progress, Route, RouteTable, Routes, Sink};
pub use pressure::{Load, Pressure, Thresholds};
pub(crate) use queue::{Queue, Queued, event_bytes};
pub use ring::Ring;
pub use rules::{Dedup, Rule, Rules};
pub use traces::{Step, Traced, Traces};
pub use windows::WindowLimits;

/// How many apps an event may come through, one after the other. What goes beyond is most likely
/// two apps that feed each other.
pub(crate) const MAX_HOPS: u8 = 8;

/// Events that apps may add to a ring that producers have filled: they can't wait, since the
/// pipeline may be waiting for them.
const FEEDBACK_EVENTS: usize = 8192;

/// Topics whose outlets are remembered.
const CACHED_TOPICS: usize = 4096;

/// Most events that are routed before outlets are looked after again.
const ROUTED_AT_ONCE: usize = 1024;

/// A chunk of up to so many events is routed by who brings it.
const ROUTED_INLINE: usize = 64;

/// Payload bytes in windows that are open, and in those that have closed, at most.
const MAX_WINDOW_BYTES: usize = 64 << 20;

/// While anything waits, there is a round that often, whenever it is due: see [`Pipeline::is_responsive`].
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// How often an outlet that had no room is asked again, besides when it says that it has.
const ASK_AGAIN: Duration = Duration::from_millis(1);

/// How the pipeline is set up.
#[derive(Clone, Copy, Debug)]
pub struct PipelineConfig {
    /// Transactional events that wait between the edge and the outlets.
    pub queue_events: usize,
    /// The same for realtime events.
    pub realtime_queue_events: usize,
    /// The same for events of the batch lane, and as many again in windows.
    pub batch_queue_events: usize,
    pub max_batch_events: usize,
    pub max_batch_delay: Duration,
    pub thresholds: Thresholds,
    /// How long a key counts, and how many do.
    pub dedup_window: Duration,
    pub dedup_max_keys: usize,
}

impl Default for PipelineConfig {
    /// As in a configuration that says nothing.
    fn default() -> Self {
        PipelineConfig {
            queue_events: 65_536,
            realtime_queue_events: 16_384,
            batch_queue_events: 32_768,
            max_batch_events: 64,
            max_batch_delay: Duration::from_millis(1),
            thresholds: Thresholds {
                events: 5_000,
                latency: Duration::from_millis(100),
                dropped_percent: 2,
            },
            dedup_window: Duration::from_secs(3_600),
            dedup_max_keys: 1_000_000,
        }
    }
}

/// See [`LaneStatus`].
#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    filtered: AtomicU64,
    deduplicated: AtomicU64,
    copies: AtomicU64,
    handed_over: AtomicU64,
    looped: AtomicU64,
    overflowed: AtomicU64,
    shed: AtomicU64,
    batches: AtomicU64,
}

/// What a lane has done since the start. It adds up:
/// `accepted + copies = filtered + deduplicated + handed_over + looped + overflowed + shed + queued`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LaneStatus {
    /// Events between edge and outlets, now.
    pub queued: u64,
    /// Events taken in, from clients and from apps.
    pub accepted: u64,
    /// Events that no outlet wants.
    pub filtered: u64,
    /// Events that had come before.
    pub deduplicated: u64,
    /// Further copies of events that more than one outlet wants.
    pub copies: u64,
    /// Events, copies included, that outlets got; these count what became of them.
    pub handed_over: u64,
    /// Dropped because they came through too many apps.
    pub looped: u64,
    /// Dropped because the lane was full: the oldest of the realtime lane, the newest of the batch lane,
    /// and outputs of apps, meant for apps, of the transactional one.
    pub overflowed: u64,
    /// Dropped because the realtime lane could not keep up.
    pub shed: u64,
    /// Batches that outlets got.
    pub batches: u64,
}

impl std::ops::AddAssign for LaneStatus {
    fn add_assign(&mut self, other: LaneStatus) {
        self.queued += other.queued;
        self.accepted += other.accepted;
        self.filtered += other.filtered;
        self.deduplicated += other.deduplicated;
        self.copies += other.copies;
        self.handed_over += other.handed_over;
        self.looped += other.looped;
        self.overflowed += other.overflowed;
        self.shed += other.shed;
        self.batches += other.batches;
    }
}

/// What the pipeline has done since the start: all lanes together, and each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PipelineStatus {
    #[serde(flatten)]
    pub all: LaneStatus,
    pub pressure: Pressure,
    pub lanes: Lanes,
    /// Keys by which duplicates are told.
    pub dedup_keys: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Lanes {
    pub realtime: LaneStatus,
    pub transactional: LaneStatus,
    pub batch: LaneStatus,
}

/// One of something for each lane.
#[derive(Debug, Default)]
struct PerLane<T>([T; 3]);

impl<T> std::ops::Index<Lane> for PerLane<T> {
    type Output = T;

    fn index(&self, lane: Lane) -> &T {
        &self.0[lane as usize]
    }
}

impl<T> std::ops::IndexMut<Lane> for PerLane<T> {
    fn index_mut(&mut self, lane: Lane) -> &mut T {
        &mut self.0[lane as usize]
    }
}

/// The running pipeline.
pub struct Pipeline {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    rings: PerLane<Ring>,
    routes: Arc<Routes>,
    counters: PerLane<Counters>,
    dedup: Arc<DedupWindow>,
    dead_letters: Arc<DeadLetters>,
    /// Held by whoever routes.
    router: Mutex<Router>,
    /// Something has come up since the router last looked: it must look again.
    look_again: AtomicBool,
    /// The pipeline's own thread has been told, or knows, that something waits in the router.
    attended: AtomicBool,
    /// Events held by the router, between ring and outlets.
    in_hand: PerLane<AtomicU64>,
    /// A [`Pressure`].
    pressure: AtomicU8,
    stopping: AtomicBool,
    /// Nothing stands back any more: what there is is to be handled.
    draining: AtomicBool,
    /// When somebody last routed, in milliseconds after `started`.
    last_round_ms: AtomicU64,
    started: Instant,
}

impl Pipeline {
    /// Starts the pipeline's own thread.
    pub fn start(
        config: PipelineConfig,
        routes: Arc<Routes>,
        dead_letters: Arc<DeadLetters>,
    ) -> std::io::Result<Pipeline> {
        let started = Instant::now();
        let ring = |lane| {
            Ring::new(match lane {
                Lane::Realtime => config.realtime_queue_events,
                Lane::Transactional => config.queue_events,
                Lane::Batch => config.batch_queue_events,
            })
        };
        let shared = Arc::new(Shared {
            rings: PerLane(Lane::ALL.map(ring)),
            routes,
            counters: PerLane::default(),
            dedup: Arc::new(DedupWindow::new(
                config.dedup_window,
                config.dedup_max_keys,
                started,
            )),
            dead_letters,
            router: Mutex::new(Router {
                config,
                generation: 0,
                gates: Vec::new(),
                windows: Windows::default(),
                controller: Controller::new(config.thresholds),
                next_cycle: None,
                overflowed: 0,
                cache: FxHashMap::default(),
            }),
            look_again: AtomicBool::new(false),
            attended: AtomicBool::new(false),
            in_hand: PerLane::default(),
            pressure: AtomicU8::new(Pressure::Healthy as u8),
            stopping: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            last_round_ms: AtomicU64::new(0),
            started,
        });
        let thread = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("pipeline".into())
                .spawn(move || shared.attend())?
        };
        for ring in &shared.rings.0 {
            ring.set_consumer(thread.thread().clone());
        }
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
        let counters = &self.shared.counters[event.lane];
        let offer = outlet.offer(vec![event]);
        if let Offer::Taken = offer {
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
            let in_hand = |count: &AtomicU64| count.load(Ordering::SeqCst) > 0;
            if shared.in_hand.0.iter().any(in_hand) {
                shared.route();
            }
        })
    }

    /// The counters, for people and scripts.
    pub fn status(&self) -> PipelineStatus {
        let lanes = Lanes {
            realtime: self.lane_status(Lane::Realtime),
            transactional: self.lane_status(Lane::Transactional),
            batch: self.lane_status(Lane::Batch),
        };
        let mut all = LaneStatus::default();
        for lane in [lanes.realtime, lanes.transactional, lanes.batch] {
            all += lane;
        }
        PipelineStatus {
            all,
            pressure: self.shared.pressure(),
            lanes,
            dedup_keys: self.shared.dedup.known(),
        }
    }

    fn lane_status(&self, lane: Lane) -> LaneStatus {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.shared.counters[lane];
        LaneStatus {
            queued: self.shared.queued(lane),
            accepted: get(&counters.accepted),
            filtered: get(&counters.filtered),
            deduplicated: get(&counters.deduplicated),
            copies: get(&counters.copies),
            handed_over: get(&counters.handed_over),
            looped: get(&counters.looped),
            overflowed: get(&counters.overflowed),
            shed: get(&counters.shed),
            batches: get(&counters.batches),
        }
    }

    /// Puts the counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        for lane in Lane::ALL {
            let status = self.lane_status(lane);
            let lane = lane.as_str();
            metrics::gauge!("headgate_pipeline_queued_events", "lane" => lane)
                .set(status.queued as f64);
            for (result, count) in [
                ("accepted", status.accepted),
                ("filtered", status.filtered),
                ("deduplicated", status.deduplicated),
                ("copied", status.copies),
                ("handed_over", status.handed_over),
                ("looped", status.looped),
                ("overflowed", status.overflowed),
                ("shed", status.shed),
            ] {
                metrics::counter!(
                    "headgate_pipeline_events_total", "lane" => lane, "result" => result
                )
                .absolute(count);
            }
            metrics::counter!("headgate_pipeline_batches_total", "lane" => lane)
                .absolute(status.batches);
        }
        let pressure = self.shared.pressure();
        for state in Pressure::ALL {
            metrics::gauge!("headgate_pressure", "state" => state.as_str())
                .set(f64::from(u8::from(state == pressure)));
        }
        metrics::gauge!("headgate_dedup_keys").set(self.shared.dedup.known() as f64);
    }

    /// Events that have come in and not reached an outlet.
    pub fn queued(&self) -> u64 {
        Lane::ALL.map(|lane| self.shared.queued(lane)).iter().sum()
    }

    pub fn pressure(&self) -> Pressure {
        self.shared.pressure()
    }

    /// By which keys duplicates are told.
    pub fn dedup(&self) -> &Arc<DedupWindow> {
        &self.shared.dedup
    }

    /// Events on their way to outlets, but for those in windows that are open.
    pub fn moving(&self) -> u64 {
        let in_windows = self.shared.router.lock().windows.len() as u64;
        self.queued().saturating_sub(in_windows)
    }

    /// From now on no lane stands back and no window waits: the gateway ends.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
        self.shared.look_again.store(true, Ordering::SeqCst);
        self.shared.wake();
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
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// What the rules and the routes say of a topic.
#[derive(Clone, Copy, Debug)]
pub struct Treatment {
    /// Whether any outlet wants it.
    pub wanted: bool,
    pub lane: Lane,
    /// Whether it is to be on disk before it is acknowledged.
    pub durable: bool,
    /// Whether [`Tap::dedup_key`] has one.
    pub dedup: bool,
    pub retries: Option<u8>,
    /// The number of its rule.
    rule: Option<usize>,
}

impl Treatment {
    /// Of an event whose producer asks for a lane: a rule can raise it, and never lowers it.
    pub fn asked_for(self, asked: Lane) -> Treatment {
        let lane = match self.rule {
            // The first one is the highest.
            Some(_) if (self.lane as usize) < asked as usize => self.lane,
            _ => asked,
        };
        Treatment { lane, ..self }
    }
}

/// One producer's way into the pipeline. Collects events and hands them over in one go.
pub struct Tap {
    shared: Arc<Shared>,
    generation: u64,
    rules: Arc<Rules>,
    known: FxHashMap<Topic, Treatment>,
    pending: PerLane<Vec<Event>>,
    filtered: PerLane<u64>,
    deduplicated: PerLane<u64>,
    notes: Notes,
}

impl Tap {
    fn new(shared: Arc<Shared>) -> Self {
        Tap {
            shared,
            generation: u64::MAX,
            rules: Arc::default(),
            known: FxHashMap::default(),
            pending: PerLane::default(),
            filtered: PerLane::default(),
            deduplicated: PerLane::default(),
            notes: Notes::default(),
        }
    }

    /// How events on `topic` are treated.
    pub fn treatment(&mut self, topic: &Topic) -> Treatment {
        let routes = self.shared.routes.load();
        if routes.generation != self.generation || self.known.len() >= CACHED_TOPICS {
            self.known.clear();
            self.generation = routes.generation;
            self.rules = routes.rules.clone();
        }
        if let Some(treatment) = self.known.get(topic) {
            return *treatment;
        }
        let found = routes.rules.find(topic.as_str());
        let treatment = Treatment {
            wanted: routes.is_wanted(topic.as_str()),
            lane: found.lane,
            durable: found.durable,
            dedup: found.rule.is_some_and(|rule| rule.dedup.is_some()),
            retries: found.rule.and_then(|rule| rule.retries),
            rule: found.number,
        };
        if topic.is_worth_caching() {
            self.known.insert(topic.clone(), treatment);
        }
        treatment
    }

    /// The key that tells an event on `topic` from others, if its rule wants that. `of_id` makes that of
    /// its id, which for MQTT is the user property of the name that it gets. `treatment` is what was said
    /// of the topic last.
    pub fn dedup_key(
        &self,
        treatment: Treatment,
        topic: &Topic,
        payload: &[u8],
        of_id: impl FnOnce(&str) -> Option<DedupKey>,
    ) -> Option<DedupKey> {
        let of_id = match self.rules.dedup(treatment.rule?)? {
            Dedup::Content => None,
            Dedup::Id(name) => of_id(name),
        };
        of_id.or_else(|| Some(DedupKey::of_content(topic, payload)))
    }

    /// Whether the realtime lane keeps up.
    pub fn pressure(&self) -> Pressure {
        self.shared.pressure()
    }

    /// By which keys duplicates are told.
    pub fn dedup(&self) -> &Arc<DedupWindow> {
        &self.shared.dedup
    }

    /// Counts an event that had come before.
    pub fn count_duplicate(&mut self, topic: &Topic, treatment: Treatment) {
        self.notes.push(topic, Step::Duplicate);
        self.deduplicated[treatment.lane] += 1;
    }

    /// Collects an event, if any outlet wants it. Else it is counted, and dropped.
    pub fn add(&mut self, event: Event, treatment: Treatment) {
        let lane = treatment.lane;
        if !treatment.wanted {
            return self.count_filtered(&event.topic, treatment);
        }
        self.notes.push(&event.topic, Step::Taken);
        self.pending[lane].push(Event {
            lane,
            retries: treatment.retries,
            ..event
        });
    }

    /// Counts an event that no outlet wants.
    pub fn count_filtered(&mut self, topic: &Topic, treatment: Treatment) {
        self.notes.push(topic, Step::Unwanted);
        self.filtered[treatment.lane] += 1;
    }

    /// Hands over what was collected. False: there is no room; [`Tap::room`] says when to try
    /// again. Until then more can be added, but had better not be.
    pub fn flush(&mut self) -> bool {
        let mut routed = self.flush_unasked();
        let chunk = std::mem::take(&mut self.pending[Lane::Transactional]);
        let count = chunk.len();
        let taken = count == 0
            || match self.shared.rings[Lane::Transactional].push(chunk, 0) {
                Ok(()) => {
                    self.shared.count_accepted(Lane::Transactional, count);
                    routed += count;
                    true
                }
                Err(chunk) => {
                    self.pending[Lane::Transactional] = chunk;
                    false
                }
            };
        if routed > 0 {
            self.shared.route_chunk(routed);
        }
        taken
    }

    /// Waits for room. May be dropped at any time.
    pub async fn room(&self) {
        self.shared.rings[Lane::Transactional].room().await;
    }

    /// Hands over what an app made. Never waits: what finds no room is dropped and counted.
    pub fn flush_feedback(&mut self) {
        let mut looped = 0;
        for lane in Lane::ALL {
            let pending = &mut self.pending[lane];
            let gone: Vec<Event> = pending
                .extract_if(.., |event| event.hops > MAX_HOPS)
                .collect();
            if !gone.is_empty() {
                self.shared.count_accepted(lane, gone.len());
                let counter = &self.shared.counters[lane].looped;
                counter.fetch_add(gone.len() as u64, Ordering::Relaxed);
                looped += gone.len();
                self.notes.flush(&self.shared.routes.traces);
                self.shared.bury(Reason::Looped, lane, &gone);
            }
        }
        if looped > 0 {
            tracing::warn!(
                events = looped,
                "dropped events that came through more than {MAX_HOPS} apps: do two apps feed each other?"
            );
        }
        let mut routed = self.flush_unasked();
        let chunk = std::mem::take(&mut self.pending[Lane::Transactional]);
        if !chunk.is_empty() {
            self.shared.count_accepted(Lane::Transactional, chunk.len());
            let count = chunk.len();
            match self.shared.rings[Lane::Transactional].push(chunk, FEEDBACK_EVENTS) {
                Ok(()) => routed += count,
                Err(chunk) => self.shared.overflow(Lane::Transactional, &chunk),
            }
        }
        if routed > 0 {
            self.shared.route_chunk(routed);
        }
    }

    /// Hands over what never waits. Returns how many events there are to route.
    fn flush_unasked(&mut self) -> usize {
        let shared = &self.shared;
        self.notes.flush(&shared.routes.traces);
        for lane in Lane::ALL {
            let filtered = std::mem::take(&mut self.filtered[lane]);
            let deduplicated = std::mem::take(&mut self.deduplicated[lane]);
            if filtered + deduplicated > 0 {
                let counters = &shared.counters[lane];
                shared.count_accepted(lane, (filtered + deduplicated) as usize);
                counters.filtered.fetch_add(filtered, Ordering::Relaxed);
                counters
                    .deduplicated
                    .fetch_add(deduplicated, Ordering::Relaxed);
            }
        }
        let mut routed = 0;
        let chunk = std::mem::take(&mut self.pending[Lane::Realtime]);
        if !chunk.is_empty() {
            shared.count_accepted(Lane::Realtime, chunk.len());
            routed += chunk.len();
            for dropped in shared.rings[Lane::Realtime].push_over(chunk) {
                shared.overflow(Lane::Realtime, &dropped);
            }
        }
        let chunk = std::mem::take(&mut self.pending[Lane::Batch]);
        if !chunk.is_empty() {
            let count = chunk.len();
            shared.count_accepted(Lane::Batch, count);
            if shared.pressure() >= Pressure::Overload {
                let shed = &shared.counters[Lane::Batch].shed;
                shed.fetch_add(count as u64, Ordering::Relaxed);
                shared.bury(Reason::Shed, Lane::Batch, &chunk);
            } else {
                match shared.rings[Lane::Batch].push(chunk, 0) {
                    Ok(()) => routed += count,
                    Err(chunk) => shared.overflow(Lane::Batch, &chunk),
                }
            }
        }
        routed
    }
}

impl Shared {
    fn pressure(&self) -> Pressure {
        Pressure::of_index(self.pressure.load(Ordering::Relaxed))
    }

    fn queued(&self, lane: Lane) -> u64 {
        self.rings[lane].len() as u64 + self.in_hand[lane].load(Ordering::SeqCst)
    }

    fn count_accepted(&self, lane: Lane, count: usize) {
        let accepted = &self.counters[lane].accepted;
        accepted.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Counts and buries events for which a lane has no room.
    fn overflow(&self, lane: Lane, events: &[Event]) {
        let overflowed = &self.counters[lane].overflowed;
        overflowed.fetch_add(events.len() as u64, Ordering::Relaxed);
        self.bury(Reason::QueueFull, lane, events);
    }

    fn bury(&self, reason: Reason, lane: Lane, events: &[Event]) {
        let topics = events.iter().map(|event| &event.topic);
        let by = lane.as_str().into();
        self.routes
            .traces
            .note(topics, &Step::Dropped { by, reason });
        let now = Instant::now();
        for event in events {
            self.dead_letters.add(reason, now, || {
                DeadLetter::new(reason, lane.as_str(), &event.topic, &event.payload, 0)
            });
        }
    }

    /// Wakes the pipeline's own thread.
    fn wake(&self) {
        self.rings[Lane::Transactional].wake();
    }

    /// Routes what has come in, here or on the pipeline's thread. `count`: how much that is.
    fn route_chunk(&self, count: usize) {
        if count <= ROUTED_INLINE {
            self.route();
        } else {
            self.wake();
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
                Left::ToRoute => return self.wake(),
                Left::Waiting => {
                    if !self.attended.swap(true, Ordering::SeqCst) {
                        self.wake();
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
                    let pause = due.saturating_duration_since(Instant::now());
                    std::thread::park_timeout(pause.min(SIGN_OF_LIFE));
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
    gates: Vec<Gate>,
    /// Of the batch lane.
    windows: Windows,
    controller: Controller,
    /// When the controller looks next. None: there is nothing to look at.
    next_cycle: Option<Instant>,
    /// Realtime events for which the ring had no room, when the controller looked last.
    overflowed: u64,
    /// The outlets for a topic, as indices into `gates`.
    cache: FxHashMap<Topic, Box<[u32]>>,
}

/// One outlet with what is collected for it.
struct Gate {
    outlet: Arc<dyn Outlet>,
    /// Realtime events of this round.
    realtime: Batch,
    /// Transactional events.
    batcher: Batcher,
    /// Transactional batches for which the outlet had no room, oldest first. While there are any, no
    /// further transactional chunk is routed, so that these are at most what one chunk makes.
    refused: VecDeque<Batch>,
    /// Windows of the batch lane that have closed, oldest first, and the bytes of their payloads.
    windows: VecDeque<Batch>,
    window_bytes: usize,
}

impl Router {
    /// Routes a bounded number of events and hands over what is due.
    fn round(&mut self, shared: &Shared) -> Left {
        let now = shared.started.elapsed().as_millis() as u64;
        shared.last_round_ms.store(now, Ordering::Relaxed);
        self.follow_routes(shared);
        let routes = shared.routes.load();
        if routes.generation != self.generation {
            // Replaced this very moment: the next round follows.
            shared.look_again.store(true, Ordering::SeqCst);
        } else {
            self.route_realtime(shared, &routes);
            self.route_transactional(shared, &routes);
            self.route_batch(shared, &routes);
        }
        self.hand_over(shared);
        self.look_after_pressure(shared);
        let has = |lane| !shared.rings[lane].is_empty();
        if has(Lane::Realtime)
            || has(Lane::Transactional) && !self.is_blocked()
            || has(Lane::Batch) && self.takes_windows(shared)
        {
            Left::ToRoute
        } else if self.next_due().is_some() {
            Left::Waiting
        } else {
            Left::Nothing
        }
    }

    /// When the next batch is due, a refused one is to be offered again, or the controller looks.
    fn next_due(&self) -> Option<Instant> {
        let gates = self.gates.iter().filter_map(|gate| {
            match gate.refused.is_empty() && gate.windows.is_empty() {
                false => Some(Instant::now() + ASK_AGAIN),
                true => gate.batcher.deadline(),
            }
        });
        let others = [self.next_cycle, self.windows.next_due()];
        gates.chain(others.into_iter().flatten()).min()
    }

    /// Takes over a new route table, handing out first what was collected under the old one.
    fn follow_routes(&mut self, shared: &Shared) {
        let routes = shared.routes.load_full();
        if routes.generation == self.generation {
            return;
        }
        let mut old = std::mem::take(&mut self.gates);
        let pressure = shared.pressure();
        self.gates = routes
            .outlets
            .iter()
            .map(|outlet| {
                let known = old
                    .iter()
                    .position(|gate| Arc::ptr_eq(&gate.outlet, outlet));
                match known {
                    Some(at) => old.swap_remove(at),
                    None => {
                        outlet.set_pressure(pressure);
                        Gate::new(outlet.clone(), &self.config)
                    }
                }
            })
            .collect();
        for mut gate in old {
            // An outlet without routes is stopped or about to be: it counts what it can't take.
            gate.refused.push_back(gate.batcher.take());
            gate.refused.append(&mut gate.windows);
            for batch in gate.refused.drain(..).filter(|batch| !batch.is_empty()) {
                shared.hand_over(&*gate.outlet, batch, true);
            }
        }
        self.cache.clear();
        self.generation = routes.generation;
    }

    /// Distributes realtime events over the gates.
    fn route_realtime(&mut self, shared: &Shared, routes: &RouteTable) {
        let mut routed = 0;
        while routed < ROUTED_AT_ONCE
            && let Some(chunk) = shared.rings[Lane::Realtime].pop()
        {
            routed += chunk.len();
            self.distribute(chunk, Lane::Realtime, shared, routes);
        }
        if routed > 0 {
            for gate in &mut self.gates {
                gate.hand_over_realtime(self.config.max_batch_events, shared);
            }
            self.next_cycle
                .get_or_insert_with(|| Instant::now() + CYCLE);
        }
    }

    /// Distributes transactional events over the gates.
    fn route_transactional(&mut self, shared: &Shared, routes: &RouteTable) {
        let mut routed = 0;
        while routed < ROUTED_AT_ONCE && !self.is_blocked() {
            let Some(chunk) = shared.rings[Lane::Transactional].pop() else {
                break;
            };
            routed += chunk.len();
            self.distribute(chunk, Lane::Transactional, shared, routes);
        }
    }

    fn distribute(&mut self, chunk: Vec<Event>, lane: Lane, shared: &Shared, routes: &RouteTable) {
        let now = Instant::now();
        let mut copies = 0;
        let mut filtered = 0;
        let mut found = Vec::new();
        for event in chunk {
            let outlets = match self.cache.get(&event.topic) {
                Some(known) => known,
                None => {
                    routes.outlets_for(event.topic.as_str(), &mut found);
                    if event.topic.is_worth_caching() {
                        if self.cache.len() >= CACHED_TOPICS {
                            self.cache.clear();
                        }
                        self.cache
                            .insert(event.topic.clone(), found.as_slice().into());
                    }
                    found.as_slice()
                }
            };
            let Some((last, others)) = outlets.split_last() else {
                filtered += 1;
                continue;
            };
            copies += others.len() as u64;
            shared.in_hand[lane].fetch_add(outlets.len() as u64, Ordering::Relaxed);
            for index in others {
                self.gates[*index as usize].push(event.clone(), now, shared);
            }
            self.gates[*last as usize].push(event, now, shared);
        }
        let counters = &shared.counters[lane];
        counters.copies.fetch_add(copies, Ordering::Relaxed);
        counters.filtered.fetch_add(filtered, Ordering::Relaxed);
    }

    /// Puts events of the batch lane into windows, and distributes those that have closed.
    fn route_batch(&mut self, shared: &Shared, routes: &RouteTable) {
        let mut routed = 0;
        let now = Instant::now();
        while routed < ROUTED_AT_ONCE && self.takes_windows(shared) {
            let Some(chunk) = shared.rings[Lane::Batch].pop() else {
                break;
            };
            routed += chunk.len();
            shared.in_hand[Lane::Batch].fetch_add(chunk.len() as u64, Ordering::Relaxed);
            for event in chunk {
                let limits = |topic: &Topic| routes.rules.find(topic.as_str()).window;
                if let Some(window) = self.windows.push(event, now, limits) {
                    self.distribute_window(window, shared, routes);
                }
            }
            // Rather early than not at all.
            while (self.windows.len() > self.config.batch_queue_events
                || self.windows.bytes() > MAX_WINDOW_BYTES)
                && let Some(window) = self.windows.pop_oldest()
            {
                self.distribute_window(window, shared, routes);
            }
        }
        let draining = shared.draining.load(Ordering::SeqCst);
        while let Some(window) = match draining {
            true => self.windows.pop_oldest(),
            false => self.windows.pop_due(now),
        } {
            self.distribute_window(window, shared, routes);
        }
    }

    fn distribute_window(&mut self, window: Batch, shared: &Shared, routes: &RouteTable) {
        let counters = &shared.counters[Lane::Batch];
        let in_hand = &shared.in_hand[Lane::Batch];
        let events = window.len() as u64;
        let mut found = Vec::new();
        routes.outlets_for(window[0].topic.as_str(), &mut found);
        let Some((last, others)) = found.split_last() else {
            in_hand.fetch_sub(events, Ordering::SeqCst);
            counters.filtered.fetch_add(events, Ordering::Relaxed);
            return;
        };
        let copies = events * others.len() as u64;
        in_hand.fetch_add(copies, Ordering::Relaxed);
        counters.copies.fetch_add(copies, Ordering::Relaxed);
        for index in others {
            self.gates[*index as usize].push_window(window.clone());
        }
        self.gates[*last as usize].push_window(window);
    }

    /// Whether there is room for more windows: those that have closed are bounded, too.
    fn takes_windows(&self, shared: &Shared) -> bool {
        let in_hand = shared.in_hand[Lane::Batch].load(Ordering::Relaxed);
        let bytes: usize = self.gates.iter().map(|gate| gate.window_bytes).sum();
        in_hand <= self.windows.len() as u64 + self.config.batch_queue_events as u64
            && bytes <= MAX_WINDOW_BYTES
    }

    fn hand_over(&mut self, shared: &Shared) {
        if self.gates.iter().all(|gate| !gate.holds_something()) {
            return;
        }
        // Before outlets are looked at: see `Pipeline::progress`.
        fence(Ordering::SeqCst);
        let now = Instant::now();
        for gate in &mut self.gates {
            let due = gate.batcher.is_due(now, gate.outlet.is_idle());
            if due || !gate.refused.is_empty() {
                gate.hand_over(shared);
            }
            gate.hand_over_windows(shared);
        }
    }

    fn is_blocked(&self) -> bool {
        self.gates.iter().any(|gate| !gate.refused.is_empty())
    }

    /// Has the controller look, once a cycle while there is realtime traffic or pressure.
    fn look_after_pressure(&mut self, shared: &Shared) {
        let now = Instant::now();
        if self.next_cycle.is_none_or(|next| now < next) {
            return;
        }
        let overflowed = &shared.counters[Lane::Realtime].overflowed;
        let overflowed = overflowed.load(Ordering::Relaxed);
        let mut load = Load {
            waiting: shared.queued(Lane::Realtime) as usize,
            dropped: overflowed - std::mem::replace(&mut self.overflowed, overflowed),
            ..Load::default()
        };
        for gate in &self.gates {
            load += gate.outlet.take_realtime_load(now);
        }
        let before = shared.pressure();
        let state = match shared.draining.load(Ordering::SeqCst) {
            true => Pressure::Healthy,
            false => self.controller.on_cycle(load),
        };
        if state != before {
            shared.pressure.store(state as u8, Ordering::Relaxed);
            shared.rings[Lane::Transactional].set_closed(state >= Pressure::Emergency);
            for gate in &self.gates {
                gate.outlet.set_pressure(state);
            }
            if state > before {
                tracing::warn!(
                    state = state.as_str(),
                    ?load,
                    "the realtime lane can't keep up"
                );
            } else {
                tracing::info!(state = state.as_str(), "the realtime lane recovers");
            }
        }
        let goes_on = load != Load::default() || state != Pressure::Healthy;
        self.next_cycle = goes_on.then(|| now + CYCLE);
    }
}

impl Gate {
    fn new(outlet: Arc<dyn Outlet>, config: &PipelineConfig) -> Gate {
        Gate {
            outlet,
            realtime: Batch::new(),
            batcher: Batcher::new(config.max_batch_events, config.max_batch_delay),
            refused: VecDeque::new(),
            windows: VecDeque::new(),
            window_bytes: 0,
        }
    }

    fn push_window(&mut self, window: Batch) {
        self.window_bytes += payload_bytes(&window);
        self.windows.push_back(window);
    }

    fn holds_something(&self) -> bool {
        !self.refused.is_empty() || !self.batcher.is_empty() || !self.windows.is_empty()
    }

    /// Collects an event, and hands the batch over when it is full.
    fn push(&mut self, event: Event, now: Instant, shared: &Shared) {
        if event.lane == Lane::Realtime {
            return self.realtime.push(event);
        }
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

    /// Nobody waits for realtime events: what the outlet does not take is dropped.
    fn hand_over_realtime(&mut self, most: usize, shared: &Shared) {
        let mut rest = std::mem::take(&mut self.realtime);
        while !rest.is_empty() {
            let later = rest.split_off(rest.len().min(most));
            shared.hand_over(&*self.outlet, rest, true);
            rest = later;
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

    fn hand_over_windows(&mut self, shared: &Shared) {
        while let Some(window) = self.windows.pop_front() {
            self.window_bytes -= payload_bytes(&window);
            if let Some(window) = shared.hand_over(&*self.outlet, window, false) {
                self.window_bytes += payload_bytes(&window);
                self.windows.push_front(window);
                return;
            }
        }
    }
}

impl Shared {
    /// Offers a batch; gives it back if the outlet has no room for it, unless it is `last`.
    fn hand_over(&self, outlet: &dyn Outlet, batch: Batch, last: bool) -> Option<Batch> {
        let lane = batch.first()?.lane;
        let offered = batch.len() as u64;
        let refused = match outlet.offer(batch) {
            Offer::Full(batch) => Some(batch),
            Offer::Taken => None,
        };
        // An outlet may have dealt with a part of what it had no room for.
        let left = refused.as_ref().map_or(0, |batch| batch.len() as u64);
        let mut settled = offered - left;
        let counters = &self.counters[lane];
        counters.handed_over.fetch_add(settled, Ordering::Relaxed);
        match &refused {
            None => {
                counters.batches.fetch_add(1, Ordering::Relaxed);
            }
            Some(batch) if last => {
                self.overflow(lane, batch);
                settled = offered;
            }
            Some(_) => {}
        }
        self.in_hand[lane].fetch_sub(settled, Ordering::SeqCst);
        refused.filter(|_| !last)
    }
}
