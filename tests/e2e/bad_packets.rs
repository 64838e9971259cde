//! Clients that break the rules, by mistake or on purpose, beside two that don't: these go on and
//! lose nothing, whatever the others do.

use std::thread;
use std::time::{Duration, Instant};

use crate::gateway::{Gateway, Home, eventually};
use crate::neighbours::Neighbours;
use crate::wire::{
    CONNACK, DISCONNECT, PINGRESP, PUBACK, SUBACK, Wire, connect_packet, connect_packet_with,
    packet, publish_packet, string, subscribe_packet,
};

/// A gateway on which two clients talk, and go on talking through `test`.
fn beside_neighbours(home: Home, test: impl FnOnce(&Gateway, &Neighbours)) {
    let gateway = home.start();
    let neighbours = Neighbours::start(&gateway);
    test(&gateway, &neighbours);
    neighbours.assert_lost_nothing();
    gateway.until_status("clients", connected, 0);
}

fn connected(status: &serde_json::Value) -> u64 {
    status["broker"]["connected"].as_u64().unwrap()
}

const NEIGHBOURS: u64 = 2;

/// Waits until only the neighbours are left.
fn until_alone(gateway: &Gateway) {
    gateway.until_status("clients", connected, NEIGHBOURS);
}

#[test]
fn what_is_no_connect_never_becomes_a_client() {
    let tls_hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let connect = |body: &[u8]| packet(0x10, body);
    let cases = [
        (
            "PUBLISH before CONNECT",
            publish_packet("neighbours/a", b"{}", 1, 1),
        ),
        ("SUBSCRIBE before CONNECT", subscribe_packet(1, &[("#", 0)])),
        ("PINGREQ before CONNECT", vec![0xc0, 0]),
        ("DISCONNECT before CONNECT", vec![0xe0, 0]),
        ("a server's CONNACK", vec![0x20, 2, 0, 0]),
        ("packet type 0", vec![0; 64]),
        ("packet type 15", vec![0xff; 64]),
        (
            "a web browser",
            b"GET / HTTP/1.1\r\nhost: headgate\r\n\r\n".to_vec(),
        ),
        ("a TLS client", tls_hello.to_vec()),
        ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
        ("CONNECT with flags in its first byte", vec![0x1f, 0]),
        ("an empty CONNECT", vec![0x10, 0]),
        (
            "a CONNECT of another protocol",
            connect(b"\x00\x04AMQP\x04\x02\x00\x00\x00\x01c"),
        ),
        (
            "a CONNECT with a long protocol name",
            connect(&string("M".repeat(60_000))),
        ),
        (
            "MQTT 3.1",
            connect(b"\x00\x06MQIsdp\x03\x02\x00\x00\x00\x01c"),
        ),
        ("MQTT 6", connect(b"\x00\x04MQTT\x06\x02\x00\x00\x00\x01c")),
        (
            "a reserved CONNECT flag",
            connect(b"\x00\x04MQTT\x04\x03\x00\x00\x00\x01c"),
        ),
        (
            "a client id past the end",
            connect(b"\x00\x04MQTT\x04\x02\x00\x00\x00\x09c"),
        ),
        (
            "a client id that is not UTF-8",
            connect(b"\x00\x04MQTT\x04\x02\x00\x00\x00\x02\xff\xfe"),
        ),
        (
            "a client id with a line end",
            connect(b"\x00\x04MQTT\x04\x02\x00\x00\x00\x03a\nb"),
        ),
        (
            "no client id and a session to keep",
            connect(b"\x00\x04MQTT\x04\x00\x00\x00\x00\x00"),
        ),
        (
            "a will with QoS 3",
            connect_packet_with(4, "c", 0, 0x1e, &[string("w"), string("x")].concat()),
        ),
        (
            "a will on a wildcard",
            connect_packet_with(4, "c", 0, 0x06, &[string("w/#"), string("x")].concat()),
        ),
        (
            "a password without a user name",
            connect_packet_with(4, "c", 0, 0x42, &string("secret")),
        ),
        (
            "NUL in the user name",
            connect_packet_with(4, "c", 0, 0x82, &string("u\0")),
        ),
        (
            "bytes behind the last field",
            connect_packet_with(4, "c", 0, 0x02, b"zz"),
        ),
        (
            "a CONNECT of 256 MiB",
            [&[0x10, 0xff, 0xff, 0xff, 0x7f][..], &[0; 64]].concat(),
        ),
        (
            "a length that never ends",
            [&[0x10][..], &[0xff; 64]].concat(),
        ),
    ];
    beside_neighbours(Home::new(), |gateway, neighbours| {
        for (what, bytes) in &cases {
            let mut wire = Wire::open(gateway);
            wire.send_while_open(bytes);
            for packet in wire.until_closed() {
                assert_eq!(packet.kind(), CONNACK, "{what}: {packet:?}");
                assert_ne!(packet.body[1], 0, "{what}: {packet:?}");
            }
            neighbours.assert_go_on();
        }
        let refused = |status: &serde_json::Value| status["broker"]["refused"].as_u64().unwrap();
        gateway.until_status("refused connections", refused, cases.len() as u64);
    });
}

