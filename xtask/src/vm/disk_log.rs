//! What a guest had its disk do, as QEMU's blklogwrites writes it down in the format of Linux's
//! dm-log-writes; and the disk that a power cut would have left.
//!
//! The log has a super block and entries, each of them a header and the sectors that were written. All
//! numbers are little-endian. An entry is logged when the disk has done it and before the guest is told so:
//! what the guest had seen written when it asked for a flush is before that flush in the log.

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use std::fmt;
use std::fs::File;
use std::ops::AddAssign;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// In bytes; QEMU is told so, too. The super block and each header take one.
pub const SECTOR: u64 = 512;

const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;

const FLUSH: u64 = 1;
/// The write was on the disk when the guest was told of it.
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// What a guest had its disk do, in the order in which it was done.
pub struct DiskLog {
    file: File,
    entries: Vec<Entry>,
}

enum Entry {
    Write(Write),
    Flush {
        /// The length of the log behind it.
        log_bytes: u64,
    },
    /// What was there may be read, or anything else: it is left as it was.
    Discard,
}

struct Write {
    /// On the disk and in the log.
    at: u64,
    from: u64,
    bytes: u64,
    is_durable: bool,
}

/// A flush of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    entry: usize,
    /// The length of the log behind it: who has seen a longer or equal one while the guest ran, has seen it
    /// after this flush.
    pub log_bytes: u64,
}

/// What became of the writes that no flush had covered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unflushed {
    pub kept: usize,
    pub torn: usize,
    pub lost: usize,
}

impl AddAssign for Unflushed {
    fn add_assign(&mut self, other: Self) {
        self.kept += other.kept;
        self.torn += other.torn;
        self.lost += other.lost;
    }
}

impl fmt::Display for Unflushed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unflushed { kept, torn, lost } = self;
        write!(f, "{kept} writes are kept, {torn} torn, {lost} lost")
    }
}

impl DiskLog {
    /// Reads the first `log_bytes` of a log; an entry that begins in them counts. The number of entries in
    /// the super block is not used: QEMU is behind with it.
    pub fn read(path: &Path, log_bytes: u64) -> Result<Self> {
        let open = || File::open(path);
        let file = open().with_context(|| format!("cannot open {}", path.display()))?;
        let entries =
            entries(&file, log_bytes).with_context(|| format!("in {}", path.display()))?;
        Ok(DiskLog { file, entries })
    }

    pub fn flushes(&self) -> impl DoubleEndedIterator<Item = Flush> {
        let flush = |(entry, found): (usize, &Entry)| match *found {
            Entry::Flush { log_bytes } => Some(Flush { entry, log_bytes }),
            Entry::Write(_) | Entry::Discard => None,
        };
        self.entries.iter().enumerate().filter_map(flush)
    }

    /// Turns `image`, the disk as it was when the log began, into one whose power was cut between `flush` and
    /// the next: it has all that was written before `flush`, and of what came after it some, in whole or in
    /// part.
    pub fn cut(&self, image: &File, flush: Flush, random: &mut Rng) -> Result<Unflushed> {
        let (flushed, rest) = self.entries.split_at(flush.entry);
        for entry in flushed {
            if let Entry::Write(write) = entry {
                self.write(image, write, |_| true)?;
            }
        }
        let mut unflushed = Unflushed::default();
        // Of some disks nearly all is left, of others nearly nothing.
        let kept = random.f64();
        for entry in &rest[1..] {
            let write = match entry {
                Entry::Write(write) => write,
                Entry::Flush { .. } => break,
                Entry::Discard => continue,
            };
            if write.is_durable || random.f64() < kept {
                self.write(image, write, |_| true)?;
                unflushed.kept += 1;
            } else if random.bool() {
                self.write(image, write, |_| random.bool())?;
                unflushed.torn += 1;
            } else {
                unflushed.lost += 1;
            }
        }
        Ok(unflushed)
    }

