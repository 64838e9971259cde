//! Many messages at full speed: nothing is lost, nothing comes twice, nothing is out of order.

use std::collections::HashMap;
use std::thread;

use rumqttc::{Client, Event, Incoming, MqttOptions, Outgoing, QoS};

use crate::apps::built;
use crate::gateway::{Gateway, Home, PATIENCE};
use crate::wire::{PUBACK, PUBLISH, Wire, publish_packet};

fn options(gateway: &Gateway, id: &str) -> MqttOptions {
    let address = gateway.mqtt();
    let mut options = MqttOptions::new(id, address.ip().to_string(), address.port());
    options.set_inflight(100);
    options
}

fn reading(number: u64) -> String {
    // Fahrenheit.
    format!("{{\"number\":{number},\"value\":50}}")
}

/// Publishes readings at QoS 1 with rumqttc, until all are acknowledged.
fn publish_all(gateway: &Gateway, topic: &str, count: u64) {
    let (client, mut connection) = Client::new(options(gateway, topic), 100);
    let sender = thread::spawn({
        let topic = topic.to_owned();
        move || {
            for number in 0..count {
                let payload = reading(number);
                client
                    .publish(&topic, QoS::AtLeastOnce, false, payload)
                    .unwrap();
            }
            client
        }
    });
    let mut acknowledged = 0;
    while acknowledged < count {
        let event = connection
            .recv_timeout(PATIENCE)
            .expect("acknowledgements come");
        if let Event::Incoming(Incoming::PubAck(_)) = event.expect("the connection holds") {
            acknowledged += 1;
        }
    }
    sender.join().unwrap().disconnect().unwrap();
    while let Ok(Ok(event)) = connection.recv_timeout(PATIENCE) {
        if event == Event::Outgoing(Outgoing::Disconnect) {
            return;
        }
    }
}

/// Takes `count` messages with rumqttc, and checks that each topic's come in order.
fn take_all(gateway: &Gateway, filter: &str, count: u64) -> thread::JoinHandle<usize> {
    let (client, mut connection) = Client::new(options(gateway, "subscriber"), 100);
    client.subscribe(filter, QoS::AtLeastOnce).unwrap();
    let mut next_event = move || {
        let event = connection.recv_timeout(PATIENCE).expect("messages come");
        event.expect("the connection holds")
    };
    while !matches!(next_event(), Event::Incoming(Incoming::SubAck(_))) {}
    thread::spawn(move || {
        let _keeps_the_connection_open = client;
        let mut next = HashMap::<String, u64>::new();
        let mut received = 0;
        while received < count {
            let Event::Incoming(Incoming::Publish(message)) = next_event() else {
                continue;
            };
            let body: serde_json::Value = serde_json::from_slice(&message.payload).unwrap();
            let expected = next.entry(message.topic.clone()).or_default();
            assert_eq!(
                body["number"].as_u64(),
                Some(*expected),
                "on {}",
                message.topic
            );
            if message.topic.starts_with("converted/") {
                assert_eq!(body["value"].as_f64(), Some(10.0));
            }
            *expected += 1;
            received += 1;
        }
        next.len()
    })
}

const PUBLISHERS: u64 = 4;
const EACH: u64 = 5_000;

#[test]
fn four_publishers_through_an_app_lose_nothing_and_every_event_is_accounted_for() {
    let gateway = Home::new().start();
    gateway.install(&built("unit-convert"));
    let results = take_all(&gateway, "converted/#", PUBLISHERS * EACH);
    thread::scope(|scope| {
        for publisher in 0..PUBLISHERS {
            let gateway = &gateway;
            let topic = format!("plant/line{publisher}/temperature_f");
            scope.spawn(move || publish_all(gateway, &topic, EACH));
        }
    });
    assert_eq!(results.join().unwrap() as u64, PUBLISHERS, "topics");

    let total = PUBLISHERS * EACH;
    // A result can be here before it is counted there.
    gateway.until_app("unit-convert", "all its events", |app| {
        app["counters"]["handled"] == total
    });
    let status = gateway.assert_adds_up();
    let broker = &status["broker"];
    assert_eq!(broker["messages_received"], total);
    assert_eq!(broker["messages_delivered"], total);
    assert_eq!(broker["messages_dropped"], 0);
    let pipeline = &status["pipeline"];
    // The app's results, too, go through the pipeline, where no other app wants them.
    assert_eq!(pipeline["accepted"], 2 * total);
    assert_eq!(
        (&pipeline["handed_over"], &pipeline["filtered"]),
        (&total.into(), &total.into())
    );
    let counters = &gateway.app("unit-convert")["counters"];
    for counter in ["offered", "handled", "published"] {
        assert_eq!(counters[counter], total, "{counter}");
    }
    assert_eq!(status["latency_us"]["count"], total);
}

