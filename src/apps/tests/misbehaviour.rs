//! Guests that do their worst: each time, the failure says whose it is and what it was, and
//! another app goes on.

use std::time::{Duration, Instant};

use super::house::*;
use crate::apps::{AppInfo, AppState, BreakerState, LogLevel};
use crate::dead_letters::Reason;
use crate::event::unix_time_ns;

/// Sends `payload` to an app beside another; returns how that app is then.
fn misbehave(payload: &str) -> (House, AppInfo) {
    misbehave_as(&manifest("culprit"), payload)
}

fn misbehave_as(manifest: &str, payload: &str) -> (House, AppInfo) {
    let house = House::new();
    house.apps.install(manifest, &guest("")).unwrap();
    house.install("other");
    house.send("culprit/in", &[payload, "same batch"]);
    house.assert_works("other");
    let info = house.until_done("culprit");
    house.assert_works("other");
    (house, info)
}

/// After a failure that costs the instance: the app comes back by itself.
fn assert_comes_back(house: &House, info: &AppInfo, expected: &str) {
    let error = info.last_error.as_deref().unwrap();
    assert!(error.contains(expected), "{error}");
    assert_eq!((info.counters.handled, info.counters.failed), (1, 1));
    let letters = house.dead_letters.list(None, 10);
    let [(_, letter)] = &letters[..] else {
        panic!("{letters:?}");
    };
    assert_eq!(
        (letter.reason, &*letter.source, letter.topic.as_str()),
        (Reason::AppFailed, "culprit", "culprit/in")
    );
    assert!(
        letter.error.as_ref().unwrap().contains(expected),
        "{letter:?}"
    );
    let log = house.apps.logs("culprit", 10).unwrap();
    assert!(
        log.iter().any(|line| line.level == LogLevel::Warn
            && line.context == "headgate"
            && line.message.contains(expected)),
        "{log:#?}"
    );
    let info = house.until_state("culprit", AppState::Running);
    // The batch, the batch again, and the half with what is to blame.
    assert_eq!((info.restarts.trap, info.restarts.failure), (3, 0));
    house.assert_works("culprit");
    let of_culprit = house.sink.lines().into_iter();
    let of_culprit: Vec<_> = of_culprit
        .filter(|line| line.starts_with("culprit"))
        .collect();
    assert_eq!(
        of_culprit,
        ["culprit culprit/in same batch", "culprit culprit/in hello"]
    );
}

#[test]
fn a_trap_costs_the_event_and_the_instance() {
    let (house, info) = misbehave("U");
    assert_comes_back(&house, &info, "`handle` trapped: wasm `unreachable`");
}

#[test]
fn a_loop_is_ended_at_the_deadline() {
    let (house, info) = misbehave("L");
    assert_comes_back(&house, &info, "`limits.batch_deadline_ms` (20)");
}

#[test]
fn growth_without_bound_is_refused() {
    let (house, info) = misbehave("G");
    assert_eq!(info.counters.refused_growth, 3);
    assert_comes_back(
        &house,
        &info,
        "wanted 65 pages of memory, and `limits.memory_pages` is 64",
    );
}

#[test]
fn a_stack_overflow_stays_inside() {
    let (house, info) = misbehave("S");
    assert_comes_back(&house, &info, "overflowed its stack of 512 KiB");
}

#[test]
fn a_result_that_blows_up_in_the_host_is_refused() {
    let (house, info) = misbehave("A");
    assert_comes_back(&house, &info, "too much data");
}

#[test]
fn an_app_that_fails_over_and_over_is_quarantined_until_somebody_starts_it() {
    let house = House::with(|config| {
        config.restart.first_pause = Duration::from_millis(1);
        config.restart.most_failures = 3;
    });
    house.install("culprit");
    house.install("other");
    // Ten open the breaker, and after each pause one more opens it again.
    for failures in 1..=12 {
        house.send("culprit/in", &["U"]);
        house.eventually("culprit", "the failure", |info| {
            info.counters.failed == failures
        });
    }
    let info = house.until_state("culprit", AppState::Quarantined);
    assert_eq!(info.restarts.failure, 2);
    assert_eq!(info.breaker, BreakerState::Open);
    let reason = info.reason.unwrap();
    assert!(
        reason.starts_with("failed too often, the last time: most of its batches fail, the last one: `handle` trapped"),
        "{reason}"
    );
    house.eventually("culprit", "no memory", |info| info.memory_pages == 0);
    let log = house.apps.logs("culprit", 100).unwrap();
    assert!(
        log.iter()
            .any(|line| line.message.contains("`headgate app start culprit`")),
        "{log:#?}"
    );
    assert!(
        house.offer("culprit/in", &["x"]).is_empty(),
        "nothing is routed to it"
    );
    house.assert_works("other");
    assert_eq!(
        house.apps.start("culprit").unwrap().state,
        AppState::Running
    );
    house.assert_works("culprit");
}

