//! Mappings: upstream's stream processor, without its I/O. Messages of a Unified Namespace go in,
//! values that JavaScript expressions make of them come out.
//!
//! `docs/mappings.md` is for users, and says where it differs from upstream. [`Set`] is what a gateway
//! runs; [`Mapping`] is one file of it. Nothing here knows a clock, a store or a broker.

mod analysis;
mod config;
mod engine;
mod fast;
mod mapping;
mod payload;
mod set;
mod topic;
mod value;
mod yaml;

pub use analysis::MAX_EXPRESSION_BYTES;
pub use config::{Config, ConfigError, Late, OutputConfig, SourceConfig, Warning};
pub use engine::Failure;
pub use mapping::{
    Counters, Explanation, Input, LastEmission, Mapping, Metadata, OutputInfo, Sent, SourceState,
    Stored, Variable,
};
pub use payload::Refusal;
pub use set::Set;
pub use topic::{to_mqtt, to_umh};
pub use value::Value;
pub use yaml::Place;

#[cfg(test)]
mod tests;
