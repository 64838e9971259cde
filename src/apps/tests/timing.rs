//! Clocks, random numbers and timers.

use std::time::Duration;

use super::house::*;
use crate::apps::{AppState, RestartPolicy};
use crate::event::unix_time_ns;

const LIMITS: &str = "batch_deadline_ms = 1000";

fn number(answer: &[u8]) -> u64 {
    u64::from_le_bytes(answer.try_into().unwrap())
}

fn house() -> House {
    let house = House::new();
    house.install_keeper("a", LIMITS);
    house
}

fn alarms(house: &House) -> usize {
    house.apps.control.shared.timer.alarms().len()
}

#[test]
fn an_app_can_read_the_clocks() {
    let house = house();
    let before = unix_time_ns() / 1_000_000_000;
    let answers = house.ask_for_bytes("a", &["n", "N", "n"]);
    let after = unix_time_ns() / 1_000_000_000;
    assert!(number(&answers[2]) > number(&answers[0]));
    assert!((before..=after).contains(&number(&answers[1])));
}

/// Toolchains ask for the version of WASI 0.2 that they were made with: Rust 1.95 for 0.2.4 to
/// 0.2.12.
#[test]
fn any_version_of_wasi_0_2_will_do_for_clocks_and_random_numbers() {
    let house = House::new();
    let mut component = keeper("");
    for interface in [
        "clocks/monotonic-clock",
        "clocks/wall-clock",
        "random/random",
    ] {
        let name = format!("wasi:{interface}@0.2.0").into_bytes();
        let mut found = 0;
        for at in 0..component.len() - name.len() {
            if component[at..].starts_with(&name) {
                component[at + name.len() - 1] = b'9';
                found += 1;
            }
        }
        assert!(found > 0, "{interface}");
    }
    house
        .apps
        .install(&keeper_manifest("a", ""), &component)
        .unwrap();
    assert_eq!(house.ask_for_bytes("a", &["n", "N", "r"]).len(), 3);
}

#[test]
fn an_app_gets_random_numbers_but_not_as_many_as_it_likes() {
    let house = house();
    let answers = house.ask_for_bytes("a", &["r", "r", "b", "S"]);
    assert_ne!(answers[0], answers[1]);
    assert_eq!((answers[2].len(), answers[3].len()), (16, 8));
    assert_ne!(answers[2], [0; 16]);
    house.ask("a", &["R"]);
    let info = house.eventually("a", "another try", |info| {
        info.restarts.total() > 0 && info.counters.failed == 1
    });
    let error = info.last_error.unwrap();
    assert!(
        error.contains("wanted 70000 random bytes at once, and 65536 are the most"),
        "{error}"
    );
}

#[test]
fn an_interval_comes_as_an_event_again_and_again() {
    let house = house();
    let set_at = unix_time_ns();
    assert_eq!(house.ask("a", &["tx"]), [""]);
    let info = house.eventually("a", "five of them", |info| info.counters.handled >= 6);
    assert_eq!(info.timers, 1);
    let events = house.sink.events();
    let ticks: Vec<_> = events
        .iter()
        .filter(|event| event.payload == "$timer/x")
        .collect();
    for (index, pair) in ticks.windows(2).enumerate() {
        let apart = pair[1].timestamp_ns.abs_diff(pair[0].timestamp_ns);
        assert!(apart >= 4_900_000, "{index}: {apart} ns");
    }
    let due = ticks[0].timestamp_ns;
    assert!((set_at..=unix_time_ns()).contains(&due), "{due}");
    assert_eq!(house.ask("a", &["cx"]).last().unwrap(), "1");
    assert_eq!(house.info("a").timers, 0);
    assert_eq!(alarms(&house), 0);
    assert_eq!(house.ask("a", &["cx"]).last().unwrap(), "0");
}

#[test]
fn timers_that_fire_once_come_once() {
    let house = house();
    house.ask("a", &["1x", "wy"]);
    house.eventually("a", "both", |info| info.counters.handled >= 4);
    assert_eq!((house.info("a").timers, alarms(&house)), (0, 0));
    let lines = house.sink.lines();
    for expected in ["a out $timer/x", "a out $timer/y"] {
        assert_eq!(
            lines.iter().filter(|line| *line == expected).count(),
            1,
            "{lines:?}"
        );
    }
    let wall = house
        .sink
        .events()
        .into_iter()
        .find(|event| event.payload == "$timer/y");
    assert_eq!(wall.unwrap().timestamp_ns, 1000);
}

