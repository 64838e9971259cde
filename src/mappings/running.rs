//! The mappings of a running gateway: their thread, their routes, and what they keep on disk.
//!
//! One thread evaluates for all of them, in the order in which events come; an expression that takes long is
//! stopped, and rests. Another one writes, once a second, the values that have changed. An event of the journal
//! is finished when its value is on disk and what was made of it is in the journal.
//!
//! Mappings of which a site has one of each are a part of their own, which gets other events and keeps its values
//! elsewhere ([`seat`]).

mod kept;
mod seat;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use self::kept::Sitting;
use super::status::{MappingError, MappingInfo, MappingsStatus, OutputStatus};
use super::{Mapping, Metadata, Refusal, Sent, Set, Stored};
use crate::dead_letters::{DeadLetter, DeadLetters, Reason};
use crate::event::{Batch, Event, Lane, Receipt, TopicFilter, unix_time_ns};
use crate::pipeline::{
    Load, Offer, Outlet, Pressure, Progress, Queue, Queued, Route, Routes, Sink, Step, event_bytes,
};
use crate::regular_file::RegularFile;
use crate::site::Worker;
use crate::store::{Store, StoreError, VariableChange};

/// Longest configuration, in bytes.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;

/// How often the values that have changed are written.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// How long somebody waits who only looks.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many apps and mappings an event has come through, as metadata of what waits for earlier messages.
const HOPS: &str = "hops";

/// Events of the journal that wait for a store that can't be written.
const MAX_RECEIPTS: usize = 10_000;

/// Who has published, where it is not one app: no app can have this name.
pub const SOURCE: &str = "mapping/*";

/// The text of a configuration, or why it can't be read.
type ReadConfig = Result<String, String>;

/// How the mappings of a gateway are set up.
#[derive(Clone, Debug)]
pub struct MappingsConfig {
    /// Folder of those that are part of the system.
    pub preinstalled: Option<PathBuf>,
    /// Names of those that the site has once.
    pub singletons: BTreeSet<String>,
    pub queue_events: usize,
    pub max_batch_events: usize,
}

