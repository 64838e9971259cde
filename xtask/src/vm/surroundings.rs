//! What must be there before anything is built or booted; each thing that is missing is one line of
//! the error, with the remedy.

use anyhow::{Context, Result, bail};
use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// By which Debian's packages are checked.
const KEYRING: (&str, &str) = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "debian-archive-keyring",
);

/// A program, and Debian's package with it.
const PROGRAMS: [(&str, &str); 11] = [
    ("qemu-system-aarch64", "qemu-system-arm"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
    ("sha256sum", "coreutils"),
    ("setpriv", "util-linux"),
    ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    ("aarch64-linux-gnu-ar", "binutils-aarch64-linux-gnu"),
];

/// Fails with all that is missing of what each test needs, and of the programs and files that this one needs
/// besides, which come with Debian's package of the name.
pub fn check(programs: &[(&str, &str)], files: &[(&str, &str)]) -> Result<()> {
    let mut missing: Vec<String> = PROGRAMS
        .iter()
        .chain(programs)
        .filter(|(program, _)| !is_on_path(program))
        .map(|(program, package)| {
            format!(
                "{program} is not installed (Debian, as root: ./dev setup vm-test, or apt-get install {package})"
            )
        })
        .collect();
    for (file, package) in [KEYRING].iter().chain(files) {
        if !Path::new(file).is_file() {
            missing.push(format!(
                "{file} is not there (Debian, as root: apt-get install {package})"
            ));
        }
    }
    // The root file system's files belong to several users, root above all.
    let user = fs::metadata("/proc/self").context("cannot read /proc/self")?;
    if user.uid() != 0 {
        missing.push(
            "root rights are needed, to unpack Debian's packages with their owners: run it as root, \
             in a container for instance"
                .to_owned(),
        );
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!("cannot run the test here:\n- {}", missing.join("\n- "))
}

/// `/usr/sbin` is not on everybody's path.
fn is_on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(program).is_file())
}
