//! Rules, lanes and duplicates, as publishers and the subscribers of what apps make see them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use serde_json::Value;

use crate::apps::{Package, built};
use crate::gateway::{Gateway, Home, eventually};
use crate::wire::{PUBACK, Wire, packet, publish_packet, string};

/// A gateway with these rules, and `relay` on it, which has what comes to `relay/#` come out below `relayed/`.
fn home(rules: &str) -> Home {
    let home = Home::new();
    let file = home.path().join("rules.toml");
    fs::write(&file, rules).unwrap();
    home.set("pipeline.rules_file", file.display())
}

fn with_relay(home: Home) -> Gateway {
    let gateway = home.start();
    gateway.install(&built("relay"));
    gateway
}

/// An MQTT 5 PUBLISH at QoS 1 with one user property.
fn publish_with(topic: &str, payload: &[u8], name: &str, value: &str) -> Vec<u8> {
    let mut properties = vec![0x26];
    properties.extend(string(name));
    properties.extend(string(value));
    let mut body = string(topic);
    body.extend(7u16.to_be_bytes());
    body.push(properties.len() as u8);
    body.extend(properties);
    body.extend(payload);
    packet(0x32, &body)
}

fn lane<'a>(status: &'a Value, lane: &str) -> &'a Value {
    &status["pipeline"]["lanes"][lane]
}

#[test]
fn a_window_of_the_batch_lane_is_one_call_and_an_idle_one_comes_in_time() {
    let gateway = with_relay(home(
        "[[rule]]\ntopics = ['relay/bulk/#']\nlane = 'batch'\nwindow_events = 500\nwindow_age_ms = 300\n",
    ));
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("relayed/#", 0);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..501 {
        let payload = number.to_string();
        publisher.send(&publish_packet("relay/bulk/a", payload.as_bytes(), 0, 0));
    }
    for number in 0..501 {
        let message = subscriber.next_message();
        assert_eq!(message.payload(), number.to_string().as_bytes());
    }
    let app = gateway.until_app("relay", "all", |app| app["counters"]["handled"] == 501);
    assert_eq!(
        app["counters"]["batches"], 2,
        "500 together, and the one that was left"
    );
    let status = gateway.assert_adds_up();
    assert_eq!(lane(&status, "batch")["batches"], 2);
}

#[test]
fn duplicates_reach_no_app_and_are_acknowledged() {
    let gateway = with_relay(home(
        "[[rule]]\ntopics = ['relay/#']\ndedup = 'id'\ndedup_property = 'order'\n",
    ));
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("relayed/#", 0);
    let mut publisher = Wire::connect_v5(&gateway, "publisher");
    for (payload, order) in [("a", "1"), ("b", "1"), ("c", "2"), ("d", "1"), ("e", "3")] {
        publisher.send(&publish_with("relay/x", payload.as_bytes(), "order", order));
        assert_eq!(publisher.next().kind(), PUBACK);
    }
    // By its content, where there is no such property.
    for payload in ["f", "f", "g"] {
        publisher.send(&publish_with("relay/x", payload.as_bytes(), "other", "9"));
        assert_eq!(publisher.next().kind(), PUBACK);
    }
    for expected in ["a", "c", "e", "f", "g"] {
        assert_eq!(subscriber.next_message().payload(), expected.as_bytes());
    }
    let status = gateway.assert_adds_up();
    assert_eq!(lane(&status, "transactional")["deduplicated"], 3);
    // It was journaled once.
    assert_eq!(gateway.json(&["journal", "stat"])["next"], 5);
}

#[test]
fn duplicates_are_known_after_a_restart_and_after_kill_9() {
    let gateway = with_relay(home("[[rule]]\ntopics = ['relay/#']\ndedup = 'content'\n"));
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("relay/x", b"before");
    let gateway = gateway.kill().start();
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("relay/x", b"before");
    publisher.publish("relay/x", b"between");
    gateway.assert_adds_up();
    let gateway = gateway.terminate().home.start();
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("relay/x", b"before");
    publisher.publish("relay/x", b"between");
    publisher.publish("relay/x", b"after");
    let status = gateway.assert_adds_up();
    assert_eq!(lane(&status, "transactional")["deduplicated"], 2);
    assert_eq!(gateway.json(&["journal", "stat"])["next"], 3);
}

