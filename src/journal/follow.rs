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
        })
    }

    /// The sequence of the event that comes next.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// What comes next, if it is on disk. What one producer has handed over at once comes at once.
    pub fn read(&mut self) -> io::Result<Option<Followed>> {
        // What is beyond may be being written.
        let durable = self.journal.shared.durable.borrow().next;
        // The files were opened since, so that all that is on disk by then is in them; or nothing is amiss.
        let mut is_sure = false;
        while self.next < durable {
            let mut found = self.reading.next().transpose();
            if let Ok(Some(Entry::Events(records))) = &mut found {
                records.retain(|record| record.sequence >= self.next);
                match records.first() {
                    None => continue,
                    Some(first) if first.sequence == self.next => is_sure = true,
                    Some(_) => {}
                }
            }
            if !is_sure {
                // A file may have been begun anew since it was opened: nothing is taken for gone before that was
                // looked at.
                self.reading = Reading::follow(&self.journal.shared.folder, self.next)?;
                is_sure = true;
                continue;
            }
            match found? {
                Some(Entry::Events(records)) => {
                    let (Some(first), Some(last)) = (records.first(), records.last()) else {
                        continue;
                    };
                    if let Some(lost) = self.gone_before(first.sequence)? {
                        // These are found again when the files are opened anew.
                        self.next = lost.end;
                        return Ok(Some(Followed::Lost(lost)));
                    }
                    self.next = last.sequence + 1;
                    return Ok(Some(Followed::Events(records)));
                }
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
                None => {
                    let gone = self.gone_before(durable)?;
                    self.next = gone.as_ref().map_or(durable, |gone| gone.end);
                    if let Some(gone) = gone {
                        return Ok(Some(Followed::Lost(gone)));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Events that are gone before this one, which comes next: their segment was removed, or this run has written
    /// them. Other numbers were left out after a torn end.
    fn gone_before(&self, first: u64) -> io::Result<Option<Range<u64>>> {
        if first == self.next {
            return Ok(None);
        }
        let segments = segment::list(&self.journal.shared.folder)?;
        let oldest = segments.first().map_or(first, |oldest| oldest.first);
        let removed = self.next..oldest.min(first);
        let own = self.next.max(self.journal.shared.opened_at)..first;
        Ok([removed, own].into_iter().find(|gone| !gone.is_empty()))
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
