//! Large packets, and frames of other edges, on their way in. A connection keeps what it has of a packet until it has come in
//! whole, so all together could keep more than there is memory. Before it reads on in a large one, a
//! connection needs a place for what comes, and waits its turn without reading. A place is for what has
//! come in, not for what was announced: who holds much has sent much.
//!
//! Where all have a part of a packet, and none a place for the rest, nobody would get on: so there is one
//! place for a whole packet besides, for one after the other of those who wait.

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
pub(crate) struct Places {
    kibibytes: Arc<Semaphore>,
    /// For one whole packet.
    whole: Arc<Semaphore>,
    /// What a packet may take longer than its size explains.
    patience: Duration,
}

impl Places {
    /// No packet is larger than `largest`, for one of which there is room in any case.
    pub fn new(bytes: usize, largest: usize, patience: Duration) -> Places {
        let parts = kibibytes(bytes.saturating_sub(largest));
        Places {
            kibibytes: Arc::new(Semaphore::new(parts as usize)),
            whole: Arc::new(Semaphore::new(1)),
            patience,
        }
    }
}

fn kibibytes(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

/// What a connection has for the packet that it is reading.
#[derive(Default)]
pub(crate) struct Place {
    /// None: the packet is small, or there is none.
    packet: Option<LargePacket>,
}

struct LargePacket {
    size: usize,
    /// When it must be there.
    until: Instant,
    /// For as much as has been read of it, and the next read.
    permit: Option<OwnedSemaphorePermit>,
    /// For all of it, whatever `permit` is for.
    whole: Option<OwnedSemaphorePermit>,
    turn: Option<Turn>,
}

type Turn = Pin<Box<dyn Future<Output = Granted> + Send>>;

/// What a connection has waited for.
pub(crate) enum Granted {
    Part(OwnedSemaphorePermit),
    Whole(OwnedSemaphorePermit),
}

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
            whole: None,
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
        if missing == 0 || packet.turn.is_some() || packet.whole.is_some() {
            return;
        }
        let (parts, whole) = (places.kibibytes.clone(), places.whole.clone());
        if let Ok(permit) = parts.clone().try_acquire_many_owned(missing) {
            packet.take(Granted::Part(permit));
        } else if let Ok(permit) = whole.clone().try_acquire_owned() {
            packet.take(Granted::Whole(permit));
        } else {
            // Those who have to wait give up before those who make them wait: what they hold is
            // what others wait for.
            packet.until = packet.until.min(now + places.patience);
            packet.turn = Some(Box::pin(async move {
                const OPEN: &str = "the semaphore is never closed";
                tokio::select! {
                    permit = parts.acquire_many_owned(missing) => Granted::Part(permit.expect(OPEN)),
                    permit = whole.acquire_owned() => Granted::Whole(permit.expect(OPEN)),
                }
            }));
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
    pub async fn turn(&mut self) -> Granted {
        match self.packet.as_mut().and_then(|packet| packet.turn.as_mut()) {
            Some(turn) => turn.await,
            None => std::future::pending().await,
        }
    }

    /// It is this connection's turn.
    pub fn take(&mut self, granted: Granted, places: &Places, now: Instant) {
        if let Some(packet) = &mut self.packet {
            packet.turn = None;
            packet.take(granted);
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

    /// The gateway has not let the client send for so long.
    pub fn put_off(&mut self, by: Duration) {
        if let Some(packet) = &mut self.packet {
            packet.until += by;
        }
    }

    /// When the packet has taken too long.
    pub fn deadline(&self) -> Option<Instant> {
        self.packet.as_ref().map(|packet| packet.until)
    }
}

impl LargePacket {
    fn take(&mut self, granted: Granted) {
        match (granted, &mut self.permit) {
            (Granted::Whole(permit), _) => self.whole = Some(permit),
            (Granted::Part(permit), Some(held)) => held.merge(permit),
            (Granted::Part(permit), None) => self.permit = Some(permit),
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
        let places = Places::new(300 * 1024, 320 * 1024, PATIENCE);
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

    #[tokio::test]
    async fn where_all_have_a_part_one_after_the_other_gets_the_whole() {
        let now = Instant::now();
        let places = Places::new(1100 * 1024, 320 * 1024, PATIENCE);
        let mut all = [(); 5].map(|()| Place::default());
        // Four have half of it each, and there is no room for the other halves.
        for place in &mut all {
            place.adjust(Some(320 * 1024), 100 * 1024, &places, now);
        }
        for place in &mut all {
            if !place.is_wanted() {
                place.adjust(Some(320 * 1024), 250 * 1024, &places, now);
            }
        }
        let mut done = 0;
        while done < all.len() {
            let ready = all
                .iter_mut()
                .position(|place| place.packet.is_some() && !place.is_wanted());
            let ready = ready.expect("somebody gets on");
            all[ready].leave();
            done += 1;
            for place in all.iter_mut().filter(|place| place.is_wanted()) {
                if let Ok(granted) = tokio::time::timeout(Duration::ZERO, place.turn()).await {
                    place.take(granted, &places, now);
                    place.adjust(Some(320 * 1024), 250 * 1024, &places, now);
                }
            }
        }
    }

    #[test]
    fn a_place_is_for_what_has_come_in_and_given_back_after_the_packet() {
        let now = Instant::now();
        let places = Places::new(500 * 1024, 200 * 1024, PATIENCE);
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
