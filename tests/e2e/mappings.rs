//! Mappings, as their users have them.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use serde_json::Value;

use crate::gateway::{Gateway, Home, assert_for_people, eventually};
use crate::mosquitto;
use crate::wire::{PUBACK, Wire, publish_packet};

const RAW: &str = "umh/v1/corpA/plant-A/aawd/_raw";
const PUMP: &str = "umh/v1/corpA/plant-A/aawd/_pump_v1";

/// A file with these lines as its mapping, over the sources press, temp and line.
fn file(home: &Home, name: &str, mapping: &[&str]) -> PathBuf {
    let path = home.path().join(name);
    let sources = ["press", "temp", "line"]
        .map(|alias| format!("    {alias}: umh.v1.corpA.plant-A.aawd._raw.{alias}\n"));
    let mapping: String = mapping.iter().map(|line| format!("    {line}\n")).collect();
    let text = format!(
        "stream_processor:\n  mode: timeseries\n  model: {{ name: pump, version: v1 }}\n  \
         output_topic: umh.v1.corpA.plant-A.aawd\n  sources:\n{}  mapping:\n{mapping}",
        sources.concat()
    );
    fs::write(&path, text).unwrap();
    path
}

fn install(gateway: &Gateway, name: &str, mapping: &[&str]) -> Value {
    let path = file(gateway.home(), &format!("{name}.yaml"), mapping);
    gateway.json(&["mapping", "install", path.to_str().unwrap()])
}

