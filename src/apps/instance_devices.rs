//! The devices of a live instance. When the instance goes, they go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::gpio::HeldLine;
use super::manifest::{Devices, GpioLine};
use super::sensors::Reading;
use super::services::AppServices;

pub(super) struct InstanceDevices {
    lines: BTreeMap<Box<str>, HeldLine>,
    /// Held for what dropping them does.
    readings: Vec<Reading>,
    services: Arc<AppServices>,
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
            services: services.clone(),
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
        services.lines.store(open.lines.len(), Ordering::Relaxed);
        let sensors = open.readings.len();
        services.sensors.store(sensors, Ordering::Relaxed);
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

impl Drop for InstanceDevices {
    fn drop(&mut self) {
        self.services.lines.store(0, Ordering::Relaxed);
        self.services.sensors.store(0, Ordering::Relaxed);
    }
}
