//! The uplink, against real NATS servers: what a stream has in the end is what the journal has.

mod batches;
mod faults;
mod logins;
mod shipping;
mod streams;
mod taking;

use std::fs;

use serde_json::{Value, json};

use crate::gateway::{Gateway, Home, eventually};
use crate::journal::records;
use crate::nats::{Client, Stored};
use crate::wire::Wire;

/// The stream that everything is shipped to.
const EVENTS: &str = "EVENTS";

/// Ships what is on `plant/#` to it. The first two lines of a table that may have more.
const SHIP: &str = "[[link.ship]]\ntopics = ['plant/#']\nstream = 'EVENTS'\n\
                    subject = 'headgate.{gateway}.{topic}'\nexclusive = true\n";

/// A gateway with one link. `more` is about the link, `ship` about what it ships.
fn home(servers: &[String], more: &str, ship: &str) -> Home {
    let home = Home::new();
    link(&home, servers, more, ship);
    home.set("uplink.gateway", "press")
        .set("uplink.links_file", "links.toml")
}

fn link(home: &Home, servers: &[String], more: &str, ship: &str) {
    let text = format!(
        "[[link]]\nname = 'cloud'\nkind = 'jetstream'\nservers = {servers:?}\n{more}\n{ship}"
    );
    fs::write(home.path().join("links.toml"), text).unwrap();
}

/// One that takes batches, where those are of use.
fn stream(replicas: usize) -> Value {
    json!({
        "name": EVENTS, "subjects": ["headgate.>"], "num_replicas": replicas, "storage": "file",
        "allow_atomic": replicas > 1,
    })
}

/// With `more` set in it.
fn stream_with(mut more: Value) -> Value {
    let mut config = stream(1);
    let config_fields = config.as_object_mut().unwrap();
    config_fields.append(more.as_object_mut().unwrap());
    config
}

fn publish(gateway: &Gateway, payloads: impl IntoIterator<Item = impl ToString>) {
    let mut wire = Wire::connect(gateway, "publisher");
    for payload in payloads {
        wire.publish("plant/a", payload.to_string().as_bytes());
    }
}

/// What was published on `plant/…`: the topic, without that, and the payload.
fn journaled(home: &Home) -> Vec<(u64, String, String)> {
    let event = |record: &Value| {
        let text = |key: &str| record[key].as_str().unwrap().to_owned();
        let sequence = record["sequence"].as_u64().unwrap();
        (sequence, text("topic"), text("payload"))
    };
    let events = records(home).iter().map(event).collect::<Vec<_>>();
    let plant = |(_, topic, _): &(u64, String, String)| topic.starts_with("plant/");
    events.into_iter().filter(plant).collect()
}

/// The same of what is in the stream: the event's sequence is in its id.
fn shipped(messages: &[Stored]) -> Vec<(u64, String, String)> {
    let event = |message: &Stored| {
        let sequence = message.id().rsplit('/').next().unwrap().parse().unwrap();
        let topic = topic(message.subject.strip_prefix("headgate.press.").unwrap());
        (sequence, topic, text(message))
    };
    messages.iter().map(event).collect()
}

fn text(message: &Stored) -> String {
    String::from_utf8(message.payload.clone()).unwrap()
}

/// The topic that a subject stands for.
fn topic(subject: &str) -> String {
    let level = |token: &str| match token {
        "%" => String::new(),
        token => {
            let decoded = percent_encoding::percent_decode_str(token);
            decoded.decode_utf8().unwrap().into_owned()
        }
    };
    subject.split('.').map(level).collect::<Vec<_>>().join("/")
}

/// Waits until the stream has as many messages as the journal has events, and compares: nothing is lost, nothing is
/// there twice, all is in its order. When that fails, the status of the link says more.
fn assert_shipped(home: &Home, client: &Client) -> usize {
    let expected = journaled(home);
    let _status = OnFailure(home);
    client.until_messages(EVENTS, expected.len() as u64);
    let found = shipped(&client.contents(EVENTS));
    let differ = found.iter().zip(&expected).position(|(a, b)| a != b);
    if let Some(at) = differ {
        let around = at.saturating_sub(2)..at + 3;
        let (found, expected) = (found.get(around.clone()), expected.get(around));
        panic!("message {at} differs: the stream has {found:?}, the journal {expected:?}");
    }
    assert_eq!(found.len(), expected.len());
    found.len()
}

/// Waits until the status of the links says that something is wrong, with these words.
fn until_told(gateway: &Gateway, words: &str) {
    let links = || gateway.status()["uplink"].to_string().to_lowercase();
    eventually(words, || links().contains(words).then_some(()));
}

/// Shows what the gateway says of its links when a test fails.
struct OnFailure<'a>(&'a Home);

impl Drop for OnFailure<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let output = self.0.command(&["uplink", "status"]).output();
            let text = output.map(|output| output.stdout).unwrap_or_default();
            eprintln!(
                "---- uplink status ----\n{}",
                String::from_utf8_lossy(&text)
            );
        }
    }
}