fn payload(value: &str) -> String {
    format!(r#"{{"value":{value},"timestamp_ms":1700000000000}}"#)
}

fn publish(gateway: &Gateway, source: &str, value: &str) {
    let topic = format!("{RAW}/{source}");
    mosquitto::publish(gateway, &["-q", "1", "-t", &topic, "-m", &payload(value)]);
}

/// `PATH VALUE` of the next message.
fn next(subscriber: &mosquitto::Subscriber) -> String {
    let line = subscriber.line();
    let (topic, payload) = line.split_once(' ').unwrap();
    let path = topic.strip_prefix(PUMP).unwrap().trim_start_matches('/');
    let payload: Value = serde_json::from_str(payload).unwrap();
    assert_eq!(payload["timestamp_ms"], 1_700_000_000_000_u64);
    format!("{path} {}", payload["value"])
}

fn subscribe(gateway: &Gateway) -> mosquitto::Subscriber {
    mosquitto::subscribe(gateway, &["-v", "-t", &format!("{PUMP}/#")])
}

fn why(gateway: &Gateway, path: &str) -> Value {
    gateway.json(&["why", &format!("mapping/{path}")])[0].clone()
}

#[test]
fn values_go_in_over_mqtt_and_what_the_expressions_make_of_them_comes_out_in_the_order_of_the_file()
{
    let gateway = Home::new().start();
    install(
        &gateway,
        "pump",
        &[
            "pressure: press + 4.00001",
            "motor: { rpm: press / 4, state: 'press > 10 ? \"high\" : \"low\"' }",
            "serial: '\"SN-1\"'",
            "both: press + temp",
        ],
    );
    let subscriber = subscribe(&gateway);
    publish(&gateway, "press", "12.5");
    let got: Vec<_> = (0..4).map(|_| next(&subscriber)).collect();
    let wanted = [
        "serial \"SN-1\"",
        "pressure 16.50001",
        "motor/rpm 3.125",
        "motor/state \"high\"",
    ];
    assert_eq!(got, wanted);
    assert_eq!(why(&gateway, "pump/both")["state"], "waits for temp");
    publish(&gateway, "temp", "1");
    assert_eq!(next(&subscriber), "serial \"SN-1\"");
    assert_eq!(next(&subscriber), "both 13.5");
    let both = why(&gateway, "both");
    assert_eq!(both["state"], "emitted");
    assert_eq!(both["last"]["inputs"][0]["value"], "12.5");
    let topic = gateway.json(&["why", &format!("{RAW}/press")]);
    assert_eq!(topic["mappings"][0], "pump");
    let counters = gateway.json(&["mapping", "inspect", "pump"])["counters"].clone();
    assert_eq!(counters["outputs_generated"], 6);
    let (_, metrics) = gateway.http("/metrics");
    let counted = "headgate_mapping_outputs_generated_total{mapping=\"pump\"} 6";
    assert!(metrics.contains(counted), "{metrics}");
    gateway.assert_adds_up();
}

#[test]
fn a_mapping_that_replaces_another_one_goes_on_with_its_values() {
    let gateway = Home::new().start();
    install(&gateway, "pump", &["sum: press + temp"]);
    let subscriber = subscribe(&gateway);
    publish(&gateway, "press", "1");
    install(&gateway, "pump", &["sum: press * 10 + temp"]);
    publish(&gateway, "temp", "5");
    assert_eq!(next(&subscriber), "sum 15");
    gateway.json(&["mapping", "remove", "pump"]);
    publish(&gateway, "temp", "6");
    install(&gateway, "pump", &["sum: press + temp"]);
    // Forgotten with it.
    assert_eq!(why(&gateway, "pump/sum")["state"], "waits for press, temp");
    gateway.assert_adds_up();
}

#[test]
fn values_outlive_a_restart_and_kill_9() {
    let gateway = Home::new().start();
    install(&gateway, "pump", &["sum: press + temp"]);
    publish(&gateway, "press", "1");
    // Handled, and not written yet: an orderly end writes it.
    let gateway = gateway.terminate().home.start();
    let subscriber = subscribe(&gateway);
    publish(&gateway, "temp", "5");
    assert_eq!(next(&subscriber), "sum 6");
    drop(subscriber);
    let home = gateway.kill().set("journal.topics", "umh/#");
    let gateway = home.start();
    publish(&gateway, "temp", "7");
    // It is in the journal, so it need not be written for it to be there again.
    let gateway = gateway.kill().start();
    gateway.until_logged("delivered again");
    eventually("the value", || {
        let sum = why(&gateway, "pump/sum");
        (sum["sources"][1]["value"] == "7").then_some(())
    });
    gateway.assert_adds_up();
}

#[test]
fn for_each_event_of_the_journal_what_was_made_of_it_is_there_whenever_the_gateway_is_killed() {
    let mut home = Home::new().set("journal.topics", "umh/#");
    install(&home.start(), "pump", &["copy: press"]);
    for round in 0..20 {
        let gateway = home.start();
        let acknowledged = AtomicU64::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut wire = Wire::connect(&gateway, "publisher");
                loop {
                    let number = acknowledged.load(Ordering::SeqCst);
                    let payload = payload(&format!("{}", round * 100_000 + number));
                    let topic = format!("{RAW}/press");
                    wire.send_while_open(&publish_packet(topic, payload.as_bytes(), 1, 7));
                    match wire.next_or_end() {
                        Some(packet) => assert_eq!(packet.kind(), PUBACK),
                        None => return,
                    }
                    acknowledged.fetch_add(1, Ordering::SeqCst);
                }
            });
            while acknowledged.load(Ordering::SeqCst) < 30 + 11 * round {
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
    let output = home
        .command(&["journal", "tail", "-n", "1000000", "--json"])
        .output()
        .unwrap();
    let records: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let on = |topic: String| -> HashSet<String> {
        let of_topic = records
            .iter()
            .filter(|record| record["topic"] == topic.as_str());
        of_topic
            .map(|record| record["payload"].as_str().unwrap().to_owned())
            .collect()
    };
    let (read, made) = (on(format!("{RAW}/press")), on(format!("{PUMP}/copy")));
    let missing: Vec<_> = read.difference(&made).collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert!(made.len() > 20 * 30);
}

#[test]
fn a_payload_that_is_none_is_a_dead_letter_and_the_next_one_goes_through() {
    let gateway = Home::new().start();
    install(&gateway, "pump", &["copy: press"]);
    let subscriber = subscribe(&gateway);
    let topic = format!("{RAW}/press");
    mosquitto::publish(&gateway, &["-t", &topic, "-m", "12.5"]);
    publish(&gateway, "press", "2");
    assert_eq!(next(&subscriber), "copy 2");
    let letters = gateway.json(&["dead-letters", "list"])["letters"].clone();
    assert_eq!(letters[0]["reason"], "unreadable");
    assert_eq!(letters[0]["topic"], topic.as_str());
    let counters = gateway.json(&["mapping", "inspect", "pump"])["counters"].clone();
    assert_eq!(counters["invalid_data_type"], 1);
}

#[test]
fn an_expression_that_never_ends_is_stopped_and_named_and_holds_up_nobody_for_long() {
    let gateway = Home::new().start();
    install(
        &gateway,
        "endless",
        &["loop: '[1].map(x => { for (;;) press })'"],
    );
    install(&gateway, "pump", &["copy: press"]);
    let subscriber = subscribe(&gateway);
    for number in 0..200 {
        publish_fast(&gateway, number);
    }
    for number in 0..200 {
        assert_eq!(next(&subscriber), format!("copy {number}"));
    }
    let stopped = why(&gateway, "endless/loop");
    let state = stopped["state"].as_str().unwrap();
    assert!(state.contains("50ms"), "{state}");
    gateway.assert_adds_up();
}

fn publish_fast(gateway: &Gateway, number: u32) {
    let mut wire = Wire::connect(gateway, "fast");
    wire.publish(
        &format!("{RAW}/press"),
        payload(&number.to_string()).as_bytes(),
    );
}

#[test]
fn mappings_that_feed_each_other_come_to_an_end() {
    let home = Home::new();
    let gateway = home.start();
    let path = home.path().join("loop.yaml");
    let mut publisher = Wire::connect(&gateway, "publisher");
    for (number, late) in ["accept", "reorder, reorder_window: 1ms"]
        .iter()
        .enumerate()
    {
        let text = format!(
            "stream_processor:\n  mode: timeseries\n  model: {{ name: pump, version: v1 }}\n  \
             output_topic: umh.v1.corpA.plant-A.aawd\n  sources:\n    again: \
             umh.v1.corpA.plant-A.aawd._pump_v1.again\n  mapping:\n    again: again + 1\n  \
             headgate: {{ late: {late} }}\n"
        );
        fs::write(&path, text).unwrap();
        gateway.json(&["mapping", "install", path.to_str().unwrap()]);
        publisher.publish(&format!("{PUMP}/again"), payload("0").as_bytes());
        eventually("the end of the loop", || {
            let letters = gateway.json(&["dead-letters"])["letters"].clone();
            (letters[number]["reason"] == "looped").then_some(())
        });
    }
    gateway.assert_adds_up();
}

#[test]
fn a_message_that_waits_for_earlier_ones_is_lost_by_no_new_version_and_by_no_end() {
    const PATIENT: &[&str] = &[
        "copy: press",
        "# Behind the mapping.",
        "\n  headgate: { late: reorder, reorder_window: 60s }",
    ];
    let home = Home::new().set("journal.topics", "umh/#");
    let gateway = home.start();
    install(&gateway, "pump", PATIENT);
    publish(&gateway, "press", "1");
    install(&gateway, "pump", PATIENT);
    let counted = |gateway: &Gateway| gateway.status()["mappings"]["handled"].clone();
    eventually("the first", || (counted(&gateway) == 1).then_some(()));
    assert_eq!(why(&gateway, "pump/copy")["last"], Value::Null);
    // At the end it waits no longer.
    let gateway = gateway.terminate().home.start();
    let values = |gateway: &Gateway| why(gateway, "pump/copy")["sources"][0]["value"].clone();
    assert_eq!(values(&gateway), "1");
    // After kill -9 it comes again.
    publish(&gateway, "press", "2");
    eventually("the second", || (counted(&gateway) == 1).then_some(()));
    let gateway = gateway.kill().start();
    gateway.until_logged("delivered again");
    let gateway = gateway.terminate().home.start();
    assert_eq!(values(&gateway), "2");
}

#[test]
fn a_file_that_is_wrong_is_refused_by_line_and_what_runs_stays() {
    let gateway = Home::new().start();
    install(&gateway, "pump", &["copy: press"]);
    let wrong = file(
        gateway.home(),
        "pump.yaml",
        &["copy: press", "bad: press +"],
    );
    let wrong = wrong.to_str().unwrap();
    for command in ["install", "check"] {
        let error = gateway.cli_error(&["mapping", command, wrong]);
        assert!(error.contains("pump.yaml:11:"), "{error}");
        assert!(error.contains("bad"), "{error}");
    }
    assert_eq!(
        gateway.json(&["mapping", "list"])[0]["outputs"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let good = file(gateway.home(), "Pump 1.yaml", &["copy: press"]);
    let error = gateway.cli_error(&["mapping", "install", good.to_str().unwrap()]);
    assert!(error.contains("can't be a mapping's name"), "{error}");
    let missing = gateway.cli_error(&["mapping", "inspect", "none"]);
    assert!(missing.contains("there is no mapping none"), "{missing}");
    let missing = gateway.cli_error(&["why", "mapping/none"]);
    assert!(
        missing.contains("no mapping has an output none"),
        "{missing}"
    );
    let unknown = file(gateway.home(), "typo.yaml", &["copy: pres + press"]);
    let error = gateway.cli_error(&["mapping", "check", "--strict", unknown.to_str().unwrap()]);
    assert!(error.contains("--strict"), "{error}");
}

#[test]
fn mappings_that_are_part_of_the_system_run_and_one_that_is_wrong_says_so_and_keeps_nobody() {
    let home = Home::new();
    let folder = home.path().join("mappings");
    fs::create_dir(&folder).unwrap();
    file(&home, "mappings/pump.yaml", &["copy: press"]);
    fs::write(folder.join("broken.yaml"), "stream_processor: [").unwrap();
    fs::write(folder.join("README"), "no mapping").unwrap();
    let home = home.set("mappings.preinstalled", folder.display());
    let gateway = home.start();
    let subscriber = subscribe(&gateway);
    publish(&gateway, "press", "2");
    assert_eq!(next(&subscriber), "copy 2");
    let list = gateway.json(&["mapping", "list"]);
    assert_eq!(list[0]["name"], "broken");
    assert!(
        list[0]["error"]
            .as_str()
            .unwrap()
            .contains("broken.yaml:2:1")
    );
    let error = gateway.cli_error(&["mapping", "remove", "pump"]);
    assert!(error.contains("part of the system"), "{error}");
    let error = gateway.cli_error(&["why", "mapping/broken/x"]);
    assert!(error.contains("does not run"), "{error}");
    drop(gateway);
    let refusal = home.set("mappings.preinstalled", "/nowhere").refusal();
    assert!(refusal.contains("mappings.preinstalled"), "{refusal}");
}

#[test]
fn a_replay_says_what_a_mapping_made_yesterday_and_what_another_version_would_have_made() {
    let gateway = Home::new().set("journal.topics", "umh/#").start();
    install(&gateway, "pump", &["double: press * 2"]);
    for value in ["1", "2", "3"] {
        publish(&gateway, "press", value);
    }
    let other = file(
        gateway.home(),
        "other.yaml",
        &["double: press * 2 + (press > 2)"],
    );
    let other = other.to_str().unwrap();
    let replay = |home: &Home, args: &[&str]| {
        let args = [&["journal", "replay", "mapping/pump"], args].concat();
        let output = home.command(&args).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_for_people(&errors);
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            errors,
        )
    };
    let (code, made, summary) = replay(gateway.home(), &[]);
    assert_eq!(code, Some(0), "{summary}");
    let values: Vec<_> = made
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let payload: Value = serde_json::from_str(line["payload"].as_str().unwrap()).unwrap();
            payload["value"].clone()
        })
        .collect();
    assert_eq!(values, [2, 4, 6]);
    // Of what it made then, three are in the journal, too.
    assert!(summary.contains("6 events, 3 skipped"), "{summary}");
    // Also beside no gateway, from what it has left.
    let home = gateway.terminate().home;
    let (code, difference, _) = replay(&home, &["--diff", other, "--batch", "1"]);
    assert_eq!(code, Some(1));
    assert!(
        difference.contains("-") && difference.contains(r#"\"value\":7"#),
        "{difference}"
    );
    assert!(!difference.contains(r#"\"value\":4"#), "{difference}");
}

#[test]
fn cases_are_made_and_run_without_a_gateway() {
    let home = Home::new();
    let pump = file(
        &home,
        "pump.yaml",
        &["double: press * 2", "sum: press + temp"],
    );
    let run = |cases: &str| {
        let path = home.path().join("cases.jsonl");
        fs::write(&path, cases).unwrap();
        let args = [
            "mapping",
            "test",
            pump.to_str().unwrap(),
            path.to_str().unwrap(),
        ];
        let output = home.command(&args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_for_people(&errors);
        (output.status.code(), text, errors)
    };
    let inputs = r#"{"inputs":[{"topic":"umh.v1.corpA.plant-A.aawd._raw.press","payload":"{\"value\":3,\"timestamp_ms\":5}"}]}"#;
    let (code, made, _) = run(inputs);
    assert_eq!(code, Some(0));
    assert!(made.contains(r#"\"value\":6"#), "{made}");
    let (code, text, _) = run(&made);
    assert_eq!((code, text.as_str()), (Some(0), "1 passed, 0 failed\n"));
    let (code, text, _) = run(&made.replace(r#"\"value\":6"#, r#"\"value\":7"#));
    assert_eq!(code, Some(1));
    assert!(
        text.contains("- input 1: umh.v1.corpA.plant-A.aawd._pump_v1.double"),
        "{text}"
    );
    assert!(
        text.contains(r#"+ input 1: umh.v1.corpA.plant-A.aawd._pump_v1.double {"value":6"#),
        "{text}"
    );
    let (code, _, error) = run("{}");
    assert_eq!(code, Some(1));
    assert!(error.contains("cases.jsonl:1"), "{error}");
}
