//! What clients and operators rely on across the gateway's end, orderly or not.

use crate::gateway::{Gateway, Home, eventually};
use crate::wire::{PUBCOMP, PUBLISH, PUBREC, Packet, SUBACK, Wire, packet, publish_packet, string};

const DISCONNECT: [u8; 2] = [0xe0, 0];

/// Subscribes, and goes.
fn leave_subscribed(gateway: &Gateway, id: &str, filter: &str, qos: u8) {
    let (mut wire, present) = Wire::connect_kept(gateway, id);
    assert!(!present);
    wire.subscribe(filter, qos);
    wire.send(&DISCONNECT);
    wire.until_closed();
}

fn assert_numbered(message: &Packet, number: usize) {
    assert_eq!(message.payload(), number.to_string().as_bytes());
}

#[test]
fn what_came_for_an_absent_client_is_there_after_kill_9() {
    let gateway = Home::new().start();
    leave_subscribed(&gateway, "keeper", "a/#", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..200 {
        publisher.publish("a/b", number.to_string().as_bytes());
    }
    let gateway = gateway.kill().start();
    let (mut keeper, present) = Wire::connect_kept(&gateway, "keeper");
    assert!(present);
    for number in 0..200 {
        assert_numbered(&keeper.next_message(), number);
    }
    // The subscription is there, too.
    Wire::connect(&gateway, "publisher").publish("a/c", b"200");
    assert_numbered(&keeper.next_message(), 200);
    keeper.send(&DISCONNECT);
    keeper.until_closed();

    // What was acknowledged does not come again.
    let gateway = gateway.terminate().home.start();
    let (mut keeper, present) = Wire::connect_kept(&gateway, "keeper");
    assert!(present);
    keeper.assert_quiet();
}

#[test]
fn what_was_in_flight_at_an_orderly_stop_comes_again_and_the_rest_after_it() {
    let home = Home::new().set("mqtt.max_inflight", 3);
    let gateway = home.start();
    let (mut keeper, _) = Wire::connect_kept(&gateway, "keeper");
    keeper.subscribe("a/#", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..50 {
        publisher.publish("a/b", number.to_string().as_bytes());
    }
    let ids: Vec<u16> = (0..3).map(|_| keeper.next().id()).collect();
    let gateway = gateway.terminate().home.start();
    let (mut keeper, present) = Wire::connect_kept(&gateway, "keeper");
    assert!(present);
    for (number, id) in ids.into_iter().enumerate() {
        let message = keeper.next_message();
        assert_numbered(&message, number);
        assert_eq!(message.id(), id);
        assert!(message.first & 8 != 0, "sent again, and says so");
    }
    for number in 3..50 {
        let message = keeper.next_message();
        assert_numbered(&message, number);
        assert!(message.first & 8 == 0);
    }
}

#[test]
fn retained_messages_survive_kill_9_and_deleted_ones_stay_away() {
    let gateway = Home::new().start();
    let mut wire = Wire::connect(&gateway, "publisher");
    let retained = |topic: &str, payload: &[u8], id| {
        let mut packet = publish_packet(topic, payload, 1, id);
        packet[0] |= 1;
        packet
    };
    // The topic has more bytes than a key of the database may have.
    let long = format!("state/{}", "x".repeat(2000));
    for (id, (topic, payload)) in [
        ("state/pump", &b"on"[..]),
        (&long, b"long"),
        ("state/fan", b"off"),
        ("state/fan", b""),
    ]
    .into_iter()
    .enumerate()
    {
        wire.send(&retained(topic, payload, id as u16 + 1));
        wire.next();
    }
    let gateway = gateway.kill().start();
    let mut wire = Wire::connect(&gateway, "subscriber");
    wire.subscribe("state/#", 1);
    let mut found = [wire.next_message(), wire.next_message()].map(|message| {
        assert!(message.is_retained());
        (message.topic().to_owned(), message.payload().to_vec())
    });
    found.sort();
    let pump = ("state/pump".to_owned(), b"on".to_vec());
    assert_eq!(found, [pump, (long, b"long".to_vec())]);
    wire.assert_quiet();
}

#[test]
fn a_qos_2_message_is_not_taken_twice_though_the_gateway_was_stopped_in_between() {
    let gateway = Home::new().start();
    let (mut sender, _) = Wire::connect_kept(&gateway, "sender");
    sender.send(&publish_packet("a", b"once", 2, 9));
    assert_eq!(sender.next().kind(), PUBREC);
    let gateway = gateway.terminate().home.start();
    let mut observer = Wire::connect(&gateway, "observer");
    observer.subscribe("#", 2);
    let (mut sender, present) = Wire::connect_kept(&gateway, "sender");
    assert!(present);
    let mut again = publish_packet("a", b"once", 2, 9);
    again[0] |= 8;
    sender.send(&again);
    assert_eq!(sender.next().kind(), PUBREC);
    sender.send(&[0x62, 2, 0, 9]);
    assert_eq!(sender.next().kind(), PUBCOMP);
    observer.assert_quiet();
}

#[test]
fn a_new_qos_2_message_is_taken_after_a_crash_though_its_id_was_in_use_before() {
    let gateway = Home::new().start();
    let (mut sender, _) = Wire::connect_kept(&gateway, "sender");
    sender.send(&publish_packet("a", b"first", 2, 8));
    assert_eq!(sender.next().kind(), PUBREC);
    sender.reset();
    gateway.until_status(
        "parked sessions",
        |s| s["broker"]["parked"].as_u64(),
        Some(1),
    );
    let (mut sender, present) = Wire::connect_kept(&gateway, "sender");
    assert!(present);
    sender.send(&[0x62, 2, 0, 8]);
    assert_eq!(sender.next().kind(), PUBCOMP);
    // Its acknowledgement says that all before it is on disk.
    let mut retained = publish_packet("state", b"x", 1, 1);
    retained[0] |= 1;
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.send(&retained);
    publisher.next();
    let gateway = gateway.kill().start();
    let mut observer = Wire::connect(&gateway, "observer");
    observer.subscribe("a", 0);
    let (mut sender, present) = Wire::connect_kept(&gateway, "sender");
    assert!(present);
    sender.send(&publish_packet("a", b"second", 2, 8));
    assert_eq!(sender.next().kind(), PUBREC);
    assert_eq!(observer.next_message().payload(), b"second");
}

#[test]
fn what_expires_on_disk_is_not_sent() {
    let gateway = Home::new().start();
    leave_subscribed(&gateway, "keeper", "a", 1);
    let mut publisher = Wire::connect_v5(&gateway, "publisher");
    let mut publish = |payload: &str, expiry_s: u32| {
        let properties = [&[5, 2][..], &expiry_s.to_be_bytes()].concat();
        let body = [&string("a")[..], &[0, 7], &properties, payload.as_bytes()].concat();
        publisher.send(&packet(0x32, &body));
        publisher.next();
    };
    publish("short", 1);
    publish("long", 3600);
    let gateway = gateway.terminate().home.start();
    let dead_letters = || gateway.json(&["dead-letters"])["letters"].to_string();
    // It lives for a second, and nothing tells of its end.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let (mut keeper, _) = Wire::connect_kept(&gateway, "keeper");
    assert_eq!(keeper.next_message().payload(), b"long");
    keeper.assert_quiet();
    assert!(dead_letters().contains("expired"), "{}", dead_letters());
}

#[test]
fn a_slow_client_gets_from_the_disk_what_had_no_room_in_memory() {
    let home = Home::new()
        .set("mqtt.max_queued_bytes", "64KiB")
        .set("mqtt.max_queued_messages", 100_000);
    let gateway = home.start();
    let (mut keeper, _) = Wire::connect_kept(&gateway, "keeper");
    keeper.subscribe("a", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    const COUNT: usize = 5000;
    for number in 0..COUNT {
        publisher.publish("a", number.to_string().as_bytes());
    }
    let status = gateway.status();
    assert_eq!(status["broker"]["messages_dropped"], 0, "{status:#}");
    for number in 0..COUNT {
        assert_numbered(&keeper.next_message(), number);
    }
    publisher.publish("a", COUNT.to_string().as_bytes());
    assert_numbered(&keeper.next_message(), COUNT);
}

#[test]
fn beyond_its_bound_on_disk_what_comes_is_dropped_and_counted() {
    let home = Home::new().set("mqtt.persistence.max_bytes_per_client", "16KiB");
    let gateway = home.start();
    leave_subscribed(&gateway, "keeper", "a", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..400 {
        publisher.publish("a", number.to_string().as_bytes());
    }
    let dropped = gateway.status()["broker"]["messages_dropped"]
        .as_u64()
        .unwrap() as usize;
    assert!(dropped > 0 && dropped < 400, "{dropped}");
    let (mut keeper, _) = Wire::connect_kept(&gateway, "keeper");
    for number in 0..400 - dropped {
        assert_numbered(&keeper.next_message(), number);
    }
    keeper.assert_quiet();
}

/// MQTT 5 CONNECT with a will on "will", a delay for it in seconds, and a session of an hour.
fn connect_with_will(id: &str, clean: bool, delay_s: u32) -> Vec<u8> {
    let mut body = b"\x00\x04MQTT\x05".to_vec();
    body.push(0x0c | u8::from(clean) << 1);
    body.extend([0, 0]); // keep-alive
    body.extend([5, 0x11, 0, 0, 0x0e, 0x10]); // session expiry
    body.extend(string(id));
    body.push(5);
    body.push(0x18);
    body.extend(delay_s.to_be_bytes());
    body.extend(string("will"));
    body.extend(string("gone"));
    packet(0x10, &body)
}

#[test]
fn a_delayed_will_waits_for_the_client_also_across_a_restart() {
    let gateway = Home::new().start();
    let open = |gateway: &Gateway, clean, delay| {
        let mut wire = Wire::open(gateway);
        wire.send(&connect_with_will("c", clean, delay));
        wire.accepted();
        wire
    };
    let witness = |gateway: &Gateway| {
        let mut witness = Wire::connect(gateway, "witness");
        witness.subscribe("will", 0);
        witness
    };
    let mut sees = witness(&gateway);
    open(&gateway, true, 3600).reset();
    gateway.until_status(
        "parked sessions",
        |s| s["broker"]["parked"].as_u64(),
        Some(1),
    );
    sees.assert_quiet();
    // It comes back in time.
    let back = open(&gateway, false, 3600);
    sees.assert_quiet();
    back.reset();
    gateway.until_status(
        "parked sessions",
        |s| s["broker"]["parked"].as_u64(),
        Some(1),
    );
    // The gateway ends, and the will waits on. A clean start ends the session and with it the wait.
    let gateway = gateway.terminate().home.start();
    let mut sees = witness(&gateway);
    sees.assert_quiet();
    let again = open(&gateway, true, 1);
    assert_eq!(sees.next_message().payload(), b"gone");
    // And when the delay passes, it is published.
    again.reset();
    assert_eq!(sees.next_message().payload(), b"gone");
}

#[test]
fn members_of_a_share_group_have_the_messages_among_them_and_get_what_one_leaves() {
    let gateway = Home::new().set("mqtt.max_inflight", 1).start();
    let mut members = ["a", "b", "c"].map(|id| {
        let mut wire = Wire::connect(&gateway, id);
        wire.subscribe("$share/g/job/+", 1);
        wire
    });
    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..30 {
        publisher.publish("job/x", number.to_string().as_bytes());
    }
    // Each has one in flight and nine behind it. The first acknowledges none and goes.
    let number = |message: &Packet| -> usize {
        assert_eq!(message.kind(), PUBLISH);
        std::str::from_utf8(message.payload())
            .unwrap()
            .parse()
            .unwrap()
    };
    let [first, second, third] = &mut members;
    number(&first.next());
    first.send(&DISCONNECT);
    let mut seen = Vec::new();
    for _ in 0..15 {
        seen.push(number(&second.next_message()));
        seen.push(number(&third.next_message()));
    }
    seen.sort();
    assert_eq!(seen, (0..30).collect::<Vec<_>>());
}

#[test]
fn what_a_member_of_a_share_group_has_not_completed_at_qos_2_when_it_goes_is_a_dead_letter() {
    let gateway = Home::new().set("mqtt.max_inflight", 1).start();
    let mut first = Wire::connect(&gateway, "first");
    first.subscribe("$share/g/job", 2);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for (id, payload) in [(1, b"1"), (2, b"2")] {
        publisher.send(&publish_packet("job", payload, 2, id));
        assert_eq!(publisher.next().kind(), PUBREC);
    }
    assert_eq!(first.next().payload(), b"1");
    let mut second = Wire::connect(&gateway, "second");
    second.subscribe("$share/g/job", 2);
    first.send(&DISCONNECT);
    // MQTT 5.0, 4.8.2: nobody else may have the first message.
    assert_eq!(second.next().payload(), b"2");
    second.assert_quiet();
    let letters = eventually("a dead letter", || {
        let listed = gateway.json(&["dead-letters"]);
        let letters = listed["letters"].as_array()?.clone();
        (!letters.is_empty()).then_some(letters)
    });
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0]["reason"], "session_ended");
    assert_eq!(letters[0]["source"], "first");
}

#[test]
fn a_share_groups_name_on_two_filters_is_two_groups() {
    let gateway = Home::new().start();
    let mut first = Wire::connect(&gateway, "first");
    first.subscribe("$share/g/a", 0);
    let mut second = Wire::connect(&gateway, "second");
    second.subscribe("$share/g/b", 0);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..10 {
        publisher.publish("a", number.to_string().as_bytes());
        publisher.publish("b", number.to_string().as_bytes());
    }
    for number in 0..10 {
        assert_numbered(&first.next_message(), number);
        assert_numbered(&second.next_message(), number);
    }
}

#[test]
fn an_unsubscribed_member_of_a_share_group_gets_nothing_more() {
    let gateway = Home::new().start();
    let mut wire = Wire::connect(&gateway, "member");
    wire.subscribe("$share/g/a", 1);
    let body = [&[0, 2][..], &string("$share/g/a")].concat();
    wire.send(&packet(0xa2, &body));
    let unsuback = wire.next();
    assert_ne!(unsuback.kind(), SUBACK);
    Wire::connect(&gateway, "publisher").publish("a", b"x");
    wire.assert_quiet();
    assert_eq!(gateway.status()["broker"]["subscriptions"], 0);
}

#[test]
fn what_waits_on_disk_for_a_session_that_ends_goes_to_the_dead_letters() {
    let gateway = Home::new().start();
    leave_subscribed(&gateway, "keeper", "a", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for payload in ["1", "2", "3"] {
        publisher.publish("a", payload.as_bytes());
    }
    let gateway = gateway.terminate().home.start();
    gateway.json(&["client", "forget", "keeper"]);
    let listed = gateway.json(&["dead-letters"]);
    let letters = listed["letters"].as_array().unwrap();
    let of_keeper = letters
        .iter()
        .filter(|letter| letter["reason"] == "session_ended" && letter["source"] == "keeper");
    assert_eq!(of_keeper.count(), 3, "{listed}");
}

#[test]
fn of_a_session_that_ends_each_message_that_was_not_acknowledged_counts_once() {
    let gateway = Home::new().start();
    leave_subscribed(&gateway, "keeper", "a", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..40 {
        publisher.publish("a", number.to_string().as_bytes());
    }
    let (mut keeper, _) = Wire::connect_kept(&gateway, "keeper");
    // All come from disk; a quarter is acknowledged, the rest is in flight.
    for _ in 0..10 {
        keeper.next_message();
    }
    for _ in 10..40 {
        assert_eq!(keeper.next().kind(), PUBLISH);
    }
    keeper.assert_quiet();
    // Waits for the disk.
    gateway.json(&["client", "forget", "keeper"]);
    let (_, metrics) = gateway.http("/metrics");
    let line = "headgate_dead_letters_total{reason=\"session_ended\"} 30\n";
    assert!(metrics.contains(line), "{metrics}");
}