#[test]
fn publishing_a_hundred_thousand_times_meets_the_quota() {
    let patient = manifest("culprit").replace("deadline_ms = 20", "deadline_ms = 60000");
    let (house, info) = misbehave_as(&patient, "P");
    assert_eq!(info.counters.published, 4096);
    assert_eq!(info.counters.over_publish_quota, 100_000 - 4096);
    assert_eq!((info.counters.handled, info.counters.failed), (2, 0));
    let log = house.apps.logs("culprit", 100).unwrap();
    let complaints = log
        .iter()
        .filter(|l| l.message.contains("limits.publish_per_batch"));
    assert_eq!(complaints.count(), 1, "{log:#?}");
    house.assert_works("culprit");
}

#[test]
fn logging_too_much_meets_the_quota() {
    let (house, info) = misbehave("O");
    assert_eq!(info.counters.over_log_quota, 100 - 64);
    let log = house.apps.logs("culprit", 1000).unwrap();
    let own = log.iter().filter(|line| line.message == "no thanks");
    assert!(own.clone().all(|line| line.level == LogLevel::Warn));
    assert_eq!(own.count(), 64);
}

#[test]
fn an_error_from_handle_costs_the_event_and_not_the_instance() {
    let (house, info) = misbehave("E");
    assert_eq!(
        info.last_error.as_deref(),
        Some("`handle` returned an error: no thanks")
    );
    assert_eq!(
        (
            info.counters.failed,
            info.counters.handled,
            info.restarts.total()
        ),
        (1, 1, 0)
    );
    house.assert_works("culprit");
}

#[test]
fn outputs_on_topics_that_are_not_the_apps_are_denied() {
    let (house, info) = misbehave("D");
    assert_eq!((info.counters.denied, info.counters.published), (1, 1));
    let log = house.apps.logs("culprit", 100).unwrap();
    assert!(
        log.iter()
            .any(|line| line.message.contains("$SYS/not/mine")),
        "{log:#?}"
    );
}

#[test]
fn topics_beyond_the_manifest_are_denied() {
    let house = House::new();
    let mute = manifest("a").replace("\"a/#\", \"+/in\"", "\"elsewhere/#\"");
    house.apps.install(&mute, &guest("")).unwrap();
    house.send("a/in", &["x", "y"]);
    let info = house.until_done("a");
    assert_eq!((info.counters.denied, info.counters.published), (2, 0));
    assert_eq!(info.counters.handled, 2);
    assert_eq!(house.sink.len(), 0);
    let log = house.apps.logs("a", 100).unwrap();
    assert!(
        log.iter()
            .any(|line| line.message.contains("covers the topic \"a/in\"")),
        "{log:#?}"
    );
}

#[test]
fn publish_tells_the_app_why_it_was_refused() {
    let house = House::new();
    // The guest writes a + over the first character of the topic.
    let manifest = manifest("o").replace("\"o/#\"", "\"+/#\"");
    house.apps.install(&manifest, &guest("")).unwrap();
    house.send("o/in", &["W"]);
    let info = house.until_done("o");
    assert_eq!((info.counters.denied, info.counters.published), (1, 1));
    const INVALID_TOPIC: u64 = 0;
    assert_eq!(house.sink.events()[0].timestamp_ns, 1000 + INVALID_TOPIC);
}

#[test]
fn a_timestamp_of_zero_stands_for_now() {
    let house = House::new();
    house.install("a");
    let before = unix_time_ns();
    house.send("a/in", &["0"]);
    house.until_done("a");
    let event = &house.sink.events()[0];
    assert!((before..=unix_time_ns()).contains(&event.timestamp_ns));
    assert_eq!(event.hops, 1);
}

/// Installs an app whose `configure` does its worst, beside another.
fn configure_badly(configure: &str) -> AppInfo {
    let house = House::new();
    house.install("other");
    let info = house
        .apps
        .install(&manifest("culprit"), &guest(configure))
        .unwrap();
    assert_eq!((&*info.name, info.state), ("culprit", AppState::BackingOff));
    house.assert_works("other");
    house.send("culprit/in", &["waits"]);
    assert_eq!(house.info("culprit").counters.queued, 1);
    house.eventually("culprit", "another try", |info| info.restarts.failure > 0);
    assert_eq!(
        house.apps.stop("culprit").unwrap().counters.dropped.stopped,
        1
    );
    house.assert_works("other");
    info
}

#[test]
fn a_trap_in_configure_is_told_and_tried_again() {
    let reason = configure_badly("unreachable").reason.unwrap();
    assert!(
        reason.contains("`configure` trapped: wasm `unreachable`"),
        "{reason}"
    );
}

