//! From one version of an app to the next, and back.

use std::thread;

use super::house::*;
use crate::apps::{AppErrorKind, AppInfo, AppState, Defaults};

/// The manifest of the next version of [`manifest`]'s app.
fn next(name: &str, keys: &str) -> String {
    let text = manifest(name).replace("1.0.0", "2.0.0");
    format!("{keys}\n{text}")
}

/// Echoes like the guest, but traps on what begins with `X`.
fn fails_with_x() -> Vec<u8> {
    let text = include_str!("guest.wat").replace("CONFIGURE", "");
    let trap = "(if (i32.eq (local.get $what) (i32.const 0x55)) (then (unreachable)))";
    assert!(text.contains(trap));
    component(&text.replace(trap, &trap.replace("0x55", "0x58")))
}

/// The keeper's next version, which keeps its state in another format.
fn keeper_v2(trial_batches: u32) -> String {
    keeper_manifest("a", "").replace("1.0.0", "2.0.0").replace(
        "[limits]",
        &format!("state_version = 2\n[upgrade]\ntrial_batches = {trial_batches}\n[limits]"),
    )
}

fn versions(info: &AppInfo) -> (&str, Option<&str>, Option<u32>) {
    let previous = info.previous_version.as_deref();
    (&info.version, previous, info.trial_batches_left)
}

fn payloads(house: &House) -> Vec<String> {
    let events = house.sink.events();
    let text = |payload: &[u8]| String::from_utf8_lossy(payload).into_owned();
    events.iter().map(|event| text(&event.payload)).collect()
}

#[test]
fn a_good_version_passes_its_trial_and_nothing_is_lost_or_handled_twice() {
    let house = House::with(|config| config.defaults = Defaults::new(100_000));
    house.install("a");
    let sent: Vec<String> = (0..2000).map(|number| format!("n{number}")).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            for payload in &sent {
                house.send("a/in", &[payload]);
            }
        });
        house.eventually("a", "some events", |info| info.counters.handled > 100);
        let info = house.apps.upgrade(&next("a", ""), &fails_with_x()).unwrap();
        assert_eq!(
            (info.version.as_str(), info.state),
            ("2.0.0", AppState::Running)
        );
    });
    house.until_done("a");
    // Batches that waited may have been put together.
    for _ in 0..10 {
        house.assert_works("a");
    }
    let info = house.info("a");
    assert_eq!(versions(&info), ("2.0.0", Some("1.0.0"), None));
    assert_eq!(info.restarts.total(), 0);
    assert_eq!(payloads(&house)[..sent.len()], sent);

    let house = house.reopen(|_| {});
    let info = house.until_state("a", AppState::Running);
    assert_eq!(versions(&info), ("2.0.0", Some("1.0.0"), None));
}

#[test]
fn a_batch_that_fails_on_trial_is_handled_by_the_version_before() {
    let house = House::new();
    house.install("a");
    house.apps.upgrade(&next("a", ""), &fails_with_x()).unwrap();
    house.assert_works("a");
    assert_eq!(versions(&house.info("a")).2, Some(9));
    house.apps.pause("a").unwrap();
    house.send("a/in", &["X1", "second"]);
    house.send("a/in", &["third"]);
    house.apps.resume("a").unwrap();
    let info = house.until_done("a");
    assert_eq!(payloads(&house), ["hello", "X1", "second", "third"]);
    assert_eq!(versions(&info), ("1.0.0", None, None));
    assert_eq!((info.restarts.rollback, info.counters.failed), (1, 0));
    let error = info.last_error.unwrap();
    assert!(error.contains("version 2.0.0 failed on trial"), "{error}");
    assert!(
        error.contains("1.0.0 is back") && error.contains("unreachable"),
        "{error}"
    );

    let house = house.reopen(|_| {});
    let info = house.until_state("a", AppState::Running);
    assert_eq!(versions(&info), ("1.0.0", None, None));
    house.assert_works("a");
}

#[test]
fn a_version_that_does_not_start_leaves_the_one_before_as_it_was() {
    let house = House::new();
    house.install("a");
    let broken = guest("(unreachable)");
    let error = house.apps.upgrade(&next("a", ""), &broken).unwrap_err();
    assert_eq!(error.kind(), AppErrorKind::Conflict);
    let message = error.to_string();
    assert!(
        message.contains("app a") && message.contains("`configure`"),
        "{message}"
    );
    let info = house.info("a");
    assert_eq!(
        (info.version.as_str(), info.state),
        ("1.0.0", AppState::Running)
    );
    house.assert_works("a");
    // Not even its component is left behind.
    let house = house.reopen(|_| {});
    assert_eq!(
        versions(&house.until_state("a", AppState::Running)),
        ("1.0.0", None, None)
    );
    house.assert_works("a");
}

