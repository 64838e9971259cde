//! What the test asks the guest.

use crate::vm::http;
use crate::vm::machine::{Machine, SOON};
use anyhow::{Result, bail, ensure};
use std::time::Duration;

/// Where each generation has its service.
pub const HEADGATE: &str = "/run/current-system/sw/bin/headgate";

/// For firmware, kernel and systemd to come up, where others compute, too.
const BOOT: Duration = Duration::from_secs(400);

/// The unit does it, with as few rights as it has. What it says is shown if it fails.
pub const UPDATE_COMMAND: &str = "systemctl start headgate-ota.service || \
     { journalctl --no-pager -b -o cat -u headgate-ota.service; false; }";

/// For an update under emulation.
pub const UPDATE: Duration = Duration::from_secs(400);

/// What became of a boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot {
    /// The gateway is ready.
    Ready,
    /// The machine has asked for a reset, or has switched itself off.
    Ended,
    /// Nothing happened any more.
    Hangs,
}

/// How a boot goes, if it is looked at for as long as `patience`.
pub fn watch(machine: &mut Machine, patience: Duration) -> Result<Boot> {
    loop {
        if machine.has_ended()? {
            return Ok(Boot::Ended);
        }
        if http::get(machine.metrics, "/readyz").is_ok_and(|(status, _)| status == 200) {
            return Ok(Boot::Ready);
        }
        if machine.started.elapsed() >= patience {
            return Ok(Boot::Hangs);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits until the gateway is ready, and says which version that is.
pub fn until_ready(machine: &mut Machine) -> Result<String> {
    match watch(machine, BOOT)? {
        Boot::Ready => version(machine),
        other => bail!("the gateway did not get ready: {other:?}"),
    }
}

pub fn version(machine: &mut Machine) -> Result<String> {
    let version = machine.run("cat /run/booted-system/version")?;
    Ok(version.trim().to_owned())
}

/// The files of the boot entries.
pub fn entries(machine: &mut Machine) -> Result<Vec<String>> {
    let entries = machine.run("ls /boot/loader/entries")?;
    Ok(entries.split_whitespace().map(str::to_owned).collect())
}

/// Waits until what follows a boot by itself is over: nothing holds the lock of updates then.
pub fn until_settled(machine: &mut Machine) -> Result<()> {
    machine.until("what follows the boot", SOON, |machine| {
        let unit = machine.output("systemctl is-active headgate-ota-commit.service")?;
        let state = unit.text.trim();
        ensure!(
            state != "failed",
            "headgate-ota-commit.service has failed: {}",
            machine.run("systemctl status --no-pager headgate-ota-commit.service; true")?
        );
        Ok((state == "active").then_some(()))
    })
}

/// Fetches and installs what the channel offers.
pub fn update(machine: &mut Machine) -> Result<String> {
    until_settled(machine)?;
    machine.run_for(UPDATE_COMMAND, UPDATE)
}

/// Waits until the booted generation is the one for good: its entry counts no tries any more, and the agent has
/// taken note of that.
pub fn until_committed(machine: &mut Machine, generation: u64) -> Result<()> {
    until_settled(machine)?;
    let wanted = format!("headgate-{generation}.conf");
    let entries = entries(machine)?;
    ensure!(
        entries.contains(&wanted),
        "there is no {wanted}, but {entries:?}"
    );
    Ok(())
}
