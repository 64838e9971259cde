//! The service as it ships, cross-compiled, and the apps, compiled for the same processor.

use super::fixture::Fixture;
use crate::child;
use crate::tree::Tree;
use anyhow::{Context, Result, bail, ensure};
use headgate_guest::{active_has_target, guest_cargo};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const TARGET: &str = "aarch64-unknown-linux-gnu";

/// What the stripped service may take on the disk of a gateway.
const LARGEST: u64 = 25_000_000;

/// Builds the service without its compiler.
pub fn build(tree: &Tree) -> Result<PathBuf> {
    let target_dir = tree.target.join("vm").join("cargo");
    let mut cargo = toolchain()?;
    cargo
        .current_dir(&tree.root)
        .args(["build", "--locked", "--profile", "dist"])
        .args(["--package", "headgate", "--bin", "headgate"])
        .args(["--no-default-features", "--target", TARGET])
        // A folder of its own: the cargo that runs this program may hold the usual one.
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CC_aarch64_unknown_linux_gnu", "aarch64-linux-gnu-gcc")
        .env("AR_aarch64_unknown_linux_gnu", "aarch64-linux-gnu-ar")
        .env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
            "aarch64-linux-gnu-gcc",
        );
    child::run(&mut cargo)?;
    Ok(target_dir.join(TARGET).join("dist").join("headgate"))
}

/// The size of the service in bytes; an error if it is more than may be.
pub fn check_size(binary: &Path) -> Result<u64> {
    let size = fs::metadata(binary)
        .with_context(|| format!("cannot read {}", binary.display()))?
        .len();
    ensure!(
        size <= LARGEST,
        "{} has {size} bytes, and at most {LARGEST} are allowed: look for what has come in with \
         `cargo tree --no-default-features --edges normal`",
        binary.display()
    );
    Ok(size)
}

/// Builds the service for this machine, with its compiler.
pub fn build_own(tree: &Tree) -> Result<PathBuf> {
    let mut build = child::cargo();
    build
        .args(["build", "--release", "--bin", "headgate", "--manifest-path"])
        .arg(tree.root.join("Cargo.toml"));
    child::run(&mut build)?;
    Ok(tree.target.join("release").join("headgate"))
}

/// Has it compile the apps, as the module would.
pub fn compile_apps(own: &Path, tree: &Tree, fixture: &Fixture, out: &Path) -> Result<()> {
    let own = own.parent().context("a program is in a folder")?;
    let path = env::join_paths(
        [own.to_owned()]
            .into_iter()
            .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())),
    )
    .context("the target directory's name has a colon")?;
    let mut compile = Command::new("sh");
    compile
        .args(["-eu", "-c"])
        .arg(fixture.compile_apps(&tree.apps_out())?)
        .env("PATH", path)
        .env("out", out);
    child::run(&mut compile).context("cannot compile the apps as the NixOS module does")
}

/// Has it compile the app that uses devices, once for each manifest in `manifests`, which is called as
/// the app there.
pub fn compile_device_apps(own: &Path, tree: &Tree, manifests: &Path, out: &Path) -> Result<()> {
    let component = tree.apps_out().join("io-panel").join("io-panel.wasm");
    for entry in
        fs::read_dir(manifests).with_context(|| format!("cannot list {}", manifests.display()))?
    {
        let manifest = entry?.path();
        let name = manifest.file_stem().context("a file has a name")?;
        let mut compile = Command::new(own);
        compile
            .args(["app", "compile"])
            .arg(&component)
            .arg("--manifest")
            .arg(&manifest)
            .arg("--name")
            .arg(name)
            .args(["--target", TARGET, "--cpu", "cortex-a72", "--output"])
            .arg(out.join(name));
        child::run(&mut compile)?;
    }
    Ok(())
}

/// The compiler that is used anyway if it has the target's standard library, else Debian's, which
/// builds that library along.
fn toolchain() -> Result<Command> {
    if active_has_target(TARGET) {
        return Ok(guest_cargo(
            env::var_os("CARGO").unwrap_or_else(|| "cargo".into()),
        ));
    }
    let debian = ["/usr/bin/cargo", "/usr/lib/rustlib/src/rust/library/std"];
    if debian.iter().all(|path| Path::new(path).exists()) {
        let mut cargo = guest_cargo("/usr/bin/cargo");
        cargo
            .env("RUSTC", "/usr/bin/rustc")
            // `-Zbuild-std` is not stable; for this child only.
            .env("RUSTC_BOOTSTRAP", "1")
            .arg("-Zbuild-std");
        return Ok(cargo);
    }
    bail!(
        "no compiler for {TARGET}. With rustup: rustup target add {TARGET}. On Debian 12, as root: \
         apt-get install -y --no-install-recommends rustc-web cargo-web rust-web-src"
    )
}
