//! Mappings: upstream's stream processor. Messages of a Unified Namespace go in,
//! values that JavaScript expressions make of them come out.
//!
//! `docs/mappings.md` is for users, and says where it differs from upstream. [`Mapping`] is one file, [`Set`]
//! all of them; neither knows a clock, a store or a broker. [`Mappings`] runs a set in a gateway.

mod analysis;
mod config;
mod engine;
mod fast;
mod mapping;
mod metrics;
mod payload;
mod running;
mod set;
mod status;
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
pub use running::{MAX_CONFIG_BYTES, Mappings, MappingsConfig, SOURCE, check_name, stored_config};
pub use set::Set;
pub use status::{MappingError, MappingInfo, MappingsStatus, OutputStatus};
pub use topic::{to_mqtt, to_umh};
pub use value::Value;
pub use yaml::Place;

#[cfg(test)]
mod tests;