    /// Writes those sectors that `is_kept` says yes to.
    fn write(
        &self,
        image: &File,
        write: &Write,
        mut is_kept: impl FnMut(u64) -> bool,
    ) -> Result<()> {
        let mut data = vec![0; usize::try_from(write.bytes)?];
        self.file.read_exact_at(&mut data, write.from)?;
        for (sector, data) in (0..).zip(data.chunks(SECTOR as usize)) {
            if is_kept(sector) {
                image.write_all_at(data, write.at + sector * SECTOR)?;
            }
        }
        Ok(())
    }
}

fn entries(log: &File, log_bytes: u64) -> Result<Vec<Entry>> {
    let [magic, version, _, sector] = numbers(log, 0).context("it has no super block")?;
    // The last is of 32 bits.
    let sector = sector & u64::from(u32::MAX);
    ensure!(
        (magic, version, sector) == (MAGIC, VERSION, SECTOR),
        "it does not begin as a log of version {VERSION} with sectors of {SECTOR} bytes does"
    );
    let mut entries = Vec::new();
    let mut at = SECTOR;
    while at < log_bytes {
        let header = numbers(log, at).with_context(|| format!("no entry at {at}"))?;
        at += SECTOR;
        let [sector, sectors, flags, _] = header;
        entries.push(match flags {
            0 | FUA if sectors > 0 => {
                let write = Write {
                    at: sector * SECTOR,
                    from: at,
                    bytes: sectors * SECTOR,
                    is_durable: flags == FUA,
                };
                at += write.bytes;
                Entry::Write(write)
            }
            FLUSH if sectors == 0 => Entry::Flush { log_bytes: at },
            DISCARD => Entry::Discard,
            _ => bail!("the entry at {} is none of QEMU's: {header:?}", at - SECTOR),
        });
    }
    Ok(entries)
}

/// The four numbers with which a sector begins.
fn numbers(log: &File, at: u64) -> Result<[u64; 4]> {
    let mut bytes = [0; 32];
    log.read_exact_at(&mut bytes, at)?;
    let (numbers, _) = bytes.as_chunks::<8>();
    Ok([0, 1, 2, 3].map(|index| u64::from_le_bytes(numbers[index])))
}

#[cfg(test)]
mod a_log {
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    /// A disk of 16 sectors, and a log that is written as QEMU does.
    struct Disk {
        folder: TempDir,
        log: Vec<u8>,
        /// What each sector may have after a cut behind the last flush, the flushed content first.
        contents: [Vec<u8>; 16],
    }

    impl Disk {
        fn new() -> Self {
            let mut disk = Disk {
                folder: tempfile::tempdir().expect("a folder"),
                log: Vec::new(),
                contents: std::array::from_fn(|_| vec![b'-']),
            };
            disk.put([MAGIC, VERSION, 0, SECTOR]);
            disk
        }

        fn put(&mut self, header: [u64; 4]) {
            self.log.extend(header.map(u64::to_le_bytes).concat());
            self.log.resize(self.log.len() + 480, 0);
        }

        fn write(&mut self, sector: u64, sectors: u64, content: u8, flags: u64) {
            self.put([sector, sectors, flags, 0]);
            self.log
                .resize(self.log.len() + (sectors * SECTOR) as usize, content);
            for may_have in &mut self.contents[sector as usize..(sector + sectors) as usize] {
                if flags == FUA {
                    may_have.clear();
                }
                may_have.push(content);
            }
        }

        fn flush(&mut self) {
            self.put([0, 0, FLUSH, 0]);
            for may_have in &mut self.contents {
                may_have.drain(..may_have.len() - 1);
            }
        }

        fn read(&self) -> Result<DiskLog> {
            let path = self.folder.path().join("log");
            fs::write(&path, &self.log)?;
            DiskLog::read(&path, self.log.len() as u64)
        }