#[test]
fn a_call_that_fails_sets_no_timer_and_cancels_none() {
    let house = house();
    house.ask("a", &["yk"]);
    // The first half goes well alone; the other one fails, and what it cancels in a call of its own
    // fails with it.
    house.ask("a", &["yx", "yz", "Eck"]);
    house.eventually("a", "the failure", |info| info.counters.failed == 1);
    assert_eq!((house.info("a").timers, alarms(&house)), (3, 1));
    assert_eq!(house.ask("a", &["cx", "cz", "ck"]), ["1", "1", "1"]);
}

#[test]
fn timers_that_may_not_be_are_refused_and_counted() {
    let house = House::new();
    house.install_keeper("a", "timers = 2");
    const INVALID_NAME: &str = "0";
    const INVALID_PERIOD: &str = "1";
    const LIMIT: &str = "2";
    assert_eq!(
        house.ask(
            "a",
            &["Tx", "y/", "y+", "yx", "yy", "yz", "yx", "cx", "yz", "yw"]
        ),
        [
            INVALID_PERIOD,
            INVALID_NAME,
            INVALID_NAME,
            "",
            "",
            LIMIT,
            "",
            "1",
            "",
            LIMIT
        ]
    );
    let info = house.info("a");
    assert_eq!((info.timers, info.counters.refused_calls.timers), (2, 5));
    assert_eq!(alarms(&house), 1, "one for all timers of an instance");
}

#[test]
fn timers_go_with_the_instance_on_every_way_out() {
    let house = House::with(|config| {
        config.restart = RestartPolicy {
            first_pause: Duration::from_millis(1),
            ..RestartPolicy::default()
        };
    });
    house.install_keeper("a", "batch_deadline_ms = 20");
    let set = || {
        house.ask("a", &["yx", "yz"]);
        assert_eq!((house.info("a").timers, alarms(&house)), (2, 1));
    };
    let gone = |why: &str| {
        house.until_state("a", AppState::Running);
        assert_eq!((house.info("a").timers, alarms(&house)), (0, 0), "{why}");
    };
    for word in ["U", "Z", "R"] {
        set();
        let failed = house.info("a").counters.failed;
        house.ask("a", &[word]);
        house.eventually("a", "the failure", |info| info.counters.failed > failed);
        gone(word);
    }
    set();
    house.apps.restart("a").unwrap();
    gone("restart");
    set();
    let upgrade = keeper_manifest("a", "").replace("1.0.0", "2.0.0");
    house.apps.install(&upgrade, &keeper("")).unwrap();
    gone("upgrade");
    set();
    house.apps.stop("a").unwrap();
    assert_eq!((house.info("a").timers, alarms(&house)), (0, 0), "stop");
    house.apps.start("a").unwrap();
    set();
    house.apps.remove("a").unwrap();
    assert_eq!(alarms(&house), 0, "remove");
}

#[test]
fn a_new_instance_sets_its_timers_in_configure() {
    let house = House::with(|config| {
        config.restart.first_pause = Duration::from_millis(1);
    });
    house
        .apps
        .install(&keeper_manifest("a", LIMITS), &keeper("txyz"))
        .unwrap();
    assert_eq!(house.info("a").timers, 2);
    house.eventually("a", "a tick", |info| info.counters.handled >= 1);
    house.ask("a", &["U"]);
    let info = house.eventually("a", "another instance", |info| {
        info.timers == 2 && info.restarts.trap >= 2
    });
    let handled = info.counters.handled;
    house.eventually("a", "a tick", |info| info.counters.handled > handled);
}

/// More timers than an app can keep up with: each has one event in the queue at most, and another
/// app does not notice.
#[test]
fn timers_never_fill_the_queue() {
    let house = House::new();
    house.install_keeper("other", LIMITS);
    let manifest = keeper_manifest(
        "a",
        "batch_deadline_ms = 2000\ntimers = 4\nqueue_events = 5",
    );
    house.apps.install(&manifest, &keeper("t1t2t3t4")).unwrap();
    house.send("a/in", &["Zx"]);
    for _ in 0..20 {
        assert_eq!(house.ask("other", &["skone", "gk"]), ["", "one"]);
        // In the call are the word and what came before it; waiting is one for each timer.
        assert!(house.info("a").counters.queued <= 1 + 4 + 4);
    }
    house.apps.remove("a").unwrap();
    assert_eq!(alarms(&house), 0);
}