#[test]
fn a_client_of_another_version_of_mqtt_is_told_so() {
    let gateway = Home::new().start();
    for name_and_level in [&b"\x00\x06MQIsdp\x03"[..], b"\x00\x04MQTT\x06"] {
        let body = [name_and_level, b"\x02\x00\x00\x00\x01c"].concat();
        let mut wire = Wire::open(&gateway);
        wire.send(&packet(0x10, &body));
        const UNACCEPTABLE_PROTOCOL_VERSION: u8 = 1;
        assert_eq!(wire.next().body, [0, UNACCEPTABLE_PROTOCOL_VERSION]);
        assert_eq!(wire.until_closed(), []);
    }
}

#[test]
fn a_connect_that_breaks_a_rule_of_mqtt_5_is_answered_with_the_reason() {
    const MALFORMED: u8 = 0x81;
    const PROTOCOL_ERROR: u8 = 0x82;
    let connect = |flags: u8, properties: &[u8], payload: &[u8]| {
        let head = [&b"\x00\x04MQTT\x05"[..], &[flags, 0, 0]].concat();
        let length = [properties.len() as u8];
        packet(0x10, &[&head[..], &length, properties, payload].concat())
    };
    let property = |bytes: &[u8]| connect(0x02, bytes, b"\x00\x01c");
    let will = |properties: &[u8]| {
        let length = [properties.len() as u8];
        let payload = [b"\x00\x01c", &length[..], properties, b"\x00\x01w\x00\x01x"].concat();
        connect(0x06, b"", &payload)
    };
    let cases = [
        (
            "session expiry twice",
            property(b"\x11\0\0\0\x01\x11\0\0\0\x02"),
            PROTOCOL_ERROR,
        ),
        (
            "request problem information 2",
            property(b"\x17\x02"),
            PROTOCOL_ERROR,
        ),
        (
            "request response information 2",
            property(b"\x19\x02"),
            PROTOCOL_ERROR,
        ),
        (
            "authentication data alone",
            property(b"\x16\0\x01x"),
            PROTOCOL_ERROR,
        ),
        ("a property of PUBLISH", property(b"\x23\0\x01"), MALFORMED),
        (
            "bytes behind the last field",
            connect(0x02, b"", b"\x00\x01czz"),
            MALFORMED,
        ),
        ("payload format 2", will(b"\x01\x02"), PROTOCOL_ERROR),
        (
            "NUL in the will's content type",
            will(b"\x03\0\x02a\0"),
            MALFORMED,
        ),
        (
            "a wildcard in the will's response topic",
            will(b"\x08\0\x03r/#"),
            PROTOCOL_ERROR,
        ),
    ];
    beside_neighbours(Home::new(), |gateway, neighbours| {
        for (what, bytes, reason) in &cases {
            let mut wire = Wire::open(gateway);
            wire.send(bytes);
            let answers = wire.until_closed();
            let said: Vec<_> = answers
                .iter()
                .map(|packet| (packet.kind(), packet.body[1]))
                .collect();
            assert_eq!(said, [(CONNACK, *reason)], "{what}");
            neighbours.assert_go_on();
        }
    });
}

