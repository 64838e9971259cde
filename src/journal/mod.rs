//! The journal: events on disk, in the order in which they came.
//!
//! What is appended is on disk when [`Journal::append`] says so; whoever sent it is told no sooner. One thread
//! writes for all, so that many share one fdatasync. After a crash, the events that no outlet had finished are
//! in [`Recovered`], to be delivered again: at least once, for what was finished in the last second before it,
//! and what came with an event that was not, is among them.
//!
//! The format is in `docs/journal.md`. Knows events; not where they come from or go to.

mod disk;
mod epochs;
mod follow;
mod frame;
mod reading;
mod retention;
mod segment;
#[cfg(test)]
mod tests;
mod tracker;
mod writer;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, watch};

use crate::event::unix_time_ns;
use disk::Io;
use frame::Frame;
use retention::Retention;
use segment::{Next, Reader, Segment, after_torn};
use tracker::Tracker;
use writer::Writer;

pub use epochs::{Epoch, Epochs};
pub use follow::{Followed, Follower};
pub use frame::{Origin, Record, Records};
pub use reading::{Entry, Problem, Reading};
pub use tracker::Receipt;

/// The name of its folder.
pub const FOLDER: &str = "journal";

/// Most bytes that wait to be written. Beyond that nothing is appended until the disk has taken them.
const MAX_WAITING_BYTES: usize = 64 << 20;

/// How a journal is set up.
#[derive(Clone, Debug)]
pub struct JournalConfig {
    pub folder: PathBuf,
    /// Beyond this the oldest segments are removed.
    pub max_bytes: u64,
    /// Events that are older are removed, once they are finished.
    pub max_age: Option<Duration>,
    /// Beyond this a segment is followed by the next.
    pub segment_bytes: u64,
    /// Whether io_uring is used where the kernel lets us.
    pub io_uring: bool,
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{}: {source}; the gateway needs a folder for its journal that it can read and write (journal.path)", .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("can't start a thread: {0}")]
    Thread(io::Error),
}

