//! Apps over the life of the gateway, by hand as the README has it.

use crate::apps::{Package, built};
use crate::gateway::{Gateway, Home};
use crate::mosquitto;
use crate::wire::Wire;

/// Publishes a reading as the README does, and waits for the alarm.
fn assert_alarm_on(gateway: &Gateway, line: &str) {
    let alarms = mosquitto::subscribe(gateway, &["-t", "alarms/#", "-v"]);
    let topic = format!("plant/{line}/temperature");
    let reading = r#"{"value": 93.5, "timestamp_ms": 1763725320000}"#;
    mosquitto::publish(gateway, &["-t", &topic, "-m", reading]);
    let alarm = alarms.line();
    let (alarm_topic, body) = alarm.split_once(' ').unwrap();
    assert_eq!(alarm_topic, format!("alarms/{topic}"));
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(
        body,
        serde_json::json!({
            "alarm": "overheat", "state": "raised", "value": 93.5, "threshold": 90.0,
            "topic": topic, "timestamp_ms": 1_763_725_320_000_u64,
        })
    );
}

#[test]
fn an_alarm_appears_and_again_after_kill_9_and_a_new_run() {
    let gateway = Home::new().start();
    gateway.install(&built("overheat-alarm"));
    assert_alarm_on(&gateway, "line1");
    let home = gateway.kill();

    let gateway = home.start();
    let app = gateway.until_app("overheat-alarm", "running", |app| app["state"] == "running");
    assert_eq!(app["counters"]["handled"], 0);
    assert_alarm_on(&gateway, "line1");
}

#[test]
fn a_source_folder_is_installed_with_what_the_build_made_of_it() {
    let built = built("overheat-alarm");
    let target = built.parent().unwrap().parent().unwrap();
    let gateway = Home::new().start();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/apps/overheat-alarm");
    let mut install = gateway.home().command(&["app", "install", source]);
    let output = install.env("CARGO_TARGET_DIR", target).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_alarm_on(&gateway, "line1");
}

#[test]
fn a_stopped_app_stays_stopped_after_kill_9_and_a_removed_one_stays_away() {
    let gateway = Home::new().start();
    gateway.install(&built("overheat-alarm"));
    gateway.install(&built("unit-convert"));
    gateway.json(&["app", "stop", "overheat-alarm"]);
    gateway.json(&["app", "remove", "unit-convert"]);
    let gateway = gateway.kill().start();
    let apps = gateway.json(&["app", "list"]);
    let apps = apps.as_array().unwrap();
    assert_eq!(apps.len(), 1);
    assert_eq!(
        (&apps[0]["name"], &apps[0]["state"]),
        (&"overheat-alarm".into(), &"stopped".into())
    );
    gateway.json(&["app", "start", "overheat-alarm"]);
    assert_alarm_on(&gateway, "line1");
}

#[test]
fn kill_9_in_the_middle_of_installs_leaves_each_app_whole_or_away() {
    let mut home = Home::new();
    let component = std::fs::read(built("unit-convert").join("unit-convert.wasm")).unwrap();
    let mut installed = Vec::new();
    for round in 0..5u64 {
        let gateway = home.start();
        let listed = gateway.json(&["app", "list"]);
        let listed = listed.as_array().unwrap();
        for name in &installed {
            let app = listed.iter().find(|app| app["name"] == *name);
            let app = app.unwrap_or_else(|| panic!("{name} was installed and is gone"));
            assert_eq!(app["state"], "running", "{app:#}");
        }
        assert!(
            listed.iter().all(|app| app["state"] == "running"),
            "{listed:#?}"
        );

        let install = |name: &str| {
            // Different components, so that each goes through the compiler and into the store.
            let package = Package::multiplier(name, name, "out/", 2);
            let custom = [0, 3, 1, b'n', name.as_bytes()[1]];
            let component = [&component[..], &custom].concat();
            std::fs::write(package.path().join("app.wasm"), component).unwrap();
            package
        };
        let first = install(&format!("a{round}"));
        gateway.install(first.path());
        installed.push(format!("a{round}"));
        let second = install(&format!("b{round}"));
        let mut command = gateway.home().command(&["app", "install", second.as_str()]);
        let mut interrupted = command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Somewhere on the way, another time each round.
        std::thread::sleep(std::time::Duration::from_millis(60 * round));
        home = gateway.kill();
        interrupted.wait().unwrap();
    }
}

#[test]
fn a_compiled_component_that_was_tampered_with_is_compiled_anew() {
    let gateway = Home::new().start();
    gateway.install(&built("overheat-alarm"));
    let home = gateway.terminate().home;
    let mut compiled = 0;
    for file in std::fs::read_dir(home.store().join("aot")).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        compiled += 1;
    }
    assert!(compiled > 0);
    let gateway = home.start();
    gateway.until_app("overheat-alarm", "running", |app| app["state"] == "running");
    assert_alarm_on(&gateway, "line1");
}

#[test]
fn apps_work_in_a_chain() {
    let gateway = Home::new().start();
    let first = Package::multiplier("first", "raw", "mid/", 2);
    let second = Package::multiplier("second", "mid", "out/", 5);
    gateway.install(first.path());
    gateway.install(second.path());
    let mut results = Wire::connect(&gateway, "results");
    results.subscribe("out/#", 0);
    let mut sensor = Wire::connect(&gateway, "sensor");
    const COUNT: u64 = 1000;
    for number in 1..=COUNT {
        sensor.publish("raw/t", format!("{{\"value\":{number}}}").as_bytes());
    }
    for number in 1..=COUNT {
        let result = results.next_message();
        assert_eq!(result.topic(), "out/mid/raw/t");
        let body: serde_json::Value = serde_json::from_slice(result.payload()).unwrap();
        assert_eq!(body["value"].as_f64(), Some(10.0 * number as f64));
    }
    let status = gateway.assert_adds_up();
    assert_eq!(status["pipeline"]["handed_over"], 2 * COUNT);
    assert_eq!(status["pipeline"]["looped"], 0);
}

#[test]
fn an_app_that_feeds_itself_is_cut_off_and_the_cut_is_counted() {
    let gateway = Home::new().start();
    // Returns what it gets, on the topic it got it on.
    let package = Package::self_feeding("echo");
    gateway.install(package.path());
    let mut wire = Wire::connect(&gateway, "c");
    const COUNT: u64 = 10;
    for _ in 0..COUNT {
        wire.publish("echo/in", b"hello");
    }
    gateway.until_status(
        "looped",
        |status| status["pipeline"]["looped"].as_u64(),
        Some(COUNT),
    );
    gateway.assert_adds_up();
    // Once from the client and eight times from itself; less often for one that was in a batch with
    // one that had been round more often.
    let handled = gateway.app("echo")["counters"]["handled"].as_u64().unwrap();
    assert!((COUNT + 8..=9 * COUNT).contains(&handled), "{handled}");
    gateway.until_logged("do two apps feed each other?");
}
