//! What the host keeps for one app, whichever instance of it runs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::app::App;
use super::device_host::DeviceHost;
use super::kv::AppState;
use super::measures::Measures;
use super::timer::Alarms;

pub(super) struct AppServices {
    pub(super) state: Arc<AppState>,
    pub(super) measures: Mutex<Measures>,
    pub(super) alarms: Alarms,
    /// Where the events of timers go.
    pub(super) app: Weak<App>,
    /// Timers that will fire.
    pub(super) timers: Total,
    pub(super) devices: Arc<DeviceHost>,
    /// GPIO lines that are held.
    pub(super) lines: Total,
    /// Sensors that are read.
    pub(super) sensors: Total,
}

/// What an app's instances have of something, all together: for a moment there can be two of them.
#[derive(Default)]
pub(super) struct Total(Arc<AtomicUsize>);

/// What one instance has of a [`Total`]. When the instance goes, it goes.
pub(super) struct Share {
    total: Arc<AtomicUsize>,
    own: usize,
}

impl Total {
    pub(super) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn share(&self) -> Share {
        Share {
            total: self.0.clone(),
            own: 0,
        }
    }
}

impl Share {
    pub(super) fn set(&mut self, own: usize) {
        self.total.fetch_add(own, Ordering::Relaxed);
        let before = std::mem::replace(&mut self.own, own);
        self.total.fetch_sub(before, Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}
