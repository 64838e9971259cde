//! How exposed the service is by the unit that the module renders, as systemd rates it.

use crate::tree::Tree;
use anyhow::{Context, Result, bail};
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
    let output = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--no-pager"])
        .arg(format!("--threshold={MOST_EXPOSED}"))
        .arg(tree.root.join(UNIT))
        .output()
        .context("cannot start systemd-analyze")?;
    if !output.status.success() {
        // An older systemd warns of keys that it does not know, so what it says else is kept back.
        bail!(
            "{}{UNIT}: the service is more exposed than {}.{}, see above; modules/service.nix sets by what",
            String::from_utf8_lossy(&output.stdout),
            MOST_EXPOSED / 10,
            MOST_EXPOSED % 10
        );
    }
    Ok(true)
}
