//! Where things are.

use anyhow::{Context, Result};
use std::env;
use std::path::{Path, PathBuf};

/// The source tree and the directory that is built into.
pub struct Tree {
    pub root: PathBuf,
    /// Cargo's target directory of the root workspace.
    pub target: PathBuf,
}

impl Tree {
    pub fn find() -> Result<Self> {
        // Cargo sets it when it runs this program; the compile-time value is for a run by hand.
        let manifest_dir = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest_dir
            .parent()
            .context("xtask/ has a parent directory")?
            .to_path_buf();
        let target = ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR"]
            .into_iter()
            .find_map(|name| env::var_os(name).filter(|value| !value.is_empty()))
            .map_or_else(|| root.join("target"), PathBuf::from);
        let target = std::path::absolute(&target)
            .with_context(|| format!("cannot resolve the target directory {}", target.display()))?;
        Ok(Tree { root, target })
    }

    /// The workspace of the sample apps and the SDK.
    pub fn apps(&self) -> PathBuf {
        self.root.join("apps")
    }

    /// Where the built apps lie, a directory each, ready for `headgate app install`.
    pub fn apps_out(&self) -> PathBuf {
        self.target.join("apps")
    }

    /// The apps' own target directory: within the root's, but with a lock of its own, because the
    /// cargo that runs this program may hold the root's.
    pub fn guest_target(&self) -> PathBuf {
        self.target.join("guest")
    }
}

/// The app directories in `apps`: those with a manifest, by name.
pub fn app_dirs(apps: &Path) -> Result<Vec<PathBuf>> {
    let mut dirs = Vec::new();
    for entry in apps
        .read_dir()
        .with_context(|| format!("cannot list {}", apps.display()))?
    {
        let dir = entry?.path();
        if dir.join("manifest.toml").is_file() {
            dirs.push(dir);
        }
    }
    dirs.sort();
    Ok(dirs)
}
