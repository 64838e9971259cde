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
fn whoever_is_killed_in_the_middle_no_event_is_lost_and_all_go_in_order() {
    assert_nothing_is_lost("ship", Gateway::kill);
}

/// A broker that is Headgate says what it has for a connected client only when it is stopped in order.
#[test]
fn whoever_goes_in_the_middle_no_command_is_lost_and_all_come_in_order() {
    assert_nothing_is_lost("take", |broker| broker.terminate().home);
}

/// Ends the gateway, the broker or both again and again while all flows one way.
fn assert_nothing_is_lost(way: &str, end_broker: impl Fn(Gateway) -> Home) {
    let [near, far] = [free_address(), free_address()];
    let url = format!("mqtt://{far}");
    let ways = format!("[[link.{way}]]\ntopics = ['plant/#']\n");
    let mut home = home(&[url], "timeout_ms = 2000", &ways)
        .set("journal.topics", "plant/#")
        .set("mqtt.listen", near);
    let mut cloud = Home::new()
        .set("mqtt.listen", far)
        .set("journal.topics", "plant/#");
    let broker = cloud.start();
    let takes = u64::from(way == "take");
    let gateway = broker.until_subscribed(takes, || home.start());
    let mut both = Some((gateway, broker));
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        let from = if way == "ship" { near } else { far };
        let enough = &enough;
        let load = scope.spawn(move || load(from, "plant/a", enough));
        for round in 0..12 {
            let (gateway, broker) = both.take().unwrap();
            let count = || {
                let link = gateway.status()["uplink"][0].take();
                link[way][0]["events"].as_u64().unwrap()
            };
            let before = count();
            eventually("events flow", || (count() > before + 100).then_some(()));
            both = Some(match round % 3 {
                0 => {
                    home = gateway.kill();
                    (home.start(), broker)
                }
                1 => {
                    cloud = end_broker(broker);
                    (gateway, cloud.start())
                }
                _ => {
                    home = gateway.kill();
                    cloud = end_broker(broker);
                    (home.start(), cloud.start())
                }
            });
        }
        enough.store(true, Ordering::Relaxed);
        load.join().unwrap();
    });
    let (from, to) = match way {
        "ship" => (&home, &cloud),
        _ => (&cloud, &home),
    };
    let sent = journaled(from);
    assert!(sent.len() > 1000, "{}", sent.len());
    let came = eventually("the last event", || {
        let came = journaled(to);
        came.contains(sent.last().unwrap()).then_some(came)
    });
    let missing: Vec<_> = sent.iter().filter(|one| !came.contains(one)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let odd = came.iter().zip(&sent).position(|(came, sent)| came != sent);
    if let Some(at) = odd {
        let around = at.saturating_sub(3)..at + 30;
        panic!(
            "out of order: {:?} came for {:?}",
            came.get(around.clone()),
            sent.get(around)
        );
    }
}

/// What the journal has, each payload once: a publisher, too, sends again what was not acknowledged.
fn journaled(home: &Home) -> Vec<String> {
    let records = crate::journal::records(home);
    let payloads: Vec<_> = records
        .iter()
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
