//! The machine with 4 KiB pages, Debian's systemd, and the unit as NixOS would have it.

use super::analyze::{self, Boot};
use super::devices;
use super::fixture::Fixture;
use super::gateway::{self, UNIT_CONVERT};
use super::machine::{Machine, Parts, SOON};
use super::mqtt::Load;
use super::power_cut::{self, Seeds};
use super::stage;
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::Duration;

/// `WatchdogSec=` of the unit, a restart, and what the emulation takes.
const WATCHDOG: Duration = Duration::from_secs(120);

/// Of `systemd-analyze security`; as low as a service gets that maps code executable.
pub const EXPOSURE: f64 = 1.5;

/// Where the service must not be able to write, and where it must.
const FOREIGN: [&str; 6] = ["/etc", "/usr", "/nix/store", "/root", "/var", "/var/log"];
const OWN: [&str; 2] = ["/var/lib/headgate", "/run/headgate"];

/// What was measured.
pub struct Measured {
    pub boot: Boot,
    /// From switching on to /readyz, seen from outside; the second after the power cut.
    pub ready: [Duration; 2],
    pub resident: f64,
    pub exposure: f64,
    /// systemd-analyze's own words.
    pub analysis: String,
}

/// `own` is the service for this machine.
pub fn test(parts: &Parts, fixture: &Fixture, own: &Path, seeds: Seeds) -> Result<Measured> {
    let headgate = &fixture.command[0];

    stage("4 KiB pages: first boot");
    let mut machine = Machine::boot(parts)?;
    let first = before_the_cut(&mut machine, headgate);
    let (mut measured, load) = first.map_err(|error| machine.explain(error))?;
    stage("4 KiB pages: power cut");
    power_cut::leave(parts, &machine.cut_power()?, seeds)?;
    drop(load);

    stage("4 KiB pages: second boot");
    let mut machine = Machine::boot(parts)?;
    measured.ready[1] =
        after_the_cut(&mut machine, headgate).map_err(|error| machine.explain(error))?;

    stage("4 KiB pages: power cut under load");
    let cut = power_cut::under_load(machine, headgate)?;
    stage("4 KiB pages: disks that it may have left");
    let unfinished = power_cut::check_images(&cut, parts, own, seeds)?;
    stage("4 KiB pages: third boot, from the last of them");
    let mut machine = Machine::boot(parts)?;
    after_the_cut_under_load(&mut machine, headgate, unfinished)
        .map_err(|error| machine.explain(error))?;
    machine.shut_down("systemctl poweroff")?;
    Ok(measured)
}

fn before_the_cut(machine: &mut Machine, headgate: &str) -> Result<(Measured, Load)> {
    let ready = gateway::until_ready(machine)?;
    for app in [gateway::OVERHEAT_ALARM, UNIT_CONVERT] {
        gateway::until_app(machine, app, "running")?;
    }
    let pid = main_pid(machine)?;
    let resident = gateway::resident(machine, &pid)?;
    gateway::check_alarm(machine)?;
    gateway::check_conversion(machine)?;

    // systemd-analyze knows when all that was to be started is.
    machine.until("systemd to have started everything", SOON, |machine| {
        let state = machine.output("systemctl is-system-running")?.text;
        Ok((!["initializing", "starting"].contains(&state.trim())).then_some(()))
    })?;
    let boot = analyze::boot(&machine.run(analyze::BOOT)?)?;
    let analysis = machine.run(
        "systemd-analyze --no-pager time; systemd-analyze --no-pager critical-chain headgate.service",
    )?;
    check_unit(machine)?;
    let security = machine.run("systemd-analyze --no-pager security headgate.service")?;
    let exposure = analyze::exposure(&security)?;
    check_hardening(machine)?;
    check_log(machine)?;
    gateway::check_journal_io(machine, headgate)?;

    stage("4 KiB pages: load");
    let load = gateway::load(machine)?;
    gateway::write_to_store(machine, headgate)?;
    let measured = Measured {
        boot,
        ready: [ready; 2],
        resident,
        exposure,
        analysis,
    };
    Ok((measured, load))
}

