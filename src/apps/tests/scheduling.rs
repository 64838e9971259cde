//! Queues, order, fairness, and the books.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::house::*;
use crate::apps::AppState;
use crate::pipeline::Offer;

#[test]
fn events_come_out_in_the_order_they_went_in() {
    let house = House::new();
    house.install("a");
    let mut sent = Vec::new();
    while sent.len() < 5000 {
        let numbers: Vec<_> = (0..1 + sent.len() % 7)
            .map(|i| format!("{}", sent.len() + i))
            .collect();
        let payloads: Vec<_> = numbers.iter().map(|number| &**number).collect();
        while let [Offer::Full(_)] = house.offer("a/in", &payloads)[..] {
            thread::yield_now();
        }
        sent.extend(numbers);
    }
    house.until_done("a");
    let came: Vec<_> = house.sink.lines();
    let expected: Vec<_> = sent
        .iter()
        .map(|number| format!("a a/in {number}"))
        .collect();
    assert_eq!(came, expected);
}

#[test]
fn an_app_with_a_long_queue_does_not_starve_the_others() {
    let house = House::with(|config| config.workers = 1);
    house.install("busy");
    let other = house.install("other");
    {
        let _workers_wait = house.sink.gate.lock();
        for _ in 0..50 {
            house.send("busy/in", &["x", "x"]);
        }
        house.send("other/in", &["y"]);
        // By now it has had more of the worker's time than the other one, for its start.
        thread::sleep(10 * Duration::from_secs_f64(other.cold_start_seconds.unwrap()));
    }
    house.until_done("busy");
    house.until_done("other");
    let lines = house.sink.lines();
    let position = lines
        .iter()
        .position(|line| line == "other other/in y")
        .unwrap();
    // One event is on its way, one call of 64 may come before the other app's turn.
    assert!(position <= 2 + 64, "came as number {position}");
}

#[test]
fn waiting_batches_are_put_together() {
    let house = House::new();
    house.install("a");
    {
        let _workers_wait = house.sink.gate.lock();
        house.send("a/in", &["first"]);
        house.eventually("a", "the first call", |info| info.counters.queued == 1);
        for _ in 0..64 {
            house.send("a/in", &["x"]);
        }
    }
    let info = house.until_done("a");
    assert_eq!(info.counters.handled, 65);
    assert!(
        info.counters.batches <= 3,
        "{} calls",
        info.counters.batches
    );
}

#[test]
fn a_full_queue_gives_the_batch_back_and_tells_of_room() {
    let house = House::new();
    house.install("a");
    let told = {
        let _workers_wait = house.sink.gate.lock();
        let refused = (0..100).find_map(|_| match &house.offer("a/in", &["x"; 10])[..] {
            [Offer::Taken] => None,
            [Offer::Full(batch)] => Some(batch.len()),
            other => panic!("{other:?}"),
        });
        assert_eq!(refused, Some(10));
        let info = house.info("a");
        assert_eq!(info.counters.dropped.total(), 0);
        assert!(info.counters.queued >= 100, "the queue was full");
        house.progress.load(Ordering::SeqCst)
    };
    let info = house.until_done("a");
    assert!(house.progress.load(Ordering::SeqCst) > told);
    assert_eq!(info.counters.handled, info.counters.offered);
    let table = house.routes.load();
    assert!(table.outlets[0].is_idle());
}

#[test]
fn a_batch_that_is_longer_than_the_queue_is_taken_when_the_queue_is_empty() {
    let house = House::new();
    house.install("a");
    house.send("a/in", &["x"; 500]);
    assert_eq!(house.until_done("a").counters.handled, 500);
}

