//! Over-the-air updates: systems come as Nix closures, boot on probation and stay if they are healthy.

pub mod boot;
