//! Headgate: an edge gateway. MQTT in, WASM apps in batches, MQTT out.
//!
//! `docs/architecture.md` has the map; each module says what it owns.
#![deny(unsafe_code)]

pub mod apps;
pub mod event;
pub mod pipeline;
pub mod store;
