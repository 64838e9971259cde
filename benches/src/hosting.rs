//! Measures the host of apps: calls, starts, many apps, bad neighbours.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use headgate::apps::{AppInfo, AppState, Apps, AppsConfig, Compiler};
use headgate::dead_letters::DeadLetters;
use headgate::event::{Event, Topic};
use headgate::pipeline::{NotJournaled, Offer, Outlet, Routes, Sink};
use headgate::store::{Store, StoreConfig};
use tempfile::TempDir;

use crate::contest::{RECEIVED, Side};
use crate::guest;
use crate::report::{Floor, Line, Section};
use crate::server::{Broker, Gateway, Site};
use crate::statistics::Rounds;
use crate::suite::{PAYLOAD_BYTES, Suite};
use crate::wire;

const BATCH: usize = 64;

/// Enough that whoever offers can rest without the worker running dry.
const QUEUE_EVENTS: usize = 8192;

/// As large as a component that was built in Rust with the usual libraries.
const COMPONENT_BYTES: usize = 1_300_000;

const APPS: usize = 100;

/// Events a second for a bad neighbour.
const BAD_EVENTS: u64 = 100;

/// Apps without a gateway around them.
struct House {
    apps: Apps,
    routes: Arc<Routes>,
    published: Arc<Published>,
}

/// Counts what apps publish.
#[derive(Default)]
struct Published(AtomicU64);

impl Sink for Published {
    fn publish(&self, _source: &str, events: Vec<Event>) -> Result<(), NotJournaled> {
        self.0.fetch_add(events.len() as u64, Ordering::Release);
        Ok(())
    }
}

impl House {
    fn open(folder: &Path) -> Result<House> {
        let store = Store::open(&StoreConfig {
            path: folder.to_owned(),
            map_bytes: 256 << 20,
        })?;
        let routes = Arc::<Routes>::default();
        let published = Arc::<Published>::default();
        let mut config = AppsConfig::new(folder)?;
        config.workers = 1;
        config.compiler = Compiler::InProcess;
        let apps = Apps::open(
            config,
            store,
            routes.clone(),
            published.clone(),
            Arc::new(|| {}),
            Arc::new(DeadLetters::new(Instant::now())),
        )?;
        Ok(House {
            apps,
            routes,
            published,
        })
    }

    fn outlet(&self) -> Result<Arc<dyn Outlet>> {
        let table = self.routes.load();
        table
            .outlets
            .first()
            .cloned()
            .context("the app takes nothing")
    }

    fn published(&self) -> u64 {
        self.published.0.load(Ordering::Acquire)
    }

    /// Until so many events are published.
    fn await_published(&self, events: u64) {
        while self.published() < events {
            std::hint::spin_loop();
        }
    }
}

fn batch(topic: &str) -> Result<Vec<Event>> {
    let topic = Topic::new(topic.to_owned()).context("a topic")?;
    let event = || {
        Event::new(
            topic.clone(),
            "x".repeat(PAYLOAD_BYTES).into(),
            Instant::now(),
        )
    };
    Ok((0..BATCH).map(|_| event()).collect())
}

impl Suite {
    pub(crate) fn calls(&self) -> Result<Section> {
        let relay = self.apps.join("relay");
        let read = |file| fs::read(relay.join(file)).with_context(|| format!("{file} of relay"));
        let relay = (
            String::from_utf8(read("manifest.toml")?)?,
            read("relay.wasm")?,
        );
        let echo = (
            "name = \"echo\"\nversion = \"1.0.0\"\nsubscribe = [\"relay/#\"]\npublish = [\"relay/#\"]\n"
                .to_owned(),
            guest::obedient("")?,
        );
        let floor = Floor::AtLeast(3e6);
        let mut lines = Vec::new();
        for (what, (manifest, component)) in [
            ("`relay` (Rust, SDK: columns)", relay),
            ("an echo by hand (typed `handle`)", echo),
        ] {
            let folder = TempDir::new()?;
            let house = House::open(&folder.path().join("store"))?;
            let manifest = format!("{manifest}\n[limits]\nqueue_events = {QUEUE_EVENTS}\n");
            let name = is_running(house.apps.install(&manifest, &component)?)?.name;
            let [mut calls, mut whole] = <[Rounds; 2]>::default();
            for _ in 0..self.rounds {
                let before = house.apps.inspect(&name)?.counters.handle_ns;
                let (events, took) = self.calls_flat_out(&house)?;
                let took_calls = house.apps.inspect(&name)?.counters.handle_ns - before;
                calls.push(events as f64 / took_calls as f64 * 1e9);
                whole.push(events as f64 / took.as_secs_f64());
            }
            lines.push(
                Line::new(format!("{what}: the calls alone"), "events/s", calls).with_floor(floor),
            );
            lines.push(Line::new(
                format!("{what}: from offer to hand-over"),
                "events/s",
                whole,
            ));
        }
        Ok(Section {
            title: "Calls into an app".to_owned(),
            conditions: format!(
                "In process: batches of {BATCH} events of {PAYLOAD_BYTES} B are offered flat out for {:?}; one \
                 worker thread, so one core, takes them. `relay` gives each event another topic; the echo \
                 returns them as they are. A call copies the events in, runs the handler, copies its outputs \
                 out and checks them; the other figure has the queue and the hand-over to the next one, too.",
                self.time
            ),
            lines,
        })
    }

