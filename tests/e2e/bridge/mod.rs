//! Links to MQTT brokers: mosquitto, another gateway, and brokers that do what they must not.

mod broker;
mod circles;
mod faults;
mod logins;

use std::fs;

use serde_json::Value;

use crate::gateway::{Gateway, Home, eventually};
use crate::wire::Wire;
use broker::{Mosquitto, Observer};

/// Ships what is on `plant/#` to `sites/north/…`.
const SHIP: &str =
    "[[link.ship]]\ntopics = ['plant/#']\nstrip_prefix = 'plant/'\nadd_prefix = 'sites/{site}/'\n";

/// Takes what is on `cmd/press/…` to `cmd/…`.
const TAKE: &str = "[[link.take]]\ntopics = ['cmd/{gateway}/#']\nstrip_prefix = 'cmd/{gateway}/'\nadd_prefix = 'cmd/'\n";

/// A gateway with one link. `more` is about the link, `ways` about what it ships and takes.
fn home(servers: &[String], more: &str, ways: &str) -> Home {
    let home = Home::new();
    write_links(&home, &link("hosted", servers, more, ways));
    home.set("uplink.gateway", "press")
        .set("uplink.site", "north")
        .set("uplink.links_file", "links.toml")
}

fn link(name: &str, servers: &[String], more: &str, ways: &str) -> String {
    format!("[[link]]\nname = '{name}'\nkind = 'mqtt'\nservers = {servers:?}\n{more}\n{ways}")
}

fn write_links(home: &Home, text: &str) {
    fs::write(home.path().join("links.toml"), text).unwrap();
}

fn publish(gateway: &Gateway, payloads: impl IntoIterator<Item = impl ToString>) {
    let mut wire = Wire::connect(gateway, "publisher");
    for payload in payloads {
        wire.publish("plant/a", payload.to_string().as_bytes());
    }
}

/// Waits until the status of the links has these words in it.
fn until_told(gateway: &Gateway, words: &str) {
    let links = || gateway.status()["uplink"].to_string().to_lowercase();
    eventually(words, || links().contains(words).then_some(()));
}

fn until_connected(gateway: &Gateway) {
    eventually("the link is up", || {
        (gateway.status()["uplink"][0]["connected"] == true).then_some(())
    });
}

/// The dead letters, when there are so many: topic and error.
fn letters(gateway: &Gateway, count: usize) -> Vec<(String, String)> {
    let letters = eventually("dead letters", || {
        let letters = gateway.json(&["dead-letters"])["letters"].take();
        let letters = letters.as_array().unwrap().clone();
        (letters.len() >= count).then_some(letters)
    });
    let text = |letter: &Value, key: &str| letter[key].as_str().unwrap().to_owned();
    let told = |letter: &Value| (text(letter, "topic"), text(letter, "error"));
    letters.iter().map(told).collect()
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

/// Each payload where it comes first.
fn firsts(payloads: &[String]) -> Vec<String> {
    let mut seen = std::collections::HashSet::new();
    let mut payloads = payloads.to_vec();
    payloads.retain(|one| seen.insert(one.clone()));
    payloads
}

#[test]
fn events_go_to_the_broker_and_commands_come_from_it_with_other_prefixes() {
    let mosquitto = Mosquitto::open();
    let observer = Observer::new(mosquitto.address(), "sites/#");
    let gateway = home(&[mosquitto.url()], "", &format!("{SHIP}{TAKE}")).start();
    let here = Observer::new(gateway.mqtt(), "cmd/#");
    publish(&gateway, 0..1000);
    let messages = observer.messages(1000);
    let payloads: Vec<_> = messages.iter().map(|one| one.payload.clone()).collect();
    assert_eq!(payloads, numbers(0..1000), "all, once, in order");
    let first = &messages[0];
    assert_eq!(first.topic, "sites/north/a");
    assert!(!first.retain);
    let id = first.property("headgate-id").unwrap();
    assert!(id.starts_with("press/") && id.ends_with("/0"), "{id}");
    assert_eq!(first.property("headgate-via"), Some("press"));
    let timestamp: u128 = first
        .property("headgate-timestamp")
        .unwrap()
        .parse()
        .unwrap();
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    assert!(timestamp < now && now - timestamp < 600_000_000_000);
    until_connected(&gateway);
    observer.publish("cmd/press/valve/7", "open");
    observer.publish("cmd/other/valve/7", "close");
    observer.publish("cmd/press/valve/8", "open");
    let commands = here.messages(2);
    let commands: Vec<_> = commands.iter().map(|one| one.topic.as_str()).collect();
    assert_eq!(commands, ["cmd/valve/7", "cmd/valve/8"]);
    eventually("all acknowledged", || {
        (gateway.status()["uplink"][0]["ship"][0]["events"] == 1000).then_some(())
    });
    assert!(gateway.cli(&["uplink", "status"]).status.success());
}

#[test]
fn the_broker_keeps_the_last_message_of_each_topic_where_that_is_wanted() {
    let mosquitto = Mosquitto::open();
    let ship = format!("{SHIP}retain = true\n");
    let gateway = home(&[mosquitto.url()], "", &ship).start();
    publish(&gateway, ["early", "late"]);
    eventually("both", || {
        (gateway.status()["uplink"][0]["ship"][0]["events"] == 2).then_some(())
    });
    let kept = Observer::new(mosquitto.address(), "sites/#").messages(1);
    assert_eq!((kept[0].payload.as_str(), kept[0].retain), ("late", true));
}

#[test]
fn commands_that_are_sent_while_the_gateway_is_away_come_when_it_is_back() {
    let mosquitto = Mosquitto::open();
    let sender = Observer::new(mosquitto.address(), "none");
    let gateway = home(&[mosquitto.url()], "", TAKE)
        .set("journal.topics", "cmd/#")
        .start();
    until_connected(&gateway);
    sender.publish("cmd/press/a", "0");
    eventually("the first command", || {
        (gateway.status()["uplink"][0]["take"][0]["events"] == 1).then_some(())
    });
    let home = gateway.kill();
    for number in 1..300 {
        sender.publish("cmd/press/a", &number.to_string());
    }
    let gateway = home.start();
    let payloads = eventually("all commands", || {
        let records = crate::journal::records(&home);
        let payloads = records.iter().map(|one| one["payload"].as_str().unwrap());
        let payloads = payloads.map(str::to_owned).collect::<Vec<_>>();
        payloads.contains(&"299".to_owned()).then_some(payloads)
    });
    // It may not have acknowledged the one that it had taken before it was killed.
    assert!(payloads.len() <= 301, "{}", payloads.len());
    assert_eq!(firsts(&payloads), numbers(0..300));
    drop(gateway);
}

#[test]
fn what_was_published_while_the_broker_was_away_goes_there_within_two_seconds() {
    let mut mosquitto = Mosquitto::open();
    let gateway = home(&[mosquitto.url()], "", SHIP).start();
    until_connected(&gateway);
    mosquitto.kill();
    until_told(&gateway, "\"connected\":false");
    publish(&gateway, 0..500);
    mosquitto.start_again();
    let back = std::time::Instant::now();
    eventually("all events", || {
        (gateway.status()["uplink"][0]["ship"][0]["events"] == 500).then_some(())
    });
    let took = back.elapsed();
    assert!(took < std::time::Duration::from_secs(2), "{took:?}");
}
