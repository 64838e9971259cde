//! Over-the-air updates: from a binary cache on the same machine into an empty store, beside Nix itself.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use headgate::ota::cache::{self, Caches, Progress, Settings};
use headgate::ota::store_dir::StoreDir;
use tempfile::TempDir;

use crate::process;
use crate::report::{Floor, Line, Section};
use crate::statistics::Rounds;
use crate::suite::Suite;

/// A system's closure is mostly small paths: files that refer to others, libraries, a kernel or two.
const SMALL: usize = 480;
const LARGE: usize = 20;
const LARGE_BYTES: usize = 8 * 1024 * 1024;
const HUGE_BYTES: usize = 512 * 1024 * 1024;

/// What one fetch came to, by another process so that its memory is its own.
struct Fetched {
    seconds: f64,
    peak_bytes: f64,
}

impl Suite {
    pub(crate) fn ota(&self) -> Result<Vec<Section>> {
        let mut small = Site::new()?;
        for number in 0..SMALL {
            small.add(&format!("small-{number}"), 1000 + number * 97)?;
        }
        for number in 0..LARGE {
            small.add(&format!("large-{number}"), LARGE_BYTES + number)?;
        }
        let closure = small.finish()?;
        let mut huge = Site::new()?;
        huge.add("huge", HUGE_BYTES)?;
        let huge = huge.finish()?;
        Ok(vec![
            self.fetches(
                &closure,
                format!("{SMALL} small paths and {LARGE} of 8 MiB"),
            )?,
            self.fetches(&huge, "one path of 512 MiB".to_owned())?,
        ])
    }

    fn fetches(&self, cache: &Cache, what: String) -> Result<Section> {
        let address = serve(cache.folder.path())?;
        let url = format!("http://{address}");
        let [mut own, mut nix, mut ratio, mut peak] = <[Rounds; 4]>::default();
        for _ in 0..self.rounds {
            let fetched = cache.fetch(&url)?;
            let theirs = cache.nix_copy(&url)?;
            ratio.push(theirs / fetched.seconds);
            own.push(fetched.seconds);
            nix.push(theirs);
            peak.push(fetched.peak_bytes / 1e6);
        }
        let ratio_of_medians = {
            let mut rounds = Rounds::default();
            rounds.push(nix.median() / own.median());
            rounds
        };
        Ok(Section {
            title: format!("Over-the-air update of {what}"),
            conditions: "From a signed zstd cache, made by `nix copy`, behind HTTP on the same machine, into an \
                         empty store on the same disk: planned, fetched, verified, unpacked and forced to disk. In \
                         turns with `nix copy --from` the same cache into an empty store, which checks the same \
                         signatures and does not force files to disk."
                .to_owned(),
            lines: vec![
                Line::new("headgate", "s", own),
                Line::new("nix copy", "s", nix),
                Line::new("throughput relative to nix copy (of medians)", "×", ratio_of_medians)
                    .with_floor(Floor::AtLeast(0.8)),
                Line::new("throughput relative to nix copy, round by round", "×", ratio),
                Line::new("peak memory", "MB", peak).with_floor(Floor::AtMost(64.0)),
            ],
        })
    }
}

/// Fetches a closure in this process. Returns seconds and peak memory in bytes.
pub fn fetch(url: &str, key: &str, root: &Path, toplevel: &str) -> Result<(f64, u64)> {
    let caches = Caches::new(Settings {
        urls: vec![url.to_owned()],
        trusted_keys: vec![key.parse()?],
        ..Settings::default()
    })?;
    let started = Instant::now();
    let store = StoreDir::open(root)?;
    let plan = cache::plan(&caches, &store, &toplevel.parse()?)?;
    cache::install(&caches, &store, &plan, &Progress::default())?;
    let seconds = started.elapsed().as_secs_f64();
    Ok((seconds, process::peak_resident_bytes(std::process::id())?))
}

/// A store that a cache is made from.
struct Site {
    folder: TempDir,
    paths: Vec<(String, usize)>,
}

/// A signed cache with one closure.
struct Cache {
    folder: TempDir,
    key: String,
    toplevel: String,
}

impl Site {
    fn new() -> Result<Self> {
        let folder = TempDir::new()?;
        fs::create_dir_all(folder.path().join("root/nix/store"))?;
        Ok(Self {
            folder,
            paths: Vec::new(),
        })
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Adds a path of one file, of which about a half compresses.
    fn add(&mut self, name: &str, bytes: usize) -> Result<()> {
        let path = format!("/nix/store/{:032}-{name}", self.paths.len());
        let mut state = bytes as u64 | 1;
        let content: Vec<u8> = (0..bytes / 8 + 1)
            .flat_map(|word| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                if word % 16 < 8 {
                    state.to_le_bytes()
                } else {
                    *b"headgate"
                }
            })
            .collect();
        fs::write(self.root().join(&path[1..]), &content)?;
        self.paths.push((path, content.len()));
        Ok(())
    }

