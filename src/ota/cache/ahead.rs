//! Reads on another thread, so that a big file is fetched and hashed while what has come is unpacked.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread;

const PIECE_BYTES: usize = 128 * 1024;

/// Pieces that wait to be unpacked.
const PIECES: usize = 4;

/// What was read ahead.
pub(super) struct Ahead {
    pieces: Receiver<io::Result<Vec<u8>>>,
    /// Where those go that were read, to be filled again.
    spare: Sender<Vec<u8>>,
    piece: Vec<u8>,
    read: usize,
}

/// Has `source` read while `reads` takes what comes of it. Returns it when both have ended.
pub(super) fn read_ahead<R: Read + Send, T>(
    mut source: R,
    reads: impl FnOnce(&mut Ahead) -> T,
) -> (R, T) {
    let (full, pieces) = sync_channel(PIECES);
    let (spare, empty) = channel::<Vec<u8>>();
    thread::scope(|scope| {
        let reader = scope.spawn(move || {
            loop {
                let mut piece = empty.try_recv().unwrap_or_default();
                piece.resize(PIECE_BYTES, 0);
                let outcome = match source.read(&mut piece) {
                    Ok(0) => break,
                    Ok(read) => {
                        piece.truncate(read);
                        Ok(piece)
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let is_last = outcome.is_err();
                // Nobody takes it any more if unpacking has failed.
                if full.send(outcome).is_err() || is_last {
                    break;
                }
            }
            source
        });
        let mut ahead = Ahead {
            pieces,
            spare,
            piece: Vec::new(),
            read: 0,
        };
        let outcome = reads(&mut ahead);
        drop(ahead);
        let source = reader.join().expect("reading does not panic");
        (source, outcome)
    })
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read == self.piece.len() {
            let Ok(next) = self.pieces.recv() else {
                return Ok(0);
            };
            let done = std::mem::replace(&mut self.piece, next?);
            self.read = 0;
            // It ends earlier than we do.
            let _ = self.spare.send(done);
        }
        let rest = &self.piece[self.read..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.read += length;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives its bytes in small pieces, and then an error.
    struct Breaks<'a>(&'a [u8]);

    impl Read for Breaks<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = self.0.len().min(buffer.len()).min(7);
            if length == 0 {
                return Err(io::Error::other("broken"));
            }
            buffer[..length].copy_from_slice(&self.0[..length]);
            self.0 = &self.0[length..];
            Ok(length)
        }
    }

    #[test]
    fn what_is_read_is_what_there_is() {
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|number| number as u8).collect();
        let (rest, read) = read_ahead(bytes.as_slice(), |ahead| {
            let mut read = Vec::new();
            ahead.read_to_end(&mut read).map(|_| read)
        });
        assert!(rest.is_empty() && read.unwrap() == bytes);
    }

    #[test]
    fn an_error_comes_after_what_was_before_it() {
        let (_, (read, error)) = read_ahead(Breaks(b"all of these"), |ahead| {
            let mut read = Vec::new();
            let error = ahead.read_to_end(&mut read).unwrap_err();
            (read, error)
        });
        assert_eq!(
            (read.as_slice(), error.to_string().as_str()),
            (b"all of these".as_slice(), "broken")
        );
    }

    #[test]
    fn whoever_stops_early_waits_for_nothing() {
        let endless = io::repeat(1);
        let (_, first) = read_ahead(endless, |ahead| {
            let mut first = [0];
            ahead.read_exact(&mut first).map(|()| first)
        });
        assert_eq!(first.unwrap(), [1]);
    }
}