#[test]
fn the_other_subscriptions_of_a_version_go_with_it() {
    let house = House::new();
    house.install("a");
    let other = next("a", "").replace("a/in", "b/in");
    house.apps.upgrade(&other, &fails_with_x()).unwrap();
    assert!(house.offer("a/in", &["nobody"]).is_empty());
    house.send("b/in", &["X"]);
    house.eventually("a", "the rollback", |info| info.restarts.rollback == 1);
    house.until_done("a");
    while !house.offer("b/in", &["nobody"]).is_empty() {
        thread::yield_now();
    }
    house.assert_works("a");
}

#[test]
fn what_is_kept_stays_in_the_same_format() {
    let house = House::new();
    house.install_keeper("a", "");
    house.ask("a", &["skone", "ik"]);
    let same = keeper_v2(3).replace("state_version = 2\n", "");
    house.apps.upgrade(&same, &keeper("sl")).unwrap();
    assert_eq!(house.ask("a", &["v", "gk", "skt"]), ["1", "one", ""]);
    house.ask("a", &["E"]);
    house.eventually("a", "the rollback", |info| info.restarts.rollback == 1);
    // What the new version did well is done.
    assert_eq!(house.ask("a", &["gk"]), ["t"]);
}

#[test]
fn another_format_is_undone_with_the_upgrade() {
    let house = House::new();
    house.install_keeper("a", "");
    house.ask("a", &["skone"]);
    // It has another key for it from now on.
    let migrating = keeper("dk");
    for end in ["E", "rollback", "reopen"] {
        house.apps.upgrade(&keeper_v2(3), &migrating).unwrap();
        assert_eq!(
            house.ask("a", &["v", "ek", "slmore"]),
            ["1", "0", ""],
            "{end}"
        );
        match end {
            "E" => {
                house.ask("a", &["E"]);
                house.eventually("a", "the rollback", |info| info.restarts.rollback > 0);
                house.until_done("a");
            }
            "rollback" => {
                let info = house.apps.rollback("a").unwrap();
                assert_eq!(versions(&info), ("1.0.0", None, None));
            }
            _ => break,
        }
        assert_eq!(
            house.ask("a", &["v", "gk", "el"]),
            ["1", "one", "0"],
            "{end}"
        );
    }
    house.eventually("a", "all on disk", |info| info.kv.synced);
    let house = house.reopen(|_| {});
    let info = house.until_state("a", AppState::Running);
    assert_eq!(versions(&info), ("2.0.0", Some("1.0.0"), Some(3)));
    assert_eq!(house.ask("a", &["v", "gl"]), ["2", "more"]);
    house.ask("a", &["E"]);
    house.eventually("a", "the rollback", |info| info.restarts.rollback == 1);
    assert_eq!(house.ask("a", &["v", "gk", "el"]), ["1", "one", "0"]);
    let info = house.eventually("a", "all on disk", |info| info.kv.synced);
    assert_eq!((info.kv.keys, versions(&info)), (1, ("1.0.0", None, None)));
}

#[test]
fn somebody_can_go_back_long_after_the_trial() {
    let house = House::new();
    house.install_keeper("a", "");
    house.ask("a", &["skone"]);
    house.apps.upgrade(&keeper_v2(1), &keeper("dk")).unwrap();
    assert_eq!(house.ask("a", &["slmore"]), [""]);
    house.eventually("a", "trust", |info| info.trial_batches_left.is_none());
    let house = house.reopen(|_| {});
    house.until_state("a", AppState::Running);
    // No trial is left to go back by itself.
    house.ask("a", &["E"]);
    assert_eq!(house.ask("a", &["v", "gl"]), ["2", "more"]);
    assert_eq!(
        versions(&house.apps.rollback("a").unwrap()),
        ("1.0.0", None, None)
    );
    assert_eq!(house.ask("a", &["v", "gk", "el"]), ["1", "one", "0"]);
    let error = house.apps.rollback("a").unwrap_err().to_string();
    assert!(error.contains("no version before this one"), "{error}");
}

#[test]
fn a_trial_of_no_batches_is_over_with_the_start() {
    let house = House::new();
    house.install("a");
    let manifest = next("a", "").replace("[limits]", "[upgrade]\ntrial_batches = 0\n[limits]");
    let info = house.apps.upgrade(&manifest, &fails_with_x()).unwrap();
    assert_eq!(versions(&info), ("2.0.0", Some("1.0.0"), None));
    house.send("a/in", &["X"]);
    let info = house.eventually("a", "the failure", |info| info.counters.failed == 1);
    assert_eq!(info.version, "2.0.0");
    let broken = manifest.replace("2.0.0", "3.0.0");
    house
        .apps
        .upgrade(&broken, &guest("(unreachable)"))
        .unwrap_err();
    assert_eq!(house.info("a").version, "2.0.0");
}

