//! `headgate release`: making what gateways are updated to. Runs where systems are built, not on gateways.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use nix_derivation::store_path::StoreDir;
use nix_narinfo::NarInfo;
use serde_json::{Value, json};

use super::output::Output;
use crate::ota::cache::{self, Caches};
use crate::ota::keys::{SecretKey, TrustedKey};
use crate::ota::release::{MAX_BYTES, Release};
use crate::ota::store_dir;

/// What a release is called in its folder.
const DOCUMENT: &str = "release.json";

#[derive(Subcommand)]
pub(super) enum ReleaseCommand {
    /// Make a key for releases
    ///
    /// Prints the public half, for ota.trusted_keys of gateways. A key that `nix key generate-secret` has made
    /// will do, too.
    Keygen {
        /// Name of the key, such as plant-2026
        name: String,
        /// File for the secret half
        file: PathBuf,
    },
    Sign(SignArgs),
    /// See whether gateways would take a release
    ///
    /// Looks at the signatures of the release and of every store path that its system needs.
    Verify {
        /// Its folder, or the URL of the channel
        release: String,
        /// Key that gateways trust, as `name:base64`
        #[arg(long, value_name = "KEY", required = true)]
        trusted_key: Vec<TrustedKey>,
    },
}

/// Sign a release and the store paths that come with it
///
/// FOLDER is a binary cache with release.json in it, such as `nix build .#release-rpi` makes. Writes
/// release.json, release-VERSION.json and their signatures, and signs each narinfo.
#[derive(Args)]
pub(super) struct SignArgs {
    folder: PathBuf,
    /// File with the secret key, as `headgate release keygen` or Nix writes it
    #[arg(long, value_name = "FILE", required = true)]
    key_file: Vec<PathBuf>,
    /// Copy the release to this new folder, and sign it there
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// When no gateway is to take it any more, as in 2027-12-31T00:00:00Z
    #[arg(long, value_name = "TIME")]
    expires: Option<Timestamp>,
    /// Only for so many percent of the gateways
    #[arg(long, value_name = "PERCENT")]
    rollout: Option<f64>,
    /// Draws the gateways of a rollout; another one draws anew [default: the version]
    #[arg(long, value_name = "SEED", requires = "rollout")]
    seed: Option<String>,
    /// Key that gateways trust from this release on: `name:base64`, or `name:base64@TIME` up to then
    #[arg(long, value_name = "KEY")]
    add_key: Vec<TrustedKey>,
    /// Name of a key that they don't trust any more
    #[arg(long, value_name = "NAME")]
    revoke_key: Vec<String>,
    /// Time that the release says it was made at [default: now]
    #[arg(long, value_name = "TIME")]
    created: Option<Timestamp>,
}

pub(super) fn run(command: ReleaseCommand, output: &Output) -> anyhow::Result<()> {
    match command {
        ReleaseCommand::Keygen { name, file } => keygen(&name, &file, output),
        ReleaseCommand::Sign(args) => sign(&args, output),
        ReleaseCommand::Verify {
            release,
            trusted_key,
        } => verify(&release, &trusted_key, output),
    }
}

fn keygen(name: &str, file: &Path, output: &Output) -> anyhow::Result<()> {
    let key = SecretKey::generate(name)?;
    let mut secret = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .with_context(|| {
            format!(
                "{}: cannot make it (a key that is there is never overwritten)",
                file.display()
            )
        })?;
    writeln!(secret, "{}", key.to_text())
        .and_then(|()| secret.sync_all())
        .with_context(|| format!("writing {}", file.display()))?;
    match output.json {
        true => output.value(&json!({ "public_key": key.public(), "secret_key_file": file })),
        false => output.text(key.public()),
    }
}

