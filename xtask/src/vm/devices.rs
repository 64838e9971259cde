//! GPIO lines and a sensor of the emulated machine, in the hands of an app.

use super::gateway;
use super::machine::{Machine, SOON};
use super::mqtt::Subscriber;
use anyhow::{Result, ensure};

/// Where the guest has the apps that use devices.
pub const APPS: &str = "/usr/lib/headgate-device-apps";

/// What the module makes of `apps.gpio`, and as the variables what is in the file there.
const UNIT: &str = "[Service]\\n\
     DeviceAllow=char-gpiochip rw\\n\
     PrivateDevices=false\\n\
     SupplementaryGroups=gpio\\n\
     Environment=HEADGATE_APPS_PREINSTALLED=/usr/lib/headgate-device-apps\\n\
     Environment=HEADGATE_APPS_GPIO=io-panel,rival,hopeful\\n\
     Environment=HEADGATE_APPS_SENSORS=*\\n";

/// QEMU's disks are always at 323 K.
const DISK: &str = "49.85";

pub fn check(machine: &mut Machine, headgate: &str) -> Result<()> {
    restart_with_devices(machine)?;
    // Both have started, and either of them may have got the line.
    machine.run(&format!("{headgate} app stop rival"))?;
    gateway::until_app(machine, "io-panel", "running")?;
    machine.run(&format!("{headgate} app start rival"))?;
    check_sensor(machine)?;
    check_edges(machine)?;
    check_output(machine)?;
    for (app, reason) in [
        (
            "rival",
            "\"mine\" (line 5 of gpiochip0) can't be had: \"io-panel\" has it already",
        ),
        (
            "hopeful",
            "there is no chip \"ftdi-cbus\"; there are gpiochip0 (9030000.pl061)",
        ),
    ] {
        check_refused(machine, headgate, app, reason)?;
    }
    machine.run(&format!("{headgate} app stop io-panel"))?;
    // The one that waited for the line gets it now.
    gateway::until_app(machine, "rival", "running")?;
    machine.run(&format!("{headgate} app stop rival"))?;
    let lines = lines(machine)?;
    ensure!(
        !lines.contains("io-panel") && !lines.contains("rival"),
        "lines of apps that are stopped are still taken:\n{lines}"
    );
    Ok(())
}

fn restart_with_devices(machine: &mut Machine) -> Result<()> {
    for command in [
        // What the module's rule for udev does.
        "echo gpio:x:950: >>/etc/group && chgrp gpio /dev/gpiochip0 && chmod 660 /dev/gpiochip0",
        "mount -t debugfs none /sys/kernel/debug",
        &format!(
            "mkdir -p /run/systemd/system/headgate.service.d && \
             printf '{UNIT}' >/run/systemd/system/headgate.service.d/devices.conf"
        ),
        "systemctl daemon-reload && systemctl restart headgate.service",
    ] {
        machine.run(command)?;
    }
    gateway::until_ready(machine)?;
    Ok(())
}

fn check_sensor(machine: &mut Machine) -> Result<()> {
    let client = Subscriber::connect(machine.mqtt, "panel/state/disk", SOON)?;
    client.expect("panel/state/disk", DISK, SOON)
}

fn check_edges(machine: &mut Machine) -> Result<()> {
    let client = Subscriber::connect(machine.mqtt, "panel/state/button", SOON)?;
    machine.press_power()?;
    for value in ["1", "0"] {
        client.expect("panel/state/button", value, SOON)?;
    }
    Ok(())
}

fn check_output(machine: &mut Machine) -> Result<()> {
    let client = Subscriber::connect(machine.mqtt, "panel/state/lamp", SOON)?;
    for (value, level) in [("1", "out hi"), ("0", "out lo")] {
        client.publish("panel/set/lamp", value)?;
        client.expect("panel/state/lamp", value, SOON)?;
        let lines = lines(machine)?;
        let lamp = lines.lines().find(|line| line.contains("out"));
        ensure!(
            lamp.is_some_and(|line| line.contains("io-panel") && line.contains(level)),
            "the lamp's line is not `{level}`, says the kernel:\n{lines}"
        );
    }
    Ok(())
}

fn check_refused(machine: &mut Machine, headgate: &str, app: &str, reason: &str) -> Result<()> {
    let what = format!("the app {app} to be refused its line");
    machine.until(&what, SOON, |machine| {
        let info = machine.run(&format!("{headgate} app inspect {app}"))?;
        Ok(info.contains(reason).then_some(()))
    })
}

/// All lines that somebody has, as the kernel tells.
fn lines(machine: &mut Machine) -> Result<String> {
    machine.run("cat /sys/kernel/debug/gpio")
}
