//! What a cache says about a store path, and whether to believe it.

use nix_derivation::{NixHash, StoreDir, StorePath};
use nix_narinfo::{Compression, NarInfo, TrustedPublicKey};

use super::fault::Fault;

/// The name of a path's narinfo in a cache and in the folder of those that are kept.
pub fn file_name(path: &StorePath) -> String {
    format!("{}.narinfo", hash_part(path))
}

/// The 32 letters that a store path begins with.
pub fn hash_part(path: &StorePath) -> String {
    nix_derivation::nixbase32::encode(path.digest())
}

/// Reads a narinfo and checks that it is the one of `asked`, signed by a trusted key, and about a NAR that
/// can be fetched.
pub fn verify(
    bytes: &[u8],
    asked: &StorePath,
    keys: &[TrustedPublicKey],
) -> Result<NarInfo, Fault> {
    let store = StoreDir::default();
    let info = NarInfo::parse_in(&store, bytes)?;
    if info.store_path() != asked {
        return Err(Fault::OtherPath {
            asked: asked.clone(),
            got: info.store_path().clone(),
        });
    }
    if !info.has_valid_signature(&store, keys) {
        return Err(Fault::Untrusted {
            trusted: names(keys.iter().map(|key| key.name.as_str())),
            by: names(
                info.signatures()
                    .iter()
                    .map(|signature| signature.key_name.as_str()),
            ),
        });
    }
    if !matches!(info.nar_hash(), NixHash::Sha256(_)) {
        return Err(Fault::HashKind);
    }
    match info.compression() {
        Compression::None | Compression::Xz | Compression::Zstd => {}
        other => return Err(Fault::Compression(other.to_string())),
    }
    Ok(info)
}

/// Names as somebody else has written them, short enough for an error.
fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<String> = names
        .take(8)
        .map(|name| {
            name.chars()
                .take(64)
                .flat_map(char::escape_default)
                .collect()
        })
        .collect();
    if names.is_empty() {
        "nobody".to_owned()
    } else {
        names.join(", ")
    }
}
