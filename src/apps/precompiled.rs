//! A component that was compiled elsewhere, as a file: `NAME.cwasm`.
//!
//! The file is native code that the gateway will run as itself. It has no signature: whoever loads
//! one must trust where it lies, which is why only [`super::preinstalled`] does. Its checksum is
//! against damage, not against an attacker.
//!
//! Layout: [`MAGIC`]; four bytes, little-endian, the length of the header; the header, as JSON;
//! BLAKE3 of the code, 32 bytes; the code, as wasmtime's `precompile_component` has made it.

use serde::{Deserialize, Serialize};

#[cfg(any(feature = "compiler", test))]
use super::target::Target;
use crate::store::ComponentId;

/// Begins each file; its last byte is the version of the layout.
const MAGIC: &[u8; 8] = b"HGCODE\0\x01";

/// A header has some 200 bytes.
const MAX_HEADER: usize = 4096;

const CHECKSUM_BYTES: usize = 32;

/// What the file says about the code in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    /// SHA-256 of the component that was compiled, in lower-case hex.
    component_sha256: String,
    pub(super) component_bytes: u64,
    /// A Rust target triple.
    pub(super) target: String,
    pub(super) cpu: String,
    /// Version of the headgate that compiled.
    pub(super) compiled_by: String,
}

/// A file that was read.
#[derive(Debug, PartialEq)]
pub(super) struct Precompiled {
    pub(super) header: Header,
    pub(super) component: ComponentId,
    /// As wasmtime takes it. Its checksum was right.
    pub(super) code: Vec<u8>,
}

/// Why a file can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Damage {
    #[error("it is no precompiled app; make one with `headgate app compile`")]
    NotPrecompiled,
    #[error("it was made by another version of Headgate; compile the app again with this one")]
    OtherLayout,
    #[error("it is damaged ({0}); put a fresh copy in its place")]
    Damaged(&'static str),
}

/// The bytes of a file with `code`, which is `component` compiled for `target`.
#[cfg(any(feature = "compiler", test))]
pub(super) fn encode(component: &[u8], target: &Target, code: &[u8]) -> Vec<u8> {
    let header = Header {
        component_sha256: ComponentId::of(component).to_string(),
        component_bytes: component.len() as u64,
        target: target.triple().to_owned(),
        cpu: target.cpu().to_owned(),
        compiled_by: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let header = serde_json::to_vec(&header).expect("strings and numbers are always JSON");
    let length = u32::try_from(header.len()).expect("a header is short");
    [
        MAGIC,
        length.to_le_bytes().as_slice(),
        &header,
        checksum(&header, code).as_bytes(),
        code,
    ]
    .concat()
}

/// Reads what [`encode`] has written.
pub(super) fn decode(mut file: Vec<u8>) -> Result<Precompiled, Damage> {
    let (magic, rest) = file
        .split_first_chunk::<{ MAGIC.len() }>()
        .ok_or(Damage::NotPrecompiled)?;
    if magic != MAGIC {
        let same_but_version = magic[..MAGIC.len() - 1] == MAGIC[..MAGIC.len() - 1];
        return Err(match same_but_version {
            true => Damage::OtherLayout,
            false => Damage::NotPrecompiled,
        });
    }
    let cut_short = Damage::Damaged("it is cut short");
    let (length, rest) = rest.split_first_chunk().ok_or(cut_short.clone())?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > MAX_HEADER {
        return Err(Damage::Damaged("its header is too long"));
    }
    let (header, rest) = rest.split_at_checked(length).ok_or(cut_short.clone())?;
    let (expected, code) = rest
        .split_first_chunk::<CHECKSUM_BYTES>()
        .ok_or(cut_short)?;
    if checksum(header, code) != blake3::Hash::from_bytes(*expected) {
        return Err(Damage::Damaged("its checksum is wrong"));
    }
    let header: Header =
        serde_json::from_slice(header).map_err(|_| Damage::Damaged("its header is no JSON"))?;
    let component = header
        .component_sha256
        .parse()
        .map_err(|_| Damage::Damaged("its component's name is no SHA-256"))?;
    let code_at = file.len() - code.len();
    file.drain(..code_at);
    Ok(Precompiled {
        header,
        component,
        code: file,
    })
}

fn checksum(header: &[u8], code: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header);
    hasher.update(code);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file() -> Vec<u8> {
        let target = Target::new(Some("aarch64-unknown-linux-gnu"), Some("cortex-a72")).unwrap();
        encode(b"wasm", &target, b"code")
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        let read = decode(file()).unwrap();
        assert_eq!(read.code, b"code");
        assert_eq!(read.component, ComponentId::of(b"wasm"));
        assert_eq!(
            (read.header.target.as_str(), read.header.cpu.as_str()),
            ("aarch64-unknown-linux-gnu", "cortex-a72")
        );
        assert_eq!(read.header.component_bytes, 4);
    }

    #[test]
    fn any_changed_byte_and_any_missing_end_is_noticed() {
        let whole = file();
        for position in 0..whole.len() {
            let mut changed = whole.clone();
            changed[position] ^= 1;
            assert!(decode(changed).is_err(), "byte {position}");
            assert!(
                decode(whole[..position].to_vec()).is_err(),
                "cut at {position}"
            );
        }
    }

    #[test]
    fn a_component_in_its_place_is_told_apart_from_damage() {
        assert_eq!(
            decode(b"\0asm\x0d\0\x01\0rest".to_vec()),
            Err(Damage::NotPrecompiled)
        );
        let mut newer = file();
        newer[7] = 9;
        assert_eq!(decode(newer), Err(Damage::OtherLayout));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(tail.clone());
            let _ = decode([MAGIC.as_slice(), &tail].concat());
        }
    }
}
