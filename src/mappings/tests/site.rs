//! Mappings of which a site has one of each: what they make of the site's events, and what they keep.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tempfile::TempDir;

use crate::dead_letters::DeadLetters;
use crate::event::{Batch, Event, Place, Receipt, Topic};
use crate::mappings::{Mappings, MappingsConfig, Stored};
use crate::pipeline::{NotJournaled, Routes, Sink};
use crate::site::{Changes, Entries, Placement, Seat, SharedState, Worker};
use crate::store::{Store, StoreConfig};

/// Keeps what it gets, as long as nobody holds the gate.
#[derive(Default)]
struct Published {
    lines: Mutex<Vec<String>>,
    gate: Mutex<()>,
}

impl Sink for Published {
    fn publish(&self, _: &str, events: Vec<Event>) -> Result<(), NotJournaled> {
        let lines = events.iter().map(|event| {
            let payload: serde_json::Value = serde_json::from_slice(&event.payload).unwrap();
            let path = event.topic.as_str().rsplit('/').next().unwrap();
            format!("{path} {}", payload["value"])
        });
        self.lines.lock().extend(lines);
        drop(self.gate.lock());
        Ok(())
    }
}

struct House {
    _folder: TempDir,
    store: Store,
    routes: Arc<Routes>,
    published: Arc<Published>,
    mappings: Mappings,
    worker: Arc<dyn Worker>,
    /// Events of the site that were given back.
    abandoned: Arc<AtomicUsize>,
}

/// A ticket of an event of the site.
#[derive(Debug)]
struct Ticket(Place, Arc<AtomicUsize>);

impl Receipt for Ticket {
    fn abandon(&self) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }

    fn place(&self) -> Option<Place> {
        Some(self.0)
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.mappings.stop(Instant::now() + Duration::from_secs(5));
        let status = self.mappings.status();
        assert_eq!(status.offered, status.handled + status.dropped);
    }
}

impl House {
    /// The mappings `one` and `all` are singletons.
    fn new() -> House {
        let folder = tempfile::tempdir().unwrap();
        let store = StoreConfig {
            path: folder.path().join("store"),
            map_bytes: 16 << 20,
        };
        let store = Store::open(&store).unwrap();
        let routes = Arc::new(Routes::default());
        let published = Arc::new(Published::default());
        let mappings = Mappings::open(
            MappingsConfig {
                preinstalled: None,
                singletons: ["one", "all"].map(str::to_owned).into(),
                queue_events: 100,
                max_batch_events: 10,
            },
            store.clone(),
            routes.clone(),
            published.clone(),
            Arc::new(|| {}),
            Arc::new(DeadLetters::new(Instant::now())),
        );
        let mappings = mappings.unwrap();
        House {
            _folder: folder,
            store,
            routes,
            published,
            worker: mappings.worker(),
            mappings,
            abandoned: Arc::default(),
        }
    }

    /// A mapping of the sources a and b.
    fn install(&self, name: &str, mapping: &str) {
        self.install_with(name, mapping, "{}");
    }

    fn install_with(&self, name: &str, mapping: &str, additions: &str) {
        let text = format!(
            "model: {{ name: m, version: v1 }}\noutput_topic: umh.v1.x\nheadgate: {additions}\n\
             sources: {{ a: umh.v1.x._raw.a, b: umh.v1.x._raw.b }}\nmapping: {mapping}\n"
        );
        self.mappings.install(name, &text).unwrap();
    }

    fn sit(&self, sitting: u64, kept: Entries) -> Arc<dyn SharedState> {
        self.worker.sit(Seat::Whole, sitting, kept, Arc::default())
    }

    /// An event of the site.
    fn event(&self, sitting: u64, number: u64, source: &str, value: u64) -> Event {
        let payload = format!("{{\"value\":{value},\"timestamp_ms\":{number}}}");
        let topic = Topic::new(format!("umh/v1/x/_raw/{source}")).unwrap();
        let place = Place {
            sitting,
            stream: 0,
            number,
        };
        let receipt: Arc<dyn Receipt> = Arc::new(Ticket(place, self.abandoned.clone()));
        Event {
            receipt: Some(receipt),
            ..Event::new(topic, Bytes::from(payload), Instant::now())
        }
    }

