//! The gateway as its users see it, over the network of the machine that it runs on.

use super::analyze;
use super::http;
use super::machine::{Machine, SOON};
use super::mqtt::{Load, Subscriber};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// An emulated machine may take long to come up where others compute, too.
const BOOT: Duration = Duration::from_secs(400);

pub const OVERHEAT_ALARM: &str = "overheat-alarm";
pub const UNIT_CONVERT: &str = "unit-convert";

/// Messages of the load that are confirmed before the power is cut.
const LOAD: u64 = 500;

/// How long after the machine was switched on /readyz said yes.
pub fn until_ready(machine: &mut Machine) -> Result<Duration> {
    machine.until("/readyz of the gateway", BOOT, |machine| {
        // Until the gateway listens, the connection is refused or ends.
        let ready = http::get(machine.metrics, "/readyz").is_ok_and(|(status, _)| status == 200);
        Ok(ready.then(|| machine.started.elapsed()))
    })
}

/// `overheat-alarm` raises an alarm and clears it.
pub fn check_alarm(machine: &Machine) -> Result<()> {
    let client = Subscriber::connect(machine.mqtt, "alarms/#", SOON)?;
    for (value, state) in [(93.5, "raised"), (20.0, "cleared")] {
        client.publish(
            "plant/press/temperature",
            &format!(r#"{{"value":{value}}}"#),
        )?;
        client.expect(
            "alarms/plant/press/temperature",
            &format!(r#""state":"{state}""#),
            SOON,
        )?;
    }
    Ok(())
}

/// `unit-convert` converts.
pub fn check_conversion(machine: &Machine) -> Result<()> {
    let client = Subscriber::connect(machine.mqtt, "converted/#", SOON)?;
    client.publish("plant/press/temperature_f", r#"{"value":212}"#)?;
    client.expect("converted/plant/press/temperature_f", "100", SOON)
}

/// Waits until /metrics says that `app` is in `state`.
pub fn until_app(machine: &mut Machine, app: &str, state: &str) -> Result<()> {
    let what = format!("the app {app} to be {state}");
    machine.until(&what, SOON, |machine| {
        let (_, page) = http::get(machine.metrics, "/metrics").context("cannot read /metrics")?;
        let labels = [("app", app), ("state", state)];
        Ok((http::metric(&page, "headgate_app_state", &labels) == Some(1.0)).then_some(()))
    })
}

/// The gateway's resident memory in MB, as the kernel of the machine counts it.
pub fn resident(machine: &mut Machine, pid: &str) -> Result<f64> {
    let status = machine.run(&format!("cat /proc/{}/status", pid.trim()))?;
    Ok(analyze::kilobytes(&status, "VmRSS")? as f64 * 1024.0 / 1e6)
}

/// Readings for `overheat-alarm` that raise no alarm. Returns when enough of them are confirmed; more
/// follow.
pub fn load(machine: &mut Machine) -> Result<Load> {
    let load = Load::start(machine.mqtt, "plant/cool/temperature", r#"{"value":20}"#);
    machine.until("confirmations of the load", SOON, |_| {
        Ok((load.confirmed() >= LOAD).then_some(()))
    })?;
    Ok(load)
}

/// Stops and starts `unit-convert` some times, and leaves it stopped: each time the store is written.
pub fn write_to_store(machine: &mut Machine, headgate: &str) -> Result<()> {
    for _ in 0..3 {
        machine.run(&format!("{headgate} app stop {UNIT_CONVERT}"))?;
        machine.run(&format!("{headgate} app start {UNIT_CONVERT}"))?;
    }
    machine.run(&format!("{headgate} app stop {UNIT_CONVERT}"))?;
    Ok(())
}

/// After the power cut: the store is the one from before, and both apps can do their work.
pub fn check_intact(machine: &mut Machine, headgate: &str) -> Result<()> {
    until_app(machine, OVERHEAT_ALARM, "running")?;
    until_app(machine, UNIT_CONVERT, "stopped")
        .context("it was stopped before the power cut, and the gateway had confirmed that")?;
    check_alarm(machine)?;
    machine.run(&format!("{headgate} app start {UNIT_CONVERT}"))?;
    until_app(machine, UNIT_CONVERT, "running")?;
    check_conversion(machine)
}

/// The journal is written through io_uring, also where the service is confined.
pub fn check_journal_io(machine: &mut Machine, headgate: &str) -> Result<()> {
    let status = machine.run(&format!("{headgate} --json status"))?;
    let status: Value = serde_json::from_str(&status)?;
    let io = &status["journal"]["io"];
    ensure!(
        io == "io_uring",
        "the journal is written with {io}, not through io_uring"
    );
    Ok(())
}

/// How many events of `app` have come to `result`.
pub fn events(machine: &Machine, app: &str, result: &str) -> Result<usize> {
    let (_, page) = http::get(machine.metrics, "/metrics").context("cannot read /metrics")?;
    let labels = [("app", app), ("result", result)];
    Ok(http::metric(&page, "headgate_app_events_total", &labels).unwrap_or(0.0) as usize)
}

/// What has come into the pipeline has come out of it, once nothing moves. docs/architecture.md has the
/// equations.
pub fn check_accounting(machine: &mut Machine) -> Result<()> {
    machine.until("the counters to add up", SOON, |machine| {
        let (_, page) = http::get(machine.metrics, "/metrics").context("cannot read /metrics")?;
        let value = |name, labels: &[_]| http::metric(&page, name, labels).unwrap_or(0.0);
        let pipeline = |result| value("headgate_pipeline_events_total", &[("result", result)]);
        let app = |app| {
            let events = |result| {
                value(
                    "headgate_app_events_total",
                    &[("app", app), ("result", result)],
                )
            };
            let queued = value("headgate_app_queue_length", &[("app", app)]);
            events("handled") + events("failed") + events("dropped") + queued
        };
        let come_in = pipeline("accepted") + pipeline("copied");
        let gone_on = pipeline("filtered") + pipeline("looped") + pipeline("overflowed");
        let queued = value("headgate_pipeline_queued_events", &[]);
        let handed_over = pipeline("handed_over");
        let adds_up = come_in == gone_on + handed_over + queued
            && handed_over == app(OVERHEAT_ALARM) + app(UNIT_CONVERT);
        Ok(adds_up.then_some(()))
    })
}

/// The gateway wrote no line that speaks of an error.
pub fn check_log(log: &str) -> Result<()> {
    let bad: Vec<&str> = log.lines().filter(|line| speaks_of_error(line)).collect();
    ensure!(
        bad.is_empty(),
        "the gateway's log speaks of errors:\n{}",
        bad.join("\n")
    );
    Ok(())
}

fn speaks_of_error(line: &str) -> bool {
    line.split_whitespace().any(|word| word == "ERROR") || line.contains("panicked")
}

#[cfg(test)]
mod the_log {
    use super::*;

    #[test]
    fn may_have_warnings_and_no_errors() {
        assert!(check_log("INFO ready\nWARN slow\n").is_ok());
        for bad in [
            "2026-11-21 ERROR store: full",
            "thread 'main' panicked at a.rs",
        ] {
            let error = check_log(&format!("INFO ready\n{bad}\n")).expect_err("it is bad");
            assert!(error.to_string().ends_with(bad));
        }
    }
}
