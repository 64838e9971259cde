//! Gateways that hand on all to each other: nothing goes round for ever, and nothing comes twice.

use super::*;
use broker::free_address;

/// Another gateway of the same kind, with a name of its own.
fn named(name: &str) -> Home {
    Home::new()
        .set("uplink.gateway", name)
        .set("uplink.links_file", "links.toml")
}

const SHIP_ALL: &str = "[[link.ship]]\ntopics = ['#']\n";
const BOTH_ALL: &str = "[[link.ship]]\ntopics = ['#']\n[[link.take]]\ntopics = ['#']\n";

/// The payloads in the journal, in their order.
fn journaled(home: &Home) -> Vec<String> {
    let records = crate::journal::records(home);
    let payloads = records.iter().map(|one| one["payload"].as_str().unwrap());
    payloads.map(str::to_owned).collect()
}

/// Waits until a link has nothing to ship any more.
fn until_idle(gateway: &Gateway) {
    eventually("all is shipped", || {
        let status = gateway.status();
        let links = status["uplink"].as_array().unwrap().clone();
        let idle = |link: &Value| link["ship"][0]["behind"] == 0;
        links.iter().all(idle).then_some(())
    });
}

#[test]
fn two_gateways_that_ship_all_to_each_other_have_each_event_once() {
    let addresses = [free_address(), free_address()];
    let gateways: Vec<_> = ["a", "b"]
        .iter()
        .zip([0, 1])
        .map(|(name, own)| {
            let home = named(name).set("mqtt.listen", addresses[own]);
            let other = format!("mqtt://{}", addresses[1 - own]);
            write_links(&home, &link("other", &[other], "", SHIP_ALL));
            home.start()
        })
        .collect();
    for (gateway, name) in gateways.iter().zip(["a", "b"]) {
        let payloads = (0..200).map(|number| format!("{name}{number}"));
        publish(gateway, payloads);
    }
    for gateway in &gateways {
        eventually("all events", || {
            (journaled(gateway.home()).len() >= 400).then_some(())
        });
    }
    // Whatever goes round would do so now.
    for _ in 0..3 {
        gateways.iter().for_each(until_idle);
    }
    publish(&gateways[0], ["last"]);
    for gateway in &gateways {
        let payloads = eventually("the last", || {
            let payloads = journaled(gateway.home());
            payloads.contains(&"last".to_owned()).then_some(payloads)
        });
        assert_eq!(payloads.len(), 401);
        let of_a = payloads.iter().filter(|one| one.starts_with('a'));
        let expected: Vec<_> = (0..200).map(|number| format!("a{number}")).collect();
        assert!(of_a.eq(&expected), "in their order");
    }
}

#[test]
fn two_gateways_that_take_all_from_each_other_have_each_event_once() {
    let addresses = [free_address(), free_address()];
    let gateways = [("a", 0), ("b", 1)].map(|(name, own)| {
        let home = named(name)
            .set("mqtt.listen", addresses[own])
            .set("journal.topics", "#");
        let other = format!("mqtt://{}", addresses[1 - own]);
        let take = "[[link.take]]\ntopics = ['#']\n";
        write_links(&home, &link("other", &[other], "", take));
        home.start()
    });
    // Until each has its subscription at the other.
    for (number, name) in [(0, "a"), (1, "b")] {
        let mut tries = 0..;
        eventually("what the other one has", || {
            publish(&gateways[number], [format!("try {} {name}", tries.next()?)]);
            let journaled = journaled(gateways[1 - number].home());
            journaled
                .iter()
                .any(|one| one.ends_with(name))
                .then_some(())
        });
    }
    publish(&gateways[0], numbers(0..100));
    publish(&gateways[1], numbers(100..200));
    let expected: std::collections::BTreeSet<_> = numbers(0..200).into_iter().collect();
    for round in 0..3 {
        // Whatever goes round is here by then.
        publish(&gateways[0], [format!("last {round}")]);
        for gateway in &gateways {
            let mut payloads = eventually("all events", || {
                let payloads = journaled(gateway.home());
                let has = |one: &String| payloads.contains(one);
                (expected.iter().all(has) && has(&format!("last {round}"))).then_some(payloads)
            });
            let count = payloads.len();
            payloads.sort();
            payloads.dedup();
            assert_eq!(payloads.len(), count, "nothing comes twice");
        }
    }
}

#[test]
fn over_two_brokers_between_two_gateways_nothing_comes_back_or_twice() {
    let brokers = [Mosquitto::open(), Mosquitto::open()];
    let gateways: Vec<_> = ["a", "b"]
        .iter()
        .map(|name| {
            let home = named(name);
            let [x, y] = &brokers;
            let x = link("x", &[x.url()], "", BOTH_ALL);
            let y = link("y", &[y.url()], "", BOTH_ALL);
            write_links(&home, &format!("{x}{y}"));
            let gateway = home.start();
            eventually("both links are up", || {
                let links = gateway.status()["uplink"].take();
                (links[0]["connected"] == true && links[1]["connected"] == true).then_some(())
            });
            gateway
        })
        .collect();
    let watches: Vec<_> = brokers
        .iter()
        .map(|broker| Observer::new(broker.address(), "#"))
        .collect();
    publish(&gateways[0], 0..100);
    // A's own, and those that B got from the other broker first.
    for watch in &watches {
        let seen = watch.messages(100);
        assert!(
            seen.iter()
                .all(|one| one.property("headgate-via").is_some())
        );
    }
    for _ in 0..3 {
        gateways.iter().for_each(until_idle);
    }
    publish(&gateways[1], ["last"]);
    for gateway in &gateways {
        let payloads = eventually("the last", || {
            let payloads = journaled(gateway.home());
            payloads.contains(&"last".to_owned()).then_some(payloads)
        });
        assert_eq!(payloads, [numbers(0..100), vec!["last".into()]].concat());
    }
    for watch in &watches {
        assert!(watch.seen().len() <= 202, "{}", watch.seen().len());
    }
}