    fn offer(&self, sitting: u64, number: u64, source: &str, value: u64) {
        let batch: Batch = vec![self.event(sitting, number, source, value)];
        assert!(self.worker.offer(batch).is_ok());
    }

    fn lines(&self) -> Vec<String> {
        self.published.lines.lock().clone()
    }

    fn until_published(&self, line: &str) {
        until(line, || {
            self.lines().contains(&line.to_owned()).then_some(())
        });
    }

    fn values(&self, mapping: &str) -> Vec<Option<String>> {
        let sources = self.mappings.inspect(mapping).unwrap().sources;
        sources.into_iter().map(|source| source.value).collect()
    }
}

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "it never came: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What is taken by and by, until `last` is among the numbers of the events.
fn take_until(state: &Arc<dyn SharedState>, last: u64) -> Changes {
    let mut all = Changes::default();
    until("what is to be kept", || {
        let changes = state.take(false)?;
        all.entries.extend(changes.entries);
        all.receipts.extend(changes.receipts);
        let mut numbers = all.receipts.iter().map(|receipt| receipt.place().unwrap());
        numbers.any(|place| place.number == last).then_some(())
    });
    all
}

fn entry(mapping: &str, source: &str, value: u64) -> (Arc<str>, Arc<[u8]>) {
    let stored = Stored {
        alias: source.to_owned(),
        topic: format!("umh.v1.x._raw.{source}"),
        value: value.to_string(),
        timestamp_ms: 0,
        arrived_ms: 0,
    };
    let value = serde_json::to_vec(&stored).unwrap();
    (format!("{mapping}\0{source}").into(), value.into())
}

/// `MAPPING.SOURCE VALUE`, without a value if it is removed.
fn kept(changes: &Changes) -> Vec<String> {
    let entries = changes.entries.iter().map(|(key, value)| {
        let key = key.replace('\0', ".");
        let stored = value.as_ref().map(|value| {
            let stored: Stored = serde_json::from_slice(value).unwrap();
            format!(" {}", stored.value)
        });
        key + &stored.unwrap_or_default()
    });
    entries.collect()
}

#[test]
fn one_that_the_site_has_once_goes_on_with_what_is_kept_and_gets_no_other_events_than_the_sites() {
    let house = House::new();
    assert_eq!(house.worker.placement(), Placement::Everywhere);
    house.install("one", "{ sum: a + b }");
    assert!(!house.routes.load().is_wanted("umh/v1/x/_raw/a"));
    house.install("each", "{ here: a }");
    assert!(house.routes.load().is_wanted("umh/v1/x/_raw/a"));
    let (worker, mappings) = (&house.worker, &house.mappings);
    assert_eq!(worker.placement(), Placement::Singleton);
    let topics = worker.subscriptions();
    let topics: Vec<_> = topics.iter().map(|filter| filter.as_str()).collect();
    assert_eq!(topics, ["umh/v1/x/_raw/a", "umh/v1/x/_raw/b"]);
    assert!(mappings.inspect("one").unwrap().standby);
    assert!(!mappings.inspect("each").unwrap().standby);
    let state = |path| mappings.why(path).unwrap()[0].explanation.state.clone();
    assert!(state("one/sum").contains("cluster status"));

    let state = house.sit(1, [entry("one", "a", 40)].into());
    house.offer(1, 7, "b", 2);
    let changes = take_until(&state, 7);
    assert_eq!(house.lines(), ["sum 42"]);
    assert_eq!(kept(&changes), ["one.b 2"]);
    assert!(!mappings.inspect("one").unwrap().standby);
    let each = mappings.inspect("each").unwrap().counters;
    assert_eq!(each, Default::default());

    // Nothing of it stays here.
    worker.rise(1);
    assert!(mappings.inspect("one").unwrap().standby);
    until("all forgotten", || {
        (house.values("one") == [None, None]).then_some(())
    });
    assert!(house.store.variables("one").unwrap().is_empty());
    assert_eq!(house.abandoned.load(Ordering::Relaxed), 0);
}

