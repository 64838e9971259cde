//! What an operator sees: metrics, health, logs, the command line, the service manager.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::apps::{Package, built};
use crate::gateway::{Gateway, Home, eventually};
use crate::mosquitto;
use crate::wire::{DISCONNECT, PUBACK, PUBLISH, Wire, publish_packet};

/// The samples of a scrape: name with labels → value. Fails on any line that isn't well-formed.
fn scrape(gateway: &Gateway) -> HashMap<String, f64> {
    let (status, text) = gateway.http("/metrics");
    assert_eq!(status, 200);
    assert!(text.ends_with('\n'));
    let mut samples = HashMap::new();
    let mut types = HashMap::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (keyword, name, rest) = (words.next(), words.next().unwrap(), words.next());
            let rest = rest.unwrap_or_else(|| panic!("{line}"));
            match keyword {
                Some("HELP") => assert!(!rest.is_empty(), "{line}"),
                Some("TYPE") => {
                    assert!(
                        ["counter", "gauge", "histogram", "summary"].contains(&rest),
                        "{line}"
                    );
                    types.insert(name.to_owned(), rest.to_owned());
                }
                _ => panic!("{line}"),
            }
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        let name = sample.split('{').next().unwrap();
        assert!(name.starts_with("headgate_"), "{line}");
        assert!(
            name.chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        );
        if let Some(labels) = sample
            .strip_prefix(name)
            .filter(|labels| !labels.is_empty())
        {
            assert!(labels.starts_with('{') && labels.ends_with("\"}"), "{line}");
        }
        let of_histogram = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|name| types.get(*name).is_some_and(|kind| kind == "histogram"));
        assert!(
            of_histogram.is_some() || types.contains_key(name),
            "no TYPE before {line}"
        );
        if types.get(name).is_some_and(|kind| kind == "counter") {
            let is_counter = |suffix: &&str| name.ends_with(*suffix);
            assert!(
                ["_total", "_count", "_bucket"].iter().any(is_counter),
                "{line}"
            );
        }
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
        assert!(value >= 0.0, "{line}");
        assert!(
            samples.insert(sample.to_owned(), value).is_none(),
            "twice: {line}"
        );
    }
    samples
}

#[test]
fn metrics_count_what_came_in_what_the_apps_made_of_it_and_what_went_out() {
    let gateway = Home::new().start();
    gateway.install(&built("unit-convert"));
    let mut results = Wire::connect(&gateway, "results");
    results.subscribe("converted/#", 0);
    let mut sensor = Wire::connect(&gateway, "sensor");
    for number in 0..100 {
        let reading = format!("{{\"value\":{number}}}");
        sensor.publish("plant/a/temperature_f", reading.as_bytes());
        sensor.publish("plant/a/pressure", reading.as_bytes());
    }
    for _ in 0..100 {
        results.next_message();
    }
    // A result can be here before it is counted there.
    gateway.until_app("unit-convert", "all its events", |app| {
        app["counters"]["handled"] == 100
    });
    gateway.assert_adds_up();

    let samples = scrape(&gateway);
    for (sample, expected) in [
        ("headgate_mqtt_clients{listener=\"tcp\"}", 2.0),
        ("headgate_mqtt_subscriptions", 1.0),
        (
            "headgate_mqtt_connections_total{listener=\"tcp\",result=\"accepted\"}",
            2.0,
        ),
        (
            "headgate_mqtt_connections_total{listener=\"tcp\",result=\"refused\"}",
            0.0,
        ),
        ("headgate_mqtt_received_messages_total", 200.0),
        ("headgate_mqtt_delivered_messages_total", 100.0),
        ("headgate_mqtt_dropped_messages_total", 0.0),
        (
            "headgate_pipeline_queued_events{lane=\"transactional\"}",
            0.0,
        ),
        (
            "headgate_pipeline_events_total{lane=\"transactional\",result=\"handed_over\"}",
            100.0,
        ),
        (
            "headgate_pipeline_events_total{lane=\"transactional\",result=\"filtered\"}",
            200.0,
        ),
        (
            "headgate_pipeline_events_total{lane=\"transactional\",result=\"accepted\"}",
            300.0,
        ),
        (
            "headgate_app_events_total{app=\"unit-convert\",result=\"handled\"}",
            100.0,
        ),
        (
            "headgate_app_published_events_total{app=\"unit-convert\"}",
            100.0,
        ),
        (
            "headgate_app_events_total{app=\"unit-convert\",result=\"failed\"}",
            0.0,
        ),
        ("headgate_app_queue_length{app=\"unit-convert\"}", 0.0),
        (
            "headgate_app_state{app=\"unit-convert\",state=\"running\"}",
            1.0,
        ),
        (
            "headgate_app_state{app=\"unit-convert\",state=\"stopped\"}",
            0.0,
        ),
        (
            "headgate_app_batch_seconds_bucket{app=\"unit-convert\",le=\"+Inf\"}",
            f64::NAN,
        ),
        (
            "headgate_event_latency_seconds{quantile=\"0.99\"}",
            f64::NAN,
        ),
        ("headgate_process_resident_memory_bytes", f64::NAN),
        ("headgate_process_cpu_seconds_total", f64::NAN),
    ] {
        let found = samples.get(sample);
        let found = found.unwrap_or_else(|| panic!("{sample} is missing: {samples:#?}"));
        if !expected.is_nan() {
            assert_eq!(*found, expected, "{sample}");
        }
    }
    // A second scrape counts on from the first.
    let again = scrape(&gateway);
    let handled = "headgate_app_events_total{app=\"unit-convert\",result=\"handled\"}";
    assert_eq!(again[handled], 100.0);
}