/// A way into the journal. Cheap to clone.
#[derive(Clone)]
pub struct Journal {
    shared: Arc<Shared>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// What was found when a journal was opened.
pub struct Recovered {
    /// Where events begin that are to be delivered again, and where they end.
    from: u64,
    to: u64,
    folder: PathBuf,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Notify,
    durable: watch::Sender<Durable>,
    tracker: Arc<Tracker>,
    stats: Mutex<Stats>,
    /// The sequence of the first event since the start.
    opened_at: u64,
    epochs: Epochs,
    /// Who else needs events: each with the first that may not be removed on account of its age.
    holds: Mutex<BTreeMap<Box<str>, u64>>,
    folder: PathBuf,
    io: Io,
}

/// Frames that wait to be written.
struct Queue {
    bytes: Vec<u8>,
    /// The sequence of the first event in them, and the one behind the last.
    first: u64,
    next: u64,
    closing: bool,
}

/// How far the writer has come.
#[derive(Clone, Copy)]
struct Durable {
    /// All events before this one are on disk.
    next: u64,
    /// The disk refuses what is to be written.
    failing: bool,
    /// It goes no further.
    closed: bool,
}

#[derive(Clone, Default)]
struct Stats {
    commits: u64,
    failures: u64,
    error: Option<String>,
    segments: usize,
    bytes: u64,
    first: Option<u64>,
    lost_unfinished: u64,
    refused: u64,
}

/// A journal, for people and scripts.
#[derive(Clone, Debug, Serialize)]
pub struct JournalStatus {
    pub folder: PathBuf,
    /// How it is written: `io_uring` or `blocking`.
    pub io: &'static str,
    pub segments: usize,
    pub bytes: u64,
    /// Sequence of the oldest event that it has.
    pub first: u64,
    /// Sequence that the next event gets.
    pub next: u64,
    /// All events before this one are on disk.
    pub durable: u64,
    /// All events before this one were finished.
    pub finished: u64,
    /// Events appended since the start.
    pub events: u64,
    /// Writes since the start, each with an fdatasync.
    pub commits: u64,
    pub failures: u64,
    /// What the last write has failed with, until one has not.
    pub error: Option<String>,
    /// Events removed for want of room before they were finished.
    pub lost_unfinished: u64,
    /// Events that apps made and that are not here, because the disk refused what was to be written.
    pub refused: u64,
}

impl Journal {
    /// Opens the journal in a folder, which is made if it is not there. Reads its last segment.
    pub fn open(config: JournalConfig) -> Result<(Journal, Recovered), JournalError> {
        let folder = config.folder.clone();
        let failed = |source| JournalError::File {
            path: folder.clone(),
            source,
        };
        fs::create_dir_all(&folder).map_err(failed)?;
        let mut segments = segment::list(&folder).map_err(failed)?;
        let Positions {
            next,
            cursor,
            newest_ns,
        } = positions(&segments)?;
        if let Some(last) = segments.last_mut() {
            last.ended_ns = Some(newest_ns);
        }
        let io = match Io::choose() {
            Ok(io) if config.io_uring => io,
            Ok(_) => Io::Blocking,
            Err(why) => {
                tracing::warn!(
                    why,
                    "the journal is written without io_uring, which is refused here"
                );
                Io::Blocking
            }
        };
        let first = segments.first().map_or(next, |segment| segment.first);
        let epochs = Epochs::begin(&folder, first, next).map_err(failed)?;
        let recovered = Recovered {
            from: cursor,
            to: next,
            folder: folder.clone(),
        };
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                bytes: Vec::new(),
                first: next,
                next,
                closing: false,
            }),
            work: Notify::new(),
            durable: watch::Sender::new(Durable {
                next,
                failing: false,
                closed: false,
            }),
            tracker: Arc::new(Tracker::new(cursor, next)),
            stats: Mutex::default(),
            opened_at: next,
            epochs,
            holds: Mutex::default(),
            folder,
            io,
        });
        let mut writer = Writer {
            shared: shared.clone(),
            io,
            segments: segments.into(),
            written_cursor: cursor,
            retention: config.max_age.map(Retention::new),
            begun: Instant::now(),
            config,
        };
        writer.make_room(0);
        let thread = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || {
                if let Err(error) = writer.run() {
                    tracing::error!(%error, "the journal's thread can't run");
                }
            })
            .map_err(JournalError::Thread)?;
        tracing::info!(folder = %shared.folder.display(), io = io.as_str(), next, cursor, "journal opened");
        let journal = Journal {
            shared,
            thread: Arc::new(Mutex::new(Some(thread))),
        };
        Ok((journal, recovered))
    }

    /// For events that are about to be appended.
    pub fn receipt(&self) -> Receipt {
        Receipt::new(self.shared.tracker.clone())
    }

    /// Appends events. What is returned ends when they are on disk, with true; or with false, when the gateway
    /// ends before they could be. If it is dropped, they are on their way all the same, unless there was no room
    /// for them, because the disk refuses what is to be written: then they were never appended.
    /// `on_appended` is called as soon as they are on their way, and not at all if they never are.
    pub fn append<F: FnOnce() + Send>(
        &self,
        records: Records,
        receipt: Receipt,
        on_appended: F,
    ) -> impl Future<Output = bool> + Send + use<F> {
        let appended = self.try_append(&records, &receipt);
        let mut on_appended = Some(on_appended);
        if appended.is_some()
            && let Some(appended) = on_appended.take()
        {
            appended();
        }
        let journal = self.clone();
        async move {
            if let Some(next) = appended {
                return journal.synced(next).await;
            }
            let mut durable = journal.shared.durable.subscribe();
            loop {
                if let Some(next) = journal.try_append(&records, &receipt) {
                    if let Some(appended) = on_appended.take() {
                        appended();
                    }
                    return journal.synced(next).await;
                }
                if durable.changed().await.is_err() || durable.borrow().closed {
                    return false;
                }
            }
        }
    }

    /// Appends events, and comes back as soon as they are on their way. Waits while the disk is behind, but not
    /// while it refuses what is to be written: where there is no room then, false, and nothing was appended.
    pub async fn append_unless_failing(&self, records: &Records, receipt: &Receipt) -> bool {
        let mut durable = self.shared.durable.subscribe();
        while self.try_append(records, receipt).is_none() {
            let Durable {
                failing, closed, ..
            } = *durable.borrow_and_update();
            if failing || closed || durable.changed().await.is_err() {
                let count = u64::from(records.count());
                self.shared.stats.lock().refused += count;
                return false;
            }
        }
        true
    }

    /// None: too much waits already. Else what to wait for with [`Journal::synced`].
    fn try_append(&self, records: &Records, receipt: &Receipt) -> Option<u64> {
        let checksum = records.checksum();
        let mut queue = self.shared.queue.lock();
        if queue.bytes.len() >= MAX_WAITING_BYTES {
            return None;
        }
        let first = queue.next;
        queue.next += u64::from(records.count());
        let next = queue.next;
        queue.bytes.reserve(records.frame_bytes());
        records.write(first, unix_time_ns(), checksum, &mut queue.bytes);
        receipt.begin(first, next);
        drop(queue);
        self.shared.work.notify_one();
        Some(next)
    }

    /// Ends like that of [`Journal::append`], for all that has been appended so far.
    pub fn barrier(&self) -> impl Future<Output = bool> + Send + use<> {
        let next = self.shared.queue.lock().next;
        let journal = self.clone();
        async move { journal.synced(next).await }
    }

    /// Waits until all before `next` is on disk. False: the gateway ends before it could be.
    async fn synced(&self, next: u64) -> bool {
        let mut durable = self.shared.durable.subscribe();
        let reached = durable
            .wait_for(|durable| durable.next >= next || durable.closed)
            .await;
        reached.is_ok_and(|durable| durable.next >= next)
    }

    /// Reads along, from an event on.
    pub fn follow(&self, from: u64) -> io::Result<Follower> {
        Follower::new(self.clone(), from)
    }

    /// The sequences that the oldest event and the next one have.
    pub fn bounds(&self) -> (u64, u64) {
        let next = self.shared.queue.lock().next;
        (self.shared.stats.lock().first.unwrap_or(next), next)
    }

    /// The sequence of the first event since the start.
    pub fn opened_at(&self) -> u64 {
        self.shared.opened_at
    }

    pub fn epochs(&self) -> &Epochs {
        &self.shared.epochs
    }

    /// `who` needs the events from `from` on: they stay, as long as there is room, however old they are.
    pub fn hold(&self, who: &str, from: u64) {
        self.shared.holds.lock().insert(who.into(), from);
    }

    /// From now on, events that are dropped were not finished.
    pub fn freeze(&self) {
        self.shared.tracker.freeze();
    }

    /// Writes what waits, once, and ends.
    pub fn close(&self) {
        self.shared.queue.lock().closing = true;
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.lock().take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }

    pub fn status(&self) -> JournalStatus {
        let next = self.shared.queue.lock().next;
        let stats = self.shared.stats.lock().clone();
        JournalStatus {
            folder: self.shared.folder.clone(),
            io: self.shared.io.as_str(),
            segments: stats.segments,
            bytes: stats.bytes,
            first: stats.first.unwrap_or(next),
            next,
            durable: self.shared.durable.borrow().next,
            finished: self.shared.tracker.cursor(),
            events: next - self.shared.opened_at,
            commits: stats.commits,
            failures: stats.failures,
            error: stats.error,
            lost_unfinished: stats.lost_unfinished,
            refused: stats.refused,
        }
    }

    /// Puts the counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        let status = self.status();
        metrics::counter!("headgate_journal_events_total").absolute(status.events);
        metrics::counter!("headgate_journal_commits_total").absolute(status.commits);
        metrics::counter!("headgate_journal_write_failures_total").absolute(status.failures);
        metrics::counter!("headgate_journal_lost_unfinished_events_total")
            .absolute(status.lost_unfinished);
        metrics::counter!("headgate_journal_refused_outputs_total").absolute(status.refused);
        metrics::gauge!("headgate_journal_bytes").set(status.bytes as f64);
        metrics::gauge!("headgate_journal_segments").set(status.segments as f64);
        metrics::gauge!("headgate_journal_unfinished_events")
            .set(status.next.saturating_sub(status.finished) as f64);
    }
}

