//! Replicated streams get batches: what such a stream takes, and what it does not.

use super::*;
use crate::nats::{Link, Servers};

/// Whether a message came as one of a batch.
fn in_batch(message: &&Stored) -> bool {
    message.header("Nats-Batch-Id").is_some()
}

#[test]
fn what_has_waited_goes_in_batches_and_a_lone_event_alone() {
    let servers = Servers::cluster();
    let client = servers.client();
    let mut link = Link::new(servers.spare_address(0), servers.addresses());
    let ship = format!("{SHIP}[link.ship.create]\nreplicas = 3\n");
    let gateway = home(&[link.url()], "", &ship).start();
    publish(&gateway, ["alone"]);
    eventually("the stream", || client.stream(EVENTS));
    client.until_messages(EVENTS, 1);
    link.cut();
    publish(&gateway, 0..1000);
    link.heal();
    assert_eq!(assert_shipped(gateway.home(), &client), 1001);
    let messages = client.contents(EVENTS);
    assert!(!in_batch(&&messages[0]), "{:?}", messages[0]);
    let places = messages[1..].iter().map(|message| {
        let place = message.header("Nats-Batch-Sequence").expect("of a batch");
        place.parse::<u32>().unwrap()
    });
    assert_eq!(places.max(), Some(64));
}

#[test]
fn a_stream_is_changed_so_that_it_takes_batches_only_where_the_gateway_may_make_it() {
    let servers = Servers::cluster();
    let client = servers.client();
    let mut link = Link::new(servers.spare_address(0), servers.addresses());
    for (create, batches) in [("", false), ("[link.ship.create]\n", true)] {
        client.create(&stream_with(json!({ "num_replicas": 3, "max_msgs": 5000 })));
        let gateway = home(&[link.url()], "", &format!("{SHIP}{create}")).start();
        link.cut();
        publish(&gateway, 0..500);
        link.heal();
        assert_eq!(assert_shipped(gateway.home(), &client), 500);
        let messages = client.contents(EVENTS);
        assert_eq!(messages.iter().any(|it| in_batch(&it)), batches);
        let config = client.stream(EVENTS).unwrap()["config"].take();
        let set = config["allow_atomic"].as_bool().unwrap_or_default();
        assert_eq!((set, &config["max_msgs"]), (batches, &json!(5000)));
        drop(gateway);
        client.delete(EVENTS);
    }
}

#[test]
fn a_message_of_a_batch_that_the_stream_finds_too_large_is_a_dead_letter_and_the_rest_goes_on() {
    let servers = Servers::cluster();
    let client = servers.client();
    let mut config = stream(3);
    client.create(&config);
    let gateway = home(&servers.urls(), "", SHIP).start();
    publish(&gateway, ["before"]);
    client.until_messages(EVENTS, 1);
    // The gateway has asked how large they may be.
    config["max_msg_size"] = json!(1000);
    client.update(&config);
    let large = "x".repeat(2000);
    let payload = |number: u32| match number {
        70 | 150 => large.clone(),
        number => number.to_string(),
    };
    publish(&gateway, (0..300).map(payload));
    client.until_messages(EVENTS, 299);
    let payloads: Vec<_> = client.contents(EVENTS).iter().map(text).collect();
    let small = (0..300).map(payload).filter(|payload| *payload != large);
    let expected: Vec<_> = std::iter::once("before".to_owned()).chain(small).collect();
    assert_eq!(payloads, expected);
    eventually("dead letters", || {
        let letters = gateway.json(&["dead-letters"])["letters"].take();
        (letters.as_array().unwrap().len() == 2).then_some(())
    });
}

#[test]
fn a_message_that_just_fits_is_shipped_alone_among_batches() {
    let servers = Servers::cluster();
    let client = servers.client();
    let mut config = stream(3);
    config["max_msg_size"] = json!(1000);
    client.create(&config);
    let gateway = home(&servers.urls(), "", SHIP).start();
    // Its headers have 128 bytes at the most, those of a batch more.
    let payload = |number: usize| match number {
        70 | 150 => "x".repeat(872),
        100 => "x".repeat(1000 - 100),
        number => number.to_string(),
    };
    publish(&gateway, (0..300).map(payload));
    client.until_messages(EVENTS, 299);
    let payloads: Vec<_> = client.contents(EVENTS).iter().map(text).collect();
    let those_that_fit = (0..300).filter(|number| *number != 100).map(payload);
    assert_eq!(payloads, those_that_fit.collect::<Vec<_>>());
    let letters = gateway.json(&["dead-letters"])["letters"].take();
    assert_eq!(letters.as_array().unwrap().len(), 1);
}

#[test]
fn a_stream_that_has_room_for_a_part_of_a_batch_gets_that_part() {
    let servers = Servers::cluster();
    let client = servers.client();
    let mut config = stream(3);
    config["max_msgs"] = json!(40);
    config["discard"] = json!("new");
    client.create(&config);
    let mut link = Link::new(servers.spare_address(0), servers.addresses());
    let gateway = home(&[link.url()], "", SHIP).start();
    link.cut();
    publish(&gateway, 0..100);
    link.heal();
    until_told(&gateway, "maximum messages exceeded");
    client.until_messages(EVENTS, 40);
    config["max_msgs"] = json!(1000);
    client.update(&config);
    assert_eq!(assert_shipped(gateway.home(), &client), 100);
    assert_eq!(gateway.json(&["dead-letters"])["letters"], json!([]));
}

#[test]
fn another_writer_while_the_link_is_cut_neither_costs_an_event_nor_doubles_one() {
    let servers = Servers::cluster();
    let client = servers.client();
    client.create(&stream(3));
    let mut link = Link::new(servers.spare_address(0), servers.addresses());
    let gateway = home(&[link.url()], "", SHIP).start();
    for round in 0..5 {
        publish(&gateway, 200 * round..200 * (round + 1));
        // Some of them are on their way.
        link.cut();
        client.publish("headgate.intruder", b"mine");
        link.heal();
    }
    client.until_messages(EVENTS, 1005);
    let messages = client.contents(EVENTS);
    let own = messages
        .into_iter()
        .filter(|message| message.subject != "headgate.intruder");
    let mut found = shipped(&own.collect::<Vec<_>>());
    found.sort();
    assert_eq!(found, journaled(gateway.home()));
}
