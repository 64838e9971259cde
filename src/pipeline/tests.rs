//! The lanes as producers and outlets see them.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::*;
use crate::event::TopicFilter;

const PATIENCE: Duration = Duration::from_secs(30);

/// An outlet that does as it is told.
#[derive(Default)]
struct Bench {
    taken: Mutex<Vec<Batch>>,
    full: AtomicBool,
    load: Mutex<Load>,
    pressure: Mutex<Pressure>,
}

impl Outlet for Bench {
    fn name(&self) -> &str {
        "bench"
    }

    fn is_idle(&self) -> bool {
        true
    }

    fn offer(&self, batch: Batch) -> Offer {
        if self.full.load(Ordering::SeqCst) && batch[0].lane != Lane::Realtime {
            return Offer::Full(batch);
        }
        self.taken.lock().push(batch);
        Offer::Taken
    }

    fn take_realtime_load(&self, _now: Instant) -> Load {
        *self.load.lock()
    }

    fn set_pressure(&self, pressure: Pressure) {
        *self.pressure.lock() = pressure;
    }
}

impl Bench {
    fn payloads(&self) -> Vec<Vec<String>> {
        let text = |event: &Event| String::from_utf8(event.payload.to_vec()).unwrap();
        let taken = self.taken.lock();
        taken
            .iter()
            .map(|batch| batch.iter().map(text).collect())
            .collect()
    }

    fn count(&self) -> usize {
        self.taken.lock().iter().map(Vec::len).sum()
    }
}

/// A pipeline with an outlet for all that is not below `other`.
struct House {
    pipeline: Pipeline,
    bench: Arc<Bench>,
    letters: Arc<DeadLetters>,
}

const RULES: &str = r#"
    [[rule]]
    topics = ["now/#"]
    lane = "realtime"

    [[rule]]
    topics = ["bulk/#", "other/bulk"]
    lane = "batch"
    window_events = 3
    window_age_ms = 20

    [[rule]]
    topics = ["once/#"]
    dedup = "id"
    durable = false
"#;

fn house(config: PipelineConfig) -> House {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), RULES).unwrap();
    let rules = Rules::read(file.path(), WindowLimits::default()).unwrap();
    let routes = Arc::new(Routes::default());
    routes.set_rules(Rules::new(rules, Vec::new(), WindowLimits::default()));
    let bench = Arc::<Bench>::default();
    let wanted = ["now/#", "bulk/#", "once/#", "plain/#"];
    let route = |filter: &str| Route {
        filter: TopicFilter::new(filter.to_owned()).unwrap(),
        outlet: bench.clone(),
    };
    routes.replace("bench", wanted.map(route).into());
    let letters = Arc::new(DeadLetters::new(Instant::now()));
    House {
        pipeline: Pipeline::start(config, routes, letters.clone()).unwrap(),
        bench,
        letters,
    }
}

impl House {
    /// Hands over one event a payload. Returns what `flush` does.
    fn send(&self, topic: &str, payloads: &[&str]) -> bool {
        let mut tap = self.pipeline.tap();
        let topic = Topic::new(topic.to_owned()).unwrap();
        let treatment = tap.treatment(&topic);
        for payload in payloads {
            let payload = Bytes::copy_from_slice(payload.as_bytes());
            tap.add(
                Event::new(topic.clone(), payload, Instant::now()),
                treatment,
            );
        }
        tap.flush()
    }

    fn wait_until(&self, what: &str, mut condition: impl FnMut(&House) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(
                Instant::now() < deadline,
                "{what}: {:?}",
                self.pipeline.status()
            );
            std::thread::yield_now();
        }
    }

    fn adds_up(&self) {
        let lanes = self.pipeline.status().lanes;
        for lane in [lanes.realtime, lanes.transactional, lanes.batch] {
            assert_eq!(
                lane.accepted + lane.copies,
                lane.filtered
                    + lane.deduplicated
                    + lane.handed_over
                    + lane.looped
                    + lane.overflowed
                    + lane.shed
                    + lane.queued,
                "{lane:?}"
            );
        }
    }
}

#[test]
fn each_event_takes_the_lane_of_its_rule() {
    let house = house(PipelineConfig::default());
    house.send("now/a", &["r"]);
    house.send("plain/a", &["t"]);
    house.send("bulk/a", &["b"]);
    house.send("other/bulk", &["nobody wants it"]);
    house.wait_until("all three", |house| house.bench.count() == 3);
    let lanes: Vec<_> = house
        .bench
        .taken
        .lock()
        .iter()
        .map(|batch| batch[0].lane)
        .collect();
    assert_eq!(lanes, [Lane::Realtime, Lane::Transactional, Lane::Batch]);
    let status = house.pipeline.status();
    assert_eq!(status.lanes.batch.filtered, 1);
    assert_eq!(status.all.accepted, 4);
    house.adds_up();
}

