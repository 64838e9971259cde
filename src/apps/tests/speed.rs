//! Measurements, run by hand: `cargo test --release --lib speed -- --ignored --nocapture`.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use std::sync::Arc;

use super::house::*;
use crate::apps::Defaults;
use crate::apps::engine::{self, EngineConfig, Instance, WasmEngine};
use crate::apps::host::{Watch, thread_cpu_time};
use crate::apps::kv::AppState;
use crate::apps::log::AppLog;
use crate::apps::manifest::Manifest;
use crate::event::Event;
use crate::pipeline::Offer;

fn instance(house: &House, component: &[u8], manifest: &str) -> Instance {
    let compiled = engine::precompile(component, None, EngineConfig::default()).unwrap();
    // SAFETY: compiled above.
    #[allow(unsafe_code)]
    let component = unsafe {
        WasmEngine::new(EngineConfig::default())
            .unwrap()
            .load(&compiled)
    }
    .unwrap();
    let manifest = Arc::new(Manifest::parse(manifest, &Defaults::new(100)).unwrap());
    let log = Arc::new(AppLog::new("a".into()));
    let services = house.apps.control.app("a").unwrap().services().clone();
    let watch = Arc::new(Watch::new(|| {}));
    Instance::start(&component, manifest, log, watch, services)
        .instance
        .unwrap()
}

fn kept(house: &House) -> Arc<AppState> {
    house.apps.control.app("a").unwrap().services().state()
}

/// CPU time of a call, in nanoseconds an event.
fn each(instance: &mut Instance, house: &House, batch: &[Event]) -> f64 {
    let kept = kept(house);
    let call = |instance: &mut Instance| {
        black_box(instance.handle(black_box(batch), kept.clone()).unwrap());
    };
    for _ in 0..1000 {
        call(instance);
    }
    let rounds = 500_000 / batch.len();
    let began = thread_cpu_time();
    for _ in 0..rounds {
        call(instance);
    }
    (thread_cpu_time() - began).as_nanos() as f64 / (rounds * batch.len()) as f64
}

/// CPU time of a call into `unit-convert` as `cargo xtask apps` has built it: the SDK's part included.
#[test]
#[ignore = "a measurement"]
fn nanoseconds_per_event_of_a_sample() {
    let house = House::new();
    house.install("a");
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let sample = target.join("apps/unit-convert");
    let component = std::fs::read(sample.join("unit-convert.wasm")).unwrap();
    let manifest = std::fs::read_to_string(sample.join("manifest.toml")).unwrap();
    let payload = r#"{"seq":4,"value":212.0,"unit":"F","note":"a payload of a hundred bytes, of which these are the rest"}"#;
    for size in [1, 8, 64, 256] {
        let mut instance = instance(&house, &component, &manifest);
        let batch = batch("plant/line1/temperature_f", &vec![payload; size]);
        assert_eq!(instance.handle(&batch, kept(&house)).unwrap().len(), size);
        println!(
            "batch {size}: {:.0} ns/event",
            each(&mut instance, &house, &batch)
        );
    }
}

/// CPU time of a call into an app that returns its events, by batch size, and of the whole way through
/// queue, worker and sink at 64 events a batch.
#[test]
#[ignore = "a measurement"]
fn nanoseconds_per_event() {
    let house = House::with(|config| {
        config.workers = 1;
        config.defaults = Defaults::new(8192);
    });
    house.install("a");
    let payload = "x".repeat(100);
    for size in [1, 8, 64, 256] {
        let payloads = vec![&*payload; size];
        let batch = batch("a/in", &payloads);
        let mut instance = instance(&house, &guest(""), &manifest("a"));
        println!(
            "batch {size}: {:.0} ns/event",
            each(&mut instance, &house, &batch)
        );
    }

    let outlet = house.routes.load().outlets[0].clone();
    let payloads = vec![&*payload; 64];
    let template = batch("a/in", &payloads);
    let began = Instant::now();
    let mut sent = 0u64;
    while began.elapsed() < Duration::from_secs(1) {
        let mut next = template.clone();
        while let Offer::Full(batch) = outlet.offer(next) {
            next = batch;
            std::thread::yield_now();
        }
        sent += 64;
    }
    house.until_done("a");
    let each = began.elapsed().as_nanos() as f64 / sent as f64;
    println!("through queue and worker: {each:.0} ns/event");
}