impl Recovered {
    /// Whether all events were finished.
    pub fn is_empty(&self) -> bool {
        self.from >= self.to
    }

    /// The events, a chunk with a receipt after the other.
    pub fn chunks(
        &self,
        journal: &Journal,
    ) -> io::Result<impl Iterator<Item = io::Result<(Vec<Record>, Receipt)>> + use<>> {
        let (journal, from, to) = (journal.clone(), self.from, self.to);
        let mut entries = Reading::open(&self.folder, from)?;
        Ok(iter::from_fn(move || {
            loop {
                let mut records = match entries.next() {
                    Some(Ok(Entry::Events(records))) => records,
                    Some(Ok(Entry::Problem { segment, problem })) => {
                        tracing::error!(segment = %segment.display(), "{problem}");
                        continue;
                    }
                    Some(Err(error)) => return Some(Err(error)),
                    None => Vec::new(),
                };
                // What comes from there on is of this run, and may be being written.
                if records.first().is_none_or(|record| record.sequence >= to) {
                    journal.shared.tracker.all_begun();
                    return None;
                }
                records.retain(|record| record.sequence >= from);
                if let (Some(first), Some(last)) = (records.first(), records.last()) {
                    let receipt = journal.receipt();
                    receipt.begin(first.sequence, last.sequence + 1);
                    return Some(Ok((records, receipt)));
                }
            }
        }))
    }
}

