//! What a manifest, or the gateway for all manifests, can set.

use std::fs;
use std::time::{Duration, Instant};

use super::house::*;
use crate::apps::{AppState, Defaults, EngineConfig};

fn with_limits(name: &str, limits: &str) -> String {
    let mut manifest = manifest(name);
    for line in limits.lines() {
        let key = line.split(' ').next().unwrap();
        manifest = manifest
            .lines()
            .filter(|line| !line.starts_with(key))
            .fold(String::new(), |text, line| text + line + "\n");
    }
    manifest + limits + "\n"
}

#[test]
fn what_the_queue_has_no_room_for_is_dropped_from_the_end_that_the_manifest_names() {
    for (queue_full, came) in [
        ("drop-newest", ["1", "2", "3", "4"]),
        ("drop-oldest", ["3", "4", "5", "6"]),
    ] {
        let house = House::new();
        let limits = format!("queue_events = 4\nqueue_full = \"{queue_full}\"");
        let manifest = with_limits("a", &limits);
        house.apps.install(&manifest, &guest("")).unwrap();
        house.apps.pause("a").unwrap();
        for number in ["1", "2", "3", "4", "5", "6"] {
            house.send("a/in", &[number]);
        }
        house.apps.resume("a").unwrap();
        let info = house.until_done("a");
        let came = came.map(|number| format!("a a/in {number}"));
        assert_eq!(house.sink.lines(), came, "{queue_full}");
        assert_eq!(info.counters.dropped.queue_full, 2, "{queue_full}");
        assert_adds_up(&info);
    }
}

#[test]
fn an_instance_that_is_worn_is_replaced() {
    for (recycle, payload, failed) in [("max_uses = 3", "x", 0), ("max_failures = 3", "E", 3)] {
        let house = House::new();
        // After an error it would be tried again, which counts, too.
        let manifest = manifest("a") + "[restart]\nretries = 0\n[recycle]\n" + recycle + "\n";
        house.apps.install(&manifest, &guest("")).unwrap();
        for number in 1..=2 {
            house.send("a/in", &[payload]);
            let info = house.eventually("a", "the call", |info| info.counters.batches == number);
            assert_eq!(info.restarts.recycle, 0, "{recycle}");
        }
        house.send("a/in", &[payload]);
        let info = house.eventually("a", "a fresh instance", |info| info.restarts.recycle == 1);
        assert_eq!(info.counters.failed, failed, "{recycle}");
        house.until_state("a", AppState::Running);
        house.assert_works("a");
    }
}

#[test]
fn the_gateway_can_set_how_long_an_instance_is_used() {
    let house = House::with(|config| config.defaults.max_uses = Some(1));
    house.install("a");
    house.send("a/in", &["x"]);
    house.eventually("a", "a fresh instance", |info| info.restarts.recycle == 1);
    house.assert_works("a");
}

/// A component whose core module has this beside what an app needs.
fn with_code(code: &str) -> Vec<u8> {
    let text = include_str!("guest.wat").replace("CONFIGURE", "");
    component(&format!(
        "{}\n{code})",
        text.trim_end().strip_suffix(')').unwrap()
    ))
}

#[test]
fn tables_and_instances_have_limits() {
    let large = with_code("(table 200 funcref)");
    for (limits, component, expected) in [
        ("table_elements = 100", &large, "wanted tables of 20"),
        ("instances = 1", &guest(""), "`limits.instances` (1)"),
    ] {
        let house = House::new();
        let info = house
            .apps
            .install(&with_limits("a", limits), component)
            .unwrap();
        let reason = info.reason.unwrap_or_default() + &info.last_error.unwrap_or_default();
        assert_ne!(info.state, AppState::Running, "{limits}");
        assert!(
            reason.contains("can't be instantiated"),
            "{limits}: {reason}"
        );
        assert!(reason.contains(expected), "{limits}: {reason}");
    }
    let house = House::new();
    let enough = with_limits("a", "table_elements = 1000");
    house.apps.install(&enough, &large).unwrap();
    house.assert_works("a");
}

#[test]
fn weight_decides_who_gets_more_of_a_worker() {
    const EVENTS: usize = 1000;
    let house = House::with(|config| {
        config.workers = 1;
        config.max_batch_events = 1;
        config.defaults = Defaults::new(2 * EVENTS);
    });
    for (name, weight) in [("light", 10), ("heavy", 1000)] {
        let manifest = with_limits(name, &format!("weight = {weight}"));
        house.apps.install(&manifest, &guest("")).unwrap();
    }
    {
        let _worker_waits = house.sink.gate.lock();
        for _ in 0..EVENTS {
            house.send("light/in", &["x"]);
            house.send("heavy/in", &["x"]);
        }
    }
    house.until_done("heavy");
    house.until_done("light");
    let lines = house.sink.lines();
    let last_heavy = lines.iter().rposition(|line| line.starts_with("heavy"));
    let light = lines[..last_heavy.unwrap()].iter();
    let light = light.filter(|line| line.starts_with("light")).count();
    // By weight it would be 10; a call that is interrupted costs its app many turns.
    assert!(light < EVENTS / 4, "{light}");
}