#[test]
fn a_client_that_breaks_a_rule_is_told_which_and_closed() {
    const MALFORMED: u8 = 0x81;
    const PROTOCOL_ERROR: u8 = 0x82;
    const TOPIC_NAME_INVALID: u8 = 0x90;
    const TOPIC_ALIAS_INVALID: u8 = 0x94;
    const PACKET_TOO_LARGE: u8 = 0x95;
    let publish = |topic: &[u8]| packet(0x30, &[&string(topic)[..], b"\x00{}"].concat());
    let cases = [
        ("two CONNECTs", connect_packet(5, "c", 0), PROTOCOL_ERROR),
        (
            "a topic that is not UTF-8",
            publish(b"neighbours/\xff"),
            TOPIC_NAME_INVALID,
        ),
        (
            "a surrogate in a topic",
            publish(b"neighbours/\xed\xa0\x80"),
            TOPIC_NAME_INVALID,
        ),
        (
            "NUL in a topic",
            publish(b"neighbours/\0"),
            TOPIC_NAME_INVALID,
        ),
        (
            "# in a publish",
            publish(b"neighbours/#"),
            TOPIC_NAME_INVALID,
        ),
        ("+ in a publish", publish(b"+/a"), TOPIC_NAME_INVALID),
        ("an empty topic", publish(b""), TOPIC_NAME_INVALID),
        ("QoS 3", packet(0x36, b"\x00\x01a\x00\x01\x00"), MALFORMED),
        ("DUP at QoS 0", packet(0x38, b"\x00\x01a\x00"), MALFORMED),
        (
            "packet id 0",
            packet(0x32, b"\x00\x01a\x00\x00\x00"),
            MALFORMED,
        ),
        (
            "a topic past the end",
            packet(0x30, b"\x00\x09a"),
            MALFORMED,
        ),
        ("an empty PUBLISH", packet(0x30, b""), MALFORMED),
        (
            "properties past the end",
            packet(0x30, b"\x00\x01a\x7f"),
            MALFORMED,
        ),
        (
            "an unknown property",
            packet(0x30, b"\x00\x01a\x02\x7e\x00"),
            MALFORMED,
        ),
        (
            "property payload format 2",
            packet(0x30, b"\x00\x01a\x02\x01\x02"),
            PROTOCOL_ERROR,
        ),
        (
            "property payload format twice",
            packet(0x30, b"\x00\x01a\x04\x01\x00\x01\x00"),
            PROTOCOL_ERROR,
        ),
        (
            "NUL in the property content type",
            packet(0x30, b"\x00\x01a\x05\x03\x00\x02a\x00"),
            MALFORMED,
        ),
        (
            "a property of CONNECT",
            packet(0x30, b"\x00\x01a\x03\x21\x00\x01"),
            MALFORMED,
        ),
        (
            "topic alias 0",
            packet(0x30, b"\x00\x01a\x03\x23\x00\x00"),
            TOPIC_ALIAS_INVALID,
        ),
        (
            "topic alias 65535",
            packet(0x30, b"\x00\x01a\x03\x23\xff\xff"),
            TOPIC_ALIAS_INVALID,
        ),
        (
            "an unknown topic alias",
            packet(0x30, b"\x00\x00\x03\x23\x00\x01"),
            TOPIC_ALIAS_INVALID,
        ),
        (
            "256 MiB",
            vec![0x30, 0xff, 0xff, 0xff, 0x7f],
            PACKET_TOO_LARGE,
        ),
        (
            "a length that never ends",
            vec![0x30, 0xff, 0xff, 0xff, 0xff, 0xff],
            MALFORMED,
        ),
        ("CONNACK", packet(0x20, &[0, 0, 0]), PROTOCOL_ERROR),
        ("SUBACK", packet(0x90, &[0, 1, 0, 0]), PROTOCOL_ERROR),
        ("UNSUBACK", packet(0xb0, &[0, 1, 0, 0]), PROTOCOL_ERROR),
        ("PINGRESP", packet(0xd0, &[]), PROTOCOL_ERROR),
        ("AUTH", packet(0xf0, &[]), PROTOCOL_ERROR),
        ("packet type 0", packet(0x00, &[]), MALFORMED),
        (
            "SUBSCRIBE with wrong flags",
            packet(0x80, b"\x00\x01\x00\x00\x01a\x00"),
            MALFORMED,
        ),
        (
            "SUBSCRIBE with packet id 0",
            packet(0x82, b"\x00\x00\x00\x00\x01a\x00"),
            PROTOCOL_ERROR,
        ),
        (
            "SUBSCRIBE without filters",
            packet(0x82, b"\x00\x01\x00"),
            PROTOCOL_ERROR,
        ),
        (
            "SUBSCRIBE with QoS 3",
            packet(0x82, b"\x00\x01\x00\x00\x01a\x03"),
            PROTOCOL_ERROR,
        ),
        (
            "SUBSCRIBE with reserved bits",
            packet(0x82, b"\x00\x01\x00\x00\x01a\x40"),
            MALFORMED,
        ),
        (
            "SUBSCRIBE with its property twice",
            packet(0x82, b"\x00\x01\x04\x0b\x01\x0b\x02\x00\x01a\x00"),
            PROTOCOL_ERROR,
        ),
        (
            "NUL in a filter to SUBSCRIBE",
            packet(0x82, b"\x00\x01\x00\x00\x03a\x00b\x00"),
            MALFORMED,
        ),
        (
            "SUBSCRIBE cut short",
            packet(0x82, b"\x00\x01\x00\x00\x05a"),
            MALFORMED,
        ),
        (
            "UNSUBSCRIBE with packet id 0",
            packet(0xa2, b"\x00\x00\x00\x00\x01a"),
            PROTOCOL_ERROR,
        ),
        (
            "UNSUBSCRIBE without filters",
            packet(0xa2, b"\x00\x01\x00"),
            PROTOCOL_ERROR,
        ),
        ("PUBREL with wrong flags", packet(0x60, &[0, 1]), MALFORMED),
        ("PUBACK cut short", packet(0x40, &[0]), MALFORMED),
        ("PUBACK of id 0", packet(0x40, &[0, 0]), PROTOCOL_ERROR),
        ("PUBCOMP of id 0", packet(0x70, &[0, 0]), PROTOCOL_ERROR),
        (
            "PUBREC with a reason that nobody knows",
            packet(0x50, &[0, 1, 0x55]),
            MALFORMED,
        ),
        (
            "PUBREC with a server's reason",
            packet(0x50, &[0, 1, 0x10]),
            PROTOCOL_ERROR,
        ),
        ("PINGREQ with a body", packet(0xc0, b"x"), MALFORMED),
        (
            "DISCONNECT with a server's reason",
            packet(0xe0, &[0x8e]),
            PROTOCOL_ERROR,
        ),
        (
            "DISCONNECT with bytes behind it",
            packet(0xe0, &[0, 0, 0]),
            MALFORMED,
        ),
        (
            "garbage",
            packet(0x32, b"garbage that looks a little like a packet"),
            MALFORMED,
        ),
    ];
    beside_neighbours(Home::new(), |gateway, neighbours| {
        let mut wrong = Vec::new();
        for (what, bytes, reason) in &cases {
            // Shown if the test fails.
            println!("{what}");
            let mut wire = Wire::connect_v5(gateway, "culprit");
            wire.send(bytes);
            // What comes behind it must not be looked at.
            wire.send_while_open(&packet(0x30, b"\x00\x0cneighbours/a\x00x"));
            let last = wire.until_closed();
            let said: Vec<_> = last
                .iter()
                .map(|packet| (packet.kind(), packet.body[0]))
                .collect();
            if said != [(DISCONNECT, *reason)] {
                wrong.push(format!("{what}: {said:02x?} instead of {reason:02x}"));
            }

            // In 3.1.1 there is nothing to say it with.
            if !what.contains("alias") && !what.contains("propert") {
                let mut wire = Wire::connect(gateway, "culprit");
                let bytes = if what.starts_with("two") {
                    connect_packet(4, "c", 0)
                } else {
                    bytes.clone()
                };
                wire.send(&bytes);
                if what.contains("empty topic") || !what.contains("SUBSCRIBE") {
                    let last = wire.until_closed();
                    assert_eq!(last, [], "{what}");
                }
            }
            neighbours.assert_go_on();
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}

#[test]
fn what_was_published_before_the_mistake_is_delivered_and_nothing_follows_the_goodbye() {
    let gateway = Home::new().start();
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("a", 0);
    let mut wire = Wire::connect_v5(&gateway, "culprit");
    let publish = packet(0x32, b"\x00\x01a\x00\x01\x00in time");
    let too_late = packet(0x30, b"\x00\x01a\x00too late");
    // In one piece, so that the gateway sees all of it at once.
    wire.send(&[publish, connect_packet(5, "culprit", 0), too_late].concat());
    let kinds: Vec<_> = wire
        .until_closed()
        .iter()
        .map(|packet| packet.kind())
        .collect();
    assert_eq!(kinds, [PUBACK, DISCONNECT]);
    assert_eq!(subscriber.next_message().payload(), b"in time");
    subscriber.assert_quiet();
}

#[test]
fn acknowledgements_of_nothing_are_ignored() {
    beside_neighbours(Home::new(), |gateway, _| {
        for first in [0x40, 0x50, 0x62, 0x70] {
            for level in [4, 5] {
                let mut wire = Wire::open(gateway);
                wire.send(&connect_packet(level, "culprit", 0));
                wire.accepted();
                for id in [1u16, 7, 65_535] {
                    let id = id.to_be_bytes();
                    wire.send(&[first, 2, id[0], id[1]]);
                }
                wire.send(&[0xc0, 0]);
                while wire.next().kind() != PINGRESP {}
            }
        }
    });
}

#[test]
fn a_packet_that_is_cut_off_by_the_end_of_the_connection_harms_nobody() {
    beside_neighbours(Home::new(), |gateway, neighbours| {
        let whole = publish_packet("neighbours/a", b"not to be delivered", 1, 1);
        for length in 1..whole.len() {
            let mut wire = Wire::connect(gateway, "culprit");
            wire.send(&whole[..length]);
            if length % 2 == 0 {
                wire.close()
            } else {
                wire.reset()
            }
        }
        let connect = connect_packet(4, "culprit", 0);
        for length in 0..connect.len() {
            let mut wire = Wire::open(gateway);
            wire.send(&connect[..length]);
            if length % 2 == 0 {
                wire.close()
            } else {
                wire.reset()
            }
        }
        neighbours.assert_go_on();
        until_alone(gateway);
    });
}

#[test]
fn packets_that_come_byte_by_byte_are_understood() {
    let gateway = Home::new().start();
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("slow", 1);
    let mut wire = Wire::open(&gateway);
    let bytes = [
        connect_packet(4, "slow", 0),
        publish_packet("slow", b"but sure", 1, 1),
    ]
    .concat();
    for byte in bytes {
        wire.send(&[byte]);
    }
    wire.accepted();
    assert_eq!(wire.next().body, [0, 1]);
    assert_eq!(subscriber.next_message().payload(), b"but sure");
}

#[test]
fn a_packet_of_exactly_the_largest_size_is_taken_and_one_byte_more_is_not() {
    const LIMIT: usize = 1024;
    beside_neighbours(
        Home::new().set("mqtt.max_packet_bytes", LIMIT),
        |gateway, _| {
            let mut subscriber = Wire::connect(gateway, "subscriber");
            subscriber.subscribe("big", 0);
            let of_size = |size: usize| {
                let payload = vec![b'x'; size - 1 - 2 - 2 - 3];
                let packet = publish_packet("big", &payload, 0, 0);
                assert_eq!(packet.len(), size);
                packet
            };
            let mut wire = Wire::connect(gateway, "culprit");
            wire.send(&of_size(LIMIT));
            assert_eq!(subscriber.next_message().payload().len(), LIMIT - 8);
            wire.send(&of_size(LIMIT + 1));
            assert_eq!(wire.until_closed(), []);
            subscriber.assert_quiet();
        },
    );
}

#[test]
fn a_connection_that_says_nothing_or_too_little_is_closed_in_time() {
    const TIMEOUT: Duration = Duration::from_millis(500);
    let home = Home::new().set("mqtt.connect_timeout_ms", TIMEOUT.as_millis());
    beside_neighbours(home, |gateway, _| {
        let started = Instant::now();
        let connect = connect_packet(4, "culprit", 0);
        let silent: Vec<_> = [&[][..], &connect[..1], &connect[..9]]
            .into_iter()
            .map(|bytes| {
                let mut wire = Wire::open(gateway);
                wire.send(bytes);
                wire
            })
            .collect();
        for wire in silent {
            assert_eq!(wire.until_closed(), []);
        }
        assert!(started.elapsed() >= TIMEOUT);
        gateway.until_logged("mqtt.connect_timeout_ms");
    });
}

#[test]
fn idle_connections_keep_nobody_out() {
    let home = Home::new().set("mqtt.max_connections", NEIGHBOURS + 1);
    beside_neighbours(home, |gateway, _| {
        let idle: Vec<_> = (0..20).map(|_| Wire::open(gateway)).collect();
        Wire::connect(gateway, "third").assert_quiet();
        drop(idle);
    });
}

#[test]
fn a_thousand_silent_connections_keep_nobody_out_for_a_moment() {
    // Nobody is let go because of the time.
    let home = Home::new()
        .set("mqtt.connect_timeout_ms", 600_000)
        .set("mqtt.max_connections", 100);
    beside_neighbours(home, |gateway, _| {
        let mut silent = Vec::new();
        for _ in 0..10 {
            silent.extend((0..100).map(|_| Wire::open(gateway)));
            let mut client = Wire::connect(gateway, "client");
            client.publish("a", b"x");
            client.close();
            until_alone(gateway);
        }
        gateway.until_logged("its place was needed for another");
    });
}

#[test]
fn a_client_beyond_the_limit_is_told_and_gets_in_when_another_leaves() {
    let home = Home::new().set("mqtt.max_connections", NEIGHBOURS + 1);
    beside_neighbours(home, |gateway, neighbours| {
        let mut third = Wire::connect(gateway, "third");
        for _ in 0..3 {
            let mut wire = Wire::open(gateway);
            wire.send(&connect_packet(4, "fourth", 0));
            const SERVER_UNAVAILABLE: u8 = 3;
            assert_eq!(wire.next().body, [0, SERVER_UNAVAILABLE]);
            assert_eq!(wire.until_closed(), []);

            let mut wire = Wire::open(gateway);
            wire.send(&connect_packet(5, "fourth", 0));
            let connack = wire.next();
            const SERVER_BUSY: u8 = 0x89;
            assert_eq!(connack.body[1], SERVER_BUSY);
            let text = String::from_utf8_lossy(&connack.body);
            assert!(text.contains("mqtt.max_connections (3)"), "{text}");
        }
        // Who is in can come again under the same id.
        let again = Wire::connect(gateway, "third");
        assert_eq!(third.next_or_end(), None);
        again.close();
        until_alone(gateway);
        Wire::connect(gateway, "fourth").assert_quiet();
        neighbours.assert_go_on();
    });
}

#[test]
fn connections_that_come_and_break_by_the_hundreds_leave_nothing_behind() {
    beside_neighbours(Home::new(), |gateway, neighbours| {
        for number in 0..250u8 {
            let mut wire = Wire::open(gateway);
            if number % 3 > 0 {
                // The same few ids over and over: takeovers of connections that break meanwhile.
                let id = format!("churn/{}/#+$", number % 7);
                wire.send_while_open(&connect_packet(4 + number % 2, &id, 0));
            }
            if number % 3 > 1 {
                wire.send_while_open(&subscribe_packet(1, &[("#", 1)]));
            }
            wire.reset();
        }
        neighbours.assert_go_on();
        until_alone(gateway);
        let subscriptions = |status: &serde_json::Value| status["broker"]["subscriptions"].as_u64();
        gateway.until_status("subscriptions", subscriptions, Some(1));
    });
}

#[test]
fn a_subscriber_that_leaves_in_the_middle_of_a_flood_takes_nobody_with_it() {
    beside_neighbours(Home::new(), |gateway, neighbours| {
        thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let mut wire = Wire::connect(gateway, "flood");
                let chunk = publish_packet("flood", &[b'x'; 100], 0, 0).repeat(500);
                for _ in 0..100 {
                    wire.send(&chunk);
                }
                wire.assert_quiet();
            });
            let mut round = 0;
            while !flood.is_finished() || round < 10 {
                round += 1;
                let mut wire = Wire::connect(gateway, "leaver");
                wire.subscribe("flood", round % 2);
                if !flood.is_finished() {
                    wire.send(&[0xe0, 0]);
                }
                wire.close();
            }
            flood.join().unwrap();
        });
        neighbours.assert_go_on();
        until_alone(gateway);
    });
}

