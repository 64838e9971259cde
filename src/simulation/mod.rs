//! Gateways of a site, the network between them and the servers, all of it in one thread and in a time of
//! its own, with faults drawn from a seed. The gateways run the same logic as real ones: [`Seat`] with
//! leases, members and shards, and the uplink's [`Window`]; the servers are models.
//!
//! Checked all the time: at most one acts for the leadership and for each shard, and tokens grow. In the
//! end, when the faults are over: each shard and the leadership are somebody's within a bound, and
//! downstream has all that was journaled, nothing twice, an exclusive stream in its order.
//!
//! `HEADGATE_SIMULATION_SEED=7 cargo test --release simulation` runs one schedule again, and
//! `HEADGATE_SIMULATION_RUNS=100000` more of them.
//!
//! [`Seat`]: crate::cluster::seat::Seat
//! [`Window`]: crate::uplink::window::Window

mod bucket;
mod gateway;
mod network;
mod shipper;
mod stream;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use world::World;

const RUNS: u64 = 2000;

/// What a gateway does wrong, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    /// Acts on what it read of its rights, without a look at the clock.
    ActsOnOldNews,
    /// Its clock runs half again as fast as those of others.
    FastClock,
    /// A bucket that is made anew begins at 1, whatever it had before.
    LowRevisions,
    /// Moves the cursor to the highest acknowledgement.
    HighestCursor,
    /// Sends what was not acknowledged again as something new.
    NewIdentities,
}

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number")),
    )
}

/// Runs schedules until one fails, which it tells, or all have gone well.
fn run(bug: Bug) {
    if let Some(seed) = setting("HEADGATE_SIMULATION_SEED") {
        World::new(seed, bug).run();
        return;
    }
    let runs = setting("HEADGATE_SIMULATION_RUNS").unwrap_or(RUNS);
    let next = AtomicU64::new(0);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= runs {
                return;
            }
            let run = AssertUnwindSafe(|| World::new(seed, bug).run());
            if let Err(failure) = catch_unwind(run) {
                next.store(runs, Ordering::Relaxed);
                eprintln!("the schedule fails with HEADGATE_SIMULATION_SEED={seed}");
                resume_unwind(failure);
            }
        }
    };
    thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            if let Err(failure) = thread.join() {
                resume_unwind(failure);
            }
        }
    });
}

#[test]
fn whatever_fails_at_most_one_acts_and_nothing_is_lost_or_doubled() {
    run(Bug::None);
}

#[test]
#[should_panic(expected = "two act for")]
fn a_gateway_that_does_not_look_at_the_clock_is_found() {
    run(Bug::ActsOnOldNews);
}

#[test]
#[should_panic(expected = "two act for")]
fn a_clock_that_runs_too_fast_is_found() {
    run(Bug::FastClock);
}

#[test]
#[should_panic(expected = "is no higher than")]
fn tokens_that_go_back_are_found() {
    run(Bug::LowRevisions);
}

#[test]
#[should_panic(expected = "lost")]
fn a_cursor_that_skips_what_was_not_acknowledged_is_found() {
    run(Bug::HighestCursor);
}

#[test]
#[should_panic(expected = "twice")]
fn messages_without_lasting_identities_are_found() {
    run(Bug::NewIdentities);
}
