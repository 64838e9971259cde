//! What the files that decide on access have in common.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{AccessError, PASSWORD_FILE};
pub(super) use crate::regular_file::{FileError, Flaw, line_of, read_and_parse as read};

/// Reads the file that `key` of the configuration names, and makes of it what `parse` does.
pub(super) fn load<T>(
    key: &'static str,
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, Flaw>,
) -> Result<T, AccessError> {
    let if_missing = match key {
        PASSWORD_FILE => MAKE_PASSWORD_FILE,
        _ => "make it, or set the key to \"\"",
    };
    read(path, if_missing, parse).map_err(|FileError { place, reason }| AccessError {
        key,
        place,
        reason,
    })
}

/// What to do where there is no password file.
pub(super) const MAKE_PASSWORD_FILE: &str = "make it with `headgate user add NAME`";

/// A secret that others can read may be known to them.
pub(super) fn warn_if_open(key: &'static str, path: &Path) {
    let mode = path.metadata().map_or(0, |file| file.permissions().mode());
    if mode & 0o007 != 0 {
        tracing::warn!(
            path = %path.display(),
            "everybody on this machine can get at the file of {key} (mode {:o}); run: chmod o= FILE",
            mode & 0o777
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as_text(contents: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), contents).unwrap();
        let text = |bytes: &[u8]| Ok(String::from_utf8(bytes.to_vec()).unwrap());
        load("mqtt.auth.acl_file", file.path(), text).unwrap()
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_what_a_file_says() {
        assert_eq!(read_as_text("\u{feff}anna:x".as_bytes()), "anna:x");
        assert_eq!(read_as_text("anna:\u{feff}".as_bytes()), "anna:\u{feff}");
        assert_eq!(read_as_text(b""), "");
    }

    #[test]
    fn of_a_missing_file_it_is_said_how_to_make_it() {
        let nothing = |_: &[u8]| Ok(());
        for (key, remedy) in [
            (PASSWORD_FILE, "make it with `headgate user add NAME`"),
            ("mqtt.auth.acl_file", "set the key to \"\""),
        ] {
            let error = load(key, Path::new("/nope"), nothing).unwrap_err();
            let error = error.to_string();
            assert!(error.starts_with(&format!("{key}: /nope: ")), "{error}");
            assert!(error.ends_with(remedy), "{error}");
        }
        let error = read(Path::new("/nope"), MAKE_PASSWORD_FILE, nothing).unwrap_err();
        assert!(error.to_string().starts_with("/nope: "), "{error}");
    }
}