/// The mappings of a gateway. Cheap to clone.
#[derive(Clone)]
pub struct Mappings {
    shared: Arc<Shared>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

struct Shared {
    config: MappingsConfig,
    store: Store,
    routes: Arc<Routes>,
    sink: Arc<dyn Sink>,
    progress: Progress,
    dead_letters: Arc<DeadLetters>,
    idle: AtomicBool,
    waiting: Mutex<Waiting>,
    wake: Condvar,
    inside: Mutex<Inside>,
    installed: AtomicUsize,
    /// Held while one is installed or removed.
    changing: Mutex<()>,
    saving: Mutex<Saving>,
    save: Condvar,
}

/// What waits for the thread.
#[derive(Default)]
struct Waiting {
    queue: Queue,
    /// The pipeline was told that there is no room.
    refused: bool,
    /// What waits is to be finished by then.
    ends: Option<Instant>,
    in_hand: usize,
    counts: Counts,
    realtime: Load,
    /// What the site's mappings are to get of the site's events.
    subscriptions: Vec<TopicFilter>,
    /// The last one; it may be over.
    sitting: Option<Arc<Sitting>>,
    seat_changed: bool,
}

/// Adds up: `offered = handled + dropped + queued`.
#[derive(Clone, Copy, Default)]
struct Counts {
    offered: u64,
    handled: u64,
    dropped: u64,
    published: u64,
    save_failures: u64,
}

#[derive(Default)]
struct Inside {
    /// Those that get this gateway's events.
    here: Part,
    /// Those that get the site's, while there is a sitting.
    site: Part,
    sitting: Option<Arc<Sitting>>,
    entries: BTreeMap<String, Entry>,
}

/// Mappings that get the same events and keep their values at the same place.
#[derive(Default)]
struct Part {
    set: Set,
    /// Of events whose values are not kept yet, and since when.
    receipts: VecDeque<(Instant, Arc<dyn Receipt>)>,
    /// How long an event may wait for earlier ones, in any mapping.
    longest_wait: Duration,
}

/// What has come of some events.
struct Handled {
    published: usize,
    /// What is to be in the journal of it is there.
    journaled: bool,
}

/// What is known of a mapping besides its work.
struct Entry {
    preinstalled: bool,
    since_ms: u64,
    warnings: Vec<String>,
    /// It does not run.
    error: Option<String>,
}

#[derive(Default)]
struct Saving {
    ends: bool,
}

impl Mappings {
    /// Loads what is installed, and what is part of the system. A file that is wrong costs nothing but itself:
    /// the log and [`Mappings::list`] have its error.
    pub fn open(
        config: MappingsConfig,
        store: Store,
        routes: Arc<Routes>,
        sink: Arc<dyn Sink>,
        progress: Progress,
        dead_letters: Arc<DeadLetters>,
    ) -> Result<Mappings, MappingError> {
        let shared = Arc::new(Shared {
            config,
            store,
            routes,
            sink,
            progress,
            dead_letters,
            idle: AtomicBool::new(true),
            waiting: Mutex::default(),
            wake: Condvar::new(),
            inside: Mutex::default(),
            installed: AtomicUsize::new(0),
            changing: Mutex::default(),
            saving: Mutex::default(),
            save: Condvar::new(),
        });
        let mut all: BTreeMap<String, (bool, ReadConfig)> = BTreeMap::new();
        for (name, text) in shared.store.mappings()? {
            let text = String::from_utf8(text).map_err(|error| error.to_string());
            all.insert(name, (false, text));
        }
        if let Some(folder) = &shared.config.preinstalled {
            for (name, text) in preinstalled(folder)? {
                if all.insert(name.clone(), (true, text)).is_some() {
                    tracing::warn!(
                        mapping = name,
                        "a mapping of this name is part of the system now; the installed one does not run, and \
                         is there again when that one is not"
                    );
                }
            }
        }
        for (name, (preinstalled, text)) in all {
            let loaded = text.and_then(|text| {
                Mapping::load(&text, &file_name(&name)).map_err(|error| error.to_string())
            });
            let mut entry = Entry::new(preinstalled);
            let mut inside = shared.inside.lock();
            match loaded {
                Ok((mut mapping, warnings)) => {
                    entry.warnings = warnings.iter().map(ToString::to_string).collect();
                    let is_singleton = shared.is_singleton(&name);
                    if !is_singleton {
                        mapping.restore(shared.stored(&name)?);
                    }
                    inside.part(is_singleton).set.install(&name, mapping);
                }
                Err(error) => {
                    tracing::error!(mapping = name, %error, "the mapping does not run");
                    entry.error = Some(error);
                }
            }
            inside.entries.insert(name, entry);
        }
        {
            let mut inside = shared.inside.lock();
            for name in &shared.config.singletons {
                if !inside.entries.contains_key(name) {
                    tracing::warn!(
                        mapping = name,
                        "mappings.singleton names a mapping that is not there: install it, or look for a typing error"
                    );
                }
            }
            shared.follow(&mut inside);
        }
        let thread = |name: &str, work: fn(&Arc<Shared>)| {
            let shared = shared.clone();
            let named = thread::Builder::new().name(name.to_owned());
            named.spawn(move || work(&shared))
        };
        let threads = [
            thread("mappings", Shared::work),
            thread("mappings-save", Shared::save_again_and_again),
        ];
        let threads = threads.into_iter().collect::<io::Result<Vec<_>>>();
        Ok(Mappings {
            threads: Arc::new(Mutex::new(threads.map_err(MappingError::Thread)?)),
            shared,
        })
    }

    /// Checks a configuration, stores it, and has it take over from the one of this name between two batches,
    /// with the values of the sources that both have.
    pub fn install(&self, name: &str, text: &str) -> Result<MappingInfo, MappingError> {
        check_name(name)?;
        let shared = &self.shared;
        let _changing = shared.changing.lock();
        let (mut mapping, warnings) = Mapping::load(text, &file_name(name))?;
        if shared.is_preinstalled(name) {
            return Err(MappingError::Preinstalled(name.to_owned()));
        }
        shared.store.put_mapping(name, text.as_bytes())?;
        let is_singleton = shared.is_singleton(name);
        let is_new = shared.inside.lock().get(name).is_none();
        if is_new && !is_singleton {
            mapping.restore(shared.stored(name)?);
        }
        let mut inside = shared.inside.lock();
        if is_new && let Some(sitting) = inside.seated().filter(|_| is_singleton) {
            mapping.restore(sitting.values(name));
        }
        inside.part(is_singleton).set.install(name, mapping);
        let entry = Entry {
            warnings: warnings.iter().map(ToString::to_string).collect(),
            ..Entry::new(false)
        };
        inside.entries.insert(name.to_owned(), entry);
        shared.follow(&mut inside);
        tracing::info!(mapping = name, "mapping installed");
        inside
            .info(name)
            .ok_or_else(|| MappingError::NotFound(name.to_owned()))
    }