    /// Offers batches until the time is over and all have been handled: how many events, how long.
    fn calls_flat_out(&self, house: &House) -> Result<(u64, Duration)> {
        let outlet = house.outlet()?;
        let template = batch("relay/line1/temperature")?;
        let (began, before) = (Instant::now(), house.published());
        let mut offered = before;
        while began.elapsed() < self.time {
            let mut next = template.clone();
            while let Offer::Full(refused) = outlet.offer(next) {
                next = refused;
                thread::sleep(Duration::from_micros(200));
            }
            offered += BATCH as u64;
        }
        house.await_published(offered);
        Ok((offered - before, began.elapsed()))
    }

    pub(crate) fn cold_starts(&self) -> Result<Section> {
        const STARTS: usize = 50;
        let folder = TempDir::new()?;
        let store = folder.path().join("store");
        let component = guest::obedient(&guest::ballast(COMPONENT_BYTES))?;
        let manifest =
            "name = \"a\"\nversion = \"1.0.0\"\nsubscribe = [\"in\"]\npublish = [\"in\"]\n";
        {
            let house = House::open(&store)?;
            is_running(house.apps.install(manifest, &component)?)?;
            house.apps.stop("a")?;
        }
        let first_result = |house: &House| -> Result<f64> {
            let (began, before) = (Instant::now(), house.published());
            is_running(house.apps.start("a")?)?;
            let mut event = batch("in")?;
            event.truncate(1);
            ensure!(matches!(house.outlet()?.offer(event), Offer::Taken));
            house.await_published(before + 1);
            let took = began.elapsed();
            house.apps.stop("a")?;
            Ok(took.as_secs_f64() * 1e3)
        };
        let [mut cold, mut again, mut replaced] = <[Rounds; 3]>::default();
        for _ in 0..self.rounds {
            let [mut first_times, mut again_times, mut times] = <[Rounds; 3]>::default();
            for _ in 0..10 {
                let house = House::open(&store)?;
                first_times.push(first_result(&house)?);
                again_times.push(first_result(&house)?);
            }
            cold.push(first_times.median());
            again.push(again_times.median());
            let house = House::open(&store)?;
            for _ in 0..STARTS {
                let seconds = house.apps.restart("a")?.cold_start_seconds;
                times.push(seconds.context("it was started")? * 1e6);
            }
            replaced.push(times.median());
            house.apps.stop("a")?;
        }
        Ok(Section {
            title: "Starts of an app".to_owned(),
            conditions: format!(
                "In process, with a component of {} bytes. From `start` of a stopped app, whose compiled code is \
                 in the cache, to its first result: load, make and configure an instance, one event, with the \
                 record of the start on disk; the median of 10 in each round. The first start since the gateway \
                 began reads the code and checks its seal; what has run lately is in memory still. Replaced: an \
                 instance is made and configured, the median of {STARTS}.",
                component.len()
            ),
            lines: vec![
                Line::new("first start to first result", "ms", cold),
                Line::new("start to first result", "ms", again).with_floor(Floor::AtMost(2.0)),
                Line::new("instance replaced", "µs", replaced).with_floor(Floor::AtMost(100.0)),
            ],
        })
    }