    fn finish(mut self) -> Result<Cache> {
        let references: Vec<String> = self.paths.iter().map(|(path, _)| path.clone()).collect();
        self.add("system", 100)?;
        let root = self.root();
        let mut registration = String::new();
        for (path, _) in &self.paths {
            let dumped = run(Command::new("nix-hash")
                .args(["--type", "sha256"])
                .arg(root.join(&path[1..])))?;
            let references: &[String] = if path.ends_with("-system") {
                &references
            } else {
                &[]
            };
            let size = nar_size(&root.join(&path[1..]))?;
            registration += &format!(
                "{path}\n{}\n{size}\n\n{}\n",
                dumped.trim(),
                references.len()
            );
            for reference in references {
                registration += &format!("{reference}\n");
            }
        }
        let store = format!("local?root={}", root.display());
        let mut load = Command::new("nix-store")
            .arg("--load-db")
            .env("NIX_REMOTE", &store)
            .stdin(Stdio::piped())
            .spawn()?;
        load.stdin
            .take()
            .context("no input")?
            .write_all(registration.as_bytes())?;
        ensure!(load.wait()?.success(), "nix-store --load-db failed");
        let [secret, public] = ["secret", "public"].map(|name| self.folder.path().join(name));
        run(Command::new("nix-store")
            .args(["--generate-binary-cache-key", "bench-1"])
            .args([&secret, &public]))?;
        let toplevel = self
            .paths
            .last()
            .map(|(path, _)| path.clone())
            .context("no paths")?;
        let folder = TempDir::new()?;
        let to = format!(
            "file://{}?compression=zstd&secret-key={}",
            folder.path().display(),
            secret.display()
        );
        run(nix().args([
            "copy",
            "--no-check-sigs",
            "--from",
            &store,
            "--to",
            &to,
            &toplevel,
        ]))?;
        Ok(Cache {
            folder,
            key: fs::read_to_string(public)?.trim().to_owned(),
            toplevel,
        })
    }
}

impl Cache {
    fn fetch(&self, url: &str) -> Result<Fetched> {
        let root = TempDir::new()?;
        fs::create_dir_all(root.path().join("nix/store"))?;
        let output = run(Command::new(std::env::current_exe()?)
            .args(["fetch", url, &self.key])
            .arg(root.path())
            .arg(&self.toplevel))?;
        let mut figures = output.split_whitespace().map(str::parse::<f64>);
        match (figures.next(), figures.next()) {
            (Some(Ok(seconds)), Some(Ok(peak_bytes))) => Ok(Fetched {
                seconds,
                peak_bytes,
            }),
            _ => bail!("the fetch printed {output:?}"),
        }
    }

    fn nix_copy(&self, url: &str) -> Result<f64> {
        let root = TempDir::new()?;
        let to = format!("local?root={}", root.path().join("root").display());
        let started = Instant::now();
        run(nix()
            .args(["copy", "--from", url, "--to", &to, &self.toplevel])
            .args(["--option", "trusted-public-keys", &self.key])
            // What an earlier round has learned does not count.
            .env("XDG_CACHE_HOME", root.path().join("cache")))?;
        let seconds = started.elapsed().as_secs_f64();
        run(Command::new("chmod").args(["-R", "u+w"]).arg(root.path()))?;
        Ok(seconds)
    }
}

/// The bytes of a NAR that is one file: the words around it, and its content filled up to eight bytes.
fn nar_size(file: &Path) -> Result<u64> {
    Ok(112 + fs::metadata(file)?.len().next_multiple_of(8))
}

fn nix() -> Command {
    let mut nix = Command::new("nix");
    nix.args(["--extra-experimental-features", "nix-command", "--quiet"]);
    nix
}

fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stderr(Stdio::inherit()).output().with_context(|| {
        format!("can't run {program}: Nix is needed (Debian, as root: apt-get install nix-bin)")
    })?;
    ensure!(output.status.success(), "{program}: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Serves a folder for as long as this process lives: files as a whole, one after another.
fn serve(folder: &Path) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let folder = folder.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let folder = folder.clone();
            // A client may go away when it likes.
            thread::spawn(move || answer(stream, &folder));
        }
    });
    Ok(address)
}

fn answer(mut stream: TcpStream, folder: &Path) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ');
        let head_only = words.next() == Some("HEAD");
        let path = words
            .next()
            .unwrap_or_default()
            .trim_start_matches('/')
            .to_owned();
        while line.trim() != "" {
            line.clear();
            reader.read_line(&mut line)?;
        }
        match fs::File::open(folder.join(path)) {
            Ok(mut file) => {
                let length = file.metadata()?.len();
                write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n"
                )?;
                if !head_only {
                    std::io::copy(&mut file, &mut stream)?;
                }
            }
            Err(_) => stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?,
        }
    }
}
