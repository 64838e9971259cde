//! Reading a journal from end to end, also while a gateway writes it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::frame::{Frame, Record};
use super::segment::{self, Next, Reader, Segment, after_torn};

/// What stands in a journal.
#[derive(Debug)]
pub enum Entry {
    /// What one producer handed over at once.
    Events(Vec<Record>),
    Problem {
        segment: PathBuf,
        problem: Problem,
    },
}

/// What is wrong with a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Something has changed bytes since they were written.
    Damage {
        at: u64,
        bytes: u64,
        lost: Range<u64>,
    },
    /// The last write was not completed. Nothing of it was acknowledged.
    Torn { at: u64, bytes: u64 },
    /// The segments with these events are not there.
    Missing { lost: Range<u64> },
}

impl Problem {
    /// Whether events are gone that may have been acknowledged.
    pub fn is_loss(&self) -> bool {
        !matches!(self, Problem::Torn { .. })
    }
}

impl Problem {
    /// How many events are gone.
    pub fn lost(&self) -> u64 {
        match self {
            Problem::Damage { lost, .. } | Problem::Missing { lost } => lost.end - lost.start,
            Problem::Torn { .. } => 0,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Damage { at, bytes, lost } => write!(
                f,
                "{bytes} bytes at {at} are damaged; {} events are lost, from sequence {} on",
                lost.end - lost.start,
                lost.start
            ),
            Problem::Torn { at, bytes } => write!(
                f,
                "ends with {bytes} bytes, from {at} on, that are no whole write: what a crash or a power cut has \
                 left, or damage"
            ),
            Problem::Missing { lost } => write!(
                f,
                "the events from sequence {} to {} are missing before it: a segment is gone",
                lost.start,
                lost.end - 1
            ),
        }
    }
}

/// Reads a journal; an iterator over what is in it.
pub struct Reading {
    from: u64,
    left: VecDeque<Segment>,
    current: Option<(Segment, Reader)>,
    /// The sequence that ought to be next; none before the first segment.
    expected: Option<u64>,
    /// After a torn end numbers are left out: the next segment begins with this one at the latest.
    left_out_to: u64,
    /// Where more may come. None: what is there at the beginning is all.
    growing: Option<PathBuf>,
}

impl Reading {
    /// Like [`Reading::open`], but what comes later is read, too: after its end, it goes on when there is more.
    /// It must not be asked for more than is on disk.
    pub(super) fn follow(folder: &Path, from: u64) -> io::Result<Reading> {
        Ok(Reading {
            growing: Some(folder.to_owned()),
            ..Reading::open(folder, from)?
        })
    }

    /// From the frame on that has the event with the sequence `from`.
    pub fn open(folder: &Path, from: u64) -> io::Result<Reading> {
        Ok(Reading {
            from,
            left: segments_from(folder, from)?,
            current: None,
            expected: None,
            left_out_to: 0,
            growing: None,
        })
    }

    fn step(&mut self) -> io::Result<Option<Entry>> {
        loop {
            let Some((segment, reader)) = &mut self.current else {
                if let Some(folder) = &self.growing
                    && self.left.is_empty()
                    && self.expected.is_none()
                {
                    self.left = segments_from(folder, self.from)?;
                }
                let Some(segment) = self.left.pop_front() else {
                    return Ok(None);
                };
                let reader = match Reader::open(&segment) {
                    Ok(reader) => reader,
                    // Removed since it was listed, to make room.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        self.expected = None;
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let first = segment.first;
                let path = segment.path.clone();
                self.current = Some((segment, reader));
                if let Some(expected) = self.expected.replace(first)
                    && expected < first
                    && self.left_out_to < first
                {
                    let problem = Problem::Missing {
                        lost: expected..first,
                    };
                    return Ok(Some(Entry::Problem {
                        segment: path,
                        problem,
                    }));
                }
                continue;
            };
            if self.growing.is_some() {
                // What was half written when it was looked at last is whole now, if anybody may ask for it.
                reader.grow()?;
            }
            // What stands there beyond is of a write that failed, and is in the next one again.
            let end = self.left.front().map_or(u64::MAX, |next| next.first);
            let problem = match reader.next()? {
                Next::Frame(header, Frame::Events(records)) => {
                    if header.first >= end {
                        continue;
                    }
                    self.expected = Some(header.next());
                    if header.next() <= self.from {
                        continue;
                    }
                    return Ok(Some(Entry::Events(records)));
                }
                Next::Frame(_, Frame::Cursor(_)) => continue,
                Next::End => {
                    if let Some(folder) = &self.growing {
                        if reader.grow()? {
                            continue;
                        }
                        if self.left.is_empty() {
                            let last = segment.first;
                            self.left = segments_from(folder, last + 1)?;
                            self.left.retain(|segment| segment.first > last);
                            if self.left.is_empty() {
                                return Ok(None);
                            }
                            // It may have grown before the next one was begun.
                            continue;
                        }
                    }
                    self.current = None;
                    continue;
                }
                Next::Damage { at, bytes, lost } => {
                    let lost = lost.start..lost.end.min(end);
                    if lost.is_empty() {
                        continue;
                    }
                    Problem::Damage { at, bytes, lost }
                }
                Next::Torn { at, bytes } => {
                    self.left_out_to = after_torn(reader.expected(), bytes);
                    Problem::Torn { at, bytes }
                }
            };
            let segment = segment.path.clone();
            return Ok(Some(Entry::Problem { segment, problem }));
        }
    }
}

/// The segments in which events from this one on may be.
fn segments_from(folder: &Path, from: u64) -> io::Result<VecDeque<Segment>> {
    let mut segments = VecDeque::from(segment::list(folder)?);
    while segments.get(1).is_some_and(|next| next.first <= from) {
        segments.pop_front();
    }
    Ok(segments)
}

impl Iterator for Reading {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<io::Result<Entry>> {
        self.step().transpose()
    }
}
