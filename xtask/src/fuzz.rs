//! Fuzzing with libFuzzer, as cargo-fuzz does it, but with the compiler that everything else is built with.

use crate::child;
use crate::tree::Tree;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Has the compiler count what runs, which is what libFuzzer goes by. All of it is stable: only
/// sanitizers are not, and the code under test is safe Rust, in which assertions find what there is to
/// find.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Longest that one input may take, in seconds, and the memory that it may need, in MB.
const PATIENCE_S: u32 = 20;
const MEMORY_MB: u32 = 2048;

/// Runs each of `targets`, or all there are, for `seconds`.
pub fn run(tree: &Tree, targets: &[String], seconds: u64) -> Result<()> {
    let folder = tree.root.join("fuzz");
    let known = known(&folder.join("fuzz_targets"))?;
    if let Some(unknown) = targets.iter().find(|name| !known.contains(name)) {
        bail!(
            "no fuzz target is called {unknown}; there are: {}",
            known.join(", ")
        );
    }
    let host = host()?;
    let chosen: Vec<&String> = known
        .iter()
        .filter(|name| targets.is_empty() || targets.contains(name))
        .collect();
    let mut build = child::cargo();
    build
        .current_dir(&folder)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", FLAGS.join(" "))
        // Named, so that build scripts and macros get none of the flags.
        .args(["build", "--release", "--target", &host, "--target-dir"])
        .arg(folder.join("target"));
    for target in &chosen {
        build.args(["--bin", target]);
    }
    child::run(&mut build)?;
    for target in chosen {
        let folders = ["corpus", "artifacts"].map(|kind| folder.join(kind).join(target));
        for folder in &folders {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let [corpus, artifacts] = folders;
        println!("{target}, {seconds} s");
        let program = folder
            .join("target")
            .join(&host)
            .join("release")
            .join(target);
        child::run(
            Command::new(program)
                .current_dir(&folder)
                .arg(format!("-artifact_prefix={}/", artifacts.display()))
                .arg(format!("-max_total_time={seconds}"))
                .arg(format!("-timeout={PATIENCE_S}"))
                .arg(format!("-rss_limit_mb={MEMORY_MB}"))
                .arg("-print_final_stats=1")
                .arg(corpus),
        )?;
    }
    Ok(())
}

/// The targets in `folder`, by name.
fn known(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in folder
        .read_dir()
        .with_context(|| format!("cannot list {}", folder.display()))?
    {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(name) = path.file_stem()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// The target that this machine's compiler compiles for when it is told none.
fn host() -> Result<String> {
    let output = Command::new("rustc")
        .arg("-vV")
        .output()
        .context("cannot start rustc")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .find_map(|line| line.strip_prefix("host: "))
        .map(str::to_owned)
        .context("rustc -vV names no host")
}