    /// Forgets a mapping and the values of its sources.
    pub fn remove(&self, name: &str) -> Result<(), MappingError> {
        let shared = &self.shared;
        let _changing = shared.changing.lock();
        if shared.is_preinstalled(name) {
            return Err(MappingError::Preinstalled(name.to_owned()));
        }
        // What is being written at this moment would be there again after it.
        let saving = shared.saving.lock();
        let mut inside = shared.inside.lock();
        let is_singleton = shared.is_singleton(name);
        inside.part(is_singleton).set.remove(name);
        inside.entries.remove(name);
        // The thread may not have looked at it yet.
        let sitting = shared.waiting.lock().sitting.clone();
        if let Some(sitting) = sitting.filter(|sitting| is_singleton && !sitting.is_over()) {
            sitting.forget(name);
        }
        shared.follow(&mut inside);
        drop(inside);
        let was_there = shared.store.remove_mapping(name)?;
        drop(saving);
        match was_there {
            true => {
                tracing::info!(mapping = name, "mapping removed");
                Ok(())
            }
            false => Err(MappingError::NotFound(name.to_owned())),
        }
    }

    /// All, by name.
    pub fn list(&self) -> Result<Vec<MappingInfo>, MappingError> {
        let inside = self.shared.look()?;
        let names = inside.entries.keys();
        Ok(names.filter_map(|name| inside.info(name)).collect())
    }

    pub fn inspect(&self, name: &str) -> Result<MappingInfo, MappingError> {
        let info = self.shared.look()?.info(name);
        info.ok_or_else(|| MappingError::NotFound(name.to_owned()))
    }

    /// The configuration, as it was handed in.
    pub fn config(&self, name: &str) -> Result<String, MappingError> {
        let shared = &self.shared;
        stored_config(&shared.store, shared.config.preinstalled.as_deref(), name)
    }

    /// Why outputs were sent last, or were not. `path` is `NAME`, `NAME/VIRTUAL.PATH`, or a virtual path of any
    /// mapping.
    pub fn why(&self, path: &str) -> Result<Vec<OutputStatus>, MappingError> {
        let inside = self.shared.look()?;
        let (name, wanted) = match path.split_once('/') {
            Some((name, path)) => (Some(name), Some(path)),
            None if inside.entries.contains_key(path) => (Some(path), None),
            None => (None, Some(path)),
        };
        let mut found = Vec::new();
        for (mapping, one) in inside.mappings() {
            if name.is_some_and(|name| name != mapping) {
                continue;
            }
            let outputs = one.outputs().map(|output| output.path);
            for path in outputs.filter(|path| wanted.is_none_or(|wanted| wanted == *path)) {
                found.extend(inside.status_of(mapping, one, path));
            }
        }
        if let Some(name) = name
            && let Some(Entry {
                error: Some(error), ..
            }) = inside.entries.get(name)
        {
            return Err(MappingError::DoesNotRun {
                name: name.to_owned(),
                error: error.clone(),
            });
        }
        match found.is_empty() {
            true => Err(MappingError::NoOutput(path.to_owned())),
            false => Ok(found),
        }
    }

    /// The output that goes to an MQTT topic, if there is one.
    pub fn output_on(&self, topic: &str) -> Option<OutputStatus> {
        let inside = self.shared.look().ok()?;
        inside.mappings().find_map(|(name, mapping)| {
            let mut outputs = mapping.outputs();
            let output = outputs.find(|output| output.topic.as_str() == topic)?;
            inside.status_of(name, mapping, output.path)
        })
    }

    /// Names of the mappings that read an MQTT topic.
    pub fn readers_of(&self, topic: &str) -> Vec<String> {
        let Ok(inside) = self.shared.look() else {
            return Vec::new();
        };
        let reads = |mapping: &Mapping| mapping.topics().any(|(source, _)| source == topic);
        let readers = inside.mappings().filter(|(_, mapping)| reads(mapping));
        readers.map(|(name, _)| name.to_owned()).collect()
    }

    pub fn status(&self) -> MappingsStatus {
        let installed = self.shared.installed.load(Ordering::Relaxed);
        let waiting = self.shared.waiting.lock();
        let Counts {
            offered,
            handled,
            dropped,
            published,
            save_failures,
        } = waiting.counts;
        MappingsStatus {
            installed,
            queued: (waiting.queue.len() + waiting.in_hand) as u64,
            offered,
            handled,
            dropped,
            published,
            save_failures,
        }
    }

