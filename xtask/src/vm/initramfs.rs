//! An initramfs: a folder as the cpio archive that the kernel unpacks into memory.

use anyhow::{Context, Result};
use cpio::{NewcBuilder, write_cpio};
use std::fs::{self, File};
use std::io::{BufWriter, Cursor, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

type Entry = (NewcBuilder, Cursor<Vec<u8>>);

/// Writes all that is in `dir` to `archive`, as root's.
pub fn write(dir: &Path, archive: &Path) -> Result<()> {
    let mut entries = Vec::new();
    collect(dir, Path::new(""), &mut entries)
        .with_context(|| format!("cannot read {}", dir.display()))?;
    let written = File::create(archive)
        .and_then(|file| write_cpio(entries.into_iter(), BufWriter::new(file)))
        .and_then(|mut file| file.flush());
    written.with_context(|| format!("cannot write {}", archive.display()))
}

/// A folder comes before what is in it, as the kernel needs it.
fn collect(dir: &Path, name: &Path, entries: &mut Vec<Entry>) -> Result<()> {
    let mut children = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    children.sort_by_key(fs::DirEntry::file_name);
    for child in children {
        let (path, name) = (child.path(), name.join(child.file_name()));
        let metadata = fs::symlink_metadata(&path)?;
        let content = if metadata.is_file() {
            fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?
        } else if metadata.is_symlink() {
            fs::read_link(&path)?.as_os_str().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        let entry = NewcBuilder::new(&name.to_string_lossy()).mode(metadata.mode());
        entries.push((entry, Cursor::new(content)));
        if metadata.is_dir() {
            collect(&path, &name, entries)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod an_initramfs {
    use super::*;
    use cpio::NewcReader;
    use std::io::Read;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn has_folders_files_and_links_with_their_modes() -> Result<()> {
        let work = tempfile::tempdir()?;
        let (dir, archive) = (work.path().join("dir"), work.path().join("archive"));
        fs::create_dir_all(dir.join("bin"))?;
        fs::write(dir.join("init"), "#!/bin/sh\n")?;
        fs::set_permissions(dir.join("init"), fs::Permissions::from_mode(0o750))?;
        symlink("busybox", dir.join("bin/sh"))?;
        write(&dir, &archive)?;

        let mut found = Vec::new();
        let mut rest: Box<dyn Read> = Box::new(File::open(&archive)?);
        loop {
            let mut reader = NewcReader::new(rest)?;
            if reader.entry().is_trailer() {
                break;
            }
            let mut content = String::new();
            reader.read_to_string(&mut content)?;
            let entry = reader.entry();
            found.push((entry.name().to_owned(), entry.mode(), content));
            rest = reader.finish()?;
        }
        let folder = fs::metadata(dir.join("bin"))?.mode();
        assert_eq!(
            found,
            [
                ("bin".to_owned(), folder, String::new()),
                ("bin/sh".to_owned(), 0o120_777, "busybox".to_owned()),
                ("init".to_owned(), 0o100_750, "#!/bin/sh\n".to_owned()),
            ]
        );
        Ok(())
    }
}
