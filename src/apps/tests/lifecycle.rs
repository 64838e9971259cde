//! Starting, stopping, and coming back after the gateway has been away.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::house::*;
use crate::apps::{AppErrorKind, AppState, BreakerState, Compiler};
use crate::store::{AppRecord, ComponentId, Desired};

/// A compiler that isn't there: whoever needs it fails.
fn no_compiler(config: &mut crate::apps::AppsConfig) {
    config.compiler = Compiler::ChildProcess("/nonexistent/headgate".into());
}

#[test]
fn running_apps_run_and_stopped_apps_stay_stopped_after_a_new_start() {
    let house = House::new();
    house.install("a");
    house.install("b");
    assert_eq!(house.apps.stop("b").unwrap().state, AppState::Stopped);
    let house = house.reopen(|_| {});
    house.until_state("a", AppState::Running);
    house.assert_works("a");
    assert_eq!(house.info("b").state, AppState::Stopped);
    assert!(house.offer("b/in", &["x"]).is_empty());
    assert_eq!(house.apps.start("b").unwrap().state, AppState::Running);
    house.assert_works("b");
}

#[test]
fn stopping_finishes_what_waits_and_frees_the_instance() {
    let house = House::new();
    house.install("a");
    let gate = house.sink.gate.lock();
    for _ in 0..20 {
        house.send("a/in", &["x"; 4]);
    }
    let stopper = std::thread::spawn({
        let apps = house.apps.clone();
        move || apps.stop("a").unwrap()
    });
    drop(gate);
    let info = stopper.join().unwrap();
    assert_eq!(
        (info.counters.handled, info.counters.dropped.total()),
        (80, 0)
    );
    assert_eq!((info.state, info.memory_pages), (AppState::Stopped, 0));
}

#[test]
fn an_offer_that_comes_after_the_stop_is_counted_as_dropped() {
    let house = House::new();
    house.install("a");
    let table = house.routes.load();
    house.apps.stop("a").unwrap();
    table.outlets[0].offer(batch("a/in", &["late", "later"]));
    assert_eq!(house.info("a").counters.dropped.stopped, 2);
}

#[test]
fn restarting_makes_a_fresh_instance_and_clears_the_failures() {
    let house = House::with(|config| config.restart.first_pause = Duration::from_secs(3600));
    house.install("a");
    house.open_breaker("a");
    assert_eq!(house.info("a").breaker, BreakerState::Open);
    let info = house.apps.restart("a").unwrap();
    assert_eq!((info.state, info.reason), (AppState::Running, None));
    assert_eq!(info.breaker, BreakerState::Closed);
    house.assert_works("a");
}

#[test]
fn a_paused_app_lets_events_wait_and_handles_them_when_it_is_resumed() {
    let house = House::new();
    house.install("a");
    house.assert_works("a");
    let memory = house.info("a").memory_pages;
    let info = house.apps.pause("a").unwrap();
    assert_eq!((info.state, info.memory_pages), (AppState::Paused, memory));
    house.send("a/in", &["1", "2", "3"]);
    assert_eq!(house.info("a").counters.queued, 3);
    let error = house.apps.pause("a").unwrap_err();
    assert_eq!(error.kind(), AppErrorKind::Conflict);
    assert!(
        error.to_string().starts_with("app a is paused: "),
        "{error}"
    );

    // Also over a new start of the gateway.
    house.apps.resume("a").unwrap();
    let info = house.until_done("a");
    assert_eq!((info.state, info.restarts.total()), (AppState::Running, 0));
    assert!(house.apps.resume("a").is_err());
    house.apps.pause("a").unwrap();
    let house = house.reopen(|_| {});
    house.until_state("a", AppState::Paused);
    house.send("a/in", &["4"]);
    assert_eq!(house.info("a").counters.handled, 0);
    house.apps.resume("a").unwrap();
    assert_eq!(house.until_done("a").counters.handled, 1);
}

#[test]
fn a_paused_app_whose_queue_is_full_drops_and_counts_what_comes() {
    let house = House::new();
    house.install("a");
    house.apps.pause("a").unwrap();
    for _ in 0..30 {
        house.send("a/in", &["x"; 10]);
    }
    let counters = house.info("a").counters;
    assert_eq!((counters.queued, counters.dropped.queue_full), (100, 200));
    let info = house.apps.stop("a").unwrap();
    assert_eq!(info.state, AppState::Stopped);
    assert_eq!(info.counters.handled, 100, "stopping finishes what waits");
}

#[test]
fn a_drained_app_finishes_all_that_waits_and_stops() {
    let house = House::new();
    house.install("a");
    let gate = house.sink.gate.lock();
    for _ in 0..10 {
        house.send("a/in", &["x"; 10]);
    }
    let drainer = std::thread::spawn({
        let apps = house.apps.clone();
        move || apps.drain("a", Duration::from_secs(60)).unwrap()
    });
    house.until_state("a", AppState::Draining);
    drop(gate);
    let info = drainer.join().unwrap();
    assert!(
        house.offer("a/in", &["late"]).is_empty(),
        "nothing is routed to it"
    );
    assert_eq!(
        (
            info.state,
            info.counters.handled,
            info.counters.dropped.total()
        ),
        (AppState::Stopped, 100, 0)
    );
    assert!(house.apps.drain("a", Duration::ZERO).is_err());
    assert_eq!(house.reopen(|_| {}).info("a").state, AppState::Stopped);
}

