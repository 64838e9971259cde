//! An entry: its name, which has the tries, and its text.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};

use super::bootspec::is_store_path;

/// How often systemd-boot has still to start an entry before it is bad, and how often it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tries {
    pub left: u32,
    pub done: u32,
}

/// An entry of ours on the EFI system partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub generation: u64,
    /// None once the generation is good.
    pub tries: Option<Tries>,
    pub file: PathBuf,
    pub title: Option<String>,
    /// The system that it starts.
    pub toplevel: Option<String>,
    /// Why it does not boot, if it does not: it is cut short, or its kernel is gone.
    pub broken: Option<String>,
}

impl Entry {
    /// Whether it has used up its tries, or was condemned.
    pub fn is_bad(&self) -> bool {
        self.tries.is_some_and(|tries| tries.left == 0)
    }

    /// In the order in which systemd-boot takes entries: the first is what the machine boots next.
    ///
    /// As `boot_entry_compare` of systemd's src/boot/boot.c, for entries that all have one `sort-key` and
    /// no `machine-id`: bad ones last, then by `version` downwards, then by what is left of the tries. Of
    /// two files for one generation, which a power cut while a file is renamed can leave, systemd-boot
    /// takes any; here the one that says more about the past comes first: good, then fewer tries left.
    pub(super) fn order(&self, other: &Entry) -> Ordering {
        let left = |entry: &Entry| entry.tries.map_or(0, |tries| tries.left);
        (self.broken.is_some().cmp(&other.broken.is_some()))
            .then(self.is_bad().cmp(&other.is_bad()))
            .then(other.generation.cmp(&self.generation))
            .then(left(self).cmp(&left(other)))
    }
}

/// The name of the file: `headgate-7+2-1.conf`.
pub(super) fn file_name(generation: u64, tries: Option<Tries>) -> String {
    match tries {
        None => format!("headgate-{generation}.conf"),
        Some(Tries { left, done: 0 }) => format!("headgate-{generation}+{left}.conf"),
        Some(Tries { left, done }) => format!("headgate-{generation}+{left}-{done}.conf"),
    }
}

/// What a file's name says, if it is one of ours.
pub(super) fn parse_name(name: &str) -> Option<(u64, Option<Tries>)> {
    let rest = name.strip_prefix("headgate-")?.strip_suffix(".conf")?;
    let (generation, counter) = match rest.split_once('+') {
        None => (rest, None),
        Some((generation, counter)) => (generation, Some(counter)),
    };
    // As it is written here, or it is somebody else's: two names must not mean one generation.
    if generation.starts_with('0') || !generation.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let tries = match counter {
        None => None,
        Some(counter) => {
            let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
            Some(Tries {
                left: number(left)?,
                done: number(done)?,
            })
        }
    };
    Some((generation.parse().ok()?, tries))
}

fn number(text: &str) -> Option<u32> {
    let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    // systemd has them as `int`.
    let number = text.parse().ok().filter(|_| is_number)?;
    (number <= i32::MAX as u32).then_some(number)
}

/// What an entry is made of. Paths are those on the EFI system partition.
pub(super) struct Text<'a> {
    pub title: &'a str,
    pub generation: u64,
    pub kernel: &'a str,
    pub initrd: Option<&'a str>,
    pub init: &'a str,
    pub kernel_params: &'a [String],
}

impl Text<'_> {
    /// `sort-key` comes before `version`: without it systemd-boot sorts by the file's name.
    pub(super) fn render(&self) -> String {
        let Text {
            generation,
            kernel,
            init,
            ..
        } = self;
        let title = self.title.replace(char::is_control, " ");
        let initrd = self
            .initrd
            .map_or(String::new(), |initrd| format!("initrd {initrd}\n"));
        let params: String = (self.kernel_params.iter())
            .flat_map(|param| [" ", param])
            .collect();
        format!(
            "title {title}\nsort-key headgate\nversion {generation}\nlinux {kernel}\n{initrd}options init={init}{params}\n"
        )
    }
}

/// What an entry says, ours or somebody else's.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parsed {
    pub title: Option<String>,
    /// Of `linux`, `efi` and `initrd`: the files on the partition that it needs.
    pub files: Vec<String>,
    pub toplevel: Option<String>,
    pub starts_something: bool,
}

pub(super) fn parse(text: &[u8]) -> Parsed {
    let mut parsed = Parsed::default();
    for line in String::from_utf8_lossy(text).lines() {
        let Some((key, value)) = line.trim().split_once([' ', '\t']) else {
            continue;
        };
        let value = value.trim();
        match key {
            "title" => parsed.title = Some(value.to_owned()),
            "linux" | "efi" | "initrd" => {
                parsed.starts_something |= key != "initrd";
                parsed.files.push(value.to_owned());
            }
            "options" => {
                let init = value
                    .split_whitespace()
                    .find_map(|option| option.strip_prefix("init="));
                let toplevel = init.and_then(|init| init.strip_suffix("/init"));
                parsed.toplevel = toplevel
                    .filter(|path| is_store_path(path))
                    .map(str::to_owned);
            }
            _ => {}
        }
    }
    parsed
}