#[test]
fn realtime_events_do_not_wait_for_an_outlet_that_is_full_of_others() {
    let house = house(PipelineConfig::default());
    house.bench.full.store(true, Ordering::SeqCst);
    house.send("plain/a", &["t"]);
    house.send("now/a", &["r1"]);
    house.send("now/a", &["r2", "r3"]);
    house.wait_until("realtime", |house| house.bench.count() == 3);
    assert_eq!(house.pipeline.status().lanes.transactional.queued, 1);
    house.bench.full.store(false, Ordering::SeqCst);
    house.wait_until("the other", |house| house.bench.count() == 4);
    house.adds_up();
}

#[test]
fn transactional_producers_wait_and_nothing_is_lost() {
    let house = house(PipelineConfig {
        queue_events: 4,
        ..PipelineConfig::default()
    });
    house.bench.full.store(true, Ordering::SeqCst);
    let mut taken = 0;
    while house.send("plain/a", &["t"]) {
        taken += 1;
        assert!(taken < 1000);
    }
    house.bench.full.store(false, Ordering::SeqCst);
    house.wait_until("all", |house| house.bench.count() == taken);
    assert_eq!(house.pipeline.status().all.overflowed, 0);
    house.adds_up();
}

#[test]
fn beyond_its_bound_the_batch_lane_drops_what_comes_last() {
    let house = house(PipelineConfig {
        batch_queue_events: 6,
        ..PipelineConfig::default()
    });
    house.bench.full.store(true, Ordering::SeqCst);
    for number in 0..100 {
        assert!(house.send("bulk/a", &[&number.to_string()]));
    }
    house.wait_until("drops", |house| {
        house.pipeline.status().lanes.batch.overflowed > 0
    });
    house.bench.full.store(false, Ordering::SeqCst);
    house.wait_until("the rest", |house| house.pipeline.queued() == 0);
    let batch = house.pipeline.status().lanes.batch;
    assert_eq!(batch.handed_over + batch.overflowed, 100);
    let payloads: Vec<_> = house.bench.payloads().concat();
    let first: Vec<_> = (0..payloads.len()).map(|n| n.to_string()).collect();
    assert_eq!(payloads, first, "the oldest are kept, in their order");
    let buried = house.letters.list(None, 1000);
    assert_eq!(buried.len() as u64, batch.overflowed);
    assert_eq!(
        (buried[0].1.reason, buried[0].1.source.as_str()),
        (Reason::QueueFull, "batch")
    );
    house.adds_up();
}

#[test]
fn a_window_leaves_as_one_batch_when_it_is_full_and_an_idle_one_in_time() {
    let house = house(PipelineConfig::default());
    house.send("bulk/a", &["1", "2"]);
    house.send("bulk/b", &["x"]);
    house.send("bulk/a", &["3", "4"]);
    house.wait_until("all", |house| house.bench.count() == 5);
    let mut batches = house.bench.payloads();
    assert_eq!(batches.remove(0), ["1", "2", "3"]);
    batches.sort();
    assert_eq!(batches, [["4"], ["x"]]);
    house.adds_up();
}

#[test]
fn windows_do_not_keep_a_gateway_from_ending() {
    let house = house(PipelineConfig::default());
    // No rule of its own, so that its window would take five seconds: longer than this test may.
    let routes = house.pipeline.shared.routes.clone();
    let rule = Rule {
        topics: vec![TopicFilter::new("plain/#").unwrap()],
        lane: Lane::Batch,
        durable: false,
        dedup: None,
        retries: None,
        window: WindowLimits {
            age: Duration::from_secs(3600),
            ..WindowLimits::default()
        },
    };
    routes.set_rules(Rules::new(vec![rule], Vec::new(), WindowLimits::default()));
    house.send("plain/a", &["1"]);
    house.wait_until("it is in a window", |house| {
        house.pipeline.shared.rings[Lane::Batch].is_empty()
    });
    assert_eq!(house.bench.count(), 0);
    // As long as it waits, somebody is seen to look after it.
    let looked = || house.pipeline.shared.last_round_ms.load(Ordering::Relaxed);
    let before = looked();
    house.wait_until("another look", |_| looked() > before + 500);
    house.pipeline.drain();
    house.wait_until("the window", |house| house.bench.count() == 1);
    house.adds_up();
}

#[test]
fn duplicates_are_known_by_the_id_that_the_rule_names_or_by_content() {
    let house = house(PipelineConfig::default());
    let mut tap = house.pipeline.tap();
    let topic = Topic::new("once/a").unwrap();
    let treatment = tap.treatment(&topic);
    assert!(treatment.dedup && !treatment.durable);
    let mut send = |id: Option<&str>, payload: &'static str| {
        let key = tap.dedup_key(treatment, &topic, payload.as_bytes(), |name| {
            assert_eq!(name, "id");
            id.map(|id| DedupKey::of_id(&topic, id.as_bytes()))
        });
        match tap.dedup().claim(key.unwrap(), true, Instant::now()) {
            Claim::Duplicate => tap.count_duplicate(&topic, treatment),
            _ => {
                let event = Event::new(topic.clone(), payload.into(), Instant::now());
                tap.add(event, treatment);
            }
        }
        tap.flush();
    };
    send(Some("1"), "a");
    send(Some("1"), "b");
    send(Some("2"), "a");
    send(None, "a");
    send(None, "a");
    house.wait_until("three", |house| house.bench.count() == 3);
    assert_eq!(house.bench.payloads().concat(), ["a", "a", "a"]);
    assert_eq!(house.pipeline.status().lanes.transactional.deduplicated, 2);
    assert_eq!(house.pipeline.status().dedup_keys, 3);
    house.adds_up();
}

