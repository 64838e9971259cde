//! The devices of a live instance. When the instance goes, they go.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::gpio::HeldLine;
use super::manifest::{Devices, GpioLine};
use super::sensors::Reading;
use super::services::{AppServices, Share};

pub(super) struct InstanceDevices {
    lines: BTreeMap<Box<str>, HeldLine>,
    /// Held for what dropping them does.
    readings: Vec<Reading>,
    /// How many there are, held for what dropping them does.
    counts: [Share; 2],
}

impl InstanceDevices {
    /// Takes the lines, and begins to read the sensors. A line that can't be had is an error; a
    /// sensor may come later.
    pub(super) fn open(
        app: &str,
        devices: &Devices,
        services: &Arc<AppServices>,
    ) -> Result<InstanceDevices, String> {
        let mut open = InstanceDevices {
            lines: BTreeMap::new(),
            readings: Vec::new(),
            counts: [services.lines.share(), services.sensors.share()],
        };
        for line in &devices.gpio {
            let held = HeldLine::take(line, app, services).map_err(|why| failed(line, &why))?;
            open.lines.insert(line.name.clone(), held);
        }
        for sensor in &devices.sensors {
            let reading = services.devices.sensors.read(sensor, services);
            let reading = reading.map_err(|error| format!("cannot start a thread: {error}"))?;
            open.readings.push(reading);
        }
        let [lines, sensors] = &mut open.counts;
        lines.set(open.lines.len());
        sensors.set(open.readings.len());
        Ok(open)
    }

    pub(super) fn line(&self, name: &str) -> Option<&HeldLine> {
        self.lines.get(name)
    }
}

fn failed(line: &GpioLine, why: &str) -> String {
    format!(
        "the GPIO line {:?} ({} of {}) can't be had: {why}",
        line.name, line.line, line.chip
    )
}