#[test]
fn a_gateway_without_simd_refuses_what_needs_it() {
    let simd = with_code("(func (result v128) (v128.const i32x4 1 2 3 4))");
    let house = House::with(|config| {
        config.engine = EngineConfig {
            simd: false,
            ..EngineConfig::default()
        }
    });
    let error = house
        .apps
        .install(&manifest("a"), &simd)
        .unwrap_err()
        .to_string();
    assert!(error.to_lowercase().contains("simd"), "{error}");
    house.install("b");
    let house = House::new();
    house.apps.install(&manifest("a"), &simd).unwrap();
    house.assert_works("a");
}

#[test]
fn a_gateway_without_a_cache_keeps_nothing_compiled() {
    let house = House::with(|config| config.aot_cache = false);
    house.install("a");
    house.apps.restart("a").unwrap();
    let files = fs::read_dir(house.folder.path().join("store/aot"));
    assert_eq!(files.unwrap().count(), 0);
    let house = house.reopen(|config| config.aot_cache = false);
    house.until_state("a", AppState::Running);
    house.assert_works("a");
}

#[test]
fn a_start_that_takes_longer_than_the_target_is_in_the_log() {
    for (target, expected) in [
        (Duration::from_nanos(1), true),
        (Duration::from_secs(3600), false),
    ] {
        let house = House::with(|config| config.cold_start_target = Some(target));
        house.install("a");
        // Either that it runs, or that it runs and took long; a moment after it does.
        let deadline = Instant::now() + Duration::from_secs(30);
        let log = loop {
            let log = house.apps.logs("a", 10).unwrap();
            if log.len() > 1 {
                break log;
            }
            assert!(Instant::now() < deadline, "{log:#?}");
            std::thread::yield_now();
        };
        let told = log
            .iter()
            .any(|line| line.message.contains("`apps.cold_start_target_ms`"));
        assert_eq!(told, expected, "{log:#?}");
    }
}

#[test]
fn a_manifest_that_says_nothing_gets_the_gateways_limits() {
    let house = House::with(|config| {
        config.defaults.limits.memory_pages = 77;
        config.defaults.limits.batch_deadline_ms = 33;
    });
    let manifest =
        "name = \"a\"\nversion = \"1.0.0\"\nsubscribe = [\"a/in\"]\npublish = [\"a/#\"]\n";
    let info = house.apps.install(manifest, &guest("")).unwrap();
    assert_eq!(
        (info.limits.memory_pages, info.limits.batch_deadline_ms),
        (77, 33)
    );
    house.send("a/in", &["L"]);
    house.until_done("a");
    let error = house.info("a").last_error.unwrap();
    assert!(error.contains("`limits.batch_deadline_ms` (33)"), "{error}");
}

#[test]
fn an_app_that_is_refused_much_rests() {
    let house = House::with(|config| config.workers = 1);
    house
        .apps
        .install(
            &with_limits("culprit", "batch_deadline_ms = 10000"),
            &guest(""),
        )
        .unwrap();
    let began = Instant::now();
    // A hundred thousand events that it may not publish.
    house.send("culprit/in", &["P"]);
    house.eventually("culprit", "the flood", |info| info.counters.batches == 1);
    let info = house.info("culprit");
    assert!(info.counters.over_publish_quota > 1000, "{info:#?}");
    let call = Duration::from_nanos(info.counters.handle_ns);
    assert!(call > Duration::from_millis(1), "{call:?}");
    house.send("culprit/in", &["x"]);
    house.eventually("culprit", "the next call", |info| {
        info.counters.batches == 2
    });
    // The call, and nine times as long after it.
    assert!(
        began.elapsed() >= 10 * call,
        "{:?} for {call:?}",
        began.elapsed()
    );
}

#[test]
fn a_pool_bounds_the_instances_and_gives_them_back() {
    let house = House::with(|config| config.engine.pool_instances = 2);
    house.install("a");
    house.install("b");
    let info = house.apps.install(&manifest("c"), &guest("")).unwrap();
    let error = info.last_error.unwrap();
    assert!(error.contains("`apps.pool_instances`"), "{error}");
    // Whose memory it gets, it does not see: each begins anew.
    for _ in 0..10 {
        house.apps.restart("a").unwrap();
        house.assert_works("a");
    }
    house.apps.stop("b").unwrap();
    house.apps.start("c").unwrap();
    house.assert_works("c");
    house.assert_works("a");
}
