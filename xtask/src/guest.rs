//! Builds the apps in `apps/`.

use crate::child;
use crate::tree::{Tree, app_dirs};
use anyhow::{Context, Result};
use headgate_guest::{TARGET, Toolchain, component, write_if_changed};
use std::fs;
use std::path::{Path, PathBuf};

/// Builds every app and returns the directories that they now lie in.
pub fn build_apps(tree: &Tree) -> Result<Vec<PathBuf>> {
    let toolchain = Toolchain::find()?;
    let apps = tree.apps();
    let dirs = app_dirs(&apps)?;
    let mut cargo = toolchain.cargo(&tree.root, "headgate");
    cargo
        .current_dir(&apps)
        .env("CARGO_TARGET_DIR", tree.guest_target())
        .arg("build")
        .args(toolchain.build_args())
        .args(["--locked", "--release", "--lib", "--target", TARGET]);
    for dir in &dirs {
        cargo
            .arg("--package")
            .arg(dir.file_name().context("an app's directory has a name")?);
    }
    child::run(&mut cargo)?;
    dirs.iter().map(|dir| package(tree, dir)).collect()
}

/// Wraps one app's module as a component and puts it beside its manifest.
fn package(tree: &Tree, source: &Path) -> Result<PathBuf> {
    let name = source
        .file_name()
        .context("an app's directory has a name")?
        .to_string_lossy();
    let module = tree
        .guest_target()
        .join(TARGET)
        .join("release")
        .join(format!("{}.wasm", name.replace('-', "_")));
    let out = tree.apps_out().join(&*name);
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    write_if_changed(&out.join(format!("{name}.wasm")), &component(&module)?)?;
    let manifest = source.join("manifest.toml");
    let manifest =
        fs::read(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    write_if_changed(&out.join("manifest.toml"), &manifest)?;
    Ok(out)
}
