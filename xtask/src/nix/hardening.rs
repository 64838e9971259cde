//! How exposed the service is by the unit that the module renders, as systemd rates it.

use crate::child;
use crate::tree::Tree;
use anyhow::{Context, Result};
use std::process::{Command, Stdio};

/// Ten times the rating: 0 is best, 100 worst.
const MOST_EXPOSED: u32 = 15;

const UNIT: &str = "tests/vm/fixture/headgate.service";

/// False if there is no systemd to ask; it need not run.
pub fn check(tree: &Tree) -> Result<bool> {
    let mut version = Command::new("systemd-analyze");
    version
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if !version.status().is_ok_and(|status| status.success()) {
        return Ok(false);
    }
    child::run(
        Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager"])
            .arg(format!("--threshold={MOST_EXPOSED}"))
            .arg(tree.root.join(UNIT))
            .stdout(Stdio::null()),
    )
    .with_context(|| {
        format!(
            "the service is more exposed than {}.{}; `systemd-analyze security --offline=true {UNIT}` says \
             by what, and modules/service.nix is where that is set",
            MOST_EXPOSED / 10,
            MOST_EXPOSED % 10
        )
    })?;
    Ok(true)
}
