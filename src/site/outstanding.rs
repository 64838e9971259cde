//! The events that a worker has and has not finished.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

use crate::event::{Place, Receipt};

/// Most of them, and of their bytes.
const MOST_EVENTS: usize = 4096;
const MOST_BYTES: usize = 16 << 20;

/// Of one sitting.
#[derive(Default)]
pub(super) struct Outstanding {
    events: AtomicUsize,
    bytes: AtomicUsize,
    abandoned: AtomicBool,
    changed: Notify,
}

/// Goes with one event.
struct Ticket {
    of: Arc<Outstanding>,
    place: Place,
    bytes: usize,
}

impl Outstanding {
    pub(super) fn ticket(self: &Arc<Self>, place: Place, bytes: usize) -> Arc<dyn Receipt> {
        self.events.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Arc::new(Ticket {
            of: self.clone(),
            place,
            bytes,
        })
    }

    /// One was dropped that is to be handled yet: the sitting begins anew from what is safe.
    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    pub(super) fn has_room(&self) -> bool {
        self.events.load(Ordering::Relaxed) < MOST_EVENTS
            && self.bytes.load(Ordering::Relaxed) < MOST_BYTES
    }

    pub(super) fn is_empty(&self) -> bool {
        self.events.load(Ordering::Acquire) == 0
    }

    /// Something was finished or abandoned since this was waited for last.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Receipt for Ticket {
    fn abandon(&self) {
        self.of.abandoned.store(true, Ordering::Release);
        self.of.changed.notify_one();
    }

    fn place(&self) -> Option<Place> {
        Some(self.place)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let events = self.of.events.fetch_sub(1, Ordering::Release);
        self.of.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        if events == 1 || events == MOST_EVENTS {
            self.of.changed.notify_one();
        }
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({:?})", self.place)
    }
}
