//! Starting, stopping, and coming back after the gateway has been away.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::house::*;
use crate::apps::{AppErrorKind, AppState, Compiler};
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
    assert_eq!((info.state, info.memory_bytes), (AppState::Stopped, 0));
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
    let house = House::new();
    house.install("a");
    house.send("a/in", &["U"]);
    house.until_state("a", AppState::BackingOff);
    let info = house.apps.restart("a").unwrap();
    assert_eq!((info.state, info.reason), (AppState::Running, None));
    house.assert_works("a");
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
        std::thread::spawn(move || apps.shutdown(Instant::now() + Duration::from_secs(30)));
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
    house.apps.shutdown(began + Duration::from_millis(50));
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    let counters = house.info("a").counters;
    assert_eq!(counters.failed + counters.dropped.stopped, 2);
    assert!(counters.failed >= 1, "the call that hung has failed");
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
