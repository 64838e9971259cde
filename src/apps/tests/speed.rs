//! Measurements, run by hand: `cargo test --release --lib speed -- --ignored --nocapture`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use std::sync::Arc;

use super::house::*;
use crate::apps::Defaults;
use crate::apps::engine::{self, EngineConfig, Instance, WasmEngine};
use crate::apps::host::{Watch, thread_cpu_time};
use crate::apps::log::AppLog;
use crate::apps::manifest::Manifest;
use crate::pipeline::Offer;

fn instance(house: &House) -> Instance {
    let compiled = engine::precompile(&guest(""), None, EngineConfig::default()).unwrap();
    // SAFETY: compiled on the line above.
    #[allow(unsafe_code)]
    let component = unsafe {
        WasmEngine::new(EngineConfig::default())
            .unwrap()
            .load(&compiled)
    }
    .unwrap();
    let manifest = Arc::new(Manifest::parse(&manifest("a"), &Defaults::new(100)).unwrap());
    let log = Arc::new(AppLog::new("a".into()));
    let services = house.apps.control.app("a").unwrap().services().clone();
    let watch = Arc::new(Watch::new(|| {}));
    Instance::start(&component, manifest, log, watch, services)
        .instance
        .unwrap()
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
        let mut instance = instance(&house);
        let call = |instance: &mut Instance| {
            black_box(instance.handle(black_box(&batch)).unwrap());
        };
        for _ in 0..1000 {
            call(&mut instance);
        }
        let rounds = 2_000_000 / size / 4;
        let began = thread_cpu_time();
        for _ in 0..rounds {
            call(&mut instance);
        }
        let each = (thread_cpu_time() - began).as_nanos() as f64 / (rounds * size) as f64;
        println!("batch {size}: {each:.0} ns/event");
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
