//! Headgate's own load generator and what its benchmarks share.
//!
//! The generator runs on the same cores as what it measures, so it must cost next to nothing: frames
//! are encoded once and patched in place, sockets are read in large pieces, and of what comes back
//! only lengths, sequence numbers and times are looked at.
#![deny(unsafe_code)]

pub mod allocations;
mod contest;
mod crowd;
mod durable;
mod guest;
mod hosting;
mod ingest;
mod lanes;
pub mod load;
mod mappings;
// The tests start their servers with it.
mod fleet;
#[path = "../../tests/e2e/nats/mod.rs"]
pub mod nats;
pub mod ota;
pub mod process;
pub mod reading;
pub mod report;
pub mod server;
pub mod sink;
mod site;
pub mod statistics;
pub mod stream;
pub mod suite;
mod uplink;
pub mod wire;