#[test]
fn health_and_readiness_are_told_over_http() {
    let gateway = Home::new().start();
    assert_eq!(gateway.http("/healthz"), (200, "ok\n".into()));
    assert_eq!(gateway.http("/readyz"), (200, "ok\n".into()));
    let (status, text) = gateway.http("/favicon.ico");
    assert_eq!(status, 404);
    assert!(text.contains("/metrics"), "{text}");
}

#[test]
fn without_a_metrics_listener_everything_else_works() {
    let gateway = Home::new().set("metrics.listen", "off").start();
    assert_eq!(gateway.status()["metrics_listen"], Value::Null);
    let subscriber = mosquitto::subscribe(&gateway, &["-t", "a"]);
    mosquitto::publish(&gateway, &["-t", "a", "-m", "hello"]);
    assert_eq!(subscriber.line(), "hello");
}

#[test]
fn sigterm_lets_out_what_was_accepted_and_ends_in_time() {
    let gateway = Home::new().start();
    gateway.install(&built("unit-convert"));
    let mut results = Wire::connect(&gateway, "results");
    results.subscribe("converted/#", 0);
    let results = thread::spawn(move || {
        let mut count = 0u64;
        while let Some(packet) = results.next_or_end() {
            assert_eq!(packet.kind(), PUBLISH, "{packet:?}");
            let body: Value = serde_json::from_slice(packet.payload()).unwrap();
            assert_eq!(body["number"].as_u64(), Some(count));
            count += 1;
        }
        count
    });
    let mut sensor = Wire::connect(&gateway, "sensor");
    let mut acknowledgements = sensor.try_clone();
    let flood = thread::spawn(move || {
        for chunk in 0..500u64 {
            let mut bytes = Vec::new();
            for number in chunk * 100..(chunk + 1) * 100 {
                let reading = format!("{{\"number\":{number},\"value\":50}}");
                let id = (number % 65_535 + 1) as u16;
                bytes.extend(publish_packet(
                    "plant/a/temperature_f",
                    reading.as_bytes(),
                    1,
                    id,
                ));
            }
            sensor.send_while_open(&bytes);
        }
    });
    let mut acknowledged = 0u64;
    let mut stopped = None;
    let mut gateway = Some(gateway);
    while let Some(packet) = acknowledgements.next_or_end() {
        assert_eq!(packet.kind(), PUBACK, "{packet:?}");
        acknowledged += 1;
        if acknowledged == 2_000 {
            let gateway = gateway.take().unwrap();
            stopped = Some(thread::spawn(move || gateway.terminate()));
        }
    }
    flood.join().unwrap();
    let stopped = stopped.expect("the flood began").join().unwrap();
    assert_eq!(stopped.status.code(), Some(0), "{}", stopped.log);
    assert!(stopped.took < Duration::from_secs(5), "{:?}", stopped.took);
    assert!(stopped.log.contains("stopped"), "{}", stopped.log);
    let results = results.join().unwrap();
    assert!(
        results >= acknowledged,
        "{results} results of {acknowledged} accepted readings"
    );
}