/// One field of all events in the journal, in the order of their sequences.
fn journal(home: &Home, field: &str) -> Vec<String> {
    let output = home
        .command(&["journal", "tail", "-n", "10000000", "--json"])
        .output()
        .unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    lines
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()[field]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect()
}

/// Sends each number until it is acknowledged, as a client does that has lost its connection.
fn resend_until_acknowledged(
    gateway: &Gateway,
    client: usize,
    event: impl Fn(u64) -> (String, String),
    next: &mut u64,
    done: &AtomicU64,
) {
    let mut wire = Wire::connect(gateway, &format!("publisher{client}"));
    loop {
        let (topic, payload) = event(*next);
        wire.send_while_open(&publish_packet(topic, payload.as_bytes(), 1, 7));
        match wire.next_or_end() {
            Some(packet) => assert_eq!(packet.kind(), PUBACK),
            None => return,
        }
        *next += 1;
        done.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn clients_that_resend_to_a_gateway_that_is_killed_again_and_again_have_each_event_journaled_once()
{
    const CLIENTS: usize = 4;
    let mut home = home("[[rule]]\ntopics = ['relay/#']\ndedup = 'content'\n");
    let mut next = [0; CLIENTS];
    let mut reported = 0;
    for round in 0..50 {
        let gateway = match round {
            0 => with_relay(home),
            _ => home.start(),
        };
        let done = AtomicU64::new(0);
        thread::scope(|scope| {
            for (client, next) in next.iter_mut().enumerate() {
                let (gateway, done) = (&gateway, &done);
                let event = move |number| ("relay/x".into(), format!("{client}-{number}"));
                scope.spawn(move || {
                    resend_until_acknowledged(gateway, client, event, next, done);
                });
            }
            while done.load(Ordering::SeqCst) < 10 + 5 * round {
                thread::yield_now();
            }
            gateway.signal(libc::SIGKILL);
        });
        home = gateway.kill();
        reported += done.into_inner();
    }
    let payloads = journal(&home, "payload");
    let distinct: HashSet<_> = payloads.iter().collect();
    assert_eq!(distinct.len(), payloads.len(), "one is there twice");
    for (client, next) in next.into_iter().enumerate() {
        for number in 0..next {
            let payload = format!("{client}-{number}");
            assert!(
                distinct.contains(&payload),
                "{payload} was acknowledged and is lost"
            );
        }
    }
    // What was on disk and not acknowledged any more is known as well.
    assert!((reported..=reported + 4 * 50).contains(&(payloads.len() as u64)));
    let verified = home.command(&["journal", "verify"]).output().unwrap();
    assert!(verified.status.success());
}

/// The topic of an event of which `meter-total` keeps how often it came.
fn counting(client: usize, number: u64) -> String {
    format!("plant/{client}-{number}/count")
}

/// How many events were delivered again at this start.
fn delivered_again(gateway: &Gateway) -> u64 {
    let log = gateway.log();
    let mut lines = log.lines();
    let line = lines.find(|line| line.contains("delivered again what no app had finished"));
    line.map_or(0, |line| {
        let (_, count) = line.split_once("events=").unwrap();
        count.split(' ').next().unwrap().parse().unwrap()
    })
}

#[test]
fn an_app_that_counts_has_counted_each_event_however_often_the_gateway_is_killed() {
    const CLIENTS: usize = 4;
    const KILLS: u64 = 50;
    let mut home = home("[[rule]]\ntopics = ['plant/#']\ndedup = 'content'\n");
    let folder = built("meter-total");
    let manifest = fs::read_to_string(folder.join("manifest.toml")).unwrap();
    let manifest = manifest.replace("publish_every_s = 10", "publish_every_s = 1");
    let package = Package::new(
        &format!(
            "component = \"app.wasm\"\n{manifest}\n[limits]\npublish_per_batch = 100000\n\
             kv_per_batch = 100000\nkv_bytes = 16777216\nbatch_deadline_ms = 10000\n"
        ),
        fs::read(folder.join("meter-total.wasm")).unwrap(),
    );
    let mut next = [0; CLIENTS];
    let (mut acknowledged, mut again) = (0, 0);
    let begin = |home: &Home, again: &mut u64| {
        let gateway = home.start();
        let running = |app: &Value| app["state"] == "running" && app["counters"]["queued"] == 0;
        // What comes again comes before anything new.
        let status = gateway.assert_adds_up();
        let app = gateway.until_app("meter-total", "what came again", running);
        let known = delivered_again(&gateway);
        assert_eq!(lane(&status, "transactional")["handed_over"], known);
        // Its timer rings, too.
        assert!(app["counters"]["handled"].as_u64() >= Some(known));
        *again += known;
        gateway
    };
    for kill in 0..KILLS {
        let gateway = match kill {
            0 => {
                let gateway = home.start();
                gateway.install(package.path());
                gateway
            }
            _ => begin(&home, &mut again),
        };
        let done = AtomicU64::new(0);
        // Some time after this many: as random as threads are.
        let enough = 10 + kill * 37 % 70;
        thread::scope(|scope| {
            for (client, next) in next.iter_mut().enumerate() {
                let (gateway, done) = (&gateway, &done);
                let event = move |number| (counting(client, number), "1".into());
                scope.spawn(move || {
                    resend_until_acknowledged(gateway, client, event, next, done);
                });
            }
            while done.load(Ordering::SeqCst) < enough {
                thread::yield_now();
            }
            gateway.signal(libc::SIGKILL);
        });
        home = gateway.kill();
        acknowledged += done.into_inner();
    }
    let gateway = begin(&home, &mut again);
    let stat = eventually("all finished", || {
        let stat = gateway.json(&["journal", "stat"]);
        (stat["finished"] == stat["next"]).then_some(stat)
    });
    let journaled = stat["next"].as_u64().unwrap();
    let topics = journal(gateway.home(), "topic");
    let distinct: HashSet<_> = topics.iter().cloned().collect();
    assert_eq!(distinct.len(), topics.len(), "one is there twice");
    for (client, next) in next.into_iter().enumerate() {
        for number in 0..next {
            let topic = counting(client, number);
            assert!(
                distinct.contains(&topic),
                "{topic} was acknowledged and is lost"
            );
        }
    }
    // It publishes a total when something has been added to it.
    let mut reader = Wire::connect(&gateway, "reader");
    reader.subscribe("totals/#", 0);
    let mut asking = Wire::connect(&gateway, "asking");
    let mut counted = HashMap::new();
    for some in topics.chunks(500) {
        for topic in some {
            asking.send(&publish_packet(topic, b"0", 0, 0));
        }
        while !some.iter().all(|topic| counted.contains_key(topic)) {
            let message = reader.next_message();
            let times: u64 = std::str::from_utf8(message.payload())
                .unwrap()
                .parse()
                .unwrap();
            let topic = message.topic().strip_prefix("totals/").unwrap();
            assert!(times >= 1, "{topic} was acknowledged and is not counted");
            counted.insert(topic.to_owned(), times);
        }
    }
    let handled: u64 = counted.values().sum();
    println!(
        "{KILLS} kills: {acknowledged} acknowledged, {journaled} in the journal, {handled} counted; {again} were \
         delivered again"
    );
    assert!((acknowledged..=acknowledged + KILLS * CLIENTS as u64).contains(&journaled));
    assert_eq!(journaled, distinct.len() as u64);
    assert!((journaled..=journaled + again).contains(&handled));
    assert!(gateway.cli(&["journal", "verify"]).status.success());
    gateway.assert_adds_up();
}

#[test]
fn realtime_events_overtake_what_waits_and_the_oldest_of_them_make_room() {
    let gateway = with_relay(home(
        "[[rule]]\ntopics = ['relay/now']\nlane = 'realtime'\n",
    ));
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("relayed/#", 0);
    let mut publisher = Wire::connect(&gateway, "publisher");
    gateway.json(&["app", "pause", "relay"]);
    for number in 0..10 {
        publisher.publish("relay/other", number.to_string().as_bytes());
    }
    // More than the app's queue holds.
    for number in 0..10_000 {
        let payload = number.to_string();
        publisher.send(&publish_packet("relay/now", payload.as_bytes(), 0, 0));
    }
    publisher.publish("relay/now", b"last");
    let status = eventually("all routed", || {
        let status = gateway.status();
        (lane(&status, "realtime")["handed_over"] == 10_001).then_some(status)
    });
    assert_eq!(
        status["pipeline"]["pressure"], "healthy",
        "it is paused, and not slow"
    );
    gateway.json(&["app", "resume", "relay"]);
    let (mut now, mut other) = (Vec::new(), Vec::new());
    while other.len() < 10 || now.last().is_none_or(|last| last != "last") {
        let message = subscriber.next_message();
        let payload = String::from_utf8(message.payload().to_vec()).unwrap();
        match message.topic() {
            "relayed/now" => now.push(payload),
            _ => other.push((now.len(), payload)),
        }
    }
    let (before, other): (Vec<_>, Vec<_>) = other.into_iter().unzip();
    assert_eq!(other, (0..10).map(|n| n.to_string()).collect::<Vec<_>>());
    // One call in eight is for those of the other lane.
    assert!(before[0] >= 200, "{before:?}");
    let app = gateway.app("relay");
    let dropped = app["counters"]["dropped"]["queue_full"].as_u64().unwrap();
    assert_eq!(now.len() as u64 + dropped, 10_001);
    assert_eq!(
        now[0],
        dropped.to_string(),
        "the oldest have gone, in their order"
    );
    let letters = gateway.json(&["dead-letters", "-n", "1000"]);
    assert_eq!(letters["letters"][0]["topic"], "relay/now");
    assert_eq!(letters["letters"][0]["reason"], "queue_full");
    gateway.assert_adds_up();
}

#[test]
fn a_flood_on_each_lane_is_accounted_for_to_the_last_event() {
    const EVENTS: u64 = 60_000;
    let home = home(
        "[[rule]]\ntopics = ['relay/now']\nlane = 'realtime'\n\
         [[rule]]\ntopics = ['relay/bulk']\nlane = 'batch'\n\
         [[rule]]\ntopics = ['relay/all']\ndurable = false\n",
    )
    .set("pipeline.realtime.queue_events", 500)
    .set("pipeline.windows.queue_events", 500)
    .set("pipeline.windows.max_age_ms", 10)
    .set("pipeline.queue_events", 500)
    .set("apps.queue_events", 500);
    let gateway = with_relay(home);
    thread::scope(|scope| {
        for topic in ["relay/now", "relay/bulk", "relay/all"] {
            let gateway = &gateway;
            scope.spawn(move || {
                let mut wire = Wire::connect(gateway, topic);
                let packet = publish_packet(topic, &[b'x'; 100], 0, 0);
                for _ in 0..EVENTS / 100 {
                    wire.send(&packet.repeat(100));
                }
                // All before it have been taken in.
                wire.publish("unrelated", b"");
            });
        }
    });
    let status = gateway.assert_adds_up();
    let of = |name: &str, what: &str| lane(&status, name)[what].as_u64().unwrap();
    for name in ["realtime", "batch"] {
        assert_eq!(of(name, "accepted"), EVENTS);
        assert_eq!(
            of(name, "handed_over") + of(name, "overflowed") + of(name, "shed"),
            EVENTS
        );
    }
    assert_eq!(
        of("transactional", "handed_over"),
        EVENTS,
        "nothing is dropped there"
    );
    assert_eq!(of("transactional", "overflowed"), 0);
}

#[test]
fn rules_are_read_again_at_a_reload_and_stay_as_they_are_if_they_are_wrong() {
    let gateway = with_relay(home("[[rule]]\ntopics = ['relay/a']\nlane = 'realtime'\n"));
    let file = gateway.home().path().join("rules.toml");
    let mut publisher = Wire::connect(&gateway, "publisher");
    let mut realtime = 0;
    let mut goes_realtime = |expected: bool| {
        publisher.publish("relay/a", b"x");
        realtime += u64::from(expected);
        assert_eq!(lane(&gateway.status(), "realtime")["accepted"], realtime);
    };
    goes_realtime(true);
    fs::write(&file, "[[rule]]\ntopics = ['relay/a']\nlane = 'slow'\n").unwrap();
    let error = gateway.cli_error(&["reload"]);
    assert!(
        error.contains("pipeline.rules_file: ") && error.contains("rules.toml:3: "),
        "{error}"
    );
    goes_realtime(true);
    fs::write(&file, "[[rule]]\ntopics = ['relay/a']\n").unwrap();
    let error = gateway.cli_error(&["reload"]);
    assert!(error.contains("without a journal"), "{error}");
    goes_realtime(true);
    fs::write(&file, "[[rule]]\ntopics = ['relay/a']\nlane = 'batch'\n").unwrap();
    gateway.json(&["reload"]);
    goes_realtime(false);
}

#[test]
fn a_gateway_with_wrong_rules_does_not_start_and_says_where() {
    let home = home("[[rule]]\ntopics = ['a/#/b']\n");
    let refusal = home.refusal();
    assert!(
        refusal.contains("pipeline.rules_file: ") && refusal.contains("rules.toml:2: `#` must be"),
        "{refusal}"
    );
    let checked = home.command(&["config", "check"]).output().unwrap();
    assert!(!checked.status.success());
    let text = String::from_utf8([checked.stdout, checked.stderr].concat()).unwrap();
    assert!(text.contains("rules.toml:2"), "{text}");
}

/// What `why` concludes, as one text.
fn because(gateway: &Gateway, topic: &str) -> String {
    let explanation = gateway.json(&["why", topic]);
    let because = explanation["because"].as_array().unwrap();
    let sentences: Vec<_> = because.iter().map(|one| one.as_str().unwrap()).collect();
    sentences.join("\n")
}

#[test]
fn why_says_what_became_of_a_topics_last_events() {
    let gateway = with_relay(home(
        "[[rule]]\ntopics = ['nobody/#']\nlane = 'realtime'\n\
         [[rule]]\ntopics = ['relay/once']\ndedup = 'content'\n\
         [[rule]]\ntopics = ['relay/bulk']\nlane = 'batch'\nwindow_age_ms = 3600000\n",
    ));
    let mut publisher = Wire::connect(&gateway, "publisher");
    assert!(because(&gateway, "relay/a").contains("no event on this topic was seen"));

    publisher.publish("relay/a", b"x");
    gateway.until_app("relay", "it", |app| app["counters"]["handled"] == 1);
    let text = eventually("the step", || {
        let text = because(&gateway, "relay/a");
        text.contains("relay has handled the last event")
            .then_some(text)
    });
    assert!(
        text.contains("with 0 others, and published 1 events"),
        "{text}"
    );
    let output = gateway.json(&["why", "relayed/a"]);
    assert_eq!(output["publishers"], serde_json::json!(["relay"]));
    assert_eq!(output["steps"][0]["step"], "published");
    assert_eq!(output["subscribers"], 0);

    publisher.publish("nobody/a", b"x");
    let text = because(&gateway, "nobody/a");
    assert!(
        text.contains("no app subscribes to it") && text.contains("no app wanted it"),
        "{text}"
    );
    assert_eq!(gateway.json(&["why", "nobody/a"])["lane"], "realtime");
    assert_eq!(gateway.json(&["why", "nobody/a"])["rule"], 1);

    for _ in 0..2 {
        publisher.publish("relay/once", b"x");
    }
    let text = eventually("the step", || {
        let text = because(&gateway, "relay/once");
        text.contains("duplicate").then_some(text)
    });
    assert!(!text.contains("no app subscribes"), "{text}");

    publisher.publish("relay/bulk", b"x");
    let text = because(&gateway, "relay/bulk");
    assert!(
        text.contains("waits in a window, for 3600000 ms at most"),
        "{text}"
    );

    gateway.json(&["app", "stop", "relay"]);
    let shown = gateway.cli(&["why", "relay/a"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(
        shown.contains("the app relay is stopped") && shown.contains("relay handled it"),
        "{shown}"
    );

    let refused = gateway.cli(&["why", "relay/#"]);
    assert_eq!(refused.status.code(), Some(2));
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(error.contains("wildcards"), "{error}");
}

#[test]
fn of_two_events_with_one_id_in_one_read_one_reaches_the_app() {
    let gateway = with_relay(home("[[rule]]\ntopics = ['relay/#']\ndedup = 'id'\n"));
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("relayed/#", 0);
    let mut publisher = Wire::connect_v5(&gateway, "publisher");
    let twice = publish_with("relay/x", b"a", "id", "1").repeat(2);
    publisher.send(&twice);
    for _ in 0..2 {
        assert_eq!(publisher.next().kind(), PUBACK);
    }
    publisher.send(&publish_with("relay/x", b"b", "id", "2"));
    assert_eq!(publisher.next().kind(), PUBACK);
    assert_eq!(subscriber.next_message().payload(), b"a");
    assert_eq!(subscriber.next_message().payload(), b"b");
    assert_eq!(gateway.json(&["journal", "stat"])["next"], 2);
    gateway.assert_adds_up();
}

#[test]
fn an_event_that_nobody_wanted_is_no_reason_to_drop_the_next_one() {
    let rules = "[[rule]]\ntopics = ['relay/#']\ndedup = 'content'\ndurable = false\n";
    let gateway = home(rules).start();
    let mut publisher = Wire::connect(&gateway, "publisher");
    publisher.publish("relay/x", b"a");
    gateway.install(&built("relay"));
    publisher.publish("relay/x", b"a");
    gateway.until_app("relay", "it", |app| app["counters"]["handled"] == 1);
}

#[test]
fn what_a_paused_app_had_no_room_for_is_not_finished_and_comes_at_the_next_start() {
    let gateway =
        with_relay(home("[[rule]]\ntopics = ['relay/#']\n").set("apps.queue_events", 100));
    gateway.json(&["app", "pause", "relay"]);
    let mut publisher = Wire::connect(&gateway, "publisher");
    for number in 0..250 {
        publisher.publish("relay/x", number.to_string().as_bytes());
    }
    // What does not fit as a whole is dropped as a whole: which of them, depends on how they came.
    let dropped = |app: &Value| app["counters"]["dropped"]["queue_full"].as_u64().unwrap();
    let queued = |app: &Value| app["counters"]["queued"].as_u64().unwrap();
    let app = gateway.until_app("relay", "all of them", |app| {
        dropped(app) + queued(app) == 250
    });
    assert!(dropped(&app) >= 150);
    gateway.json(&["app", "resume", "relay"]);
    gateway.until_app("relay", "the first", |now| {
        now["counters"]["handled"] == app["counters"]["queued"]
    });
    let gateway = gateway.terminate().home.start();
    gateway.until_logged("delivered again");
    // Some that were handled just before may come again with them.
    gateway.until_app("relay", "the others", |now| {
        now["counters"]["handled"].as_u64() >= Some(dropped(&app))
    });
    gateway.assert_adds_up();
    let gateway = gateway.terminate().home.start();
    let journal = &gateway.status()["journal"];
    assert_eq!(journal["finished"], journal["next"]);
}

#[test]
fn a_sighup_with_wrong_rules_says_so_in_the_log() {
    let gateway = with_relay(home("[[rule]]\ntopics = ['relay/#']\nlane = 'batch'\n"));
    let file = gateway.home().path().join("rules.toml");
    fs::write(&file, "[[rule]]\ntopics = 7\n").unwrap();
    gateway.signal(libc::SIGHUP);
    gateway.until_logged("rules.toml:2");
}
