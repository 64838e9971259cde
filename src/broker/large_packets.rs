//! Large packets on their way in. A connection keeps what it has of a packet until it has come in
//! whole, so all together could keep more than there is memory. Before it reads on in a large one, a
//! connection needs a place for what comes, and waits its turn without reading. A place is for what has
//! come in, not for what was announced: who holds much has sent much.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Packets up to here need no place, nor does the beginning of a larger one: that much is counted with
/// the connection.
const LARGE: usize = 64 * 1024;

/// Who sends more slowly than this keeps a place from others.
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
pub(super) struct Place {
    /// None: the packet is small, or there is none.
    packet: Option<LargePacket>,
}

struct LargePacket {
    size: usize,
    /// When it must be there.
    until: Instant,
    /// For as much as has been read of it, and the next read.
    permit: Option<OwnedSemaphorePermit>,
    turn: Option<Turn>,
}

type Turn = Pin<Box<dyn Future<Output = OwnedSemaphorePermit> + Send>>;

impl Place {
    /// A packet of `size` bytes has begun and `bytes` of it are there; no size if nothing has begun.
    pub fn adjust(&mut self, size: Option<usize>, bytes: usize, places: &Places, now: Instant) {
        let Some(size) = size.filter(|size| *size > LARGE) else {
            self.leave();
            return;
        };
        let packet = self.packet.get_or_insert_with(|| LargePacket {
            size,
            until: now + places.patience + Duration::from_secs((size / BYTES_PER_S) as u64),
            permit: None,
            turn: None,
        });
        let has = packet
            .permit
            .as_ref()
            .map_or(0, |permit| permit.num_permits());
        let wants = match bytes < LARGE {
            true => 0,
            false => kibibytes((bytes + LARGE).min(packet.size)),
        };
        let missing = wants.saturating_sub(has as u32);
        if missing == 0 || packet.turn.is_some() {
            return;
        }
        let semaphore = places.kibibytes.clone();
        match semaphore.clone().try_acquire_many_owned(missing) {
            Ok(permit) => packet.take(permit),
            Err(_) => {
                // Those who have to wait give up before those who make them wait: what they hold is
                // what others wait for.
                packet.until = packet.until.min(now + places.patience);
                packet.turn = Some(Box::pin(async move {
                    let turn = semaphore.acquire_many_owned(missing).await;
                    turn.expect("the semaphore is never closed")
                }));
            }
        }
    }

    /// A packet has come in whole: the next one, even if it is as large, has a place of its own.
    pub fn leave(&mut self) {
        self.packet = None;
    }

    pub fn is_wanted(&self) -> bool {
        let packet = self.packet.as_ref();
        packet.is_some_and(|packet| packet.turn.is_some())
    }

    /// Waits until it is this connection's turn, if it waits for one. May be dropped at any time.
    pub async fn turn(&mut self) -> OwnedSemaphorePermit {
        match self.packet.as_mut().and_then(|packet| packet.turn.as_mut()) {
            Some(turn) => turn.await,
            None => std::future::pending().await,
        }
    }

    /// It is this connection's turn.
    pub fn take(&mut self, permit: OwnedSemaphorePermit, places: &Places, now: Instant) {
        if let Some(packet) = &mut self.packet {
            packet.turn = None;
            packet.take(permit);
            let time = Duration::from_secs((packet.size / BYTES_PER_S) as u64);
            packet.until = now + places.patience + time;
        }
    }

    /// The gateway has not let the client send until `now`.
    pub fn excuse(&mut self, places: &Places, now: Instant) {
        if let Some(packet) = self.packet.as_mut().filter(|packet| packet.turn.is_none()) {
            packet.until = packet.until.max(now + places.patience);
        }
    }

    /// When the packet has taken too long.
    pub fn deadline(&self) -> Option<Instant> {
        self.packet.as_ref().map(|packet| packet.until)
    }
}

impl LargePacket {
    fn take(&mut self, permit: OwnedSemaphorePermit) {
        match &mut self.permit {
            Some(held) => held.merge(permit),
            None => self.permit = Some(permit),
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
        first.adjust(Some(320 * 1024), 150 * 1024, &places, now);
        assert_eq!(
            first.deadline(),
            Some(now + PATIENCE + Duration::from_secs(20))
        );
        second.adjust(Some(320 * 1024), 150 * 1024, &places, now);
        assert!(second.is_wanted());
        assert_eq!(
            second.deadline(),
            Some(now + PATIENCE),
            "it waits no longer"
        );
        first.leave();
        let permit = second.turn().await;
        second.take(permit, &places, now);
        assert!(!second.is_wanted());
    }

    #[test]
    fn a_place_is_for_what_has_come_in_and_given_back_after_the_packet() {
        let now = Instant::now();
        let places = Places::new(300 * 1024, PATIENCE);
        let mut place = Place::default();
        place.adjust(Some(200 * 1024), 100, &places, now);
        assert_eq!(
            places.kibibytes.available_permits(),
            300,
            "nothing is there"
        );
        place.adjust(Some(200 * 1024), 100 * 1024, &places, now);
        assert_eq!(places.kibibytes.available_permits(), 300 - 164);
        place.adjust(Some(200 * 1024), 190 * 1024, &places, now);
        assert_eq!(places.kibibytes.available_permits(), 100);
        let late = now + PATIENCE * 9;
        place.excuse(&places, late);
        assert_eq!(place.deadline(), Some(late + PATIENCE));
        place.adjust(Some(10), 10, &places, now);
        assert_eq!(places.kibibytes.available_permits(), 300);
    }
}
