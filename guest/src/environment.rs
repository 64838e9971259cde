//! What a cargo that builds guests must not inherit.

use std::env;
use std::ffi::OsStr;
use std::process::Command;

const PREFIXES: [&str; 5] = [
    "CARGO_PKG_",
    "CARGO_MANIFEST_",
    "CARGO_PROFILE_",
    "CARGO_TARGET_",
    "CARGO_UNSTABLE_",
];

const NAMES: [&str; 8] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_BUILD_RUSTC",
    "RUSTC",
    "RUSTC_BOOTSTRAP",
];

/// A cargo that builds guests: what the environment says about how programs are to be compiled
/// (flags, target, profile, another compiler) is not for them.
pub fn guest_cargo(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in env::vars_os() {
        let is_removed = |name: &str| {
            NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        };
        if name.to_str().is_some_and(is_removed) {
            command.env_remove(name);
        }
    }
    command
}
