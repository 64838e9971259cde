//! What MQTT clients get from the broker.

use std::time::{Duration, Instant};

use crate::gateway::{Gateway, Home};
use crate::mosquitto;
use crate::wire::{
    CONNACK, DISCONNECT, SUBACK, UNSUBACK, Wire, connect_packet, connect_packet_with, packet,
    publish_packet, string, subscribe_packet,
};

fn gateway() -> Gateway {
    Home::new().start()
}

#[test]
fn messages_go_between_mosquittos_clients_at_every_qos_and_version() {
    let gateway = gateway();
    for sub_version in ["mqttv311", "mqttv5"] {
        for sub_qos in ["0", "1", "2"] {
            let format = ["-F", "%q %r %t %p"];
            let args = ["-t", "a/+/c", "-q", sub_qos, "-V", sub_version];
            let subscriber = mosquitto::subscribe(&gateway, &[&args[..], &format].concat());
            for pub_version in ["mqttv311", "mqttv5"] {
                for pub_qos in ["0", "1", "2"] {
                    let text = format!("from {pub_version} at {pub_qos}");
                    let args = ["-t", "a/b/c", "-q", pub_qos, "-V", pub_version, "-m", &text];
                    mosquitto::publish(&gateway, &args);
                    let qos = sub_qos.min(pub_qos);
                    assert_eq!(subscriber.line(), format!("{qos} 0 a/b/c {text}"));
                }
            }
            subscriber.leave(&gateway);
        }
    }
}

#[test]
fn a_retained_message_meets_later_subscribers_until_it_is_deleted() {
    let gateway = gateway();
    let retained = ["-t", "state/pump", "-q", "1", "-r"];
    mosquitto::publish(&gateway, &[&retained[..], &["-m", "on"]].concat());
    let args = ["-t", "state/#", "-C", "1", "-F", "%r %t %p"];
    let lines = mosquitto::subscribe_until_done(&gateway, &args);
    assert_eq!(lines, ["1 state/pump on"]);

    let present = mosquitto::subscribe(&gateway, &["-t", "state/+", "-F", "%r %p"]);
    assert_eq!(present.line(), "1 on");
    mosquitto::publish(&gateway, &[&retained[..], &["-m", "off"]].concat());
    assert_eq!(
        present.line(),
        "0 off",
        "who was there gets it as a new message"
    );

    mosquitto::publish(&gateway, &[&retained[..], &["-n"]].concat());
    gateway.until_status(
        "retained messages",
        |s| s["broker"]["retained"].as_u64(),
        Some(0),
    );
    let mut wire = Wire::connect(&gateway, "late");
    wire.subscribe("state/#", 0);
    wire.assert_quiet();
}

#[test]
fn the_will_of_a_client_that_is_killed_is_published_and_of_one_that_leaves_is_not() {
    let gateway = gateway();
    let mut witness = Wire::connect(&gateway, "witness");
    witness.subscribe("will/#", 1);
    let will = |topic| {
        let payload = ["--will-payload", "gone", "--will-qos", "1"];
        [&["-t", "x", "--will-topic", topic][..], &payload].concat()
    };

    let polite = mosquitto::subscribe(&gateway, &[&will("will/polite")[..], &["-C", "1"]].concat());
    mosquitto::publish(&gateway, &["-t", "x", "-m", "enough"]);
    assert_eq!(polite.line(), "enough");
    let clients = |status: &serde_json::Value| status["broker"]["connected"].as_u64();
    gateway.until_status("clients", clients, Some(1));
    witness.assert_quiet();

    mosquitto::subscribe(&gateway, &will("will/killed")).kill();
    let message = witness.next_message();
    assert_eq!(
        (message.topic(), message.payload()),
        ("will/killed", &b"gone"[..])
    );
}

#[test]
fn a_second_client_of_the_same_id_takes_the_place_of_the_first() {
    let gateway = gateway();
    let mut first = Wire::connect_v5(&gateway, "twin");
    first.send(&packet(
        0x82,
        &[&[0, 1, 0][..], &string("a"), &[1]].concat(),
    ));
    assert_eq!(first.next().kind(), SUBACK);
    let mut second = Wire::connect(&gateway, "twin");
    let last = first.until_closed();
    const SESSION_TAKEN_OVER: u8 = 0x8e;
    assert_eq!(
        (last[0].kind(), last[0].body[0]),
        (DISCONNECT, SESSION_TAKEN_OVER)
    );

    second.subscribe("a", 1);
    Wire::connect(&gateway, "other").publish("a", b"for the second");
    assert_eq!(second.next_message().payload(), b"for the second");
    second.assert_quiet();
}

#[test]
fn a_client_that_falls_silent_is_cut_off_after_one_and_a_half_keep_alives() {
    let gateway = gateway();
    let mut witness = Wire::connect(&gateway, "witness");
    witness.subscribe("will", 0);
    let mut silent = Wire::open(&gateway);
    let started = Instant::now();
    // Keep-alive 1 s; a will.
    let will = [string("will"), string("silence")].concat();
    silent.send(&connect_packet_with(4, "silent", 1, 0x06, &will));
    silent.accepted();
    assert_eq!(silent.until_closed(), []);
    assert!(started.elapsed() >= Duration::from_millis(1500));
    assert_eq!(witness.next_message().payload(), b"silence");
}

