//! Real NATS servers, each test's its own, and a way to them that can be cut. The benchmarks use it too.

mod client;
mod link;
mod servers;

use std::time::{Duration, Instant};

pub use client::{Client, Stored};
pub use link::Link;
pub use servers::{Program, Servers};

/// Longer than anything here takes on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

/// Asks again until there is an answer.
fn eventually<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(why) => assert!(Instant::now() < deadline, "{what}: never came: {why}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