#[test]
fn a_client_that_never_reads_is_dropped_and_the_others_get_everything() {
    let home = Home::new().set("mqtt.write_timeout_ms", 1000);
    beside_neighbours(home, |gateway, neighbours| {
        const COUNT: usize = 120_000;
        let mut deaf = Wire::connect(gateway, "deaf");
        deaf.set_receive_buffer(4096);
        deaf.subscribe("flood", 0);
        let mut attentive = Wire::connect(gateway, "attentive");
        attentive.subscribe("flood", 1);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut wire = Wire::connect(gateway, "flood");
                let mut acknowledged = 0;
                for start in (0..COUNT).step_by(500) {
                    let mut chunk = Vec::new();
                    for number in start..start + 500 {
                        let mut payload = [b'x'; 200];
                        payload[..8].copy_from_slice(&number.to_be_bytes());
                        chunk.extend(publish_packet(
                            "flood",
                            &payload,
                            1,
                            (number % 1000 + 1) as u16,
                        ));
                    }
                    wire.send(&chunk);
                    while acknowledged < start {
                        assert_eq!(wire.next().first, 0x40);
                        acknowledged += 1;
                    }
                }
            });
            for number in 0..COUNT {
                let message = attentive.next_message();
                assert_eq!(message.payload()[..8], number.to_be_bytes());
            }
        });
        neighbours.assert_go_on();
        gateway.until_logged("mqtt.write_timeout_ms");
        attentive.close();
        // The deaf one is gone although its end of the connection is still there.
        until_alone(gateway);
        drop(deaf);
    });
}

