//! What monitoring made for mosquitto reads below `$SYS/broker`.

use std::collections::HashMap;

use crate::gateway::{Home, eventually};
use crate::wire::{Wire, connect_packet_with, publish_packet};

const DISCONNECT: [u8; 2] = [0xe0, 0];

#[test]
fn what_passes_and_what_waits_is_told_under_mosquittos_names() {
    let gateway = Home::new().set("mqtt.system_topics_every_s", 1).start();
    let mut away = Wire::open(&gateway);
    away.send(&connect_packet_with(4, "away", 0, 0, &[]));
    away.accepted();
    away.subscribe("a", 1);
    away.send(&DISCONNECT);
    away.until_closed();

    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("a", b"12345");
    publisher.publish("a", b"1234");
    let mut retained = publish_packet("r", b"kept", 0, 0);
    retained[0] |= 1;
    publisher.send(&retained);

    let mut watcher = Wire::connect(&gateway, "watcher");
    watcher.subscribe("a", 0);
    publisher.publish("a", b"123");
    assert_eq!(watcher.next_message().payload(), b"123");
    watcher.subscribe("$SYS/broker/#", 0);

    let mut said = HashMap::new();
    let mut until = |name: &'static str, fits: &dyn Fn(f64) -> bool| {
        eventually(name, || {
            if said.get(name).is_some_and(|value: &f64| fits(*value)) {
                return Some(());
            }
            let message = watcher.next_message();
            let topic = message
                .topic()
                .trim_start_matches("$SYS/broker/")
                .to_owned();
            let text = String::from_utf8(message.payload().to_vec()).unwrap();
            if let Ok(value) = text.parse() {
                said.insert(topic, value);
            }
            None
        });
    };
    for (name, value) in [
        // Three for the client that is away, and the retained one.
        ("store/messages/count", 4.0),
        ("messages/stored", 4.0),
        ("publish/messages/received", 4.0),
        ("publish/bytes/received", 16.0),
        ("publish/messages/dropped", 0.0),
    ] {
        until(name, &|found| found == value);
    }
    for name in [
        "store/messages/bytes",
        "publish/bytes/sent",
        "heap/current",
        "heap/maximum",
        "load/connections/1min",
        "load/connections/5min",
        "load/connections/15min",
        "load/sockets/1min",
    ] {
        until(name, &|found| found > 0.0);
    }
}