    /// Puts the counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        let status = self.status();
        metrics::gauge!("headgate_mappings_queued_events").set(status.queued as f64);
        metrics::counter!("headgate_mappings_dropped_events_total").absolute(status.dropped);
        metrics::counter!("headgate_mappings_save_failures_total").absolute(status.save_failures);
        // Those of the last time are there, otherwise.
        let Some(inside) = self.shared.inside.try_lock() else {
            return;
        };
        for (name, mapping) in inside.mappings() {
            super::metrics::record(name, mapping);
        }
    }

    /// The mappings of which the site has one of each.
    pub(crate) fn worker(&self) -> Arc<dyn Worker> {
        self.shared.clone()
    }

    /// Whether nothing waits.
    pub fn is_idle(&self) -> bool {
        self.shared.idle.load(Ordering::Acquire)
    }

    /// Finishes by `deadline` what waits, writes the values, and ends the threads. What is offered from now on,
    /// and what was not finished, comes again at the next start if it is in the journal.
    pub fn stop(&self, deadline: Instant) {
        {
            let mut waiting = self.shared.waiting.lock();
            waiting.ends = Some(deadline);
            waiting.queue.set_pressure(Pressure::Healthy);
        }
        self.shared.wake.notify_all();
        let mut threads = std::mem::take(&mut *self.threads.lock()).into_iter();
        // A panic there has been reported by the panic hook.
        let _ = threads.next().map(JoinHandle::join);
        self.shared.saving.lock().ends = true;
        self.shared.save.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Entry {
    fn new(preinstalled: bool) -> Entry {
        Entry {
            preinstalled,
            since_ms: now_ms(),
            warnings: Vec::new(),
            error: None,
        }
    }
}

impl Inside {
    fn part(&mut self, is_singleton: bool) -> &mut Part {
        match is_singleton {
            true => &mut self.site,
            false => &mut self.here,
        }
    }

    /// The sitting in which the site's mappings are, until that is over.
    fn seated(&self) -> Option<&Sitting> {
        let sitting = self.sitting.as_deref();
        sitting.filter(|sitting| !sitting.is_over())
    }

    fn get(&self, name: &str) -> Option<&Mapping> {
        let here = self.here.set.get(name);
        here.or_else(|| self.site.set.get(name))
    }

    fn mappings(&self) -> impl Iterator<Item = (&str, &Mapping)> {
        self.here.set.iter().chain(self.site.set.iter())
    }

    /// Whether it would run here, did not another gateway.
    fn stands_by(&self, name: &str) -> bool {
        self.site.set.get(name).is_some() && self.seated().is_none()
    }

    fn status_of(&self, name: &str, mapping: &Mapping, path: &str) -> Option<OutputStatus> {
        let mut explanation = mapping.explain(path, now_ms())?;
        if self.stands_by(name) {
            explanation.state = seat::STANDS_BY.to_owned();
        }
        Some(OutputStatus {
            mapping: name.to_owned(),
            explanation,
        })
    }

    fn next_time(&self) -> Option<u64> {
        let times = [&self.here, &self.site].map(|part| part.set.next_time());
        times.into_iter().flatten().min()
    }

    fn info(&self, name: &str) -> Option<MappingInfo> {
        let entry = self.entries.get(name)?;
        let mapping = self.get(name);
        Some(MappingInfo {
            name: name.to_owned(),
            preinstalled: entry.preinstalled,
            standby: self.stands_by(name),
            since_ms: entry.since_ms,
            warnings: entry.warnings.clone(),
            error: entry.error.clone(),
            sources: mapping
                .map(|mapping| mapping.sources(now_ms()))
                .unwrap_or_default(),
            outputs: mapping
                .into_iter()
                .flat_map(|mapping| {
                    let paths = mapping.outputs().map(|output| output.path);
                    paths.filter_map(|path| self.status_of(name, mapping, path))
                })
                .collect(),
            counters: mapping.map(Mapping::counters).unwrap_or_default(),
        })
    }
}

impl Part {
    /// The topics that they read.
    fn topics(&self) -> Vec<TopicFilter> {
        let topics = self.set.iter().flat_map(|(_, mapping)| mapping.topics());
        let topics: BTreeSet<&str> = topics.map(|(topic, _)| topic).collect();
        let topics = topics.into_iter();
        topics
            .filter_map(|topic| TopicFilter::new(topic).ok())
            .collect()
    }

    /// Takes the receipts of the events of which none waits for earlier ones any more, or of `all`.
    fn finished(&mut self, all: bool) -> Vec<(Instant, Arc<dyn Receipt>)> {
        let wait = self.longest_wait;
        let is_over = |(since, _): &(Instant, _)| all || since.elapsed() >= wait;
        let over = self.receipts.partition_point(is_over);
        self.receipts.drain(..over).collect()
    }
}

impl Shared {
    fn is_preinstalled(&self, name: &str) -> bool {
        let inside = self.inside.lock();
        inside
            .entries
            .get(name)
            .is_some_and(|entry| entry.preinstalled)
    }

    /// The values of a mapping's sources that are on disk. What can't be read is left out.
    fn stored(&self, name: &str) -> Result<Vec<Stored>, StoreError> {
        let variables = self.store.variables(name)?;
        let variables = variables.into_iter();
        let read = variables.filter_map(|(alias, bytes)| read_stored(name, &alias, &bytes));
        Ok(read.collect())
    }

    /// For whoever must not wait for as long as expressions may run.
    fn look(&self) -> Result<MutexGuard<'_, Inside>, MappingError> {
        self.inside.try_lock_for(PATIENCE).ok_or(MappingError::Busy)
    }

    /// To be called when what runs has changed.
    fn follow(self: &Arc<Self>, inside: &mut Inside) {
        for part in [&mut inside.here, &mut inside.site] {
            part.longest_wait = part.set.longest_wait();
        }
        let installed = inside.entries.len();
        self.installed.store(installed, Ordering::Relaxed);
        let routes = inside.here.topics().into_iter().map(|filter| Route {
            filter,
            outlet: self.clone(),
        });
        self.routes.replace("mappings", routes.collect());
        self.waiting.lock().subscriptions = inside.site.topics();
    }

    fn work(self: &Arc<Self>) {
        let mut sent = Vec::new();
        while let Some((mut batch, since)) = self.next() {
            let is_realtime = batch
                .first()
                .is_some_and(|event| event.lane == Lane::Realtime);
            let of_site = batch.extract_if(.., |event| event.sitting().is_some());
            let of_site: Batch = of_site.collect();
            let handled = self.handle(&batch, |inside| &mut inside.here, || false, &mut sent);
            let (handled_for_site, published_for_site) = self.act_for_site(of_site, &mut sent);
            let published = handled.map_or(0, |handled| handled.published) + published_for_site;
            let events = batch.len() + handled_for_site;
            self.account(events, is_realtime, since, published);
        }
        // What waits for earlier messages waits no longer. Those of the site are another gateway's.
        let mut inside = self.inside.lock();
        inside.here.set.on_time(u64::MAX, &mut sent);
        drop(inside);
        let outputs: Vec<_> = sent.drain(..).map(released).collect();
        self.waiting.lock().counts.published += outputs.len() as u64;
        if !outputs.is_empty() {
            // If the disk refuses, what led to it is not finished either.
            let _ = self.sink.publish(SOURCE, outputs);
        }
    }

    /// Has the mappings of a part handle events, and those before that have waited long enough. None: that was
    /// over before it came to an end, and nobody has seen anything of it.
    fn handle(
        &self,
        batch: &[Event],
        part: fn(&mut Inside) -> &mut Part,
        is_over: impl Fn() -> bool,
        sent: &mut Vec<Sent>,
    ) -> Option<Handled> {
        let mut outputs = Vec::new();
        let mut unreadable = Vec::new();
        for event in batch {
            if is_over() {
                return None;
            }
            // For one event only: others want to look, and to install.
            let mut inside = self.inside.lock();
            let Part {
                set, longest_wait, ..
            } = part(&mut inside);
            let metadata = (!longest_wait.is_zero()).then(|| hops(event));
            let read = set.on_message(
                event.topic.as_str(),
                &event.payload,
                metadata.as_ref(),
                now_ms(),
                sent,
            );
            drop(inside);
            if let Err(refusal) = read {
                unreadable.push((event, refusal));
            }
            outputs.extend(sent.drain(..).map(|sent| made_of(event, sent)));
        }
        let mut inside = self.inside.lock();
        part(&mut inside).set.on_time(now_ms(), sent);
        drop(inside);
        outputs.extend(sent.drain(..).map(released));
        if is_over() {
            return None;
        }
        let published = outputs.len();
        self.trace(batch, published);
        self.bury(&unreadable);
        let journaled = outputs.is_empty() || self.sink.publish(SOURCE, outputs).is_ok();
        self.keep_receipts(batch, journaled, part);
        Some(Handled {
            published,
            journaled,
        })
    }

    /// Until the values are kept.
    fn keep_receipts(&self, batch: &[Event], journaled: bool, part: fn(&mut Inside) -> &mut Part) {
        let receipts = batch.iter().filter_map(|event| event.receipt.as_ref());
        let mut receipts: Vec<_> = receipts.cloned().collect();
        receipts.dedup_by(|a, b| Arc::ptr_eq(a, b));
        if !journaled {
            receipts.iter().for_each(|receipt| receipt.abandon());
        }
        if !receipts.is_empty() {
            let now = Instant::now();
            let receipts = receipts.into_iter().map(|receipt| (now, receipt));
            part(&mut self.inside.lock()).receipts.extend(receipts);
        }
    }

    /// The next events, or none of them when it is only time for those that wait for earlier ones. None: the end.
    fn next(&self) -> Option<(Batch, Instant)> {
        /// No more bytes at a time, unless one event has more.
        const BATCH_BYTES: usize = 4 << 20;
        let mut waiting = self.waiting.lock();
        loop {
            if std::mem::take(&mut waiting.seat_changed) {
                let sitting = waiting.sitting.clone();
                MutexGuard::unlocked(&mut waiting, || self.take_seat(sitting));
                continue;
            }
            if waiting
                .ends
                .is_some_and(|deadline| Instant::now() > deadline)
            {
                while let Some((batch, _)) = waiting.queue.pop(usize::MAX, usize::MAX) {
                    self.drop_at_the_end(&mut waiting, &batch);
                }
            }
            if let Some((batch, since)) =
                waiting.queue.pop(self.config.max_batch_events, BATCH_BYTES)
            {
                waiting.in_hand = batch.len();
                self.idle.store(false, Ordering::Release);
                return Some((batch, since));
            }
            self.idle.store(true, Ordering::Release);
            if waiting.ends.is_some() {
                return None;
            }
            let next = MutexGuard::unlocked(&mut waiting, || self.inside.lock().next_time());
            if waiting.queue.is_ready() || waiting.seat_changed {
                continue;
            }
            match next.map(|at_ms| Duration::from_millis(at_ms.saturating_sub(now_ms()))) {
                Some(Duration::ZERO) => return Some((Batch::new(), Instant::now())),
                Some(left) => {
                    self.wake.wait_for(&mut waiting, left);
                }
                None => self.wake.wait(&mut waiting),
            }
        }
    }

    fn account(&self, events: usize, is_realtime: bool, since: Instant, published: usize) {
        let mut waiting = self.waiting.lock();
        waiting.in_hand = 0;
        waiting.counts.handled += events as u64;
        waiting.counts.published += published as u64;
        if is_realtime {
            waiting.realtime.handled += events as u64;
            waiting.realtime.slowest = waiting.realtime.slowest.max(since.elapsed());
        }
        let is_idle = waiting.queue.len() == 0;
        let was_refused = std::mem::take(&mut waiting.refused);
        drop(waiting);
        if is_idle || was_refused {
            self.idle.store(is_idle, Ordering::Release);
            (self.progress)();
        }
    }

    fn trace(&self, batch: &[Event], published: usize) {
        let step = Step::Handled {
            app: SOURCE.into(),
            events: batch.len(),
            published,
            refused: 0,
        };
        let topics = batch.iter().map(|event| &event.topic);
        self.routes.traces.note(topics, &step);
    }

    /// What no mapping could read.
    fn bury(&self, unreadable: &[(&Event, Refusal)]) {
        let now = Instant::now();
        for (event, refusal) in unreadable {
            let step = Step::failed(SOURCE.into(), &refusal.to_string());
            self.routes.traces.note([&event.topic].into_iter(), &step);
            let reason = Reason::Unreadable;
            self.dead_letters.add(reason, now, || DeadLetter {
                error: Some(refusal.to_string()),
                ..DeadLetter::new(reason, SOURCE, &event.topic, &event.payload, 0)
            });
        }
    }

    fn drop_for_room(&self, waiting: &mut Waiting, events: &[Event]) {
        waiting.counts.dropped += events.len() as u64;
        let (reason, now) = (Reason::QueueFull, Instant::now());
        let by = SOURCE.into();
        let topics = events.iter().map(|event| &event.topic);
        self.routes
            .traces
            .note(topics, &Step::Dropped { by, reason });
        for event in events {
            self.dead_letters.add(reason, now, || {
                DeadLetter::new(reason, SOURCE, &event.topic, &event.payload, 0)
            });
        }
    }

    /// It is not finished: if it is in the journal, it comes again.
    fn drop_at_the_end(&self, waiting: &mut Waiting, events: &[Event]) {
        waiting.counts.dropped += events.len() as u64;
        for receipt in events.iter().filter_map(|event| event.receipt.as_ref()) {
            receipt.abandon();
        }
    }

    fn save_again_and_again(self: &Arc<Self>) {
        // What could not be written yet.
        let mut pending = BTreeMap::new();
        let mut failing = false;
        loop {
            let mut saving = self.saving.lock();
            if !saving.ends {
                self.save.wait_for(&mut saving, SAVE_EVERY);
            }
            let ends = saving.ends;
            let saved = self.save(&mut pending, ends);
            drop(saving);
            match saved {
                Ok(()) => failing = false,
                Err(error) => {
                    self.waiting.lock().counts.save_failures += 1;
                    if !failing {
                        tracing::error!(%error, "the values of the mappings' sources can't be stored; it is tried again every second");
                    }
                    failing = true;
                }
            }
            if ends {
                return;
            }
        }
    }

    fn save(
        &self,
        pending: &mut BTreeMap<(String, String), Vec<u8>>,
        ends: bool,
    ) -> Result<(), StoreError> {
        let receipts = {
            let here = &mut self.inside.lock().here;
            for (name, mapping) in here.set.iter_mut() {
                for stored in mapping.take_changed() {
                    let value =
                        serde_json::to_vec(&stored).expect("text and numbers are always JSON");
                    pending.insert((name.to_owned(), stored.alias), value);
                }
            }
            pending.retain(|(name, _), _| here.set.get(name).is_some());
            // Some of the others' events may wait for earlier ones, in memory only.
            here.finished(ends)
        };
        if pending.is_empty() {
            return Ok(());
        }
        let changes: Vec<_> = pending
            .iter()
            .map(|((mapping, source), value)| VariableChange {
                mapping,
                source,
                value: value.as_slice(),
            })
            .collect();
        let written = self.store.put_variables(&changes);
        match &written {
            Ok(()) => pending.clear(),
            // They are not finished before the values are there; too many of them, not in this run.
            Err(_) if receipts.len() > MAX_RECEIPTS => {
                receipts.iter().for_each(|(_, receipt)| receipt.abandon());
            }
            Err(_) => {
                let mut inside = self.inside.lock();
                for receipt in receipts.into_iter().rev() {
                    inside.here.receipts.push_front(receipt);
                }
            }
        }
        written
    }
}

impl Outlet for Shared {
    fn name(&self) -> &str {
        SOURCE
    }

