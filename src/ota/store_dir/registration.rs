//! What an image says about the paths that it came with: the format that `nix-store --load-db` reads and
//! nixpkgs' `closureInfo` writes. Of each path, a line each: the path, the SHA-256 of its NAR, the NAR's
//! size, what it was made from (or nothing), how many references follow, the references.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use nix_derivation::{NixHash, StorePath};

use super::{Known, StoreError};

/// Reads a registration. Without a file, nothing is registered.
pub(super) fn load(file: &Path) -> Result<HashMap<StorePath, Known>, StoreError> {
    match fs::read_to_string(file) {
        Ok(text) => parse(&text).map_err(|(line, why)| StoreError::Registration {
            file: file.to_owned(),
            line,
            why,
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(HashMap::new()),
        Err(error) => Err(StoreError::new("read", file, error)),
    }
}

fn parse(text: &str) -> Result<HashMap<StorePath, Known>, (usize, String)> {
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line));
    let mut registered = HashMap::new();
    while let Some((number, line)) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let path = store_path(number, line)?;
        let mut field = |what: &str| {
            lines
                .next()
                .ok_or((number, format!("{path} has no {what}")))
        };
        let (at, hash) = field("hash")?;
        // Nix takes it with the algorithm's name and without.
        let nar_hash = if hash.contains([':', '-']) {
            NixHash::parse(hash)
        } else {
            NixHash::parse(&format!("sha256:{hash}"))
        }
        .map_err(|error| (at, error.to_string()))?;
        let (at, size) = field("size")?;
        let nar_size = number_of(at, size)?;
        field("line for what it was made from")?;
        let (at, count) = field("number of references")?;
        let count = number_of(at, count)?;
        let mut references = Vec::new();
        for _ in 0..count {
            let (at, reference) = field("such number of references")?;
            references.push(store_path(at, reference)?);
        }
        registered.insert(
            path,
            Known {
                nar_hash,
                nar_size,
                references,
            },
        );
    }
    Ok(registered)
}

fn store_path(line: usize, text: &str) -> Result<StorePath, (usize, String)> {
    text.parse()
        .map_err(|error| (line, format!("{text:?} is no store path: {error}")))
}

fn number_of(line: usize, text: &str) -> Result<u64, (usize, String)> {
    text.parse()
        .map_err(|_| (line, format!("{text:?} is no number")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "/nix/store/00000000000000000000000000000000-a";
    const B: &str = "/nix/store/11111111111111111111111111111111-b";

    #[test]
    fn each_path_has_its_hash_size_and_references() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let text = format!("{A}\n{hex}\n120\n\n2\n{A}\n{B}\n{B}\nsha256:{hex}\n7\n{A}.drv\n0\n");
        let registered = parse(&text).unwrap();
        let [a, b] = [A, B].map(|path| path.parse::<StorePath>().unwrap());
        assert_eq!(registered[&a].references, [a.clone(), b.clone()]);
        assert_eq!((registered[&a].nar_size, registered[&b].nar_size), (120, 7));
        assert_eq!(registered[&a].nar_hash, registered[&b].nar_hash);
        assert!(registered[&b].references.is_empty());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for (text, line) in [
            ("/tmp/x\n".to_owned(), 1),
            (format!("{A}\nxyz\n1\n\n0\n"), 2),
            (format!("{A}\n{hex}\nmany\n\n0\n"), 3),
            (format!("{A}\n{hex}\n1\n\n-1\n"), 5),
            (format!("{A}\n{hex}\n1\n\n1\n/etc\n"), 6),
            (format!("{A}\n{hex}\n1\n\n1000000000000\n"), 1),
        ] {
            assert_eq!(parse(&text).unwrap_err().0, line, "{text}");
        }
    }
}
