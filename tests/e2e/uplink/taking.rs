//! Commands that come from a stream.

use super::*;
use crate::nats::{Link, Servers};

const COMMANDS: &str = "COMMANDS";

const TAKE: &str = "[[link.take]]\nstream = 'COMMANDS'\nsubjects = ['cmd.{gateway}.>']\nskip_levels = 2\n\
                    add_prefix = 'cmd/'\nstart = 'oldest'\n";

const CONSUMER: &str = "COMMANDS.headgate-press-cloud-COMMANDS";

fn commands() -> Value {
    json!({ "name": COMMANDS, "subjects": ["cmd.>"], "num_replicas": 1, "storage": "file" })
}

/// Waits until a stream knows that so many of its messages were taken.
fn until_taken(client: &Client, consumer: &str, count: u64) {
    eventually("acknowledgements", || {
        let info = client.ask(&format!("CONSUMER.INFO.{consumer}"), &json!({}));
        (info["ack_floor"]["stream_seq"] == count).then_some(())
    });
}

/// The commands that are in the journal.
fn taken(home: &Home) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let events = records(home)
        .into_iter()
        .map(|record| (text(&record["topic"]), text(&record["payload"])));
    events
        .filter(|(topic, _)| topic.starts_with("cmd/"))
        .collect()
}

#[test]
fn commands_come_once_and_in_their_order() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&commands());
    let expected: Vec<_> = (0..600)
        .map(|number: u32| (format!("cmd/valve/{}", number % 3), number.to_string()))
        .collect();
    for (topic, payload) in &expected {
        let subject = topic.replace("cmd/", "cmd.press.").replace('/', ".");
        client.publish(&subject, payload.as_bytes());
    }
    client.publish("cmd.oven.valve", b"of another gateway");
    let mut gateway = home(&servers.urls(), "", TAKE).start();
    until_taken(&client, CONSUMER, 600);
    gateway = gateway.kill().start();
    client.publish("cmd.press.last", b"last");
    until_taken(&client, CONSUMER, 602);
    let found = taken(gateway.home());
    assert_eq!(found[..600], expected);
    assert_eq!(found[600..], [("cmd/last".into(), "last".into())]);
}

#[test]
fn a_command_of_which_the_acknowledgement_was_lost_comes_once_however_late_it_comes_again() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&commands());
    let mut link = Link::new(servers.spare_address(0), servers.addresses());
    let home = home(&[link.url()], "", TAKE).set("pipeline.dedup.window_s", 1);
    let mut gateway = home.start();
    client.publish("cmd.press.a", b"0");
    until_taken(&client, CONSUMER, 1);
    // It comes again when nothing else knows it any more, but not as late as the gateway asks for.
    let mut consumer = client.ask(&format!("CONSUMER.INFO.{CONSUMER}"), &json!({}));
    consumer["config"]["ack_wait"] = json!(3_000_000_000u64);
    let request = json!({ "stream_name": COMMANDS, "config": consumer["config"] });
    let updated = client.ask(&format!("CONSUMER.DURABLE.CREATE.{CONSUMER}"), &request);
    assert!(updated.get("error").is_none(), "{updated}");
    let mut expected = vec![("cmd/a".to_owned(), "0".to_owned())];
    for (number, is_killed) in [(1, false), (2, true)] {
        link.mute();
        client.publish("cmd.press.a", number.to_string().as_bytes());
        expected.push(("cmd/a".into(), number.to_string()));
        let events = |status: &Value| status["uplink"][0]["take"][0]["events"].as_u64();
        gateway.until_status("the command", events, Some(number + 1));
        assert_eq!(taken(&home), expected);
        link.cut();
        if is_killed {
            gateway = gateway.kill().start();
        }
        link.heal();
        until_taken(&client, CONSUMER, number + 1);
        assert_eq!(taken(&home), expected);
    }
    drop(gateway);
}

