//! What can be said by evaluating: tests of the module, files that are made, outputs of the flake, and
//! whether the gateway takes what the module renders.

use super::{Made, keep_current};
use crate::child;
use crate::tree::Tree;
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::thread;

type Texts = BTreeMap<String, String>;

/// Nix, with a nixpkgs.
pub struct Evaluator {
    nixpkgs: PathBuf,
}

impl Evaluator {
    pub fn new(nixpkgs: PathBuf) -> Self {
        Evaluator { nixpkgs }
    }

    /// The value of `attribute`, or of all, in `file`.
    fn value<T: DeserializeOwned>(&self, file: &Path, attribute: Option<&str>) -> Result<T> {
        let output = self.evaluate(file, attribute)?;
        if !output.status.success() {
            bail!(
                "{}{} does not evaluate:\n{}",
                file.display(),
                attribute
                    .map(|name| format!(", {name},"))
                    .unwrap_or_default(),
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{} evaluates to what was not expected", file.display()))
    }

    fn evaluate(&self, file: &Path, attribute: Option<&str>) -> Result<Output> {
        let mut nix = Command::new("nix-instantiate");
        nix.args(["--eval", "--strict", "--json"])
            // Whoever builds elsewhere than he evaluates could not evaluate.
            .args(["--option", "allow-import-from-derivation", "false"])
            .args(["--option", "abort-on-warn", "true"])
            .arg("--argstr")
            .arg("nixpkgs")
            .arg(&self.nixpkgs)
            .arg(file)
            .stdin(Stdio::null());
        if let Some(attribute) = attribute {
            nix.args(["-A", attribute]);
        }
        nix.output().context("cannot start nix-instantiate")
    }

    /// Evaluates all of `attributes`, several at a time, and returns what `look` says of each that
    /// it has something to say about.
    fn each(
        &self,
        file: &Path,
        attributes: &[String],
        look: impl Fn(&str, Output) -> Option<String> + Sync,
    ) -> Result<Vec<String>> {
        // Each may take a gigabyte.
        let threads = thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4));
        let waiting = Mutex::new(attributes.iter());
        let complaints = Mutex::new(Vec::new());
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|_| {
                    scope.spawn(|| -> Result<()> {
                        loop {
                            let next = waiting.lock().expect("no holder panics").next();
                            let Some(attribute) = next else {
                                return Ok(());
                            };
                            let output = self.evaluate(file, Some(attribute))?;
                            if let Some(complaint) = look(attribute, output) {
                                complaints.lock().expect("no holder panics").push(complaint);
                            }
                        }
                    })
                })
                .collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().expect("a worker does not panic"))
        })?;
        Ok(complaints.into_inner().expect("no holder panics"))
    }
}

/// Returns what could not be checked, and why.
pub fn run(tree: &Tree, nix: &Evaluator, made: Made) -> Result<Vec<String>> {
    made_files(tree, nix, made)?;
    let mut left_out = Vec::new();
    module_tests(tree, nix)?;
    left_out.extend(gateway_takes_them(tree, nix)?);
    left_out.extend(test_scripts(tree, nix)?);
    outputs(tree, nix)?;
    Ok(left_out)
}

fn made_files(tree: &Tree, nix: &Evaluator, made: Made) -> Result<()> {
    let options: String = nix.value(&tree.root.join("tests/eval"), Some("optionsDoc"))?;
    keep_current(
        tree,
        &tree.root.join("docs/nixos-options.md"),
        &options,
        made,
    )?;

    for folder in [
        "tests/vm/fixture",
        "tests/ota/fixture",
        "tests/images/fixture",
    ] {
        let folder = tree.root.join(folder);
        let texts: Texts = nix.value(&folder.with_extension("nix"), None)?;
        for (name, text) in texts {
            keep_current(tree, &folder.join(name), &text, made)?;
        }
    }
    Ok(())
}

fn module_tests(tree: &Tree, nix: &Evaluator) -> Result<()> {
    let tests = tree.root.join("tests/eval");

    let failures: Vec<serde_json::Value> = nix.value(&tests, Some("failures"))?;
    for failure in &failures {
        eprintln!(
            "nix: {} failed\n  expected {}\n  got      {}",
            failure["name"], failure["expected"], failure["result"]
        );
    }

    let messages: Texts = nix.value(&tests, Some("messages"))?;
    let values: Vec<String> = messages
        .keys()
        .map(|name| format!("values.{name:?}"))
        .collect();
    let accepted = nix.each(&tests, &values, |attribute, output| {
        let name = attribute.trim_start_matches("values.").trim_matches('"');
        let stderr = String::from_utf8_lossy(&output.stderr);
        let is_rejected = !output.status.success() && stderr.contains(&messages[name]);
        (!is_rejected).then(|| {
            format!(
                "{name} failed\n  expected an error with: {}\n  got: {}{stderr}",
                messages[name],
                String::from_utf8_lossy(&output.stdout)
            )
        })
    })?;
    for failure in &accepted {
        eprintln!("nix: {failure}");
    }

    let count: usize = nix.value(&tests, Some("count"))?;
    let all = count + values.len();
    let failed = failures.len() + accepted.len();
    if failed > 0 {
        bail!("{failed} of {all} tests in tests/eval failed, see above");
    }
    eprintln!("nix: {all} tests in tests/eval passed");
    Ok(())
}