#[test]
fn a_loop_in_configure_is_ended() {
    let reason = configure_badly("(loop $ever (br $ever))").reason.unwrap();
    assert!(
        reason.contains("`configure` took more CPU time"),
        "{reason}"
    );
}

#[test]
fn an_error_from_configure_is_told() {
    let fail = "(i32.store8 (i32.const 0) (i32.const 1))
        (i32.store (i32.const 4) (i32.const 1040))
        (i32.store (i32.const 8) (i32.const 9))
        (return (i32.const 0))";
    let reason = configure_badly(fail).reason.unwrap();
    assert_eq!(reason, "`configure` returned an error: no thanks");
}

#[test]
fn a_component_that_needs_more_memory_than_its_limit_says_so() {
    let house = House::new();
    let small = manifest("a").replace("memory_pages = 64", "memory_pages = 4");
    let info = house.apps.install(&small, &guest("")).unwrap();
    let reason = info.reason.unwrap();
    assert!(
        reason.contains("wanted 8 pages of memory, and `limits.memory_pages` is 4"),
        "{reason}"
    );
}

#[test]
fn configure_reads_the_manifests_config() {
    let house = House::new();
    let greeting = format!("{}[config]\ngreeting = \"good morning\"\n", manifest("a"));
    house.apps.install(&greeting, &guest("")).unwrap();
    let log = house.apps.logs("a", 10).unwrap();
    let own: Vec<_> = log
        .iter()
        .filter(|line| line.context == "greeting")
        .collect();
    assert_eq!(own.len(), 1, "{log:#?}");
    assert_eq!(
        (own[0].level, &*own[0].message),
        (LogLevel::Info, "good morning")
    );
}

#[test]
fn calls_that_fail_late_take_a_tenth_of_a_workers_time_at_the_most() {
    let house = House::with(|config| config.workers = 1);
    let manifest = manifest("culprit").replace("batch_deadline_ms = 20", "batch_deadline_ms = 50");
    house.apps.install(&manifest, &guest("")).unwrap();
    house.install("other");
    let began = Instant::now();
    house.send("culprit/in", &["L"]);
    house.send("culprit/in", &["fine"]);
    // Meanwhile the only worker is free for others most of the time.
    let mut handled = 0;
    let info = loop {
        house.assert_works("other");
        handled += 1;
        let info = house.info("culprit");
        if info.counters.handled > 0 {
            break info;
        }
    };
    assert_eq!((info.counters.handled, info.counters.failed), (1, 1));
    // Two failures of at least 50 ms, and after each a rest that is nine times as long.
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1000), "{took:?}");
    assert!(handled > 10, "{handled}");
}

#[test]
fn while_an_app_rests_what_its_queue_has_no_room_for_is_dropped_and_nobody_waits() {
    let house = House::new();
    let manifest = manifest("culprit").replace("= 20", "= 200\nqueue_events = 2");
    house.apps.install(&manifest, &guest("")).unwrap();
    house.send("culprit/in", &["L"]);
    house.eventually("culprit", "the failure", |info| info.counters.retried == 1);
    house.send("culprit/in", &["a", "b"]);
    house.send("culprit/in", &["c"]);
    let info = house.info("culprit");
    assert_eq!(info.counters.dropped.queue_full, 1, "{info:#?}");
    house.until_done("culprit");
}

#[test]
fn an_instance_that_dies_after_a_pause_in_its_last_call_is_replaced() {
    let house = House::with(|config| config.workers = 1);
    let manifest = manifest("culprit").replace("deadline_ms = 20", "deadline_ms = 300")
        + "[restart]\nretries = 0\n";
    house.apps.install(&manifest, &guest("")).unwrap();
    // One more failure, and the breaker would open.
    for failures in 1..=9 {
        house.send("culprit/in", &["U"]);
        house.eventually("culprit", "the failure", |info| {
            info.counters.failed == failures
        });
    }
    house.until_state("culprit", AppState::Running);
    house.send("culprit/in", &["L"]);
    house.apps.pause("culprit").unwrap();
    house.apps.resume("culprit").unwrap();
    house.eventually("culprit", "the failure", |info| info.counters.failed == 10);
    house.send("culprit/in", &["hello"]);
    house.eventually("culprit", "work", |info| info.counters.handled == 1);
    // And the only worker is still there for others.
    house.install("other");
    house.assert_works("other");
}

#[test]
fn a_pause_while_it_backs_off_does_not_leave_the_breaker_open() {
    let house = House::new();
    house.install("culprit");
    house.open_breaker("culprit");
    house.apps.pause("culprit").unwrap();
    house.apps.resume("culprit").unwrap();
    house.assert_works("culprit");
    assert_eq!(house.info("culprit").breaker, BreakerState::Closed);
}
