//! More than somebody takes: consumers that stand still, and each lane with ten times what its app can handle.

use std::collections::HashSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use headgate::ingest::frame::Priority;
use serde_json::Value;

use crate::apps::{Package, built, guest_with, manifest};
use crate::gateway::{Gateway, Home, eventually};
use crate::ingest::{Producer, frame};
use crate::mosquitto;
use crate::wire::{Wire, publish_packet};

fn home(rules: &str) -> Home {
    let home = Home::new().set("pipeline.rules_file", "rules.toml");
    fs::write(home.path().join("rules.toml"), rules).unwrap();
    home
}

fn count(value: &Value, path: &str) -> u64 {
    value.pointer(path).unwrap().as_u64().unwrap()
}

/// Bytes of memory that the gateway has in use.
pub fn resident(gateway: &Gateway) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", gateway.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kibibytes.parse::<u64>().unwrap() * 1024
}

/// What a publisher and a subscriber beside the one that stands still have seen.
struct Others {
    sent: u64,
    /// From an event to its acknowledgement, and to what the app has made of it, each in ascending order.
    acknowledged: Vec<Duration>,
    relayed: Vec<Duration>,
    most_memory: u64,
}

fn slowest(times: &[Duration], of_a_thousand: usize) -> Duration {
    times[(times.len() - 1) * of_a_thousand / 1000]
}

/// Publishes 400 events a second for `time`, and takes what the app makes of them.
fn publish_steadily(gateway: &Gateway, time: Duration) -> Others {
    const EVERY: Duration = Duration::from_micros(2500);
    let mut subscriber = Wire::connect(gateway, "healthy");
    subscriber.subscribe("relayed/#", 0);
    let mut publisher = Wire::connect(gateway, "publisher");
    let began = Instant::now();
    let all = time.as_micros() / EVERY.as_micros();
    let (mut sent, mut acknowledged) = (Vec::new(), Vec::new());
    let mut most_memory = 0;
    let relayed = thread::spawn(move || {
        let take = |number| {
            let message = subscriber.next_message();
            assert!(
                message
                    .payload()
                    .starts_with(format!("{number:08}").as_bytes())
            );
            Instant::now()
        };
        (0..all).map(take).collect::<Vec<_>>()
    });
    for number in 0..all as u32 {
        // A rate, whatever the last one took.
        thread::sleep((began + EVERY * number).saturating_duration_since(Instant::now()));
        sent.push(Instant::now());
        let mut payload = format!("{number:08}").into_bytes();
        payload.resize(2_000, b'x');
        publisher.publish("relay/x", &payload);
        acknowledged.push(sent.last().unwrap().elapsed());
        if number % 400 == 0 {
            most_memory = most_memory.max(resident(gateway));
        }
    }
    let relayed = relayed.join().unwrap().into_iter().zip(&sent);
    let mut relayed: Vec<_> = relayed.map(|(came, sent)| came - *sent).collect();
    relayed.sort();
    acknowledged.sort();
    Others {
        sent: all as u64,
        acknowledged,
        relayed,
        most_memory,
    }
}

impl Others {
    /// Publishers wait for a subscriber that stands still once for half a second, and then no more.
    fn had_no_trouble(&self, stalled: u32) {
        for times in [&self.acknowledged, &self.relayed] {
            let (most, p99) = (slowest(times, 1000), slowest(times, 990));
            println!("of {} events p99 {p99:?}, slowest {most:?}", times.len());
            assert!(p99 < Duration::from_millis(500) * stalled, "{p99:?}");
            assert!(most < Duration::from_millis(1500) * stalled, "{most:?}");
        }
        println!("{} MiB at the most", self.most_memory >> 20);
        assert!(self.most_memory < 200 << 20, "{}", self.most_memory);
    }
}

const A_MINUTE: Duration = Duration::from_secs(60);

