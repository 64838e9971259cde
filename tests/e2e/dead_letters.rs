//! `headgate dead-letters`.

use serde_json::Value;

use crate::apps::{Package, built, guest_with, manifest};
use crate::gateway::{Gateway, Home, assert_for_people, eventually};
use crate::wire::{PUBACK, Wire, publish_packet};

#[test]
fn nothing_is_dropped_as_long_as_nothing_is() {
    let gateway = Home::new().start();
    assert_eq!(
        gateway.json(&["dead-letters"]),
        serde_json::json!({ "letters": [], "left_out": 0 })
    );
    let shown = gateway.cli(&["dead-letters", "--topic", "plant/#", "-n", "5"]);
    assert_eq!(String::from_utf8_lossy(&shown.stdout), "no dead letters\n");
    assert_eq!(
        gateway.json(&["dead-letters", "purge"]),
        serde_json::json!({ "removed": 0 })
    );
    let (_, metrics) = gateway.http("/metrics");
    assert!(
        metrics.contains("headgate_dead_letters_total{reason=\"queue_full\"} 0"),
        "{metrics}"
    );
}

#[test]
fn a_wrong_filter_is_refused_with_what_is_wrong_about_it() {
    let gateway = Home::new().start();
    let error = gateway.cli_error(&["dead-letters", "--topic", "plant/#/x"]);
    assert_for_people(&error);
    assert!(
        error.contains("plant/#/x") && error.contains("`#` must be the last"),
        "{error}"
    );
}

/// The letters that there are when there are so many, as `--json` shows them.
fn letters(gateway: &Gateway, count: usize) -> Vec<Value> {
    eventually("the letters", || {
        let letters = gateway.json(&["dead-letters"])["letters"].take();
        let letters = letters.as_array().unwrap().clone();
        (letters.len() == count).then_some(letters)
    })
}

fn id(letter: &Value) -> String {
    letter["id"].as_u64().unwrap().to_string()
}

fn publish_retained(wire: &mut Wire, topic: &str, payload: &[u8]) {
    let mut packet = publish_packet(topic, payload, 1, 7);
    packet[0] |= 1;
    wire.send(&packet);
    assert_eq!(wire.next().kind(), PUBACK);
}

/// A gateway that retains one message, so that each further one is a dead letter, too.
fn with_little_room() -> Gateway {
    let gateway = Home::new().set("mqtt.max_retained_messages", 1).start();
    publish_retained(&mut Wire::connect(&gateway, "first"), "other", b"x");
    gateway
}