/// Shows what the module renders to the gateway, if that is built.
fn gateway_takes_them(tree: &Tree, nix: &Evaluator) -> Result<Vec<String>> {
    let gateway = tree.target.join("release/headgate");
    if !gateway.is_file() {
        return Ok(vec![
            "whether the gateway takes what the module renders: it is not built (cargo build --release)"
                .to_owned(),
        ]);
    }
    let tests = tree.root.join("tests/eval");
    let folder = tempfile::tempdir().context("cannot create a temporary folder")?;
    let write = |name: &str, text: &str| -> Result<PathBuf> {
        let file = folder.path().join(name);
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    };

    let configurations: Texts = nix.value(&tests, Some("configurations"))?;
    for (name, text) in &configurations {
        let file = write(&format!("{name}.toml"), text)?;
        child::run(
            Command::new(&gateway)
                .arg("--config")
                .arg(file)
                .args(["config", "check", "--no-files"])
                .stdout(Stdio::null()),
        )
        .with_context(|| {
            format!("the gateway does not take the configuration of `{name}` in tests/eval")
        })?;
    }

    let component = tree.apps_out().join("overheat-alarm/overheat-alarm.wasm");
    if !component.is_file() {
        return Ok(vec![
            "whether the gateway takes manifests: the apps are not built (cargo xtask apps)"
                .to_owned(),
        ]);
    }
    let manifests: Texts = nix.value(&tests, Some("manifests"))?;
    for (name, text) in &manifests {
        let file = write(&format!("{name}.manifest.toml"), text)?;
        child::run(
            Command::new(&gateway)
                .args(["app", "compile"])
                .arg(&component)
                .arg("--manifest")
                .arg(file)
                .args(["--name", name, "--output"])
                .arg(folder.path().join(name))
                .stdout(Stdio::null()),
        )
        .with_context(|| {
            format!("the gateway does not take the manifest of `{name}` in tests/eval")
        })?;
    }
    Ok(Vec::new())
}

/// The VM tests need KVM and hours; that their scripts are Python can be said here.
fn test_scripts(tree: &Tree, nix: &Evaluator) -> Result<Vec<String>> {
    let has_python = Command::new("python3")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !has_python {
        return Ok(vec![
            "the scripts of the VM tests: python3 is not installed".to_owned(),
        ]);
    }
    let file = tree.root.join("tests/eval/derivations.nix");
    let folder = tempfile::tempdir().context("cannot create a temporary folder")?;
    let names: Vec<String> = nix.value(&file, Some("scriptNames"))?;
    let attributes: Vec<String> = names
        .iter()
        .map(|name| format!("scripts.{name:?}"))
        .collect();
    let complaints = nix.each(&file, &attributes, |attribute, output| {
        let name = attribute.trim_start_matches("scripts.").trim_matches('"');
        let checked = script_compiles(folder.path(), name, &output);
        checked.err().map(|error| format!("{error:#}"))
    })?;
    complain(
        &complaints,
        "the script of a VM test in tests/nixos is wrong",
    )?;
    Ok(Vec::new())
}

fn script_compiles(folder: &Path, name: &str, output: &Output) -> Result<()> {
    if !output.status.success() {
        bail!(
            "{name}: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    let script: String = serde_json::from_slice(&output.stdout).context("the script is no text")?;
    let file = folder.join(format!("{name}.py"));
    fs::write(&file, script).with_context(|| format!("cannot write {}", file.display()))?;
    child::run(
        Command::new("python3")
            .args(["-m", "py_compile"])
            .arg(&file),
    )
}

/// Every output of the flake comes to a derivation.
fn outputs(tree: &Tree, nix: &Evaluator) -> Result<()> {
    let file = tree.root.join("tests/eval/derivations.nix");
    let names: Vec<String> = nix.value(&file, Some("names"))?;
    let attributes: Vec<String> = names
        .iter()
        .map(|name| format!("derivations.{name:?}"))
        .collect();
    let complaints = nix.each(&file, &attributes, |attribute, output| {
        (!output.status.success()).then(|| {
            let name = attribute.trim_start_matches("derivations.");
            format!(
                "{name}: {}",
                String::from_utf8_lossy(&output.stderr).trim_end()
            )
        })
    })?;
    complain(&complaints, "an output of the flake does not evaluate")?;
    eprintln!("nix: {} outputs of the flake evaluate", names.len());
    Ok(())
}

fn complain(complaints: &[String], what: &str) -> Result<()> {
    for complaint in complaints {
        eprintln!("nix: {complaint}");
    }
    if !complaints.is_empty() {
        bail!("{what}, see above");
    }
    Ok(())
}
