//! A clock that somebody sets, under load and between two starts. Debian's libfaketime sets it for the gateway
//! alone, and leaves the monotonic clock as it is.

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use serde_json::Value;

use crate::access::{SECRET, hs256, logged_in, now_s};
use crate::apps::{Package, built};
use crate::gateway::{Gateway, Home, eventually};
use crate::wire::{Wire, publish_packet};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

/// What `faketime` sets for the programs that it runs.
fn library() -> String {
    let output = Command::new("faketime")
        .args(["-m", "-f", "+0", "printenv", "LD_PRELOAD"])
        .output();
    let output = output.unwrap_or_else(|error| {
        panic!(
            "these tests need faketime (on Debian, as root: apt-get install faketime; `./dev setup` does it): \
             {error}"
        )
    });
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Sets the clock of gateways of this home: so many seconds from the right time.
pub fn set_clock(home: &Home, seconds: i64) {
    let (new, file) = (home.path().join("clock.new"), home.path().join("clock"));
    fs::write(&new, format!("{seconds:+}\n")).unwrap();
    fs::rename(new, file).unwrap();
}

/// Starts a gateway whose clock is `seconds` from the right time.
pub fn start(home: &Home, seconds: i64) -> Gateway {
    set_clock(home, seconds);
    let (library, file) = (library(), home.path().join("clock"));
    let settings = [
        ("LD_PRELOAD", library.as_str()),
        ("FAKETIME_TIMESTAMP_FILE", file.to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    home.start_with(&["run"], &settings)
}

/// Events of all that goes by age would be too old after an hour.
fn home() -> Home {
    let home = Home::new()
        .set("pipeline.rules_file", "rules.toml")
        .set("journal.max_age_s", HOUR)
        .set("journal.segment_bytes", 65_536);
    let rules = "[[rule]]\ntopics = ['relay/bulk/#']\nlane = 'batch'\nwindow_age_ms = 300\n\
                 [[rule]]\ntopics = ['relay/#']\ndedup = 'content'\n";
    fs::write(home.path().join("rules.toml"), rules).unwrap();
    home
}

fn deduplicated(gateway: &Gateway) -> u64 {
    let status = gateway.status();
    let lane = &status["pipeline"]["lanes"]["transactional"];
    lane["deduplicated"].as_u64().unwrap()
}

/// How far the clock by which the last event was journaled was from the right time.
fn told_time(gateway: &Gateway) -> Option<i64> {
    let tail = gateway.cli(&["journal", "tail", "-n", "1", "--json"]);
    let last: Value = serde_json::from_slice(&tail.stdout).ok()?;
    Some(last["timestamp_ns"].as_i64()? / 1_000_000_000 - now_s() as i64)
}

/// Whether an event has just been journaled with this offset.
fn tells(gateway: &Gateway, offset: i64) -> Option<()> {
    told_time(gateway)
        .filter(|told| (told - offset).abs() < 60)
        .map(drop)
}

/// `meter-total`, publishing every second.
fn meter() -> Package {
    let folder = built("meter-total");
    let manifest = fs::read_to_string(folder.join("manifest.toml")).unwrap();
    let manifest = manifest.replace("publish_every_s = 10", "publish_every_s = 1");
    let component = fs::read(folder.join("meter-total.wasm")).unwrap();
    Package::new(&format!("component = \"app.wasm\"\n{manifest}"), component)
}

#[test]
fn a_clock_that_is_set_under_load_loses_nothing_forgets_nothing_and_stops_nothing() {
    let gateway = start(&home(), 0);
    gateway.install(&built("relay"));
    gateway.install(meter().path());
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("relayed/bulk", 0);
    let mut totals = Wire::connect(&gateway, "totals");
    totals.subscribe("totals/#", 0);
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("relay/x", b"before");
    let (acknowledged, enough) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut duplicates = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut wire = Wire::connect(&gateway, "load");
            while !enough.load(Ordering::SeqCst) {
                let number = acknowledged.load(Ordering::SeqCst);
                wire.publish("relay/x", format!("{number:0200}").as_bytes());
                acknowledged.fetch_add(1, Ordering::SeqCst);
            }
        });
        for (step, offset) in [0, -HOUR, DAY, 0].into_iter().enumerate() {
            set_clock(gateway.home(), offset);
            eventually("the clock", || tells(&gateway, offset));
            let before = acknowledged.load(Ordering::SeqCst);
            eventually("more events", || {
                (acknowledged.load(Ordering::SeqCst) >= before + 500).then_some(())
            });
            // What came before is known,
            publisher.publish("relay/x", b"before");
            publisher.publish("relay/x", format!("{before:0200}").as_bytes());
            duplicates += 1 + u64::from(before > 0);
            // windows close,
            publisher.publish("relay/bulk", step.to_string().as_bytes());
            let window = subscriber.next_message();
            assert_eq!(window.payload(), step.to_string().as_bytes());
            // and timers ring.
            publisher.publish("plant/press/count", b"1");
            let total = (step + 1).to_string();
            while totals.next_message().payload() != total.as_bytes() {}
        }
        enough.store(true, Ordering::SeqCst);
    });
    let events = 1 + acknowledged.into_inner();
    let status = gateway.assert_adds_up();
    assert_eq!(deduplicated(&gateway), duplicates);
    // The journal has all of them, each once: no segment was too old.
    let stat = gateway.json(&["journal", "stat"]);
    assert_eq!((&stat["first"], &stat["next"]), (&0.into(), &events.into()));
    assert!(stat["segments"].as_u64().unwrap() > 1, "{stat}");
    gateway.until_app("relay", "all events", |app| {
        app["counters"]["handled"] == events + 4
    });
    eventually("all finished", || {
        (gateway.json(&["journal", "stat"])["finished"] == events).then_some(())
    });
    assert!(gateway.cli(&["journal", "verify"]).status.success());
    println!(
        "{events} events and {duplicates} duplicates; {}",
        status["pipeline"]
    );
}