#[test]
fn large_events_come_in_smaller_batches_and_too_large_ones_not_at_all() {
    let house = House::new();
    house.install("a");
    // The app has 4 MiB: 512 KiB a call, 1 MiB an event; the guest's own memory is 512 KiB.
    let (small, large) = ("s".repeat(100_000), "l".repeat((1 << 20) + 1));
    house.send(
        "a/in",
        &[&small, &small, &large, &small, &small, &small, &small],
    );
    let info = house.until_done("a");
    let counters = &info.counters;
    assert_eq!((counters.offered, counters.dropped.too_large), (7, 1));
    assert_eq!(
        (counters.handled, counters.failed),
        (6, 0),
        "{:?}",
        info.last_error
    );
    assert_eq!(counters.batches, 2);
    house.send("a/in", &[&large]);
    assert_eq!(house.until_done("a").counters.dropped.too_large, 2);
}

#[test]
fn an_app_in_a_long_call_loses_what_does_not_fit_instead_of_blocking_the_pipeline() {
    let house = House::new();
    let slow = manifest("a").replace("deadline_ms = 20", "deadline_ms = 60000");
    house.apps.install(&slow, &guest("")).unwrap();
    house.send("a/in", &["L"]);
    let mut held_back = false;
    let info = house.eventually("a", "a dropped event", |info| {
        let told = house.progress.load(Ordering::SeqCst);
        if let [Offer::Full(_)] = house.offer("a/in", &["x"; 50])[..] {
            // What was held back is asked for again.
            house.eventually("a", "progress", |_| {
                house.progress.load(Ordering::SeqCst) > told
            });
        }
        info.counters.dropped.stalled > 0
    });
    held_back |= info.counters.queued > 100;
    assert!(held_back && info.state == AppState::Running);
    assert_eq!(house.apps.stop("a").unwrap().state, AppState::Stopped);
}

#[test]
fn an_app_that_backs_off_queues_up_to_its_bound_and_drops_the_rest() {
    let house = House::with(|config| config.restart.first_pause = Duration::from_millis(300));
    house.install("a");
    house.open_breaker("a");
    for _ in 0..30 {
        house.send("a/in", &["x"; 10]);
    }
    let info = house.until_done("a");
    // It may have come back early on a slow machine, and then it has taken more.
    assert!(info.counters.handled >= 100, "{:?}", info.counters);
    assert_eq!(
        info.counters.handled + info.counters.dropped.queue_full,
        300
    );
    assert!(!house.routes.load().outlets.is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Offer(Vec<&'static str>),
    Stop,
    Start,
    Restart,
    Upgrade,
}

fn step() -> impl Strategy<Value = Step> {
    let payload = prop_oneof![
        20 => Just("x"), 1 => Just("U"), 1 => Just("E"), 1 => Just("D"), 1 => Just("G")
    ];
    prop_oneof![
        12 => prop::collection::vec(payload, 0..40).prop_map(Step::Offer),
        1 => Just(Step::Stop),
        1 => Just(Step::Start),
        1 => Just(Step::Restart),
        1 => Just(Step::Upgrade),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Whatever happens to an app, the books balance at every moment, and nothing is queued at the
    /// end.
    #[test]
    fn every_event_is_accounted_for(steps in prop::collection::vec(step(), 1..60)) {
        let house = House::new();
        house.install("a");
        let component = guest("");
        // Kept from the beginning: the pipeline, too, may still offer to an app that was stopped.
        let outlet = house.routes.load().outlets[0].clone();
        let mut offered = 0;
        for step in steps {
            match step {
                Step::Offer(payloads) => {
                    if let Offer::Taken = outlet.offer(batch("a/in", &payloads)) {
                        offered += payloads.len() as u64;
                    }
                }
                Step::Stop => drop(house.apps.stop("a").unwrap()),
                Step::Start => drop(house.apps.start("a").unwrap()),
                Step::Restart => drop(house.apps.restart("a").unwrap()),
                Step::Upgrade => drop(house.apps.install(&manifest("a"), &component).unwrap()),
            }
            prop_assert_eq!(house.info("a").counters.offered, offered);
        }
        house.apps.stop("a").unwrap();
        let counters = house.info("a").counters;
        prop_assert_eq!(counters.queued, 0);
        prop_assert_eq!(counters.offered, offered);
        prop_assert_eq!(counters.published, house.sink.len() as u64);
    }
}