#[test]
fn a_consumer_that_somebody_deletes_is_made_anew_where_it_was() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&commands());
    for (name, start) in [("oven", "oldest"), ("press", "new")] {
        let take = TAKE.replace("oldest", start);
        let gateway = home(&servers.urls(), "", &take)
            .set("uplink.gateway", name)
            .start();
        let consumer = format!("COMMANDS.headgate-{name}-cloud-COMMANDS");
        eventually("the consumer", || {
            let info = client.ask(&format!("CONSUMER.INFO.{consumer}"), &json!({}));
            info.get("config").map(drop)
        });
        let send = |numbers: std::ops::Range<u32>| {
            for number in numbers {
                client.publish(&format!("cmd.{name}.a"), number.to_string().as_bytes());
            }
        };
        let until = |count: usize| {
            eventually("the commands", || {
                let taken = taken(gateway.home());
                (taken.len() >= count).then_some(taken)
            })
        };
        send(0..10);
        until(10);
        for round in 1..4 {
            client.ask(&format!("CONSUMER.DELETE.{consumer}"), &json!({}));
            send(round * 10..round * 10 + 10);
            let payloads: Vec<_> = until(10 + 10 * round as usize)
                .into_iter()
                .map(|(_, payload)| payload)
                .collect();
            let expected = 0..10 + 10 * round;
            assert!(
                payloads
                    .iter()
                    .eq(&expected.map(|one| one.to_string()).collect::<Vec<_>>())
            );
        }
        // Of a stream that was made anew, all is new.
        client.delete(COMMANDS);
        client.create(&commands());
        send(100..110);
        let payloads = until(50);
        assert_eq!(payloads.len(), 50);
        assert_eq!(payloads[49].1, "109");
    }
}

#[test]
fn other_subjects_are_in_force_from_the_next_start_on() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&commands());
    let gateway = home(&servers.urls(), "", TAKE).start();
    client.publish("cmd.press.a", b"0");
    until_taken(&client, CONSUMER, 1);
    let home = gateway.kill();
    let take = TAKE.replace("'cmd.{gateway}.>'", "'cmd.all.>', 'cmd.some.>'");
    link(&home, &servers.urls(), "", &take);
    let gateway = home.start();
    eventually("the other subjects", || {
        let info = client.ask(&format!("CONSUMER.INFO.{CONSUMER}"), &json!({}));
        (info["config"]["filter_subjects"][1] == "cmd.some.>").then_some(())
    });
    for subject in ["cmd.press.b", "cmd.all.c", "cmd.some.d"] {
        client.publish(subject, b"1");
    }
    let taken = eventually("three commands", || {
        let taken = taken(gateway.home());
        (taken.len() >= 3).then_some(taken)
    });
    let topics: Vec<_> = taken.iter().map(|(topic, _)| topic.as_str()).collect();
    assert_eq!(topics, ["cmd/a", "cmd/c", "cmd/d"]);
}

#[test]
fn gateways_with_names_that_are_alike_get_their_own_commands() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&commands());
    let gateways = ["g.a", "g_a", "g+a"].map(|name| {
        home(&servers.urls(), "", TAKE)
            .set("uplink.gateway", name)
            .start()
    });
    // The name is one token, as in what is shipped.
    for token in ["g%2Ea", "g_a", "g+a"] {
        for _ in 0..5 {
            client.publish(&format!("cmd.{token}.valve"), token.as_bytes());
        }
    }
    for (gateway, token) in gateways.iter().zip(["g%2Ea", "g_a", "g+a"]) {
        let taken = eventually("the commands", || {
            let taken = taken(gateway.home());
            (taken.len() >= 5).then_some(taken)
        });
        assert_eq!(taken, vec![("cmd/valve".to_owned(), token.to_owned()); 5]);
    }
}

#[test]
fn what_gateways_hand_on_to_each_other_comes_back_to_none() {
    let servers = Servers::single();
    let client = servers.client();
    client.create(&stream(1));
    let take = "[[link.take]]\nstream = 'EVENTS'\nsubjects = ['headgate.>']\nskip_levels = 2\nstart = 'oldest'\n";
    let ship = SHIP.replace("exclusive = true", "exclusive = false");
    // By another link, which does not know what came by the first one.
    let more = format!(
        "{take}[[link]]\nname = 'up'\nkind = 'jetstream'\nservers = {:?}\n{ship}",
        servers.urls()
    );
    let gateways = ["press", "oven"].map(|name| {
        let home = home(&servers.urls(), "", &more).set("uplink.gateway", name);
        home.start()
    });
    publish(&gateways[0], ["x"]);
    client.until_messages(EVENTS, 2);
    for name in ["press", "oven"] {
        until_taken(&client, &format!("EVENTS.headgate-{name}-cloud-EVENTS"), 2);
    }
    for gateway in &gateways {
        assert_eq!(journaled(gateway.home()).len(), 1);
    }
    let messages = client.contents(EVENTS);
    let ways: Vec<_> = messages
        .iter()
        .map(|message| (&*message.subject, message.header("Headgate-Via")))
        .collect();
    assert_eq!(
        ways,
        [
            ("headgate.press.plant.a", None),
            ("headgate.oven.plant.a", Some("press"))
        ]
    );
}
