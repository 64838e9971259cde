//! The segments in a folder, and how they are read: whatever is in them, nothing but whole frames comes out,
//! and each byte that is not of one is told of.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use bytes::Bytes;

use super::frame::{self, Frame, FrameHeader, HEADER_BYTES};

const SUFFIX: &str = ".journal";

/// No gateway gets so far; a file with a higher number is none of its segments.
const MAX_SEQUENCE: u64 = 1 << 62;

/// No frame is so large: it is what one connection has read at once, or one packet.
const MAX_BODY_BYTES: u32 = 1 << 30;

/// A file of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Sequence of the first event in it, by its name.
    pub(super) first: u64,
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    /// When it was begun: nanoseconds since 1970, by its header. None if that can't be read.
    pub(super) begun_ns: Option<u64>,
    /// When its newest event came, at the latest, if it is of an earlier run: when the next one was begun.
    pub(super) ended_ns: Option<u64>,
    /// When this run has last written events to it.
    pub(super) written: Option<Instant>,
}

pub(super) fn path(folder: &Path, first: u64) -> PathBuf {
    folder.join(format!("{first:020}{SUFFIX}"))
}

/// The segments in a folder, the oldest first. Other files don't count.
pub(super) fn list(folder: &Path) -> io::Result<Vec<Segment>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
        let first = stem.and_then(|stem| stem.parse().ok());
        let first =
            first.filter(|first| *first <= MAX_SEQUENCE && path(folder, *first).ends_with(&name));
        let metadata = match entry.metadata() {
            // Removed in the meantime, to make room.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        if let Some(first) = first.filter(|_| metadata.is_file()) {
            segments.push(Segment {
                first,
                begun_ns: begun_ns(&entry.path()),
                path: entry.path(),
                bytes: metadata.len(),
                ended_ns: None,
                written: None,
            });
        }
    }
    segments.sort_by_key(|segment| segment.first);
    for next in 1..segments.len() {
        segments[next - 1].ended_ns = segments[next].begun_ns;
    }
    Ok(segments)
}

/// The sequence of the first event of the segment in which events since this time may begin, in nanoseconds
/// since 1970: the one before the first that was begun later. The clock may have been set: what it said of a
/// time that is still to come counts only where nothing else does.
pub(super) fn first_since(segments: &[Segment], since_ns: u64, now_ns: u64) -> u64 {
    let begun = |later: std::ops::RangeInclusive<u64>| {
        // What can't be read says nothing of its time.
        let is_later = |segment: &Segment| segment.begun_ns.is_some_and(|ns| later.contains(&ns));
        segments.iter().position(is_later)
    };
    let later = begun(since_ns + 1..=now_ns).or_else(|| begun(now_ns..=u64::MAX));
    let readable = |segment: &Segment| segment.begun_ns.is_some();
    let before = later.unwrap_or(segments.len()).saturating_sub(1);
    let before = segments.iter().take(before + 1).rposition(readable);
    let segment = before.map_or(segments.first(), |at| segments.get(at));
    segment.map_or(0, |segment| segment.first)
}

/// When a segment was begun: nanoseconds since 1970, by its header. None if that can't be read.
fn begun_ns(path: &Path) -> Option<u64> {
    let mut header = [0; HEADER_BYTES];
    File::open(path).ok()?.read_exact(&mut header).ok()?;
    frame::parse_segment_header(&header).map(|(_, begun_ns)| begun_ns)
}

/// The sequence that comes after a torn end of so many bytes: a number that was given to an event once is
/// never given again, whatever this was.
pub(super) fn after_torn(expected: u64, bytes: u64) -> u64 {
    /// No record is shorter.
    const RECORD_BYTES: u64 = 15;
    expected + bytes / RECORD_BYTES + 1
}

/// What comes next in a segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Frame(FrameHeader, Frame),
    /// Bytes that are no frame, before one that is: something has changed them since they were written. The
    /// events that were there are lost.
    Damage {
        at: u64,
        bytes: u64,
        lost: Range<u64>,
    },
    /// Bytes that are no whole frame, and nothing after them is: what a crash has left of the last write.
    Torn {
        at: u64,
        bytes: u64,
    },
    End,
}