#[test]
fn consumers_that_stand_still_for_a_minute_disturb_nobody_and_what_they_miss_is_counted() {
    // They are to stay connected, so that each message is either received or dropped.
    let gateway = home("[[rule]]\ntopics = ['relay/#']\n")
        .set("mqtt.write_timeout_ms", 600_000)
        .start();
    gateway.install(&built("relay"));
    let consumers = ["0", "1"].map(|qos| {
        let args = ["-t", "relay/#", "-q", qos, "-k", "600", "-F", "%p"];
        mosquitto::subscribe(&gateway, &args)
    });
    consumers.iter().for_each(|one| one.signal(libc::SIGSTOP));
    let others = publish_steadily(&gateway, A_MINUTE);
    others.had_no_trouble(2);
    consumers.iter().for_each(|one| one.signal(libc::SIGCONT));
    let dropped = || count(&gateway.status(), "/broker/messages_dropped");
    let mut received = [0, 0];
    eventually("what was not dropped", || {
        for (consumer, received) in consumers.iter().zip(&mut received) {
            *received += consumer.lines_so_far().len() as u64;
        }
        (received.iter().sum::<u64>() + dropped() == 2 * others.sent).then_some(())
    });
    println!(
        "sent {} to each; received {received:?}; dropped {}",
        others.sent,
        dropped()
    );
    assert!(
        dropped() > 0,
        "there was room for all of it: too little was sent"
    );
    gateway.assert_adds_up();
}

#[test]
fn a_consumer_whose_session_is_kept_stands_still_for_a_minute_and_misses_nothing() {
    let gateway = home("[[rule]]\ntopics = ['relay/#']\n").start();
    gateway.install(&built("relay"));
    let args = ["-t", "relay/#", "-q", "1", "-c", "-i", "kept", "-F", "%p"];
    let consumer = mosquitto::subscribe(&gateway, &args);
    consumer.signal(libc::SIGSTOP);
    let others = publish_steadily(&gateway, A_MINUTE);
    others.had_no_trouble(1);
    // It took no byte for mqtt.write_timeout_ms, so it was disconnected, and comes back.
    consumer.signal(libc::SIGCONT);
    let (mut lines, mut received) = (HashSet::new(), 0);
    eventually("all of them", || {
        for line in consumer.lines_so_far() {
            received += 1;
            lines.insert(line[..8].to_owned());
        }
        (lines.len() as u64 == others.sent).then_some(())
    });
    println!("sent {}, received {received}", others.sent);
    assert_eq!(count(&gateway.status(), "/broker/messages_dropped"), 0);
    gateway.assert_adds_up();
}

/// An app that computes for some milliseconds in each call, and publishes nothing. It takes `slow/#`.
fn slow_app() -> Package {
    let manifest = manifest("slow")
        .replace("[\"slow/in\"]", "[\"slow/#\"]")
        .replace("batch_deadline_ms = 20", "batch_deadline_ms = 10000");
    let handle = ";; U: unreachable";
    let compute = "(loop $compute
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $compute (i32.lt_u (local.get $i) (i32.const 4000000))))
      (return (call $return (i32.const 0) (i32.const 0)))";
    Package::new(
        &manifest,
        guest_with(handle, &format!("{compute}\n    {handle}")),
    )
}

/// Sends so many events on a topic, ten times `capacity` a second, unless it has to wait; until all of them are
/// taken in. How long that took.
fn offer(wire: &mut Wire, topic: &str, events: u64, capacity: u64) -> Duration {
    let began = Instant::now();
    let packet = publish_packet(topic, &[b'x'; 1000], 0, 0);
    let at_once = (capacity / 10).max(1);
    for (number, sent) in (0..events).step_by(at_once as usize).enumerate() {
        let due = began + Duration::from_millis(10) * number as u32;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        wire.send(&packet.repeat(at_once.min(events - sent) as usize));
    }
    wire.publish("unrelated", b"");
    began.elapsed()
}

