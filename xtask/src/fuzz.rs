//! Fuzzing, with cargo-fuzz and a nightly compiler.

use crate::child;
use crate::tree::Tree;
use anyhow::{Result, bail};
use std::process::{Command, Stdio};

/// Runs each of `targets`, or all there are, for `seconds`.
pub fn run(tree: &Tree, targets: &[String], seconds: u64) -> Result<()> {
    let fuzz = |args: &[&str]| {
        let mut command = Command::new("rustup");
        command
            .args(["run", "nightly", "cargo", "fuzz"])
            .args(args)
            .current_dir(&tree.root);
        command
    };
    let listed = fuzz(&["list"]).stderr(Stdio::inherit()).output();
    let Some(listed) = listed.ok().filter(|listed| listed.status.success()) else {
        bail!(
            "fuzzing needs a nightly compiler and cargo-fuzz: rustup toolchain install nightly; \
             cargo install cargo-fuzz"
        );
    };
    let known = String::from_utf8_lossy(&listed.stdout).into_owned();
    let known: Vec<&str> = known.lines().collect();
    if let Some(unknown) = targets.iter().find(|name| !known.contains(&name.as_str())) {
        bail!(
            "no fuzz target is called {unknown}; there are: {}",
            known.join(", ")
        );
    }
    let all_or_chosen = known
        .iter()
        .filter(|name| targets.is_empty() || targets.iter().any(|chosen| chosen == **name));
    for target in all_or_chosen {
        let limit = format!("-max_total_time={seconds}");
        // The code under test is safe Rust: assertions find what there is to find, and without the
        // sanitizer the dependencies written in C need no second build.
        child::run(&mut fuzz(&[
            "run",
            "--sanitizer",
            "none",
            target,
            "--",
            &limit,
        ]))?;
    }
    Ok(())
}
