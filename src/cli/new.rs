//! `headgate app new`: a project to begin an app with.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;

use super::output::Output;
use crate::apps::{Defaults, Manifest};

/// Make a project for an app in Rust, with tests
///
/// The SDK comes with it: cargo needs nothing of Headgate's from anywhere else.
#[derive(Args)]
pub(super) struct NewArgs {
    /// The app's name: 1 to 64 of the characters a-z 0-9 _ . -
    name: String,
    /// Folder to make; it must not exist [default: NAME]
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
}

/// Files of the project, with their place in it. `NAME` and `PACKAGE` in them are replaced.
const PROJECT: [(&str, &str); 8] = [
    ("Cargo.toml", include_str!("../../templates/app/Cargo.toml")),
    (
        "manifest.toml",
        include_str!("../../templates/app/manifest.toml"),
    ),
    ("src/lib.rs", include_str!("../../templates/app/src/lib.rs")),
    (
        "tests/gateway.rs",
        include_str!("../../templates/app/tests/gateway.rs"),
    ),
    (
        "events.jsonl",
        include_str!("../../templates/app/events.jsonl"),
    ),
    (
        "expected.jsonl",
        include_str!("../../templates/app/expected.jsonl"),
    ),
    (".gitignore", include_str!("../../templates/app/gitignore")),
    ("README.md", include_str!("../../templates/app/README.md")),
];

macro_rules! files {
    ($($path:literal,)*) => { [$(($path, include_str!(concat!("../../", $path)))),*] };
}

/// The SDK and the interface, with their places in Headgate's sources. In a project they keep these,
/// below [`SDK_FOLDER`].
const SDK: [(&str, &str); 25] = files![
    "sdk/Cargo.toml",
    "sdk/macros/Cargo.toml",
    "sdk/macros/src/lib.rs",
    "sdk/src/allocator.rs",
    "sdk/src/clock.rs",
    "sdk/src/columns.rs",
    "sdk/src/config.rs",
    "sdk/src/gpio.rs",
    "sdk/src/guest.rs",
    "sdk/src/json.rs",
    "sdk/src/kv.rs",
    "sdk/src/lib.rs",
    "sdk/src/log.rs",
    "sdk/src/metrics.rs",
    "sdk/src/native.rs",
    "sdk/src/rate_limit.rs",
    "sdk/src/sensor.rs",
    "sdk/src/testing.rs",
    "sdk/src/timer.rs",
    "wit/deps/wasi-clocks/clocks.wit",
    "wit/deps/wasi-config/store.wit",
    "wit/deps/wasi-keyvalue/keyvalue.wit",
    "wit/deps/wasi-logging/logging.wit",
    "wit/deps/wasi-random/random.wit",
    "wit/world.wit",
];

const SDK_FOLDER: &str = "headgate";

pub(super) fn run(args: NewArgs, output: &Output) -> anyhow::Result<()> {
    let name = args.name;
    check_name(&name)?;
    let folder = args.path.unwrap_or_else(|| PathBuf::from(&name));
    fs::create_dir(&folder).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => anyhow::anyhow!(
            "{} is there already; name another folder with --path DIR",
            folder.display()
        ),
        _ => anyhow::anyhow!("cannot make {}: {error}", folder.display()),
    })?;
    if let Err(error) = write_project(&name, &folder) {
        // Only what was made just now is in it. If this fails too, the first error says why.
        let _ = fs::remove_dir_all(&folder);
        return Err(error);
    }
    if output.json {
        return output.value(&serde_json::json!({ "app": name, "path": folder }));
    }
    output.text(format!(
        "{name} is in {0}; try `headgate app test {0}`",
        folder.display()
    ))
}

/// The rules are the manifest's.
fn check_name(name: &str) -> anyhow::Result<()> {
    let manifest = format!(
        "name = {}\nversion = \"0.1.0\"\nsubscribe = [\"a\"]\n",
        toml::Value::from(name)
    );
    match Manifest::parse(&manifest, &Defaults::new(1)) {
        Ok(_) => Ok(()),
        Err(error) => bail!("{}", error.message),
    }
}

