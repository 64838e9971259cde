//! What systemd-boot tells the system that it has started, in EFI variables
//! (<https://systemd.io/BOOT_LOADER_INTERFACE/>).

use std::io::{self, Read};
use std::path::Path;

use super::entry::parse_name;
use super::{BootError, Doing, Entry};

const VENDOR: &str = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// Names of files; more is none of systemd-boot's.
const MAX_BYTES: u64 = 4096;
/// In `LoaderFeatures`: the boot loader counts tries.
const BOOT_COUNTING: u64 = 1 << 4;

/// How this boot came about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Booted {
    /// `LoaderEntrySelected`, such as `headgate-7.conf`: without the counter.
    pub entry: Option<String>,
    /// `LoaderBootCountPath`, such as `\loader\entries\headgate-7+2-1.conf`: the entry's name after it was
    /// counted, if it was.
    pub counted: Option<String>,
    /// `LoaderInfo`, such as `systemd-boot 257`.
    pub loader: Option<String>,
    /// `LoaderFeatures`.
    pub features: Option<u64>,
}

/// Whether boots are counted here. If they are not, a bad update would be booted for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Counting {
    /// This boot was.
    Works,
    /// This boot was of an entry without a counter: it says nothing.
    Unknown,
    /// No boot loader has left any variables: it is not systemd-boot, or the firmware is not UEFI's.
    NoLoader,
    /// The boot loader does not know how.
    NotKnown,
    /// The entry that was booted still has all of its tries: the firmware could not rename its file.
    NotRenamed,
}

/// Reads what the folder `/sys/firmware/efi/efivars` has.
pub fn booted(efivars: &Path) -> Result<Booted, BootError> {
    let features = read(efivars, "LoaderFeatures")?;
    Ok(Booted {
        entry: text(efivars, "LoaderEntrySelected")?,
        counted: text(efivars, "LoaderBootCountPath")?,
        loader: text(efivars, "LoaderInfo")?,
        features: features.and_then(|value| Some(u64::from_le_bytes(value.try_into().ok()?))),
    })
}

impl Booted {
    /// The generation that is running, if it was started by an entry of ours.
    pub fn generation(&self) -> Option<u64> {
        let name = self
            .entry
            .as_deref()
            .or_else(|| self.counted.as_deref()?.rsplit('\\').next())?;
        parse_name(name).map(|(generation, _)| generation)
    }

    /// `entries` are those that are there now.
    pub fn counting(&self, entries: &[Entry]) -> Counting {
        if self.loader.is_none() && self.entry.is_none() {
            return Counting::NoLoader;
        }
        if self
            .features
            .is_some_and(|features| features & BOOT_COUNTING == 0)
        {
            return Counting::NotKnown;
        }
        // One that was tried has fewer, whatever became of it since.
        let is_untouched = |entry: &&Entry| {
            Some(entry.generation) == self.generation()
                && entry
                    .tries
                    .is_some_and(|tries| tries.left > 0 && tries.done == 0)
        };
        match (&self.counted, entries.iter().find(is_untouched)) {
            (_, Some(_)) => Counting::NotRenamed,
            (Some(_), None) => Counting::Works,
            (None, None) => Counting::Unknown,
        }
    }
}

/// A variable's value, without the four bytes of attributes in front of it.
fn read(efivars: &Path, name: &str) -> Result<Option<Vec<u8>>, BootError> {
    let path = efivars.join(format!("{name}-{VENDOR}"));
    let mut value = Vec::new();
    match std::fs::File::open(&path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut value)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).doing("reading", &path),
        Ok(_) => Ok(value.get(4..).map(<[u8]>::to_vec)),
    }
}

