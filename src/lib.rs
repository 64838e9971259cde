//! Headgate: an edge gateway. MQTT in, WASM apps in batches, MQTT out.
//!
//! `docs/architecture.md` has the map; each module says what it owns.
#![deny(unsafe_code)]

pub mod admin;
pub mod apps;
pub mod broker;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod dead_letters;
mod descriptors;
pub mod event;
pub mod gateway;
pub mod http;
pub mod ingest;
pub mod journal;
pub mod logging;
pub mod mappings;
pub mod metrics;
pub mod ota;
pub mod pipeline;
mod regular_file;
pub mod remote;
#[cfg(test)]
mod simulation;
pub mod site;
pub mod store;
pub mod systemd;
pub mod uplink;
mod uring;
pub mod why;