#[test]
fn a_client_that_publishes_without_reading_its_acknowledgements_is_held_up_and_dropped() {
    let home = Home::new().set("mqtt.write_timeout_ms", 1000);
    beside_neighbours(home, |gateway, neighbours| {
        let mut wire = Wire::connect(gateway, "culprit");
        wire.set_receive_buffer(4096);
        let chunk = publish_packet("nobody", b"", 1, 1).repeat(1000);
        let logged = |what| gateway.log().contains(what);
        let deadline = Instant::now() + crate::gateway::PATIENCE;
        while !logged("mqtt.write_timeout_ms") {
            wire.send_while_open(&chunk);
            assert!(Instant::now() < deadline, "it is never dropped");
        }
        neighbours.assert_go_on();
        until_alone(gateway);
    });
}

#[test]
fn a_client_that_acknowledges_nothing_keeps_its_connection_and_holds_up_nobody() {
    beside_neighbours(Home::new().set("mqtt.max_inflight", 32), |gateway, _| {
        let mut mute = Wire::connect(gateway, "mute");
        mute.subscribe("work", 1);
        let mut wire = Wire::connect(gateway, "publisher");
        for number in 0..100u8 {
            wire.publish("work", &[number]);
        }
        let messages: Vec<_> = (0..32).map(|_| mute.next()).collect();
        mute.assert_quiet();
        for message in messages {
            let id = message.id().to_be_bytes();
            mute.send(&[0x40, 2, id[0], id[1]]);
        }
        assert_eq!(mute.next_message().payload(), [32]);
    });
}

