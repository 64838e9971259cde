//! Reading along: events from some sequence on, and then whatever comes, as soon as it is on disk.

use std::io;
use std::ops::Range;

use super::{Entry, Journal, Problem, Reading, Record, segment};

/// Reads a journal in the order of its events, and waits for the next ones.
pub struct Follower {
    journal: Journal,
    reading: Reading,
    /// The sequence of the next event.
    next: u64,
    /// The files were opened for it, and not before.
    fresh: bool,
}

/// What stands next in a journal.
#[derive(Debug, PartialEq, Eq)]
pub enum Followed {
    Events(Vec<Record>),
    /// These events are gone: their segment was removed for want of room, or bytes were changed.
    Lost(Range<u64>),
}

impl Follower {
    pub(super) fn new(journal: Journal, from: u64) -> io::Result<Follower> {
        Ok(Follower {
            reading: Reading::follow(&journal.shared.folder, from)?,
            journal,
            next: from,
            fresh: true,
        })
    }

    /// The sequence of the event that comes next.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// What comes next, if it is on disk. What one producer has handed over at once comes at once.
    pub fn read(&mut self) -> io::Result<Option<Followed>> {
        let durable = self.journal.shared.durable.borrow().next;
        // What is beyond may be being written.
        while self.next < durable {
            match self.reading.next().transpose()? {
                Some(Entry::Events(mut records)) => {
                    let Some(first) = records
                        .iter()
                        .map(|record| record.sequence)
                        .find(|sequence| *sequence >= self.next)
                    else {
                        continue;
                    };
                    if let Some(lost) = self.lost_before(first)? {
                        // They come again.
                        self.next = lost.end;
                        self.look_anew()?;
                        return Ok(Some(Followed::Lost(lost)));
                    }
                    records.retain(|record| record.sequence >= first);
                    self.next = records.last().map_or(self.next, |last| last.sequence + 1);
                    self.fresh = false;
                    return Ok(Some(Followed::Events(records)));
                }
                // A file may have been begun anew since it was opened.
                Some(Entry::Problem { .. }) | None if !self.fresh => self.look_anew()?,
                Some(Entry::Problem { segment, problem }) => {
                    tracing::error!(segment = %segment.display(), "{problem}");
                    let lost = match problem {
                        Problem::Damage { lost, .. } | Problem::Missing { lost } => lost,
                        Problem::Torn { .. } => continue,
                    };
                    let lost = lost.start.max(self.next)..lost.end;
                    if lost.is_empty() {
                        continue;
                    }
                    self.next = lost.end;
                    return Ok(Some(Followed::Lost(lost)));
                }
                // Numbers that were left out.
                None => self.next = durable,
            }
        }
        Ok(None)
    }

    /// Opens the files again, for what comes next.
    fn look_anew(&mut self) -> io::Result<()> {
        self.reading = Reading::follow(&self.journal.shared.folder, self.next)?;
        self.fresh = true;
        Ok(())
    }

    /// The events that were removed before this one, which comes next.
    fn lost_before(&self, first: u64) -> io::Result<Option<Range<u64>>> {
        if first == self.next {
            return Ok(None);
        }
        let segments = segment::list(&self.journal.shared.folder)?;
        let oldest = segments.first().map_or(first, |oldest| oldest.first);
        let lost = self.next..oldest.min(first);
        Ok((!lost.is_empty()).then_some(lost))
    }

    /// Waits until there is something to read. False: the gateway ends.
    pub async fn ready(&self) -> bool {
        let mut durable = self.journal.shared.durable.subscribe();
        let told = durable
            .wait_for(|durable| durable.next > self.next || durable.closed)
            .await;
        told.is_ok_and(|durable| durable.next > self.next)
    }
}
