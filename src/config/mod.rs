//! The configuration: from defaults, a TOML file, `HEADGATE_*` variables and flags to one typed tree.
//!
//! [`tree`] declares every key once; all else here works from that declaration. Nothing in this room
//! knows how a value is used, and nothing reads the process's environment except
//! [`Source::of_process`].

mod file;
mod key;
mod origin;
mod problem;
mod resolve;
mod schema;
mod section;
mod suggest;
mod tree;
mod value;

#[cfg(test)]
mod tests;

pub use key::Key;
pub use origin::{Origin, Position};
pub use problem::{ConfigErrors, Fault, Problem};
pub use resolve::{Override, Resolved, SYSTEM_FILE, Setting, Source};
pub use schema::{json_schema, markdown};
pub(crate) use suggest::nearest;
pub use tree::{
    AdminConfig, AppsConfig, AuthConfig, BatchConfig, Config, HealthConfig, IngestConfig,
    LogConfig, MappingsConfig, MetricsConfig, MqttConfig, OtaConfig, PipelineConfig,
    ShutdownConfig, StoreConfig, TlsConfig, UplinkConfig, WebSocketConfig, keys,
};
pub use value::{
    AddressError, Anonymous, AppNames, ClientCertificates, ListenAddress, LogFormat, RebootWhen,
    SizeError, Value,
};