#[test]
fn an_event_that_an_app_could_not_handle_goes_to_that_app_again_and_to_nobody_else() {
    let gateway = Home::new().start();
    gateway.install(Package::obedient("culprit").path());
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("#", 1);
    let mut told = Wire::connect(&gateway, "told");
    told.subscribe("$headgate/dead-letters", 0);
    Wire::connect(&gateway, "publisher").publish("culprit/in", b"U");
    assert_eq!(subscriber.next_message().payload(), b"U");
    let letter = letters(&gateway, 1).remove(0);
    let message = told.next_message();
    assert_eq!(
        serde_json::from_slice::<Value>(message.payload()).unwrap(),
        letter
    );

    let shown = gateway.cli(&["dead-letters", "show", &id(&letter)]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(
        shown.contains("payload  1 bytes, as text:\nU\nerror:\n"),
        "{shown}"
    );
    assert!(shown.contains("unreachable"), "{shown}");
    assert_eq!(
        gateway.json(&["dead-letters", "show", &id(&letter)]),
        letter
    );
    let error = gateway.cli_error(&["dead-letters", "show", "99"]);
    assert!(error.contains("no dead letter has the id 99"), "{error}");

    gateway.json(&["app", "stop", "culprit"]);
    let retry = ["dead-letters", "retry", &id(&letter)];
    let error = gateway.cli_error(&retry);
    assert!(error.contains("app culprit is stopped"), "{error}");
    // Another version can handle it.
    let manifest = manifest("culprit").replace("culprit/#", "elsewhere");
    gateway.json(&["app", "start", "culprit"]);
    gateway.install(Package::new(&manifest, guest_with("0x55", "0x7b")).path());
    let before = gateway.app("culprit")["counters"].clone();
    let outcome = gateway.json(&retry);
    assert_eq!(outcome, serde_json::json!({ "retried": 1, "refused": [] }));
    let handled = before["handled"].as_u64().unwrap() + 1;
    let app = gateway.until_app("culprit", "the event", |app| {
        app["counters"]["handled"] == handled
    });
    assert_eq!(app["counters"]["failed"], before["failed"]);
    assert!(letters(&gateway, 0).is_empty());
    subscriber.assert_quiet();
    let (_, metrics) = gateway.http("/metrics");
    assert!(
        metrics.contains("headgate_dead_letters_retried_total 1"),
        "{metrics}"
    );
    gateway.assert_adds_up();
    let error = gateway.cli_error(&retry);
    assert!(error.contains("no dead letter has the id"), "{error}");
}

#[test]
fn what_was_dropped_on_its_way_to_clients_goes_to_all_that_have_subscribed_by_then() {
    let gateway = with_little_room();
    gateway.install(&built("relay"));
    let mut publisher = Wire::connect(&gateway, "publisher");
    for payload in [&b"1"[..], b"2"] {
        publish_retained(&mut publisher, "relay/a", payload);
    }
    publish_retained(&mut publisher, "plant/large", &[b'x'; (64 << 10) + 1]);
    publish_retained(&mut publisher, "plant/b", b"3");
    let found = letters(&gateway, 4);
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("relay/#", 1);
    subscriber.subscribe("plant/b", 2);
    subscriber.subscribe("relayed/#", 0);

    let outcome = gateway.json(&["dead-letters", "retry", "--topic", "relay/#"]);
    assert_eq!(outcome["retried"], 2);
    let mut got = Vec::new();
    for _ in 0..4 {
        let message = subscriber.next_message();
        assert!(!message.is_retained());
        let payload = String::from_utf8(message.payload().to_vec()).unwrap();
        got.push((message.topic().to_owned(), message.qos(), payload));
    }
    got.sort();
    let expected = [
        ("relay/a", 1, "1"),
        ("relay/a", 1, "2"),
        ("relayed/a", 0, "1"),
        ("relayed/a", 0, "2"),
    ];
    assert_eq!(
        got,
        expected.map(|(topic, qos, payload)| (topic.into(), qos, payload.into()))
    );

    // What is not whole stays, and does not hold up the others.
    let output = gateway.cli(&["dead-letters", "retry", "--all"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_for_people(&error);
    let expected = format!(
        "dead letter {}: only the first 65536 of its 65537",
        id(&found[2])
    );
    assert!(error.contains(&expected), "{error}");
    assert_eq!(subscriber.next_message().payload(), b"3");
    let left = letters(&gateway, 1);
    assert_eq!(left[0], found[2]);
}

#[test]
fn a_letter_has_the_same_id_after_a_restart_and_what_was_retried_is_gone() {
    let gateway = with_little_room();
    let mut publisher = Wire::connect(&gateway, "publisher");
    for topic in ["plant/a", "plant/b", "plant/c"] {
        publish_retained(&mut publisher, topic, b"x");
    }
    let before = letters(&gateway, 3);
    gateway.json(&["dead-letters", "retry", &id(&before[1])]);
    let gateway = gateway.terminate().home.start();
    let after = letters(&gateway, 2);
    assert_eq!(after, [before[0].clone(), before[2].clone()]);
    assert_eq!(gateway.json(&["dead-letters", "purge"])["removed"], 2);
    let gateway = gateway.terminate().home.start();
    let mut publisher = Wire::connect(&gateway, "publisher");
    publish_retained(&mut publisher, "plant/d", b"x");
    let new = letters(&gateway, 1).remove(0);
    assert!(new["id"].as_u64() > before[2]["id"].as_u64(), "{new}");
}

#[test]
fn a_retry_has_to_say_which_letters_it_means() {
    let home = Home::new();
    for args in [
        &["retry"][..],
        &["retry", "--all", "3"],
        &["retry", "x"],
        &["show"],
    ] {
        let output = home.command(&[&["dead-letters"], args].concat()).output();
        assert_eq!(output.unwrap().status.code(), Some(2), "{args:?}");
    }
}
