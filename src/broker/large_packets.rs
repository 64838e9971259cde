//! Large packets on their way in. A connection keeps what it has of a packet until it has come in
//! whole, so all together could keep more than there is memory. Before it reads on in a large one, a
//! connection needs a place for it, and waits its turn without reading.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Larger ones need a place. Smaller ones are counted with the connection.
const LARGE: usize = 64 * 1024;

/// Who has a place and sends more slowly than this keeps it from others.
const BYTES_PER_S: usize = 16 * 1024;

/// Places for so many bytes.
#[derive(Debug)]
pub(super) struct Places {
    kibibytes: Arc<Semaphore>,
    /// What a packet may take longer than its size explains.
    patience: Duration,
}

impl Places {
    pub fn new(bytes: usize, patience: Duration) -> Places {
        Places {
            kibibytes: Arc::new(Semaphore::new(kibibytes(bytes) as usize)),
            patience,
        }
    }
}

fn kibibytes(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

/// What a connection has for the packet that it is reading.
#[derive(Default)]
pub(super) enum Place {
    /// The packet is small, or there is none.
    #[default]
    NotNeeded,
    Wanted {
        size: usize,
        turn: Turn,
    },
    Held {
        size: usize,
        _permit: OwnedSemaphorePermit,
        /// When the packet must be there.
        until: Instant,
    },
}

type Turn = Pin<Box<dyn Future<Output = OwnedSemaphorePermit> + Send>>;

impl Place {
    /// A packet of `size` bytes has begun and is not there in whole; none if nothing has begun.
    pub fn adjust(&mut self, size: Option<usize>, places: &Places, now: Instant) {
        let has_size = match self {
            Place::NotNeeded => None,
            Place::Wanted { size, .. } | Place::Held { size, .. } => Some(*size),
        };
        let size = size.filter(|size| *size > LARGE);
        if has_size == size {
            return;
        }
        // What there was is given back first.
        *self = Place::NotNeeded;
        let Some(size) = size else {
            return;
        };
        let semaphore = places.kibibytes.clone();
        *self = match semaphore.clone().try_acquire_many_owned(kibibytes(size)) {
            Ok(permit) => Place::held(size, permit, places, now),
            Err(_) => Place::Wanted {
                size,
                turn: Box::pin(async move {
                    let turn = semaphore.acquire_many_owned(kibibytes(size)).await;
                    turn.expect("the semaphore is never closed")
                }),
            },
        };
    }

    /// A packet has come in whole: the next one, even if it is as large, has a place of its own.
    pub fn leave(&mut self) {
        *self = Place::NotNeeded;
    }

    pub fn is_wanted(&self) -> bool {
        matches!(self, Place::Wanted { .. })
    }

    /// Waits until it is this connection's turn, if it waits for one. May be dropped at any time.
    pub async fn turn(&mut self) -> OwnedSemaphorePermit {
        match self {
            Place::Wanted { turn, .. } => turn.await,
            _ => std::future::pending().await,
        }
    }

    /// It is this connection's turn.
    pub fn take(&mut self, permit: OwnedSemaphorePermit, places: &Places, now: Instant) {
        if let Place::Wanted { size, .. } = self {
            *self = Place::held(*size, permit, places, now);
        }
    }

    fn held(size: usize, permit: OwnedSemaphorePermit, places: &Places, now: Instant) -> Place {
        let time = Duration::from_secs((size / BYTES_PER_S) as u64);
        Place::Held {
            size,
            _permit: permit,
            until: now + places.patience + time,
        }
    }

    /// Nothing was read until `now`.
    pub fn excuse(&mut self, places: &Places, now: Instant) {
        if let Place::Held { until, .. } = self {
            *until = (*until).max(now + places.patience);
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        match self {
            Place::Held { until, .. } => Some(*until),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn who_finds_no_place_gets_one_when_another_leaves() {
        let now = Instant::now();
        let places = Places::new(300 * 1024, PATIENCE);
        let (mut first, mut second) = (Place::default(), Place::default());
        first.adjust(Some(200 * 1024), &places, now);
        second.adjust(Some(200 * 1024), &places, now);
        assert_eq!(
            first.deadline(),
            Some(now + PATIENCE + Duration::from_secs(12))
        );
        assert!(second.is_wanted() && second.deadline().is_none());
        first.leave();
        let permit = second.turn().await;
        second.take(permit, &places, now);
        assert!(!second.is_wanted() && second.deadline().is_some());
    }

    #[test]
    fn a_place_is_kept_while_the_packet_is_the_same_and_given_back_after_it() {
        let now = Instant::now();
        let places = Places::new(300 * 1024, PATIENCE);
        let mut place = Place::default();
        place.adjust(Some(100 * 1024), &places, now);
        let until = place.deadline();
        place.adjust(Some(100 * 1024), &places, now + PATIENCE);
        assert_eq!(place.deadline(), until);
        let late = now + PATIENCE * 9;
        place.excuse(&places, late);
        assert_eq!(place.deadline(), Some(late + PATIENCE));
        assert_eq!(places.kibibytes.available_permits(), 200);
        place.adjust(Some(10), &places, now);
        assert_eq!(places.kibibytes.available_permits(), 300);
    }
}
