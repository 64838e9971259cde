//! What a site of several gateways has once: an app that one of them runs for all, and that another one goes on
//! with, where it was, whatever happens to the first.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::apps::{Package, keeper};
use crate::gateway::{Gateway, Home, eventually};
use crate::nats::Servers;
use crate::wire::Wire;

/// In seconds.
const LEASE: u64 = 2;

/// A gateway of the site.
fn home(name: &str, servers: &[String]) -> Home {
    let home = Home::new();
    let text = format!(
        "[[link]]\nname = 'site'\nkind = 'jetstream'\nservers = {servers:?}\n\
         cluster = {{ lease_s = {LEASE}, replicas = 1, shards = 8, topics = ['keeper/#'] }}\n"
    );
    fs::write(home.path().join("links.toml"), text).unwrap();
    home.set("uplink.gateway", name)
        .set("uplink.site", "hall-3")
        .set("uplink.links_file", "links.toml")
}

/// Counts what it gets, under `n` (`in` stands for: increment `n`).
fn install(gateway: &Gateway, placement: &str) {
    let manifest = format!(
        "name = \"keeper\"\nversion = \"1.0.0\"\ncomponent = \"app.wasm\"\nplacement = \"{placement}\"\n\
         subscribe = [\"keeper/#\"]\npublish = [\"out\"]\n"
    );
    let package = Package::new(&manifest, keeper());
    gateway.json(&["app", "install", package.path().to_str().unwrap()]);
}

fn cluster(gateway: &Gateway) -> Value {
    gateway.status()["uplink"][0]["cluster"].clone()
}

fn leads(gateway: &Gateway) -> bool {
    cluster(gateway)["leads_with"].is_u64()
}

/// Which of them leads, as soon as one does and its app runs.
fn leader(gateways: &[&Gateway]) -> usize {
    eventually("a leader whose app runs", || {
        let is_up =
            |gateway: &&Gateway| leads(gateway) && gateway.app("keeper")["state"] == "running";
        gateways.iter().position(is_up)
    })
}

fn count(gateway: &Gateway, id: &str, events: usize) {
    let mut wire = Wire::connect(gateway, id);
    for _ in 0..events {
        wire.publish("keeper/in", b"in");
    }
}

/// What the app has kept, as the gateway that runs it tells.
fn kept(leader: &Gateway) -> u64 {
    let mut wire = Wire::connect(leader, "reader");
    wire.subscribe("out", 0);
    wire.publish("keeper/in", b"gn");
    match wire.next_message().payload() {
        b"" => 0,
        digits => std::str::from_utf8(digits).unwrap().parse().unwrap(),
    }
}

fn until_kept(leader: &Gateway, events: u64) {
    let mut last = 0;
    eventually(&format!("{events} events in what is kept"), || {
        last = kept(leader);
        assert!(last <= events, "{last} of {events}: some counted twice");
        (last == events).then_some(())
    });
}

#[test]
fn a_singleton_gets_the_events_of_all_gateways_and_another_goes_on_with_what_it_keeps() {
    let servers = Servers::single();
    let (a, b) = (
        home("a", &servers.urls()).start(),
        home("b", &servers.urls()).start(),
    );
    install(&a, "singleton");
    install(&b, "singleton");
    let first = leader(&[&a, &b]);
    let (first, second) = if first == 0 { (a, b) } else { (b, a) };
    assert_eq!(second.app("keeper")["state"], "standby");
    count(&first, "c", 30);
    count(&second, "c", 30);
    until_kept(&first, 60);

    let home = first.kill();
    let killed = Instant::now();
    // What comes while nobody leads waits in the stream.
    count(&second, "c", 30);
    leader(&[&second]);
    let took = killed.elapsed();
    assert!(took <= Duration::from_secs(2 * LEASE), "{took:?}");
    until_kept(&second, 90);

    // The other one comes back, and has nothing to do; what it had journaled and not shipped comes now.
    let first = home.start();
    count(&first, "c", 10);
    eventually("standby", || {
        (first.app("keeper")["state"] == "standby").then_some(())
    });
    until_kept(&second, 100);
}