#[test]
fn ten_times_what_an_app_can_take_is_accounted_for_on_each_lane() {
    let gateway = home(
        "[[rule]]\ntopics = ['slow/now']\nlane = 'realtime'\n\
         [[rule]]\ntopics = ['slow/bulk']\nlane = 'batch'\nwindow_events = 8\nwindow_age_ms = 10\n\
         [[rule]]\ntopics = ['slow/all']\ndurable = false\n",
    )
    .set("pipeline.batch.max_events", 4)
    .set("pipeline.realtime.queue_events", 200)
    .set("pipeline.windows.queue_events", 200)
    .set("pipeline.queue_events", 200)
    .set("apps.queue_events", 200)
    .start();
    gateway.install(slow_app().path());
    let mut wire = Wire::connect(&gateway, "flood");
    let handled = || count(&gateway.app("slow"), "/counters/handled");
    let until_idle = || {
        gateway.assert_adds_up();
        gateway.until_app("slow", "the end", |app| app["counters"]["queued"] == 0);
    };
    let began = Instant::now();
    offer(&mut wire, "slow/all", 400, 1_000);
    until_idle();
    let capacity = (400.0 / began.elapsed().as_secs_f64()) as u64;
    for (lane, topic, seconds) in [
        ("realtime", "slow/now", 2.0),
        ("batch", "slow/bulk", 2.0),
        ("transactional", "slow/all", 0.4),
    ] {
        let before = handled();
        let app_dropped = || count(&gateway.app("slow"), "/counters/dropped/queue_full");
        let dropped_before = app_dropped();
        let of = |what: &str| count(&gateway.status(), &format!("/pipeline/lanes/{lane}/{what}"));
        let (accepted, unrelated) = (of("accepted"), of("filtered"));
        let events = (10.0 * capacity as f64 * seconds) as u64;
        let took = offer(&mut wire, topic, events, capacity);
        until_idle();
        let (handled, by_app) = (handled() - before, app_dropped() - dropped_before);
        let (overflowed, shed) = (of("overflowed"), of("shed"));
        let dropped = by_app + overflowed + shed;
        println!(
            "{lane}: {capacity}/s can be handled; offered {events} within {took:?}; handled {handled}, dropped \
             {by_app} by the app, {overflowed} by the lane, {shed} under pressure"
        );
        let filtered = of("filtered") - unrelated;
        assert_eq!(of("accepted") - accepted - filtered, events);
        assert_eq!(handled + dropped, events);
        match lane {
            "transactional" => {
                assert_eq!(dropped, 0);
                let needed = Duration::from_secs_f64(events as f64 / capacity as f64);
                assert!(took > needed / 4, "who sends was not slowed down");
            }
            _ => assert!(dropped > events / 2 && handled > 0),
        }
    }
}

#[test]
fn under_pressure_high_frames_take_the_transactional_lane_and_critical_ones_do_not() {
    let gateway = home("[[rule]]\ntopics = ['relay/now']\nlane = 'realtime'\n")
        .set("ingest.listen", "127.0.0.1:0")
        .set("pipeline.realtime.max_latency_ms", 1)
        .start();
    gateway.install(&built("relay"));
    let pressure = || gateway.status()["pipeline"]["pressure"].clone();
    let accepted = |lane: &str| {
        count(
            &gateway.status(),
            &format!("/pipeline/lanes/{lane}/accepted"),
        )
    };
    let mut producer = Producer::greet(&gateway, "press");
    let mut last = 0;
    // By how much the counters of both lanes rise with ten frames.
    let mut send = |priority| {
        let before = ["realtime", "transactional"].map(accepted);
        for id in last + 1..=last + 10 {
            producer.send(&frame(priority, id, "elsewhere", "x"));
        }
        last += 10;
        producer.until_acknowledged(last);
        let after = ["realtime", "transactional"].map(accepted);
        (after[0] - before[0], after[1] - before[1])
    };
    assert_eq!(send(Priority::High), (10, 0), "healthy");

    // Bursts, so that events wait longer than that, and the app has time left all the same.
    let mut wire = Wire::connect(&gateway, "alarms");
    let burst = publish_packet("relay/now", &[b'x'; 100], 0, 0).repeat(3_000);
    let mut seen = Vec::new();
    let began = Instant::now();
    while seen.len() < 2 {
        assert!(
            began.elapsed() < crate::gateway::PATIENCE,
            "no pressure: {}",
            gateway.status()["pipeline"]
        );
        wire.send(&burst);
        wire.publish("unrelated", b"");
        thread::sleep(Duration::from_millis(20));
        if pressure() == "healthy" {
            continue;
        }
        // The next look is a tenth of a second away, or it takes five of them to get better.
        for (priority, lane) in [(Priority::High, 1), (Priority::Critical, 0)] {
            let (realtime, transactional) = send(priority);
            seen.push((priority, [realtime, transactional][lane]));
        }
        if pressure() == "healthy" {
            seen.clear();
        }
    }
    assert_eq!(seen, [(Priority::High, 10), (Priority::Critical, 10)]);
    eventually("recovery", || (pressure() == "healthy").then_some(()));
    assert_eq!(send(Priority::High), (10, 0), "healthy again");
    gateway.assert_adds_up();
}