#[test]
fn sigterm_waits_for_a_subscribers_acknowledgements() {
    const MESSAGES: u16 = 500;
    let gateway = Home::new().start();
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("plant/#", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for id in 1..=MESSAGES {
        publisher.send(&publish_packet("plant/a", b"x", 1, id));
        assert_eq!(publisher.next().kind(), PUBACK);
    }
    // More than may be in flight waits in the gateway: nothing has been acknowledged so far.
    let stopping = thread::spawn(move || gateway.terminate());
    let mut received = 0;
    while let Some(message) = subscriber.next_or_end() {
        assert_eq!(message.kind(), PUBLISH, "{message:?}");
        received += 1;
        let [high, low] = message.id().to_be_bytes();
        subscriber.send_while_open(&[PUBACK << 4, 2, high, low]);
    }
    let stopped = stopping.join().unwrap();
    assert_eq!(received, MESSAGES, "{}", stopped.log);
    assert_eq!(stopped.status.code(), Some(0), "{}", stopped.log);
}

#[test]
fn sigterm_says_goodbye_to_the_clients_and_waits_for_none_that_does_not_listen() {
    let gateway = Home::new().start();
    let mut deaf = Wire::connect(&gateway, "deaf");
    deaf.set_receive_buffer(4096);
    deaf.subscribe("flood", 0);
    let client = Wire::connect_v5(&gateway, "client");
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.send(&publish_packet("flood", &[b'x'; 1000], 0, 0).repeat(10_000));
    publisher.assert_quiet();
    // Connected to the metrics and saying nothing.
    let stopped = gateway.terminate();
    assert_eq!(stopped.status.code(), Some(0), "{}", stopped.log);
    assert!(stopped.took < Duration::from_secs(6), "{:?}", stopped.took);
    const SERVER_SHUTTING_DOWN: u8 = 0x8b;
    let last = client.until_closed();
    assert_eq!(
        (last[0].kind(), last[0].body[0]),
        (DISCONNECT, SERVER_SHUTTING_DOWN)
    );
    assert!(!stopped.home.store().join("admin.sock").exists());
}

#[test]
fn ctrl_c_is_as_good_as_sigterm() {
    let gateway = Home::new().start();
    gateway.signal(libc::SIGINT);
    let stopped = gateway.terminate();
    assert_eq!(stopped.status.code(), Some(0), "{}", stopped.log);
}

#[test]
fn an_app_that_loops_does_not_hold_up_the_shutdown() {
    let gateway = Home::new().start();
    let manifest = crate::apps::manifest("loop").replace("_ms = 20", "_ms = 60000");
    let package = Package::new(&manifest, crate::apps::guest(""));
    gateway.install(package.path());
    Wire::connect(&gateway, "c").publish("loop/in", b"L");
    gateway.until_app("loop", "its batch", |app| app["counters"]["offered"] == 1);
    let stopped = gateway.terminate();
    assert_eq!(stopped.status.code(), Some(0), "{}", stopped.log);
    assert!(stopped.took < Duration::from_secs(6), "{:?}", stopped.took);
}

#[test]
fn the_service_manager_hears_of_the_start_of_life_and_of_the_end() {
    let home = Home::new();
    // Microseconds.
    let mut gateway = home.start_with(&["run"], &[("WATCHDOG_USEC", "200000")]);
    assert!(gateway.service_manager().was_told("READY=1"));
    gateway.service_manager().until_told("WATCHDOG=1");
    gateway.signal(libc::SIGTERM);
    gateway.service_manager().until_told("STOPPING=1");
    assert_eq!(gateway.terminate().status.code(), Some(0));
}

#[test]
fn every_command_about_apps_has_json() {
    let gateway = Home::new().start();
    let folder = built("overheat-alarm");
    let app = gateway.json(&["app", "install", folder.to_str().unwrap()]);
    assert_eq!(
        (&app["name"], &app["state"]),
        (&"overheat-alarm".into(), &"running".into())
    );
    let name = "overheat-alarm";
    let listed = gateway.json(&["app", "list"]);
    assert_eq!(listed[0]["component_sha256"], app["component_sha256"]);
    assert_eq!(gateway.json(&["app", "inspect", name])["name"], name);
    assert_eq!(gateway.json(&["app", "stop", name])["state"], "stopped");
    assert_eq!(gateway.json(&["app", "start", name])["state"], "running");
    assert_eq!(gateway.json(&["app", "restart", name])["state"], "running");

    Wire::connect(&gateway, "c").publish("plant/a/temperature", b"hot");
    let told = |lines: &Value| {
        let lines = lines.as_array().unwrap();
        lines
            .iter()
            .any(|line| line["message"].as_str().unwrap().contains("not a reading"))
    };
    eventually("the app's complaint", || {
        told(&gateway.json(&["app", "logs", name])).then_some(())
    });

    let mut follower = gateway
        .home()
        .command(&["--json", "app", "logs", name, "--follow"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    Wire::connect(&gateway, "c").publish("plant/b/temperature", b"hotter");
    let followed = lines.find_map(|line| {
        let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
        line["message"]
            .as_str()
            .unwrap()
            .starts_with("plant/b/temperature")
            .then_some(line)
    });
    assert!(followed.is_some());
    follower.kill().unwrap();
    follower.wait().unwrap();

    assert_eq!(gateway.json(&["status"])["apps"], 1);
    assert_eq!(gateway.json(&["app", "remove", name])["removed"], name);
    assert_eq!(gateway.json(&["app", "list"]), Value::Array(Vec::new()));
    let error = gateway.cli(&["--json", "app", "inspect", name]);
    assert_eq!(error.status.code(), Some(1));
    let error: Value = serde_json::from_slice(&error.stderr).unwrap();
    assert!(error["error"].as_str().unwrap().contains(name), "{error}");
}

#[test]
fn logs_are_lines_of_json_when_asked_for_whatever_clients_and_apps_say() {
    let gateway = Home::new()
        .set("log.format", "json")
        .set("log.level", "debug")
        .start();
    gateway.install(&built("overheat-alarm"));
    let mut wire = Wire::connect(&gateway, "\"quotes\" \\ and \u{2028} ünïcode");
    wire.publish("plant/\n{\"level\":\"ERROR\"}/temperature", b"\x1b[2J\n}");
    wire.close();
    let mut wire = Wire::open(&gateway);
    wire.send_while_open(b"GET /\r\n\r\n");
    wire.until_closed();
    gateway.until_app("overheat-alarm", "its event", |app| {
        app["counters"]["handled"] == 1
    });
    let stopped = gateway.terminate();
    let mut messages = Vec::new();
    for line in stopped.log.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(
            line["timestamp"].is_string() && line["level"].is_string(),
            "{line}"
        );
        assert_ne!(line["level"], "ERROR", "{line}");
        messages.push(line["message"].as_str().unwrap().to_owned());
    }
    for expected in [
        "ready",
        "client connected",
        "client disconnected",
        "stopped",
    ] {
        assert!(
            messages.iter().any(|message| message == expected),
            "{messages:#?}"
        );
    }
}

#[test]
fn the_text_log_is_one_line_an_event_whatever_clients_say() {
    let gateway = Home::new().start();
    gateway.install(&built("overheat-alarm"));
    let mut wire = Wire::connect(&gateway, "c");
    wire.publish("plant/\nFAKE ERROR\x1b[2J/temperature", b"hot");
    gateway.until_app("overheat-alarm", "its event", |app| {
        app["counters"]["handled"] == 1
    });
    let stopped = gateway.terminate();
    let forged = |line: &str| line.starts_with("FAKE") || line.contains('\x1b');
    assert!(!stopped.log.lines().any(forged), "{}", stopped.log);
}
