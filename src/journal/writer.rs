//! The thread that writes. What has come while the last write ran goes out in the next one: one write, one
//! fdatasync, however many wait for it.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use super::disk::{Io, Log, sync_folder};
use super::frame;
use super::retention::{Now, Retention};
use super::segment::{self, Segment};
use super::{JournalConfig, Shared, Stats};
use crate::event::unix_time_ns;

/// How often the cursor is written when nothing else is, and old segments are looked for.
const CURSOR_EVERY: Duration = Duration::from_secs(1);

/// Most bytes of a buffer that is kept between two writes.
const KEPT_BYTES: usize = 1 << 20;

/// After a write that failed.
const RETRY: Duration = Duration::from_secs(1);

pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) config: JournalConfig,
    pub(super) io: Io,
    /// The oldest first.
    pub(super) segments: VecDeque<Segment>,
    /// What retention goes by: what was made from events before it is on disk.
    pub(super) written_cursor: u64,
    /// None: events may become as old as they like.
    pub(super) retention: Option<Retention>,
    /// When the last segment was begun, if this run has.
    pub(super) begun: Instant,
}

/// What is to be written.
struct Batch {
    bytes: Vec<u8>,
    /// The sequences of the events in it.
    first: u64,
    next: u64,
    /// All events before this one are finished, and what was made from them is here or was written before.
    cursor: u64,
    closing: bool,
}

impl Writer {
    pub(super) fn run(self) -> io::Result<()> {
        match self.io {
            Io::Uring => tokio_uring::start(self.write()),
            Io::Blocking => tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()?
                .block_on(self.write()),
        }
        Ok(())
    }

    async fn write(mut self) {
        // The segment that is written to; none before the first event and after a failure.
        let mut log = None;
        let mut spare = Vec::new();
        let mut retired = Instant::now();
        loop {
            let mut batch = self.take(&mut spare).await;
            let cursor = batch.cursor;
            if cursor != self.written_cursor {
                frame::write_cursor(cursor, batch.next, unix_time_ns(), &mut batch.bytes);
            }
            if !batch.bytes.is_empty() && !self.commit(&mut log, &mut batch).await {
                break;
            }
            self.written_cursor = cursor;
            if batch.closing {
                break;
            }
            if retired.elapsed() >= CURSOR_EVERY {
                retired = Instant::now();
                self.retire(&mut log, Now::read()).await;
            }
            batch.bytes.clear();
            batch.bytes.shrink_to(KEPT_BYTES);
            spare = batch.bytes;
        }
        self.shared
            .durable
            .send_modify(|durable| durable.closed = true);
    }

    /// Waits for something to do, or for a moment.
    async fn take(&self, spare: &mut Vec<u8>) -> Batch {
        let mut waited = false;
        loop {
            {
                let mut queue = self.shared.queue.lock();
                if !queue.bytes.is_empty() || queue.closing || waited {
                    let next = queue.next;
                    return Batch {
                        // An event can be finished before it is on disk.
                        cursor: self.shared.tracker.cursor().min(next),
                        bytes: mem::replace(&mut queue.bytes, mem::take(spare)),
                        first: mem::replace(&mut queue.first, next),
                        next,
                        closing: queue.closing,
                    };
                }
            }
            let told = timeout(CURSOR_EVERY, self.shared.work.notified()).await;
            waited = told.is_err();
        }
    }

    /// Until it is on disk. False: the gateway ends, and it can't be written.
    async fn commit(&mut self, log: &mut Option<Log>, batch: &mut Batch) -> bool {
        let mut failing = false;
        loop {
            match self.try_commit(log, batch).await {
                Ok(()) => {
                    if failing {
                        tracing::info!(
                            folder = %self.config.folder.display(),
                            "the journal can be written again"
                        );
                    }
                    self.note(|stats| {
                        stats.commits += 1;
                        stats.error = None;
                    });
                    let next = batch.next;
                    let durable = &self.shared.durable;
                    durable.send_modify(|durable| {
                        durable.next = next;
                        durable.failing = false;
                    });
                    return true;
                }
                Err(error) => {
                    self.note(|stats| {
                        stats.failures += 1;
                        stats.error = Some(error.to_string());
                    });
                    if !failing {
                        tracing::error!(
                            folder = %self.config.folder.display(), %error,
                            "the journal can't be written; what it is to have is not acknowledged until it can"
                        );
                    }
                    failing = true;
                    let durable = &self.shared.durable;
                    durable.send_modify(|durable| durable.failing = true);
                    if error.kind() == io::ErrorKind::StorageFull {
                        self.remove_finished();
                    }
                    // The next attempt begins a file of its own: what is in this one is not known.
                    *log = None;
                    if batch.closing || self.shared.queue.lock().closing {
                        return false;
                    }
                    sleep(RETRY).await;
                }
            }
        }
    }

