//! Where a file is: on this machine, or behind HTTP.

use std::fmt;
use std::path::PathBuf;

use super::fault::{CacheError, Fault};

/// A file, or the folder that a cache is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Location {
    File(PathBuf),
    Http(String),
}

impl Location {
    /// Takes `file://`, `http://` and `https://`.
    pub(super) fn parse(url: &str) -> Result<Self, CacheError> {
        let wrong = |why| CacheError::Url {
            url: url.to_owned(),
            why,
        };
        if url.contains(|c: char| c.is_control() || c.is_whitespace()) {
            return Err(wrong("it contains blanks or control characters"));
        }
        if let Some(path) = url.strip_prefix("file://") {
            if !path.starts_with('/') {
                return Err(wrong(
                    "after file:// comes a path from the root, as in file:///mnt/cache",
                ));
            }
            return Ok(Self::File(PathBuf::from(path)));
        }
        let host = url
            .strip_prefix("https://")
            .or_else(|| url.strip_prefix("http://"))
            .ok_or_else(|| wrong("it has to begin with https://, http:// or file://"))?;
        if host.is_empty() || host.starts_with('/') {
            return Err(wrong("it names no host"));
        }
        if url.contains(['?', '#']) {
            return Err(wrong("parameters (?) and fragments (#) are not taken"));
        }
        Ok(Self::Http(url.trim_end_matches('/').to_owned()))
    }

    /// A file below this folder. What a narinfo names is not to be believed: it must not lead elsewhere.
    pub(super) fn file(&self, relative: &str) -> Result<Self, Fault> {
        let (path, _) = relative.split_once('?').unwrap_or((relative, ""));
        let is_plain = !relative
            .contains(|c: char| !c.is_ascii_graphic() || matches!(c, '\\' | '#' | ':'))
            && path
                .split('/')
                .all(|part| !part.is_empty() && part != "." && part != "..");
        if !is_plain {
            return Err(Fault::Url(format!("{relative:?}")));
        }
        Ok(match self {
            Self::File(folder) => Self::File(folder.join(relative)),
            Self::Http(base) => Self::Http(format!("{base}/{relative}")),
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::Http(url) => f.write_str(url),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_cache_are_below_it() {
        for cache in ["file:///mnt/cache", "https://cache.example.org/headgate/"] {
            let cache = Location::parse(cache).unwrap();
            for good in ["nar/x.nar.zst", "x.narinfo", "nar/1.nar?hash=1"] {
                let file = cache.file(good).unwrap().to_string();
                assert!(
                    file.ends_with(&format!("/{good}")) && !file.contains("e//"),
                    "{file}"
                );
            }
            for bad in [
                "",
                "/etc/passwd",
                "../x",
                "nar/../../x",
                "nar//x",
                "nar/./x",
                "https://other.example.org/x",
                "file:///etc/passwd",
                "//other.example.org/x",
                "nar/a b",
                "nar/\n",
                "nar\\..\\x",
                "nar/ü",
            ] {
                assert!(matches!(cache.file(bad), Err(Fault::Url(_))), "{bad}");
            }
        }
    }

    #[test]
    fn urls_that_name_no_cache_are_refused() {
        for bad in [
            "",
            "cache",
            "/mnt/cache",
            "file://mnt",
            "ftp://x",
            "http://",
            "https:///x",
            "https://x/?a=1",
            "https://x y",
            "s3://bucket",
        ] {
            assert!(Location::parse(bad).is_err(), "{bad}");
        }
    }
}
