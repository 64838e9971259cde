//! Over-the-air updates: Nix closures from a signed binary cache, without Nix on the device.
//!
//! Nothing of the other rooms is used here.

pub mod cache;
pub mod store_dir;
