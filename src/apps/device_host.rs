//! What all apps share of the machine's devices.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::gpio::{Chips, Watcher};
use super::sensors::Sensors;

pub(super) struct DeviceHost {
    pub(super) chips: Arc<dyn Chips>,
    pub(super) watcher: Watcher,
    pub(super) sensors: Sensors,
}

impl DeviceHost {
    pub(super) fn start(chips: Arc<dyn Chips>, sysfs: PathBuf) -> io::Result<DeviceHost> {
        Ok(DeviceHost {
            chips,
            watcher: Watcher::start()?,
            sensors: Sensors::new(sysfs),
        })
    }

    pub(super) fn stop(&self) {
        self.watcher.stop();
        self.sensors.stop();
    }
}
