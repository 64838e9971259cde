//! The machine with 16 KiB pages: the gateway alone, from an initramfs.

use super::fixture::Fixture;
use super::gateway::{self, UNIT_CONVERT};
use super::machine::{Machine, Parts};
use super::mqtt::Load;
use super::power_cut::{self, Seeds};
use super::stage;
use anyhow::{Result, ensure};
use std::time::Duration;

pub struct Measured {
    /// From switching on to /readyz, seen from outside.
    pub ready: Duration,
    /// The larger of both boots: whether the kernel has a huge page to hand is a matter of luck.
    pub resident: f64,
}

pub fn test(parts: &Parts, fixture: &Fixture, seeds: Seeds) -> Result<Measured> {
    let headgate = &fixture.command[0];
    stage("16 KiB pages: first boot");
    let mut machine = Machine::boot(parts)?;
    let first = before_the_cut(&mut machine, headgate);
    let (mut measured, load) = first.map_err(|error| machine.explain(error))?;
    stage("16 KiB pages: power cut");
    power_cut::leave(parts, &machine.cut_power()?, seeds)?;
    drop(load);

    stage("16 KiB pages: second boot");
    let mut machine = Machine::boot(parts)?;
    let second = after_the_cut(&mut machine, headgate);
    let resident = second.map_err(|error| machine.explain(error))?;
    measured.resident = measured.resident.max(resident);
    machine.shut_down("kill $(cat /run/headgate.pid); sync; poweroff -f")?;
    Ok(measured)
}

fn after_the_cut(machine: &mut Machine, headgate: &str) -> Result<f64> {
    gateway::until_ready(machine)?;
    let pid = machine.run("cat /run/headgate.pid")?;
    let resident = gateway::resident(machine, &pid)?;
    gateway::check_intact(machine, headgate)?;
    check_log(machine)?;
    Ok(resident)
}

fn before_the_cut(machine: &mut Machine, headgate: &str) -> Result<(Measured, Load)> {
    let ready = gateway::until_ready(machine)?;
    for app in [gateway::OVERHEAT_ALARM, UNIT_CONVERT] {
        gateway::until_app(machine, app, "running")?;
    }
    let pid = machine.run("cat /run/headgate.pid")?;
    check_pages(machine, &pid)?;
    let resident = gateway::resident(machine, &pid)?;
    gateway::check_alarm(machine)?;
    gateway::check_conversion(machine)?;
    check_log(machine)?;
    gateway::check_journal_io(machine, headgate)?;
    let load = gateway::load(machine)?;
    gateway::write_to_store(machine, headgate)?;
    Ok((Measured { ready, resident }, load))
}

/// The kernel is the one that was asked for.
fn check_pages(machine: &mut Machine, pid: &str) -> Result<()> {
    let smaps = machine.run(&format!(
        "grep -m 1 KernelPageSize /proc/{}/smaps",
        pid.trim()
    ))?;
    ensure!(
        smaps.contains(" 16 kB"),
        "the kernel's pages are not of 16 KiB: {smaps}"
    );
    Ok(())
}

fn check_log(machine: &mut Machine) -> Result<()> {
    gateway::check_log(&machine.run("cat /run/headgate.log")?)
}
