//! What apps keep, over the end of the gateway.

use serde_json::Value;

use crate::apps::{Package, built, keeper};
use crate::gateway::{Gateway, Home};
use crate::wire::Wire;

/// Counts what it gets, under `n` (`in` stands for: increment `n`).
fn install_keeper(gateway: &Gateway) {
    let manifest = "name = \"keeper\"\nversion = \"1.0.0\"\ncomponent = \"app.wasm\"\n\
                    subscribe = [\"keeper/in\"]\npublish = [\"out\"]\n";
    let package = Package::new(manifest, keeper());
    gateway.install(package.path());
}

fn until_synced(gateway: &Gateway) -> Value {
    gateway.until_app("keeper", "all on disk", |app| app["kv"]["synced"] == true)
}

/// The number that the app has kept; 0 if there is none.
fn kept(gateway: &Gateway) -> u64 {
    let mut wire = Wire::connect(gateway, "reader");
    wire.subscribe("out", 0);
    wire.publish("keeper/in", b"gn");
    match wire.next_message().payload() {
        b"" => 0,
        digits => std::str::from_utf8(digits).unwrap().parse().unwrap(),
    }
}

#[test]
fn what_an_app_keeps_survives_kill_9_and_goes_with_the_app() {
    let gateway = Home::new().start();
    install_keeper(&gateway);
    let mut wire = Wire::connect(&gateway, "c");
    for _ in 0..3 {
        wire.publish("keeper/in", b"in");
    }
    gateway.until_app("keeper", "the events", |app| {
        app["counters"]["handled"] == 3
    });
    let app = until_synced(&gateway);
    assert_eq!(app["kv"]["keys"], 1);
    assert_eq!(app["kv"]["bytes"], "default\0n3".len() + 64);

    let gateway = gateway.kill().start();
    let app = gateway.until_app("keeper", "running", |app| app["state"] == "running");
    assert_eq!(app["kv"]["keys"], 1);
    assert_eq!(kept(&gateway), 3);
    gateway.json(&["app", "remove", "keeper"]);
    install_keeper(&gateway);
    assert_eq!(kept(&gateway), 0);
}

#[test]
fn kill_9_while_an_app_counts_loses_nothing_that_was_on_disk() {
    let mut home = Home::new();
    let mut on_disk = 0;
    let mut sent = 0;
    for round in 0..5 {
        let gateway = home.start();
        match round {
            0 => install_keeper(&gateway),
            _ => {
                gateway.until_app("keeper", "running", |app| app["state"] == "running");
                let kept = kept(&gateway);
                assert!(
                    (on_disk..=sent).contains(&kept),
                    "{on_disk} <= {kept} <= {sent}"
                );
                on_disk = kept;
            }
        }
        let mut wire = Wire::connect(&gateway, "c");
        for number in 0..200 {
            sent += 1;
            wire.publish("keeper/in", b"in");
            if number == 100 {
                gateway.until_app("keeper", "the events", |app| app["counters"]["queued"] == 0);
                until_synced(&gateway);
                on_disk += 101;
            }
        }
        home = gateway.kill();
    }
}

#[test]
fn the_meter_keeps_its_totals_and_publishes_them_by_a_timer() {
    let folder = built("meter-total");
    let manifest = std::fs::read_to_string(folder.join("manifest.toml")).unwrap();
    let manifest = manifest.replace("publish_every_s = 10", "publish_every_s = 1")
        + "\n[limits]\nkv_bytes = 65536\n";
    let manifest = format!("component = \"app.wasm\"\n{manifest}");
    let component = std::fs::read(folder.join("meter-total.wasm")).unwrap();
    let package = Package::new(&manifest, component);

    let gateway = Home::new().start();
    gateway.install(package.path());
    let app = gateway.app("meter-total");
    assert_eq!(
        (&app["state"], &app["timers"]),
        (&"running".into(), &1.into()),
        "{app:#}"
    );
    let mut wire = Wire::connect(&gateway, "c");
    wire.subscribe("totals/#", 1);
    wire.publish("plant/press/count", b"40");
    wire.publish("plant/press/count", b"2");
    // The timer may have come between the two.
    while wire.next_message().payload() != b"42" {}

    gateway.until_app("meter-total", "all on disk", |app| {
        app["kv"]["synced"] == true
    });
    let gateway = gateway.kill().start();
    let mut wire = Wire::connect(&gateway, "c");
    wire.subscribe("totals/#", 1);
    let message = wire.next_message();
    assert_eq!(
        (message.topic(), message.payload()),
        ("totals/plant/press/count", &b"42"[..])
    );
}
