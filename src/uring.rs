//! Whether io_uring can be used here. tokio-uring panics where it is refused.

use io_uring::{IoUring, Probe};

/// Whether the kernel has these operations and lets us use them; else why not.
pub fn probe(operations: &[u8]) -> Result<(), String> {
    let ring = IoUring::new(2).map_err(|error| error.to_string())?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|error| error.to_string())?;
    match operations.iter().all(|code| probe.is_supported(*code)) {
        true => Ok(()),
        false => Err("the kernel is too old".to_owned()),
    }
}