fn after_the_cut(machine: &mut Machine, headgate: &str) -> Result<Duration> {
    let ready = gateway::until_ready(machine)?;
    gateway::check_intact(machine, headgate)?;
    check_log(machine)?;
    stage("4 KiB pages: a gateway that hangs");
    check_watchdog(machine)?;
    Ok(ready)
}

fn after_the_cut_under_load(
    machine: &mut Machine,
    headgate: &str,
    unfinished: usize,
) -> Result<()> {
    power_cut::check_delivered_again(machine, headgate, unfinished)?;
    check_log(machine)?;
    stage("4 KiB pages: GPIO lines and a sensor");
    devices::check(machine, headgate)
}

fn main_pid(machine: &mut Machine) -> Result<String> {
    let pid = machine.run("systemctl show headgate.service -p MainPID --value")?;
    Ok(pid.trim().to_owned())
}

/// systemd has understood every line of the unit.
fn check_unit(machine: &mut Machine) -> Result<()> {
    let complaints = machine.output(
        "journalctl --no-pager -b -o cat _PID=1 | grep -E 'headgate\\.(service|conf):[0-9]+'",
    )?;
    ensure!(
        !complaints.succeeded,
        "systemd doesn't understand the unit: {}",
        complaints.text
    );
    Ok(())
}

fn check_log(machine: &mut Machine) -> Result<()> {
    let log = machine.run("journalctl --no-pager -b -o cat -u headgate.service")?;
    ensure!(
        log.contains("ready"),
        "systemd has no log of the gateway: {log}"
    );
    gateway::check_log(&log)
}

/// The service holds no privilege and writes nowhere but where it may. Not even root can, as long as
/// it is where the service is.
fn check_hardening(machine: &mut Machine) -> Result<()> {
    let pid = main_pid(machine)?;
    let status = machine.run(&format!("cat /proc/{pid}/status"))?;
    for (name, wanted) in [
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("NoNewPrivs", "1"),
        // A filter of system calls.
        ("Seccomp", "2"),
    ] {
        let value = analyze::status_field(&status, name)
            .with_context(|| format!("/proc/PID/status has no {name}"))?;
        ensure!(
            value == wanted,
            "the service's {name} is {value}, not {wanted}"
        );
    }
    let user = analyze::status_field(&status, "Uid").unwrap_or_default();
    ensure!(!user.starts_with("0\t"), "the service runs as root");

    for dir in FOREIGN {
        let touch = machine.output(&format!("nsenter --target {pid} --mount touch {dir}/probe"))?;
        ensure!(
            !touch.succeeded && touch.text.contains("Read-only file system"),
            "where the service is, {dir} can be written: {}",
            touch.text
        );
    }
    for dir in OWN {
        machine.run(&format!(
            "nsenter --target {pid} --mount setpriv --reuid headgate --regid headgate --clear-groups \
             sh -c 'touch {dir}/probe && rm {dir}/probe'"
        ))?;
    }
    Ok(())
}

/// A gateway that doesn't move any more is restarted by the watchdog.
fn check_watchdog(machine: &mut Machine) -> Result<()> {
    let pid = main_pid(machine)?;
    machine.run(&format!("kill -STOP {pid}"))?;
    machine.until("the watchdog to restart the gateway", WATCHDOG, |machine| {
        let now = main_pid(machine)?;
        Ok((now != pid && now != "0").then_some(()))
    })?;
    gateway::until_ready(machine)?;
    gateway::until_app(machine, UNIT_CONVERT, "running")?;
    gateway::check_alarm(machine)?;
    let log = machine.run("journalctl --no-pager -b -o cat -u headgate.service")?;
    ensure!(
        log.contains("Watchdog timeout"),
        "the gateway was restarted, and not by the watchdog: {log}"
    );
    Ok(())
}