fn write_project(name: &str, folder: &Path) -> anyhow::Result<()> {
    let package = package_name(name);
    for (path, template) in PROJECT {
        let text = template.replace("NAME", name).replace("PACKAGE", &package);
        write(&folder.join(path), &text)?;
    }
    for (path, text) in SDK {
        let text = match path.ends_with("Cargo.toml") {
            true => without_workspace(text),
            false => text.to_owned(),
        };
        write(&folder.join(SDK_FOLDER).join(path), &text)?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let folder = path.parent().expect("it has one");
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, text))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// A name for cargo, which takes no dots and no digit at the beginning, and for a crate, which must not
/// be called like a word or a crate of Rust's.
fn package_name(name: &str) -> String {
    const TAKEN: [&str; 18] = [
        "alloc",
        "as",
        "async",
        "break",
        "const",
        "core",
        "crate",
        "dyn",
        "else",
        "enum",
        "fn",
        "for",
        "headgate-sdk",
        "if",
        "proc_macro",
        "serde",
        "std",
        "test",
    ];
    let package = name.replace('.', "-");
    let begins_well = package.starts_with(|c: char| c.is_ascii_lowercase());
    match begins_well && !TAKEN.contains(&&*package) {
        true => package,
        false => format!("app-{package}"),
    }
}

/// The manifest of a crate that was a member of a workspace with lints of its own.
fn without_workspace(manifest: &str) -> String {
    let kept = manifest
        .lines()
        .filter(|line| !line.starts_with("workspace = \""))
        .map(|line| format!("{line}\n"));
    kept.collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn files_below(folder: &Path, found: &mut BTreeSet<String>, root: &Path) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let is_built = path.ends_with("target") || path.ends_with("Cargo.lock");
            if path.is_dir() && !is_built {
                files_below(&path, found, root);
            } else if !is_built {
                let path = path.strip_prefix(root).unwrap();
                found.insert(path.to_str().unwrap().to_owned());
            }
        }
    }

    #[test]
    fn the_whole_sdk_is_in_a_project() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut there = BTreeSet::new();
        files_below(&root.join("sdk"), &mut there, root);
        files_below(&root.join("wit"), &mut there, root);
        let listed: BTreeSet<_> = SDK.iter().map(|(path, _)| (*path).to_owned()).collect();
        assert_eq!(listed, there);
    }

    #[test]
    fn a_project_is_whole_and_its_manifest_is_right() {
        let folder = tempfile::tempdir().unwrap();
        let project = folder.path().join("p");
        fs::create_dir(&project).unwrap();
        write_project("press.v2", &project).unwrap();
        let read = |path: &str| fs::read_to_string(project.join(path)).unwrap();
        let manifest = Manifest::parse(&read("manifest.toml"), &Defaults::new(1)).unwrap();
        assert_eq!(manifest.name, "press.v2");
        assert!(read("Cargo.toml").contains("name = \"press-v2\""));
        assert!(read("README.md").starts_with("# press.v2\n"));
        for manifest in ["headgate/sdk/Cargo.toml", "headgate/sdk/macros/Cargo.toml"] {
            assert!(!read(manifest).contains("../"), "{manifest}");
        }
    }

    #[test]
    fn a_name_that_cargo_would_not_take_is_made_one_that_it_does() {
        for (name, package) in [
            ("press", "press"),
            ("a.b_c-d", "a-b_c-d"),
            ("7up", "app-7up"),
            ("test", "app-test"),
            ("headgate-sdk", "app-headgate-sdk"),
        ] {
            assert_eq!(package_name(name), package);
        }
    }

    #[test]
    fn the_rules_for_names_are_the_manifests() {
        assert!(check_name("press.v2").is_ok());
        for name in [
            "",
            "Press",
            "a/b",
            "-a",
            "../a",
            "a\"b",
            "a\nb",
            &"a".repeat(65),
        ] {
            let error = check_name(name).unwrap_err().to_string();
            assert!(error.contains("is no name for an app"), "{error}");
        }
    }
}