#[test]
fn four_publishers_to_one_subscriber_lose_nothing() {
    let gateway = Home::new().start();
    let messages = take_all(&gateway, "raw/#", PUBLISHERS * EACH);
    thread::scope(|scope| {
        for publisher in 0..PUBLISHERS {
            let (gateway, topic) = (&gateway, format!("raw/{publisher}"));
            scope.spawn(move || publish_all(gateway, &topic, EACH));
        }
    });
    assert_eq!(messages.join().unwrap() as u64, PUBLISHERS, "topics");
    assert_eq!(gateway.assert_adds_up()["broker"]["messages_dropped"], 0);
}

#[test]
fn a_client_that_floods_an_app_and_takes_its_results_on_one_connection_gets_them_all() {
    // Small queues, so that all of them fill up.
    let gateway = Home::new()
        .set("pipeline.queue_events", 256)
        .set("apps.queue_events", 256)
        .start();
    gateway.install(&built("unit-convert"));
    const COUNT: u64 = 50_000;
    let mut wire = Wire::connect(&gateway, "both");
    wire.subscribe("converted/#", 0);
    let mut sender = wire.try_clone();
    let flood = thread::spawn(move || {
        let mut bytes = Vec::new();
        for number in 0..COUNT {
            let id = (number % 65_535 + 1) as u16;
            let payload = reading(number);
            bytes.extend(publish_packet(
                "plant/a/temperature_f",
                payload.as_bytes(),
                1,
                id,
            ));
            if bytes.len() > 32 * 1024 {
                sender.send(&bytes);
                bytes.clear();
            }
        }
        sender.send(&bytes);
    });
    let (mut results, mut acknowledged) = (0, 0);
    while results < COUNT || acknowledged < COUNT {
        let packet = wire.next();
        match packet.kind() {
            PUBACK => acknowledged += 1,
            PUBLISH => {
                let body: serde_json::Value = serde_json::from_slice(packet.payload()).unwrap();
                assert_eq!(body["number"].as_u64(), Some(results));
                results += 1;
            }
            _ => panic!("{packet:?}"),
        }
    }
    flood.join().unwrap();
    gateway.until_app("unit-convert", "all its events", |app| {
        app["counters"]["handled"] == COUNT
    });
    let status = gateway.assert_adds_up();
    // pipeline.batch.max_events is 64 by default, however much comes at once.
    let batches = status["pipeline"]["batches"].as_u64().unwrap();
    assert!(64 * batches >= COUNT, "{batches} batches");
    let calls = gateway.app("unit-convert")["counters"]["batches"].clone();
    assert!(64 * calls.as_u64().unwrap() >= COUNT, "{calls} calls");
}

#[test]
fn without_room_in_the_pipeline_publishers_wait_and_nothing_is_lost() {
    let gateway = Home::new()
        .set("pipeline.queue_events", 1)
        .set("apps.queue_events", 1)
        .set("pipeline.batch.max_events", 1)
        .start();
    gateway.install(&built("unit-convert"));
    const COUNT: u64 = 2_000;
    let results = take_all(&gateway, "converted/#", 2 * COUNT);
    thread::scope(|scope| {
        for topic in ["plant/a/temperature_f", "plant/b/temperature_f"] {
            let gateway = &gateway;
            scope.spawn(move || publish_all(gateway, topic, COUNT));
        }
    });
    assert_eq!(results.join().unwrap(), 2, "topics");
    gateway.assert_adds_up();
}
