//! Mappings of which the site has one of each.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{LEASE, home, logs};
use crate::gateway::{Gateway, eventually};
use crate::nats::{Client, Servers};
use crate::wire::Wire;

/// The mapping `line`, over what comes from a press and an oven.
fn install(gateway: &Gateway, mapping: &str) {
    let path = gateway.home().path().join("line.yaml");
    let text = format!(
        "model: {{ name: line, version: v1 }}\noutput_topic: umh.v1.corpA.hall\nsources:\n  \
         press: umh.v1.corpA.hall._raw.press\n  oven: umh.v1.corpA.hall._raw.oven\nmapping: {mapping}\n"
    );
    fs::write(&path, text).unwrap();
    gateway.json(&["mapping", "install", path.to_str().unwrap()]);
}

/// Two gateways with it, the one that runs it first.
fn start(servers: &Servers) -> (Gateway, Gateway) {
    let [a, b] = ["a", "b"].map(|name| {
        let home = home(name, &servers.urls()).set("mappings.singleton", "line, other");
        let gateway = home.start();
        install(&gateway, "{ sum: press + oven }");
        gateway
    });
    let runs = |gateway: &&Gateway| mapping(gateway)["standby"] == false;
    match eventually("a gateway that runs it", || [&a, &b].iter().position(runs)) {
        0 => (a, b),
        _ => (b, a),
    }
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
    let value = |(key, value): (Arc<str>, Arc<[u8]>)| {
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
    let (first, second) = start(&servers);
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
    install(&second, "{ product: press * oven }");
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
    let (first, second) = start(&servers);
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
