//! The journal's side of what is shipped: reads it, keeps the cursor, and says what may go.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytestring::ByteString;
use tokio::task::JoinHandle;

use super::links::{Link, Ship, Start};
use super::progress::ShipProgress;
use super::window::{SafePoint, Window};
use crate::dead_letters::{DeadLetter, DeadLetters, Reason};
use crate::event::Topic;
use crate::event::via::{is_done, without_hops};
use crate::journal::{Epoch, Followed, Follower, Journal, Record};
use crate::store::{Cursor, Cursors};

/// How often the cursor is written, if it has moved: what was shipped after it is looked for at the other side
/// after a crash.
pub(super) const SAVE_EVERY: Duration = Duration::from_secs(1);

/// Beside topic and payload, what a message takes on its way.
const OVERHEAD_BYTES: usize = 160;

/// A message on its way.
#[derive(Debug)]
pub(super) struct Message {
    /// The subject or topic that it goes to.
    pub(super) to: String,
    pub(super) topic: Topic,
    pub(super) payload: Bytes,
    pub(super) timestamp_ns: u64,
    /// The gateways that it came over.
    pub(super) via: ByteString,
}

/// What all feeds share.
#[derive(Clone)]
pub(super) struct Sources {
    pub(super) journal: Journal,
    pub(super) cursors: Cursors,
    pub(super) dead_letters: Arc<DeadLetters>,
    pub(super) gateway: Arc<str>,
    pub(super) site: Arc<str>,
}

pub(super) struct Feed {
    sources: Sources,
    /// `LINK/SHIP`: of the cursor.
    key: String,
    link: Arc<Link>,
    ship: Ship,
    follower: Follower,
    pub(super) window: Window<Message>,
    safe: SafePoint,
    pub(super) progress: Arc<ShipProgress>,
    saved: Cursor,
    saving: Option<JoinHandle<()>>,
    /// An event that waits on the disk, and when it came.
    waits: Option<(u64, u64)>,
    /// Of what is gone from the journal and was not read was told.
    told_of_loss: bool,
}

impl Feed {
    /// Goes on where it was.
    pub(super) fn open(
        sources: Sources,
        link: Arc<Link>,
        ship: Ship,
        progress: Arc<ShipProgress>,
    ) -> io::Result<Feed> {
        let key = format!("{}/{}", link.name, ship.name);
        let journal = &sources.journal;
        let found = sources.cursors.get(&key).map_err(io::Error::other)?;
        let cursor = begin(journal, found.clone(), ship.start, &key);
        if found.as_ref() != Some(&cursor) {
            // Else what comes until it is written first would be no news after a crash.
            sources
                .cursors
                .put(&key, &cursor)
                .map_err(io::Error::other)?;
        }
        journal.hold(&key, cursor.safe);
        let follower = journal.follow(cursor.next)?;
        progress.cursor.store(cursor.next, Ordering::Relaxed);
        progress.safe.store(cursor.safe, Ordering::Relaxed);
        Ok(Feed {
            window: Window::new(
                ship.to.is_exclusive(),
                cursor.next,
                cursor.last,
                link.max_inflight_bytes,
            ),
            safe: SafePoint::new(link.hold, cursor.safe),
            follower,
            key,
            link,
            ship,
            progress,
            saved: cursor,
            saving: None,
            waits: None,
            told_of_loss: false,
            sources,
        })
    }

