//! Stores and caches that the real Nix makes.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use headgate::ota::cache::PublicKey;
use nix_archive::nar::{CaseHack, hash_path};
use nix_derivation::{NixHash, StorePath};
use tempfile::TempDir;

/// A store of its own below a temporary folder, filled by hand and registered with Nix. No builder runs,
/// so neither a sandbox nor root is needed.
pub struct Nix {
    folder: TempDir,
    pub public: PublicKey,
    references: BTreeMap<StorePath, Vec<StorePath>>,
}

/// How caches compress.
#[derive(Clone, Copy, Debug)]
pub enum Compressed {
    Zstd,
    Xz,
    None,
}

impl Nix {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("root/nix/store")).unwrap();
        let [secret, public] = ["secret", "public"].map(|name| folder.path().join(name));
        run(Command::new("nix-store")
            .args(["--generate-binary-cache-key", "test-1"])
            .args([&secret, &public]));
        let public = fs::read_to_string(public).unwrap().trim().parse().unwrap();
        Self {
            folder,
            public,
            references: BTreeMap::new(),
        }
    }

    /// The key that caches are signed with.
    pub fn secret_file(&self) -> PathBuf {
        self.folder.path().join("secret")
    }

    /// What gateways trust.
    pub fn public_text(&self) -> String {
        let text = fs::read_to_string(self.folder.path().join("public")).unwrap();
        text.trim().to_owned()
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    pub fn place_of(&self, path: &StorePath) -> PathBuf {
        self.root().join("nix/store").join(path.to_basename())
    }

    /// Adds a path, whose content `fill` makes at the place that it is given. `digest` makes its name its own.
    pub fn add(
        &mut self,
        name: &str,
        references: &[&StorePath],
        fill: impl FnOnce(&Path),
    ) -> StorePath {
        let mut digest = [0; 20];
        fastrand::fill(&mut digest);
        let path = StorePath::from_parts(digest, name).unwrap();
        fill(&self.place_of(&path));
        self.references.insert(
            path.clone(),
            references.iter().map(|path| (*path).clone()).collect(),
        );
        path
    }

    /// A path that is one file.
    pub fn file(&mut self, name: &str, references: &[&StorePath], content: &[u8]) -> StorePath {
        self.add(name, references, |place| fs::write(place, content).unwrap())
    }

    /// A path with all that a path can have.
    pub fn zoo(&mut self, name: &str, references: &[&StorePath]) -> StorePath {
        self.add(name, references, |place| {
            fs::create_dir_all(place.join("bin/empty folder")).unwrap();
            let tool = place.join("bin/tool");
            fs::write(&tool, "#!/bin/sh\necho hello\n").unwrap();
            fs::set_permissions(&tool, Permissions::from_mode(0o755)).unwrap();
            fs::write(place.join("bin/ünïcode 文件 \"quoted\" \\ 'x'\n"), "odd").unwrap();
            fs::write(place.join("empty"), "").unwrap();
            fs::write(place.join("-"), "x").unwrap();
            fs::write(place.join("..."), "x".repeat(7)).unwrap();
            fs::write(place.join("a".repeat(255)), "x".repeat(8)).unwrap();
            fs::write(place.join("large"), noise(3_000_000)).unwrap();
            symlink("bin/tool", place.join("link")).unwrap();
            symlink("/nowhere/at all", place.join("dangling")).unwrap();
            symlink("..", place.join("bin/up")).unwrap();
            let deep = (0..40).fold(place.join("deep"), |path, _| path.join("d"));
            fs::create_dir_all(&deep).unwrap();
            fs::write(deep.join("leaf"), "leaf").unwrap();
        })
    }

    /// Registers all that was added, and copies these paths' closures into a signed cache.
    pub fn cache(&self, paths: &[&StorePath], compressed: Compressed) -> TempDir {
        let mut registration = String::new();
        for (path, references) in &self.references {
            let nar = hash_path(&self.place_of(path), CaseHack::Disabled).unwrap();
            let hash = NixHash::Sha256(nar.sha256).to_nix_base16_string();
            registration += &format!("{path}\n{}\n{}\n\n{}\n", hash, nar.size, references.len());
            for reference in references {
                registration += &format!("{reference}\n");
            }
        }
        let mut register = Command::new("nix-store")
            .arg("--load-db")
            .env(
                "NIX_REMOTE",
                format!("local?root={}", self.root().display()),
            )
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        register
            .stdin
            .take()
            .unwrap()
            .write_all(registration.as_bytes())
            .unwrap();
        assert!(register.wait().unwrap().success());
        let cache = tempfile::tempdir().unwrap();
        let compressed = match compressed {
            Compressed::Zstd => "zstd",
            Compressed::Xz => "xz",
            Compressed::None => "none",
        };
        let to = format!(
            "file://{}?compression={compressed}&secret-key={}",
            cache.path().display(),
            self.folder.path().join("secret").display()
        );
        run(Command::new("nix")
            .args([
                "--extra-experimental-features",
                "nix-command",
                "copy",
                "--no-check-sigs",
            ])
            .args([
                "--from",
                &format!("local?root={}", self.root().display()),
                "--to",
                &to,
            ])
            .args(paths.iter().map(|path| path.to_string())));
        cache
    }
}

/// What `nix-store --dump` says a place has in it.
pub fn dump(place: &Path) -> Vec<u8> {
    run(Command::new("nix-store").arg("--dump").arg(place))
}

/// Bytes that hardly compress, the same each time.
pub fn noise(bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(bytes as u64);
    let mut noise = vec![0; bytes];
    random.fill(&mut noise);
    noise
}

fn run(command: &mut Command) -> Vec<u8> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("these tests need Nix (Debian: apt-get install nix-bin): {command:?}: {error}")
        });
    let mut output = Vec::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut output)
        .unwrap();
    assert!(child.wait().unwrap().success(), "{command:?}");
    output
}
