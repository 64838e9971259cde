//! What happens to brokers and gateways while events flow, and what single messages do: nothing is lost.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;
use broker::{Answer, OddBroker, free_address};

#[test]
fn a_message_that_the_broker_finds_too_large_is_a_dead_letter_and_the_rest_goes_on() {
    // It says so in its CONNACK.
    let mosquitto = Mosquitto::start("allow_anonymous true\nmax_packet_size 4096", |_| {});
    let observer = Observer::new(mosquitto.address(), "sites/#");
    let gateway = home(&[mosquitto.url()], "", SHIP).start();
    publish(
        &gateway,
        ["before".into(), "x".repeat(5000), "after".into()],
    );
    assert_eq!(observer.payloads(2), ["before", "after"]);
    let (topic, error) = &letters(&gateway, 1)[0];
    assert_eq!(topic, "plant/a");
    assert!(error.contains("4096 at the most"), "{error}");
    // It only says so when it gets one.
    let mosquitto = Mosquitto::start("allow_anonymous true\nmessage_size_limit 4096", |_| {});
    let observer = Observer::new(mosquitto.address(), "sites/#");
    let gateway = home(&[mosquitto.url()], "", SHIP).start();
    publish(
        &gateway,
        ["before".into(), "x".repeat(5000), "after".into()],
    );
    assert_eq!(observer.payloads(2), ["before", "after"]);
    let (_, error) = &letters(&gateway, 1)[0];
    assert!(error.contains("packet too large"), "{error}");
}

#[test]
fn a_topic_that_is_none_with_its_prefixes_is_a_dead_letter_and_the_rest_goes_on() {
    let mosquitto = Mosquitto::open();
    let observer = Observer::new(mosquitto.address(), "#");
    let ship = "[[link.ship]]\ntopics = ['plant/#']\nstrip_prefix = 'plant/a'\n";
    let gateway = home(&[mosquitto.url()], "", ship).start();
    let mut wire = Wire::connect(&gateway, "publisher");
    wire.publish("plant/a", b"nothing is left");
    wire.publish("plant/a/b", b"x");
    assert_eq!(observer.messages(1)[0].topic, "/b");
    let (topic, error) = &letters(&gateway, 1)[0];
    assert_eq!(topic, "plant/a");
    assert!(error.contains("prefixes"), "{error}");
}

#[test]
fn a_message_that_makes_the_broker_hang_up_is_found_among_those_around_it() {
    let odd = OddBroker::start(|message| match message.payload.as_str() {
        "bad" => Answer::Disconnect(0x95),
        _ => Answer::PubAck(0),
    });
    let gateway = home(&[odd.url()], "", SHIP).start();
    let mut payloads = numbers(0..50);
    payloads.insert(25, "bad".into());
    payloads.insert(40, "bad".into());
    publish(&gateway, &payloads);
    eventually("all but two", || {
        (gateway.status()["uplink"][0]["ship"][0]["cursor"] == 52).then_some(())
    });
    let letters = letters(&gateway, 2);
    assert_eq!(letters.len(), 2);
    assert!(
        letters[0].1.contains("packet too large, 0x95"),
        "{letters:?}"
    );
    assert_eq!(firsts(&odd.taken(50)), numbers(0..50));
}

#[test]
fn what_the_broker_refuses_is_a_dead_letter_and_what_it_has_no_room_for_is_tried_again() {
    let mut no_room = 3;
    let odd = OddBroker::start(move |message| match message.payload.as_str() {
        "forbidden" => Answer::PubAck(0x87),
        "10" if no_room > 0 => {
            no_room -= 1;
            Answer::PubAck(0x97)
        }
        "20" => Answer::PubAck(0x10),
        _ => Answer::PubAck(0),
    });
    let gateway = home(&[odd.url()], "", SHIP).start();
    let mut payloads = numbers(0..30);
    payloads.insert(5, "forbidden".into());
    publish(&gateway, &payloads);
    eventually("all but one", || {
        let ship = gateway.status()["uplink"][0]["ship"][0].take();
        (ship["cursor"] == 31 && ship["error"].is_null()).then_some(())
    });
    let letters = letters(&gateway, 1);
    assert!(letters[0].1.contains("not authorized, 0x87"), "{letters:?}");
    let mut expected = numbers(0..30);
    // The broker has it, though nobody has subscribed to it.
    expected.remove(20);
    let mut taken = firsts(&odd.taken(29));
    taken.sort_by_key(|one| one.parse::<u64>().unwrap());
    assert_eq!(taken, expected);
    assert_eq!(gateway.status()["uplink"][0]["connections"], 1);
}