    /// Opens it once more, when this one has ended without a word.
    pub(super) fn again(&self) -> impl Fn() -> io::Result<Feed> + use<> {
        let (sources, link) = (self.sources.clone(), self.link.clone());
        let (ship, progress) = (self.ship.clone(), self.progress.clone());
        move || {
            Feed::open(
                sources.clone(),
                link.clone(),
                ship.clone(),
                progress.clone(),
            )
        }
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    pub(super) fn ship(&self) -> &Ship {
        &self.ship
    }

    pub(super) fn gateway(&self) -> &str {
        &self.sources.gateway
    }

    pub(super) fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Whether the journal has had an event with this sequence, of this epoch.
    pub(super) fn knows(&self, epoch: Epoch, sequence: u64) -> bool {
        let (_, next) = self.sources.journal.bounds();
        sequence < next && self.sources.journal.epochs().has(epoch, sequence)
    }

    /// Takes in what is on disk and has room. `to` makes of a topic where it goes; None: it is not shipped.
    pub(super) fn fill(
        &mut self,
        mut to: impl FnMut(&Record) -> Result<String, &'static str>,
    ) -> io::Result<()> {
        while self.window.has_room() {
            match self.follower.read()? {
                None => break,
                Some(Followed::Lost(lost)) => {
                    let events = lost.end - lost.start;
                    self.progress.lost.fetch_add(events, Ordering::Relaxed);
                    tracing::error!(
                        link = self.link.name,
                        ship = self.ship.name,
                        events,
                        from = lost.start,
                        "events of the journal are gone before they were shipped, some of them perhaps of this link: \
                         make journal.max_bytes larger"
                    );
                }
                Some(Followed::Events(records)) => {
                    for record in records {
                        self.take_in(record, &mut to);
                    }
                }
            }
            self.window.skip_to(self.follower.position());
        }
        Ok(())
    }

    fn take_in(
        &mut self,
        record: Record,
        to: &mut impl FnMut(&Record) -> Result<String, &'static str>,
    ) {
        let topic = record.topic.as_str();
        // What came from there does not go back, nor round in a circle.
        let is_wanted = record.link != Some(self.link.origin())
            && !is_done(&record.via, &self.sources.gateway)
            && self.ship.topics.iter().any(|filter| filter.matches(topic));
        if !is_wanted {
            return;
        }
        match to(&record) {
            Ok(to) => {
                let bytes = to.len() + record.payload.len() + OVERHEAD_BYTES;
                let message = Message {
                    to,
                    topic: record.topic,
                    payload: record.payload,
                    timestamp_ns: record.timestamp_ns,
                    via: match self.link.is_shared(&self.ship) {
                        true => record.via,
                        false => without_hops(record.via),
                    },
                };
                self.window.push(record.sequence, bytes, message);
            }
            Err(why) => self.bury(&record.topic, &record.payload, why),
        }
    }

    /// The other side never takes this one.
    pub(super) fn refuse(&mut self, sequence: u64, why: &str) {
        if let Some(message) = self.window.remove(sequence) {
            self.bury(&message.topic, &message.payload, why);
        }
    }

    fn bury(&self, topic: &Topic, payload: &Bytes, why: &str) {
        self.progress.refused.fetch_add(1, Ordering::Relaxed);
        let letters = &self.sources.dead_letters;
        letters.add(Reason::NotShipped, Instant::now(), || DeadLetter {
            error: Some(why.to_owned()),
            ..DeadLetter::new(Reason::NotShipped, &self.key, topic, payload, 1)
        });
    }

    /// Whether there is something to take in.
    pub(super) async fn ready(&self) -> bool {
        self.follower.ready().await
    }

    /// What the other side has acknowledged and then lost goes there again, from this event on.
    pub(super) fn rewind(&mut self, from: u64, last: Option<u64>) -> io::Result<()> {
        let again = self.window.cursor().saturating_sub(from);
        self.progress
            .lost_upstream
            .fetch_add(again, Ordering::Relaxed);
        self.window.rewind(from, last);
        self.follower = self.sources.journal.follow(from)?;
        Ok(())
    }

    /// Where all is safe that comes before it.
    pub(super) fn safe(&self) -> u64 {
        self.saved.safe
    }

    /// To be called every [`SAVE_EVERY`].
    pub(super) fn tick(&mut self, now: Instant) {
        let cursor = self.position(now);
        self.sources.journal.hold(&self.key, cursor.safe);
        let is_busy = self
            .saving
            .as_ref()
            .is_some_and(|saving| !saving.is_finished());
        if cursor == self.saved || is_busy {
            return;
        }
        self.saved = cursor.clone();
        let (cursors, key) = (self.sources.cursors.clone(), self.key.clone());
        self.saving = Some(tokio::task::spawn_blocking(move || {
            save(&cursors, &key, &cursor)
        }));
    }

    /// Shows how far it is.
    pub(super) fn show(&mut self) {
        let unread = self.follower.position();
        let (first, _) = self.sources.journal.bounds();
        let is_lost = unread < first;
        if is_lost && !self.told_of_loss {
            tracing::error!(
                link = self.link.name,
                ship = self.ship.name,
                "events go from the journal before they can be shipped: make journal.max_bytes larger"
            );
        }
        self.told_of_loss = is_lost;
        let front = self.window.front().map(|message| message.timestamp_ns);
        let oldest = front.unwrap_or_else(|| self.oldest_unread());
        let progress = &self.progress;
        progress
            .cursor
            .store(self.window.cursor(), Ordering::Relaxed);
        progress
            .in_flight
            .store(self.window.in_flight() as u64, Ordering::Relaxed);
        progress.oldest_ns.store(oldest, Ordering::Relaxed);
    }

    /// When the oldest came that waits on the disk; 0 if none does.
    fn oldest_unread(&mut self) -> u64 {
        let unread = self.follower.position();
        if unread >= self.sources.journal.bounds().1 {
            return 0;
        }
        if let Some((of, came)) = self.waits
            && of == unread
        {
            return came;
        }
        // What can't be read is told of when it is to be shipped.
        let read = self.sources.journal.follow(unread);
        let came = match read.and_then(|mut follower| follower.read()) {
            Ok(Some(Followed::Events(records))) => {
                records.first().map_or(0, |record| record.timestamp_ns)
            }
            _ => return 0,
        };
        self.waits = Some((unread, came));
        came
    }

    /// Writes the cursor for the last time.
    pub(super) async fn close(mut self) {
        if let Some(saving) = self.saving.take() {
            // A panic there has been reported by the panic hook.
            let _ = saving.await;
        }
        let cursor = self.position(Instant::now());
        if cursor != self.saved {
            save(&self.sources.cursors, &self.key, &cursor);
        }
    }

    fn position(&mut self, now: Instant) -> Cursor {
        let next = self.window.cursor();
        let safe = self.safe.note(next, now);
        self.progress.safe.store(safe, Ordering::Relaxed);
        Cursor {
            next,
            safe,
            last: self.window.last(),
            epoch: epoch_before(&self.sources.journal, next),
        }
    }
}

/// The epoch of the event before this one, which says of which journal a cursor is.
fn epoch_before(journal: &Journal, next: u64) -> String {
    journal.epochs().of(next.saturating_sub(1)).to_string()
}

fn save(cursors: &Cursors, key: &str, cursor: &Cursor) {
    if let Err(error) = cursors.put(key, cursor) {
        tracing::error!(ship = key, %error, "its cursor can't be written");
    }
}

/// Where to begin.
fn begin(journal: &Journal, found: Option<Cursor>, start: Start, key: &str) -> Cursor {
    let (oldest, next) = journal.bounds();
    let at = |next: u64| Cursor {
        next,
        safe: next,
        last: None,
        epoch: epoch_before(journal, next),
    };
    let Some(cursor) = found else {
        return at(match start {
            // Events come before the links start.
            Start::New => journal.opened_at(),
            Start::Oldest => oldest,
        });
    };
    let before = cursor.next.saturating_sub(1);
    let epoch = cursor.epoch.parse();
    let is_known = epoch.is_ok_and(|epoch| journal.epochs().has(epoch, before));
    // What was removed since can't be compared.
    if cursor.next <= next && (is_known || before < oldest) {
        return cursor;
    }
    // At 0 nothing was shipped of any journal.
    if cursor.next > 0 {
        tracing::warn!(
            ship = key,
            cursor = cursor.next,
            "its cursor is of another journal than this one, which is shipped from its oldest event on"
        );
    }
    at(oldest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{JournalConfig, Records};

    #[tokio::test]
    async fn a_new_link_begins_with_what_has_come_since_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let config = JournalConfig {
            folder: folder.path().into(),
            max_bytes: 1 << 30,
            max_age: None,
            segment_bytes: 1 << 20,
            io_uring: true,
        };
        let append = async |journal: &Journal| {
            let mut records = Records::default();
            records.push(&Topic::new("a").unwrap(), b"x", 7, None, None);
            assert!(journal.append(records, journal.receipt(), || ()).await);
        };
        let begins = |journal: &Journal, start| begin(journal, None, start, "a/b").next;
        let (journal, _) = Journal::open(config.clone()).unwrap();
        append(&journal).await;
        assert_eq!(begins(&journal, Start::New), 0);
        drop(journal);
        let (journal, _) = Journal::open(config).unwrap();
        append(&journal).await;
        assert_eq!(begins(&journal, Start::New), 1);
        assert_eq!(begins(&journal, Start::Oldest), 0);
    }
}