    pub(crate) fn hundred_apps(&self) -> Result<Section> {
        let site = Site::new(&self.gateway)?;
        let gateway = site.start()?;
        for copy in 0..APPS {
            let copied = self.copied_app(copy)?;
            gateway.install(copied.path())?;
        }
        gateway.stop()?;
        let [mut ready, mut memory] = <[Rounds; 2]>::default();
        for _ in 0..self.rounds {
            let gateway = site.start()?;
            ready.push(gateway.ready_after.as_secs_f64() * 1e3);
            self.await_copies(&gateway, APPS)?;
            memory.push(gateway.resident_bytes()? as f64 / 1e6);
            gateway.stop()?;
        }
        Ok(Section {
            title: format!("{APPS} apps"),
            conditions: format!(
                "A gateway with {APPS} copies of `unit-convert`, each with a name and an instance of its own; \
                 from the start of the process to the first 200 from `/readyz`, and VmRSS after each has \
                 answered."
            ),
            lines: vec![
                Line::new("ready", "ms", ready).with_floor(Floor::AtMost(1000.0)),
                Line::new("resident memory", "MB", memory).with_floor(Floor::AtMost(100.0)),
            ],
        })
    }

    /// A good app flat out, alone and beside a bad one, in turns.
    pub(crate) fn neighbours(&self) -> Result<Section> {
        const BAD: [(&str, &str); 6] = [
            ("loops for ever", "L"),
            ("grows without bound", "G"),
            ("overflows its stack", "S"),
            ("traps", "U"),
            ("floods with refused outputs", "P"),
            ("returns errors", "E"),
        ];
        let package = TempDir::new()?;
        let manifest = "name = \"bad\"\nversion = \"1.0.0\"\ncomponent = \"bad.wasm\"\n\
                        subscribe = [\"bad/in\"]\npublish = [\"bad/out\"]\n";
        fs::write(package.path().join("manifest.toml"), manifest)?;
        fs::write(package.path().join("bad.wasm"), guest::obedient("")?)?;
        let alone_site = Site::new(&self.gateway)?;
        let alone = self.with_converting_app(&alone_site)?;
        let mut lines = Vec::new();
        for (what, order) in BAD {
            let site = Site::new(&self.gateway)?;
            let gateway = self.with_converting_app(&site)?;
            gateway.install(package.path())?;
            let [mut ratio, mut lost] = <[Rounds; 2]>::default();
            for _ in 0..self.rounds {
                let mut sides = <[Side; 2]>::default();
                sides[0].add(self.app_load(&alone).run()?);
                let outcome = beside(&gateway, order, || self.app_load(&gateway).run())?;
                sides[1].add(outcome);
                ratio.push(sides[1].per_second.median() / sides[0].per_second.median());
                lost.push(sides[1].lost.sum());
            }
            lines.push(
                Line::new(
                    format!("beside one that {what}: {RECEIVED}"),
                    "× alone",
                    ratio,
                )
                .with_floor(Floor::AtLeast(0.9)),
            );
            let all: Rounds = [lost.sum()].into_iter().collect();
            lines.push(
                Line::new(
                    format!("beside one that {what}: lost"),
                    "events in all rounds",
                    all,
                )
                .with_floor(Floor::AtMost(0.0)),
            );
            gateway.stop()?;
        }
        alone.stop()?;
        Ok(Section {
            title: "Bad neighbours".to_owned(),
            conditions: format!(
                "As through a WASM app, {:?} each, beside an app that gets {BAD_EVENTS} events a second and \
                 does its worst with each, with default limits, on the same 2 cores; taking turns with a \
                 gateway that has the good app alone.",
                self.time
            ),
            lines,
        })
    }
}

fn is_running(app: AppInfo) -> Result<AppInfo> {
    ensure!(app.state == AppState::Running, "{app:#?}");
    Ok(app)
}

/// Runs `load` while the bad app gets its orders.
fn beside<T>(gateway: &Gateway<'_>, order: &str, load: impl FnOnce() -> Result<T>) -> Result<T> {
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        let orders = scope.spawn(|| -> Result<()> {
            let mut publisher = wire::connect(&gateway.endpoint(), "orders")?;
            let (frame, ..) = wire::publish("bad/in", 0, order.as_bytes());
            while !ends.load(Ordering::Relaxed) {
                publisher.write_all(&frame)?;
                thread::sleep(Duration::from_secs(1) / BAD_EVENTS as u32);
            }
            Ok(())
        });
        let outcome = load();
        ends.store(true, Ordering::Relaxed);
        orders.join().expect("it does not panic")?;
        outcome
    })
}