#[test]
fn ten_thousand_subscriptions_in_one_packet_are_granted_up_to_the_limit() {
    beside_neighbours(
        Home::new().set("mqtt.max_subscriptions", 1000),
        |gateway, neighbours| {
            let filters: Vec<_> = (0..10_000)
                .map(|number| format!("many/{number}/+/#"))
                .collect();
            let wishes: Vec<_> = filters.iter().map(|filter| (filter.as_str(), 1)).collect();
            let mut wire = Wire::connect(gateway, "culprit");
            wire.send(&subscribe_packet(1, &wishes));
            let suback = wire.next();
            assert_eq!(suback.kind(), SUBACK);
            let (granted, refused) = suback.body[2..].split_at(1000);
            assert!(granted.iter().all(|code| *code == 1));
            assert_eq!(refused.len(), 9000);
            assert!(refused.iter().all(|code| *code == 0x80));
            wire.assert_quiet();
            neighbours.assert_go_on();
            wire.close();
            until_alone(gateway);
        },
    );
}

#[test]
fn filters_may_have_two_hundred_levels_and_no_more() {
    beside_neighbours(Home::new(), |gateway, neighbours| {
        let deep = vec!["+"; 200].join("/");
        let too_deep = vec!["+"; 201].join("/");
        let slashes = "/".repeat(60_000);
        let mut wire = Wire::connect(gateway, "culprit");
        let wishes = [(&*deep, 0), (&*too_deep, 0), (&*slashes, 0)];
        wire.send(&subscribe_packet(1, &wishes));
        assert_eq!(wire.next().body, [0, 1, 0, 0x80, 0x80]);
        // Topics may have as many as fit: nothing is built for them.
        let topic = vec!["x"; 200].join("/");
        let mut publisher = Wire::connect(gateway, "publisher");
        publisher.publish(&slashes, b"nobody's");
        publisher.publish(&topic, b"mine");
        assert_eq!(wire.next_message().topic(), topic);
        neighbours.assert_go_on();
    });
}