/// UTF-16, little-endian, ended by a zero.
fn text(efivars: &Path, name: &str) -> Result<Option<String>, BootError> {
    let value = read(efivars, name)?.unwrap_or_default();
    let (pairs, _) = value.as_chunks::<2>();
    let units: Vec<u16> = (pairs.iter().map(|pair| u16::from_le_bytes(*pair)))
        .take_while(|unit| *unit != 0)
        .collect();
    Ok(Some(String::from_utf16_lossy(&units)).filter(|text| !text.is_empty()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::Tries;
    use super::*;

    /// As efivarfs shows variables: attributes, then the value.
    fn write(folder: &Path, name: &str, value: &[u8]) {
        let value = [&[6, 0, 0, 0], value].concat();
        std::fs::write(folder.join(format!("{name}-{VENDOR}")), value).unwrap();
    }

    fn utf16(text: &str) -> Vec<u8> {
        let units = text.encode_utf16().chain([0]);
        units.flat_map(u16::to_le_bytes).collect()
    }

    fn after_boot(entry: &str, counted: Option<&str>, features: u64) -> Booted {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "LoaderInfo", &utf16("systemd-boot 257.9"));
        write(folder.path(), "LoaderEntrySelected", &utf16(entry));
        write(folder.path(), "LoaderFeatures", &features.to_le_bytes());
        if let Some(counted) = counted {
            write(folder.path(), "LoaderBootCountPath", &utf16(counted));
        }
        booted(folder.path()).unwrap()
    }

    fn entry(generation: u64, tries: Option<(u32, u32)>) -> Entry {
        Entry {
            generation,
            tries: tries.map(|(left, done)| Tries { left, done }),
            file: PathBuf::new(),
            title: None,
            toplevel: None,
            broken: None,
        }
    }

    #[test]
    fn a_boot_that_was_counted_says_so_and_which_generation_it_is() {
        let counted = r"\loader\entries\headgate-7+2-1.conf";
        let booted = after_boot("headgate-7.conf", Some(counted), BOOT_COUNTING);
        assert_eq!(booted.counted.as_deref(), Some(counted));
        assert_eq!(booted.loader.as_deref(), Some("systemd-boot 257.9"));
        assert_eq!(booted.generation(), Some(7));
        let entries = [entry(7, Some((2, 1))), entry(6, None)];
        assert_eq!(booted.counting(&entries), Counting::Works);
    }

    #[test]
    fn an_entry_without_a_counter_says_nothing_about_counting() {
        let booted = after_boot("headgate-7.conf", None, BOOT_COUNTING);
        let entries = [entry(8, Some((3, 0))), entry(7, None)];
        assert_eq!(booted.counting(&entries), Counting::Unknown);
    }

    #[test]
    fn a_firmware_that_can_not_rename_is_found_out_by_the_tries_that_are_left() {
        let entries = [entry(7, Some((3, 0)))];
        let silent = after_boot("headgate-7.conf", None, BOOT_COUNTING);
        assert_eq!(silent.counting(&entries), Counting::NotRenamed);
        let lying = after_boot(
            "headgate-7.conf",
            Some(r"\loader\entries\headgate-7+2-1.conf"),
            BOOT_COUNTING,
        );
        assert_eq!(lying.counting(&entries), Counting::NotRenamed);
    }

    #[test]
    fn a_generation_that_was_condemned_while_it_ran_was_counted_all_the_same() {
        let booted = after_boot(
            "headgate-7.conf",
            Some(r"\loader\entries\headgate-7+2-1.conf"),
            BOOT_COUNTING,
        );
        assert_eq!(booted.counting(&[entry(7, Some((0, 3)))]), Counting::Works);
    }

    #[test]
    fn a_boot_loader_that_does_not_count_is_told_from_none_at_all() {
        let old = after_boot("headgate-7.conf", None, !BOOT_COUNTING);
        assert_eq!(old.counting(&[]), Counting::NotKnown);
        let empty = tempfile::tempdir().unwrap();
        for folder in [empty.path(), Path::new("/nonexistent/efivars")] {
            let booted = booted(folder).unwrap();
            assert_eq!(booted, Booted::default());
            assert_eq!(booted.counting(&[]), Counting::NoLoader);
        }
    }

    #[test]
    fn variables_that_are_cut_short_are_as_good_as_none() {
        let folder = tempfile::tempdir().unwrap();
        for bytes in [&b""[..], &[6, 0], &[6, 0, 0, 0], &[6, 0, 0, 0, b'h']] {
            std::fs::write(
                folder.path().join(format!("LoaderEntrySelected-{VENDOR}")),
                bytes,
            )
            .unwrap();
            std::fs::write(
                folder.path().join(format!("LoaderFeatures-{VENDOR}")),
                bytes,
            )
            .unwrap();
            assert_eq!(
                booted(folder.path()).unwrap(),
                Booted::default(),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn an_entry_of_somebody_elses_is_no_generation() {
        let booted = after_boot("nixos-generation-4.conf", None, BOOT_COUNTING);
        assert_eq!(booted.generation(), None);
    }
}
