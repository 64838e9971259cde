//! A Nix store with systems for the emulated machine, and a signed cache of them, both made by the real Nix.
//!
//! Nothing is built by Nix: a store path is a folder that is put there, called by the hash of what is in it, and
//! registered with its references.

use crate::child;
use crate::vm::fixture::within;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub const STORE: &str = "/nix/store/";

/// In the place of a path's own hash, while that is not known. Its letter is in no hash of Nix's.
const PLACEHOLDER: &str = "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee";

pub struct Store {
    /// Where `nix/store` is.
    root: PathBuf,
    /// With which all is signed.
    secret_key: PathBuf,
    pub public_key: String,
    paths: BTreeMap<String, Registered>,
}

struct Registered {
    nar_hash: String,
    nar_size: u64,
    references: BTreeSet<String>,
}

impl Store {
    pub fn new(root: PathBuf) -> Result<Self> {
        let dir = root.join(&STORE[1..]);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let secret_key = root.join("secret-key");
        let public_key = root.join("public-key");
        child::run(
            nix("nix-store")
                .args(["--generate-binary-cache-key", "ota-test-1"])
                .args([&secret_key, &public_key]),
        )?;
        Ok(Store {
            root,
            secret_key,
            public_key: fs::read_to_string(public_key)?.trim().to_owned(),
            paths: BTreeMap::new(),
        })
    }

    pub fn secret_key(&self) -> &Path {
        &self.secret_key
    }

    /// Adds what `make` puts at the path that it is given; it is also told what that will be called. Returns
    /// that name. `references` are the paths that are named in it, besides itself.
    pub fn add(
        &mut self,
        name: &str,
        references: &[&str],
        make: impl Fn(&Path, &str) -> Result<()>,
    ) -> Result<String> {
        let draft = self.root.join("draft");
        let own = format!("{STORE}{PLACEHOLDER}-{name}");
        make(&draft, &own)?;
        let hash = nix_hash("sha1", &draft)?;
        let path = format!("{STORE}{hash}-{name}");
        remove(&draft)?;
        if self.paths.contains_key(&path) {
            return Ok(path);
        }
        let real = self.real(&path);
        make(&real, &path)?;
        canonicalise(&real)?;
        let mut references: BTreeSet<String> = references.iter().map(|&path| path.into()).collect();
        if names(&real, &path)? {
            references.insert(path.clone());
        }
        let registered = Registered {
            nar_hash: nix_hash("sha256", &real)?,
            nar_size: nar_size(&real)?,
            references,
        };
        self.paths.insert(path.clone(), registered);
        self.register(&path)?;
        Ok(path)
    }

    /// Where the store path `path` is on this machine.
    pub fn real(&self, path: &str) -> PathBuf {
        within(&self.root, path)
    }

    /// Copies the store path `path` to where it belongs in `root`.
    pub fn copy(&self, path: &str, root: &Path) -> Result<()> {
        let to = within(root, STORE);
        fs::create_dir_all(&to).with_context(|| format!("cannot create {}", to.display()))?;
        child::run(
            Command::new("cp")
                .args(["-a", "--"])
                .args([&self.real(path), &to]),
        )
    }

    /// `path` and all that it needs.
    pub fn closure(&self, path: &str) -> BTreeSet<String> {
        let mut closure = BTreeSet::new();
        let mut next = vec![path.to_owned()];
        while let Some(path) = next.pop() {
            if let Some(registered) = self.paths.get(&path) {
                next.extend(registered.references.difference(&closure).cloned());
            }
            closure.insert(path);
        }
        closure
    }

    /// How many paths `new` needs that `old` does not.
    pub fn missing(&self, new: &str, old: &str) -> usize {
        self.closure(new).difference(&self.closure(old)).count()
    }

    /// SHA-256 of the NAR, in Nix's base 32.
    pub fn nar_hash(&self, path: &str) -> Option<&str> {
        self.paths.get(path).map(|path| path.nar_hash.as_str())
    }

    /// Of these paths, as Nix's `closureInfo` and `nix-store --load-db` have it.
    pub fn registration<'a>(&self, paths: impl IntoIterator<Item = &'a String>) -> Result<String> {
        let mut text = String::new();
        for path in paths {
            let Registered {
                nar_size,
                references,
                ..
            } = self.paths.get(path).context("it is in the store")?;
            let hash = stdout(
                Command::new("nix-hash")
                    .args(["--type", "sha256"])
                    .arg(self.real(path)),
            )?;
            text.push_str(&format!(
                "{path}\n{hash}\n{nar_size}\n\n{}\n",
                references.len()
            ));
            for reference in references {
                text.push_str(&format!("{reference}\n"));
            }
        }
        Ok(text)
    }

    /// Copies the closure of `path` to the cache in the folder `cache`, signed.
    pub fn copy_to_cache(&self, path: &str, cache: &Path) -> Result<()> {
        child::run(
            nix("nix")
                .args(["--extra-experimental-features", "nix-command", "copy"])
                .args(["--store", &self.uri(), "--to"])
                .arg(format!(
                    "file://{}?compression=zstd&secret-key={}",
                    cache.display(),
                    self.secret_key.display()
                ))
                .arg(path)
                // It tells of each path.
                .stderr(Stdio::null()),
        )
    }

    fn register(&self, path: &str) -> Result<()> {
        let text = self.registration([&path.to_owned()])?;
        let mut load = nix("nix-store")
            .args(["--store", &self.uri(), "--load-db"])
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot start nix-store")?;
        let mut stdin = load.stdin.take().context("it has an input")?;
        stdin.write_all(text.as_bytes())?;
        drop(stdin);
        ensure!(load.wait()?.success(), "nix-store refuses {path}: {text}");
        Ok(())
    }

    fn uri(&self) -> String {
        format!("local?root={}", self.root.display())
    }
}

/// A program of Nix's that needs no users to build as.
fn nix(program: &str) -> Command {
    let mut nix = Command::new(program);
    nix.env("NIX_CONFIG", "build-users-group =");
    nix
}

/// The hash of what is at `path` as a NAR.
pub fn nix_hash(kind: &str, path: &Path) -> Result<String> {
    stdout(
        Command::new("nix-hash")
            .args(["--base32", "--type", kind])
            .arg(path),
    )
}

fn nar_size(path: &Path) -> Result<u64> {
    let mut dump = Command::new("nix-store")
        .arg("--dump")
        .arg(path)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start nix-store")?;
    let mut nar = dump.stdout.take().context("it has an output")?;
    let size = std::io::copy(&mut nar, &mut std::io::sink())?;
    ensure!(dump.wait()?.success(), "nix-store --dump failed");
    Ok(size)
}

/// As Nix has everything in its store: read-only, and from the first second of 1970.
fn canonicalise(path: &Path) -> Result<()> {
    child::run(Command::new("chmod").args(["-R", "a=rX"]).arg(path))?;
    child::run(
        Command::new("find")
            .arg(path)
            .args(["-exec", "touch", "-h", "-d", "@1", "{}", "+"]),
    )
}

/// Whether a file of `dir` has `text` in it.
fn names(dir: &Path, text: &str) -> Result<bool> {
    let mut grep = Command::new("grep");
    grep.args(["-rqF", "--", text]).arg(dir);
    Ok(grep.status().context("cannot start grep")?.success())
}

fn remove(path: &Path) -> Result<()> {
    child::run(Command::new("rm").args(["-rf", "--"]).arg(path))
}

fn stdout(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", child::shown(command)))?;
    ensure!(
        output.status.success(),
        "{} failed: {}",
        child::shown(command),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