    fn is_idle(&self) -> bool {
        self.idle.load(Ordering::Acquire)
    }

    fn offer(&self, batch: Batch) -> Offer {
        let Some(lane) = batch.first().map(|event| event.lane) else {
            return Offer::Taken;
        };
        let events = batch.len();
        let bytes = batch.iter().map(event_bytes).sum();
        let bound = self.config.queue_events;
        let mut waiting = self.waiting.lock();
        if waiting.ends.is_some() {
            waiting.counts.offered += events as u64;
            self.drop_at_the_end(&mut waiting, &batch);
            return Offer::Taken;
        }
        while !waiting.queue.has_room(lane, events, bytes, bound) {
            match lane {
                Lane::Transactional => {
                    waiting.refused = true;
                    return Offer::Full(batch);
                }
                Lane::Batch => {
                    waiting.counts.offered += events as u64;
                    self.drop_for_room(&mut waiting, &batch);
                    return Offer::Taken;
                }
                Lane::Realtime => {
                    let too_many = (waiting.queue.lane_len(lane) + events).saturating_sub(bound);
                    let Some(oldest) = waiting.queue.pop_oldest(lane, too_many.max(1)) else {
                        break;
                    };
                    waiting.realtime.dropped += oldest.len() as u64;
                    self.drop_for_room(&mut waiting, &oldest);
                }
            }
        }
        waiting.counts.offered += events as u64;
        waiting.queue.push(lane, Queued::new(batch));
        self.idle.store(false, Ordering::Release);
        drop(waiting);
        self.wake.notify_one();
        Offer::Taken
    }