#[test]
fn a_session_that_is_kept_gets_what_was_published_meanwhile_in_order() {
    let gateway = gateway();
    let session = ["-i", "kept", "-c", "-q", "1", "-t", "a/#"];
    // -E: leave as soon as the subscription is acknowledged.
    mosquitto::subscribe_until_done(&gateway, &[&session[..], &["-E"]].concat());
    for number in 0..5 {
        let text = number.to_string();
        mosquitto::publish(&gateway, &["-t", "a/b", "-q", "1", "-m", &text]);
        mosquitto::publish(&gateway, &["-t", "a/b", "-q", "0", "-m", "not kept"]);
    }
    let lines = mosquitto::subscribe_until_done(&gateway, &[&session[..], &["-C", "5"]].concat());
    assert_eq!(lines, ["0", "1", "2", "3", "4"]);
}

#[test]
fn a_session_that_is_kept_loses_nothing_when_the_connection_breaks_before_the_acknowledgement() {
    let gateway = gateway();
    let connect = connect_packet_with(4, "breaks", 0, 0, &[]);
    let mut wire = Wire::open(&gateway);
    wire.send(&connect);
    wire.accepted();
    wire.subscribe("a", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("a", b"one");
    let first = wire.next();
    assert_eq!(first.payload(), b"one");
    wire.reset();
    publisher.publish("a", b"two");

    let mut wire = Wire::open(&gateway);
    wire.send(&connect);
    let connack = wire.next();
    assert_eq!(
        (connack.kind(), &connack.body[..]),
        (CONNACK, &[1, 0][..]),
        "session present"
    );
    let again = wire.next_message();
    const DUP: u8 = 0b1000;
    assert_eq!((again.payload(), again.first & DUP), (&b"one"[..], DUP));
    assert_eq!(wire.next_message().payload(), b"two");
    wire.assert_quiet();
}

#[test]
fn after_unsubscribing_nothing_comes() {
    let gateway = gateway();
    let mut wire = Wire::connect(&gateway, "c");
    wire.subscribe("a/#", 1);
    wire.subscribe("b", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("a/1", b"wanted");
    assert_eq!(wire.next_message().payload(), b"wanted");
    wire.send(&packet(0xa2, &[&[0, 9][..], &string("a/#")].concat()));
    let unsuback = wire.next();
    assert_eq!(
        (unsuback.kind(), &unsuback.body[..]),
        (UNSUBACK, &[0, 9][..])
    );
    publisher.publish("a/1", b"unwanted");
    publisher.publish("b", b"still wanted");
    assert_eq!(wire.next_message().payload(), b"still wanted");
    wire.assert_quiet();
}

#[test]
fn a_message_is_delivered_once_to_a_client_with_overlapping_subscriptions() {
    let gateway = gateway();
    let mut wire = Wire::connect(&gateway, "c");
    wire.send(&subscribe_packet(5, &[("#", 0), ("a/+", 1), ("a/b", 0)]));
    assert_eq!(wire.next().body, [0, 5, 0, 1, 0]);
    Wire::connect(&gateway, "publisher").publish("a/b", b"x");
    let message = wire.next_message();
    assert_eq!(
        (message.qos(), message.payload(), message.is_retained()),
        (1, &b"x"[..], false)
    );
    wire.assert_quiet();
}

#[test]
fn a_topic_in_any_script_reaches_those_who_subscribed_to_it() {
    let gateway = gateway();
    for topic in [
        "ünïcode/temperatur",
        "温度/一号线",
        "🌡/1",
        "\u{feff}x",
        " ",
        "/",
        "//",
    ] {
        let subscriber = mosquitto::subscribe(&gateway, &["-t", topic, "-F", "%t=%p"]);
        mosquitto::publish(&gateway, &["-t", topic, "-q", "1", "-m", "21"]);
        assert_eq!(subscriber.line(), format!("{topic}=21"));
        subscriber.leave(&gateway);
    }
}

#[test]
fn what_comes_together_with_connect_is_not_left_lying() {
    let gateway = gateway();
    let mut wire = Wire::open(&gateway);
    let packets = [
        connect_packet(4, "eager", 0),
        subscribe_packet(1, &[("a", 0)]),
        publish_packet("a", b"eager", 1, 2),
    ];
    wire.send(&packets.concat());
    wire.accepted();
    assert_eq!(wire.next().kind(), SUBACK);
    let mut rest = [wire.next(), wire.next()];
    rest.sort_by_key(|packet| packet.kind());
    assert_eq!(rest[0].payload(), b"eager");
    assert_eq!(rest[1].body, [0, 2], "PUBACK");
}

#[test]
fn a_message_that_comes_together_with_connect_and_disconnect_is_delivered() {
    let gateway = gateway();
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("a", 0);
    let goodbye = vec![0xe0, 0];
    let packets = [
        connect_packet(4, "hasty", 0),
        publish_packet("a", b"x", 0, 0),
        goodbye,
    ];
    let mut wire = Wire::open(&gateway);
    wire.send(&packets.concat());
    assert_eq!(subscriber.next_message().payload(), b"x");
    assert_eq!(wire.until_closed().len(), 1, "CONNACK");
}

#[test]
fn a_client_that_publishes_and_leaves_at_once_has_published_everything() {
    let gateway = gateway();
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("flood", 0);
    const COUNT: u32 = 50_000;
    let mut bytes = connect_packet(4, "flood", 0);
    for number in 0..COUNT {
        bytes.extend(publish_packet("flood", &number.to_be_bytes(), 0, 0));
    }
    bytes.extend([0xe0, 0]);
    let mut publisher = Wire::open(&gateway);
    publisher.send(&bytes);
    for number in 0..COUNT {
        assert_eq!(subscriber.next_message().payload(), number.to_be_bytes());
    }
    assert_eq!(publisher.until_closed().len(), 1, "the CONNACK");
}