#[test]
fn what_waits_when_a_sitting_ends_is_given_back_and_what_it_knew_is_forgotten() {
    let house = House::new();
    house.install("one", "{ sum: a + b }");
    let first = house.sit(1, Entries::new());
    // The thread is held up at the first output.
    let gate = house.published.gate.lock();
    house.offer(1, 1, "a", 1);
    house.offer(1, 2, "b", 1);
    house.until_published("sum 2");
    house.offer(1, 3, "b", 2);
    house.worker.rise(1);
    let second = house.sit(2, [entry("one", "a", 10)].into());
    // The end of the one before comes late.
    house.worker.rise(1);
    house.offer(2, 4, "b", 20);
    drop(gate);
    let changes = take_until(&second, 4);
    assert_eq!(kept(&changes), ["one.b 20"]);
    assert_eq!(house.lines(), ["sum 2", "sum 30"]);
    assert_eq!(house.abandoned.load(Ordering::Relaxed), 1);
    drop(first);
}

fn reorder(window: &str) -> String {
    format!("{{ sources: {{ a: {{ late: reorder, reorder_window: {window} }} }} }}")
}

#[test]
fn an_event_that_waits_for_earlier_ones_is_not_finished_and_neither_is_one_behind_it() {
    let house = House::new();
    house.install_with("one", "{ a: a, b: b }", &reorder("200ms"));
    let state = house.sit(1, Entries::new());
    let events = vec![house.event(1, 1, "a", 1), house.event(1, 2, "b", 2)];
    assert!(house.worker.offer(events).is_ok());
    let changes = take_until(&state, 2);
    assert_eq!(house.lines(), ["b 2", "a 1"]);
    assert_eq!(changes.receipts.len(), 2);
    assert_eq!(kept(&changes), ["one.a 1", "one.b 2"]);
}

#[test]
fn what_waits_for_earlier_events_when_a_sitting_ends_comes_again_elsewhere() {
    let house = House::new();
    house.install_with("one", "{ a: a, b: b }", &reorder("60s"));
    let first = house.sit(1, Entries::new());
    house.offer(1, 1, "a", 1);
    until("it waits", || {
        let handled = house.mappings.status().handled;
        (handled == 1).then_some(())
    });
    assert!(first.take(false).is_none());
    house.worker.rise(1);
    let second = house.sit(2, Entries::new());
    house.offer(2, 2, "b", 2);
    take_until(&second, 2);
    assert_eq!(house.lines(), ["b 2"]);
    // An orderly end does not let it go on either.
    house.offer(2, 3, "a", 3);
    house.mappings.stop(Instant::now() + Duration::from_secs(5));
    assert_eq!(house.lines(), ["b 2"]);
}

#[test]
fn one_that_is_replaced_keeps_its_values_one_that_is_removed_none_and_others_are_left_alone() {
    let house = House::new();
    house.install("one", "{ sum: a + b }");
    let unknown = entry("unknown", "a", 9);
    let kept_before = [entry("one", "a", 1), entry("all", "a", 5), unknown];
    let state = house.sit(1, kept_before.into());
    house.offer(1, 1, "b", 2);
    take_until(&state, 1);
    house.install("one", "{ product: a * b }");
    // It was installed on another gateway before.
    house.install("all", "{ all: a }");
    assert_eq!(house.values("all"), [Some("5".to_owned()), None]);
    house.offer(1, 2, "b", 3);
    take_until(&state, 2);
    assert_eq!(house.lines(), ["sum 3", "product 3"]);
    let all = state.take(true).unwrap();
    assert!(all.replaces);
    let wanted = ["all.a 5", "all.b 3", "one.a 1", "one.b 3", "unknown.a 9"];
    assert_eq!(kept(&all), wanted);

    house.mappings.remove("one").unwrap();
    let removed = state.take(false).unwrap();
    assert_eq!(kept(&removed), ["one.a", "one.b"]);
    house.install("one", "{ sum: a + b }");
    assert_eq!(house.values("one"), [None, None]);
    let all = state.take(true).unwrap();
    assert_eq!(kept(&all), ["all.a 5", "all.b 3", "unknown.a 9"]);
    state.written(all, true);

    // With the last one the seat is given up, but not before the log has nothing of it.
    house.mappings.remove("one").unwrap();
    house.mappings.remove("all").unwrap();
    assert!(house.worker.subscriptions().is_empty());
    assert_eq!(house.worker.placement(), Placement::Singleton);
    house.worker.rise(1);
    let state = house.sit(2, [entry("all", "a", 5)].into());
    let removed = state.take(false).unwrap();
    assert_eq!(kept(&removed), ["all.a"]);
    state.written(removed, true);
    assert_eq!(house.worker.placement(), Placement::Everywhere);
}
