//! Streams that are not what the gateway expects.

use super::*;
use crate::nats::{Link, Servers};

#[test]
fn a_stream_that_is_missing_is_named_and_what_waits_goes_there_when_somebody_makes_it() {
    let servers = Servers::single();
    let client = servers.client();
    let gateway = home(&servers.urls(), "", SHIP).start();
    publish(&gateway, 0..100);
    until_told(&gateway, "there is no stream");
    assert!(client.stream(EVENTS).is_none());
    client.create(&stream(1));
    assert_eq!(assert_shipped(gateway.home(), &client), 100);
}

#[test]
fn a_stream_that_is_missing_is_made_where_the_link_says_how() {
    let servers = Servers::cluster();
    let client = servers.client();
    let ship =
        format!("{SHIP}[link.ship.create]\nreplicas = 3\nmax_bytes = 1_000_000\ndiscard = 'new'\n");
    let gateway = home(&servers.urls(), "", &ship).start();
    publish(&gateway, 0..100);
    eventually("the stream", || client.stream(EVENTS));
    assert_eq!(assert_shipped(gateway.home(), &client), 100);
    let config = client.stream(EVENTS).unwrap()["config"].take();
    assert_eq!(config["num_replicas"], 3, "{config:#}");
    assert_eq!(config["max_bytes"], 1_000_000);
    assert_eq!(config["discard"], "new");
    assert_eq!(config["duplicate_window"], 600_000_000_000u64);
    assert_eq!(config["storage"], "file");
}

#[test]
fn a_full_stream_makes_events_wait_and_those_come_when_it_has_room_again() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&stream_with(json!({ "max_msgs": 40, "discard": "new" })));
    let gateway = home(&servers.urls(), "", SHIP).start();
    publish(&gateway, 0..100);
    let mut payloads = Vec::new();
    for expected in [40, 40, 20] {
        client.until_messages(EVENTS, expected);
        let messages = client.contents(EVENTS);
        assert_eq!(messages.len() as u64, expected);
        payloads.extend(messages.iter().map(text));
        client.purge(EVENTS);
    }
    let expected: Vec<_> = (0..100).map(|number| number.to_string()).collect();
    assert_eq!(payloads, expected);
    assert_eq!(gateway.json(&["dead-letters"])["letters"], json!([]));
}

#[test]
fn a_stream_that_takes_smaller_messages_only_refuses_one_and_gets_the_others() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&stream_with(json!({ "max_msg_size": 1000 })));
    let gateway = home(&servers.urls(), "", SHIP).start();
    publish(&gateway, ["before"]);
    publish(&gateway, [&"x".repeat(2000), "after"]);
    client.until_messages(EVENTS, 2);
    let payloads: Vec<_> = client.contents(EVENTS).iter().map(text).collect();
    assert_eq!(payloads, ["before", "after"]);
    let letters = eventually("a dead letter", || {
        let letters = gateway.json(&["dead-letters"])["letters"].take();
        let letters = letters.as_array().unwrap().clone();
        (!letters.is_empty()).then_some(letters)
    });
    assert_eq!(
        (letters.len(), &letters[0]["topic"]),
        (1, &json!("plant/a"))
    );
}

#[test]
fn a_stream_that_does_not_take_the_subject_is_named_and_nothing_is_lost() {
    let servers = Servers::single();
    let client = servers.client();
    let mut config = stream(1);
    config["subjects"] = json!(["elsewhere.>"]);
    client.create(&config);
    let gateway = home(&servers.urls(), "", SHIP).start();
    publish(&gateway, 0..100);
    until_told(&gateway, "add that to its subjects");
    config["subjects"] = json!(["elsewhere.>", "headgate.>"]);
    client.update(&config);
    assert_eq!(assert_shipped(gateway.home(), &client), 100);
}

#[test]
fn a_stream_that_is_deleted_and_made_again_gets_what_comes_from_then_on() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&stream(1));
    let gateway = home(&servers.urls(), "", SHIP).start();
    publish(&gateway, 0..100);
    client.until_messages(EVENTS, 100);
    client.delete(EVENTS);
    publish(&gateway, 100..200);
    client.create(&stream(1));
    // What was acknowledged may come again, since the gateway still has it; nothing that was not may be missing.
    let expected: Vec<_> = (100..200).map(|number| number.to_string()).collect();
    eventually("all that came after it was deleted", || {
        let messages = client.contents(EVENTS);
        let payloads: Vec<_> = messages.iter().map(text).collect();
        payloads.ends_with(&expected).then_some(())
    });
    let found = shipped(&client.contents(EVENTS));
    assert!(found.is_sorted_by(|a, b| a.0 < b.0), "{found:?}");
}

#[test]
fn another_writer_in_an_exclusive_stream_is_noticed_and_costs_no_event() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&stream(1));
    let gateway = home(&servers.urls(), "", SHIP).start();
    publish(&gateway, 0..100);
    client.until_messages(EVENTS, 100);
    client.publish("headgate.intruder", b"mine");
    publish(&gateway, 100..200);
    client.until_messages(EVENTS, 201);
    let messages = client.contents(EVENTS);
    let own: Vec<_> = messages
        .into_iter()
        .filter(|message| message.subject != "headgate.intruder")
        .collect();
    // What the other one's message has displaced comes behind what was on its way with it.
    let mut found = shipped(&own);
    found.sort();
    assert_eq!(found, journaled(gateway.home()));
    gateway.until_logged("exclusive");
}

#[test]
fn another_writer_costs_no_event_where_the_connection_breaks_before_anything_is_heard_of_it() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&stream(1));
    let mut link = Link::new(servers.spare_address(0), servers.addresses());
    let gateway = home(&[link.url()], "", SHIP).start();
    publish(&gateway, 0..100);
    client.until_messages(EVENTS, 100);
    link.deafen();
    client.publish("headgate.intruder", b"mine");
    // Its message has the place of the first one of these, which is refused.
    publish(&gateway, 100..200);
    client.until_messages(EVENTS, 200);
    link.cut();
    link.heal();
    client.until_messages(EVENTS, 201);
    let messages = client.contents(EVENTS);
    let own = messages
        .into_iter()
        .filter(|message| message.subject != "headgate.intruder");
    let mut found = shipped(&own.collect::<Vec<_>>());
    assert_eq!(found.last().unwrap().2, "100");
    found.sort();
    assert_eq!(found, journaled(gateway.home()));
    gateway.until_logged("exclusive");
}

#[test]
fn two_gateways_with_one_name_are_told_apart_and_told() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&stream(1));
    let first = home(&servers.urls(), "", SHIP).start();
    publish(&first, 0..50);
    client.until_messages(EVENTS, 50);
    let second = home(&servers.urls(), "", SHIP).start();
    publish(&second, 1000..1050);
    publish(&first, 50..100);
    client.until_messages(EVENTS, 150);
    let messages = client.contents(EVENTS);
    let mut payloads: Vec<u32> = messages
        .iter()
        .map(|it| text(it).parse().unwrap())
        .collect();
    payloads.sort_unstable();
    assert_eq!(payloads, (0..100).chain(1000..1050).collect::<Vec<_>>());
}
