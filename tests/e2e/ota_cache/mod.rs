//! The client of binary caches, against caches that the real Nix makes.

mod failing;
mod fetching;
mod forge;
mod hostile;
mod server;
mod store;
mod ways;