    fn take_realtime_load(&self, now: Instant) -> Load {
        let mut waiting = self.waiting.lock();
        let waits = waiting.queue.since(Lane::Realtime);
        let waits = waits.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let load = std::mem::take(&mut waiting.realtime);
        Load {
            waiting: waiting.queue.lane_len(Lane::Realtime),
            slowest: load.slowest.max(waits),
            ..load
        }
    }

    fn set_pressure(&self, pressure: Pressure) {
        let mut waiting = self.waiting.lock();
        // At the end all lanes are to be finished.
        if waiting.ends.is_none() {
            waiting.queue.set_pressure(pressure);
        }
        drop(waiting);
        self.wake.notify_one();
    }
}

/// What a mapping has made of an event, or of one before it that has waited for this one.
fn made_of(event: &Event, sent: Sent) -> Event {
    Event {
        hops: hops_of(&sent).unwrap_or(event.hops).saturating_add(1),
        ..Event::at(sent.topic, sent.payload, event.received, event.timestamp_ns)
    }
}

/// For what waits.
fn hops(event: &Event) -> Metadata {
    [(HOPS.into(), event.hops.to_string().into())].into()
}

fn hops_of(sent: &Sent) -> Option<u8> {
    let metadata = sent.metadata.as_ref()?;
    let (_, hops) = metadata.iter().find(|(name, _)| **name == *HOPS)?;
    hops.parse().ok()
}

/// What has waited for earlier messages.
fn released(sent: Sent) -> Event {
    Event {
        hops: hops_of(&sent).unwrap_or_default().saturating_add(1),
        ..Event::new(sent.topic, sent.payload, Instant::now())
    }
}

/// The value of a mapping's source, if it can be read.
fn read_stored(mapping: &str, source: &str, bytes: &[u8]) -> Option<Stored> {
    let stored = serde_json::from_slice(bytes);
    stored
        .inspect_err(|error| {
            tracing::warn!(mapping, source, %error, "the stored value can't be read");
        })
        .ok()
}

/// The configuration of a mapping, as it was handed in, or as it is in the folder of those that are part of the
/// system.
pub fn stored_config(
    store: &Store,
    preinstalled: Option<&Path>,
    name: &str,
) -> Result<String, MappingError> {
    check_name(name)?;
    let path = preinstalled.map(|folder| folder.join(file_name(name)));
    if let Some(path) = path.filter(|path| path.exists()) {
        return read(&path).map_err(|error| MappingError::DoesNotRun {
            name: name.to_owned(),
            error,
        });
    }
    let mut found = store.mappings()?.into_iter();
    let text = found.find_map(|(stored, text)| (stored == name).then_some(text));
    let text = text.and_then(|text| String::from_utf8(text).ok());
    text.ok_or_else(|| MappingError::NotFound(name.to_owned()))
}

fn read(path: &Path) -> Result<String, String> {
    let bytes = RegularFile::open(path, 0)
        .and_then(|file| file.read(MAX_CONFIG_BYTES as u64))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    String::from_utf8(bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// Lower-case letters, digits and hyphens, 64 at the most; no hyphen first.
pub fn check_name(name: &str) -> Result<(), MappingError> {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let (first, all) = (name.bytes().next(), name.bytes());
    let is_name = first.is_some_and(is_letter)
        && name.len() <= 64
        && all.into_iter().all(|byte| is_letter(byte) || byte == b'-');
    match is_name {
        true => Ok(()),
        false => Err(MappingError::Name(name.to_owned())),
    }
}

/// How errors call its configuration.
fn file_name(name: &str) -> String {
    format!("{name}.yaml")
}

/// The files of a folder: their names without .yaml, and what stands in them or why that can't be said.
fn preinstalled(folder: &Path) -> Result<Vec<(String, ReadConfig)>, MappingError> {
    let failed = |source| MappingError::Folder {
        path: folder.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(name) = name.and_then(|name| name.strip_suffix(".yaml")) else {
            tracing::warn!(path = %path.display(), "not called NAME.yaml: this is no mapping");
            continue;
        };
        let is_name = check_name(name).map_err(|error| error.to_string());
        let text = is_name.and_then(|()| read(&path));
        found.push((name.to_owned(), text));
    }
    Ok(found)
}

fn now_ms() -> u64 {
    unix_time_ns() / 1_000_000
}