impl Recovered {
    /// The keys of events that were appended in the last `window`, oldest first, each with its age. That is
    /// by the wall clock, which may have been set: no event is older than one that came before it.
    pub fn keys(
        &self,
        window: Duration,
    ) -> io::Result<impl Iterator<Item = io::Result<([u8; 16], Duration)>> + use<>> {
        let now = unix_time_ns();
        let since = now.saturating_sub(window.as_nanos() as u64);
        let from = segment::first_since(&segment::list(&self.folder)?, since, now);
        let entries = Reading::open(&self.folder, from)?;
        let mut youngest_ns = u64::MAX;
        let keys = entries.flat_map(move |entry| {
            let records = match entry {
                Ok(Entry::Events(records)) => records.into_iter().map(Ok).collect(),
                // It is told of where the events are read.
                Ok(Entry::Problem { .. }) => Vec::new(),
                Err(error) => vec![Err(error)],
            };
            let aged = records.into_iter().map(|record| {
                let record = record?;
                let age_ns = match now.checked_sub(record.timestamp_ns) {
                    Some(age_ns) => {
                        youngest_ns = youngest_ns.min(age_ns);
                        youngest_ns
                    }
                    // From a time to come, by a clock that was wrong: as good as new.
                    None => 0,
                };
                Ok((record.key, Duration::from_nanos(age_ns)))
            });
            aged.filter_map(|record| match record {
                Ok((key, age)) => Some(Ok((key?, age))),
                Err(error) => Some(Err(error)),
            })
            .collect::<Vec<_>>()
        });
        Ok(keys)
    }
}

/// How much a journal has, by its files.
#[derive(Clone, Debug, Serialize)]
pub struct Stat {
    pub segments: usize,
    pub bytes: u64,
    /// Sequence of the oldest event.
    pub first: u64,
    /// Sequence behind the latest.
    pub next: u64,
    /// All events before this one were finished, as far as that is on disk.
    pub finished: u64,
}

/// None if there is no journal in the folder. Reads its last segment, or as many as it takes to find a cursor.
pub fn stat(folder: &Path) -> io::Result<Option<Stat>> {
    let segments = match segment::list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        segments => segments?,
    };
    let Some(first) = segments.first() else {
        return Ok(None);
    };
    let positions = positions(&segments).map_err(io::Error::other)?;
    Ok(Some(Stat {
        segments: segments.len(),
        bytes: segments.iter().map(|segment| segment.bytes).sum(),
        first: first.first,
        next: positions.next,
        finished: positions.cursor,
    }))
}

/// How far a journal goes.
struct Positions {
    /// The sequence behind all events that it may have had.
    next: u64,
    /// Its last cursor.
    cursor: u64,
    /// When the last event in its last segment came: nanoseconds since 1970; 0 if there is none.
    newest_ns: u64,
}

fn positions(segments: &[Segment]) -> Result<Positions, JournalError> {
    let mut last = None;
    // A crash may have left the last one without a cursor.
    for segment in segments.iter().rev() {
        let found = last_positions(segment).map_err(|source| JournalError::File {
            path: segment.path.clone(),
            source,
        })?;
        let (next, _, newest_ns) = *last.get_or_insert(found);
        if let (_, Some(cursor), _) = found {
            return Ok(Positions {
                next,
                cursor: cursor.min(next),
                newest_ns,
            });
        }
    }
    let first = segments.first().map_or(0, |segment| segment.first);
    let (next, _, newest_ns) = last.unwrap_or((first, None, 0));
    Ok(Positions {
        next,
        cursor: first,
        newest_ns,
    })
}

/// The sequence behind all events that a segment may have had, its last cursor, and when the last event came.
fn last_positions(segment: &Segment) -> io::Result<(u64, Option<u64>, u64)> {
    let mut reader = Reader::open(segment)?;
    let mut cursor = None;
    let mut newest_ns = 0;
    loop {
        match reader.next()? {
            Next::Frame(_, Frame::Cursor(found)) => cursor = Some(found),
            Next::Frame(header, Frame::Events(_)) => newest_ns = header.time_ns,
            Next::Damage { at, bytes, lost } => {
                let problem = Problem::Damage { at, bytes, lost };
                tracing::error!(segment = %segment.path.display(), "{problem}");
            }
            Next::Torn { at, bytes } => {
                let problem = Problem::Torn { at, bytes };
                tracing::warn!(segment = %segment.path.display(), "{problem}");
                let next = after_torn(reader.expected(), bytes);
                return Ok((next, cursor, newest_ns));
            }
            Next::End => return Ok((reader.expected(), cursor, newest_ns)),
        }
    }
}