#[test]
fn invalid_filters_are_refused_and_the_connection_goes_on() {
    let gateway = Home::new().start();
    let mut wire = Wire::connect(&gateway, "c");
    let filters = ["a/#/b", "a+", "", "#a", "$share//a", "fine"];
    wire.send(&subscribe_packet(1, &filters.map(|filter| (filter, 0))));
    assert_eq!(wire.next().body, [0, 1, 0x80, 0x80, 0x80, 0x80, 0x80, 0]);
    wire.assert_quiet();
}

#[test]
fn a_topic_of_the_gateways_own_is_acknowledged_and_goes_nowhere() {
    let gateway = Home::new().set("mqtt.system_topics_every_s", 0).start();
    let mut wire = Wire::connect(&gateway, "c");
    wire.subscribe("$SYS/#", 0);
    wire.publish("$SYS/broker/version", b"mine");
    wire.assert_quiet();
}

#[test]
fn a_topic_that_starts_with_a_character_beyond_ascii_is_delivered() {
    beside_neighbours(Home::new(), |gateway, _| {
        let mut subscriber = Wire::connect(gateway, "subscriber");
        subscriber.subscribe("#", 1);
        let mut wire = Wire::connect(gateway, "publisher");
        for topic in ["é", "\u{10ffff}/x", "温度"] {
            wire.publish(topic, b"x");
            let message = eventually(topic, || {
                let message = subscriber.next_message();
                (!message.topic().starts_with("neighbours/")).then_some(message)
            });
            assert_eq!(message.topic(), topic);
        }
    });
}

