//! The client of binary caches, against caches that the real Nix makes.

mod fetching;
mod nix;