/// A path in an entry below the partition's mount point; None if it leads out of it.
pub(super) fn below(esp: &Path, file: &str) -> Option<PathBuf> {
    let parts: Vec<&str> = file
        .split(['/', '\\'])
        .filter(|part| !part.is_empty())
        .collect();
    (!parts.contains(&"..")).then(|| {
        parts
            .iter()
            .fold(esp.to_owned(), |path, part| path.join(part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> Entry {
        let (generation, tries) = parse_name(name).unwrap();
        Entry {
            generation,
            tries,
            file: PathBuf::from(name),
            title: None,
            toplevel: None,
            broken: None,
        }
    }

    fn in_order(names: &[&str]) -> Vec<String> {
        let mut entries: Vec<Entry> = names.iter().map(|name| entry(name)).collect();
        entries.sort_by(Entry::order);
        (entries.iter())
            .map(|entry| entry.file.display().to_string())
            .collect()
    }

    #[test]
    fn a_name_carries_generation_and_tries_and_comes_back_from_them() {
        for (name, generation, tries) in [
            ("headgate-1.conf", 1, None),
            ("headgate-12+3.conf", 12, Some((3, 0))),
            ("headgate-12+2-1.conf", 12, Some((2, 1))),
            ("headgate-12+0-3.conf", 12, Some((0, 3))),
            ("headgate-18446744073709551615.conf", u64::MAX, None),
        ] {
            let tries = tries.map(|(left, done)| Tries { left, done });
            assert_eq!(parse_name(name), Some((generation, tries)), "{name}");
            assert_eq!(file_name(generation, tries), name);
        }
    }

    #[test]
    fn names_that_are_not_ours_are_left_to_whoever_they_belong_to() {
        for name in [
            "nixos-generation-1.conf",
            "headgate-.conf",
            "headgate-1.conf.bak",
            "headgate-01.conf",
            "headgate-+3.conf",
            "headgate-1+.conf",
            "headgate-1+3-.conf",
            "headgate-1+-3.conf",
            "headgate-1+three.conf",
            "headgate-1++3.conf",
            "headgate-1+2147483648.conf",
            "headgate-18446744073709551616.conf",
            ".headgate-1.conf",
        ] {
            assert_eq!(parse_name(name), None, "{name}");
        }
    }

    #[test]
    fn the_newest_comes_first_and_once_it_is_bad_the_one_before() {
        let newest = ["headgate-10+3.conf", "headgate-9.conf", "headgate-8.conf"];
        assert_eq!(in_order(&newest), newest);
        assert_eq!(
            in_order(&["headgate-10+0-3.conf", "headgate-8.conf", "headgate-9.conf"]),
            ["headgate-9.conf", "headgate-8.conf", "headgate-10+0-3.conf"]
        );
    }

    #[test]
    fn of_two_files_for_one_generation_the_one_that_says_more_comes_first() {
        assert_eq!(
            in_order(&[
                "headgate-2+3.conf",
                "headgate-2+2-1.conf",
                "headgate-2.conf"
            ]),
            [
                "headgate-2.conf",
                "headgate-2+2-1.conf",
                "headgate-2+3.conf"
            ]
        );
    }

    #[test]
    fn an_entry_says_what_it_was_made_of_and_a_title_makes_no_line_of_its_own() {
        let toplevel = "/nix/store/00000000000000000000000000000000-nixos-system";
        let text = Text {
            title: "two\nlinux /evil",
            generation: 7,
            kernel: "/EFI/headgate/k-kernel.efi",
            initrd: Some("/EFI/headgate/i-initrd"),
            init: &format!("{toplevel}/init"),
            kernel_params: &["quiet".into(), "panic=10".into()],
        }
        .render();
        assert_eq!(
            text,
            format!(
                "title two linux /evil\nsort-key headgate\nversion 7\nlinux /EFI/headgate/k-kernel.efi\n\
                 initrd /EFI/headgate/i-initrd\noptions init={toplevel}/init quiet panic=10\n"
            )
        );
        let parsed = parse(text.as_bytes());
        assert_eq!(
            parsed.files,
            ["/EFI/headgate/k-kernel.efi", "/EFI/headgate/i-initrd"]
        );
        assert_eq!(parsed.toplevel.as_deref(), Some(toplevel));
        assert!(parsed.starts_something);
    }

    #[test]
    fn rubbish_in_an_entry_is_no_entry() {
        for text in [
            &b""[..],
            b"linux",
            b"\xff\xfe\x00l",
            b"# linux /k",
            b"title only\n",
        ] {
            assert!(!parse(text).starts_something, "{text:?}");
        }
        assert_eq!(parse(b"options init=/etc/passwd").toplevel, None);
    }

    #[test]
    fn a_path_in_an_entry_never_leads_out_of_the_partition() {
        let esp = Path::new("/boot");
        assert_eq!(below(esp, "/EFI//a").unwrap(), Path::new("/boot/EFI/a"));
        assert_eq!(below(esp, r"\EFI\a").unwrap(), Path::new("/boot/EFI/a"));
        assert_eq!(below(esp, "/EFI/../../etc/passwd"), None);
    }
}