fn sign(args: &SignArgs, output: &Output) -> anyhow::Result<()> {
    let keys: Vec<SecretKey> = args
        .key_file
        .iter()
        .map(|file| read_key(file))
        .collect::<Result<_, _>>()?;
    let release = describe(args)?;
    let folder = match &args.output {
        Some(target) => {
            copy(&args.folder, target)?;
            target
        }
        None => &args.folder,
    };
    let signed = sign_narinfos(folder, &keys)?;
    let document = serde_json::to_vec_pretty(&release)?;
    let signatures: String = keys
        .iter()
        .map(|key| format!("{}\n", key.sign(&document).to_nix_string()))
        .collect();
    // The signature comes first: a gateway that looks in between sees an old release and refuses it, and one
    // that looks later finds both.
    for name in [
        format!("release-{}.json", release.version),
        DOCUMENT.to_owned(),
    ] {
        write(&folder.join(format!("{name}.sig")), signatures.as_bytes())?;
        write(&folder.join(&name), &document)?;
    }
    match output.json {
        true => output.value(&json!({ "release": release, "folder": folder, "narinfos": signed })),
        false => output.text(format!(
            "{} {} for {} is signed by {}, with {signed} store paths: {}",
            release.product,
            release.version,
            release.system,
            keys.iter()
                .map(SecretKey::name)
                .collect::<Vec<_>>()
                .join(", "),
            folder.display(),
        )),
    }
}

fn read_key(file: &Path) -> anyhow::Result<SecretKey> {
    let reading = || format!("reading {}", file.display());
    let mode = fs::metadata(file)
        .with_context(reading)?
        .permissions()
        .mode();
    ensure!(
        mode & 0o022 == 0,
        "{}: others can write this key; make it yours alone with `chmod 600`, or take another",
        file.display()
    );
    let text = fs::read_to_string(file).with_context(reading)?;
    text.parse().with_context(|| file.display().to_string())
}

/// The release with what the command line says about it.
fn describe(args: &SignArgs) -> anyhow::Result<Release> {
    let path = args.folder.join(DOCUMENT);
    let text = fs::read(&path)
        .with_context(|| format!("{}: this folder holds no release", path.display()))?;
    let mut fields: Value =
        serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    let Some(object) = fields.as_object_mut() else {
        bail!("{}: this is no JSON object, so no release", path.display());
    };
    let created = args.created.unwrap_or_else(|| {
        // Whole seconds are enough, and read better.
        Timestamp::from_second(Timestamp::now().as_second()).expect("now is a time")
    });
    object.insert("created".into(), json!(created));
    if let Some(expires) = args.expires {
        ensure!(
            expires > created,
            "--expires {expires}: the release would have expired before it was made"
        );
        object.insert("expires".into(), json!(expires));
    }
    if let Some(percent) = args.rollout {
        let seed = args
            .seed
            .clone()
            .or_else(|| object.get("version")?.as_str().map(str::to_owned));
        object.insert(
            "rollout".into(),
            json!({ "percent": percent, "seed": seed.unwrap_or_default() }),
        );
    }
    if !args.add_key.is_empty() {
        let keys: Vec<_> = args.add_key.iter().map(TrustedKey::to_string).collect();
        object.insert("add_keys".into(), json!(keys));
    }
    if !args.revoke_key.is_empty() {
        object.insert("revoke_keys".into(), json!(args.revoke_key));
    }
    let of_file = |fault| anyhow::anyhow!("{} {fault}", path.display());
    let release = Release::parse(fields.to_string().as_bytes()).map_err(of_file)?;
    release.check_created(Timestamp::now()).map_err(of_file)?;
    Ok(release)
}

/// A copy that can be written; what Nix has built can't.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let target = std::path::absolute(to)?;
    let source = fs::canonicalize(from).with_context(|| from.display().to_string())?;
    let parent = target
        .parent()
        .and_then(|parent| fs::canonicalize(parent).ok());
    ensure!(
        !parent.is_some_and(|parent| parent.starts_with(&source)),
        "--output {}: this lies within the release itself; take a folder beside it",
        to.display()
    );
    copy_folder(from, to)
}

fn copy_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir(to)
        .with_context(|| format!("--output {}: this must be a new folder", to.display()))?;
    let list = || format!("reading {}", from.display());
    for entry in fs::read_dir(from).with_context(list)? {
        let entry = entry.with_context(list)?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().with_context(list)?.is_dir() {
            copy_folder(&path, &target)?;
            continue;
        }
        // A link counts for the file that it leads to.
        let about = fs::metadata(&path).with_context(|| path.display().to_string())?;
        ensure!(
            about.is_file(),
            "{}: neither a file nor a folder, so no part of a release",
            path.display()
        );
        let mut source = fs::File::open(&path).with_context(|| path.display().to_string())?;
        fs::File::create_new(&target)
            .and_then(|mut target| std::io::copy(&mut source, &mut target))
            .with_context(|| format!("writing {}", target.display()))?;
    }
    Ok(())
}

