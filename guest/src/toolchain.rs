//! Finds what compiles guests.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::TARGET;
use crate::environment::guest_cargo;

/// `active` or `debian` instead of the first that is found; for tests of the fallback.
const CHOICE_VARIABLE: &str = "GUEST_TOOLCHAIN";

/// What compiles the guests.
pub enum Toolchain {
    /// The one on the path; it has the target's standard library.
    Active,
    /// Debian's, which comes without that library: it is built from source along with the guests.
    Debian { linker: String },
}

impl Toolchain {
    /// The first that is there.
    pub fn find() -> Result<Self> {
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

    /// A cargo that compiles with this toolchain. `root` is the folder of the sources, and `name`
    /// stands for it in panic messages.
    pub fn cargo(&self, root: &Path, name: &str) -> Command {
        let flags = without_paths_of_this_machine(root, name);
        let mut cargo = match self {
            Toolchain::Active => {
                guest_cargo(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            }
            Toolchain::Debian { .. } => guest_cargo("/usr/bin/cargo"),
        };
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        if let Toolchain::Debian { linker } = self {
            cargo
                .env("RUSTC", "/usr/bin/rustc")
                // `-Zbuild-std` is not stable; for this child only.
                .env("RUSTC_BOOTSTRAP", "1")
                .env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", linker);
        }
        cargo
    }

    /// What `cargo build` is to be given besides.
    pub fn build_args(&self) -> &'static [&'static str] {
        match self {
            Toolchain::Active => &[],
            Toolchain::Debian { .. } => &["-Zbuild-std=std,panic_abort"],
        }
    }
}

/// Paths stand in panic messages; without those of this machine, two of them build the same
/// component from the same source.
fn without_paths_of_this_machine(root: &Path, name: &str) -> Vec<String> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let mut flags = vec![format!("--remap-path-prefix={}={name}", root.display())];
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
