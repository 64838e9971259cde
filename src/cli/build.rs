//! `headgate app build`: a component from an app's Rust sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use clap::Args;
use headgate_guest::{TARGET, Toolchain, component, write_if_changed};
use serde::Deserialize;

use super::output::Output;
use super::package::read_manifest;
use crate::apps::MANIFEST_FILE;

/// Build an app that is written in Rust
///
/// Needs cargo and a compiler for wasm32-unknown-unknown. Writes TARGET/apps/NAME/NAME.wasm and
/// manifest.toml there, where TARGET is cargo's target folder. `app install`, `app test` and `app
/// compile` find them there.
#[derive(Args)]
pub(super) struct BuildArgs {
    /// Folder with Cargo.toml and manifest.toml
    #[arg(default_value = ".")]
    path: PathBuf,
}

pub(super) fn run(args: BuildArgs, output: &Output) -> anyhow::Result<()> {
    let built = build(&args.path)?;
    if output.json {
        return output.value(&serde_json::json!({
            "app": built.name,
            "path": built.component,
            "bytes": built.bytes,
        }));
    }
    output.text(format!(
        "{}: {} bytes in {}",
        built.name,
        built.bytes,
        built.component.display()
    ))
}

/// Whether the folder holds sources that [`build`] can build.
pub(super) fn is_source(folder: &Path) -> bool {
    folder.join("Cargo.toml").is_file()
}

/// What was built.
pub(super) struct Built {
    pub(super) name: String,
    /// With the manifest beside it.
    pub(super) component: PathBuf,
    bytes: usize,
}

/// Builds the app in `folder`. Cargo says on standard error what it does.
pub(super) fn build(folder: &Path) -> anyhow::Result<Built> {
    let (text, manifest) = read_manifest(&folder.join(MANIFEST_FILE))?;
    if !is_source(folder) {
        bail!(
            "{}: there is no Cargo.toml in this folder; only apps in Rust are built so",
            folder.display()
        );
    }
    let toolchain = Toolchain::find()?;
    let crate_ = Crate::find(&toolchain, folder)?;
    let mut cargo = toolchain.cargo(&crate_.workspace, &crate_.package);
    cargo
        .arg("build")
        .args(toolchain.build_args())
        .args(["--release", "--lib", "--target", TARGET])
        .args(["--package", &crate_.package])
        .current_dir(folder)
        .env("CARGO_TARGET_DIR", &crate_.target);
    let status = cargo.stdout(Stdio::null()).status();
    if !status.context("cannot start cargo")?.success() {
        bail!("app {}: cargo has failed; see above", manifest.name);
    }
    let module = crate_.target.join(TARGET).join("release");
    let module = module.join(format!("{}.wasm", crate_.library));
    let component = component(&module).with_context(|| {
        format!(
            "app {}: does the crate use headgate_sdk's `app` attribute or `export!`?",
            manifest.name
        )
    })?;
    let out = crate_.target.join("apps").join(&manifest.name);
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let path = out.join(&manifest.component);
    write_if_changed(&path, &component)?;
    write_if_changed(&out.join(MANIFEST_FILE), text.as_bytes())?;
    Ok(Built {
        name: manifest.name,
        component: path,
        bytes: component.len(),
    })
}

/// What cargo says of the crate.
struct Crate {
    package: String,
    /// As in the name of the file that is built.
    library: String,
    workspace: PathBuf,
    target: PathBuf,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<MetadataPackage>,
    target_directory: PathBuf,
    workspace_root: PathBuf,
}

#[derive(Deserialize)]
struct MetadataPackage {
    name: String,
    manifest_path: PathBuf,
    targets: Vec<MetadataTarget>,
}

#[derive(Deserialize)]
struct MetadataTarget {
    name: String,
    crate_types: Vec<String>,
}

impl Crate {
    fn find(toolchain: &Toolchain, folder: &Path) -> anyhow::Result<Crate> {
        let mut cargo = toolchain.cargo(folder, "app");
        cargo
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .current_dir(folder);
        // Where to build is for the user to say, other than how.
        if let Some(target) = std::env::var_os("CARGO_TARGET_DIR") {
            let target = std::path::absolute(&target).context("CARGO_TARGET_DIR")?;
            cargo.env("CARGO_TARGET_DIR", target);
        }
        let metadata: Metadata = answer(&mut cargo)?;
        let own = folder.join("Cargo.toml").canonicalize();
        let own = own.with_context(|| format!("{}", folder.display()))?;
        let package = metadata
            .packages
            .into_iter()
            .find(|package| package.manifest_path == own)
            .with_context(|| {
                format!(
                    "{}: this is no package but a workspace; name the folder of an app",
                    own.display()
                )
            })?;
        let library = package
            .targets
            .iter()
            .find(|target| target.crate_types.iter().any(|kind| kind == "cdylib"))
            .with_context(|| {
                format!(
                    "{}: `[lib]` needs `crate-type = [\"cdylib\", \"lib\"]`",
                    own.display()
                )
            })?;
        Ok(Crate {
            library: library.name.replace('-', "_"),
            package: package.name,
            workspace: metadata.workspace_root,
            target: metadata.target_directory,
        })
    }
}

fn answer(cargo: &mut Command) -> anyhow::Result<Metadata> {
    let output = cargo
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo; get it from https://rustup.rs")?;
    if !output.status.success() {
        bail!("cargo can't read the crate; see above");
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata: an unexpected answer")
}