/// Adds signatures to those narinfos that lack them. Returns how many there are.
fn sign_narinfos(folder: &Path, keys: &[SecretKey]) -> anyhow::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path
            .extension()
            .is_none_or(|extension| extension != "narinfo")
        {
            continue;
        }
        let mut text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let info: NarInfo = text.parse().with_context(|| path.display().to_string())?;
        check_nar(folder, &path, &info)?;
        let fingerprint = info.fingerprint(&StoreDir::default());
        let before = text.len();
        for key in keys {
            let signature = key.sign(fingerprint.as_bytes());
            if !info.signatures().contains(&signature) {
                if !text.ends_with('\n') {
                    text.push('\n');
                }
                text.push_str(&format!("Sig: {signature}\n"));
            }
        }
        if text.len() > before {
            write(&path, text.as_bytes())?;
        }
        count += 1;
    }
    Ok(count)
}

/// The file that a narinfo names is there, as long as it says.
fn check_nar(folder: &Path, path: &Path, info: &NarInfo) -> anyhow::Result<()> {
    let nar = folder.join(info.url());
    let about = fs::metadata(&nar)
        .with_context(|| format!("{} names {}", path.display(), nar.display()))?;
    if let Some(size) = info.file_size() {
        let found = about.len();
        ensure!(
            found == size,
            "{}: has {found} bytes, and {} says {size}",
            nar.display(),
            path.display()
        );
    }
    Ok(())
}

fn write(path: &Path, text: &[u8]) -> anyhow::Result<()> {
    Ok(crate::ota::state::replace(path, text)?)
}

fn verify(place: &str, keys: &[TrustedKey], output: &Output) -> anyhow::Result<()> {
    let url = match place.contains("://") {
        true => place.trim_end_matches('/').to_owned(),
        false => {
            let folder = fs::canonicalize(place).with_context(|| place.to_owned())?;
            format!("file://{}", folder.display())
        }
    };
    let now = Timestamp::now();
    let document_url = format!("{url}/{DOCUMENT}");
    let read = |caches: &Caches| -> anyhow::Result<Release> {
        let document = caches.document(&document_url, MAX_BYTES)?;
        let signatures = caches.document(&format!("{document_url}.sig"), MAX_BYTES)?;
        Release::read(&document, &String::from_utf8_lossy(&signatures), keys, now)
            .map_err(|fault| anyhow::anyhow!("{document_url} {fault}"))
    };
    let with_keys = |keys: &[TrustedKey]| {
        Caches::new(cache::Settings {
            urls: vec![url.clone()],
            trusted_keys: keys.iter().map(|key| key.key.clone()).collect(),
            ..cache::Settings::default()
        })
    };
    let release = read(&with_keys(keys)?)?;
    if let Some(expires) = release.expires.filter(|expires| *expires <= now) {
        bail!("{document_url} has expired on {expires}");
    }
    let all: Vec<_> = keys.iter().cloned().chain(release.added_keys()?).collect();
    // Into an empty store all of it would have to go.
    let empty = tempfile::tempdir()?;
    fs::create_dir_all(empty.path().join("nix/store"))?;
    let store = store_dir::StoreDir::open(empty.path())?;
    let plan = cache::plan(&with_keys(&all)?, &store, &release.toplevel()?)?;
    let (paths, bytes) = (plan.closure.len(), plan.download_bytes);
    match output.json {
        true => output.value(&json!({ "release": release, "paths": paths, "download_bytes": bytes, "unpacked_bytes": plan.unpacked_bytes })),
        false => output.text(format!(
            "{} {} for {}: the signatures of the release and of its {paths} store paths are good ({bytes} bytes to fetch, {} unpacked).",
            release.product, release.version, release.system, plan.unpacked_bytes,
        )),
    }
}
