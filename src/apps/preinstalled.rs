//! Apps that are part of the system: folders that the gateway reads at its start and never writes.
//!
//! The folder that `apps.preinstalled` names has one folder for each app, called as the app is, with
//! its manifest and either its precompiled component, `NAME.cwasm`, or the component itself. Native
//! code is run as it is found, so nobody but the gateway's user and root may be able to change it.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::AppError;
use super::manifest::{Defaults, MANIFEST_FILE, Manifest};
use super::precompiled::{self, Precompiled};
use crate::regular_file::{ReadError, RegularFile};

/// Takes the place of a component's `.wasm` in the file name of its compiled form.
pub const PRECOMPILED_EXTENSION: &str = "cwasm";

/// Largest file that is read. Compiled code is some three times as large as its component.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// An app's folder.
#[derive(Clone, Debug)]
pub(super) struct AppFolder {
    /// The name of the app, and the last part of `path`.
    pub(super) name: String,
    path: PathBuf,
}

/// What an app's folder has to run.
pub(super) enum Code {
    Precompiled {
        path: PathBuf,
        file: Box<Precompiled>,
    },
    Component(Vec<u8>),
}

/// The folders in `folder`, by name. What isn't a folder, or is hidden, doesn't count.
pub(super) fn scan(folder: &Path) -> Result<Vec<AppFolder>, AppError> {
    let unusable = |reason: String| AppError::PreinstalledFolder {
        path: folder.to_owned(),
        reason,
    };
    let failed = |error: io::Error| unusable(error.to_string());
    let real = fs::canonicalize(folder).map_err(failed)?;
    let metadata = fs::metadata(&real).map_err(failed)?;
    if !metadata.is_dir() {
        return Err(unusable("not a folder".into()));
    }
    check_ways(&real).map_err(unusable)?;
    check_owner(&real, &metadata).map_err(unusable)?;
    check_mode(&real, &metadata).map_err(unusable)?;
    let mut apps = Vec::new();
    for entry in fs::read_dir(&real).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && !name.starts_with('.') {
            let name = name.into_owned();
            apps.push(AppFolder { name, path });
        }
    }
    apps.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(apps)
}

impl AppFolder {
    /// Reads the manifest. The error says which file, and why.
    pub(super) fn manifest(&self, defaults: &Defaults) -> Result<Arc<Manifest>, String> {
        let path = self.path.join(MANIFEST_FILE);
        let text = String::from_utf8(self.read(&path)?)
            .map_err(|_| format!("{}: not UTF-8, so not a manifest", path.display()))?;
        let manifest = Manifest::parse(&text, defaults)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        if manifest.name != self.name {
            return Err(format!(
                "{}: the app is called {:?} there, and its folder {:?}; give both one name",
                path.display(),
                manifest.name,
                self.name
            ));
        }
        Ok(Arc::new(manifest))
    }

    /// Reads what `manifest` names, compiled if it is there so. The error says which file, and why.
    pub(super) fn code(&self, manifest: &Manifest) -> Result<Code, String> {
        let component = self.path.join(&manifest.component);
        let compiled = component.with_extension(PRECOMPILED_EXTENSION);
        if compiled.exists() {
            let file = precompiled::decode(self.read(&compiled)?)
                .map_err(|damage| format!("{}: {damage}", compiled.display()))?;
            return Ok(Code::Precompiled {
                path: compiled,
                file: Box::new(file),
            });
        }
        if component.exists() {
            return self.read(&component).map(Code::Component);
        }
        Err(format!(
            "neither {} nor {} is there; make the folder with `headgate app compile`",
            compiled.display(),
            component.display()
        ))
    }

    /// The manifest's text and the component, as they could be installed elsewhere. None if there is but
    /// compiled code.
    pub(super) fn package(&self, manifest: &Manifest) -> Result<Option<(String, Vec<u8>)>, String> {
        let component = self.path.join(&manifest.component);
        if !component.exists() {
            return Ok(None);
        }
        let path = self.path.join(MANIFEST_FILE);
        let text = String::from_utf8(self.read(&path)?)
            .map_err(|_| format!("{}: not UTF-8, so not a manifest", path.display()))?;
        Ok(Some((text, self.read(&component)?)))
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, String> {
        read_trusted(path).map_err(|reason| format!("{}: {reason}", path.display()))
    }
}

/// Reads a regular file that nobody but root and the gateway's user can have put in its place.
fn read_trusted(path: &Path) -> Result<Vec<u8>, String> {
    // Behind all links; and from the root of the file system down to the file's folder only those two
    // can change anything, so it is still the same file when it is opened.
    let real = fs::canonicalize(path).map_err(|error| error.to_string())?;
    check_ways(&real)?;
    let failed = |error: ReadError| error.to_string();
    let file = RegularFile::open(&real, libc::O_NOFOLLOW).map_err(failed)?;
    check_owner(&real, file.metadata())?;
    check_mode(&real, file.metadata())?;
    file.read(MAX_FILE_BYTES).map_err(failed)
}

/// Checks the folders on the way to `real`, which has no links in it. In one with the sticky bit others,
/// but for its owner, can add things and not move those that are there.
fn check_ways(real: &Path) -> Result<(), String> {
    const STICKY: u32 = 0o1000;
    for folder in real.ancestors().skip(1) {
        let metadata = fs::symlink_metadata(folder)
            .map_err(|error| format!("{}: {error}", folder.display()))?;
        check_owner(folder, &metadata)?;
        if metadata.mode() & STICKY == 0 {
            check_mode(folder, &metadata)?;
        }
    }
    Ok(())
}

/// Whether it is somebody else's.
fn check_owner(path: &Path, metadata: &Metadata) -> Result<(), String> {
    // The owner of its entry in /proc is the effective user of a process.
    let ours = fs::metadata("/proc/self").map_or(0, |entry| entry.uid());
    if ![0, ours].contains(&metadata.uid()) {
        return Err(format!(
            "{} belongs to user {}, who could put any code here; chown it to root",
            path.display(),
            metadata.uid()
        ));
    }
    Ok(())
}

/// Whether somebody else may write to it.
fn check_mode(path: &Path, metadata: &Metadata) -> Result<(), String> {
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
        return Err(format!(
            "others may write to {path} (mode {:o}), and so put any code here; run: chmod go-w {path}",
            metadata.mode() & 0o7777,
            path = path.display()
        ));
    }
    Ok(())
}
