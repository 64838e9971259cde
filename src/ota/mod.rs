//! Over-the-air updates: the whole system as one unit, from a signed Nix binary cache, on probation until it is
//! healthy.
//!
//! What is to be done next follows from what is on disk ([`update`]), so that an update goes on after whatever has
//! interrupted it. Trusts nothing that comes over the network but signatures by the keys that the
//! configuration names, or that a release has added which such a key has signed.

pub mod agent;
pub mod boot;
pub mod cache;
pub mod health;
pub mod keys;
mod machine;
pub mod metrics;
pub mod release;
pub mod state;
pub mod status;
pub mod store_dir;
pub mod update;
mod version;
pub mod window;
mod writable;

pub use machine::booted_system;
pub use state::State;
pub use writable::make_store_writable;