#[test]
fn a_clock_that_is_set_between_two_starts_costs_no_event_and_no_key_that_is_due() {
    let gateway = start(&home(), 0);
    gateway.install(&built("relay"));
    let publish = |gateway: &Gateway, payloads: &[&str]| {
        let mut publisher = Wire::connect(gateway, "publisher");
        for payload in payloads {
            publisher.publish("relay/x", payload.as_bytes());
        }
    };
    publish(&gateway, &["done"]);
    eventually("the cursor on disk", || {
        (gateway.json(&["journal", "stat"])["finished"] == 1).then_some(())
    });
    // From here on nothing is finished.
    gateway.json(&["app", "pause", "relay"]);
    publish(&gateway, &["a", "b"]);

    let gateway = start(&gateway.kill(), -HOUR);
    publish(&gateway, &["done", "a", "b", "c"]);
    assert_eq!(deduplicated(&gateway), 3, "an hour back");

    // As the clock says, `c` is an hour old; but it came after `b`.
    let gateway = start(&gateway.kill(), 0);
    publish(&gateway, &["done", "a", "b", "c", "d"]);
    assert_eq!(deduplicated(&gateway), 4, "put right");

    // Nobody can tell this from a gateway that was off for a day.
    let gateway = start(&gateway.kill(), DAY);
    publish(&gateway, &["a", "e"]);
    assert_eq!(deduplicated(&gateway), 0, "a day on");

    let gateway = start(&gateway.kill(), 0);
    publish(&gateway, &["a", "e", "f"]);
    assert_eq!(deduplicated(&gateway), 2, "put right again");
    let stat = gateway.json(&["journal", "stat"]);
    assert_eq!((&stat["next"], &stat["finished"]), (&8.into(), &1.into()));
    assert!(gateway.cli(&["journal", "verify"]).status.success());
    // a, b, c, d, a, e, f: whatever the clock said, what was not finished is there.
    gateway.json(&["app", "resume", "relay"]);
    gateway.until_app("relay", "all that was left", |app| {
        app["counters"]["handled"] == 7
    });
    eventually("all finished", || {
        (gateway.json(&["journal", "stat"])["finished"] == 8).then_some(())
    });
    gateway.assert_adds_up();
}

#[test]
fn a_token_ends_when_its_time_has_passed_whatever_the_clock_is_set_to_meanwhile() {
    let home = Home::new()
        .set("mqtt.auth.anonymous", "never")
        .set("mqtt.auth.jwt_key", "secret")
        .set("journal.topics", "#");
    fs::write(home.path().join("secret"), SECRET).unwrap();
    let gateway = start(&home, 0);
    let token = |seconds: i64| {
        let end = now_s() as i64 + seconds;
        hs256(serde_json::json!({ "sub": "press", "exp": end }))
    };
    // Tokens count for half a minute longer than they say.
    let (short, long) = (token(-26), token(HOUR));
    let mut ending = logged_in(&gateway, "ending", ("press", &short));
    let mut staying = logged_in(&gateway, "staying", ("press", &long));
    let mut publish = |offset: i64| {
        set_clock(&home, offset);
        eventually("the clock", || {
            // Of MQTT 5: without properties.
            staying.send(&publish_packet("t", b"\0x", 0, 0));
            tells(&gateway, offset)
        });
    };
    publish(-HOUR);
    // By this clock its end is an hour away; by what has passed since it was shown, it isn't.
    assert_eq!(ending.next().kind(), crate::wire::DISCONNECT);
    publish(DAY);
    staying.assert_quiet();
}