#[test]
fn a_stopped_app_stays_stopped_and_a_paused_one_paused() {
    let house = House::new();
    house.install("a");
    house.apps.stop("a").unwrap();
    let info = house.apps.upgrade(&next("a", ""), &fails_with_x()).unwrap();
    assert_eq!(
        (info.state, info.version.as_str()),
        (AppState::Stopped, "2.0.0")
    );
    house.apps.start("a").unwrap();
    house.assert_works("a");
    assert_eq!(house.info("a").trial_batches_left, Some(9));
    house.apps.pause("a").unwrap();
    let info = house.apps.rollback("a").unwrap();
    assert_eq!(
        (info.state, info.version.as_str()),
        (AppState::Paused, "1.0.0")
    );
    let info = house.apps.upgrade(&next("a", ""), &fails_with_x()).unwrap();
    assert_eq!(
        (info.state, info.version.as_str()),
        (AppState::Paused, "2.0.0")
    );
    house.send("a/in", &["X"]);
    house.apps.resume("a").unwrap();
    house.eventually("a", "the rollback", |info| info.restarts.rollback == 1);
    house.until_done("a");
    house.apps.pause("a").unwrap();
    let broken = guest("(unreachable)");
    house.apps.upgrade(&next("a", ""), &broken).unwrap_err();
    assert_eq!(house.info("a").state, AppState::Paused);
    house.apps.resume("a").unwrap();
    house.assert_works("a");
}

#[test]
fn a_quarantined_app_is_mended_by_an_upgrade() {
    let house = House::new();
    let broken = guest("(unreachable)");
    house.apps.install(&manifest("a"), &broken).unwrap();
    house.apps.upgrade(&next("a", ""), &fails_with_x()).unwrap();
    house.assert_works("a");
}

#[test]
fn of_two_upgrades_at_once_one_wins() {
    let house = House::new();
    house.install("a");
    let component = fails_with_x();
    let results = thread::scope(|scope| {
        let upgrade = |version: &str| {
            let manifest = next("a", "").replace("2.0.0", version);
            let (apps, component) = (&house.apps, &component);
            scope.spawn(move || apps.upgrade(&manifest, component))
        };
        let both = [upgrade("2.0.0"), upgrade("3.0.0")];
        both.map(|one| one.join().unwrap())
    });
    let [won, lost] = match results {
        [Ok(won), Err(lost)] | [Err(lost), Ok(won)] => [won.version, lost.to_string()],
        other => panic!("{other:?}"),
    };
    assert!(
        lost.contains("on trial still") && lost.contains("headgate app rollback"),
        "{lost}"
    );
    let info = house.info("a");
    assert_eq!(versions(&info), (won.as_str(), Some("1.0.0"), Some(10)));
}

#[test]
fn what_can_not_be_upgraded_says_why() {
    let house = House::new();
    let error = house.apps.upgrade(&manifest("a"), &guest("")).unwrap_err();
    assert_eq!(error.kind(), AppErrorKind::NotFound);
    house.install("a");
    let error = house.apps.upgrade(&manifest("a"), &guest("")).unwrap_err();
    assert!(error.to_string().contains("installed already"), "{error}");
    let error = house
        .apps
        .upgrade(&next("a", "state_version = 0"), &guest(""));
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("line 1: `state_version`: 0 is out of range"),
        "{error}"
    );
    let error = house.apps.rollback("a").unwrap_err().to_string();
    assert!(
        error.contains("app a is running") && error.contains("no version before"),
        "{error}"
    );
    house.assert_works("a");
}

#[test]
fn an_app_that_was_given_up_while_it_drained_is_upgraded_like_any_other() {
    let house = House::new();
    let fragile = manifest("a") + "[restart]\nmost_failures = 1\nretries = 0\n";
    house.apps.install(&fragile, &guest("")).unwrap();
    house.apps.pause("a").unwrap();
    for _ in 0..10 {
        house.send("a/in", &["U"]);
    }
    let drained = house.apps.drain("a", std::time::Duration::from_secs(30));
    assert_eq!(drained.unwrap().state, AppState::Quarantined);
    let info = house.apps.upgrade(&next("a", ""), &fails_with_x()).unwrap();
    assert_eq!(info.state, AppState::Running);
    house.assert_works("a");
}

#[test]
fn going_back_while_the_trial_fails_keeps_what_was_kept() {
    let house = House::new();
    house.install_keeper("a", "");
    house.ask("a", &["skone"]);
    for _ in 0..20 {
        house
            .apps
            .upgrade(&keeper_v2(3), &keeper("dk"))
            .map_err(|error| error.to_string())
            .unwrap();
        house.send("a/in", &["E"]);
        // It is back by itself, or by this.
        let _ = house.apps.rollback("a");
        house.eventually("a", "version 1", |info| info.version == "1.0.0");
        house.until_done("a");
        assert_eq!(house.ask("a", &["v", "gk"]), ["1", "one"]);
    }
    house.eventually("a", "all on disk", |info| info.kv.synced);
    let house = house.reopen(|_| {});
    house.until_state("a", AppState::Running);
    assert_eq!(house.ask("a", &["v", "gk"]), ["1", "one"]);
}
