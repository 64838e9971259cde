//! What kills or misleads the broker whose codecs the edge uses, done to the edge. docs/mqtt.md says
//! which test stands for which defect.

use std::net::{SocketAddr, TcpStream};

use crate::gateway::{Gateway, Home, PATIENCE};
use crate::websocket;
use crate::wire::{
    PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC, Packet, SUBACK, UNSUBACK, Wire, connect_packet,
    connect_packet_with, packet, publish_packet, string, subscribe_packet,
};

const DUP: u8 = 0b1000;
const CLEAN: u8 = 0b10;
const PUBREL: u8 = 6;

fn gateway() -> Gateway {
    Home::new().start()
}

/// A 3.1.1 client whose session is kept; whether there was one.
fn kept(gateway: &Gateway, id: &str) -> (Wire, bool) {
    let mut wire = Wire::open(gateway);
    wire.send(&connect_packet_with(4, id, 0, 0, &[]));
    let connack = wire.next();
    assert_eq!(connack.body[1], 0, "{connack:?}");
    (wire, connack.body[0] == 1)
}

/// An MQTT 5 client; `properties` of its CONNECT.
fn connect_v5(gateway: &Gateway, id: &str, properties: &[u8]) -> Wire {
    let mut wire = Wire::open(gateway);
    let start = b"\x00\x04MQTT\x05\x02\x00\x00";
    let length = [properties.len() as u8];
    wire.send(&packet(
        0x10,
        &[&start[..], &length, properties, &string(id)].concat(),
    ));
    wire.accepted();
    wire
}

/// An MQTT 5 PUBLISH at QoS 0 or 1, whose packet id is then 7.
fn publish_v5(topic: &str, qos: u8, properties: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut body = string(topic);
    if qos > 0 {
        body.extend([0, 7]);
    }
    body.push(properties.len() as u8);
    body.extend(properties);
    body.extend(payload);
    packet(0x30 | qos << 1, &body)
}

/// `options`: of the subscription, the QoS among them.
fn subscribe_v5(wire: &mut Wire, filter: &str, options: u8) {
    let body = [&[0, 1, 0][..], &string(filter), &[options]].concat();
    wire.send(&packet(0x82, &body));
    let suback = wire.next();
    assert_eq!((suback.kind(), suback.body[3]), (SUBACK, options & 3));
}

/// An acknowledgement of any kind, for the message `id`.
fn acknowledge(wire: &mut Wire, kind: u8, id: u16) {
    let flags = if kind == PUBREL { 0b10 } else { 0 };
    wire.send(&packet(kind << 4 | flags, &id.to_be_bytes()));
}

/// The next packet is this acknowledgement.
fn assert_acknowledged(wire: &mut Wire, kind: u8, id: u16) {
    let packet = wire.next();
    assert_eq!(
        (packet.kind(), &packet.body[..2]),
        (kind, &id.to_be_bytes()[..]),
        "{packet:?}"
    );
}

/// Of an MQTT 5 PUBLISH without more than 127 bytes of properties.
fn payload_v5(message: &Packet) -> &[u8] {
    assert_eq!(message.kind(), PUBLISH, "{message:?}");
    let topic = 2 + usize::from(u16::from_be_bytes([message.body[0], message.body[1]]));
    let properties = topic + if message.qos() > 0 { 2 } else { 0 };
    let length = usize::from(message.body[properties]);
    &message.body[properties + 1 + length..]
}

