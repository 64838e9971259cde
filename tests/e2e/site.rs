//! What a site of several gateways has once: apps and mappings that one of them runs for all, and that another one
//! goes on with, where it was, whatever happens to the first.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use headgate::site::Entries;
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
fn logs(client: &Client) -> Vec<Entries> {
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
    let counted = |entries: Entries| {
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

/// The mapping `line`, over what comes from a press and an oven.
fn install_mapping(gateway: &Gateway, mapping: &str) {
    let path = gateway.home().path().join("line.yaml");
    let text = format!(
        "model: {{ name: line, version: v1 }}\noutput_topic: umh.v1.corpA.hall\nsources:\n  \
         press: umh.v1.corpA.hall._raw.press\n  oven: umh.v1.corpA.hall._raw.oven\nmapping: {mapping}\n"
    );
    fs::write(&path, text).unwrap();
    gateway.json(&["mapping", "install", path.to_str().unwrap()]);
}

fn mapping(gateway: &Gateway) -> Value {
    gateway.json(&["mapping", "inspect", "line"])
}

fn measure(gateway: &Gateway, source: &str, value: u64) {
    let topic = format!("umh/v1/corpA/hall/_raw/{source}");
    let payload = format!("{{\"value\":{value},\"timestamp_ms\":1}}");
    Wire::connect(gateway, source).publish(&topic, payload.as_bytes());
}

/// Gets what the mapping sends.
fn results(gateway: &Gateway) -> Wire {
    let mut wire = Wire::connect(gateway, "results");
    wire.subscribe("umh/v1/corpA/hall/_line_v1/#", 0);
    wire
}

fn result(of: &mut Wire) -> u64 {
    let payload: Value = serde_json::from_slice(of.next_message().payload()).unwrap();
    payload["value"].as_u64().unwrap()
}

/// The values of the mapping that are kept, by source.
fn values(client: &Client) -> BTreeMap<String, String> {
    let entries = logs(client).into_iter().flatten();
    let value = |(key, value): (std::sync::Arc<str>, std::sync::Arc<[u8]>)| {
        let stored: Value = serde_json::from_slice(&value).unwrap();
        let source = key.strip_prefix("line\0").unwrap();
        (
            source.to_owned(),
            stored["value"].as_str().unwrap().to_owned(),
        )
    };
    entries.map(value).collect()
}

fn until_values(client: &Client, wanted: &[(&str, &str)]) {
    let wanted: BTreeMap<String, String> = wanted
        .iter()
        .map(|(source, value)| ((*source).to_owned(), (*value).to_owned()))
        .collect();
    eventually(&format!("{wanted:?} in what is kept"), || {
        (values(client) == wanted).then_some(())
    });
}

#[test]
fn a_singleton_mapping_combines_the_values_of_all_gateways_once_and_another_goes_on_with_them() {
    let servers = Servers::single();
    let client = servers.client();
    let start = |name| {
        let home = home(name, &servers.urls()).set("mappings.singleton", "line, other");
        let gateway = home.start();
        install_mapping(&gateway, "{ sum: press + oven }");
        gateway
    };
    let (a, b) = (start("a"), start("b"));
    let runs = |gateway: &&Gateway| mapping(gateway)["standby"] == false;
    let first = eventually("a gateway that runs it", || [&a, &b].iter().position(runs));
    let (first, second) = if first == 0 { (a, b) } else { (b, a) };
    let list = second.cli(&["mapping", "list"]).stdout;
    let list = String::from_utf8(list).unwrap();
    assert!(list.contains("standby"), "{list}");
    let (mut at_first, mut at_second) = (results(&first), results(&second));
    measure(&first, "press", 1);
    measure(&second, "oven", 2);
    assert_eq!(result(&mut at_first), 3);
    until_values(&client, &[("press", "1"), ("oven", "2")]);
    at_first.assert_quiet();
    at_second.assert_quiet();
    let generated = |gateway: &Gateway| mapping(gateway)["counters"]["outputs_generated"].clone();
    assert_eq!(
        (generated(&first), generated(&second)),
        (1.into(), 0.into())
    );
    first.assert_adds_up();

    let home = first.kill();
    let killed = Instant::now();
    measure(&second, "oven", 5);
    assert_eq!(result(&mut at_second), 6);
    let took = killed.elapsed();
    assert!(took <= Duration::from_secs(2 * LEASE), "{took:?}");

    // The other one comes back, and leaves it to this one.
    let first = home.start();
    measure(&first, "press", 10);
    assert_eq!(result(&mut at_second), 15);
    assert_eq!(mapping(&first)["standby"], true);
    assert_eq!(generated(&first), 0);

    // What is installed anew goes on with its values; what is removed leaves none.
    install_mapping(&second, "{ product: press * oven }");
    measure(&first, "press", 4);
    assert_eq!(result(&mut at_second), 20);
    until_values(&client, &[("press", "4"), ("oven", "5")]);
    second.json(&["mapping", "remove", "line"]);
    until_values(&client, &[]);
    first.assert_adds_up();
    second.assert_adds_up();
}

#[test]
fn when_the_gateway_that_runs_a_singleton_mapping_ends_in_order_nothing_is_computed_twice() {
    let servers = Servers::single();
    let client = servers.client();
    let start = |name| {
        let home = home(name, &servers.urls()).set("mappings.singleton", "line");
        let gateway = home.start();
        install_mapping(&gateway, "{ sum: press + oven }");
        gateway
    };
    let (a, b) = (start("a"), start("b"));
    let runs = |gateway: &&Gateway| mapping(gateway)["standby"] == false;
    let first = eventually("a gateway that runs it", || [&a, &b].iter().position(runs));
    let (first, second) = if first == 0 { (a, b) } else { (b, a) };
    measure(&first, "press", 1);
    until_values(&client, &[("press", "1")]);
    let mut at_first = results(&first);
    let mut at_second = results(&second);
    measure(&second, "oven", 2);
    assert_eq!(result(&mut at_first), 3);
    first.terminate();
    measure(&second, "oven", 5);
    assert_eq!(result(&mut at_second), 6);
}