    async fn try_commit(&mut self, log: &mut Option<Log>, batch: &mut Batch) -> io::Result<()> {
        let is_full = |segment: &Segment| segment.bytes >= self.config.segment_bytes;
        if log.is_none() || self.segments.back().is_none_or(is_full) {
            *log = Some(self.begin_segment(batch.first).await?);
        }
        let (Some(log), Some(segment)) = (log, self.segments.back_mut()) else {
            unreachable!("there is one now");
        };
        let (result, bytes) = log.write(mem::take(&mut batch.bytes), segment.bytes).await;
        batch.bytes = bytes;
        result?;
        let written = batch.bytes.len() as u64;
        segment.bytes += written;
        if batch.first < batch.next {
            segment.written = Some(Instant::now());
        }
        self.note(|stats| stats.bytes += written);
        Ok(())
    }

    async fn begin_segment(&mut self, first: u64) -> io::Result<Log> {
        self.make_room(self.config.segment_bytes);
        let path = segment::path(&self.config.folder, first);
        // One without events may be there.
        self.segments.retain(|segment| segment.path != path);
        let log = Log::create(self.io, &path)?;
        let now = unix_time_ns();
        let mut head = frame::segment_header(first, now).to_vec();
        let cursor = self.written_cursor.min(first);
        frame::write_cursor(cursor, first, now, &mut head);
        let (result, head) = log.write(head, 0).await;
        result?;
        sync_folder(&self.config.folder)?;
        self.segments.push_back(Segment {
            first,
            path,
            bytes: head.len() as u64,
            begun_ns: Some(now),
            ended_ns: None,
            written: None,
        });
        self.begun = Instant::now();
        self.note_size();
        Ok(log)
    }

    /// Removes the oldest segments, so that so many bytes more are no more than `max_bytes`.
    pub(super) fn make_room(&mut self, bytes: u64) {
        let mut all: u64 = self.segments.iter().map(|segment| segment.bytes).sum();
        while all + bytes > self.config.max_bytes && self.segments.len() > 1 {
            let oldest = self.remove_oldest();
            let next = self
                .segments
                .front()
                .map_or(oldest.first, |next| next.first);
            let unfinished = next.saturating_sub(self.shared.tracker.cursor().max(oldest.first));
            if unfinished > 0 {
                self.note(|stats| stats.lost_unfinished += unfinished);
                tracing::error!(
                    events = unfinished, segment = %oldest.path.display(),
                    "removed events from the journal that no app has finished, for want of room \
                     (journal.max_bytes): after a crash they are not delivered again"
                );
            }
            all -= oldest.bytes;
        }
        self.note_size();
    }

    /// Removes the segments of which all events are finished: the disk has no room for what is new.
    fn remove_finished(&mut self) {
        while self.is_oldest_finished() {
            self.remove_oldest();
        }
        self.note_size();
    }

    /// Whether all events in the oldest segment are finished, and it is not the last one.
    fn is_oldest_finished(&self) -> bool {
        let next = self.segments.get(1);
        next.is_some_and(|next| next.first <= self.needed_from())
    }

    /// All events before this one are finished, and nobody else needs them.
    fn needed_from(&self) -> u64 {
        let holds = self.shared.holds.lock();
        let held = holds.values().copied().min().unwrap_or(u64::MAX);
        self.written_cursor.min(held)
    }

    /// Removes what is too old and finished, and has the next events begin a segment if this one is old enough.
    async fn retire(&mut self, log: &mut Option<Log>, now: Now) {
        let Some(retention) = self.retention else {
            return;
        };
        let next = self.shared.durable.borrow().next;
        let has_events = self.segments.back().is_some_and(|last| last.first < next);
        if has_events && retention.is_full(self.begun, now) {
            *log = None;
        }
        let is_over =
            |oldest: Option<&Segment>| oldest.is_some_and(|oldest| retention.is_over(oldest, now));
        let is_finished = self.needed_from() >= next;
        let is_only = self.segments.len() == 1 && has_events;
        if is_only && is_finished && is_over(self.segments.front()) {
            // One stays, so that its sequences are not given again.
            match self.begin_segment(next).await {
                Ok(begun) => *log = Some(begun),
                Err(error) => self.note(|stats| {
                    stats.failures += 1;
                    stats.error = Some(error.to_string());
                }),
            }
        }
        while is_over(self.segments.front()) && self.is_oldest_finished() {
            let oldest = self.remove_oldest();
            tracing::debug!(segment = %oldest.path.display(), "removed a segment that is older than journal.max_age_s");
        }
        self.note_size();
    }

    /// There is more than one.
    fn remove_oldest(&mut self) -> Segment {
        let oldest = self.segments.pop_front().expect("more than one");
        if let Err(error) = std::fs::remove_file(&oldest.path) {
            tracing::error!(segment = %oldest.path.display(), %error, "can't remove an old segment of the journal");
        }
        oldest
    }

    fn note_size(&self) {
        self.note(|stats| {
            stats.segments = self.segments.len();
            stats.bytes = self.segments.iter().map(|segment| segment.bytes).sum();
            stats.first = self.segments.front().map(|segment| segment.first);
        });
    }

    fn note(&self, change: impl FnOnce(&mut Stats)) {
        change(&mut self.shared.stats.lock());
    }
}