#[test]
fn an_app_that_never_gets_done_is_stopped_when_patience_ends() {
    let house = House::new();
    let patient = manifest("a").replace("deadline_ms = 20", "deadline_ms = 60000");
    house.apps.install(&patient, &guest("")).unwrap();
    house.send("a/in", &["L"]);
    house.send("a/in", &["never handled"]);
    let info = house.apps.drain("a", Duration::from_millis(50)).unwrap();
    assert_eq!(
        (info.state, info.counters.dropped.stopped),
        (AppState::Stopped, 2)
    );
}

#[test]
fn a_removed_app_is_gone_for_good() {
    let house = House::new();
    house.install("a");
    house.apps.remove("a").unwrap();
    let error = house.apps.inspect("a").unwrap_err();
    assert_eq!(error.kind(), AppErrorKind::NotFound);
    assert!(error.to_string().contains("\"a\""), "{error}");
    for result in [
        house.apps.start("a").err(),
        house.apps.stop("a").err(),
        house.apps.remove("a").err(),
        house.apps.logs("a", 1).err(),
    ] {
        assert_eq!(result.unwrap().kind(), AppErrorKind::NotFound);
    }
    assert!(house.offer("a/in", &["x"]).is_empty());
    let compiled = fs::read_dir(house.folder.path().join("store/aot")).unwrap();
    assert_eq!(compiled.count(), 0);
    assert_eq!(house.reopen(|_| {}).apps.list(), []);
}

#[test]
fn a_second_start_needs_no_compiler() {
    let house = House::new();
    house.install("a");
    let house = house.reopen(no_compiler);
    house.until_state("a", AppState::Running);
    house.assert_works("a");
}

#[test]
fn a_tampered_compiled_component_is_not_run_but_compiled_anew() {
    let house = House::new();
    house.install("a");
    let folder = house.folder.path().join("store/aot");
    let file = fs::read_dir(folder)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let original = fs::read(&file).unwrap();
    let mut tampered = original.clone();
    let last = tampered.len() - 1;
    tampered[last] ^= 1;

    fs::write(&file, &tampered).unwrap();
    let house = house.reopen(no_compiler);
    let info = house.until_state("a", AppState::Quarantined);
    let reason = info.reason.unwrap();
    assert!(reason.contains("/nonexistent/headgate"), "{reason}");

    let house = house.reopen(|_| {});
    house.until_state("a", AppState::Running);
    house.assert_works("a");
    assert_ne!(fs::read(&file).unwrap(), tampered, "the file was replaced");
    let house = house.reopen(no_compiler);
    house.until_state("a", AppState::Running);
}

#[test]
fn an_app_whose_stored_manifest_is_broken_says_so_and_the_others_run() {
    let house = House::new();
    house.install("good");
    let folder = house.folder.clone();
    drop(house);
    let component = guest("");
    let record = AppRecord {
        manifest: "name = \"bad\"\nfuture = true\n".into(),
        component: ComponentId::of(&component),
        component_bytes: component.len() as u64,
        desired: Desired::Running,
        previous: None,
        on_trial: false,
    };
    store(folder.path())
        .put_app("bad", &record, &component)
        .unwrap();

    let house = House::at(folder, |_| {});
    house.until_state("good", AppState::Running);
    house.assert_works("good");
    let info = house.info("bad");
    assert_eq!(info.state, AppState::Quarantined);
    let reason = info.reason.unwrap();
    assert!(
        reason.contains("`future`") && reason.contains("install it again"),
        "{reason}"
    );
    assert!(
        house
            .apps
            .start("bad")
            .unwrap_err()
            .to_string()
            .contains("app bad")
    );
    house.install("bad");
    house.assert_works("bad");
}

#[test]
fn shutting_down_finishes_what_waits() {
    let house = House::new();
    house.install("a");
    let gate = house.sink.gate.lock();
    for _ in 0..20 {
        house.send("a/in", &["x"; 4]);
    }
    let apps = house.apps.clone();
    let shutdown =
        std::thread::spawn(move || apps.shutdown(Instant::now() + Duration::from_secs(30), || {}));
    drop(gate);
    shutdown.join().unwrap();
    assert_eq!(house.sink.len(), 80);
    let info = house.info("a");
    assert_eq!((info.counters.handled, info.counters.queued), (80, 0));
    let error = house.apps.stop("a").unwrap_err();
    assert_eq!(error.kind(), AppErrorKind::Unavailable);
}

#[test]
fn shutting_down_does_not_wait_for_an_app_that_hangs() {
    let house = House::new();
    let patient = manifest("a").replace("deadline_ms = 20", "deadline_ms = 60000");
    house.apps.install(&patient, &guest("")).unwrap();
    house.send("a/in", &["L"]);
    house.send("a/in", &["never handled"]);
    let began = Instant::now();
    house
        .apps
        .shutdown(began + Duration::from_millis(50), || {});
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    let counters = house.info("a").counters;
    assert_eq!((counters.failed, counters.dropped.stopped), (0, 2));
}

#[test]
fn dropping_the_last_handle_frees_the_store() {
    let house = House::new();
    house.install("a");
    let folder = house.folder.clone();
    drop(house);
    store(folder.path());
    assert_eq!(Arc::strong_count(&folder), 1);
}
