//! What apps keep: it is there in the next call, for nobody else, and only if the call went well.

use std::sync::{Arc, Weak};

use super::house::*;
use crate::apps::AppState;
use crate::store::Desired;

const LIMITS: &str = "batch_deadline_ms = 1000";

fn house() -> House {
    let house = House::new();
    house.install_keeper("a", LIMITS);
    house
}

#[test]
fn what_an_app_keeps_is_there_in_the_same_call_and_in_the_next() {
    let house = house();
    assert_eq!(
        house.ask("a", &["skone", "gk", "ek", "l"]),
        ["", "one", "1", "1"]
    );
    assert_eq!(
        house.ask("a", &["gk", "dk", "gk", "ek"]),
        ["one", "", "", "0"]
    );
    assert_eq!(house.ask("a", &["gk", "l"]), ["", "0"]);
}

#[test]
fn a_number_counts_up_and_stays_a_text() {
    let house = house();
    assert_eq!(house.ask("a", &["in", "in", "gn"]), ["", "", "2"]);
    assert_eq!(
        house.ask("a", &["snx", "in"]),
        ["", "the value is no number in decimal digits"]
    );
    let most = format!("sn{}", u64::MAX);
    let answers = house.ask("a", &[&most, "in"]);
    assert!(answers[1].contains("is more than"), "{answers:?}");
}

#[test]
fn a_call_that_fails_leaves_no_trace() {
    let house = House::new();
    // After each call that runs into it, the app rests for nine times as long.
    house.install_keeper("a", "batch_deadline_ms = 300");
    // An error, a trap, a deadline. The batch is tried twice, and then its halves: of the four calls
    // with `in` or `end`, all that `in` counts is in the one that went well.
    for (round, end) in ["E", "U", "Z"].into_iter().enumerate() {
        house.ask("a", &["in", end]);
        house.eventually("a", "the failure", |info| {
            info.counters.failed == round as u64 + 1 && info.counters.queued == 0
        });
        house.until_state("a", AppState::Running);
        assert_eq!(house.ask("a", &["gn"]), [(round + 1).to_string()], "{end}");
    }
    let info = house.info("a");
    assert_eq!((info.kv.keys, info.restarts.trap), (1, 6));
}

#[test]
fn apps_and_buckets_keep_apart() {
    let house = house();
    house.install_keeper("b", LIMITS);
    house.ask("a", &["skdefault", "oother", "skother"]);
    assert_eq!(house.ask("b", &["gk", "l"]), ["", "0"]);
    assert_eq!(
        house.ask("a", &["gk", "odefault", "gk", "o", "gk", "l"]),
        ["other", "", "default", "", "default", "1"]
    );
}

#[test]
fn what_is_kept_outlives_stop_restart_upgrade_and_the_gateway_but_not_removal() {
    let house = house();
    house.ask("a", &["skone"]);
    house.apps.stop("a").unwrap();
    house.apps.start("a").unwrap();
    assert_eq!(house.ask("a", &["gk"]), ["one"]);
    house.apps.restart("a").unwrap();
    assert_eq!(house.ask("a", &["gk"]), ["one"]);
    let upgrade = keeper_manifest("a", LIMITS).replace("1.0.0", "2.0.0");
    house.apps.install(&upgrade, &keeper("")).unwrap();
    assert_eq!(house.ask("a", &["gk", "sltwo"]), ["one", ""]);
    // What nobody waited for is on disk all the same.
    let house = house.reopen(|_| {});
    house.until_state("a", AppState::Running);
    assert_eq!(house.ask("a", &["gk", "gl"]), ["one", "two"]);
    assert!(
        house
            .eventually("a", "synced", |info| info.kv.synced)
            .kv
            .bytes
            > 0
    );
    house.apps.remove("a").unwrap();
    house.install_keeper("a", LIMITS);
    assert_eq!(house.ask("a", &["gk", "l"]), ["", "0"]);
    assert_eq!(house.info("a").kv.bytes, 0);
    let house = house.reopen(|_| {});
    house.until_state("a", AppState::Running);
    assert_eq!(house.ask("a", &["l"]), ["0"]);
}

#[test]
fn inspect_says_how_much_is_kept_and_when_it_is_on_disk() {
    let house = house();
    house.ask("a", &["skone"]);
    let info = house.eventually("a", "synced", |info| info.kv.synced);
    assert_eq!(
        (info.kv.keys, info.kv.bytes),
        (1, "default\0kone".len() as u64 + 64)
    );
    let stored = store_of(&house).app_state("a").unwrap();
    assert_eq!(stored, [("default\0k".to_owned(), b"one".to_vec())]);
    assert_eq!(
        store_of(&house).apps().unwrap()[0]
            .1
            .as_ref()
            .unwrap()
            .desired,
        Desired::Running
    );
}

fn store_of(house: &House) -> crate::store::Store {
    house.apps.control.store.clone()
}

