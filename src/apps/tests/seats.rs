//! An app whose place is its site's to say: it acts for what it is told to, as long as it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use super::house::*;
use crate::apps::AppState;
use crate::event::{Event, Place, Receipt};
use crate::site::{Changes, Entries, Placement, Seat, SharedState, Worker};

/// An event of a sitting.
#[derive(Debug)]
struct Ticket(Place, Arc<AtomicBool>);

impl Receipt for Ticket {
    fn abandon(&self) {
        self.1.store(true, Ordering::SeqCst);
    }

    fn place(&self) -> Option<Place> {
        Some(self.0)
    }
}

/// Events of one sitting, with numbers from `first` on; and whether one of them was given back.
fn events(sitting: u64, first: u64, payloads: &[&str]) -> (Vec<Event>, Arc<AtomicBool>) {
    let abandoned = Arc::new(AtomicBool::new(false));
    let mut batch = batch("a/in", payloads);
    for (event, number) in batch.iter_mut().zip(first..) {
        let place = Place {
            sitting,
            stream: 0,
            number,
        };
        event.receipt = Some(Arc::new(Ticket(place, abandoned.clone())));
    }
    (batch, abandoned)
}

fn house(placement: &str) -> House {
    let house = House::with(|config| {
        config.in_site = true;
        config.workers = 1;
    });
    let manifest = format!(
        "placement = {placement:?}\n{}",
        keeper_manifest("a", "batch_deadline_ms = 1000")
    );
    house.apps.install(&manifest, &keeper("")).unwrap();
    house
}

fn worker(house: &House) -> Arc<dyn Worker> {
    house.apps.placed().pop().expect("the app is placed")
}

fn sit(worker: &dyn Worker, seat: Seat, sitting: u64, n: Option<&str>) -> Arc<dyn SharedState> {
    let mut kept = Entries::new();
    if let Some(n) = n {
        kept.insert("default\0n".into(), n.as_bytes().into());
    }
    worker.sit(seat, sitting, kept, Arc::new(Notify::new()))
}

fn n(changes: &Changes) -> Option<&str> {
    let value = changes.entries.get("default\0n")?.as_ref()?;
    Some(std::str::from_utf8(value).unwrap())
}

fn numbers(changes: &Changes) -> Vec<u64> {
    let places = changes
        .receipts
        .iter()
        .filter_map(|receipt| receipt.place());
    places.map(|place| place.number).collect()
}

#[test]
fn a_singleton_stands_by_until_it_is_told_to_act_and_goes_on_from_what_it_is_given() {
    let house = house("singleton");
    let worker = worker(&house);
    assert_eq!(worker.placement(), Placement::Singleton);
    assert_eq!(house.info("a").state, AppState::Standby);
    assert!(
        house.offer("a/in", &["in"]).is_empty(),
        "nothing is routed to it"
    );
    let (lone, _) = events(1, 1, &["in"]);
    assert!(worker.offer(lone).is_err(), "it takes nothing");

    let state = sit(&*worker, Seat::Whole, 1, Some("41"));
    house.until_state("a", AppState::Running);
    worker.offer(events(1, 7, &["in", "gn"]).0).unwrap();
    house.until_done("a");
    assert_eq!(house.sink.lines(), ["a out ", "a out 42"]);
    let changes = state.take(false).expect("something has changed");
    assert_eq!((n(&changes), numbers(&changes)), (Some("42"), vec![7, 8]));
    assert!(!changes.replaces);
    state.written(changes, true);
    assert!(state.take(false).is_none());
    let all = state.take(true).expect("there is something");
    assert_eq!(
        (n(&all), all.replaces, numbers(&all)),
        (Some("42"), true, vec![])
    );
    state.written(all, true);

    worker.rise(1);
    house.until_state("a", AppState::Standby);
    assert!(worker.offer(events(1, 9, &["in"]).0).is_err());
    // What it has kept here was another gateway's to keep since then.
    let state = sit(&*worker, Seat::Whole, 2, Some("100"));
    house.until_state("a", AppState::Running);
    worker.offer(events(2, 1, &["in"]).0).unwrap();
    house.until_done("a");
    assert_eq!(n(&state.take(false).unwrap()), Some("101"));
}

