//! Caches made by hand, signed with a key that is trusted: to see what stops what a signature does not.

use std::fs;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use headgate::ota::cache::{Caches, PublicKey, Settings, narinfo};
use nix_archive::nar::{Node, encode_tree};
use nix_derivation::{HashAlgorithm, NixHash, StoreDir, StorePath, hash_bytes};
use nix_narinfo::{Compression, NarInfo, NarInfoBuilder, NixSignature};
use ring::signature::{Ed25519KeyPair, KeyPair};
use tempfile::TempDir;

use super::fetching::file_url;

pub struct Forge {
    pub cache: TempDir,
    key: Ed25519KeyPair,
}

pub fn path(name: &str) -> StorePath {
    let digest = hash_bytes(HashAlgorithm::Sha1, name.as_bytes());
    StorePath::from_parts(digest.digest_as_bytes().try_into().unwrap(), name).unwrap()
}

pub fn sha256(bytes: &[u8]) -> NixHash {
    hash_bytes(HashAlgorithm::Sha256, bytes)
}

impl Forge {
    pub fn new() -> Self {
        let cache = tempfile::tempdir().unwrap();
        fs::write(
            cache.path().join("nix-cache-info"),
            "StoreDir: /nix/store\n",
        )
        .unwrap();
        Self {
            cache,
            key: Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap(),
        }
    }

    pub fn public(&self) -> PublicKey {
        format!("forge-1:{}", STANDARD.encode(self.key.public_key()))
            .parse()
            .unwrap()
    }

    pub fn caches(&self) -> Caches {
        Caches::new(Settings {
            urls: vec![file_url(self.cache.path())],
            trusted_keys: vec![self.public()],
            ..Settings::default()
        })
        .unwrap()
    }

    /// Signs a description and puts it into the cache.
    pub fn describe(&self, builder: NarInfoBuilder) -> NarInfo {
        let info = builder.clone().build().unwrap();
        let fingerprint = info.fingerprint(&StoreDir::default());
        let signature = self.key.sign(fingerprint.as_bytes());
        let signature = NixSignature::from_bytes("forge-1", signature.as_ref()).unwrap();
        let info = builder.signature(signature).build().unwrap();
        self.put(
            &narinfo::file_name(info.store_path()),
            &info.to_canonical_bytes(),
        );
        info
    }

    /// A path with these bytes as its NAR, described as they are.
    pub fn nar(&self, name: &str, nar: &[u8]) -> NarInfo {
        self.put("x.nar", nar);
        self.describe(
            NarInfo::builder(path(name), "x.nar", sha256(nar), nar.len() as u64)
                .compression(Compression::None),
        )
    }

    pub fn put(&self, name: &str, bytes: &[u8]) {
        fs::write(self.cache.path().join(name), bytes).unwrap();
    }
}

/// The NAR of a file.
pub fn file_nar(content: &[u8]) -> Vec<u8> {
    let node = Node::Regular {
        executable: false,
        contents: content,
    };
    let mut nar = Vec::new();
    encode_tree(&mut nar, &node).unwrap();
    nar
}

/// Writes a NAR word by word, right or wrong.
pub fn words(words: &[&[u8]]) -> Vec<u8> {
    let mut nar = Vec::new();
    for word in words {
        nar.extend((word.len() as u64).to_le_bytes());
        nar.extend(*word);
        nar.resize(nar.len().next_multiple_of(8), 0);
    }
    nar
}

/// A folder with these entries, each a name and what is in it.
pub fn folder(entries: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut nar: Vec<&[u8]> = vec![b"nix-archive-1", b"(", b"type", b"directory"];
    for (name, content) in entries {
        nar.extend([&b"entry"[..], b"(", b"name", name, b"node"]);
        nar.extend([
            &b"("[..],
            b"type",
            b"regular",
            b"contents",
            content,
            b")",
            b")",
        ]);
    }
    nar.push(b")");
    words(&nar)
}