/// Reads a segment from its beginning.
pub(super) struct Reader {
    file: BufReader<File>,
    at: u64,
    length: u64,
    /// The sequence that the next frame ought to have.
    expected: u64,
}

impl Reader {
    pub(super) fn open(segment: &Segment) -> io::Result<Reader> {
        let file = File::open(&segment.path)?;
        let length = file.metadata()?.len();
        let mut reader = Reader {
            file: BufReader::with_capacity(1 << 17, file),
            at: 0,
            length,
            expected: segment.first,
        };
        let mut header = [0; HEADER_BYTES];
        if length >= HEADER_BYTES as u64 {
            reader.file.read_exact(&mut header)?;
            let parsed = frame::parse_segment_header(&header);
            if parsed.is_some_and(|(first, _)| first == segment.first) {
                reader.at = HEADER_BYTES as u64;
            } else {
                reader.file.rewind()?;
            }
        }
        Ok(reader)
    }

    /// Whether there is more in the file than before.
    pub(super) fn grow(&mut self) -> io::Result<bool> {
        let length = self.file.get_ref().metadata()?.len();
        let grown = length > self.length;
        self.length = self.length.max(length);
        Ok(grown)
    }

    /// The sequence behind all events so far.
    pub(super) fn expected(&self) -> u64 {
        self.expected
    }

    pub(super) fn next(&mut self) -> io::Result<Next> {
        if self.at == self.length {
            return Ok(Next::End);
        }
        if let Some((header, frame)) = self.frame()? {
            self.at += HEADER_BYTES as u64 + u64::from(header.body_bytes);
            self.expected = header.next();
            return Ok(Next::Frame(header, frame));
        }
        let begin = self.at;
        while self.at + (HEADER_BYTES as u64) < self.length {
            self.find_header()?;
            let found = self.frame()?;
            if found.is_some_and(|(header, _)| header.first >= self.expected) {
                break;
            }
            self.at += 1;
        }
        self.file.seek(SeekFrom::Start(self.at))?;
        if self.at + HEADER_BYTES as u64 >= self.length {
            self.at = self.length;
            return Ok(Next::Torn {
                at: begin,
                bytes: self.length - begin,
            });
        }
        let (header, _) = self.frame()?.ok_or(io::ErrorKind::InvalidData)?;
        let lost = self.expected..header.first;
        self.expected = header.first;
        Ok(Next::Damage {
            at: begin,
            bytes: self.at - begin,
            lost,
        })
    }

    /// The frame that begins here, if one does. The file stands here, or is made to.
    fn frame(&mut self) -> io::Result<Option<(FrameHeader, Frame)>> {
        let left = self.length - self.at;
        if left < HEADER_BYTES as u64 {
            return Ok(None);
        }
        let position = self.file.stream_position()?;
        self.file.seek_relative(self.at as i64 - position as i64)?;
        let mut header = [0; HEADER_BYTES];
        self.file.read_exact(&mut header)?;
        let Some(header) = FrameHeader::parse(&header) else {
            return Ok(None);
        };
        let fits = u64::from(header.body_bytes) <= left - HEADER_BYTES as u64;
        if !fits || header.body_bytes > MAX_BODY_BYTES {
            return Ok(None);
        }
        let mut body = vec![0; header.body_bytes as usize];
        self.file.read_exact(&mut body)?;
        Ok(frame::parse_body(&header, Bytes::from(body)).map(|frame| (header, frame)))
    }

    /// Moves on to the next byte, from this one on, at which a header's checksum is right.
    fn find_header(&mut self) -> io::Result<()> {
        const CHUNK: usize = 1 << 16;
        let mut chunk = vec![0; CHUNK];
        loop {
            let left = (self.length - self.at) as usize;
            let length = left.min(CHUNK);
            self.file.seek(SeekFrom::Start(self.at))?;
            self.file.read_exact(&mut chunk[..length])?;
            let windows = chunk[..length].windows(HEADER_BYTES);
            let found = windows
                .map(|window| <&[u8; HEADER_BYTES]>::try_from(window).expect("as long"))
                .position(|window| FrameHeader::parse(window).is_some());
            if let Some(found) = found {
                self.at += found as u64;
                return Ok(());
            }
            if length == left {
                self.at = self.length;
                return Ok(());
            }
            self.at += (length - HEADER_BYTES + 1) as u64;
        }
    }
}