#[test]
fn the_only_member_of_a_share_group_that_drops_gets_what_it_did_not_acknowledge_again() {
    let gateway = gateway();
    let (mut member, _) = kept(&gateway, "member");
    member.subscribe("$share/g/job", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("job", b"one");
    publisher.publish("job", b"two");
    assert_eq!(member.next().payload(), b"one");
    assert_eq!(member.next().payload(), b"two");
    member.reset();
    let (mut member, was_kept) = kept(&gateway, "member");
    assert!(was_kept);
    for text in [b"one", b"two"] {
        assert_eq!(member.next_message().payload(), text);
    }
    publisher.publish("job", b"three");
    assert_eq!(member.next_message().payload(), b"three");
}

#[test]
fn a_client_id_may_have_what_means_something_in_topics_and_connect_as_often_as_it_likes() {
    let gateway = gateway();
    for id in ["a/b", "+", "#", "$SYS", "$share/g/a", "a b/+/#"] {
        for _ in 0..3 {
            let mut first = Wire::connect(&gateway, id);
            first.subscribe("a", 1);
            let mut second = Wire::connect(&gateway, id);
            assert_eq!(first.next_or_end(), None);
            second.subscribe("a", 1);
            Wire::connect(&gateway, "publisher").publish("a", b"x");
            assert_eq!(second.next_message().payload(), b"x");
        }
    }
}

#[test]
fn clients_that_connect_and_break_off_take_up_no_places() {
    let gateway = Home::new().set("mqtt.max_connections", 2).start();
    for _ in 0..20 {
        let mut wire = Wire::open(&gateway);
        wire.send(&connect_packet(4, "breaks", 0));
        wire.reset();
    }
    let connected = |status: &serde_json::Value| status["broker"]["connected"].as_u64();
    gateway.until_status("clients", connected, Some(0));
    let mut both = ["a", "b"].map(|id| Wire::connect(&gateway, id));
    both.iter_mut().for_each(Wire::assert_quiet);
}

#[test]
fn a_message_with_properties_reaches_clients_of_both_versions() {
    let gateway = gateway();
    let mut old = Wire::connect(&gateway, "old");
    old.subscribe("a", 1);
    let mut new = Wire::connect_v5(&gateway, "new");
    subscribe_v5(&mut new, "a", 1);
    let content_type = [&[3][..], &string("text/plain")].concat();
    let user_property = [&[0x26][..], &string("key"), &string("value")].concat();
    let properties = [content_type, user_property].concat();
    let mut publisher = Wire::connect_v5(&gateway, "publisher");
    for number in 0..3 {
        publisher.send(&publish_v5("a", 1, &properties, &[number]));
        assert_acknowledged(&mut publisher, PUBACK, 7);
        assert_eq!(old.next_message().payload(), [number]);
        let message = new.next_message();
        assert_eq!(payload_v5(&message), [number]);
        let is_there = |wanted: &[u8]| {
            message
                .body
                .windows(wanted.len())
                .any(|part| part == wanted)
        };
        assert!(is_there(b"text/plain") && is_there(b"key") && is_there(b"value"));
    }
}

#[test]
fn an_idle_connection_on_any_port_keeps_nobody_from_connecting() {
    let home = Home::new()
        .set("mqtt.connect_timeout_ms", 600_000)
        .set("mqtt.tls.listen", "127.0.0.1:0")
        .set("mqtt.tls.certificate", "mqtt.crt")
        .set("mqtt.tls.key", "mqtt.key")
        .set("mqtt.websocket.listen", "127.0.0.1:0");
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let path = |name: &str| home.path().join(name);
    std::fs::write(path("mqtt.crt"), pair.cert.pem()).unwrap();
    std::fs::write(path("mqtt.key"), pair.signing_key.serialize_pem()).unwrap();
    let gateway = home.start();
    let status = gateway.status();
    let address = |key: &str| -> SocketAddr { status[key].as_str().unwrap().parse().unwrap() };
    let (tls, websocket) = (address("mqtt_tls_listen"), address("mqtt_websocket_listen"));
    let idle = [gateway.mqtt(), tls, websocket].map(|address| TcpStream::connect(address).unwrap());

    let tls_client = std::process::Command::new("mosquitto_pub")
        .args([
            "-h",
            "localhost",
            "-p",
            &tls.port().to_string(),
            "-t",
            "a",
            "-m",
            "x",
        ])
        .arg("--cafile")
        .arg(gateway.home().path().join("mqtt.crt"))
        .status()
        .unwrap();
    assert!(tls_client.success());
    let stream = TcpStream::connect(websocket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    websocket::Client::connect(stream, "websocket");
    Wire::connect(&gateway, "plain").assert_quiet();
    drop(idle);
}

#[test]
fn a_topic_alias_stands_for_its_topic_under_a_wildcard_subscription_too() {
    const TOPIC_ALIAS: u8 = 0x23;
    const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
    let gateway = gateway();
    let mut old = Wire::connect(&gateway, "old");
    old.subscribe("plant/#", 1);
    let mut aliased = connect_v5(&gateway, "aliased", &[TOPIC_ALIAS_MAXIMUM, 0, 2]);
    subscribe_v5(&mut aliased, "plant/#", 1);
    let mut publisher = Wire::connect_v5(&gateway, "publisher");
    let topics = ["plant/a", "plant/b", "plant/c"];
    let mut meant = vec![String::new(); 3];
    for round in 0..3 {
        for (index, topic) in topics.iter().enumerate() {
            let named = if round == 0 { topic } else { "" };
            let alias = [TOPIC_ALIAS, 0, index as u8 + 1];
            publisher.send(&publish_v5(named, 1, &alias, topic.as_bytes()));
            assert_acknowledged(&mut publisher, PUBACK, 7);
            let message = old.next_message();
            assert_eq!(
                (message.topic(), message.payload()),
                (*topic, topic.as_bytes())
            );
            // With more topics than aliases, and the aliases that it is told.
            let message = aliased.next_message();
            let at = 2 + message.topic().len() + 2;
            let properties = &message.body[at + 1..][..usize::from(message.body[at])];
            let name = match properties {
                [TOPIC_ALIAS, 0, alias @ 1..=2] => {
                    let known = &mut meant[usize::from(*alias)];
                    if !message.topic().is_empty() {
                        *known = message.topic().to_owned();
                    }
                    known.clone()
                }
                [] => message.topic().to_owned(),
                other => panic!("properties {other:02x?}"),
            };
            assert_eq!((&*name, payload_v5(&message)), (*topic, topic.as_bytes()));
        }
    }
}

#[test]
fn a_takeover_publishes_the_will_of_the_old_connection_and_not_of_the_new() {
    let gateway = gateway();
    let mut witness = Wire::connect(&gateway, "witness");
    witness.subscribe("will/#", 1);
    const WILL_AT_QOS_1: u8 = 0b0000_1100;
    let connect = |text: &str| {
        let will = [string("will/twin"), string(text)].concat();
        let mut wire = Wire::open(&gateway);
        wire.send(&connect_packet_with(
            4,
            "twin",
            0,
            CLEAN | WILL_AT_QOS_1,
            &will,
        ));
        wire.accepted();
        wire
    };
    let old = connect("old");
    let mut new = connect("new");
    assert_eq!(old.until_closed(), []);
    assert_eq!(witness.next_message().payload(), b"old");
    new.assert_quiet();
    witness.assert_quiet();
    new.reset();
    assert_eq!(witness.next_message().payload(), b"new");
    witness.assert_quiet();
}

#[test]
fn a_qos_2_message_that_is_sent_again_is_delivered_once() {
    let gateway = gateway();
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("a", 0);
    let message = publish_packet("a", b"once", 2, 5);
    let mut again = message.clone();
    again[0] |= DUP;

    let (mut sender, _) = kept(&gateway, "sender");
    sender.send(&message);
    assert_acknowledged(&mut sender, PUBREC, 5);
    sender.send(&again);
    assert_acknowledged(&mut sender, PUBREC, 5);
    sender.reset();
    let (mut sender, was_kept) = kept(&gateway, "sender");
    assert!(was_kept);
    sender.send(&again);
    assert_acknowledged(&mut sender, PUBREC, 5);
    acknowledge(&mut sender, PUBREL, 5);
    assert_acknowledged(&mut sender, PUBCOMP, 5);
    // A release that is sent again, too.
    acknowledge(&mut sender, PUBREL, 5);
    assert_acknowledged(&mut sender, PUBCOMP, 5);
    assert_eq!(subscriber.next_message().payload(), b"once");
    subscriber.assert_quiet();
    // Afterwards the id means another message.
    sender.send(&publish_packet("a", b"next", 2, 5));
    assert_acknowledged(&mut sender, PUBREC, 5);
    assert_eq!(subscriber.next_message().payload(), b"next");
}

#[test]
fn a_qos_2_receiver_that_comes_back_is_taken_up_where_it_was() {
    let gateway = gateway();
    let (mut receiver, _) = kept(&gateway, "receiver");
    receiver.subscribe("a", 2);
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("a", b"qos 1");
    assert_eq!(receiver.next_message().payload(), b"qos 1");
    publisher.send(&publish_packet("a", b"once", 2, 5));
    assert_acknowledged(&mut publisher, PUBREC, 5);
    acknowledge(&mut publisher, PUBREL, 5);
    assert_acknowledged(&mut publisher, PUBCOMP, 5);
    let first = receiver.next();
    assert_eq!((first.qos(), first.payload()), (2, &b"once"[..]));
    let id = first.id();

    // Before PUBREC: the message again.
    receiver.reset();
    let (mut receiver, _) = kept(&gateway, "receiver");
    let again = receiver.next();
    assert_eq!((again.id(), again.payload()), (id, &b"once"[..]));
    assert_eq!(again.first & DUP, DUP);
    acknowledge(&mut receiver, PUBREC, id);
    assert_acknowledged(&mut receiver, PUBREL, id);

    // After it: the release only.
    receiver.reset();
    let (mut receiver, _) = kept(&gateway, "receiver");
    assert_acknowledged(&mut receiver, PUBREL, id);
    acknowledge(&mut receiver, PUBCOMP, id);
    receiver.assert_quiet();

    // After that: nothing.
    receiver.reset();
    kept(&gateway, "receiver").0.assert_quiet();
}

#[test]
fn unsubscribing_is_answered_and_ends_resumed_subscriptions_too() {
    let gateway = gateway();
    let unsubscribe = |wire: &mut Wire, filter: &str| {
        wire.send(&packet(0xa2, &[&[0, 9][..], &string(filter)].concat()));
        assert_acknowledged(wire, UNSUBACK, 9);
    };
    let (mut wire, _) = kept(&gateway, "c");
    unsubscribe(&mut wire, "never/subscribed");
    wire.subscribe("a", 1);
    wire.subscribe("$share/g/a", 1);
    wire.reset();
    let (mut wire, was_kept) = kept(&gateway, "c");
    assert!(was_kept);
    unsubscribe(&mut wire, "a");
    unsubscribe(&mut wire, "$share/g/a");
    Wire::connect(&gateway, "publisher").publish("a", b"x");
    wire.assert_quiet();
}

#[test]
fn retained_messages_all_come_each_time_somebody_subscribes() {
    const TOPICS: usize = 1000;
    let gateway = gateway();
    let mut publisher = Wire::connect(&gateway, "publisher");
    for index in 0..TOPICS {
        let mut packet = publish_packet(format!("r/{index}"), b"kept", (index % 2) as u8, 7);
        packet[0] |= 1;
        publisher.send(&packet);
        if index % 2 == 1 {
            assert_acknowledged(&mut publisher, PUBACK, 7);
        }
    }
    // Without the flag it deletes nothing.
    publisher.publish("r/1", b"");
    let mut wire = Wire::connect(&gateway, "c");
    for qos in [0, 1, 1] {
        wire.subscribe("r/#", qos);
        let mut topics: Vec<String> = (0..TOPICS)
            .map(|_| {
                let message = wire.next_message();
                assert!(message.is_retained());
                assert_eq!(message.payload(), b"kept");
                message.topic().to_owned()
            })
            .collect();
        topics.sort();
        topics.dedup();
        assert_eq!(topics.len(), TOPICS);
        wire.assert_quiet();
    }
}

#[test]
fn a_message_comes_at_the_lower_qos_of_its_own_and_the_subscriptions() {
    let gateway = gateway();
    for wanted in 0..3 {
        let mut wire = Wire::connect(&gateway, "c");
        wire.subscribe("a", wanted);
        let mut publisher = Wire::connect(&gateway, "publisher");
        for sent in 0..3 {
            publisher.send(&publish_packet("a", b"x", sent, 1));
            let message = wire.next();
            assert_eq!(message.qos(), sent.min(wanted));
        }
    }
}

#[test]
fn acknowledgements_may_come_in_any_order_and_pings_between() {
    const MESSAGES: u16 = 100;
    let gateway = Home::new().set("mqtt.max_inflight", MESSAGES).start();
    let mut wire = Wire::connect(&gateway, "c");
    wire.subscribe("a", 1);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for _ in 0..MESSAGES {
        publisher.publish("a", b"x");
    }
    let mut ids: Vec<u16> = (0..MESSAGES).map(|_| wire.next().id()).collect();
    // With all of them unacknowledged.
    wire.send(&[0xc0, 0]);
    assert_eq!(wire.next().kind(), PINGRESP);
    ids.reverse();
    ids.swap(10, 70);
    for id in ids {
        acknowledge(&mut wire, PUBACK, id);
    }
    wire.assert_quiet();
    publisher.publish("a", b"after");
    assert_eq!(wire.next_message().payload(), b"after");
}

#[test]
fn no_local_and_receive_maximum_are_followed() {
    const RECEIVE_MAXIMUM: u8 = 0x21;
    const NO_LOCAL: u8 = 0b100;
    let gateway = gateway();
    let mut wire = connect_v5(&gateway, "c", &[RECEIVE_MAXIMUM, 0, 2]);
    subscribe_v5(&mut wire, "a", 1 | NO_LOCAL);
    wire.send(&publish_v5("a", 1, &[], b"own"));
    assert_acknowledged(&mut wire, PUBACK, 7);
    wire.assert_quiet();

    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..5 {
        publisher.publish("a", &[number]);
    }
    let first = [wire.next(), wire.next()];
    wire.assert_quiet();
    for (number, message) in first.iter().enumerate() {
        assert_eq!(payload_v5(message), [number as u8]);
        acknowledge(&mut wire, PUBACK, message.id());
    }
    for number in 2..5 {
        assert_eq!(payload_v5(&wire.next_message()), [number]);
    }
}

#[test]
fn a_keep_alive_of_0_and_a_subscription_to_sys_are_taken() {
    let gateway = gateway();
    let mut wire = Wire::open(&gateway);
    wire.send(&connect_packet(4, "c", 0));
    wire.accepted();
    wire.send(&subscribe_packet(
        3,
        &[("$SYS/broker/nothing/of/the/kind", 0)],
    ));
    assert_eq!(wire.next().body, [0, 3, 0]);
    wire.assert_quiet();
}

#[test]
fn a_slow_consumer_at_qos_1_gets_every_message() {
    const MESSAGES: u32 = 30_000;
    let gateway = gateway();
    let mut slow = Wire::connect(&gateway, "slow");
    slow.set_receive_buffer(4096);
    slow.subscribe("a", 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut publisher = Wire::connect(&gateway, "publisher");
            let mut acknowledged = 0;
            for number in 0..MESSAGES {
                let id = (number % 1000) as u16 + 1;
                let payload = [&number.to_be_bytes()[..], &[b'x'; 100]].concat();
                publisher.send(&publish_packet("a", &payload, 1, id));
                while acknowledged + 500 < number {
                    assert_eq!(publisher.next().kind(), PUBACK);
                    acknowledged += 1;
                }
            }
            while acknowledged < MESSAGES {
                assert_eq!(publisher.next().kind(), PUBACK);
                acknowledged += 1;
            }
        });
        for number in 0..MESSAGES {
            // Slow is who reads one message a millisecond for a while; all of them would take a minute.
            if number < 1000 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            let message = slow.next_message();
            assert_eq!(message.payload()[..4], number.to_be_bytes());
        }
    });
    slow.assert_quiet();
}
