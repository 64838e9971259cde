//! In which run an event was written: sequences alone don't name one for ever, as a card may be copied, or an old
//! copy of it be put back.
//!
//! Each start begins an epoch, with a random number. They stand in a file of the journal's folder, one line each.

use std::fs;
use std::io;
use std::path::Path;

use super::disk::sync_folder;

const FILE: &str = "epochs";

/// What was written longer ago is not asked for.
const KEPT: usize = 64;

/// The number of an epoch: of 16 hexadecimal digits in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(u64);

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl std::str::FromStr for Epoch {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Epoch, Self::Err> {
        u64::from_str_radix(text, 16).map(Epoch)
    }
}

/// Which sequences belong to which epoch.
#[derive(Clone, Debug)]
pub struct Epochs {
    /// Each with the sequence that it begins with, the oldest first. Never empty.
    begun: Vec<(u64, Epoch)>,
}

impl Epochs {
    /// Begins an epoch at the sequence `next`. The oldest event of the journal is `first`.
    pub(super) fn begin(folder: &Path, first: u64, next: u64) -> io::Result<Epochs> {
        let path = folder.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            // Then they are as good as new ones: what was on its way may be sent twice.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => String::new(),
            Err(error) => return Err(error),
        };
        let mut begun: Vec<(u64, Epoch)> = text.lines().filter_map(parse).collect();
        // What is not in order was damaged.
        if !begun.is_sorted_by(|a, b| a.0 < b.0) {
            begun.clear();
        }
        begun.retain(|(began, _)| *began < next);
        begun.drain(..begun.len().saturating_sub(KEPT));
        if begun.is_empty() && first < next {
            begun.push((first, random()));
        }
        begun.push((next, random()));
        let lines: String = begun
            .iter()
            .map(|(began, epoch)| format!("{began} {epoch}\n"))
            .collect();
        let new = path.with_extension("new");
        fs::write(&new, lines)?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, &path)?;
        sync_folder(folder)?;
        Ok(Epochs { begun })
    }

    /// The epoch of an event that the journal has, or is yet to get.
    pub fn of(&self, sequence: u64) -> Epoch {
        let begun = self.begun.partition_point(|(began, _)| *began <= sequence);
        self.begun[begun.saturating_sub(1)].1
    }

    /// Whether an event with this sequence was written in this epoch.
    pub fn has(&self, epoch: Epoch, sequence: u64) -> bool {
        let begun = self.begun.partition_point(|(began, _)| *began <= sequence);
        begun > 0 && self.begun[begun - 1].1 == epoch
    }
}

fn random() -> Epoch {
    Epoch(fastrand::u64(..))
}

fn parse(line: &str) -> Option<(u64, Epoch)> {
    let (began, epoch) = line.split_once(' ')?;
    Some((began.parse().ok()?, epoch.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_run_has_an_epoch_and_an_event_that_of_the_run_that_wrote_it() {
        let folder = tempfile::tempdir().unwrap();
        let first = Epochs::begin(folder.path(), 0, 0).unwrap();
        let second = Epochs::begin(folder.path(), 0, 10).unwrap();
        assert_eq!(second.of(9), first.of(9));
        assert_ne!(second.of(10), first.of(10));
        assert!(second.has(first.of(0), 3));
        assert!(!second.has(first.of(0), 10));
        let mut last = second.clone();
        for next in 20..20 + KEPT as u64 {
            last = Epochs::begin(folder.path(), 12, next).unwrap();
        }
        assert_eq!(last.of(13), second.of(13));
        assert!(!last.has(first.of(0), 3), "it was long ago");
    }

    #[test]
    fn a_run_that_wrote_nothing_leaves_no_epoch() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            Epochs::begin(folder.path(), 0, 0).unwrap();
        }
        let text = fs::read_to_string(folder.path().join(FILE)).unwrap();
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn what_was_damaged_is_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        for text in ["9 x\n\n", "5 1\n3 2\n", "\u{0}\u{0}", "7 1\n7 2\n"] {
            fs::write(folder.path().join(FILE), text).unwrap();
            let epochs = Epochs::begin(folder.path(), 2, 10).unwrap();
            assert!(epochs.has(epochs.of(2), 9), "{text:?}");
            assert_ne!(epochs.of(9), epochs.of(10));
        }
    }
}
