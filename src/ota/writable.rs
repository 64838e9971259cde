//! Makes the store writable for this process, where NixOS has mounted it read-only.

use std::path::Path;

use rustix::fs::StatVfsMountFlags;
use rustix::mount::{MountFlags, mount_remount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::agent::AgentError;

/// As Nix does it: in a mount namespace of its own, so that for everybody else the store stays read-only. Must be
/// called before other threads are started.
pub fn make_store_writable(root: &Path) -> Result<(), AgentError> {
    let store = root.join("nix/store");
    let failed = |doing| {
        let store = store.clone();
        move |error: rustix::io::Errno| AgentError::io(doing, &store, error.into())
    };
    // Whoever has no store finds out when it is needed.
    let Ok(about) = rustix::fs::statvfs(&store) else {
        return Ok(());
    };
    if !about.f_flag.contains(StatVfsMountFlags::RDONLY) || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    // SAFETY: a mount namespace changes no memory, and no descriptors.
    #[allow(unsafe_code)]
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(failed("make a mount namespace for"))?;
    mount_remount(&store, MountFlags::BIND, "").map_err(failed("make writable"))
}