/// The word, what the error says, and the counter of it.
fn assert_refused(word: &str, expected: &str, limits: &str) -> House {
    let house = House::new();
    house.install_keeper("culprit", limits);
    house.install_keeper("other", LIMITS);
    let answers = house.ask("culprit", &[word]);
    assert!(answers[0].contains(expected), "{word}: {answers:?}");
    let log = house.apps.logs("culprit", 100).unwrap();
    assert!(
        log.iter().any(|line| line.message.contains(expected)),
        "{log:#?}"
    );
    assert_eq!(house.ask("other", &["skone", "gk"]), ["", "one"]);
    let info = house.info("culprit");
    assert_eq!((info.restarts.total(), info.state), (0, AppState::Running));
    house
}

#[test]
fn an_app_can_not_keep_more_than_its_limit() {
    let house = assert_refused("B", "`limits.kv_bytes` is reached: 1048576 bytes", LIMITS);
    let info = house.info("culprit");
    assert_eq!(info.kv.keys, 17);
    assert!(info.kv.bytes <= 1 << 20);
    assert_eq!(info.counters.refused_calls.kv_bytes, 90 - 17);
    // It can make room, and go on.
    assert_eq!(house.ask("culprit", &["d!", "snew", "gn"]), ["", "", "ew"]);
    let house = house.reopen(|_| {});
    house.until_state("culprit", AppState::Running);
    assert_eq!(house.info("culprit").kv.keys, 17);
}

#[test]
fn an_app_without_room_keeps_nothing() {
    assert_refused(
        "skone",
        "`limits.kv_bytes` is reached: 0 bytes",
        "kv_bytes = 0",
    );
}

#[test]
fn calls_beyond_the_quota_are_refused_and_counted() {
    let limits = "batch_deadline_ms = 1000\nkv_per_batch = 500";
    let house = assert_refused("Qk", "`limits.kv_per_batch` is used up", limits);
    // One was for opening the bucket.
    let refused = house.info("culprit").counters.refused_calls;
    assert_eq!(refused.kv_per_batch, 2000 - 499);
    // What is about many keys counts as many; and the next call has a quota of its own.
    for word in ["G", "W"] {
        assert_refused(word, "`limits.kv_per_batch` is used up", limits);
        let answers = house.ask("culprit", &["skone", word, "gk"]);
        assert!(answers[1].contains("kv_per_batch"), "{answers:?}");
        assert_eq!((&*answers[0], &*answers[2]), ("", "one"));
    }
}

#[test]
fn what_is_no_key_value_bucket_or_cursor_is_refused_with_the_reason() {
    for (word, expected) in [
        ("K", "a key of 300 bytes; 1 to 255 are allowed"),
        ("k", "a key of 0 bytes"),
        ("D", "a key of 0 bytes"),
        ("Vk", "a value of 65537 bytes; 65536 are the most"),
        ("oa/b", "a bucket's name has 1 to 64 of the characters"),
        ("L", "there is no cursor 99"),
        ("H", "64 handles on buckets are open"),
    ] {
        let house = assert_refused(word, expected, LIMITS);
        assert!(house.info("culprit").counters.refused_calls.kv_invalid > 0);
        assert_eq!(house.info("culprit").kv.keys, 0);
    }
    let house = house();
    let long = format!("o{}", "b".repeat(1000));
    assert!(house.ask("a", &[&long])[0].contains("a bucket's name"));
}

#[test]
fn handles_that_are_dropped_do_not_count() {
    let house = house();
    for _ in 0..5 {
        assert_eq!(house.ask("a", &["h", "skone", "gk"]), ["", "", "one"]);
    }
}

#[test]
fn an_app_has_sixteen_buckets_at_most() {
    let house = house();
    for number in 1..16 {
        let bucket = format!("ob{number}");
        assert_eq!(house.ask("a", &[&bucket, "skone"]), ["", ""]);
    }
    let answers = house.ask("a", &["oone-more"]);
    // The default bucket was opened, if not used.
    assert_eq!(answers, ["an app has 16 buckets at most"]);
    assert_eq!(house.ask("a", &["ob7", "gk"]), ["", "one"]);
}

#[test]
fn nothing_of_an_app_remains_in_the_host_when_it_is_removed() {
    let house = house();
    house.ask("a", &["skone", "tx", "mcount"]);
    let app = house.apps.control.app("a").unwrap();
    let state = app.services().state.clone();
    let weak = (Arc::downgrade(&app), Arc::downgrade(&state));
    drop((app, state));
    house.apps.remove("a").unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    let held = |weak: &(Weak<_>, Weak<_>)| weak.0.strong_count() + weak.1.strong_count();
    while held(&weak) > 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "{} still hold it",
            held(&weak)
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(house.apps.control.shared.timer.alarms().len(), 0);
    assert_eq!(store_of(&house).app_state("a").unwrap(), []);
}