#[test]
fn while_realtime_cannot_keep_up_the_others_stand_back_and_then_go_on() {
    let house = house(PipelineConfig::default());
    *house.bench.load.lock() = Load {
        waiting: 1_000_000,
        ..Load::default()
    };
    house.send("now/a", &["r"]);
    house.wait_until("an emergency", |house| {
        *house.bench.pressure.lock() == Pressure::Emergency
    });
    assert_eq!(house.pipeline.status().pressure, Pressure::Emergency);
    assert!(!house.send("plain/a", &["t"]), "nothing is taken in");
    house.send("bulk/a", &["b"]);
    assert_eq!(house.pipeline.status().lanes.batch.shed, 1);
    assert_eq!(house.letters.list(None, 10)[0].1.reason, Reason::Shed);
    house.send("now/a", &["r"]);
    house.wait_until("realtime goes on", |house| house.bench.count() == 2);

    *house.bench.load.lock() = Load::default();
    house.wait_until("all is well", |house| {
        *house.bench.pressure.lock() == Pressure::Healthy
    });
    assert!(house.send("plain/a", &["t"]));
    house.wait_until("it", |house| house.bench.count() == 3);
    house.adds_up();
}

#[test]
fn new_rules_hold_for_what_comes_after_them() {
    let house = house(PipelineConfig::default());
    let mut tap = house.pipeline.tap();
    let topic = Topic::new("now/a").unwrap();
    assert_eq!(tap.treatment(&topic).lane, Lane::Realtime);
    let routes = &house.pipeline.shared.routes;
    routes.set_rules(Rules::default());
    assert_eq!(tap.treatment(&topic).lane, Lane::Transactional);
    assert!(tap.treatment(&topic).wanted, "the routes are as they were");
}

#[test]
fn a_rule_raises_the_lane_that_an_event_asks_for_and_never_lowers_it() {
    let house = house(PipelineConfig::default());
    let mut tap = house.pipeline.tap();
    let mut lanes = |topic: &str| {
        let treatment = tap.treatment(&Topic::new(topic.to_owned()).unwrap());
        Lane::ALL.map(|asked| treatment.asked_for(asked).lane)
    };
    assert_eq!(lanes("now/a"), [Lane::Realtime; 3]);
    let raised = [Lane::Realtime, Lane::Transactional, Lane::Transactional];
    assert_eq!(lanes("once/a"), raised);
    assert_eq!(lanes("bulk/a"), Lane::ALL);
    assert_eq!(lanes("plain/a"), Lane::ALL);
}

#[test]
fn realtime_events_come_in_batches_of_the_usual_size() {
    let house = house(PipelineConfig {
        max_batch_events: 3,
        ..PipelineConfig::default()
    });
    house.send("now/a", &["1", "2", "3", "4", "5", "6", "7"]);
    house.wait_until("all", |house| house.bench.count() == 7);
    let sizes: Vec<_> = house.bench.payloads().iter().map(Vec::len).collect();
    assert_eq!(sizes, [3, 3, 1]);
    house.adds_up();
}

#[test]
fn windows_of_large_events_close_early_rather_than_take_all_memory() {
    let house = house(PipelineConfig::default());
    let payload = "x".repeat(1 << 20);
    for number in 0..200 {
        house.send(&format!("bulk/{number}"), &[&payload]);
        let windows = || house.pipeline.shared.router.lock().windows.bytes();
        assert!(windows() <= MAX_WINDOW_BYTES + (1 << 20), "{}", windows());
    }
    house.wait_until("all", |house| house.bench.count() == 200);
    house.adds_up();
}

#[test]
fn realtime_events_for_which_the_lane_has_no_room_are_strain() {
    let house = house(PipelineConfig {
        realtime_queue_events: 4,
        ..PipelineConfig::default()
    });
    house.wait_until("strain", |house| {
        // Nobody routes meanwhile: each of these takes the place of the one before.
        let router = house.pipeline.shared.router.lock();
        for _ in 0..3 {
            house.send("now/a", &["x"; 4]);
        }
        drop(router);
        house.send("now/a", &["x"]);
        house.pipeline.pressure() == Pressure::Critical
    });
    house.wait_until("recovery", |house| {
        house.pipeline.pressure() == Pressure::Healthy
    });
    house.adds_up();
}