#[test]
fn what_could_not_be_written_comes_again_unless_it_has_changed_since() {
    let house = house("singleton");
    let worker = worker(&house);
    let state = sit(&*worker, Seat::Whole, 1, None);
    house.until_state("a", AppState::Running);
    worker.offer(events(1, 1, &["in", "skfirst"]).0).unwrap();
    house.until_done("a");
    let changes = state.take(false).unwrap();
    worker.offer(events(1, 3, &["in"]).0).unwrap();
    house.until_done("a");
    assert!(state.take(false).is_none(), "one at a time");
    state.written(changes, false);
    let changes = state.take(false).unwrap();
    assert_eq!((n(&changes), changes.entries.len()), (Some("2"), 2));
    let mut numbers = numbers(&changes);
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2, 3]);
}

#[test]
fn shards_that_come_mixed_are_kept_apart() {
    let house = house("partition");
    let worker = worker(&house);
    house.until_state("a", AppState::Running);
    let states = [1, 2].map(|sitting| sit(&*worker, Seat::Shard(sitting as u16), sitting, None));
    house.apps.pause("a").unwrap();
    // They wait together, and are put together for one call.
    for (sitting, number) in [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2), (1, 4)] {
        worker.offer(events(sitting, number, &["in"]).0).unwrap();
    }
    house.apps.resume("a").unwrap();
    house.until_done("a");
    let [one, two] = states.map(|state| state.take(false).unwrap());
    assert_eq!((n(&one), numbers(&one)), (Some("4"), vec![1, 2, 3, 4]));
    assert_eq!((n(&two), numbers(&two)), (Some("2"), vec![1, 2]));
}

#[test]
fn what_waits_for_a_shard_that_has_moved_is_given_back() {
    let house = house("partition");
    let worker = worker(&house);
    house.until_state("a", AppState::Running);
    let stays = sit(&*worker, Seat::Shard(1), 1, None);
    let moves = sit(&*worker, Seat::Shard(2), 2, None);
    house.apps.pause("a").unwrap();
    let (kept, given_back) = (events(1, 1, &["in"]), events(2, 1, &["in"]));
    worker.offer(kept.0).unwrap();
    worker.offer(given_back.0).unwrap();
    worker.rise(2);
    // The shard comes back: that is another sitting.
    let back = sit(&*worker, Seat::Shard(2), 3, None);
    house.apps.resume("a").unwrap();
    house.until_done("a");
    assert_eq!(n(&stays.take(false).unwrap()), Some("1"));
    assert!(moves.take(false).is_none() && back.take(false).is_none());
    assert!(given_back.1.load(Ordering::SeqCst) && !kept.1.load(Ordering::SeqCst));
}

#[test]
fn stopping_a_singleton_gives_back_what_waits_and_starting_it_goes_on() {
    let house = house("singleton");
    let worker = worker(&house);
    let _state = sit(&*worker, Seat::Whole, 1, None);
    house.until_state("a", AppState::Running);
    house.apps.pause("a").unwrap();
    let (waiting, given_back) = events(1, 1, &["in"]);
    worker.offer(waiting).unwrap();
    // Nothing can be finished by one that failed too often, as by one that is stopped at once.
    worker.rise(1);
    assert!(given_back.load(Ordering::SeqCst));
    // It is paused still when it acts again.
    let _state = sit(&*worker, Seat::Whole, 2, None);
    house.until_state("a", AppState::Paused);
    house.apps.stop("a").unwrap();
    assert!(!worker.is_wanted());
    house.apps.start("a").unwrap();
    house.until_state("a", AppState::Running);
    assert!(worker.is_wanted());
}

#[test]
fn without_a_site_an_app_runs_wherever_it_is_installed() {
    let house = House::new();
    let manifest = format!("placement = \"singleton\"\n{}", keeper_manifest("a", ""));
    house.apps.install(&manifest, &keeper("")).unwrap();
    assert!(house.apps.placed().is_empty());
    assert_eq!(house.ask("a", &["in", "gn"]), ["", "1"]);
}