        /// The first byte of each sector after a cut, if all of a sector is the same.
        fn cut(&self, flush: Flush, seed: u64) -> Result<Vec<u8>> {
            let path = self.folder.path().join("image");
            fs::write(&path, [b'-'; 16 * SECTOR as usize])?;
            let image = File::options().write(true).open(&path)?;
            self.read()?.cut(&image, flush, &mut Rng::with_seed(seed))?;
            let sectors = fs::read(&path)?;
            let whole = |sector: &[u8]| sector.iter().all(|byte| *byte == sector[0]);
            let sectors = sectors.chunks(SECTOR as usize);
            assert!(sectors.clone().all(whole), "no sector is torn");
            Ok(sectors.map(|sector| sector[0]).collect())
        }

        fn last_flush(&self) -> Result<Flush> {
            self.read()?.flushes().next_back().context("no flush")
        }
    }

    #[test]
    fn is_replayed_up_to_a_flush_and_no_further_than_the_next() -> Result<()> {
        let mut disk = Disk::new();
        disk.write(0, 4, b'a', 0);
        disk.flush();
        disk.flush();
        disk.write(2, 1, b'b', 0);
        disk.flush();
        let flushes: Vec<_> = disk.read()?.flushes().collect();
        assert_eq!(flushes.len(), 3);
        assert_eq!(flushes[2].log_bytes, disk.log.len() as u64);
        for seed in 0..50 {
            assert_eq!(disk.cut(flushes[0], seed)?, b"aaaa------------");
            assert_eq!(disk.cut(flushes[2], seed)?, b"aaba------------");
        }
        Ok(())
    }

    #[test]
    fn that_is_cut_has_all_that_was_flushed_and_anything_of_the_rest() -> Result<()> {
        for seed in 0..200 {
            let mut random = Rng::with_seed(seed);
            let mut disk = Disk::new();
            for content in b'a'..=b'z' {
                let sector = random.u64(0..16);
                let flags = if random.u8(..) < 32 { FUA } else { 0 };
                disk.write(sector, random.u64(1..=16 - sector), content, flags);
                if random.u8(..) < 64 {
                    disk.flush();
                }
                if content == b'a' {
                    disk.flush();
                }
            }
            let found = disk.cut(disk.last_flush()?, seed)?;
            for (found, may_have) in found.iter().zip(&disk.contents) {
                assert!(may_have.contains(found), "seed {seed}");
            }
        }
        Ok(())
    }

    #[test]
    fn keeps_loses_and_tears_what_was_not_flushed() -> Result<()> {
        let mut disk = Disk::new();
        disk.flush();
        disk.write(0, 16, b'a', 0);
        let flush = disk.last_flush()?;
        let images: Result<Vec<_>> = (0..50).map(|seed| disk.cut(flush, seed)).collect();
        let images = images?;
        assert!(images.contains(&b"aaaaaaaaaaaaaaaa".to_vec()));
        assert!(images.contains(&b"----------------".to_vec()));
        let is_torn = |image: &Vec<u8>| image.contains(&b'a') && image.contains(&b'-');
        assert!(images.iter().any(is_torn));
        // A seed says which.
        assert_eq!(disk.cut(flush, 7)?, disk.cut(flush, 7)?);
        Ok(())
    }

    #[test]
    fn that_is_damaged_is_an_error_that_says_where() -> Result<()> {
        let mut disk = Disk::new();
        disk.flush();
        disk.put([0, 0, 0, 0]);
        let error = disk.read().err().context("it is damaged")?;
        assert!(format!("{error:#}").contains("the entry at 1024 is none of QEMU's"));
        disk.log.truncate(1024 + 8);
        let error = disk.read().err().context("it is cut short")?;
        assert!(format!("{error:#}").contains("no entry at 1024"));
        disk.log[0] = 0;
        let error = disk.read().err().context("it is no log")?;
        assert!(format!("{error:#}").contains("does not begin as a log"));
        Ok(())
    }
}
