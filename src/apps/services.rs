//! What the host keeps for one app, whichever instance of it runs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::app::App;
use super::device_host::DeviceHost;
use super::kv::AppState;
use super::measures::Measures;
use super::timer::Alarms;

pub(super) struct AppServices {
    /// What it keeps on this gateway.
    pub(super) state: Arc<AppState>,
    /// What it keeps for the site, where it acts for that.
    pub(super) seats: Mutex<Seats>,
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

/// For what of its site an app acts here, and what is kept for it.
#[derive(Default)]
pub(super) struct Seats {
    /// For all of the site. It has the place of what is kept on this gateway.
    pub(super) whole: Option<Arc<AppState>>,
    /// For all or shards of it, by sitting: for calls about their events.
    pub(super) sittings: FxHashMap<u64, Arc<AppState>>,
}

impl AppServices {
    /// What a call has to do with that is about no events, or about this gateway's.
    pub(super) fn state(&self) -> Arc<AppState> {
        let whole = self.seats.lock().whole.clone();
        whole.unwrap_or_else(|| self.state.clone())
    }

    /// What a call about events of this sitting has to do with. None: that is over.
    pub(super) fn state_of(&self, sitting: Option<u64>) -> Option<Arc<AppState>> {
        match sitting {
            None => Some(self.state()),
            Some(sitting) => self.seats.lock().sittings.get(&sitting).cloned(),
        }
    }
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
