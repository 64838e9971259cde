//! What the host keeps for one app, whichever instance of it runs.

use std::sync::atomic::AtomicUsize;
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
    /// Timers of the live instance that will fire.
    pub(super) timers: AtomicUsize,
    pub(super) devices: Arc<DeviceHost>,
    /// GPIO lines that the live instance holds.
    pub(super) lines: AtomicUsize,
    /// Sensors that are read for it.
    pub(super) sensors: AtomicUsize,
}