#[test]
fn who_connects_again_and_again_may_not_send_more_than_who_stays() {
    const PER_S: u64 = 10;
    const CONNECTIONS: u64 = 20;
    let gateway = Home::new().set("mqtt.max_messages_per_s", PER_S).start();
    let start = Instant::now();
    let flood = publish_packet("flood", b"x", 0, 0).repeat(200);
    for _ in 0..CONNECTIONS {
        let mut wire = Wire::open(&gateway);
        wire.send(&[connect_packet(4, "flood", 0), flood.clone()].concat());
        wire.accepted();
        wire.close();
    }
    let received = gateway.status()["broker"]["messages_received"].as_u64();
    let allowed = CONNECTIONS * 2 + PER_S * start.elapsed().as_secs();
    assert!(received.unwrap() <= allowed, "{received:?}, {allowed}");
}

#[test]
fn large_packets_come_in_one_after_the_other_where_there_is_room_for_one() {
    let gateway = Home::new()
        .set("mqtt.max_incoming_bytes", "64KiB")
        .set("mqtt.max_packet_bytes", "1MiB")
        .start();
    let large = publish_packet("large", &vec![7; 1_000_000], 1, 1);
    let mut first = Wire::connect(&gateway, "first");
    let mut second = Wire::connect(&gateway, "second");
    let copy = large.clone();
    let mut small = Wire::connect(&gateway, "small");
    let (head, tail) = large.split_at(large.len() - 1);
    let received = || {
        gateway.status()["broker"]["bytes_received"]
            .as_u64()
            .unwrap() as usize
    };
    let until = |bytes| eventually("so many bytes", || (received() >= bytes).then_some(()));
    first.send(head);
    until(head.len());
    thread::scope(|scope| {
        let mut sending = second.try_clone();
        scope.spawn(move || sending.send(&copy));
        // It has begun, and waits; the others go on.
        until(head.len() + 1000);
        small.publish("small", b"x");
        assert!(received() < head.len() + 300_000);
        first.send(tail);
        assert_eq!(first.next().kind(), PUBACK);
        assert_eq!(second.next().kind(), PUBACK);
    });
}

#[test]
fn a_large_packet_that_never_ends_gives_its_place_back() {
    let gateway = Home::new().set("mqtt.write_timeout_ms", 100).start();
    let mut wire = Wire::connect_v5(&gateway, "slow");
    // At 16 KiB a second it may take 4 seconds.
    wire.send(&publish_packet("large", &[7; 70_000], 1, 1)[..66_000]);
    let packets = wire.until_closed();
    let last = packets.last().expect("a DISCONNECT");
    assert_eq!((last.kind(), last.body[0]), (DISCONNECT, 0x97));
    gateway.until_logged("a large packet has not come in whole in time");
}

/// A CONNECT of MQTT 5 from a client that takes packets of `max` bytes.
fn connect_of_a_small_client(max: u32) -> Vec<u8> {
    let mut body = b"\x00\x04MQTT\x05\x02\x00\x00\x05\x27".to_vec();
    body.extend(max.to_be_bytes());
    body.extend(string("small"));
    packet(0x10, &body)
}

#[test]
fn a_client_gets_no_answer_that_is_larger_than_it_takes() {
    let gateway = Home::new().start();
    let mut wire = Wire::open(&gateway);
    wire.send(&connect_of_a_small_client(60));
    wire.accepted();
    let filters: Vec<u8> = (0..80)
        .flat_map(|number| [string(format!("a/{number}")), vec![0]].concat())
        .collect();
    wire.send(&packet(0x82, &[&[0, 1, 0][..], &filters].concat()));
    let packets = wire.until_closed();
    let [last] = &packets[..] else {
        panic!("{packets:?}");
    };
    assert_eq!((last.kind(), last.body[0]), (DISCONNECT, 0x95));

    let mut wire = Wire::open(&gateway);
    wire.send(&connect_of_a_small_client(10));
    assert_eq!(wire.until_closed(), []);
    gateway.until_logged("maximum packet size leaves no room for CONNACK");
}
