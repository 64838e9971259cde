//! Builds the apps: finds a compiler for `wasm32-unknown-unknown`, compiles, and wraps each core
//! module as a component.

use crate::child;
use crate::tree::{Tree, app_dirs};
use anyhow::{Context, Result, bail};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use wit_component::ComponentEncoder;

const TARGET: &str = "wasm32-unknown-unknown";

/// `active` or `debian` instead of the first that is found; for tests of the fallback.
const CHOICE_VARIABLE: &str = "GUEST_TOOLCHAIN";

/// Builds every app and returns the directories that they now lie in.
pub fn build_apps(tree: &Tree) -> Result<Vec<PathBuf>> {
    let mut cargo = Toolchain::find()?.cargo(tree);
    let apps = tree.apps();
    let dirs = app_dirs(&apps)?;
    cargo
        .current_dir(&apps)
        .env("CARGO_TARGET_DIR", tree.guest_target())
        .args([
            "build",
            "--locked",
            "--release",
            "--lib",
            "--target",
            TARGET,
        ]);
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
    let module_path = tree
        .guest_target()
        .join(TARGET)
        .join("release")
        .join(format!("{}.wasm", name.replace('-', "_")));
    let module = read(&module_path)?;
    let component = ComponentEncoder::default()
        .validate(true)
        .module(&module)
        .and_then(|encoder| encoder.encode())
        .with_context(|| format!("{} does not fit the world in wit/", module_path.display()))?;

    let out = tree.apps_out().join(&*name);
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    write_if_changed(&out.join(format!("{name}.wasm")), &component)?;
    write_if_changed(
        &out.join("manifest.toml"),
        &read(&source.join("manifest.toml"))?,
    )?;
    Ok(out)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Whole or not at all, since a running gateway may be reading it.
fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, content)
        .and_then(|()| fs::rename(&unfinished, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// What compiles the guests.
enum Toolchain {
    /// The one that compiles the gateway; it has the target's standard library.
    Active,
    /// Debian's, which comes without that library: it is built from source along with the guests.
    Debian { linker: String },
}

impl Toolchain {
    fn find() -> Result<Self> {
        match env::var(CHOICE_VARIABLE).as_deref() {
            Ok("active") => return Ok(Toolchain::Active),
            Ok("debian") => {
                return Self::debian().context(
                    "Debian's compiler, its source or its wasm linker is not installed; as root: \
                     apt-get install -y --no-install-recommends rustc-web cargo-web rust-web-src lld-19",
                );
            }
            Ok("") | Err(_) => {}
            Ok(other) => bail!("{CHOICE_VARIABLE}={other}: must be active or debian"),
        }
        if active_has_target(TARGET) {
            return Ok(Toolchain::Active);
        }
        Self::debian().with_context(|| {
            format!(
                "no compiler for {TARGET}. With rustup: rustup target add {TARGET}. On Debian 12, as root: \
                 apt-get install -y --no-install-recommends rustc-web cargo-web rust-web-src lld-19"
            )
        })
    }

    /// Debian's compiler with the source of its standard library and a linker, if all are there.
    fn debian() -> Option<Self> {
        let sysroot = stdout_of(Command::new("/usr/bin/rustc").args(["--print", "sysroot"]))?;
        let source = Path::new(&sysroot).join("lib/rustlib/src/rust/library/std");
        let has_all = source.is_dir() && Path::new("/usr/bin/cargo").is_file();
        has_all
            .then(newest_debian_linker)
            .flatten()
            .map(|linker| Toolchain::Debian { linker })
    }

    fn cargo(&self, tree: &Tree) -> Command {
        let flags = without_paths_of_this_machine(tree);
        let mut cargo = match self {
            Toolchain::Active => {
                child::guest_cargo(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            }
            Toolchain::Debian { linker } => {
                let mut cargo = child::guest_cargo("/usr/bin/cargo");
                cargo
                    .env("RUSTC", "/usr/bin/rustc")
                    // `-Zbuild-std` is not stable; for this child only.
                    .env("RUSTC_BOOTSTRAP", "1")
                    .env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", linker)
                    .arg("-Zbuild-std=std,panic_abort");
                cargo
            }
        };
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        cargo
    }
}

/// Paths stand in panic messages; without those of this machine, two of them build the same
/// component from the same source.
fn without_paths_of_this_machine(tree: &Tree) -> Vec<String> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let mut flags = vec![format!(
        "--remap-path-prefix={}=headgate",
        tree.root.display()
    )];
    if let Some(cargo_home) = cargo_home {
        flags.push(format!(
            "--remap-path-prefix={}=cargo",
            cargo_home.display()
        ));
    }
    flags
}

/// Whether the compiler on the path has the standard library of `target`.
pub fn active_has_target(target: &str) -> bool {
    let libdir =
        stdout_of(Command::new("rustc").args(["--print", "target-libdir", "--target", target]));
    libdir
        .and_then(|libdir| fs::read_dir(libdir).ok())
        .is_some_and(|files| {
            files
                .flatten()
                .any(|file| file.file_name().to_string_lossy().starts_with("libstd-"))
        })
}

/// `wasm-ld-19` and the like: Debian has one for each version of LLVM.
fn newest_debian_linker() -> Option<String> {
    let versions = fs::read_dir("/usr/bin").ok()?.flatten().filter_map(|file| {
        file.file_name()
            .to_str()?
            .strip_prefix("wasm-ld-")?
            .parse::<u32>()
            .ok()
    });
    versions.max().map(|version| format!("wasm-ld-{version}"))
}

/// The first line that `command` prints, if it can be run and succeeds.
fn stdout_of(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    String::from_utf8(output.stdout)
        .ok()?
        .lines()
        .next()
        .map(str::to_owned)
}
