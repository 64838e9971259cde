//! Debian's arm64 packages: a root with systemd and two kernels. Downloaded, checked against the
//! archive's signature and unpacked by mmdebstrap; nothing of it runs on this machine.

use crate::child;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Its systemd is new enough for every line of the unit, its C library for what this machine's
/// cross-linker links against, and it has a kernel with 16 KiB pages.
const SUITE: &str = "trixie";
/// Not even the essential ones come unasked.
const PACKAGES: &str = "base-files,base-passwd,coreutils,dash,e2fsprogs,grep,libc-bin,mount,systemd,\
     udev,util-linux,busybox-static,linux-image-arm64,linux-image-arm64-16k,systemd-boot,systemd-boot-efi";

/// The unpacked packages, in a folder that is kept between runs.
pub struct Debian {
    dir: PathBuf,
}

/// A kernel of Debian's by the size of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    Of4KiB,
    Of16KiB,
}

impl Debian {
    /// Takes what an earlier run has left, if it is whole; else downloads it.
    pub fn get(dir: PathBuf, mirror: Option<&str>, tools: &Path) -> Result<Self> {
        let hook = tools.join("take-kernels");
        let steps =
            fs::read_to_string(&hook).with_context(|| format!("cannot read {}", hook.display()))?;
        let from = mirror.unwrap_or("mmdebstrap's mirror");
        let recipe = format!("{SUITE}\n{PACKAGES}\n{from}\n{steps}");
        let debian = Debian { dir };
        let recipe_path = debian.dir.join("recipe");
        if fs::read_to_string(&recipe_path).is_ok_and(|old| old == recipe) {
            debian.check()?;
            return Ok(debian);
        }
        if debian.dir.exists() {
            fs::remove_dir_all(&debian.dir)
                .with_context(|| format!("cannot remove {}", debian.dir.display()))?;
        }
        fs::create_dir_all(&debian.dir)
            .with_context(|| format!("cannot create {}", debian.dir.display()))?;
        debian.download(mirror, &hook)?;
        debian.sum_up()?;
        // Last, since it says that the rest is there.
        fs::write(&recipe_path, recipe)
            .with_context(|| format!("cannot write {}", recipe_path.display()))?;
        Ok(debian)
    }

    fn download(&self, mirror: Option<&str>, hook: &Path) -> Result<()> {
        println!("downloading Debian {SUITE} for arm64 (300 MB)");
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap
            .args(["--variant=extract", "--architectures=arm64"])
            .arg(format!("--include={PACKAGES}"))
            .arg(format!("--extract-hook={}", hook.display()))
            .args(apt_proxy())
            .arg(SUITE)
            .arg(self.root_tar())
            .args(mirror)
            .env("HEADGATE_VM_OUT", &self.dir)
            .stdin(Stdio::null());
        child::run(&mut mmdebstrap).context(
            "cannot get Debian's packages: its messages are above. Check the network and the space \
             on the disk, or name another mirror: --mirror URL",
        )
    }

    /// So that a file that is damaged later is found before it is booted.
    fn sum_up(&self) -> Result<()> {
        child::run(self.shell().args([
            "-c",
            "find . -type f ! -name SHA256SUMS | sort | xargs sha256sum >SHA256SUMS",
        ]))
    }

    fn check(&self) -> Result<()> {
        let mut sums = Command::new("sha256sum");
        sums.args(["--check", "--quiet", "--strict", "SHA256SUMS"])
            .current_dir(&self.dir)
            // The files, by name, are on its standard output.
            .stderr(Stdio::null());
        let output = sums.output().context("cannot start sha256sum")?;
        if output.status.success() {
            return Ok(());
        }
        bail!(
            "what was downloaded before is damaged: {}. Remove {} to have it downloaded again",
            String::from_utf8_lossy(&output.stdout).trim(),
            self.dir.display()
        )
    }

    fn shell(&self) -> Command {
        let mut sh = Command::new("sh");
        sh.current_dir(&self.dir);
        sh
    }

    pub fn root_tar(&self) -> PathBuf {
        self.dir.join("root.tar")
    }

    pub fn busybox(&self) -> PathBuf {
        self.dir.join("busybox")
    }

    pub fn kernel(&self, pages: Pages) -> PathBuf {
        self.boot(pages).join("vmlinuz")
    }

    /// Kernel modules by the names under which the initramfs has them.
    pub fn modules(&self, pages: Pages) -> Result<Vec<PathBuf>> {
        let dir = self.boot(pages);
        let mut modules = Vec::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "ko") {
                modules.push(path);
            }
        }
        modules.sort();
        Ok(modules)
    }

    fn boot(&self, pages: Pages) -> PathBuf {
        self.dir.join(match pages {
            Pages::Of4KiB => "4k",
            Pages::Of16KiB => "16k",
        })
    }
}

/// mmdebstrap doesn't read this machine's apt configuration; where packages come through a proxy,
/// it needs to know.
fn apt_proxy() -> Vec<String> {
    let mut config = Command::new("apt-config");
    config.args([
        "dump",
        "--no-empty",
        "Acquire::http::Proxy",
        "Acquire::https::Proxy",
    ]);
    let Ok(output) = config.stderr(Stdio::null()).output() else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| format!("--aptopt={line}"))
        .collect()
}
