//! Acknowledged means on disk: what the journal has, whatever happens to the gateway and the disk.

use std::collections::HashSet;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use serde_json::Value;

use crate::apps::{Package, built};
use crate::gateway::{Gateway, Home, assert_for_people, eventually};
use crate::wire::{PUBACK, SUBACK, Wire, packet, publish_packet, string, subscribe_packet};

fn home() -> Home {
    Home::new().set("journal.topics", "relay/#, plant/#")
}

/// The payloads in the journal, in the order of their sequences, and whether all of it is whole.
fn journaled(home: &Home) -> (Vec<String>, bool) {
    let payload = |record: &Value| record["payload"].as_str().unwrap().to_owned();
    let payloads = records(home).iter().map(payload).collect();
    let verified = home.command(&["journal", "verify"]).output().unwrap();
    (payloads, verified.status.success())
}

pub fn records(home: &Home) -> Vec<Value> {
    let output = home
        .command(&["journal", "tail", "-n", "10000000", "--json"])
        .output()
        .unwrap();
    // Its first file comes with the first event.
    if String::from_utf8_lossy(&output.stderr).contains("there is no journal in") {
        return Vec::new();
    }
    assert!(output.status.success(), "{output:?}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let records: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(records.is_sorted_by(|a, b| a["sequence"].as_u64() < b["sequence"].as_u64()));
    records
}

/// Publishes one message after the other until the gateway is gone. Returns those that it has acknowledged.
fn publish_until_the_end(
    gateway: &Gateway,
    topic: &str,
    client: usize,
    acknowledged: &AtomicU64,
) -> Vec<String> {
    let mut wire = Wire::connect(gateway, &format!("publisher{client}"));
    let mut done = Vec::new();
    loop {
        let payload = format!("{client}-{}", done.len());
        wire.send_while_open(&publish_packet(topic, payload.as_bytes(), 1, 7));
        match wire.next_or_end() {
            Some(packet) => assert_eq!(packet.kind(), PUBACK),
            None => return done,
        }
        done.push(payload);
        acknowledged.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn what_was_acknowledged_is_on_disk_whenever_the_gateway_is_killed() {
    let mut home = home().set("journal.segment_bytes", "65536");
    let mut all = HashSet::new();
    for round in 0..50 {
        let gateway = home.start();
        let acknowledged = AtomicU64::new(0);
        let enough = 20 + 7 * round;
        let done: Vec<_> = thread::scope(|scope| {
            let publishers: Vec<_> = (0..4)
                .map(|client| {
                    let (gateway, acknowledged) = (&gateway, &acknowledged);
                    scope.spawn(move || {
                        let client = round as usize * 4 + client;
                        publish_until_the_end(gateway, "plant/a", client, acknowledged)
                    })
                })
                .collect();
            while acknowledged.load(Ordering::SeqCst) < enough {
                thread::yield_now();
            }
            gateway.signal(libc::SIGKILL);
            publishers
                .into_iter()
                .flat_map(|one| one.join().unwrap())
                .collect()
        });
        home = gateway.kill();
        all.extend(done);
        let (payloads, whole) = journaled(&home);
        assert!(whole);
        let journaled: HashSet<_> = payloads.iter().cloned().collect();
        let lost: Vec<_> = all.difference(&journaled).collect();
        assert!(lost.is_empty(), "{lost:?}");
        // Each was sent once, so it is there once.
        assert_eq!(journaled.len(), payloads.len());
    }
}

#[test]
fn what_an_app_made_is_in_the_journal_before_what_it_was_made_from_is_finished() {
    let mut home = home().set("journal.topics", "relay/#, relayed/#");
    home.start().install(&built("relay"));
    for round in 0..20 {
        let gateway = home.start();
        let acknowledged = AtomicU64::new(0);
        thread::scope(|scope| {
            scope.spawn(|| publish_until_the_end(&gateway, "relay/a", round, &acknowledged));
            while acknowledged.load(Ordering::SeqCst) < 50 + 13 * round as u64 {
                thread::yield_now();
            }
            gateway.signal(libc::SIGKILL);
        });
        home = gateway.kill();
    }
    let gateway = home.start();
    eventually("all of it finished", || {
        let journal = gateway.json(&["journal", "stat"]);
        (journal["finished"] == journal["next"]).then_some(())
    });
    let home = gateway.terminate().home;
    let records = records(&home);
    let on = |topic: &'static str| {
        let of_topic = records
            .iter()
            .filter(move |record| record["topic"] == topic);
        of_topic.map(|record| record["payload"].as_str().unwrap())
    };
    let made: HashSet<_> = on("relayed/a").collect();
    let missing: Vec<_> = on("relay/a").filter(|one| !made.contains(one)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert!(made.len() > 20 * 50);
}

#[test]
fn the_will_of_a_client_that_stays_away_is_in_the_journal() {
    let gateway = home().start();
    let mut client = Wire::open(&gateway);
    // Version 5, a will at QoS 1; a session of 100 s, a will that waits for 1 s.
    let mut body = b"\x00\x04MQTT\x05\x0e\x00\x00".to_vec();
    body.extend(b"\x05\x11\x00\x00\x00\x64");
    body.extend(string("away"));
    body.extend(b"\x05\x18\x00\x00\x00\x01");
    body.extend([string("plant/will"), string("gone")].concat());
    client.send(&packet(0x10, &body));
    client.accepted();
    drop(client);
    eventually("the will on disk", || {
        (gateway.status()["journal"]["durable"] == 1).then_some(())
    });
    let (payloads, _) = journaled(&gateway.terminate().home);
    assert_eq!(payloads, ["gone"]);
}

#[test]
fn what_no_app_had_finished_comes_again_after_kill_9_and_what_one_had_does_not() {
    let gateway = home().start();
    gateway.install(&built("relay"));
    let (mut keeper, _) = Wire::connect_kept(&gateway, "keeper");
    keeper.subscribe("relayed/#", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("relay/a", b"finished");
    assert_eq!(keeper.next_message().payload(), b"finished");
    // Until the journal has that, too.
    eventually("the cursor on disk", || {
        (gateway.json(&["journal", "stat"])["finished"] == 1).then_some(())
    });
    gateway.json(&["app", "pause", "relay"]);
    for number in 0..50 {
        publisher.publish("relay/a", number.to_string().as_bytes());
    }
    let gateway = gateway.kill().start();
    gateway.until_logged("delivered again");
    let (mut keeper, _) = Wire::connect_kept(&gateway, "keeper");
    gateway.json(&["app", "resume", "relay"]);
    for number in 0..50 {
        assert_eq!(
            keeper.next_message().payload(),
            number.to_string().as_bytes()
        );
    }
    let gateway = gateway.terminate().home.start();
    let (mut keeper, _) = Wire::connect_kept(&gateway, "keeper");
    keeper.assert_quiet();
    assert_eq!(gateway.status()["journal"]["finished"], 51);
}

#[test]
fn an_acknowledgement_waits_for_the_journal_whatever_else_comes_in_the_same_read() {
    let gateway = home().start();
    let segment = gateway.home().first_segment();
    fs::create_dir(&segment).unwrap();
    let mut publisher = Wire::connect(&gateway, "publisher");
    let mut retained = publish_packet("other/b", b"y", 1, 8);
    retained[0] |= 1;
    let subscribe = subscribe_packet(9, &[("unrelated", 0)]);
    publisher.send(&[publish_packet("plant/a", b"x", 1, 7), subscribe, retained].concat());
    assert_eq!(publisher.next().kind(), SUBACK);
    gateway.until_logged("the journal can't be written");
    // What is retained is on disk in its order, so the first one is when the second one is.
    let mut other = Wire::connect(&gateway, "other");
    let mut retained = publish_packet("other/c", b"z", 1, 7);
    retained[0] |= 1;
    other.send(&retained);
    assert_eq!(other.next().kind(), PUBACK);
    publisher.assert_nothing_yet();
    fs::remove_dir(&segment).unwrap();
    let acknowledged = [publisher.next().kind(), publisher.next().kind()];
    assert_eq!(acknowledged, [PUBACK, PUBACK]);
}

#[test]
fn tail_shows_what_is_asked_for_in_a_form_that_loses_nothing() {
    let gateway = home().start();
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("plant/a", b"\xff\x00");
    publisher.publish("plant/b", b"text");
    publisher.publish("plant/a", b"last");
    let tail = |args: &[&str]| {
        let output = gateway.cli(&[&["journal", "tail", "--json"], args].concat());
        let lines = String::from_utf8(output.stdout).unwrap();
        let line = |line: &str| serde_json::from_str(line).unwrap();
        lines.lines().map(line).collect::<Vec<Value>>()
    };
    let of_a = tail(&["--topic", "plant/a"]);
    assert_eq!(of_a.len(), 2, "{of_a:?}");
    assert_eq!(of_a[0]["payload_base64"], "/wA=");
    assert_eq!(of_a[1]["payload"], "last");
    let last = tail(&["-n", "1"]);
    assert_eq!((last.len(), &last[0]["sequence"]), (1, &2.into()));
}

#[test]
fn an_orderly_stop_leaves_what_an_app_could_not_finish_for_the_next_start() {
    let gateway = home().set("shutdown.timeout_ms", 500).start();
    gateway.install(&built("relay"));
    gateway.json(&["app", "pause", "relay"]);
    Wire::connect(&gateway, "publisher").publish("relay/a", b"waits");
    let gateway = gateway.terminate().home.start();
    gateway.json(&["app", "resume", "relay"]);
    gateway.until_app("relay", "the event", |app| app["counters"]["handled"] == 1);
}

#[test]
fn nothing_is_acknowledged_while_the_disk_refuses_and_all_is_when_it_does_not() {
    let gateway = home().start();
    // In the place of the first segment.
    let segment = gateway.home().first_segment();
    fs::create_dir(&segment).unwrap();
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.send(&publish_packet("plant/a", b"x", 1, 7));
    gateway.until_logged("the journal can't be written");
    publisher.assert_nothing_yet();
    // Others go on.
    Wire::connect(&gateway, "other").publish("other/topic", b"y");
    assert!(gateway.status()["journal"]["error"].is_string());
    fs::remove_dir(&segment).unwrap();
    let packet = publisher.next();
    assert_eq!(packet.kind(), PUBACK);
    gateway.until_logged("the journal can be written again");
    let (payloads, whole) = journaled(gateway.home());
    assert_eq!((payloads, whole), (vec!["x".to_owned()], true));
}

#[test]
fn a_damaged_journal_is_told_of_and_the_gateway_starts() {
    let gateway = home().start();
    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..5 {
        publisher.publish("plant/a", format!("number {number}").as_bytes());
    }
    let home = gateway.terminate().home;
    let segment = home.first_segment();
    let mut bytes = fs::read(&segment).unwrap();
    let place = bytes
        .windows(8)
        .position(|window| window == b"number 2")
        .unwrap();
    bytes[place] ^= 1;
    fs::write(&segment, bytes).unwrap();
    let output = home.command(&["journal", "verify"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("4 events are whole, 1 are lost"), "{text}");
    assert!(text.contains("00000000000000000000.journal: "), "{text}");
    let gateway = home.start();
    gateway.until_logged("1 events are lost, from sequence 2 on");
    Wire::connect(&gateway, "publisher").publish("plant/a", b"new");
    let tail = gateway.cli(&["journal", "tail", "-n", "1"]);
    let text = String::from_utf8(tail.stdout).unwrap();
    assert!(text.contains("plant/a") && text.contains("new"), "{text}");
}

#[test]
fn a_gateway_without_a_journal_says_how_to_have_one() {
    let home = Home::new();
    let output = home.command(&["journal", "stat"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("journal.topics"), "{text}");
    let refusal = Home::new().set("journal.topics", "a/#/b").refusal();
    assert!(
        refusal.contains("journal.topics") && refusal.contains("a/#/b"),
        "{refusal}"
    );
}

#[test]
fn who_publishes_much_at_once_shares_the_writes() {
    let gateway = home().start();
    let mut publisher = Wire::connect(&gateway, "publisher");
    let mut packets = Vec::new();
    for id in 1..=1000 {
        packets.extend(publish_packet("plant/a", b"x", 1, id));
    }
    publisher.send(&packets);
    for id in 1..=1000 {
        let packet = publisher.next();
        assert_eq!(
            (
                packet.kind(),
                u16::from_be_bytes([packet.body[0], packet.body[1]])
            ),
            (PUBACK, id)
        );
    }
    let journal = &gateway.status()["journal"];
    assert_eq!(
        (&journal["events"], &journal["durable"]),
        (&1000.into(), &1000.into())
    );
    assert!(journal["commits"].as_u64().unwrap() < 500, "{journal}");
}

/// Exit code, standard output and standard error of `headgate journal replay ARGS`.
fn replay(home: &Home, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = home.command(&[&["journal", "replay"], args].concat());
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert_for_people(&stderr);
    (output.status.code(), stdout, stderr)
}

/// A gateway that has had `events` readings on `plant/a` and one on `plant/other`, of which an app has made
/// three times as much; and what that was, as lines.
fn with_results(events: u64) -> (Gateway, Vec<Value>) {
    let gateway = home().start();
    gateway.install(Package::multiplier("scale", "plant/a", "out/", 3).path());
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("out/#", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("plant/other", b"{\"value\":7}");
    for value in 0..events {
        publisher.publish("plant/a", format!("{{\"value\":{value}}}").as_bytes());
    }
    let results = (0..events).map(|_| {
        let message = subscriber.next_message();
        let payload = std::str::from_utf8(message.payload()).unwrap();
        serde_json::json!({ "topic": message.topic(), "payload": payload })
    });
    let results = results.collect();
    (gateway, results)
}

/// Lines of JSON, without timestamps.
fn parsed(lines: &str) -> Vec<Value> {
    let line = |line| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("timestamp_ns");
        line
    };
    lines.lines().map(line).collect()
}

#[test]
fn a_replay_shows_what_was_published_and_publishes_nothing() {
    let (gateway, results) = with_results(150);
    let before = gateway.app("scale")["counters"].clone();
    let (code, stdout, stderr) = replay(gateway.home(), &["scale"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(parsed(&stdout), results);
    let counts = "scale 1.0.0: 151 events, 1 skipped, 150 handled";
    assert!(stderr.contains(counts), "{stderr}");
    assert_eq!(gateway.app("scale")["counters"], before);
    // The timestamps are those of the journal.
    let times = |lines: &[u8]| {
        let lines = std::str::from_utf8(lines).unwrap().lines();
        let lines = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .map(|line| line["timestamp_ns"].clone())
            .collect::<Vec<_>>()
    };
    let tail = ["journal", "tail", "--json", "-n", "150"];
    assert_eq!(times(stdout.as_bytes()), times(&gateway.cli(&tail).stdout));

    // Without the gateway, from what it has left on disk, or of the same app somewhere else.
    let home = gateway.terminate().home;
    let (code, again, stderr) = replay(&home, &["scale"]);
    assert_eq!((code, &again), (Some(0), &stdout), "{stderr}");
    let package = Package::multiplier("scale", "plant/a", "out/", 3);
    let (code, again, _) = replay(&home, &["--package", package.as_str()]);
    assert_eq!((code, &again), (Some(0), &stdout));
    let (code, _, stderr) = replay(&home, &["x", "--package", package.as_str()]);
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("the package is of app scale, and not of x"),
        "{stderr}"
    );
    let (code, _, stderr) = replay(&home, &["nobody"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("no app is called \"nobody\""), "{stderr}");
}

#[test]
fn a_replay_takes_what_it_is_told_to() {
    let (gateway, results) = with_results(10);
    let home = gateway.home();
    // Sequence 0 is not for this app.
    for (args, expected) in [
        (&["--from", "3", "--to", "5"][..], &results[2..5]),
        (&["--since", "1h"], &results[..]),
        (
            &["--topic", "plant/+", "--until", "2999-01-01T00:00:00+01:00"],
            &results[..],
        ),
        (&["--from", "10", "--batch", "1"], &results[9..]),
    ] {
        let (code, stdout, stderr) = replay(home, &[&["scale"], args].concat());
        assert_eq!(
            (code, &parsed(&stdout)[..]),
            (Some(0), expected),
            "{args:?}: {stderr}"
        );
    }
    for args in [
        &["--until", "1h"][..],
        &["--from", "11"],
        &["--topic", "elsewhere/#"],
    ] {
        let (code, stdout, stderr) = replay(home, &[&["scale"], args].concat());
        assert_eq!((code, &*stdout), (Some(0), ""), "{args:?}");
        let expected = "nothing to hand over: the journal has the sequences 0 to 10";
        assert!(stderr.contains(expected), "{args:?}: {stderr}");
    }
    let (code, _, stderr) = replay(home, &["scale", "--from", "5", "--to", "4"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("--to is before --from"), "{stderr}");
    let (_, _, stderr) = replay(home, &["scale", "--json", "--from", "11"]);
    let summary: Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
    assert_eq!(summary["summary"]["events"], 0);
    let (code, _, stderr) = replay(home, &["scale", "--since", "yesterday"]);
    assert_eq!(code, Some(2));
    assert!(
        stderr.contains("yesterday") && stderr.contains("24h"),
        "{stderr}"
    );
}

#[test]
fn a_replay_says_what_another_version_would_have_done() {
    let (gateway, _) = with_results(10);
    let home = gateway.home();
    let same = Package::multiplier("scale", "plant/a", "out/", 3);
    let (code, stdout, stderr) = replay(home, &["scale", "--diff", same.as_str()]);
    assert_eq!((code, &*stdout), (Some(0), ""), "{stderr}");
    assert!(stderr.contains("differ in 0 of 1 batches"), "{stderr}");

    // Of 0, and only of that, another factor makes the same.
    let other = Package::multiplier("scale", "plant/a", "out/", 4);
    let args = ["scale", "--diff", other.as_str()];
    let (code, stdout, stderr) = replay(home, &[&args[..], &["--batch", "4"]].concat());
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stdout.starts_with("sequences 1 to 4: plant/a\n- {"),
        "{stdout}"
    );
    let lines = |sign| stdout.lines().filter(|line| line.starts_with(sign)).count();
    assert_eq!((lines('-'), lines('+')), (9, 9), "{stdout}");
    assert!(stderr.contains("differ in 3 of 3 batches"), "{stderr}");
    let one = [
        &args[..],
        &["--from", "0", "--to", "2", "--batch", "1", "--json"],
    ]
    .concat();
    let (code, stdout, stderr) = replay(home, &one);
    assert_eq!(code, Some(1), "{stderr}");
    let difference: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (&difference["first"], &difference["last"]),
        (&2.into(), &2.into())
    );
    assert_eq!(difference["topics"], serde_json::json!(["plant/a"]));
    let value = |side: &str| {
        let payload = difference[side][0]["payload"].as_str().unwrap();
        serde_json::from_str::<Value>(payload).unwrap()["value"].as_f64()
    };
    assert_eq!((value("before"), value("after")), (Some(3.0), Some(4.0)));

    // One that subscribes to more makes something of more.
    let more = Package::multiplier("scale", "plant", "out/", 3);
    let (code, stdout, _) = replay(home, &["scale", "--diff", more.as_str(), "--batch", "1"]);
    assert_eq!(code, Some(1));
    assert!(
        stdout.starts_with("sequence 0: plant/other\n+ {"),
        "{stdout}"
    );
    assert_eq!(stdout.lines().count(), 2);
}

#[test]
fn an_event_that_fails_in_one_version_is_a_difference_and_damage_does_not_end_a_replay() {
    let gateway = home().start();
    let mut publisher = Wire::connect(&gateway, "publisher");
    for payload in [&b"x"[..], b"damaged", b"E", b"y"] {
        publisher.publish("relay/in", payload);
    }
    let home = gateway.terminate().home;
    let segment = home.first_segment();
    let mut bytes = fs::read(&segment).unwrap();
    let place = bytes.windows(7).position(|window| window == b"damaged");
    bytes[place.unwrap()] ^= 1;
    fs::write(&segment, bytes).unwrap();
    let obedient = Package::self_feeding("relay");
    let args = ["--package", obedient.as_str(), "--batch", "1"];
    let (code, stdout, stderr) = replay(&home, &args);
    assert_eq!(code, Some(1));
    let payloads: Vec<_> = parsed(&stdout)
        .iter()
        .map(|line| line["payload"].clone())
        .collect();
    assert_eq!(payloads, ["x", "y"], "{stderr}");
    assert!(
        stderr.contains("1 events are lost, from sequence 1 on"),
        "{stderr}"
    );
    assert!(
        stderr.contains("sequence 2: failed: `handle` returned"),
        "{stderr}"
    );
    assert!(stderr.contains("1 events were not handled"), "{stderr}");

    let relay = built("relay");
    let diff = [
        "--diff",
        relay.to_str().unwrap(),
        "--from",
        "2",
        "--to",
        "2",
    ];
    let (code, stdout, stderr) = replay(&home, &[&args[..], &diff].concat());
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stdout.starts_with("sequence 2: relay/in\n- {\"error\":"),
        "{stdout}"
    );
    assert!(stdout.contains("\n+ {\"topic\":\"relayed/in\""), "{stdout}");
}
