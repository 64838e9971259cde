//! Any bytes are a NAR, which unpacked and packed again is the same bytes, or an error; nothing is ever
//! written beside the place that it goes to.
#![no_main]

use std::fs::{self, File};
use std::os::fd::AsFd;

use headgate::ota::cache::nar::unpack;
use libfuzzer_sys::fuzz_target;
use nix_archive::nar::{CaseHack, encode_path};
use nix_derivation::{HashAlgorithm, NixHash, hash_bytes};
use tempfile::TempDir;

const WORDS: [&[u8]; 15] = [
    b"nix-archive-1",
    b"(",
    b")",
    b"type",
    b"regular",
    b"directory",
    b"symlink",
    b"contents",
    b"executable",
    b"",
    b"entry",
    b"name",
    b"node",
    b"target",
    b"..",
];

/// The bytes as they are, or words of NARs that they choose, and words that are not.
fn nar(bytes: &[u8]) -> Vec<u8> {
    let Some((0, mut choices)) = bytes.split_first().map(|(first, rest)| (first % 2, rest)) else {
        return bytes.to_vec();
    };
    let mut nar = Vec::new();
    while let Some((choice, rest)) = choices.split_first() {
        choices = rest;
        let word = WORDS.get(usize::from(*choice)).copied().unwrap_or_else(|| {
            let (word, rest) = choices.split_at(choices.len().min(usize::from(choice % 8)));
            choices = rest;
            word
        });
        nar.extend((word.len() as u64).to_le_bytes());
        nar.extend(word);
        nar.resize(nar.len().next_multiple_of(8), 0);
    }
    nar
}

fuzz_target!(|bytes: &[u8]| {
    let bytes = nar(bytes);
    let bytes = bytes.as_slice();
    thread_local! {
        static FOLDER: TempDir = tempfile::tempdir().unwrap();
    }
    FOLDER.with(|folder| {
        let NixHash::Sha256(hash) = hash_bytes(HashAlgorithm::Sha256, bytes) else {
            unreachable!()
        };
        let open = File::open(folder.path()).unwrap();
        let place = folder.path().join("x");
        let unpacked = unpack(bytes, bytes.len() as u64, &hash, open.as_fd(), "x");
        if unpacked.is_ok() {
            let mut again = Vec::new();
            encode_path(&mut again, &place, CaseHack::Disabled).unwrap();
            assert!(again == bytes);
        }
        if let Ok(metadata) = place.symlink_metadata() {
            if metadata.is_dir() {
                // As root, which the fuzzer may not be, nothing has to be made writable.
                let _ = std::process::Command::new("chmod")
                    .args(["-R", "u+w"])
                    .arg(&place)
                    .status();
                fs::remove_dir_all(&place).unwrap();
            } else {
                fs::remove_file(&place).unwrap();
            }
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    });
});
