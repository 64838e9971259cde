//! What a site of several gateways has once: apps and mappings that one of them runs for all, and that another one
//! goes on with, where it was, whatever happens to the first.

mod mappings;

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use headgate::site::log::{Part, Replay};
use serde_json::Value;

use crate::apps::{Package, keeper};
use crate::gateway::{Gateway, Home, eventually};
use crate::nats::{Client, Servers};
use crate::wire::Wire;

/// The stream with the logs.
const STATE: &str = "HEADGATE_hall-3_STATE";

/// In seconds.
const LEASE: u64 = 2;

/// A gateway of the site.
fn home(name: &str, servers: &[String]) -> Home {
    let home = Home::new();
    let text = format!(
        "[[link]]\nname = 'site'\nkind = 'jetstream'\nservers = {servers:?}\n\
         cluster = {{ lease_s = {LEASE}, replicas = 1, shards = 8, topics = ['keeper/#', 'umh/#'] }}\n"
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

/// All that is kept, seat by seat, as whoever goes on with it would find it.
fn logs(client: &Client) -> Vec<headgate::site::Entries> {
    let mut logs: BTreeMap<String, Replay> = BTreeMap::new();
    if client.stream(STATE).is_none() {
        return Vec::new();
    }
    for message in client.contents(STATE) {
        let part = Part::decode(&message.payload).unwrap();
        logs.entry(message.subject).or_default().add(part);
    }
    logs.into_values().map(|log| log.image().entries).collect()
}

/// What the app has kept, all seats together.
fn kept(client: &Client) -> u64 {
    let counted = |entries: headgate::site::Entries| {
        let digits = entries.get("default\0n")?;
        std::str::from_utf8(digits).unwrap().parse::<u64>().ok()
    };
    logs(client).into_iter().filter_map(counted).sum()
}

fn until_kept(client: &Client, events: u64) {
    eventually(&format!("{events} events in what is kept"), || {
        let kept = kept(client);
        assert!(kept <= events, "{kept} of {events}: some counted twice");
        (kept == events).then_some(())
    });
}

#[test]
fn a_singleton_gets_the_events_of_all_gateways_and_another_goes_on_with_what_it_keeps() {
    let servers = Servers::single();
    let client = servers.client();
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
    until_kept(&client, 60);

    let home = first.kill();
    let killed = Instant::now();
    // What comes while nobody leads waits in the stream.
    count(&second, "c", 30);
    leader(&[&second]);
    let took = killed.elapsed();
    assert!(took <= Duration::from_secs(2 * LEASE), "{took:?}");
    until_kept(&client, 90);

    // The other one comes back, and has nothing to do; what it had journaled and not shipped comes now.
    let first = home.start();
    count(&first, "c", 10);
    eventually("standby", || {
        (first.app("keeper")["state"] == "standby").then_some(())
    });
    until_kept(&client, 100);
}

#[test]
fn when_the_gateway_that_runs_it_ends_in_order_another_goes_on_at_once() {
    let servers = Servers::single();
    let client = servers.client();
    let (a, b) = (
        home("a", &servers.urls()).start(),
        home("b", &servers.urls()).start(),
    );
    install(&a, "singleton");
    install(&b, "singleton");
    let first = leader(&[&a, &b]);
    let (first, second) = if first == 0 { (a, b) } else { (b, a) };
    count(&first, "c", 20);
    count(&second, "c", 20);
    first.terminate();
    let ended = Instant::now();
    leader(&[&second]);
    let took = ended.elapsed();
    assert!(took < Duration::from_secs(LEASE), "{took:?}");
    until_kept(&client, 40);
}

#[test]
fn a_leader_that_stood_still_writes_nothing_any_more_when_it_wakes_up() {
    let servers = Servers::single();
    let client = servers.client();
    let (a, b) = (
        home("a", &servers.urls()).start(),
        home("b", &servers.urls()).start(),
    );
    install(&a, "singleton");
    install(&b, "singleton");
    let first = leader(&[&a, &b]);
    let (first, second) = if first == 0 { (a, b) } else { (b, a) };
    count(&second, "c", 20);
    until_kept(&client, 20);
    first.signal(libc::SIGSTOP);
    count(&second, "c", 20);
    leader(&[&second]);
    until_kept(&client, 40);
    first.signal(libc::SIGCONT);
    count(&first, "c", 20);
    count(&second, "c", 20);
    eventually("standby", || {
        (first.app("keeper")["state"] == "standby").then_some(())
    });
    until_kept(&client, 80);
}

#[test]
fn what_is_kept_survives_a_leader_that_is_killed_under_load_again_and_again() {
    let servers = Servers::single();
    let client = servers.client();
    let mut gateways = ["a", "b"].map(|name| Some(home(name, &servers.urls()).start()));
    for gateway in gateways.iter().flatten() {
        install(gateway, "singleton");
    }
    let mut sent = 0;
    for _ in 0..4 {
        let [a, b] = &gateways;
        let leading = leader(&[a.as_ref().unwrap(), b.as_ref().unwrap()]);
        std::thread::scope(|scope| {
            let other = gateways[1 - leading].as_ref().unwrap();
            let load = scope.spawn(|| count(other, "c", 300));
            count(gateways[leading].as_ref().unwrap(), "c", 100);
            load.join().unwrap();
        });
        sent += 400;
        let home = gateways[leading].take().unwrap().kill();
        gateways[leading] = Some(home.start());
    }
    let [a, b] = gateways.map(Option::unwrap);
    leader(&[&a, &b]);
    until_kept(&client, sent);
}

#[test]
fn a_log_that_somebody_deletes_is_written_anew_and_one_that_cant_be_read_is_told_of() {
    let servers = Servers::single();
    let client = servers.client();
    let a = home("a", &servers.urls()).start();
    install(&a, "singleton");
    leader(&[&a]);
    count(&a, "c", 20);
    until_kept(&client, 20);
    client.delete(STATE);
    count(&a, "c", 20);
    until_kept(&client, 40);
    eventually("the log", || client.stream(STATE).map(drop));
    let a = a.kill().start();
    leader(&[&a]);
    until_kept(&client, 40);

    client.publish("headgate-state.hall-3.keeper.whole", b"\x09none of ours");
    count(&a, "c", 1);
    let problem = || cluster_problem(&a);
    eventually("what is wrong", || {
        problem().filter(|problem| problem.contains("format 9") || problem.contains("written"))
    });
    let (output, code) = {
        let output = a.cli(&["cluster", "status"]);
        (
            String::from_utf8(output.stdout).unwrap(),
            output.status.code(),
        )
    };
    assert_eq!(code, Some(1), "{output}");
    assert!(
        output.contains("keeper is to act here for the site"),
        "{output}"
    );
}

/// What is wrong with the seat of the app, if anything is.
fn cluster_problem(gateway: &Gateway) -> Option<String> {
    let seat = &gateway.status()["uplink"][0]["seats"][0];
    seat["problem"].as_str().map(str::to_owned)
}

/// How many shards each of them acts for with the app.
fn shards(gateway: &Gateway) -> u64 {
    let seats = gateway.status()["uplink"][0]["seats"].clone();
    let seats = seats.as_array().cloned().unwrap_or_default();
    seats.iter().filter(|seat| seat["acts"] == true).count() as u64
}

fn until_divided(gateways: &[&Gateway]) {
    eventually("all shards divided", || {
        let shards: Vec<u64> = gateways.iter().map(|gateway| shards(gateway)).collect();
        (shards.iter().sum::<u64>() == 8 && shards.iter().all(|count| *count > 0)).then_some(())
    });
}

/// Counts on topics of all shards.
fn count_in_shards(gateway: &Gateway, events: usize) {
    let mut wire = Wire::connect(gateway, "c");
    for number in 0..events {
        wire.publish(&format!("keeper/{}", number % 40), b"in");
    }
}

#[test]
fn the_shards_of_an_app_move_with_what_they_keep_when_a_gateway_joins_leaves_or_dies() {
    let servers = Servers::single();
    let client = servers.client();
    let a = home("a", &servers.urls()).start();
    install(&a, "partition");
    until_divided(&[&a]);
    count_in_shards(&a, 80);
    until_kept(&client, 80);

    let b = home("b", &servers.urls()).start();
    install(&b, "partition");
    until_divided(&[&a, &b]);
    count_in_shards(&a, 40);
    count_in_shards(&b, 40);
    until_kept(&client, 160);

    let home = a.kill();
    until_divided(&[&b]);
    count_in_shards(&b, 40);
    until_kept(&client, 200);

    let a = home.start();
    until_divided(&[&a, &b]);
    b.terminate();
    until_divided(&[&a]);
    count_in_shards(&a, 40);
    until_kept(&client, 240);
}