#[test]
fn a_broker_that_acknowledges_nothing_is_left_and_gets_it_again() {
    let mut silent = true;
    let odd = OddBroker::start(move |message| match (silent, message.payload.as_str()) {
        (true, "9") => {
            // From the next connection on it behaves.
            silent = false;
            Answer::Silence
        }
        (true, _) => Answer::Silence,
        (false, _) => Answer::PubAck(0),
    });
    let gateway = home(&[odd.url()], "timeout_ms = 500", SHIP).start();
    publish(&gateway, 0..10);
    until_told(&gateway, "has acknowledged nothing for 500ms");
    assert_eq!(firsts(&odd.taken(10)), numbers(0..10));
    let ship = gateway.status()["uplink"][0]["ship"][0].take();
    assert!(ship["resent"].as_u64().unwrap() >= 10, "{ship}");
}

#[test]
fn whoever_is_killed_in_the_middle_nothing_is_lost_and_all_comes_in_order() {
    let [near, far] = [free_address(), free_address()];
    let ship = "[[link.ship]]\ntopics = ['plant/#']\n";
    let take = "[[link.take]]\ntopics = ['cmd/#']\n";
    let url = format!("mqtt://{far}");
    let mut home = home(&[url], "timeout_ms = 2000", &format!("{ship}{take}"))
        .set("journal.topics", "cmd/#")
        .set("mqtt.listen", near);
    let mut cloud = Home::new()
        .set("mqtt.listen", far)
        .set("journal.topics", "plant/#, cmd/#");
    let broker = cloud.start();
    let gateway = broker.until_subscribed(1, || home.start());
    let mut gateways = Some((gateway, broker));
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        let enough = &enough;
        let loads = [(near, "plant/a"), (far, "cmd/a")]
            .map(|(address, topic)| scope.spawn(move || load(address, topic, enough)));
        for round in 0..12 {
            let (gateway, broker) = gateways.take().unwrap();
            let link = || gateway.status()["uplink"][0].take();
            let count = |way: &str| link()[way][0]["events"].as_u64().unwrap();
            let before = (count("ship"), count("take"));
            eventually("events flow both ways", || {
                let is_more = count("ship") > before.0 + 100 && count("take") > before.1 + 20;
                is_more.then_some(())
            });
            gateways = Some(match round % 3 {
                0 => {
                    home = gateway.kill();
                    (home.start(), broker)
                }
                1 => {
                    cloud = broker.kill();
                    (gateway, cloud.start())
                }
                _ => {
                    home = gateway.kill();
                    cloud = broker.kill();
                    (home.start(), cloud.start())
                }
            });
        }
        enough.store(true, Ordering::Relaxed);
        for load in loads {
            load.join().unwrap();
        }
    });
    let (gateway, _broker) = gateways.unwrap();
    for (from, to, topic) in [(&home, &cloud, "plant/a"), (&cloud, &home, "cmd/a")] {
        let sent = journaled(from, topic);
        assert!(sent.len() > 200, "{}", sent.len());
        let came = eventually("all events", || {
            let came = firsts(&journaled(to, topic));
            (came.len() >= sent.len()).then_some(came)
        });
        assert_eq!(came.len(), sent.len(), "{topic}");
        assert!(came == sent, "{topic}: in the order of the journal");
    }
    let resent = gateway.status()["uplink"][0]["ship"][0]["resent"].clone();
    println!("sent again: {resent}");
}

/// What the journal has on a topic, each payload once: a publisher, too, sends again what was not acknowledged.
fn journaled(home: &Home, topic: &str) -> Vec<String> {
    let records = crate::journal::records(home);
    let ours = records.iter().filter(|one| one["topic"] == topic);
    let payloads: Vec<_> = ours
        .map(|one| one["payload"].as_str().unwrap().to_owned())
        .collect();
    firsts(&payloads)
}

/// Publishes numbers, and goes on whatever happens to the broker, until it is told that it is enough.
fn load(address: std::net::SocketAddr, topic: &str, enough: &AtomicBool) {
    let mut unacknowledged = HashMap::new();
    let mut next = 0_u64;
    while !enough.load(Ordering::Relaxed) || !unacknowledged.is_empty() {
        let Some(mut wire) = Wire::dial(address, "load") else {
            continue;
        };
        loop {
            if unacknowledged.is_empty() {
                if enough.load(Ordering::Relaxed) {
                    return;
                }
                unacknowledged.extend((0..20).map(|id| (id as u16 + 1, next + id)));
                next += 20;
            }
            let mut waiting: Vec<_> = unacknowledged.clone().into_iter().collect();
            waiting.sort_unstable();
            let packets = waiting.iter().map(|(id, number)| {
                crate::wire::publish_packet(topic, number.to_string().as_bytes(), 1, *id)
            });
            wire.send_while_open(&packets.collect::<Vec<_>>().concat());
            while !unacknowledged.is_empty()
                && let Some(packet) = wire.next_or_end()
            {
                unacknowledged.remove(&packet.id());
            }
            if !unacknowledged.is_empty() {
                break;
            }
        }
    }
}
