//! One file of a cache as a stream of bytes, whatever happens to the connection meanwhile.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::fault::Fault;
use super::location::Location;
use super::spool::Spooled;
use super::throttle::Bucket;
use super::transport::{Opened, Transport};

/// The first pause before a request is made again; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MOST: Duration = Duration::from_secs(10);

/// Bytes after which a connection counts as one that works: the tries begin anew.
const PROGRESS: u64 = 64 * 1024;

/// Bytes that have to come in the time of a stall.
const LEAST: u64 = 4 * 1024;

/// What all downloads share.
pub(super) struct Line {
    pub(super) transport: Transport,
    pub(super) bucket: Option<Mutex<Bucket>>,
    pub(super) retries: u32,
}

impl Line {
    /// Waits a while, unless it is cancelled meanwhile.
    fn wait(&self, pause: Duration, cancel: &AtomicBool) -> Result<(), Fault> {
        let end = Instant::now() + pause;
        loop {
            if cancel.load(Ordering::Relaxed) {
                return Err(Fault::Cancelled);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// A file on its way. Reconnects where it was when the connection breaks; gives an error (a [`Fault`]
/// inside) when that is of no use any more.
pub(super) struct Download<'a> {
    line: &'a Line,
    cancel: &'a AtomicBool,
    location: &'a Location,
    /// How long the file has to be; if nobody says so, what the server says first.
    length: Option<u64>,
    /// How long it may be at most.
    limit: u64,
    at: u64,
    stream: Option<Box<dyn Read + Send>>,
    /// Bytes of the stream that were there already.
    skip: u64,
    /// Tries without progress, and since which byte.
    tries: u32,
    tried_at: u64,
    /// Time and bytes since the last look at the pace.
    waited: Duration,
    came: u64,
    /// Whether what was read is of more than one answer.
    pieced: bool,
    spool: Option<Spooled>,
}

impl<'a> Download<'a> {
    pub(super) fn new(
        line: &'a Line,
        cancel: &'a AtomicBool,
        location: &'a Location,
        length: Option<u64>,
        limit: u64,
        spool: Option<Spooled>,
    ) -> Self {
        Self {
            line,
            cancel,
            location,
            length,
            limit,
            at: 0,
            stream: None,
            skip: 0,
            tries: 0,
            tried_at: 0,
            waited: Duration::ZERO,
            came: 0,
            pieced: spool.as_ref().is_some_and(|spool| spool.kept() > 0),
            spool,
        }
    }

    /// Whether the bytes may not belong together, so that it makes sense to begin anew if they are wrong.
    pub(super) fn is_pieced(&self) -> bool {
        self.pieced
    }

    /// Reads all of a small file.
    pub(super) fn whole(mut self) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)
            .map_err(|error| Fault::from_io(error, Fault::File))?;
        Ok(bytes)
    }

    /// The file is what it should be: nothing has to be kept of it.
    pub(super) fn forget(mut self) {
        if let Some(spool) = self.spool.take() {
            spool.remove();
        }
    }

    fn connect(&mut self) -> Result<(), Fault> {
        let Opened {
            reader,
            offset,
            length,
        } = self.line.transport.open(self.location, self.at)?;
        match (self.length, length) {
            (Some(expected), Some(got)) if got != expected => {
                return Err(Fault::Length { got, expected });
            }
            (None, Some(got)) => {
                if got > self.limit {
                    return Err(Fault::TooLong { limit: self.limit });
                }
                self.length = Some(got);
            }
            _ => {}
        }
        self.pieced |= self.at > 0;
        // Some servers know no ranges.
        self.skip = self.at - offset;
        self.stream = Some(reader);
        Ok(())
    }

    /// Reads once from the connection, which is made if there is none.
    fn pull(&mut self, buffer: &mut [u8]) -> Result<usize, Fault> {
        if self.stream.is_none() {
            self.connect()?;
        }
        let Some(stream) = &mut self.stream else {
            return Ok(0);
        };
        let started = Instant::now();
        let read = loop {
            match stream.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => {
                    return Err(Fault::Stalled(self.line.transport.stall()));
                }
                Err(error) => {
                    return Err(match self.location {
                        Location::File(_) => Fault::File(error),
                        Location::Http(_) => Fault::Connection(error.to_string()),
                    });
                }
                Ok(read) => break read,
            }
        };
        self.waited += started.elapsed();
        self.came += read as u64;
        if self.waited >= self.line.transport.stall() {
            if self.came < LEAST && read > 0 {
                return Err(Fault::Stalled(self.waited));
            }
            self.waited = Duration::ZERO;
            self.came = 0;
        }
        if read == 0
            && let Some(expected) = self.length
            && self.at < expected
        {
            return Err(Fault::Short {
                got: self.at,
                expected,
            });
        }
        Ok(read)
    }

    fn next(&mut self, buffer: &mut [u8]) -> Result<usize, Fault> {
        if let Some(spool) = &mut self.spool {
            let read = spool.replay(buffer);
            if read > 0 {
                self.at += read as u64;
                return Ok(read);
            }
        }
        let mut buffer = buffer;
        if let Some(bucket) = &self.line.bucket {
            let portion = bucket.lock().portion().min(buffer.len());
            buffer = &mut buffer[..portion];
        }
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(Fault::Cancelled);
            }
            if self.length.is_some_and(|length| self.at >= length) && self.stream.is_none() {
                return Ok(0);
            }
            match self.pull(buffer) {
                Ok(came) => {
                    if let Some(bucket) = &self.line.bucket {
                        let pause = bucket.lock().take(came, Instant::now());
                        self.line.wait(pause, self.cancel)?;
                    }
                    let known = came.min(usize::try_from(self.skip).unwrap_or(usize::MAX));
                    self.skip -= known as u64;
                    if came > 0 && known == came {
                        continue;
                    }
                    buffer.copy_within(known..came, 0);
                    let read = came - known;
                    self.at += read as u64;
                    if self.at > self.length.unwrap_or(self.limit).min(self.limit) {
                        return Err(Fault::TooLong {
                            limit: self.length.unwrap_or(self.limit),
                        });
                    }
                    if let Some(spool) = &mut self.spool {
                        spool.keep(&buffer[..read]);
                    }
                    return Ok(read);
                }
                Err(fault) if fault.is_passing() => {
                    self.stream = None;
                    self.waited = Duration::ZERO;
                    self.came = 0;
                    if self.at >= self.tried_at + PROGRESS {
                        self.tries = 0;
                    }
                    self.tried_at = self.at;
                    if self.tries >= self.line.retries {
                        return Err(fault);
                    }
                    let pause = PAUSE
                        .saturating_mul(1 << self.tries.min(16))
                        .min(PAUSE_MOST);
                    // Not all gateways at once.
                    self.line
                        .wait(pause.mul_f64(0.5 + fastrand::f64() / 2.0), self.cancel)?;
                    self.tries += 1;
                }
                Err(fault) => return Err(fault),
            }
        }
    }
}

impl Read for Download<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        Ok(self.next(buffer)?)
    }
}

fn is_timeout(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    matches!(inner, Some(ureq::Error::Timeout(_)))
}
