//! Builds apps: finds a compiler for `wasm32-unknown-unknown`, and wraps the core modules that it
//! makes as components.
//!
//! Shared by `headgate app build` and `cargo xtask apps`. Knows nothing of manifests.

#![forbid(unsafe_code)]

mod environment;
mod toolchain;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use wit_component::ComponentEncoder;

pub use environment::guest_cargo;
pub use toolchain::{Toolchain, active_has_target};

/// What apps are compiled for.
pub const TARGET: &str = "wasm32-unknown-unknown";

/// How the name of the section with the interface begins.
const INTERFACE: &[u8] = b"component-type";

/// Wraps the core module in the file `module` as a component. The interface is in a section of it that
/// the SDK's macros have written.
pub fn component(module: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(module).with_context(|| format!("cannot read {}", module.display()))?;
    // Without it there would be a component that exports nothing.
    ensure!(
        bytes.windows(INTERFACE.len()).any(|name| name == INTERFACE),
        "{} has no interface in it",
        module.display()
    );
    ComponentEncoder::default()
        .validate(true)
        .module(&bytes)
        .and_then(|encoder| encoder.encode())
        .with_context(|| format!("{} can't be made a component", module.display()))
}

/// Whole or not at all, since a running gateway may be reading it.
pub fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, content)
        .and_then(|()| fs::rename(&unfinished, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_without_an_interface_makes_no_component() {
        let path = std::env::temp_dir().join(format!("headgate-guest-{}", std::process::id()));
        fs::write(&path, b"\0asm\x01\0\0\0").unwrap();
        let error = component(&path).unwrap_err().to_string();
        fs::remove_file(&path).unwrap();
        assert!(error.ends_with("has no interface in it"), "{error}");
    }
}
